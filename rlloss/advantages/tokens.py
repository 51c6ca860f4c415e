"""Advantages per token or per turn, compared over the sequences of a group: what a [B] of rewards cannot say."""

from typing import Any

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float, Int
from rlloss.advantages.gae import sums_to_go
from rlloss.advantages.group import Singleton, group_advantages
from rlloss.advantages.rows import Rows, joint_ids
from rlloss.reduce import to_tokens, within_sequences, zero_masked

__all__ = ["optimal_token_baseline", "turn_advantages"]


def optimal_token_baseline(
    returns: Float[Tensor, "*tokens"],
    logprobs: Float[Tensor, "*tokens"],
    sum_p2: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    group_ids: Int[Tensor, " S"],
    *,
    token_weights: Float[Tensor, "*tokens"] | None = None,
    singleton: Singleton = "zero",
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """The Optimal Token Baseline's advantages, https://arxiv.org/abs/2602.07078: G_t - B_t with a baseline per token.

        B_t = sum_i W_it G_it / sum_i W_it,   W_t = sum_{j <= t} (1 - 2 pi_j + sum_v pi_jv^2)

    over the sequences i of the group that have a t-th trained token. W is the squared norm of the log-probs' gradients
    up to t with respect to their logits: a sequence that moves the policy more has more of a say in the baseline.
    Masked gaps (a tool's answers) do not count, so t is the same number of own tokens in all sequences.

    0 at masked positions, without gradient. Equal returns give exact zeros.

    Args:
        returns: G, from `rlloss.returns_to_go`.
        logprobs: Of the policy that sampled, with its `sum_p2`: `rlloss.token_logprobs(..., outputs=("logprobs",
            "sum_p2"))` gives both.
        token_weights: The weights rho that the loss will have, such as an off-policy correction's: the terms of W
            are then rho_j^2 as large.
        singleton: What a token gets where the group's other sequences have ended: 0, or its return (`raw`).

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> p = torch.tensor([[0.5, 0.9], [0.5, 0.5]])
    >>> returns = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    >>> optimal_token_baseline(returns, p.log(), p**2, mask, torch.tensor([3, 3])).tolist()
    [[0.5, 0.0], [-0.5, 0.0]]
    """
    who = "optimal_token_baseline"
    check_choice(who, "singleton", singleton, ("zero", "raw"))
    check_tokens_layout(who, loss_mask, cu_seqlens)
    inputs = {"returns": returns, "logprobs": logprobs, "sum_p2": sum_p2, "token_weights": token_weights}
    for name, x in inputs.items():
        if x is not None:
            check_like(who, name, x, "loss_mask", loss_mask)
    _check_groups(who, group_ids, loss_mask, cu_seqlens)

    mask = within_sequences(loss_mask, cu_seqlens)
    returns_, logprobs, sum_p2 = (x.detach().double() for x in zero_masked(mask, returns, logprobs, sum_p2))
    # (1 - pi)^2 and the squares of the others: below 0 by rounding alone
    energy = (1 - 2 * logprobs.exp() + sum_p2).clamp(min=0)
    if token_weights is not None:
        energy = energy * torch.where(mask, token_weights.detach(), 0).double().square()
    energy, nth = (_sums_so_far(x, mask, cu_seqlens).flatten() for x in (energy, mask.double()))

    group = to_tokens(group_ids, mask, cu_seqlens).flatten()
    rows = Rows(joint_ids(group, nth.long()), mask.flatten())
    has_peers = (rows.size > 1) & (rows.total(energy) > 0)
    lone = returns_.flatten() if singleton == "raw" else torch.zeros_like(energy)
    advantages = torch.where(has_peers, rows.centred(returns_.flatten(), energy), lone)
    return torch.where(mask, advantages.view(mask.shape), 0).to(returns.dtype)


def turn_advantages(
    token_rewards: Float[Tensor, "*tokens"],
    turn_ids: Int[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    group_ids: Int[Tensor, " S"],
    gamma: float = 1.0,
    *,
    state_ids: Int[Tensor, "*tokens"] | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> Float[Tensor, "*tokens"]:
    """Group advantages of turns: every token of a turn has the advantage of what the turn still earned.

        U_k = r_k + gamma U_{k+1} for the turns k of a sequence;   A_k = group_advantages(U_k) among its peers

    The peers of a turn are those of the same number in the group's other sequences; or, with `state_ids`, all turns of
    the group that were taken in the same state, however many turns came before, in the same sequence too. That is the
    step advantage of GiGPO, https://arxiv.org/abs/2505.10978, whose other summand is `group_advantages` of whole
    sequences. gamma = 0 compares what each turn itself earned.

    0 at masked positions, without gradient.

    Args:
        token_rewards: A turn's reward is the sum over its trained tokens; what stands at others is not seen.
        turn_ids: The turn's number within its sequence; its trained tokens stand together, gaps aside.
        gamma: Discount per turn, not per token.
        state_ids: Any integer per token, the same in all tokens of a turn.
        **options: Of `rlloss.group_advantages`: `scale`, `baseline` and so on.

    >>> mask = torch.ones(2, 3).bool()
    >>> rewards, turns = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    >>> turn_advantages(rewards, turns, mask, torch.tensor([7, 7]), gamma=0.5, scale="none").tolist()
    [[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
    """
    who = "turn_advantages"
    check_range(who, "gamma", gamma, 0, 1)
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "token_rewards", token_rewards, "loss_mask", loss_mask)
    _check_groups(who, group_ids, loss_mask, cu_seqlens)
    for name, ids in {"turn_ids": turn_ids, "state_ids": turn_ids if state_ids is None else state_ids}.items():
        if ids.shape != loss_mask.shape or ids.is_floating_point():
            raise ValueError(
                f"{who}: {name} must be integers of the shape of loss_mask, {list(loss_mask.shape)}, got {ids.dtype} "
                f"{list(ids.shape)}"
            )

    mask = within_sequences(loss_mask, cu_seqlens)
    sequence = to_tokens(torch.arange(len(group_ids), device=mask.device), mask, cu_seqlens).flatten()
    turns = Rows(joint_ids(sequence, turn_ids.flatten()), mask.flatten())
    place = torch.arange(mask.numel(), device=mask.device)
    is_first, is_last = (turns.valid & (turns.extreme(place.double(), which) == place) for which in ("amin", "amax"))
    # from its first token on, a turn earns all of its own; behind its last, what follows is discounted
    per_token = torch.where(is_last.view(mask.shape), torch.full_like(token_rewards, gamma, dtype=torch.float64), 1)
    returns = sums_to_go(token_rewards, per_token, mask, cu_seqlens, "auto").flatten()

    group = to_tokens(group_ids, mask, cu_seqlens).flatten()
    peers = joint_ids(group, (turn_ids if state_ids is None else state_ids).flatten())
    advantages = turns.total(group_advantages(returns, peers, valid=is_first, **options))
    return torch.where(mask, advantages.view(mask.shape), 0).to(token_rewards.dtype)


def _sums_so_far(x: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Of each trained token and those before it in its sequence."""
    backwards = None if cu_seqlens is None else x.shape[-1] - cu_seqlens.flip(0)
    return sums_to_go(x.flip(-1), 1.0, mask.flip(-1), backwards, "auto").flip(-1)


def _check_groups(who: str, group_ids: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None) -> None:
    sequences = loss_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if group_ids.shape != (sequences,) or group_ids.is_floating_point():
        raise ValueError(
            f"{who}: group_ids must be one integer per sequence [{sequences}], got {group_ids.dtype} "
            f"{list(group_ids.shape)}"
        )
