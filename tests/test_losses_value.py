"""The critic's loss against arithmetic done by hand."""

import math

import pytest
import torch

from rlloss import ActorCriticLoss, PPOLoss, ValueLoss, scalars


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def loss_and_slope(loss_fn, values, *inputs, **extra):
    leaf = values.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0].flatten().tolist()


# from an old value of 10, a clip of 0.2 and
#   v - 10   R - 10   (v - R)^2   (v' - R)^2
#    0.1      1.0       0.81         0.81     within
#    0.5      1.0       0.25         0.64     up towards the return: cut
#    0.5      0.0       0.25         0.04     up away from it: not cut
#   -0.5     -1.0       0.25         0.64     down towards the return: cut
#   -0.5      0.0       0.25         0.04     down away from it: not cut
OLD = tensor([10.0] * 5)
VALUES = OLD + tensor([0.1, 0.5, 0.5, -0.5, -0.5])
RETURNS = OLD + tensor([1.0, 1.0, 0.0, -1.0, 0.0])
MASK = torch.ones(1, 5, dtype=torch.bool)


def test_value_by_hand():
    loss, slope = loss_and_slope(ValueLoss(), VALUES, OLD, RETURNS, MASK)
    assert loss == close((0.81 + 0.64 + 0.25 + 0.64 + 0.25) / 2 / 5)
    assert slope == close([-0.9 / 5, 0.0, 0.5 / 5, 0.0, -0.5 / 5])
    assert scalars(ValueLoss()(VALUES, OLD, RETURNS, MASK).metrics) == {
        "value": close(10.02),  # 10 + (0.1 + 0.5 + 0.5 - 0.5 - 0.5) / 5
        "value_error": close((0.81 + 4 * 0.25) / 5),
        "value_clip_frac": close(2 / 5),
        # R - 10 has mean 0.2 and squares 3 / 5; R - v is 0.9, 0.5, -0.5, -0.5, 0.5, of mean 0.18 and squares 1.81 / 5
        "explained_variance": close(1 - (1.81 / 5 - 0.18**2) / (3 / 5 - 0.2**2)),
    }


def test_value_without_halving_is_twice_as_large():
    loss, slope = loss_and_slope(ValueLoss(halve=False), VALUES, OLD, RETURNS, MASK)
    assert loss == close((0.81 + 0.64 + 0.25 + 0.64 + 0.25) / 5)
    assert slope == close([-1.8 / 5, 0.0, 1.0 / 5, 0.0, -1.0 / 5])


UNCLIPPED = (close((0.81 + 4 * 0.25) / 2 / 5), close([-0.9 / 5, -0.5 / 5, 0.5 / 5, 0.5 / 5, -0.5 / 5]))


@pytest.mark.parametrize(
    ("loss_fn", "old"),
    [
        (ValueLoss(value_clip=None), OLD),
        (ValueLoss(value_clip=0.6), OLD),  # no value has moved so far
        (ValueLoss(), VALUES),
        (ValueLoss(), None),  # the values themselves
    ],
    ids=["no_clip", "wide_clip", "unmoved", "no_old_values"],
)
def test_value_where_no_clip_binds(loss_fn, old):
    assert loss_and_slope(loss_fn, VALUES, old, RETURNS, MASK) == UNCLIPPED
    metrics = scalars(loss_fn(VALUES, old, RETURNS, MASK).metrics)
    assert metrics["value_clip_frac"] == 0
    assert metrics["value_error"] == close(1.81 / 5)


def test_value_averages_over_tokens_and_weighs_them():
    # rows of two tokens and of one: errors 1, 4 and 9, of 3 tokens
    values, returns = tensor([1.0, 2.0], [3.0, math.nan]), torch.zeros(2, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    loss, slope = loss_and_slope(ValueLoss(), values, None, returns, mask)
    assert loss == close((1 + 4 + 9) / 2 / 3)
    assert slope == close([1 / 3, 2 / 3, 3 / 3, 0.0])
    # (2 * 1 + 0 + 0.5 * 9) / 2 / 3; metrics stay unweighted
    weights = tensor([2.0, 0.0], [0.5, 7.0])
    loss, slope = loss_and_slope(ValueLoss(), values, None, returns, mask, token_weights=weights)
    assert loss == close(6.5 / 2 / 3)
    assert slope == close([2 / 3, 0.0, 1.5 / 3, 0.0])
    metrics = scalars(ValueLoss()(values, None, returns, mask, token_weights=weights).metrics)
    assert metrics["value"] == close(2)
    assert metrics["value_error"] == close(14 / 3)


def test_value_trains_nothing_but_the_values():
    leaves = [x.clone().requires_grad_() for x in (VALUES, OLD, RETURNS)]
    ValueLoss()(*leaves, MASK).loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    assert leaves[2].grad is None


def test_a_critic_that_knows_the_returns_has_nothing_to_learn():
    loss, slope = loss_and_slope(ValueLoss(), RETURNS, RETURNS, RETURNS, MASK)
    assert loss == 0
    assert slope == [0.0] * 5
    assert scalars(ValueLoss()(RETURNS, None, RETURNS, MASK).metrics)["explained_variance"] == 1


def test_rounding_is_no_clip():
    # 0.04 + (0.17 - 0.04) is a little less than 0.17 in float32, and so further from the return
    values, old, returns = (torch.tensor([[x]]) for x in (0.17, 0.04, 1.0))
    assert ((old + (values - old) - returns).square() > (values - returns).square()).all()
    out = ValueLoss(value_clip=0.2)(values, old, returns, torch.ones(1, 1, dtype=torch.bool))
    assert float(out.metrics["value_clip_frac"]) == 0


def test_actor_critic_by_hand():
    # ratio 1.5 clipped to 1.2 for an advantage of 2; the critic is 3 below its return and where it was
    logprobs, advantages = tensor([math.log(0.75)]), tensor([2.0])
    values, mask = tensor([4.0]), torch.ones(1, 1, dtype=torch.bool)
    old = tensor([math.log(0.5)])
    loss_fn = ActorCriticLoss(policy=PPOLoss(), value=ValueLoss())
    out = loss_fn(logprobs, old, advantages, mask, values=values, old_values=values, returns=values + 3)
    assert out.loss.item() == close(-1.2 * 2 + 0.5 * (9 / 2))
    metrics = scalars(out.metrics)
    assert (metrics["ratio"], metrics["clip_frac"]) == (close(1.5), 1)
    assert (metrics["value"], metrics["value_error"]) == (4, 9)


def test_a_tie_beyond_the_clip_keeps_its_gradient():
    # clipped at 0.5, the value is as far below its return of 0.75 as it is above
    loss, slope = loss_and_slope(ValueLoss(value_clip=0.5), tensor([1.0]), tensor([0.0]), tensor([0.75]), MASK[:, :1])
    assert (loss, slope) == (0.25**2 / 2, [0.25])
