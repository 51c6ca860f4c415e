"""The specification: every formula in float64, as scalar loops straight from its paper, with NumPy only.

Nothing here is fast, and nothing is shared with the losses that it judges. Arguments are array-likes. Whatever a
paper stops the gradient through reads `frozen_logprobs`: central differences then give the paper's gradient.
"""

from rlloss.reference.advantages import group_advantages
from rlloss.reference.divergence import kl, kl_k1, kl_k2, kl_k3
from rlloss.reference.likelihood import sft
from rlloss.reference.logprobs import linear_stats, token_stats
from rlloss.reference.policy import conservative_ppo, dr_grpo, grpo, gspo, policy_metrics
from rlloss.reference.preference import dpo

__all__ = [
    "conservative_ppo",
    "dpo",
    "dr_grpo",
    "group_advantages",
    "grpo",
    "gspo",
    "kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "linear_stats",
    "policy_metrics",
    "sft",
    "token_stats",
]
