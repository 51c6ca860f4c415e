"""What kernels read logits from: the hidden states and the heads of one model or of several."""

from typing import Any

import triton
from torch import Tensor

from rlloss_kernels.gpu.functions import processors
from rlloss_kernels.gpu.tiling import bulk_loads, operand, tiling
from rlloss_kernels.head import Head


class Operands:
    """The matrices, numbers and constants of every kernel that multiplies hidden states by heads.

    Args:
        models: Each head with its hidden states [N, H], the active rows first.
    """

    def __init__(self, *models: tuple[Head, Tensor]):
        self.heads, self.hidden = zip(*models, strict=True)
        weights = [x.weight if x.weight.stride(1) == 1 else x.weight.contiguous() for x in self.heads]
        # that of the wider operands
        self.cut = cut = tiling(max(self.hidden, key=lambda h: h.dtype.itemsize), accumulators=len(models))
        self.tokens = len(self.hidden[0])  # at most
        self.blocks = triton.cdiv(self.tokens, cut.rows)
        bulk = bulk_loads(*self.hidden, *weights)
        self.matrices: list[Any] = []  # hidden states, weight and bias of each
        self.numbers: list[float] = []  # their strides, width, scale and softcap
        self.flags: list[bool] = []  # whether they have a bias and a softcap
        for head, h, weight in zip(self.heads, self.hidden, weights, strict=True):
            pieces = operand(h, cut.rows, cut.depth, bulk), operand(weight, cut.columns // 2, cut.depth, bulk)
            softcap = 0.0 if head.softcap is None else float(head.softcap)
            self.matrices += [*pieces, weight if head.bias is None else head.bias]
            self.numbers += [h.stride(0), weight.stride(0), h.shape[1], float(head.logit_scale), softcap]
            self.flags += [head.bias is not None, head.softcap is not None]
        self.constants: dict[str, Any] = {"BULK": bulk, "PANEL": cut.panel}
        self.constants |= {"ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth}
        self.constants |= {"num_warps": cut.warps, "num_stages": cut.stages}

    def programs(self, groups: int) -> tuple:
        """The grid of a persistent kernel that takes every block of rows with so many groups of columns."""
        return (min(processors(self.hidden[0].device), self.blocks * groups),)
