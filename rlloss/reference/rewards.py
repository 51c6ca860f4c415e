"""Reward models: from pairs with margins or ties, from rankings, from ratings and from judged steps."""

import math

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.preference import floats, mean_of_counted
from rlloss.reference.reduce import reduced, rows


def margin_ranking(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    margin: ArrayLike | float = 1.0,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    squared: bool = False,
) -> float:
    """The ranking SVM's hinge, https://doi.org/10.1145/775047.775067; a margin per pair takes the constant's place.

    loss = mean over pairs of max(0, margin - (chosen - rejected)), or of its square

    >>> margin_ranking([2.0], [1.75])
    0.75
    """
    chosen, rejected = floats(chosen_rewards), floats(rejected_rewards)
    asked = floats(np.broadcast_to(np.asarray(margin, dtype=np.float64), (len(chosen),)))
    losses = []
    for i in range(len(chosen)):
        missing = asked[i] - (chosen[i] - rejected[i])
        losses.append(0.0 if missing <= 0.0 else missing**2 if squared else missing)
    return mean_of_counted(losses, mask, weights)


def rao_kupper(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    ties: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    theta: float = 2.0,
) -> float:
    """Rao and Kupper's Bradley-Terry model with ties, https://doi.org/10.1080/01621459.1967.10482901.

    With strengths w = exp(chosen) and l = exp(rejected):
    P(win) = w / (w + theta l), P(tie) = (theta^2 - 1) w l / ((w + theta l) (theta w + l))

    >>> round(rao_kupper([1.0], [1.0], ties=[True], theta=2.0), 12) == round(math.log(3), 12)
    True
    """
    chosen, rejected = floats(chosen_rewards), floats(rejected_rewards)
    tied = [False] * len(chosen) if ties is None else np.asarray(ties).tolist()
    losses = []
    for i in range(len(chosen)):
        log_ahead = math.log(math.exp(chosen[i]) + theta * math.exp(rejected[i]))
        log_behind = math.log(theta * math.exp(chosen[i]) + math.exp(rejected[i]))
        win = log_ahead - chosen[i]
        tie = log_ahead + log_behind - chosen[i] - rejected[i] - math.log(theta**2 - 1.0)
        losses.append(tie if tied[i] else win)
    return mean_of_counted(losses, mask, weights)


def davidson(
    chosen_rewards: ArrayLike,
    rejected_rewards: ArrayLike,
    *,
    ties: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    nu: float = 1.0,
) -> float:
    """Davidson's Bradley-Terry model with ties, https://doi.org/10.1080/01621459.1970.10481082.

    With strengths w = exp(chosen) and l = exp(rejected):
    P(win) = w / (w + l + nu sqrt(w l)), P(tie) = nu sqrt(w l) / (w + l + nu sqrt(w l))

    >>> davidson([0.0], [0.0], ties=[True], nu=1.0) == math.log(3)
    True
    """
    chosen, rejected = floats(chosen_rewards), floats(rejected_rewards)
    tied = [False] * len(chosen) if ties is None else np.asarray(ties).tolist()
    losses = []
    for i in range(len(chosen)):
        win, lose = math.exp(chosen[i]), math.exp(rejected[i])
        tie = nu * math.sqrt(win * lose)
        losses.append(-math.log((tie if tied[i] else win) / (win + lose + tie)))
    return mean_of_counted(losses, mask, weights)


def plackett_luce(rewards: ArrayLike, mask: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """Plackett-Luce over ranked lists, https://doi.org/10.2307/2346567, of which each row is one, the best first.

    loss_i = -sum_k log(exp(r_k) / (exp(r_k) + exp(r_{k+1}) + ...)), the mean over lists with an answer

    >>> plackett_luce([[0.0, 0.0, 0.0]], [[True, True, True]]) == math.log(3) + math.log(2)
    True
    """
    counts, scores = rows(mask), rows(rewards)
    losses = []
    for i in range(len(counts)):
        ranked = [scores[i][k] for k in range(len(counts[i])) if counts[i][k]]
        loss = 0.0
        for k in range(len(ranked)):
            loss += math.log(sum(math.exp(r) for r in ranked[k:])) - ranked[k]
        losses.append(loss)
    return mean_of_counted(losses, [any(row) for row in counts], weights)


def reward_regression(
    rewards: ArrayLike, targets: ArrayLike, *, mask: ArrayLike | None = None, weights: ArrayLike | None = None
) -> float:
    """Least squares on ratings, https://arxiv.org/abs/2406.08673.

    >>> reward_regression([3.0, 1.0], [4.0, 1.0])
    0.5
    """
    scores, asked = floats(rewards), floats(targets)
    return mean_of_counted([(scores[i] - asked[i]) ** 2 for i in range(len(scores))], mask, weights)


def process_reward(
    logits: ArrayLike,
    labels: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    reduction: str = "token_mean",
    max_completion_length: int | None = None,
) -> float:
    """The process reward model, https://arxiv.org/abs/2211.14275: cross-entropy of every step's label.

    >>> process_reward([[0.0]], [[1.0]], [[True]]) == math.log(2)
    True
    """
    mask = rows(loss_mask, cu_seqlens)
    score, label = rows(logits, cu_seqlens), rows(labels, cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)
    losses: list[list[float]] = []
    for i in range(len(mask)):
        losses.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            right = 1.0 / (1.0 + math.exp(-score[i][t]))
            loss = -label[i][t] * math.log(right) - (1.0 - label[i][t]) * math.log(1.0 - right)
            losses[i].append(0.0 if weight[i][t] == 0.0 else weight[i][t] * loss)
    return reduced(losses, reduction, max_completion_length)
