"""VESPO: a smooth weight of the whole sequence that fades on either side of 1."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import WeightedPolicyLoss
from rlloss.surrogate import bounded

__all__ = ["VESPOLoss"]


class VESPOLoss(WeightedPolicyLoss):
    """VESPO, equation 20 of https://arxiv.org/abs/2602.10693v3, with the kernel of equation 17 scaled to phi(1) = 1.

    The importance weight of the whole answer, without a mean over its length, is reshaped instead of clipped: phi has
    its peak near 1, w^k fades what the policy has left and exp(-lambda w) what it has rushed to.

        w_i = exp(sum_t (l_t - old_t)),    phi_i = w_i^k exp(lambda (1 - w_i)),    (k, lambda) by the sign of A
        loss = -(1/N) sum_i sg[phi_i] sum_t A_t l_t    (N trained tokens)
        dloss/dl_t = -(1/N) phi_i A_t

    Under samples of `old_logprobs` this ascends the expectation of f(w) A with f'(w) = phi(w) / w. phi is formed in
    log space and bounded above by (k/lambda)^k exp(lambda - k). Equation 20 sums over an answer; dividing by all
    tokens, as the authors' runs do, scales the step and no answer against another. `old_logprobs` are to be those of
    the policy that wrote the answers, the sampler's included. For long answers sum_t (l_t - old_t) is large from
    rounding alone, and phi near 0: watch `weight`.

    Base class: inputs, options and metrics (ratio is w; the KL term keeps each token's own); adds weight, the mean of
    phi. Where advantages differ in sign within a sequence, each token's own chooses its (k, lambda).

    Args:
        k_pos: The paper's c1 where A >= 0: how fast phi falls below w = 1. From 1 on, its second moment is bounded.
        lambda_pos: The paper's c2 where A >= 0: how fast phi falls above w = 1.
        k_neg: c1 where A < 0.
        lambda_neg: c2 where A < 0.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> VESPOLoss()(l, l - 0.5, torch.tensor([1.0]), mask).loss  # exp(2 + 3 (1 - e)) * (1 + 2) / 2
    tensor(0.0640)
    """

    reduction = "token_mean"
    ratio_level = "sequence"

    def __init__(
        self,
        *,
        k_pos: float = 2.0,
        lambda_pos: float = 3.0,
        k_neg: float = 3.0,
        lambda_neg: float = 2.0,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        for name, k in (("k_pos", k_pos), ("k_neg", k_neg)):
            check_range(self._who, name, k, 0)
        for name, decay in (("lambda_pos", lambda_pos), ("lambda_neg", lambda_neg)):
            check_range(self._who, name, decay, 0, open_low=True)
        self.k_pos, self.lambda_pos, self.k_neg, self.lambda_neg = k_pos, lambda_pos, k_neg, lambda_neg

    def weights(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """Phi of the sequence's ratio, by the sign of the advantage."""
        log_w, w = bounded(batch.log_ratio.detach(), self.max_log_ratio), batch.ratio.detach()
        log_phi = torch.where(
            batch.advantages < 0,
            self.k_neg * log_w + self.lambda_neg * (1 - w),
            self.k_pos * log_w + self.lambda_pos * (1 - w),
        )
        phi = log_phi.clamp(max=self.max_log_ratio).exp()
        return phi, {"weight": Mean.of(phi, batch.loss_mask)}
