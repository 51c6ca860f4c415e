"""What the process that keeps the GPU does for gpu.py: one job after the other, each of which returns a record."""

import os
import traceback
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import gpu_cases
import torch
from cases import GATE_TOKENS, Case
from gpu_cases import Shape
from worker import answers

Record = dict[str, Any]


def served(connection: Connection, shape: Shape, quick: bool) -> None:
    """Answers jobs until the connection ends."""
    with ExitStack() as stack:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from interpreted import as_on_a_gpu

            stack.enter_context(as_on_a_gpu())
        answers(connection, Jobs(shape, quick).done)


class Jobs:
    """The jobs by name, on the one device."""

    def __init__(self, shape: Shape, quick: bool):
        from gpu_measure import device

        cases = [*gpu_cases.every_case(shape, quick), *gpu_cases.overflow_cases(quick)]
        self.cases, self.quick, self.device = {case.name: case for case in cases}, quick, device()

    def done(self, job: str, arguments: Record) -> Record:
        """The record of a job, or {"error": ...}; "fatal" where this process can do no more."""
        from jobs import finite

        try:
            record = getattr(self, job)(**arguments)
        except Exception:
            record = {"error": traceback.format_exc()}
        if not self.device.is_healthy():
            return {"error": "an error that ends all work on the device", **finite(record), "fatal": True}
        self.device.give_back()
        return finite(record)

    def environment(self) -> Record:
        if self.device.kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return {"error": "no CUDA device; for a dry run on the CPU: TRITON_INTERPRET=1, with --quick"}
        return {**self.device.facts(), "kind": self.device.kind, "torch": torch.__version__}

    def probes(self, case: str) -> Record:
        from gpu_measure import probes

        return probes(self.cases[case], self.device)

    def gate(self, case: str, names: list[str]) -> Record:
        """Errors against float64 at the case's own head and at most as many tokens as the judge takes."""
        from gpu_peers import implementations
        from jobs import bound_calls, judge

        whole = self.cases[case]
        few = whole if whole.kind == "gae" else replace(whole, tokens=min(whole.tokens, GATE_TOKENS))
        record: Record = {"rows": {}, "left_out": {}, "failures": []}
        calls = bound_calls(few, implementations(few, tuple(names)), record["left_out"], self.device.kind)
        if "ours" in calls:
            judge(few, calls, record)
        else:
            record["skipped"] = record["left_out"].pop("ours", "ours is not among the implementations")
        return record

    def timing(self, case: str, names: list[str], seconds: float) -> Record:
        from gpu_measure import timed

        return timed(self.cases[case], tuple(names), self.device, seconds)

    def twice(self, case: str) -> Record:
        from gpu_checks import twice

        return self._checked(twice, case)

    def alone(self, case: str) -> Record:
        from gpu_checks import alone

        return self._checked(alone, case)

    def large(self, case: str) -> Record:
        from gpu_checks import large

        return self._checked(large, case)

    def tiling(self, case: str, number: int) -> Record:
        from gpu_tilings import QUICK as FEW
        from gpu_tilings import TILINGS, tiled

        return tiled(self.cases[case], (FEW if self.quick else TILINGS)[number], self.device)

    def tilings(self) -> Record:
        """How many there are."""
        from gpu_tilings import QUICK as FEW
        from gpu_tilings import TILINGS

        return {"count": len(FEW if self.quick else TILINGS)}

    def _checked(self, check: Any, case: str) -> Record:
        """{"skipped": ...} where ours cannot compute the case at all."""
        from implementations import UnavailableError

        try:
            return check(self._case(case), self.device)
        except UnavailableError as reason:
            return {"skipped": str(reason)}

    def _case(self, name: str) -> Case:
        return self.cases[name]
