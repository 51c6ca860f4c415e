"""PPO with a critic on two-digit addition: one answer per prompt, where GRPO needs a group of them.

The same task, model and warm start as examples/grpo_addition.py, but a token's reward comes when it is written: that is
what a critic is for. It learns what is still to come after each prefix, and `explained_variance_before` says how
much of that it knew. It has a trunk of its own here; `--shared-trunk` makes it a head on the policy's. The KL to the
reference is part of the reward, under a coefficient that a controller steers to a target.

    python examples/ppo_with_critic.py
"""

import argparse
import copy
from pathlib import Path

import torch
from addition import ANSWER_TOKENS, digit_match, digits_tokenizer, exact_match, small_llama, sums, warm_start
from torch.optim.lr_scheduler import LambdaLR

import rlloss
from rlloss.loop import (
    CriticAdvantages,
    Session,
    before_after_table,
    evaluate_online,
    frozen_copy,
    plot_curves,
    prompts,
    train_online,
)

EPOCHS, UPDATES_PER_EPOCH = 4, 2  # over the answers of each step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80, help="steps of PPO")
    parser.add_argument("--warm-start", type=float, default=0.6, help="accuracy at which SFT hands over")
    parser.add_argument("--shared-trunk", action="store_true", help="the critic is a head on the policy's trunk")
    parser.add_argument("--target-kl", type=float, default=2.0, help="nats per answer that the controller holds")
    parser.add_argument("--folder", type=Path, default=Path("runs/ppo_with_critic"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = digits_tokenizer()
    model = small_llama(tokenizer)
    train_rows, held_out_rows = sums(args.seed)
    train, held_out = prompts(train_rows, tokenizer), prompts(held_out_rows, tokenizer)

    def evaluate(session: Session) -> dict[str, float]:
        return {"accuracy": evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)[0]}

    warm_start(model, tokenizer, train_rows, evaluate, args.warm_start)

    print("\nPPO: 512 prompts x 1 completion a step, a quarter of the reward for each right token")
    updates = EPOCHS * UPDATES_PER_EPOCH * args.steps
    session = Session(
        model,
        tokenizer,
        reference=frozen_copy(model),
        critic=rlloss.ScalarModel(model if args.shared_trunk else copy.deepcopy(model)),
        learning_rate=3e-4,
        critic_learning_rate=1e-3,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda k: min((k + 1) / 20, 1 - k / updates)),
        seed=args.seed,
    )
    before, answers_before = evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)
    train_online(
        session,
        train,
        digit_match,
        rlloss.ActorCriticLoss(policy=rlloss.PPOLoss(), value=rlloss.ValueLoss(), value_coef=0.5),
        steps=args.steps,
        prompts_per_step=512,
        group_size=1,
        max_new_tokens=ANSWER_TOKENS,
        advantages=CriticAdvantages(kl_coef=rlloss.AdaptiveKLController(0.01, target_kl=args.target_kl)),
        epochs_per_step=EPOCHS,
        updates_per_epoch=UPDATES_PER_EPOCH,
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
    panels = ("reward", "accuracy", "explained_variance_before", "sequence_kl", "kl_coef", "clip_frac")
    curves = plot_curves(args.folder, panels)
    print(f"\n{args.folder}: metrics.jsonl, {curves.name}, checkpoint/, model/ (safetensors)")


if __name__ == "__main__":
    main()
