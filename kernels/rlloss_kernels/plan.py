"""How large the tiles of a head are."""

from typing import NamedTuple

from rlloss_kernels.head import Head
from rlloss_kernels.workers import worker_count

COLUMNS = 4096  # of a tile at most
_FEWEST = 64


class Plan(NamedTuple):
    """Rows of a block and columns of a tile."""

    rows: int
    columns: int

    @classmethod
    def of(cls, head: Head, count: int, active: int, scratch_bytes: int, tiles: int = 3) -> "Plan":
        """For `active` of `count` rows, with half of the scratch for what workers share and half for what each has.

        What they share is one tile of the gradient of all rows; each has `tiles` tiles of logits, and two more in the
        dtype of products.
        """
        workers = worker_count(head.weight.device)
        size, low = head.dtype.itemsize, head.operand_dtype.itemsize
        columns = scratch_bytes // (2 * low * max(count, 1)) // _FEWEST * _FEWEST
        columns = min(COLUMNS, max(_FEWEST, columns))
        rows = scratch_bytes // (2 * workers * columns * (tiles * size + 2 * low))
        return cls(max(1, min(rows, -(-active // workers))), columns)
