"""The terminal: signals, standard streams, progress, and text for people."""
