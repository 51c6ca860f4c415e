"""The lines of the unpaired losses and of those that train reward models in the tables of the laws."""

import torch
from loss_cases import Case, Draw, Step, bare_scored_pairs, scored_pairs, thumbs

from rlloss import (
    APOZeroUnpairedLoss,
    BCOLoss,
    DavidsonLoss,
    MarginRankingLoss,
    Mean,
    PlackettLuceLoss,
    ProcessRewardLoss,
    RaoKupperLoss,
    RewardRegressionLoss,
)

ONE = torch.tensor(1.0, dtype=torch.float64)


class Lists(Step):
    """Ranked lists, which are never packed."""

    def packed(self, tail=0, fill=0.0):
        return self


def rows_of_thumbs(mask: torch.Tensor, draw: Draw) -> Step:
    step = thumbs(mask, draw)
    del step["kl"]
    return step


def bare_thumbs(mask: torch.Tensor, draw: Draw) -> Step:
    step = rows_of_thumbs(mask, draw)
    del step["weights"]
    return step


def shifted_bco(*, delta: float, **options) -> BCOLoss:
    """BCO after an update that left this delta."""
    loss_fn, one = BCOLoss(**options), torch.tensor(1)
    loss_fn.update(Mean(2 * delta * ONE, one), Mean(0 * ONE, one))
    return loss_fn


def pairs_with_ties(mask: torch.Tensor, draw: Draw) -> Step:
    step = scored_pairs(mask, draw)
    del step["margin"]
    return step.but(ties=draw(mask.shape[0]) > 0.3)


def lists(mask: torch.Tensor, draw: Draw) -> Step:
    return Lists(rewards=draw(*mask.shape), mask=mask, weights=draw(mask.shape[0]).clamp(min=0))


def bare_lists(mask: torch.Tensor, draw: Draw) -> Step:
    return Lists(rewards=draw(*mask.shape), mask=mask)


def ratings(mask: torch.Tensor, draw: Draw) -> Step:
    scores = {name: draw(mask.shape[0]) for name in ("rewards", "targets")}
    return Step(**scores, mask=mask.any(-1), weights=draw(mask.shape[0]).clamp(min=0))


def bare_ratings(mask: torch.Tensor, draw: Draw) -> Step:
    step = ratings(mask, draw)
    del step["weights"]
    return step


def steps(mask: torch.Tensor, draw: Draw) -> Step:
    labels = (2 * draw(*mask.shape)).sigmoid()
    return Step(logits=draw(*mask.shape), labels=labels, loss_mask=mask, token_weights=draw(*mask.shape).clamp(min=0))


def bare_steps(mask: torch.Tensor, draw: Draw) -> Step:
    return Step(logits=draw(*mask.shape), labels=(draw(*mask.shape) > 0).double(), loss_mask=mask)


OF_CLASS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}

CASES = [
    Case("apo_zero_unpaired_bare", APOZeroUnpairedLoss, bare_thumbs),
    Case("apo_zero_unpaired", APOZeroUnpairedLoss, rows_of_thumbs, {"beta": 0.2} | OF_CLASS),
    Case("bco_unseen", BCOLoss, bare_thumbs),
    Case("bco", shifted_bco, rows_of_thumbs, {"beta": 0.2, "delta": 0.4} | OF_CLASS),
    Case("margin_ranking_bare", MarginRankingLoss, bare_scored_pairs, {"margin": 0.7}),
    Case("margin_ranking", MarginRankingLoss, scored_pairs),
    Case("margin_ranking_squared", MarginRankingLoss, bare_scored_pairs, {"squared": True}),
    Case("rao_kupper_bare", RaoKupperLoss, bare_scored_pairs),
    Case("rao_kupper", RaoKupperLoss, pairs_with_ties, {"theta": 1.4}),
    Case("davidson_bare", DavidsonLoss, bare_scored_pairs),
    Case("davidson", DavidsonLoss, pairs_with_ties, {"nu": 0.6}),
    Case("plackett_luce_bare", PlackettLuceLoss, bare_lists),
    Case("plackett_luce", PlackettLuceLoss, lists),
    Case("reward_regression_bare", RewardRegressionLoss, bare_ratings),
    Case("reward_regression", RewardRegressionLoss, ratings),
    Case("process_reward_bare", ProcessRewardLoss, bare_steps),
    Case("process_reward", ProcessRewardLoss, steps, {"reduction": "sequence_mean"}),
]


def of_rows(step, slope):
    return step.get("weights", ONE) * slope / step.mask.sum()


def unpaired_gradient(loss_fn, step, c, slope):
    side = torch.where(step["desirable"], ONE, -ONE)
    weight = torch.where(step["desirable"], loss_fn.desirable_weight * ONE, loss_fn.undesirable_weight)
    x = side * (loss_fn.beta * (step["logps"] - step["ref_logps"]) - c)
    return {"logps": of_rows(step, side * loss_fn.beta * weight * slope(x))}


def apo_zero_unpaired(loss_fn, step):
    return unpaired_gradient(loss_fn, step, 0, lambda x: -torch.sigmoid(x) * torch.sigmoid(-x))


def bco(loss_fn, step):
    return unpaired_gradient(loss_fn, step, loss_fn.delta, lambda x: -torch.sigmoid(-x))


def of_pairs(step, slope):
    return {"chosen_rewards": of_rows(step, slope), "rejected_rewards": -of_rows(step, slope)}


def difference(step):
    return step["chosen_rewards"] - step["rejected_rewards"]


def margin_ranking(loss_fn, step):
    missing = step.get("margin", loss_fn.margin * ONE) - difference(step)
    return of_pairs(step, torch.where(missing > 0, -2 * missing if loss_fn.squared else -ONE, 0))


def rao_kupper(loss_fn, step):
    h, eta = difference(step), torch.log(loss_fn.theta * ONE)
    win, lose = torch.sigmoid(h - eta), torch.sigmoid(-h - eta)
    ties = step.get("ties", torch.zeros_like(step.mask))
    return of_pairs(step, torch.where(ties, win - lose, win - 1))


def davidson(loss_fn, step):
    h = difference(step)
    p = torch.stack([h / 2, torch.log(loss_fn.nu * torch.ones_like(h)), -h / 2]).softmax(0)
    ties = step.get("ties", torch.zeros_like(step.mask))
    return of_pairs(step, torch.where(ties, (p[0] - p[2]) / 2, -(p[2] + p[1] / 2)))


def plackett_luce(loss_fn, step):
    strength = step["rewards"].exp() * step.mask
    left = strength.flip(-1).cumsum(-1).flip(-1)
    slope = strength * torch.where(step.mask, 1 / left, 0).cumsum(-1) - 1
    return {"rewards": step.get("weights", ONE[None])[:, None] * slope / step.mask.any(-1).sum()}


def reward_regression(loss_fn, step):
    return {"rewards": of_rows(step, 2 * (step["rewards"] - step["targets"]))}


def process_reward(loss_fn, step):
    from closed_forms import divisor

    slope = torch.sigmoid(step["logits"]) - step["labels"]
    return {"logits": step.get("token_weights", ONE) * slope / divisor(loss_fn, step.mask)}


# in the sense of closed_forms.CLOSED_FORMS
CLOSED_FORMS = {
    APOZeroUnpairedLoss: apo_zero_unpaired,
    BCOLoss: bco,
    DavidsonLoss: davidson,
    MarginRankingLoss: margin_ranking,
    PlackettLuceLoss: plackett_luce,
    ProcessRewardLoss: process_reward,
    RaoKupperLoss: rao_kupper,
    RewardRegressionLoss: reward_regression,
}
