"""The cases: what is computed, at which shapes, and how much work no implementation can avoid."""

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

TOKEN_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GATE_TOKENS = 1024  # the float64 judge sees no more tokens than these
SWEEP = ("ours", "naive", "trl")


@dataclass(frozen=True)
class Case:
    """One row of the benchmark; every implementation of its kind runs on the same tensors."""

    name: str
    kind: str  # logits, head, grpo, dpo, kl, logits_kl or gae
    dtype: str = "float32"
    backward: bool = True
    entropy: bool = False
    frozen: bool = False  # the head's weight needs no gradient
    active: float = 1.0  # share of the tokens whose upstream gradient is not 0, or that `masked` leaves
    masked: bool = False  # the other tokens are outside of a loss mask
    mean: bool = False  # the upstream gradient is that of a mean over the tokens
    divergences: tuple[str, ...] = ("forward_kl",)  # of two models
    impl: str = "auto"  # what ours computes with
    cached: bool = False  # ours may keep all logits between forward and backward
    tokens: int = 1024
    hidden: int = 1024
    vocabulary: int = 151936
    scale: float = 1.5
    seed: int = 0
    sequences: int = 0  # that the tokens are cut into, for what works on sequences; its own default where 0
    packed: bool = False  # all sequences in one row
    sweep: str = ""  # the axis along which this case is one point
    only: tuple[str, ...] = ()  # the implementations that run; all of its kind where empty

    @property
    def rows(self) -> int:
        return self.sequences or (16 if self.kind == "gae" else 8)

    @property
    def is_pair(self) -> bool:
        return self.kind in ("kl", "logits_kl")

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.is_pair:
            return self.divergences
        return ("logprobs", "entropy") if self.entropy else ("logprobs",)

    @property
    def work(self) -> tuple[str, float]:
        """What no implementation can avoid: FLOPs of matrix products, or bytes read and written."""
        size = TOKEN_BYTES[self.dtype]
        if self.kind == "gae":  # rewards, values and mask in, advantages and returns out
            return "bytes", self.tokens * (4 * size + 1)
        if self.kind == "logits":  # read once; backward reads again and writes the gradient
            return "bytes", self.tokens * self.vocabulary * size * (3 if self.backward else 1)
        if self.kind == "logits_kl":
            return "bytes", self.tokens * self.vocabulary * size * (5 if self.backward else 2)
        products = (2.0 if self.kind == "kl" else 1.0) * (self.active if self.masked else 1.0)
        if self.backward:
            products += self.active * (1 if self.frozen else 2)
        return "flops", 2.0 * self.tokens * self.hidden * self.vocabulary * products

    @property
    def shape(self) -> str:
        if self.kind == "gae":
            return f"[{self.rows}, {self.tokens // self.rows}]"
        hidden = "" if self.kind in ("logits", "logits_kl") else f" H={self.hidden}"
        return f"N={self.tokens}{hidden} V={self.vocabulary}"

    def warm_up(self) -> "Case":
        """The same code at a size that costs nothing."""
        return replace(self, tokens=16 * self.rows, hidden=32, vocabulary=211)


def every_case() -> list[Case]:
    cases = []
    for kind, tokens in (("logits", 512), ("head", 1024)):
        for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            for passes in ("fwd", "fwdbwd"):
                for entropy in ("", "-entropy"):
                    options: dict[str, Any] = {"backward": passes == "fwdbwd", "entropy": bool(entropy)}
                    cases.append(Case(f"{kind}-{short}-{passes}{entropy}", kind, dtype, tokens=tokens, **options))
    return [
        *cases,
        Case("head-fp32-frozen", "head", frozen=True),
        Case("head-bf16-frozen", "head", "bfloat16", frozen=True),
        Case("head-bf16-active50", "head", "bfloat16", active=0.5),
        Case("head-bf16-active10", "head", "bfloat16", active=0.1),
        Case("head-fp32-cache", "head", cached=True),
        Case("head-bf16-cache", "head", "bfloat16", cached=True),
        Case("grpo-bf16", "grpo", "bfloat16"),
        Case("dpo-bf16", "dpo", "bfloat16"),
        Case("kl-fp32", "kl"),
        Case("kl-bf16", "kl", "bfloat16"),
        Case("gae", "gae", backward=False, tokens=16 * 8192),
    ]


def sweep_cases() -> list[Case]:
    """Forward and backward of a bf16 head, along the tokens and along the vocabulary."""
    tokens = [
        Case(f"sweep-tokens-{n}", "head", "bfloat16", tokens=n, sweep="tokens", only=SWEEP) for n in _doubled(256, 4096)
    ]
    return tokens + [
        Case(f"sweep-vocabulary-{v}", "head", "bfloat16", vocabulary=v, sweep="vocabulary", only=SWEEP)
        for v in _doubled(8192, 262144)
    ]


def selected(cases: list[Case], pattern: str) -> list[Case]:
    return [case for case in cases if any(fnmatch(case.name, part) for part in pattern.split(","))]


def quick(case: Case) -> Case:
    """Small enough for a dry run; the points of a sweep keep their proportions."""
    if case.sweep:
        return replace(case, tokens=case.tokens // 16, hidden=64, vocabulary=case.vocabulary // 64)
    return replace(case, tokens=1024 if case.kind == "gae" else 64, hidden=64, vocabulary=1999)


def _doubled(first: int, last: int) -> list[int]:
    points = [first]
    while points[-1] < last:
        points.append(2 * points[-1])
    return points
