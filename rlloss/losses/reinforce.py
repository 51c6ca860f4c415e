"""REINFORCE: the policy gradient as it stands."""

from rlloss.policy_surrogates import WeightedPolicyLoss

__all__ = ["REINFORCELoss"]


class REINFORCELoss(WeightedPolicyLoss):
    """REINFORCE, theorem 1 of https://doi.org/10.1007/BF00992696; for language models https://arxiv.org/abs/2402.14740.

    No ratio and no clip: one update per rollout. It sums over a sequence's tokens, as the log-prob of the sequence
    does, which makes it an unbiased gradient of the expected reward whatever the lengths.

        loss = -(1/S) sum_i sum_t A_t l_t
        dloss/dl_t = -(1/S) A_t

    `advantages` are rewards, less a baseline that does not depend on the sampled answer. Base class: inputs, options
    (those of `rlloss.PolicyOptions`) and metrics; `old_logprobs` enters the metrics and the KL term alone.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> REINFORCELoss()(l, None, torch.tensor([0.5]), mask).loss
    tensor(1.5000)
    """

    reduction = "sequence_sum"
