"""The specification: every formula in float64, as scalar loops straight from its paper, with NumPy only.

Nothing here is fast, and nothing is shared with the losses that it judges. Arguments are array-likes. Whatever a
paper stops the gradient through reads `frozen_logprobs`: central differences then give the paper's gradient.
"""

from rlloss.reference.advantages import gae, group_advantages, informative_groups, whiten
from rlloss.reference.advantages_named import gdpo_advantages, pass_at_k_advantages, preset_advantages
from rlloss.reference.advantages_tokens import optimal_token_baseline, returns_to_go, turn_advantages
from rlloss.reference.conservative import conservative_ppo
from rlloss.reference.correction import importance_weights, top_entropy
from rlloss.reference.critic import actor_critic, value
from rlloss.reference.divergence import kl, kl_k1, kl_k2, kl_k3
from rlloss.reference.importance import importance_sampling
from rlloss.reference.likelihood import dft, distillation, divergence_of, sft, top_k_divergence, xpo
from rlloss.reference.logprobs import linear_stats, token_stats
from rlloss.reference.pairs import apo_down, apo_zero, bco_pair, beta_dpo, cal_dpo, nca, sppo, tdpo
from rlloss.reference.pairs_free import alpha_po, cpo, desensitized_logps, orpo, tpo, wpo_weights
from rlloss.reference.pairs_margin import discopop, exo, hinge, robust
from rlloss.reference.pairs_ranked import aot, aot_unpaired
from rlloss.reference.policy import dapo, dr_grpo, grpo, gspo, policy_metrics, ppo, reinforce, rloo
from rlloss.reference.preference import bradley_terry, divergence_score, dpo, ipo, kto, kto_kl, simpo
from rlloss.reference.regions import (
    a_star_po,
    binary_divergence,
    cpgd,
    decoupled_ppo,
    dppo,
    dro,
    kimi,
    opsm,
    optimal_value,
)
from rlloss.reference.rewards import (
    davidson,
    margin_ranking,
    plackett_luce,
    process_reward,
    rao_kupper,
    reward_regression,
)
from rlloss.reference.selective import clip_cov, kl_cov, m2po
from rlloss.reference.sequence import gmpo, gspo_token, luspo, sapo
from rlloss.reference.shaping import adaptive_kl_coef, kl_shaped_rewards, overlong_penalty
from rlloss.reference.unpaired import apo_zero_unpaired, bco
from rlloss.reference.weighted import a2c, cispo, gpg, tis, topr, vespo

__all__ = [
    "a2c",
    "a_star_po",
    "actor_critic",
    "adaptive_kl_coef",
    "alpha_po",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "bco",
    "bco_pair",
    "beta_dpo",
    "binary_divergence",
    "bradley_terry",
    "cal_dpo",
    "cispo",
    "clip_cov",
    "conservative_ppo",
    "cpgd",
    "cpo",
    "dapo",
    "davidson",
    "decoupled_ppo",
    "desensitized_logps",
    "dft",
    "discopop",
    "distillation",
    "divergence_of",
    "divergence_score",
    "dpo",
    "dppo",
    "dr_grpo",
    "dro",
    "exo",
    "gae",
    "gdpo_advantages",
    "gmpo",
    "gpg",
    "group_advantages",
    "grpo",
    "gspo",
    "gspo_token",
    "hinge",
    "importance_sampling",
    "importance_weights",
    "informative_groups",
    "ipo",
    "kimi",
    "kl",
    "kl_cov",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_rewards",
    "kto",
    "kto_kl",
    "linear_stats",
    "luspo",
    "m2po",
    "margin_ranking",
    "nca",
    "opsm",
    "optimal_token_baseline",
    "optimal_value",
    "orpo",
    "overlong_penalty",
    "pass_at_k_advantages",
    "plackett_luce",
    "policy_metrics",
    "ppo",
    "preset_advantages",
    "process_reward",
    "rao_kupper",
    "reinforce",
    "returns_to_go",
    "reward_regression",
    "rloo",
    "robust",
    "sapo",
    "sft",
    "simpo",
    "sppo",
    "tdpo",
    "tis",
    "token_stats",
    "top_entropy",
    "top_k_divergence",
    "topr",
    "tpo",
    "turn_advantages",
    "value",
    "vespo",
    "whiten",
    "wpo_weights",
    "xpo",
]
