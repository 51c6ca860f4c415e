"""Time by interleaved rounds, excess memory, and the roofline of the same machine in the same minute."""

import ctypes
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from cases import Case
from implementations import Call, Implementation
from inputs import Inputs
from torch import Tensor

CLEAR_REFS = Path("/proc/self/clear_refs")
COPY_BYTES = 256 * 2**20


class Seconds(NamedTuple):
    """Of one call: wall time of each pass, and the CPU time of all threads."""

    forward: float
    backward: float
    cpu: float

    @property
    def wall(self) -> float:
        return self.forward + self.backward


class Prepared(NamedTuple):
    """An implementation bound to its tensors."""

    call: Call
    inputs: Inputs
    upstream: tuple[Tensor, ...]
    rounds: int | None = None

    def run(self) -> tuple[Tensor, ...]:
        """Forward, and backward where an input needs a gradient; the gradients stay in the leaves."""
        outputs = self.call()
        self.backward(outputs)
        return outputs

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        if self.inputs.leaves():
            # a scalar is already the product with the upstream
            upstream = [
                u.to(y.dtype) if y.ndim else torch.ones_like(y) for y, u in zip(outputs, self.upstream, strict=True)
            ]
            torch.autograd.backward(outputs, upstream)

    def clear(self) -> None:
        for leaf in self.inputs.leaves().values():
            leaf.grad = None

    @property
    def mandatory_bytes(self) -> int:
        """The gradients, which every implementation must leave behind."""
        return sum(leaf.numel() * leaf.element_size() for leaf in self.inputs.leaves().values())

    def seconds(self) -> Seconds:
        gc.collect()
        cpu, start = time.process_time(), time.perf_counter()
        outputs = self.call()
        middle = time.perf_counter()
        self.backward(outputs)
        end, cpu_end = time.perf_counter(), time.process_time()
        del outputs
        self.clear()
        return Seconds(middle - start, end - middle, cpu_end - cpu)


class Timeable(Protocol):
    """What rounds are made of: an implementation bound to its tensors, and to a clock."""

    @property
    def rounds(self) -> int | None: ...

    def seconds(self) -> Seconds: ...


def prepared(implementation: Implementation, case: Case, inputs: Inputs) -> Prepared:
    upstream = inputs.dense_upstream if implementation.dense else inputs.upstream
    return Prepared(implementation.build(case, inputs), inputs, upstream, implementation.rounds)


def interleaved(
    calls: Mapping[str, Timeable], rounds: int, probe: Callable[[], float]
) -> tuple[dict[str, list[Seconds]], list[float]]:
    """One call of each per round, in an order that rotates, so that a slow minute is slow for all of them.

    Returns the seconds of each by name, in the order of the rounds, and the probe's rate in every round.
    """
    names, rates = list(calls), []
    times: dict[str, list[Seconds]] = {name: [] for name in calls}
    for i in range(rounds):
        rates.append(probe())
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            if i < (calls[name].rounds or rounds):
                times[name].append(calls[name].seconds())
    return times, rates


def summary(times: list[Seconds], ours: list[Seconds], case: Case, rates: list[float]) -> dict[str, float]:
    """Medians over rounds.

    A ratio is the median of the ratios within each round, not the ratio of two medians: what slows the whole machine
    for a round then cancels. The same holds for the share of the roofline, against the probe of that round.
    """
    median = statistics.median
    return {
        "wall_s": median(t.wall for t in times),
        "wall_min_s": min(t.wall for t in times),
        "cpu_s": median(t.cpu for t in times),
        "forward_wall_s": median(t.forward for t in times),
        "backward_wall_s": median(t.backward for t in times),
        "wall_over_ours": median(t.wall / o.wall for t, o in zip(times, ours, strict=False)),
        "cpu_over_ours": median(t.cpu / o.cpu for t, o in zip(times, ours, strict=False)),
        "roofline_fraction": median(case.work[1] / t.wall / rate for t, rate in zip(times, rates, strict=False)),
        "rounds": len(times),
    }


def roofline(case: Case) -> Callable[[], float]:
    """A probe that returns FLOP/s of a large `torch.mm` of the case's dtype, or bytes/s of a copy."""
    if case.work[0] == "bytes":
        source = torch.ones(min(int(case.work[1]), COPY_BYTES), dtype=torch.uint8)
        target = torch.zeros_like(source)
        return lambda: 2 * len(source) / _fastest(lambda: target.copy_(source))
    dtype = getattr(torch, case.dtype)
    a = torch.randn(min(case.tokens, 1024), case.hidden).to(dtype)
    b = torch.randn(min(case.vocabulary, 8192), case.hidden).to(dtype)
    product = torch.empty(len(a), len(b), dtype=dtype)
    return lambda: 2 * a.numel() * len(b) / _fastest(lambda: torch.mm(a, b.t(), out=product))


def _fastest(call: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Neighbours:
    """The share of all cores that other processes took since this was made; None where the system does not say.

    A parallel operation waits for its slowest thread, so a neighbour on one core costs code of many small operations
    far more than code of few large ones: even ratios, and CPU times, are then wrong.
    """

    def __init__(self) -> None:
        self.start, self.others = time.perf_counter(), self._others()

    def share(self) -> float | None:
        seconds, others = time.perf_counter() - self.start, self._others()
        if others is None or self.others is None or seconds < 1:  # the system counts in ticks of 10 ms
            return None
        return max(0.0, others - self.others) / seconds / (os.cpu_count() or 1)

    @staticmethod
    def _others() -> float | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()


def excess_bytes(call: Callable[[], object], mandatory: int) -> int:
    """Peak of the process's memory during a call, above what it held before and what the call must leave behind."""
    gc.collect()
    _give_back_free_memory()
    before = _status("VmRSS")
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # the peak becomes the present
        call()
        return _status("VmHWM") - before - mandatory
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - mandatory


def _give_back_free_memory() -> None:
    """What malloc keeps of freed tensors would be used again by the call, unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
