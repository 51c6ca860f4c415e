"""Unpaired losses and those of reward models against arithmetic done by hand, and the identities between them."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rlloss
from rlloss import (
    APOZeroUnpairedLoss,
    BCOLoss,
    BradleyTerryLoss,
    DavidsonLoss,
    KTOLoss,
    MarginRankingLoss,
    Mean,
    PlackettLuceLoss,
    ProcessRewardLoss,
    RaoKupperLoss,
    RewardRegressionLoss,
    merge_metrics,
    scalars,
)

LOG2, LOG3 = math.log(2), math.log(3)  # sigmoid(log 3) = 3/4


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_slope(loss_fn, x, *inputs, **extra):
    leaf = x.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0].tolist()


# APO-zero without pairs

REF = tensor(-10.0, -20.0, -30.0)
LOGPS = REF + tensor(2 * LOG3, 2 * LOG3, -2 * LOG3)
UP = torch.tensor([True, False, False])


def test_apo_zero_unpaired_by_hand():
    # 2 * 1/4, 3 * 3/4 and 3 * 1/4 over 3 rows; slopes -+ 0.5 w 3/16
    loss_fn = APOZeroUnpairedLoss(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, slope = loss_and_slope(loss_fn, LOGPS, REF, UP)
    assert loss == close(3.5 / 3)
    assert slope == close([-0.0625, 0.09375, 0.09375])
    assert scalars(loss_fn(LOGPS, REF, UP).metrics) == {
        "accuracy": close(2 / 3),
        "desirable_reward": close(LOG3),
        "undesirable_reward": close(0.0),
    }


def test_apo_zero_unpaired_is_kto_whose_kl_is_0():
    logps, ref, up = draws(8), draws(8, seed=1), draws(8, seed=2) > 0
    options = {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6}
    kto, apo = KTOLoss(**options), APOZeroUnpairedLoss(**options)
    assert loss_and_slope(apo, logps, ref, up) == loss_and_slope(kto, logps, ref, up, kl=0.0)
    metrics = scalars(kto(logps, ref, up, kl=0.0).metrics)
    del metrics["kl"]
    assert scalars(apo(logps, ref, up).metrics) == metrics


def test_apo_zero_unpaired_of_a_pairs_rows_is_half_the_pairs_loss():
    # sigmoid(beta r_l) + 1 - sigmoid(beta r_w)
    chosen, rejected = 2.0, -1.0
    loss = APOZeroUnpairedLoss(beta=0.5)(tensor(chosen, rejected), tensor(0.0, 0.0), torch.tensor([True, False])).loss
    sigmoid = torch.sigmoid(tensor(0.5 * chosen, 0.5 * rejected))
    assert 2 * loss == close((sigmoid[1] + 1 - sigmoid[0]).item())


# BCO


def after(desirable, undesirable, **options):
    """BCO after one update by these rewards."""
    loss_fn = BCOLoss(**options)
    loss_fn.update(*(Mean.of(tensor(*x), torch.ones(len(x)).bool()) for x in (desirable, undesirable)))
    return loss_fn


def test_bco_by_hand():
    # delta 1/2: rewards 1/2 + log 3, 1/2 + log 3 and 1/2 - log 3 of beta 1/2
    logps = REF + tensor(1 + 2 * LOG3, 1 + 2 * LOG3, 1 - 2 * LOG3)
    loss_fn = after([2.0], [-1.0], beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, slope = loss_and_slope(loss_fn, logps, REF, UP)
    assert loss == close((2 * math.log(4 / 3) + 3 * math.log(4) + 3 * math.log(4 / 3)) / 3)
    assert slope == close([-0.5 * 2 / 4 / 3, 0.5 * 3 * 3 / 4 / 3, 0.5 * 3 / 4 / 3])
    assert scalars(loss_fn(logps, REF, UP).metrics) == {
        "accuracy": close(2 / 3),
        "desirable_reward": close(0.5 + LOG3),
        "undesirable_reward": close(0.5),
        "delta": close(0.5),
    }


def test_bco_is_right_about_what_lies_beyond_delta():
    loss_fn, ref = after([2.0], [-1.0], beta=0.5), tensor(0.0, 0.0)
    metrics = loss_fn(tensor(0.5, 0.5), ref, torch.tensor([True, False])).metrics  # rewards 1/4 against 1/2
    assert scalars(metrics)["accuracy"] == 0.5
    assert scalars(BCOLoss()(tensor(0.5), ref[:1], UP[:1]).metrics)["accuracy"] == 1.0
    assert scalars(loss_fn(tensor(0.5), ref[:1], UP[:1]).metrics)["accuracy"] == 0.0


def test_bco_at_the_reference_is_log_2_and_its_delta_0():
    loss_fn = BCOLoss()
    assert loss_fn.delta == 0
    assert loss_fn(REF, REF, UP).loss == close(LOG2)


def test_bco_delta_is_halfway_between_the_classes_however_many_rows_they_have():
    loss_fn = after([1.0, 2.0, 3.0], [-2.0])
    assert loss_fn.delta == 0.0
    loss_fn.update(Mean.of(tensor(6.0), torch.tensor([True])), Mean.of(tensor(-4.0), torch.tensor([True])))
    assert loss_fn.delta == 0.0  # (12 / 4 - 6 / 2) / 2
    loss_fn.update(Mean.of(tensor(8.0), torch.tensor([True])), Mean.of(tensor(0.0), torch.tensor([False])))
    assert loss_fn.delta == 0.5  # (20 / 5 - 6 / 2) / 2


def test_bco_delta_of_one_class_alone():
    assert after([3.0, 5.0], []).delta == 2.0  # the other is taken to be at the reference
    assert after([], [3.0, 5.0]).delta == 2.0
    assert after([], []).delta == 0.0


def test_bco_decay_forgets():
    loss_fn = after([4.0], [0.0], decay=0.5)
    loss_fn.update(*(Mean.of(tensor(x), torch.tensor([True])) for x in (1.0, 3.0)))
    assert loss_fn.delta == close((3 / 1.5 + 3 / 1.5) / 2)
    only_the_last = after([4.0], [0.0], decay=0.0)
    only_the_last.update(*(Mean.of(tensor(x), torch.tensor([True])) for x in (1.0, 3.0)))
    assert only_the_last.delta == 2.0
    # of a class that is absent for long, the mean stays
    loss_fn.update(*(Mean.of(tensor(x), torch.tensor([x > 0])) for x in (1.0, 0.0)))
    assert loss_fn.delta == close((2.5 / 1.75 + 1.5 / 0.75) / 2)


def test_bco_learns_from_its_metrics_in_any_parts():
    logps, ref, up = draws(6), draws(6, seed=1), torch.tensor([True, False, True, True, False, False])
    whole, split = BCOLoss(beta=0.5), BCOLoss(beta=0.5)
    metrics = whole(logps, ref, up).metrics
    parts = merge_metrics(split(logps[i], ref[i], up[i]).metrics for i in ([0, 2], [1, 3, 4], [5]))
    for loss_fn, of in ((whole, metrics), (split, parts)):
        loss_fn.update(of["desirable_reward"], of["undesirable_reward"])
    rewards = 0.5 * (logps - ref)
    assert whole.delta == close(float(rewards[up].mean() + rewards[~up].mean()) / 2)
    assert split.delta == close(float(whole.delta))


def test_bco_delta_is_state_and_changes_by_update_alone():
    loss_fn = after([1.0], [2.0])
    before = {k: x.clone() for k, x in loss_fn.state_dict().items()}
    loss_fn(LOGPS, REF, UP)
    assert all(torch.equal(x, before[k]) for k, x in loss_fn.state_dict().items())
    restored = BCOLoss()
    restored.load_state_dict(loss_fn.state_dict())
    assert restored.delta == loss_fn.delta == 1.5
    leaf = tensor(2.0).requires_grad_()
    loss_fn.update(Mean((1 * leaf).sum(), torch.tensor(1)), Mean(tensor(0.0).sum(), torch.tensor(1)))
    assert not loss_fn.totals.requires_grad


def test_bco_does_not_saturate_on_what_is_wrong():
    wrong = tensor(-1e4)
    assert loss_and_slope(BCOLoss(), wrong, tensor(0.0), UP[:1])[1] == close([-0.1])
    assert loss_and_slope(APOZeroUnpairedLoss(), wrong, tensor(0.0), UP[:1])[1] == close([0.0])


@pytest.mark.unhooked
def test_bad_bco_updates_teach():
    with pytest.raises(ValueError, match=r"BCOLoss.update: desirable_reward must be the rlloss.Mean of that name, got"):
        BCOLoss().update(0.5, 0.5)  # type: ignore[arg-type]


# margin ranking


def test_margin_ranking_by_hand():
    # differences 1/2, 2 and -1 against 1: 1/2, 0 and 2
    chosen, rejected = tensor(1.5, 3.0, 0.0), tensor(1.0, 1.0, 1.0)
    loss, slope = loss_and_slope(MarginRankingLoss(), chosen, rejected)
    assert loss == close(2.5 / 3)
    assert slope == close([-1 / 3, 0.0, -1 / 3])
    assert loss_and_slope(lambda r, c: MarginRankingLoss()(c, r), rejected, chosen)[1] == close([1 / 3, 0.0, 1 / 3])
    loss, slope = loss_and_slope(MarginRankingLoss(squared=True), chosen, rejected)
    assert loss == close((0.25 + 4) / 3)
    assert slope == close([-1 / 3, 0.0, -4 / 3])
    # per pair in the constant's place: 0, 1 and 4
    assert MarginRankingLoss()(chosen, rejected, margin=tensor(0.5, 3.0, 3.0)).loss == close(5 / 3)
    assert MarginRankingLoss(margin=0.5)(chosen, rejected).loss == close(1.5 / 3)
    assert scalars(MarginRankingLoss()(chosen, rejected).metrics) == {
        "accuracy": close(2 / 3),
        "margin": close(0.5),
        "margin_std": close(math.sqrt(1.5)),
        "chosen_reward": close(1.5),
        "rejected_reward": close(1.0),
    }


@pytest.mark.parametrize("name", ["bradley_terry", "davidson", "margin_ranking", "rao_kupper"])
def test_equal_rewards_are_no_win(name):
    metrics = rlloss.get_loss(name)(tensor(1.0, 2.0, 3.0), tensor(0.0, 2.0, 4.0)).metrics
    assert scalars(metrics)["accuracy"] == close(1 / 3)


# ties

WINS = [RaoKupperLoss(theta=1.7), DavidsonLoss(nu=0.8)]


def probabilities(loss_fn, h):
    """Of a win, a tie and a loss."""
    zero = torch.zeros_like(h)
    of = [loss_fn.win_loss(h), loss_fn.tie_loss(h), loss_fn.win_loss(zero - h)]
    return [(-x).exp() for x in of]


@pytest.mark.parametrize("loss_fn", WINS, ids=repr)
def test_win_tie_and_loss_are_all_that_can_happen(loss_fn):
    win, tie, lose = probabilities(loss_fn, 3 * draws(20))
    torch.testing.assert_close(win + tie + lose, torch.ones_like(win), rtol=1e-13, atol=0)
    assert min(win.min(), tie.min(), lose.min()) > 0


def test_rao_kupper_by_hand():
    # theta 2: a win at h = log 2 has 1/2, and a tie at 0 has 1/3, at -log 2 3 * 1/2 * 1/5
    loss_fn = RaoKupperLoss(theta=2.0)
    chosen, rejected, ties = tensor(LOG2, 0.0, -LOG2), tensor(0.0, 0.0, 0.0), torch.tensor([False, True, True])
    loss, slope = loss_and_slope(loss_fn, chosen, rejected, ties=ties)
    assert loss == close((LOG2 + LOG3 + math.log(10 / 3)) / 3)
    assert slope == close([-0.5 / 3, 0.0, (0.2 - 0.5) / 3])
    assert scalars(loss_fn(chosen, rejected, ties=ties).metrics) == {
        "accuracy": 1.0,
        "margin": close(LOG2),
        "margin_std": 0.0,
        "chosen_reward": close(LOG2),
        "rejected_reward": 0.0,
        "tie_distance": close(LOG2 / 2),
    }


def test_davidson_by_hand():
    # nu 2, strengths 4 and 1: 4/9, 4/9 and 1/9
    loss_fn = DavidsonLoss(nu=2.0)
    chosen, rejected, ties = tensor(2 * LOG2, 2 * LOG2), tensor(0.0, 0.0), torch.tensor([False, True])
    loss, slope = loss_and_slope(loss_fn, chosen, rejected, ties=ties)
    assert loss == close(math.log(9 / 4))
    assert slope == close([-(1 / 9 + 2 / 9) / 2, (4 / 9 - 1 / 9) / 2 / 2])
    # the odds of a win are those of Bradley and Terry
    win, _, lose = probabilities(loss_fn, chosen)
    assert (win / lose).tolist() == close([4.0, 4.0])


@pytest.mark.parametrize("loss_fn", [RaoKupperLoss(theta=1 + 1e-13), DavidsonLoss(nu=1e-13)], ids=repr)
def test_where_ties_hardly_happen_wins_are_bradley_and_terrys(loss_fn):
    loss, slope = loss_and_slope(loss_fn, *draws(2, 6))
    expected, expected_slope = loss_and_slope(BradleyTerryLoss(), *draws(2, 6))
    assert loss == pytest.approx(expected, rel=1e-11)
    assert slope == pytest.approx(expected_slope, rel=1e-11)


@pytest.mark.parametrize("loss_fn", WINS, ids=repr)
def test_it_does_not_matter_which_side_of_a_tie_is_called_chosen(loss_fn):
    ties, (chosen, rejected) = torch.ones(6).bool(), draws(2, 6)
    assert loss_fn(chosen, rejected, ties=ties).loss == close(loss_fn(rejected, chosen, ties=ties).loss.item())
    none = loss_fn(chosen, rejected)
    assert loss_fn(chosen, rejected, ties=~ties).loss == none.loss


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_ties_gives_the_parameter(share):
    even = tensor(0.0)
    for loss_fn in (RaoKupperLoss(theta=(1 + share) / (1 - share)), DavidsonLoss(nu=2 * share / (1 - share))):
        assert probabilities(loss_fn, even)[1].item() == close(share)


# Plackett-Luce


def test_plackett_luce_by_hand():
    # strengths 1, 2 and 3 in this order: 6/1 * 5/2, of slopes 1/6 - 1, 2/6 + 2/5 - 1 and 3/6 + 3/5 + 1 - 1
    rewards, mask = tensor([0.0, LOG2, LOG3]), torch.ones(1, 3).bool()
    loss, slope = loss_and_slope(PlackettLuceLoss(), rewards, mask)
    assert loss == close(math.log(15))
    assert slope[0] == close([1 / 6 - 1, 2 / 6 + 2 / 5 - 1, 3 / 6 + 3 / 5])
    metrics = scalars(PlackettLuceLoss()(tensor([3.0, 1.0, 2.0]), mask).metrics)
    assert metrics == {"accuracy": 0.5, "margin": 0.5, "margin_std": 1.5, "reward": 2.0}
    # equal rewards are no order, and neighbours stand over gaps
    gap = torch.tensor([[True, True, False, True]])
    metrics = scalars(PlackettLuceLoss()(tensor([3.0, 3.0, 9.0, 1.0]), gap).metrics)
    assert metrics == {"accuracy": 0.5, "margin": 1.0, "margin_std": 1.0, "reward": close(7 / 3)}


def test_plackett_luce_of_two_is_bradley_and_terrys():
    pairs = draws(5, 2)
    loss, slope = loss_and_slope(PlackettLuceLoss(), pairs, torch.ones(5, 2).bool())
    expected, expected_slope = loss_and_slope(BradleyTerryLoss(), *pairs.T)
    assert loss == close(expected)
    assert [x for x, _ in slope] == close(expected_slope)


def test_plackett_luce_gives_every_order_its_probability():
    rewards = draws(4)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    likelihoods = [(-PlackettLuceLoss()(rewards[order][None], torch.ones(1, 4).bool()).loss).exp() for order in orders]
    assert float(sum(likelihoods)) == close(1.0)


def test_plackett_luce_sees_a_list_without_its_gaps():
    gaps = torch.tensor([[False, True, False, True, True, False]])
    rewards = draws(1, 6)
    loss, slope = loss_and_slope(PlackettLuceLoss(), rewards, gaps)
    expected, expected_slope = loss_and_slope(PlackettLuceLoss(), rewards[gaps][None], torch.ones(1, 3).bool())
    assert loss == close(expected)
    assert torch.tensor(slope)[gaps].tolist() == pytest.approx(expected_slope[0])
    assert not torch.tensor(slope)[~gaps].any()


def test_plackett_luce_of_one_answer_teaches_nothing_and_counts():
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    rewards = tensor([5.0, 9.0], [0.0, 0.0], [1.0, 1.0])
    loss, slope = loss_and_slope(PlackettLuceLoss(), rewards, mask)
    assert loss == close(LOG2 / 2)
    assert slope[0] == close([0.0, 0.0])
    assert PlackettLuceLoss()(rewards, mask, weights=tensor(1.0, 3.0, 1.0)).loss == close(1.5 * LOG2)


# ratings


def test_reward_regression_by_hand():
    rewards, targets = tensor(1.0, 2.0, 2.0), tensor(1.0, 2.0, 3.0)
    loss, slope = loss_and_slope(RewardRegressionLoss(), rewards, targets)
    assert loss == close(1 / 3)
    assert slope == close([0.0, 0.0, -2 / 3])
    assert scalars(RewardRegressionLoss()(rewards, targets).metrics) == {
        "explained_variance": close(2 / 3),
        "absolute_error": close(1 / 3),
        "reward": close(5 / 3),
        "target": close(2.0),
    }


# judged steps


def test_process_reward_by_hand():
    # log(4/3), log 4 and half of each, over two sequences
    logits = tensor([LOG3, 9.0, LOG3], [LOG3, 9.0, 9.0])
    labels = tensor([1.0, 0.0, 0.0], [0.5, 0.0, 0.0])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    loss, slope = loss_and_slope(ProcessRewardLoss(), logits, labels, mask)
    right, wrong = math.log(4 / 3), math.log(4)
    assert loss == close((right + wrong + (right + wrong) / 2) / 3)
    assert slope[0] == close([(0.75 - 1) / 3, 0.0, 0.75 / 3])
    assert slope[1] == close([0.25 / 3, 0.0, 0.0])
    by_answer = ProcessRewardLoss(reduction="sequence_mean")(logits, labels, mask).loss
    assert by_answer == close((right + wrong) / 2)
    assert scalars(ProcessRewardLoss()(logits, labels, mask).metrics) == {
        "accuracy": close(1 / 3),
        "probability": close(0.75),
        "label": close(0.5),
    }


def test_process_reward_is_least_at_the_label():
    labels = torch.tensor([[0.25, 0.9]], dtype=torch.float64)
    mask = torch.ones(1, 2).bool()
    assert loss_and_slope(ProcessRewardLoss(), labels.logit(), labels, mask)[1][0] == close([0.0, 0.0])


def test_an_outcome_reward_model_has_one_step_per_answer():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logits, labels = draws(2, 3), tensor([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    loss = ProcessRewardLoss()(logits, labels, rlloss.last_tokens(mask)).loss
    ends = torch.stack([logits[0, 1], logits[1, 2]])
    assert loss == close(F.binary_cross_entropy_with_logits(ends, tensor(1.0, 0.0)).item())


# extremes and what cannot be asked for

FAR = [torch.tensor([1e4, -1e4, 1e4, -1e4]), torch.tensor([-1e4, 1e4, 1e4, -1e4])]
SCORED = [
    (APOZeroUnpairedLoss(), (*FAR, torch.tensor([True, True, False, False])), {}),
    (BCOLoss(), (*FAR, torch.tensor([True, True, False, False])), {}),
    (MarginRankingLoss(), FAR, {}),
    (MarginRankingLoss(squared=True), FAR, {}),
    (RaoKupperLoss(), FAR, {"ties": torch.tensor([True, True, False, False])}),
    (RaoKupperLoss(), FAR, {}),
    (DavidsonLoss(), FAR, {"ties": torch.tensor([True, True, False, False])}),
    (DavidsonLoss(), FAR, {}),
    (PlackettLuceLoss(), (torch.stack([*FAR, FAR[0].sort().values]), torch.ones(3, 4).bool()), {}),
    (RewardRegressionLoss(), FAR, {}),
    (ProcessRewardLoss(), (FAR[0][None], torch.tensor([[1.0, 1.0, 0.0, 0.5]]), torch.ones(1, 4).bool()), {}),
]


@pytest.mark.parametrize(("loss_fn", "inputs", "extra"), SCORED, ids=[repr(case[0]) for case in SCORED])
def test_far_rewards_have_finite_loss_and_gradient(loss_fn, inputs, extra):
    loss, slope = loss_and_slope(loss_fn, *inputs, **extra)
    assert math.isfinite(loss)
    assert loss > 0
    assert torch.tensor(slope).isfinite().all()
    assert torch.tensor(slope).any() or isinstance(loss_fn, APOZeroUnpairedLoss)


DEFAULTS = {
    "apo_zero_unpaired": "APOZeroUnpairedLoss(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)",
    "bco": "BCOLoss(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, decay=1.0)",
    "bradley_terry": "BradleyTerryLoss(temperature=1.0, label_smoothing=0.0, center_coef=0.0)",
    "davidson": "DavidsonLoss(nu=1.0)",
    "kto": "KTOLoss(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)",
    "margin_ranking": "MarginRankingLoss(margin=1.0, squared=False)",
    "plackett_luce": "PlackettLuceLoss()",
    "process_reward": "ProcessRewardLoss(reduction='token_mean', max_length=None)",
    "rao_kupper": "RaoKupperLoss(theta=2.0)",
    "reward_regression": "RewardRegressionLoss()",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_losses_have_these_defaults(name):
    assert repr(rlloss.get_loss(name)) == DEFAULTS[name]


TWO: Any = 2
LIST: Any = [1.0, 2.0, 3.0]
BAD: list[tuple[Any, str]] = [
    (lambda: APOZeroUnpairedLoss(beta=0), "APOZeroUnpairedLoss: beta must be a number in (0, inf], got 0"),
    (lambda: BCOLoss(decay=1.5), "BCOLoss: decay must be a number in [0, 1], got 1.5"),
    (lambda: BCOLoss(undesirable_weight=-1), "BCOLoss: undesirable_weight must be a number in [0, inf], got -1"),
    (lambda: MarginRankingLoss(margin=-1.0), "MarginRankingLoss: margin must be a number in [0, inf], got -1.0"),
    (lambda: MarginRankingLoss(squared=TWO), "MarginRankingLoss: squared must be True or False, got 2"),
    (lambda: RaoKupperLoss(theta=1.0), "RaoKupperLoss: theta must be a number in (1, inf], got 1.0"),
    (lambda: DavidsonLoss(nu=0), "DavidsonLoss: nu must be a number in (0, inf], got 0"),
    (lambda: RaoKupperLoss()(*FAR, ties=FAR[0]), "RaoKupperLoss: ties must be a bool tensor (True = counts)"),
    (lambda: DavidsonLoss()(*FAR, ties=UP), "DavidsonLoss: ties must be [4] as chosen_rewards, got [3]"),
    (lambda: PlackettLuceLoss()(FAR[0], FAR[0] > 0), "PlackettLuceLoss: mask must be 2-D, got shape [4]"),
    (
        lambda: PlackettLuceLoss()(FAR[0][None], torch.ones(1, 4).bool(), weights=FAR[0]),
        "PlackettLuceLoss: weights must be one number per list, [1], got [4]",
    ),
    (
        lambda: RewardRegressionLoss()(FAR[0], FAR[0][:2]),
        "RewardRegressionLoss: targets must have the shape of rewards, [4], got [2]",
    ),
    (
        lambda: ProcessRewardLoss()(FAR[0][None], FAR[0], torch.ones(1, 4).bool()),
        "ProcessRewardLoss: labels must have the shape of loss_mask, [1, 4], got [4]",
    ),
    (lambda: ProcessRewardLoss(max_length=3), "ProcessRewardLoss: max_length is for fixed_length and only for it"),
    (lambda: BCOLoss()(LIST, LIST, UP), "BCOLoss: logps must be a tensor, got list"),
    (lambda: KTOLoss()(LIST, LIST, UP, kl=0.0), "KTOLoss: logps must be a tensor, got list"),
    (lambda: APOZeroUnpairedLoss()(LIST, LIST, UP), "APOZeroUnpairedLoss: logps must be a tensor, got list"),
    (lambda: BCOLoss()(*FAR, UP), "BCOLoss: desirable must be [4] as logps, got [3]"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_reward_losses_teach(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("alias", "loss"),
    [
        ("APO-Zero-Unpaired", APOZeroUnpairedLoss),
        ("LogExp", BradleyTerryLoss),
        ("log-exp", BradleyTerryLoss),
        ("bradley_terry_ties", RaoKupperLoss),
        ("btt", RaoKupperLoss),
        ("listmle", PlackettLuceLoss),
        ("list-mle", PlackettLuceLoss),
        ("PRM", ProcessRewardLoss),
        ("reward_hinge", MarginRankingLoss),
        ("reward_mse", RewardRegressionLoss),
    ],
)
def test_reward_losses_have_the_names_that_the_field_gives_them(alias, loss):
    assert isinstance(rlloss.get_loss(alias), loss)
