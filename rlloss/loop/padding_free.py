"""Rows end to end in one row without padding, for models that keep them apart by their positions."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlloss._typing import Bool, Float, Int
from rlloss.heads import accepts, backbone_of, text_config
from rlloss.loop.modes import eval_mode
from rlloss.models import backbone_hidden
from rlloss.scalar import ScalarModel

__all__ = ["check_padding_free", "packed_hidden"]

_WHO = "padding_free"
_WAY_OUT = "pass Session(..., padding_free=False)"

# Attention that counts tokens or chooses among them beyond a length, which a short probe never reaches.
_BEYOND_THE_PROBE = ("attention_chunk_size", "index_topk", "index_topk_blocks")
_proved: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def packed_hidden(
    backbone: nn.Module, input_ids: Int[Tensor, "B T"], attention_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T H"]:
    """Hidden states of right-padded rows, made without the padding, where they are 0.

    The rows lie end to end in one, whose positions start at 0 where a row does. Attention that reads them stays within
    a row; that of a backbone is proved before it is first used.
    """
    _check(backbone)
    (real,) = attention_mask.flatten().nonzero(as_tuple=True)
    positions = (attention_mask.cumsum(-1) - 1).flatten()[real]
    hidden = backbone_hidden(_WHO, backbone, input_ids.flatten()[real][None], position_ids=positions[None])[0]
    padded = hidden.new_zeros(attention_mask.numel(), hidden.shape[-1]).index_copy(0, real, hidden)
    return padded.unflatten(0, attention_mask.shape)


def check_padding_free(model: nn.Module) -> None:
    """Raises ValueError unless rows that lie end to end leave each other alone in this model.

    Two short rows prove it: the last token's gradient must reach its own row and be exactly 0 in the row before, and
    the second row must come out as it does alone. Recurrence, convolution, and attention that makes its own positions
    fail. Attention that depends on lengths far beyond the probe is refused by the name of its option.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> check_padding_free(LlamaForCausalLM(LlamaConfig(vocab_size=11, **size)))
    """
    _check(model.backbone if isinstance(model, ScalarModel) else backbone_of(model))


def _check(backbone: nn.Module) -> None:
    config = text_config(backbone)
    kind = getattr(config, "_attn_implementation", None)  # what may change between calls and change the mask
    if backbone in _proved and _proved[backbone] == kind:
        return
    name = type(backbone).__name__
    if not accepts(backbone, "position_ids"):
        raise ValueError(f"{_WHO}: {name} reads no position_ids, which would tell its rows apart; {_WAY_OUT}")
    for option in _BEYOND_THE_PROBE:
        if getattr(config, option, None) is not None:
            raise ValueError(
                f"{_WHO}: {name} has {option}={getattr(config, option)}, so that how rows of such lengths stay apart "
                f"cannot be proved on short ones; {_WAY_OUT}"
            )
    with eval_mode(backbone), _fresh_autocast(next(backbone.parameters()).device.type):
        reason = _mixes(backbone)
    if reason:
        raise ValueError(f"{_WHO}: {name} with attn_implementation={kind!r} {reason}; {_WAY_OUT}")
    _proved[backbone] = kind


def _mixes(backbone: Any) -> str | None:
    """Why rows end to end are not what they are alone, or None."""
    embedding = backbone.get_input_embeddings()
    device = embedding.weight.device
    first, second = torch.arange(5, device=device), torch.arange(4, device=device)
    ids = (torch.cat([first, second + 5]) % embedding.weight.shape[0])[None]
    embedded: list[Tensor] = []

    def leaf(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()  # some models write into it

    handle = embedding.register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            packed = backbone_hidden(_WHO, backbone, ids, position_ids=torch.cat([first, second])[None])[0]
            # in a random direction: a normalised state has the same sum, or sum of squares, whatever it read
            direction = torch.randn(packed.shape[-1], generator=torch.Generator().manual_seed(0)).to(packed)
            [gradient] = torch.autograd.grad(packed[-1] @ direction, embedded[0])
    finally:
        handle.remove()
    with torch.no_grad():
        alone = backbone_hidden(_WHO, backbone, ids[:, 5:])[0]
    reached = gradient[0].abs().sum(-1)
    if not bool((reached[:5] == 0).all()):
        return "lets a row read the row before it"
    if not bool((reached[7:] > 0).all()):
        return "shows no gradient within a row, so that it cannot be proved that rows stay apart"
    # at the dtype that it is computed in; a forgotten position moves the state by as much as it is large
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else packed.dtype
    if not float((packed.detach()[5:] - alone).norm()) <= torch.finfo(dtype).eps ** 0.5 * float(alone.norm()):
        return "makes another thing of a row behind a row than of the row alone"
    return None


def _fresh_autocast(device: str) -> torch.autocast:
    """As outside, but for its cache of cast weights: what is cast without a gradient here would have none later."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)
