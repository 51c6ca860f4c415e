"""GRPO on packed sequences, in a loop of your own: no padding, one row after the other under `cu_seqlens`.

The same task as examples/grpo_addition.py, with numbers and answers of varying length, and none of rlloss.loop but the
warm start and the sampler: what is left is a whole RL step in forty lines. Rows are laid end to end in packs of at most
512 tokens; positions that start again at 0 tell transformers where each begins. Every step counts its tokens once, so
that the packs add up exactly: the first step is also computed padded, and the two must agree.

    python examples/packed_grpo.py
"""

import argparse
from collections.abc import Iterator

import torch
from addition import ANSWER_TOKENS, digits_tokenizer, exact_match, small_llama, sums, warm_start
from torch import Tensor

import rlloss
from rlloss.loop import Session, Tokens, collate, evaluate_online, prompts, sample
from rlloss.loop.run import example_order

GROUP_SIZE = 8
PACK_TOKENS = 512


def packs(rows: list[Tokens]) -> Iterator[list[int]]:
    """Indices of rows that fit into one pack each."""
    pack: list[int] = []
    for i, row in enumerate(rows):
        if sum(len(rows[j].input_ids) for j in pack) + len(row.input_ids) > PACK_TOKENS:
            yield pack
            pack = []
        pack.append(i)
    yield pack


def packed_logprobs(model: torch.nn.Module, rows: list[Tokens]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, mask and boundaries of rows that are laid end to end."""
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    input_ids = torch.tensor([i for row in rows for i in row.input_ids])
    loss_mask = torch.tensor([m for row in rows for m in row.loss_mask])
    position_ids = torch.cat([torch.arange(n) for n in lengths.tolist()])
    ids, mask = rlloss.shift(input_ids, loss_mask, cu_seqlens)  # never across a boundary
    stats = rlloss.model_logprobs(model, input_ids[None], ids[None], mask[None], position_ids=position_ids[None])
    return stats.logprobs[0], mask, cu_seqlens


def packed_backward(model: torch.nn.Module, rows: list[Tokens], advantages: Tensor, loss_fn: rlloss.Loss) -> float:
    """Adds the gradient of a step; returns its loss."""
    normalizer = sum(rlloss.count(torch.tensor([row.loss_mask])) for row in rows)  # of the whole step
    total = 0.0
    for pack in packs(rows):
        logprobs, mask, cu_seqlens = packed_logprobs(model, [rows[i] for i in pack])
        loss, _ = loss_fn(logprobs, None, advantages[pack], mask, normalizer=normalizer, cu_seqlens=cu_seqlens)
        loss.backward()
        total += loss.item()
    return total


def padded_backward(model: torch.nn.Module, rows: list[Tokens], advantages: Tensor, loss_fn: rlloss.Loss) -> float:
    """The same step, padded to its longest row."""
    batch = collate(rows)
    logprobs = rlloss.model_logprobs(
        model, batch.input_ids, batch.ids, batch.loss_mask, attention_mask=batch.attention_mask
    ).logprobs
    loss, _ = loss_fn(logprobs, None, advantages, batch.loss_mask)
    loss.backward()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="steps of GRPO")
    parser.add_argument("--warm-start", type=float, default=0.6, help="accuracy at which SFT hands over")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = digits_tokenizer()
    model = small_llama(tokenizer)
    train_rows, held_out_rows = sums(args.seed, width=0)
    train, held_out = prompts(train_rows, tokenizer), prompts(held_out_rows, tokenizer)

    def evaluate(session: Session) -> dict[str, float]:
        return {"accuracy": evaluate_online(session, held_out, exact_match, max_new_tokens=ANSWER_TOKENS)[0]}

    warm_start(model, tokenizer, train_rows, evaluate, args.warm_start)
    watch = Session(model, tokenizer)
    print(f"\nGRPO: 32 prompts x {GROUP_SIZE} completions a step; held-out accuracy {evaluate(watch)['accuracy']:.3f}")

    eos_token_id = tokenizer.convert_tokens_to_ids("<eos>")
    loss_fn = rlloss.GRPOLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(args.seed)
    order = example_order(len(train), 32, args.seed)
    for step in range(args.steps):
        asked = [train[i] for i in order(step) for _ in range(GROUP_SIZE)]
        drawn = sample(
            model.eval(),
            [prompt.ids for prompt in asked[::GROUP_SIZE]],
            group_size=GROUP_SIZE,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=eos_token_id,
            generator=generator,
        )
        rewards = torch.tensor(
            exact_match([], [], [prompt.columns["answer"] for prompt in asked], [c.ids for c in drawn])
        )
        advantages = rlloss.group_advantages(rewards, torch.arange(len(asked)) // GROUP_SIZE)
        rows = [
            Tokens([*p.ids, *c.ids], [False] * len(p.ids) + [True] * len(c.ids))
            for p, c in zip(asked, drawn, strict=True)
        ]
        loss = packed_backward(model, rows, advantages, loss_fn)
        if step == 0:
            gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
            padded_loss = padded_backward(model, rows, advantages, loss_fn)
            padded = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            difference = float((gradient - padded).norm() / padded.norm())
            tokens, slots = sum(len(row.input_ids) for row in rows), collate(rows).input_ids.numel()
            print(
                f"first step: {tokens} tokens packed, {slots} padded; loss {loss:+.7f} and {padded_loss:+.7f}", end=""
            )
            print(f"; gradients differ by {difference:.1e} of their norm")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min((step + 1) / 10, 1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0 or step == args.steps - 1:
            print(f"step {step + 1}: reward {rewards.mean():.3f}, held-out accuracy {evaluate(watch)['accuracy']:.3f}")


if __name__ == "__main__":
    main()
