"""What a process of its own does: the gate and the rounds of one case, or one call's memory."""

import gc
import json
import math
import multiprocessing
import statistics
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import exact
import torch
from cases import GATE_TOKENS, Case
from gate import Verdict, something_else, verdict
from implementations import Implementation, UnavailableError
from inputs import make
from measure import Neighbours, Prepared, Seconds, excess_bytes, interleaved, prepared, roofline, summary
from peers import implementations

Record = dict[str, Any]


def in_a_process(job: Callable[..., Record], *arguments: Any) -> Record:
    """The job's record, or {"error": ...}. The process is a fork of this one, which imports and computes nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, job, *arguments))
    process.start()
    sender.close()
    try:
        record = json.loads(receiver.recv_bytes())
    except EOFError:
        record = {}
    process.join()
    return record or {"error": f"the process died with exit code {process.exitcode}"}


def _send(sender: Connection, job: Callable[..., Record], *arguments: Any) -> None:
    gc.freeze()  # no collection looks through what was imported
    try:
        record = job(*arguments)
    except Exception:
        record = {"error": traceback.format_exc()}
    sender.send_bytes(json.dumps(finite(record), allow_nan=False).encode())


def timed(case: Case, names: tuple[str, ...], rounds: int, threads: int, time_failures: bool = False) -> Record:
    """The gate, then the rounds: {"rows": by implementation, "left_out": reasons by name, "failures", "skipped"}."""
    torch.set_num_threads(threads)
    record: Record = {"rows": {}, "left_out": {}, "failures": [], "skipped": None}
    gate_case = replace(case, tokens=min(case.tokens, GATE_TOKENS))
    calls = bound_calls(gate_case, implementations(case, names), record["left_out"])
    if "ours" not in calls:
        record["skipped"] = record["left_out"].pop("ours", "ours is not among the implementations")
        return record
    verdicts = judge(gate_case, calls, record)
    if record["failures"] and not time_failures:
        return record
    calls = {name: calls[name] for name in verdicts}
    if gate_case != case:  # of this size the gate has warmed up nothing
        calls = bound_calls(case, implementations(case, tuple(calls)), record["left_out"])
        calls = {name: calls[name] for name in survivors(calls, Prepared.seconds, record["left_out"])}
    probe, neighbours = roofline(case), Neighbours()
    times, rates = interleaved(calls, rounds, probe)
    record["neighbours"], record["roofline_rate"] = neighbours.share(), statistics.median(rates)
    record["rows"] = {name: record["rows"][name] | row for name, row in summaries(case, times, rates).items()}
    return record


def summaries(case: Case, times: dict[str, list[Seconds]], rates: list[float]) -> dict[str, Record]:
    """What the rounds come to, by implementation."""
    rows: dict[str, Record] = {name: summary(times[name], times["ours"], case, rates) for name in times}
    if "ours-dense" in times:
        pairs = zip(times["ours"], times["ours-dense"], strict=True)
        rows["ours"]["backward_over_dense"] = statistics.median(o.backward / d.backward for o, d in pairs)
    return rows


def bound_calls(
    case: Case, every: dict[str, Implementation], left_out: dict[str, str], device: str = "cpu"
) -> dict[str, Prepared]:
    """The implementations that can be bound to the case's tensors, which they share."""
    inputs = make(case, device)
    return survivors(every, lambda one: prepared(one, case, inputs), left_out)


def judge(case: Case, calls: dict[str, Prepared], record: Record) -> dict[str, Verdict]:
    """The verdicts on ours, and on the peers that compute the case; they are entered in "rows" and "failures"."""
    left_out, truth = record["left_out"], exact.judged(case, calls["ours"].inputs)
    verdicts = survivors(calls, lambda call: verdict(case, call, truth), left_out)
    different = {name: something_else(case, one) for name, one in verdicts.items() if not _is_ours(name)}
    left_out |= {name: reason for name, reason in different.items() if reason}
    verdicts = {name: one for name, one in verdicts.items() if not different.get(name)}
    record["rows"] = {name: _accuracy(one) for name, one in verdicts.items()}
    record["failures"] = [f"{name}: {f}" for name, one in verdicts.items() if _is_ours(name) for f in one.failures]
    return verdicts


def survivors(things: dict[str, Any], step: Callable[[Any], Any], left_out: dict[str, str]) -> dict[str, Any]:
    """The results of a step by name. A peer that goes wrong is left out; ours raises."""
    results = {}
    for name, thing in things.items():
        try:
            results[name] = step(thing)
        except Exception as error:
            if _is_ours(name) and not isinstance(error, UnavailableError):
                raise
            left_out[name] = _reason(error)
    return results


def _is_ours(name: str) -> bool:
    return name.startswith("ours")


def _accuracy(one: Verdict) -> Record:
    """What the gate found; `gradient_error` is that of the leaf which is furthest off."""
    errors = one.gradient_errors
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]), default=None)
    return {
        "max_error": one.max_error,
        "gradient_error": None if worst is None else errors[worst],
        "gradient_floor": None if worst is None else one.gradient_floors[worst],
        "gradient_errors": errors,
        "gradient_floors": one.gradient_floors,
    }


def peak(case: Case, name: str, threads: int) -> Record:
    """{"excess_bytes", "mandatory_bytes"} of the first call at full size, after a small one that loads the code."""
    torch.set_num_threads(threads)
    implementation = implementations(case, (name,))[name]
    small = case if implementation.compiles else case.warm_up()  # what is compiled, is compiled for one size
    _bound(small, name).run()
    call = _bound(case, name)
    mandatory = call.mandatory_bytes
    return {"excess_bytes": excess_bytes(call.run, mandatory), "mandatory_bytes": mandatory}


def _bound(case: Case, name: str) -> Prepared:
    return prepared(implementations(case, (name,))[name], case, make(case))


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, UnavailableError) else f"{type(error).__name__}: {first}"


def finite(x: Any) -> Any:
    """JSON has no NaN: what is none is null."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
