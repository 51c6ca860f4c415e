"""GRPO on two-digit addition, from an untrained model, in about two minutes on two CPU cores.

A small Llama is made from scratch and warm-started on sums with SFTLoss until it is right about every second time.
From there on GRPO sees nothing but a reward: 1 for a right answer, 0 for a wrong one. Left out is what a real run
adds (a pretrained model, chat templates, a GPU): examples/smollm2_addition.py is the same loop on such a model.

    pip install -c constraints.txt -e ".[examples]" && python examples/grpo_addition.py
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import (
    Session,
    before_after_table,
    completions,
    evaluate_online,
    frozen_copy,
    plot_curves,
    prompts,
    train_offline,
    train_online,
)

ANSWER_TOKENS = 4  # three digits and the end of the sequence
UPDATES_PER_STEP = 2


def digits_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"0123456789+="])}
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


def sums(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """All 10,000 sums of two numbers of two digits, in fixed width: 9,000 to train on and 1,000 held out."""
    rows = [
        {"prompt": f"{a:02d}+{b:02d}=", "completion": f"{a + b:03d}", "answer": f"{a + b:03d}"}
        for a in range(100)
        for b in range(100)
    ]
    random.Random(seed).shuffle(rows)
    return rows[:9000], rows[9000:]


def exact_match(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the right sum, else 0."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=240, help="steps of GRPO")
    parser.add_argument("--warm-start", type=float, default=0.6, help="accuracy at which SFT hands over")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo_addition"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = digits_tokenizer()
    model = small_llama(tokenizer)
    train_rows, held_out_rows = sums(args.seed)
    train, held_out = prompts(train_rows, tokenizer), prompts(held_out_rows, tokenizer)

    def evaluate(session: Session) -> dict[str, float]:
        return {"accuracy": evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)[0]}

    print(f"Warm start: SFT on 9,000 sums, until {args.warm_start:.0%} of the sampled held-out answers are right")
    warm_start = Session(model, tokenizer, learning_rate=2e-3)
    train_offline(
        warm_start,
        completions(train_rows, tokenizer),
        rlloss.SFTLoss(),
        steps=2000,
        batch_size=256,
        evaluate=evaluate,
        evaluate_every=20,
        until=lambda numbers: numbers.get("accuracy", 0.0) >= args.warm_start,
    )

    print("\nGRPO: 64 prompts x 8 completions a step, reward 1 for the right sum, else 0")
    updates = UPDATES_PER_STEP * args.steps
    session = Session(
        model,
        tokenizer,
        reference=frozen_copy(model),
        learning_rate=5e-4,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda k: min((k + 1) / 20, 1 - k / updates)),
        seed=args.seed,
    )
    before, answers_before = evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)
    train_online(
        session,
        train,
        exact_match,
        rlloss.GRPOLoss(),
        steps=args.steps,
        prompts_per_step=64,
        group_size=8,
        max_new_tokens=ANSWER_TOKENS,
        updates_per_epoch=UPDATES_PER_STEP,
        recompute_old_logprobs=False,  # sampler and trainer are one float32 model: what it recorded is exact
        evaluate=evaluate,
        evaluate_every=10,
        folder=args.folder,
        seed=args.seed,
    )
    after, answers_after = evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)

    shown = slice(0, 6)
    print("\nHeld-out sums, one sampled answer each\n")
    print(
        before_after_table(
            [row["prompt"] for row in held_out_rows[shown]],
            [row["answer"] for row in held_out_rows[shown]],
            answers_before[shown],
            answers_after[shown],
            headline={"held-out accuracy": (before, after)},
        )
    )
    session.save_model(args.folder / "model")
    print(f"\n{args.folder}: metrics.jsonl, {plot_curves(args.folder).name}, checkpoint/, model/ (safetensors)")


if __name__ == "__main__":
    main()
