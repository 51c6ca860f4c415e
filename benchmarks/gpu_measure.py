"""Time by CUDA events, excess memory, and the speed of the same GPU in the same second."""

import contextlib
import gc
import itertools
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from cases import Case
from gpu_peers import implementations
from jobs import Record, bound_calls, summaries, survivors
from measure import Prepared, Seconds, excess_bytes, interleaved
from torch import Tensor

COPY_BYTES = 2 << 30
BALLAST_BYTES = 1 << 30
QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
ROUNDS = (3, 20)


class Host:
    """The processor, by whose clock a dry run goes: its times mean nothing."""

    kind = "cpu"
    copy_bytes = 1 << 20

    def facts(self) -> Record:
        return {"gpu": "interpreter"}

    def is_healthy(self) -> bool:
        return True

    def free_bytes(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def give_back(self) -> None:
        """Memory that nobody uses."""
        gc.collect()

    def head_start(self) -> None:
        """Keeps the device busy while its work is being launched."""

    def mark(self) -> Any:
        """A moment in the work of the device."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        return end - start

    def excess_bytes(self, call: Callable[[], object], mandatory: int) -> int:
        return excess_bytes(call, mandatory)


class Cuda(Host):
    """The first GPU that is visible."""

    kind = "cuda"

    def __init__(self) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        self.copy_bytes = min(COPY_BYTES, total // 16)
        self.ballast = torch.zeros(min(BALLAST_BYTES, total // 32), dtype=torch.uint8, device="cuda")

    def facts(self) -> Record:
        properties: Any = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(),
        }

    def is_healthy(self) -> bool:
        """False after an error that no later call of this process survives."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def free_bytes(self) -> int:
        self.give_back()
        return torch.cuda.mem_get_info()[0]

    def give_back(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def head_start(self) -> None:
        """Clears far more memory than the second-level cache holds, for about a millisecond."""
        for _ in range(4):
            self.ballast.zero_()

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def excess_bytes(self, call: Callable[[], object], mandatory: int) -> int:
        """Peak of what tensors hold during a call, above what they held before and what the call must leave behind."""
        torch.cuda.synchronize()
        self.give_back()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - mandatory


def device() -> Host:
    return Cuda() if torch.cuda.is_available() else Host()


class Timed(NamedTuple):
    """A bound implementation on a device."""

    prepared: Prepared
    device: Host

    @property
    def rounds(self) -> int | None:
        return self.prepared.rounds

    def seconds(self) -> Seconds:
        """Of one call, whose launches are hidden behind other work, as in training; CPU seconds are of launching."""
        self.device.head_start()
        cpu, start = time.process_time(), self.device.mark()
        outputs = self.prepared.call()
        middle = self.device.mark()
        self.prepared.backward(outputs)
        end, cpu_end = self.device.mark(), time.process_time()
        del outputs
        self.prepared.clear()
        whole = self.device.seconds(start, end)
        forward = self.device.seconds(start, middle)
        return Seconds(forward, whole - forward, cpu_end - cpu)

    def memory(self) -> Record:
        mandatory = self.prepared.mandatory_bytes
        found = {"excess_bytes": self.device.excess_bytes(self.prepared.run, mandatory), "mandatory_bytes": mandatory}
        self.prepared.clear()
        return found


def timed(case: Case, names: tuple[str, ...], device: Host, seconds: float) -> Record:
    """Memory, then as many interleaved rounds as `seconds` hold: {"rows" by implementation, "left_out", ...}."""
    record: Record = {"rows": {}, "left_out": {}, "failures": []}
    calls = bound_calls(case, implementations(case, names), record["left_out"], device.kind)
    timers = {name: Timed(call, device) for name, call in calls.items()}
    if "ours" not in timers:
        record["skipped"] = record["left_out"].pop("ours", "ours is not among the implementations")
        return record
    warm: dict[str, Seconds] = {}
    for _ in range(2):  # the first call compiles
        warm = survivors(timers, Timed.seconds, record["left_out"])
        timers = _cleared(timers, warm)
    memory = survivors(timers, Timed.memory, record["left_out"])
    timers = _cleared(timers, memory)
    probe = roofline(case, device)
    with _no_collection():
        rounds = rounds_within(seconds, sum(warm[name].wall for name in timers))
        times, rates = interleaved(timers, rounds, probe)
    rows = summaries(case, times, rates)
    record["rows"] = {name: row | memory[name] for name, row in rows.items()}
    record["roofline_rate"] = statistics.median(rates)
    return record


def rounds_within(seconds: float, of_one: float) -> int:
    fewest, most = ROUNDS
    return max(fewest, min(most, int(seconds / max(of_one, 1e-9))))


def probes(case: Case, device: Host) -> Record:
    """Bytes per second of a copy, and FLOP/s of the case's product of matrices."""
    rates = {}
    for name, work in (("copy_bytes_per_s", _copy), ("matmul_flops_per_s", _matmul)):
        probe = work(case, device)
        rates[name] = statistics.median(probe() for _ in range(3))
    return rates


def roofline(case: Case, device: Host) -> Callable[[], float]:
    """The probe that bounds the case, as `measure.roofline` of a processor."""
    return (_copy if case.work[0] == "bytes" else _matmul)(case, device)


def laps(device: Host, work: Callable[[], object], times: int = 3) -> float:
    """Median seconds of `work`, the launching of which the one before hides."""
    work()
    marks = [device.mark()]
    for _ in range(times):
        work()
        marks.append(device.mark())
    device.seconds(marks[0], marks[-1])
    return statistics.median(device.seconds(a, b) for a, b in itertools.pairwise(marks))


def _copy(case: Case, device: Host) -> Callable[[], float]:
    """Read and written bytes count."""
    source = torch.ones(device.copy_bytes, dtype=torch.uint8, device=device.kind)
    target = torch.zeros_like(source)
    return lambda: 2 * len(source) / laps(device, lambda: target.copy_(source))


def _matmul(case: Case, device: Host) -> Callable[[], float]:
    dtype = getattr(torch, case.dtype)

    def matrix(rows: int) -> Tensor:
        return torch.randn(rows, case.hidden, device=device.kind).to(dtype)

    a, b = matrix(case.tokens), matrix(case.vocabulary)
    product = torch.empty(len(a), len(b), dtype=dtype, device=device.kind)
    return lambda: 2 * a.numel() * len(b) / laps(device, lambda: torch.mm(a, b.t(), out=product))


def _cleared(timers: dict[str, Timed], survived: dict[str, Any]) -> dict[str, Timed]:
    """Those that survived; what one left that did not is gone."""
    for timer in timers.values():
        timer.prepared.clear()
    return {name: timers[name] for name in survived}


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _nvidia_smi() -> dict[str, str] | None:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    values = run.stdout.strip().split(", ")
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else None
