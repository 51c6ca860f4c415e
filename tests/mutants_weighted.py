"""Mutants of the losses that weigh, smooth or average the ratio: what each has of its own."""

MUTANTS = [
    (
        "a2c",
        "rlloss/losses/a2c.py",
        [
            ("default", "entropy_coef is 0.1", "= 0.01, **options", "= 0.1, **options"),
            (
                "coefficient",
                "the bonus is lost",
                "super().__init__(entropy_coef=entropy_coef, **options)",
                "super().__init__(entropy_coef=0.0, **options)",
            ),
            ("unit", "means over sequences", 'reduction = "token_mean"', 'reduction = "sequence_mean"'),
        ],
    ),
    (
        "gpg",
        "rlloss/losses/gpg.py",
        [
            ("unit", "means over sequences", 'reduction = "token_mean"', 'reduction = "sequence_mean"'),
            ("unit", "sums over sequences", 'reduction = "token_mean"', 'reduction = "sequence_sum"'),
        ],
    ),
    (
        "cispo",
        "rlloss/losses/cispo.py",
        [
            (
                "clip",
                "no largest weight",
                "held_ratio(batch, self.ratio_min, self.ratio_max)",
                "held_ratio(batch, self.ratio_min, 1e9)",
            ),
            (
                "clip",
                "no least weight",
                "held_ratio(batch, self.ratio_min, self.ratio_max)",
                "held_ratio(batch, 0.0, self.ratio_max)",
            ),
            ("swap", "ratio_min and ratio_max", "= ratio_min, ratio_max", "= ratio_max, ratio_min"),
            ("bound", "a bound of 1 is taken", "if ratio_max <= 1:", "if ratio_max < 1:"),
            ("default", "ratio_min is 0.1", "ratio_min: float = 0.0", "ratio_min: float = 0.1"),
            (
                "default",
                "tinker holds at 5",
                '"tinker": {"ratio_min": 0.0, "ratio_max": 4.0}',
                '"tinker": {"ratio_min": 0.0, "ratio_max": 5.0}',
            ),
        ],
    ),
    (
        "topr",
        "rlloss/losses/topr.py",
        [
            ("sign", "the good are tapered", "batch.advantages < 0", "batch.advantages > 0"),
            (
                "clip",
                "the bad are not tapered",
                "ratio.clamp(self.negative_min, self.negative_max)",
                "torch.ones_like(ratio)",
            ),
            (
                "clip",
                "the good are weighed by their ratio",
                "ratio.clamp(self.positive_min, self.positive_max)",
                "ratio",
            ),
            ("clip", "the token's ratio", 'ratio_level = "sequence"', 'ratio_level = "token"'),
            ("default", "negative_min is 0.1", "negative_min: float = 0.0", "negative_min: float = 0.1"),
            ("metric", "clip_frac of all tokens", "batch.loss_mask & is_negative", "batch.loss_mask"),
            ("unit", "means over sequences", 'reduction = "sequence_sum"', 'reduction = "sequence_mean"'),
        ],
    ),
    (
        "vespo",
        "rlloss/losses/vespo.py",
        [
            ("sign", "the signs' kernels are swapped", "batch.advantages < 0", "batch.advantages >= 0"),
            ("coefficient", "the power is lost", "self.k_pos * log_w + ", ""),
            ("coefficient", "phi(1) is not 1", "self.lambda_neg * (1 - w)", "self.lambda_neg * -w"),
            ("clip", "the geometric mean", 'ratio_level = "sequence"', 'ratio_level = "geometric"'),
            ("bound", "phi's exponent is free", "log_phi.clamp(max=self.max_log_ratio).exp()", "log_phi.exp()"),
            ("default", "k_neg is 2", "k_neg: float = 3.0", "k_neg: float = 2.0"),
            ("unit", "sums over sequences", 'reduction = "token_mean"', 'reduction = "sequence_sum"'),
        ],
    ),
    (
        "sapo",
        "rlloss/losses/sapo.py",
        [
            ("sign", "the surrogate", "return -4 / tau", "return 4 / tau"),
            ("coefficient", "not scaled to a slope of 1", "return -4 / tau * p", "return -4 * p"),
            ("sign", "tau of the other sign", "batch.advantages > 0", "batch.advantages < 0"),
            ("sign", "0 has the gate of the positive", "batch.advantages > 0", "batch.advantages >= 0"),
            ("default", "tau_neg is 1", "tau_neg: float = 1.05", "tau_neg: float = 1.0"),
            ("metric", "gate without its 4", "Mean.of(4 * p * (1 - p)", "Mean.of(p * (1 - p)"),
        ],
    ),
    (
        "gspo_token",
        "rlloss/losses/gspo_token.py",
        [
            ("stop", "the sequence's ratio", "batch.log_ratio.detach() + nothing", "batch.log_ratio + nothing"),
            ("stop", "no gradient but the sequence's", "batch.log_ratio.detach() + nothing", "batch.log_ratio"),
            (
                "bound",
                "s_t is free",
                "bounded(batch.log_ratio.detach() + nothing, self.max_log_ratio).exp()",
                "(batch.log_ratio.detach() + nothing).exp()",
            ),
            ("clip", "the token's ratio", 'ratio_level = "geometric"', 'ratio_level = "token"'),
            ("unit", "sums over sequences", 'reduction = "sequence_mean"', 'reduction = "sequence_sum"'),
        ],
    ),
    (
        "gmpo",
        "rlloss/losses/gmpo.py",
        [
            ("clip", "the other side is clipped", "log_ratio.clamp(max=high)", "log_ratio.clamp(min=low)"),
            ("clip", "both sides are clipped", "log_ratio.clamp(min=low)", "log_ratio.clamp(low, high)"),
            (
                "sign",
                "of the clip",
                "torch.where(advantages > 0, above, below)",
                "torch.where(advantages > 0, below, above)",
            ),
            ("bound", "the mean is free", "bounded(mean, self.max_log_ratio).exp()", "mean.exp()"),
            ("metric", "clip_frac without what is below", " | (advantages < 0) & (log_ratio < low)", ""),
            (
                "swap",
                "low and high",
                "low, high = -self.clip_log_ratio_low, self.clip_log_ratio_high",
                "low, high = -self.clip_log_ratio_high, self.clip_log_ratio_low",
            ),
            (
                "default",
                "clip_log_ratio_high is 0.5",
                "clip_log_ratio_high: float = 0.4",
                "clip_log_ratio_high: float = 0.5",
            ),
        ],
    ),
    (
        "luspo",
        "rlloss/losses/luspo.py",
        [
            ("unit", "GSPO's mean", 'reduction = "sequence_sum"', 'reduction = "sequence_mean"'),
            ("clip", "the sequence's ratio", 'ratio_level = "geometric"', 'ratio_level = "sequence"'),
            ("default", "the range of GSPO", "clip_eps_high: float = 2.5e-3", "clip_eps_high: float = 4e-4"),
            (
                "swap",
                "clip_eps_low and clip_eps_high",
                "clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high",
                "clip_eps_low=clip_eps_high, clip_eps_high=clip_eps_low",
            ),
        ],
    ),
]
