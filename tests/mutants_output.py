"""Mutants of the metrics and of what joins losses."""

MEAN_OF = '0 where nothing is."""\n        values = torch.where(mask, values.detach(), 0)'
MAX_OF = "torch.where(mask, values.detach(), -torch.inf)"
MIN_OF = "torch.where(mask, values.detach(), torch.inf)"
MEAN_ADD = "return Mean(self.total + other.total, self.count + other.count)"
MOMENTS_OF = "values, count = torch.where(mask, values.detach(), 0), mask.sum()"
M2_OF = "torch.where(mask, values - mean, 0).square().sum()"
M2_ADD = "self.m2 + other.m2 + delta.square() * self.count * share"
STD = "(self.m2 / self.count.clamp(min=1)).sqrt()"
ERROR = "Moments.of(targets - torch.where(mask, predictions, 0), mask)"
TARGETS = "targets = torch.where(mask, targets.detach(), 0)\n"
BY_MOMENTS = "`Moments.of` masks and detaches both the targets and the errors made of them"
EXPLAINED = "torch.where(varies, 1 - self.error_m2 / torch.where(varies, self.target_m2, 1), 0)"

OUTPUT = [
    (
        "mask",
        "Mean is not masked",
        MEAN_OF,
        MEAN_OF.replace("torch.where(mask, values.detach(), 0)", "values.detach()"),
    ),
    ("mask", "Moments are not masked", MOMENTS_OF, "values, count = values.detach(), mask.sum()"),
    ("mask", "the deviations of Moments are not masked", M2_OF, "(values - mean).square().sum()"),
    (
        "mask",
        "ExplainedVariance's targets are not masked",
        TARGETS,
        "targets = targets.detach()\n",
        {"reason": BY_MOMENTS},
    ),
    (
        "mask",
        "ExplainedVariance's predictions are not masked",
        "torch.where(mask, predictions, 0)",
        "predictions",
        {"reason": BY_MOMENTS},
    ),
    ("mask", "Max starts at 0", MAX_OF, MAX_OF.replace("-torch.inf", "0")),
    ("mask", "Min starts at 0", MIN_OF, MIN_OF.replace("torch.inf", "0")),
    ("stop", "Mean", MEAN_OF, MEAN_OF.replace("values.detach()", "values")),
    (
        "stop",
        "Mean of a constant",
        "value.detach().to(count.device)",
        "value.to(count.device)",
    ),
    ("stop", "Moments", MOMENTS_OF, MOMENTS_OF.replace("values.detach()", "values")),
    ("stop", "Max", MAX_OF, MAX_OF.replace("values.detach()", "values")),
    ("stop", "Min", MIN_OF, MIN_OF.replace("values.detach()", "values")),
    (
        "stop",
        "ExplainedVariance's targets",
        TARGETS,
        TARGETS.replace("targets.detach()", "targets"),
        {"reason": BY_MOMENTS},
    ),
    ("unit", "means are added", MEAN_ADD, "return Mean(self.value + other.value, self.count * 0 + 2)"),
    ("unit", "counts are not added", MEAN_ADD, "return Mean(self.total + other.total, self.count)"),
    (
        "unit",
        "Mean counts masked entries",
        "return cls(values.sum(), mask.sum())",
        "return cls(values.sum(), mask.sum() * 0 + mask.numel())",
    ),
    (
        "unit",
        "a constant is not multiplied by its count",
        "return cls(value * count, count)",
        "return cls(value * (count > 0), count)",
    ),
    ("unit", "Mean divides by 0", "return self.total / self.count.clamp(min=1)", "return self.total / self.count"),
    (
        "unit",
        "Moments' mean over all entries",
        "mean = values.sum() / count.clamp(min=1)",
        "mean = values.sum() / max(values.numel(), 1)",
    ),
    ("unit", "Moments divide by 0", "mean = values.sum() / count.clamp(min=1)", "mean = values.sum() / count"),
    ("coefficient", "Moments meet half-way", "self.mean + delta * share", "self.mean + delta / 2"),
    ("coefficient", "the distance of the means is lost", M2_ADD, "self.m2 + other.m2"),
    (
        "coefficient",
        "the distance of the means is not squared",
        M2_ADD,
        M2_ADD.replace("delta.square()", "delta.abs()"),
    ),
    (
        "coefficient",
        "the distance of the means weighs both counts",
        M2_ADD,
        M2_ADD.replace("self.count * share", "share"),
    ),
    ("coefficient", "the share is float32", "other.count.to(other.mean.dtype) / count", "other.count / count"),
    ("coefficient", "the deviation with n - 1", STD, STD.replace("self.count.clamp", "(self.count - 1).clamp")),
    ("coefficient", "the variance in place of the deviation", STD, STD.removesuffix(".sqrt()")),
    ("sign", "Moments' delta", "other.mean - self.mean\n", "self.mean - other.mean\n"),
    ("sign", "Max merges to the smaller", "Max(torch.maximum(", "Max(torch.minimum("),
    ("sign", "Min merges to the larger", "Min(torch.minimum(", "Min(torch.maximum("),
    ("sign", "the predictions", ERROR, ERROR.replace("targets - torch", "targets + torch")),
    ("sign", "the unexplained in place of the explained", EXPLAINED, EXPLAINED.replace("1 - self", "self")),
    (
        "swap",
        "error and target",
        "return cls(*target, error.mean, error.m2)",
        "return cls(*error, target.mean, target.m2)",
    ),
    (
        "swap",
        "error and target, when read",
        EXPLAINED,
        "torch.where(varies, 1 - self.target_m2 / torch.where(varies, self.error_m2, 1), 0)",
    ),
    (
        "swap",
        "error and target, when merged",
        "        return ExplainedVariance(*target, error.mean, error.m2)",
        "        return ExplainedVariance(*error, target.mean, target.m2)",
    ),
    (
        "coefficient",
        "ExplainedVariance: errors are not merged",
        "        error += Moments(other.count, other.error_mean, other.error_m2)\n",
        "",
    ),
    (
        "coefficient",
        "ExplainedVariance: targets are not merged",
        "        target += Moments(other.count, other.target_mean, other.target_m2)\n",
        "",
    ),
    (
        "coefficient",
        "ExplainedVariance: a bias counts as an error",
        "self.error_m2 / torch",
        "(self.error_m2 + self.count * self.error_mean.square()) / torch",
    ),
    (
        "clip",
        "ExplainedVariance of constant targets",
        "varies = self.target_m2 > rounding",
        "varies = self.target_m2 >= 0",
    ),
    (
        "clip",
        "ExplainedVariance takes rounding for variance",
        "varies = self.target_m2 > rounding",
        "varies = self.target_m2 > 0",
    ),
    (
        "clip",
        "nothing reads -inf",
        "return torch.where(self.largest == -torch.inf, 0, self.largest)",
        "return self.largest",
    ),
    (
        "clip",
        "nothing reads inf",
        "return torch.where(self.smallest == torch.inf, 0, self.smallest)",
        "return self.smallest",
    ),
    (
        "stop",
        "waist_gradient's loss",
        "return LossOutput(out.loss.detach(), out.metrics), grads",
        "return LossOutput(out.loss, out.metrics), grads",
    ),
    (
        "stop",
        "waist_gradient runs into the caller's graph",
        "x.detach().requires_grad_() for x in waist",
        "x.requires_grad_() for x in waist",
    ),
    (
        "coefficient",
        "a factor is lost",
        "return LossOutput(self.loss * factor, self.metrics)",
        "return LossOutput(self.loss, self.metrics)",
    ),
    (
        "coefficient",
        "combine averages",
        "torch.stack([term.loss for term in terms.values()]).sum()",
        "torch.stack([term.loss for term in terms.values()]).mean()",
    ),
    ("unit", "merge_metrics keeps the last part", "merged[name] + metric if name in merged else metric", "metric"),
]

MUTANTS = [("output", "rlloss/output.py", OUTPUT)]
