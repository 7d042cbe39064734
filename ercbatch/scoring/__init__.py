"""Scoring: log probabilities of the labels, from one of several runtimes."""
