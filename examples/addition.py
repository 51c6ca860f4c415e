"""The task of three examples: sums of two numbers, one token per digit, for a Llama that is made from scratch.

Everything is here that the algorithms do not care about: tokenizer, model, rows, the reward, and the warm start by SFT
that leaves reinforcement learning something to reward.
"""

import random
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import Session, completions, train_offline

ANSWER_TOKENS = 4  # three digits and the end of the sequence

SYMBOLS = ["<pad>", "<eos>", *"0123456789+="]

Rows = list[dict[str, str]]


def digits_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {symbol: i for i, symbol in enumerate(SYMBOLS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """3 layers x 128, 0.64 M parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def sums(seed: int, *, width: int = 2) -> tuple[Rows, Rows]:
    """All 10,000 sums of two numbers below 100: 9,000 to train on and 1,000 held out.

    Numbers have `width` digits or more and their sums one more; with `width=0` lengths vary.
    """
    longer = width and width + 1
    answers = {(a, b): f"{a + b:0{longer}d}" for a in range(100) for b in range(100)}
    rows = [
        {"prompt": f"{a:0{width}d}+{b:0{width}d}=", "completion": answer, "answer": answer}
        for (a, b), answer in answers.items()
    ]
    random.Random(seed).shuffle(rows)
    return rows[:9000], rows[9000:]


def exact_match(
    prompts: list[str], completions: list[str], answer: list[str], completion_ids: list[list[int]], **columns: Any
) -> list[float]:
    """1 for the right sum and its end, else 0."""
    return [float(ids == tokens_of(right)) for ids, right in zip(completion_ids, answer, strict=True)]


def digit_match(
    prompts: list[str], completions: list[str], answer: list[str], completion_ids: list[list[int]], **columns: Any
) -> list[list[float]]:
    """A quarter for each token that is right at its place, the end of the sequence included: 1 for the right sum."""
    return [
        [0.25 * (k < len(tokens_of(right)) and ids[k] == tokens_of(right)[k]) for k in range(len(ids))]
        for ids, right in zip(completion_ids, answer, strict=True)
    ]


def tokens_of(answer: str) -> list[int]:
    """What the model should write: padding in between would vanish from its text."""
    return [SYMBOLS.index(symbol) for symbol in [*answer, "<eos>"]]


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Rows,
    evaluate: Callable[[Session], dict[str, float]],
    accuracy: float,
) -> None:
    """SFT on right answers, until that share of the sampled held-out answers is right."""
    print(f"Warm start: SFT on {len(rows):,} sums, until {accuracy:.0%} of the sampled held-out answers are right")
    train_offline(
        Session(model, tokenizer, learning_rate=2e-3),
        completions(rows, tokenizer),
        rlloss.SFTLoss(),
        steps=2000,
        batch_size=256,
        evaluate=evaluate,
        evaluate_every=20,
        until=lambda numbers: numbers.get("accuracy", 0.0) >= accuracy,
    )
