"""The kernels compiled for GPUs that are not here, by processes that run beside the tests."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

OTHER = os.environ.get("OTHER_TRITON")  # a folder with another version, for `pip install --target`
BUILDS = {
    f"sm_{capability}, {'the other' if other else 'this'} triton": (capability, other)
    for capability in (80, 90)
    for other in (False, True)
}


class Built(NamedTuple):
    """What one of them has found."""

    capability: int
    about: dict
    again: dict  # how often another length compiled
    variants: list[dict]


@contextmanager
def compiling() -> Iterator[dict[str, subprocess.Popen]]:
    """One process for each of BUILDS; those of the other Triton only where there is one."""
    with ExitStack() as stack:
        processes = {}
        for name, (capability, other) in BUILDS.items():
            if OTHER or not other:
                processes[name] = stack.enter_context(started(capability, other))
                stack.callback(processes[name].kill)
        yield processes


def started(capability: int, other: bool) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if other:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (OTHER, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name("compile_for_gpu.py")), str(capability)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@cache
def output(process: subprocess.Popen) -> tuple[str, str]:
    return process.communicate()


def built(name: str, process: subprocess.Popen) -> Built:
    """Waits for a process."""
    printed, errors = output(process)
    assert process.returncode == 0, errors[-3000:]
    about, again, *variants = map(json.loads, printed.splitlines())
    return Built(BUILDS[name][0], about, again, variants)
