"""Mutants of what the policy losses share, and of what the losses over pairs share."""

DOOR = """        logprobs, old_logprobs, advantages = zero_masked(
            loss_mask, logprobs, old_logprobs.detach(), advantages.detach()
        )
"""
ENTERED = "zero_masked(loss_mask, x if name in _WITH_GRADIENT else x.detach())[0]"


def past_the_door(name):
    bare = f'(x if name in _WITH_GRADIENT else x.detach()) if name == "{name}" else {ENTERED}'
    return ("mask", f"{name} passes the door", f"entered[name] = {ENTERED}", f"entered[name] = {bare}")


RAW = DOOR.replace("        logprobs, old", "        raw = logprobs\n        logprobs, old")
BOUNDED = "ratio=bounded(log_ratio, self.max_log_ratio).exp(),"
MASKED_LATE = (
    'ratio=zero_masked(loss_mask, ({}).exp())[0] if self.ratio_level == "token"'
    " else bounded(log_ratio, self.max_log_ratio).exp(),"
)
WEIGHTED = "        token_loss = weighted(token_loss, batch.token_weights)\n"
REJECTED = "logprobs, advantages = zero_masked(accepted, batch.logprobs, batch.advantages)"
BONUS = "self._entropy_weight(batch.entropy) * batch.entropy"
APPROX_KL = "kl_k3(batch.old_logprobs, batch.logprobs, self.max_log_ratio)"
REF_KL = "kl_k3(batch.logprobs, batch.ref_logprobs, self.max_log_ratio)"
CLIP_FRAC = "Mean.of(is_clipped.to(token_loss.dtype), batch.loss_mask)"

POLICY = [
    ("sign", "the entropy bonus", "token_loss - self._entropy", "token_loss + self._entropy"),
    ("coefficient", "entropy_coef is 1", BONUS, "batch.entropy"),
    ("default", "kl is k2", 'kl: KLEstimator = "k3"', 'kl: KLEstimator = "k2"'),
    ("default", "kl_coef is 0.04", "kl_coef: float = 0.0", "kl_coef: float = 0.04"),
    ("default", "entropy_coef is 0.01", "AdaptiveEntropyController = 0.0", "AdaptiveEntropyController = 0.01"),
    ("default", "max_log_ratio is 10", "max_log_ratio: float = 20.0", "max_log_ratio: float = 10.0"),
    (
        "weight",
        "the KL term is not weighted",
        WEIGHTED,
        "        bare = self.kl_coef * self.ref_kl(accepted) if self.kl_coef else 0\n"
        "        token_loss = weighted(token_loss - bare, batch.token_weights) + bare\n",
    ),
    (
        "weight",
        "the entropy bonus is weighted",
        BONUS,
        BONUS.replace("* batch.entropy", "* weighted(batch.entropy, batch.token_weights)"),
    ),
    (
        "weight",
        "a rejected token enters",
        "    if batch.token_weights is None:\n        return batch\n",
        "    return batch\n",
    ),
    (
        "weight",
        "a rejected token's advantage enters",
        REJECTED,
        "(logprobs,) = zero_masked(accepted, batch.logprobs)\n    advantages = batch.advantages",
    ),
    (
        "weight",
        "a rejected token's logprobs enter",
        REJECTED,
        "(advantages,) = zero_masked(accepted, batch.advantages)\n    logprobs = batch.logprobs",
    ),
    ("weight", "weights leave the metrics", "self._metrics(batch) | metrics", "self._metrics(accepted) | metrics"),
    ("stop", "the ratio", "self.max_log_ratio).exp(),\n", "self.max_log_ratio).exp().detach(),\n"),
    (
        "stop",
        "the entropy carries no gradient",
        '_WITH_GRADIENT = {"ref_kl", "entropy"}',
        '_WITH_GRADIENT = {"ref_kl"}',
    ),
    (
        "mask",
        "logprobs pass the door",
        DOOR,
        "        old_logprobs, advantages = zero_masked(loss_mask, old_logprobs.detach(), advantages.detach())\n",
    ),
    (
        "mask",
        "old_logprobs pass the door",
        DOOR,
        "        logprobs, advantages = zero_masked(loss_mask, logprobs, advantages.detach())\n"
        "        old_logprobs = old_logprobs.detach()\n",
    ),
    (
        "mask",
        "advantages pass the door",
        DOOR,
        "        logprobs, old_logprobs = zero_masked(loss_mask, logprobs, old_logprobs.detach())\n"
        "        advantages = advantages.detach()\n",
    ),
    *map(past_the_door, ("ref_logprobs", "entropy", "token_weights")),
    (*past_the_door("ref_kl"), {"reason": "the loss is linear in it, and the reduction masks the sum"}),
    (
        "stop",
        "the exact KL carries no gradient",
        '_WITH_GRADIENT = {"ref_kl", "entropy"}',
        '_WITH_GRADIENT = {"entropy"}',
    ),
    ("swap", "an exact KL is not read", "        kl = batch.ref_kl\n", "        kl = None\n"),
    (
        "mask",
        "tokens behind a pack's last boundary count",
        "        loss_mask = within_sequences(loss_mask, cu_seqlens)\n",
        "",
    ),
    (
        "mask",
        "the ratio is masked after exp, unbounded",
        DOOR,
        RAW,
        {"also": ((BOUNDED, MASKED_LATE.format("raw - old_logprobs")),)},
    ),
    (
        "mask",
        "the ratio is masked after bound and exp",
        DOOR,
        RAW,
        {
            "also": ((BOUNDED, MASKED_LATE.format("bounded(raw - old_logprobs, self.max_log_ratio)")),),
            "reason": "the bound stops the gradient of what is not finite, so that the later mask is enough",
        },
    ),
    (
        "unit",
        "the normalizer is ignored",
        "            normalizer=normalizer,\n            cu_seqlens=batch.cu_seqlens,\n            max_length",
        "            cu_seqlens=batch.cu_seqlens,\n            max_length",
    ),
    ("bound", "the ratio has none", BOUNDED, "ratio=log_ratio.exp(),"),
    (
        "bound",
        "every log-ratio is counted as within",
        "batch.log_ratio.abs() > self.max_log_ratio",
        "batch.log_ratio.abs() > 1e9",
    ),
    ("bound", "one side is counted", "batch.log_ratio.abs() > self", "batch.log_ratio > self"),
    ("bound", "the KL term's is 20", "self.kl_grad, self.max_log_ratio", "self.kl_grad, 20.0"),
    ("bound", "approx_kl's is 20", APPROX_KL, APPROX_KL.replace("self.max_log_ratio", "20.0")),
    ("bound", "ref_kl's is 20", REF_KL, REF_KL.replace("self.max_log_ratio", "20.0")),
    (
        "metric",
        "approx_kl's direction",
        APPROX_KL,
        APPROX_KL.replace("batch.old_logprobs, batch.logprobs", "batch.logprobs, batch.old_logprobs"),
    ),
    (
        "metric",
        "ref_kl's direction",
        REF_KL,
        REF_KL.replace("batch.logprobs, batch.ref_logprobs", "batch.ref_logprobs, batch.logprobs"),
    ),
    ("metric", "ref_kl to old", REF_KL, REF_KL.replace("batch.ref_logprobs", "batch.old_logprobs")),
    ("metric", "ref_kl_seq over empty sequences too", "lengths > 0)", "lengths >= 0)"),
    (
        "metric",
        "ref_kl_seq of one token",
        "sequence_sum(kl, mask, batch.cu_seqlens)",
        "sequence_sum(kl, mask, batch.cu_seqlens) / lengths",
    ),
    ("metric", "ref_kl_seq of the pack", "sequence_sum(kl, mask, batch.cu_seqlens)", "sequence_sum(kl, mask)"),
    ("metric", "ratio_max is the least", '"ratio_max": Max.of', '"ratio_max": Min.of'),
    ("metric", "ratio_min is the largest", '"ratio_min": Min.of', '"ratio_min": Max.of'),
    (
        "default",
        "old_logprobs are 0",
        "old_logprobs = logprobs if old_logprobs is None",
        "old_logprobs = 0 * logprobs if old_logprobs is None",
    ),
]

PREFERENCE = [
    (
        "mask",
        "logps pass the door",
        "chosen, rejected = zero_masked(mask, chosen_logps, rejected_logps)",
        "chosen, rejected = chosen_logps, rejected_logps",
    ),
    (
        "mask",
        "the references pass the door",
        "ref_chosen, ref_rejected = zero_masked(mask, ref_chosen_logps.detach(), ref_rejected_logps.detach())",
        "ref_chosen, ref_rejected = ref_chosen_logps.detach(), ref_rejected_logps.detach()",
    ),
    (
        "mask",
        "weights pass the door",
        "        (weights,) = zero_masked(mask, weights.detach())\n",
        "        weights = weights.detach()\n",
        {"reason": "what they scale is 0 or finite where masked, and `reduce_sequences` masks the product"},
    ),
    ("weight", "a rejected row enters", "        inputs = zero_masked(weights != 0, *inputs)\n", ""),
    ("default", "beta is 0.2", "beta: float = 0.1, reference_free", "beta: float = 0.2, reference_free"),
    ("metric", "accuracy counts ties", "(margin > 0).to", "(margin >= 0).to"),
    ("metric", "accuracy of the rejected", "(margin > 0).to", "(margin < 0).to"),
    ("metric", "margin without beta", "Moments.of(beta * margin", "Moments.of(margin"),
    ("metric", "chosen_reward without beta", "Mean.of(beta * chosen", "Mean.of(chosen"),
    ("metric", "rejected_reward without beta", "Mean.of(beta * rejected", "Mean.of(rejected"),
    ("metric", "chosen_reward of the rejected", "Mean.of(beta * chosen", "Mean.of(beta * rejected"),
    ("metric", "rejected_reward of the chosen", "Mean.of(beta * rejected", "Mean.of(beta * chosen"),
]

SURROGATES = [
    (
        "metric",
        "clip_frac over masked tokens too",
        CLIP_FRAC,
        "Mean.of(is_clipped.to(token_loss.dtype), is_clipped | ~is_clipped)",
    ),
]

MUTANTS = [
    ("policy", "rlloss/policy.py", POLICY),
    ("policy_surrogates", "rlloss/policy_surrogates.py", SURROGATES),
    ("preference", "rlloss/preference.py", PREFERENCE),
]
