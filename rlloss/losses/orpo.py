"""ORPO: supervised fine-tuning and preferences in one stage, by odds."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Float
from rlloss.preference import logistic_loss
from rlloss.preference_inputs import log1mexp
from rlloss.preference_margins import MeanPreferenceLoss

__all__ = ["ORPOLoss"]


class ORPOLoss(MeanPreferenceLoss):
    """ORPO, https://arxiv.org/abs/2403.07691; `beta` is its lambda.

    The chosen answer's likelihood is trained as in SFT, and a weak penalty on the odds keeps that from raising the
    rejected style, too: no reference and no second stage. With p = exp(mean log-prob per token):

        x = log(p_w / (1 - p_w)) - log(p_l / (1 - p_l))
        loss = -nll_coef log p_w - beta log sigmoid(x)
        dloss/dchosen_mean_logps = -nll_coef - beta sigmoid(-x) / (1 - p_w)
        dloss/drejected_mean_logps = beta sigmoid(-x) / (1 - p_l)

    forward(chosen_mean_logps, rejected_mean_logps): means per token `[B]`, at most 0 (`rlloss.sequence_mean_logps`).
    Odds are at most e^20, without gradient through 1 - p beyond, so that p = 1 is harmless. For the likelihood of
    public code, a mean over the tokens of all answers and prompts, set `nll_coef=0.0` and join `rlloss.SFTLoss` by
    `rlloss.combine`. `rlloss.PreferenceLoss` lists the optional inputs and the metrics.

    Args:
        beta: Weight of the odds ratio's term.
        nll_coef: Weight of the chosen answer's negative log-likelihood per token.

    >>> import torch
    >>> half = torch.tensor([0.5]).log()
    >>> round(ORPOLoss(beta=1.0)(half, half).loss.item(), 4)  # 2 log 2
    1.3863
    """

    def __init__(self, *, beta: float = 0.1, nll_coef: float = 1.0) -> None:
        super().__init__(beta=beta)
        check_range(self._who, "nll_coef", nll_coef, 0)
        self.nll_coef = nll_coef

    def answers_loss(
        self, chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"], beta: Tensor | float
    ) -> Float[Tensor, " B"]:
        """The likelihood, and the logistic loss of the log odds ratio."""
        log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        return beta * logistic_loss(log_odds_ratio) - self.nll_coef * chosen
