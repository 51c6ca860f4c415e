"""A vocabulary over the ranks of a process group: real processes under gloo, and DTensor heads."""

# pyright: reportArgumentType=false

import os
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlloss
from rlloss import VocabShard

PROBLEM = """
import sys
import torch
import torch.distributed as dist
import rlloss
from rlloss import VocabShard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

torch.set_num_threads(1)
rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
torch.manual_seed(0)
V = 101
hidden, ref_hidden = torch.randn(2, 4, 9, 16, dtype=torch.float64)
weight, ref_weight = torch.randn(2, V, 16, dtype=torch.float64)
bias, ids, mask = torch.randn(V, dtype=torch.float64), torch.randint(V, (4, 9)), torch.rand(4, 9) > 0.3
upstream = torch.randn(4, 9, dtype=torch.float64)
outputs = ("logprobs", "entropy", "logsumexp", "sum_p2", "mean_logprob")
divergences = ("reverse_kl", "forward_kl", "renyi", "js", "entropy", "ref_entropy", "logprobs", "ref_logprobs")

def graded(x, w, b, stats):
    total = sum((getattr(stats, name) * upstream).sum() for name in stats._fields if getattr(stats, name) is not None)
    return torch.autograd.grad(total, [t for t in (x, w, b) if t is not None])

def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]

def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)

x, w, b = leaves(hidden, weight, bias)
whole = rlloss.linear_logprobs(x, w, ids, bias=b, loss_mask=mask, temperature=0.7, outputs=outputs)
exact = graded(x, w, b, whole)
shard = VocabShard.even(dist.group.WORLD, V)
each = -(-V // size)
part = slice(shard.first, min(shard.first + each, V))
assert shard.first == rank * each
"""

CHECKS = {
    "a head": """
        x, w, b = leaves(hidden, weight[part], bias[part])
        stats = rlloss.linear_logprobs(
            x, w, ids, bias=b, loss_mask=mask, temperature=0.7, outputs=outputs, vocab_shard=shard
        )
        for name in outputs:
            same(getattr(stats, name), getattr(whole, name))
        found = graded(x, w, b, stats)
        same(found, (exact[0], exact[1][part], exact[2][part]))
    """,
    "padding": """
        padded = torch.cat([weight, torch.full((each * size - V + 3, 16), float("nan"), dtype=torch.float64)])
        mine = padded[rank * each : (rank + 1) * each + (3 if rank == size - 1 else 0)]
        x, w = leaves(hidden, mine)
        stats = rlloss.linear_logprobs(x, w, ids, loss_mask=mask, vocab_shard=shard)
        y, v = leaves(hidden, weight)
        same(stats.logprobs, rlloss.linear_logprobs(y, v, ids, loss_mask=mask).logprobs)
        found, = torch.autograd.grad((stats.logprobs * upstream).sum(), w)
        assert not found[part.stop - part.start :].any() and not found.isnan().any()
    """,
    "logits": """
        logits = (hidden @ weight.T).detach()
        y, = leaves(logits)
        right = rlloss.token_logprobs(y, ids, loss_mask=mask, outputs=outputs)
        z, = leaves(logits[..., part])
        stats = rlloss.token_logprobs(z, ids, loss_mask=mask, outputs=outputs, vocab_shard=shard)
        for name in outputs:
            same(getattr(stats, name), getattr(right, name))
        same(graded(z, None, None, stats)[0], graded(y, None, None, right)[0][..., part])
    """,
    "two heads": """
        x, w = leaves(hidden, weight)
        keywords = dict(ids=ids, loss_mask=mask, temperature=0.7, outputs=divergences)
        right = rlloss.linear_divergences(x, w, ref_hidden, ref_weight, **keywords)
        y, v = leaves(hidden, weight[part])
        stats = rlloss.linear_divergences(y, v, ref_hidden, ref_weight[part], vocab_shard=shard, **keywords)
        for name in divergences:
            same(getattr(stats, name), getattr(right, name))
        d_hidden, d_weight = graded(x, w, None, right)
        same(graded(y, v, None, stats), (d_hidden, d_weight[part]))
    """,
    "two logits": """
        logits, ref_logits = (hidden @ weight.T).detach(), (ref_hidden @ ref_weight.T).detach()
        y, = leaves(logits)
        keywords = dict(ids=ids, loss_mask=mask, outputs=divergences)
        right = rlloss.token_divergences(y, ref_logits, **keywords)
        z, = leaves(logits[..., part])
        stats = rlloss.token_divergences(z, ref_logits[..., part], vocab_shard=shard, **keywords)
        for name in divergences:
            same(getattr(stats, name), getattr(right, name))
        same(graded(z, None, None, stats)[0], graded(y, None, None, right)[0][..., part])
    """,
    "a DTensor head": """
        mesh = init_device_mesh("cpu", (size,))
        for replicated in (True, False):
            w = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
            x, = leaves(hidden)
            h = DTensor.from_local(x, mesh, [Replicate()]) if replicated else x
            given = {} if replicated else {"vocab_shard": VocabShard.of(w)}
            stats = rlloss.linear_logprobs(h, w, ids, loss_mask=mask, temperature=0.7, outputs=outputs, **given)
            y, v = leaves(hidden, weight)
            right = rlloss.linear_logprobs(y, v, ids, loss_mask=mask, temperature=0.7, outputs=outputs)
            for name in outputs:
                same(getattr(stats, name), getattr(right, name))
            d_hidden, d_weight = graded(x, w, None, stats)
            exact_hidden, exact_weight = graded(y, v, None, right)
            same(d_hidden, exact_hidden)
            same(d_weight.full_tensor(), exact_weight)
    """,
    "a DTensor head that may be another's": """
        mesh = init_device_mesh("cpu", (size,))
        w = distribute_tensor(weight, mesh, [Shard(0)])
        try:
            rlloss.linear_logprobs(hidden, w, ids)
        except ValueError as error:
            assert "vocab_shard=rlloss.VocabShard.of(weight)" in str(error) and "full_tensor" in str(error)
        else:
            raise AssertionError("it took hidden states that each rank may have for itself")
        whole_weight = distribute_tensor(weight, mesh, [Replicate()])
        right = rlloss.linear_logprobs(hidden, weight, ids)
        same(rlloss.linear_logprobs(hidden, whole_weight, ids).logprobs, right.logprobs)
        try:
            VocabShard.of(distribute_tensor(weight, mesh, [Shard(1)]))
        except ValueError as error:
            assert "Shard(0)" in str(error)
        else:
            raise AssertionError("it took a weight that is cut along its columns")
    """,
}


@pytest.mark.parametrize("size", [2, 3])
def test_processes_under_gloo(size, tmp_path):
    checks = "".join(f"\nprint({name!r}, flush=True)\n{textwrap.dedent(body)}" for name, body in CHECKS.items())
    script = tmp_path / "rank.py"
    script.write_text(PROBLEM + checks + "\ndist.destroy_process_group()\n")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(size), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(printed)


GROUP = SimpleNamespace(group_name="none")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"vocab_shard": VocabShard(GROUP, 0, 11), "vocab_size": 9}, r"vocab_size=9 and vocab_shard.total=11 say the same"),
    ({"vocab_shard": VocabShard(GROUP, 12, 11)}, r"vocab_shard must have 0 <= first <= total, got 12 and 11"),
    ({"vocab_shard": VocabShard(None, 0, 11)}, r"vocab_shard.group must be a process group, got None"),
    (
        {"vocab_shard": VocabShard(GROUP, 0, 11), "kept_ids": torch.zeros(2, 3, 1, dtype=torch.long)},
        r"kept_ids need a whole head",
    ),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("bad", "message"), BAD)
@pytest.mark.parametrize("entry", ["head", "logits"])
def test_bad_shards_teach(bad, message, entry):
    ids = torch.zeros(2, 3, dtype=torch.long)
    x = torch.zeros(2, 3, 11)
    score = rlloss.token_logprobs if entry == "logits" else partial(rlloss.linear_logprobs, weight=torch.zeros(11, 11))
    who = "linear_logprobs" if entry == "head" else "token_logprobs"
    with pytest.raises(ValueError, match=f"{who}: {message}"):
        score(x, ids=ids, **bad)
