"""The specification: every formula in float64, as scalar loops straight from its paper, with NumPy only.

Nothing here is fast, and nothing is shared with the losses that it judges. Arguments are array-likes. Whatever a
paper stops the gradient through reads `frozen_logprobs`: central differences then give the paper's gradient.
"""

from rlloss.reference.advantages import gae, group_advantages, informative_groups, whiten
from rlloss.reference.conservative import conservative_ppo
from rlloss.reference.critic import actor_critic, value
from rlloss.reference.divergence import kl, kl_k1, kl_k2, kl_k3
from rlloss.reference.importance import importance_sampling
from rlloss.reference.likelihood import sft
from rlloss.reference.logprobs import linear_stats, token_stats
from rlloss.reference.policy import dapo, dr_grpo, grpo, gspo, policy_metrics, ppo, reinforce, rloo
from rlloss.reference.preference import bradley_terry, dpo, ipo, kto, kto_kl, simpo
from rlloss.reference.shaping import adaptive_kl_coef, kl_shaped_rewards, overlong_penalty

__all__ = [
    "actor_critic",
    "adaptive_kl_coef",
    "bradley_terry",
    "conservative_ppo",
    "dapo",
    "dpo",
    "dr_grpo",
    "gae",
    "group_advantages",
    "grpo",
    "gspo",
    "importance_sampling",
    "informative_groups",
    "ipo",
    "kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "kto",
    "kto_kl",
    "linear_stats",
    "overlong_penalty",
    "policy_metrics",
    "ppo",
    "reinforce",
    "rloo",
    "sft",
    "simpo",
    "token_stats",
    "value",
    "whiten",
]
