"""Mutants of the critic's loss and of actor and critic together."""

FILE = "rlloss/losses/value.py"
DOOR = "values, old_values, returns = zero_masked(mask, values, old_values.detach(), returns.detach())"
CLIPPED = "clipped = old_values + moved.clamp(-self.value_clip, self.value_clip)"
LARGER = "is_clipped = (clipped_error > error) & (moved.abs() > self.value_clip)"
PICKED = "torch.where(is_clipped, clipped_error, error)"
ERROR = "        error = (values - returns).square()"
HALF = "(0.5 if self.halve else 1.0)"
# they reach nothing but the loss, which the reduction masks, and the gradient of `values`, which has its own door
BEHIND_VALUES = {"reason": "the reduction masks the loss, and the door of `values` their gradient"}
VALUE = [
    (
        "swap",
        "values and old_values",
        DOOR,
        DOOR.replace("values, old_values, returns =", "old_values, values, returns ="),
    ),
    (
        "swap",
        "old_values and returns",
        DOOR,
        DOOR.replace("values, old_values, returns =", "values, returns, old_values ="),
    ),
    ("swap", "the clip is around the returns", CLIPPED, CLIPPED.replace("old_values +", "returns +")),
    ("sign", "the loss", HALF, "-" + HALF),
    ("sign", "the returns", ERROR, ERROR.replace("values - returns", "values + returns")),
    ("sign", "what has moved", "moved = values - old_values", "moved = old_values - values"),
    ("sign", "the returns in the clipped error", "(clipped - returns)", "(clipped + returns)"),
    ("clip", "the smaller error", PICKED, "torch.minimum(error, clipped_error)"),
    ("clip", "half of each at a tie", PICKED, "torch.maximum(error, clipped_error)"),
    ("clip", "always", PICKED, "clipped_error"),
    ("clip", "never", PICKED, "error"),
    ("clip", "one side", CLIPPED, CLIPPED.replace("-self.value_clip, self.value_clip", "max=self.value_clip")),
    ("clip", "a wider range", CLIPPED, CLIPPED.replace("self.value_clip)", "2 * self.value_clip)")),
    ("clip", "the clipped value is its old one", CLIPPED, "clipped = old_values"),
    ("coefficient", "no half", HALF, "1.0"),
    ("coefficient", "always half", HALF, "0.5"),
    ("coefficient", "halve is turned around", HALF, "(1.0 if self.halve else 0.5)"),
    ("coefficient", "no square", ERROR, ERROR.replace(".square()", ".abs()")),
    ("coefficient", "no square in the clipped error", "(clipped - returns).square()", "(clipped - returns).abs()"),
    ("stop", "old_values", "old_values.detach()", "old_values"),
    ("stop", "returns", "returns.detach()", "returns"),
    ("stop", "token_weights", "token_weights.detach()", "token_weights"),
    (
        "stop",
        "values, in the clipped error",
        CLIPPED,
        CLIPPED.replace("moved.clamp", "moved.detach().clamp"),
        {"reason": "where the clipped error is picked, the clamp has taken the gradient already"},
    ),
    ("unit", "a mean of means", '"token_mean",', '"sequence_mean",'),
    ("unit", "sums per sequence", '"token_mean",', '"sequence_sum",'),
    ("unit", "the normalizer is ignored", "normalizer=normalizer", "normalizer=None"),
    ("weight", "none", "weighted(error, token_weights)", "error"),
    ("weight", "a rejected token enters", "            accepted = zero_masked(token_weights != 0, *accepted)\n", ""),
    ("mask", "no door", DOOR, "old_values, returns = old_values.detach(), returns.detach()"),
    (
        "mask",
        "values pass the door",
        DOOR,
        "old_values, returns = zero_masked(mask, old_values.detach(), returns.detach())",
    ),
    (
        "mask",
        "old_values pass the door",
        DOOR,
        "old_values = old_values.detach()\n        values, returns = zero_masked(mask, values, returns.detach())",
        BEHIND_VALUES,
    ),
    (
        "mask",
        "returns pass the door",
        DOOR,
        "returns = returns.detach()\n        values, old_values = zero_masked(mask, values, old_values.detach())",
        BEHIND_VALUES,
    ),
    (
        "mask",
        "token_weights pass the door",
        "(token_weights,) = zero_masked(mask, token_weights.detach())",
        "token_weights = token_weights.detach()",
        BEHIND_VALUES,
    ),
    (
        "mask",
        "tokens behind a pack's last boundary count",
        "mask = within_sequences(loss_mask, cu_seqlens)",
        "mask = loss_mask",
    ),
    ("default", "no clip", "value_clip: float | None = 0.2", "value_clip: float | None = None"),
    ("default", "value_clip is 0.5", "value_clip: float | None = 0.2", "value_clip: float | None = 0.5"),
    ("default", "halve is False", "halve: bool = True", "halve: bool = False"),
    (
        "default",
        "old_values are 0",
        "old_values = values if old_values is None",
        "old_values = 0 * values if old_values is None",
    ),
    ("metric", "value is the returns", '"value": Mean.of(values, mask)', '"value": Mean.of(returns, mask)'),
    (
        "metric",
        "value_error of the old values",
        "Mean.of((values - returns).square(), mask)",
        "Mean.of((old_values - returns).square(), mask)",
    ),
    ("metric", "value_error is clipped", "Mean.of((values - returns).square(), mask)", "Mean.of(error, mask)"),
    (
        "metric",
        "value_error is halved",
        "Mean.of((values - returns).square(), mask)",
        "Mean.of((values - returns).square() / 2, mask)",
    ),
    (
        "metric",
        "value_clip_frac counts every value out of range",
        LARGER,
        LARGER.replace("(clipped_error > error) & ", ""),
    ),
    (
        "metric",
        "value_clip_frac counts wherever the error is larger",
        LARGER,
        LARGER.replace(" & (moved.abs() > self.value_clip)", ""),
    ),
    ("metric", "value_clip_frac counts upwards only", LARGER, LARGER.replace("moved.abs()", "moved")),
    (
        "metric",
        "explained_variance of the values",
        "ExplainedVariance.of(values, returns, mask)",
        "ExplainedVariance.of(returns, values, mask)",
    ),
    (
        "metric",
        "explained_variance of the old values",
        "ExplainedVariance.of(values, returns, mask)",
        "ExplainedVariance.of(old_values, returns, mask)",
    ),
]

TERMS = "torch.stack([actor.loss, self.value_coef * critic.loss]).sum()"
ACTOR = "self.policy(logprobs, old_logprobs, advantages, loss_mask, **shared, **of_policy)"
CRITIC = "self.value(values, old_values, returns, loss_mask, **shared)"
ACTOR_CRITIC = [
    ("sign", "the critic's loss", TERMS, TERMS.replace("self.value", "-self.value")),
    ("sign", "the policy's loss", TERMS, TERMS.replace("actor.loss", "-actor.loss")),
    ("coefficient", "value_coef is 1", TERMS, TERMS.replace("self.value_coef * ", "")),
    ("coefficient", "value_coef scales both", TERMS, "self.value_coef * torch.stack([actor.loss, critic.loss]).sum()"),
    ("coefficient", "no critic", TERMS, "actor.loss"),
    ("coefficient", "the mean of both", TERMS, TERMS.replace("sum", "mean")),
    ("swap", "value_coef is the policy's", TERMS, "torch.stack([self.value_coef * actor.loss, critic.loss]).sum()"),
    ("swap", "values and old_values", CRITIC, CRITIC.replace("values, old_values", "old_values, values")),
    ("swap", "old_values and returns", CRITIC, CRITIC.replace("old_values, returns", "returns, old_values")),
    ("swap", "policy and old", ACTOR, ACTOR.replace("logprobs, old_logprobs", "old_logprobs, logprobs")),
    ("stop", "the critic", TERMS, TERMS.replace("critic.loss", "critic.loss.detach()")),
    ("stop", "the policy", TERMS, TERMS.replace("actor.loss", "actor.loss.detach()")),
    ("unit", "the normalizer is ignored", '"normalizer": normalizer,', '"normalizer": None,'),
    (
        "unit",
        "the critic ignores the normalizer",
        CRITIC,
        CRITIC.replace("**shared", '**shared | {"normalizer": None}'),
    ),
    ("mask", "the critic sees every token", CRITIC, CRITIC.replace("loss_mask", "torch.ones_like(loss_mask)")),
    ("mask", "the policy sees every token", ACTOR, ACTOR.replace("loss_mask", "torch.ones_like(loss_mask)")),
    ("weight", "none", '"token_weights": token_weights,', '"token_weights": None,'),
    ("weight", "the critic is not weighted", CRITIC, CRITIC.replace("**shared", '**shared | {"token_weights": None}')),
    ("weight", "the policy is not weighted", ACTOR, ACTOR.replace("**shared", '**shared | {"token_weights": None}')),
    ("layout", "packs are ignored", '"cu_seqlens": cu_seqlens}', '"cu_seqlens": None}'),
    ("default", "value_coef is 1", "value_coef: float = 0.5", "value_coef: float = 1.0"),
    ("metric", "the critic's are lost", "actor.metrics | critic.metrics", "actor.metrics"),
    ("metric", "the policy's are lost", "actor.metrics | critic.metrics", "critic.metrics"),
]

MUTANTS = [
    ("value", FILE, VALUE),
    ("actor_critic", "rlloss/losses/actor_critic.py", ACTOR_CRITIC),
]
