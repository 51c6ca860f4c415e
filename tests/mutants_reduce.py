"""Mutants of masks, shift, counts and reductions."""

ZERO = "return tuple(torch.where(loss_mask, x, 0) for x in tensors)"
WEIGHTED = "torch.where(weights == 0, 0, weights * values)"
SUMS = "    values = torch.where(loss_mask, values, 0)\n    if cu_seqlens is None:\n        return values.sum(-1)"
MEANS = "sequence_sum(values, loss_mask, cu_seqlens) / lengths.clamp(min=1)"
DIVIDED = "total / (_divisor(counts, unit) * (max_length or 1))"
ROWS = 'torch.where(mask, values, 0).sum() / _divisor(count(mask) if normalizer is None else normalizer, "sequences")'
BUCKETS = "torch.bucketize(positions, cu_seqlens[1:], right=True)"
OWN_OR_GIVEN = "counts = count(loss_mask, cu_seqlens) if normalizer is None else normalizer"
LAST = "return loss_mask & (loss_mask.cumsum(-1) == to_tokens(totals, loss_mask, cu_seqlens))"

REDUCE = [
    (
        "unit",
        "tokens and sequences are exchanged",
        'unit = "tokens" if reduction == "token_mean" else "sequences"',
        'unit = "sequences" if reduction == "token_mean" else "tokens"',
    ),
    ("unit", "rows are divided by tokens", ROWS, ROWS.replace('"sequences"', '"tokens"')),
    (
        "unit",
        "count exchanges its fields",
        "return Counts(lengths.sum(), (lengths > 0).sum())",
        "return Counts((lengths > 0).sum(), lengths.sum())",
    ),
    ("unit", "rows without a token are sequences", "(lengths > 0).sum())", "(lengths >= 0).sum())"),
    ("unit", "adding counts loses sequences", "self.sequences + other.sequences)", "self.sequences)"),
    ("unit", "adding counts loses tokens", "Counts(self.tokens + other.tokens,", "Counts(self.tokens,"),
    ("unit", "reduce_tokens ignores the normalizer", OWN_OR_GIVEN, "counts = count(loss_mask, cu_seqlens)"),
    (
        "unit",
        "reduce_sequences ignores the normalizer",
        ROWS,
        ROWS.replace("count(mask) if normalizer is None else normalizer", "count(mask)"),
    ),
    ("unit", "fixed_length forgets its constant", DIVIDED, "total / _divisor(counts, unit)"),
    (
        "unit",
        "every reduction is a sum of sums",
        'if reduction == "sequence_mean":\n        total = sequence_mean(',
        'if reduction == "sequence_mean":\n        total = sequence_sum(',
    ),
    (
        "unit",
        "a sequence's mean is over T",
        MEANS,
        "sequence_sum(values, loss_mask, cu_seqlens) / max(loss_mask.shape[-1], 1)",
    ),
    ("unit", "a sequence's mean is its sum", MEANS, "sequence_sum(values, loss_mask, cu_seqlens) + 0 * lengths"),
    ("unit", "nothing divides by 0: Counts", "getattr(normalizer, unit).clamp(min=1)", "getattr(normalizer, unit)"),
    ("unit", "nothing divides by 0: tensor", "return torch.where(normalizer == 0, 1, normalizer)", "return normalizer"),
    ("unit", "nothing divides by 0: number", "return normalizer or 1", "return normalizer"),
    ("unit", "nothing divides by 0: lengths", "/ lengths.clamp(min=1)", "/ lengths"),
    (
        "unit",
        "sum divides by tokens",
        "        return total\n    counts",
        "        return total / loss_mask.sum().clamp(min=1)\n    counts",
    ),
    ("mask", "a product, not where", ZERO, "return tuple(x * loss_mask for x in tensors)"),
    ("mask", "sums are not masked", SUMS, SUMS.removeprefix("    values = torch.where(loss_mask, values, 0)\n")),
    (
        "mask",
        "sums are masked by a product",
        SUMS,
        SUMS.replace("torch.where(loss_mask, values, 0)", "values * loss_mask"),
    ),
    ("mask", "rows are not masked", ROWS, ROWS.replace("torch.where(mask, values, 0)", "values")),
    (
        "mask",
        "a pack's tail counts",
        "return loss_mask & (_segments(loss_mask, cu_seqlens) < cu_seqlens.shape[0] - 1)",
        "return loss_mask",
    ),
    (
        "mask",
        "the weights of prompts are not masked",
        "torch.where(loss_mask, to_tokens(weights, loss_mask, cu_seqlens), 0)",
        "to_tokens(weights, loss_mask, cu_seqlens)",
    ),
    ("weight", "squared", WEIGHTED, WEIGHTED.replace("weights * values", "weights * weights * values")),
    ("weight", "by product only", WEIGHTED, "weights * values"),
    ("weight", "rejects and no more", WEIGHTED, "torch.where(weights == 0, 0, values)"),
    ("weight", "negative weights reject", WEIGHTED, WEIGHTED.replace("weights == 0", "weights <= 0")),
    ("weight", "prompts without a token vote", "prompts = (tokens > 0).sum()", "prompts = (tokens >= 0).sum()"),
    (
        "weight",
        "sequences, not prompts, are averaged",
        "weights = 1 / (tokens[group].clamp(min=1) * ",
        "weights = 1 / (lengths.clamp(min=1) * ",
    ),
    ("layout", "a boundary is off by one", BUCKETS, BUCKETS.replace("right=True", "right=False")),
    (
        "layout",
        "a pack's tail joins the last sequence",
        BUCKETS,
        BUCKETS + ".clamp(max=max(cu_seqlens.shape[0] - 2, 0))",
    ),
    ("layout", "shift crosses boundaries", "        mask[..., :-1] &= segment[1:] == segment[:-1]\n", "        pass\n"),
    (
        "layout",
        "shift to the other side",
        "torch.cat([input_ids[..., 1:], input_ids[..., -1:]], dim=-1)",
        "torch.cat([input_ids[..., :1], input_ids[..., :-1]], dim=-1)",
    ),
    (
        "layout",
        "shift moves ids and not the mask",
        "torch.cat([loss_mask[..., 1:], torch.zeros_like(loss_mask[..., -1:])], dim=-1)",
        "loss_mask.clone()",
    ),
    ("layout", "shift's last position trains", "torch.zeros_like(loss_mask[..., -1:])", "loss_mask[..., -1:]"),
    (
        "layout",
        "tokens get the next sequence's value",
        "torch.cat([per_sequence, per_sequence.new_zeros(1)])",
        "torch.cat([per_sequence[1:], per_sequence.new_zeros(2)])",
    ),
    ("layout", "the first token, not the last", LAST, LAST.replace("to_tokens(totals, loss_mask, cu_seqlens)", "1")),
    ("layout", "a pack's last tokens by their own length", "        totals = totals.cumsum(0)\n", "        pass\n"),
    ("layout", "masked positions behind it are last tokens too", LAST, LAST.replace("loss_mask & ", "")),
]

MUTANTS = [("reduce", "rlloss/reduce.py", REDUCE)]
