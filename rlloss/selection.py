"""Choices among the tokens of a whole step: by covariance, by rank, at random, and never waiting for the device."""

from typing import Any

import torch
from torch import Tensor

from rlloss._typing import Bool, Float, Int
from rlloss.reduce import reduce_tokens

__all__ = ["first_ranked", "share_of", "token_covariance", "token_hash"]


def token_covariance(
    logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    counted: Bool[Tensor, "*tokens"],
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """(l - mean l) (A - mean A), equation 10 of https://arxiv.org/abs/2505.22617; 0 where a token is not counted.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_covariance(torch.tensor([[-1.0, -3.0, 9.0]]), torch.tensor([[2.0, 1.0, 9.0]]), mask).tolist()
    [[0.5, 0.5, 0.0]]
    """

    def centred(x: Tensor) -> Tensor:
        x = torch.where(counted, x, 0)
        return torch.where(counted, x - reduce_tokens(x, counted, "token_mean", cu_seqlens=cu_seqlens), 0)

    return centred(logprobs) * centred(advantages)


def share_of(counted: Bool[Tensor, "*tokens"], fraction: float) -> Float[Tensor, ""]:
    """floor(fraction * N) of the N counted tokens, as a tensor.

    >>> float(share_of(torch.ones(1, 9).bool(), 0.25))
    2.0
    """
    return (counted.sum().double() * fraction).floor()


def first_ranked(
    keys: Tensor, among: Bool[Tensor, "*tokens"], number: Float[Tensor, ""] | int
) -> Bool[Tensor, "*tokens"]:
    """The `number` entries of smallest key `among` some, or all of those where there are fewer; ties by position.

    >>> first_ranked(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, True, False]), 1).tolist()
    [False, True, False, False]
    """
    last = torch.inf if keys.is_floating_point() else torch.iinfo(keys.dtype).max
    order = torch.where(among, keys, last).flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    return (rank.view_as(among) < number) & among


def token_hash(counted: Bool[Tensor, "*tokens"], seed: int) -> Int[Tensor, "*tokens"]:
    """Random order without a generator: a hash of each token's number among the counted ones, in 32 bits.

    The same on every device, for any padding and packing. No two of the first 2^32 counted tokens share theirs.

    >>> token_hash(torch.tensor([[True, False, True]]), seed=0)[0, ::2].tolist()
    [4243941292, 1402979721]
    """
    number = counted.flatten().cumsum(0) - 1
    return _mixed(number.clamp(min=0) ^ _mixed(seed ^ 0x9E3779B9)).view_as(counted)


def _mixed(x: Any) -> Any:
    for _ in range(2):  # 32 bits times 27: the product never leaves 63, and nothing wraps around
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x
