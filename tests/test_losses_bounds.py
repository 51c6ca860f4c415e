"""Bounds that are options: each reaches every place that it is for."""

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


CLIPPED = ["conservative_ppo", "dapo", "dr_grpo", "gspo", "grpo", "ppo", "rloo"]


@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_loss_clips_where_it_is_told(name):
    more = {"max_completion_length": 8} if name == "dr_grpo" else {}
    loss_fn = rlloss.get_loss(name, clip_eps_low=0.1, clip_eps_high=0.3, dual_clip=3.0, **more)
    assert (loss_fn.clip_eps_low, loss_fn.clip_eps_high, loss_fn.dual_clip) == (0.1, 0.3, 3.0)
