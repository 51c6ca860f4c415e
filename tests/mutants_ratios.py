"""Mutants of the ratios, the clipped surrogate and the KL estimators."""

LARGER = "torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)"
DUAL = "torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)"
BINDS = "torch.where(advantages >= 0, (ratio > high) & (advantages > 0), ratio < low)"
SURROGATE = [
    ("sign", "the unclipped term", "torch.maximum(-ratio * advantages,", "torch.maximum(ratio * advantages,"),
    ("sign", "the clipped term", "-ratio.clamp(low, high) * advantages", "ratio.clamp(low, high) * advantages"),
    ("sign", "the dual clip", "-dual_clip * advantages", "dual_clip * advantages"),
    (
        "swap",
        "clip_eps_low and clip_eps_high",
        "low, high = 1 - clip_eps_low, 1 + clip_eps_high",
        "low, high = 1 - clip_eps_high, 1 + clip_eps_low",
    ),
    (
        "swap",
        "the levels",
        'sequence_mean if level == "geometric" else sequence_sum',
        'sequence_sum if level == "geometric" else sequence_mean',
    ),
    ("clip", "always", LARGER, "-ratio.clamp(low, high) * advantages"),
    ("clip", "never", LARGER, "-ratio * advantages"),
    ("clip", "no lower bound", "ratio.clamp(low, high)", "ratio.clamp(max=high)"),
    ("clip", "no upper bound", "ratio.clamp(low, high)", "ratio.clamp(min=low)"),
    ("clip", "the dual clip binds for every advantage", DUAL, "torch.minimum(loss, -dual_clip * advantages)"),
    ("clip", "the dual clip binds for A > 0", DUAL, DUAL.replace("advantages < 0", "advantages > 0")),
    ("clip", "the dual clip is a lower bound", DUAL, DUAL.replace("minimum", "maximum")),
    ("metric", "the dual clip is not counted", "        is_clipped |= (advantages < 0) & (ratio > dual_clip)\n", ""),
    (
        "metric",
        "the dual clip is counted at every advantage",
        "(advantages < 0) & (ratio > dual_clip)",
        "(ratio > dual_clip)",
    ),
    ("metric", "A = 0 is counted", BINDS, BINDS.replace(" & (advantages > 0)", "")),
    ("metric", "either side is counted at every advantage", BINDS, "(ratio > high) | (ratio < low)"),
    ("bound", "none", "return log_ratio.clamp(-bound, bound)", "return log_ratio"),
    ("bound", "upwards only", "return log_ratio.clamp(-bound, bound)", "return log_ratio.clamp(max=bound)"),
    ("bound", "downwards only", "return log_ratio.clamp(-bound, bound)", "return log_ratio.clamp(min=-bound)"),
    (
        "layout",
        "packs are ignored",
        "log_ratio, loss_mask, cu_seqlens), loss_mask, cu_seqlens)",
        "log_ratio, loss_mask, None), loss_mask, None)",
    ),
]

K1, K2 = "return logprobs - ref_logprobs\n", "return (logprobs - ref_logprobs).square() / 2"
K3 = "torch.expm1(log_ratio) - log_ratio"
TIMES_RATIO = '(ratio if kl_grad == "reverse" and kl != "k2" else ratio.detach()) * estimate'
LITERAL = '    if kl_grad == "literal":\n        return estimate\n'
DIVERGENCE = [
    ("sign", "k1", K1, "return ref_logprobs - logprobs\n"),
    ("sign", "k2's reference", K2, K2.replace("logprobs - ref", "logprobs + ref")),
    ("sign", "k3's linear part", K3, K3.replace(" - log", " + log")),
    ("sign", "k3", K3, "log_ratio - torch.expm1(log_ratio)"),
    ("swap", "policy and reference in k3", "bounded(ref_logprobs - logprobs,", "bounded(logprobs - ref_logprobs,"),
    ("swap", "policy and old in the ratio", "bounded(logprobs - old_logprobs", "bounded(old_logprobs - logprobs"),
    ("swap", "k1 and k2", '{"k1": kl_k1, "k2": kl_k2,', '{"k1": kl_k2, "k2": kl_k1,'),
    ("coefficient", "k2 without 1/2", K2, K2.removesuffix(" / 2")),
    ("coefficient", "k3 by exp - 1", K3, "log_ratio.exp() - 1 - log_ratio"),
    ("coefficient", "k3 without its linear part", K3, "torch.expm1(log_ratio)"),
    ("stop", "the ratio of k2 and of forward", "else ratio.detach()) * estimate", "else ratio) * estimate"),
    ("stop", "the ratio of k1 and k3 is stopped", TIMES_RATIO, "ratio.detach() * estimate"),
    ("stop", "k2's ratio alone carries a gradient", TIMES_RATIO, TIMES_RATIO.replace(' and kl != "k2"', "")),
    (
        "stop",
        "forward's ratio alone carries a gradient",
        TIMES_RATIO,
        TIMES_RATIO.replace('kl_grad == "reverse" and ', ""),
    ),
    ("weight", "no ratio", LITERAL, "    return estimate\n"),
    ("weight", "literal has a ratio", LITERAL, ""),
    ("bound", "k3 bounds its exponent alone", K3, K3.replace("- log_ratio", "- (ref_logprobs - logprobs)")),
    (
        "bound",
        "the ratio has none",
        "ratio = bounded(logprobs - old_logprobs, max_log_ratio).exp()",
        "ratio = (logprobs - old_logprobs).exp()",
    ),
    ("bound", "k3's is 20", "kl_k3(logprobs, ref_logprobs, max_log_ratio)", "kl_k3(logprobs, ref_logprobs)"),
    (
        "default",
        "k3's is 10",
        '    logprobs: Float[Tensor, "*tokens"], ref_logprobs: Float[Tensor, "*tokens"], max_log_ratio: float = 20.0',
        '    logprobs: Float[Tensor, "*tokens"], ref_logprobs: Float[Tensor, "*tokens"], max_log_ratio: float = 10.0',
    ),
    ("default", "the term is k2", 'kl: KLEstimator = "k3"', 'kl: KLEstimator = "k2"'),
    ("default", "the term is literal", 'kl_grad: KLGradient = "reverse"', 'kl_grad: KLGradient = "literal"'),
]

MUTANTS = [
    ("surrogate", "rlloss/surrogate.py", SURROGATE),
    ("divergence", "rlloss/divergence.py", DIVERGENCE),
]
