"""How many rows a block has, and how large the tiles of a head are."""

from typing import NamedTuple

import torch

from rlloss_kernels.head import Head
from rlloss_kernels.workers import worker_count

COLUMNS = 4096  # of a tile at most
_FEWEST = 64


def rows_of_block(active: int, bytes_per_row: int, scratch_bytes: int, device: torch.device) -> int:
    """As many of the `active` rows as every worker's share of the scratch holds, and no more than its share of them."""
    workers = worker_count(device)
    return max(1, min(scratch_bytes // (workers * bytes_per_row), -(-active // workers)))


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
        size, low = head.dtype.itemsize, head.operand_dtype.itemsize
        columns = scratch_bytes // (2 * low * max(count, 1)) // _FEWEST * _FEWEST
        columns = min(COLUMNS, max(_FEWEST, columns))
        of_row = columns * (tiles * size + 2 * low)
        return cls(rows_of_block(active, of_row, scratch_bytes // 2, head.weight.device), columns)
