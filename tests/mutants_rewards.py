"""Mutants of the unpaired losses and of those that train reward models."""

import runpy
from pathlib import Path

ROWS = runpy.run_path(str(Path(__file__).with_name("mutants_rows.py")))

UNPAIRED = "rlloss/unpaired.py"
PAIRS = "rlloss/scored_pairs.py"


def own(loss):
    return f"rlloss/losses/{loss}.py"


OTHER_DOOR = "the door of what is trained stops the gradient; the mean and the metrics mask the values"

# what all losses over judged answers share
SIDE = "side = torch.where(desirable, torch.ones_like(log_ratio), -1)"
CLASS = "torch.where(desirable, torch.full_like(log_ratio, self.desirable_weight), self.undesirable_weight)"
X = "self.row_loss(side * self.beta * (log_ratio - log_ratio_of_c))"
RIGHT = "side * (log_ratio - log_ratio_of_c) > 0"
ANY_THUMBS = [
    ("sign", "x", X, X.replace("(side", "(-side")),
    ("sign", "undesirable rows count as desirable", SIDE, SIDE.replace(", -1)", ", 1)")),
    ("swap", "desirable and undesirable", SIDE, SIDE.replace("torch.where(desirable", "torch.where(~desirable")),
    ("swap", "the weights of both classes", CLASS, CLASS.replace("torch.where(desirable", "torch.where(~desirable")),
    ("swap", "policy and reference", "log_ratio = logps - ref_logps", "log_ratio = ref_logps - logps"),
    ("coefficient", "beta is 1", X, X.replace("self.beta * ", "")),
    ("coefficient", "no desirable_weight", CLASS, CLASS.replace("self.desirable_weight", "1.0")),
    ("coefficient", "no undesirable_weight", CLASS, CLASS.replace("self.undesirable_weight", "1")),
    ("coefficient", "no class weights", "return of_class * ", "return "),
    ("stop", "ref_logps", "ref_logps.detach()", "ref_logps"),
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
    ("metric", "accuracy without the side", RIGHT, "log_ratio - log_ratio_of_c > 0"),
    ("metric", "accuracy counts ties", RIGHT, RIGHT.replace("> 0", ">= 0")),
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
]
COMPARED = [
    ("sign", "what rewards are compared with", X, X.replace("- log", "+ log")),
    ("coefficient", "nothing is compared with", X, X.replace(" - log_ratio_of_c", "")),
    (
        "coefficient",
        "what is compared with is not scaled",
        X,
        "self.row_loss(side * (self.beta * log_ratio - log_ratio_of_c))",
    ),
    ("metric", "accuracy without what is compared with", RIGHT, "side * log_ratio > 0"),
]
FEW_THUMBS = [
    row for row in ANY_THUMBS if row[1] in {"x", "desirable and undesirable", "beta is 1", "ref_logps", "beta is 0.2"}
]

SATURATES = "return torch.sigmoid(-x)"
KTO = [
    ("sign", "the loss", SATURATES, "return -torch.sigmoid(-x)"),
    ("coefficient", "no saturation", SATURATES, "return torch.nn.functional.softplus(-x)"),
    ("stop", "kl", "kl.detach().to(logps)", "kl.to(logps)"),
    ("swap", "logps and ref_logps", "self._output(logps, ref_logps,", "self._output(ref_logps, logps,"),
    ("weight", "none is passed on", "kl, mask, weights, normalizer)", "kl, mask, None, normalizer)"),
    (
        "metric",
        "kl counts all rows",
        "Mean.constant(kl, counted.sum())",
        "Mean.constant(kl, torch.tensor(len(counted)))",
    ),
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

APO = [
    ("sign", "the loss", SATURATES, "return -torch.sigmoid(-x)"),
    ("coefficient", "no saturation", SATURATES, "return torch.nn.functional.softplus(-x)"),
    ("coefficient", "compared with a nat", "desirable, 0.0, mask", "desirable, 1.0, mask"),
    ("swap", "logps and ref_logps", "self._output(logps, ref_logps,", "self._output(ref_logps, logps,"),
    ("weight", "none is passed on", "0.0, mask, weights, normalizer)", "0.0, mask, None, normalizer)"),
    ("unit", "the normalizer is not passed on", "0.0, mask, weights, normalizer)", "0.0, mask, weights, None)"),
]
LEARNT = "self.totals = self.decay * self.totals + "
HALFWAY = "return (self.totals / torch.where(self.counts > 0, self.counts, 1)).mean()"
BCO = [
    ("sign", "the loss", "return logistic_loss(x)", "return -logistic_loss(x)"),
    ("sign", "delta", "delta = self.delta.to(logps.device)", "delta = -self.delta.to(logps.device)"),
    ("coefficient", "saturation", "return logistic_loss(x)", "return torch.sigmoid(-x)"),
    ("coefficient", "no delta", "delta = self.delta.to(logps.device)", "delta = 0 * self.delta.to(logps.device)"),
    ("coefficient", "delta in nats of the log-ratio", "(delta / self.beta).to", "(delta * 1.0).to"),
    ("coefficient", "delta is the sum of both means", HALFWAY, HALFWAY.replace(".mean()", ".sum()")),
    (
        "coefficient",
        "delta is the mean of all rewards alike",
        HALFWAY,
        "return self.totals.sum() / torch.where(self.counts.sum() > 0, self.counts.sum(), 1)",
    ),
    ("coefficient", "sums are not forgotten", LEARNT, "self.totals = self.totals + "),
    ("coefficient", "counts are not forgotten", "self.counts = self.decay * self.counts", "self.counts = self.counts"),
    ("coefficient", "the last update alone", LEARNT, "self.totals = 0 * self.totals + "),
    (
        "swap",
        "the classes that an update learns",
        'self._mean(desirable_reward, "desirable_reward"), self._mean(undesirable_reward, "undesirable_reward")',
        'self._mean(undesirable_reward, "desirable_reward"), self._mean(undesirable_reward, "undesirable_reward")',
    ),
    ("stop", "what an update learns", "mean.total.detach()", "mean.total"),
    ("default", "decay is 0.9", "decay: float = 1.0", "decay: float = 0.9"),
    ("metric", "delta counts all rows", "counted.sum())", "torch.tensor(len(counted)))"),
    (
        "state",
        "the sums are no state",
        'register_buffer("totals", torch.zeros(2, dtype=torch.float64))',
        'register_buffer("totals", torch.zeros(2, dtype=torch.float64), persistent=False)',
    ),
]

# reward models from pairs
DIFFERENCE = "difference = chosen - rejected\n"
SCORED = [
    (
        "swap",
        "chosen and rejected, at the door",
        "zero_masked(mask, chosen_rewards, rejected_rewards)\n        loss = mean_of_rows(self.pair",
        "zero_masked(mask, rejected_rewards, chosen_rewards)\n        loss = mean_of_rows(self.pair",
    ),
    ("stop", "margin", "zero_masked(mask, margin.detach())", "zero_masked(mask, margin)"),
    (
        "mask",
        "margin passes the door",
        "zero_masked(mask, margin.detach())",
        "(margin.detach(),)",
        {"reason": OTHER_DOOR},
    ),
    ("metric", "accuracy counts ties", "(difference > 0)", "(difference >= 0)"),
    ("metric", "chosen_reward of the rejected", "Mean.of(chosen, decided)", "Mean.of(rejected, decided)"),
    ("metric", "rejected_reward of the chosen", "Mean.of(rejected, decided)", "Mean.of(chosen, decided)"),
    ("metric", "half the difference", DIFFERENCE, "difference = (chosen - rejected) / 2\n"),
]
LOGITS = "h = chosen - rejected if margin is None else chosen - rejected - margin"
LOSS = "logistic_loss(h / self.temperature, self.label_smoothing)"
CENTRING = "self.center_coef * (chosen + rejected).square()"
BRADLEY_TERRY = [
    ("swap", "chosen and rejected", LOSS, LOSS.replace("(h", "(-h")),
    ("sign", "the margin", LOGITS, LOGITS.replace("- margin", "+ margin")),
    ("sign", "the rejected", LOGITS, LOGITS.replace("h = chosen - rejected", "h = chosen + rejected")),
    ("sign", "the centring", "loss + " + CENTRING, "loss - " + CENTRING),
    ("sign", "the rejected in the centring", CENTRING, CENTRING.replace("chosen + rejected", "chosen - rejected")),
    ("coefficient", "no margin", LOGITS, LOGITS.replace(" - margin", "")),
    (
        "coefficient",
        "temperature does not divide the margin",
        LOGITS,
        LOGITS.replace("- margin", "- self.temperature * margin"),
    ),
    ("coefficient", "no temperature", LOSS, LOSS.replace(" / self.temperature", "")),
    ("coefficient", "temperature multiplies", LOSS, LOSS.replace("/ self", "* self")),
    ("coefficient", "center_coef is 1", CENTRING, CENTRING.removeprefix("self.center_coef * ")),
    ("coefficient", "no centring", "if self.center_coef:", "if False:"),
    ("coefficient", "no square in the centring", CENTRING, CENTRING.replace(".square()", ".abs()")),
    (
        "coefficient",
        "the mean, not the sum, is centred",
        CENTRING,
        CENTRING.replace("(chosen + rejected)", "((chosen + rejected) / 2)"),
    ),
    *ROWS["UNSMOOTHED"],
    ("default", "temperature is 2", "temperature: float = 1.0", "temperature: float = 2.0"),
    ("default", "center_coef is 0.01", "center_coef: float = 0.0", "center_coef: float = 0.01"),
]

CLAMPED = "a hinge passes no gradient where it is NaN, and the mean and the metrics mask the values"
HINGE = "hinge = ((self.margin if margin is None else margin) - (chosen - rejected)).clamp(min=0)"
MARGIN_RANKING = [
    ("sign", "the difference", HINGE, HINGE.replace("- (chosen", "+ (chosen")),
    ("swap", "chosen and rejected", HINGE, HINGE.replace("chosen - rejected", "rejected - chosen")),
    ("clip", "no hinge", HINGE, HINGE.replace(".clamp(min=0)", "")),
    (
        "coefficient",
        "the constant beside a pair's own",
        HINGE,
        HINGE.replace("else margin)", "else self.margin + margin)"),
    ),
    (
        "coefficient",
        "a pair's own margin is not seen",
        HINGE,
        HINGE.replace("self.margin if margin is None else margin", "self.margin"),
    ),
    ("coefficient", "always squared", "if self.squared else hinge", "if True else hinge"),
    ("coefficient", "half the square", "hinge.square()", "hinge.square() / 2"),
    ("default", "margin is 0", "margin: float = 1.0", "margin: float = 0.0"),
    ("default", "squared", "squared: bool = False", "squared: bool = True"),
]

TIED = "torch.where(tied, self.tie_loss(h), self.win_loss(h))"
TIES = [
    ("swap", "wins and ties", TIED, "torch.where(tied, self.win_loss(h), self.tie_loss(h))"),
    ("swap", "chosen and rejected", "h = chosen - rejected\n", "h = rejected - chosen\n"),
    ("metric", "ties have a winner", "_metrics(chosen, rejected, mask & ~tied)", "_metrics(chosen, rejected, mask)"),
    (
        "metric",
        "tie_distance of all pairs",
        "(chosen - rejected).abs(), mask & tied)",
        "(chosen - rejected).abs(), mask)",
    ),
    ("metric", "tie_distance has a sign", "(chosen - rejected).abs(), mask", "chosen - rejected, mask"),
]
WIN = "return -F.logsigmoid(h - math.log(self.theta))"
TIE = "return self.win_loss(h) + self.win_loss(-h) - math.log(self.theta**2 - 1)"
RAO_KUPPER = [
    ("sign", "eta", WIN, WIN.replace("h - math", "h + math")),
    ("sign", "h", WIN, WIN.replace("(h -", "(-h -")),
    ("coefficient", "theta, not its log", WIN, WIN.replace("math.log(self.theta)", "self.theta")),
    ("coefficient", "theta - 1", TIE, TIE.replace("self.theta**2 - 1", "self.theta - 1")),
    ("coefficient", "a tie is one side's", TIE, TIE.replace(" + self.win_loss(-h)", "")),
    ("default", "theta is 3", "theta: float = 2.0", "theta: float = 3.0"),
]
WIN = "torch.stack([torch.zeros_like(h), -h, math.log(self.nu) - h / 2])"
TIE = "torch.stack([h / 2, -h / 2, torch.full_like(h, math.log(self.nu))]).logsumexp(0) - math.log(self.nu)"
DAVIDSON = [
    ("sign", "h", WIN, WIN.replace("-h,", "h,")),
    ("sign", "nu's share of a win", WIN, WIN.replace("- h / 2", "+ h / 2")),
    ("coefficient", "a whole h", WIN, WIN.replace("- h / 2", "- h")),
    ("coefficient", "no ties in a win's odds", WIN, "torch.stack([torch.zeros_like(h), -h])"),
    ("coefficient", "a tie's own strength is lost", TIE, TIE.removesuffix(" - math.log(self.nu)")),
    ("default", "nu is 2", "nu: float = 1.0", "nu: float = 2.0"),
]

LUCE = "torch.where(mask, of_the_rest - rewards, 0).sum(-1)"
REST = "torch.where(mask, rewards, absent).flip(-1).logcumsumexp(-1).flip(-1)"
ORDER = "torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)"
PLACKETT_LUCE = [
    ("sign", "the loss", LUCE, LUCE.replace("of_the_rest - rewards", "rewards - of_the_rest")),
    ("swap", "the worst first", REST, "torch.where(mask, rewards, absent).logcumsumexp(-1)"),
    ("coefficient", "the mean over ranks", LUCE, LUCE.replace(".sum(-1)", ".mean(-1)")),
    ("mask", "absent answers have strength 1", REST, REST.replace("absent)", "0)")),
    ("mask", "absent answers have a rank", LUCE, "(of_the_rest - rewards).sum(-1)"),
    ("mask", "the gaps come first", ORDER, ORDER.replace("~mask", "mask")),
    ("weight", "none", "lists, weights, normalizer)", "lists, None, normalizer)"),
    ("weight", "what weighs nothing is seen", "torch.where((weights.detach() != 0)[:, None], rewards, 0)", "rewards"),
    ("unit", "the normalizer is ignored", "lists, weights, normalizer)", "lists, weights, None)"),
    (
        "unit",
        "lists without an answer count",
        "mean_of_rows(lambda: _list_loss(kept, mask), (), lists,",
        "mean_of_rows(lambda: _list_loss(kept, mask), (), lists | ~lists,",
    ),
    ("metric", "accuracy counts ties", "(difference > 0)", "(difference >= 0)"),
    (
        "metric",
        "neighbours that are absent",
        "Moments.of(difference, mask[:, 1:])",
        "Moments.of(difference, mask[:, :-1])",
    ),
]

SQUARE = "lambda r, target: (r - target).square()"
REGRESSION = [
    ("sign", "the target", SQUARE, SQUARE.replace("r - target", "r + target")),
    ("coefficient", "half the square", SQUARE, SQUARE + " / 2"),
    ("coefficient", "no square", SQUARE, SQUARE.replace(".square()", ".abs()")),
    (
        "swap",
        "rewards and targets",
        "zero_masked(mask, rewards, targets.detach())",
        "zero_masked(mask, targets, rewards.detach())",
    ),
    ("stop", "targets", "targets.detach()", "targets"),
    (
        "metric",
        "explained by the targets",
        "ExplainedVariance.of(rewards, targets",
        "ExplainedVariance.of(targets, rewards",
    ),
    ("metric", "the error has a sign", "(rewards - targets).abs()", "(rewards - targets)"),
]

ENTROPY = "return -labels * F.logsigmoid(logits) - (1 - labels) * F.logsigmoid(-logits)"
PROCESS = [
    ("sign", "the loss", ENTROPY, "return labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)"),
    ("swap", "right and wrong", ENTROPY, ENTROPY.replace("F.logsigmoid(logits) - (1", "F.logsigmoid(-logits) - (1")),
    ("swap", "logits and labels", '{"logits": logits, "labels": labels}', '{"logits": labels, "labels": logits}'),
    ("coefficient", "wrong steps weigh nothing", ENTROPY, "return -labels * F.logsigmoid(logits)"),
    ("coefficient", "wrong steps weigh as right ones", ENTROPY, ENTROPY.replace("(1 - labels)", "1.0")),
    ("stop", "labels", 'inputs["labels"].detach()', 'inputs["labels"]'),
    ("metric", "accuracy of hard labels", "(labels > 0.5)", "(labels > 0)"),
    ("metric", "probability is the score", "logits.sigmoid()", "logits"),
]

FEW = ("the normalizer is ignored", "none", "weights")
FEW_ROWS = [row for row in ROWS["ANY_ROWS"] if row[1] in FEW]
NEW_ROWS = ("apo_zero_unpaired", "bco", "margin_ranking", "rao_kupper", "davidson", "reward_regression")

MUTANTS = [
    ("kto", own("kto"), [*KTO, *KTO_KL]),
    ("kto", "rlloss/output.py", CLAMPED_ROWS),
    ("kto", UNPAIRED, [*ANY_THUMBS, *COMPARED]),
    ("apo_zero_unpaired", own("apo_zero_unpaired"), APO),
    ("apo_zero_unpaired", UNPAIRED, FEW_THUMBS),
    ("bco", own("bco"), BCO),
    ("bco", UNPAIRED, [*FEW_THUMBS[:-1], *COMPARED]),
    ("bradley_terry", own("bradley_terry"), BRADLEY_TERRY),
    ("bradley_terry", PAIRS, SCORED),
    ("margin_ranking", own("margin_ranking"), MARGIN_RANKING),
    ("margin_ranking", PAIRS, SCORED[:2]),
    ("rao_kupper", own("rao_kupper"), RAO_KUPPER),
    ("rao_kupper", PAIRS, TIES),
    ("davidson", own("davidson"), DAVIDSON),
    ("davidson", PAIRS, TIES[:2]),
    ("plackett_luce", own("plackett_luce"), PLACKETT_LUCE),
    ("plackett_luce", "rlloss/preference.py", [row for row in FEW_ROWS if row[0] == "stop"]),
    ("reward_regression", own("reward_regression"), REGRESSION),
    ("process_reward", own("process_reward"), PROCESS),
    *((loss, "rlloss/preference.py", FEW_ROWS) for loss in NEW_ROWS),
    *((loss, "rlloss/reduce.py", ROWS["DOOR"]) for loss in (*NEW_ROWS, "process_reward") if loss != "margin_ranking"),
    ("margin_ranking", "rlloss/reduce.py", [(*row, {"reason": CLAMPED}) for row in ROWS["DOOR"]]),
]
