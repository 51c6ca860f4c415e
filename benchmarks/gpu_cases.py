"""The cases of gpu.py, the most important first, and the shapes at which a 32-bit index would overflow."""

from dataclasses import replace
from typing import Any, NamedTuple

from cases import Case

SWEEP = ("ours", "naive", "trl", "liger")
LIBRARIES = ("ours", "naive", "trl", "liger", "liger-flce")
BOTH = ("forward_kl", "reverse_kl")


class Shape(NamedTuple):
    """What most cases have; the others have a part of it."""

    tokens: int = 8192
    hidden: int = 4096
    vocabulary: int = 128256
    scale: float = 1.5
    seed: int = 0


# of so few numbers the errors scatter, with a CPU's own roundings up to what the gate allows: not so of this seed's
QUICK = Shape(tokens=16, hidden=128, vocabulary=131, seed=1)


def every_case(shape: Shape, quick: bool = False) -> list[Case]:
    """In the order in which they are judged and timed."""
    own: dict[str, Any] = {"dtype": "bfloat16", "impl": "triton", **shape._asdict()}

    def head(name: str, **options: Any) -> Case:
        return Case(f"head-{name}", "head", **{**own, "only": LIBRARIES, **options})

    def logits(name: str, **options: Any) -> Case:
        return Case(f"logits-{name}", "logits", **{**own, "only": ("ours", "naive", "trl"), **options})

    forward, entropy = {"backward": False}, {"entropy": True}
    # a CPU rounds every bfloat16 product, more than the gate allows to a gradient between two models
    heads: Any = own | {"dtype": "float32"} if quick else own
    few = {"tokens": max(shape.tokens // 8, 1), "only": ("ours", "naive", "trl")}
    ours: Any = {"only": ("ours", "ours-dense", "trl")}
    sequences, length = (4, 16) if quick else (64, 8192)
    gae: Any = {"dtype": "float32", "backward": False, "sequences": sequences, "tokens": sequences * length}
    return [
        head("fwdbwd-entropy", **entropy),
        head("fwdbwd"),
        head("fwd-entropy", **forward, **entropy),
        logits("fwdbwd-entropy", **entropy),
        logits("fwd-entropy", **forward, **entropy),
        head("frozen", frozen=True),
        head("active10", active=0.1, **ours),
        head("mean", mean=True, only=("ours", "liger-flce")),
        Case("kl-reverse", "kl", divergences=("reverse_kl",), **heads),
        Case("grpo", "grpo", sequences=8, **own),
        head("fwd", **forward),
        head("half-fwd-entropy", hidden=shape.hidden // 2, **forward, **entropy),
        head("quarter-fwd-entropy", hidden=shape.hidden // 4, **forward, **entropy),
        Case("kl-forward", "kl", divergences=("forward_kl",), **heads),
        Case("kl-both-fwd", "kl", divergences=BOTH, **forward, **heads),
        logits("fwd", **forward),
        Case("logits-kl-fwd", "logits_kl", divergences=BOTH, **forward, **own),
        head("active50", active=0.5, **ours),
        head("masked10", active=0.1, masked=True, only=("ours",)),
        head("masked50", active=0.5, masked=True, only=("ours",)),
        Case("gae", "gae", impl="triton", **gae),
        Case("gae-packed", "gae", impl="triton", packed=True, **gae),
        head("half-fwdbwd", hidden=shape.hidden // 2),
        head("quarter-fwdbwd", hidden=shape.hidden // 4),
        head("fp32-fwdbwd-entropy", **{**few, **entropy, "dtype": "float32"}),
        head("fp16-fwdbwd-entropy", **{**few, **entropy, "dtype": "float16"}),
        *sweep_cases(shape),
        logits("fwdbwd-entropy-compiled", **{**entropy, "only": ("ours", "compiled")}),
        logits("fwd-entropy-compiled", **{**entropy, **forward, "only": ("ours", "compiled")}),
    ]


def sweep_cases(shape: Shape) -> list[Case]:
    """Forward and backward of a head, at four numbers of tokens and four sizes of the vocabulary."""

    def head(sweep: str, tokens: int, vocabulary: int) -> Case:
        own: Any = {**shape._asdict(), "tokens": tokens, "vocabulary": vocabulary, "sweep": sweep, "only": SWEEP}
        return Case(f"sweep-{sweep}-{own[sweep]}", "head", "bfloat16", impl="triton", **own)

    tokens = [head("tokens", shape.tokens * factor // 4, shape.vocabulary) for factor in (1, 2, 4, 8)]
    sizes = [head("vocabulary", shape.tokens // 2, shape.vocabulary * factor // 4) for factor in (1, 2, 4, 8)]
    return tokens + sizes


def checked_cases(cases: list[Case]) -> list[Case]:
    """One of each kind of kernel, to be run twice over and row by row."""
    named = {case.name: case for case in cases}
    wanted = (
        *("head-fwdbwd-entropy", "head-frozen", "logits-fwdbwd-entropy", "kl-reverse", "head-active10"),
        *("head-fp32-fwdbwd-entropy", "head-fp16-fwdbwd-entropy", "logits-kl-fwd"),
    )
    return [named[name] for name in wanted if name in named]


def overflow_cases(quick: bool) -> list[Case]:
    """More than 2^31 logits, as many rows as have nowhere been tried, and a vocabulary that is as large."""
    own: Any = {"dtype": "bfloat16", "impl": "triton"}
    rows: Any = {"tokens": 262144, "hidden": 256, "vocabulary": 16384, **own}
    large = [
        Case("overflow-logits", "logits", entropy=True, tokens=8704, vocabulary=262144, **own),
        Case("overflow-rows", "head", entropy=True, **rows),
        Case("overflow-vocabulary", "head", entropy=True, tokens=1024, hidden=1024, vocabulary=262144, **own),
        Case("overflow-frozen", "head", frozen=True, **rows),
    ]
    return [replace(case, tokens=24, hidden=32, vocabulary=301) for case in large] if quick else large
