"""TRL 1.16's preference losses, written from what its trainers compute, against ours in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rlloss
from rlloss import (
    AlphaPOLoss,
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    CalDPOLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    NCALoss,
    ORPOLoss,
    RobustDPOLoss,
    SFTLoss,
    SPPOLoss,
    TDPOLoss,
    TPOLoss,
    combine,
)

BETA = 0.3


def batch(seed, scale=1.0):
    """Per-token log-probs of both answers under both models, and ragged masks."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 8, (2, 6), generator=generator)
    mask = torch.arange(7) < lengths[..., None]
    policy = -draw[:2].abs()
    return policy, policy + scale * draw[2:], mask


def sums(policy, ref, mask):
    """Chosen, rejected and those of the reference, summed."""
    return *(policy * mask).sum(-1), *(ref * mask).sum(-1)


def logistic(x, smoothing=0.0):
    return -(1 - smoothing) * F.logsigmoid(x) - smoothing * F.logsigmoid(-x)


def exo_pair(c, r):
    x, e = BETA * (c - r), torch.tensor(0.01, dtype=torch.float64)
    q, p = torch.sigmoid(x), torch.sigmoid(-x)
    return q * (F.logsigmoid(x) - torch.log1p(-e)) + p * (F.logsigmoid(-x) - torch.log(e))


def discopop(c, r):
    x = BETA * (c - r)
    g = torch.sigmoid(x / 0.05)
    return logistic(x) * (1 - g) + torch.exp(-x) * g


def robust(c, r):
    x, e = BETA * (c - r), 0.1
    return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


def nca_pair(c, r):
    return -F.logsigmoid(BETA * c) - 0.5 * F.logsigmoid(-BETA * c) - 0.5 * F.logsigmoid(-BETA * r)


def aot_unpaired(c, r):
    return logistic(BETA * (c.sort().values - r.sort().values), 0.1)


def scored(score):
    """DPO under TRL's `f_divergence_type`."""
    return lambda c, r: logistic(BETA * (score(c) - score(r)))


def of_alpha(a):
    return lambda x: (torch.exp((a - 1) * x) - 1) / (a - 1)


# of log-ratios alone
PEERS: dict[str, tuple[Any, Any]] = {
    "sigmoid": (lambda c, r: logistic(BETA * (c - r)), DPOLoss(beta=BETA)),
    "hinge": (lambda c, r: torch.relu(1 - BETA * (c - r)), HingeLoss(beta=BETA)),
    "exo_pair": (exo_pair, EXOLoss(beta=BETA, label_smoothing=0.01)),
    "nca_pair": (nca_pair, NCALoss(beta=BETA)),
    "robust": (robust, RobustDPOLoss(beta=BETA)),
    "sppo_hard": (lambda c, r: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2, SPPOLoss(beta=BETA)),
    "aot_unpaired": (aot_unpaired, AOTUnpairedLoss(beta=BETA, label_smoothing=0.1)),
    "apo_zero": (lambda c, r: 1 - torch.sigmoid(BETA * c) + torch.sigmoid(BETA * r), APOZeroLoss(beta=BETA)),
    "apo_down": (lambda c, r: torch.sigmoid(BETA * c) + 1 - torch.sigmoid(BETA * (c - r)), APODownLoss(beta=BETA)),
    "discopop": (discopop, DiscoPOPLoss(beta=BETA)),
    "forward_kl": (scored(lambda x: 1 - torch.exp(-x)), DPOLoss(beta=BETA, divergence="forward_kl")),
    "js_divergence": (
        scored(lambda x: math.log(2) + F.logsigmoid(x)),
        DPOLoss(beta=BETA, divergence="jensen_shannon"),
    ),
    # TRL's coefficient is 1 less the paper's
    "alpha_divergence": (
        scored(of_alpha(0.7)),
        DPOLoss(beta=BETA, divergence="alpha", divergence_alpha=0.3),
    ),
    # the authors' code of Cal-DPO
    "cal_dpo": (
        lambda c, r: logistic(c - r) + (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
        CalDPOLoss(beta=BETA),
    ),
}


def both(policy, *calls):
    """Loss and gradient of each."""
    results = []
    for call in calls:
        leaf = policy.clone().requires_grad_()
        loss = call(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    return results


def assert_agree(results):
    (theirs, slope), (ours, our_slope) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(our_slope, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PEERS)
def test_the_loss_of_trls_name_is_its(name, seed):
    peer, loss_fn = PEERS[name]
    policy, ref, mask = batch(seed)

    def theirs(leaf):
        chosen, rejected, ref_chosen, ref_rejected = sums(leaf, ref, mask)
        return peer(chosen - ref_chosen, rejected - ref_rejected).mean()

    assert_agree(both(policy, theirs, lambda leaf: loss_fn(*sums(leaf, ref, mask)).loss))


@pytest.mark.parametrize("seed", range(4))
def test_bco_pair_is_trls_without_its_shift(seed):
    policy, ref, mask = batch(seed)

    def theirs(leaf):
        c, r, ref_c, ref_r = sums(leaf, ref, mask)
        return (-F.logsigmoid(BETA * (c - ref_c)) - F.logsigmoid(-BETA * (r - ref_r))).mean()

    loss_fn = BCOPairLoss(beta=BETA)
    assert_agree(both(policy, theirs, lambda leaf: loss_fn(*sums(leaf, ref, mask), delta=0.0).loss))
    shifted = loss_fn(*sums(policy, ref, mask)).loss
    assert abs(shifted - theirs(policy)) > 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_aot_sorts_margins_of_both_models(seed):
    policy, ref, mask = batch(seed)

    def theirs(leaf):
        c, r, ref_c, ref_r = sums(leaf, ref, mask)
        return logistic(BETA * ((c - r).sort().values - (ref_c - ref_r).sort().values), 0.1).mean()

    loss_fn = AOTLoss(beta=BETA, label_smoothing=0.1)
    assert_agree(both(policy, theirs, lambda leaf: loss_fn(*sums(leaf, ref, mask)).loss))


def means(policy, ref, mask):
    return [x / n for x, n in zip(sums(policy, ref, mask), (*mask.sum(-1), *mask.sum(-1)), strict=True)]


@pytest.mark.parametrize("seed", range(4))
def test_length_normalised_losses_take_means(seed):
    policy, ref, mask = batch(seed)

    def margin(leaf):
        c, r, ref_c, ref_r = sums(leaf, ref, mask)
        return (c - ref_c) / mask[0].sum(-1) - (r - ref_r) / mask[1].sum(-1)

    peers = {
        rlloss.get_loss("sigmoid_norm", beta=BETA): lambda h: logistic(BETA * h),
        IPOLoss(beta=BETA, length_normalized=True): lambda h: (h - 1 / (2 * BETA)) ** 2,
    }
    for loss_fn, peer in peers.items():
        ours = lambda leaf, loss_fn=loss_fn: loss_fn(*means(leaf, ref, mask)).loss  # noqa: E731
        assert_agree(both(policy, lambda leaf, peer=peer: peer(margin(leaf)).mean(), ours))


@pytest.mark.parametrize("seed", range(4))
def test_orpo_but_for_its_likelihood_is_trls(seed):
    policy, ref, mask = batch(seed)

    def theirs(leaf):
        c, r = means(leaf, ref, mask)[:2]
        odds = (c - r) - (torch.log1p(-torch.exp(c)) - torch.log1p(-torch.exp(r)))
        nll = -(leaf[0] * mask[0]).sum() / mask[0].sum()
        return nll - (0.1 * F.logsigmoid(odds)).mean()

    def ours(leaf):
        odds = ORPOLoss(nll_coef=0.0)(*means(leaf, ref, mask)[:2])
        return combine(preference=odds, nll=SFTLoss()(leaf[0], mask[0])).loss

    assert_agree(both(policy, theirs, ours))


@pytest.mark.parametrize("seed", range(4))
def test_cpo_and_tpo_but_for_their_likelihood_are_trls(seed):
    policy, ref, mask = batch(seed)

    def theirs(leaf, beta, gold):
        c, r = sums(leaf, ref, mask)[:2]
        return logistic(beta * (c - r), 0.1).mean() - (leaf[gold] * mask[gold]).sum() / mask[gold].sum()

    def ours(leaf, loss_fn, gold):
        preference = loss_fn(*sums(leaf, ref, mask)[:2])
        return combine(preference=preference, nll=SFTLoss()(leaf[gold], mask[gold])).loss

    for beta, loss in ((0.1, CPOLoss), (0.01, TPOLoss)):
        loss_fn = loss(nll_coef=0.0, label_smoothing=0.1)
        for gold in (0, 1):
            calls = (lambda x, b=beta, g=gold: theirs(x, b, g)), (lambda x, f=loss_fn, g=gold: ours(x, f, g))
            assert_agree(both(policy, *calls))


@pytest.mark.parametrize("alpha", [0.25, -0.5, 1.0])
def test_alpha_po_is_trls_where_that_does_not_overflow(alpha):
    policy, ref, mask = batch(0)

    def theirs(leaf):
        c, r = (torch.exp(x).pow(-alpha) for x in means(leaf, ref, mask)[:2])
        return logistic(2.0 * (((1 - c) - (1 - r)) / alpha - 0.5 / 2.0)).mean()

    loss_fn = AlphaPOLoss(alpha=alpha, margin=0.5)
    assert_agree(both(policy, theirs, lambda leaf: loss_fn(*means(leaf, ref, mask)[:2]).loss))


@pytest.mark.parametrize(("name", "tdpo2"), [("tdpo", True), ("tdpo1", False)])
def test_tdpo_is_its_authors(name, tdpo2):
    policy, ref, mask = batch(0)
    kl = torch.linspace(0.0, 3.0, 12, dtype=torch.float64).view(2, 6)

    def drift(leaf):
        return kl * (1 + (leaf * mask).sum(-1).square())

    def theirs(leaf):
        c, r, ref_c, ref_r = sums(leaf, ref, mask)
        chosen, rejected = drift(leaf)
        apart = 0.5 * (rejected - chosen.detach()) if tdpo2 else rejected - chosen
        return -F.logsigmoid(BETA * (c - ref_c - r + ref_r - apart)).mean()

    def ours(leaf):
        chosen, rejected = drift(leaf)
        loss_fn: Any = rlloss.get_loss(name, beta=BETA)
        return loss_fn(*sums(leaf, ref, mask), chosen_kl=chosen, rejected_kl=rejected).loss

    assert isinstance(rlloss.get_loss(name), TDPOLoss)
    assert_agree(both(policy, theirs, ours))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ld_dpo_is_trls(alpha):
    policy, ref, mask = batch(0)
    shared = mask.sum(-1).amin(0)

    def theirs(x):
        position = mask.cumsum(-1)
        kept = (x * mask * (position <= shared[:, None])).sum(-1)
        return kept + alpha * (x * mask * (position > shared[:, None])).sum(-1)

    for logprobs in (policy, ref):
        ours = rlloss.desensitized_logps(logprobs[0], mask[0], logprobs[1], mask[1], alpha)
        torch.testing.assert_close(torch.stack(ours), theirs(logprobs), rtol=1e-12, atol=1e-12)


def test_wpo_weights_are_trls():
    policy, ref, mask = batch(0)
    log_sum_p2 = -ref.abs()
    aligned = ((policy - log_sum_p2) * mask).sum(-1) / mask.sum(-1)
    weights = aligned.exp().prod(0)
    ours = [rlloss.wpo_weights(x, p2.exp(), m) for x, p2, m in zip(policy, log_sum_p2, mask, strict=True)]
    torch.testing.assert_close(ours[0] * ours[1], weights)
    logps = sums(policy, ref, mask)
    theirs = (logistic(BETA * (logps[0] - logps[2] - logps[1] + logps[3])) * weights).mean()
    torch.testing.assert_close(DPOLoss(beta=BETA)(*logps, weights=ours[0] * ours[1]).loss, theirs)
