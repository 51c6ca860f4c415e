"""Mutants of the losses with a region of trust, a square, or a choice among a step's tokens."""

MUTANTS = [
    (
        "policy_surrogates",
        "rlloss/policy_surrogates.py",
        [
            (
                "coefficient",
                "the whole square, not half of it",
                "self.tau / 2 * batch.drift * own",
                "self.tau * batch.drift * own",
            ),
            (
                "sign",
                "the square pushes away",
                "-batch.advantages * batch.logprobs + self.tau",
                "-batch.advantages * batch.logprobs - self.tau",
            ),
            ("clip", "every token its own square at any level", "batch.drift * own", "own * own"),
            ("swap", "old and reference exchanged", 'if self.anchor == "old":', 'if self.anchor != "old":'),
            (
                "swap",
                "a reference is needed only with a KL penalty",
                'self.anchor == "reference" or (self._reads_kl',
                'self.anchor == "reference" and (self._reads_kl',
            ),
            (
                "unit",
                "squares are averaged over tokens",
                'reduction = "sequence_sum"\n    ratio_level = "sequence"\n    anchor',
                'reduction = "token_mean"\n    ratio_level = "sequence"\n    anchor',
            ),
        ],
    ),
    (
        "policy",
        "rlloss/policy.py",
        [
            (
                "mask",
                "a rejected token's log-ratio to the anchor stays",
                "advantages=advantages, drift=drift)",
                "advantages=advantages)",
            ),
        ],
    ),
    (
        "kimi",
        "rlloss/losses/kimi.py",
        [
            ("coefficient", "tau doubled", "self.tau = tau", "self.tau = 2 * tau"),
            (
                "default",
                "the ratio level is not heard",
                "self.ratio_level = ratio_level",
                'self.ratio_level = "sequence"',
            ),
            ("bound", "tau may be 0", '"tau", tau, 0, open_low=True)', '"tau", tau, 0)'),
        ],
    ),
    (
        "dro",
        "rlloss/losses/dro.py",
        [
            (
                "swap",
                "the anchor is not heard",
                "self.tau, self.anchor = tau, anchor",
                'self.tau, self.anchor = tau, "reference"',
            ),
            (
                "default",
                "anchored at the old policy",
                'anchor: Literal["reference", "old"] = "reference"',
                'anchor: Literal["reference", "old"] = "old"',
            ),
            (
                "default",
                "the ratio level is not heard",
                "self.ratio_level = ratio_level",
                'self.ratio_level = "sequence"',
            ),
        ],
    ),
    (
        "a_star_po",
        "rlloss/losses/a_star_po.py",
        [
            ("sign", "advantages are added", "batch.drift - batch.advantages", "batch.drift + batch.advantages"),
            ("coefficient", "least absolute error", ".square()", ".abs()"),
            (
                "coefficient",
                "beta scales the advantage too",
                "(self.beta * batch.drift - batch.advantages)",
                "(self.beta * (batch.drift - batch.advantages))",
            ),
            ("unit", "the square once per token", 'reduction = "sequence_mean"', 'reduction = "sequence_sum"'),
            ("swap", "anchored at the old policy", 'anchor = "reference"', 'anchor = "old"'),
        ],
    ),
    (
        "optimal_value",
        "rlloss/advantages/optimal_value.py",
        [
            ("bound", "measured from the smallest reward", 'rows.extreme(x, "amax")', 'rows.extreme(x, "amin")'),
            ("coefficient", "times beta inside", "(x - best) / beta)", "(x - best) * beta)"),
            ("coefficient", "no logarithm", "torch.log1p(excess)", "excess"),
            ("mask", "a prompt without rows is worth 0", "value, torch.nan)", "value, 0)"),
            ("stop", "the value carries a gradient", "rewards.detach()", "rewards"),
        ],
    ),
    (
        "cpgd",
        "rlloss/losses/cpgd.py",
        [
            ("bound", "the room below is no log", "math.log1p(-self.clip_eps_low)", "-self.clip_eps_low"),
            ("bound", "the room above is no log", "high = math.log1p(self.clip_eps_high)", "high = self.clip_eps_high"),
            ("clip", "optimistic, not pessimistic", "torch.maximum(-log_ratio", "torch.minimum(-log_ratio"),
            (
                "stop",
                "the drift's ratio carries a gradient",
                "excess = batch.ratio.detach() - 1",
                "excess = batch.ratio - 1",
            ),
            (
                "clip",
                "the drift is cut on both sides",
                "excess.clamp(max=self.drift_clip)",
                "excess.clamp(-self.drift_clip, self.drift_clip)",
            ),
            (
                "sign",
                "the drift drives away",
                "return token_loss + self.drift_coef",
                "return token_loss - self.drift_coef",
            ),
        ],
    ),
    (
        "dppo",
        "rlloss/losses/dppo.py",
        [
            (
                "swap",
                "a token that comes back is cut",
                "(batch.advantages > 0) & (batch.log_ratio > 0)",
                "(batch.advantages > 0) & (batch.log_ratio < 0)",
            ),
            (
                "bound",
                "at the threshold is beyond",
                "divergence > self.threshold_high",
                "divergence >= self.threshold_high",
            ),
            (
                "default",
                "one threshold for both signs",
                "divergence > self.threshold_low)",
                "divergence > self.threshold_high)",
            ),
            (
                "stop",
                "a capped token teaches nothing",
                "/ batch.ratio.detach()).clamp(max=1)",
                "/ batch.ratio).clamp(max=1)",
            ),
            ("coefficient", "the KL weighs by the new policy", "old.exp() * (old - new)", "new.exp() * (old - new)"),
            ("coefficient", "the other tokens' part turned around", "old_rest / rest)", "rest / old_rest)"),
            (
                "bound",
                "a probability of 1 has an infinite divergence",
                ".clamp(max=-torch.finfo(new.dtype).tiny)",
                ".clamp(max=0)",
            ),
        ],
    ),
    (
        "opsm",
        "rlloss/losses/opsm.py",
        [
            (
                "sign",
                "masks what has become more likely",
                "sequence_mean(-batch.log_ratio",
                "sequence_mean(batch.log_ratio",
            ),
            ("sign", "masks good answers", "(batch.advantages < 0) & (fallen", "(batch.advantages > 0) & (fallen"),
            ("bound", "at the threshold is masked", "fallen > self.threshold", "fallen >= self.threshold"),
            (
                "mask",
                "nothing is dropped",
                "torch.where(is_masked, 0, token_loss)",
                "torch.where(is_masked, 1, 1) * token_loss",
            ),
            ("unit", "averaged over all tokens", 'reduction = "sequence_mean"', 'reduction = "token_mean"'),
        ],
    ),
    (
        "decoupled_ppo",
        "rlloss/losses/decoupled_ppo.py",
        [
            (
                "sign",
                "the weight turned around",
                "batch.old_logprobs - batch.rollout_logprobs",
                "batch.rollout_logprobs - batch.old_logprobs",
            ),
            (
                "bound",
                "the weight has no cap",
                "self._rollout_ratio(batch).clamp(max=self.ratio_max)",
                "self._rollout_ratio(batch)",
            ),
            ("weight", "the caller's weights are lost", "else weights * batch.token_weights", "else weights"),
            (
                "bound",
                "an unbounded exponential",
                "bounded(batch.old_logprobs - batch.rollout_logprobs, self.max_log_ratio).exp()",
                "(batch.old_logprobs - batch.rollout_logprobs).exp()",
            ),
            ("swap", "the sampler's log-probs are refused", "needs_rollout = True", "needs_rollout = False"),
        ],
    ),
    (
        "clip_cov",
        "rlloss/losses/clip_cov.py",
        [
            ("bound", "covariances below the least", "covariance >= self.cov_min", "covariance <= self.cov_min"),
            ("bound", "no largest covariance", "covariance <= self.cov_max", "covariance <= torch.inf"),
            (
                "coefficient",
                "a share of the candidates",
                "share_of(counted, self.fraction)",
                "share_of(candidates, self.fraction)",
            ),
            ("default", "the seed is not heard", "token_hash(counted, self.seed)", "token_hash(counted, 0)"),
            (
                "coefficient",
                "what is drawn goes on teaching",
                "torch.where(batch.selected, 0, token_loss)",
                "torch.where(batch.selected, 1, 1) * token_loss",
            ),
            (
                "mask",
                "rejected tokens may be drawn and are counted",
                "candidates = counted & (",
                "candidates = batch.loss_mask & (",
            ),
        ],
    ),
    (
        "kl_cov",
        "rlloss/losses/kl_cov.py",
        [
            ("layout", "the smallest covariances", "first_ranked(-covariance", "first_ranked(covariance"),
            (
                "coefficient",
                "the KL turned around",
                "kl_k3(batch.old_logprobs, batch.logprobs,",
                "kl_k3(batch.logprobs, batch.old_logprobs,",
            ),
            (
                "coefficient",
                "every token pays",
                "torch.where(batch.selected, self.penalty_coef * penalty, 0)",
                "self.penalty_coef * penalty",
            ),
            ("weight", "the weight is not heard", "self.penalty_coef * penalty", "penalty"),
            ("sign", "ascends the loss", "- batch.ratio * batch.advantages", "+ batch.ratio * batch.advantages"),
        ],
    ),
    (
        "m2po",
        "rlloss/losses/m2po.py",
        [
            ("clip", "tokens without advantage are in the region", "* batch.log_ratio > 0)", "* batch.log_ratio >= 0)"),
            (
                "clip",
                "every token is in the region",
                "counted & (batch.advantages.sign() * batch.log_ratio > 0)",
                "counted & (batch.advantages.sign() < 2)",
            ),
            ("bound", "at the threshold is beyond", "moment > self.threshold", "moment >= self.threshold"),
            (
                "coefficient",
                "each token's own square",
                "ascending.cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)",
                "ascending",
            ),
            ("coefficient", "the first moment", ".double().square().sort()", ".double().abs().sort()"),
            (
                "mask",
                "tokens outside the region are cut",
                "is_cut.view_as(counted) & candidates",
                "is_cut.view_as(counted)",
            ),
            (
                "coefficient",
                "what is cut goes on teaching",
                "torch.where(batch.selected, 0, -batch.ratio * batch.advantages)",
                "-batch.ratio * batch.advantages",
            ),
        ],
    ),
    (
        "selection",
        "rlloss/selection.py",
        [
            ("layout", "one more than the number", "rank.view_as(among) < number", "rank.view_as(among) <= number"),
            ("coefficient", "rounded up", "fraction).floor()", "fraction).ceil()"),
            ("coefficient", "log-probs are not centred", "centred(logprobs) * centred", "logprobs * centred"),
            ("coefficient", "advantages are not centred", "* centred(advantages)", "* advantages"),
            (
                "layout",
                "positions in the tensor, padding included",
                "counted.flatten().cumsum(0) - 1",
                "torch.arange(counted.numel())",
            ),
            ("layout", "the seed is not heard", "_mixed(seed ^ 0x9E3779B9)", "0x9E3779B9"),
        ],
    ),
]
