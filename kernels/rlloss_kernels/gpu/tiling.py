"""How a matrix product is cut for one kind of GPU, and how its operands are read."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlloss_kernels.gpu.functions import INTERPRETED


class Tiling(NamedTuple):
    """Rows and columns of a tile of logits, and how deep its operands are read at a time.

    A program takes `tiles` tiles of one block of rows in turn and keeps their statistics in registers. What it writes
    is merged in the order of the columns, so that a row's result depends on nothing but its own numbers.
    """

    rows: int
    columns: int
    depth: int
    tiles: int
    warps: int
    stages: int
    panel: int = 16  # blocks of rows that share the columns in the second-level cache

    @property
    def group(self) -> int:
        """The columns of one program."""
        return self.columns * self.tiles


def tiling(x: Tensor, accumulators: int = 1) -> Tiling:
    """For products of matrices like `x`, with so many accumulators for every logit."""
    if INTERPRETED:
        return Tiling(rows=16, columns=32, depth=16, tiles=2, warps=4, stages=1, panel=2)
    large, memory = device_limits(x.device)
    if x.dtype.itemsize == 4:  # three products of TF32 each, from operands of twice the size
        return Tiling(64, 128, 32, 8, 4, 3) if memory < 160_000 else Tiling(128, 128, 32, 8, 8, 3)
    if memory < 160_000:  # compute capability 8.6, 8.9 and 12
        return Tiling(128, 128, 32, 8, 8, 3)
    if large and accumulators == 1:
        return Tiling(128, 256, 64, 4, 8, 3)
    return Tiling(128, 128, 64, 8, 8, 3)


def device_limits(device: torch.device) -> tuple[bool, int]:
    """Whether warp groups multiply from shared memory (compute capability 9 and later), and the bytes of it."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.major >= 9, properties.shared_memory_per_block_optin


def bulk_loads(*operands: Tensor) -> bool:
    """Whether the tensor memory accelerator can read these matrices: aligned to 16 bytes, on a GPU that has one."""
    for x in operands:
        if x.data_ptr() % 16 or x.stride(0) * x.itemsize % 16 or x.stride(1) != 1 or not x.numel():
            return False
    return INTERPRETED or device_limits(operands[0].device)[0]


def operand(x: Tensor, rows: int, depth: int, bulk: bool) -> Any:
    """What a kernel reads `x` [n, H] from, in pieces [rows, depth]."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, depth]) if bulk else x
