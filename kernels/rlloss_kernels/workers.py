"""Threads that each work on rows of their own, with one core for every operation.

On a CPU the passes of this package are hundreds of short operations on tiles that fit into a cache. To share each of
them among all cores costs a barrier per operation, which on a busy machine takes longer than the work; and it moves the
tiles from one core's cache to another's.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar("Part")

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def worker_count(device: torch.device) -> int:
    """How many threads `in_parallel` uses: those of torch on a CPU, one elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def shares(parts: Sequence[Part], workers: int) -> list[Sequence[Part]]:
    """The parts in order, cut into at most `workers` runs that differ by one at most; none is empty."""
    each, more = divmod(len(parts), workers)
    ends = [(i + 1) * each + min(i + 1, more) for i in range(workers)]
    return [parts[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]


def in_parallel(work: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """Calls `work` for every part, each in a thread of its own, and raises what any of them raises.

    A single part stays in the calling thread, where an operation has all cores.
    """
    if len(parts) < 2:
        for part in parts:
            work(part)
        return

    def alone(part: Part) -> None:
        with torch.no_grad():  # threads do not inherit it
            work(part)

    list(_pool(len(parts)).map(alone, parts))


def _pool(workers: int) -> ThreadPoolExecutor:
    key = (os.getpid(), workers)  # threads do not survive a fork
    if key not in _pools:
        threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(workers, "rlloss_kernels", initializer=_one_core)
        _pools[key] = pool
        list(pool.map(lambda barrier: barrier.wait(), [Barrier(workers)] * workers))
        torch.set_num_threads(threads)  # what a worker sets for itself is also what new threads begin with
    return _pools[key]


def _one_core() -> None:
    torch.get_num_threads()  # a thread first takes over the process's number, whatever it sets before
    torch.set_num_threads(1)
