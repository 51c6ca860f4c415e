"""DPO, IPO or SimPO on pairs of answers: which of two the model should prefer.

Rows hold a prompt, a chosen and a rejected answer, as texts or as chat messages. A tenth of them is held out; the share
of held-out pairs that the model ranks rightly is printed before and after. For DPO and IPO a pair is ranked by
how much more likely each answer has become than under the reference, for SimPO by the mean log-prob of its tokens.

    python examples/dpo.py                                             # model and pairs from the Hugging Face hub
    python examples/dpo.py --model path/to/folder --data pairs.jsonl   # your own
    python examples/dpo.py --loss simpo
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from pretrained import SMOLLM2, load_upper_half

import rlloss
from rlloss.loop import Session, evaluate_offline, frozen_copy, load_rows, pairs, plot_curves, train_offline

# the hyperparameters that each paper's authors start from
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "ipo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "margin": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="local folder or hub name")
    parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="file, folder or hub name")
    parser.add_argument("--loss", choices=sorted(LOSSES), default="dpo")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/dpo"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer, model = load_upper_half(args.model)
    rows = load_rows(args.data).shuffle(seed=args.seed)
    examples = pairs(rows, tokenizer, max_length=args.max_length)
    held_out, train = examples[: len(examples) // 10], examples[len(examples) // 10 :]

    loss_fn = rlloss.get_loss(args.loss, **LOSSES[args.loss])
    session = Session(
        model,
        tokenizer,
        reference=frozen_copy(model) if loss_fn.needs_reference else None,
        learning_rate=args.learning_rate,
        autocast_dtype=torch.bfloat16,
        micro_batch_tokens=4096,
        seed=args.seed,
    )

    def evaluate(session: Session) -> dict[str, float]:
        return evaluate_offline(session, held_out, loss_fn)

    print(f"{loss_fn} on {len(train)} pairs, {len(held_out)} held out")
    before = evaluate(session)
    train_offline(
        session,
        train,
        loss_fn,
        steps=args.steps,
        batch_size=args.batch_size,
        evaluate=evaluate,
        evaluate_every=max(args.steps // 4, 1),
        folder=args.folder,
        seed=args.seed,
    )
    after = evaluate(session)

    print("\nheld out     before   after")
    for name in ("accuracy", "margin", "loss"):
        print(f"{name:10} {before[f'eval/{name}']:8.3f} {after[f'eval/{name}']:7.3f}")
    session.save_model(args.folder / "model")
    print(f"\n{args.folder}: metrics.jsonl, {plot_curves(args.folder).name}, checkpoint/, model/ (safetensors)")


if __name__ == "__main__":
    main()
