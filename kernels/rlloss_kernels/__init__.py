"""Fused per-token log-prob kernels; knows nothing of rlloss."""
