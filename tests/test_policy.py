"""What the body of all policy losses owes beyond the laws: its bound and its metrics."""

import math

import pytest
import torch

import rlloss
from rlloss import GRPOLoss

ZEROS = torch.zeros(1, 2, dtype=torch.float64)


def test_max_log_ratio_bounds_every_exponential():
    # log(pi / old) = 5 and log(ref / pi) = 6, both held at 2
    loss_fn = GRPOLoss(kl_coef=1.0, max_log_ratio=2.0)
    out = loss_fn(ZEROS, ZEROS - 5, ZEROS, ZEROS == 0, ref_logprobs=ZEROS + 6)
    k3 = math.exp(2) - 1 - 2
    assert float(out.loss) == pytest.approx(math.exp(2) * k3)  # r k3
    metrics = rlloss.scalars(out.metrics)
    assert metrics["ratio"] == pytest.approx(math.exp(2))
    assert metrics["approx_kl"] == metrics["ref_kl"] == pytest.approx(k3)
    assert metrics["bounded_frac"] == 1


def test_metrics_of_a_policy_loss_are_unweighted(case):
    step = case.step()
    if not isinstance(case(), rlloss.PolicyLoss) or "token_weights" not in step:
        pytest.skip("not a policy loss with weights")
    unweighted = type(step)({k: x for k, x in step.items() if k != "token_weights"})
    expected = rlloss.scalars(case()(**unweighted).metrics)
    metrics = rlloss.scalars(case()(**step).metrics)
    metrics["clip_frac"] = expected.get("clip_frac", 0)  # the clip takes nothing from a rejected token
    assert metrics == {"clip_frac": 0, **expected}
