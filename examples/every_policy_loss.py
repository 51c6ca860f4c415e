"""Every policy loss on two-digit addition, from one warm-started model and with one budget: a table.

The task, the model and the warm start are those of examples/grpo_addition.py; each loss then gets the same number of
steps on the same prompts, its own paper's advantages and, where the paper leaves a bound open, the bound named below.
It shows that a loss trains and does not fall apart; it ranks none, because all share one learning rate.

    pip install -c constraints.txt -e ".[examples]" && python examples/every_policy_loss.py

A minute per loss on two CPU cores; docs/addition.md has the table.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from addition import ANSWER_TOKENS, digits_tokenizer, exact_match, small_llama, sums, warm_start
from torch.optim.lr_scheduler import LambdaLR

import rlloss
from rlloss.loop import Session, evaluate_online, frozen_copy, prompts, train_online

UPDATES_PER_STEP = 2
DR_GRPO = partial(rlloss.group_advantages, scale="none")
RLOO = partial(rlloss.group_advantages, scale="none", baseline="leave_one_out")


class Line(NamedTuple):
    """How one loss is run."""

    options: dict[str, Any]
    advantages: Callable[..., torch.Tensor] = rlloss.group_advantages


PLAIN = ["clip_cov", "cpgd", "dapo", "decoupled_ppo", "dppo", "gmpo", "grpo", "gspo", "gspo_token"]
PLAIN += ["kl_cov", "luspo", "m2po", "ppo", "sapo"]
LINES = {name: Line({}) for name in PLAIN} | {
    "a2c": Line({"entropy_coef": 0.001}, DR_GRPO),
    "a_star_po": Line({"beta": 0.05}, DR_GRPO),
    "cispo": Line({"ratio_max": 5.0}),
    "conservative_ppo": Line({"max_kl": 0.05}),
    "dr_grpo": Line({"max_completion_length": ANSWER_TOKENS}, DR_GRPO),
    "dro": Line({"tau": 0.1}, DR_GRPO),
    "opsm": Line({"threshold": 0.01}),
}
LINES |= {name: Line({}, DR_GRPO) for name in ("gpg", "kimi")}
LINES |= {name: Line({}, RLOO) for name in ("importance_sampling", "reinforce", "rloo", "tis", "topr", "vespo")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("losses", nargs="*", help="names of losses; all policy losses where none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm-start", type=float, default=0.6, help="accuracy at which SFT hands over")
    parser.add_argument("--folder", type=Path, default=Path("runs/every_policy_loss"))
    args = parser.parse_args()
    unknown = set(args.losses) - LINES.keys()
    if unknown:
        parser.error(f"no line for {sorted(unknown)}; known: {', '.join(LINES)}")

    torch.manual_seed(args.seed)
    tokenizer = digits_tokenizer()
    start = small_llama(tokenizer)
    train_rows, held_out_rows = sums(args.seed)
    train, held_out = prompts(train_rows, tokenizer), prompts(held_out_rows, tokenizer)

    def evaluate(session: Session) -> dict[str, float]:
        return {"accuracy": evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)[0]}

    warm_start(start, tokenizer, train_rows, evaluate, args.warm_start)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.losses or LINES:
        session = new_session(start, tokenizer, args.seed, args.steps)
        before, began = evaluate(session)["accuracy"], time.perf_counter()
        history = train_online(
            session,
            train,
            exact_match,
            rlloss.get_loss(name, **LINES[name].options),
            steps=args.steps,
            prompts_per_step=64,
            group_size=8,
            max_new_tokens=ANSWER_TOKENS,
            advantages=LINES[name].advantages,
            updates_per_epoch=UPDATES_PER_STEP,
            seed=args.seed,
            progress=False,
        )
        seconds, after = time.perf_counter() - began, evaluate(session)["accuracy"]
        rows.append(row(name, before, after, history, seconds))
        print(line(rows[-1]), flush=True)
        (args.folder / "rows.json").write_text(json.dumps(rows, indent=1))
    (args.folder / "table.md").write_text("\n".join([*HEAD, *map(line, rows), ""]))
    print(f"\n{args.folder}: table.md, rows.json")


def new_session(start: Any, tokenizer: Any, seed: int, steps: int) -> Session:
    """The same beginning for every loss."""
    updates = UPDATES_PER_STEP * steps
    return Session(
        copy.deepcopy(start),
        tokenizer,
        reference=frozen_copy(start),
        learning_rate=5e-4,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda k: min((k + 1) / 20, 1 - k / updates)),
        seed=seed,
    )


def row(name: str, before: float, after: float, history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """What the table says of one loss; the worst step tells whether it fell apart on the way."""
    tail = history[-10:]

    def late(key: str) -> float:
        return sum(numbers[key] for numbers in tail) / len(tail)

    return {
        "loss": name,
        "options": LINES[name].options,
        "before": before,
        "after": after,
        "lowest_reward": min(numbers["reward"] for numbers in history),
        "ref_kl": late("ref_kl_seq"),
        "entropy": late("entropy"),
        "seconds": seconds,
    }


HEAD = [
    "| loss | options | held-out accuracy | lowest reward of a step | KL to the start | entropy |",
    "|---|---|---|---|---|---|",
]


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    options = ", ".join(f"`{key}={value}`" for key, value in row["options"].items())
    numbers = f"{row['before']:.3f} -> {row['after']:.3f} | {row['lowest_reward']:.3f}"
    return f"| `{row['loss']}` | {options} | {numbers} | {row['ref_kl']:.3f} | {row['entropy']:.3f} |"


if __name__ == "__main__":
    main()
