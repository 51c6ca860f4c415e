"""Inputs on which TRL 1.16 was seen to be wrong, in its losses and under them, and what they should have given.

Each test's docstring says what TRL's own function, or its expression written down, was seen to give.
"""

import math

import pytest
import torch

import rlloss

INF = math.inf
TRUE = torch.ones(1, 1, dtype=torch.bool)


def with_gradient(function, *inputs):
    """Value and gradients, all finite."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad(value.sum(), leaves)
    assert all(x.isfinite().all() for x in (value.detach(), *gradients))
    return value.detach(), *gradients


def test_a_forbidden_token_has_no_entropy():
    """NaN."""
    logits = torch.tensor([[0.0, 0.0, -INF]])
    stats = rlloss.token_logprobs(logits, torch.tensor([1]), outputs=("logprobs", "entropy"))
    assert stats.entropy.item() == pytest.approx(math.log(2))
    assert stats.logprobs.item() == pytest.approx(-math.log(2))


def test_a_first_tile_of_forbidden_tokens_is_nothing():
    """NaN, of a fused head whose first block of the vocabulary was -inf alone."""
    bias = torch.zeros(600)
    bias[:512] = -INF
    hidden, weight = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(600, 8)
    ids = torch.tensor([512, 599])
    stats = rlloss.linear_logprobs(hidden, weight, ids, bias=bias, outputs=("logprobs", "entropy"), scratch_bytes=1)
    torch.testing.assert_close(stats.logprobs, torch.full((2,), -math.log(88)))
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(88)))


def test_what_the_teacher_forbids_leaves_divergences_finite():
    """NaN for beta = 0 and 0.5."""
    teacher = torch.tensor([[0.0, -INF, 0.0]])

    def divergence(name, **options):
        def call(student):
            found = rlloss.token_divergences(student, teacher, outputs=(name,), **options)
            loss_fn = rlloss.DistillationLoss(divergence=name, **options)
            return loss_fn(getattr(found, name), torch.tensor([True]), cu_seqlens=torch.tensor([0, 1])).loss

        return call

    student = torch.zeros(1, 3)
    forward, _ = with_gradient(divergence("forward_kl"), student)
    assert forward.item() == pytest.approx(math.log(3 / 2))
    js, _ = with_gradient(divergence("js", beta=0.5), student)
    third, half = 1 / 3, 5 / 12  # of the student, and of the mixture where the teacher allows
    expected = 0.5 * 2 * 0.5 * math.log(0.5 / half)
    expected += 0.5 * (2 * third * math.log(third / half) + third * math.log(2))
    assert js.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [1.0, 1.0 - 1e-7, 0.999])
def test_odds_of_an_answer_that_is_certain(p):
    """A NaN gradient of log(1 - p) near p = 1."""
    chosen, rejected = torch.tensor([p]).log(), torch.tensor([-0.5])
    with_gradient(lambda x, y: rlloss.ORPOLoss(beta=0.1)(x, y).loss, chosen, rejected)


def test_weights_of_pairs_scale_the_likelihood_of_one_side_too():
    """WPO's weights beside `sft` raised a RuntimeError."""
    logprobs, mask = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    weights = rlloss.wpo_weights(logprobs, torch.full_like(logprobs, 0.5), mask)
    per_token = rlloss.to_tokens(weights, mask)
    (value, gradient) = with_gradient(lambda x: rlloss.SFTLoss()(x, mask, token_weights=per_token).loss, logprobs)
    expected = (3 * weights[0] + 3 * weights[1]) / 3
    assert value.item() == pytest.approx(expected.item())
    torch.testing.assert_close(gradient, -per_token * mask / 3)


def test_a_batch_in_which_nothing_was_chosen():
    """`sft` gave NaN."""
    value, gradient = with_gradient(lambda x: rlloss.SFTLoss()(x, ~TRUE).loss, torch.tensor([[-1.0]]))
    assert value.item() == gradient.item() == 0.0


def test_alpha_po_of_a_long_way_down():
    """-inf at -500 nats."""
    loss_fn = rlloss.AlphaPOLoss(alpha=0.25)
    with_gradient(lambda x, y: loss_fn(x, y).loss, torch.tensor([-500.0]), torch.tensor([-1.0]))
    with_gradient(lambda x, y: loss_fn(x, y).loss, torch.tensor([-1.0]), torch.tensor([-500.0]))


RATIO = [rlloss.PPOLoss(), rlloss.GRPOLoss(), rlloss.DAPOLoss(), rlloss.SAPOLoss()]


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("loss_fn", RATIO, ids=lambda loss_fn: type(loss_fn).__name__)
def test_a_ratio_beyond_float32(loss_fn, advantage):
    """A finite loss with a NaN gradient for A >= 0, an infinite loss for A < 0; the token may even be masked."""
    logprobs, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -100.0]])
    for mask in (torch.tensor([[True, True]]), torch.tensor([[True, False]])):
        with_gradient(lambda x, m=mask: loss_fn(x, old, torch.tensor([advantage]), m).loss, logprobs)


def test_k3_far_away_and_very_near():
    """A NaN gradient from a masked distance of 100 nats; at 1e-4 nats 0 for 5e-9, at 1e-3 nats 4.7 % too little."""
    logprobs, ref = torch.tensor([[-1.0, -101.0]]), torch.tensor([[-1.0, -1.0]])
    loss_fn, mask = rlloss.GRPOLoss(kl_coef=0.1), torch.tensor([[True, False]])
    with_gradient(lambda x: loss_fn(x, logprobs, torch.tensor([0.0]), mask, ref_logprobs=ref).loss, logprobs)
    for distance in (1e-4, 1e-3):
        d = torch.tensor([distance])
        assert rlloss.kl_k3(torch.zeros(1), d).item() == pytest.approx(distance**2 / 2, rel=1e-3)


@pytest.mark.parametrize("reward", [0.1, 0.7, 100.3, 12345.6])
def test_rewards_that_are_all_alike_teach_nothing(reward):
    """|A| of .0018 for rewards up to 1, .13 up to 100, .90 up to 10,000."""
    for size in (3, 7, 8):
        rewards, groups = torch.full((size,), reward), torch.zeros(size, dtype=torch.long)
        assert not rlloss.group_advantages(rewards, groups).any()
        assert not rlloss.group_advantages(rewards, groups, "none", baseline="leave_one_out").any()


@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_discopop_far_from_the_margin(margin):
    """0 * inf is NaN below -88.7 / beta nats."""
    ref = torch.zeros(1)
    with_gradient(lambda x: rlloss.DiscoPOPLoss(beta=0.1)(x, ref, ref, ref).loss, torch.tensor([margin]))


def test_a_forward_kl_between_answers_that_both_sank():
    """inf - inf."""
    ref, sunk = torch.zeros(1), torch.tensor([-100.0])
    loss_fn = rlloss.DPOLoss(divergence="forward_kl")
    with_gradient(lambda x, y: loss_fn(x, y, ref, ref).loss, sunk, sunk - 5)


def test_an_entropy_quantile_of_many_tokens():
    """`torch.quantile` raises above 16 M values."""
    entropy = torch.arange(2**24 + 100, dtype=torch.int32).float().view(1, -1)
    found = rlloss.top_entropy_correction(entropy, torch.ones_like(entropy, dtype=torch.bool), 0.25)
    assert found.keep.float().mean().item() == pytest.approx(0.25, abs=1e-3)


def test_no_weight_is_held_below_what_it_is_on_policy():
    """CISPO's default bound of 0.2, read as an offset elsewhere, held every weight at 0.2."""
    with pytest.raises(ValueError, match=r"ratio_max must be above 1, got 0\.2"):
        rlloss.CISPOLoss(ratio_max=0.2)


def test_the_tail_of_a_student_that_is_too_sure():
    """No gradient, and an error of 0.2 nats."""
    teacher_ids, teacher = torch.tensor([[0]]), torch.tensor([[0.9]]).log()

    def divergence(logits):
        logprobs, tail = rlloss.top_k_logprobs(logits, teacher_ids)
        return rlloss.top_k_divergence(logprobs, teacher, tail=tail)

    value, gradient = with_gradient(divergence, torch.tensor([[30.0, 0.0, 0.0]]))
    exact = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - (math.log(2) - 30))
    assert value.item() == pytest.approx(exact, rel=1e-5)
    assert gradient[0, 0].item() == pytest.approx(0.1, rel=1e-4)  # p - q


def test_labels_of_which_half_are_flipped_raise():
    """Only a warning, and then a division by 0."""
    with pytest.raises(ValueError, match="label_smoothing must be a number in"):
        rlloss.RobustDPOLoss(label_smoothing=0.5)


def test_a_nan_reward_of_an_answer_is_seen():
    """KTO's `nanmean` left it out and said nothing."""
    up, ref = torch.tensor([True, True]), torch.zeros(2)
    loss = rlloss.KTOLoss()(torch.tensor([-1.0, math.nan]), ref, up, kl=torch.tensor(0.0)).loss
    assert loss.isnan()
