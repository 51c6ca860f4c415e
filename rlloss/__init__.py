"""Standalone RLHF and RL losses in pure PyTorch, the log-prob primitive under them and a small loop above them."""

import importlib
from typing import TYPE_CHECKING, Any

from rlloss.advantages.gae import gae, length_adaptive_lambda, returns_to_go
from rlloss.advantages.gdpo import gdpo_advantages
from rlloss.advantages.group import group_advantages, informative_groups
from rlloss.advantages.nash_md import nash_md_advantages
from rlloss.advantages.optimal_value import optimal_value
from rlloss.advantages.pass_at_k import pass_at_k_advantages
from rlloss.advantages.presets import list_advantages, preset_advantages
from rlloss.advantages.rows import joint_ids
from rlloss.advantages.running import (
    AdaptiveEntropyController,
    AdaptiveKLController,
    FixedKLController,
    RunningRewardNorm,
)
from rlloss.advantages.running_baseline import RunningBaseline
from rlloss.advantages.shaping import kl_shaped_rewards, overlong_penalty
from rlloss.advantages.teacher import distillation_advantages, minillm_advantages
from rlloss.advantages.tokens import optimal_token_baseline, turn_advantages
from rlloss.advantages.whiten import whiten
from rlloss.correction import Correction, importance_correction, top_entropy_correction
from rlloss.divergence import (
    TokenDivergences,
    kl_abs,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_term,
    linear_divergences,
    token_divergences,
)
from rlloss.doctor import Diagnosis, Finding, doctor, doctor_rows
from rlloss.likelihood import LikelihoodLoss
from rlloss.logprobs import TokenStats, linear_logprobs, sequence_logps, sequence_mean_logps, token_logprobs
from rlloss.losses.a2c import A2CLoss
from rlloss.losses.a_star_po import AStarPOLoss
from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.alpha_po import AlphaPOLoss
from rlloss.losses.aot import AOTLoss
from rlloss.losses.aot_unpaired import AOTUnpairedLoss
from rlloss.losses.apo_down import APODownLoss
from rlloss.losses.apo_zero import APOZeroLoss
from rlloss.losses.apo_zero_unpaired import APOZeroUnpairedLoss
from rlloss.losses.bco import BCOLoss
from rlloss.losses.bco_pair import BCOPairLoss
from rlloss.losses.beta_dpo import BetaDPOLoss
from rlloss.losses.bradley_terry import BradleyTerryLoss
from rlloss.losses.cal_dpo import CalDPOLoss
from rlloss.losses.cispo import CISPOLoss
from rlloss.losses.clip_cov import ClipCovLoss
from rlloss.losses.conservative_ppo import ConservativePPOLoss
from rlloss.losses.cpgd import CPGDLoss
from rlloss.losses.cpo import CPOLoss
from rlloss.losses.dapo import DAPOLoss
from rlloss.losses.davidson import DavidsonLoss
from rlloss.losses.decoupled_ppo import DecoupledPPOLoss
from rlloss.losses.dft import DFTLoss
from rlloss.losses.discopop import DiscoPOPLoss
from rlloss.losses.distillation import DistillationLoss
from rlloss.losses.dpo import DPOLoss
from rlloss.losses.dppo import DPPOLoss
from rlloss.losses.dr_grpo import DrGRPOLoss
from rlloss.losses.dro import DROLoss
from rlloss.losses.exo import EXOLoss
from rlloss.losses.gmpo import GMPOLoss
from rlloss.losses.gpg import GPGLoss
from rlloss.losses.grpo import GRPOLoss
from rlloss.losses.gspo import GSPOLoss
from rlloss.losses.gspo_token import GSPOTokenLoss
from rlloss.losses.hinge import HingeLoss
from rlloss.losses.importance_sampling import ImportanceSamplingLoss
from rlloss.losses.ipo import IPOLoss
from rlloss.losses.kimi import KimiLoss
from rlloss.losses.kl_cov import KLCovLoss
from rlloss.losses.kto import KTOLoss, kto_kl
from rlloss.losses.luspo import LUSPOLoss
from rlloss.losses.m2po import M2POLoss
from rlloss.losses.margin_ranking import MarginRankingLoss
from rlloss.losses.nca import NCALoss
from rlloss.losses.opsm import OPSMLoss
from rlloss.losses.orpo import ORPOLoss
from rlloss.losses.plackett_luce import PlackettLuceLoss
from rlloss.losses.ppo import PPOLoss
from rlloss.losses.process_reward import ProcessRewardLoss
from rlloss.losses.rao_kupper import RaoKupperLoss
from rlloss.losses.reinforce import REINFORCELoss
from rlloss.losses.reward_regression import RewardRegressionLoss
from rlloss.losses.rloo import RLOOLoss
from rlloss.losses.robust import RobustDPOLoss
from rlloss.losses.sapo import SAPOLoss
from rlloss.losses.sft import SFTLoss
from rlloss.losses.simpo import SimPOLoss
from rlloss.losses.sppo import SPPOLoss
from rlloss.losses.tdpo import TDPOLoss
from rlloss.losses.tis import TISLoss
from rlloss.losses.topr import TOPRLoss
from rlloss.losses.tpo import TPOLoss
from rlloss.losses.value import ValueLoss
from rlloss.losses.vespo import VESPOLoss
from rlloss.losses.xpo import XPOLoss
from rlloss.models import hidden_logprobs, model_hidden, model_logprobs
from rlloss.output import (
    EffectiveSampleSize,
    ExplainedVariance,
    LossOutput,
    Max,
    Mean,
    Metric,
    Min,
    Moments,
    combine,
    merge_metrics,
    scalars,
    waist_gradient,
)
from rlloss.parallel import VocabShard
from rlloss.policy import PolicyBatch, PolicyLoss, PolicyOptions
from rlloss.policy_surrogates import (
    ClippedPolicyLoss,
    QuadraticPolicyLoss,
    SelectivePolicyLoss,
    TruncatedPolicyLoss,
    WeightedPolicyLoss,
)
from rlloss.preference import PreferenceLoss, logistic_loss
from rlloss.preference_inputs import desensitized_logps, divergence_score, log1mexp, power_score, wpo_weights
from rlloss.preference_margins import (
    MarginLoss,
    MarginOptions,
    MeanPreferenceLoss,
    RankedLoss,
    ReferenceFreeLoss,
    StepStatisticLoss,
)
from rlloss.protocol import Loss
from rlloss.reduce import (
    Counts,
    count,
    last_tokens,
    prompt_mean_weights,
    reduce_sequences,
    reduce_tokens,
    sequence_lengths,
    sequence_mean,
    sequence_sum,
    shift,
    to_tokens,
)
from rlloss.registry import get_loss, list_losses
from rlloss.scalar import ScalarModel
from rlloss.scored_pairs import ScoredPairLoss, TiedPairLoss
from rlloss.surrogate import clipped_surrogate, log_ratios
from rlloss.top_k import top_k_divergence, top_k_logprobs
from rlloss.unpaired import UnpairedLoss

__version__ = "0.1.0"

__all__ = [
    # losses
    "A2CLoss",
    "AOTLoss",
    "AOTUnpairedLoss",
    "APODownLoss",
    "APOZeroLoss",
    "APOZeroUnpairedLoss",
    "AStarPOLoss",
    "ActorCriticLoss",
    "AlphaPOLoss",
    "BCOLoss",
    "BCOPairLoss",
    "BetaDPOLoss",
    "BradleyTerryLoss",
    "CISPOLoss",
    "CPGDLoss",
    "CPOLoss",
    "CalDPOLoss",
    "ClipCovLoss",
    "ConservativePPOLoss",
    "DAPOLoss",
    "DFTLoss",
    "DPOLoss",
    "DPPOLoss",
    "DROLoss",
    "DavidsonLoss",
    "DecoupledPPOLoss",
    "DiscoPOPLoss",
    "DistillationLoss",
    "DrGRPOLoss",
    "EXOLoss",
    "GMPOLoss",
    "GPGLoss",
    "GRPOLoss",
    "GSPOLoss",
    "GSPOTokenLoss",
    "HingeLoss",
    "IPOLoss",
    "ImportanceSamplingLoss",
    "KLCovLoss",
    "KTOLoss",
    "KimiLoss",
    "LUSPOLoss",
    "M2POLoss",
    "MarginRankingLoss",
    "NCALoss",
    "OPSMLoss",
    "ORPOLoss",
    "PPOLoss",
    "PlackettLuceLoss",
    "ProcessRewardLoss",
    "REINFORCELoss",
    "RLOOLoss",
    "RaoKupperLoss",
    "RewardRegressionLoss",
    "RobustDPOLoss",
    "SAPOLoss",
    "SFTLoss",
    "SPPOLoss",
    "SimPOLoss",
    "TDPOLoss",
    "TISLoss",
    "TOPRLoss",
    "TPOLoss",
    "VESPOLoss",
    "ValueLoss",
    "XPOLoss",
    "get_loss",
    "kto_kl",
    "list_losses",
    # the waist: per-token log-probs from logits, a head or a model; values and scores from a model
    "ScalarModel",
    "TokenDivergences",
    "TokenStats",
    "VocabShard",
    "hidden_logprobs",
    "linear_divergences",
    "linear_logprobs",
    "model_hidden",
    "model_logprobs",
    "sequence_logps",
    "sequence_mean_logps",
    "shift",
    "token_divergences",
    "token_logprobs",
    "top_k_divergence",
    "top_k_logprobs",
    # rewards in, advantages out
    "AdaptiveEntropyController",
    "AdaptiveKLController",
    "FixedKLController",
    "RunningBaseline",
    "RunningRewardNorm",
    "distillation_advantages",
    "gae",
    "gdpo_advantages",
    "group_advantages",
    "informative_groups",
    "joint_ids",
    "kl_shaped_rewards",
    "length_adaptive_lambda",
    "list_advantages",
    "minillm_advantages",
    "nash_md_advantages",
    "optimal_token_baseline",
    "optimal_value",
    "overlong_penalty",
    "pass_at_k_advantages",
    "preset_advantages",
    "returns_to_go",
    "turn_advantages",
    "whiten",
    # which tokens count how much: off-policy corrections and selections, for `token_weights`
    "Correction",
    "importance_correction",
    "top_entropy_correction",
    # what a loss is made of
    "clipped_surrogate",
    "desensitized_logps",
    "divergence_score",
    "kl_abs",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_term",
    "last_tokens",
    "log1mexp",
    "log_ratios",
    "logistic_loss",
    "power_score",
    "prompt_mean_weights",
    "reduce_sequences",
    "reduce_tokens",
    "sequence_lengths",
    "sequence_mean",
    "sequence_sum",
    "to_tokens",
    "wpo_weights",
    # the protocol
    "ClippedPolicyLoss",
    "Counts",
    "EffectiveSampleSize",
    "ExplainedVariance",
    "LikelihoodLoss",
    "Loss",
    "LossOutput",
    "MarginLoss",
    "MarginOptions",
    "Max",
    "Mean",
    "MeanPreferenceLoss",
    "Metric",
    "Min",
    "Moments",
    "PolicyBatch",
    "PolicyLoss",
    "PolicyOptions",
    "PreferenceLoss",
    "QuadraticPolicyLoss",
    "RankedLoss",
    "ReferenceFreeLoss",
    "ScoredPairLoss",
    "SelectivePolicyLoss",
    "StepStatisticLoss",
    "TiedPairLoss",
    "TruncatedPolicyLoss",
    "UnpairedLoss",
    "WeightedPolicyLoss",
    "combine",
    "count",
    "merge_metrics",
    "scalars",
    "waist_gradient",
    # what is wrong with a batch or a data file, before it is trained on
    "Diagnosis",
    "Finding",
    "doctor",
    "doctor_rows",
    # the loop and the trainer above it (import transformers, datasets and safetensors when first touched)
    "Session",
    "create_rl_trainer",
    "train_offline",
    "train_online",
]

_LAZY = {
    "Session": "rlloss.loop",
    "create_rl_trainer": "rlloss.trainer",
    "train_offline": "rlloss.loop",
    "train_online": "rlloss.loop",
}

if TYPE_CHECKING:
    from rlloss.loop import Session, train_offline, train_online
    from rlloss.trainer import create_rl_trainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'rlloss' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
