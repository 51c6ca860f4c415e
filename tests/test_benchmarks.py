"""The benchmark: its command, its gate, its judge, its clock and its pictures, at sizes where times mean nothing."""

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rlloss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ["--tokens", "16", "--hidden", "32", "--vocabulary", "211", "--threads", "1", "--rounds", "2"]
COLUMNS = {"case", "implementation", "machine", "versions", "commit", "threads", "seed", "passed", "wall_s", "cpu_s"}
COLUMNS |= {"wall_over_ours", "cpu_over_ours", "excess_bytes", "max_error", "gradient_error", "roofline_fraction"}
COLUMNS |= {"tokens", "hidden", "vocabulary", "dtype", "scale", "rounds", "quick", "sweep", "time", "command"}

# several runs of the command in one process, since most of a run this small is imports
DRIVER = """
import json, sys
sys.path.insert(0, {benchmarks!r})
sys.modules["trl"] = None  # as where it is not installed
import rlloss, run
right = rlloss.token_logprobs
def wrong(logits, ids, **options):
    return right(logits.bfloat16().float(), ids, **options)
def result(*arguments):
    sys.argv = ["run.py", *arguments]
    return run.main()
codes = [result("--sweep", *{tokens!r}), result("--sweep", *{vocabulary!r}), result(*{missing!r})]
rlloss.token_logprobs = wrong
print(json.dumps([*codes, result(*{wrong!r})]))
"""


def module(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # as python does for a script
    return importlib.import_module(name)


def records(folder):
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    cases = "logits-bf16-fwdbwd-entropy,head-fp32-fwd,head-bf16-active50,grpo-bf16,dpo-bf16,gae"
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--cases", cases, *TINY, "--results", folder]
    command += ["--implementations", "ours", "naive", "ours-dense"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run.stdout


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sweep", "missing", "wrong")}
    cases = {"tokens": "sweep-tokens-256,sweep-tokens-512", "vocabulary": "sweep-vocabulary-8192"}
    cases |= {"missing": "head-fp32-fwd", "wrong": "logits-fp32-fwdbwd"}
    arguments = {}
    for name, pattern in cases.items():
        arguments[name] = ["--quick", "--cases", pattern, "--results", str(folders.get(name, folders["sweep"]))]
        arguments[name] += ["--threads", "1", "--rounds", "2", "--implementations", "ours", "naive"]
    arguments["missing"] += ["trl"]
    driver = DRIVER.format(benchmarks=str(BENCHMARKS), **arguments)
    run = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, cwd=folders["sweep"])
    assert run.returncode == 0, run.stdout + run.stderr
    return folders, run.stdout


def test_one_command_measures_every_column(quick_run):
    folder, printed = quick_run
    lines = records(folder)
    ours = [line for line in lines if line["implementation"] == "ours"]
    assert len(ours) == 6
    assert {line["implementation"] for line in lines} == {"ours", "naive", "ours-dense"}
    for line in lines:
        assert line.keys() >= COLUMNS
        assert line["passed"]
        assert line["quick"]
        assert line["rounds"] == 2
        assert line["tokens"] == 16
        for key in ("wall_s", "cpu_s", "wall_over_ours", "cpu_over_ours", "roofline_fraction"):
            assert line[key] > 0, (line["case"], key)
        assert abs(line["excess_bytes"]) < 64 * 2**20
        assert 0 <= line["max_error"] < 0.1
        assert line["case"] in printed
    for line in ours:
        assert line["wall_over_ours"] == line["cpu_over_ours"] == 1
        assert (line["gradient_error"] is None) == (line["case"] in ("head-fp32-fwd", "gae"))
        assert (line["backward_over_dense"] is None) == (line["case"] != "head-bf16-active50")
    assert printed.count("implementation ") == 6
    assert "FAILED" not in printed


def test_a_second_run_appends(driven):
    lines = records(driven[0]["sweep"])
    assert [line["implementation"] for line in lines] == ["ours", "naive"] * 3
    assert [line["sweep"] for line in lines] == ["tokens"] * 4 + ["vocabulary"] * 2


def test_a_peer_that_is_not_installed_is_a_printed_line(driven):
    folders, printed = driven
    assert "trl: left out: ModuleNotFoundError" in printed
    assert {line["implementation"] for line in records(folders["missing"])} == {"ours", "naive"}


def test_a_wrong_result_of_ours_is_not_timed_and_fails_the_command(driven):
    folders, printed = driven
    assert json.loads(printed.splitlines()[-1]) == [0, 0, 0, 1]
    assert "FAILED logits-fp32-fwdbwd: ours: outputs: error" in printed
    for line in records(folders["wrong"]):
        assert not line["passed"]
        assert line["wall_s"] is line["cpu_s"] is line["excess_bytes"] is None
    assert {line["max_error"] < 1e-5 for line in records(folders["wrong"])} == {True, False}  # naive's, ours


def test_all_cases_have_their_names(monkeypatch):
    cases = module("cases", monkeypatch)
    names = [case.name for case in cases.every_case()]
    assert len(names) == len(set(names)) == 27
    for kind in ("logits", "head"):
        for dtype in ("fp32", "bf16"):
            for passes in ("fwd", "fwdbwd", "fwd-entropy", "fwdbwd-entropy"):
                assert f"{kind}-{dtype}-{passes}" in names
    assert [case.tokens for case in cases.sweep_cases()][:5] == [256, 512, 1024, 2048, 4096]
    assert [case.vocabulary for case in cases.sweep_cases()][-1] == 262144


def test_mandatory_work_is_counted_by_products_and_passes(monkeypatch):
    case_type = module("cases", monkeypatch).Case
    head = case_type("", "head", tokens=3, hidden=5, vocabulary=7)
    product = 2 * 3 * 5 * 7
    assert head.work == ("flops", 3 * product)
    assert replace(head, backward=False).work == ("flops", product)
    assert replace(head, frozen=True).work == ("flops", 2 * product)
    assert replace(head, active=0.5).work == ("flops", 2 * product)
    assert replace(head, kind="kl").work == ("flops", 4 * product)
    logits = replace(head, kind="logits", dtype="bfloat16")
    assert logits.work == ("bytes", 3 * 3 * 7 * 2)
    assert replace(logits, backward=False).work == ("bytes", 3 * 7 * 2)


def tiny(kind, monkeypatch, **options):
    options = {"dtype": "bfloat16", "tokens": 16, "hidden": 32, "vocabulary": 211} | options
    return module("cases", monkeypatch).Case(kind, kind, **options)


def test_only_active_tokens_have_an_upstream_gradient(monkeypatch):
    x = module("inputs", monkeypatch).make(tiny("head", monkeypatch, active=0.25))
    assert int((x.upstream[0] != 0).sum()) == 4
    assert (x.dense_upstream[0] != 0).all()
    assert torch.equal(x.upstream[0], torch.where(x.upstream[0] != 0, x.dense_upstream[0], 0))


def exact_in(x, name):
    return getattr(x, name).detach().double()


@pytest.mark.parametrize("kind", ["logits", "head", "grpo", "dpo", "kl"])
def test_the_judge_is_autograd_in_float64(kind, monkeypatch):
    # three tiles, and a seed at which either kind of rounding is the larger one somewhere
    case = tiny(kind, monkeypatch, entropy=kind in ("logits", "head"), vocabulary=9001, seed=1)
    inputs, exact, plain = (module(name, monkeypatch) for name in ("inputs", "exact", "plain"))
    x = inputs.make(case)
    truth = exact.judged(case, x)
    leaves = {name: exact_in(x, name).requires_grad_() for name in x.leaves()}
    z = leaves["logits"] if kind == "logits" else leaves["hidden"] @ leaves["weight"].t()
    z.retain_grad()
    log_p = torch.log_softmax(z, -1)
    chosen = log_p.gather(-1, x.ids[:, None])[:, 0]
    if kind == "kl":
        log_q = torch.log_softmax(exact_in(x, "ref_hidden") @ exact_in(x, "ref_weight").t(), -1)
        outputs = ((log_q.exp() * (log_q - log_p)).sum(-1),)
    elif kind == "grpo":
        outputs = (plain.grpo_loss(chosen.view(8, -1), x.old_logprobs.double().view(8, -1), x.advantages.double()),)
    elif kind == "dpo":
        outputs = (plain.dpo_loss(chosen.view(8, -1)),)
    else:
        outputs = (chosen, -(log_p.exp() * log_p).sum(-1))
    torch.autograd.backward(outputs, [upstream.double() for upstream in x.upstream])
    torch.testing.assert_close(truth.outputs, tuple(y.detach() for y in outputs), rtol=1e-10, atol=1e-12)
    rounded = z.grad.bfloat16().double()
    through = {"logits": rounded}
    if kind != "logits":
        through = {"hidden": rounded @ leaves["weight"].detach(), "weight": rounded.t() @ leaves["hidden"].detach()}
    for name, leaf in leaves.items():
        torch.testing.assert_close(truth.gradients[name], leaf.grad, rtol=1e-9, atol=1e-12)
        lost = max((through[name] - leaf.grad).norm(), (leaf.grad.bfloat16().double() - leaf.grad).norm())
        assert truth.floors[name] == pytest.approx(float(lost / leaf.grad.norm()), rel=1e-5)


def test_the_judge_of_gae_is_the_specification(monkeypatch):
    case = tiny("gae", monkeypatch, dtype="float32", tokens=16 * 5, backward=False)
    x = module("inputs", monkeypatch).make(case)
    exact = module("exact", monkeypatch)
    mask = torch.ones_like(x.values, dtype=torch.bool)
    advantages, _ = rlloss.gae(x.rewards.double(), x.values.double(), mask, exact.GAMMA, exact.GAE_LAMBDA)
    torch.testing.assert_close(exact.judged(case, x).outputs[0], advantages, rtol=1e-12, atol=1e-12)


def through_rounded_logits(right, hidden, weight, ids, outputs, **_):
    return rlloss.token_logprobs(hidden @ weight.t(), ids, outputs=outputs)


def with_a_flipped_gradient(right, hidden, weight, ids, **options):
    return right(2 * hidden.detach() - hidden, weight, ids, **options)


def with_a_gradient_too_large(right, hidden, weight, ids, **options):
    return right(hidden, weight.detach() + 1.01 * (weight - weight.detach()), ids, **options)


def without_a_gradient(right, hidden, weight, ids, **options):
    return right(hidden, weight.detach(), ids, **options)


def with_a_nan(right, *inputs, **options):
    stats = right(*inputs, **options)
    return stats._replace(logprobs=torch.where(torch.arange(16) == 3, torch.nan, stats.logprobs))


WRONG = [
    (through_rounded_logits, "bfloat16", "outputs"),
    *((with_a_flipped_gradient, dtype, "gradient of hidden") for dtype in ("float32", "bfloat16")),
    *((with_a_gradient_too_large, dtype, "gradient of weight") for dtype in ("float32", "bfloat16")),
    (without_a_gradient, "bfloat16", "gradient of weight"),
    (with_a_nan, "float32", "outputs"),
]


@pytest.mark.usefixtures("threads_put_back")
@pytest.mark.parametrize(("wrong", "dtype", "what"), WRONG)
def test_the_gate_stops_a_wrong_implementation(wrong, dtype, what, monkeypatch):
    jobs = module("jobs", monkeypatch)
    case = tiny("head", monkeypatch, dtype=dtype)
    assert jobs.timed(case, ("ours", "naive"), 1, 1)["failures"] == []
    right = rlloss.linear_logprobs
    monkeypatch.setattr(rlloss, "linear_logprobs", lambda *inputs, **options: wrong(right, *inputs, **options))
    record = jobs.timed(case, ("ours", "naive"), 1, 1)
    assert any(failure.startswith(f"ours: {what}: error") for failure in record["failures"])
    assert "wall_s" not in record["rows"]["ours"]
    json.dumps(jobs.finite(record), allow_nan=False)
    timed_all_the_same = jobs.timed(case, ("ours", "naive"), 1, 1, time_failures=True)
    assert timed_all_the_same["failures"] == record["failures"]
    assert timed_all_the_same["rows"]["ours"]["wall_s"] > 0


@pytest.mark.usefixtures("threads_put_back")
def test_a_peer_that_raises_is_left_out_and_ours_is_not(monkeypatch):
    jobs, peers = module("jobs", monkeypatch), module("peers", monkeypatch)

    def broken(*_, **__):
        raise RuntimeError("no such device\nand more")

    monkeypatch.setitem(peers.PEERS["head"], "trl", peers.Implementation(lambda case, x: broken))
    record = jobs.timed(tiny("head", monkeypatch), ("ours", "trl"), 1, 1)
    assert record["left_out"] == {"trl": "RuntimeError: no such device"}
    assert list(record["rows"]) == ["ours"]
    monkeypatch.setattr(rlloss, "linear_logprobs", broken)
    with pytest.raises(RuntimeError, match="no such device"):
        jobs.timed(tiny("head", monkeypatch), ("ours",), 1, 1)


@pytest.mark.usefixtures("threads_put_back")
@pytest.mark.parametrize(("factor", "what"), [(0.9, "outputs are off"), (1.0, "the gradient of hidden")])
def test_a_peer_that_computes_something_else_is_left_out(factor, what, monkeypatch):
    jobs, peers = module("jobs", monkeypatch), module("peers", monkeypatch)

    def other(case, x):
        hidden = 2 * x.hidden.detach() - x.hidden  # its gradient is flipped
        return lambda: (factor * rlloss.linear_logprobs(hidden, x.weight, x.ids).logprobs,)

    monkeypatch.setitem(peers.PEERS["head"], "trl", peers.Implementation(other))
    record = jobs.timed(tiny("head", monkeypatch), ("ours", "trl"), 1, 1)
    assert what in record["left_out"]["trl"]
    assert record["failures"] == []
    assert list(record["rows"]) == ["ours"]


def test_a_ratio_is_the_median_of_the_ratios_within_rounds(monkeypatch):
    measure = module("measure", monkeypatch)
    ours = [measure.Seconds(1.0, 0.0, 1.0), measure.Seconds(10.0, 0.0, 1.0), measure.Seconds(2.0, 0.0, 1.0)]
    peer = [measure.Seconds(2.0, 1.0, 2.0), measure.Seconds(10.0, 10.0, 2.0), measure.Seconds(1.0, 1.0, 2.0)]
    case = tiny("head", monkeypatch)
    medians = measure.summary(peer, ours, case, [case.work[1]] * 3)
    assert medians["wall_s"] == 3
    assert medians["wall_over_ours"] == 2  # of 3, 2 and 1; the ratio of the medians is 3/2
    assert medians["cpu_over_ours"] == 2
    assert medians["roofline_fraction"] == pytest.approx(1 / 3)


def test_rounds_rotate_and_a_slow_peer_runs_fewer(monkeypatch):
    measure, inputs = module("measure", monkeypatch), module("inputs", monkeypatch)
    order = []

    def called(name, rounds=None):
        return measure.Prepared(lambda: order.append(name) or (), inputs.Inputs(), (), rounds)

    times, rates = measure.interleaved({"a": called("a"), "b": called("b", 1), "c": called("c")}, 3, lambda: 7.0)
    assert "".join(order) == "abc" + "ca" + "ca"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 1, "c": 3}
    assert rates == [7.0] * 3


def test_neighbours_on_the_machine_are_seen_and_said(monkeypatch):
    measure, report = module("measure", monkeypatch), module("report", monkeypatch)
    clock, others = iter([100.0, 104.0]), iter([7.0, 9.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure.Neighbours, "_others", staticmethod(lambda: next(others)))
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    assert measure.Neighbours().share() == 0.25  # 2 of 4 x 2 seconds
    row = {"max_error": 0.0, "gradient_errors": {}}
    table = report.table(tiny("head", monkeypatch), {"rows": {"ours": row}, "neighbours": 0.25})
    assert "other processes took 25% of the cores" in table
    table = report.table(tiny("head", monkeypatch), {"rows": {"ours": row}, "neighbours": 0.01})
    assert "other processes" not in table


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_excess_memory_is_the_peak_beyond_what_must_stay(monkeypatch):
    measure = module("measure", monkeypatch)
    kept = []

    def call():
        kept.append(torch.ones(8 * 2**20))  # 32 MiB, such as a gradient
        torch.ones(16 * 2**20)  # 64 MiB, gone at once

    excess = measure.excess_bytes(call, mandatory=32 * 2**20)
    assert math.isclose(excess, 64 * 2**20, abs_tol=4 * 2**20)


def test_plots(quick_run, driven, tmp_path, monkeypatch, capsys):
    plot = module("plot", monkeypatch)
    files = [*quick_run[0].glob("*.jsonl"), *(p for folder in driven[0].values() for p in folder.glob("*.jsonl"))]
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, files), "--quick", "--folder", str(tmp_path)])
    plot.main()
    drawn = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in drawn] == ["against_tokens.png", "against_vocabulary.png", "ratios.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
    assert plot.latest(files, quick=False) == []  # a dry run is no result
    assert {r["case"] for r in plot.latest(files, quick=True)}.isdisjoint({"logits-fp32-fwdbwd"})  # it failed
    stopped = tmp_path / "stopped.jsonl"
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    stopped.write_text("".join(json.dumps(line | {"passed": False}) + "\n" for line in lines))
    assert plot.latest([stopped], quick=True) == []  # timed all the same, after the gate had stopped it
