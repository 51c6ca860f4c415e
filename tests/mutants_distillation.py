"""Mutants of the token losses, of the teacher's likeliest tokens and of the teacher as a reward."""

SHARED = "rlloss/likelihood.py"


def own(loss):
    return f"rlloss/losses/{loss}.py"


# what all losses over tokens of given texts share
LOSS = "weighted(token_loss(**inputs), token_weights)"
SEEN = "            inputs = {name: zero_masked(token_weights != 0, x)[0] for name, x in inputs.items()}\n"
DOOR = "return loss_mask, {name: zero_masked(loss_mask, x)[0] for name, x in inputs.items()}"
WEIGHTS = "(token_weights,) = zero_masked(loss_mask, token_weights.detach())"
FEW = [
    ("weight", "none", LOSS, "token_loss(**inputs)"),
    ("stop", "token_weights", "token_weights.detach()", "token_weights"),
    ("unit", "the reduction is always token_mean", "            self.reduction,\n", '            "token_mean",\n'),
    (
        "unit",
        "the normalizer is ignored",
        "normalizer=normalizer,\n            cu_seqlens",
        "normalizer=None,\n            cu_seqlens",
    ),
    (
        "mask",
        "tokens behind a pack's last boundary count",
        "        loss_mask = within_sequences(loss_mask, cu_seqlens)\n",
        "",
    ),
]
ANY_TOKENS = [
    *FEW,
    ("default", "the base's is sequence_mean", 'Reduction = "token_mean"', 'Reduction = "sequence_mean"'),
    (
        "unit",
        "sums where it says token_mean",
        "            self.reduction,\n",
        '            "sequence_sum" if self.reduction == "token_mean" else self.reduction,\n',
    ),
    ("unit", "another constant", "max_length=self.max_length,", "max_length=self.max_length and self.max_length + 1,"),
    ("mask", "no door", DOOR, "return loss_mask, inputs"),
    (
        "mask",
        "token_weights pass the door",
        WEIGHTS,
        "token_weights = token_weights.detach()",
        {"reason": "what they scale is 0 where masked, and the reduction masks the product"},
    ),
]

SMOOTHED = "loss = -(1 - self.label_smoothing) * logprobs - self.label_smoothing * mean_logprob"
HELD = "loss = loss + self.z_coef * logsumexp.square()"
SFT = [
    ("sign", "the log-probs", "loss = -logprobs\n", "loss = logprobs\n"),
    ("sign", "the vocabulary's share", SMOOTHED, SMOOTHED.replace("- self", "+ self")),
    ("sign", "the z-loss", HELD, HELD.replace("+ self", "- self")),
    ("coefficient", "the label keeps its share", SMOOTHED, SMOOTHED.replace("-(1 - self.label_smoothing) * ", "-")),
    ("coefficient", "no smoothing", "if self.label_smoothing and", "if False and"),
    ("coefficient", "no z-loss", "if self.z_coef and", "if False and"),
    ("coefficient", "half the square", HELD, HELD + " / 2"),
    ("coefficient", "no square", HELD, HELD.replace(".square()", ".abs()")),
    (
        "swap",
        "the label and the vocabulary",
        SMOOTHED,
        SMOOTHED.replace("(1 - self", "(0 + self").replace(
            "- self.label_smoothing *", "- (1 - self.label_smoothing) *"
        ),
    ),
    (
        "swap",
        "mean_logprob and logsumexp",
        '"mean_logprob": mean_logprob, "logsumexp": logsumexp}',
        '"mean_logprob": logsumexp, "logsumexp": mean_logprob}',
    ),
    ("default", "label_smoothing is 0.1", "label_smoothing: float = 0.0", "label_smoothing: float = 0.1"),
    ("default", "z_coef is 1e-4", "z_coef: float = 0.0", "z_coef: float = 1e-4"),
    ("default", "sequence_mean", 'reduction: Reduction = "token_mean"', 'reduction: Reduction = "sequence_mean"'),
    ("metric", "nll's sign", 'Mean.of(-inputs["logprobs"]', 'Mean.of(inputs["logprobs"]'),
    ("metric", "logsumexp is nll", 'Mean.of(inputs["logsumexp"]', 'Mean.of(-inputs["logprobs"]'),
    ("error", "smoothing goes without its input", "if value and x is None:", "if False:"),
]

WEIGHTED = "return weighted(-logprobs, _probability(logprobs))"
DFT = [
    ("sign", "the loss", WEIGHTED, WEIGHTED.replace("-logprobs", "logprobs")),
    ("coefficient", "plain SFT", WEIGHTED, "return -logprobs"),
    ("coefficient", "what cannot be is infinite", WEIGHTED, "return -_probability(logprobs) * logprobs"),
    ("coefficient", "the root of p", ".clamp(max=0).exp()", ".clamp(max=0).div(2).exp()"),
    ("swap", "l and p", WEIGHTED, "return weighted(-_probability(logprobs), logprobs)"),
    ("stop", "the probability", "logprobs.detach().clamp(max=0)", "logprobs.clamp(max=0)"),
    ("metric", "nll's sign", "Mean.of(-logprobs, loss_mask)", "Mean.of(logprobs, loss_mask)"),
]

DISTILLATION = [
    ("sign", "the loss", "return divergence\n", "return -divergence\n"),
    ("coefficient", "half of it", "return divergence\n", "return divergence / 2\n"),
    ("swap", "the divergence's name", "self.divergence: Divergence = divergence", 'self.divergence: Divergence = "js"'),
    ("default", "reverse_kl", 'divergence: Divergence = "forward_kl"', 'divergence: Divergence = "reverse_kl"'),
    ("default", "beta is 0.1", "self.beta = 0.5 if", "self.beta = 0.1 if"),
    ("default", "sequence_mean", 'reduction: Reduction = "token_mean"', 'reduction: Reduction = "sequence_mean"'),
    ("error", "a beta that is not used", 'if divergence != "js":', "if False:"),
    ("error", "a js that is 0", "if beta == 1:", "if False:"),
    ("metric", "minus the divergence", 'Mean.of(inputs["divergence"]', 'Mean.of(-inputs["divergence"]'),
]

XPO = [
    ("sign", "up goes what the reference says", "return self.alpha * logprobs", "return -self.alpha * logprobs"),
    ("coefficient", "alpha is 1", "return self.alpha * logprobs", "return logprobs"),
    ("swap", "alpha and log-probs", "return self.alpha * logprobs", "return self.alpha - logprobs"),
    ("default", "alpha is 1e-4", "alpha: float = 1e-5", "alpha: float = 1e-4"),
    ("default", "token_mean", 'reduction: Reduction = "sequence_sum"', 'reduction: Reduction = "token_mean"'),
    ("metric", "its sign", 'Mean.of(inputs["logprobs"]', 'Mean.of(-inputs["logprobs"]'),
]

KL = "torch.where(here, torch.where(here, log_p, 0).exp() * torch.where(here, log_p - log_q, 0), 0).sum(-1)"
JS = "beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)"
MIXTURE = "torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))"
KNOWN = "known = -torch.expm1(largest[..., 0]) - others"
MASS = "return (mass + (held - mass).detach()).log().to(logprobs.dtype)"
TOP_K = [
    ("swap", "forward_kl is reverse_kl", "found = _kl(teacher, student)", "found = _kl(student, teacher)"),
    ("swap", "reverse_kl is forward_kl", "found = _kl(student, teacher)", "found = _kl(teacher, student)"),
    (
        "swap",
        "the shares of the mixture",
        "mixture = _mixture(teacher, student, beta)",
        "mixture = _mixture(student, teacher, beta)",
    ),
    ("swap", "the shares of js", JS, "(1 - beta) * _kl(teacher, mixture) + beta * _kl(student, mixture)"),
    ("coefficient", "js is the student's half", JS, "(1 - beta) * _kl(student, mixture)"),
    ("coefficient", "no bucket", "return torch.cat([logprobs, tail[..., None]], -1)", "return logprobs"),
    (
        "coefficient",
        "the tail that is given is not seen",
        "tail = _complement(logprobs) if tail is None else tail",
        "tail = _complement(logprobs)",
    ),
    ("coefficient", "1 - sum p has lost its digits", KNOWN, "known = (1 - logprobs.detach().exp().sum(-1)).double()"),
    ("coefficient", "no least tail", "held = known.clamp(min=torch.finfo(logprobs.dtype).eps)", "held = known"),
    ("stop", "the tail's gradient", MASS, "return held.log().to(logprobs.dtype)"),
    (
        "stop",
        "the gradient where the bound binds",
        "(mass + (held - mass).detach())",
        "mass.clamp(min=torch.finfo(logprobs.dtype).eps)",
    ),
    ("stop", "the teacher", "_buckets(teacher_logprobs.detach(), None if", "_buckets(teacher_logprobs, None if"),
    ("stop", "the teacher's tail", "teacher_tail.detach(), loss_mask)", "teacher_tail, loss_mask)"),
    ("mask", "p = 0", KL, "(log_p.exp() * (log_p - log_q)).sum(-1)"),
    ("mask", "neither p nor q", "torch.where(nowhere, 0, x) for x", "x for x"),
    (
        "mask",
        "the loss mask",
        "return found if loss_mask is None else torch.where(loss_mask, found, 0)",
        "return found",
    ),
    ("mask", "no door of log-probs", "logprobs = torch.where(loss_mask[..., None], logprobs, 0)\n        tail", "tail"),
    ("mask", "no door of logits", "        logits = torch.where(loss_mask[..., None], logits, 0)\n", ""),
    (
        "mask",
        "ids that stand for none",
        "is_one, places = ids >= 0, ids.clamp(min=0).long()",
        "is_one, places = ids >= -9, ids.clamp(min=0).long()",
    ),
    (
        "mask",
        "the gradient of an empty tail",
        "torch.where(some[..., None], rest, 0).logsumexp(-1)",
        "rest.logsumexp(-1)",
    ),
    ("coefficient", "the tail has all tokens", "rest = z.masked_fill(taken, -torch.inf)", "rest = z"),
    ("coefficient", "the tail is not normalised", ".logsumexp(-1) - total\n    tail", ".logsumexp(-1)\n    tail"),
    ("coefficient", "no temperature", "logits.float()) / temperature", "logits.float()) / 1"),
    ("precision", "half precision", "(logits if logits.dtype is torch.float64 else logits.float())", "logits"),
]

TEACHER = [
    ("sign", "the reward", "return mask, teacher - student", "return mask, student - teacher"),
    ("coefficient", "the student's alone", "return mask, teacher - student", "return mask, teacher"),
    ("coefficient", "gamma is 1", "returns_to_go(reward, mask, gamma, cu", "returns_to_go(reward, mask, 1.0, cu"),
    ("coefficient", "no gamma", "if gamma else reward", "if False else reward"),
    ("default", "gamma is 1", "gamma: float = 0.0", "gamma: float = 1.0"),
    (
        "coefficient",
        "the token's own reward",
        "mask & (tokens > 1), to_go - reward, 0)",
        "mask & (tokens > 1), to_go, 0)",
    ),
    ("unit", "no length", "return following / (tokens - 1).clamp(min=1)", "return following"),
    (
        "unit",
        "one token more",
        "return following / (tokens - 1).clamp(min=1)",
        "return following / tokens.clamp(min=1)",
    ),
    ("mask", "behind the last boundary", "mask = within_sequences(loss_mask, cu_seqlens)", "mask = loss_mask"),
    (
        "mask",
        "no door",
        "zero_masked(mask, logprobs.detach(), teacher_logprobs.detach())",
        "(logprobs.detach(), teacher_logprobs.detach())",
    ),
    ("stop", "the student", "logprobs.detach(), teacher_logprobs", "logprobs, teacher_logprobs"),
    ("stop", "the teacher", "teacher_logprobs.detach())", "teacher_logprobs)"),
]

NASH = "preferences.detach() - 0.5 - tau * (logps.detach() - ref_logps.detach())"
NASH_MD = [
    ("sign", "the KL", NASH, NASH.replace("- tau", "+ tau")),
    (
        "swap",
        "policy and reference",
        NASH,
        NASH.replace("logps.detach() - ref_logps.detach()", "ref_logps.detach() - logps.detach()"),
    ),
    ("coefficient", "no baseline", NASH, NASH.replace(" - 0.5", "")),
    ("coefficient", "tau is 1", NASH, NASH.replace("tau * ", "")),
    ("stop", "the policy", NASH, NASH.replace("(logps.detach()", "(logps")),
]

MUTANTS = [
    ("sft", own("sft"), SFT),
    ("sft", SHARED, ANY_TOKENS),
    ("dft", own("dft"), DFT),
    ("dft", SHARED, [*FEW, ANY_TOKENS[5]]),
    ("distillation", own("distillation"), DISTILLATION),
    ("distillation", SHARED, FEW),
    ("xpo", own("xpo"), XPO),
    ("xpo", SHARED, FEW),
    ("process_reward", SHARED, [*FEW, ANY_TOKENS[5]]),
    ("top_k", "rlloss/top_k.py", TOP_K),
    ("teacher", "rlloss/advantages/teacher.py", TEACHER),
    ("nash_md", "rlloss/advantages/nash_md.py", NASH_MD),
]
