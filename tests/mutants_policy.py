"""Mutants of the policy losses: what they share, judged by the tests of each of them, and what each has of its own."""

SHARED = "rlloss/policy.py"
SURROGATE = "rlloss/surrogate.py"
LOSSES = ["ppo", "dapo", "reinforce", "rloo", "grpo", "dr_grpo", "gspo", "conservative_ppo"]
CLIPPED = [loss for loss in LOSSES if loss != "reinforce"]


def own(loss):
    return f"rlloss/losses/{loss}.py"


WITH_GRADIENT = '_WITH_GRADIENT = {"ref_kl", "entropy"}'
BODY = [
    ("sign", "the KL term", "token_loss + self.kl_coef", "token_loss - self.kl_coef"),
    ("coefficient", "kl_coef is 1", "self.kl_coef * self.ref_kl(accepted)", "self.ref_kl(accepted)"),
    ("stop", "old_logprobs", "old_logprobs.detach(), advantages.detach()", "old_logprobs, advantages.detach()"),
    ("stop", "advantages", "old_logprobs.detach(), advantages.detach()", "old_logprobs.detach(), advantages"),
    ("stop", "ref_logprobs", WITH_GRADIENT, WITH_GRADIENT.replace("{", '{"ref_logprobs", ')),
    ("stop", "token_weights", WITH_GRADIENT, WITH_GRADIENT.replace("{", '{"token_weights", ')),
    (
        "weight",
        "surrogate and KL are not weighted",
        "        token_loss = weighted(token_loss, batch.token_weights)\n",
        "",
    ),
    ("default", "kl_grad is literal", 'kl_grad: KLGradient = "reverse"', 'kl_grad: KLGradient = "literal"'),
]
RATIO = [
    (
        "swap",
        "policy and old in the ratio",
        "log_ratio = logprobs - old_logprobs",
        "log_ratio = old_logprobs - logprobs",
    ),
]
REFERENCE = [
    ("swap", "policy and reference in k3", "bounded(ref_logprobs - logprobs,", "bounded(logprobs - ref_logprobs,"),
]
DOOR = [("mask", "no door", "return tuple(torch.where(loss_mask, x, 0) for x in tensors)", "return tensors")]
CLIP_BODY = [
    (
        "sign",
        "the surrogate",
        "torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)",
        "torch.maximum(ratio * advantages, ratio.clamp(low, high) * advantages)",
    ),
    ("clip", "the smaller of both terms", "loss = torch.maximum(", "loss = torch.minimum("),
]
PASSED_ON = "clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip"
CLIP_CHOICES = [
    (
        "swap",
        "clip_eps_low and clip_eps_high",
        PASSED_ON,
        "clip_eps_low=clip_eps_high, clip_eps_high=clip_eps_low, dual_clip=dual_clip",
    ),
    ("clip", "dual_clip is lost", "dual_clip=dual_clip", "dual_clip=None"),
    ("default", "dual_clip is 3", "dual_clip: float | None = None", "dual_clip: float | None = 3.0"),
]
SAME_RANGE = [
    ("default", "clip_eps_low is 0.1", "clip_eps_low: float = 0.2", "clip_eps_low: float = 0.1"),
    ("default", "clip_eps_high is 0.28", "clip_eps_high: float = 0.2,", "clip_eps_high: float = 0.28,"),
]

TOKEN_MEAN, SEQUENCE_MEAN = 'reduction = "token_mean"', 'reduction = "sequence_mean"'
SEQUENCE_SUM = 'reduction = "sequence_sum"'
BY_SEQUENCES = ("unit", "a mean over sequences of token means", TOKEN_MEAN, SEQUENCE_MEAN)
BY_TOKENS = ("unit", "a mean over tokens", SEQUENCE_MEAN, TOKEN_MEAN)
SUMS_BY_SEQUENCES = ("unit", "sums over tokens, not means", SEQUENCE_MEAN, SEQUENCE_SUM)
OWN = [
    ("ppo", [BY_SEQUENCES, *SAME_RANGE]),
    (
        "dapo",
        [
            BY_SEQUENCES,
            ("default", "clip_eps_low is 0.28", "clip_eps_low: float = 0.2", "clip_eps_low: float = 0.28"),
            ("default", "clip_eps_high is 0.2", "clip_eps_high: float = 0.28", "clip_eps_high: float = 0.2"),
        ],
    ),
    (
        "reinforce",
        [
            ("unit", "a mean over tokens", SEQUENCE_SUM, TOKEN_MEAN),
            ("unit", "means over a sequence's tokens, not sums", SEQUENCE_SUM, SEQUENCE_MEAN),
            ("unit", "sums over everything", SEQUENCE_SUM, 'reduction = "sum"'),
        ],
    ),
    (
        "rloo",
        [
            BY_TOKENS,
            SUMS_BY_SEQUENCES,
            *SAME_RANGE,
            ("clip", "a ratio per token", '    ratio_level = "sequence"\n', ""),
            ("clip", "the geometric mean", 'ratio_level = "sequence"', 'ratio_level = "geometric"'),
        ],
    ),
    ("grpo", [BY_TOKENS, SUMS_BY_SEQUENCES, *SAME_RANGE]),
    (
        "dr_grpo",
        [
            *SAME_RANGE,
            *(
                (
                    "unit",
                    change,
                    'reduction = "fixed_length"',
                    new,
                    {"also": (("self.max_length = max_completion_length", "self.max_length = None"),)},
                )
                for change, new in [
                    ("a mean over tokens", TOKEN_MEAN),
                    ("each sequence's own length", SEQUENCE_MEAN),
                    ("no length at all", SEQUENCE_SUM),
                ]
            ),
            (
                "coefficient",
                "the constant is another",
                "self.max_length = max_completion_length",
                "self.max_length = max_completion_length + 1",
            ),
        ],
    ),
    (
        "gspo",
        [
            BY_TOKENS,
            SUMS_BY_SEQUENCES,
            ("default", "clip_eps_low is 4e-4", "clip_eps_low: float = 3e-4", "clip_eps_low: float = 4e-4"),
            ("default", "clip_eps_high is 3e-4", "clip_eps_high: float = 4e-4", "clip_eps_high: float = 3e-4"),
            ("clip", "a ratio per token", '    ratio_level = "geometric"\n', ""),
            ("clip", "the whole sequence's product", 'ratio_level = "geometric"', 'ratio_level = "sequence"'),
        ],
    ),
    ("conservative_ppo", [BY_SEQUENCES, *SAME_RANGE]),
]

WEIGHTED = "return -weights.detach() * batch.advantages * batch.logprobs, metrics"
WEIGHTED_BODY = [
    ("sign", "the surrogate", WEIGHTED, WEIGHTED.replace("-weights", "weights")),
    ("coefficient", "twice", WEIGHTED, WEIGHTED.replace("-weights", "-2 * weights")),
    ("clip", "the ratio in place of the log-prob", WEIGHTED, WEIGHTED.replace("batch.logprobs", "batch.ratio")),
    ("stop", "the log-prob", WEIGHTED, WEIGHTED.replace("batch.logprobs", "batch.logprobs.detach()")),
]

MUTANTS = [
    *((loss, own(loss), rows) for loss, rows in OWN),
    *((loss, own(loss), CLIP_CHOICES) for loss in CLIPPED),
    *((loss, SURROGATE, CLIP_BODY) for loss in CLIPPED),
    *((loss, "rlloss/policy_surrogates.py", WEIGHTED_BODY) for loss in ["reinforce"]),
    *((loss, SURROGATE, RATIO) for loss in LOSSES),
    *((loss, "rlloss/divergence.py", REFERENCE) for loss in LOSSES),
    *((loss, "rlloss/reduce.py", DOOR) for loss in LOSSES),
    *((loss, SHARED, BODY) for loss in LOSSES),
]
