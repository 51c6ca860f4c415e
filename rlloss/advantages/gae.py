"""Advantages from a learned value function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float
from rlloss.reduce import last_tokens, to_tokens, within_sequences, zero_masked

__all__ = ["gae"]


def gae(
    rewards: Float[Tensor, "*tokens"],
    values: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    gamma: float,
    gae_lambda: float,
    last_value: Float[Tensor, " S"] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Float[Tensor, "*tokens"], Float[Tensor, "*tokens"]]:
    """Generalised advantage estimation, equation 16 of https://arxiv.org/abs/1506.02438, over trained tokens alone.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = sum_l (gamma gae_lambda)^l delta_{t+l} = delta_t + gamma gae_lambda A_{t+1}

    where t + 1 is the next trained token of the sequence: a masked gap (a tool's answer) neither cuts the sum nor
    discounts it. Rewards and values at masked positions are not seen, and may be NaN.

    Returns the advantages and the returns, A_t + V_t, which are the value loss's targets: both in the dtype of
    `values`, exactly 0 at masked positions and without gradient.

    Args:
        rewards: Per token; `rlloss.kl_shaped_rewards` puts a sequence's reward at its last trained token.
        values: V of the state in which the token at this position was chosen.
        last_value: V of the state behind the last trained token: what a truncated sequence would still have earned,
            0 for one that ended. None says that all ended.

    >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> mask = torch.tensor([[True, False, True]])
    >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.25, 0.0, 0.5]], [[0.75, 0.0, 1.0]])
    """
    _check(rewards, values, loss_mask, gamma, gae_lambda, last_value, cu_seqlens)
    mask = within_sequences(loss_mask, cu_seqlens)
    last = last_tokens(mask, cu_seqlens)
    dtype = values.dtype
    # in float64: a long product of discounts in float32 is off by 1e-5 of the advantage
    rewards, values = zero_masked(mask, rewards.detach().double(), values.detach().double())

    from_here = values.gather(-1, _trained_from_here(mask))
    end = 0 if last_value is None else to_tokens(last_value.detach().double(), mask, cu_seqlens)
    # what roll wraps around, and what it brings from a pack's next sequence, stands at a last token or is masked
    next_values = torch.where(last, end, from_here.roll(-1, -1))
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0)
    decay = torch.full_like(deltas, gamma * gae_lambda).masked_fill(last, 0).masked_fill(~mask, 1)
    advantages = torch.where(mask, _reverse_recurrence(decay, deltas), 0)
    return advantages.to(dtype), (advantages + values).to(dtype)


def _trained_from_here(mask: Tensor) -> Tensor:
    """The first trained position from each on; the last position where none comes."""
    length = mask.shape[-1]
    positions = torch.arange(length, device=mask.device).expand(mask.shape)
    ahead = torch.where(mask, positions, length).flip(-1).cummin(-1).values.flip(-1)
    return ahead.clamp(max=max(length - 1, 0))


def _reverse_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """y_t = b_t + a_t y_{t+1} along the last axis, with linear work in log2(T) levels instead of T steps."""
    length = b.shape[-1]
    if length < 2:
        return b
    a, b = F.pad(a, (0, length % 2)), F.pad(b, (0, length % 2))
    even_a, odd_a, even_b, odd_b = a[..., ::2], a[..., 1::2], b[..., ::2], b[..., 1::2]
    even = _reverse_recurrence(even_a * odd_a, _step(even_a, even_b, odd_b))
    odd = _step(odd_a, odd_b, F.pad(even[..., 1:], (0, 1)))
    return torch.stack([even, odd], dim=-1).flatten(-2)[..., :length]


def _step(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    # a = 0 ends a sequence: a NaN of the next one must not come through as 0 * NaN
    return torch.where(a == 0, b, b + a * y)


def _check(
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    gamma: float,
    gae_lambda: float,
    last_value: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    who = "gae"
    check_range(who, "gamma", gamma, 0, 1)
    check_range(who, "gae_lambda", gae_lambda, 0, 1)
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "rewards", rewards, "loss_mask", loss_mask)
    check_like(who, "values", values, "loss_mask", loss_mask)
    if last_value is not None:
        sequences = loss_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_like(who, "last_value", last_value, "one value per sequence", loss_mask.new_empty(sequences))
