"""Exact divergences between two models against the textbook in float64, and what they promise not to do."""

import itertools
import math
from typing import Any

import pytest
import torch
from rlloss_kernels import DIVERGENCES, plan, two_heads, two_logits
from torch._dynamo.utils import counters
from torch.autograd import gradcheck

import rlloss

token_divergences: Any = rlloss.token_divergences
linear_divergences: Any = rlloss.linear_divergences

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SUBSETS = [(name,) for name in DIVERGENCES] + [DIVERGENCES, ("reverse_kl", "entropy"), ("forward_kl", "js", "logprobs")]


def oracle(s, u, ids, temperature: Any = 1.0, alpha=0.5, beta=0.5) -> dict[str, Any]:
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[..., None]
    log_p, log_q = ((z.double() / temperature).log_softmax(-1) for z in (s, u.detach()))
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    to_m = [(x * (log_x - log_m)).sum(-1) for x, log_x in ((p, log_p), (q, log_q))]
    return {
        "reverse_kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "renyi": (alpha * log_p + (1 - alpha) * log_q).logsumexp(-1) / (alpha - 1),
        "js": beta * to_m[1] + (1 - beta) * to_m[0],
        "entropy": -(p * log_p).sum(-1),
        "ref_entropy": -(q * log_q).sum(-1),
        "logprobs": log_p.gather(-1, ids[..., None]).squeeze(-1),
        "ref_logprobs": log_q.gather(-1, ids[..., None]).squeeze(-1),
    }


def inputs(*shapes, vocabulary, tokens, dtype=torch.float32, std=1.0, seed=0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    leaves = [(std * torch.randn(s, generator=generator)).to(dtype).requires_grad_() for s in shapes]
    return *leaves, torch.randint(vocabulary, tokens, generator=generator)


def total(values) -> Any:
    return sum(x.sum() for x in values)


def upstream(like, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(len(DIVERGENCES), *like.shape, generator=generator, dtype=torch.float64)
    grads[:, torch.rand(like.shape, generator=generator) < 1 / 3] = 0
    return dict(zip(DIVERGENCES, grads, strict=True))


def gradients(values, names, leaves, g):
    """Of those values that have any."""
    used = [(values[name], g[name]) for name in names if values[name].requires_grad]
    return torch.autograd.grad([v for v, _ in used], leaves, [x.to(v.dtype) for v, x in used]) if used else []


@pytest.fixture(params=["whole", "tiny"])
def tiles(request, monkeypatch):
    if request.param == "tiny":
        monkeypatch.setattr(two_logits, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(two_heads, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(plan, "COLUMNS", 37)


@pytest.mark.parametrize("outputs", SUBSETS, ids="-".join)
@pytest.mark.parametrize("temperature", [1.0, "token"])
@pytest.mark.parametrize("orders", [(0.5, 0.5), (2.0, 0.1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_logits_entry_equals_oracle(tiles, outputs, temperature, orders, dtype):
    s, u, ids = inputs((3, 5, 101), (3, 5, 101), vocabulary=101, tokens=(3, 5), dtype=dtype)
    if temperature == "token":
        temperature = 0.5 + torch.arange(15).view(3, 5) / 15
    mask = torch.arange(15).view(3, 5) % 4 > 0
    options = {"temperature": temperature, "loss_mask": mask, "outputs": outputs, "alpha": orders[0], "beta": orders[1]}
    found = token_divergences(s, u, ids, **options)._asdict()
    double = s.detach().double().requires_grad_()
    truth = {k: torch.where(mask, x, 0) for k, x in oracle(double, u, ids, temperature, *orders).items()}
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    assert [name for name in DIVERGENCES if found[name] is not None] == [
        name for name in DIVERGENCES if name in outputs
    ]
    for name in outputs:
        torch.testing.assert_close(found[name].double(), truth[name], rtol=tolerance, atol=tolerance)
        assert (found[name][~mask] == 0).all()
    g = upstream(ids)
    ours, exact = gradients(found, outputs, [s], g), gradients(truth, outputs, [double], g)
    for x, e in zip(ours, exact or [torch.zeros_like(double)], strict=True):
        torch.testing.assert_close(x.double(), e, rtol=tolerance, atol=tolerance)
    if outputs != ("ref_entropy",):
        assert u.grad is None


HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"softcap": 2.0, "ref_softcap": 3.0, "logit_scale": 0.5, "ref_logit_scale": 2.0}, id="all"),
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_head_entry_equals_oracle(tiles, head, dtype, biased):
    shapes = (3, 5, 8), (101, 8), (101,), (3, 5, 6), (110, 6), (110,)
    *leaves, ids = inputs(*shapes, vocabulary=101, tokens=(3, 5), dtype=dtype, std=0.6)
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = leaves
    mask, g = torch.arange(15).view(3, 5) % 4 > 0, upstream(ids)
    biases = {"bias": bias, "ref_bias": ref_bias} if biased else {}
    found = linear_divergences(
        hidden, weight, ref_hidden, ref_weight, ids, loss_mask=mask, temperature=0.8, vocab_size=101,
        outputs=DIVERGENCES, **biases, **head,
    )._asdict()  # fmt: skip

    def logits(tensors, softcap=None, scale=1.0):
        h, w, *b = tensors
        z = scale * (h @ w.mT + (b[0] if biased else 0))
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    trained = [hidden, weight, bias] if biased else [hidden, weight]
    doubles = [x.detach().double().requires_grad_() for x in trained]
    s = logits(doubles, head.get("softcap"), head.get("logit_scale", 1.0))
    ref = [x.detach().double() for x in (ref_hidden, ref_weight[:101], ref_bias[:101])]
    u = logits(ref, head.get("ref_softcap"), head.get("ref_logit_scale", 1.0))
    truth = {k: torch.where(mask, x, 0) for k, x in oracle(s, u, ids, 0.8).items()}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    for name in DIVERGENCES:
        torch.testing.assert_close(found[name].double(), truth[name], rtol=tolerance, atol=tolerance)
    exact = gradients(truth, DIVERGENCES, doubles, g)
    for x, e in zip(gradients(found, DIVERGENCES, trained, g), exact, strict=True):
        bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        assert (x.double() - e).norm() <= bound * e.norm()


def test_gradcheck(tiles):
    shapes = (2, 3, 4), (11, 4), (11,), (2, 3, 5), (11, 5)
    *leaves, ids = inputs(*shapes, vocabulary=11, tokens=(2, 3), dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    frozen = [x.detach() for x in leaves[3:]]
    names = [name for name in DIVERGENCES if not name.startswith("ref")]

    def run(h, w, b):
        options = {"bias": b, "softcap": 1.5, "logit_scale": 0.5, "loss_mask": mask, "alpha": 0.3, "beta": 0.7}
        found = linear_divergences(h, w, *frozen, ids, outputs=names, **options)
        return [getattr(found, name) for name in names]

    assert gradcheck(run, leaves[:3])


@pytest.mark.parametrize("entry", ["logits", "head"])
def test_a_model_is_at_no_distance_from_itself(tiles, entry):
    hidden, weight, _ = inputs((6, 8), (101, 8), vocabulary=101, tokens=(6,))
    options = {"outputs": ("reverse_kl", "forward_kl", "renyi", "js")}
    if entry == "head":
        found = linear_divergences(hidden, weight, hidden, weight, **options)
    else:
        z = hidden @ weight.mT
        found = token_divergences(z, z, **options)
    for name in options["outputs"]:
        assert getattr(found, name).abs().max() < 1e-6
        grad = torch.autograd.grad(getattr(found, name).sum(), (hidden, weight), retain_graph=True)
        assert max(x.abs().max() for x in grad) < 1e-5


def test_forbidden_tokens():
    s = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0], [0.0, -math.inf, 2.0]], requires_grad=True)
    u = torch.tensor([[1.0, 0.0, -math.inf], [0.0, -math.inf, 1.0], [0.0, 1.0, 2.0]])
    names = ("reverse_kl", "forward_kl", "renyi", "js", "entropy", "ref_entropy")
    found = token_divergences(s, u, outputs=names)
    both = token_divergences(s[:1, :2], u[:1, :2], outputs=names)
    for name in names:
        assert getattr(found, name)[0] == getattr(both, name)[0]
        assert not getattr(found, name).isnan().any()
    assert found.reverse_kl.isinf().tolist() == [False, True, False]
    assert found.forward_kl.isinf().tolist() == [False, False, True]
    loss = sum(getattr(found, name)[0] for name in names if name != "ref_entropy") + found.js.sum() + found.renyi.sum()
    loss.backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert s.grad[0, 2] == s.grad[2, 1] == 0


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_masked_rows_change_nothing(garbage):
    hidden, weight, ref_hidden, ref_weight, ids = inputs(
        (6, 8), (101, 8), (6, 5), (101, 5), vocabulary=101, tokens=(6,)
    )
    mask, results = torch.arange(6) > 1, []
    for value in (0.0, garbage):
        h, r = (x.detach().masked_fill(~mask[:, None], value).requires_grad_() for x in (hidden, ref_hidden))
        i = ids.masked_fill(~mask, -100)
        found = linear_divergences(h, weight, r, ref_weight, i, loss_mask=mask, outputs=DIVERGENCES)
        results.append([*found, *torch.autograd.grad(total(found), (h, weight))])
        assert r.grad is None
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 4), (2, 3)], ids=str)
def test_empty_and_single_batches(shape):
    hidden, weight, ref_hidden, ids = inputs((*shape, 8), (5, 8), (*shape, 8), vocabulary=5, tokens=shape)
    found = linear_divergences(hidden, weight, ref_hidden, weight, ids, outputs=DIVERGENCES)
    assert all(x.shape == shape for x in found)
    hidden_grad, weight_grad = torch.autograd.grad(found.reverse_kl.sum(), (hidden, weight))
    assert hidden_grad.shape == hidden.shape
    assert weight_grad.isfinite().all()


@pytest.mark.parametrize("entry", ["logits", "head"])
def test_nothing_of_the_size_of_the_logits_is_made(entry, monkeypatch):
    for module in (two_heads, two_logits):
        monkeypatch.setattr(module, "SCRATCH_BYTES", 1 << 18)
    monkeypatch.setattr(plan, "COLUMNS", 256)
    hidden, weight, ids = inputs((160, 8), (5000, 8), vocabulary=5000, tokens=(160,))
    z = (hidden @ weight.mT).detach().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        if entry == "logits":
            found, leaves = token_divergences(z, z.detach(), ids, outputs=DIVERGENCES), (z,)
        else:
            found, leaves = (
                linear_divergences(hidden, weight, hidden, weight, ids, outputs=DIVERGENCES),
                (hidden, weight),
            )
        torch.autograd.grad(total(found), leaves)
    large = [e.name for e in profile.events() or [] if e.self_cpu_memory_usage > 160 * 5000]
    assert len(large) == (1 if entry == "logits" else 0), large


@pytest.mark.parametrize("trainable", [s for n in (1, 2) for s in itertools.combinations(range(2), n)], ids=str)
def test_a_frozen_tensor_gets_no_gradient(trainable):
    hidden, weight, ref_hidden, _ = inputs((7, 8), (101, 8), (7, 8), vocabulary=101, tokens=(7,))
    whole = torch.autograd.grad(
        linear_divergences(hidden, weight, ref_hidden, weight).reverse_kl.sum(), (hidden, weight)
    )
    some = [x.detach().requires_grad_(i in trainable) for i, x in enumerate((hidden, weight))]
    linear_divergences(*some, ref_hidden, weight).reverse_kl.sum().backward()
    for i, x in enumerate(some):
        assert torch.equal(x.grad, whole[i]) if i in trainable else x.grad is None


def test_the_reference_may_have_another_precision():
    hidden, weight, _ = inputs((7, 8), (101, 8), vocabulary=101, tokens=(7,))
    low = [x.detach().bfloat16() for x in (hidden, weight)]
    found = linear_divergences(hidden, weight, *low).reverse_kl
    assert (found > 0).all()
    assert found.max() < 1e-2


@pytest.mark.parametrize("output", ["reverse_kl", "forward_kl"])
def test_rounded_products_cost_little_more_than_the_rounding_of_their_gradient(output):
    heads = inputs((128, 256), (16000, 256), (128, 256), (16000, 256), vocabulary=1, tokens=(1,), dtype=torch.bfloat16)
    with torch.no_grad():
        hidden, weight, ref_hidden, ref_weight = (x.mul_(1.5 / 16) if len(x) == 16000 else x for x in heads[:4])
    products, ref_products = (
        h.detach().double() @ w.detach().double().mT for h, w in ((hidden, weight), (ref_hidden, ref_weight))
    )
    products.requires_grad_()
    exact = getattr(token_divergences(products, ref_products, outputs=[output]), output)
    value = getattr(linear_divergences(hidden, weight, ref_hidden, ref_weight, outputs=[output]), output)
    assert (value.double() - exact).abs().max() <= 2e-3
    g = torch.randn(128, generator=torch.Generator().manual_seed(2))
    (dz,) = torch.autograd.grad(exact, products, g.double())
    rounded, (h, w) = dz.bfloat16().double(), (x.detach().double() for x in (hidden, weight))
    grads = torch.autograd.grad(value, (hidden, weight), g)
    for ours, floor, truth in zip(grads, (rounded @ w, rounded.mT @ h), (dz @ w, dz.mT @ h), strict=True):
        assert (ours.double() - truth).norm() <= 1.5 * (floor.bfloat16().double() - truth).norm()


def test_results_repeat_to_the_bit_and_nothing_is_mutated():
    leaves = inputs((7, 8), (101, 8), (7, 6), (101, 6), vocabulary=101, tokens=(7,), dtype=torch.bfloat16)
    before = [x.detach().clone() for x in leaves]

    def run():
        found = linear_divergences(*leaves, outputs=DIVERGENCES)
        return [*found, *torch.autograd.grad(total(found), leaves[:2])]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(leaves, before, strict=True))


@pytest.mark.unhooked
def test_a_compiled_graph_holds_one_operator_for_all_lengths():
    torch._dynamo.reset()
    counters.clear()

    def loss(leaves, ids, mask) -> Any:
        hidden, weight, ref_hidden, z = leaves
        first = linear_divergences(hidden, weight, ref_hidden, weight, ids, loss_mask=mask, outputs=DIVERGENCES)
        second = token_divergences(z, z.detach() + 1, loss_mask=mask, outputs=("js",))
        return total(first) + second.js.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        shapes = (2, length, 8), (101, 8), (2, length, 8), (2, length, 101)
        *leaves, ids = inputs(*shapes, vocabulary=101, tokens=(2, length), seed=length)
        mask = torch.arange(2 * length).view(2, length) % 4 > 0
        trained = [leaves[0], leaves[1], leaves[3]]
        values = [f(leaves, ids, mask) for f in (loss, compiled)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(v, trained) for v in values))
    assert counters["stats"]["unique_graphs"] == 1


def call(**changed):
    s, u, ids = inputs((2, 3, 7), (2, 3, 7), vocabulary=7, tokens=(2, 3))
    return token_divergences(**{"logits": s, "ref_logits": u, "ids": ids} | changed)


def head_call(**changed):
    h, w, r, v = inputs((2, 3, 4), (7, 4), (2, 3, 5), (7, 5), vocabulary=7, tokens=(2, 3))[:4]
    return linear_divergences(**{"hidden": h, "weight": w, "ref_hidden": r, "ref_weight": v} | changed)


ERRORS = [
    (call, {"ref_logits": torch.zeros(2, 4, 7)}, r"ref_logits \[2, 4, 7\] and ids \[2, 3\]"),
    (call, {"ref_logits": torch.zeros(2, 3, 9)}, "the policy has 7 tokens and the reference 9; .* pass vocab_size=7"),
    (call, {"ref_logits": torch.zeros(2, 3, 7).double()}, "float32 but the reference torch.float64"),
    (call, {"ids": None, "outputs": ("ref_logprobs",)}, r"outputs=\['ref_logprobs'\] need ids, got None"),
    (call, {"outputs": ("kl",)}, "outputs must be among .*, got 'kl'"),
    (call, {"alpha": 1.0}, "alpha=1 and beta=1 are limits"),
    (call, {"alpha": 0.0}, "alpha must be"),
    (call, {"beta": 1.0}, "alpha=1 and beta=1 are limits"),
    (call, {"beta": 1.5}, "beta must be"),
    (call, {"logits": [0.0]}, "logits must be a tensor, got list"),
    (call, {"vocab_size": 8}, "vocab_size must be an integer from 1 to the 7"),
    (head_call, {"ref_weight": torch.zeros(7, 4)}, "weight must be .* with the width H=5"),
    (head_call, {"ref_softcap": -1.0}, "ref_softcap must be a positive number"),
    (head_call, {"ref_logit_scale": 0.0}, "ref_logit_scale must be a positive number"),
    (head_call, {"scratch_bytes": "1"}, "scratch_bytes must be a number of bytes"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("call", "changed", "message"), ERRORS)
def test_errors_teach(call, changed, message):
    with pytest.raises(ValueError, match=message):
        call(**changed)
