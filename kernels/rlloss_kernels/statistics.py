"""Softmax statistics of blocks of rows, one tile of columns at a time: the running sums and the one backward formula.

With z the logits of a row, y its target and p = softmax(z), everything is expressed by sums over the columns other
than y. Then x = logsumexp(others) - z_y gives log p_y = -softplus(x) and 1 - p_y = sigmoid(x), which stay accurate as
p_y -> 1, where z_y - logsumexp(z) and 1 - exp(log p_y) lose every digit.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss_kernels.tile import FAR, LOG2_E, Targets, exp_

STATISTICS = ("logprobs", "entropy", "logsumexp", "sum_p2", "mean_logprob")


class State(NamedTuple):
    """What the forward pass keeps of every row: all that the backward pass needs beside the logits."""

    shift: Tensor  # the largest of the others
    log_mass: Tensor  # log sum exp(z - shift) over the others
    x: Tensor  # logsumexp(others) - z_y
    spread: Tensor  # entropy of softmax(others)
    concentration: Tensor  # sum of squares of softmax(others)


class Sums(NamedTuple):
    """What an OnlineSoftmax has summed up, [n] each; None for what was not wanted."""

    shift: Tensor
    target: Tensor
    mass: Tensor
    moment: Tensor | None
    square: Tensor | None
    total: Tensor | None
    columns: Tensor

    @classmethod
    def joined(cls, parts: "Sequence[Sums]") -> "Sums":
        """Of several blocks of rows, one after the other."""
        return cls(*(None if xs[0] is None else torch.cat(xs) for xs in zip(*parts, strict=True)))  # type: ignore[arg-type]

    @property
    def packed(self) -> Tensor:
        """All of them [7, n], 0 where not wanted."""
        return torch.stack([torch.zeros_like(self.shift) if x is None else x for x in self])

    def merged(self, parts: Tensor) -> "Sums":
        """Those of all columns, of which `parts` [P, 7, n] holds packed sums over each part; wanted as these are."""
        shift, target, mass, moment, square, total, columns = parts.unbind(1)
        top = shift.amax(0)
        moved = shift - top
        growth = moved.exp()
        moment = (moment + mass * moved.clamp(min=-FAR)) * growth
        total = total + columns * (base(shift) - base(top))
        sums = (target, mass * growth, moment, square * growth.square(), total, columns)
        return Sums(top, *(None if x is None else y.sum(0) for x, y in zip(self[1:], sums, strict=True)))  # type: ignore[arg-type]

    def close(self, vocabulary: int) -> tuple[Tensor, Tensor]:
        """The statistics `[5, n]`, in the order of STATISTICS and 0 where not wanted, and the State `[5, n]`."""
        log_mass = self.mass.log()
        x = (self.shift - self.target) + log_mass
        x = torch.where(self.target == math.inf, math.nan, x)  # as log_softmax answers a logit of +inf
        alone = self.mass == 0  # every other logit is -inf
        zero = torch.zeros_like(x)
        spread = zero if self.moment is None else torch.where(alone, 0, log_mass - self.moment / self.mass)
        concentration = zero if self.square is None else torch.where(alone, 0, self.square / self.mass.square())
        state = State(self.shift, log_mass, x, spread, concentration)
        logsumexp = torch.logaddexp(self.shift + log_mass, self.target)
        above_base = torch.logaddexp(log_mass + (self.shift - base(self.shift)), self.target - base(self.shift))
        statistics = (
            -_softplus(x),
            zero if self.moment is None else _entropy(state),
            logsumexp,
            zero if self.square is None else _sum_p2(state),
            zero if self.total is None else self.total / vocabulary - above_base,
        )
        return torch.stack(statistics), torch.stack(state)


def base(shift: Tensor) -> Tensor:
    """What a sum of logits is counted from: the shift, but for a row that has none yet."""
    return torch.where(shift == torch.finfo(shift.dtype).min, 0, shift)


class OnlineSoftmax:
    """Running sums over the columns of a block of rows, the target's column left out."""

    def __init__(self, ids: Tensor, dtype: torch.dtype, wanted: Sequence[bool]):
        _, entropy, _, sum_p2, mean_logprob = wanted
        self.ids = ids
        self.columns = 0
        self.growth = torch.ones_like(ids, dtype=dtype)  # of the sums so far, by the last change of the shift
        # it starts at the lowest finite number, so that no difference of two shifts is -inf - -inf
        self.shift = torch.full(ids.shape, torch.finfo(dtype).min, dtype=dtype, device=ids.device)
        self.target = torch.zeros_like(self.shift)
        self.mass = torch.zeros_like(self.shift)  # sum of exp(u), where u = z - shift
        self.moment = torch.zeros_like(self.shift) if entropy else None  # sum of exp(u) u
        self.square = torch.zeros_like(self.shift) if sum_p2 else None  # sum of exp(u)^2
        self.total = (
            torch.zeros_like(self.shift) if mean_logprob else None
        )  # sum of z - base(shift), the target's included

    def absorb(self, z: Tensor, spare: Tensor) -> None:
        """Adds the next columns `z` [n, k]; overwrites `z` and `spare`, which has its shape."""
        targets = Targets.of(self.ids, self.columns, z.shape[1])
        target = targets.read(z)
        self.target += target
        targets.write(z, -math.inf)
        shift = torch.maximum(self.shift, z.amax(1))
        moved, moved_base = self.shift - shift, base(self.shift) - base(shift)
        self.shift = shift
        z.sub_(shift[:, None])
        if self.total is not None:
            targets.write(z, 0.0)
            own = torch.where(targets.here, target - base(shift), 0)
            self.total = self.total + self.columns * moved_base + z.sum(1) + own
            targets.write(z, -math.inf)
        self.growth = growth = moved.exp()
        if self.moment is None:
            weight = exp_(z)
        else:
            weight = torch.exp2(z.mul_(LOG2_E).clamp_(min=-FAR), out=spare)
            moment = self.moment + self.mass * moved.clamp(min=-FAR)
            self.moment = moment * growth + z.mul_(weight).sum(1) / LOG2_E
        self.mass = self.mass * growth + weight.sum(1)
        if self.square is not None:
            self.square = self.square * growth.square() + weight.square_().sum(1)
        self.columns += z.shape[1]

    @property
    def sums(self) -> Sums:
        """What there is so far."""
        columns = torch.full_like(self.shift, self.columns)
        return Sums(self.shift, self.target, self.mass, self.moment, self.square, self.total, columns)


class GradientRows(NamedTuple):
    """The gradient of a row of logits, its coefficients fixed by the row's statistics and upstream gradients alone.

    dz_v = w (scale + slope u + square w) + uniform with u = log2(e) (z - shift) and w = 2^u; at the target, `target`.
    None stands for a term that is 0 in every row.
    """

    shift: Tensor
    scale: Tensor
    slope: Tensor | None
    square: Tensor | None
    uniform: Tensor | None
    target: Tensor

    def rows(self, at: slice) -> "GradientRows":
        """The coefficients of some of the rows."""
        return GradientRows(*(None if c is None else c[at] for c in self))  # type: ignore[arg-type]

    def overwrite(self, z: Tensor, column: int, ids: Tensor, spare: Tensor) -> None:
        """Turns the logits `z` [n, k] of the columns from `column` on into their gradient; overwrites `spare`."""
        z.sub_(self.shift[:, None])
        forbidden = z == -math.inf if self.uniform is not None else None
        if self.slope is None and self.square is None:
            exp_(z).mul_(self.scale[:, None])
        else:
            weight = torch.exp2(z.mul_(LOG2_E), out=spare)
            if self.slope is None:
                z.copy_(self.scale[:, None])
            else:
                z.clamp_(min=-FAR).mul_(self.slope[:, None]).add_(self.scale[:, None])
            z.mul_(weight)
            if self.square is not None:
                z.add_(weight.square_().mul_(self.square[:, None]))
        if self.uniform is not None and forbidden is not None:
            z.add_(self.uniform[:, None]).masked_fill_(forbidden, 0)
        Targets.of(ids, column, z.shape[1]).write(z, self.target)


def gradient_rows(state: Tensor, grad: Tensor, vocabulary: int, factor: Tensor | float) -> GradientRows:
    """The backward formula's coefficients for the State [5, n] and upstream gradients [5, n], all times `factor` [n].

    Over v, the derivatives are: log p_y: 1[v=y] - p; entropy: -p (log p + H); logsumexp: p; sum p^2: 2 p (p - sum p^2);
    mean log p: 1/V - p. At the target they are written with 1 - p_y as a factor wherever it is one, so that they do not
    cancel as p_y -> 1. A logit of -inf is forbidden, not learned: its gradient is 0, also where it is the target's.
    """
    logp, entropy, logsumexp, sum_p2, mean_logprob = grad
    shift, log_mass, x, _, concentration = row = State(*state)
    p, q = torch.sigmoid(-x), torch.sigmoid(x)
    a = logsumexp - logp - entropy * _entropy(row) - 2 * sum_p2 * _sum_p2(row) - mean_logprob
    alone = log_mass == -math.inf
    log_k = torch.where(alone, 0, -log_mass - _softplus(-x))  # p_v = k w_v for the others
    k = torch.where(alone, 0, q * torch.exp(-log_mass))
    target = (
        logp * q
        + entropy * p * (_softplus(x) - _entropy(row))
        + logsumexp * p
        + 2 * sum_p2 * p * q * (p - q * concentration)
        + mean_logprob * (1 / vocabulary - p)
    )
    target = torch.where(x == math.inf, 0, target)
    used = (grad != 0).any(1).tolist()
    return GradientRows(
        shift,
        factor * k * (a - entropy * log_k),
        -factor * k * entropy / LOG2_E if used[1] else None,
        factor * 2 * sum_p2 * k.square() if used[3] else None,
        factor * mean_logprob / vocabulary if used[4] else None,
        factor * target,
    )


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _entropy(state: State) -> Tensor:
    x = state.x.clamp(-FAR, FAR)
    return torch.sigmoid(-x) * _softplus(x) + torch.sigmoid(x) * (_softplus(-x) + state.spread)


def _sum_p2(state: State) -> Tensor:
    return torch.sigmoid(-state.x).square() + torch.sigmoid(state.x).square() * state.concentration
