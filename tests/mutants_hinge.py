"""Mutants of conservative PPO's hinge."""

FILE = "rlloss/losses/conservative_ppo.py"
SQUARE = "        value = self.conservative_coef * violation.square()\n"
BATCH_SQUARE = SQUARE + "        # the value"
ROW_SQUARE = SQUARE + "        rows ="
SLOPE = "2 * self.conservative_coef * violation * (kl_part - kl_part.detach())"
TOKENS = "tokens = sequence_lengths(batch.loss_mask, batch.cu_seqlens).sum()"
OWN, GIVEN = "kl = kl_part.detach()", "kl.detach().to(kl_part)"

HINGE = [
    ("sign", "the hinge", "return LossOutput(loss + penalty", "return LossOutput(loss - penalty"),
    ("sign", "the batch's side of the hinge", "(kl - self.max_kl).clamp(min=0)", "(self.max_kl - kl).clamp(min=0)"),
    (
        "sign",
        "each sequence's side of the hinge",
        "- self.max_kl).clamp(min=0)\n" + ROW_SQUARE,
        "- self.max_kl).clamp(max=0)\n" + ROW_SQUARE,
    ),
    ("clip", "the batch's KL below max_kl costs", "(kl - self.max_kl).clamp(min=0)", "kl - self.max_kl"),
    ("sign", "the hinge's gradient", "share * value + 2 *", "share * value - 2 *"),
    ("coefficient", "the hinge's gradient without 2", SLOPE, SLOPE.removeprefix("2 * ")),
    (
        "coefficient",
        "the hinge's gradient without conservative_coef",
        SLOPE,
        SLOPE.replace("self.conservative_coef *", ""),
    ),
    ("coefficient", "the hinge's gradient without violation", SLOPE, SLOPE.replace("violation * ", "")),
    ("coefficient", "the batch's hinge is linear", BATCH_SQUARE, BATCH_SQUARE.replace(".square()", "")),
    (
        "coefficient",
        "the batch's hinge without conservative_coef",
        BATCH_SQUARE,
        BATCH_SQUARE.replace("self.conservative_coef * ", ""),
    ),
    ("coefficient", "each sequence's hinge is linear", ROW_SQUARE, ROW_SQUARE.replace(".square()", "")),
    (
        "coefficient",
        "each sequence's hinge without conservative_coef",
        ROW_SQUARE,
        ROW_SQUARE.replace("self.conservative_coef * ", ""),
    ),
    ("unit", "every part pays the whole hinge", "penalty = share * value", "penalty = value"),
    (
        "unit",
        "the batch's KL is a mean of means",
        'values, batch.loss_mask, "token_mean", normalizer',
        'values, batch.loss_mask, "sequence_mean", normalizer',
    ),
    (
        "unit",
        "the statistic is a mean of means",
        '(self.ref_kl(batch), batch.loss_mask, "token_mean", cu',
        '(self.ref_kl(batch), batch.loss_mask, "sequence_mean", cu',
    ),
    (
        "unit",
        "a sequence's KL is a sum",
        "(sequence_mean(self.ref_kl(batch)",
        "(sequence_sum(self.ref_kl(batch)",
        {"also": (("    sequence_mean,\n", "    sequence_mean,\n    sequence_sum,\n"),)},
    ),
    (
        "unit",
        "sequences' hinges are summed",
        "penalty = reduce_sequences(value, rows, normalizer=normalizer)",
        "penalty = value.sum()",
    ),
    ("unit", "the metrics of the hinge count rows", TOKENS, TOKENS.replace(".sum()", ".gt(0).sum()")),
    ("stop", "the given statistic", GIVEN, GIVEN.replace(".detach()", "")),
    ("stop", "the hinge's own KL", OWN, OWN.removesuffix(".detach()"), {"reason": "the next line detaches it again"}),
    (
        "stop",
        "the hinge's own KL, and the statistic",
        OWN,
        OWN.removesuffix(".detach()"),
        {"also": ((GIVEN, GIVEN.replace(".detach()", "")),)},
    ),
    ("stop", "the difference that carries the gradient", "(kl_part - kl_part.detach())", "(kl_part - kl_part)"),
    ("stop", "the statistics", "with torch.no_grad():", "with torch.enable_grad():"),
    (
        "mask",
        "rows without a token are rows",
        "sequence_lengths(mask, cu_seqlens) > 0",
        "sequence_lengths(mask, cu_seqlens) >= 0",
    ),
    (
        "weight",
        "the hinge is weighted",
        "kl_part = part(self.ref_kl(batch))",
        "kl_part = part(weighted(self.ref_kl(batch), batch.token_weights))",
        {"also": (("    sequence_mean,\n", "    sequence_mean,\n    weighted,\n"),)},
    ),
    ("default", "conservative_coef is 1", "conservative_coef: float = 0.1", "conservative_coef: float = 1.0"),
    ("default", "max_kl is 0.1", "max_kl: float = 0.01", "max_kl: float = 0.1"),
    ("default", "level is sequence", '"sequence"] = "batch"', '"sequence"] = "sequence"'),
    ("metric", "kl_violation is the penalty", "Mean.constant(violation, tokens)", "Mean.constant(value, tokens)"),
    ("metric", "kl_violation of sequences is the penalty", "Mean.of(violation, rows)", "Mean.of(value, rows)"),
    ("metric", "max_kl is 0", "new_full((), self.max_kl)", "new_full((), 0.0)"),
]

MUTANTS = [("conservative_ppo", FILE, HINGE)]
