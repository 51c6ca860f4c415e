"""Mutants of the losses over rows and pairs: DPO, IPO, SimPO, KTO and Bradley-Terry."""

SHARED = "rlloss/preference.py"
REDUCE = "rlloss/reduce.py"
LOSSES = ["dpo", "ipo", "simpo", "kto", "bradley_terry"]


def own(loss):
    return f"rlloss/losses/{loss}.py"


MEAN = "reduce_sequences(weighted(row_loss(*inputs), weights), mask, normalizer=normalizer)"
ANY_ROWS = [
    ("unit", "a sum", "return " + MEAN, "return torch.where(mask, weighted(row_loss(*inputs), weights), 0).sum()"),
    (
        "unit",
        "a mean over all rows, the masked ones too",
        "return " + MEAN,
        "return torch.where(mask, weighted(row_loss(*inputs), weights), 0).sum() / max(len(mask), 1)",
    ),
    ("unit", "the normalizer is ignored", MEAN, MEAN.replace("normalizer=normalizer", "normalizer=None")),
    ("weight", "none", "weighted(row_loss(*inputs), weights)", "row_loss(*inputs)"),
    (
        "weight",
        "a rejected row leaves the denominator",
        "        inputs = zero_masked(weights != 0, *inputs)\n",
        "        inputs = zero_masked(weights != 0, *inputs)\n        mask = mask & (weights != 0)\n",
    ),
    ("stop", "weights", "zero_masked(mask, weights.detach())", "zero_masked(mask, weights)"),
]
OTHER_DOOR = "the door of what is trained stops the gradient; the mean and the metrics mask the values"
DOOR = [("mask", "no door", "return tuple(torch.where(loss_mask, x, 0) for x in tensors)", "return tensors")]

PAIRS = [
    ("swap", "chosen and rejected", "margin = chosen - rejected", "margin = rejected - chosen"),
    ("sign", "the rejected", "margin = chosen - rejected", "margin = chosen + rejected"),
]
REFERENCES = "chosen, rejected = chosen - ref_chosen, rejected - ref_rejected"
REFERENCED = [
    (
        "swap",
        "the references of chosen and rejected",
        REFERENCES,
        "chosen, rejected = chosen - ref_rejected, rejected - ref_chosen",
    ),
    (
        "swap",
        "policy and reference",
        REFERENCES,
        "chosen, rejected = ref_chosen - chosen, ref_rejected - rejected",
    ),
    ("sign", "the chosen's reference", REFERENCES, "chosen, rejected = chosen + ref_chosen, rejected - ref_rejected"),
    ("sign", "the rejected's reference", REFERENCES, "chosen, rejected = chosen - ref_chosen, rejected + ref_rejected"),
    ("coefficient", "no reference", "            " + REFERENCES + "\n", ""),
    ("stop", "ref_chosen_logps", "ref_chosen_logps.detach()", "ref_chosen_logps"),
    ("stop", "ref_rejected_logps", "ref_rejected_logps.detach()", "ref_rejected_logps"),
    ("default", "reference_free", "beta=beta, reference_free=reference_free)", "beta=beta, reference_free=False)"),
]
LOGISTIC = [
    (
        "sign",
        "the logistic loss",
        "-(1 - label_smoothing) * F.logsigmoid(logits)",
        "-(1 - label_smoothing) * F.logsigmoid(-logits)",
    ),
    ("sign", "the loss without smoothing", "return -F.logsigmoid(logits)", "return F.logsigmoid(logits)"),
    ("swap", "the sides without smoothing", "return -F.logsigmoid(logits)", "return -F.logsigmoid(-logits)"),
    ("sign", "the smoothing", "- label_smoothing * F.", "+ label_smoothing * F."),
    ("coefficient", "the smoothing takes nothing off the other term", "-(1 - label_smoothing) * F", "-1 * F"),
    ("coefficient", "the smoothed term's slope", "F.logsigmoid(-logits)", "F.logsigmoid(-2 * logits)"),
]
UNSMOOTHED = [
    ("coefficient", "label_smoothing is 0", "self.label_smoothing)", "0.0)"),
    ("default", "label_smoothing is 0.1", "label_smoothing: float = 0.0", "label_smoothing: float = 0.1"),
]

DPO = [
    ("sign", "h", "self.beta * h,", "-self.beta * h,"),
    ("coefficient", "beta is 1", "self.beta * h,", "h,"),
    ("coefficient", "beta divides", "self.beta * h,", "h / self.beta,"),
    ("default", "beta is 0.2", "beta: float = 0.1", "beta: float = 0.2"),
    *UNSMOOTHED,
]
SQUARE = "return (h - 1 / (2 * self.beta)).square()"
IPO = [
    ("sign", "the target", SQUARE, SQUARE.replace("h -", "h +")),
    ("sign", "h", SQUARE, SQUARE.replace("(h", "(-h")),
    ("sign", "the loss", SQUARE, SQUARE.replace("return ", "return -")),
    ("coefficient", "the target without 1/2", SQUARE, SQUARE.replace("(2 * self.beta)", "self.beta")),
    ("coefficient", "the target is 2 beta", SQUARE, SQUARE.replace("1 / (2 * self.beta)", "2 * self.beta")),
    ("coefficient", "no square", SQUARE, SQUARE.replace(".square()", ".abs()")),
    ("coefficient", "half the square", SQUARE, SQUARE + " / 2"),
    ("default", "beta is 0.2", "beta: float = 0.1", "beta: float = 0.2"),
    ("default", "length_normalized", "length_normalized: bool = False", "length_normalized: bool = True"),
]
SIMPO = [
    ("sign", "h", "self.beta * h -", "-self.beta * h -"),
    ("sign", "the target", "self.beta * h - self.margin", "self.beta * h + self.margin"),
    ("coefficient", "beta is 1", "self.beta * h -", "h -"),
    ("coefficient", "no target", "self.beta * h - self.margin", "self.beta * h"),
    ("coefficient", "the target times beta", "self.beta * h - self.margin", "self.beta * (h - self.margin)"),
    (
        "swap",
        "chosen and rejected, at the door",
        "            chosen_mean_logps, rejected_mean_logps, mask=mask",
        "            rejected_mean_logps, chosen_mean_logps, mask=mask",
    ),
    ("weight", "none is passed on", "weights=weights, normalizer", "weights=None, normalizer"),
    ("mask", "none is passed on", "mask=mask, weights", "mask=None, weights"),
    ("unit", "the normalizer is not passed on", "normalizer=normalizer\n", "normalizer=None\n"),
    ("unit", "takes sums, not means", "length_normalized = True", "length_normalized = False"),
    ("default", "beta is 2.5", "beta: float = 2.0", "beta: float = 2.5"),
    ("default", "margin is 1", "margin: float = 0.5", "margin: float = 1.0"),
    *UNSMOOTHED,
]

SIDE = "side = torch.where(desirable, one, -1)"
CLASS = "torch.where(desirable, self.desirable_weight * one, self.undesirable_weight)"
ROW_LOSS = "of_class * torch.sigmoid(-side * self.beta * (log_ratio - kl))"
KTO = [
    ("sign", "x", ROW_LOSS, ROW_LOSS.replace("-side", "side")),
    ("sign", "the loss", ROW_LOSS, "-" + ROW_LOSS),
    ("sign", "the KL", ROW_LOSS, ROW_LOSS.replace("- kl", "+ kl")),
    ("sign", "undesirable rows count as desirable", SIDE, "side = one"),
    ("swap", "desirable and undesirable", SIDE, "side = torch.where(desirable, -one, 1)"),
    (
        "swap",
        "the weights of both classes",
        CLASS,
        "torch.where(desirable, self.undesirable_weight * one, self.desirable_weight)",
    ),
    ("swap", "policy and reference", "log_ratio = logps - ref_logps", "log_ratio = ref_logps - logps"),
    ("coefficient", "beta is 1", ROW_LOSS, ROW_LOSS.replace("self.beta * ", "")),
    (
        "coefficient",
        "beta does not scale the KL",
        ROW_LOSS,
        ROW_LOSS.replace("self.beta * (log_ratio", "(self.beta * log_ratio"),
    ),
    ("coefficient", "no KL", ROW_LOSS, ROW_LOSS.replace("(log_ratio - kl)", "log_ratio")),
    ("coefficient", "no desirable_weight", CLASS, CLASS.replace("self.desirable_weight * one", "one")),
    ("coefficient", "no undesirable_weight", CLASS, CLASS.replace("self.undesirable_weight", "1")),
    ("coefficient", "no class weights", ROW_LOSS, ROW_LOSS.removeprefix("of_class * ")),
    ("coefficient", "no saturation", ROW_LOSS, ROW_LOSS.replace("torch.sigmoid", "torch.nn.functional.softplus")),
    ("stop", "ref_logps", "ref_logps.detach()", "ref_logps"),
    ("stop", "kl", "kl.detach().to(logps)", "kl.to(logps)"),
    (
        "mask",
        "only logps at the door",
        "zero_masked(mask, logps, ref_logps.detach())",
        "(torch.where(mask, logps, 0), ref_logps.detach())",
        {"reason": OTHER_DOOR},
    ),
    (
        "mask",
        "only ref_logps at the door",
        "zero_masked(mask, logps, ref_logps.detach())",
        "(logps, torch.where(mask, ref_logps.detach(), 0))",
    ),
    ("default", "beta is 0.2", "beta: float = 0.1", "beta: float = 0.2"),
    ("default", "desirable_weight is 1.33", "desirable_weight: float = 1.0,", "desirable_weight: float = 1.33,"),
    ("default", "undesirable_weight is 1.33", "undesirable_weight: float = 1.0)", "undesirable_weight: float = 1.33)"),
    ("metric", "accuracy without the KL", "side * (log_ratio - kl) > 0", "side * log_ratio > 0"),
    ("metric", "accuracy without the side", "side * (log_ratio - kl) > 0", "log_ratio - kl > 0"),
    ("metric", "accuracy counts ties", "side * (log_ratio - kl) > 0", "side * (log_ratio - kl) >= 0"),
    ("metric", "desirable_reward of the undesirable", "log_ratio, mask & desirable)", "log_ratio, mask & ~desirable)"),
    ("metric", "undesirable_reward of the desirable", "log_ratio, mask & ~desirable)", "log_ratio, mask & desirable)"),
    (
        "metric",
        "desirable_reward without beta",
        "Mean.of(self.beta * log_ratio, mask & desirable)",
        "Mean.of(log_ratio, mask & desirable)",
    ),
    (
        "metric",
        "undesirable_reward without beta",
        "Mean.of(self.beta * log_ratio, mask & ~desirable)",
        "Mean.of(log_ratio, mask & ~desirable)",
    ),
    ("metric", "undesirable_reward over all rows", "log_ratio, mask & ~desirable)", "log_ratio, mask)"),
    ("metric", "desirable_reward over all rows", "log_ratio, mask & desirable)", "log_ratio, mask)"),
    ("metric", "kl counts all rows", "Mean.constant(kl, mask.sum())", "Mean.constant(kl, torch.tensor(len(mask)))"),
]
KTO_KL = [
    ("clip", "no bound at 0", "log_ratio.value.clamp(min=0)", "log_ratio.value"),
    ("clip", "at most 0", "log_ratio.value.clamp(min=0)", "log_ratio.value.clamp(max=0)"),
    ("clip", "its absolute value", "log_ratio.value.clamp(min=0)", "log_ratio.value.abs()"),
    ("sign", "the reference point", "log_ratio.value.clamp(min=0)", "(-log_ratio.value).clamp(min=0)"),
    ("unit", "the sum, not the mean", "log_ratio.value.clamp(min=0)", "log_ratio.total.clamp(min=0)"),
]
# what the clamp before the sum comes to: a mean over rows of max(0, log-ratio)
CLAMPED_ROWS = [
    (
        "clip",
        "every row is clamped before the sum",
        "torch.where(mask, values.detach(), 0)\n        return cls(values.sum()",
        "torch.where(mask, values.detach(), 0)\n        return cls(values.clamp(min=0).sum()",
    ),
]

DIFFERENCE = "logistic_loss((chosen - rejected - margin) / self.temperature, self.label_smoothing)"
CENTRING = "self.center_coef * (chosen + rejected).square()"
BRADLEY_TERRY = [
    ("swap", "chosen and rejected", DIFFERENCE, DIFFERENCE.replace("chosen - rejected", "rejected - chosen")),
    (
        "swap",
        "chosen and rejected, at the door",
        "chosen, rejected = zero_masked(mask, chosen_rewards, rejected_rewards)",
        "chosen, rejected = zero_masked(mask, rejected_rewards, chosen_rewards)",
    ),
    ("sign", "the margin", DIFFERENCE, DIFFERENCE.replace("- margin", "+ margin")),
    ("sign", "the rejected", DIFFERENCE, DIFFERENCE.replace("- rejected", "+ rejected")),
    ("sign", "the centring", "loss + " + CENTRING, "loss - " + CENTRING),
    ("sign", "the rejected in the centring", CENTRING, CENTRING.replace("chosen + rejected", "chosen - rejected")),
    ("coefficient", "no margin", DIFFERENCE, DIFFERENCE.replace(" - margin", "")),
    (
        "coefficient",
        "temperature does not divide the margin",
        DIFFERENCE,
        DIFFERENCE.replace(
            "(chosen - rejected - margin) / self.temperature", "(chosen - rejected) / self.temperature - margin"
        ),
    ),
    ("coefficient", "no temperature", DIFFERENCE, DIFFERENCE.replace(" / self.temperature", "")),
    (
        "coefficient",
        "temperature multiplies",
        DIFFERENCE,
        DIFFERENCE.replace("/ self.temperature", "* self.temperature"),
    ),
    ("coefficient", "center_coef is 1", CENTRING, CENTRING.removeprefix("self.center_coef * ")),
    ("coefficient", "no centring", "if self.center_coef:", "if False:"),
    ("coefficient", "no square in the centring", CENTRING, CENTRING.replace(".square()", ".abs()")),
    (
        "coefficient",
        "the mean, not the sum, is centred",
        CENTRING,
        CENTRING.replace("(chosen + rejected)", "((chosen + rejected) / 2)"),
    ),
    *UNSMOOTHED,
    ("stop", "margin", "zero_masked(mask, margin.detach())", "zero_masked(mask, margin)"),
    (
        "mask",
        "margin passes the door",
        "*zero_masked(mask, margin.detach())",
        "margin.detach()",
        {"reason": OTHER_DOOR},
    ),
    ("default", "temperature is 2", "temperature: float = 1.0", "temperature: float = 2.0"),
    ("default", "center_coef is 0.01", "center_coef: float = 0.0", "center_coef: float = 0.01"),
    ("metric", "accuracy counts ties", "(difference > 0)", "(difference >= 0)"),
    (
        "metric",
        "the margin asked for is taken off",
        "difference = chosen - rejected",
        "difference = chosen - rejected - (0 if margin is None else inputs[2])",
    ),
    ("metric", "chosen_reward of the rejected", "Mean.of(chosen, mask)", "Mean.of(rejected, mask)"),
    ("metric", "rejected_reward of the chosen", "Mean.of(rejected, mask)", "Mean.of(chosen, mask)"),
    (
        "metric",
        "the difference in units of the temperature",
        "Moments.of(difference, mask)",
        "Moments.of(difference / self.temperature, mask)",
    ),
]

MUTANTS = [
    ("dpo", own("dpo"), DPO),
    ("ipo", own("ipo"), IPO),
    ("simpo", own("simpo"), SIMPO),
    ("kto", own("kto"), [*KTO, *KTO_KL]),
    ("kto", "rlloss/output.py", CLAMPED_ROWS),
    ("bradley_terry", own("bradley_terry"), BRADLEY_TERRY),
    *((loss, SHARED, PAIRS) for loss in ("dpo", "ipo", "simpo")),
    *((loss, SHARED, REFERENCED[:-1]) for loss in ("dpo", "ipo")),
    *((loss, own(loss), REFERENCED[-1:]) for loss in ("dpo", "ipo")),
    *((loss, SHARED, LOGISTIC) for loss in ("dpo", "simpo", "bradley_terry")),
    *((loss, SHARED, ANY_ROWS) for loss in LOSSES),
    *((loss, REDUCE, DOOR) for loss in LOSSES),
]
