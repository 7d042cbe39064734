"""Retrieval: the bank of demonstrations, its encoder and its index."""
