"""What two distributions over one vocabulary have between them, from tiles of their logits, and its gradient.

s are the logits of the policy with p = softmax(s), u those of the reference with q = softmax(u), and d = s - u.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch

DIVERGENCES = ("reverse_kl", "forward_kl", "renyi", "js", "entropy", "ref_entropy", "logprobs", "ref_logprobs")


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

    def absorb(self, z: Tensor, values: Mapping[str, Tensor], scratch: Scratch) -> None:
        """Adds the next columns `z` [n, k], which become their weights, with one tile of values for each name."""
        shift = torch.maximum(self.shift, z.amax(1))
        growth = (self.shift - shift).exp()
        self.shift = shift
        weight = z.sub_(shift[:, None]).exp_()
        self.mass = self.mass * growth + weight.sum(1)
        for name, value in values.items():
            total = weighted_sum(weight, value, scratch)
            self.totals[name] = self.totals[name] * growth + total
        if self.square is not None:
            self.square = self.square * growth.square() + weight.square_().sum(1)

    @property
    def logsumexp(self) -> Tensor:
        """Over all columns so far."""
        return self.shift + self.mass.log()

    @property
    def typical(self) -> Tensor:
        """How far the logit of the mean probability, sum p^2, lies above the largest one."""
        assert self.square is not None
        return self.square.log() - self.mass.log()

    def mean(self, name: str) -> Tensor:
        """E[value], 0 where it was not asked for."""
        total = self.totals.get(name)
        return torch.zeros_like(self.mass) if total is None else total / self.mass


class PairSums:
    """The first pass over the columns of a block of rows: all but the mixture."""

    def __init__(
        self, count: int, like: Tensor, wanted: Sequence[str], orders: Orders, squares: Sequence[bool] = (False, False)
    ):
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
            sums.absorb(z, {name: values[name] for name in sums.totals}, scratch)

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
        log_p, log_q = s.sub_(self.state.lse[:, None]), u.sub_(self.state.ref_lse[:, None])
        log_m = log_mixture(log_p, log_q, self.orders.beta, scratch)
        for name, log_x in (("policy", log_p), ("reference", log_q)):
            weight = torch.exp(log_x, out=scratch.tile("weight", *s.shape))
            total = weighted_sum(weight, log_x.sub_(log_m), scratch)
            setattr(self, name, getattr(self, name) + total)

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
        dz = scratch.tile("dz", *s.shape).zero_()
        if "renyi" in grad:
            bridge = bridged(s, u, alpha, scratch).sub_(state.bridge[:, None]).exp_()
            dz.addcmul_(bridge, (alpha / (alpha - 1) * grad["renyi"])[:, None])
        # p (constant + slope), where slope is what depends on the column
        constant = grad.get("forward_kl", 0) - alpha / (alpha - 1) * grad.get("renyi", 0) - grad.get("logprobs", 0)
        slope = scratch.tile("slope_of_p", *s.shape).copy_(torch.as_tensor(constant, dtype=s.dtype).view(-1, 1))
        if "reverse_kl" in grad:
            drift = torch.sub(s, u, out=scratch.tile("drift", *s.shape)).sub_(state.drift[:, None])
            drift.masked_fill_((grad["reverse_kl"] == 0)[:, None], 0)  # it may be infinite
            slope.addcmul_(drift, grad["reverse_kl"][:, None])
        log_p, log_q = s.sub_(state.lse[:, None]), u.sub_(state.ref_lse[:, None])
        if "entropy" in grad:
            surprise = torch.add(log_p, state.entropy[:, None], out=scratch.tile("drift", *s.shape))
            slope.addcmul_(surprise, -grad["entropy"][:, None])
        if "js" in grad:
            far = log_mixture(log_p, log_q, beta, scratch).neg_().add_(log_p).sub_(state.to_mixture[:, None])
            slope.addcmul_(far, ((1 - beta) * grad["js"])[:, None])
        p = log_p.exp_()
        dz.add_(slope.mul_(p).masked_fill_(p == 0, 0))
        if "forward_kl" in grad:
            dz.addcmul_(log_q.exp_(), -grad["forward_kl"][:, None])
        return dz


def weighted_sum(weight: Tensor, value: Tensor, scratch: Scratch) -> Tensor:
    """Sums over columns; a weight of 0 takes away whatever stands beside it."""
    product = torch.mul(weight, value, out=scratch.tile("product", *weight.shape))
    return product.masked_fill_(weight == 0, 0).sum(1)


def bridged(s: Tensor, u: Tensor, alpha: float, scratch: Scratch) -> Tensor:
    """The logits of p^alpha q^(1 - alpha); of a token that neither allows, -inf."""
    z = torch.mul(s, alpha, out=scratch.tile("bridge", *s.shape)).add_(u, alpha=1 - alpha)
    return z.masked_fill_(z.isnan(), -math.inf)


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float, scratch: Scratch) -> Tensor:
    """Log of m = beta q + (1 - beta) p."""
    share = torch.add(log_q, math.log(beta), out=scratch.tile("share", *log_p.shape))
    rest = torch.add(log_p, math.log1p(-beta), out=scratch.tile("mixture", *log_p.shape))
    return torch.logaddexp(share, rest, out=rest)
