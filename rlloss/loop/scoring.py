"""What losses read of models, per token and per sequence, from as few forward passes as the models allow."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlloss.loop.batch import Batch
from rlloss.models import hidden_logprobs, model_hidden
from rlloss.scalar import ScalarModel

__all__ = ["score"]


def score(
    model: Any, critic: ScalarModel | None, batch: Batch, outputs: Sequence[str], temperature: float
) -> dict[str, Tensor]:
    """The named `outputs`, in their order.

    `scores` `[B]` are a reward model's, at each row's last trained token; `values` `[B, T]` the critic's after each
    token; all other names are per-token statistics of the language model. A critic on its trunk shares its forward.
    """
    attention = {"attention_mask": batch.attention_mask}
    made: dict[str, Tensor] = {}
    hidden = None
    if "scores" in outputs:
        made["scores"] = model.score(batch.input_ids, batch.last_index, **attention)
    statistics = [name for name in outputs if name not in ("scores", "values")]
    if statistics:
        hidden = model_hidden(model, batch.input_ids, **attention)
        stats = hidden_logprobs(model, hidden, batch.ids, batch.loss_mask, temperature=temperature, outputs=statistics)
        made |= {name: getattr(stats, name) for name in statistics}
    if "values" in outputs:
        assert critic is not None  # the session has checked it
        if hidden is not None and critic.shares_backbone_with(model):
            made["values"] = critic.scalars(hidden)
        else:
            made["values"] = critic(batch.input_ids, **attention)
    return {name: made[name] for name in outputs}
