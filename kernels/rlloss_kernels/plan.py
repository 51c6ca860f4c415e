"""How many rows a block has, and how large the tiles of a head are."""

from typing import NamedTuple

import torch

from rlloss_kernels.head import Head
from rlloss_kernels.workers import worker_count

COLUMNS = 4096  # of a tile at most
_FEWEST = 64


def rows_of_block(active: int, bytes_per_row: int, scratch_bytes: int, device: torch.device) -> int:
    """As many of the `active` rows as every worker's share of the scratch holds, and the same number in every block."""
    workers = worker_count(device)
    share = max(1, -(-active // workers))
    blocks = -(-share // max(1, scratch_bytes // (workers * bytes_per_row)))
    return -(-share // blocks)


class Plan(NamedTuple):
    """Rows of a block and columns of a tile."""

    rows: int
    columns: int

    @classmethod
    def of(cls, head: Head, count: int, active: int, scratch_bytes: int, tiles: int = 2) -> "Plan":
        """For `active` of `count` rows.

        All workers share one tile of the gradient of all rows, which takes half of the scratch at most; each has
        `tiles` tiles of logits, one more for a softcap, and two in the dtype of products.
        """
        size, low = head.dtype.itemsize, head.operand_dtype.itemsize
        columns = scratch_bytes // (2 * low * max(count, 1)) // _FEWEST * _FEWEST
        columns = min(COLUMNS, max(_FEWEST, columns))
        of_row = columns * ((tiles + (head.softcap is not None)) * size + 2 * low)
        rest = scratch_bytes - low * count * columns
        return cls(rows_of_block(active, of_row, rest, head.weight.device), columns)
