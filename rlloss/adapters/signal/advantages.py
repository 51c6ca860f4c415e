"""What is derived of a batch before its loss runs: advantages, returns, and log-probs of whole sequences per token."""

import torch
from torch import Tensor

from rlloss.adapters.signal.batches import BatchData, Rows, check_finite
from rlloss.adapters.signal.run import Run
from rlloss.advantages.gae import gae
from rlloss.advantages.whiten import whiten
from rlloss.output import Moments
from rlloss.reduce import sequence_lengths, sequence_sum, to_tokens

__all__ = ["given_or_centred_advantages", "spread", "take_advantages", "take_old_logprobs"]


def take_old_logprobs(rows: Rows, old_log_probs: Tensor | None) -> None:
    """Sets the batch's `old_logprobs`; without any, the policy is its own old policy."""
    if old_log_probs is not None:
        rows.batch.fields["old_logprobs"] = rows.place("old_log_probs", old_log_probs)


def take_advantages(
    run: Run,
    rows: Rows,
    rewards: Tensor,
    gamma: float,
    gae_lambda: float,
    *,
    old_log_probs: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
) -> dict[str, float]:
    """Sets what an actor-critic loss wants of a batch; returns what is known of it before the loss runs."""
    mask, values = rows.batch.loss_mask, run.values(rows.who, rows, values)
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    advantages = whiten(advantages, mask)
    take_old_logprobs(rows, old_log_probs)
    rows.batch.fields |= {
        "advantages": advantages,
        "returns": returns,
        "old_values": torch.where(mask, values, 0) if old_values is None else rows.place("old_values", old_values),
    }
    moments = Moments.of(advantages, mask)
    sequences = mask.any(-1)
    return {
        "advantage_mean": float(moments),
        "advantage_std": float(moments.std),
        "return_mean": float(Moments.of(returns, mask)),
        "reward_mean": float(Moments.of(sequence_sum(rewards, mask), sequences)),
    }


def given_or_centred_advantages(rows: Rows, data: BatchData) -> Tensor:
    """The batch's `advantages`; else rewards to go, whitened over the batch."""
    mask = rows.batch.loss_mask
    if "advantages" in data:
        advantages = data.floats("advantages", 1, 2)
        if advantages.ndim == 2:
            return rows.place("advantages", advantages)
        check_finite(data.who, "advantages", advantages)
        if advantages.shape != mask.shape[:1]:
            raise ValueError(
                f"{data.who}: advantages must have one value per sequence, [{len(mask)}], or per token, "
                f"{list(rows.trained.shape)}, got {list(advantages.shape)}"
            )
        return torch.where(mask, to_tokens(advantages, mask), 0)
    if "rewards" not in data:
        raise ValueError(f"{data.who}: batch_data needs 'rewards' or 'advantages', got {sorted(data.data)}")
    given = data.floats("rewards", 1, 2)
    if len(mask) == 1:
        raise ValueError(
            f"{data.who}: the rewards of a batch are compared with each other, and one sequence has nothing to be "
            "compared with; pass more sequences, or advantages"
        )
    rewards = rows.rewards(given)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    return whiten(to_go, mask)


def spread(run: Run, rows: Rows, behavior: Tensor) -> Tensor:
    """Per-token log-probs that sum to those of whole sequences: each token gets the same log-ratio to the policy."""
    batch, mask = rows.batch, rows.batch.loss_mask
    if behavior.shape != mask.shape[:1]:
        raise ValueError(
            f"{rows.who}: behavior_log_probs must have one sum per sequence, [{len(mask)}], or one value per token, "
            f"{list(rows.trained.shape)}, got {list(behavior.shape)}"
        )
    check_finite(rows.who, "behavior_log_probs", behavior)
    current = run.session.logprobs(batch)
    per_token = (behavior - sequence_sum(current, mask)) / sequence_lengths(mask).clamp(min=1)
    return torch.where(mask, current + to_tokens(per_token.to(current.dtype), mask), 0)
