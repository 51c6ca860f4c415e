"""Sampling from a causal LM: a group shares its prompt's prefill, and log-probs are kept as they are drawn."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlloss._checks import check_count, check_range
from rlloss._typing import Float, Int
from rlloss.heads import text_config
from rlloss.loop.modes import eval_mode

__all__ = ["Completion", "sample", "stop_tokens"]


@dataclass(frozen=True)
class Completion:
    """What the model wrote after one prompt.

    Args:
        ids: The drawn tokens; the last one is an end-of-sequence token if `finished`.
        logprobs: `log softmax(logits / temperature)` of each of them, float32: the `rollout_logprobs` of a loss.
        finished: False where `max_new_tokens` cut it.
    """

    ids: list[int]
    logprobs: list[float]
    finished: bool


@torch.no_grad()  # not inference_mode: models that update a buffer in forward would keep an inference tensor
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
    max_rows: int | None = None,
) -> list[Completion]:
    """Draws `group_size` completions of every prompt from any Hugging Face decoder-only LM.

    Each prompt is prefilled once and its cache then shared out to the group; rows that have ended leave the batch.
    The result is prompt-major: the completions of `prompts[i]` are `[i * group_size : (i + 1) * group_size]`.

    There is no top-p and no top-k: a truncated sampler draws from another distribution than the one whose log-probs
    the loss computes, so every importance ratio would be biased.

    A `generator` in the same state gives the same completions. Every row and position has a random number of its own,
    so neither `max_rows` nor the moment at which other rows end changes what is drawn (the float noise of another batch
    shape aside), and the generator moves on by the same amount whatever is drawn. The model runs in eval mode and is
    left as it was.

    Args:
        model: Anything whose `forward` takes `input_ids, attention_mask, past_key_values, use_cache` and returns
            `logits` and a `past_key_values` that can be reordered.
        prompts: Token ids, of any lengths.
        temperature: Divides the logits; 0 is greedy decoding, whose log-probs are recorded at temperature 1.
        eos_token_id: The token, or tokens, that end a completion; None lets every one run to `max_new_tokens`.
        pad_token_id: Fills the left of shorter prompts; it is masked, so any id of the vocabulary serves.
        max_rows: How many completions are decoded at once. Multiples of `group_size` keep groups whole; a group
            that is split over two batches is prefilled in both.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=2)
    >>> completions = sample(LlamaForCausalLM(config), [[1, 2, 3], [4]], group_size=2, max_new_tokens=5, eos_token_id=0)
    >>> len(completions), all(len(c.ids) == len(c.logprobs) for c in completions)
    (4, True)
    """
    stops = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    _check_numbers(group_size, max_new_tokens, temperature, max_rows)
    _check_tokens(text_config(model), prompts, max_new_tokens, {"eos": stops, "pad": [pad_token_id]})

    device = next(model.parameters()).device
    n_rows = len(prompts) * group_size
    noise_device = device if generator is None else generator.device
    noise = torch.rand(n_rows, max_new_tokens, generator=generator, device=noise_device, dtype=torch.float64)
    stop_ids = torch.tensor(stops, dtype=torch.long, device=device)

    chunk = n_rows if max_rows is None else max_rows
    chunk = chunk // group_size * group_size or chunk
    completions = []
    with eval_mode(model):
        for first in range(0, n_rows, chunk):
            rows = range(first, min(first + chunk, n_rows))
            first_prompt = first // group_size
            owner = torch.tensor([row // group_size - first_prompt for row in rows], device=device)
            part = prompts[first_prompt : rows[-1] // group_size + 1]
            batch = _prefill(model, part, owner, max_new_tokens, pad_token_id)
            completions += _decode(model, batch, noise[rows.start : rows.stop].to(device), temperature, stop_ids)
    return completions


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation config.

    Of an instruction-tuned model these may differ: the end of a turn, and the end of a text. What the config names and
    the vocabulary has not (a default, of a model of your own) is never drawn, and left out.

    >>> from types import SimpleNamespace
    >>> model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 9]))
    >>> stop_tokens(model, SimpleNamespace(eos_token_id=2))
    [2, 9]
    """
    own, also = (
        [] if named is None else [named] if isinstance(named, int) else list(named)
        for named in (tokenizer.eos_token_id, getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    )
    size = getattr(text_config(model), "vocab_size", None)
    return own + [token for token in also if token not in own and (size is None or token < size)]


@dataclass
class _Batch:
    """The rows being decoded, and all that one more forward pass needs to know of them."""

    logits: Tensor  # [rows, V], for the next token
    cache: Any  # a transformers Cache
    mask: Tensor  # [rows, prompt width + max_new_tokens]: left padding is False, the future already True
    positions: Tensor  # [rows], of the next token
    width: int  # columns of the mask that the cache holds

    def keep(self, rows: Tensor) -> None:
        # reorder_cache is the one selection that every cache layer has: batch_select_indices skips recurrent states
        self.cache.reorder_cache(rows)
        self.logits, self.mask, self.positions = self.logits[rows], self.mask[rows], self.positions[rows]


def _prefill(
    model: nn.Module, prompts: Sequence[Sequence[int]], owner: Tensor, max_new_tokens: int, pad_token_id: int
) -> _Batch:
    """Runs every prompt once and shares its cache out: row i continues prompt `owner[i]`."""
    width = max(len(prompt) for prompt in prompts)
    padded = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    ids = torch.tensor(padded, device=owner.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=owner.device)
    columns = torch.arange(width + max_new_tokens, device=owner.device)
    positions = columns - (width - lengths)[:, None]
    mask = positions >= 0

    logits, cache = _forward(model, ids, mask[:, :width], positions[:, :width].clamp(min=0), None)
    if not hasattr(cache, "reorder_cache"):
        raise ValueError(
            f"sample: {type(model).__name__} must return past_key_values with a reorder_cache method, got "
            f"{type(cache).__name__}; load it as a transformers causal LM (AutoModelForCausalLM, transformers >= 5.17)"
        )
    batch = _Batch(logits, cache, mask, lengths, width)
    batch.keep(owner)
    return batch


def _decode(
    model: nn.Module, batch: _Batch, noise: Float[Tensor, "rows T"], temperature: float, stops: Int[Tensor, " E"]
) -> list[Completion]:
    ids = torch.zeros(noise.shape, dtype=torch.long, device=noise.device)
    logprobs = torch.zeros(noise.shape, device=noise.device)
    row = torch.arange(len(noise), device=noise.device)  # where the batch's rows stand in the result
    ended = torch.zeros_like(row, dtype=torch.bool)
    for t in range(noise.shape[1]):
        token, logprobs[row, t] = _draw(batch.logits, noise[row, t], temperature)
        ids[row, t] = token
        ended |= torch.isin(token, stops)
        running = len(row) - int(ended.sum())
        if running == 0 or t + 1 == noise.shape[1]:
            break
        if running <= 0.9 * len(row):  # a selection copies the cache, so not for every row that ends
            alive = (~ended).nonzero().squeeze(-1)
            batch.keep(alive)
            row, token, ended = row[alive], token[alive], ended[alive]
        batch.width += 1
        batch.logits, batch.cache = _forward(
            model, token[:, None], batch.mask[:, : batch.width], batch.positions[:, None], batch.cache
        )
        batch.positions = batch.positions + 1

    # a row that had ended went on drawing until it left the batch: what follows its first stop is cut here
    stopped = torch.isin(ids, stops)
    finished = stopped.any(-1)
    length = torch.where(finished, stopped.int().argmax(-1) + 1, noise.shape[1])
    columns = (x.tolist() for x in (ids, logprobs, length, finished))
    return [Completion(i[:n], lp[:n], done) for i, lp, n, done in zip(*columns, strict=True)]


def _draw(
    logits: Float[Tensor, "rows V"], noise: Float[Tensor, " rows"], temperature: float
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """One token per row from softmax(logits / temperature), and its log-prob.

    Inverts the distribution function in units of 2**-50. Integers add up exactly, so the sum is monotone, zero
    probability stays zero and torch.use_deterministic_algorithms has no objection (it refuses a float cumsum on CUDA).
    """
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if bool(logprobs[:, 0].isnan().any()):  # one NaN or +inf among the logits makes the whole row NaN
        raise ValueError(
            f"sample: the model's logits / temperature (here {temperature}) must be finite or -inf, got NaN or inf; "
            "look at its weights and its dtype"
        )
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        mass = (logprobs.exp() * 2.0**50).long().cumsum(-1)
        target = (noise[:, None] * mass[:, -1:]).long()  # noise < 1, so target < the total
        token = torch.searchsorted(mass, target, right=True).squeeze(-1)
    return token, logprobs.gather(-1, token[:, None]).squeeze(-1)


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: object) -> tuple[Tensor, object]:
    """The logits of the last column, and the cache after it."""
    optional = {"position_ids": positions, "logits_to_keep": 1}
    accepted = inspect.signature(model.forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        optional = {name: value for name, value in optional.items() if name in accepted}
    out = model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **optional)
    return out.logits[:, -1].to(ids.device), getattr(out, "past_key_values", None)


def _check_numbers(group_size: int, max_new_tokens: int, temperature: float, max_rows: int | None) -> None:
    for name, value in {"group_size": group_size, "max_new_tokens": max_new_tokens, "max_rows": max_rows}.items():
        if value is not None:
            check_count("sample", name, value)
    check_range("sample", "temperature", temperature, low=0)


def _check_tokens(
    config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, special: dict[str, list[int]]
) -> None:
    if len(prompts) == 0:
        raise ValueError("sample: prompts must hold at least one prompt, got none")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"sample: prompts[{i}] is empty; start it with the tokenizer's bos token")
    vocab_size = getattr(config, "vocab_size", None)
    if vocab_size is not None:
        named = {f"{name}_token_id": ids for name, ids in special.items()}
        named |= {f"prompts[{i}]": prompt for i, prompt in enumerate(prompts)}
        for name, ids in named.items():
            if ids and (min(ids) < 0 or max(ids) >= vocab_size):
                raise ValueError(
                    f"sample: {name} holds token ids from {min(ids)} to {max(ids)}, but the model's vocabulary is "
                    f"0 to {vocab_size - 1}; is it another model's tokenizer?"
                )
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if limit is not None and len(prompts[longest]) + max_new_tokens > limit:
        raise ValueError(
            f"sample: prompts[{longest}] has {len(prompts[longest])} tokens, which with max_new_tokens="
            f"{max_new_tokens} is more than the model's {limit} positions; shorten one of them"
        )
