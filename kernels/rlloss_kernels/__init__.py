"""Fused per-token log-prob kernels; knows nothing of rlloss."""

from rlloss_kernels.blocks import statistics_dtype
from rlloss_kernels.statistics import STATISTICS
from rlloss_kernels.tiled import linear_statistics, logits_statistics

__all__ = ["STATISTICS", "linear_statistics", "logits_statistics", "statistics_dtype"]
