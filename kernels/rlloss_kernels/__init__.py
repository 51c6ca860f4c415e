"""Fused per-token log-prob kernels; knows nothing of rlloss."""

from rlloss_kernels.blocks import statistics_dtype
from rlloss_kernels.kept import kept_logits
from rlloss_kernels.linear import linear_statistics
from rlloss_kernels.logits import logits_statistics
from rlloss_kernels.statistics import STATISTICS

__all__ = ["STATISTICS", "kept_logits", "linear_statistics", "logits_statistics", "statistics_dtype"]
