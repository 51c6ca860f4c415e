"""Other systems' formulas, written from their equations, against ours on random batches in float64."""

import math
from typing import Any

import pytest
import torch

from rlloss import (
    CISPOLoss,
    GMPOLoss,
    GPGLoss,
    GSPOTokenLoss,
    ImportanceSamplingLoss,
    LUSPOLoss,
    SAPOLoss,
    TISLoss,
    TOPRLoss,
    VESPOLoss,
)


def batch(seed):
    """Log-probs, old ones, one advantage per sequence and a mask of ragged rows, each with at least one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (6,), generator=generator)
    draw = torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    logprobs = -draw[0].abs()
    return logprobs, logprobs + 0.4 * draw[1], draw[2, :, 0], torch.arange(7) < lengths[:, None]


def token_mean(terms, mask):
    return (terms * mask).sum() / mask.sum()


def sequence_mean(terms, mask):
    return ((terms * mask).sum(-1) / mask.sum(-1)).mean()


def sequence_sum(terms, mask):
    return (terms * mask).sum(-1).mean()


def row_mean(x, mask):
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def verl_cispo(new, old, a, mask):
    weight = (new - old).exp().clamp(1 - 0.2, 1 + 0.2).detach()
    return token_mean(-weight * a * new, mask)


def trl_cispo(new, old, a, mask):
    return token_mean(-(new - old).exp().clamp(max=5.0).detach() * a * new, mask)


def tinker_cispo(new, old, a, mask):
    """Summed: the user divides."""
    return -((new - old).exp().clamp(0.0, 4.0).detach() * a * new * mask).sum() / mask.sum()


def tinker_importance_sampling(new, old, a, mask):
    """-w A with the gradient through w, which is that of -sg[w] A l."""
    return -((new - old).exp() * a * mask).sum() / mask.any(-1).sum()


def roll_tis(new, old, a, mask):
    return sequence_sum(-(new - old).exp().clamp(0, 1).detach() * a * new, mask)


def verl_topr(new, old, a, mask):
    """Its ratio is the geometric mean; for answers of one token the two agree."""
    ratio = row_mean(new - old, mask).exp().detach()
    return sequence_sum(-torch.where(a > 0, torch.ones_like(ratio), ratio.clamp(0, 1)) * a * new, mask)


def verl_gpg(new, old, a, mask):
    return token_mean(-new * a, mask)


def trl_vespo(new, old, a, mask):
    log_w = ((new - old).clamp(-20, 20) * mask).sum(-1, keepdim=True).clamp(math.log(1e-8), 20)
    k = torch.where(a >= 0, torch.full_like(log_w, 2.0), 3.0)
    decay = torch.where(a >= 0, torch.full_like(log_w, 3.0), 2.0)
    phi = (decay + k * log_w - decay * log_w.exp()).exp().nan_to_num(0, 0, 0).detach()
    return token_mean(-phi * a * new, mask)


def trl_sapo(new, old, a, mask):
    tau = torch.where(a > 0, torch.full_like(a, 1.0), 1.05)
    return sequence_mean(-torch.sigmoid(tau * ((new - old).exp() - 1)) * 4 / tau * a, mask)


def verl_gspo(new, old, a, mask):
    log_s = row_mean(new - old, mask).detach() + new - new.detach()
    s = log_s.clamp(max=10.0).exp()
    return sequence_mean(torch.maximum(-a * s, -a * s.clamp(1 - 3e-4, 1 + 4e-4)), mask)


def verl_geo_mean(new, old, a, mask):
    log_r, sign = new - old, a.sign()
    held = sign * torch.minimum(sign * log_r, sign * log_r.clamp(-0.4, 0.4))
    return (-row_mean(a.expand_as(new), mask) * row_mean(held, mask).exp()).mean()


def trl_gmpo(new, old, a, mask):
    log_r = new - old
    held = log_r.clamp(-0.4, 0.4)
    held = torch.where(a > 0, torch.minimum(log_r, held), torch.maximum(log_r, held))
    return (-row_mean(held, mask).exp() * a).mean()


def trl_luspo(new, old, a, mask):
    s = row_mean(new - old, mask).exp()
    return sequence_sum(-torch.minimum(s * a, s.clamp(1 - 2e-3, 1 + 2.5e-3) * a), mask)


PEERS: list[tuple[Any, Any]] = [
    (verl_cispo, CISPOLoss(ratio_min=0.8, ratio_max=1.2)),
    (trl_cispo, CISPOLoss(ratio_max=5.0)),
    (tinker_cispo, CISPOLoss(ratio_max=4.0)),
    (roll_tis, TISLoss(ratio_level="token")),
    (verl_gpg, GPGLoss()),
    (trl_vespo, VESPOLoss()),
    (trl_sapo, SAPOLoss()),
    (verl_gspo, GSPOTokenLoss()),
    (verl_geo_mean, GMPOLoss()),
    (trl_gmpo, GMPOLoss()),
    (trl_luspo, LUSPOLoss()),
]


def both(peer, loss_fn, logprobs, old, advantages, mask):
    """Loss and gradient of a peer and of ours."""
    results = []
    for call in (lambda x: peer(x, old, advantages[:, None], mask), lambda x: loss_fn(x, old, advantages, mask).loss):
        leaf = logprobs.clone().requires_grad_()
        loss = call(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    return results


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("peer", "loss_fn"), PEERS, ids=[peer.__name__ for peer, _ in PEERS])
def test_loss_and_gradient_are_the_peers(peer, loss_fn, seed):
    (theirs, slope), (ours, our_slope) = both(peer, loss_fn, *batch(seed))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(our_slope, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_tinkers_importance_sampling_has_our_gradient(seed):
    # the values are -w A and -w A l, whose gradients agree
    loss_fn = ImportanceSamplingLoss(ratio_level="token", ratio_max=math.inf)
    (_, slope), (_, our_slope) = both(tinker_importance_sampling, loss_fn, *batch(seed))
    torch.testing.assert_close(our_slope, slope, rtol=1e-6, atol=1e-9)


def test_verls_topr_has_another_ratio_for_more_than_one_token():
    logprobs, old, advantages, mask = batch(0)
    (_, slope), (_, our_slope) = both(verl_topr, TOPRLoss(), logprobs, old, advantages, mask)
    assert (slope - our_slope).abs().max() > 0.01
    single = torch.arange(7) < torch.ones(6, 1)
    (theirs, slope), (ours, our_slope) = both(verl_topr, TOPRLoss(), logprobs, old, advantages, single)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(our_slope, slope, rtol=1e-6, atol=1e-9)
