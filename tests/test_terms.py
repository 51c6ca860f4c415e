"""The terms beside a policy's surrogate: an exact KL, and an entropy bonus with a coefficient that moves."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rlloss
from rlloss import AdaptiveEntropyController, ConservativePPOLoss, GRPOLoss, PPOLoss

MASK = torch.tensor([[True, True], [True, False]])
L = torch.tensor([[-1.0, -2.0], [-0.5, -9.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([0.5, -1.0], dtype=torch.float64)
H = torch.tensor([[0.3, 0.1], [0.2, 7.0]], dtype=torch.float64)


def test_an_exact_kl_enters_as_it_is_and_is_the_metric():
    kl = torch.tensor([[0.2, 0.4], [0.9, 9.0]], dtype=torch.float64, requires_grad=True)
    bare = PPOLoss()(L, L, ADVANTAGES, MASK).loss
    out = PPOLoss(kl_coef=0.1, kl="exact")(L, L, ADVANTAGES, MASK, ref_kl=kl)
    assert float(out.loss.detach()) == pytest.approx(float(bare) + 0.1 * (0.2 + 0.4 + 0.9) / 3)
    assert float(out.metrics["ref_kl"]) == pytest.approx(0.5)
    assert float(out.metrics["ref_kl_seq"]) == pytest.approx(0.75)
    out.loss.backward()
    torch.testing.assert_close(kl.grad, 0.1 / 3 * MASK.double())
    assert not PPOLoss(kl_coef=0.1, kl="exact").needs_reference


def test_the_hinge_takes_an_exact_kl_too():
    kl = torch.tensor([[0.2, 0.4], [0.9, 9.0]], dtype=torch.float64)
    loss_fn = ConservativePPOLoss(conservative_coef=2.0, max_kl=0.1, kl="exact")
    out = loss_fn(L, L, ADVANTAGES, MASK, ref_kl=kl)
    assert float(out.metrics["kl_penalty"]) == pytest.approx(2.0 * (0.5 - 0.1) ** 2)
    with pytest.raises(ValueError, match="kl='exact' needs ref_kl, got None"):
        loss_fn(L, L, ADVANTAGES, MASK)


def test_vapo_imitates_right_answers_by_a_mean_over_their_own_tokens():
    # L_PPO + 0.1 L_NLL, of which the second divides by the tokens of the right answers alone
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -4.0, 9.0], [-0.2, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    old, advantages = logprobs - 0.1, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
    is_right = torch.tensor([True, False, True])

    def vapo(rows, normalizer, right_normalizer):
        inputs = leaf[rows], old[rows], advantages[rows], mask[rows]
        policy = PPOLoss(clip_eps_high=0.28)(*inputs, normalizer=normalizer)
        nll = rlloss.SFTLoss()(leaf[rows], mask[rows] & is_right[rows][:, None], normalizer=right_normalizer)
        return rlloss.combine(policy=policy, nll=0.1 * nll)

    def counts(rows):
        return rlloss.count(mask[rows]), rlloss.count(mask[rows] & is_right[rows][:, None])

    leaf = logprobs.clone().requires_grad_()
    whole = vapo(slice(None), *counts(slice(None)))
    (slope,) = torch.autograd.grad(whole.loss, leaf)
    surrogate = -math.exp(0.1) * advantages[:, None] * mask / 6  # the ratio is within the clip's room
    expected = surrogate - 0.1 * (mask & is_right[:, None]).double() / 4
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
    assert float(whole.metrics["nll/nll"]) == pytest.approx((1 + 2 + 3 + 0.2) / 4)
    # in micro-batches, one of which has no right answer
    normalizers = [sum(parts) for parts in zip(*(counts([i]) for i in range(3)), strict=True)]
    parts = torch.stack([vapo([i], *normalizers).loss for i in range(3)]).sum()
    torch.testing.assert_close(parts, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(parts, leaf)[0], slope, rtol=1e-12, atol=0)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "inputs", "message"),
    [
        ({"kl_coef": 0.1, "kl": "exact"}, {}, "GRPOLoss: kl='exact' needs ref_kl, got None; rlloss.token_divergences"),
        ({"kl_coef": 0.1, "kl": "exact", "kl_grad": "forward"}, {"ref_logprobs": L}, "give it as forward_kl"),
        ({"kl_coef": 0.1}, {"ref_logprobs": L, "ref_kl": L}, "GRPOLoss: ref_kl is for kl='exact', got it with kl='k3'"),
        ({}, {"rollout_logprobs": L}, "GRPOLoss: takes no rollout_logprobs; rlloss.importance_correction makes"),
        ({"kl_coef": 0.1}, {}, "GRPOLoss: kl_coef=0.1 needs ref_logprobs, got None"),
    ],
)
def test_inputs_that_no_term_reads_and_terms_without_inputs_raise(options, inputs, message):
    with pytest.raises(ValueError, match="GRPOLoss: ") as raised:
        GRPOLoss(**options)(L, L, ADVANTAGES, MASK, **inputs)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("kl", "kl_grad", "message"),
    [
        ("abs", "reverse", "descends neither KL; kl_grad='literal' takes it as it stands"),
        ("abs", "forward", "descends neither KL"),
        ("exact", "literal", "no estimator; kl_grad says which KL ref_kl is"),
    ],
)
def test_an_unsound_gradient_raises(kl, kl_grad, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(kl_coef=0.1, kl=kl, kl_grad=kl_grad)


# the entropy controller


def test_the_coefficient_rises_below_the_target_and_falls_above_it():
    controller = AdaptiveEntropyController(0.2, init_coef=0.01, step=0.004, max_coef=0.016)
    seen = []
    for entropy in (0.1, torch.tensor(0.1), 0.1, 0.3, 0.2, 0.3, 0.3, 0.3, 0.3):
        controller.update(entropy)
        seen.append((round(float(controller.coef), 6), round(float(controller.entropy_coef), 6)))
    assert seen[:3] == [(0.014, 0.014), (0.016, 0.016), (0.016, 0.016)]
    # above the target the bonus is off; at the target it is on, but coef falls
    assert seen[3:5] == [(0.012, 0.0), (0.008, 0.008)]
    assert seen[5:] == [(0.004, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]


def test_a_loss_follows_its_controller_and_saves_it():
    controller = AdaptiveEntropyController(0.5, step=0.25)
    loss_fn = GRPOLoss(entropy_coef=controller)
    bare = GRPOLoss()(L, L, ADVANTAGES, MASK).loss

    def bonus():
        return float(bare - loss_fn(L, L, ADVANTAGES, MASK, entropy=H).loss)

    assert bonus() == 0
    controller.update(0.4)
    assert bonus() == pytest.approx(0.25 * ((0.3 + 0.1) / 2 + 0.2) / 2)
    other = GRPOLoss(entropy_coef=AdaptiveEntropyController(0.5, step=0.25))
    other.load_state_dict(loss_fn.state_dict())
    assert other(L, L, ADVANTAGES, MASK, entropy=H).loss == loss_fn(L, L, ADVANTAGES, MASK, entropy=H).loss
    assert "target_entropy=0.5" in repr(loss_fn)
    controller.update(0.6)
    assert bonus() == 0


def test_the_bonus_of_a_controller_has_its_gradient():
    controller = AdaptiveEntropyController(0.5, step=0.25)
    controller.update(0.4)
    entropy = H.clone().requires_grad_()
    PPOLoss(entropy_coef=controller)(L, L, ADVANTAGES, MASK, entropy=entropy).loss.backward()
    torch.testing.assert_close(entropy.grad, -0.25 / 3 * MASK.double())
    single = PPOLoss(entropy_coef=controller)(L.float(), None, ADVANTAGES.float(), MASK, entropy=H.float()).loss
    assert single.dtype is torch.float32


@pytest.mark.unhooked
def test_bad_controllers_teach():
    for options, message in [
        ({"target_entropy": -1.0}, "target_entropy must be a number in [0"),
        ({"target_entropy": 0.2, "step": 0.0}, "step must be a number in (0"),
        ({"target_entropy": 0.2, "init_coef": 2.0}, "init_coef must be a number in [0, 1]"),
        ({"target_entropy": 0.2, "max_coef": 0.0}, "max_coef must be a number in (0"),
    ]:
        with pytest.raises(ValueError, match="AdaptiveEntropyController: ") as raised:
            AdaptiveEntropyController(**options)
        assert message in str(raised.value)
    controller = AdaptiveEntropyController(0.2)
    for entropy in (torch.zeros(2), float("nan")):
        with pytest.raises(ValueError, match=r"AdaptiveEntropyController.update: entropy must be"):
            controller.update(entropy)
    with pytest.raises(ValueError, match="needs entropy, got None"):
        GRPOLoss(entropy_coef=controller)(L, L, ADVANTAGES, MASK)
    assert rlloss.scalars(GRPOLoss(entropy_coef=controller)(L, L, ADVANTAGES, MASK, entropy=H).metrics)["entropy"] > 0


@pytest.mark.unhooked
def test_a_moving_coefficient_makes_no_new_graph():
    controller = AdaptiveEntropyController(0.5)
    loss_fn = GRPOLoss(entropy_coef=controller)
    counter = CompileCounter()
    compiled = torch.compile(loss_fn, fullgraph=True, backend=counter, dynamic=True)
    for _ in range(3):
        controller.update(0.4)
        out, expected = (f(L, L, ADVANTAGES, MASK, entropy=H).loss for f in (compiled, loss_fn))
        torch.testing.assert_close(out, expected)
    assert counter.frame_count == 1
