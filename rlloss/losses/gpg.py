"""GPG: the policy gradient over groups, without ratio, clip or reference."""

from rlloss.policy_surrogates import WeightedPolicyLoss

__all__ = ["GPGLoss"]


class GPGLoss(WeightedPolicyLoss):
    """Group policy gradient, https://arxiv.org/abs/2504.02546.

    It descends the objective itself in place of a surrogate: log-probs times group advantages, over all tokens.

        loss = -(1/N) sum_t A_t l_t    (N trained tokens)
        dloss/dl_t = -(1/N) A_t

    The paper's alpha, which makes up for the groups that teach nothing, and its F_norm scale rewards: they belong to
    the advantages. Base class: inputs, options (those of `rlloss.PolicyOptions`) and metrics; `old_logprobs` enters
    the metrics and the KL term alone.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> GPGLoss()(l, None, torch.tensor([0.5]), mask).loss
    tensor(0.7500)
    """

    reduction = "token_mean"
