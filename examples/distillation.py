"""Distillation: a small student learns the distributions of a pretrained teacher, token by token.

The student is a Llama made from scratch with the teacher's vocabulary. Both heads are read by
`rlloss.linear_divergences`, so that neither model's logits are ever held, and any divergence trains: `--divergence`
forward_kl, reverse_kl or js. A tenth of the texts is held out; both KLs per token are printed before and after.

    python examples/distillation.py                                           # model and texts from the hub
    python examples/distillation.py --teacher path/to/folder --data texts.jsonl --divergence js
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from pretrained import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rlloss
from rlloss.loop import Batch, collate, completions, load_rows

OUTPUTS = ("forward_kl", "reverse_kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teacher", default=SMOLLM2, help="local folder or hub name")
    parser.add_argument("--data", default="roneneldan/TinyStories", help="file, folder or hub name, with a column text")
    parser.add_argument("--divergence", choices=["forward_kl", "reverse_kl", "js"], default="forward_kl")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-samples", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher: Any = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval().requires_grad_(False)
    student = small_student(teacher.config.vocab_size, args.width, args.layers)
    rows = load_rows(args.data).shuffle(seed=args.seed)
    texts = completions(rows.select(range(min(args.max_samples, len(rows)))), tokenizer, max_length=args.max_length)
    held_out, train = texts[: len(texts) // 10], texts[len(texts) // 10 :]
    tests = [collate(held_out[i : i + args.batch_size]) for i in range(0, len(held_out), args.batch_size)]

    loss_fn = rlloss.DistillationLoss(divergence=args.divergence)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps)
    size = sum(p.numel() for p in student.parameters()) / 1e6
    print(f"{loss_fn}: a student of {size:.1f} M parameters, {len(train)} texts, {len(held_out)} held out")
    before = held_out_kl(student, teacher, tests)
    for step, batch in zip(range(args.steps), batches(train, args.batch_size, args.seed), strict=False):
        divergence = divergences(student, teacher, batch, (args.divergence,))[args.divergence]
        loss, _ = loss_fn(divergence, batch.loss_mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 9:
            print(f"step {step + 1:4}  {args.divergence} {loss.item():.3f}", flush=True)
    after = held_out_kl(student, teacher, tests)
    print("\nheld out, nats per token     before   after")
    for name in OUTPUTS:
        print(f"{name:28} {before[name]:6.3f}  {after[name]:6.3f}")


def small_student(vocab_size: int, width: int, layers: int) -> LlamaForCausalLM:
    """A Llama from scratch, head and embedding tied."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def divergences(student: Any, teacher: Any, batch: Batch, outputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Per token, with the student's gradient."""
    with torch.no_grad():
        of_teacher = rlloss.model_hidden(teacher, batch.input_ids, attention_mask=batch.attention_mask)
    found = rlloss.linear_divergences(
        rlloss.model_hidden(student, batch.input_ids, attention_mask=batch.attention_mask),
        student.get_output_embeddings().weight,
        of_teacher,
        teacher.get_output_embeddings().weight,
        loss_mask=batch.loss_mask,
        outputs=outputs,
    )
    return {name: getattr(found, name) for name in outputs}


def held_out_kl(student: Any, teacher: Any, batches: list[Batch]) -> dict[str, float]:
    """The means over all held-out tokens."""
    parts = []
    with torch.no_grad():
        for batch in batches:
            found = divergences(student, teacher, batch, OUTPUTS)
            parts.append({name: rlloss.Mean.of(x, batch.loss_mask) for name, x in found.items()})
    return rlloss.scalars(rlloss.merge_metrics(parts))


def batches(texts: list[Any], size: int, seed: int) -> Iterator[Batch]:
    """Of texts in a random order, without an end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(texts), generator=generator).split(size):
            yield collate([texts[i] for i in rows])


if __name__ == "__main__":
    main()
