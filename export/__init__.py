"""Trained models to bundles: merge, trace, quantize, measure, write."""
