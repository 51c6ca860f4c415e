"""Advantages from a learned value function, and what is still to be earned without one."""

import torch
from rlloss_kernels import IMPLEMENTATIONS, reverse_recurrence_, why_not_triton
from torch import Tensor

from rlloss._checks import check_like, check_range, check_tokens_layout
from rlloss._scoring import check_impl
from rlloss._typing import Bool, Float
from rlloss.reduce import sequence_lengths, to_tokens, weighted, within_sequences, zero_masked

__all__ = ["gae", "length_adaptive_lambda", "returns_to_go"]


def gae(
    rewards: Float[Tensor, "*tokens"],
    values: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    gamma: float,
    gae_lambda: float | Float[Tensor, " S"],
    last_value: Float[Tensor, " S"] | None = None,
    *,
    value_lambda: float | None = None,
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
        gae_lambda: One for all sequences or one each, such as `length_adaptive_lambda`'s.
        last_value: V of the state behind the last trained token: what a truncated sequence would still have earned,
            0 for one that ended. None says that all ended.
        value_lambda: The lambda of the returns, gae_lambda where None. VAPO, https://arxiv.org/abs/2504.05118, has 1:
            its critic learns the rewards that were earned, whatever the policy's lambda.
        impl: What runs the recurrence: "triton", "tiled" for plain PyTorch, or "auto", which is Triton on an NVIDIA GPU
            and plain PyTorch elsewhere. Both compute in float64.

    >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> mask = torch.tensor([[True, False, True]])
    >>> advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.5)
    >>> advantages.tolist(), returns.tolist()
    ([[0.25, 0.0, 0.5]], [[0.75, 0.0, 1.0]])
    """
    _check(rewards, values, loss_mask, gamma, gae_lambda, last_value, value_lambda, cu_seqlens)
    # its arithmetic is float64 for every dtype, which is no reason against it
    check_impl("gae", impl, IMPLEMENTATIONS, lambda: why_not_triton(values.device, torch.float32))
    mask = within_sequences(loss_mask, cu_seqlens)
    if not mask.numel():
        return torch.zeros_like(values), torch.zeros_like(values)
    rewards, values = zero_masked(mask, rewards.detach(), values.detach())
    end = values.new_zeros(()) if last_value is None else to_tokens(last_value.detach(), mask, cu_seqlens)

    def returns_by(lambda_: float | Tensor) -> Tensor:
        share = to_tokens(lambda_.detach().double(), mask, cu_seqlens) if isinstance(lambda_, Tensor) else lambda_
        # in float64: a long product of discounts in float32 is off by 1e-5 of the advantage
        worth = _worth_behind(rewards, values, mask, end, gamma, share, cu_seqlens, impl)
        return worth.mul_(gamma).add_(rewards)

    returns = returns_by(gae_lambda)
    advantages = (returns - values).to(values.dtype)
    if value_lambda is not None:
        returns = returns_by(value_lambda)
    advantages, returns = zero_masked(mask, advantages, returns.to(values.dtype))
    return advantages, returns


def length_adaptive_lambda(
    loss_mask: Bool[Tensor, "*tokens"], alpha: float = 0.05, *, cu_seqlens: Tensor | None = None
) -> Float[Tensor, " S"]:
    """VAPO's lambda of the policy, https://arxiv.org/abs/2504.05118: 1 - 1 / (alpha l) of a sequence of l tokens.

    The weights lambda^t of the errors ahead then sum to alpha l: a longer answer looks further. It is 0 up to a length
    of 1 / alpha, float64, and meant as `gae_lambda` beside value_lambda=1.

    >>> length_adaptive_lambda(torch.ones(2, 100).bool(), alpha=0.1).tolist()
    [0.9, 0.9]
    """
    check_range("length_adaptive_lambda", "alpha", alpha, 0, open_low=True)
    lengths = sequence_lengths(loss_mask, cu_seqlens).clamp(min=1).double()
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def returns_to_go(
    token_rewards: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    gamma: float = 1.0,
    *,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Float[Tensor, "*tokens"]:
    """What a sequence still earns from each trained token on: R_t = r_t + gamma R_{t+1}.

    t + 1 is the next trained token, as in `gae`: a masked gap neither cuts the sum nor discounts it, and what stands
    there is not seen. 0 at masked positions, without gradient.

    With the KL in the rewards and whitened over the step they are the advantages of REINFORCE++,
    https://arxiv.org/abs/2501.03262:

        rewards = kl_shaped_rewards(rewards, kl_k1(old_logprobs, ref_logprobs), loss_mask, kl_coef)
        returns = returns_to_go(rewards, loss_mask)
        advantages = whiten(returns, loss_mask)

    >>> mask = torch.tensor([[True, True, False, False, True, True]])
    >>> returns_to_go(torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0, 1.0]]), mask).tolist()
    [[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]
    """
    who = "returns_to_go"
    check_range(who, "gamma", gamma, 0, 1)
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "token_rewards", token_rewards, "loss_mask", loss_mask)
    check_impl(who, impl, IMPLEMENTATIONS, lambda: why_not_triton(token_rewards.device, torch.float32))
    returns = sums_to_go(token_rewards, gamma, within_sequences(loss_mask, cu_seqlens), cu_seqlens, impl)
    return returns.to(token_rewards.dtype)


def sums_to_go(rewards: Tensor, gamma: float | Tensor, mask: Tensor, cu_seqlens: Tensor | None, impl: str) -> Tensor:
    """R_t = r_t + gamma_t R_{t+1} of trained tokens, in float64; 0 at masked ones."""
    if not mask.numel():
        return torch.zeros_like(rewards, dtype=torch.float64)
    rewards = torch.where(mask, rewards.detach(), 0)
    no_value = torch.zeros_like(rewards)
    worth = _worth_behind(rewards, no_value, mask, no_value.new_zeros(()), gamma, 1.0, cu_seqlens, impl)
    share = gamma if isinstance(gamma, Tensor) else worth.new_full((), gamma)
    return torch.where(mask, weighted(worth, share) + rewards, 0)


def _worth_behind(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    end: Tensor,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    cu_seqlens: Tensor | None,
    impl: str,
) -> Tensor:
    """U_{t+1} of the return R_t = r_t + gamma U_{t+1}: what the rest of a sequence is worth to the token before it.

    U_t = (1 - lambda) V_t + lambda R_t at a trained token, U_{t+1} at a masked one, and `end` behind a sequence. There
    another sequence begins, whose own U nobody asks for.
    """
    shape, discount = (*mask.shape[:-1], mask.shape[-1] + 1), gamma * gae_lambda
    worth, decay = values.new_zeros(shape, dtype=torch.float64), values.new_ones(shape, dtype=torch.float64)
    share = gae_lambda if isinstance(gae_lambda, Tensor) else worth.new_full((), gae_lambda)
    worth[..., :-1].addcmul_(values, 1 - share).addcmul_(rewards, share)
    decay[..., :-1] = torch.where(mask, discount, decay[..., :-1])
    behind = -1 if cu_seqlens is None else cu_seqlens[1:].long()
    worth[..., behind] = end.expand(mask.shape)[..., -1 if cu_seqlens is None else behind - 1].double()
    decay[..., behind] = 0
    cuts = cu_seqlens is not None or isinstance(discount, Tensor) or discount == 0
    reverse_recurrence_(decay, worth, cuts=cuts, impl=impl)
    return worth[..., 1:]


def _check(
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    gamma: float,
    gae_lambda: float | Tensor,
    last_value: Tensor | None,
    value_lambda: float | None,
    cu_seqlens: Tensor | None,
) -> None:
    who = "gae"
    check_range(who, "gamma", gamma, 0, 1)
    if value_lambda is not None:
        check_range(who, "value_lambda", value_lambda, 0, 1)
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "rewards", rewards, "loss_mask", loss_mask)
    check_like(who, "values", values, "loss_mask", loss_mask)
    per_sequence = loss_mask.new_empty(loss_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
    if isinstance(gae_lambda, Tensor):
        check_like(who, "gae_lambda", gae_lambda, "one lambda per sequence", per_sequence)
    else:
        check_range(who, "gae_lambda", gae_lambda, 0, 1)
    if last_value is not None:
        check_like(who, "last_value", last_value, "one value per sequence", per_sequence)
