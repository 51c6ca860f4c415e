"""Mutants of what stands beside advantages: the recurrence of GAE and its scan, whiten, shaping, running."""

RECURRENCE = [
    ("layout", "the partner before", "even_b[..., 1:], cuts", "even_b[..., :-1], cuts"),
    (
        "layout",
        "the last token of an odd length",
        "behind = odd_b.shape[-1], even_b.shape[-1] - 1",
        "behind = odd_b.shape[-1] - 1, even_b.shape[-1] - 1",
    ),
    ("clip", "NaN passes the end of a sequence", "torch.where(a == 0, 0, a * y)", "a * y"),
    ("clip", "float64 is refused", "implementation(impl, b, dtype=torch.float32)", "implementation(impl, b)"),
]

AT = "(chunk + 1) * blocks - 1 - step"
SCAN = [
    ("sign", "what stands behind is taken away", "return b + a *", "return b - a *"),
    ("swap", "the order of two steps", "_step(a, b, b_behind)", "_step(a_behind, b_behind, b)"),
    ("swap", "two steps have the decay of the one in front", "return a * a_behind,", "return a,"),
    ("clip", "NaN passes the end of a sequence", "tl.where(a == 0, 0.0, y)", "y"),
    ("clip", "folds in float32", "chunks, dtype=torch.float64", "chunks, dtype=torch.float32"),
    (
        "clip",
        "the y behind a chunk in float32",
        "other=0.0).to(tl.float64)\n    for",
        "other=0.0).to(tl.float32).to(tl.float64)\n    for",
    ),
    ("layout", "blocks run forward", "(BLOCK - 1 - tl.arange(0, BLOCK))", "tl.arange(0, BLOCK)"),
    ("layout", "a chunk is walked from its first block", AT, "chunk * blocks + step", {"times": 2}),
    ("layout", "a block's last token is handed on", "== BLOCK - 1, x, 0.0)", "== 0, x, 0.0)"),
    ("layout", "a chunk is handed its own y", "tl.load(behind + program + 1", "tl.load(behind + program"),
    ("layout", "a row runs into the next", "mask=chunk + 1 < chunks", "mask=program + 1 < tl.num_programs(0)"),
    ("layout", "a chunk's blocks are not joined", "y = _last(solution, BLOCK)", "pass"),
    ("layout", "a fold is that of its first block", "product *= _last(decay, BLOCK)", "product = _last(decay, BLOCK)"),
    ("layout", "a fold forgets the blocks behind", "_last(_step(decay, worth, y), BLOCK)", "_last(worth, BLOCK)"),
    ("layout", "folds are not solved", "        _scan_rows_(fold_a, behind)\n", ""),
    (
        "layout",
        "the last chunk is not there",
        "chunks = triton.cdiv(columns, blocks * BLOCK)",
        "chunks = columns // (blocks * BLOCK) or 1",
    ),
    ("layout", "strided rows are solved in a copy", "        b.copy_(y)", "        pass"),
    (
        "mask",
        "what lies behind a row is seen",
        "worth = tl.load(b + t, mask=t < columns, other=0.0)",
        "worth = tl.load(b + t)",
    ),
]

WHITENED = "centred * (sample_variance(moments) + eps).rsqrt()"
WHITEN = [
    ("sign", "the mean", "centred = x - mean", "centred = x + mean"),
    ("sign", "the mean added back", "whitened + moments.mean", "whitened - moments.mean"),
    ("swap", "center is turned around", "whitened if center else", "whitened if not center else"),
    ("coefficient", "the variance with n", "(moments.count - 1).clamp(min=1)", "moments.count.clamp(min=1)"),
    ("coefficient", "the variance in place of the deviation", WHITENED, WHITENED.replace(".rsqrt()", ".reciprocal()")),
    ("coefficient", "multiplied by the deviation", WHITENED, WHITENED.replace("rsqrt", "sqrt")),
    ("coefficient", "eps is ignored", WHITENED, WHITENED.replace(" + eps", " + 1e-12")),
    ("coefficient", "eps is added to the deviation", WHITENED, "centred / (sample_variance(moments).sqrt() + eps)"),
    (
        "unit",
        "the given moments are ignored",
        "Moments.of(values, mask) if moments is None else moments",
        "Moments.of(values, mask)",
    ),
    ("clip", "rounding is blown up", "torch.where(centred.abs() <= rounding(mean), 0, centred)", "centred"),
    ("mask", "masked values have a say", "Moments.of(values, mask) if", "Moments.of(values, torch.ones_like(mask)) if"),
    (
        "mask",
        "masked positions are filled",
        "torch.where(mask, whitened if center else whitened + moments.mean, 0)",
        "(whitened if center else whitened + moments.mean)",
    ),
    (
        "mask",
        "tokens behind a pack's last boundary count",
        "mask = within_sequences(loss_mask, cu_seqlens)",
        "mask = loss_mask",
    ),
    ("stop", "x", "x.detach()", "x"),
    ("default", "center is False", "center: bool = True", "center: bool = False"),
    ("default", "eps is 1e-6", "eps: float = 1e-8", "eps: float = 1e-6"),
]

AT_THE_LAST = "torch.where(last_tokens(mask, cu_seqlens), to_tokens(rewards, mask, cu_seqlens), 0)"
SHAPED = "rewards - coef * kl.detach()"
PENALTY = "penalty * ((max_length - buffer_length - lengths) / buffer_length).clamp(-1, 0)"
SHAPING = [
    ("sign", "the KL's cost", SHAPED, SHAPED.replace(" - ", " + ")),
    ("sign", "the reward", SHAPED, "-" + SHAPED),
    ("coefficient", "kl_coef is 1", SHAPED, SHAPED.replace("coef * ", "")),
    ("swap", "reward and KL", "torch.where(mask, " + SHAPED, "torch.where(mask, kl.detach() - coef * rewards"),
    ("stop", "rewards", "rewards.detach()", "rewards"),
    ("stop", "kl", "coef * kl.detach()", "coef * kl"),
    ("stop", "kl_coef", "coef = kl_coef.detach() if", "coef = kl_coef if"),
    (
        "unit",
        "every token earns the sequence's reward",
        AT_THE_LAST,
        "to_tokens(rewards, mask, cu_seqlens)",
    ),
    (
        "unit",
        "a reward per token counts at the last alone",
        "    if not per_token:\n        rewards = " + AT_THE_LAST,
        "    rewards = rewards if per_token else to_tokens(rewards, mask, cu_seqlens)\n"
        "    rewards = torch.where(last_tokens(mask, cu_seqlens), rewards, 0)",
    ),
    ("mask", "masked positions pay", "torch.where(mask, " + SHAPED + ", 0)", "(" + SHAPED + ")"),
    (
        "mask",
        "tokens behind a pack's last boundary count",
        "within_sequences(loss_mask, cu_seqlens), rewards",
        "loss_mask, rewards",
    ),
    ("sign", "the overlong penalty", PENALTY, "-" + PENALTY),
    ("clip", "the penalty grows beyond max_length", PENALTY, PENALTY.replace("clamp(-1, 0)", "clamp(max=0)")),
    ("clip", "short answers are rewarded", PENALTY, PENALTY.replace("clamp(-1, 0)", "clamp(min=-1)")),
    (
        "coefficient",
        "the penalty grows from max_length",
        PENALTY,
        PENALTY.replace("max_length - buffer_length - lengths", "max_length - lengths"),
    ),
    ("coefficient", "the penalty is 1", PENALTY, PENALTY.removeprefix("penalty * ")),
    ("coefficient", "over max_length, not the buffer", PENALTY, PENALTY.replace("/ buffer_length", "/ max_length")),
    (
        "swap",
        "max_length and buffer_length",
        PENALTY,
        PENALTY.replace("max_length - buffer_length", "buffer_length - max_length"),
    ),
    ("default", "the penalty is 0.5", "penalty: float = 1.0", "penalty: float = 0.5"),
]

ERROR = "error = (kl / self.target_kl - 1).clamp(-0.2, 0.2)"
STEP = "self.kl_coef * (1 + error * (n / self.horizon))"
NORMALISED = "((deviation(x, self.mean) if self.center else x) * scale)"
SPREAD = "has_spread = variance > rounding(self.mean).square()"
RUNNING = [
    ("sign", "the error", STEP, STEP.replace("1 + error", "1 - error")),
    ("swap", "KL and target", ERROR, ERROR.replace("kl / self.target_kl", "self.target_kl / kl")),
    ("swap", "n and horizon", STEP, STEP.replace("n / self.horizon", "self.horizon / n")),
    (
        "coefficient",
        "the difference, not relative to the target",
        ERROR,
        ERROR.replace("kl / self.target_kl - 1", "kl - self.target_kl"),
    ),
    ("coefficient", "the step adds to the coefficient", STEP, STEP.replace("self.kl_coef * (1 +", "self.kl_coef + (")),
    ("coefficient", "n is ignored", STEP, STEP.replace("n / self.horizon", "1 / self.horizon")),
    ("clip", "the error has no bounds", ERROR, ERROR.removesuffix(".clamp(-0.2, 0.2)")),
    ("clip", "the error has no lower bound", ERROR, ERROR.replace("clamp(-0.2, 0.2)", "clamp(max=0.2)")),
    ("clip", "the error's bounds are 0.1", ERROR, ERROR.replace("clamp(-0.2, 0.2)", "clamp(-0.1, 0.1)")),
    ("stop", "the KL", "kl.detach().to(self.kl_coef)", "kl.to(self.kl_coef)"),
    ("default", "horizon is 1000", "horizon: int = 10000", "horizon: int = 1000"),
    (
        "unit",
        "the coefficient is float32",
        'self.register_buffer("kl_coef", torch.tensor(init_kl_coef, dtype=torch.float64))',
        'self.register_buffer("kl_coef", torch.tensor(init_kl_coef))',
    ),
    (
        "unit",
        "the coefficient is not saved",
        "torch.tensor(init_kl_coef, dtype=torch.float64))",
        "torch.tensor(init_kl_coef, dtype=torch.float64), persistent=False)",
    ),
    ("unit", "the fixed coefficient is saved", ", persistent=False)", ")"),
    (
        "swap",
        "the fixed coefficient takes the KL",
        '        """Does nothing."""',
        '        """Does nothing."""\n        self.kl_coef = torch.as_tensor(kl).to(self.kl_coef)',
    ),
    ("sign", "the mean of all rewards is not taken off", NORMALISED, "(x * scale)"),
    ("swap", "center is turned around", NORMALISED, NORMALISED.replace("if self.center", "if not self.center")),
    (
        "coefficient",
        "the variance in place of the deviation",
        "(variance + self.eps).rsqrt()",
        "(variance + self.eps).reciprocal()",
    ),
    ("coefficient", "eps is ignored", "(variance + self.eps).rsqrt()", "(variance + 1e-12).rsqrt()"),
    (
        "coefficient",
        "a step replaces all before it",
        "self.count, self.mean, self.m2 = self.moments + step",
        "self.count, self.mean, self.m2 = step",
    ),
    (
        "clip",
        "no spread is blown up",
        "torch.where(has_spread, (variance + self.eps).rsqrt(), 1)",
        "(variance + self.eps).rsqrt()",
    ),
    ("clip", "rounding is a spread", SPREAD, "has_spread = variance > 0"),
    ("stop", "the moments", "x.detach().to(self.mean)", "x.to(self.mean)"),
    ("stop", "rewards", "rewards.detach().double()", "rewards.double()"),
    ("unit", "float32", "rewards.detach().double()", "rewards.detach()"),
    ("default", "center is False", "center: bool = True", "center: bool = False"),
    ("default", "eps is 1e-6", "eps: float = 1e-8", "eps: float = 1e-6"),
]

MUTANTS = [
    ("recurrence", "kernels/rlloss_kernels/recurrence.py", RECURRENCE),
    ("scan", "kernels/rlloss_kernels/gpu/scan.py", SCAN),
    ("whiten", "rlloss/advantages/whiten.py", WHITEN),
    ("shaping", "rlloss/advantages/shaping.py", SHAPING),
    ("running", "rlloss/advantages/running.py", RUNNING),
]
