"""Runs of the command label: checks before it, the journal, the output, resuming."""
