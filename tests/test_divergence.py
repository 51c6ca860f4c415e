"""The KL estimators by hand and at their extremes."""

import math

import pytest
import torch

import rlloss


def test_kl_estimators_by_hand():
    new, ref = torch.tensor([-1.0, -1.0]), torch.tensor([-3.0, 0.0])  # log(pi / ref) = 2 and -1
    assert rlloss.kl_k1(new, ref).tolist() == [2.0, -1.0]
    assert rlloss.kl_k2(new, ref).tolist() == [2.0, 0.5]
    assert rlloss.kl_k3(new, ref).tolist() == pytest.approx([math.exp(-2) + 1, math.e - 2])


@pytest.mark.parametrize("nats", [-1e4, -100.0, -21.0, -19.0, 0.5, 19.0, 21.0, 100.0, 1e4])
def test_k3_is_never_negative_and_never_pushes_away(nats):
    new = torch.tensor([nats], requires_grad=True)
    k3 = rlloss.kl_k3(new, torch.zeros(1))
    slope = torch.autograd.grad(k3, new)[0].item()
    assert k3.item() >= 0
    assert slope * nats >= 0  # descending moves the policy to the reference, if anywhere
    assert (slope == 0) == (abs(nats) > 20)


def test_k3_keeps_its_digits_close_to_the_reference():
    x = 1e-4
    k3 = rlloss.kl_k3(torch.tensor([0.0]), torch.tensor([x])).item()
    assert k3 == pytest.approx(x**2 / 2, rel=1e-3)
