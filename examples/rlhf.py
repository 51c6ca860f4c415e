"""RLHF in three stages: supervised fine-tuning, a reward model from preferences, PPO against that reward model.

A language model learns to tell happier stories. VADER's sentiment plays the annotator: it ranks two continuations of
each opening, the reward model learns from those pairs alone, and PPO sees only the reward model. Held out are openings
that no stage has seen; what the annotator thinks of their continuations is printed before and after.

    python examples/rlhf.py                                                       # from the Hugging Face hub
    python examples/rlhf.py --model path/to/folder --data stories.jsonl           # your own: a column `text`

The learning rate is for SmolLM2-135M; a model of a million parameters wants ten times as much (`--learning-rate 1e-4`).

Wants `pip install "rlloss[examples,rewards]"`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrained import SMOLLM2

import rlloss
from rlloss.loop import load_rows
from rlloss.rewards import get_reward

OPENING_WORDS, ANSWER_TOKENS, HELD_OUT = 8, 48, 64

Row = dict[str, str]


def openings(texts: list[str]) -> list[Row]:
    """The first words of each text, and the rest."""
    split = [text.strip().split(" ", OPENING_WORDS) for text in texts]
    return [{"prompt": " ".join(w[:OPENING_WORDS]), "completion": " " + w[-1]} for w in split if len(w) > OPENING_WORDS]


def annotated_pairs(trainer: Any, prompts: list[str], annotator: Callable[..., list[float]]) -> list[Row]:
    """Two continuations of each opening, ranked; ties and empty ones are dropped."""
    first, second = (trainer.predict(prompts) for _ in range(2))
    scores = zip(annotator(prompts, first), annotator(prompts, second), strict=True)
    return [
        {"prompt": prompt, "chosen": one if x > y else other, "rejected": other if x > y else one}
        for prompt, one, other, (x, y) in zip(prompts, first, second, scores, strict=True)
        if x != y and one.strip() and other.strip()
    ]


def fine_tuned(args: argparse.Namespace, rows: list[Row], shared: dict[str, Any]) -> Any:
    print("1. Supervised fine-tuning on stories")
    options = {"max_steps": args.sft_steps, "batch_size": 16, "learning_rate": args.learning_rate}
    trainer = rlloss.create_rl_trainer(args.model, rows, "sft", output_dir=args.folder / "sft", **options, **shared)
    before = trainer.evaluate()["eval/nll"]
    trainer.train()
    print(f"   held-out nll per token {before:.3f} -> {trainer.evaluate()['eval/nll']:.3f}")
    return trainer


def reward_model(args: argparse.Namespace, start: str, pairs: list[Row], shared: dict[str, Any]) -> Any:
    print(f"2. A reward model from {len(pairs)} annotated pairs")
    options = {"max_steps": args.reward_steps, "batch_size": 16, "learning_rate": 10 * args.learning_rate}
    options |= {"eval_fraction": 0.15, "output_dir": args.folder / "reward"}
    trainer = rlloss.create_rl_trainer(start, pairs, "reward", **options, **shared)
    trainer.train()
    print(f"   held-out pairs ranked rightly {trainer.evaluate()['eval/accuracy']:.3f}")
    return trainer


def ppo(args: argparse.Namespace, start: str, reward: str, prompts: list[str], shared: dict[str, Any]) -> Any:
    """The trainer; what it does is up to the caller."""
    return rlloss.create_rl_trainer(
        start,
        [{"prompt": prompt} for prompt in prompts],
        "ppo",
        reward_model_name=reward,
        max_steps=args.ppo_steps,
        batch_size=args.ppo_batch_size,
        mini_batch_size=args.ppo_batch_size // 2,
        num_ppo_epochs=2,
        learning_rate=args.learning_rate / 3,
        critic_learning_rate=10 * args.learning_rate,
        kl_coef=args.kl_coef,
        normalize_rewards=True,
        output_dir=args.folder / "ppo",
        **shared,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="local folder or hub name")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="file, folder or hub name; a column `text`")
    parser.add_argument("--sft-steps", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=512, help="openings that are annotated")
    parser.add_argument("--reward-steps", type=int, default=60)
    parser.add_argument("--ppo-steps", type=int, default=60)
    parser.add_argument("--ppo-batch-size", type=int, default=64, help="stories per step")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="reward model and critic x 10, PPO / 3")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--bf16", action="store_true", help="forward passes under autocast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/rlhf"))
    args = parser.parse_args()
    shared = {"seed": args.seed, "max_new_tokens": ANSWER_TOKENS, "max_seq_length": 128, "bf16": args.bf16}

    stories = openings(load_rows(args.data)["text"][: 4 * args.pairs])
    asked, train = [row["prompt"] for row in stories[:HELD_OUT]], stories[HELD_OUT:]
    prompts, annotator = [row["prompt"] for row in train], get_reward("sentiment")

    def opinion(trainer: Any) -> float:
        scores = annotator(asked * 4, trainer.predict(asked * 4))
        return sum(scores) / len(scores)

    sft = fine_tuned(args, train, shared)
    policy = sft.save_model()
    reward = reward_model(args, policy, annotated_pairs(sft, prompts[: args.pairs], annotator), shared)
    print("3. PPO against the reward model")
    trainer = ppo(args, policy, reward.save_model(), prompts, shared)
    before = opinion(trainer)
    history = trainer.train()
    print(f"   reward {history[0]['reward']:.2f} -> {history[-1]['reward']:.2f}")
    print(f"   KL to the start {history[-1]['sequence_kl']:.2f} nats per story")
    print(f"   the annotator's opinion of held-out stories {before:+.3f} -> {opinion(trainer):+.3f}")
    for prompt, text in zip(asked[:3], trainer.predict(asked[:3]), strict=True):
        print(f"   {prompt!r} -> {text!r}")
    print(f"\n{args.folder}: sft, reward and ppo, each with metrics.jsonl and a model; {trainer.save_model()}")


if __name__ == "__main__":
    main()
