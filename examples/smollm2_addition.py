"""GRPO on single-digit addition with a real pretrained model, in about five minutes on two CPU cores.

SmolLM2-135M-Instruct knows sums but seldom states one within ten tokens. The reward is 1 where the last number of the
answer is the right sum, else 0. The same loop as examples/grpo_addition.py; new are a chat template, a frozen lower
half, and bfloat16: float32 master weights under autocast, and a bfloat16 copy that samples.

    python examples/smollm2_addition.py                        # the model from the Hugging Face hub
    python examples/smollm2_addition.py --model path/to/folder # any local folder, any chat model
"""

import argparse
import random
import re
from pathlib import Path
from typing import Any

import torch
from pretrained import SMOLLM2, load_upper_half

import rlloss
from rlloss.loop import (
    Session,
    before_after_table,
    evaluate_online,
    frozen_copy,
    plot_curves,
    prompts,
    train_online,
)

ANSWER_TOKENS = 10


def questions(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All 100 sums of two digits as chat prompts: 80 to train on and 20 held out."""
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
        for a in range(10)
        for b in range(10)
    ]
    random.Random(seed).shuffle(rows)
    return rows[:80], rows[80:]


def last_number(prompts: list[Any], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of a completion is the answer, else 0."""
    numbers = [re.findall(r"\d+", completion) for completion in completions]
    return [float(found[-1:] == [right]) for found, right in zip(numbers, answer, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="local folder or hub name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/smollm2_addition"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer, model = load_upper_half(args.model)
    train_rows, held_out_rows = questions(args.seed)
    train, held_out = prompts(train_rows, tokenizer), prompts(held_out_rows, tokenizer)

    session = Session(
        model,
        tokenizer,
        reference=frozen_copy(model),
        learning_rate=3e-5,
        autocast_dtype=torch.bfloat16,
        sampling_dtype=torch.bfloat16,
        seed=args.seed,
    )

    def held_out_answers(session: Session) -> tuple[float, list[str]]:
        return evaluate_online(session, held_out * 10, last_number, max_new_tokens=ANSWER_TOKENS)

    before, answers_before = held_out_answers(session)
    train_online(
        session,
        train,
        last_number,
        rlloss.GRPOLoss(),
        steps=args.steps,
        prompts_per_step=8,
        group_size=8,
        max_new_tokens=ANSWER_TOKENS,
        evaluate=lambda session: {"accuracy": held_out_answers(session)[0]},
        evaluate_every=10,
        folder=args.folder,
        seed=args.seed,
    )
    after, answers_after = held_out_answers(session)

    shown = slice(0, 6)
    print("\nHeld-out sums, sampled answers\n")
    print(
        before_after_table(
            [row["prompt"][0]["content"] for row in held_out_rows[shown]],
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
