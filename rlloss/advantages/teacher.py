"""A teacher as the reward: advantages from the log-probs that student and teacher give to the student's own tokens."""

import torch
from torch import Tensor

from rlloss._checks import check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float
from rlloss.advantages.gae import returns_to_go
from rlloss.reduce import within_sequences, zero_masked

__all__ = ["distillation_advantages", "minillm_advantages"]


def distillation_advantages(
    logprobs: Float[Tensor, "*tokens"],
    teacher_logprobs: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    *,
    gamma: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """On-policy distillation: the reverse KL as an advantage, https://thinkingmachines.ai/blog/on-policy-distillation/.

        A_t = sum_{s >= t} gamma^(s - t) (log T_s - log S_s)

    of tokens that the student S sampled, for any policy loss. At gamma = 0 the expected gradient descends KL(S || T) of
    every next token at the contexts that S reaches, and at gamma = 1 the KL of whole sequences (MiniLLM). It needs one
    log-prob per token of the teacher, where `rlloss.DistillationLoss` needs distributions and has no variance.

    0 at masked positions, without gradient.

    Args:
        logprobs: The student's, those that it sampled with (`old_logprobs` of the policy loss).
        gamma: How far a token answers for what follows.

    >>> mask = torch.tensor([[True, True, False]])
    >>> student, teacher = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-3.0, -1.0, 0.0]])
    >>> distillation_advantages(student, teacher, mask).tolist()
    [[-2.0, 1.0, 0.0]]
    >>> distillation_advantages(student, teacher, mask, gamma=1.0).tolist()
    [[-1.0, 1.0, 0.0]]
    """
    check_range("distillation_advantages", "gamma", gamma, 0, 1)
    mask, reward = _reward("distillation_advantages", logprobs, teacher_logprobs, loss_mask, cu_seqlens)
    return returns_to_go(reward, mask, gamma, cu_seqlens=cu_seqlens) if gamma else reward


def minillm_advantages(
    logprobs: Float[Tensor, "*tokens"],
    teacher_logprobs: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    *,
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """MiniLLM's length-normalised reward-to-go, https://arxiv.org/abs/2306.08543: the mean reward of what follows t.

        A_t = 1/(L - t) sum_{s > t} (log T_s - log S_s)        t = 1 .. L; 0 at the last token

    The token's own reward is left to the single-step term, which has it exactly over the vocabulary:

        combine(long=policy_loss(logprobs, old_logprobs, advantages, loss_mask),
                single=DistillationLoss(divergence="reverse_kl")(reverse_kl, loss_mask))

    Where samples are mixed with the teacher's, the policy loss's ratio is against the mixture. The authors' code takes
    the token's own reward into the mean and whitens it. 0 at masked positions, without gradient.

    Args:
        logprobs: The student's, those that it sampled with.

    >>> mask = torch.ones(1, 3, dtype=torch.bool)
    >>> student, teacher = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[-9.0, -1.0, -4.0]])
    >>> minillm_advantages(student, teacher, mask).tolist()
    [[-1.0, -3.0, 0.0]]
    """
    mask, reward = _reward("minillm_advantages", logprobs, teacher_logprobs, loss_mask, cu_seqlens)
    to_go, tokens = (returns_to_go(x, mask, cu_seqlens=cu_seqlens) for x in (reward, torch.ones_like(reward)))
    following = torch.where(mask & (tokens > 1), to_go - reward, 0)  # exactly 0 at the last
    return following / (tokens - 1).clamp(min=1)


def _reward(
    who: str, logprobs: Tensor, teacher_logprobs: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tokens that count, and log(T / S) of each."""
    check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "logprobs", logprobs, "loss_mask", loss_mask)
    check_like(who, "teacher_logprobs", teacher_logprobs, "loss_mask", loss_mask)
    mask = within_sequences(loss_mask, cu_seqlens)
    student, teacher = zero_masked(mask, logprobs.detach(), teacher_logprobs.detach())
    return mask, teacher - student
