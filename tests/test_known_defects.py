"""Thirteen inputs on which public systems were seen to be wrong, and what they should have given.

Each test's docstring says what was printed; the numbers were obtained by running those systems' own functions.
"""

import math

import pytest
import torch

import rlloss
from rlloss import CISPOLoss, ClipCovLoss, Counts, DrGRPOLoss, GRPOLoss, PPOLoss

GAP = torch.tensor([[True, True, False, False, True, True]])  # a tool's answer stands between an answer's two parts


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_return_crosses_a_tools_answer():
    """A REINFORCE++ return was cut by the gap: [0, 0, 0, 1, 1, 1]."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    returns = rlloss.returns_to_go(rewards, GAP, gamma=1.0)
    assert returns.tolist() == [[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]


def test_gae_takes_a_tools_answer_for_no_step():
    """Tool tokens were steps of the recursion: [.3406, .3585, .475, .5]."""
    values = torch.where(GAP, 0.5, 9.0)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    advantages, _ = rlloss.gae(rewards, values, GAP, gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(advantages[GAP], torch.tensor([0.4287, 0.4512, 0.475, 0.5]), atol=1e-4, rtol=0)


def test_a_sum_over_a_constant_does_not_shrink_with_the_ranks():
    """Two ranks, averaged, gave half of the loss of one: .8596 for 1.7192."""
    advantages = -torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs, mask = torch.zeros(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.bool)
    loss_fn = DrGRPOLoss(max_completion_length=5)
    whole = loss_fn(logprobs, logprobs, advantages, mask).loss
    counts = rlloss.count(mask)
    ranks = [
        2 * loss_fn(logprobs[r], logprobs[r], advantages[r], mask[r], normalizer=counts).loss
        for r in (slice(2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(ranks) / 2, whole)  # a framework's mean over ranks


def test_a_group_of_one_has_one_policy():
    """One estimator's loop gave 1.0 and its vectorised twin 0.0; another gave the raw reward, 0.7."""
    rewards, group_ids = torch.tensor([1.0, 0.7]), torch.tensor([0, 1])
    for name in ("rloo", "grpo", "dr_grpo", "opo"):
        inputs = {"weights": torch.tensor([3.0, 4.0])} if name == "opo" else {}
        assert rlloss.preset_advantages(name, rewards, group_ids, **inputs).tolist() == [0.0, 0.0]
    raw = rlloss.group_advantages(rewards, group_ids, singleton="raw")
    torch.testing.assert_close(raw, rewards)


def test_a_row_without_a_token_is_in_no_mean():
    """A token mean that never saw the mask gave 2.0."""
    mask = torch.tensor([[True] * 4, [False] * 4])
    assert rlloss.reduce_tokens(torch.ones(2, 4), mask, "token_mean") == 1


def test_whitened_values_have_mean_zero():
    """A default added the mean back: 3.21."""
    x = 3 + torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(rlloss.whiten(x, x == x).mean()) < 1e-12


def test_a_clipped_weight_goes_on_teaching():
    """The gradient ran through the clip and there was no log-prob: [-1, 0, 0]."""
    logprobs = double(0.0, 1.0, -1.0)[None].requires_grad_()
    old, advantages = torch.zeros(1, 3, dtype=torch.float64), double(1.0, 1.0, -1.0)[None]
    mask = torch.ones(1, 3, dtype=torch.bool)
    out = CISPOLoss(ratio_min=0.8, ratio_max=1.2)(logprobs, old, advantages, mask, normalizer=1)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, double(-1.0, -1.2, 0.8)[None])


@pytest.mark.parametrize(
    ("rewards", "winner"), [([0.35] * 7 + [0.7], 2.4749), ([0.0] * 7 + [1.0], 2.4749)], ids=["residue", "winner_of_one"]
)
def test_one_winner_stands_no_further_out_than_its_group_allows(rewards, winner):
    """Deviations of the others alone gave 2154.06 for the first and 1.0 (losers -.378) for the second."""
    advantages = rlloss.group_advantages(torch.tensor(rewards), torch.zeros(8, dtype=torch.long))
    assert float(advantages[-1]) == pytest.approx(winner, abs=1e-3)
    torch.testing.assert_close(advantages[:-1], torch.full((7,), -winner / 7), atol=1e-3, rtol=0)
    whole = rlloss.group_advantages(torch.tensor(rewards), torch.zeros(8, dtype=torch.long), std="population")
    assert float(whole[-1]) == pytest.approx(math.sqrt(7), abs=1e-3)


def test_kl_gradients_in_expectation():
    """k1 in the loss has none; k2 descends KL(pi||ref); k3 as papers print it descends KL(ref||pi)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p = logprobs.exp().detach()

    def slope(x):
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    reverse = slope((logprobs.exp() * (logprobs - ref)).sum())
    forward = slope((ref.exp() * (ref - logprobs)).sum())
    assert slope((p * rlloss.kl_k1(logprobs, ref)).sum()).norm() < 1e-15
    torch.testing.assert_close(slope((p * rlloss.kl_k2(logprobs, ref)).sum()), reverse)
    torch.testing.assert_close(slope((p * rlloss.kl_k3(logprobs, ref)).sum()), forward)
    for kl in ("k1", "k2", "k3"):
        term = rlloss.kl_term(logprobs, logprobs.detach(), ref, kl, "reverse")
        torch.testing.assert_close(slope((p * term).sum()), reverse)


def test_k3_in_value_with_the_gradient_of_k2():
    """The name for it, k3+, raised NotImplementedError; here it is k3 with kl_grad="reverse", the default."""
    logprobs, ref = double(-1.0, -2.0).requires_grad_(), double(-1.5, -0.5)
    term = rlloss.kl_term(logprobs, logprobs.detach(), ref, "k3", "reverse")
    torch.testing.assert_close(term, rlloss.kl_k3(logprobs, ref))
    slopes = [torch.autograd.grad(x.sum(), logprobs)[0] for x in (term, rlloss.kl_k2(logprobs, ref))]
    torch.testing.assert_close(*slopes)


def test_covariances_are_of_advantages_as_they_are():
    """Advantages divided by 1e5 tokens beforehand: the covariance of 5 was 5e-5 and met no bound of 1."""
    logprobs = double(-0.1, -9.0, -0.1, -9.0)[None]
    advantages, mask = double(1.0, -1.0, -1.0, 1.0)[None], torch.ones(1, 4, dtype=torch.bool)
    loss_fn = ClipCovLoss(fraction=0.5)
    assert loss_fn.statistics(logprobs, logprobs, advantages, mask)["selected"].sum() == 2
    assert not loss_fn.statistics(logprobs, logprobs, advantages / 1e5, mask)["selected"].any()
    # the count of the step divides afterwards, so that KL and surrogate keep their proportion
    normalizer = Counts(torch.tensor(1e5), torch.tensor(1e4))
    kl = {"ref_logprobs": logprobs - 1}
    plain, divided = (
        PPOLoss(kl_coef=0.1)(logprobs, logprobs, advantages, mask, **kl, normalizer=n).loss for n in (None, normalizer)
    )
    torch.testing.assert_close(divided, plain * 4 / 1e5)


def test_an_infinity_behind_the_mask_is_nothing():
    """0 * inf was NaN."""
    logprobs = torch.tensor([[-1.0, math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    out = GRPOLoss()(logprobs, torch.tensor([[-1.0, -math.inf]]), torch.tensor([1.0]), mask)
    out.loss.backward()
    assert out.loss == -1
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, 0.0]]))
