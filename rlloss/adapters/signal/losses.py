"""Signal's loss names, each with what it reads of a batch, and the library's loss that stands behind it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import repeat

from rlloss.adapters.signal.advantages import given_or_centred_advantages, spread, take_advantages, take_old_logprobs
from rlloss.adapters.signal.batches import BatchData, answer_rows, check_finite, language_rows, pair_rows
from rlloss.adapters.signal.reported import ReportedImportanceSampling, ReportedPolicy, ReportedRewards
from rlloss.adapters.signal.run import Reference, Run
from rlloss.advantages.group import group_advantages
from rlloss.loop.batch import Batch
from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.bradley_terry import BradleyTerryLoss
from rlloss.losses.conservative_ppo import ConservativePPOLoss
from rlloss.losses.dpo import DPOLoss
from rlloss.losses.grpo import GRPOLoss
from rlloss.losses.importance_sampling import ImportanceSamplingLoss
from rlloss.losses.ppo import PPOLoss
from rlloss.losses.sft import SFTLoss
from rlloss.losses.value import ValueLoss
from rlloss.output import Mean
from rlloss.protocol import Loss
from rlloss.reduce import sequence_mean

__all__ = [
    "Step",
    "causal_lm",
    "conservative_ppo",
    "dpo",
    "enhanced_ppo",
    "grpo",
    "importance_sampling",
    "ppo",
    "reward_modeling",
]

Numbers = dict[str, float]


class Step(NamedTuple):
    """One forward_backward: the loop's batch, the loss, and Signal's metrics from the loss's own numbers."""

    batch: Batch
    loss_fn: Loss
    report: Callable[[Numbers], Numbers]


def causal_lm(run: Run, data: BatchData) -> Step:
    """Cross-entropy of the tokens that count: `SFTLoss`."""
    return Step(language_rows(data).batch, SFTLoss(), _likelihood)


def dpo(
    run: Run,
    data: BatchData,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reference_model: Reference = None,
) -> Step:
    """Preferences against a reference: `DPOLoss`."""
    batch = pair_rows(data)
    batch.fields |= run.ref_logprobs(data.who, batch, reference_model, "the loss")
    return Step(
        batch,
        DPOLoss(beta=beta, label_smoothing=label_smoothing),
        lambda n: {
            "implicit_reward": n["margin"],
            "chosen_reward": n["chosen_reward"],
            "rejected_reward": n["rejected_reward"],
            "reward_margin": n["margin"],
            "preference_accuracy": n["accuracy"],
        },
    )


def grpo(
    run: Run, data: BatchData, *, beta: float = 0.01, clip_epsilon: float = 0.2, reference_model: Reference = None
) -> Step:
    """Samples of a prompt against each other: `GRPOLoss` over `group_advantages`."""
    rewards = data.floats("rewards", 2)
    check_finite(data.who, "rewards", rewards)
    response_shape = list(data.ids("response_ids", 3).shape)
    if list(rewards.shape) != response_shape[:2]:
        raise ValueError(
            f"{data.who}: rewards must be {response_shape[:2]}, one per response, got {list(rewards.shape)}"
        )
    prompts, num_samples = rewards.shape
    if num_samples < 2:
        raise ValueError(f"{data.who}: compares the samples of a prompt with each other, and needs at least 2, got 1")
    rows = answer_rows(data, num_samples=num_samples)
    groups = repeat(torch.arange(prompts), "prompts -> (prompts samples)", samples=num_samples)
    advantages = group_advantages(rewards.flatten(), groups)
    rows.batch.fields["advantages"] = advantages
    take_old_logprobs(rows, data.per_response("old_log_probs") if "old_log_probs" in data else None)
    rows.batch.fields |= run.ref_logprobs(data.who, rows.batch, reference_model, f"{beta=}" if beta else None)
    known = {
        "mean_reward": float(rewards.mean()),
        "advantage_std": float(advantages.std(correction=0)),
        "num_samples": float(num_samples),
    }
    clip = _clip(clip_epsilon)
    loss_fn = ReportedPolicy(GRPOLoss(**clip, kl_coef=beta), GRPOLoss(**clip))
    return Step(rows.batch, loss_fn, lambda n: {"policy_loss": n["policy_loss"], **_kl(n), **known})


def ppo(
    run: Run,
    data: BatchData,
    *,
    beta: float = 0.01,
    clip_epsilon: float = 0.2,
    gamma: float = 0.99,
    reference_model: Reference = None,
) -> Step:
    """PPO with a critic on prompts and responses: `ActorCriticLoss`, with fixed coefficients."""
    rows = answer_rows(data)
    of_batch = {n: data.per_response(n) if n in data else None for n in ("old_log_probs", "values", "old_values")}
    rewards = data.floats("rewards", 1, 2)
    rewards = rows.rewards(rewards if rewards.ndim == 1 else data.per_response("rewards"))
    known = take_advantages(run, rows, rewards, gamma, 0.95, **of_batch)
    rows.batch.fields |= run.ref_logprobs(data.who, rows.batch, reference_model, f"{beta=}" if beta else None)
    return Step(
        rows.batch,
        _actor_critic(data.who, clip_epsilon, beta, entropy_coef=0.01, value_coef=0.5, value_clip=clip_epsilon),
        lambda n: {
            "policy_loss": n["policy_loss"],
            "value_loss": n["value_loss"],
            "entropy": n["entropy"],
            "mean_advantage": known["advantage_mean"],
            "advantage_std": known["advantage_std"],
        },
    )


def enhanced_ppo(
    run: Run,
    data: BatchData,
    *,
    beta: float = 0.01,
    clip_epsilon: float = 0.2,
    value_loss_coef: float = 0.5,
    entropy_coef: float = 0.01,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    use_gae: bool = True,
    clip_value_loss: bool = True,
    max_grad_norm: float | None = None,  # of the update that follows: the client's
    reference_model: Reference = None,
) -> Step:
    """PPO with a critic: `ActorCriticLoss` over `gae`."""
    rows = language_rows(data)
    of_batch = {n: data.floats(n, 2) if n in data else None for n in ("old_log_probs", "values", "old_values")}
    rewards = rows.rewards(data.floats("rewards", 1, 2))
    known = take_advantages(run, rows, rewards, gamma, gae_lambda if use_gae else 1.0, **of_batch)
    rows.batch.fields |= run.ref_logprobs(data.who, rows.batch, reference_model, f"{beta=}" if beta else None)
    value_clip = clip_epsilon if clip_value_loss else None
    return Step(
        rows.batch,
        _actor_critic(data.who, clip_epsilon, beta, entropy_coef, value_loss_coef, value_clip),
        lambda n: {
            "policy_loss": n["policy_loss"],
            "value_loss": n["value_loss"],
            "entropy": n["entropy"],
            **_kl(n),
            "approx_kl": n["approx_kl"],
            "clip_fraction": n["clip_frac"],
            "explained_variance": n["explained_variance"],
            "value_mean": n["value"],
            **known,
        },
    )


def importance_sampling(
    run: Run, data: BatchData, *, beta: float = 0.1, clip_ratio: float = 10.0, reference_model: Reference = None
) -> Step:
    """The off-policy policy gradient: `ImportanceSamplingLoss` on the weights of whole sequences."""
    rows = language_rows(data)
    behavior = data.floats("behavior_log_probs", 1, 2)
    per_token = behavior.ndim == 2
    old_logprobs = rows.place("behavior_log_probs", behavior) if per_token else spread(run, rows, behavior)
    advantages = given_or_centred_advantages(rows, data)
    rows.batch.fields |= {"old_logprobs": old_logprobs, "advantages": advantages}
    rows.batch.fields |= run.ref_logprobs(data.who, rows.batch, reference_model, f"{beta=}" if beta else None)
    clip: dict[str, Any] = {"ratio_min": 1 / clip_ratio, "ratio_max": clip_ratio}
    mask = rows.batch.loss_mask
    known = {"advantage_mean": float(Mean.of(sequence_mean(advantages, mask), mask.any(-1)))}
    return Step(
        rows.batch,
        ReportedImportanceSampling(ImportanceSamplingLoss(**clip, kl_coef=beta), ImportanceSamplingLoss(**clip)),
        lambda n: {
            "policy_loss": n["policy_loss"],
            "kl_penalty": n["penalty"],
            "is_ratio_mean": n["is_ratio"],
            "is_ratio_max": n["is_ratio_max"],
            "is_ratio_min": n["is_ratio_min"],
            "clipped_fraction": n["is_clipped"],
            **known,
        },
    )


def conservative_ppo(
    run: Run,
    data: BatchData,
    *,
    conservative_coef: float = 0.1,
    max_kl_divergence: float = 0.01,
    clip_epsilon: float = 0.2,
    adaptive_kl: bool = False,
    reference_model: Reference = None,
) -> Step:
    """PPO with a wall around the reference: `ConservativePPOLoss`."""
    if adaptive_kl:
        raise ValueError(
            f"{data.who}: adaptive_kl=True did nothing in Signal and is not made up here; adapt conservative_coef "
            "between calls, by the metric kl_divergence, and leave adaptive_kl out"
        )
    rows = language_rows(data)
    take_old_logprobs(rows, data.floats("old_log_probs", 2))
    rows.batch.fields["advantages"] = given_or_centred_advantages(rows, data)
    rows.batch.fields |= run.ref_logprobs(data.who, rows.batch, reference_model, "the penalty")
    clip = _clip(clip_epsilon)
    loss_fn = ConservativePPOLoss(conservative_coef=conservative_coef, max_kl=max_kl_divergence, **clip)
    return Step(
        rows.batch,
        ReportedPolicy(loss_fn, PPOLoss(**clip)),
        lambda n: {
            "policy_loss": n["policy_loss"],
            **_kl(n),
            "kl_penalty": n["kl_penalty"],
            "kl_violation": float(n["kl_violation"] > 0),
            "clip_fraction": n["clip_frac"],
            "max_kl_threshold": max_kl_divergence,
        },
    )


def reward_modeling(run: Run, data: BatchData, *, margin: float = 1.0, temperature: float = 0.1) -> Step:
    """A reward model from pairs: `BradleyTerryLoss`."""
    batch = pair_rows(data)
    # Signal's margin stands behind the temperature, the library's before it
    batch.fields["margin"] = torch.full((len(batch.ids),), margin * temperature)
    return Step(
        batch,
        ReportedRewards(BradleyTerryLoss(temperature=temperature)),
        lambda n: {
            "preference_accuracy": n["accuracy"],
            "reward_margin": n["margin"],
            "chosen_reward_mean": n["chosen_reward"],
            "rejected_reward_mean": n["rejected_reward"],
            "chosen_reward_std": n["chosen_reward_std"],
            "rejected_reward_std": n["rejected_reward_std"],
        },
    )


def _likelihood(numbers: Numbers) -> Numbers:
    # where math.exp would raise, this overflows to infinity
    return {"loss": numbers["loss"], "perplexity": torch.tensor(numbers["nll"], dtype=torch.float64).exp().item()}


def _clip(clip_epsilon: float) -> dict[str, Any]:
    return {"clip_eps_low": clip_epsilon, "clip_eps_high": clip_epsilon}


def _actor_critic(
    who: str, clip_epsilon: float, beta: float, entropy_coef: float, value_coef: float, value_clip: float | None
) -> ReportedPolicy:
    if value_clip == 0:
        way_out = ", or clip_value_loss=False" if who == "enhanced_ppo" else ""
        raise ValueError(
            f"{who}: clip_epsilon=0 also clips the values, to those of before, so that they would learn nothing; pass "
            f"more than 0{way_out}"
        )
    clip = _clip(clip_epsilon)
    policy = PPOLoss(**clip, kl_coef=beta, entropy_coef=entropy_coef)
    value = ValueLoss(value_clip=value_clip, halve=False)
    return ReportedPolicy(ActorCriticLoss(policy=policy, value=value, value_coef=value_coef), PPOLoss(**clip))


def _kl(numbers: Numbers) -> Numbers:
    if "ref_kl" not in numbers:
        return {}
    return {"kl_divergence": numbers["ref_kl"], "ref_kl_seq": numbers["ref_kl_seq"]}
