"""Trained models to bundles: merge, trace, quantize, measure, write."""

from ercbatch.scoring.hidden_kernels import hide_kernels

hide_kernels()
