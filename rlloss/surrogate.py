"""Importance ratios at token and sequence level, and the clipped surrogate of PPO."""

from typing import Literal

import torch
from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.reduce import sequence_mean, sequence_sum, to_tokens

__all__ = ["RatioLevel", "bounded", "clipped_surrogate", "log_ratios"]

RatioLevel = Literal["token", "sequence", "geometric"]


def bounded(log_ratio: Tensor, bound: float) -> Tensor:
    """A log-ratio that is safe to exponentiate: clamped to `[-bound, bound]`, without gradient beyond.

    >>> bounded(torch.tensor([-100.0, 0.5, 100.0]), 20.0).tolist()
    [-20.0, 0.5, 20.0]
    """
    return log_ratio.clamp(-bound, bound)


def log_ratios(
    logprobs: Float[Tensor, "*tokens"],
    old_logprobs: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    level: RatioLevel = "token",
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """The log importance ratio of every token, of its sequence, or of its sequence's geometric mean per token.

    `token` l_t - old_t; `sequence` sum_t (l_t - old_t); `geometric` (1/L) sum_t (l_t - old_t), equation 7 of
    https://arxiv.org/abs/2507.18071. The sequence levels give all tokens of a sequence its value.

    >>> new, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-2.0, -1.0]])
    >>> log_ratios(new, old, torch.ones(1, 2).bool(), "geometric").tolist()
    [[0.5, 0.5]]
    """
    log_ratio = logprobs - old_logprobs
    if level == "token":
        return log_ratio
    per_sequence = sequence_mean if level == "geometric" else sequence_sum
    return to_tokens(per_sequence(log_ratio, loss_mask, cu_seqlens), loss_mask, cu_seqlens)


def clipped_surrogate(
    ratio: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    clip_eps_low: float,
    clip_eps_high: float,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, "*tokens"], Bool[Tensor, "*tokens"]]:
    """PPO's clipped surrogate as a loss, equation 7 of https://arxiv.org/abs/1707.06347, and where the clip binds.

    max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A), and for A < 0 at most -dual_clip A, equation 5 of
    https://arxiv.org/abs/1912.09729. The gradient with respect to r is -A where the clip does not bind, else 0.

    >>> loss, clipped = clipped_surrogate(torch.tensor([1.5, 1.5]), torch.tensor([1.0, -1.0]), 0.2, 0.25)
    >>> loss.tolist(), clipped.tolist()
    ([-1.25, 1.5], [True, False])
    """
    low, high = 1 - clip_eps_low, 1 + clip_eps_high
    loss = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
    is_clipped = torch.where(advantages >= 0, (ratio > high) & (advantages > 0), ratio < low)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
        is_clipped |= (advantages < 0) & (ratio > dual_clip)
    return loss, is_clipped
