"""A vocabulary that is spread over the ranks of a process group (tensor parallelism of the head)."""

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

__all__ = ["VocabShard", "check_shard", "check_whole", "kernel_shard", "local_head"]


class VocabShard(NamedTuple):
    """Which part of the vocabulary this rank's head has: its rows are the tokens from `first` on, of `total`.

    Hidden states, ids, masks and temperatures are the same on every rank of `group`, and so are all results, bit for
    bit: statistics of the shards are gathered once and merged in the order of ranks. In the backward pass the gradient
    of the hidden states is summed over the group, as the result of a column-parallel layer needs it; the gradients of
    weight and bias are each rank's own. Rows from `total` on are padding and count nowhere.

    >>> VocabShard(group=None, first=0, total=11).total
    11
    """

    group: Any  # a torch.distributed.ProcessGroup
    first: int
    total: int

    @classmethod
    def even(cls, group: Any, total: int) -> "VocabShard":
        """This rank's part where every rank has ceil(total / ranks) tokens but the last ones, as `torch.chunk` cuts."""
        each = -(-total // dist.get_world_size(group))
        return cls(group, min(dist.get_rank(group) * each, total), total)

    @classmethod
    def of(cls, weight: Any) -> "VocabShard":
        """This rank's part of a head whose weight is a DTensor, cut along its rows over one axis of its mesh."""
        axes = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
        if len(axes) != 1 or not weight.placements[axes[0]].is_shard(0):
            raise ValueError(
                "VocabShard.of: the weight must be cut along its rows, Shard(0), over one axis of its mesh and whole "
                f"along the others, got {list(weight.placements)}; weight.full_tensor() is whole"
            )
        return cls.even(weight.device_mesh.get_group(axes[0]), weight.shape[0])


def is_dtensor(x: object) -> bool:
    """Whether a tensor is spread over a mesh of devices."""
    return hasattr(x, "placements") and hasattr(x, "device_mesh")


def local_head(
    who: str, hidden: Any, weight: Any, bias: Any, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """This rank's tensors, where some are DTensors, and its part of the vocabulary.

    A plain hidden state beside a cut weight says nothing about whether other ranks have the same one (tensor
    parallelism) or another (FSDP), so that it needs `shard`.
    """
    if is_dtensor(hidden) and not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(f"{who}: hidden is a DTensor placed {list(hidden.placements)}; redistribute it to Replicate()")
    if is_dtensor(weight) and shard is None and any(not p.is_replicate() for p in weight.placements):
        if not is_dtensor(hidden):
            raise ValueError(
                f"{who}: weight is a DTensor placed {list(weight.placements)}, and hidden a plain tensor: if every "
                "rank has the same hidden states (tensor parallelism), pass vocab_shard=rlloss.VocabShard.of(weight); "
                "if each has its own (FSDP), pass weight.full_tensor()"
            )
        shard = VocabShard.of(weight)
    hidden = hidden.to_local(grad_placements=hidden.placements) if is_dtensor(hidden) else hidden
    weight, bias = (x.to_local() if is_dtensor(x) else x for x in (weight, bias))
    return hidden, weight, bias, shard


def check_shard(who: str, shard: VocabShard | None, columns: int, vocab_size: int | None) -> int | None:
    """How many of a rank's `columns` are tokens; None for all. ValueError for a shard that cannot be."""
    if shard is None:
        return vocab_size
    if vocab_size is not None:
        raise ValueError(f"{who}: vocab_size={vocab_size} and vocab_shard.total={shard.total} say the same; drop one")
    if not 0 <= shard.first <= shard.total or shard.total < 1:
        raise ValueError(f"{who}: vocab_shard must have 0 <= first <= total, got {shard.first} and {shard.total}")
    if shard.group is None:
        raise ValueError(
            f"{who}: vocab_shard.group must be a process group, got None; see torch.distributed.group.WORLD"
        )
    return min(columns, shard.total - shard.first)


def check_whole(who: str, shard: VocabShard | None) -> None:
    """Raises ValueError for a shard where some of the kept ids' logits would be with other ranks."""
    if shard is not None:
        raise ValueError(f"{who}: kept_ids need a whole head, got vocab_shard={shard}; pass weight.full_tensor()")


def kernel_shard(shard: VocabShard | None) -> tuple[int, int, str] | None:
    """A shard as the kernels know it: first column, total and the name of the group."""
    return None if shard is None else (shard.first, shard.total, shard.group.group_name)
