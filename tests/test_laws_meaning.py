"""Law 7, meaning: gradients in closed form, and exact expectations over every sequence of a tiny language."""

import itertools
import math
from typing import Any

import pytest
import torch
from closed_forms import CLOSED_FORMS, ONE

import rlloss
from rlloss import (
    ConservativePPOLoss,
    Counts,
    DrGRPOLoss,
    GRPOLoss,
    ImportanceSamplingLoss,
    LUSPOLoss,
    REINFORCELoss,
    RLOOLoss,
    TISLoss,
    TOPRLoss,
)


def test_law_7_the_stated_gradient_is_the_gradient(case):
    assert type(case()) in CLOSED_FORMS, f"{case.name} needs a line in CLOSED_FORMS"
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
    if loss_fn.kl == "exact":
        inputs["ref_kl"] = torch.zeros_like(inputs.pop("ref_logprobs"))
    if isinstance(loss_fn, ConservativePPOLoss) and loss_fn.exactness == "statistic":
        inputs["kl"] = 0.0
    if loss_fn.needs_rollout:
        inputs["rollout_logprobs"] = language.logprobs.detach()
    if isinstance(loss_fn, rlloss.SelectivePolicyLoss):
        inputs["selected"] = torch.zeros_like(language.mask)
    # what the loss divides by beyond the expectation: all sequences have two tokens
    whole = {"sequence_sum": 1, "fixed_length": loss_fn.max_length}.get(loss_fn.reduction, 2)
    # of a ratio that carries the gradient, the whole sequence's is that of all its tokens
    carries = loss_fn.ratio_level == "sequence" and isinstance(loss_fn, rlloss.ClippedPolicyLoss | rlloss.AStarPOLoss)
    length = 1 if carries else whole
    # least squares on beta log(pi / ref) have 2 beta times that gradient
    steeper = 2 * loss_fn.beta if isinstance(loss_fn, rlloss.AStarPOLoss) else 1
    gradient = length / steeper * expected_gradient(loss_fn, language, reward, **inputs)
    torch.testing.assert_close(gradient, -reward_gradient(language, reward), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss_fn", "factor"),
    [
        (REINFORCELoss(), 1),
        (RLOOLoss(), 1),
        (DrGRPOLoss(max_completion_length=5), 5),
        (ImportanceSamplingLoss(), 1),
        (ImportanceSamplingLoss(ratio_level="token"), 1),
        (LUSPOLoss(), 1),
        (TISLoss(), 1),
        (TOPRLoss(), 1),
        (rlloss.KimiLoss(), 1),
        (rlloss.DPPOLoss(), 1),
    ],
    ids=[
        "sequence_sum",
        "sequence_ratio",
        "fixed_length",
        "importance_sampling",
        "importance_sampling_token",
        "luspo",
        "tis",
        "topr",
        "kimi",
        "dppo",
    ],
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


@pytest.mark.parametrize("loss", [ImportanceSamplingLoss, TISLoss])
@pytest.mark.parametrize("end", [False, True])
def test_law_7_off_policy_importance_sampling_ascends_the_expected_reward(end, loss):
    language, old = Language(0, end=end), Language(4, end=end)
    reward = rewards(language)

    def gradient(**options):
        out = loss(**options)(
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


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_law_7_an_exact_kl_descends_itself(direction):
    language, ref = Language(1), Language(2)
    contexts = torch.stack([torch.zeros_like(language.first), 1 + language.first], -1)
    exact = rlloss.token_divergences(language.logits[contexts], ref.logits[contexts], outputs=[f"{direction}_kl"])
    loss_fn = DrGRPOLoss(max_completion_length=1, kl_coef=1.0, kl="exact", kl_grad=direction)
    out = loss_fn(
        language.logprobs,
        language.logprobs.detach(),
        torch.zeros(len(language.mask), dtype=torch.float64),
        language.mask,
        ref_kl=getattr(exact, f"{direction}_kl"),
        token_weights=language.weights(),
        normalizer=Counts(ONE, ONE),
    )
    truth = divergence(language, ref, language, direction)
    torch.testing.assert_close(out.loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(language.gradient(out.loss), language.gradient(truth), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", [ImportanceSamplingLoss, TISLoss])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_law_7_truncated_importance_sampling_descends_it_where_no_weight_is_clipped(kl, loss):
    language, ref, old = Language(1), Language(2), Language(3)
    truth = language.gradient(divergence(language, ref, old, "reverse"))

    def gradient(ratio_max):
        loss_fn = loss(kl_coef=1.0, kl=kl, ratio_max=ratio_max)
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


def test_law_7_a_bare_abs_descends_neither_kl():
    language, ref = Language(1), Language(2)
    gradient = language.gradient(kl_penalty(language, language, ref, kl="abs", kl_grad="literal"))
    for direction in ("reverse", "forward"):
        truth = language.gradient(divergence(language, ref, language, direction))
        assert torch.cosine_similarity(gradient.flatten(), truth.flatten(), dim=0) < 0.99


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


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize(
    ("loss_fn", "factor"),
    [(rlloss.KimiLoss(tau=0.3), 0.3), (rlloss.DROLoss(tau=0.7), 0.7), (rlloss.AStarPOLoss(beta=0.5), 2 * 0.5**2)],
    ids=["kimi", "dro", "a_star_po"],
)
def test_law_7_on_policy_a_square_descends_the_kl_to_its_anchor(loss_fn, factor, end):
    language, anchor = Language(1, end=end), Language(2, end=end)
    near = {"ref_logprobs": anchor.logprobs.detach()} if loss_fn.needs_reference else {}
    leaves = language.logprobs
    out = loss_fn(
        leaves,
        leaves.detach() if near else anchor.logprobs.detach(),
        torch.zeros(len(language.mask), dtype=torch.float64),
        language.mask,
        token_weights=language.weights(),
        normalizer=Counts(ONE, ONE),
        **near,
    )
    apart = (language.probabilities * (language.logprobs - anchor.logprobs.detach()).sum(-1)).sum()
    truth = factor * language.gradient(apart)
    torch.testing.assert_close(language.gradient(out.loss), truth, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    "loss_fn",
    [
        rlloss.CPGDLoss(drift_coef=1.0, drift_clip=math.inf),
        rlloss.KLCovLoss(fraction=1.0, penalty="k3"),
    ],
    ids=["cpgd", "kl_cov"],
)
def test_law_7_a_drift_descends_the_divergence_from_the_old_policy(loss_fn):
    language, old = Language(1), Language(3)
    chosen = {"selected": old.mask} if isinstance(loss_fn, rlloss.SelectivePolicyLoss) else {}
    out = loss_fn(
        language.logprobs,
        old.logprobs.detach(),
        torch.zeros(len(language.mask), dtype=torch.float64),
        language.mask,
        token_weights=old.weights(),
        normalizer=Counts(ONE, ONE),
        **chosen,
    )
    truth = language.gradient(divergence(language, old, old, "forward"))
    torch.testing.assert_close(language.gradient(out.loss), truth, rtol=1e-11, atol=1e-14)
