"""Two models' logits for Triton kernels: running sums, their merge, the mixture, and the one backward formula.

The formulas are those of `rlloss_kernels.pair`, with the same names, and so are the PAIR_SUMS, which a kernel carries
for every row over all columns so far. They are closed there, once for all implementations.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.gpu.functions import FAR, INF, LOG2_E, LOWEST, loaded, store
from rlloss_kernels.pair import DIVERGENCES, PAIR_SUMS, Orders, PairState, completed, pair_gradient
from rlloss_kernels.pair import FAR_APART as _FAR_APART

FAR_APART: tl.constexpr = tl.constexpr(_FAR_APART)
_ROWS = 128  # of a program that merges


class Kept(NamedTuple):
    """Which of the sums are wanted; known when a kernel is compiled."""

    drift: bool
    ref_drift: bool
    moment: bool
    ref_moment: bool
    target: bool
    bridge: bool

    @classmethod
    def of(cls, wanted: Sequence[bool]) -> "Kept":
        """For some of the DIVERGENCES."""
        reverse_kl, forward_kl, renyi, _, entropy, ref_entropy, logprobs, ref_logprobs = wanted
        return cls(reverse_kl, forward_kl, entropy, ref_entropy, logprobs or ref_logprobs, renyi)


class Terms(NamedTuple):
    """Which terms of the gradient there are; known when a kernel is compiled."""

    reverse_kl: bool
    forward_kl: bool
    renyi: bool
    js: bool
    entropy: bool
    logprobs: bool

    @classmethod
    def of(cls, wanted: Sequence[bool]) -> "Terms":
        """For some of the DIVERGENCES."""
        reverse_kl, forward_kl, renyi, js, entropy, _, logprobs, _ = wanted
        return cls(reverse_kl, forward_kl, renyi, js, entropy, logprobs)


def merged_sums(parts: Tensor, number: Tensor, positions: Tensor | None = None) -> Tensor:
    """The sums [k, N] over all parts [P, k, N], merged in their order; k is 12 for PAIR_SUMS, 2 for a mixture's.

    Args:
        number: How many rows there are, the first ones.
        positions: Where to put them; the others are 0.
    """
    groups, kept, tokens = parts.shape
    sums = torch.zeros((kept, tokens), dtype=torch.float32, device=parts.device)
    if tokens:
        _merge_kernel[(triton.cdiv(tokens, _ROWS),)](
            parts,
            sums,
            number,
            number if positions is None else positions,
            tokens,
            groups,
            positions is not None,
            kept != len(PAIR_SUMS),
            _ROWS,
        )
    return sums


def complete(
    sums: Tensor,
    loss_mask: Tensor | None,
    wanted: Sequence[bool],
    orders: Orders,
    distances: Callable[[PairState], Tensor],
    group: str,
    found: Tensor,
    state: Tensor,
) -> None:
    """Fills in `found` [8, N] and PairState [6, N] of the tokens inside `loss_mask`, which `sums` [12, N] are of."""
    values, kept = completed(sums, orders, wanted, distances, group)
    for row, value in [*zip(state, kept, strict=True), *((found[DIVERGENCES.index(n)], x) for n, x in values.items())]:
        row.copy_(value if loss_mask is None else torch.where(loss_mask.flatten(), value, 0))


def coefficients(
    grad: Tensor, state: Tensor, temperature: Tensor | None, wanted: Sequence[bool], orders: Orders
) -> Tensor:
    """Those of PairGradient [10, N], in its order, for upstream gradients [8, N]; meaningless for masked tokens."""
    factor = 1.0 if temperature is None else 1 / temperature.flatten()
    gradient = pair_gradient(state, grad, wanted, orders, factor)
    zero = torch.zeros_like(gradient.constant)
    return torch.stack([zero if x is None else x for x in gradient])


@triton.jit
def no_pair_sums(ROWS: tl.constexpr):
    """The sums over no columns. A shift is finite, so that no difference of two of them is -inf - -inf."""
    zero = tl.zeros([ROWS], tl.float32)
    lowest = zero + LOWEST
    return lowest, zero, zero, zero, zero, lowest, zero, zero, zero, zero, lowest, zero


@triton.jit
def absorbed_pair(s, u, is_column, is_target, alpha, sums, KEPT):
    """The sums with the columns of tiles of the logits `s` and `u` [R, C] added."""
    bridge_shift, bridge_mass = sums[10:12]
    if KEPT.bridge:
        b = tl.where(is_column, bridged(s, u, alpha), -INF)
        top = tl.maximum(bridge_shift, tl.max(b, 1))
        bridge_mass = bridge_mass * tl.exp(bridge_shift - top) + tl.sum(tl.exp2((b - top[:, None]) * LOG2_E), 1)
        bridge_shift = top
    d = s - u
    policy = _absorbed(s, d, is_column, is_target, sums[0:5], KEPT.drift, KEPT.moment, KEPT.target)
    reference = _absorbed(u, d, is_column, is_target, sums[5:10], KEPT.ref_drift, KEPT.ref_moment, KEPT.target)
    return policy + reference + (bridge_shift, bridge_mass)


@triton.jit
def _absorbed(z, d, is_column, is_target, sums, DRIFT: tl.constexpr, MOMENT: tl.constexpr, TARGET: tl.constexpr):
    shift, mass, drift, moment, target = sums
    if TARGET:
        target += tl.sum(tl.where(is_target & is_column, z, 0.0), 1)  # it may be another shard's
    z = tl.where(is_column, z, -INF)
    top = tl.maximum(shift, tl.max(z, 1))
    moved = shift - top
    growth = tl.exp(moved)
    below = z - top[:, None]
    w = tl.exp2(below * LOG2_E)
    if MOMENT:
        moment = (moment + mass * tl.maximum(moved, -FAR)) * growth + tl.sum(w * tl.maximum(below, -FAR), 1)
    if DRIFT:
        drift = _rescaled(drift, growth) + tl.sum(tl.where(w == 0.0, 0.0, w * d), 1)
    return top, mass * growth + tl.sum(w, 1), drift, moment, target


@triton.jit
def _rescaled(total, growth):
    """A sum over columns whose weights grow by a factor, or become 0: it may be infinite."""
    return tl.where(growth == 0.0, 0.0, total * growth)


@triton.jit
def joined_pair(a, b):
    """The sums over the columns of `a` and those of `b`."""
    shift = tl.maximum(a[10], b[10])
    mass = a[11] * tl.exp(a[10] - shift) + b[11] * tl.exp(b[10] - shift)
    return _joined(a[0:5], b[0:5]) + _joined(a[5:10], b[5:10]) + (shift, mass)


@triton.jit
def _joined(a, b):
    shift_a, mass_a, drift_a, moment_a, target_a = a
    shift_b, mass_b, drift_b, moment_b, target_b = b
    shift = tl.maximum(shift_a, shift_b)
    moved_a, moved_b = shift_a - shift, shift_b - shift
    growth_a, growth_b = tl.exp(moved_a), tl.exp(moved_b)
    drift = _rescaled(drift_a, growth_a) + _rescaled(drift_b, growth_b)
    moment = (moment_a + mass_a * tl.maximum(moved_a, -FAR)) * growth_a
    moment += (moment_b + mass_b * tl.maximum(moved_b, -FAR)) * growth_b
    return shift, mass_a * growth_a + mass_b * growth_b, drift, moment, target_a + target_b


@triton.jit
def bridged(s, u, alpha):
    """The logits of p^alpha q^(1 - alpha); of a token that neither allows, -inf."""
    b = tl.where(alpha > 1.0, s + (alpha - 1.0) * (s - u), u + alpha * (s - u))
    return tl.where(b == b, b, -INF)


@triton.jit
def mixture_distances(s, u, is_column, lse, ref_lse, beta):
    """What a tile's columns have in the distances of p and q to their mixture."""
    log_p = _cut(tl.where(is_column, s - lse[:, None], -INF))
    log_q = _cut(tl.where(is_column, u - ref_lse[:, None], -INF))
    apart, above = _above_mixture(log_p, log_q, beta)
    return tl.sum(tl.exp2(log_p * LOG2_E) * above, 1), tl.sum(tl.exp2(log_q * LOG2_E) * (above - apart), 1)


@triton.jit
def _above_mixture(log_p, log_q, beta):
    """The distance log p - log q, and log p - log m of the mixture m = beta q + (1 - beta) p."""
    apart = tl.minimum(tl.maximum(log_p - log_q, -FAR_APART), FAR_APART)
    return apart, -tl.log(1.0 + beta * (tl.exp2(-apart * LOG2_E) - 1.0))


@triton.jit
def _cut(x):
    """A logarithm of p or q, cut where these are 0 in every float type; NaN stays."""
    return tl.where(x < -FAR, -FAR, x)


@triton.jit
def pair_logit_gradient(s, u, is_target, alpha, beta, row, TERMS):
    """The gradient of a tile of the policy's logits `s` [R, C], from its rows' coefficients."""
    lse, ref_lse, bridge, constant, reverse_kl, forward_kl, renyi, js, entropy, logprobs = row
    dz = tl.zeros_like(s)  # in an order in which little has to be kept at a time
    if TERMS.renyi:
        r = tl.exp2((bridged(s, u, alpha) - bridge[:, None]) * LOG2_E)
        dz += tl.where(renyi[:, None] == 0.0, 0.0, renyi[:, None] * r)  # it may be infinite
    log_p, log_q = _cut(s - lse[:, None]), _cut(u - ref_lse[:, None])
    if TERMS.forward_kl:
        dz += forward_kl[:, None] * tl.exp2(log_q * LOG2_E)
    over_p = tl.zeros_like(s) + constant[:, None]
    if TERMS.js:
        _, above = _above_mixture(log_p, log_q, beta)
        over_p += js[:, None] * above
    if TERMS.reverse_kl:
        over_p += reverse_kl[:, None] * (log_p - log_q)
    if TERMS.entropy:
        over_p += entropy[:, None] * log_p
    dz += over_p * tl.exp2(log_p * LOG2_E)
    if TERMS.logprobs:
        dz += tl.where(is_target, logprobs[:, None], 0.0)
    return dz


@triton.jit(do_not_specialize=["tokens", "groups"])
def _merge_kernel(
    parts,
    sums,
    number,
    positions,
    tokens,
    groups,
    HAS_POSITIONS: tl.constexpr,
    IS_MIXTURE: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.load(number)
    if tl.program_id(0) * ROWS < rows:
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        is_row = r < rows
        n = tl.zeros([], tl.int64) + tokens
        p = r
        if HAS_POSITIONS:
            p = tl.load(positions + r, mask=is_row, other=0)
        if IS_MIXTURE:
            own, ref = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
            for group in range(groups):
                own_part, ref_part = loaded(parts + group * (2 * n) + r, n, is_row, 2)
                own += own_part
                ref += ref_part
            store(sums + p, n, is_row, (own, ref), 2)
        else:
            total = no_pair_sums(ROWS)
            for group in range(groups):
                total = joined_pair(total, loaded(parts + group * (12 * n) + r, n, is_row, 12))
            store(sums + p, n, is_row, total, 12)
