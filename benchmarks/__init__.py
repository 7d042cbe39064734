"""Measurements. Most modules are run as `python -m benchmarks.NAME` and end with one JSON line."""
