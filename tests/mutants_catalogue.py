"""Mutants of what all policy losses share, judged by the tests of each loss that has a table of its own beside it."""

import runpy
from pathlib import Path

POLICY = runpy.run_path(str(Path(__file__).with_name("mutants_policy.py")))

WEIGHTED = ["a2c", "cispo", "gpg", "topr", "vespo"]
LOSSES = [
    *WEIGHTED,
    "a_star_po",
    "clip_cov",
    "cpgd",
    "decoupled_ppo",
    "dppo",
    "dro",
    "gmpo",
    "gspo_token",
    "kimi",
    "kl_cov",
    "luspo",
    "m2po",
    "opsm",
    "sapo",
]

MEANS = {"token_mean": "sequence_mean", "sequence_mean": "token_mean", "sequence_sum": "sequence_mean"}
REDUCTIONS = {
    "a_star_po": "sequence_mean",
    "cispo": "token_mean",
    "clip_cov": "token_mean",
    "cpgd": "token_mean",
    "decoupled_ppo": "token_mean",
    "dppo": "sequence_sum",
    "gmpo": "sequence_mean",
    "kl_cov": "token_mean",
    "m2po": "token_mean",
    "sapo": "sequence_mean",
}
SQUARE = 'reduction = "{}"\n    ratio_level = "sequence"\n    anchor'


def unit(reduction, text='reduction = "{}"'):
    other = MEANS[reduction]
    return [("unit", f"the reduction is {other}", text.format(reduction), text.format(other))]


MUTANTS = [
    *((loss, f"rlloss/losses/{loss}.py", unit(reduction)) for loss, reduction in REDUCTIONS.items()),
    *((loss, "rlloss/policy_surrogates.py", unit("sequence_sum", SQUARE)) for loss in ("dro", "kimi")),
    *((loss, "rlloss/policy_surrogates.py", POLICY["WEIGHTED_BODY"]) for loss in WEIGHTED),
    *((loss, POLICY["SURROGATE"], POLICY["RATIO"]) for loss in LOSSES),
    *((loss, "rlloss/divergence.py", POLICY["REFERENCE"]) for loss in LOSSES),
    *((loss, "rlloss/reduce.py", POLICY["DOOR"]) for loss in LOSSES),
    *((loss, POLICY["SHARED"], POLICY["BODY"]) for loss in LOSSES),
]
