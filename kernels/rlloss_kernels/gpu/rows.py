"""Where rows lie, and which of them count: found on the device, so that nobody waits for their number.

Kernels launch for as many rows as there may be, read how many there are, and leave.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlloss_kernels.blocks import Rows

_BLOCK = 1024


class ActiveRows(NamedTuple):
    """The tokens that count, in order: the first `number` entries of the rest, whose others are not to be read."""

    number: Tensor  # [1], int32
    positions: Tensor  # [N], int64, into the flattened tokens
    ids: Tensor
    temperature: Tensor | None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, temperatures and their number, as kernels take them."""
        return self.ids, flat(self.temperature, self.ids), self.number


class Matrix(NamedTuple):
    """Vectors [*tokens, D] as rows of memory: that of token i begins `place[i]`, or i, strides after the first."""

    data: Tensor
    place: Tensor | None
    stride: int
    step: int  # from one element to the next

    @classmethod
    def of(cls, x: Tensor) -> "Matrix":
        """Over x's own memory, whatever its strides."""
        try:
            rows = x.view(-1, x.shape[-1])
            return cls(x, None, rows.stride(0), x.stride(-1))
        except RuntimeError:  # its leading axes do not merge
            rows = Rows(x)
            return cls(rows.matrix, rows.place, rows.matrix.stride(0), rows.matrix.stride(1))

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """Data and places, as kernels take them."""
        return self.data, flat(self.place, self.data)

    @property
    def strides(self) -> tuple[int, int]:
        """From one vector to the next, and from one of its elements to the next."""
        return self.stride, self.step

    @property
    def has_place(self) -> bool:
        """Whether vectors lie elsewhere than one stride after the other."""
        return self.place is not None


def flat(x: Tensor | None, instead: Tensor) -> Tensor:
    """The elements of `x`, those of a mask as bytes; a kernel has to be given a tensor `instead` of none."""
    if x is None:
        return instead
    return x.flatten().view(torch.uint8) if x.dtype is torch.bool else x.flatten()


def active_rows(
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    vocabulary: int,
    grad: Tensor | None = None,
    *,
    first: int = 0,
) -> ActiveRows:
    """The tokens inside `loss_mask` and, in the backward pass, with an upstream gradient [K, N] other than 0.

    Their ids are counted from `first` on, the first column of a shard, and may lie outside of it. An id outside of the
    whole vocabulary fails an assertion on the device, as in PyTorch's own losses.
    """
    tokens, ids = ids.numel(), ids.flatten()
    positions = torch.empty(tokens, dtype=torch.int64, device=ids.device)
    numbers = torch.empty(2, dtype=torch.int32, device=ids.device)
    own_ids = torch.empty_like(ids)
    heat = flat(temperature, ids)
    own_temperature = None if temperature is None else torch.empty_like(heat)
    _active_kernel[(1,)](
        ids,
        flat(loss_mask, ids),
        heat,
        ids if grad is None else grad,
        numbers,
        positions,
        own_ids,
        ids if own_temperature is None else own_temperature,
        tokens,
        vocabulary,
        first,
        loss_mask is not None,
        temperature is not None,
        0 if grad is None else len(grad),
        _BLOCK,
    )
    check_ids(numbers[1], vocabulary)
    return ActiveRows(numbers[:1], positions, own_ids, own_temperature)


def check_ids(are_valid: Tensor, vocabulary: int) -> None:
    """Fails, when the device comes to it, unless `are_valid` [] is other than 0."""
    torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
        are_valid,
        f"ids of tokens that count must lie in [0, {vocabulary}); a position without a target, such as -100, needs "
        "loss_mask=False",
    )


class HostCount:
    """The number of active rows for those who launch what is not ours, on its way while the device goes on working.

    While a CUDA graph is captured nobody may wait: then it is as large as it can be, and memory has to start at 0.
    """

    def __init__(self, rows: ActiveRows):
        self.most = len(rows.positions)
        self.is_known = not (rows.number.is_cuda and torch.cuda.is_current_stream_capturing())
        if not self.is_known:
            return
        self.event = torch.cuda.Event() if rows.number.is_cuda else None
        self.number = torch.empty(1, dtype=torch.int32, pin_memory=rows.number.is_cuda)
        self.number.copy_(rows.number, non_blocking=True)
        if self.event is not None:
            self.event.record(torch.cuda.current_stream(rows.number.device))

    def read(self) -> int:
        """Waits for what was launched before it was made, and for nothing else."""
        if not self.is_known:
            return self.most
        if self.event is not None:
            self.event.synchronize()
        return int(self.number)

    def memory(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """For rows of which `read()` will be used."""
        make = torch.empty if self.is_known else torch.zeros
        return make(shape, dtype=dtype, device=device)


def compacted(x: Tensor, rows: ActiveRows) -> Tensor:
    """The vectors [N, D] of the active rows of `x` [*tokens, D], one after the other."""
    matrix, width = Matrix.of(x), x.shape[-1]
    out = torch.empty((len(rows.positions), width), dtype=x.dtype, device=x.device)
    if out.numel():
        _gather_kernel[(len(out),)](
            *matrix.operands,
            rows.positions,
            rows.number,
            out,
            *matrix.strides,
            width,
            matrix.has_place,
            _BLOCK,
        )
    return out


def contiguous_rows(x: Tensor, rows: ActiveRows, are_all: bool) -> Tensor:
    """The same: the tensor itself where all are active and its rows are regular."""
    matrix = Matrix.of(x)
    if are_all and not matrix.has_place and matrix.step == 1:
        return x.view(-1, x.shape[-1])
    return compacted(x, rows)


@triton.jit
def row_at(matrix, place, stride, i, HAS_PLACE: tl.constexpr):
    """Where the vector of token i begins."""
    at = i
    if HAS_PLACE:
        at = tl.load(place + i)
    return matrix + at * stride


@triton.jit
def logits_at(row, step, c, columns, heat, HAS_TEMPERATURE: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Those of a row's columns `c` [1, C]; -inf past the last one, unless the tile is whole."""
    place = row + c.to(tl.int64) * step
    if IS_WHOLE:  # without a mask a thread loads 16 bytes at a time
        z = tl.load(place).to(tl.float32)
    else:
        z = tl.load(place, mask=c < columns, other=-float("inf")).to(tl.float32)
    if HAS_TEMPERATURE:
        z = z / heat
    return z


@triton.jit(do_not_specialize=["tokens", "vocabulary", "first"])
def _active_kernel(
    ids,
    mask,
    temperature,
    grad,
    numbers,
    positions,
    own_ids,
    own_temperature,
    tokens,
    vocabulary,
    first,
    HAS_MASK: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    found = 0
    rows = tl.zeros([], tl.int64) + tokens
    invalid = 0
    for start in range(0, tokens, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        counts = i < tokens
        if HAS_MASK:
            counts = counts & (tl.load(mask + i, mask=counts, other=0) != 0)
        if GRADS > 0:
            used = i < 0
            for k in tl.static_range(GRADS):
                used = used | (tl.load(grad + k * rows + i, mask=counts, other=0.0) != 0.0)
            counts = counts & used
        own = tl.load(ids + i, mask=counts, other=0)
        invalid += tl.sum(tl.where((own < 0) | (own >= vocabulary), 1, 0))
        one = tl.where(counts, 1, 0)
        r = found + tl.cumsum(one, 0) - 1
        tl.store(positions + r, i, mask=counts)
        tl.store(own_ids + r, own - first, mask=counts)
        if HAS_TEMPERATURE:
            tl.store(own_temperature + r, tl.load(temperature + i, mask=counts, other=1.0), mask=counts)
        found += tl.sum(one)
    tl.store(numbers, found)
    tl.store(numbers + 1, tl.where(invalid == 0, 1, 0))


@triton.jit(do_not_specialize=["width"])
def _gather_kernel(
    source, place, positions, count, out, stride, step, width, HAS_PLACE: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    if r < tl.load(count):
        row = row_at(source, place, stride, tl.load(positions + r), HAS_PLACE)
        for start in range(0, width, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x = tl.load(row + k.to(tl.int64) * step, mask=k < width)
            tl.store(out + r * width + k, x, mask=k < width)
