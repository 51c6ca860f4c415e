"""Clip-Cov: a few of the tokens that would cost entropy teach nothing."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range, check_seed
from rlloss.output import Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss, SelectivePolicyLoss
from rlloss.selection import first_ranked, share_of, token_covariance, token_hash

__all__ = ["ClipCovLoss"]


class ClipCovLoss(SelectivePolicyLoss, ClippedPolicyLoss):
    """Clip-Cov, equations 10 to 12 and listing 1 of https://arxiv.org/abs/2505.22617.

    Entropy falls by the covariance of log-probs and advantages, and a few tokens make most of that: some of them,
    drawn at random, are left out, which keeps exploration alive without an entropy bonus.

        cov_t = (l_t - mean l) (A_t - mean A)                    over the N tokens of the step
        I = floor(fraction N) tokens drawn from those with cov_min <= cov_t <= cov_max
        loss = (1/N) sum_t [t not in I] max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A)
        dloss/dl_t = -(1/N) r_t A_t    where the clip does not bind and t is not in I, else 0

    I is `selected`: under a split pass the whole step's, `statistics(...)["selected"]`. As the paper writes it, a
    fraction that comes to less than one token leaves none out. The bounds compare with advantages as they are: scaled
    by a batch size beforehand, none would reach them. Base classes: inputs, options and metrics; adds clip_frac and
    selected_frac.

    Args:
        fraction: Share of the step's tokens that are left out.
        cov_min: Least covariance of a token that may be drawn.
        cov_max: Largest covariance of a token that may be drawn.
        seed: Of the draw, the same on every device; a step's tokens draw the same until `loss_fn.seed` changes.
        clip_eps_low: The ratio's room below 1. The equation has no clip, and the authors' runs next to none.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, a = torch.tensor([[-0.1, -9.0, -0.1, -9.0]]), torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    >>> loss_fn, mask = ClipCovLoss(fraction=0.25), torch.ones(1, 4, dtype=torch.bool)
    >>> loss_fn.statistics(l, l, a, mask)["selected"]  # what was likely and good, or unlikely and bad
    tensor([[False,  True, False, False]])
    """

    reduction = "token_mean"

    def __init__(
        self,
        *,
        fraction: float = 2e-4,
        cov_min: float = 1.0,
        cov_max: float = 5.0,
        seed: int = 0,
        clip_eps_low: float = 1.0,
        clip_eps_high: float = 1.0,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
        check_range(self._who, "fraction", fraction, 0, 1)
        check_range(self._who, "cov_min", cov_min)
        check_range(self._who, "cov_max", cov_max, cov_min)
        check_seed(self._who, "seed", seed)
        self.fraction, self.cov_min, self.cov_max, self.seed = fraction, cov_min, cov_max, seed

    def selection(self, batch: PolicyBatch, counted: Tensor) -> Tensor:
        """The tokens of I, those of least hash among the candidates."""
        covariance = token_covariance(batch.logprobs, batch.advantages, counted, batch.cu_seqlens)
        candidates = counted & (covariance >= self.cov_min) & (covariance <= self.cov_max)
        return first_ranked(token_hash(counted, self.seed), candidates, share_of(counted, self.fraction))

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """PPO's clipped surrogate, 0 in I."""
        assert batch.selected is not None  # forward has chosen
        token_loss, metrics = super().surrogate(batch)
        return torch.where(batch.selected, 0, token_loss), metrics
