"""Mutants of the Triton kernels of two models: their sums, the mixture, the gradient, and where they read and write."""

PAIR = [
    (
        "swap",
        "the drifts of the two models",
        "cls(reverse_kl, forward_kl, entropy, ref",
        "cls(forward_kl, reverse_kl, entropy, ref",
    ),
    ("default", "a reference's log-prob without a target", "logprobs or ref_logprobs, renyi)", "logprobs, renyi)"),
    (
        "coefficient",
        "the temperature squared",
        "else 1 / temperature.flatten()",
        "else 1 / temperature.flatten() ** 2",
    ),
    (
        "mask",
        "masked rows have a divergence",
        "value if loss_mask is None else torch.where(loss_mask.flatten(), value, 0)",
        "value",
    ),
    (
        "mask",
        "columns past the last are in the bridge",
        "tl.where(is_column, bridged(s, u, alpha), -INF)",
        "bridged(s, u, alpha)",
    ),
    (
        "coefficient",
        "the bridge's mass is not rescaled",
        "bridge_mass * tl.exp(bridge_shift - top) + tl",
        "bridge_mass + tl",
    ),
    (
        "swap",
        "the reference's sums are over the policy's logits",
        "_absorbed(u, d, is_column",
        "_absorbed(s, d, is_column",
    ),
    ("mask", "a target past the last column", "tl.where(is_target & is_column, z, 0.0)", "tl.where(is_target, z, 0.0)"),
    ("mask", "columns past the last count", "    z = tl.where(is_column, z, -INF)\n", ""),
    (
        "coefficient",
        "the moment keeps its old shift",
        "moment = (moment + mass * tl.maximum(moved, -FAR)) * growth + tl",
        "moment = moment * growth + tl",
    ),
    ("clip", "0 times a forbidden logit", "tl.sum(w * tl.maximum(below, -FAR), 1)", "tl.sum(w * below, 1)"),
    ("coefficient", "the drift is not rescaled", "drift = _rescaled(drift, growth) + tl", "drift = drift + tl"),
    ("clip", "0 times an infinite distance", "tl.where(w == 0.0, 0.0, w * d)", "w * d"),
    ("clip", "an infinite sum that becomes 0", "tl.where(growth == 0.0, 0.0, total * growth)", "total * growth"),
    (
        "coefficient",
        "parts of the bridge are not brought to one shift",
        "mass = a[11] * tl.exp(a[10] - shift) + b[11] * tl.exp(b[10] - shift)",
        "mass = a[11] + b[11]",
    ),
    (
        "coefficient",
        "the drift of the second part",
        "_rescaled(drift_a, growth_a) + _rescaled(drift_b, growth_b)",
        "_rescaled(drift_a, growth_a) + drift_b",
    ),
    (
        "coefficient",
        "the moment of the second part",
        "moment += (moment_b + mass_b * tl.maximum(moved_b, -FAR)) * growth_b",
        "moment += moment_b * growth_b",
    ),
    ("swap", "the target of the first part alone", "drift, moment, target_a + target_b", "drift, moment, target_a"),
    (
        "swap",
        "the bridge leads from the policy to the reference",
        "u + alpha * (s - u))",
        "s + alpha * (u - s))",
    ),
    (
        "clip",
        "a bridge of an order above 1 forgets what the reference forbids",
        "tl.where(alpha > 1.0, s + (alpha - 1.0) * (s - u), u + alpha * (s - u))",
        "u + alpha * (s - u)",
    ),
    ("clip", "the bridge to what neither allows", "return tl.where(b == b, b, -INF)", "return b"),
    ("swap", "the policy under the reference's normaliser", "s - lse[:, None], -INF", "s - ref_lse[:, None], -INF"),
    (
        "mask",
        "columns past the last are in the mixture",
        "_cut(tl.where(is_column, s - lse[:, None], -INF))",
        "_cut(s - lse[:, None])",
    ),
    ("coefficient", "the reference's distance is the policy's", "* (above - apart), 1)", "* above, 1)"),
    ("swap", "the shares of the mixture", "1.0 + beta * (tl", "1.0 + (1.0 - beta) * (tl"),
    (
        "clip",
        "the distance of a forbidden token",
        "tl.minimum(tl.maximum(log_p - log_q, -FAR_APART), FAR_APART)",
        "log_p - log_q",
    ),
    ("clip", "a NaN is a probability of 0", "tl.where(x < -FAR, -FAR, x)", "tl.where(x >= -FAR, x, -FAR)"),
    (
        "clip",
        "0 times an infinite bridge",
        "tl.where(renyi[:, None] == 0.0, 0.0, renyi[:, None] * r)",
        "renyi[:, None] * r",
    ),
    (
        "swap",
        "forward KL weighs by the policy",
        "forward_kl[:, None] * tl.exp2(log_q",
        "forward_kl[:, None] * tl.exp2(log_p",
    ),
    ("coefficient", "what all logits have in common", "tl.zeros_like(s) + constant[:, None]", "tl.zeros_like(s)"),
    ("swap", "the distance to the reference, not to the mixture", "        _, above =", "        above, _ ="),
    (
        "sign",
        "the slope of reverse KL",
        "reverse_kl[:, None] * (log_p - log_q)",
        "reverse_kl[:, None] * (log_q - log_p)",
    ),
    ("swap", "the entropy's slope is a cross entropy's", "entropy[:, None] * log_p", "entropy[:, None] * log_q"),
    ("mask", "every token is the target", "tl.where(is_target, logprobs[:, None], 0.0)", "logprobs[:, None]"),
    (
        "layout",
        "merged rows stay where they were",
        "            p = tl.load(positions + r, mask=is_row, other=0)\n",
        "            p = r\n",
    ),
    (
        "layout",
        "the first part is left out",
        "for group in range(groups):",
        "for group in range(1, groups):",
        {"times": 2},
    ),
]

PAIR_LOGITS = [
    ("layout", "the reference has the policy's strides", "*ref.strides,", "*own.strides,", {"times": 2}),
    ("mask", "masked rows with a gradient", "        used = used & loss_mask.flatten()\n", "        pass\n"),
    ("clip", "no id is refused", "(own < 0) | (own >= total)", "own < own"),
    ("swap", "ids are counted from 0 in every shard", "            own -= first\n", ""),
    ("swap", "ids are counted from 0 in every shard's gradient", "tl.load(ids + i) - first", "tl.load(ids + i)"),
    (
        "swap",
        "the normalisers of the two models",
        "mass, ref_mass = tl.load(lse + at), tl.load(ref_lse + at)",
        "ref_mass, mass = tl.load(lse + at), tl.load(ref_lse + at)",
    ),
    ("layout", "the last columns are left out", "if whole < columns:", "if whole < 0:", {"times": 2}),
    (
        "layout",
        "every chunk is the first",
        "start_of_chunk = (tl.program_id(0) % chunks) * CHUNK",
        "start_of_chunk = 0",
    ),
    (
        "mask",
        "columns past the last have a gradient",
        "tl.where(c < columns, dz, 0.0), mask=c < last",
        "dz, mask=c < last",
    ),
    (
        "swap",
        "a shard is taken for the whole",
        "        sums = merged_sums(gathered(sums, shard.group), number)\n",
        "        pass\n",
    ),
]

PAIR_HEADS = [
    ("layout", "every group ends at the last column", "tl.minimum(start + COLUMNS * TILES, columns)", "columns"),
    ("layout", "normalisers of other rows", "p = tl.load(positions + r, mask=is_row, other=0)", "p = r"),
    ("swap", "the reference's scale is the policy's", "columns, ref_bias, ref_scale,", "columns, ref_bias, scale,"),
    (
        "coefficient",
        "the reference is not cooled",
        "HAS_REF_BIAS, HAS_REF_SOFTCAP, HAS_TEMPERATURE,\n",
        "HAS_REF_BIAS, HAS_REF_SOFTCAP, False,\n",
    ),
    ("mask", "columns past the last count", "is_column = (c < columns)[None, :]", "is_column = (c >= 0)[None, :]"),
    ("layout", "only the last tile of the mixture", "ref_part += ref_more", "ref_part = ref_more"),
    (
        "swap",
        "a shard is taken for the whole",
        "        parts = gathered(merged_sums(parts, rows.number), shard.group)\n",
        "        pass\n",
    ),
]

PAIR_GRADIENT = [
    ("coefficient", "the slope of scale and softcap", "d = slope * pair_logit_gradient(", "d = pair_logit_gradient("),
    (
        "swap",
        "the slope is the reference's",
        "            s, slope = f",
        "            s, _ = f",
        {"also": (("u, _ = f", "u, slope = f"),)},
    ),
    ("layout", "the coefficients of other rows", "loaded(found + p,", "loaded(found + r,"),
    (
        "layout",
        "every block has the sums of the first",
        "(tl.zeros([], tl.int64) + block) * bias_stride",
        "bias_stride * 0",
    ),
    ("swap", "targets are counted from 0 in every range", "place = own - first", "place = own"),
    (
        "layout",
        "every range has the first one's logits",
        "block * ROWS, first + group * COLUMNS",
        "block * ROWS, group * COLUMNS",
    ),
    ("layout", "every range has the first one's biases", "c = first + inside", "c = inside"),
]

MUTANTS = [
    ("gpu.pair", "kernels/rlloss_kernels/gpu/pair.py", PAIR),
    ("gpu.pair_logits", "kernels/rlloss_kernels/gpu/pair_logits.py", PAIR_LOGITS),
    ("gpu.pair_heads", "kernels/rlloss_kernels/gpu/pair_heads.py", PAIR_HEADS),
    ("gpu.pair_gradient", "kernels/rlloss_kernels/gpu/pair_gradient.py", PAIR_GRADIENT),
]
