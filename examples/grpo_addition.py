"""GRPO on two-digit addition, from an untrained model, in about two minutes on two CPU cores.

A small Llama is made from scratch (examples/addition.py) and warm-started on sums by SFT until it is right about
every second time. From there on GRPO sees nothing but a reward: 1 for a right answer, 0 for a wrong one. Left out is
what a real run adds (a pretrained model, chat templates, a GPU): examples/smollm2_addition.py is the same loop on one.

    pip install -c constraints.txt -e ".[examples]" && python examples/grpo_addition.py
"""

import argparse
from pathlib import Path

import torch
from addition import ANSWER_TOKENS, digits_tokenizer, exact_match, small_llama, sums, warm_start
from torch.optim.lr_scheduler import LambdaLR

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

UPDATES_PER_STEP = 2


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

    warm_start(model, tokenizer, train_rows, evaluate, args.warm_start)

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
