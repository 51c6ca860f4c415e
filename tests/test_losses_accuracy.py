"""The accuracy of the losses over rows and pairs, and KTO's mask without weights."""

import math

import pytest
import torch

from rlloss import BradleyTerryLoss, DPOLoss, IPOLoss, KTOLoss, SimPOLoss

FREE = [DPOLoss(reference_free=True), IPOLoss(reference_free=True), SimPOLoss(), BradleyTerryLoss()]


@pytest.mark.parametrize("loss_fn", FREE, ids=lambda loss_fn: type(loss_fn).__name__)
def test_accuracy_is_the_share_of_pairs_that_the_chosen_wins(loss_fn):
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0, -8.0]), torch.tensor([-4.0, -5.0, -6.0, -7.0])
    assert float(loss_fn(chosen, rejected).metrics["accuracy"]) == 0.75


def test_kto_is_right_where_it_gains_on_what_is_desirable_and_loses_on_what_is_not():
    gains = torch.tensor([2.0, -1.0, -3.0, 4.0])
    out = KTOLoss()(gains, torch.zeros(4), torch.tensor([True, False, False, False]), kl=0.0)
    assert float(out.metrics["accuracy"]) == 0.75


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_kto_sees_no_masked_row_without_weights_either(poison):
    logps = torch.tensor([-1.0, poison], requires_grad=True)
    ref_logps, desirable = torch.tensor([-2.0, poison]), torch.tensor([True, True])
    loss = KTOLoss()(logps, ref_logps, desirable, kl=0.0, mask=torch.tensor([True, False])).loss
    (slope,) = torch.autograd.grad(loss, logps)
    assert slope[0].isfinite()
    assert slope[1] == 0
