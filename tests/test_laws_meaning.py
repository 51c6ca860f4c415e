"""Law 7, meaning: gradients in closed form, and exact expectations over every sequence of a tiny language."""

import itertools
import math
from typing import Any

import pytest
import torch

import rlloss
from rlloss import (
    ActorCriticLoss,
    BradleyTerryLoss,
    ConservativePPOLoss,
    Counts,
    DAPOLoss,
    DPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    ImportanceSamplingLoss,
    IPOLoss,
    KTOLoss,
    PPOLoss,
    REINFORCELoss,
    RLOOLoss,
    SFTLoss,
    SimPOLoss,
    ValueLoss,
)

ONE = torch.tensor(1.0, dtype=torch.float64)


# gradients as the docstrings state them


def divisor(loss_fn, mask):
    """What each token's term is divided by."""
    lengths = mask.sum(-1, keepdim=True).double()
    sequences = (lengths > 0).sum().double()
    return {
        "token_mean": lengths.sum(),
        "sequence_mean": sequences * lengths,
        "sequence_sum": sequences,
        "fixed_length": sequences * (loss_fn.max_length or 1),
        "sum": ONE,
    }[loss_fn.reduction]


def row_mean(x, mask):
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def row_sum(x, mask):
    return (x * mask).sum(-1, keepdim=True)


def kl_slope(loss_fn, step):
    """dKL_t/dl_t of every estimator."""
    r = (step["logprobs"] - step["old_logprobs"]).exp()
    if isinstance(loss_fn, ImportanceSamplingLoss):
        r = r.clamp(loss_fn.ratio_min, loss_fn.ratio_max)
    d = step["logprobs"] - step["ref_logprobs"]
    return {
        ("k1", "reverse"): r * (1 + d),
        ("k2", "reverse"): r * d,
        ("k3", "reverse"): r * d,
        ("k3", "forward"): r * (1 - (-d).exp()),
        ("k2", "literal"): d,
        ("k3", "literal"): 1 - (-d).exp(),
    }[loss_fn.kl, loss_fn.kl_grad]


def kl_value(loss_fn, step):
    r = (step["logprobs"] - step["old_logprobs"]).exp()
    d = step["logprobs"] - step["ref_logprobs"]
    return {"k2": r * d**2 / 2, "k3": r * ((-d).exp() - 1 + d)}[loss_fn.kl]


def policy_gradient(loss_fn, step):
    mask, advantages = step.mask, step["advantages"]
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    weights = step.get("token_weights", ONE)
    log_ratio = step["logprobs"] - step["old_logprobs"]
    if isinstance(loss_fn, REINFORCELoss):
        slope = -weights * advantages
    elif isinstance(loss_fn, ImportanceSamplingLoss):
        r = (row_sum(log_ratio, mask) if loss_fn.ratio_level == "sequence" else log_ratio).exp()
        slope = -weights * r.clamp(loss_fn.ratio_min, loss_fn.ratio_max) * advantages
    else:
        per_row = {GSPOLoss: row_mean, RLOOLoss: row_sum}.get(type(loss_fn))
        r = (per_row(log_ratio, mask) if per_row else log_ratio).exp()
        clipped = torch.where(advantages > 0, r > 1 + loss_fn.clip_eps_high, r < 1 - loss_fn.clip_eps_low)
        if loss_fn.dual_clip is not None:
            clipped |= (advantages < 0) & (r > loss_fn.dual_clip)
        slope = torch.where(clipped, 0, -weights * r * advantages)
        slope = per_row(slope, mask) if per_row else slope
    if loss_fn.kl_coef:
        slope = slope + weights * loss_fn.kl_coef * kl_slope(loss_fn, step)
    if isinstance(loss_fn, ConservativePPOLoss):
        kl = kl_value(loss_fn, step)
        whose = row_mean(kl, mask) if loss_fn.level == "sequence" else (kl * mask).sum() / mask.sum()
        hinge = 2 * loss_fn.conservative_coef * (whose - loss_fn.max_kl).clamp(min=0)
        own = mask.sum() if loss_fn.level == "batch" else mask.sum(-1, keepdim=True) * mask.any(-1).sum()
        slope = slope + hinge * kl_slope(loss_fn, step) * divisor(loss_fn, mask) / own
    gradients = {"logprobs": slope / divisor(loss_fn, mask)}
    if "entropy" in step:
        gradients["entropy"] = -loss_fn.entropy_coef / divisor(loss_fn, mask).expand(mask.shape)
    return gradients


def likelihood_gradient(loss_fn, step):
    return {"logprobs": -step["token_weights"] / divisor(loss_fn, step.mask)}


def dpo_gradient(loss_fn, step):
    h = step["chosen_logps"] - step["rejected_logps"]
    if not loss_fn.reference_free:
        h = h - (step["ref_chosen_logps"] - step["ref_rejected_logps"])
    slope = loss_fn.beta * (torch.sigmoid(loss_fn.beta * h) - 1 + loss_fn.label_smoothing)
    slope = step["weights"] * slope / step.mask.sum()
    return {"chosen_logps": slope, "rejected_logps": -slope}


def ipo_gradient(loss_fn, step):
    h = step["chosen_logps"] - step["rejected_logps"]
    if not loss_fn.reference_free:
        h = h - (step["ref_chosen_logps"] - step["ref_rejected_logps"])
    slope = step["weights"] * 2 * (h - 1 / (2 * loss_fn.beta)) / step.mask.sum()
    return {"chosen_logps": slope, "rejected_logps": -slope}


def simpo_gradient(loss_fn, step):
    h = step["chosen_mean_logps"] - step["rejected_mean_logps"]
    slope = loss_fn.beta * (torch.sigmoid(loss_fn.beta * h - loss_fn.margin) - 1 + loss_fn.label_smoothing)
    slope = step["weights"] * slope / step.mask.sum()
    return {"chosen_mean_logps": slope, "rejected_mean_logps": -slope}


def kto_gradient(loss_fn, step):
    gain = loss_fn.beta * (step["logps"] - step["ref_logps"] - step["kl"])
    both = torch.sigmoid(gain) * torch.sigmoid(-gain)
    up, down = -loss_fn.desirable_weight * both, loss_fn.undesirable_weight * both
    return {"logps": step["weights"] * loss_fn.beta * torch.where(step["desirable"], up, down) / step.mask.sum()}


def bradley_terry_gradient(loss_fn, step):
    chosen, rejected = step["chosen_rewards"], step["rejected_rewards"]
    x = (chosen - rejected - step.get("margin", 0 * ONE)) / loss_fn.temperature
    slope = (torch.sigmoid(x) - 1 + loss_fn.label_smoothing) / loss_fn.temperature
    centre = 2 * loss_fn.center_coef * (chosen + rejected)
    weights = step.get("weights", ONE) / step.mask.sum()
    return {"chosen_rewards": weights * (slope + centre), "rejected_rewards": weights * (centre - slope)}


def value_gradient(loss_fn, step):
    v, old, target = step["values"], step["old_values"], step["returns"]
    slope = (1 if loss_fn.halve else 2) * (v - target)
    if loss_fn.value_clip is not None:
        near = old + (v - old).clamp(-loss_fn.value_clip, loss_fn.value_clip)
        beyond = (v - old).abs() > loss_fn.value_clip
        slope = torch.where(beyond & ((near - target).abs() > (v - target).abs()), 0, slope)
    return {"values": step.get("token_weights", ONE) * slope / step.mask.sum()}


def actor_critic_gradient(loss_fn, step):
    gradients = policy_gradient(loss_fn.policy, step)
    return gradients | {k: loss_fn.value_coef * x for k, x in value_gradient(loss_fn.value, step).items()}


CLOSED_FORMS = {
    ActorCriticLoss: actor_critic_gradient,
    BradleyTerryLoss: bradley_terry_gradient,
    ConservativePPOLoss: policy_gradient,
    DAPOLoss: policy_gradient,
    DPOLoss: dpo_gradient,
    DrGRPOLoss: policy_gradient,
    GRPOLoss: policy_gradient,
    GSPOLoss: policy_gradient,
    ImportanceSamplingLoss: policy_gradient,
    IPOLoss: ipo_gradient,
    KTOLoss: kto_gradient,
    PPOLoss: policy_gradient,
    REINFORCELoss: policy_gradient,
    RLOOLoss: policy_gradient,
    SFTLoss: likelihood_gradient,
    SimPOLoss: simpo_gradient,
    ValueLoss: value_gradient,
}


def test_law_7_the_stated_gradient_is_the_gradient(case):
    if type(case()) not in CLOSED_FORMS:
        assert case.name == "aot", f"{case.name} needs a line in CLOSED_FORMS"
        pytest.skip("a loss of the tests alone")
    for seed in range(3):
        step = case.step(seed=seed)
        stated = CLOSED_FORMS[type(case())](case(), step)
        for name, grad in case.run(step)[1].items():
            expected = torch.where(step.mask, stated[name], 0)
            torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-14, msg=name)


# exact expectations over all sequences of a language of three tokens


class Language:
    """A tabular softmax policy: one row of logits for the first token, and one after each of the three tokens.

    With `end`, token 0 ends the sequence, so that lengths are 1 and 2; without, all have length 2.
    """

    def __init__(self, seed, *, end=False):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
        pairs = itertools.product(range(3), range(3))
        sequences = [(0, 0)] + [(a, b) for a, b in pairs if a] if end else list(pairs)
        self.first, self.second = torch.tensor(sequences).unbind(-1)
        self.mask = torch.stack([torch.ones_like(self.first), (self.first > 0) | (not end)], -1).bool()

    @property
    def table(self):
        return self.logits.log_softmax(-1)

    @property
    def logprobs(self):
        return torch.stack([self.table[0, self.first], self.table[1 + self.first, self.second]], -1) * self.mask

    @property
    def probabilities(self):
        return self.logprobs.sum(-1).exp()

    @property
    def reach(self):
        """The probability of every context: the start, and each first token."""
        return torch.cat([ONE[None], self.table[0].exp()]).detach()

    def weights(self):
        """Token weights that make the sum over all sequences an expectation."""
        return self.probabilities.detach()[:, None].expand(self.mask.shape).contiguous()

    def gradient(self, value):
        return torch.autograd.grad(value, self.logits)[0]


def rewards(language):
    return torch.randn(len(language.mask), generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def expected_gradient(loss_fn, language, reward, **inputs):
    """The gradient of the loss in expectation under the language's own samples."""
    inputs |= {"token_weights": language.weights(), "normalizer": Counts(tokens=2 * ONE, sequences=ONE)}
    out = loss_fn(language.logprobs, language.logprobs.detach(), reward, language.mask, **inputs)
    return language.gradient(out.loss)


def reward_gradient(language, reward):
    return language.gradient((language.probabilities * reward).sum())


def test_law_7_on_policy_every_policy_loss_ascends_the_expected_reward(case):
    loss_fn = case()
    if not isinstance(loss_fn, rlloss.PolicyLoss):
        pytest.skip("not a policy loss")
    language = Language(0)
    reward = rewards(language)
    # at ref = pi, no KL term has an expected gradient, though r k1 has one at every token
    inputs: dict[str, Any] = {
        "ref_logprobs": language.logprobs.detach(),
        "entropy": torch.zeros_like(language.logprobs),
    }
    if loss_fn.exactness == "statistic":
        inputs["kl"] = 0.0
    # what the loss divides by beyond the expectation: all sequences have two tokens
    whole = {"sequence_sum": 1, "fixed_length": loss_fn.max_length}.get(loss_fn.reduction, 2)
    length = 1 if loss_fn.ratio_level == "sequence" else whole
    gradient = length * expected_gradient(loss_fn, language, reward, **inputs)
    torch.testing.assert_close(gradient, -reward_gradient(language, reward), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss_fn", "factor"),
    [
        (REINFORCELoss(), 1),
        (RLOOLoss(), 1),
        (DrGRPOLoss(max_completion_length=5), 5),
        (ImportanceSamplingLoss(), 1),
        (ImportanceSamplingLoss(ratio_level="token"), 1),
    ],
    ids=["sequence_sum", "sequence_ratio", "fixed_length", "importance_sampling", "importance_sampling_token"],
)
def test_law_7_where_lengths_differ_it_takes_a_sum_or_a_constant(loss_fn, factor):
    language = Language(0, end=True)
    reward = rewards(language)
    gradient = factor * expected_gradient(loss_fn, language, reward)
    torch.testing.assert_close(gradient, -reward_gradient(language, reward), rtol=1e-12, atol=1e-14)
    # a reward that all sequences share teaches nothing, but the mean over a sequence's tokens prefers short ones
    shared = torch.ones_like(reward)
    assert expected_gradient(loss_fn, language, shared).abs().max() < 1e-15
    assert expected_gradient(GRPOLoss(), language, shared).abs().max() > 0.05


@pytest.mark.parametrize("end", [False, True])
def test_law_7_off_policy_importance_sampling_ascends_the_expected_reward(end):
    language, old = Language(0, end=end), Language(4, end=end)
    reward = rewards(language)

    def gradient(**options):
        out = ImportanceSamplingLoss(**options)(
            language.logprobs,
            old.logprobs.detach(),
            reward,
            language.mask,
            token_weights=old.weights(),
            normalizer=Counts(tokens=ONE, sequences=ONE),
        )
        return language.gradient(out.loss)

    truth = -reward_gradient(language, reward)
    torch.testing.assert_close(gradient(ratio_max=math.inf), truth, rtol=1e-12, atol=1e-14)
    # what the clip and the token's own ratio leave out
    assert (gradient(ratio_max=1.5) - truth).abs().max() > 0.01
    assert (gradient(ratio_max=math.inf, ratio_level="token") - truth).abs().max() > 0.01


def divergence(language, ref, old, direction):
    """The KL divergence of the next token, over the contexts that the sampling policy reaches.

    A token-level loss sees nothing else: the contexts are not differentiated.
    """
    p, q = (language.table, ref.table.detach()) if direction == "reverse" else (ref.table.detach(), language.table)
    return (old.reach * (p.exp() * (p - q)).sum(-1)).sum()


KL_TERMS = [
    ("k1", "reverse", "reverse", "always"),
    ("k2", "reverse", "reverse", "always"),
    ("k3", "reverse", "reverse", "always"),
    ("k3", "forward", "forward", "always"),
    ("k2", "literal", "reverse", "on policy"),
    ("k3", "literal", "forward", "on policy"),
]


def kl_penalty(language, old, ref, loss_fn=None, **options):
    """The expected KL penalty, under samples of `old`, of a policy loss without advantages."""
    loss_fn = DrGRPOLoss(max_completion_length=1, kl_coef=1.0, **options) if loss_fn is None else loss_fn
    return loss_fn(
        language.logprobs,
        old.logprobs.detach(),
        torch.zeros(len(language.mask), dtype=torch.float64),
        language.mask,
        ref_logprobs=ref.logprobs.detach(),
        token_weights=old.weights(),
        normalizer=Counts(ONE, ONE),
    ).loss


@pytest.mark.parametrize(("kl", "kl_grad", "direction", "exact"), KL_TERMS)
@pytest.mark.parametrize("old_seed", [1, 3], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("end", [False, True])
def test_law_7_a_kl_term_descends_the_divergence_that_it_names(kl, kl_grad, direction, exact, old_seed, end):
    language, ref, old = (Language(seed, end=end) for seed in (1, 2, old_seed))
    gradient = language.gradient(kl_penalty(language, old, ref, kl=kl, kl_grad=kl_grad))
    truth = language.gradient(divergence(language, ref, old, direction))
    if end:  # nothing follows the token that ends a sequence
        truth = truth.index_fill(0, torch.tensor(1), 0)
    if exact == "always" or old_seed == 1:
        torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-14)
    else:
        assert (gradient - truth).abs().max() > 0.01


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_law_7_truncated_importance_sampling_descends_it_where_no_weight_is_clipped(kl):
    language, ref, old = Language(1), Language(2), Language(3)
    truth = language.gradient(divergence(language, ref, old, "reverse"))

    def gradient(ratio_max):
        loss_fn = ImportanceSamplingLoss(kl_coef=1.0, kl=kl, ratio_max=ratio_max)
        return language.gradient(kl_penalty(language, old, ref, loss_fn))

    largest = (language.logprobs - old.logprobs).max().exp().item()
    torch.testing.assert_close(gradient(1.001 * largest), truth, rtol=1e-11, atol=1e-14)
    assert (gradient(1.0) - truth).abs().max() > 0.01


@pytest.mark.parametrize("kl", ["k1", "k3"])
@pytest.mark.parametrize("old_seed", [1, 3], ids=["on_policy", "off_policy"])
def test_law_7_k1_and_k3_are_unbiased(kl, old_seed):
    language, ref, old = Language(1), Language(2), Language(old_seed)
    truth = divergence(language, ref, old, "reverse")
    torch.testing.assert_close(kl_penalty(language, old, ref, kl=kl), truth, rtol=1e-12, atol=0)
    assert abs(kl_penalty(language, old, ref, kl="k2") - truth) > 1e-3 * truth


def test_law_7_a_bare_k1_regularises_nothing():
    language, ref = Language(1), Language(2)
    k1 = rlloss.kl_k1(language.logprobs, ref.logprobs.detach())
    assert language.gradient((language.weights() * k1).sum()).abs().max() < 1e-15


@pytest.mark.parametrize("kl", ["k1", "k3"])
def test_law_7_the_hinge_descends_its_own_square(kl):
    language, ref, old = Language(1), Language(2), Language(3)
    old.logits.data.zero_()  # uniform samples: every sequence once
    loss_fn = ConservativePPOLoss(conservative_coef=0.7, max_kl=0.05, kl=kl)
    out = loss_fn(
        language.logprobs,
        old.logprobs.detach(),
        torch.zeros(9, dtype=torch.float64),
        language.mask,
        ref_logprobs=ref.logprobs.detach(),
    )
    truth = 0.7 * (divergence(language, ref, old, "reverse") / 2 - 0.05).square()  # per token, of which there are two
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(language.gradient(out.loss), language.gradient(truth), rtol=1e-11, atol=1e-14)
