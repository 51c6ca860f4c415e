"""Truncated importance sampling against arithmetic done by hand."""

import math

import pytest
import torch

import rlloss
from rlloss import ImportanceSamplingLoss, REINFORCELoss, scalars
from rlloss.reference import importance_sampling

RAGGED = torch.tensor([[True, True], [True, False]])


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def loss_and_slope(loss_fn, logprobs, *inputs, **extra):
    leaf = logprobs.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


# two answers: ratios 2 and 4 per token, 8 of the whole; and 0.2, of the one token that it has
LOGPROBS = tensor([-1.0, -2.0], [-3.0, -9.0])
OLD = LOGPROBS - tensor([2.0, 4.0], [0.2, 1.0]).log()
ADVANTAGES = tensor(1.0, -2.0)


def test_weights_of_whole_answers_by_hand():
    # 8 is held at 5 and 0.2 at 0.5: (5 * 1 * (1 + 2) + 0.5 * -2 * 3) / 2
    loss_fn, inputs = ImportanceSamplingLoss(ratio_min=0.5, ratio_max=5.0), (LOGPROBS, OLD, ADVANTAGES, RAGGED)
    loss, slope = loss_and_slope(loss_fn, *inputs)
    assert loss == close(6.0)
    assert_close(slope, tensor([-2.5, -2.5], [0.5, 0.0]))
    metrics = scalars(loss_fn(*inputs).metrics)
    assert metrics["clip_frac"] == 1
    assert metrics["ratio"] == close((8 + 8 + 0.2) / 3)  # as they are, before the clip
    # by default weights go up to 10 and down to nothing: (8 * 3 + 0.2 * -2 * 3) / 2
    loss, slope = loss_and_slope(ImportanceSamplingLoss(), *inputs)
    assert loss == close(11.4)
    assert_close(slope, tensor([-4.0, -4.0], [0.2, 0.0]))
    assert scalars(ImportanceSamplingLoss()(*inputs).metrics)["clip_frac"] == 0


def test_weights_of_tokens_by_hand():
    # 4 is held at 3 and 0.2 at 0.5: (2 * 1 + 3 * 2 + 0.5 * -2 * 3) / 2
    loss_fn = ImportanceSamplingLoss(ratio_level="token", ratio_min=0.5, ratio_max=3.0)
    inputs = (LOGPROBS, OLD, ADVANTAGES, RAGGED)
    loss, slope = loss_and_slope(loss_fn, *inputs)
    assert loss == close(2.5)
    assert_close(slope, tensor([-1.0, -1.5], [0.5, 0.0]))
    assert scalars(loss_fn(*inputs).metrics)["clip_frac"] == close(2 / 3)


def test_each_side_of_the_clip_counts_as_clipped():
    inputs = (LOGPROBS, OLD, ADVANTAGES, RAGGED)
    above, below = ImportanceSamplingLoss(ratio_max=5.0), ImportanceSamplingLoss(ratio_min=0.5)
    assert scalars(above(*inputs).metrics)["clip_frac"] == close(2 / 3)
    assert scalars(below(*inputs).metrics)["clip_frac"] == close(1 / 3)
    at_the_bound = ImportanceSamplingLoss(ratio_min=1.0, ratio_max=1.0)
    assert scalars(at_the_bound(LOGPROBS, None, ADVANTAGES, RAGGED).metrics)["clip_frac"] == 0


def test_advantages_per_token_meet_the_weight_of_their_answer():
    # (8 * (1 * 1 + 3 * 2) + 0.2 * -2 * 3) / 2
    inputs = (LOGPROBS, OLD, tensor([1.0, 3.0], [-2.0, 7.0]), RAGGED)
    loss, slope = loss_and_slope(ImportanceSamplingLoss(), *inputs)
    assert loss == close(27.4)
    assert_close(slope, tensor([-4.0, -12.0], [0.2, 0.0]))


def test_terms_by_hand():
    # at A = 0: k3 of log(pi/ref) = 2 is e^-2 + 1 under the token's own ratio, held at 3; the bonus is 3 per token
    loss_fn = ImportanceSamplingLoss(kl_coef=0.5, entropy_coef=0.1, ratio_max=3.0)
    loss = loss_fn(
        LOGPROBS, OLD, ADVANTAGES * 0, RAGGED, ref_logprobs=LOGPROBS - 2, entropy=torch.full_like(LOGPROBS, 3)
    ).loss
    assert loss == close((0.5 * (2 + 3 + 0.2) * (math.exp(-2) + 1) - 0.1 * 9) / 2)


# per token at log(pi/ref) = 2, whose ratio is held at w: the term, and its slope
KL_TERMS = [
    ({"kl": "k3"}, math.exp(-2) + 1, 2),
    ({"kl": "k1"}, 2, 2 + 1),
    ({"kl": "k2"}, 2, 2),
    ({"kl": "k3", "kl_grad": "forward"}, math.exp(-2) + 1, 1 - math.exp(-2)),
]


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize(("options", "term", "slope"), KL_TERMS, ids=["k3", "k1", "k2", "forward"])
def test_the_kl_is_weighed_by_each_tokens_own_held_ratio(options, term, slope, level):
    bounds = {"ratio_min": 0.5, "ratio_max": 3.0, "ratio_level": level}
    inputs = (LOGPROBS, OLD, ADVANTAGES * 0, RAGGED)
    loss_fn = ImportanceSamplingLoss(kl_coef=1.0, **bounds, **options)
    loss, slopes = loss_and_slope(loss_fn, *inputs, ref_logprobs=LOGPROBS - 2)
    assert loss == close((2 + 3 + 0.5) * term / 2)
    assert_close(slopes, tensor([2.0, 3.0], [0.5, 0.0]) * slope / 2)
    of_reference = importance_sampling(
        *(x.numpy() for x in inputs), ref_logprobs=(LOGPROBS - 2).numpy(), kl_coef=1.0, **bounds, **options
    )
    assert of_reference == close(loss)


def test_the_kl_of_the_literal_papers_has_no_ratio_to_hold():
    loss_fn = ImportanceSamplingLoss(kl_coef=1.0, kl_grad="literal", ratio_max=1.0, ratio_min=1.0)
    loss = loss_fn(LOGPROBS, OLD, ADVANTAGES * 0, RAGGED, ref_logprobs=LOGPROBS - 2).loss
    assert loss == close(3 * (math.exp(-2) + 1) / 2)


def test_where_no_weight_is_held_the_kl_is_that_of_all_losses():
    extra = {"ref_logprobs": LOGPROBS - tensor([2.0, -1.0], [0.5, 0.0])}
    inputs = (LOGPROBS, OLD, ADVANTAGES * 0, RAGGED)
    loss, slope = loss_and_slope(ImportanceSamplingLoss(kl_coef=0.3), *inputs, **extra)
    same, same_slope = loss_and_slope(REINFORCELoss(kl_coef=0.3), *inputs, **extra)
    assert loss == same
    assert torch.equal(slope, same_slope)


def test_answers_of_long_ago_leave_the_kl_small():
    # their own ratios would be bounded at e^20 alone
    old = LOGPROBS - tensor([40.0, 60.0], [80.0, 1.0])
    inputs = (LOGPROBS, old, ADVANTAGES * 0, RAGGED)
    loss, slope = loss_and_slope(ImportanceSamplingLoss(kl_coef=0.1), *inputs, ref_logprobs=LOGPROBS - 2)
    assert loss == close(0.1 * 3 * 10 * (math.exp(-2) + 1) / 2)
    assert_close(slope, tensor([1.0, 1.0], [1.0, 0.0]))


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_on_policy_it_is_reinforce(level):
    inputs = (LOGPROBS, None, ADVANTAGES, RAGGED)
    loss, slope = loss_and_slope(ImportanceSamplingLoss(ratio_level=level), *inputs)
    same, same_slope = loss_and_slope(REINFORCELoss(), *inputs)
    assert loss == close(same)
    assert_close(slope, same_slope)
    # as it is where every weight is held at 1
    held = ImportanceSamplingLoss(ratio_level=level, ratio_min=1.0, ratio_max=1.0)
    loss, slope = loss_and_slope(held, LOGPROBS, OLD, ADVANTAGES, RAGGED)
    assert loss == close(same)
    assert_close(slope, same_slope)


def test_the_reference_by_hand():
    loss = importance_sampling(LOGPROBS.numpy(), OLD.numpy(), ADVANTAGES.numpy(), RAGGED.numpy(), ratio_max=5.0)
    assert loss == close((5 * 3 - 0.2 * 6) / 2)
    loss = importance_sampling(LOGPROBS.numpy(), OLD.numpy(), ADVANTAGES.numpy(), RAGGED.numpy(), ratio_level="token")
    assert loss == close((2 * 1 + 4 * 2 - 0.2 * 6) / 2)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_level": "sequences"}, "did you mean 'sequence'"),
        ({"ratio_level": "geometric"}, "ratio_level must be one of"),
        ({"ratio_min": 1.5}, r"ratio_min must be a number in \[0, 1\]"),
        ({"ratio_max": 0.5}, r"ratio_max must be a number in \[1, inf\]"),
        ({"ratio_max": math.nan}, "ratio_max must be a number"),
    ],
)
def test_weights_that_would_change_the_policy_gradient_itself_raise(options, message):
    with pytest.raises(ValueError, match=f"ImportanceSamplingLoss: .*{message}|{message}"):
        rlloss.get_loss("importance_sampling", **options)
