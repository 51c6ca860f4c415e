"""What two distributions over one vocabulary have between them, from tiles of their logits, and its gradient.

s are the logits of the policy with p = softmax(s), u those of the reference with q = softmax(u), and d = s - u.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.tile import FAR, exp_

DIVERGENCES = ("reverse_kl", "forward_kl", "renyi", "js", "entropy", "ref_entropy", "logprobs", "ref_logprobs")

# where log p - log q is cut before it becomes p / q: what it changes has a weight below e^-80
_FAR_APART = 80.0


class PairState(NamedTuple):
    """What the forward pass keeps of every row."""

    lse: Tensor  # of s
    ref_lse: Tensor  # of u
    drift: Tensor  # E_p[d]
    entropy: Tensor  # of p
    bridge: Tensor  # logsumexp of alpha s + (1 - alpha) u
    to_mixture: Tensor  # KL(p || m), where m = beta q + (1 - beta) p


class Orders(NamedTuple):
    """The order of Renyi's divergence, and the reference's share of the mixture in Jensen and Shannon's."""

    alpha: float
    beta: float


class RunningMeans:
    """logsumexp of a row's logits, and the means of other values under their softmax, tile by tile."""

    def __init__(self, count: int, names: Sequence[str], like: Tensor, dtype: torch.dtype, *, squares: bool = False):
        # it starts at the lowest finite number, so that no difference of two shifts is -inf - -inf
        self.shift = like.new_full((count,), torch.finfo(dtype).min, dtype=dtype)
        self.mass = torch.zeros_like(self.shift)
        self.totals = {name: torch.zeros_like(self.shift) for name in names}
        self.square = torch.zeros_like(self.shift) if squares else None
        self.beside = torch.zeros_like(self.shift)  # sum of the squares times what stands beside

    def absorb(self, z: Tensor, values: Mapping[str, Tensor], scratch: Scratch, beside: Tensor | None = None) -> None:
        """Adds the next columns `z` [n, k], which become their weights, with one tile of values for each name."""
        shift = torch.maximum(self.shift, z.amax(1))
        growth = (self.shift - shift).exp()
        self.shift = shift
        weight = exp_(z.sub_(shift[:, None]))
        self.mass = self.mass * growth + weight.sum(1)
        for name, value in values.items():
            total = weighted_sum(weight, value, scratch)
            self.totals[name] = self.totals[name] * growth + total
        if self.square is not None:
            self.square = self.square * growth.square() + weight.square_().sum(1)
            if beside is not None:
                self.beside = self.beside * growth.square() + weighted_sum(weight, beside, scratch)

    @property
    def logsumexp(self) -> Tensor:
        """Over all columns so far."""
        return self.shift + self.mass.log()

    @property
    def typical(self) -> Tensor:
        """How far the logit of the mean probability, sum p^2, lies above the largest one."""
        assert self.square is not None
        return self.square.log() - self.mass.log()

    @property
    def mean_beside(self) -> Tensor:
        """The mean, under the squares of the weights, of what stood beside them."""
        assert self.square is not None
        return self.beside / self.square

    def mean(self, name: str) -> Tensor:
        """E[value], 0 where it was not asked for."""
        total = self.totals.get(name)
        return torch.zeros_like(self.mass) if total is None else total / self.mass


class PairSums:
    """The first pass over the columns of a block of rows: all but the mixture.

    Args:
        rounds: Whether the policy's and the reference's logits come of products that a backward pass has to centre.
    """

    def __init__(
        self, count: int, like: Tensor, wanted: Sequence[str], orders: Orders, rounds: Sequence[bool] = (False, False)
    ):
        # the gradient of reverse KL weighs the reference's logits by p, those of the others by q as well
        self.beside = rounds[1] and "reverse_kl" in wanted and "forward_kl" not in wanted
        squares = rounds[0] or self.beside, rounds[1]
        means = {"reverse_kl": "drift", "entropy": "logits"}, {"forward_kl": "drift", "ref_entropy": "logits"}
        names = [[mean for output, mean in of.items() if output in wanted] for of in means]
        self.policy, self.reference = (
            RunningMeans(count, n, like, like.dtype, squares=s) for n, s in zip(names, squares, strict=True)
        )
        self.bridge = RunningMeans(count, (), like, like.dtype) if "renyi" in wanted else None
        self.orders = orders

    def absorb(self, s: Tensor, u: Tensor, scratch: Scratch) -> None:
        """Adds the next columns; overwrites both tiles."""
        if self.bridge is not None:
            self.bridge.absorb(bridged(s, u, self.orders.alpha, scratch), {}, scratch)
        values = {"drift": torch.sub(s, u, out=scratch.tile("drift", *s.shape))}
        for sums, z in ((self.policy, s), (self.reference, u)):
            if "logits" in sums.totals:
                values["logits"] = scratch.tile("logits", *z.shape).copy_(z)
            beside = u if self.beside and sums is self.policy else None
            sums.absorb(z, {name: values[name] for name in sums.totals}, scratch, beside)

    def close(self) -> tuple[dict[str, Tensor], PairState]:
        """The divergences by name, and the state without a mixture."""
        lse, ref_lse = self.policy.logsumexp, self.reference.logsumexp
        drift, entropy = self.policy.mean("drift"), lse - self.policy.mean("logits")
        zero, alpha = torch.zeros_like(lse), self.orders.alpha
        bridge = zero if self.bridge is None else self.bridge.logsumexp
        found = {
            "reverse_kl": drift - (lse - ref_lse),
            "forward_kl": (lse - ref_lse) - self.reference.mean("drift"),
            "renyi": (bridge - alpha * lse - (1 - alpha) * ref_lse) / (alpha - 1),
            "entropy": entropy,
            "ref_entropy": ref_lse - self.reference.mean("logits"),
        }
        return found, PairState(lse, ref_lse, drift, entropy, bridge, zero)


class MixtureSums:
    """The second pass: the distances of p and q to their mixture, which want both normalisers first."""

    def __init__(self, state: PairState, orders: Orders):
        self.state, self.orders = state, orders
        self.policy = torch.zeros_like(state.lse)
        self.reference = torch.zeros_like(state.lse)

    def absorb(self, s: Tensor, u: Tensor, scratch: Scratch) -> None:
        """Adds the next columns; overwrites both tiles."""
        log_p, log_q = normalised(s, u, self.state)
        apart, above = above_mixture(log_p, log_q, self.orders.beta, scratch)
        self.policy += exp_(log_p).mul_(above).sum(1)
        self.reference += exp_(log_q).mul_(above.sub_(apart)).sum(1)

    def close(self) -> tuple[Tensor, PairState]:
        """The divergence of Jensen and Shannon, and the state with the policy's distance to the mixture."""
        beta = self.orders.beta
        return beta * self.reference + (1 - beta) * self.policy, self.state._replace(to_mixture=self.policy)


class PairGradient(NamedTuple):
    """The gradient of the policy's logits for upstream gradients `grad`, by the names of DIVERGENCES, [n] each."""

    state: PairState
    grad: Mapping[str, Tensor]
    orders: Orders

    def rows(self, at: slice) -> "PairGradient":
        """Of some of the rows."""
        grad = {name: g[at] for name, g in self.grad.items()}
        return PairGradient(PairState(*(x[at] for x in self.state)), grad, self.orders)

    def overwrite(self, s: Tensor, u: Tensor, scratch: Scratch) -> Tensor:
        """Turns logits `s` into their gradient, but for what a target adds; overwrites `u`."""
        state, grad, (alpha, beta) = self.state, self.grad, self.orders
        constant, slope = self._constant(), scratch.tile("slope_of_p", *s.shape)
        bridge = exp_(bridged(s, u, alpha, scratch).sub_(state.bridge[:, None])) if "renyi" in grad else None
        log_p, log_q = normalised(s, u, state)
        dz = slope.copy_(constant[:, None])  # over p, for now
        if "reverse_kl" in grad:
            apart = torch.sub(log_p, log_q, out=scratch.tile("drift", *s.shape))
            dz.addcmul_(apart, grad["reverse_kl"][:, None])
        if "entropy" in grad:
            dz.addcmul_(log_p, -grad["entropy"][:, None])
        if "js" in grad:
            _, above = above_mixture(log_p, log_q, beta, scratch)
            dz.addcmul_(above, ((1 - beta) * grad["js"])[:, None])
        dz.mul_(exp_(log_p))
        if "forward_kl" in grad:
            dz.addcmul_(exp_(log_q), -grad["forward_kl"][:, None])
        if bridge is not None:
            dz.addcmul_(bridge, (alpha / (alpha - 1) * grad["renyi"])[:, None])
        return dz

    def _constant(self) -> Tensor:
        """What every column's gradient over p has, [n]."""
        state, grad, (alpha, beta) = self.state, self.grad, self.orders
        reverse_kl = state.drift - (state.lse - state.ref_lse)
        parts = {
            "reverse_kl": -reverse_kl,
            "forward_kl": 1.0,
            "renyi": -alpha / (alpha - 1),
            "js": -(1 - beta) * state.to_mixture,
            "entropy": -state.entropy,
            "logprobs": -1.0,
        }
        total = torch.zeros_like(state.lse)
        for name, part in parts.items():
            if name in grad:
                total += torch.where(grad[name] == 0, 0, grad[name] * part)  # a divergence may be infinite
        return total


def normalised(s: Tensor, u: Tensor, state: PairState) -> tuple[Tensor, Tensor]:
    """The logarithms of p and q in place of the logits, cut where p and q are 0 in every float type."""
    return s.sub_(state.lse[:, None]).clamp_(min=-FAR), u.sub_(state.ref_lse[:, None]).clamp_(min=-FAR)


def above_mixture(log_p: Tensor, log_q: Tensor, beta: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The distance log p - log q, and log p - log m of the mixture m = beta q + (1 - beta) p."""
    apart = torch.sub(log_p, log_q, out=scratch.tile("drift", *log_p.shape)).clamp_(-_FAR_APART, _FAR_APART)
    q_over_p = exp_(torch.neg(apart, out=scratch.tile("mixture", *log_p.shape)))
    return apart, q_over_p.sub_(1).mul_(beta).log1p_().neg_()


def weighted_sum(weight: Tensor, value: Tensor, scratch: Scratch) -> Tensor:
    """Sums over columns; a weight of 0 takes away an infinity that stands beside it."""
    product = torch.mul(weight, value, out=scratch.tile("product", *weight.shape))
    return product.nan_to_num_(0.0, math.inf, -math.inf).sum(1)


def bridged(s: Tensor, u: Tensor, alpha: float, scratch: Scratch) -> Tensor:
    """The logits of p^alpha q^(1 - alpha); of a token that neither allows, -inf."""
    z = torch.mul(s, alpha, out=scratch.tile("bridge", *s.shape)).add_(u, alpha=1 - alpha)
    return z.nan_to_num_(-math.inf, math.inf, -math.inf)
