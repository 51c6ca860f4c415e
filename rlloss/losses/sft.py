"""SFT: the negative log-likelihood of the trained tokens."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.likelihood import LikelihoodLoss
from rlloss.output import LossOutput, Mean, Metric
from rlloss.reduce import Normalizer, Reduction

__all__ = ["SFTLoss"]


class SFTLoss(LikelihoodLoss):
    """Supervised fine-tuning: maximum likelihood of demonstrations, step 1 of https://arxiv.org/abs/2203.02155.

    With one normaliser for the whole step a short answer's tokens weigh what a long answer's do.

        loss = -(1/N) sum_t l_t        dloss/dl_t = -1/N        (token_mean; N trained tokens)

    Label smoothing, https://arxiv.org/abs/1512.00567, gives a share of each label to the whole vocabulary, and the
    z-loss of PaLM, https://arxiv.org/abs/2204.02311, holds the normaliser Z of the softmax near 1:

        loss_t = -(1 - label_smoothing) l_t - label_smoothing m_t + z_coef z_t^2
        dloss_t/dm_t = -label_smoothing        dloss_t/dz_t = 2 z_coef z_t

    with the mean m of the log-probs over the vocabulary and z = log Z, `mean_logprob` and `logsumexp` of
    `rlloss.token_logprobs`. A vocabulary with a token of log-prob -inf has no mean, and cannot be smoothed.

    forward(logprobs, loss_mask, mean_logprob=..., logsumexp=...): as `rlloss.LikelihoodLoss`.

    Metrics: nll (mean over trained tokens, in nats; unweighted), and logsumexp where it is given.

    Args:
        label_smoothing: Share of a label that the vocabulary gets, in [0, 1].
        z_coef: Weight of the z-loss; PaLM has 1e-4.
        reduction: How tokens are averaged: see `rlloss.reduce_tokens`.
        max_length: The constant of `fixed_length`.

    >>> import torch
    >>> SFTLoss()(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])).loss
    tensor(2.)
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        z_coef: float = 0.0,
        reduction: Reduction = "token_mean",
        max_length: int | None = None,
    ) -> None:
        super().__init__(reduction=reduction, max_length=max_length)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 1)
        check_range(self._who, "z_coef", z_coef, 0)
        self.label_smoothing, self.z_coef = label_smoothing, z_coef

    @property
    def extra_outputs(self) -> tuple[str, ...]:
        """The mean log-prob for label smoothing, the normaliser for the z-loss."""
        wanted = {"mean_logprob": self.label_smoothing, "logsumexp": self.z_coef}
        return tuple(name for name, weight in wanted.items() if weight)

    def forward(
        self,
        logprobs: Float[Tensor, "*tokens"],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        mean_logprob: Float[Tensor, "*tokens"] | None = None,
        logsumexp: Float[Tensor, "*tokens"] | None = None,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """The loss and its metrics; `token_weights` scale the numerator, and 0 rejects a token."""
        given = {"logprobs": logprobs, "mean_logprob": mean_logprob, "logsumexp": logsumexp}
        self._check_needed("label_smoothing", self.label_smoothing, "mean_logprob", mean_logprob)
        self._check_needed("z_coef", self.z_coef, "logsumexp", logsumexp)
        loss_mask, inputs = self._door({k: x for k, x in given.items() if x is not None}, loss_mask, cu_seqlens)
        loss = self._reduced(self.token_loss, inputs, loss_mask, token_weights, normalizer, cu_seqlens)
        metrics: dict[str, Metric] = {"nll": Mean.of(-inputs["logprobs"], loss_mask)}
        if logsumexp is not None:
            metrics["logsumexp"] = Mean.of(inputs["logsumexp"], loss_mask)
        return LossOutput(loss, metrics)

    def token_loss(
        self, logprobs: Tensor, mean_logprob: Tensor | None = None, logsumexp: Tensor | None = None
    ) -> Tensor:
        """The loss of each token."""
        loss = -logprobs
        if self.label_smoothing and mean_logprob is not None:
            loss = -(1 - self.label_smoothing) * logprobs - self.label_smoothing * mean_logprob
        if self.z_coef and logsumexp is not None:
            loss = loss + self.z_coef * logsumexp.square()
        return loss

    def _check_needed(self, option: str, value: float, name: str, x: Tensor | None) -> None:
        if value and x is None:
            raise ValueError(
                f"{self._who}: {option}={value} needs {name}, got None; rlloss.token_logprobs(..., "
                f"outputs=('logprobs', '{name}')) makes it"
            )
