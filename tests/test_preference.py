"""What the body of the losses over pairs owes beyond the laws: its default and its accuracy."""

import pytest
import torch

from rlloss import BradleyTerryLoss, DPOLoss, IPOLoss, PreferenceLoss, SimPOLoss

FREE = [DPOLoss(reference_free=True), IPOLoss(reference_free=True), SimPOLoss(), BradleyTerryLoss()]


def test_beta_is_a_tenth():
    assert PreferenceLoss().beta == 0.1


@pytest.mark.parametrize("loss_fn", FREE, ids=lambda loss_fn: type(loss_fn).__name__)
def test_accuracy_is_the_share_of_pairs_that_the_chosen_wins(loss_fn):
    chosen, rejected = torch.tensor([-1.0, -2.0, -3.0, -8.0]), torch.tensor([-4.0, -5.0, -6.0, -7.0])
    assert float(loss_fn(chosen, rejected).metrics["accuracy"]) == 0.75
