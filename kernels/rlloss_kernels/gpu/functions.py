"""What every Triton kernel needs: its device, the numbers of rows, scalar functions as exact as float32 allows."""

import torch
import triton
import triton.language as tl

from rlloss_kernels.implementation import is_interpreted
from rlloss_kernels.tile import FAR as _FAR
from rlloss_kernels.tile import LOG2_E as _LOG2_E

# The interpreter keeps bfloat16 as bare bits, which its tl.dot would multiply as integers.
INTERPRETED = is_interpreted()
WIDE: tl.constexpr = tl.constexpr(INTERPRETED)
LOG2_E: tl.constexpr = tl.constexpr(_LOG2_E)
FAR: tl.constexpr = tl.constexpr(_FAR)
LOWEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).min)
INF: tl.constexpr = tl.constexpr(float("inf"))


def processors(device: torch.device) -> int:
    """How many programs run at a time: those of a persistent kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit
def loaded(pointer, n, mask, COUNT: tl.constexpr):
    """So many numbers of every row, `n` apart; 0 outside the mask."""
    numbers = (tl.load(pointer, mask=mask, other=0.0),)
    for k in tl.static_range(1, COUNT):
        numbers = numbers + (tl.load(pointer + k * n, mask=mask, other=0.0),)  # noqa: RUF005
    return numbers


@triton.jit
def store(pointer, n, mask, numbers, COUNT: tl.constexpr):
    """Writes the first so many of them."""
    for k in tl.static_range(COUNT):
        tl.store(pointer + k * n, numbers[k], mask=mask)


@triton.jit
def log1p(t):
    """log(1 + t) for t from 0 to 1, by the series of 2 artanh(t / (2 + t)): 1 + t would lose the digits of t."""
    s = t / (2.0 + t)
    s2 = s * s
    series = 1.0 / 17.0
    series = series * s2 + 1.0 / 15.0
    series = series * s2 + 1.0 / 13.0
    series = series * s2 + 1.0 / 11.0
    series = series * s2 + 1.0 / 9.0
    series = series * s2 + 1.0 / 7.0
    series = series * s2 + 1.0 / 5.0
    series = series * s2 + 1.0 / 3.0
    return 2.0 * (s + s * s2 * series)


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logaddexp(a, b):
    """log(exp(a) + exp(b)), also of infinities."""
    apart = tl.where(a == b, 0.0, tl.abs(a - b))
    return tl.maximum(a, b) + log1p(tl.exp(-apart))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with all digits where it is small."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x):
    """By its series where exp(2 x) - 1 would cancel."""
    x2 = x * x
    series = -5.70498872745e-3
    series = series * x2 + 2.06390887954e-2
    series = series * x2 - 5.37397155531e-2
    series = series * x2 + 1.33314422036e-1
    series = series * x2 - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(x), 20.0)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, x + x * x2 * series, tl.where(x < 0, -large, large))
