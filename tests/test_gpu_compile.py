"""Every Triton kernel compiles for GPUs that are not here, and no other length compiles it again."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

OTHER = os.environ.get("OTHER_TRITON")  # a folder with another version, for `pip install --target`
BUILDS = {
    f"sm_{capability}, {'the other' if other else 'this'} triton": (capability, other)
    for capability in (80, 90)
    for other in (False, True)
}


def started(capability, other):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if other:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (OTHER, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name("compile_for_gpu.py")), str(capability)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.fixture(scope="module")
def running():
    """A process for every build; all compile while one is waited for."""
    with ExitStack() as stack:
        processes = {}
        for name, (capability, other) in BUILDS.items():
            if OTHER or not other:
                processes[name] = stack.enter_context(started(capability, other))
                stack.callback(processes[name].kill)
        yield processes


class Build(NamedTuple):
    capability: int
    about: dict
    again: dict  # how often another length compiled
    variants: list[dict]


@cache
def output(process):
    return process.communicate()


def finished(name, process):
    printed, errors = output(process)
    assert process.returncode == 0, errors[-3000:]
    about, again, *variants = map(json.loads, printed.splitlines())
    return Build(BUILDS[name][0], about, again, variants)


@pytest.fixture(params=BUILDS)
def build(request, running):
    if request.param not in running:
        pytest.skip("OTHER_TRITON names no folder")
    return finished(request.param, running[request.param])


def test_every_kernel_compiles(build):
    assert build.about["never launched"] == []
    assert len(build.variants) > 40


def test_no_other_length_compiles_again(build):
    assert build.again == {"variants that another length made": 0}


def test_tensor_cores_and_bulk_loads_are_used(build):
    products = [v for v in build.variants if "DEPTH" in v["flags"]]
    assert products
    for variant in products:
        assert variant["wgmma"] == (build.capability >= 90)
        assert variant["bulk loads"] == (build.capability >= 90 and variant["flags"]["BULK"])


def test_hardly_any_register_is_spilled(build):
    # a stack of some hundred bytes holds what the loop over a product does not touch; two thousand were once there
    assert not [v for v in build.variants if v["stack"] > 800]


@pytest.mark.skipif(OTHER is None, reason="OTHER_TRITON names no folder")
def test_the_other_triton_is_another(running):
    this, other = (finished(name, running[name]) for name in BUILDS if name.startswith("sm_90"))
    assert this.about["triton"] != other.about["triton"]
