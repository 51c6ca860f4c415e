"""Every Triton kernel compiles for GPUs that are not here, and no other length compiles it again."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHER = os.environ.get("OTHER_TRITON")  # a folder with another version, for `pip install --target`


@cache
def running(capability: int, other: bool) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if other:
        environment["PYTHONPATH"] = str(OTHER)
    command = [sys.executable, str(ROOT / "tests" / "compile_for_gpu.py"), str(capability)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@cache
def compiled(capability: int, other: bool) -> tuple[dict, dict, list[dict]]:
    """Which Triton compiled, how often another length did, and every variant of a kernel."""
    for each in (80, 90):  # both compile while one is waited for
        running(each, other)
    printed, errors = running(capability, other).communicate()
    assert running(capability, other).returncode == 0, errors[-3000:]
    about, again, *variants = map(json.loads, printed.splitlines())
    return about, again, variants


BUILDS = {
    f"sm_{capability}, {'the other' if other else 'this'} triton": (capability, other)
    for capability in (80, 90)
    for other in (False, True)
}


@pytest.fixture(params=BUILDS)
def build(request):
    capability, other = BUILDS[request.param]
    if other and OTHER is None:
        pytest.skip("OTHER_TRITON names no folder")
    return capability, compiled(capability, other)


def test_every_kernel_compiles(build):
    _, (about, _, variants) = build
    assert about["never launched"] == []
    assert len(variants) > 40


def test_no_other_length_compiles_again(build):
    _, (_, again, _) = build
    assert again == {"variants that another length made": 0}


def test_tensor_cores_and_bulk_loads_are_used(build):
    capability, (_, _, variants) = build
    products = [v for v in variants if "DEPTH" in v["flags"]]
    assert products
    for variant in products:
        assert variant["wgmma"] == (capability >= 90)
        assert variant["bulk loads"] == (capability >= 90 and variant["flags"]["BULK"])


def test_hardly_any_register_is_spilled(build):
    # a stack of some hundred bytes holds what the loop over a product does not touch; two thousand were once there
    _, (_, _, variants) = build
    assert not [v for v in variants if v["stack"] > 800]


@pytest.mark.skipif(OTHER is None, reason="OTHER_TRITON names no folder")
def test_the_other_triton_is_another():
    assert compiled(90, True)[0]["triton"] != compiled(90, False)[0]["triton"]
