"""Distillation: the divergence of every token's distribution from a teacher's."""

from typing import Literal, get_args

from torch import Tensor

from rlloss._checks import check_choice, check_range
from rlloss._typing import Bool, Float
from rlloss.likelihood import LikelihoodLoss
from rlloss.output import LossOutput, Mean
from rlloss.reduce import Normalizer, Reduction

__all__ = ["DistillationLoss"]

Divergence = Literal["forward_kl", "reverse_kl", "js"]


class DistillationLoss(LikelihoodLoss):
    """Distillation by a divergence per token: https://arxiv.org/abs/1503.02531, GKD https://arxiv.org/abs/2306.13649.

    The texts are the teacher's, the student's own (on-policy, GKD) or anyone's: the loss is the same. With the teacher
    T and the student S, at each position:

        forward_kl  KL(T || S): S covers all that T might say; on a teacher's texts what SFT estimates from one token
        reverse_kl  KL(S || T): S keeps to what T would say
        js          beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S: equation 1 of GKD, between them:
                    js / beta -> KL(T || S) as beta -> 0, js / (1 - beta) -> KL(S || T) as beta -> 1

        loss = (1/N) sum_t divergence_t        dloss/ddivergence_t = 1/N        (token_mean; N trained tokens)

    forward(divergence, loss_mask): the divergence is the entry of that name of `rlloss.token_divergences(student,
    teacher, outputs=(loss_fn.divergence,), beta=loss_fn.beta)` or of `rlloss.linear_divergences`, which never holds the
    logits; `rlloss.top_k_divergence` where only the teacher's likeliest tokens are known. The rest as
    `rlloss.LikelihoodLoss`. On-policy, `rlloss.distillation_advantages` needs the sampled tokens' log-probs alone.

    Metrics: the divergence under its name (mean over trained tokens, in nats; unweighted).

    Args:
        divergence: One of the three; the loss only averages it, and a loop reads here what to make.
        beta: The teacher's share of the mixture, of js alone, between 0 and 1; 1/2 where None.
        reduction: How tokens are averaged: see `rlloss.reduce_tokens`.
        max_length: The constant of `fixed_length`.

    >>> import torch
    >>> from rlloss import token_divergences
    >>> student, teacher = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, -torch.inf]]])
    >>> kl = token_divergences(student, teacher, outputs=("forward_kl",)).forward_kl
    >>> DistillationLoss(divergence="forward_kl")(kl, torch.tensor([[True]])).loss
    tensor(0.6931)
    """

    family = "distillation"

    def __init__(
        self,
        *,
        divergence: Divergence = "forward_kl",
        beta: float | None = None,
        reduction: Reduction = "token_mean",
        max_length: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction, max_length=max_length)
        check_choice(self._who, "divergence", divergence, get_args(Divergence))
        if beta is not None:
            if divergence != "js":
                raise ValueError(f"{self._who}: beta is of divergence='js' alone, got {divergence=} {beta=}")
            check_range(self._who, "beta", beta, 0, 1, open_low=True)
            if beta == 1:
                raise ValueError(f"{self._who}: js is 0 at beta=1; divergence='reverse_kl' is what it tends to")
        self.divergence: Divergence = divergence
        self.beta = 0.5 if beta is None else beta

    def forward(
        self,
        divergence: Float[Tensor, "*tokens"],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """The loss and its metrics; `token_weights` scale the numerator, and 0 rejects a token."""
        loss_mask, inputs = self._door({"divergence": divergence}, loss_mask, cu_seqlens)
        loss = self._reduced(self.token_loss, inputs, loss_mask, token_weights, normalizer, cu_seqlens)
        return LossOutput(loss, {self.divergence: Mean.of(inputs["divergence"], loss_mask)})

    def token_loss(self, divergence: Tensor) -> Tensor:
        """The divergence itself."""
        return divergence
