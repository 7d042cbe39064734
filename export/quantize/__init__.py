"""Quantization: int8 and int4 weights, rounded with the statistics of activations."""
