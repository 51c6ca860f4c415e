"""The critic."""

from typing import Any

from numpy.typing import ArrayLike

from rlloss.reference.policy import ppo
from rlloss.reference.reduce import reduced, rows


def value(
    values: ArrayLike,
    old_values: ArrayLike | None,
    returns: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    value_clip: float | None = 0.2,
    halve: bool = True,
) -> float:
    """The squared error of equation 9 of https://arxiv.org/abs/1707.06347, clipped as in section 3 of https://arxiv.org/abs/2005.12729.

    loss_t = c * weight_t * max((v - R)^2, (clip(v, old - value_clip, old + value_clip) - R)^2)
    c = 1/2, or 1 where `halve` is False; loss = sum_it loss_it / tokens

    `old_values=None` is the critic itself, which no clip can bind.

    >>> value([[1.0, 9.0]], [[0.0, 9.0]], [[2.0, 9.0]], [[True, False]], value_clip=0.5)  # (0.5 - 2)^2 / 2
    1.125
    """
    mask = rows(loss_mask, cu_seqlens)
    new = rows(values, cu_seqlens)
    target = rows(returns, cu_seqlens)
    old = new if old_values is None else rows(old_values, cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)  # a counted token weighs 1
    losses: list[list[float]] = []
    for i in range(len(mask)):
        losses.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            if weight[i][t] == 0.0:
                losses[i].append(0.0)
                continue
            loss = (new[i][t] - target[i][t]) ** 2
            if value_clip is not None:
                near = min(max(new[i][t], old[i][t] - value_clip), old[i][t] + value_clip)
                loss = max(loss, (near - target[i][t]) ** 2)
            losses[i].append(weight[i][t] * (loss / 2.0 if halve else loss))
    return reduced(losses, "token_mean")


def actor_critic(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    values: ArrayLike,
    old_values: ArrayLike | None,
    returns: ArrayLike,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    value_coef: float = 0.5,
    value_clip: float | None = 0.2,
    **terms: Any,
) -> float:
    """PPO with its critic, equation 9 of https://arxiv.org/abs/1707.06347: `ppo` of `terms`, and value_coef `value`.

    >>> actor_critic([[-1.0]], None, [1.0], [[True]], values=[[0.0]], old_values=None, returns=[[2.0]], value_coef=0.25)
    -0.5
    """
    policy = ppo(
        logprobs, old_logprobs, advantages, loss_mask, token_weights=token_weights, cu_seqlens=cu_seqlens, **terms
    )
    critic = value(
        values,
        old_values,
        returns,
        loss_mask,
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        value_clip=value_clip,
    )
    return policy + value_coef * critic
