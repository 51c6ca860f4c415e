"""Rewards per token: the KL to the reference as a cost, and the cost of length."""

import torch
from torch import Tensor

from rlloss._checks import check_count, check_full_precision, check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float, Int
from rlloss.reduce import last_tokens, to_tokens, within_sequences

__all__ = ["kl_shaped_rewards", "overlong_penalty"]


def kl_shaped_rewards(
    rewards: Float[Tensor, "..."],
    kl: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    kl_coef: float | Float[Tensor, ""],
    *,
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """Rewards with a KL cost per token, equation 2 of https://arxiv.org/abs/1909.08593: the KL of PPO's RLHF.

        r_t = -kl_coef kl_t + [t is the last trained token] R

    The paper's kl_t is log pi - log ref of the sampled token, `rlloss.kl_k1(old_logprobs, ref_logprobs)`, and of all
    per-token KLs it alone makes a policy gradient descend KL(pi || ref): a reward is a constant to the gradient, and
    only k1 does without its own. Others are taken as they are, with these expected gradients: k3, the difference of
    the two KLs' gradients, which climbs KL(ref || pi); a KL over the full vocabulary, that of the KL still to come,
    without the token's own. Add those to the loss instead (`kl_coef` of the policy losses).

    0 at masked positions, whatever stands there; a sequence without a trained token loses its reward. The result has
    the dtype of `kl` and carries no gradient.

    Args:
        rewards: One per sequence, `[S]`, or per token (of `loss_mask`'s shape), which are added where they stand.
        kl_coef: A number, or the 0-dim tensor of a controller such as `rlloss.AdaptiveKLController`.

    >>> kl, mask = torch.tensor([[0.5, 1.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> kl_shaped_rewards(torch.tensor([1.0]), kl, mask, kl_coef=0.5).tolist()
    [[-0.25, 0.5, 0.0]]
    """
    who = "kl_shaped_rewards"
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "kl", kl, "loss_mask", loss_mask)
    check_full_precision(who, "rewards", rewards)
    if not isinstance(kl_coef, Tensor):
        check_range(who, "kl_coef", kl_coef, 0)
    elif kl_coef.ndim != 0:
        raise ValueError(f"{who}: kl_coef must be one number, got a tensor of shape {list(kl_coef.shape)}")
    sequences = loss_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    per_token = rewards.shape == loss_mask.shape
    if not per_token and rewards.shape != (sequences,):
        raise ValueError(
            f"{who}: rewards must have one value per sequence [{sequences}] or per token {list(loss_mask.shape)}, "
            f"got {list(rewards.shape)}"
        )

    mask, rewards = within_sequences(loss_mask, cu_seqlens), rewards.detach()
    if not per_token:
        rewards = torch.where(last_tokens(mask, cu_seqlens), to_tokens(rewards, mask, cu_seqlens), 0)
    coef = kl_coef.detach() if isinstance(kl_coef, Tensor) else kl_coef
    return torch.where(mask, rewards - coef * kl.detach(), 0).to(kl.dtype)


def overlong_penalty(
    lengths: Int[Tensor, " B"], max_length: int, buffer_length: int, penalty: float = 1.0
) -> Float[Tensor, " B"]:
    """DAPO's soft overlong punishment, equation 13 of https://arxiv.org/abs/2503.14476: a reward to add, never above 0.

        0                                                      up to max_length - buffer_length tokens,
        penalty (max_length - buffer_length - length) / buffer_length     up to max_length,
        -penalty                                               beyond

    Args:
        lengths: Tokens of each completion; `rlloss.sequence_lengths` counts the trained ones.
        buffer_length: The last tokens below `max_length`, over which the penalty grows.

    >>> overlong_penalty(torch.tensor([60, 80, 90, 100, 120]), max_length=100, buffer_length=20).tolist()
    [0.0, 0.0, -0.5, -1.0, -1.0]
    """
    who = "overlong_penalty"
    check_count(who, "max_length", max_length)
    check_count(who, "buffer_length", buffer_length)
    check_range(who, "penalty", penalty, 0)
    if buffer_length > max_length:
        raise ValueError(f"{who}: buffer_length is a part of max_length, got {buffer_length=} {max_length=}")
    if not isinstance(lengths, Tensor) or lengths.ndim != 1 or lengths.is_floating_point():
        got = f"{lengths.dtype} {list(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"{who}: lengths must be integers [B], got {got}")
    return penalty * ((max_length - buffer_length - lengths) / buffer_length).clamp(-1, 0)
