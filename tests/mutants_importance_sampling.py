"""Mutants of truncated importance sampling: what it has of its own, and what it shares with all policy losses."""

import runpy
from pathlib import Path

POLICY = runpy.run_path(str(Path(__file__).with_name("mutants_policy.py")))

NAME = "importance_sampling"
FILE = f"rlloss/losses/{NAME}.py"
WEIGHT = "batch.ratio.detach().clamp(self.ratio_min, self.ratio_max)"
CLIPPED = "(batch.ratio < self.ratio_min) | (batch.ratio > self.ratio_max)"
TERM = "return -weight * batch.advantages * batch.logprobs, metrics"
HELD = "batch.old_logprobs.clamp(now - high, now - low)"
LEVEL = "        self.ratio_level = ratio_level  # pyright: ignore[reportAttributeAccessIssue]\n"
SEQUENCE_SUM = POLICY["SEQUENCE_SUM"]

OWN = [
    ("sign", "the surrogate", TERM, TERM.replace("-weight", "weight")),
    ("coefficient", "twice", TERM, TERM.replace("-weight", "-2 * weight")),
    ("coefficient", "no weight", TERM, TERM.replace("-weight * batch", "-batch")),
    ("swap", "ratio_min and ratio_max", "= ratio_min, ratio_max\n", "= ratio_max, ratio_min\n"),
    ("stop", "the weight", WEIGHT, WEIGHT.replace(".detach()", "")),
    ("stop", "the log-prob, so that a clipped row has no gradient", "* batch.logprobs,", "* batch.logprobs.detach(),"),
    ("clip", "none", WEIGHT, "batch.ratio.detach()"),
    ("clip", "no largest weight", WEIGHT, WEIGHT.replace(", self.ratio_max", "")),
    ("clip", "no least weight", WEIGHT, WEIGHT.replace("self.ratio_min", "0")),
    ("clip", "rows beyond it are rejected", WEIGHT, f"(~({CLIPPED})) * {WEIGHT}"),
    ("clip", "the ratio in place of the log-prob", "* batch.logprobs,", "* batch.ratio,"),
    ("clip", "ratio_level is lost", LEVEL, '        self.ratio_level = "sequence"\n'),
    ("clip", "the geometric mean", LEVEL, LEVEL + '        self.ratio_level = "geometric"\n'),
    ("clip", "the KL's ratio is not held", HELD, "batch.old_logprobs"),
    ("clip", "the KL's ratio is held below alone", HELD, "batch.old_logprobs.clamp(max=now - low)"),
    ("clip", "the KL's ratio is held above alone", HELD, "batch.old_logprobs.clamp(now - high)"),
    ("stop", "the log-prob in the KL's bound", "now = batch.logprobs.detach()", "now = batch.logprobs"),
    ("unit", "a mean over tokens", SEQUENCE_SUM, POLICY["TOKEN_MEAN"]),
    ("unit", "means over a sequence's tokens, not sums", SEQUENCE_SUM, POLICY["SEQUENCE_MEAN"]),
    ("unit", "sums over everything", SEQUENCE_SUM, 'reduction = "sum"'),
    ("default", "ratio_level is token", '"token"] = "sequence"', '"token"] = "token"'),
    ("default", "ratio_min is 0.1", "ratio_min: float = 0.0", "ratio_min: float = 0.1"),
    ("default", "ratio_max is 5", "ratio_max: float = 10.0", "ratio_max: float = 5.0"),
    ("metric", "clip_frac without what is above", CLIPPED, "batch.ratio < self.ratio_min"),
    ("metric", "clip_frac without what is below", CLIPPED, "batch.ratio > self.ratio_max"),
    ("metric", "clip_frac counts the bounds themselves", CLIPPED, CLIPPED.replace(" < ", " <= ")),
]

MUTANTS = [
    (NAME, FILE, OWN),
    (NAME, POLICY["SURROGATE"], POLICY["RATIO"]),
    (NAME, "rlloss/divergence.py", POLICY["REFERENCE"]),
    (NAME, "rlloss/reduce.py", POLICY["DOOR"]),
    (NAME, POLICY["SHARED"], POLICY["BODY"]),
]
