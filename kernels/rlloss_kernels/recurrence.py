"""A linear recurrence from the end of a row to its start."""

import torch
from torch import Tensor

from rlloss_kernels.implementation import implementation

__all__ = ["reverse_recurrence_"]


def reverse_recurrence_(a: Tensor, b: Tensor, *, cuts: bool, impl: str = "auto") -> None:
    """Turns b into y_t = b_t + a_t y_{t+1} along the last axis, with y = 0 behind it; overwrites a.

    Args:
        cuts: Whether some a = 0 ends a sequence, so that a NaN of the next one must not come through as 0 * NaN.
        impl: "triton" computes in float64 whatever the dtype, "tiled" in that of the tensors.
    """
    if impl == "tiled" or (impl == "auto" and not b.is_cuda):
        _in_levels_(a, b, cuts)
    else:
        _on_the_device_(a, b, cuts, impl)


# one operation, as no compiler traces what `implementation` asks of the machine
@torch.library.custom_op("rlloss_kernels::reverse_recurrence_", mutates_args=("a", "b"))
def _on_the_device_(a: Tensor, b: Tensor, cuts: bool, impl: str) -> None:
    if implementation(impl, b, dtype=torch.float32) == "tiled":
        _in_levels_(a, b, cuts)
        return
    from rlloss_kernels.gpu.scan import reverse_scan_

    reverse_scan_(a, b)


@_on_the_device_.register_fake
def _(a: Tensor, b: Tensor, cuts: bool, impl: str) -> None: ...


def _in_levels_(a: Tensor, b: Tensor, cuts: bool) -> None:
    """The recurrence with linear work in log2(T) levels."""
    if b.shape[-1] < 2:
        return
    (even_a, odd_a), (even_b, odd_b) = ((x[..., ::2], x[..., 1::2]) for x in (a, b))
    pairs, behind = odd_b.shape[-1], even_b.shape[-1] - 1
    _step_(even_a[..., :pairs], even_b[..., :pairs], odd_b, cuts)
    even_a[..., :pairs].mul_(odd_a)
    _in_levels_(even_a, even_b, cuts)
    _step_(odd_a[..., :behind], odd_b[..., :behind], even_b[..., 1:], cuts)


def _step_(a: Tensor, b: Tensor, y: Tensor, cuts: bool) -> None:
    """Turns b into b + a y."""
    if cuts:
        b.add_(torch.where(a == 0, 0, a * y))
    else:
        b.addcmul_(a, y)
