"""Other systems' unpaired losses and reward models, written from their equations, against ours in float64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlloss import (
    APOZeroUnpairedLoss,
    BCOLoss,
    BradleyTerryLoss,
    KTOLoss,
    MarginRankingLoss,
    Mean,
    PlackettLuceLoss,
    ProcessRewardLoss,
    RewardRegressionLoss,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(theirs, ours, *inputs):
    """Loss and gradient in all inputs."""
    results = []
    for call in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = call(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


UP, DOWN = torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5])
DESIRABLE = torch.tensor([True, False, True, True, False, False])


def trl_apo_zero_unpaired(logps, ref, beta, up, down):
    good, bad = (beta * (logps[i] - ref[i]) for i in (UP, DOWN))
    return torch.cat([up * (1 - torch.sigmoid(good)), down * torch.sigmoid(bad)]).nanmean()


def trl_kto(logps, ref, beta, up, down, kl):
    ratio = logps - ref
    good, bad = 1 - torch.sigmoid(beta * (ratio[UP] - kl)), 1 - torch.sigmoid(beta * (kl - ratio[DOWN]))
    return torch.cat([up * good, down * bad]).nanmean()


def trl_bco(logps, ref, beta, delta, density_ratio):
    rewards = beta * (logps - ref)
    good, bad = -F.logsigmoid(rewards[UP] - delta), -F.logsigmoid(-(rewards[DOWN] - delta))
    return torch.cat([good, density_ratio * bad]).mean()


@pytest.mark.parametrize("seed", range(3))
def test_trls_apo_zero_unpaired_is_ours(seed):
    ref, options = draws(6, seed=9), {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    assert_same(
        lambda x: trl_apo_zero_unpaired(x, ref, 0.3, 1.3, 0.8),
        lambda x: APOZeroUnpairedLoss(beta=0.3, **options)(x, ref, DESIRABLE).loss,
        ref + draws(6, seed=seed),
    )


@pytest.mark.parametrize("seed", range(3))
def test_trls_kto_is_ours(seed):
    ref, options = draws(6, seed=9), {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    assert_same(
        lambda x: trl_kto(x, ref, 0.3, 1.3, 0.8, 0.2),
        lambda x: KTOLoss(beta=0.3, **options)(x, ref, DESIRABLE, kl=0.2).loss,
        ref + draws(6, seed=seed),
    )


@pytest.mark.parametrize("seed", range(3))
def test_trls_bco_at_its_delta_is_ours(seed):
    ref, density_ratio = draws(6, seed=9), torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    loss_fn = BCOLoss(beta=0.3)
    loss_fn.update(*(Mean(torch.tensor(x, dtype=torch.float64), torch.tensor(1)) for x in (0.7, -0.1)))
    weights = torch.ones(6, dtype=torch.float64).index_copy(0, DOWN, density_ratio)
    assert_same(
        lambda x: trl_bco(x, ref, 0.3, 0.3, density_ratio),
        lambda x: loss_fn(x, ref, DESIRABLE, weights=weights).loss,
        ref + draws(6, seed=seed),
    )


def test_trls_delta_is_ours_where_the_classes_are_of_one_size():
    # its running mean is of all rewards alike, ours halfway between the classes
    rewards = draws(6)

    def ours(desirable):
        loss_fn = BCOLoss()
        loss_fn.update(Mean.of(rewards, desirable), Mean.of(rewards, ~desirable))
        return loss_fn.delta

    torch.testing.assert_close(ours(DESIRABLE), rewards.mean(), rtol=1e-12, atol=0)
    assert abs(ours(torch.arange(6) < 1) - rewards.mean()) > 0.01


def trl_reward(chosen, rejected, margin, center):
    return -F.logsigmoid(chosen - rejected - margin).mean() + center * ((chosen + rejected) ** 2).mean()


def openrlhf_log_exp(chosen, rejected):
    return (1 + (rejected - chosen).exp()).log().mean()


@pytest.mark.parametrize("seed", range(3))
def test_reward_models_from_pairs_are_the_peers(seed):
    pair, margin = draws(2, 7, seed=seed), draws(7, seed=9)
    assert_same(
        lambda c, r: trl_reward(c, r, margin, 0.01),
        lambda c, r: BradleyTerryLoss(center_coef=0.01)(c, r, margin=margin).loss,
        *pair,
    )
    assert_same(openrlhf_log_exp, lambda c, r: BradleyTerryLoss()(c, r).loss, *pair)
    assert_same(
        lambda c, r: F.margin_ranking_loss(c, r, torch.ones_like(c), margin=0.4),
        lambda c, r: MarginRankingLoss(margin=0.4)(c, r).loss,
        *pair,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_ranking_in_place_of_its_pairs(seed):
    # the pairs of a list as independent, InstructGPT's 1 / (K over 2), is another loss
    lists = draws(3, 4, seed=seed)

    def list_mle(x):
        return sum(x[:, k:].logsumexp(-1) - x[:, k] for k in range(4)).mean()  # type: ignore[union-attr]

    assert_same(list_mle, lambda x: PlackettLuceLoss()(x, torch.ones(3, 4).bool()).loss, lists)
    pairs = torch.combinations(torch.arange(4))
    of_pairs = -F.logsigmoid(lists[:, pairs[:, 0]] - lists[:, pairs[:, 1]]).mean()
    assert abs(of_pairs - PlackettLuceLoss()(lists, torch.ones(3, 4).bool()).loss) > 0.1


def test_ratings_are_torchs_mean_square():
    targets = draws(6, seed=3)
    assert_same(lambda x: F.mse_loss(x, targets), lambda x: RewardRegressionLoss()(x, targets).loss, draws(6))


@pytest.mark.parametrize("seed", range(3))
def test_trls_process_reward_is_ours_of_its_two_logits_difference(seed):
    labels, ends = draws(2, 5, seed=8) > 0, draws(2, 5, seed=9) > -0.5
    targets: Any = torch.where(ends, labels.long(), -100)

    def trl_prm(two):
        return F.cross_entropy(two.flatten(0, 1), targets.flatten())

    assert_same(
        trl_prm,
        lambda two: ProcessRewardLoss()(two[..., 1] - two[..., 0], labels.double(), ends).loss,
        draws(2, 5, 2, seed=seed),
    )


def test_a_list_of_one_pair_is_instructgpts():
    pair = draws(5, 2)
    assert math.isclose(
        PlackettLuceLoss()(pair, torch.ones(5, 2).bool()).loss, BradleyTerryLoss()(*pair.T).loss, rel_tol=1e-12
    )
