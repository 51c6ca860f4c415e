"""Prompts and sequences to tokens: raw texts as they are, chats through the template."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlloss.loop.chat import chat_tokens, generation_prompts, token_ids
from rlloss.loop.columns import Item, Text
from rlloss.loop.truncation import Encoded

__all__ = ["answered", "prompt_tokens", "sequence_tokens"]

_Encoder = Callable[[Any, list[Any]], Iterable[Any]]


def prompt_tokens(tokenizer: Any, items: Sequence[Item]) -> list[list[int]]:
    """Token ids up to where the answer begins."""
    return _in_order(tokenizer, items, _text_prompts, generation_prompts)


def sequence_tokens(tokenizer: Any, items: Sequence[Item]) -> list[Encoded]:
    """Token ids, and the mask of what is trained: of a text the completion and its end of sequence."""
    return _in_order(tokenizer, items, _text_tokens, chat_tokens)


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    """The token ids of a prompt and its answer, and the mask that trains the answer alone.

    >>> answered([5, 6], [7])
    ([5, 6, 7], [False, False, True])
    """
    return [*prompt, *answer], [False] * len(prompt) + [True] * len(answer)


def _in_order(tokenizer: Any, items: Sequence[Item], of_texts: _Encoder, of_chats: _Encoder) -> list[Any]:
    """Texts and chats are each encoded together, since tokenizers are fast on batches, and put back in order."""
    texts = iter(of_texts(tokenizer, [item for item in items if isinstance(item, Text)]))
    chats = iter(of_chats(tokenizer, [item for item in items if not isinstance(item, Text)]))
    return [next(texts if isinstance(item, Text) else chats) for item in items]


def _text_tokens(tokenizer: Any, texts: Sequence[Text]) -> Iterator[Encoded]:
    if not texts:
        return
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"{texts[0].place}: the tokenizer has no eos_token, so the model would never learn to stop; "
            "set tokenizer.eos_token"
        )
    before = _text_prompts(tokenizer, texts)  # of the empty prompt: what the tokenizer puts before any text
    after = token_ids(tokenizer, [text.completion for text in texts], special=False)
    for prompt, ids in zip(before, after, strict=True):
        yield answered(prompt, ids if ids[-1:] == [eos] else [*ids, eos])


def _text_prompts(tokenizer: Any, texts: Sequence[Text]) -> list[list[int]]:
    made = token_ids(tokenizer, [text.prompt for text in texts], special=True)
    for text, ids in zip(texts, made, strict=True):
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # a single one is a BOS that is also the EOS
            raise ValueError(
                f"{text.place}: the prompt's tokens end with the end-of-sequence token {ids[-1]}, after which a model "
                "writes nothing; load the tokenizer with add_eos_token=False, or take the token out of the text"
            )
    return made
