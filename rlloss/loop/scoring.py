"""What losses read of models, per token and per sequence, from as few forward passes as the models allow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlloss.heads import backbone_of
from rlloss.loop.batch import Batch
from rlloss.loop.padding_free import packed_hidden
from rlloss.models import backbone_hidden, hidden_logprobs
from rlloss.scalar import ScalarModel

__all__ = ["score"]


def score(
    model: Any,
    critic: ScalarModel | None,
    batch: Batch,
    outputs: Sequence[str],
    temperature: float,
    *,
    padding_free: bool = False,
) -> dict[str, Tensor]:
    """The named `outputs`, in their order.

    `scores` `[B]` are a reward model's, at each row's last trained token; `values` `[B, T]` the critic's after each
    token; all other names are per-token statistics of the language model. A critic on its trunk shares its forward.

    With `padding_free` the models read the rows end to end, without padding; the outputs are laid out as ever.
    """

    def hidden_states(backbone: nn.Module) -> Tensor:
        if padding_free:
            return packed_hidden(backbone, batch.input_ids, batch.attention_mask)
        return backbone_hidden("score", backbone, batch.input_ids, attention_mask=batch.attention_mask)

    made: dict[str, Tensor] = {}
    hidden = None
    if "scores" in outputs:
        states = hidden_states(model.backbone)
        made["scores"] = model.scalars(states[torch.arange(len(states), device=states.device), batch.last_index])
    statistics = [name for name in outputs if name not in ("scores", "values")]
    if statistics:
        hidden = hidden_states(backbone_of(model))
        stats = hidden_logprobs(model, hidden, batch.ids, batch.loss_mask, temperature=temperature, outputs=statistics)
        made |= {name: getattr(stats, name) for name in statistics}
    if "values" in outputs:
        assert critic is not None  # the session has checked it
        if hidden is None or not critic.shares_backbone_with(model):
            hidden = hidden_states(critic.backbone)
        made["values"] = critic.scalars(hidden)
    return {name: made[name] for name in outputs}
