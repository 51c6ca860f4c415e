"""KL-Cov: the tokens that would cost the most entropy are held near the old policy."""

from typing import Literal, Unpack

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_range
from rlloss.divergence import kl_abs, kl_k3
from rlloss.output import Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import SelectivePolicyLoss
from rlloss.selection import first_ranked, share_of, token_covariance

__all__ = ["KLCovLoss"]


class KLCovLoss(SelectivePolicyLoss):
    """KL-Cov, equations 10, 13 and 14 and listing 1 of https://arxiv.org/abs/2505.22617.

    Entropy falls by the covariance of log-probs and advantages, and a few tokens make most of that: those of largest
    covariance go on teaching, but pay for leaving the old policy. No ratio is clipped.

        cov_t = (l_t - mean l) (A_t - mean A)                    over the N tokens of the step
        I = the floor(fraction N) tokens of largest cov_t
        loss = (1/N) sum_t [-r_t A_t + penalty_coef [t in I] |l_t - old_t|]
        dloss/dl_t = (1/N) (-r_t A_t + penalty_coef [t in I] sign(l_t - old_t))

    The |l - old| of the listing is no estimate of the KL(old||pi) in the equation; `k3` is, with the slope r - 1, and
    needs another weight. I is `selected`: under a split pass the whole step's, `statistics(...)["selected"]`. Base
    classes: inputs, options and metrics; adds selected_frac.

    Args:
        fraction: Share of the step's tokens that pay: 2e-3 in the paper at 7B parameters, 2e-4 at 32B.
        penalty_coef: Weight of the penalty.
        penalty: `abs` or `k3`: what they pay.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, a = torch.tensor([[-0.1, -9.0, -0.1, -9.0]]), torch.tensor([[3.0, -1.0, -1.0, 1.0]])
    >>> loss_fn, mask = KLCovLoss(fraction=0.25), torch.ones(1, 4, dtype=torch.bool)
    >>> loss_fn.statistics(l, l, a, mask)["selected"]
    tensor([[ True, False, False, False]])
    """

    reduction = "token_mean"

    def __init__(
        self,
        *,
        fraction: float = 2e-3,
        penalty_coef: float = 1.0,
        penalty: Literal["abs", "k3"] = "abs",
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "fraction", fraction, 0, 1)
        check_range(self._who, "penalty_coef", penalty_coef, 0)
        check_choice(self._who, "penalty", penalty, ("abs", "k3"))
        self.fraction, self.penalty_coef, self.penalty = fraction, penalty_coef, penalty

    def selection(self, batch: PolicyBatch, counted: Tensor) -> Tensor:
        """The tokens of I."""
        covariance = token_covariance(batch.logprobs, batch.advantages, counted, batch.cu_seqlens)
        return first_ranked(-covariance, counted, share_of(counted, self.fraction))

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """-r A, and the penalty in I."""
        assert batch.selected is not None  # forward has chosen
        if self.penalty == "abs":
            penalty = kl_abs(batch.logprobs, batch.old_logprobs)
        else:
            penalty = kl_k3(batch.old_logprobs, batch.logprobs, self.max_log_ratio)
        return torch.where(batch.selected, self.penalty_coef * penalty, 0) - batch.ratio * batch.advantages, {}
