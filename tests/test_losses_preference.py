"""Paired preference losses against arithmetic done by hand, what they reduce to, and what goes into them."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

import rlloss
from rlloss import (
    AlphaPOLoss,
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    BetaDPOLoss,
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
    SimPOLoss,
    SPPOLoss,
    TDPOLoss,
    TPOLoss,
    combine,
    desensitized_logps,
    divergence_score,
    log1mexp,
    power_score,
    scalars,
    waist_gradient,
    wpo_weights,
)

LOG2, LOG3 = math.log(2), math.log(3)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_slopes(loss_fn, *inputs, **extra):
    """The loss, and its slopes in the first two inputs (chosen and rejected)."""
    chosen, rejected = (x.clone().requires_grad_() for x in inputs[:2])
    loss = loss_fn(chosen, rejected, *inputs[2:], **extra).loss
    return loss.item(), *(x.tolist() for x in torch.autograd.grad(loss, (chosen, rejected)))


def softplus(x):
    return math.log1p(math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pair(c, r):
    """One pair with these log-ratios."""
    return tensor(c - 5.0), tensor(r - 6.0), tensor(-5.0), tensor(-6.0)


# of one margin: with beta = 1/2, h = 2 log 3 is beta h = log 3, where sigmoid is 3/4


@pytest.mark.parametrize(
    ("h", "loss", "slope"), [(1.0, 0.5, -0.5), (2.0, 0.0, 0.0), (5.0, 0.0, 0.0), (-3.0, 2.5, -0.5)]
)
def test_hinge_by_hand(h, loss, slope):
    assert loss_and_slopes(HingeLoss(beta=0.5), *pair(h, 0.0)) == (close(loss), close([slope]), close([-slope]))


def test_hinge_is_slic_of_a_margin_in_nats():
    # max(0, delta - h) of delta = 4: h = 3 and -3
    chosen, rejected = tensor(-4.0, -7.0), tensor(-7.0, -4.0)
    loss_fn = rlloss.get_loss("SLiC-HF", beta=1 / 4)
    assert 4 * float(loss_fn(chosen, rejected).loss) == close((1 + 7) / 2)


@pytest.mark.parametrize("x", [LOG3, -LOG3])
def test_robust_by_hand(x):
    # e = 1/4: (3/4 L(x) - 1/4 L(-x)) / (1/2), of slope 1/2 (sigmoid - 3/2)
    loss, chosen, rejected = loss_and_slopes(RobustDPOLoss(beta=0.5, label_smoothing=0.25), *pair(2 * x, 0.0))
    assert loss == close(1.5 * softplus(-x) - 0.5 * softplus(x))
    assert chosen == close([0.5 * (sigmoid(x) - 1.5)])
    assert rejected == close([-chosen[0]])


@pytest.mark.parametrize("e", [0.1, 0.4])
def test_robust_is_unbiased_under_flips(e):
    logps, robust, dpo = draws(4, 6), RobustDPOLoss(label_smoothing=e), DPOLoss()
    flipped = logps[[1, 0, 3, 2]]
    expected = (1 - e) * robust(*logps).loss + e * robust(*flipped).loss
    assert expected.item() == close(dpo(*logps).loss.item())
    assert RobustDPOLoss(label_smoothing=0.0)(*logps).loss == dpo(*logps).loss


def test_exo_by_hand():
    # q = 3/4 against 4/5 and 1/5: slope 1/2 * 3/16 (log 3 - log 4)
    loss, chosen, rejected = loss_and_slopes(EXOLoss(beta=0.5, label_smoothing=0.2), *pair(2 * LOG3, 0.0))
    assert loss == close(0.75 * math.log(0.75 / 0.8) + 0.25 * math.log(0.25 / 0.2))
    assert chosen == close([0.5 * 3 / 16 * math.log(3 / 4)])
    assert rejected == close([-chosen[0]])


def test_exo_is_the_kl_that_dpo_takes_the_other_way():
    e, h = 0.2, tensor(0.7)
    q, p = torch.sigmoid(0.5 * h), 1 - e
    exo = EXOLoss(beta=0.5, label_smoothing=e, reference_free=True)(h, torch.zeros_like(h)).loss
    assert exo.item() == close((q * (q / p).log() + (1 - q) * ((1 - q) / e).log()).item())
    dpo = DPOLoss(beta=0.5, label_smoothing=e, reference_free=True)(h, torch.zeros_like(h)).loss
    entropy = -p * math.log(p) - e * math.log(e)
    assert dpo.item() - entropy == close((p * (p / q).log() + e * (e / (1 - q)).log()).item())


@pytest.mark.parametrize("x", [0.3, -0.3, 0.01])
def test_discopop_by_hand(x):
    g = sigmoid(x / 0.05)
    loss, chosen, _ = loss_and_slopes(DiscoPOPLoss(beta=0.5), *pair(2 * x, 0.0))
    assert loss == close((1 - g) * softplus(-x) + g * math.exp(-x))
    hump = g * (1 - g) / 0.05 * (math.exp(-x) - softplus(-x))
    assert chosen == close([0.5 * (hump - (1 - g) * sigmoid(-x) - g * math.exp(-x))])


def test_discopop_is_logistic_where_lost_and_exponential_where_won():
    assert DiscoPOPLoss()(*pair(-50.0, 0.0)).loss.item() == close(softplus(5.0))
    assert DiscoPOPLoss()(*pair(50.0, 0.0)).loss.item() == close(math.exp(-5.0))


# of both log-ratios: with beta = 1/2, log-ratios of 2 log 3 and -2 log 3


def test_nca_by_hand():
    # s(beta c) = 3/4 and s(beta r) = 1/4: -log 3/4 - (log 1/4 + log 3/4) / 2
    loss, chosen, rejected = loss_and_slopes(NCALoss(beta=0.5), *pair(2 * LOG3, -2 * LOG3))
    assert loss == close(-1.5 * math.log(0.75) - 0.5 * math.log(0.25))
    assert (chosen, rejected) == (close([0.5 * (0.375 - 0.25)]), close([0.5 * 0.125]))


def test_nca_holds_the_chosen_answer_at_log_2():
    _, chosen, _ = loss_and_slopes(NCALoss(beta=0.5), *pair(2 * LOG2, 7.0))  # sigmoid / 2 = 1 - sigmoid at 2/3
    assert chosen == close([0.0])


def test_sppo_by_hand():
    # targets 2 and -2: (3 - 2)^2 + (1 + 2)^2
    assert loss_and_slopes(SPPOLoss(beta=0.25), *pair(3.0, 1.0)) == (close(10.0), close([2.0]), close([6.0]))
    # win rates of 3/4 and 1/2: targets 1 and 0
    rates = {"chosen_win_rate": tensor(0.75), "rejected_win_rate": tensor(0.5)}
    assert loss_and_slopes(SPPOLoss(beta=0.25), *pair(3.0, 1.0), **rates) == (close(5.0), close([4.0]), close([2.0]))


def test_apo_by_hand():
    # 1 - 3/4 + 1/4, of slopes 1/2 * 3/16
    bump = 0.5 * 3 / 16
    assert loss_and_slopes(APOZeroLoss(beta=0.5), *pair(2 * LOG3, -2 * LOG3)) == (
        close(0.5),
        close([-bump]),
        close([bump]),
    )
    # h = 2 log 3 + 2 log 3, where sigmoid(beta h) = 9/10
    loss, chosen, rejected = loss_and_slopes(APODownLoss(beta=0.5), *pair(2 * LOG3, -2 * LOG3))
    assert loss == close(0.75 + 0.1)
    assert (chosen, rejected) == (close([bump - 0.5 * 0.09]), close([0.5 * 0.09]))


def test_bco_pair_by_hand():
    # rewards 1 + log 3 and 1 - log 3: their mean is 1, so that both are told apart with 3/4
    logps = pair(2 + 2 * LOG3, 2 - 2 * LOG3)
    loss, chosen, rejected = loss_and_slopes(BCOPairLoss(beta=0.5), *logps)
    assert loss == close(2 * math.log(4 / 3))
    assert (chosen, rejected) == (close([-0.125]), close([0.125]))  # delta carries no gradient
    for delta in (0.0, tensor(0.0)[0].float()):
        assert BCOPairLoss(beta=0.5)(*logps, delta=delta).loss.item() == close(softplus(-1 - LOG3) + softplus(1 - LOG3))
    assert scalars(BCOPairLoss(beta=0.5)(*logps, delta=0.25).metrics)["delta"] == 0.25


def test_bco_pairs_threshold_is_of_the_pairs_that_count():
    chosen, rejected, ref = tensor(4.0, 9.0, 2.0), tensor(2.0, 9.0, 0.0), torch.zeros(3, dtype=torch.float64)
    mask, weights = torch.tensor([True, False, True]), tensor(1.0, 1.0, 0.0)

    def delta(**extra):
        return float(BCOPairLoss(beta=0.5).statistics(chosen, rejected, ref, ref, **extra)["delta"])

    assert delta() == close((1.5 + 4.5 + 0.5) / 3)
    assert delta(mask=mask) == close((1.5 + 0.5) / 2)
    assert delta(mask=mask, weights=weights) == close(1.5)
    assert delta(mask=mask, beta=tensor(1.0, 1.0, 3.0)) == close((3.0 + 3.0) / 2)


def test_cal_dpo_by_hand():
    # targets 1 and -1: softplus(-(2 - 1)) + (2 - 1)^2 + (1 + 1)^2
    loss, chosen, rejected = loss_and_slopes(CalDPOLoss(beta=0.5), *pair(2.0, 1.0))
    assert loss == close(softplus(-1.0) + 5.0)
    assert (chosen, rejected) == (close([2.0 - sigmoid(-1.0)]), close([4.0 + sigmoid(-1.0)]))


def test_tdpo_by_hand():
    # x = 1/2 (2 - 1/2 (3 - 1)) = 1/2
    drift = {"chosen_kl": tensor(1.0), "rejected_kl": tensor(3.0).requires_grad_()}
    out = TDPOLoss(beta=0.5)(*pair(2.0, 0.0), **drift)
    assert out.loss.item() == close(softplus(-0.5))
    assert torch.autograd.grad(out.loss, drift["rejected_kl"])[0].tolist() == close([0.25 * sigmoid(-0.5)])
    assert scalars(out.metrics)["margin"] == close(1.0)
    # TDPO1: x = 1/2 (2 - (3 - 1))
    assert rlloss.get_loss("tdpo1", beta=0.5)(*pair(2.0, 0.0), **drift).loss.item() == close(LOG2)


@pytest.mark.parametrize(("stop", "moves"), [(True, False), (False, True)])
def test_tdpo_stops_the_gradient_of_the_chosen_drift(stop, moves):
    chosen_kl = tensor(1.0).requires_grad_()
    logps = [x.requires_grad_() for x in pair(2.0, 0.0)]
    loss = TDPOLoss(stop_chosen=stop)(*logps, chosen_kl=chosen_kl, rejected_kl=tensor(3.0)).loss
    loss.backward()
    assert (chosen_kl.grad is not None) == moves


def test_tdpo_alike_drifts_are_dpo():
    logps, drift = draws(4, 6), draws(6, seed=1).abs()
    for loss_fn, kl in ((TDPOLoss(beta=0.3), drift), (TDPOLoss(beta=0.3, alpha=0.0), 2 * drift)):
        assert loss_fn(*logps, chosen_kl=drift, rejected_kl=kl).loss.item() == close(
            DPOLoss(beta=0.3)(*logps).loss.item()
        )


# batch statistics


def test_beta_dpo_by_hand():
    # margins 3 and 1, of mean 2: beta = 1/4 (1 + 1/2 (2 - 1)) = 3/8
    inputs = tensor(3.0, 1.0), tensor(0.0, 0.0), tensor(0.0, 0.0), tensor(0.0, 0.0)
    loss_fn = BetaDPOLoss(beta=0.25, alpha=0.5)
    loss_fn.running_margin.fill_(1.0)
    loss, chosen, rejected = loss_and_slopes(loss_fn, *inputs)
    assert loss == close((softplus(-9 / 8) + softplus(-3 / 8)) / 2)
    assert chosen == close([-3 / 16 * sigmoid(-9 / 8), -3 / 16 * sigmoid(-3 / 8)])
    assert rejected == close([-x for x in chosen])
    assert scalars(loss_fn(*inputs).metrics)["beta"] == close(3 / 8)
    assert loss_fn(*inputs, step_margin=1.0).loss.item() == close(DPOLoss(beta=0.25)(*inputs).loss.item())
    assert scalars(loss_fn(*inputs, step_margin=-99.0).metrics)["beta"] == close(1e-3)


def test_beta_dpo_remembers_the_mean_margin():
    loss_fn = BetaDPOLoss(momentum=0.75)
    for margin in (4.0, torch.tensor(8.0, requires_grad=True)):
        loss_fn.update(margin)
    assert loss_fn.running_margin == 0.75 * 1 + 0.25 * 8
    by_its_metrics = BetaDPOLoss(momentum=0.75)
    for margin in (4.0, 8.0):
        by_its_metrics.after_step(by_its_metrics(*torch.zeros(4, 2), step_margin=margin).metrics)
    assert by_its_metrics.running_margin == 2.75
    other = BetaDPOLoss()
    other.load_state_dict(loss_fn.state_dict())
    assert other.running_margin == 2.75


@pytest.mark.unhooked
@pytest.mark.parametrize("loss_fn", [BCOPairLoss(), BetaDPOLoss()], ids=["bco_pair", "beta_dpo"])
def test_a_part_of_a_step_asks_for_the_statistic_of_the_whole(loss_fn):
    logps, name = draws(4, 6), loss_fn.statistic
    with pytest.raises(ValueError, match=f"pass {name}=loss_fn.statistics"):
        loss_fn(*logps[:, :2], normalizer=6)
    given = loss_fn.statistics(*logps)
    parts = [loss_fn(*logps[:, part], normalizer=6, **given).loss.item() for part in (slice(2), slice(2, 6))]
    assert sum(parts) == close(loss_fn(*logps).loss.item())


# by rank


def test_aot_by_hand():
    # margins 1, -2 and 4 sort to -2, 1, 4; the reference's 2, 0 and 1 to 0, 1, 2: h = -2, 0, 2
    chosen, rejected = tensor(1.0, -2.0, 4.0), tensor(0.0, 0.0, 0.0)
    ref_chosen, ref_rejected = tensor(2.0, 0.0, 1.0), tensor(0.0, 0.0, 0.0)
    loss, of_chosen, of_rejected = loss_and_slopes(AOTLoss(beta=0.5), chosen, rejected, ref_chosen, ref_rejected)
    assert loss == close((softplus(1.0) + LOG2 + softplus(-1.0)) / 3)
    assert of_chosen == close([-0.5 / 6, -0.5 * sigmoid(1.0) / 3, -0.5 * sigmoid(-1.0) / 3])
    assert of_rejected == close([-x for x in of_chosen])
    metrics = scalars(AOTLoss(beta=0.5)(chosen, rejected, ref_chosen, ref_rejected).metrics)
    assert metrics["accuracy"] == close(1 / 3)
    assert (metrics["margin"], metrics["margin_std"]) == (close(0.0), close(0.5 * math.sqrt(8 / 3)))
    assert (metrics["chosen_reward"], metrics["rejected_reward"]) == (close(0.0), close(0.0))


def test_aot_unpaired_by_hand():
    # chosen log-ratios 3 and 0, rejected ones 1 and 2: h = 0 - 1 and 3 - 2; by prompts it were 2 and -2
    ref = tensor(0.0, 0.0)
    loss, chosen, rejected = loss_and_slopes(AOTUnpairedLoss(beta=0.5), tensor(3.0, 0.0), tensor(1.0, 2.0), ref, ref)
    assert loss == close((softplus(0.5) + softplus(-0.5)) / 2)
    assert chosen == close([-0.25 * sigmoid(-0.5), -0.25 * sigmoid(0.5)])
    assert rejected == close([0.25 * sigmoid(0.5), 0.25 * sigmoid(-0.5)])
    metrics = scalars(AOTUnpairedLoss(beta=0.5)(tensor(3.0, 0.0), tensor(1.0, 2.0), ref, ref).metrics)
    assert (metrics["accuracy"], metrics["margin_std"]) == (0.5, close(0.5))
    tied = AOTUnpairedLoss()(tensor(3.0, 0.0), tensor(0.0, 1.0), ref, ref)  # h = 0 and 2
    assert scalars(tied.metrics)["accuracy"] == 0.5


@pytest.mark.unhooked
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_ranks_have_no_weight(name):
    logps = draws(4, 3)
    for keyword in ("weights", "beta"):
        with pytest.raises(ValueError, match=f"so that {keyword} would act on no pair"):
            rlloss.get_loss(name)(*logps, **{keyword: torch.ones_like(logps[0])})


@pytest.mark.parametrize("loss", [AOTLoss, AOTUnpairedLoss])
def test_one_pair_has_no_rank(loss):
    logps = draws(4, 1)
    for smoothing in (0.0, 0.2):
        aot, dpo = loss(beta=0.3, label_smoothing=smoothing), DPOLoss(beta=0.3, label_smoothing=smoothing)
        for one, other in zip(loss_and_slopes(aot, *logps), loss_and_slopes(dpo, *logps), strict=True):
            assert one == close(other)


@pytest.mark.parametrize("loss", [AOTLoss, AOTUnpairedLoss])
def test_a_step_of_ranks_goes_through_its_waist(loss):
    logps, loss_fn = draws(4, 6), loss()
    out, gradients = waist_gradient(lambda c, r: loss_fn(c, r, *logps[2:]), logps[0], logps[1])
    whole, *slopes = loss_and_slopes(loss_fn, *logps)
    assert out.loss.item() == close(whole)
    assert [g.tolist() for g in gradients] == [close(x) for x in slopes]


# without a reference


def test_cpo_by_hand():
    # beta h = 1/2 * 2 log 3: log(4/3) + 2 * 3, of slopes -1/8 - 2 and 1/8
    chosen, rejected = tensor(-3.0), tensor(-3.0 - 2 * LOG3)
    loss, *slopes = loss_and_slopes(CPOLoss(beta=0.5, nll_coef=2.0), chosen, rejected)
    assert loss == close(math.log(4 / 3) + 6)
    assert slopes == [close([-2.125]), close([0.125])]
    bare = CPOLoss(beta=0.5, nll_coef=0.0, label_smoothing=0.1)
    assert (
        bare(chosen, rejected).loss
        == DPOLoss(beta=0.5, label_smoothing=0.1, reference_free=True)(chosen, rejected).loss
    )


def test_tpo_by_hand():
    gold = tensor(-4.0).requires_grad_()
    out = TPOLoss(beta=0.5, margin=0.25, nll_coef=0.5)(tensor(-1.0), tensor(-2.0), gold_logps=gold)
    assert out.loss.item() == close(softplus(-0.25) + 2.0)
    assert torch.autograd.grad(out.loss, gold)[0].tolist() == [-0.5]
    simpo = SimPOLoss(beta=0.01, margin=0.5)(tensor(-1.0), tensor(-2.0)).loss.item()
    assert rlloss.get_loss("tpo-l", nll_coef=0.0)(tensor(-1.0), tensor(-2.0)).loss.item() == close(simpo)


def test_alpha_po_by_hand():
    # p = 1/2 and 1/4: rewards -1 and -3 at alpha = 1; 1/2 * 2 - 1 = 0, of slopes 1/2 * (-1/2) * (2, 4)
    halves = tensor(-LOG2), tensor(-2 * LOG2)
    loss, chosen, rejected = loss_and_slopes(AlphaPOLoss(beta=0.5, alpha=1.0, margin=1.0), *halves)
    assert (loss, chosen, rejected) == (close(LOG2), close([-0.5]), close([1.0]))
    # alpha = -1: p - 1, so that 1/2 * 1/4 - 1
    assert AlphaPOLoss(beta=0.5, alpha=-1.0, margin=1.0)(*halves).loss.item() == close(softplus(7 / 8))
    metrics = scalars(AlphaPOLoss(beta=0.5, alpha=1.0, margin=1.0)(*halves).metrics)
    assert (metrics["chosen_reward"], metrics["rejected_reward"]) == (close(-0.5), close(-1.5))
    assert metrics["score_bounded_frac"] == 0


def test_alpha_po_at_zero_is_simpo():
    means = -draws(2, 6).abs()
    simpo = loss_and_slopes(SimPOLoss(label_smoothing=0.1), *means)
    assert loss_and_slopes(AlphaPOLoss(alpha=0.0, label_smoothing=0.1), *means) == simpo
    for near, exact in zip(loss_and_slopes(AlphaPOLoss(alpha=1e-9, label_smoothing=0.1), *means), simpo, strict=True):
        assert near == pytest.approx(exact, rel=1e-8)


def test_alpha_po_says_where_its_reward_is_bounded():
    # exponents of 25, 25 and -25 nats at alpha = 1/4; 25 nats the other way at -1/4
    chosen, rejected = tensor(-100.0, -1.0, 100.0), tensor(-1.0, -100.0, 0.0)
    assert scalars(AlphaPOLoss()(chosen, rejected).metrics)["score_bounded_frac"] == close(2 / 3)
    assert scalars(AlphaPOLoss(alpha=-0.25)(chosen, rejected).metrics)["score_bounded_frac"] == close(1 / 3)


def test_orpo_by_hand():
    # p = 3/4 and 1/2: the odds are 3 and 1, sigmoid(log 3) = 3/4; 1/(1 - p) is 4 and 2
    loss, chosen, rejected = loss_and_slopes(ORPOLoss(beta=0.5, nll_coef=2.0), tensor(math.log(0.75)), tensor(-LOG2))
    assert loss == close(2 * math.log(4 / 3) + 0.5 * math.log(4 / 3))
    assert (chosen, rejected) == (close([-2 - 0.5]), close([0.25]))


def test_orpo_is_harmless_where_an_answer_is_certain():
    for logps in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-30, -1e4), (-1e4, -1e-30), (1e-8, -1.0), (-1e-8, -1e-8)):
        leaves = [torch.tensor([x], requires_grad=True) for x in logps]
        out = ORPOLoss()(*leaves)
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_log1mexp_loses_no_digit():
    for x in (-1e-9, -1e-5, -0.5, -LOG2, -0.7, -5.0, -40.0, -700.0):
        held = min(x, -math.exp(-20))
        expected = math.log(-math.expm1(held)) if x > -LOG2 else math.log1p(-math.exp(x))
        leaf = tensor(x).requires_grad_()
        value = log1mexp(leaf)
        assert value.item() == pytest.approx(expected, rel=1e-14)
        slope = torch.autograd.grad(value.sum(), leaf)[0].item()
        assert slope == pytest.approx(-math.exp(x) / -math.expm1(x) if x < -math.exp(-20) else 0.0, rel=1e-12)


# scores of a divergence


@pytest.mark.parametrize(
    ("divergence", "score", "slope"),
    [
        ("reverse_kl", LOG3, 1.0),
        ("forward_kl", 1 - 1 / 3, 1 / 3),
        ("jensen_shannon", math.log(1.5), 1 / 4),
        ("alpha", 2 * (1 - 3**-0.5), 3**-0.5),
    ],
)
def test_scores_by_hand(divergence, score, slope):
    log_ratio = tensor(LOG3).requires_grad_()  # u = 3
    value = divergence_score(log_ratio, divergence)
    assert value.item() == close(score)
    assert torch.autograd.grad(value.sum(), log_ratio)[0].item() == close(slope)
    assert divergence_score(tensor(0.0), divergence).item() == close(0.0)
    # DPO sees the difference of two of them
    logps = pair(LOG3, 0.0)
    out = DPOLoss(beta=0.5, divergence=divergence)(*logps)
    assert out.loss.item() == close(softplus(-0.5 * score))
    assert scalars(out.metrics)["chosen_reward"] == close(0.5 * score)


def test_the_alpha_divergence_passes_from_the_reverse_to_the_forward_kl():
    log_ratio = draws(6)
    torch.testing.assert_close(divergence_score(log_ratio, "alpha", 1.0), divergence_score(log_ratio, "forward_kl"))
    torch.testing.assert_close(divergence_score(log_ratio, "alpha", 1e-10), log_ratio, rtol=1e-8, atol=0)


@pytest.mark.parametrize("loss", [DPOLoss, IPOLoss, HingeLoss, RobustDPOLoss, EXOLoss, DiscoPOPLoss])
@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
@pytest.mark.parametrize("nats", [100.0, -100.0, 1e4, -1e4])
def test_no_score_overflows(loss, divergence, nats):
    loss_fn = loss(divergence=divergence)
    leaves = [torch.tensor([x], requires_grad=True) for x in (nats, -1.0)]
    for logps in (leaves, leaves[::-1]):
        out = loss_fn(*logps, torch.zeros(1), torch.zeros(1))
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)
    if divergence != "jensen_shannon":
        assert scalars(out.metrics)["score_bounded_frac"] == (nats < 0)


def test_a_bounded_score_says_so_and_has_no_gradient():
    log_ratio = tensor(-19.9, -20.1).requires_grad_()
    slopes = torch.autograd.grad(power_score(log_ratio, 1.0).sum(), log_ratio)[0].tolist()
    assert slopes == [pytest.approx(math.exp(19.9)), 0.0]
    out = DPOLoss(divergence="forward_kl")(
        tensor(0.0, -21.0, 0.0), tensor(0.0, 0.0, -21.0), *torch.zeros(2, 3).double()
    )
    assert scalars(out.metrics)["score_bounded_frac"] == close(2 / 3)


# per pair: strengths and labels


def test_soft_labels_by_hand():
    # beta h = log 3: 0.9 log(4/3) + 0.1 log 4
    loss, chosen, _ = loss_and_slopes(DPOLoss(beta=0.5), *pair(2 * LOG3, 0.0), soft_labels=tensor(0.9))
    assert loss == close(0.9 * math.log(4 / 3) + 0.1 * math.log(4))
    assert chosen == close([0.5 * (0.75 - 0.9)])


def test_soft_labels_of_one_number_are_smoothing():
    logps = draws(4, 5)
    soft = torch.full((5,), 0.8, dtype=torch.float64)
    for one, other in zip(
        loss_and_slopes(DPOLoss(), *logps, soft_labels=soft),
        loss_and_slopes(DPOLoss(label_smoothing=0.2), *logps),
        strict=True,
    ):
        assert one == close(other)


EVERY: list[Any] = [
    DPOLoss,
    IPOLoss,
    HingeLoss,
    RobustDPOLoss,
    EXOLoss,
    DiscoPOPLoss,
    NCALoss,
    SPPOLoss,
    APOZeroLoss,
    APODownLoss,
    BCOPairLoss,
    CalDPOLoss,
    SimPOLoss,
    CPOLoss,
    AlphaPOLoss,
    ORPOLoss,
]


@pytest.mark.parametrize("loss", EVERY)
def test_a_pairs_own_beta_is_the_losss_for_that_pair(loss):
    logps = (-draws(4, 2).abs())[: 4 if loss().needs_reference else 2]
    keywords = {"delta": 0.5} if loss is BCOPairLoss else {}
    singly = [loss(beta=b)(*logps[:, i : i + 1], **keywords) for i, b in enumerate((0.2, 0.7))]
    out = loss(beta=9.0)(*logps, beta=tensor(0.2, 0.7), **keywords)
    assert out.loss.item() == close(sum(x.loss.item() for x in singly) / 2)
    for name, value in scalars(out.metrics).items():
        if not name.endswith("std"):
            assert value == close(sum(scalars(x.metrics)[name] for x in singly) / 2)


@pytest.mark.parametrize("loss", [IPOLoss, SPPOLoss, CalDPOLoss])
def test_the_beta_of_a_pair_that_does_not_count_may_be_anything(loss):
    logps, keep = draws(4, 3), {"mask": torch.tensor([True, False, True]), "weights": tensor(1.0, 1.0, 0.0)}
    expected = loss_and_slopes(loss(), *logps, **keep, beta=tensor(0.3, 0.3, 0.3))
    for value in (0.0, math.nan, math.inf):
        assert loss_and_slopes(loss(), *logps, **keep, beta=tensor(0.3, value, value)) == expected


@pytest.mark.parametrize("loss", [HingeLoss, RobustDPOLoss, EXOLoss, DiscoPOPLoss])
def test_losses_of_the_margin_see_it_alone(loss):
    inputs = draws(4, 5)
    loss_fn, whole = loss(), loss()(*inputs).loss.item()
    assert loss_fn(inputs[0] + 3, inputs[1] + 3, *inputs[2:]).loss == close(whole)
    assert loss_fn(inputs[0] + 3, inputs[1], inputs[2] + 3, inputs[3]).loss == close(whole)
    means = loss(length_normalized=True)
    assert means.length_normalized
    assert means(*inputs).loss.item() == whole


# what goes into them


def test_desensitized_logps_by_hand():
    # three trained tokens against two, and one against three; what is masked is not counted
    chosen, rejected = (
        tensor([-1.0, -9.0, -2.0, -4.0], [-5.0, -9.0, -9.0, -9.0]),
        tensor([-1.0, -3.0, -9.0], [-1.0, -2.0, -4.0]),
    )
    chosen_mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    rejected_mask = torch.tensor([[True, True, False], [True, True, True]])
    args = (chosen, chosen_mask, rejected, rejected_mask, 0.25)
    made = desensitized_logps(*args)
    assert [x.tolist() for x in made] == [[-1 - 2 - 1, -5], [-4, -1 - 1.5]]
    assert [x.tolist() for x in made] == [close(x) for x in rlloss.reference.desensitized_logps(*map_numpy(args))]
    packed = [x[m] for x, m in ((chosen, chosen_mask), (rejected, rejected_mask))]
    ones = [torch.ones(len(x), dtype=torch.bool) for x in packed]
    again = desensitized_logps(
        packed[0],
        ones[0],
        packed[1],
        ones[1],
        0.25,
        chosen_cu_seqlens=torch.tensor([0, 3, 4]),
        rejected_cu_seqlens=torch.tensor([0, 2, 5]),
    )
    assert all(torch.equal(x, y) for x, y in zip(again, made, strict=True))


def map_numpy(values):
    return [x.numpy() if isinstance(x, torch.Tensor) else x for x in values]


def test_desensitized_logps_pass_from_the_shared_length_to_the_sum():
    logprobs, mask = -draws(2, 3, 6).abs(), draws(2, 3, 6, seed=1) > 0
    inputs = (logprobs[0], mask[0], logprobs[1], mask[1])
    for made, side in zip(desensitized_logps(*inputs, 1.0), range(2), strict=True):
        torch.testing.assert_close(made, rlloss.sequence_logps(logprobs[side], mask[side]))
    # with alpha = 0 what is beyond is rejected, whatever stands there
    beyond = mask.cumsum(-1) > mask.sum(-1).amin(0)[None, :, None]
    strange = torch.where(beyond | ~mask, -math.inf, logprobs)
    for one, other in zip(
        desensitized_logps(strange[0], mask[0], strange[1], mask[1], 0.0), desensitized_logps(*inputs, 0.0), strict=True
    ):
        assert torch.equal(one, other)


def test_wpo_weights_by_hand():
    logprobs, mask = (
        tensor([0.5, 0.25, 0.1], [0.3, 0.1, 0.1]).log().requires_grad_(),
        torch.zeros(2, 3, dtype=torch.bool),
    )
    mask[0, :2] = True
    sum_p2 = tensor([0.5, 0.5, 0.0], [0.0, 0.0, 0.0]).requires_grad_()
    weights = wpo_weights(logprobs, sum_p2, mask)
    assert weights.tolist() == close([math.sqrt(0.5), 1.0])
    assert not weights.requires_grad
    assert rlloss.reference.wpo_weights(logprobs.detach().numpy(), np.ones((2, 3)) / 2, mask.numpy()) == close(
        [math.sqrt(0.5), 1.0]
    )


def test_wpo_of_a_sharp_policy_is_one():
    logits = torch.tensor([[[50.0, 0.0, 0.0], [0.0, 50.0, 0.0]]])
    stats = rlloss.token_logprobs(logits, torch.tensor([[0, 1]]), outputs=("logprobs", "sum_p2"))
    assert wpo_weights(stats.logprobs, stats.sum_p2, torch.ones(1, 2, dtype=torch.bool)).tolist() == [1.0]


# recipes


def test_rpo_is_dpo_and_the_chosen_answers_likelihood():
    logprobs, mask = -draws(2, 4, 5).abs(), draws(2, 4, 5, seed=1) > -1
    mask[..., 0] = True
    logps = [rlloss.sequence_logps(x, m) for x, m in zip(logprobs, mask, strict=True)]
    refs = [x + 0.5 for x in logps]
    dpo = DPOLoss()(*logps, refs[0], refs[1] - 1)
    out = combine(preference=dpo, nll=0.2 * SFTLoss(reduction="sequence_mean")(logprobs[0], mask[0]))
    per_answer = -(logprobs[0] * mask[0]).sum(-1) / mask[0].sum(-1)
    assert out.loss.item() == close(dpo.loss.item() + 0.2 * per_answer.mean().item())
    cpo = combine(preference=CPOLoss(nll_coef=0.0)(*logps), nll=SFTLoss()(logprobs[0], mask[0]))
    tokens = -(logprobs[0] * mask[0]).sum() / mask[0].sum()
    expected = CPOLoss()(*logps).loss + logps[0].mean() + tokens
    assert cpo.loss.item() == close(expected.item())
    assert {"preference/accuracy", "nll/nll"} <= cpo.metrics.keys()


def test_mpo_joins_preference_quality_and_generation():
    logps, logprobs, mask = draws(4, 3), -draws(3, 4).abs(), torch.ones(3, 4, dtype=torch.bool)
    parts = DPOLoss()(*logps), BCOPairLoss()(*logps, delta=0.0), SFTLoss()(logprobs, mask)
    out = combine(preference=0.8 * parts[0], quality=0.2 * parts[1], generation=parts[2])
    assert out.loss.item() == close(0.8 * parts[0].loss.item() + 0.2 * parts[1].loss.item() + parts[2].loss.item())


# names, defaults, and what is refused


def test_a_name_may_stand_for_options():
    assert rlloss.get_loss("sigmoid_norm", beta=5.0).length_normalized
    assert rlloss.get_loss("length-normalized-dpo").length_normalized
    assert not rlloss.get_loss("dpo").length_normalized
    assert rlloss.get_loss("slic").reference_free
    assert not rlloss.get_loss("slic", reference_free=False).reference_free
    assert not rlloss.get_loss("rso").reference_free
    assert rlloss.get_loss("tpo_l").margin == 0.5
    assert "sigmoid_norm" not in rlloss.list_losses()
    assert rlloss.registry.loss_family("sigmoid_norm") == "preference"
    assert "label_smoothing" in rlloss.registry.loss_hyperparameters("sigmoid_norm")
    with pytest.raises(ValueError, match="tpo_l has no hyperparameter 'gamma'"):
        rlloss.get_loss("tpo_l", gamma=1.0)


@pytest.mark.parametrize(
    ("alias", "loss"),
    [
        ("exo_pair", EXOLoss),
        ("nca_pair", NCALoss),
        ("sppo_hard", SPPOLoss),
        ("rDPO", RobustDPOLoss),
        ("sigmoid", DPOLoss),
        ("AlphaPO", AlphaPOLoss),
        ("APO-zero", APOZeroLoss),
        ("tdpo2", TDPOLoss),
    ],
)
def test_trls_loss_types_are_names(alias, loss):
    assert type(rlloss.get_loss(alias)) is loss


DEFAULTS = [
    (HingeLoss(), "beta=0.1"),
    (RobustDPOLoss(), "label_smoothing=0.1"),
    (EXOLoss(), "label_smoothing=0.001"),
    (DiscoPOPLoss(), "tau=0.05"),
    (NCALoss(), "NCALoss(beta=0.1, reference_free=False)"),
    (SPPOLoss(), "SPPOLoss(beta=0.1, reference_free=False)"),
    (APOZeroLoss(), "APOZeroLoss(beta=0.1, reference_free=False)"),
    (APODownLoss(), "APODownLoss(beta=0.1, reference_free=False)"),
    (BCOPairLoss(), "BCOPairLoss(beta=0.1, reference_free=False)"),
    (CalDPOLoss(), "CalDPOLoss(beta=0.1, reference_free=False)"),
    (BetaDPOLoss(), "BetaDPOLoss(beta=0.1, reference_free=False, alpha=0.6, momentum=0.9, min_beta=0.001)"),
    (TDPOLoss(), "TDPOLoss(beta=0.1, alpha=0.5, stop_chosen=True)"),
    (AOTLoss(), "AOTLoss(beta=0.1, reference_free=False, label_smoothing=0.0)"),
    (AOTUnpairedLoss(), "AOTUnpairedLoss(beta=0.1, reference_free=False, label_smoothing=0.0)"),
    (CPOLoss(), "CPOLoss(beta=0.1, nll_coef=1.0, label_smoothing=0.0)"),
    (TPOLoss(), "TPOLoss(beta=0.01, nll_coef=1.0, margin=0.0, label_smoothing=0.0, length_normalized=False)"),
    (AlphaPOLoss(), "AlphaPOLoss(beta=2.0, alpha=0.25, margin=0.5, label_smoothing=0.0)"),
    (ORPOLoss(), "ORPOLoss(beta=0.1, nll_coef=1.0)"),
]


@pytest.mark.parametrize(("loss_fn", "says"), DEFAULTS, ids=lambda x: type(x).__module__.rpartition(".")[2])
def test_preference_losses_have_these_defaults(loss_fn, says):
    assert says in repr(loss_fn)


def test_losses_say_what_they_take():
    assert all(x.needs_reference for x, _ in DEFAULTS[:14])
    assert not any(x.needs_reference for x, _ in DEFAULTS[14:])
    assert [type(x) for x, _ in DEFAULTS if x.length_normalized] == [AlphaPOLoss, ORPOLoss]
    kinds = {type(x): x.exactness for x, _ in DEFAULTS if x.exactness != "sum"}
    assert kinds == {BCOPairLoss: "statistic", BetaDPOLoss: "statistic", AOTLoss: "waist", AOTUnpairedLoss: "waist"}


A = torch.zeros(2)
REFUSED = [
    (lambda: RobustDPOLoss(label_smoothing=0.5), r"label_smoothing must be a number in \[0, 0.5\), got 0.5"),
    (lambda: EXOLoss(label_smoothing=0.0), r"EXOLoss: label_smoothing must be a number in \(0, 0.5\], got 0.0"),
    (lambda: DiscoPOPLoss(tau=2.0), r"DiscoPOPLoss: tau must be a number in \(0, 1\], got 2.0"),
    (lambda: DPOLoss(divergence=cast(Any, "js")), r"divergence must be one of .*'jensen_shannon'"),
    (lambda: DPOLoss(divergence="alpha", divergence_alpha=0.0), r"divergence_alpha must be a number in \(0, 1\]"),
    (lambda: DPOLoss(divergence="alpha", reference_free=True), "which reference_free=True leaves out"),
    (lambda: IPOLoss(divergence="forward_kl", length_normalized=True), "length_normalized=True leaves out"),
    (lambda: rlloss.get_loss("nca", divergence="alpha"), "nca has no hyperparameter 'divergence'"),
    (lambda: DPOLoss(label_smoothing=0.1)(A, A, A, A, soft_labels=A), "soft_labels say of each pair what label_smoo"),
    (lambda: DPOLoss()(A, A, A, A, soft_labels=A[:1]), "soft_labels must have the shape of chosen_logps"),
    (lambda: DPOLoss()(A, A, A, A, beta=A.half()), "beta must be float32 or float64"),
    (lambda: AOTLoss()(A, A, A, A, weights=A), "AOTLoss: pairs are sorted apart, so that weights would act on no pair"),
    (lambda: AOTUnpairedLoss()(A, A, A, A, beta=A), "so that beta would act on no pair"),
    (lambda: AOTLoss()(A, A), "AOTLoss: needs ref_chosen_logps, got None"),
    (lambda: BetaDPOLoss()(A, A, A, A, beta=A), "sets beta by the step's mean margin"),
    (lambda: BetaDPOLoss()(A, A, A, A, normalizer=4), "pass step_margin=loss_fn.statistics"),
    (lambda: BCOPairLoss()(A, A, A, A, normalizer=4), "pass delta=loss_fn.statistics"),
    (lambda: BCOPairLoss()(A, A, A, A, delta=A), r"delta must be one number for the whole step, got shape \[2\]"),
    (lambda: BCOPairLoss()(A, A, A, A, delta="0"), "delta must be a number"),
    (lambda: TDPOLoss()(A, A, A, A, chosen_kl=A), "TDPOLoss: needs rejected_kl, got None"),
    (lambda: TDPOLoss()(A, A, A, A), "TDPOLoss: needs chosen_kl, got None"),
    (lambda: TPOLoss()(A, A), "nll_coef=1.0 needs gold_logps, got None; pass the gold answers' log-probs"),
    (lambda: TPOLoss(nll_coef=0.0)(A, A, gold_logps=A), "nll_coef=0 leaves gold_logps unused; leave them out"),
    (lambda: CPOLoss(nll_coef=-1.0), r"CPOLoss: nll_coef must be a number in \[0, inf\], got -1.0"),
    (lambda: AlphaPOLoss(alpha=math.nan), "AlphaPOLoss: alpha must be a number"),
    (
        lambda: desensitized_logps(A[None], A[None] == 0, A[None], A[None] == 0, 1.5),
        r"alpha must be a number in \[0, 1\]",
    ),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
