"""Fused per-token log-prob kernels; knows nothing of rlloss."""

from rlloss_kernels.blocks import statistics_dtype
from rlloss_kernels.implementation import IMPLEMENTATIONS, why_not_triton
from rlloss_kernels.kept import kept_logits
from rlloss_kernels.linear import linear_statistics
from rlloss_kernels.logits import logits_statistics
from rlloss_kernels.pair import DIVERGENCES
from rlloss_kernels.recurrence import reverse_recurrence_
from rlloss_kernels.statistics import STATISTICS
from rlloss_kernels.two_heads import linear_divergences
from rlloss_kernels.two_logits import logits_divergences

__all__ = [
    "DIVERGENCES",
    "IMPLEMENTATIONS",
    "STATISTICS",
    "kept_logits",
    "linear_divergences",
    "linear_statistics",
    "logits_divergences",
    "logits_statistics",
    "reverse_recurrence_",
    "statistics_dtype",
    "why_not_triton",
]
