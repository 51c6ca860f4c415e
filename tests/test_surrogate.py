"""Ratios at every level, and the clipped surrogate region by region."""

import pytest
import torch

import rlloss


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.5, 2.0, -2.6, 0.0, True),  # above, A > 0: held at 1.3
        (0.5, 2.0, -1.0, -2.0, False),  # below, A > 0: free to come back
        (1.5, -2.0, 3.0, 2.0, False),  # above, A < 0: free to come back
        (0.5, -2.0, 1.6, 0.0, True),  # below, A < 0: held at 0.8
        (4.0, -2.0, 6.0, 0.0, True),  # far above, A < 0: held by the dual clip of 3
        (4.0, 2.0, -2.6, 0.0, True),  # the dual clip is for A < 0 alone
        (4.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, slope, clipped):
    r = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value, is_clipped = rlloss.clipped_surrogate(r, torch.tensor([advantage]).double(), 0.2, 0.3, dual_clip=3.0)
    assert value.item() == pytest.approx(loss)
    assert torch.autograd.grad(value, r)[0].item() == pytest.approx(slope)
    assert is_clipped.item() is clipped


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_log_ratios_by_hand(level):
    expected = {
        "token": [[1.0, 3.0], [5.0, 7.0]],
        "sequence": [[4.0, 4.0], [5.0, 5.0]],  # 1 + 3, and 5 alone
        "geometric": [[2.0, 2.0], [5.0, 5.0]],
    }
    ragged = torch.tensor([[True, True], [True, False]])
    new = torch.tensor([[2.0, 4.0], [6.0, 8.0]])
    assert rlloss.log_ratios(new, torch.ones(2, 2), ragged, level).tolist() == expected[level]
