"""A trained reward model as a reward function."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlloss._checks import check_count, check_flag
from rlloss.rewards.readers import reader_of
from rlloss.rewards.reward import Columns, Reward

__all__ = ["RewardModel"]

_WHO = "reward_model"


class RewardModel(Reward):
    """The score that a reward model gives a prompt with its completion; any real number, as it was trained.

    A prompt of messages is written by the chat template, where the tokenizer has one, with the completion as the
    assistant's turn. Anything else is the tokens of the prompt, those of the completion and an end of sequence: the
    form in which `rlloss.loop.pairs` trains. A tokenizer with a CLS token (BERT's kind) makes a pair of texts of them,
    and the completion alone where the prompt is empty.

    The score is read at the row's last token, that of a `ScalarModel` at the last one that it was trained on, however
    the batch is padded and whatever the padding token is. It is proved when the reward is made.

    Args:
        model: The folder or hub name of a sequence classifier of transformers, a folder that
            `rlloss.loop.load_scalar_model` reads, or such a model; put in eval mode and never trained.
        tokenizer: The model's own; the folder's where None.
        batch_size: Rows per forward pass; those of similar length go together.
        label: Which output is the score, where there are several: its name in `config.id2label`, or its number.
        append_eos: False for a model that was trained on texts without an end of sequence.
        max_length: Tokens that the model reads of a row, its `max_position_embeddings` where None. A longer row loses
            the beginning of its prompt, and a completion that alone is longer its end; the first cut is logged.
        quantization: Of a model that is loaded here, options of transformers' BitsAndBytesConfig:
            `{"load_in_4bit": True}`.
        device: Where the model goes. None leaves a model where it is, and takes a folder to the GPU where there is one.
    """

    __name__ = _WHO

    def __init__(
        self,
        *,
        model: str | Path | nn.Module | None = None,
        tokenizer: Any = None,
        batch_size: int = 16,
        label: int | str | None = None,
        append_eos: bool = True,
        max_length: int | None = None,
        quantization: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if model is None:
            raise ValueError(
                f"{_WHO}: needs a model, got None; pass get_reward('reward_model', model='folder or hub name') or a "
                "loaded one with its tokenizer"
            )
        check_count(_WHO, "batch_size", batch_size)
        check_flag(_WHO, "append_eos", append_eos)
        if max_length is not None:
            check_count(_WHO, "max_length", max_length)
        self.tokenizer = _tokenizer(model) if tokenizer is None else tokenizer
        self.model: Any = _loaded(model, quantization, device).eval()
        self.batch_size, self.label, self.append_eos, self.max_length = batch_size, label, append_eos, max_length
        self.quantization, self.device = quantization, None if device is None else str(device)
        self._reader = reader_of(self.model, self.tokenizer, label=label, append_eos=append_eos, max_length=max_length)

    @torch.no_grad()
    def scores(self, prompts: Sequence[Any], completions: Sequence[str], columns: Columns) -> list[float]:
        """One number per completion."""
        rows = [self._reader.row(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        self._reader.window.report()
        longest_first = sorted(range(len(rows)), key=lambda i: -self._reader.length(rows[i]))
        scores = torch.zeros(len(rows), dtype=torch.float64)
        for chunk in torch.tensor(longest_first, dtype=torch.long).split(self.batch_size):
            if len(chunk):
                scores[chunk] = self._reader.scores([rows[i] for i in chunk.tolist()]).double().cpu()
        return scores.tolist()


def _tokenizer(source: str | Path | nn.Module) -> Any:
    from rlloss.loop.pretrained import own_tokenizer

    return own_tokenizer(_WHO, source)


def _loaded(
    source: str | Path | nn.Module, quantization: Mapping[str, Any] | None, device: str | torch.device | None
) -> nn.Module:
    if isinstance(source, nn.Module):
        if quantization is not None:
            raise ValueError(f"{_WHO}: quantization is for a model that is loaded here; load yours quantised")
        return source if device is None else source.to(device)
    from rlloss.loop.pretrained import check_quantization, default_device, quantization_config

    place = device or default_device()
    if quantization is None:
        return _from_folder(source, {}).to(place)
    check_quantization(_WHO, quantization)
    return _from_folder(source, {"quantization_config": quantization_config(quantization), "device_map": {"": place}})


def _from_folder(source: str | Path, options: dict[str, Any]) -> nn.Module:
    from rlloss.loop.pretrained import architecture, load_classifier
    from rlloss.loop.scalar_folder import load_scalar_model

    kind = architecture(source)
    if "SequenceClassification" not in kind:
        try:
            return load_scalar_model(source, **options)
        except ValueError as error:
            raise ValueError(f"{_WHO}: {source} is a {kind}, no sequence classifier; {error}") from error
    model, info = load_classifier(source, **options)
    if info["missing_keys"]:
        raise ValueError(
            f"{_WHO}: {source} has no weights for {sorted(info['missing_keys'])}, which would be drawn at random; pass "
            "a model that was trained to score"
        )
    return model
