"""KTO on single answers with thumbs up or down: no pairs are needed.

Rows hold `messages` (or `prompt` and `completion`) and a `label`, true for thumbs up. A tenth of them is held out; its
loss, the share of answers on the right side of the reference point and the rewards of both classes are printed before
and after. Each prompt's mismatched answer, from which the reference point is estimated, comes with the data.

    python examples/kto.py                                             # model and thumbs from the Hugging Face hub
    python examples/kto.py --model path/to/folder --data thumbs.json   # your own
"""

import argparse
from pathlib import Path

import torch
from pretrained import SMOLLM2, load_upper_half

import rlloss
from rlloss.loop import Session, evaluate_offline, frozen_copy, labelled, load_rows, plot_curves, train_offline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="local folder or hub name")
    parser.add_argument("--data", default="trl-lib/kto-mix-14k", help="file, folder or hub name")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/kto"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer, model = load_upper_half(args.model)
    rows = load_rows(args.data).shuffle(seed=args.seed)
    examples = labelled(rows, tokenizer, max_length=args.max_length)
    held_out, train = examples[: len(examples) // 10], examples[len(examples) // 10 :]

    # where one class is rarer, its weight makes up for it
    ups = sum(example.desirable for example in train)
    downs = len(train) - ups
    loss_fn = rlloss.KTOLoss(
        beta=args.beta,
        desirable_weight=max(1.0, downs / max(ups, 1)),
        undesirable_weight=max(1.0, ups / max(downs, 1)),
    )
    session = Session(
        model,
        tokenizer,
        reference=frozen_copy(model),
        learning_rate=args.learning_rate,
        autocast_dtype=torch.bfloat16,
        micro_batch_tokens=4096,
        seed=args.seed,
    )

    def evaluate(session: Session) -> dict[str, float]:
        return evaluate_offline(session, held_out, loss_fn)

    print(f"{loss_fn} on {ups} thumbs up and {downs} thumbs down, {len(held_out)} held out")
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

    print("\nheld out              before   after")
    for name in ("loss", "accuracy", "desirable_reward", "undesirable_reward", "kl"):
        print(f"{name:19} {before[f'eval/{name}']:8.3f} {after[f'eval/{name}']:7.3f}")
    session.save_model(args.folder / "model")
    print(f"\n{args.folder}: metrics.jsonl, {plot_curves(args.folder).name}, checkpoint/, model/ (safetensors)")


if __name__ == "__main__":
    main()
