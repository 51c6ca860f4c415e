"""Advantages from a learned value function."""

import torch
from rlloss_kernels import IMPLEMENTATIONS, reverse_recurrence_, why_not_triton
from torch import Tensor

from rlloss._checks import check_like, check_range, check_tokens_layout
from rlloss._scoring import check_impl
from rlloss._typing import Bool, Float
from rlloss.reduce import to_tokens, within_sequences, zero_masked

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
    impl: str = "auto",
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
        impl: What runs the recurrence: "triton", "tiled" for plain PyTorch, or "auto", which is Triton on an NVIDIA GPU
            and plain PyTorch elsewhere. Both compute in float64.

    >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> mask = torch.tensor([[True, False, True]])
    >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.25, 0.0, 0.5]], [[0.75, 0.0, 1.0]])
    """
    _check(rewards, values, loss_mask, gamma, gae_lambda, last_value, cu_seqlens)
    # its arithmetic is float64 for every dtype, which is no reason against it
    check_impl("gae", impl, IMPLEMENTATIONS, lambda: why_not_triton(values.device, torch.float32))
    mask = within_sequences(loss_mask, cu_seqlens)
    if not mask.numel():
        return torch.zeros_like(values), torch.zeros_like(values)
    rewards, values = zero_masked(mask, rewards.detach(), values.detach())
    end = values.new_zeros(()) if last_value is None else to_tokens(last_value.detach(), mask, cu_seqlens)
    # in float64: a long product of discounts in float32 is off by 1e-5 of the advantage
    returns = _worth_behind(rewards, values, mask, end, gamma, gae_lambda, cu_seqlens, impl).mul_(gamma).add_(rewards)
    advantages, returns = zero_masked(mask, (returns - values).to(values.dtype), returns.to(values.dtype))
    return advantages, returns


def _worth_behind(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    end: Tensor,
    gamma: float,
    gae_lambda: float,
    cu_seqlens: Tensor | None,
    impl: str,
) -> Tensor:
    """U_{t+1} of the return R_t = r_t + gamma U_{t+1}: what the rest of a sequence is worth to the token before it.

    U_t = (1 - lambda) V_t + lambda R_t at a trained token, U_{t+1} at a masked one, and `end` behind a sequence. There
    another sequence begins, whose own U nobody asks for.
    """
    shape, discount = (*mask.shape[:-1], mask.shape[-1] + 1), gamma * gae_lambda
    worth, decay = values.new_zeros(shape, dtype=torch.float64), values.new_ones(shape, dtype=torch.float64)
    worth[..., :-1].add_(values, alpha=1 - gae_lambda).add_(rewards, alpha=gae_lambda)
    decay[..., :-1].masked_fill_(mask, discount)
    behind = -1 if cu_seqlens is None else cu_seqlens[1:].long()
    worth[..., behind] = end.expand(mask.shape)[..., -1 if cu_seqlens is None else behind - 1].double()
    decay[..., behind] = 0
    reverse_recurrence_(decay, worth, cuts=cu_seqlens is not None or discount == 0, impl=impl)
    return worth[..., 1:]


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
