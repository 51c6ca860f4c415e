"""A vocabulary that is spread over the ranks of a process group, each of which holds some columns of the logits."""

from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

__all__ = ["Shard"]


class Shard(NamedTuple):
    """The columns from `first` on, as many as a rank's weight has rows, of the `total`; `group` is a group's name.

    The hidden states are the same on every rank, and so are all results and the gradient of the hidden states, which is
    summed over the group; those of weight and bias are each rank's own.
    """

    first: int = 0
    total: int = 0
    group: str = ""

    @property
    def is_part(self) -> bool:
        """Whether there are other ranks."""
        return self.group != ""

    @classmethod
    def made(cls, given: tuple[int, int, str] | None, columns: int) -> "Shard":
        """From its fields, or of a vocabulary that is whole and has so many columns."""
        return cls(0, columns, "") if given is None else cls(*given)


def gathered(x: Tensor, group: str) -> Tensor:
    """What every rank has in the place of `x`, [ranks, *x.shape], in their order."""
    ranks = resolved(group)
    out = x.new_empty((dist.get_world_size(ranks), *x.shape))
    dist.all_gather(list(out.unbind(0)), x.contiguous(), group=ranks)
    return out


def summed_(x: Tensor, group: str) -> Tensor:
    """Adds up, in place, what every rank has in the place of `x`."""
    dist.all_reduce(x, group=resolved(group))
    return x


def resolved(group: str) -> Any:
    """The group of this name."""
    return c10d._resolve_process_group(group)  # pyright: ignore
