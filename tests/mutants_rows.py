"""Mutants of the losses over rows and pairs: DPO, IPO, SimPO, KTO and Bradley-Terry."""

SHARED = "rlloss/preference.py"
MARGINS = "rlloss/preference_margins.py"
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
DOOR = [("mask", "no door", "return tuple(torch.where(loss_mask, x, 0) for x in tensors)", "return tensors")]

PAIRS = [
    ("swap", "chosen and rejected", "pair_loss(chosen - rejected, beta)", "pair_loss(rejected - chosen, beta)"),
    ("sign", "the rejected", "pair_loss(chosen - rejected, beta)", "pair_loss(chosen + rejected, beta)"),
]
OWN_PAIRS = [
    ("swap", "chosen and rejected", "h = chosen - rejected", "h = rejected - chosen"),
    ("sign", "the rejected", "h = chosen - rejected", "h = chosen + rejected"),
]
REFERENCES = "return mask, chosen - ref_chosen, rejected - ref_rejected"
REFERENCED = [
    (
        "swap",
        "the references of chosen and rejected",
        REFERENCES,
        "return mask, chosen - ref_rejected, rejected - ref_chosen",
    ),
    (
        "swap",
        "policy and reference",
        REFERENCES,
        "return mask, ref_chosen - chosen, ref_rejected - rejected",
    ),
    ("sign", "the chosen's reference", REFERENCES, "return mask, chosen + ref_chosen, rejected - ref_rejected"),
    ("sign", "the rejected's reference", REFERENCES, "return mask, chosen - ref_chosen, rejected + ref_rejected"),
    ("coefficient", "no reference", REFERENCES, "return mask, chosen, rejected"),
    ("stop", "ref_chosen_logps", "ref_chosen_logps.detach()", "ref_chosen_logps"),
    ("stop", "ref_rejected_logps", "ref_rejected_logps.detach()", "ref_rejected_logps"),
]
FLAG = 'reference_free)\n        check_flag(self._who, "length_normalized"'
OF_MARGINS = [
    (
        "default",
        "reference_free",
        "reference_free=" + FLAG,
        "reference_free=False" + FLAG.removeprefix("reference_free"),
    ),
    (
        "default",
        "beta is 0.2",
        "beta: float = 0.1,\n        reference_free: bool = False,\n        length",
        "beta: float = 0.2,\n        reference_free: bool = False,\n        length",
    ),
    ("default", "length_normalized", "length_normalized: bool = False", "length_normalized: bool = True"),
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
    ("sign", "h", "beta * h, self.", "-beta * h, self."),
    ("coefficient", "beta is 1", "beta * h, self.", "h, self."),
    ("coefficient", "beta divides", "beta * h, self.", "h / beta, self."),
    ("coefficient", "beta is 1 under soft labels", "beta * h, 1 - soft_labels", "h, 1 - soft_labels"),
    ("swap", "soft labels", "1 - soft_labels", "soft_labels"),
    ("stop", "soft labels", "soft_labels = soft_labels.detach()", "pass"),
    ("bound", "soft labels and smoothing", "if self.label_smoothing:", "if False:"),
    *UNSMOOTHED,
]
SQUARE = "return (h - 1 / (2 * beta)).square()"
IPO = [
    ("sign", "the target", SQUARE, SQUARE.replace("h -", "h +")),
    ("sign", "h", SQUARE, SQUARE.replace("(h", "(-h")),
    ("sign", "the loss", SQUARE, SQUARE.replace("return ", "return -")),
    ("coefficient", "the target without 1/2", SQUARE, SQUARE.replace("(2 * beta)", "beta")),
    ("coefficient", "the target is 2 beta", SQUARE, SQUARE.replace("1 / (2 * beta)", "2 * beta")),
    ("coefficient", "no square", SQUARE, SQUARE.replace(".square()", ".abs()")),
    ("coefficient", "half the square", SQUARE, SQUARE + " / 2"),
]
SIMPO = [
    ("sign", "h", "(beta * h -", "(-beta * h -"),
    ("sign", "the target", "(beta * h - self.margin", "(beta * h + self.margin"),
    ("coefficient", "beta is 1", "(beta * h -", "(h -"),
    ("coefficient", "no target", "(beta * h - self.margin", "(beta * h"),
    ("coefficient", "the target times beta", "(beta * h - self.margin", "(beta * (h - self.margin)"),
    ("default", "beta is 2.5", "beta: float = 2.0", "beta: float = 2.5"),
    ("default", "margin is 1", "margin: float = 0.5", "margin: float = 1.0"),
    *UNSMOOTHED,
]

PASSED_ON = "return self._output((chosen_mean_logps, rejected_mean_logps, None, None), mask, weights, beta, normalizer)"
OF_MEANS = [
    (
        "swap",
        "chosen and rejected, at the door",
        PASSED_ON,
        PASSED_ON.replace("chosen_mean_logps, rejected_mean_logps", "rejected_mean_logps, chosen_mean_logps"),
    ),
    ("weight", "none is passed on", PASSED_ON, PASSED_ON.replace("weights", "None")),
    ("mask", "none is passed on", PASSED_ON, PASSED_ON.replace("mask", "None")),
    ("unit", "the normalizer is not passed on", PASSED_ON, PASSED_ON.replace("normalizer", "None")),
    ("unit", "takes sums, not means", "    length_normalized = True\n", "    length_normalized = False\n"),
]

MUTANTS = [
    ("dpo", own("dpo"), DPO),
    ("ipo", own("ipo"), IPO),
    ("simpo", own("simpo"), SIMPO),
    ("simpo", MARGINS, OF_MEANS),
    ("dpo", own("dpo"), OWN_PAIRS),
    *((loss, SHARED, PAIRS) for loss in ("ipo", "simpo")),
    *((loss, SHARED, REFERENCED) for loss in ("dpo", "ipo")),
    *((loss, MARGINS, OF_MARGINS) for loss in ("dpo", "ipo")),
    *((loss, SHARED, LOGISTIC) for loss in ("dpo", "simpo", "bradley_terry")),
    *((loss, SHARED, ANY_ROWS) for loss in LOSSES),
    *((loss, REDUCE, DOOR) for loss in LOSSES),
]
