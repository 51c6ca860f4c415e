"""Mutants of the paired preference losses beyond DPO, IPO and SimPO, of their kinds, and of what goes into them."""

SHARED = "rlloss/preference.py"
MARGINS = "rlloss/preference_margins.py"
INPUTS = "rlloss/preference_inputs.py"
REDUCE = "rlloss/reduce.py"


def own(loss):
    return f"rlloss/losses/{loss}.py"


MEAN = "return reduce_sequences(weighted(row_loss(*inputs), weights), mask, normalizer=normalizer)"
ANY_PAIRS = [
    ("unit", "a sum", MEAN, "return torch.where(mask, weighted(row_loss(*inputs), weights), 0).sum()"),
    ("weight", "none", "weighted(row_loss(*inputs), weights)", "row_loss(*inputs)"),
    ("stop", "weights", "zero_masked(mask, weights.detach())", "zero_masked(mask, weights)"),
]
DOOR = [("mask", "no door", "return tuple(torch.where(loss_mask, x, 0) for x in tensors)", "return tensors")]
DIFFERENCE = "pair_loss(chosen - rejected, beta)"
OF_MARGINS = [("swap", "chosen and rejected", DIFFERENCE, "pair_loss(rejected - chosen, beta)")]
BETA = "beta: float = 0.1,\n        reference_free: bool = False,\n        length_normalized"
BETA_OF_MARGINS = [("default", "beta is 0.2", BETA, BETA.replace("0.1", "0.2"))]
RATIOS = "return mask, chosen - ref_chosen, rejected - ref_rejected"
OF_RATIOS = [
    ("swap", "the references", RATIOS, "return mask, chosen - ref_rejected, rejected - ref_chosen"),
    ("default", "beta is 0.2", "beta: float = 0.1, reference_free", "beta: float = 0.2, reference_free"),
]

HINGE = [
    ("sign", "h", "(1 - beta * h)", "(1 + beta * h)"),
    ("coefficient", "beta is 1", "(1 - beta * h)", "(1 - h)"),
    ("coefficient", "a margin of 1 nat", "(1 - beta * h)", "beta * (1 - h)"),
    ("clip", "no hinge", "(1 - beta * h).relu()", "1 - beta * h"),
]
ROBUST = [
    ("sign", "the flipped term", "- flipped * logistic_loss", "+ flipped * logistic_loss"),
    ("sign", "h", "(1 - flipped) * logistic_loss(beta * h)", "(1 - flipped) * logistic_loss(-beta * h)"),
    ("coefficient", "not scaled back", ") / (1 - 2 * flipped)", ") / 1"),
    ("coefficient", "half of it", "(1 - 2 * flipped)", "(1 - flipped) / 1"),
    ("default", "label_smoothing is 0", "label_smoothing: float = 0.1", "label_smoothing: float = 0.0"),
    ("bound", "half the labels flipped", "label_smoothing < 0.5", "label_smoothing <= 0.5"),
]
EXO = [
    ("sign", "x", "x = beta * h", "x = -beta * h"),
    ("sign", "the lost side", "return wins + torch", "return wins - torch"),
    ("swap", "the labels", "math.log1p(-self.label_smoothing)", "math.log(self.label_smoothing)"),
    ("coefficient", "beta is 1", "x = beta * h", "x = h"),
    ("coefficient", "the forward KL's weight", "torch.sigmoid(-x) * (F", "torch.sigmoid(x) * (F"),
    ("default", "label_smoothing is 0.01", "float = 1e-3", "float = 1e-2"),
    ("bound", "no smoothing is taken", "0, 0.5, open_low=True", "0, 0.5"),
]
DISCOPOP = [
    ("sign", "x", "x = beta * h", "x = -beta * h"),
    ("swap", "logistic and exponential", "torch.sigmoid(-x / self.tau)", "torch.sigmoid(x / self.tau)"),
    ("coefficient", "beta is 1", "x = beta * h", "x = h"),
    ("coefficient", "tau does not divide", "torch.sigmoid(-x / self.tau)", "torch.sigmoid(-x * self.tau)"),
    ("coefficient", "the exponential is not modulated", "F.logsigmoid(x / self.tau) - x", "-x"),
    (
        "overflow",
        "g and exp(-x) apart",
        "torch.exp(F.logsigmoid(x / self.tau) - x)",
        "torch.sigmoid(x / self.tau) * torch.exp(-x)",
    ),
    ("default", "tau is 0.5", "tau: float = 0.05", "tau: float = 0.5"),
]
NCA = [
    (
        "sign",
        "the chosen among the data",
        "return logistic_loss(beta * chosen)",
        "return logistic_loss(-beta * chosen)",
    ),
    ("sign", "the rejected", "logistic_loss(-beta * rejected)", "logistic_loss(beta * rejected)"),
    (
        "swap",
        "chosen and rejected in the data",
        "return logistic_loss(beta * chosen)",
        "return logistic_loss(beta * rejected)",
    ),
    ("coefficient", "noise counts in full", "noise / 2", "noise"),
    ("coefficient", "the chosen is no noise", "logistic_loss(-beta * chosen) + ", ""),
]
SPPO = [
    ("sign", "the chosen's target", "(chosen - (chosen", "(chosen + (chosen"),
    ("sign", "the rejected's target", "(rejected - (rejected", "(rejected + (rejected"),
    ("swap", "the win rates", "chosen_win_rate: Tensor | float = 1.0", "chosen_win_rate: Tensor | float = 0.0"),
    ("coefficient", "targets of win rates, not of what they exceed", "(chosen_win_rate - 0.5)", "chosen_win_rate"),
    ("coefficient", "beta multiplies", "(rejected_win_rate - 0.5) / beta", "(rejected_win_rate - 0.5) * beta"),
    ("stop", "a win rate", "else chosen_win_rate.detach()", "else chosen_win_rate"),
    ("stop", "the other win rate", "else rejected_win_rate.detach()", "else rejected_win_rate"),
]
APO_ZERO = [
    ("sign", "the chosen", "torch.sigmoid(-beta * chosen)", "torch.sigmoid(beta * chosen)"),
    ("sign", "the rejected", "torch.sigmoid(beta * rejected)", "torch.sigmoid(-beta * rejected)"),
    ("coefficient", "the rejected counts twice", "+ torch.sigmoid(", "+ 2 * torch.sigmoid("),
    (
        "swap",
        "chosen and rejected",
        "-beta * chosen) + torch.sigmoid(beta * rejected",
        "-beta * rejected) + torch.sigmoid(beta * chosen",
    ),
]
APO_DOWN = [
    ("sign", "the chosen", "torch.sigmoid(beta * chosen)", "torch.sigmoid(-beta * chosen)"),
    ("sign", "the margin", "torch.sigmoid(-beta * (chosen", "torch.sigmoid(beta * (chosen"),
    ("coefficient", "the margin is the rejected's", "(chosen - rejected)", "-rejected"),
    ("swap", "the chosen is the rejected", "torch.sigmoid(beta * chosen)", "torch.sigmoid(beta * rejected)"),
]
BCO_PAIR = [
    ("sign", "the shift of the chosen", "beta * chosen - delta", "beta * chosen + delta"),
    ("sign", "the rejected", "logistic_loss(delta - beta * rejected)", "logistic_loss(beta * rejected - delta)"),
    ("swap", "chosen and rejected", "(beta * chosen - delta)", "(beta * rejected - delta)"),
    ("coefficient", "delta is the sum of both", "(chosen + rejected) / 2", "(chosen + rejected)"),
    ("coefficient", "delta is of the chosen", "(chosen + rejected) / 2", "chosen"),
    ("coefficient", "delta without beta", "return beta * (chosen", "return (chosen"),
]
STATISTIC = [
    (
        "weight",
        "rejected pairs are in the statistic",
        "reduce_sequences(values, counts)",
        "reduce_sequences(values, mask)",
    ),
    (
        "unit",
        "a part has a statistic of its own",
        "            if normalizer is not None:\n",
        "            if False:\n",
    ),
]
STATISTIC_STOPS = [("stop", "the statistic as given", "return given.detach().to(", "return given.to(")]
BETA_DPO = [
    (
        "sign",
        "M - M_0",
        "step_margin - self.running_margin.to(step_margin)",
        "self.running_margin.to(step_margin) - step_margin",
    ),
    (
        "swap",
        "M and M_0 in the update",
        "mul_(self.momentum).add_((1 - self.momentum)",
        "mul_(1 - self.momentum).add_(self.momentum",
    ),
    ("swap", "the margin", "return chosen - rejected", "return rejected - chosen"),
    ("coefficient", "no running margin", "step_margin - self.running_margin.to(step_margin)", "step_margin"),
    ("coefficient", "alpha is 1", "self.alpha * apart", "apart"),
    ("clip", "no least beta", ".clamp(min=self.min_beta)", ""),
    ("default", "alpha is 0.5", "alpha: float = 0.6", "alpha: float = 0.5"),
]
CAL_DPO = [
    ("sign", "the chosen's target", "(chosen - target)", "(chosen + target)"),
    ("sign", "the rejected's target", "(rejected + target)", "(rejected - target)"),
    ("swap", "chosen and rejected", "logistic_loss(chosen - rejected)", "logistic_loss(rejected - chosen)"),
    (
        "coefficient",
        "beta in the logistic term",
        "logistic_loss(chosen - rejected)",
        "logistic_loss(beta * (chosen - rejected))",
    ),
    ("coefficient", "a target of 1 / beta", "1 / (2 * beta)", "1 / beta"),
]
TDPO = [
    ("sign", "the drift", "- self.alpha * (rejected_kl", "+ self.alpha * (rejected_kl"),
    ("swap", "the drifts", "(rejected_kl - chosen_kl)", "(chosen_kl - rejected_kl)"),
    ("coefficient", "alpha is 1", "self.alpha * (rejected_kl", "(rejected_kl"),
    (
        "coefficient",
        "beta does not scale the drift",
        "beta * (chosen - rejected - self",
        "(beta * (chosen - rejected) - self",
    ),
    ("stop", "the chosen's drift", "chosen_kl.detach() if self.stop_chosen", "chosen_kl if self.stop_chosen"),
    ("default", "alpha is 1", "alpha: float = 0.5", "alpha: float = 1.0"),
    ("default", "stop_chosen", "stop_chosen: bool = True", "stop_chosen: bool = False"),
]
AOT = [
    ("sign", "the reference's rejected", "reference[0] - reference[1]", "reference[0] + reference[1]"),
    (
        "swap",
        "policy and reference",
        "return policy[0] - policy[1], reference[0] - reference[1]",
        "return reference[0] - reference[1], policy[0] - policy[1]",
    ),
    ("swap", "chosen and rejected", "return policy[0] - policy[1]", "return policy[1] - policy[0]"),
]
AOT_UNPAIRED = [
    ("sign", "the reference", "policy[0] - reference[0]", "policy[0] + reference[0]"),
    (
        "swap",
        "the samples",
        "return policy[0] - reference[0], policy[1] - reference[1]",
        "return policy[1] - reference[1], policy[0] - reference[0]",
    ),
    (
        "swap",
        "the references",
        "policy[0] - reference[0], policy[1] - reference[1]",
        "policy[0] - reference[1], policy[1] - reference[0]",
    ),
]
OF_RANKS = "loss = reduce_sequences(self.pair_loss(h, self.beta), ranks, normalizer=normalizer)"
RANKED = [
    ("mask", "masked rows are ranked", "torch.where(mask, x, torch.inf).sort().values", "x.sort().values"),
    ("unit", "a sum", OF_RANKS, "loss = torch.where(ranks, self.pair_loss(h, self.beta), 0).sum()"),
    ("unit", "ranks where the rows counted", "mask.sort(descending=True).values", "mask"),
    ("weight", "a weight is ignored", "            if given is not None:\n", "            if False:\n"),
    ("coefficient", "no sort", "torch.where(mask, x, torch.inf).sort().values", "x"),
    ("coefficient", "beta is 1", "self.pair_loss(h, self.beta), ranks", "self.pair_loss(h, 1.0), ranks"),
    ("swap", "above and below", "h = above - below", "h = below - above"),
    ("metric", "accuracy counts ties", "(h > 0).to", "(h >= 0).to"),
    ("metric", "margin without beta", "Moments.of(self.beta * h, ranks)", "Moments.of(h, ranks)"),
]
REFERENCE_STOPS = [
    ("stop", "ref_chosen_logps", "ref_chosen_logps.detach()", "ref_chosen_logps"),
    ("stop", "ref_rejected_logps", "ref_rejected_logps.detach()", "ref_rejected_logps"),
]
RANKED_DEFAULT = [
    (
        "default",
        "label_smoothing is 0.1",
        "beta: float = 0.1, label_smoothing: float = 0.0",
        "beta: float = 0.1, label_smoothing: float = 0.1",
    ),
]
CPO = [
    ("sign", "the likelihood", "- self.nll_coef * chosen", "+ self.nll_coef * chosen"),
    ("swap", "chosen and rejected", "beta * (chosen - rejected)", "beta * (rejected - chosen)"),
    ("swap", "the likelihood of the rejected", "- self.nll_coef * chosen", "- self.nll_coef * rejected"),
    ("coefficient", "beta is 1", "beta * (chosen - rejected)", "(chosen - rejected)"),
    ("coefficient", "nll_coef is 1", "self.nll_coef * chosen", "chosen"),
    ("coefficient", "no smoothing", "(chosen - rejected), self.label_smoothing)", "(chosen - rejected))"),
    ("default", "beta is 0.2", "beta: float = 0.1", "beta: float = 0.2"),
    ("default", "nll_coef is 0", "nll_coef: float = 1.0", "nll_coef: float = 0.0"),
]
TPO = [
    ("sign", "the likelihood", "- self.nll_coef * gold_logps", "+ self.nll_coef * gold_logps"),
    ("sign", "the target", "- self.margin, self", "+ self.margin, self"),
    ("swap", "chosen and rejected", "beta * (chosen - rejected)", "beta * (rejected - chosen)"),
    ("swap", "the likelihood of the chosen", "self.nll_coef * gold_logps", "self.nll_coef * chosen"),
    ("coefficient", "nll_coef is 1", "self.nll_coef * gold_logps", "gold_logps"),
    ("coefficient", "no target", " - self.margin, self", ", self"),
    ("default", "beta is 0.1", "beta: float = 0.01", "beta: float = 0.1"),
    ("bound", "a gold answer may be missing", "if gold_logps is None and self.nll_coef:", "if False:"),
]
ALPHA_PO = [
    ("sign", "the target", "beta * h - self.margin", "beta * h + self.margin"),
    ("sign", "alpha", "power_score(log_ratio, self.alpha)", "power_score(log_ratio, -self.alpha)"),
    ("coefficient", "alpha is 0", "power_score(log_ratio, self.alpha)", "log_ratio"),
    ("coefficient", "the target times beta", "(beta * h - self.margin,", "(beta * (h - self.margin),"),
    ("default", "alpha is 0.5", "alpha: float = 0.25", "alpha: float = 0.5"),
    ("metric", "no exponent is counted", "        return self.alpha\n", "        return 0.0\n"),
]
ODDS = "(chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))"
ORPO = [
    ("sign", "the likelihood", "- self.nll_coef * chosen", "+ self.nll_coef * chosen"),
    ("sign", "log(1 - p)", "(chosen - log1mexp(chosen))", "(chosen + log1mexp(chosen))"),
    ("swap", "chosen and rejected", ODDS, "(rejected - log1mexp(rejected)) - (chosen - log1mexp(chosen))"),
    ("coefficient", "probabilities, not odds", ODDS, "chosen - rejected"),
    (
        "coefficient",
        "beta within the sigmoid",
        "beta * logistic_loss(log_odds_ratio)",
        "logistic_loss(beta * log_odds_ratio)",
    ),
    ("coefficient", "nll_coef is 1", "self.nll_coef * chosen", "chosen"),
    ("default", "beta is 0.2", "beta: float = 0.1", "beta: float = 0.2"),
]

EXPONENT = "-torch.expm1((-alpha * log_ratio).clamp(max=MAX_EXPONENT)) / alpha"
SCORES = [
    ("sign", "the exponent", EXPONENT, EXPONENT.replace("(-alpha", "(alpha")),
    ("sign", "the score", EXPONENT, EXPONENT.removeprefix("-")),
    ("coefficient", "alpha does not divide", EXPONENT, EXPONENT.removesuffix(" / alpha")),
    ("overflow", "no bound", ".clamp(max=MAX_EXPONENT)) / alpha", ") / alpha"),
    ("coefficient", "the forward KL at 2", '"forward_kl": 1.0', '"forward_kl": 2.0'),
    ("coefficient", "not 0 at the reference", "math.log(2) + F.logsigmoid", "F.logsigmoid"),
    (
        "default",
        "alpha is 0.3",
        'divergence: Divergence = "reverse_kl", alpha: float = 0.5',
        'divergence: Divergence = "reverse_kl", alpha: float = 0.3',
    ),
]
LOG1MEXP = [
    ("overflow", "no bound at p = 1", "    x = x.clamp(max=-math.exp(-MAX_EXPONENT))\n", ""),
    (
        "overflow",
        "both forms see all",
        "near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))",
        "near, far = x, x",
    ),
    ("precision", "the near form everywhere", "x > -math.log(2), torch", "x > -math.inf, torch"),
    ("precision", "the far form everywhere", "x > -math.log(2), torch", "x > math.inf, torch"),
]
LENGTHS = [
    ("swap", "the longer length is shared", "torch.minimum(*lengths)", "torch.maximum(*lengths)"),
    ("clip", "one token more is shared", "beyond = number > to_tokens", "beyond = number > 1 + to_tokens"),
    ("coefficient", "alpha is 1", "torch.where(beyond, alpha,", "torch.where(beyond, 1.0,"),
    ("unit", "positions count what is masked", "number = mask.cumsum(-1)", "number = torch.ones_like(mask).cumsum(-1)"),
    ("unit", "a pack is one answer", "number = number - to_tokens(own.cumsum(0) - own, mask, cu_seqlens)", "pass"),
    ("mask", "what is rejected is multiplied", "weighted(logprobs, weights)", "weights * logprobs"),
]
WPO = [
    ("sign", "sum p^2", "logprobs.detach() - sum_p2", "logprobs.detach() + sum_p2"),
    ("stop", "logprobs", "aligned = logprobs.detach()", "aligned = logprobs"),
    ("stop", "sum_p2", "sum_p2.detach().log()", "sum_p2.log()"),
    ("unit", "a sum over tokens", "return sequence_mean(aligned", "return sequence_sum(aligned"),
]
STRENGTH = "strength = self.beta if beta is None else beta.detach()"
BETAS = [
    ("coefficient", "a pair's beta is ignored", STRENGTH, "strength = self.beta"),
    ("stop", "a pair's beta", STRENGTH, STRENGTH.removesuffix(".detach()")),
]
REFUSALS = [
    ("bound", "a divergence without a reference", "(reference_free or length_normalized):", "length_normalized:"),
    ("bound", "a divergence of means", "(reference_free or length_normalized):", "reference_free:"),
    ("default", "divergence_alpha is 0.3", "divergence_alpha: float = 0.5", "divergence_alpha: float = 0.3"),
    ("metric", "bounded scores are not counted", '"alpha": self.divergence_alpha}.get', '"alpha": 0.0}.get'),
    ("coefficient", "alpha is not passed on", "self.divergence, self.divergence_alpha)", "self.divergence)"),
]
BOUNDED = [
    ("metric", "high scores are counted", "(exponent > MAX_EXPONENT)", "(-exponent > MAX_EXPONENT)"),
    (
        "metric",
        "the chosen's scores alone",
        "torch.maximum(-self.score_exponent * chosen, -self.score_exponent * rejected)",
        "-self.score_exponent * chosen",
    ),
]
PRESETS = [
    (
        "default",
        "sigmoid_norm takes sums",
        '("dpo", {"length_normalized": True})',
        '("dpo", {"length_normalized": False})',
    ),
    ("swap", "a name's options win", "loss(**options | hyperparameters)", "loss(**hyperparameters | options)"),
]

OWN = {
    "hinge": HINGE,
    "robust": ROBUST,
    "exo": EXO,
    "discopop": DISCOPOP,
    "nca": NCA,
    "sppo": SPPO,
    "apo_zero": APO_ZERO,
    "apo_down": APO_DOWN,
    "bco_pair": BCO_PAIR,
    "beta_dpo": BETA_DPO,
    "cal_dpo": CAL_DPO,
    "tdpo": TDPO,
    "aot": AOT,
    "aot_unpaired": AOT_UNPAIRED,
    "cpo": CPO,
    "tpo": TPO,
    "alpha_po": ALPHA_PO,
    "orpo": ORPO,
}
RANKS = ("aot", "aot_unpaired")

MUTANTS = [
    *((loss, own(loss), rows) for loss, rows in OWN.items()),
    *((loss, SHARED, ANY_PAIRS) for loss in OWN if loss not in RANKS),
    *((loss, REDUCE, DOOR) for loss in OWN if loss not in RANKS),
    *((loss, SHARED, OF_MARGINS) for loss in ("hinge", "robust", "alpha_po")),
    *((loss, SHARED, OF_RATIOS) for loss in ("nca", "sppo", "apo_zero", "apo_down", "bco_pair", "cal_dpo")),
    *((loss, MARGINS, STATISTIC) for loss in ("bco_pair", "beta_dpo")),
    ("bco_pair", MARGINS, STATISTIC_STOPS),  # beta-DPO's goes into a beta, which is stopped as any
    *((loss, MARGINS, [*RANKED, *RANKED_DEFAULT]) for loss in RANKS),
    *((loss, SHARED, REFERENCE_STOPS) for loss in RANKS),
    ("hinge", MARGINS, BETA_OF_MARGINS),
    ("ipo", SHARED, BETAS),
    ("alpha_po", SHARED, BOUNDED),
    ("preference_margins", MARGINS, REFUSALS),
    ("preference_margins", "rlloss/registry.py", PRESETS),
    ("preference_inputs", INPUTS, [*SCORES, *LOG1MEXP, *LENGTHS, *WPO]),
]
