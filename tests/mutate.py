"""The mutation sweep: every mutant of the tables `mutants_*.py` must make a test fail.

    python tests/mutate.py                   all mutants; writes docs/mutants.md
    python tests/mutate.py --only "^dpo:"    those whose `group: kind: change` matches; writes nothing
    python tests/mutate.py --list            names them and runs none

What several losses share is changed once for each of them, and then tests of that loss must fail. The sweep fails on a
survivor without a `reason`, on a `reason` whose mutant is killed, and on text that no longer stands in its file.
"""

import argparse
import gc
import importlib.util
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
COMMAND = "python tests/mutate.py"
SECONDS = 300  # of one run of the tests

# first words of the names of tests that hold no law of a loss, of a metric or of an advantage
ELSEWHERE = {"bad", "benchmark", "benchmarks", "cached", "checkpoint", "compile", "data", "documents", "examples"}
ELSEWHERE |= {"gpu", "heads", "vocab"}
ELSEWHERE |= {
    "house",
    "logprobs",
    "loop",
    "models",
    "mutants",
    "padding",
    "preferences",
    "readme",
    "reference",
    "report",
    "rewards",
}
ELSEWHERE |= {"sampling", "scalar", "shapes", "signal", "trainer", "trl", "truncation", "two", "workers"}


def _tests(*patterns: str) -> list[str]:
    """Files of tests, those of the most telling pattern first."""
    paths = [path for pattern in patterns for path in sorted(TESTS.glob(f"test_{pattern}.py"))]
    return [f"tests/{p.name}" for p in dict.fromkeys(paths) if p.stem.split("_")[1] not in ELSEWHERE]


OF_LOSSES = _tests("laws_specification", "losses*", "laws_meaning", "laws")
OF_PIECES = (
    *_tests("laws_specification", "losses*", "[!l]*", "*"),
    *(f"rlloss/{name}" for name in ("advantages", "losses", "divergence.py", "output.py")),
    *(f"rlloss/{name}.py" for name in ("preference", "reduce", "surrogate")),
)
# where the tests of a piece do not bear its name
FIRST = {"group": "advantages", "rows": "advantages", "running": "shaping", "whiten": "shaping"}
FIRST |= dict.fromkeys(("gdpo", "pass_at_k", "presets", "running_baseline"), "advantages_named")
FIRST |= {"tokens": "advantages_tokens", "policy": "losses", "policy_surrogates": "losses"}
FIRST |= dict.fromkeys(("optimal_value", "selection"), "losses_regions")
# pieces that few tests reach
ALONE = {"recurrence": ("gae", "gpu_scan"), "scan": ("gpu_scan",), "loop_advantages": ("advantages_loop",)}
ALONE |= dict.fromkeys(("preference_inputs", "preference_margins"), ("losses_preference", "peers_preference"))
OF_ONE_MODEL = ("softmax", "rows", "products", "gradient", "gradient_products", "frozen")
OF_TWO_MODELS = ("pair", "pair_logits", "pair_heads", "pair_gradient")
ALONE |= dict.fromkeys(("nash_md", "teacher", "top_k"), ("losses_distillation",))
ALONE |= {f"gpu.{name}": ("gpu_logprobs",) for name in OF_ONE_MODEL}
ALONE |= {f"gpu.{name}": ("gpu_pair",) for name in OF_TWO_MODELS}
# a loss's own tests, where its name alone would name more
KEYWORDS = {"grpo": "grpo and not dr_grpo and not drgrpo", "ppo": "ppo and not conservative"}
KEYWORDS |= {"bco": "bco and not bco_pair"}


class Mutant(NamedTuple):
    """One change of one file, and why it may survive."""

    group: str  # a loss, or the file of a shared piece
    kind: str
    change: str
    file: str
    old: str
    new: str
    also: tuple[tuple[str, str], ...] = ()  # further replacements in the same file
    times: int = 1  # how often `old` stands in the file; all are replaced
    reason: str = ""  # why no test can tell it from the code

    def __str__(self) -> str:
        return f"{self.group}: {self.kind}: {self.change}"

    def applied(self, source: str) -> str:
        """The mutated source."""
        for old, new, times in ((self.old, self.new, self.times), *((old, new, 1) for old, new in self.also)):
            if source.count(old) != times:
                raise ValueError(f"{self}: stands {source.count(old)} times, not {times}, in {self.file}: {old!r}")
            source = source.replace(old, new)
        return source

    def selections(self) -> list[tuple[str, ...]]:
        """The arguments that select what should kill it; the next ones run where the first do not."""
        loss = f"rlloss/losses/{self.group}.py"
        if self.group in ALONE:
            return [tuple(f"tests/test_{name}.py" for name in ALONE[self.group])]
        if not (ROOT / loss).exists():
            first = f"tests/test_{FIRST.get(self.group, self.group)}.py"
            return [tuple(sorted(OF_PIECES, key=lambda name: name != first))]
        named = (*OF_LOSSES, loss, "-k", KEYWORDS.get(self.group, self.group))
        # whatever fails by a change of the loss's own file tests that loss, with or without its name
        return [named, (*OF_LOSSES, loss)] if self.file == loss else [named]


class Outcome(NamedTuple):
    """What became of a mutant: `killed` by a test, `survived`, or an `error` such as code that cannot be imported."""

    mutant: Mutant
    verdict: str
    detail: str


def mutants() -> list[Mutant]:
    """Every line of every table: sections (group, file, rows) with rows (kind, change, old, new[, other fields])."""
    sections = [s for path in sorted(TESTS.glob("mutants_*.py")) for s in runpy.run_path(str(path))["MUTANTS"]]
    return [
        Mutant(group, kind, change, file, old, new, **(more[0] if more else {}))
        for group, file, rows in sections
        for kind, change, old, new, *more in rows
    ]


# running: a worker has a copy of the repository and torch, and every run of the tests is a fork of it


class Plugin:
    """Makes sure that the copy is what is tested, and writes the test that fails down for the waiting process."""

    def __init__(self, failure: Path) -> None:
        self.failure = failure

    def pytest_collection_finish(self) -> None:
        # an editable installation stands ready to import the original
        for name in ("rlloss", "rlloss_kernels"):
            found = str(importlib.import_module(name).__file__)
            assert Path(found).is_relative_to(TREE), f"{found} is not the copy"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failure.write_text(report.nodeid.rpartition("/")[2])


def copy_repository(to: Path) -> None:
    for name in ("rlloss", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)


def start_worker(folder: str) -> None:
    global TREE
    TREE = Path(folder) / str(os.getpid())
    copy_repository(TREE)


def run_tests(tests: tuple[str, ...]) -> tuple[int, str]:
    """The exit status of pytest in this worker's copy, and the test that failed."""
    failure = TREE / "failure"
    failure.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = _test_in_this_process(tests, failure)
        except BaseException as error:
            failure.write_text(repr(error))
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, failure.read_text() if failure.exists() else ""


def _test_in_this_process(tests: tuple[str, ...], failure: Path) -> int:
    signal.alarm(SECONDS)
    os.chdir(TREE)
    sys.path[:0] = [str(TREE), str(TREE / "kernels")]
    log = os.open(TREE / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[Plugin(failure)]))


def judge(mutant: Mutant) -> Outcome:
    path = TREE / mutant.file
    source = path.read_text()
    _rewrite(path, mutant.applied(source))
    status, detail = 0, ""
    for tests in mutant.selections():
        status, detail = (status, detail) if status else run_tests(tests)
    _rewrite(path, source)
    verdict = {0: "survived", 1: "killed"}.get(status, "error")
    return Outcome(mutant, verdict, f"{detail} (exit status {status})" if verdict == "error" else detail)


def _rewrite(path: Path, source: str) -> None:
    path.write_text(source)
    # bytecode counts as fresh if size and second of writing agree, as they may for a mutant and its original
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def check_baseline(tests: tuple[str, ...]) -> str:
    """Why these tests prove nothing: they fail or are none on the code as it is; else empty."""
    status, detail = run_tests(tests)
    return f"exit status {status} without a mutant, {detail}: {' '.join(tests)}" if status else ""


# judging


def stale(chosen: list[Mutant]) -> list[str]:
    """What no longer stands in its file."""
    found = []
    for mutant in chosen:
        try:
            mutant.applied((ROOT / mutant.file).read_text())
        except ValueError as error:
            found.append(str(error))
    return found


def problems(outcomes: Iterable[Outcome]) -> list[str]:
    found = []
    for mutant, verdict, detail in outcomes:
        if verdict == "error":
            found.append(f"{mutant}: {detail}")
        if verdict == "survived" and not mutant.reason:
            found.append(f"{mutant}: survived")
        if verdict == "killed" and mutant.reason:
            found.append(f"{mutant}: has a reason to survive, but was killed by {detail}")
    return found


def page(outcomes: list[Outcome]) -> str:
    """docs/mutants.md."""
    survivors = [o for o in outcomes if o.verdict == "survived"]
    lines = [
        "# Mutants",
        "",
        f"Written by `{COMMAND}`, which makes each change below to a copy of the code and runs the tests. "
        f"{len(outcomes)} mutants, {len(outcomes) - len(survivors)} killed, {len(survivors)} survivors. "
        "What several losses share is changed once for each of them, and then only tests of that loss count. "
        "A mutant survives where no test can tell it from the code; its reason stands with it.",
        "",
        *_count_table("kind", outcomes, [o.mutant.kind for o in outcomes]),
        *_count_table("group", outcomes, [o.mutant.group for o in outcomes]),
    ]
    for group in dict.fromkeys(o.mutant.group for o in outcomes):
        lines += [f"## {group}", "", "| kind | change | killed by |", "|---|---|---|"]
        for mutant, verdict, detail in (o for o in outcomes if o.mutant.group == group):
            fate = f"**survives**: {mutant.reason}" if verdict == "survived" else f"`{detail}`"
            lines.append(f"| {mutant.kind} | {mutant.change} | {fate} |".replace("||", r"\|\|"))
        lines.append("")
    return "\n".join(lines)


def _count_table(title: str, outcomes: list[Outcome], keys: list[str]) -> list[str]:
    lines = [f"| {title} | mutants | killed | survivors |", "|---|---|---|---|"]
    for key in dict.fromkeys(keys):
        verdicts = [o.verdict for o, k in zip(outcomes, keys, strict=True) if k == key]
        lines.append(f"| {key} | {len(verdicts)} | {verdicts.count('killed')} | {verdicts.count('survived')} |")
    return [*lines, ""]


def sweep(chosen: list[Mutant], jobs: int) -> tuple[list[Outcome], list[str]]:
    """What became of the mutants, and what is wrong with it."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.environ["TRITON_INTERPRET"] = "1"  # triton asks at its import, which is torch._dynamo's
    sys.dont_write_bytecode = False  # whatever the environment says: every fork would compile all tests anew
    for name in ("numpy", "torch", "torch._dynamo"):
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage in every fork
    outcomes = []
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("fork").Pool(jobs, start_worker, [folder]) as workers,
    ):
        first = {tests for m in chosen for tests in m.selections()[:1]}
        # OF_PIECES holds every other selection but those of ALONE
        every = [OF_PIECES, *{tests for tests in first if not set(tests) <= {*OF_PIECES, *OF_LOSSES}}]
        if broken := list(filter(None, workers.imap(check_baseline, first if len(first) < 4 else every))):
            return [], broken
        for done, outcome in enumerate(workers.imap(judge, chosen), start=1):
            print(f"{done}/{len(chosen)} {outcome.verdict:8} {outcome.mutant}  [{outcome.detail}]", flush=True)
            outcomes.append(outcome)
    return outcomes, problems(outcomes)


def main() -> int:
    parser = argparse.ArgumentParser(description="The mutation sweep.")
    parser.add_argument("--only", default="", metavar="PATTERN", help="those whose `group: kind: change` matches")
    parser.add_argument("--list", action="store_true", help="name the mutants, run none")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    chosen = [m for m in mutants() if re.search(options.only, str(m))]
    if not chosen:
        parser.error(f"no mutant matches {options.only!r}")
    if options.list:
        print(*chosen, sep="\n")
        return 0
    start = time.monotonic()
    wrong = stale(chosen)
    outcomes, wrong = ([], wrong) if wrong else sweep(chosen, options.jobs)
    if outcomes and not options.only:
        (ROOT / "docs" / "mutants.md").write_text(page(outcomes))
    print(f"{len(outcomes)} mutants, {time.monotonic() - start:.0f} s; {len(wrong)} problems", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
