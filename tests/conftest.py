"""What several test files share: the table of losses, the kernels' interpreter and simulated ranks."""

import math
import os
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import CASES, Case
from torch import Tensor
from torch._dynamo import trace_rules

if not torch.cuda.is_available():  # the interpreter tests the kernels on the CPU; triton asks once, at its import
    os.environ.setdefault("TRITON_INTERPRET", "1")

AS_ON_A_GPU = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "interpreted.py"))["as_on_a_gpu"]


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    """What a test sets as torch's number of threads is that test's alone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where Triton's kernels run: a GPU, or the CPU by the interpreter; memory that nobody has written holds NaN."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(math.nan if x.is_floating_point() else 1)

        return made

    # Dynamo lists torch's functions once, by identity: made while these stand in their place, the list lacks them
    trace_rules.get_torch_obj_rule_map()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    with AS_ON_A_GPU():
        yield torch.device("cpu")


@pytest.fixture
def strided() -> Callable[[Tensor, str], Tensor]:
    """The same numbers with other strides."""

    def laid_out(x: Tensor, how: str) -> Tensor:
        if how == "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        axis, before, after = {"sliced": (-1, 3, 4), "shifted": (1, 0, 1)}[how]
        shape = list(x.shape)
        shape[axis] += before + after
        wide = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)
        return wide.narrow(axis, before, x.shape[axis]).copy_(x)

    return laid_out


class SimulatedGroup:
    """Ranks as threads that run one at a time, in the place of torch.distributed; turns change at collectives.

    The interpreter of Triton has but one state for all threads.
    """

    group_name = "simulated"

    def __init__(self, size: int):
        self.size, self.turn, self.meeting = size, threading.Lock(), threading.Barrier(size)
        self.slots = [torch.zeros(())] * size
        self.own = threading.local()

    def get_world_size(self, group: object) -> int:
        return self.size

    def all_gather(self, out: list[Tensor], x: Tensor, group: object) -> None:
        self.slots[self.own.rank] = x.clone()
        self._meet()
        for to, slot in zip(out, list(self.slots), strict=True):
            to.copy_(slot)
        self._meet()

    def all_reduce(self, x: Tensor, group: object) -> None:
        self.slots[self.own.rank] = x.clone()
        self._meet()
        x.copy_(torch.stack(self.slots).sum(0))
        self._meet()

    def _meet(self) -> None:
        self.turn.release()
        self.meeting.wait()
        self.turn.acquire()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """What `work(rank)` returns on every rank."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def one(rank: int) -> None:
            self.own.rank = rank
            with self.turn, np.errstate(all="ignore"):
                try:
                    results[rank] = work(rank)
                except BaseException as error:
                    errors.append(error)
                    self.meeting.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.fixture
def simulated_group(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], SimulatedGroup]:
    """Makes a group of that many simulated ranks, which the kernels then take for torch.distributed."""
    from rlloss_kernels import shards

    def make(size: int) -> SimulatedGroup:
        group = SimulatedGroup(size)
        monkeypatch.setattr(shards, "dist", group)
        monkeypatch.setattr(shards, "resolved", lambda name: group)
        return group

    return make


@pytest.fixture
def cases() -> list[Case]:
    return CASES


@pytest.fixture(params=[case.name for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    """Every line of the table; `parametrize("case", ["dpo"], indirect=True)` for some of them."""
    return next(case for case in CASES if case.name == request.param)
