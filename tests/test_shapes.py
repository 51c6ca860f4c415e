"""The shape annotations are true: tests run again in a process where jaxtyping and beartype check every one of them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPICS = ("advantages", "divergence", "gae", "law*", "losses*", "output", "reduce", "shaping", "surrogate")
FILES = [path for topic in TOPICS for path in sorted(ROOT.glob(f"tests/test_{topic}.py"))]
# of the laws, one pass over every loss in each layout: the other repetitions call the same functions
FEW = "not test_laws.py or law_3 or law_5"


@pytest.mark.unhooked
@pytest.mark.skipif(
    not (importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype")),
    reason="needs jaxtyping and beartype",
)
def test_the_annotations_are_true():
    pytest_program = Path(sys.executable).with_name("pytest")
    hook = ["--jaxtyping-packages=rlloss,beartype.beartype", "-m", "not unhooked", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [pytest_program, "-q", *hook, "-k", FEW, *FILES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
