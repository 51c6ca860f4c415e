"""What two distributions over one vocabulary have between them, from tiles of their logits, and its gradient.

s are the logits of the policy with p = softmax(s), u those of the reference with q = softmax(u), and d = s - u.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch
from rlloss_kernels.shards import summed_
from rlloss_kernels.tile import FAR, Targets, exp_

DIVERGENCES = ("reverse_kl", "forward_kl", "renyi", "js", "entropy", "ref_entropy", "logprobs", "ref_logprobs")

# The sums over a row's columns that all but `js` follow from: of the policy, of the reference, and of the bridge
# between them, whose logits are alpha s + (1 - alpha) u. With weights w = exp(z - shift) of a distribution's logits z:
#   shift   the largest logit    drift    sum of w d              target   the target's logit
#   mass    sum of w             moment   sum of w (z - shift)
PAIR_SUMS = (
    *("shift", "mass", "drift", "moment", "target"),
    *("ref_shift", "ref_mass", "ref_drift", "ref_moment", "ref_target"),
    *("bridge_shift", "bridge_mass"),
)

# where log p - log q is cut before it becomes p / q: what it changes has a weight below e^-80
FAR_APART = 80.0


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


class RunningSums:
    """The sums over a row's columns of one distribution, tile by tile."""

    def __init__(self, count: int, like: Tensor, *, drift: bool = False, moment: bool = False, squares: bool = False):
        # it starts at the lowest finite number, so that no difference of two shifts is -inf - -inf
        self.shift = like.new_full((count,), torch.finfo(like.dtype).min)
        self.mass = torch.zeros_like(self.shift)
        self.drift = torch.zeros_like(self.shift) if drift else None
        self.moment = torch.zeros_like(self.shift) if moment else None
        self.target = torch.zeros_like(self.shift)
        self.square = torch.zeros_like(self.shift) if squares else None
        self.beside = torch.zeros_like(self.shift)  # sum of the squares times what stands beside

    def absorb(self, z: Tensor, scratch: Scratch, apart: Tensor | None = None, beside: Tensor | None = None) -> None:
        """Adds the next columns `z` [n, k], which become their weights; `apart` is d, where a drift is wanted."""
        shift = torch.maximum(self.shift, z.amax(1))
        moved = self.shift - shift
        growth = moved.exp()
        self.shift = shift
        z.sub_(shift[:, None])
        below = None if self.moment is None else torch.clamp(z, min=-FAR, out=scratch.tile("moment", *z.shape))
        weight = exp_(z)
        if self.moment is not None and below is not None:
            moment = (self.moment + self.mass * moved.clamp(min=-FAR)) * growth
            self.moment = moment + below.mul_(weight).sum(1)
        self.mass = self.mass * growth + weight.sum(1)
        if self.drift is not None and apart is not None:
            self.drift = _rescaled(self.drift, growth) + _weighted_sum(weight, apart, scratch)
        if self.square is not None:
            self.square = self.square * growth.square() + weight.square_().sum(1)
            if beside is not None:
                self.beside = _rescaled(self.beside, growth.square()) + _weighted_sum(weight, beside, scratch)

    @property
    def packed(self) -> list[Tensor]:
        """The first five of PAIR_SUMS, 0 where not wanted."""
        zero = torch.zeros_like(self.mass)
        optional = (zero if x is None else x for x in (self.drift, self.moment))
        return [self.shift, self.mass, *optional, self.target]

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
        squares, ref_squares = rounds[0] or self.beside, rounds[1]
        of_policy, of_reference = "reverse_kl" in wanted, "forward_kl" in wanted
        self.policy = RunningSums(count, like, drift=of_policy, moment="entropy" in wanted, squares=squares)
        self.reference = RunningSums(
            count, like, drift=of_reference, moment="ref_entropy" in wanted, squares=ref_squares
        )
        self.bridge = RunningSums(count, like) if "renyi" in wanted else None
        self.drifts = of_policy or of_reference
        self.orders = orders

    def absorb(self, s: Tensor, u: Tensor, targets: Targets, scratch: Scratch) -> None:
        """Adds the next columns; overwrites both tiles."""
        self.policy.target += targets.read(s)
        self.reference.target += targets.read(u)
        if self.bridge is not None:
            self.bridge.absorb(bridged(s, u, self.orders.alpha, scratch), scratch)
        apart = torch.sub(s, u, out=scratch.tile("drift", *s.shape)) if self.drifts else None
        self.policy.absorb(s, scratch, apart, u if self.beside else None)
        self.reference.absorb(u, scratch, apart)

    @property
    def packed(self) -> Tensor:
        """All of PAIR_SUMS [12, n], 0 where not wanted."""
        zero = torch.zeros_like(self.policy.shift)
        bridge = [zero, zero] if self.bridge is None else [self.bridge.shift, self.bridge.mass]
        return torch.stack([*self.policy.packed, *self.reference.packed, *bridge])


def merged_sums(parts: Tensor) -> Tensor:
    """The sums [12, n] over all columns, of which `parts` [P, 12, n] holds those over each part."""
    found = []
    for shift, mass, drift, moment, target in (parts[:, :5].unbind(1), parts[:, 5:10].unbind(1)):
        top = shift.amax(0)
        moved = shift - top
        growth = moved.exp()
        moment = (moment + mass * moved.clamp(min=-FAR)) * growth
        found += [top, *(x.sum(0) for x in (mass * growth, _rescaled(drift, growth), moment, target))]
    shift, mass = parts[:, 10:].unbind(1)
    top = shift.amax(0)
    return torch.stack([*found, top, (mass * (shift - top).exp()).sum(0)])


def closed(sums: Tensor, orders: Orders) -> tuple[dict[str, Tensor], PairState]:
    """The divergences by name, meaningless where their sums were not wanted, and the state; all without a mixture."""
    shift, mass, drift, moment, target, *others, bridge_shift, bridge_mass = sums
    ref_shift, ref_mass, ref_drift, ref_moment, ref_target = others
    alpha, log_mass, ref_log_mass, log_bridge = orders.alpha, mass.log(), ref_mass.log(), bridge_mass.log()
    lse, ref_lse = shift + log_mass, ref_shift + ref_log_mass
    # what large logits have in common is taken away first, for it would cost the digits of what is left
    rise, log_ratio = shift - ref_shift, log_mass - ref_log_mass
    above = alpha * (bridge_shift - shift) + (1 - alpha) * (bridge_shift - ref_shift)
    log_sum = above + (log_bridge - alpha * log_mass - (1 - alpha) * ref_log_mass)
    is_endless = bridge_shift == math.inf  # the reference forbids a token that the policy allows, and alpha is above 1
    mean_drift, entropy = drift / mass, log_mass - moment / mass
    found = {
        "reverse_kl": (mean_drift - rise) - log_ratio,
        "forward_kl": (rise - ref_drift / ref_mass) + log_ratio,
        "renyi": torch.where(is_endless, bridge_shift - lse, log_sum) / (alpha - 1),
        "entropy": entropy,
        "ref_entropy": ref_log_mass - ref_moment / ref_mass,
        "logprobs": (target - shift) - log_mass,
        "ref_logprobs": (ref_target - ref_shift) - ref_log_mass,
    }
    bridge = torch.where(is_endless, bridge_shift, bridge_shift + log_bridge)
    return found, PairState(lse, ref_lse, mean_drift, entropy, bridge, torch.zeros_like(lse))


def completed(
    sums: Tensor, orders: Orders, wanted: Sequence[bool], distances: Callable[[PairState], Tensor], group: str
) -> tuple[dict[str, Tensor], PairState]:
    """Those divergences that are wanted, by name, and the state.

    Args:
        distances: Sums up those of p and q to their mixture [2, n], for which both normalisers have to be known.
        group: Over which these are summed, where other ranks hold other columns of the logits.
    """
    values, state = closed(sums, orders)
    names = [name for name, want in zip(DIVERGENCES, wanted, strict=True) if want]
    if "js" in names:
        to_mixture, ref_to_mixture = summed_(distances(state), group) if group else distances(state)
        values["js"] = orders.beta * ref_to_mixture + (1 - orders.beta) * to_mixture
        state = state._replace(to_mixture=to_mixture)
    return {name: values[name] for name in names}, state


def mixture_distances(s: Tensor, u: Tensor, state: PairState, orders: Orders, scratch: Scratch) -> Tensor:
    """The parts [2, n] that some columns have in the distances of p and q to their mixture; overwrites both tiles."""
    log_p, log_q = normalised(s, u, state.lse, state.ref_lse)
    apart, above = above_mixture(log_p, log_q, orders.beta, scratch)
    of_policy = exp_(log_p).mul_(above).sum(1)
    return torch.stack([of_policy, exp_(log_q).mul_(above.sub_(apart)).sum(1)])


class PairGradient(NamedTuple):
    """The gradient of a row of the policy's logits, its coefficients fixed by the row's state and upstream gradients.

    ds_v = p_v (constant + reverse_kl log(p_v / q_v) + entropy log p_v + js log(p_v / m_v)) + forward_kl q_v
    + renyi r_v, and `logprobs` more at the target, where r = softmax(alpha s + (1 - alpha) u). None stands for a term
    that is 0 in every row.
    """

    lse: Tensor
    ref_lse: Tensor
    bridge: Tensor
    constant: Tensor
    reverse_kl: Tensor | None
    forward_kl: Tensor | None
    renyi: Tensor | None
    js: Tensor | None
    entropy: Tensor | None
    logprobs: Tensor | None

    def rows(self, at: slice) -> "PairGradient":
        """Of some of the rows."""
        return PairGradient(*(None if x is None else x[at] for x in self))  # type: ignore[arg-type]

    def overwrite(self, s: Tensor, u: Tensor, targets: Targets, orders: Orders, scratch: Scratch) -> Tensor:
        """Turns logits `s` into their gradient; overwrites `u`."""
        dz, bridge = scratch.tile("slope_of_p", *s.shape), None
        if self.renyi is not None:
            bridge = exp_(bridged(s, u, orders.alpha, scratch).sub_(self.bridge[:, None]))
        log_p, log_q = normalised(s, u, self.lse, self.ref_lse)
        dz.copy_(self.constant[:, None])  # over p, for now
        if self.reverse_kl is not None:
            apart = torch.sub(log_p, log_q, out=scratch.tile("drift", *s.shape))
            dz.addcmul_(apart, self.reverse_kl[:, None])
        if self.entropy is not None:
            dz.addcmul_(log_p, self.entropy[:, None])
        if self.js is not None:
            _, above = above_mixture(log_p, log_q, orders.beta, scratch)
            dz.addcmul_(above, self.js[:, None])
        dz.mul_(exp_(log_p))
        if self.forward_kl is not None:
            dz.addcmul_(exp_(log_q), self.forward_kl[:, None])
        if bridge is not None and self.renyi is not None:  # it may be infinite
            dz.addcmul_(bridge.masked_fill_((self.renyi == 0)[:, None], 0), self.renyi[:, None])
        if self.logprobs is not None:
            targets.write(dz, targets.read(dz) + self.logprobs)
        return dz


def pair_gradient(
    state: Tensor, grad: Tensor, wanted: Sequence[bool], orders: Orders, factor: Tensor | float
) -> PairGradient:
    """The coefficients for PairState [6, n] and upstream gradients [8, n], all times `factor` [n]."""
    row, (alpha, beta) = PairState(*state), orders
    grads = {name: g for name, g, want in zip(DIVERGENCES, grad, wanted, strict=True) if want}
    of_p = {
        "reverse_kl": (row.lse - row.ref_lse) - row.drift,
        "forward_kl": 1.0,
        "renyi": -alpha / (alpha - 1),
        "js": -(1 - beta) * row.to_mixture,
        "entropy": -row.entropy,
        "logprobs": -1.0,
    }
    of_its_own = {
        "reverse_kl": 1.0,
        "forward_kl": -1.0,
        "renyi": alpha / (alpha - 1),
        "js": 1 - beta,
        "entropy": -1.0,
        "logprobs": 1.0,
    }
    constant = torch.zeros_like(row.lse)
    for name, part in of_p.items():
        if name in grads:
            constant += torch.where(grads[name] == 0, 0, grads[name] * part)  # a divergence may be infinite
    terms = {name: grads[name] * part * factor if name in grads else None for name, part in of_its_own.items()}
    return PairGradient(row.lse, row.ref_lse, row.bridge, constant * factor, **terms)


def normalised(s: Tensor, u: Tensor, lse: Tensor, ref_lse: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of p and q in place of the logits, cut where p and q are 0 in every float type."""
    return s.sub_(lse[:, None]).clamp_(min=-FAR), u.sub_(ref_lse[:, None]).clamp_(min=-FAR)


def above_mixture(log_p: Tensor, log_q: Tensor, beta: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """The distance log p - log q, and log p - log m of the mixture m = beta q + (1 - beta) p."""
    apart = torch.sub(log_p, log_q, out=scratch.tile("drift", *log_p.shape)).clamp_(-FAR_APART, FAR_APART)
    q_over_p = exp_(torch.neg(apart, out=scratch.tile("mixture", *log_p.shape)))
    return apart, q_over_p.sub_(1).mul_(beta).log1p_().neg_()


def bridged(s: Tensor, u: Tensor, alpha: float, scratch: Scratch) -> Tensor:
    """The logits of p^alpha q^(1 - alpha), u + alpha d; of a token that neither allows, -inf."""
    z, near, rate = torch.sub(s, u, out=scratch.tile("bridge", *s.shape)), u, alpha
    if alpha > 1:  # as s + (alpha - 1) d, whose infinity is that of what the reference forbids
        near, rate = s, alpha - 1
    return z.mul_(rate).add_(near).nan_to_num_(-math.inf, math.inf, -math.inf)


def _weighted_sum(weight: Tensor, value: Tensor, scratch: Scratch) -> Tensor:
    """Sums over columns; a weight of 0 takes away an infinity that stands beside it."""
    product = torch.mul(weight, value, out=scratch.tile("product", *weight.shape))
    return product.nan_to_num_(0.0, math.inf, -math.inf).sum(1)


def _rescaled(total: Tensor, growth: Tensor) -> Tensor:
    """The same of a sum over columns whose weights become 0."""
    return torch.where(growth == 0, 0, total * growth)
