"""What preference losses may read in the place of plain log-probs: scores of a divergence, odds, weights, lengths."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import check_full_precision, check_like, check_range
from rlloss._typing import Bool, Float
from rlloss.reduce import sequence_lengths, sequence_mean, sequence_sum, to_tokens, weighted

__all__ = ["Divergence", "desensitized_logps", "divergence_score", "log1mexp", "power_score", "wpo_weights"]

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]
MAX_EXPONENT = 20.0


def power_score(log_ratio: Float[Tensor, " B"], alpha: float) -> Float[Tensor, " B"]:
    """(1 - u^-alpha) / alpha of u = exp(log_ratio), which is log u where alpha is 0; its slope is u^-alpha.

    The exponent -alpha log u is at most 20, without gradient beyond.

    >>> power_score(torch.tensor([0.0, math.log(4.0)]), 0.5).tolist()
    [0.0, 1.0]
    """
    if not alpha:
        return log_ratio
    return -torch.expm1((-alpha * log_ratio).clamp(max=MAX_EXPONENT)) / alpha


def divergence_score(
    log_ratio: Float[Tensor, " B"], divergence: Divergence = "reverse_kl", alpha: float = 0.5
) -> Float[Tensor, " B"]:
    """f'(u) - f'(1) of u = pi / ref, table 1 of https://arxiv.org/abs/2309.16240: the reward under an f-divergence.

    `reverse_kl` log u; `forward_kl` 1 - 1/u; `jensen_shannon` log(2u / (1 + u)); `alpha` (1 - u^-alpha) / alpha,
    which is the reverse KL as alpha -> 0 and the forward KL at 1. Exponents are at most 20, without gradient beyond.

    >>> [round(divergence_score(torch.tensor([1.0]), kind).item(), 4) for kind in ("reverse_kl", "forward_kl")]
    [1.0, 0.6321]
    """
    if divergence == "jensen_shannon":
        return math.log(2) + F.logsigmoid(log_ratio)
    return power_score(log_ratio, {"reverse_kl": 0.0, "forward_kl": 1.0, "alpha": alpha}[divergence])


def log1mexp(x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """log(1 - e^x) for x <= 0 to the last digit, by two forms that meet at x = -log 2.

    From -e^-20 up, where it passes -20 nats, it is constant, so that p = 1 has a finite value and gradient.

    >>> log1mexp(torch.tensor([-50.0, math.log(0.75), 0.0])).tolist()
    [-1.9287498933537385e-22, -1.3862943649291992, -20.0]
    """
    x = x.clamp(max=-math.exp(-MAX_EXPONENT))
    # each form sees only its own side: the other's slope is infinite there, and 0 * inf is NaN
    near, far = x.clamp(min=-math.log(2)), x.clamp(max=-math.log(2))
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def desensitized_logps(
    chosen_logprobs: Float[Tensor, "*chosen"],
    chosen_mask: Bool[Tensor, "*chosen"],
    rejected_logprobs: Float[Tensor, "*rejected"],
    rejected_mask: Bool[Tensor, "*rejected"],
    alpha: float,
    *,
    chosen_cu_seqlens: Tensor | None = None,
    rejected_cu_seqlens: Tensor | None = None,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """LD-DPO's sequence log-probs, https://arxiv.org/abs/2409.06411: what one answer has beyond the other counts less.

    With L the number of trained tokens of the shorter answer, each of the two has

        logps = sum_(t <= L) logprobs_t + alpha sum_(t > L) logprobs_t

    Call it for the policy and for the reference alike. alpha = 1 is `rlloss.sequence_logps`.

    >>> chosen, rejected = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[-3.0]])
    >>> desensitized_logps(chosen, chosen < 0, rejected, rejected < 0, 0.5)
    (tensor([-4.]), tensor([-3.]))
    """
    check_range("desensitized_logps", "alpha", alpha, 0, 1)
    sides = [
        (chosen_logprobs, chosen_mask, chosen_cu_seqlens, "chosen"),
        (rejected_logprobs, rejected_mask, rejected_cu_seqlens, "rejected"),
    ]
    lengths = [sequence_lengths(mask, cu_seqlens) for _, mask, cu_seqlens, _ in sides]
    if lengths[0].shape != lengths[1].shape:
        raise ValueError(
            f"desensitized_logps: needs as many chosen as rejected answers, got {len(lengths[0])} and {len(lengths[1])}"
        )
    shared = torch.minimum(*lengths)
    made = []
    for (logprobs, mask, cu_seqlens, name), own in zip(sides, lengths, strict=True):
        check_full_precision("desensitized_logps", f"{name}_logprobs", logprobs)
        number = mask.cumsum(-1)
        if cu_seqlens is not None:
            number = number - to_tokens(own.cumsum(0) - own, mask, cu_seqlens)
        beyond = number > to_tokens(shared, mask, cu_seqlens)
        weights = torch.where(beyond, alpha, torch.ones_like(logprobs))
        made.append(sequence_sum(weighted(logprobs, weights), mask, cu_seqlens))
    return made[0], made[1]


def wpo_weights(
    logprobs: Float[Tensor, "*tokens"],
    sum_p2: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, " S"]:
    """WPO's weight of each answer, https://arxiv.org/abs/2406.11827: how likely the policy is to write it, aligned.

        w(y) = exp((1/|y|) sum_t (log p_t - log sum_v p_v^2)),   without gradient

    A pair's weight is the product: `weights=wpo_weights(...chosen) * wpo_weights(...rejected)`, with `sum_p2` from
    `rlloss.token_logprobs(..., outputs=("logprobs", "sum_p2"))`. An answer without trained tokens has 1.

    >>> mask = torch.ones(1, 2, dtype=torch.bool)
    >>> wpo_weights(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.5, 0.5]]), mask)  # sqrt(1 * 1/2)
    tensor([0.7071])
    """
    check_full_precision("wpo_weights", "logprobs", logprobs)
    check_like("wpo_weights", "sum_p2", sum_p2, "logprobs", logprobs)
    aligned = logprobs.detach() - sum_p2.detach().log()  # -inf where masked, which the mean leaves out
    return sequence_mean(aligned, loss_mask, cu_seqlens).clamp(max=MAX_EXPONENT).exp()
