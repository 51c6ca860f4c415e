"""Mutants of the off-policy corrections and of the choice of tokens by entropy."""

FILE = "rlloss/correction.py"
WITHIN = "(ratio >= low) & (ratio <= high)"

CORRECTION = [
    ("sign", "the ratio is upside down", "_at_level(old - rollout, mask", "_at_level(rollout - old, mask"),
    ("sign", "the kept mass", "old = old - log_kept_mass", "old = old + log_kept_mass"),
    ("swap", "k3's direction", "kl_k3(rollout, old, max", "kl_k3(old, rollout, max"),
    ("mask", "a log-prob that is missing counts", "is_there = rollout.isfinite() & mask", "is_there = mask"),
    ("mask", "masked tokens have weights", "weights = torch.where(mask, weights, 0)", "weights = weights + 0"),
    ("mask", "masked entropies are ranked", "torch.where(mask, x, -torch.inf).flatten()", "x.flatten()"),
    ("clip", "no largest ratio", WITHIN, "ratio >= low"),
    ("clip", "no least ratio", WITHIN, "ratio <= high"),
    ("clip", "icepop truncates", 'kind in ("mis", "icepop") else', 'kind in ("mis",) else'),
    ("clip", "mis truncates", 'kind in ("mis", "icepop") else', 'kind in ("icepop",) else'),
    ("clip", "a filter weighs", "weights = is_within.to(ratio.dtype)", "weights = ratio"),
    ("clip", "tis rejects", 'keep = mask if kind == "tis" else', 'keep = mask if kind == "none" else'),
    ("bound", "the ratio has none", "bounded(log_ratio, max_log_ratio).exp()", "log_ratio.exp()"),
    ("unit", "geometric is a sum", 'sequence_mean if level == "geometric"', 'sequence_sum if level == "geometric"'),
    ("unit", "a segment's sum", "(sums / sizes.clamp(min=1))[run]", "sums[run]"),
    ("layout", "segments know no mask", "marks = [owner, mask.flatten()]", "marks = [owner]"),
    ("layout", "segments run through sequences", "marks = [owner, mask", "marks = [mask.flatten(), mask"),
    ("layout", "ids tell no segments apart", "[] if segment_ids is None else [segment_ids.flatten()]", "[]"),
    ("default", "tis holds at 3", '"tis": (0.0, 2.0)', '"tis": (0.0, 3.0)'),
    ("default", "icepop's lower bound is 0", '"icepop": (0.5, 5.0)', '"icepop": (0.0, 5.0)'),
    ("metric", "ess of the raw ratio", "EffectiveSampleSize.of(weights, mask)", "EffectiveSampleSize.of(ratio, mask)"),
    ("metric", "the ratio behind the bounds", '_ratio": Moments.of(ratio', '_ratio": Moments.of(weights'),
    ("coefficient", "one token more", ".ceil().long() - 1", ".ceil().long()"),
    ("coefficient", "7 of 100 are 8", "fraction - 1e-9).ceil()", "fraction).ceil()"),
    ("weight", "a product keeps one's weights", "self.weights * other.weights", "self.weights"),
    ("weight", "a product keeps what one rejects", "self.keep & other.keep", "self.keep"),
]
OUTPUT = [
    (
        "metric",
        "EffectiveSampleSize of masked weights",
        "weights = torch.where(mask, weights.detach(), 0)\n        return cls(weights.sum(), weights.square",
        "weights = weights.detach()\n        return cls(weights.sum(), weights.square",
    ),
    ("metric", "EffectiveSampleSize adds no squares", "self.squares + other.squares", "self.squares"),
]

MUTANTS = [("correction", FILE, CORRECTION), ("correction", "rlloss/output.py", OUTPUT)]
