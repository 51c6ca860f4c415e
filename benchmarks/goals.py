"""What the kernels set out to reach on a GPU, and what a run measured of it.

Times are goals for N = 8192, H = 4096, V = 128256 on a GPU that multiplies bfloat16 matrices at 790 TFLOP/s: they are
scaled to the shape of the run and to what its own `torch.mm` reached between the rounds. Shares are of that rate, or
of the rate of a copy, in the same rounds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cases import TOKEN_BYTES, Case

Record = dict[str, Any]
ASSUMED_FLOPS, ASSUMED_SIZE = 790e12, 8192 * 4096 * 128256


@dataclass
class Results:
    """What a run has found: by case its record of the gate and of the clock, and the checks with their names."""

    cases: dict[str, Case]
    gates: dict[str, Record] = field(default_factory=dict)
    timings: dict[str, Record] = field(default_factory=dict)
    checks: dict[str, list[bool]] = field(default_factory=dict)

    def row(self, case: str, implementation: str = "ours") -> Record:
        """Empty where there is none, or ours was wrong."""
        record = self.timings.get(case, {})
        return {} if record.get("failures") else record.get("rows", {}).get(implementation, {})


class Goal(NamedTuple):
    """One line of the table; `measured` is None where the run did not come to it."""

    what: str
    measured: float | None
    bound: float
    unit: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound


def goals(results: Results) -> list[Goal]:
    return [*_of_logits(results), *_of_heads(results), *_of_two_models(results), *_of_peers(results), *_exact(results)]


def table(found: Iterable[Goal]) -> str:
    lines = []
    for goal in found:
        said = {None: "not measured", True: "met", False: "NOT MET"}[goal.met]
        sign = ">=" if goal.at_least else "<="
        bound = f"{sign} {_number(goal.bound)} {goal.unit}".rstrip()
        measured = "-" if goal.measured is None else f"{_number(goal.measured)} {goal.unit}".rstrip()
        lines.append(f"  {goal.what:<58}{measured:>14}   {bound:<14} {said}")
    return "\n".join(lines)


def _of_logits(r: Results) -> list[Goal]:
    def share(case: str, which: str, passes: int) -> float | None:
        return _share(r, case, which, passes * _logit_bytes(r, case))

    return [
        _least("logits, forward: share of a copy's rate", share("logits-fwd-entropy", "forward_wall_s", 1), 0.95),
        _least("logits, backward: share", share("logits-fwdbwd-entropy", "backward_wall_s", 2), 0.92),
        _least("logits of two models, forward: share", share("logits-kl-fwd", "forward_wall_s", 2), 0.92),
        _least("logits, forward: naive's time over ours", _times(r, "logits-fwd-entropy", "naive"), 12, "x"),
        _least("logits, forward: TRL's time over ours", _times(r, "logits-fwd-entropy", "trl"), 1.1, "x"),
    ]


def _of_heads(r: Results) -> list[Goal]:
    def share(case: str, which: str, products: int) -> float | None:
        return _share(r, case, which, products * _product(r, case))

    both, frozen = "head-fwdbwd-entropy", "head-frozen"
    few = r.row("head-active10").get("backward_over_dense")
    masked, whole = r.row("head-masked10").get("wall_s"), r.row("head-fwdbwd").get("wall_s")
    return [
        _least("head, forward: share of torch.mm", share("head-fwd-entropy", "forward_wall_s", 1), 0.80),
        _least("head of half the width, forward: share", share("head-half-fwd-entropy", "forward_wall_s", 1), 0.70),
        _least("head of a quarter, forward: share", share("head-quarter-fwd-entropy", "forward_wall_s", 1), 0.55),
        _least("head, backward: share, counting 6 N V H", share(both, "backward_wall_s", 3), 0.85),
        Goal("head, forward and backward", _ms(r.row(both).get("wall_s")), _scaled(r, both, 52), "ms"),
        Goal("frozen head, forward and backward", _ms(r.row(frozen).get("wall_s")), _scaled(r, frozen, 27), "ms"),
        Goal("a tenth of the rows active: share of the dense backward", few, 0.13),
        Goal("a tenth inside the mask: share of all rows' time", masked / whole if masked and whole else None, 0.13),
        Goal("head, forward: excess memory", _mb(r.row("head-fwd-entropy").get("excess_bytes")), 32, "MB"),
        Goal("head, forward and backward: excess memory", _mb(r.row(both).get("excess_bytes")), 450, "MB"),
    ]


def _of_two_models(r: Results) -> list[Goal]:
    found = [
        _least(
            "two models, forward: share of torch.mm",
            _share(r, "kl-both-fwd", "forward_wall_s", 2 * _product(r, "kl-both-fwd")),
            0.75,
        )
    ]
    for name in ("kl-reverse", "kl-forward"):
        share = _share(r, name, "wall_s", 6 * _product(r, name))
        found.append(_least(f"{name}, both passes: share, 6 products", share, 0.75))
        found.append(Goal(f"{name}, both passes", _ms(r.row(name).get("wall_s")), _scaled(r, name, 87), "ms"))
        found.append(_least(f"{name}: Liger's fused_linear_jsd over ours", _times(r, name, "liger-jsd"), 2, "x"))
    return found


def _of_peers(r: Results) -> list[Goal]:
    grpo, head = r.row("grpo").get("wall_s"), r.row("head-fwdbwd").get("wall_s")
    beside = None if grpo is None or head is None else 1e3 * (grpo - head)
    return [
        _least("GRPO: Liger's chunked over ours", _times(r, "grpo", "liger", "liger-compiled"), 2.7, "x"),
        Goal("GRPO: time beside the head's", beside, 0.1, "ms"),
        _least("head: TRL's chunked over ours", _times(r, "head-fwdbwd", "trl"), 2.5, "x"),
        _least("head: Liger's FLCE over ours", _times(r, "head-mean", "liger-flce"), 3, "x"),
    ]


def _exact(r: Results) -> list[Goal]:
    """Outputs that are not finite have the largest of errors."""
    rows = [gate["rows"]["ours"] for gate in r.gates.values() if "ours" in gate.get("rows", {})]
    errors = [float("inf") if row["max_error"] is None else row["max_error"] for row in rows]
    wrong = sum(bool(gate.get("failures") or gate.get("error")) for gate in r.gates.values())
    found = [
        Goal("largest error of any output", max(errors, default=None), 1e-5, "nats"),
        Goal("cases that the gate stopped", wrong if r.gates else None, 0),
    ]
    for what, passed in r.checks.items():
        found.append(Goal(f"{what}: cases of {len(passed)} that fail", passed.count(False), 0))
    return found


def _least(what: str, measured: float | None, bound: float, unit: str = "") -> Goal:
    return Goal(what, measured, bound, unit, at_least=True)


def _share(r: Results, case: str, which: str, work: float) -> float | None:
    seconds, rate = r.row(case).get(which), r.timings.get(case, {}).get("roofline_rate")
    return work / seconds / rate if seconds and rate else None


def _times(r: Results, case: str, *peers: str) -> float | None:
    """The time of the fastest of the peers over ours."""
    found = [r.row(case, peer)["wall_over_ours"] for peer in peers if r.row(case, peer)]
    return min(found, default=None)


def _scaled(r: Results, case: str, ms: float) -> float:
    rate = r.timings.get(case, {}).get("roofline_rate") or ASSUMED_FLOPS
    shape = r.cases.get(case)
    size = ASSUMED_SIZE if shape is None else shape.tokens * shape.hidden * shape.vocabulary
    return ms * size / ASSUMED_SIZE * ASSUMED_FLOPS / rate


def _product(r: Results, case: str) -> float:
    """FLOPs of one product of the hidden states and the head."""
    shape = r.cases.get(case)
    return 0.0 if shape is None else 2.0 * shape.tokens * shape.hidden * shape.vocabulary


def _logit_bytes(r: Results, case: str) -> float:
    shape = r.cases.get(case)
    return 0.0 if shape is None else float(shape.tokens * shape.vocabulary * TOKEN_BYTES[shape.dtype])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _mb(size: float | None) -> float | None:
    return None if size is None else size / 1e6


def _number(x: float) -> str:
    return f"{x:.1e}" if 0 < abs(x) < 1e-3 else f"{x:.4g}"
