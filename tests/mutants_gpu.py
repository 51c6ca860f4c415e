"""Mutants of the Triton kernels of one model: their sums, coefficients, rows, products and gradients."""

SOFTMAX = [
    ("clip", "a row without others is counted from its shift", "tl.where(shift == LOWEST, 0.0, shift)", "shift"),
    ("mask", "the target is among the others", "tl.where(is_target, -INF, z), -INF)", "z, -INF)"),
    (
        "mask",
        "columns past the last count",
        "tl.where(is_column, tl.where(is_target, -INF, z), -INF)",
        "tl.where(is_target, -INF, z)",
    ),
    (
        "mask",
        "columns past the last are in the total",
        "tl.where(is_column, z - base(top)[:, None], 0.0)",
        "z - base(top)[:, None]",
    ),
    ("coefficient", "the mass is not rescaled", "mass = mass * growth + tl.sum(w, 1)", "mass = mass + tl.sum(w, 1)"),
    (
        "coefficient",
        "the moment keeps its old shift",
        "moment = (moment + mass * tl.maximum(moved, -FAR)) * growth + tl",
        "moment = moment * growth + tl",
    ),
    ("clip", "0 times a forbidden logit", "tl.sum(w * tl.maximum(u, -FAR), 1)", "tl.sum(w * u, 1)"),
    ("coefficient", "squares grow as weights do", "square * growth * growth + tl", "square * growth + tl"),
    ("coefficient", "the total keeps its old shift", "total += before * (base(shift) - base(top)) + tl", "total += tl"),
    (
        "coefficient",
        "parts are not brought to one shift",
        "mass = mass_a * growth_a + mass_b * growth_b",
        "mass = mass_a + mass_b",
    ),
    (
        "coefficient",
        "the moment of the first part",
        "moment = (moment_a + mass_a * tl.maximum(moved_a, -FAR)) * growth_a",
        "moment = moment_a * growth_a",
    ),
    (
        "coefficient",
        "the moment of the second part",
        "moment += (moment_b + mass_b * tl.maximum(moved_b, -FAR)) * growth_b",
        "moment += moment_b * growth_b",
    ),
    ("coefficient", "squares of the second part", "square_b * growth_b * growth_b", "square_b * growth_b"),
    (
        "coefficient",
        "the total of the first part",
        "total = total_a + columns_a * (base(shift_a) - base(shift))",
        "total = total_a",
    ),
    (
        "coefficient",
        "the total of the second part",
        "total += total_b + columns_b * (base(shift_b) - base(shift))",
        "total += total_b",
    ),
    (
        "swap",
        "the target of the first part alone",
        "return shift, target_a + target_b, mass",
        "return shift, target_a, mass",
    ),
    (
        "sign",
        "how far the target is from the others",
        "x = (shift - target) + log_mass",
        "x = (target - shift) + log_mass",
    ),
    ("clip", "a target of +inf is certain", 'x = tl.where(target == INF, float("nan"), x)', "x = x"),
    (
        "clip",
        "an entropy where nothing is left",
        "spread = tl.where(alone, 0.0, log_mass - moment / mass)",
        "spread = log_mass - moment / mass",
    ),
    (
        "clip",
        "squares where nothing is left",
        "concentration = tl.where(alone, 0.0, square / (mass * mass))",
        "concentration = square / (mass * mass)",
    ),
    ("sign", "the log-prob", "concentration, -softplus(x), entropy", "concentration, softplus(x), entropy"),
    (
        "coefficient",
        "the mean over another number",
        "total / vocabulary - logaddexp",
        "total / (vocabulary + 1) - logaddexp",
    ),
    ("coefficient", "the entropy of the others", "sigmoid(x) * (softplus(-x) + spread)", "sigmoid(x) * softplus(-x)"),
    ("clip", "0 times an infinite distance", "    x = tl.minimum(tl.maximum(x, -FAR), FAR)\n", ""),
    ("coefficient", "squares of the others", "p * p + q * q * concentration", "p * p + q * concentration"),
    ("sign", "the others of a log-prob", "a = g_logsumexp - g_logp", "a = g_logsumexp + g_logp"),
    (
        "swap",
        "p and 1 - p at the target",
        "target = g_logp * q + g_logsumexp * p",
        "target = g_logp * p + g_logsumexp * q",
    ),
    ("coefficient", "the entropy's others", "a -= g_entropy * (entropy + log_k)", "a -= g_entropy * entropy"),
    (
        "sign",
        "the entropy's slope",
        "slope = -factor * k * g_entropy / LOG2_E",
        "slope = factor * k * g_entropy / LOG2_E",
    ),
    ("coefficient", "the entropy at the target", "p * (softplus(x) - entropy)", "p * softplus(x)"),
    (
        "coefficient",
        "the sum of squares' others",
        "a -= 2.0 * g_sum_p2 * sum_p2_of(x, concentration)",
        "a -= g_sum_p2 * sum_p2_of(x, concentration)",
    ),
    ("coefficient", "the sum of squares at the target", "p * q * (p - q * concentration)", "p * q * p"),
    ("coefficient", "squares of weights", "factor * 2.0 * g_sum_p2 * k * k", "factor * g_sum_p2 * k * k"),
    ("coefficient", "the mean's others", "        a -= g_mean\n", ""),
    ("coefficient", "the mean at the target", "g_mean * (1.0 / vocabulary - p)", "g_mean * (1.0 / vocabulary)"),
    ("clip", "a forbidden target learns", "target = tl.where(x == INF, 0.0, target)", "target = target"),
    (
        "clip",
        "the weight of nothing",
        "log_k = tl.where(alone, 0.0, -log_mass - softplus(-x))",
        "log_k = -log_mass - softplus(-x)",
    ),
    ("coefficient", "the temperature's factor", "return shift, factor * k * a, slope", "return shift, k * a, slope"),
    ("coefficient", "the temperature's factor at the target", "uniform, factor * target", "uniform, target"),
    ("clip", "a forbidden token learns", "tl.where(z == -INF, 0.0, dz + uniform[:, None])", "dz + uniform[:, None]"),
    ("mask", "the target is one of the others", "return tl.where(is_target, target[:, None], dz)", "return dz"),
]

ROWS = [
    (
        "mask",
        "masked rows count",
        "counts = counts & (tl.load(mask + i, mask=counts, other=0) != 0)",
        "counts = counts",
    ),
    ("mask", "rows without a gradient count", "            counts = counts & used\n", ""),
    (
        "layout",
        "the rows of a block begin one later",
        "r = found + tl.cumsum(one, 0) - 1",
        "r = found + tl.cumsum(one, 0)",
    ),
    (
        "layout",
        "every block begins at the first row",
        "        found += tl.sum(one)\n",
        "        found = tl.sum(one)\n",
    ),
    ("swap", "ids are counted from 0 in every shard", "own - first, mask=counts", "own, mask=counts"),
    ("clip", "no id is refused", "tl.where((own < 0) | (own >= vocabulary), 1, 0)", "tl.where(own < own, 1, 0)"),
    (
        "layout",
        "rows are gathered from where they are not",
        "    if HAS_PLACE:\n        at = tl.load(place + i)\n",
        "",
    ),
]

PRODUCTS = [
    (
        "mask",
        "rows past the last are read",
        "tl.minimum(column + tl.arange(0, HALF), columns - 1)",
        "(column + 1 + tl.arange(0, HALF))",
    ),
    ("swap", "both halves are the left one", "tl.dot(a, e.T, right", "tl.dot(a, b.T, right"),
    (
        "mask",
        "the end of a row is that of the next",
        "a = tl.load(h + r + along, mask=along < width, other=0.0)",
        "a = tl.load(h + r + along)",
    ),
    ("coefficient", "the bias is scaled no more", "    z *= scale\n    slope", "    slope"),
    ("coefficient", "the softcap's slope", "slope = (1.0 - t * t) * scale", "slope = scale"),
    ("swap", "the temperature multiplies", "z = z / heat[:, None]", "z = z * heat[:, None]"),
    ("layout", "a low panel is as tall as the others", "tl.minimum(blocks - panel * PANEL, PANEL)", "PANEL"),
]

GRADIENT = [
    ("coefficient", "the slope of scale and softcap", "d = slope * logit_gradient(", "d = logit_gradient("),
]

GRADIENT_PRODUCTS = [
    ("mask", "the target is among the products too", "tl.where(is_target, 0.0, d), mask=is_here", "d, mask=is_here"),
    ("coefficient", "the target's row is left out", "others + g * w, mask", "others, mask"),
    (
        "layout",
        "targets are not put back",
        "dz + r.to(tl.int64) * width + place, tl.load",
        "dz + r.to(tl.int64) * width + place, 0.0 * tl.load",
    ),
    ("mask", "rows past the last are in the bias", "tl.sum(tl.where(is_here, d, 0.0), 0)", "tl.sum(d, 0)"),
    ("mask", "another shard's target counts", "(k < width) & (own >= 0) & (own < columns)", "k < width"),
    (
        "layout",
        "rows of the weight past the vocabulary",
        "            self.d_weight[head.vocabulary :] = 0\n",
        "            pass\n",
    ),
    (
        "layout",
        "rows of the weight where nothing counts",
        "            self.d_weight[column : column + width] = 0\n",
        "            pass\n",
    ),
]

FROZEN = [
    ("clip", "a jump is left alone", "shift - old > _RISE", "shift - old > 1e9"),
    ("clip", "every block is made again", "new = tl.where(any_far != 0, shift, old)", "new = shift"),
    ("coefficient", "the sum keeps its old offset", "x * g, mask=k < width", "x, mask=k < width"),
    (
        "coefficient",
        "the mass keeps another offset",
        "tl.exp((shift - tl.load(offset + r)) + log_mass)",
        "tl.exp(log_mass)",
    ),
    ("sign", "the others", "of_target * w - of_others * others", "of_target * w + of_others * others"),
    ("coefficient", "the target's slope", "slope *= 1.0 - z * z", "slope *= 1.0"),
    ("clip", "a forbidden target learns", "q = tl.where(x == INF, 0.0, sigmoid(x))", "q = sigmoid(x)"),
    (
        "clip",
        "the mean of nothing",
        "tl.where((log_mass == -INF) | (shift == LOWEST), 0.0, q * scale / heat / mass)",
        "q * scale / heat / mass",
    ),
    (
        "sign",
        "the direction in logsumexp's gradient",
        "along, of_target = g_logp - g_logsumexp, 0.0",
        "along, of_target = g_logp + g_logsumexp, 0.0",
    ),
    (
        "mask",
        "masked rows get a gradient",
        "tl.where(counts, g_logp, 0.0), tl.where(counts, g_logsumexp, 0.0)",
        "g_logp, g_logsumexp",
    ),
]

MUTANTS = [
    ("gpu.softmax", "kernels/rlloss_kernels/gpu/softmax.py", SOFTMAX),
    ("gpu.rows", "kernels/rlloss_kernels/gpu/rows.py", ROWS),
    ("gpu.products", "kernels/rlloss_kernels/gpu/products.py", PRODUCTS),
    ("gpu.gradient", "kernels/rlloss_kernels/gpu/gradient.py", GRADIENT),
    ("gpu.gradient_products", "kernels/rlloss_kernels/gpu/gradient_products.py", GRADIENT_PRODUCTS),
    ("gpu.frozen", "kernels/rlloss_kernels/gpu/frozen.py", FROZEN),
]
