"""What weights do and do not touch."""

import pytest
import torch

import rlloss
from rlloss.reduce import weighted


def test_a_negative_weight_is_no_rejection():
    assert weighted(torch.tensor([3.0]), torch.tensor([-2.0])).tolist() == [-6.0]


def test_metrics_of_a_policy_loss_are_unweighted(case):
    step = case.step()
    if not isinstance(case(), rlloss.PolicyLoss) or "token_weights" not in step:
        pytest.skip("not a policy loss with weights")
    unweighted = type(step)({k: x for k, x in step.items() if k != "token_weights"})
    expected = rlloss.scalars(case()(**unweighted).metrics)
    metrics = rlloss.scalars(case()(**step).metrics)
    for name in metrics.keys() & {"clip_frac", "gate", "masked_frac", "selected_frac", "weight"}:
        metrics[name] = expected[name]  # from a rejected token, a loss has nothing to take
    assert metrics == expected
