"""The kernels on a GPU: are they right, are they the same every time, and how fast are they.

    python benchmarks/gpu.py                                        in less than ten minutes, on any CUDA machine
    python benchmarks/gpu.py --cases "head-*,grpo" --peers trl      some cases, some peers
    python benchmarks/gpu.py --list                                 names the cases
    TRITON_INTERPRET=1 python benchmarks/gpu.py --quick             a dry run on a CPU; its times mean nothing

In this order: what the machine is and how fast it copies and multiplies; every case against float64 of the same
inputs; the same bits in every run, and for a row alone; indices beyond 32 bits; times by CUDA events in interleaved
rounds, with the copy or the product of the same round as probe, and excess memory; the table of goals; other tilings;
pictures. Every step appends its record to benchmarks/results at once. One process keeps the GPU: if a step kills or
hangs it, a new one takes over, and the step counts as failed. What `--seconds` do not suffice for is left out, the
least important first, and named. The exit code is 1 if any of ours was wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import Case, selected
from goals import Results, goals, table
from gpu_cases import QUICK, Shape, checked_cases, every_case, overflow_cases
from report import appended, commit, lines, results_file, versions
from report import table as rows_table
from worker import Worker

HEADINGS = ("forward", "backward", "ms", "least", "wall/ours", "excess MiB", "max error", "grad error", "roofline")
LONGEST = 150.0  # seconds of one job, after which its process hangs
STANDARD = "head-fwdbwd"  # whose product is the probe between cases
PLOTS = 15.0  # seconds that are kept for the end
Record = dict[str, Any]
Call = Callable[..., Record]


class Run:
    """The steps of a run within its seconds; `call(job, seconds, **arguments)` does what needs the device."""

    def __init__(self, arguments: argparse.Namespace, call: Call, clock: Callable[[], float] = time.monotonic):
        self.arguments, self.call, self.clock, self.start = arguments, call, clock, clock()
        every = every_case(shape_of(arguments), arguments.quick)
        self.every = {case.name: case for case in every}
        self.cases = selected(every, arguments.cases)
        self.results = Results(self.every)
        self.about: Record = {"run": time.strftime("%Y-%m-%dT%H:%M:%S"), "quick": arguments.quick}
        self.path = Path()
        self.failures: list[str] = []
        self.left_out: list[str] = []

    def everything(self) -> int:
        """All steps in their order; the exit code."""
        if not self.environment():
            return 1
        self.probe()
        for case in self.cases:
            self.gate(case)
        for job in ("twice", "alone"):
            for case in checked_cases(self.cases):
                self.check(job, case)
        for case in selected(overflow_cases(self.arguments.quick), self.arguments.cases):
            self.check("large", case)
        for case in self.cases:
            self.timing(case)
        self.goals()
        self.tilings()
        self.pictures()
        return self.end()

    def left(self) -> float:
        return self.arguments.seconds - (self.clock() - self.start)

    def has(self, seconds: float, what: str) -> bool:
        """Whether there is time for a step, which is otherwise left out."""
        if self.left() - PLOTS >= seconds:
            return True
        self.left_out.append(what)
        print(f"{what}: left out, {max(self.left(), 0):.0f} s are left", flush=True)
        return False

    def job(self, name: str, **arguments: Any) -> Record:
        return self.call(name, max(30.0, min(LONGEST, self.left())), **arguments)

    def write(self, step: str, record: Record) -> None:
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, **self.about}
        appended(self.path, [{**stamp, "passed": not wrong(record), **record}])

    def failed(self, what: str, why: str) -> None:
        self.failures.append(what)
        print(f"FAILED {what}: {why.strip()}", flush=True)

    def environment(self) -> bool:
        found = self.call("environment", LONGEST)
        if "error" in found:
            self.failed("environment", found["error"])
            return False
        self.about["gpu"] = found["gpu"]
        self.path = results_file(self.arguments.results, found["gpu"])
        record = {**found, "versions": versions(), "commit": commit(), "command": sys.argv[1:]}
        self.write("environment", record)
        for name, value in record.items():
            print(f"{name}: {value}")
        print(f"records: {self.path}", flush=True)
        return True

    def probe(self) -> None:
        """The speed of the machine, in the same units all along, so that a drift of its clocks is seen."""
        found = self.job("probes", case=STANDARD)
        self.write("probe", found)
        if "error" in found:
            self.failed("probe", found["error"])
            return
        copy, product = found["copy_bytes_per_s"] / 1e12, found["matmul_flops_per_s"] / 1e12
        print(f"probe: copy {copy:.3f} TB/s, torch.mm {product:.1f} TFLOP/s", flush=True)

    def gate(self, case: Case) -> None:
        if not self.has(8, f"gate of {case.name}"):
            return
        record = self.job("gate", case=case.name, names=self.names(case))
        self.results.gates[case.name] = record
        print(f"\ngate: {case.name}  {case.shape} {case.dtype}", flush=True)
        if "error" in record:
            self.failed(case.name, record["error"])
            self.write("gate", {"case": case.name, **record})
            return
        self._say_left_out(record)
        if "skipped" in record:
            print(f"  skipped: {record['skipped']}", flush=True)
            return
        for name, row in record["rows"].items():
            errors = [f"{leaf} {_plain(error)}" for leaf, error in row["gradient_errors"].items()]
            print(f"  {name}: {', '.join([_plain(row['max_error']), *errors])}", flush=True)
        for failure in record["failures"]:
            self.failed(case.name, failure)
        appended(self.path, lines(case, record, step="gate", threads=None, **self.about))

    def check(self, job: str, case: Case) -> None:
        """To the bit, or, with large indices, a few rows against float64."""
        what = {"twice": "two runs", "alone": "a row alone", "large": "large indices"}[job]
        if not self.has(6, f"{what} of {case.name}"):
            return
        record = self.job(job, case=case.name)
        self.write(job, {"case": case.name, **record})
        if "skipped" in record:
            print(f"{what} of {case.name}: skipped: {record['skipped']}", flush=True)
            return
        differing, failures = record.get("differing", []), record.get("failures", [])
        self.results.checks.setdefault(what, []).append(not wrong(record))
        if wrong(record):
            why = record.get("error") or "; ".join([*(f"{name} differs" for name in differing), *failures])
            self.failed(f"{what} of {case.name}", why)
            return
        said = f"within {_plain(record['max_error'])}" if job == "large" else "the same bits"
        print(f"{what} of {case.name}: {said}", flush=True)

    def timing(self, case: Case) -> None:
        """Of a case that the gate has seen: one that failed is timed too, but stays failed."""
        gate = self.results.gates.get(case.name, {})
        if not gate.get("rows") or not self.has(12, f"times of {case.name}"):
            return
        self.probe()
        given = self.arguments.seconds_per_case
        seconds = min((0 if self.arguments.quick else 4) if given is None else given, self.left() / 3)
        record = self.job("timing", case=case.name, names=list(gate["rows"]), seconds=seconds)
        print(f"\n{case.name}  {case.shape} {case.dtype}", flush=True)
        if "error" in record:
            self.failed(f"times of {case.name}", record["error"])
            self.write("timing", {"case": case.name, **record})
            return
        self._say_left_out(record)
        record["failures"] = gate["failures"]
        record["rows"] = {name: gate["rows"][name] | row for name, row in record["rows"].items()}
        self.results.timings[case.name] = record
        print(rows_table(case, record, HEADINGS), flush=True)
        appended(self.path, lines(case, record, step="timing", threads=None, **self.about))

    def goals(self) -> None:
        found = goals(self.results)
        self.write("goals", {"goals": [{**goal._asdict(), "met": goal.met} for goal in found]})
        print(
            f"\nGoals{', of a dry run: they mean nothing' if self.arguments.quick else ''}\n{table(found)}", flush=True
        )

    def tilings(self) -> None:
        if STANDARD not in {case.name for case in self.cases} or not self.has(15, "other tilings"):
            return
        print("\nTilings: forward ms (share of torch.mm), backward ms (share), frozen head ms")
        for number in range(self.job("tilings")["count"]):
            if not self.has(15, f"tiling {number} and later"):
                return
            record = self.job("tiling", case=STANDARD, number=number)
            self.write("tiling", {"number": number, **record})
            if "error" in record:  # such as too little shared memory
                print(f"  {number}: {record['error'].strip().splitlines()[-1]}", flush=True)
                continue
            passes = [f"{1e3 * record[f'{p}_s']:.3f} ({record[f'{p}_share']:.3f})" for p in ("forward", "backward")]
            numbers = "  ".join([*passes, f"{1e3 * record['frozen_s']:.3f}"])
            print(f"  {tuple(record['tiling'].values())}: {numbers} {'; '.join(record['failures'])}", flush=True)

    def pictures(self) -> None:
        try:
            from plot import latest, pictures, saved
        except ImportError as error:
            print(f"no pictures: {error}")
            return
        records = [r for r in latest([self.path], self.arguments.quick) if r["run"] == self.about["run"]]
        for path in saved(pictures(records), self.arguments.results):
            print(path)

    def end(self) -> int:
        print(f"\n{self.clock() - self.start:.0f} s", flush=True)
        if self.left_out:
            self.write("left out", {"steps": self.left_out})
            print(f"left out for want of time: {', '.join(self.left_out)}")
        if self.failures:
            print(f"FAILED: {', '.join(dict.fromkeys(self.failures))}")
        return int(bool(self.failures))

    def names(self, case: Case) -> list[str]:
        """The implementations that are asked for; every one where the list is empty."""
        if self.arguments.peers is not None:
            return ["ours", "ours-dense", *self.arguments.peers]
        return ["ours", "ours-dense"] if self.arguments.quick else []

    def _say_left_out(self, record: Record) -> None:
        for name, reason in record["left_out"].items():
            print(f"  {name}: left out: {reason}", flush=True)


def wrong(record: Record) -> bool:
    return bool(record.get("error") or record.get("failures") or record.get("differing"))


def shape_of(arguments: argparse.Namespace) -> Shape:
    shape = QUICK if arguments.quick else Shape()
    given = {name: getattr(arguments, name) for name in Shape._fields}
    return shape._replace(**{name: value for name, value in given.items() if value is not None})


def _plain(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def parsed(command: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", metavar="GLOB", help="names of cases, patterns joined by commas")
    parser.add_argument("--list", action="store_true", help="names of the cases and their shapes")
    parser.add_argument("--quick", action="store_true", help="small shapes, and no peers unless they are named")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="beside ours; default: all")
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--seconds-per-case", type=float, help="for the rounds of one case; 4, and none if --quick")
    for name in ("tokens", "hidden", "vocabulary", "seed"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--scale", type=float, help="standard deviation of the logits")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    return parser.parse_args(command)


def main() -> int:
    arguments = parsed()
    if arguments.list:
        for case in [*every_case(shape_of(arguments), arguments.quick), *overflow_cases(arguments.quick)]:
            print(f"{case.name:36}{case.shape}")
        return 0
    from gpu_jobs import served

    with Worker(served, shape_of(arguments), arguments.quick) as worker:
        return Run(arguments, worker.call).everything()


if __name__ == "__main__":
    sys.exit(main())
