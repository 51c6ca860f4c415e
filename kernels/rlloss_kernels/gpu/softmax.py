"""Softmax statistics for Triton kernels: running sums, their merge, their closing, and the one backward formula.

The formulas are those of `rlloss_kernels.statistics`, with the same names, and so are the sums and the State. A kernel
carries, for every row, the sums over all columns so far but the target's:

    shift    the largest logit            mass    sum of w = exp(z - shift)
    target   the target's logit           moment  sum of w (z - shift)
    total    sum of z - base(shift)       square  sum of w^2

Which of moment, square and total it needs are flags, known when it is compiled.
"""

import triton
import triton.language as tl

from rlloss_kernels.gpu.functions import FAR, INF, LOG2_E, LOWEST, logaddexp, sigmoid, softplus

# the rows of a tensor of sums, in the order in which a prefix of them serves the usual outputs
SUMS = ("shift", "target", "mass", "moment", "square", "total", "columns")


def sum_rows(entropy: bool, square: bool, total: bool) -> int:
    """How many of SUMS have to be kept for these outputs."""
    if total:
        return 7
    if square:
        return 5
    return 4 if entropy else 3


@triton.jit
def no_sums(ROWS: tl.constexpr):
    """The sums over no columns. The shift is finite, so that no difference of two of them is -inf - -inf."""
    zero = tl.zeros([ROWS], tl.float32)
    return zero + LOWEST, zero, zero, zero, zero, zero


@triton.jit
def base(shift):
    """What a sum of logits is counted from: the shift, but for a row that has none yet."""
    return tl.where(shift == LOWEST, 0.0, shift)


@triton.jit
def absorbed(
    z,
    is_column,
    is_target,
    before,
    sums,
    ENTROPY: tl.constexpr,
    SQUARE: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """The sums with the columns of a tile of logits `z` [R, C] added; `before` is how many columns there were."""
    shift, target, mass, moment, square, total = sums
    target += tl.sum(tl.where(is_target & is_column, z, 0.0), 1)  # it may be another shard's
    others = tl.where(is_column, tl.where(is_target, -INF, z), -INF)
    top = tl.maximum(shift, tl.max(others, 1))
    moved = shift - top
    growth = tl.exp(moved)
    if TOTAL:
        total += before * (base(shift) - base(top)) + tl.sum(tl.where(is_column, z - base(top)[:, None], 0.0), 1)
    u = others - top[:, None]
    w = tl.exp2(u * LOG2_E)
    if ENTROPY:
        moment = (moment + mass * tl.maximum(moved, -FAR)) * growth + tl.sum(w * tl.maximum(u, -FAR), 1)
    if SQUARE:
        square = square * growth * growth + tl.sum(w * w, 1)
    mass = mass * growth + tl.sum(w, 1)
    return top, target, mass, moment, square, total


@triton.jit
def joined(a, b):
    """The sums (shift, target, mass, moment, square, total, columns) over the columns of `a` and those of `b`."""
    shift_a, target_a, mass_a, moment_a, square_a, total_a, columns_a = a
    shift_b, target_b, mass_b, moment_b, square_b, total_b, columns_b = b
    shift = tl.maximum(shift_a, shift_b)
    moved_a, moved_b = shift_a - shift, shift_b - shift
    growth_a, growth_b = tl.exp(moved_a), tl.exp(moved_b)
    moment = (moment_a + mass_a * tl.maximum(moved_a, -FAR)) * growth_a
    moment += (moment_b + mass_b * tl.maximum(moved_b, -FAR)) * growth_b
    square = square_a * growth_a * growth_a + square_b * growth_b * growth_b
    total = total_a + columns_a * (base(shift_a) - base(shift))
    total += total_b + columns_b * (base(shift_b) - base(shift))
    mass = mass_a * growth_a + mass_b * growth_b
    return shift, target_a + target_b, mass, moment, square, total, columns_a + columns_b


@triton.jit
def closed(sums, vocabulary, ENTROPY: tl.constexpr, SQUARE: tl.constexpr, TOTAL: tl.constexpr):
    """The State and then the five statistics."""
    shift, target, mass, moment, square, total = sums
    log_mass = tl.log(mass)
    x = (shift - target) + log_mass
    x = tl.where(target == INF, float("nan"), x)  # as log_softmax answers a logit of +inf
    alone = mass == 0.0
    spread, concentration = tl.zeros_like(x), tl.zeros_like(x)
    entropy, sum_p2, mean_logprob = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    if ENTROPY:
        spread = tl.where(alone, 0.0, log_mass - moment / mass)
        entropy = entropy_of(x, spread)
    if SQUARE:
        concentration = tl.where(alone, 0.0, square / (mass * mass))
        sum_p2 = sum_p2_of(x, concentration)
    if TOTAL:
        mean_logprob = total / vocabulary - logaddexp(log_mass + (shift - base(shift)), target - base(shift))
    logsumexp = logaddexp(shift + log_mass, target)
    return shift, log_mass, x, spread, concentration, -softplus(x), entropy, logsumexp, sum_p2, mean_logprob


@triton.jit
def entropy_of(x, spread):
    """The entropy of all columns from that of the others."""
    x = tl.minimum(tl.maximum(x, -FAR), FAR)
    return sigmoid(-x) * softplus(x) + sigmoid(x) * (softplus(-x) + spread)


@triton.jit
def sum_p2_of(x, concentration):
    """The sum of squares over all columns from that over the others."""
    p, q = sigmoid(-x), sigmoid(x)
    return p * p + q * q * concentration


@triton.jit
def coefficients(state, grad, vocabulary, factor, ENTROPY: tl.constexpr, SQUARE: tl.constexpr, TOTAL: tl.constexpr):
    """(shift, scale, slope, square, uniform, target) of a row, for the gradient of its logits times `factor`.

    dz_v = w (scale + slope u + square w) + uniform with u = log2(e) (z - shift) and w = 2^u; at the target, `target`.
    """
    shift, log_mass, x, spread, concentration = state
    g_logp, g_entropy, g_logsumexp, g_sum_p2, g_mean = grad
    p, q = sigmoid(-x), sigmoid(x)
    alone = log_mass == -INF
    log_k = tl.where(alone, 0.0, -log_mass - softplus(-x))  # p_v = k w_v for the others
    k = tl.where(alone, 0.0, q * tl.exp(-log_mass))
    a = g_logsumexp - g_logp
    target = g_logp * q + g_logsumexp * p
    slope, square, uniform = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    if ENTROPY:
        entropy = entropy_of(x, spread)
        a -= g_entropy * (entropy + log_k)
        target += g_entropy * p * (softplus(x) - entropy)
        slope = -factor * k * g_entropy / LOG2_E
    if SQUARE:
        a -= 2.0 * g_sum_p2 * sum_p2_of(x, concentration)
        target += 2.0 * g_sum_p2 * p * q * (p - q * concentration)
        square = factor * 2.0 * g_sum_p2 * k * k
    if TOTAL:
        a -= g_mean
        target += g_mean * (1.0 / vocabulary - p)
        uniform = factor * g_mean / vocabulary
    target = tl.where(x == INF, 0.0, target)  # a forbidden target learns nothing
    return shift, factor * k * a, slope, square, uniform, factor * target


@triton.jit
def logit_gradient(z, is_target, row, ENTROPY: tl.constexpr, SQUARE: tl.constexpr, TOTAL: tl.constexpr):
    """The gradient of a tile of logits `z` [R, C], from its rows' coefficients."""
    shift, scale, slope, square, uniform, target = row
    u = (z - shift[:, None]) * LOG2_E
    w = tl.exp2(u)
    dz = tl.zeros_like(z) + scale[:, None]
    if ENTROPY:
        dz += slope[:, None] * tl.maximum(u, -FAR)
    if SQUARE:
        dz += square[:, None] * w
    dz *= w
    if TOTAL:
        dz = tl.where(z == -INF, 0.0, dz + uniform[:, None])  # a forbidden token learns nothing
    return tl.where(is_target, target[:, None], dz)
