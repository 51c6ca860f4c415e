"""Nash-MD: advantages against an opponent that stands between the policy and its reference."""

from torch import Tensor

from rlloss._checks import check_like, check_range
from rlloss._typing import Float

__all__ = ["nash_md_advantages"]


def nash_md_advantages(
    preferences: Float[Tensor, " B"],
    logps: Float[Tensor, " B"],
    ref_logps: Float[Tensor, " B"],
    *,
    tau: float,
) -> Float[Tensor, " B"]:
    """Nash-MD's advantages, https://arxiv.org/abs/2312.00886: to be preferred, less the KL to the reference.

        A_i = P(y_i preferred to y'_i) - 1/2 - tau (log pi(y_i) - log mu(y_i))

    The answer y is the policy's, and y' an opponent's, the geometric mixture pi^(1 - b) mu^b of policy and reference.
    With `rlloss.REINFORCELoss` the expected gradient ascends E[P] - tau KL(pi || mu) of whole answers; a product of
    each token's log-ratio and its own gradient would not. Without gradient.

    Args:
        preferences: P, of a preference model or a judge, between 0 and 1.
        logps: log pi(y), `rlloss.sequence_logps` of the policy that sampled.
        ref_logps: log mu(y).
        tau: Weight of the KL.

    >>> import torch
    >>> logps, ref_logps = torch.tensor([-4.0, -4.0]), torch.tensor([-4.0, -6.0])
    >>> nash_md_advantages(torch.tensor([1.0, 1.0]), logps, ref_logps, tau=0.1).tolist()
    [0.5, 0.30000001192092896]
    """
    who = "nash_md_advantages"
    check_range(who, "tau", tau, 0)
    check_like(who, "logps", logps, "preferences", preferences)
    check_like(who, "ref_logps", ref_logps, "preferences", preferences)
    return preferences.detach() - 0.5 - tau * (logps.detach() - ref_logps.detach())
