"""Proof: the metrics of a bundle beside its original, its calibration, its card."""
