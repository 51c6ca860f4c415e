"""A reward model from pairs: the backbone of a causal LM under a head of one output, trained by Bradley-Terry.

Rows hold a prompt, a chosen and a rejected answer, as texts or as chat messages. A tenth of them is held out; the share
of held-out pairs whose chosen answer scores higher is printed before and after. The head starts at zero, so before
training no answer wins.

    python examples/reward_model.py                                             # from the Hugging Face hub
    python examples/reward_model.py --model path/to/folder --data pairs.jsonl   # your own
"""

import argparse
from pathlib import Path

import torch
from pretrained import SMOLLM2, load_upper_half
from torch.optim.lr_scheduler import LambdaLR

import rlloss
from rlloss.loop import Session, evaluate_offline, load_rows, load_scalar_model, pairs, plot_curves, train_offline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="local folder or hub name")
    parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="file, folder or hub name")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/reward_model"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer, model = load_upper_half(args.model)
    rows = load_rows(args.data).shuffle(seed=args.seed)
    examples = pairs(rows, tokenizer, max_length=args.max_length)
    held_out, train = examples[: len(examples) // 10], examples[len(examples) // 10 :]

    loss_fn = rlloss.BradleyTerryLoss(center_coef=0.01)
    session = Session(
        rlloss.ScalarModel(model, bias=False),  # a constant would change no difference of scores
        tokenizer,
        learning_rate=args.learning_rate,
        scheduler=lambda optimizer: LambdaLR(optimizer, lambda k: min((k + 1) / 10, 1 - k / args.steps)),
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

    reward_model = load_scalar_model(session.save_model(args.folder / "model"))
    for name, sequence in (("chosen", held_out[0].chosen), ("rejected", held_out[0].rejected)):
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            score = reward_model.score(ids, torch.tensor([ids.shape[1] - 1]))
        print(f"{float(score):+.2f}  {name}: {tokenizer.decode(sequence.input_ids)[-100:]!r}")
    print(f"\n{args.folder}: metrics.jsonl, {plot_curves(args.folder).name}, checkpoint/, model/ (safetensors)")


if __name__ == "__main__":
    main()
