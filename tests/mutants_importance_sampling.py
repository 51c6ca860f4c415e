"""Mutants of truncated importance sampling: of the body of both its losses, and of what all policy losses share."""

import runpy
from pathlib import Path

POLICY = runpy.run_path(str(Path(__file__).with_name("mutants_policy.py")))

LOSSES = ["importance_sampling", "tis"]
SURROGATES = "rlloss/policy_surrogates.py"
WEIGHT = "batch.ratio.detach().clamp(ratio_min, ratio_max)"
CLIPPED = "(batch.ratio < ratio_min) | (batch.ratio > ratio_max)"
TERM = "return -weights.detach() * batch.advantages * batch.logprobs, metrics"
HELD = "batch.old_logprobs.clamp(now - high, now - low)"
LEVEL = "        self.ratio_level = ratio_level  # pyright: ignore[reportAttributeAccessIssue]\n"
# behind it the class's own constructor, which no other body of the file has
CONSTRUCTOR = '\n\n    def __init__(\n        self, *, ratio_level: Literal["sequence", "token"], ratio_min'
SEQUENCE_SUM = POLICY["SEQUENCE_SUM"] + CONSTRUCTOR

SHARED = [
    *POLICY["WEIGHTED_BODY"],
    ("coefficient", "no weight", TERM, TERM.replace("-weights.detach() * batch", "-batch")),
    ("swap", "ratio_min and ratio_max", "= ratio_min, ratio_max\n", "= ratio_max, ratio_min\n"),
    ("stop", "the weight", TERM, TERM.replace(".detach()", ""), {"also": ((WEIGHT, WEIGHT.replace(".detach()", "")),)}),
    ("clip", "none", WEIGHT, "batch.ratio.detach()"),
    ("clip", "no largest weight", WEIGHT, WEIGHT.replace(", ratio_max", "")),
    ("clip", "rows beyond it are rejected", WEIGHT, f"(~({CLIPPED})) * {WEIGHT}"),
    ("clip", "ratio_level is lost", LEVEL, '        self.ratio_level = "sequence"\n'),
    ("clip", "the geometric mean", LEVEL, LEVEL + '        self.ratio_level = "geometric"\n'),
    ("clip", "the KL's ratio is not held", HELD, "batch.old_logprobs"),
    ("clip", "the KL's ratio is held below alone", HELD, "batch.old_logprobs.clamp(max=now - low)"),
    ("stop", "the log-prob in the KL's bound", "now = batch.logprobs.detach()", "now = batch.logprobs"),
    ("unit", "a mean over tokens", SEQUENCE_SUM, POLICY["TOKEN_MEAN"] + CONSTRUCTOR),
    ("unit", "means over a sequence's tokens, not sums", SEQUENCE_SUM, POLICY["SEQUENCE_MEAN"] + CONSTRUCTOR),
    ("unit", "sums over everything", SEQUENCE_SUM, 'reduction = "sum"' + CONSTRUCTOR),
    ("metric", "clip_frac without what is above", CLIPPED, "batch.ratio < ratio_min"),
]
OWN = {
    "importance_sampling": [
        ("default", "ratio_level is token", '"token"] = "sequence"', '"token"] = "token"'),
        ("default", "ratio_min is 0.1", "ratio_min: float = 0.0", "ratio_min: float = 0.1"),
        ("default", "ratio_max is 5", "ratio_max: float = 10.0", "ratio_max: float = 5.0"),
    ],
    "tis": [
        ("default", "ratio_level is token", '"token"] = "sequence"', '"token"] = "token"'),
        ("default", "ratio_min is 0.1", "ratio_min=0.0", "ratio_min=0.1"),
        ("default", "ratio_max is 2", "ratio_max: float = 1.0", "ratio_max: float = 2.0"),
    ],
}
# only one of both has a lower bound
BOTH_SIDES = [
    ("clip", "no least weight", WEIGHT, WEIGHT.replace("ratio_min", "0")),
    ("clip", "the KL's ratio is held above alone", HELD, "batch.old_logprobs.clamp(now - high)"),
    ("metric", "clip_frac without what is below", CLIPPED, "batch.ratio > ratio_max"),
    ("metric", "clip_frac counts the bounds themselves", CLIPPED, CLIPPED.replace(" < ", " <= ")),
]

MUTANTS = [
    *((loss, f"rlloss/losses/{loss}.py", rows) for loss, rows in OWN.items()),
    *((loss, SURROGATES, SHARED) for loss in LOSSES),
    ("importance_sampling", SURROGATES, BOTH_SIDES),
    *((loss, POLICY["SURROGATE"], POLICY["RATIO"]) for loss in LOSSES),
    *((loss, "rlloss/divergence.py", POLICY["REFERENCE"]) for loss in LOSSES),
    *((loss, "rlloss/reduce.py", POLICY["DOOR"]) for loss in LOSSES),
    *((loss, POLICY["SHARED"], POLICY["BODY"]) for loss in LOSSES),
]
