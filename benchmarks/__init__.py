"""Measurements. Each module is run as `python -m benchmarks.NAME` and ends with one JSON line."""
