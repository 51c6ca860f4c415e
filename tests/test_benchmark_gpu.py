"""The benchmark of the GPU kernels, without a GPU: Triton's interpreter, made-up clocks, made-up events."""

import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CASES = "head-fwdbwd,logits-fwd-entropy,kl-reverse,sweep-tokens-4,overflow-rows"
TINY = ["--quick", "--tokens", "16", "--hidden", "16", "--vocabulary", "37", "--seed", "2"]


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # as python does for a script
    return importlib.import_module(name)


@pytest.fixture
def interpreted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on the GPU")
    with module("interpreted", monkeypatch).as_on_a_gpu():
        yield


@pytest.fixture
def jobs(monkeypatch, interpreted):
    shape = module("gpu_cases", monkeypatch).Shape(tokens=16, hidden=16, vocabulary=37, seed=2)
    return module("gpu_jobs", monkeypatch).Jobs(shape, quick=True)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    command = [sys.executable, BENCHMARKS / "gpu.py", *TINY, "--cases", CASES, "--peers", "naive"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, "--results", folder], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.jsonl")
    return folder, [json.loads(line) for line in path.read_text().splitlines()], run


def test_one_command_does_every_step_and_records_it(dry_run):
    folder, records, run = dry_run
    assert "RuntimeWarning" not in run.stderr
    steps = list(dict.fromkeys(r["step"] for r in records))
    assert steps == ["environment", "probe", "gate", "twice", "alone", "large", "timing", "goals", "tiling"]
    assert len({r["run"] for r in records}) == 1
    assert all(r["quick"] and r["gpu"] == "interpreter" and r["passed"] for r in records)
    assert next(folder.glob("*.jsonl")).name.endswith("-interpreter.jsonl")
    names = [name for name in CASES.split(",") if not name.startswith("overflow")]
    assert {r["case"] for r in records if r["step"] == "gate"} == set(names)
    for line in (r for r in records if r["step"] == "timing"):
        assert line["implementation"] in ("ours", "naive")
        assert line["wall_s"] >= line["wall_min_s"] > 0
        assert line["roofline_rate"] > 0
        assert line["max_error"] < 0.1
        assert line["impl"] == "triton"
        assert line["excess_bytes"] is not None
    assert {r["case"] for r in records if r["step"] == "timing"} == set(names)
    (found,) = [r["goals"] for r in records if r["step"] == "goals"]
    met = {goal["what"]: goal["met"] for goal in found}
    assert met["largest error of any output"] is met["two runs: cases of 1 that fail"] is True
    assert {path.name for path in folder.glob("*.png")} == {
        "interpreter-against_tokens.png",
        "interpreter-ratios.png",
    }
    assert run.stdout.index("gate: ") < run.stdout.index("two runs of") < run.stdout.index("\nGoals")


def test_a_machine_without_a_gpu_is_told_what_to_do(monkeypatch, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    jobs = module("gpu_jobs", monkeypatch).Jobs(module("gpu_cases", monkeypatch).QUICK, quick=True)
    run = started(monkeypatch, tmp_path, lambda job, limit, **arguments: jobs.done(job, arguments))
    assert run.everything() == 1
    assert "no CUDA device; for a dry run on the CPU: TRITON_INTERPRET=1" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_cases_have_names_of_their_own_and_goals_name_cases_that_exist(monkeypatch):
    gpu_cases, goals = module("gpu_cases", monkeypatch), module("goals", monkeypatch)
    cases = [*gpu_cases.every_case(gpu_cases.Shape()), *gpu_cases.overflow_cases(quick=False)]
    named = {case.name: case for case in cases}
    assert len(named) == len(cases)
    assert all(case.impl == "triton" for case in cases)
    assert named["overflow-logits"].tokens * named["overflow-logits"].vocabulary > 2**31
    assert len(gpu_cases.checked_cases(cases)) == 8
    assert [case.tokens for case in cases if case.sweep == "tokens"] == [2048, 4096, 8192, 16384]
    assert [case.vocabulary for case in cases if case.sweep == "vocabulary"][-1] == 2 * 128256
    row = {"wall_s": 1.0, "forward_wall_s": 0.5, "backward_wall_s": 0.5, "wall_over_ours": 2.0, "max_error": 0.0}
    row |= {"excess_bytes": 1, "backward_over_dense": 0.1}
    peers = ("ours", "naive", "trl", "liger", "liger-flce", "liger-jsd")
    record = {"rows": dict.fromkeys(peers, row), "roofline_rate": 1.0, "failures": []}
    results = goals.Results(named, dict.fromkeys(named, record), dict.fromkeys(named, record), {"two runs": [True]})
    assert [goal.what for goal in goals.goals(results) if goal.measured is None] == []
    assert [goal.what for goal in goals.goals(goals.Results(named)) if goal.met is not None] == []


def measured(monkeypatch, **rows):
    """Results of a head of 10 x 20 x 30 at 1e6 FLOP/s: a product takes 12 ms."""
    goals, case_type = module("goals", monkeypatch), module("cases", monkeypatch).Case
    shape = {"dtype": "bfloat16", "tokens": 10, "hidden": 20, "vocabulary": 30}
    cases = {name: case_type(name, "head", **shape) for name in ("head-fwdbwd-entropy", "logits-fwdbwd-entropy")}
    cases |= {name: case_type(name, "kl", **shape) for name in ("kl-reverse", "grpo", "head-fwdbwd")}
    timings = {
        name.replace("_", "-"): {"rows": found, "roofline_rate": 1e6, "failures": []} for name, found in rows.items()
    }
    return goals, goals.Results(cases, timings=timings)


def test_goals_are_shares_of_the_probe_and_times_scaled_by_it(monkeypatch):
    ours = {"wall_s": 0.060, "forward_wall_s": 0.015, "backward_wall_s": 0.045, "excess_bytes": 451e6}
    peer = {"wall_over_ours": 2.0}
    goals, results = measured(
        monkeypatch,
        head_fwdbwd_entropy={"ours": ours},
        logits_fwdbwd_entropy={"ours": {"backward_wall_s": 0.0024}},
        kl_reverse={"ours": {"wall_s": 0.080}, "liger-jsd": peer},
        grpo={"ours": {"wall_s": 0.0611}, "liger": {"wall_over_ours": 3.0}, "liger-compiled": {"wall_over_ours": 2.6}},
        head_fwdbwd={"ours": {"wall_s": 0.061}, "trl": {"wall_over_ours": 2.5}},
        head_masked10={"ours": {"wall_s": 0.0061}},
    )
    found = {goal.what: goal for goal in goals.goals(results)}

    def goal(start):
        (only,) = [goal for what, goal in found.items() if what.startswith(start)]
        return only

    assert goal("head, backward: share").measured == pytest.approx(3 * 12e3 / 0.045 / 1e6)
    assert not goal("head, backward: share").met  # 0.8 of 0.85
    assert goal("logits, backward: share").measured == pytest.approx(2 * 10 * 30 * 2 / 0.0024 / 1e6)
    scaled = 52 * (10 * 20 * 30) / (8192 * 4096 * 128256) * 790e12 / 1e6
    assert found["head, forward and backward"].bound == pytest.approx(scaled)
    assert found["head, forward and backward"].measured == pytest.approx(60)
    assert not goal("head, forward and backward: excess").met  # 451 MB of 450
    assert goal("kl-reverse, both passes: share").measured == pytest.approx(6 * 12e3 / 0.080 / 1e6)
    assert goal("kl-reverse: Liger").met
    assert found["a tenth inside the mask: share of all rows' time"].measured == pytest.approx(0.0061 / 0.061)
    assert goal("GRPO: Liger").measured == 2.6  # the faster of the two
    assert not goal("GRPO: Liger").met
    assert goal("GRPO: time beside").measured == pytest.approx(0.1)
    assert goal("head: TRL").met
    assert goal("head: Liger").met is None
    assert goal("head, forward: share").met is None
    table = goals.table([goal("head: TRL"), goal("GRPO: Liger"), goal("head: Liger")])
    said = [line[92:] for line in table.splitlines()]
    assert said == ["met", "NOT MET", "not measured"]


def test_what_is_wrong_meets_no_goal(monkeypatch):
    goals, results = measured(monkeypatch, head_fwdbwd={"ours": {"wall_s": 1.0}, "trl": {"wall_over_ours": 9.0}})
    results.timings["head-fwdbwd"]["failures"] = ["ours: outputs: error 1 above 0"]
    results.gates["a"] = {"rows": {"ours": {"max_error": None}}, "failures": ["ours: outputs"]}
    results.gates["b"] = {"error": "it raised"}
    results.checks["two runs"] = [True, False, True]
    found = {goal.what: goal for goal in goals.goals(results)}
    assert found["head: TRL's chunked over ours"].met is None
    assert found["largest error of any output"].met is False
    assert found["cases that the gate stopped"].measured == 2
    assert found["two runs: cases of 3 that fail"].measured == 1
    assert found["two runs: cases of 3 that fail"].met is False


def started(monkeypatch, folder, call, **options):
    clock = options.pop("clock", None)
    gpu = module("gpu", monkeypatch)
    arguments = gpu.parsed([])
    given = {"quick": True, "results": folder, "peers": [], **options}
    return gpu.Run(Namespace(**{**vars(arguments), **given}), call, *([clock] if clock else []))


class MadeUp:
    """A device on which every job takes as long as it is said to, and a clock that shows it."""

    def __init__(self, **seconds):
        self.now, self.seconds, self.done, self.answers = 0.0, seconds, [], {}

    def call(self, job, limit, **arguments):
        self.done.append((job, arguments.get("case", "")))
        self.now += min(self.seconds.get(job, 1.0), limit)
        return self.answers.get(self.done[-1]) or self.answer(job)

    def answer(self, job):
        row = {"max_error": 0.0, "gradient_error": None, "gradient_errors": {}, "gradient_floors": {}}
        if job == "timing":
            row = {"wall_s": 1.0, "forward_wall_s": 0.5, "backward_wall_s": 0.5, "wall_over_ours": 1.0}
        record = {"rows": {"ours": row}, "left_out": {}, "failures": [], "roofline_rate": 1.0, "differing": []}
        record |= {"gpu": "NVIDIA H1", "max_error": 0.0, "count": 1, "tiling": {"rows": 1}, "frozen_s": 1.0}
        record |= dict.fromkeys(("copy_bytes_per_s", "matmul_flops_per_s"), 1.0)
        return record | {f"{p}_{unit}": 1.0 for p in ("forward", "backward") for unit in ("s", "share")}


def test_a_run_keeps_to_its_seconds_and_says_what_it_left_out(monkeypatch, tmp_path, capsys):
    made_up = MadeUp(gate=6, timing=30, environment=20)
    run = started(monkeypatch, tmp_path, made_up.call, seconds=540, clock=lambda: made_up.now)
    assert run.everything() == 0
    assert 500 < made_up.now <= 540
    timed = [case for job, case in made_up.done if job == "timing"]
    every = [case.name for case in run.cases]
    assert timed == every[: len(timed)]  # the most important ones
    assert 0 < len(timed) < len(every)
    assert run.left_out == [*(f"times of {name}" for name in every[len(timed) :]), "other tilings"]
    printed = capsys.readouterr().out
    assert f"left out for want of time: times of {every[len(timed)]}" in printed
    (path,) = tmp_path.glob("*.jsonl")
    assert path.name.endswith("-nvidia-h1.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[-1]["step"] == "left out"
    assert records[-1]["steps"] == run.left_out


def test_ours_that_fails_fails_the_run_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    made_up = MadeUp()
    judged = made_up.answer("gate") | {"failures": ["ours: outputs: error 1.00e-04 above 1.00e-05"]}
    made_up.answers = {
        ("gate", "head-fwdbwd"): judged,
        ("gate", "grpo"): {"error": "Traceback\nCUDA error"},
        ("twice", "kl-reverse"): {"differing": ["gradient of hidden"]},
        ("large", "overflow-rows"): {"skipped": "needs 9 GB"},
        ("timing", "gae"): {"error": "no answer within 150 s; the process was ended"},
    }
    run = started(monkeypatch, tmp_path, made_up.call, clock=lambda: made_up.now)
    assert run.everything() == 1
    assert run.failures == ["head-fwdbwd", "grpo", "two runs of kl-reverse", "times of gae"]
    printed = capsys.readouterr().out
    assert "FAILED two runs of kl-reverse: gradient of hidden differs" in printed
    assert "large indices of overflow-rows: skipped: needs 9 GB" in printed
    timed = [case for job, case in made_up.done if job == "timing"]
    assert "head-fwdbwd" in timed  # it counts as failed all the same
    assert "grpo" not in timed
    assert made_up.done[-1] == ("tiling", "head-fwdbwd")
    (path,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    failed = {(r["step"], r.get("case")) for r in records if not r["passed"]}
    assert failed == {
        *(("gate", name) for name in ("head-fwdbwd", "grpo")),
        ("twice", "kl-reverse"),
        *(("timing", name) for name in ("head-fwdbwd", "gae")),
    }


OTHERS = ("head-frozen", "head-active10", "head-masked50", "head-mean", "grpo", "logits-kl-fwd", "gae", "gae-packed")


@pytest.mark.parametrize("name", OTHERS)
def test_every_kind_of_case_is_judged_beside_the_naive_formula(jobs, name):
    record = jobs.done("gate", {"case": name, "names": ["ours", "naive"]})
    assert record["failures"] == []
    assert list(record["rows"]) == (
        ["ours"] if "mask" in name or "mean" in name or "active" in name else ["ours", "naive"]
    )
    assert record["left_out"] == {}


def scaled_statistics(head, monkeypatch):
    right = head.close_sums

    def wrong(sums, rows, vocabulary, flags, statistics, state):
        right(sums, rows, vocabulary, flags, statistics, state)
        statistics.mul_(1.001)

    monkeypatch.setattr(head, "close_sums", wrong)


def scaled_gradients(gradient, monkeypatch):
    right = gradient.GradientProducts.gradients
    monkeypatch.setattr(gradient.GradientProducts, "gradients", lambda *a: [x * 1.01 for x in right(*a)])


@pytest.mark.parametrize(
    ("where", "wrong", "what"),
    [
        ("head", scaled_statistics, "outputs"),
        ("gradient", scaled_gradients, "gradient of weight"),
    ],
)
def test_the_gate_stops_a_wrong_kernel(jobs, where, wrong, what, monkeypatch):
    assert jobs.done("gate", {"case": "head-fwdbwd", "names": ["ours"]})["failures"] == []
    wrong(importlib.import_module(f"rlloss_kernels.gpu.{where}"), monkeypatch)
    record = jobs.done("gate", {"case": "head-fwdbwd", "names": ["ours"]})
    assert any(failure.startswith(f"ours: {what}: error") for failure in record["failures"])
    if where == "head":
        assert jobs.done("large", {"case": "overflow-rows"})["failures"]


@pytest.mark.parametrize("what", ["another draw every time", "the size of the batch"])
def test_other_bits_are_seen(jobs, what, monkeypatch):
    head = importlib.import_module("rlloss_kernels.gpu.head")
    right = head.close_sums

    def other(sums, rows, vocabulary, flags, statistics, state):
        right(sums, rows, vocabulary, flags, statistics, state)
        own = torch.rand(()) if what == "another draw every time" else 0.01 * statistics.shape[1]
        statistics.mul_(1 + 1e-5 * float(own))

    for job in ("twice", "alone"):
        assert jobs.done(job, {"case": "head-fwdbwd"}) == {"differing": []}
    monkeypatch.setattr(head, "close_sums", other)
    assert jobs.done("alone", {"case": "head-fwdbwd"})["differing"]
    found = jobs.done("twice", {"case": "head-fwdbwd"})["differing"]
    assert found == (["output 0"] if what == "another draw every time" else [])


def test_a_job_that_raises_is_a_record_and_an_end_of_the_device_is_said(jobs, monkeypatch):
    record = jobs.done("gate", {"case": "no such case", "names": []})
    assert "KeyError" in record["error"]
    assert "fatal" not in record
    monkeypatch.setattr(jobs.device, "is_healthy", lambda: False)
    assert jobs.done("gate", {"case": "no such case", "names": []})["fatal"]
    assert jobs.done("environment", {})["error"] == "an error that ends all work on the device"


def test_a_tiling_is_taken_everywhere_and_given_back(jobs, monkeypatch):
    tilings = module("gpu_tilings", monkeypatch)
    operands = importlib.import_module("rlloss_kernels.gpu.operands")
    with tilings.everywhere(tilings.QUICK[1]):
        assert operands.tiling(torch.zeros(1)) == tilings.QUICK[1]
        assert operands.tiling(torch.zeros(1), accumulators=2) == tilings.tiling(torch.zeros(1), accumulators=2)
    assert operands.tiling is tilings.tiling
    record = jobs.done("tiling", {"case": "head-fwdbwd", "number": 1})
    assert record["failures"] == []
    assert record["tiling"]["columns"] == 64
    assert min(record[f"{p}_s"] for p in ("forward", "backward", "frozen")) > 0
    monkeypatch.setattr(tilings, "SAME_OUTPUT", -1.0)
    assert len(jobs.done("tiling", {"case": "head-fwdbwd", "number": 0})["failures"]) == 1
    deeper = [cut for cut in tilings.TILINGS if cut.depth * cut.stages * (cut.rows + cut.columns) * 2 > 232_448]
    assert deeper == []  # bytes of shared memory that an H100 has


SERVING = """
import os, time
from worker import answers

def served(connection, word):
    def done(job, arguments):
        if job == "die":
            os._exit(3)
        if job == "hang":
            time.sleep(60)
        return {"process": os.getpid(), "word": word, **arguments} | ({"fatal": True} if job == "fatal" else {})
    answers(connection, done)
"""


def test_a_process_that_dies_or_hangs_costs_one_job(monkeypatch, tmp_path):
    worker = module("worker", monkeypatch)
    (tmp_path / "serving_of_a_test.py").write_text(SERVING)
    monkeypatch.syspath_prepend(tmp_path)
    served = importlib.import_module("serving_of_a_test").served
    with worker.Worker(served, "hello") as one:
        first = one.call("job", 60, limit=1)
        assert first["word"] == "hello"
        assert first["limit"] == 1
        assert one.call("job", 60)["process"] == first["process"]
        assert one.call("die", 60) == {"error": "the process died with exit code 3"}
        second = one.call("fatal", 60)
        assert second["fatal"]
        third = one.call("job", 60)
        assert len({first["process"], second["process"], third["process"]}) == 3
        start = time.monotonic()
        assert one.call("hang", 1) == {"error": "no answer within 1 s; the process was ended"}
        assert time.monotonic() - start < 20
        assert "error" not in one.call("job", 60)
    assert one.process is None


class MadeUpDevice:
    """Its work takes seconds of its own, and what is launched is only done when the device comes to it."""

    kind = "cpu"

    def __init__(self):
        self.now, self.log = 0.0, []

    def head_start(self):
        self.log.append("head start")
        self.now += 100

    def mark(self):
        self.log.append("mark")
        return self.now

    def seconds(self, start, end):
        return end - start

    def work(self, name, seconds):
        self.log.append(name)
        self.now += seconds


def test_passes_are_timed_apart_behind_a_head_start(monkeypatch):
    measure, gpu_measure = module("measure", monkeypatch), module("gpu_measure", monkeypatch)
    device = MadeUpDevice()

    class Bound(measure.Prepared):
        def backward(self, outputs):
            device.work("backward", 3)

        def clear(self):
            device.log.append("clear")

    def call():
        device.work("forward", 2)
        return ()

    inputs = module("inputs", monkeypatch).Inputs()
    found = gpu_measure.Timed(Bound(call, inputs, ()), device).seconds()
    assert (found.forward, found.backward) == (2, 3)
    assert device.log == ["head start", "mark", "forward", "mark", "backward", "mark", "clear"]


def test_laps_take_the_median_behind_one_that_is_not_timed(monkeypatch):
    device, durations = MadeUpDevice(), iter([50.0, 2.0, 9.0, 1.0])
    laps = module("gpu_measure", monkeypatch).laps
    assert laps(device, lambda: device.work("lap", next(durations))) == 2
    assert device.log[:2] == ["lap", "mark"]


def test_rounds_fill_the_seconds(monkeypatch):
    rounds = module("gpu_measure", monkeypatch).rounds_within
    assert [rounds(4.0, one) for one in (0.5, 0.01, 9.0, 0.0)] == [8, 20, 3, 20]


def test_cuda_events_are_waited_for_and_read_in_seconds(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number = len([x for x in log if x == "made"])
            log.append("made")

        def record(self):
            log.append(f"recorded {self.number}")

        def synchronize(self):
            log.append(f"waited for {self.number}")

        def elapsed_time(self, end):
            return 1500.0 * (end.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    cuda_type = module("gpu_measure", monkeypatch).Cuda
    cuda = cuda_type.__new__(cuda_type)
    start, end = cuda.mark(), cuda.mark()
    assert cuda.seconds(start, end) == 1.5
    assert log == ["made", "recorded 0", "made", "recorded 1", "waited for 1"]


def test_excess_memory_on_a_gpu_is_the_peak_beyond_what_was_there_and_must_stay(monkeypatch):
    log = []
    memory = {"now": 1000, "peak": 9999}
    fakes = {
        "synchronize": lambda: log.append("synchronize"),
        "empty_cache": lambda: log.append("empty_cache"),
        "reset_peak_memory_stats": lambda: memory.update(peak=memory["now"]),
        "memory_allocated": lambda: memory["now"],
        "max_memory_allocated": lambda: memory["peak"],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cuda_type = module("gpu_measure", monkeypatch).Cuda

    def call():
        log.append("call")
        memory.update(peak=max(memory["peak"], 1700))

    assert cuda_type.__new__(cuda_type).excess_bytes(call, mandatory=300) == 400
    assert log == ["synchronize", "empty_cache", "call", "synchronize"]


def test_an_error_of_the_device_is_seen_at_the_next_wait(monkeypatch):
    cuda_type = module("gpu_measure", monkeypatch).Cuda
    cuda = cuda_type.__new__(cuda_type)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert cuda.is_healthy()

    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not cuda.is_healthy()


def test_what_the_gpu_says_of_itself(monkeypatch):
    gpu_measure = module("gpu_measure", monkeypatch)
    values = "NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 1980 MHz, 41, 120.5 W\n"
    monkeypatch.setattr(gpu_measure.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=values))
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=5, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda = gpu_measure.Cuda.__new__(gpu_measure.Cuda)
    facts = cuda.facts()
    assert facts["capability"] == "9.0"
    assert facts["nvidia_smi"]["clocks.sm"] == "1980 MHz"

    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpu_measure.subprocess, "run", missing)
    assert cuda.facts()["nvidia_smi"] is None


JUDGED = {
    "kl": {"divergences": ("reverse_kl",)},
    "kl of both": {"divergences": ("forward_kl", "reverse_kl")},
    "logits_kl": {"divergences": ("reverse_kl", "forward_kl")},
    "head": {"masked": True, "active": 0.5, "entropy": True},
    "head of a mean": {"mean": True},
}


@pytest.mark.parametrize("name", JUDGED)
def test_the_judge_is_autograd_in_float64(name, monkeypatch):
    case_type, inputs, exact = (module(m, monkeypatch) for m in ("cases", "inputs", "exact"))
    kind = name.split()[0]
    case = case_type.Case(name, kind, "bfloat16", tokens=16, hidden=32, vocabulary=5003, **JUDGED[name])
    x = inputs.make(case)
    truth = exact.judged(case, x)
    leaves = {key: leaf.detach().double().requires_grad_() for key, leaf in x.leaves().items()}
    z = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["weight"].t()
    log_p = torch.log_softmax(z, -1)
    if case.is_pair:
        u = x.ref_logits.double() if x.hidden is None else x.ref_hidden.double() @ x.ref_weight.double().t()
        log_q = torch.log_softmax(u, -1)
        found = {"forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1)}
        found["reverse_kl"] = (log_p.exp() * (log_p - log_q)).sum(-1)
        outputs = [found[output] for output in case.outputs]
    else:
        outputs = [log_p.gather(-1, x.ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)][: len(case.outputs)]
    if case.masked:
        assert int(x.loss_mask.sum()) == 8
        assert all((g != 0).all() for g in x.upstream)  # it is the mask that keeps them out
        outputs = [y * x.loss_mask for y in outputs]
    torch.autograd.backward(outputs, [g.double() for g in x.upstream])
    torch.testing.assert_close(truth.outputs, tuple(y.detach() for y in outputs), rtol=1e-9, atol=1e-12)
    for key, leaf in leaves.items():
        torch.testing.assert_close(truth.gradients[key], leaf.grad, rtol=1e-9, atol=1e-12)
        assert 0 < truth.floors[key] < 0.01


@pytest.mark.parametrize("kind", ["logits", "head", "grpo", "dpo", "kl", "logits_kl", "gae"])
def test_inputs_judge_and_gate_stay_on_the_device_of_the_case(kind, monkeypatch):
    case_type, inputs, exact, gate = (module(m, monkeypatch) for m in ("cases", "inputs", "exact", "gate"))
    measure, peers = module("measure", monkeypatch), module("peers", monkeypatch)
    backward = kind != "gae"
    case = case_type.Case(kind, kind, "float32", backward=backward, tokens=16, hidden=8, vocabulary=37)
    with torch.device("meta"):  # where everything lands that is told no device
        x = inputs.make(case, "cpu")
        call = measure.prepared(peers.implementations(case, ("naive",))["naive"], case, x)
        found = gate.verdict(case, call, exact.judged(case, x))
    assert found.failures == []
    assert found.max_error < 1e-5


def test_the_gate_asks_of_sums_in_registers_what_it_asks_of_float32(monkeypatch):
    case_type, gate = module("cases", monkeypatch).Case, module("gate", monkeypatch)
    case = case_type("", "head", "bfloat16")
    assert gate.nats_bound(case) == 2e-3
    assert gate.nats_bound(replace(case, impl="triton")) == 1e-5
    assert gate.nats_bound(replace(case, kind="logits_kl")) == 1e-5
    assert gate.gradient_bound(replace(case, dtype="float16"), 1e-3) == pytest.approx(1.5e-3)


def test_pictures_of_a_gpu_and_of_a_processor_do_not_mix(monkeypatch, tmp_path):
    plot = module("plot", monkeypatch)
    point = {
        "passed": True,
        "quick": False,
        "wall_s": 1.0,
        "excess_bytes": 2**20,
        "sweep": "tokens",
        "dtype": "bfloat16",
    }
    point |= {"hidden": 8, "vocabulary": 9, "implementation": "ours", "threads": 2, "wall_over_ours": 1.0}
    records = [point | {"case": f"sweep-tokens-{n}", "tokens": n} for n in (1024, 2048)]
    records += [r | {"gpu": "NVIDIA H200", "threads": None} for r in records]
    whole = {"case": "head-fwdbwd", "sweep": "", "tokens": 8, "gpu": "NVIDIA H200"}
    records += [point | whole, point | whole | {"implementation": "trl", "wall_over_ours": 3.0}]
    path = tmp_path / "both.jsonl"
    other = [{"step": "probe", "passed": True, "quick": False}]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, *other]))
    figures = plot.pictures(plot.latest([path], quick=False))
    assert list(figures) == ["against_tokens.png", "nvidia-h200-against_tokens.png", "nvidia-h200-ratios.png"]
    titles = [figure._suptitle.get_text() for figure in figures.values()]
    assert titles[0].endswith("2 threads")
    assert titles[1].endswith("NVIDIA H200")
