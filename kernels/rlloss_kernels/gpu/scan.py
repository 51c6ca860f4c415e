"""The recurrence of `rlloss_kernels.recurrence` as a scan: a program walks a chunk of a row from its end.

Where a row has several chunks, each is first folded into the pair (a, b) of one step, y = b + a y_behind; the folds are
a shorter row of the same problem, whose solution is what stands behind every chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["reverse_scan_"]

BLOCK = 1024  # tokens that a program takes at a time
STEPS = 8  # blocks of a chunk, up to twice as many: a row's length alone cuts it, and its result with it


def reverse_scan_(a: Tensor, b: Tensor) -> None:
    """Turns b into y_t = b_t + a_t y_{t+1} along the last axis, in float64; where a = 0, y_{t+1} is not seen."""
    columns = b.shape[-1]
    if columns < 2 or not b.numel():
        return
    y = b.contiguous()
    with torch.cuda.device_of(b):
        _scan_rows_(a.contiguous().view(-1, columns), y.view(-1, columns))
    if y is not b:
        b.copy_(y)


def _scan_rows_(a: Tensor, b: Tensor) -> None:
    rows, columns = b.shape
    blocks = triton.cdiv(columns, max(1, columns // (STEPS * BLOCK)) * BLOCK)
    chunks = triton.cdiv(columns, blocks * BLOCK)
    grid, lengths, behind = (rows * chunks,), (columns, chunks, blocks), b
    if chunks > 1:
        # two tensors: half of one might start where Triton compiles anew, as it asks whether 16 divides an address
        fold_a, behind = (b.new_empty(rows, chunks, dtype=torch.float64) for _ in range(2))
        _fold_kernel[grid](a, b, fold_a, behind, *lengths, BLOCK=BLOCK)
        _scan_rows_(fold_a, behind)
    _walk_kernel[grid](a, b, behind, *lengths, BLOCK=BLOCK)


@triton.jit(do_not_specialize=["columns", "chunks", "blocks"])
def _fold_kernel(a, b, fold_a, fold_b, columns, chunks, blocks, BLOCK: tl.constexpr):
    """Every chunk as one step."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    product, y = tl.full((), 1.0, tl.float64), tl.full((), 0.0, tl.float64)
    for step in tl.range(0, blocks, num_stages=3):
        t = _from_the_end((chunk + 1) * blocks - 1 - step, BLOCK)
        decay, worth = _scan_of_block(a + row * columns, b + row * columns, t, columns)
        product *= _last(decay, BLOCK)
        y = _last(_step(decay, worth, y), BLOCK)
    tl.store(fold_a + program, product)
    tl.store(fold_b + program, y)


@triton.jit(do_not_specialize=["columns", "chunks", "blocks"])
def _walk_kernel(a, b, behind, columns, chunks, blocks, BLOCK: tl.constexpr):
    """Solves every chunk from the y behind it: the first one of the next chunk, and 0 behind a row."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // chunks, program % chunks
    y = tl.load(behind + program + 1, mask=chunk + 1 < chunks, other=0.0).to(tl.float64)
    for step in tl.range(0, blocks, num_stages=3):
        t = _from_the_end((chunk + 1) * blocks - 1 - step, BLOCK)
        decay, worth = _scan_of_block(a + row * columns, b + row * columns, t, columns)
        solution = _step(decay, worth, y)
        tl.store(b + row * columns + t, solution, mask=t < columns)
        y = _last(solution, BLOCK)


@triton.jit
def _from_the_end(block, BLOCK: tl.constexpr):
    """The tokens of a block, the last one first, so that a forward scan runs back through the row."""
    return block * BLOCK + (BLOCK - 1 - tl.arange(0, BLOCK))


@triton.jit
def _scan_of_block(a, b, t, columns):
    """(a, b) of the one step from each token `t` to what stands behind the block."""
    decay = tl.load(a + t, mask=t < columns, other=0.0).to(tl.float64)
    worth = tl.load(b + t, mask=t < columns, other=0.0).to(tl.float64)
    return tl.associative_scan((decay, worth), 0, _joined)


@triton.jit
def _joined(a_behind, b_behind, a, b):
    """Two steps as one: what a scan has passed stands behind what it comes to."""
    return a * a_behind, _step(a, b, b_behind)


@triton.jit
def _step(a, b, y):
    """B + a y, without y where a = 0: it may be the NaN of another sequence."""
    return b + a * tl.where(a == 0, 0.0, y)


@triton.jit
def _last(x, BLOCK: tl.constexpr):
    """The entry at which a scan ends."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), 0)
