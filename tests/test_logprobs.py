"""The log-prob primitive against the naive formulas in float64, and what it promises not to do."""

import itertools
import math
from typing import Any

import pytest
import torch
from rlloss_kernels import STATISTICS, blocks, linear, linear_tiled, plan
from rlloss_kernels import logits as logits_entry
from torch._dynamo.utils import counters
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

import rlloss
from rlloss.logprobs import TokenStats, sequence_logps, sequence_mean_logps

# called here with every kind of argument, wrong ones too: more than static types can follow
token_logprobs: Any = rlloss.token_logprobs
linear_logprobs: Any = rlloss.linear_logprobs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
VALUE_TOLERANCE = {torch.float64: 1e-13}  # else float32 statistics: 1e-5
SUBSETS = [subset for n in (1, 2, 5) for subset in itertools.combinations(STATISTICS, n)]
HEADS = [
    pytest.param({}, id="plain"),
    pytest.param({"bias": True}, id="bias"),
    pytest.param({"softcap": 2.0}, id="softcap"),
    pytest.param({"bias": True, "softcap": 2.0, "logit_scale": 0.25}, id="all"),
]


def oracle(logits, ids, temperature: Any = 1.0, dtype=torch.float64) -> Any:
    """All five statistics by the textbook."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(dtype).view(*temperature.shape, *[1] * (logits.ndim - temperature.ndim))
    z = logits.to(dtype) / temperature
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0, p * log_p).sum(-1)
    picked = log_p.gather(-1, ids.long()[..., None]).squeeze(-1)
    return TokenStats(picked, entropy, z.logsumexp(-1), p.square().sum(-1), log_p.mean(-1))


def head_logits(hidden, weight, bias=None, softcap: Any = None, logit_scale: Any = 1.0):
    z = hidden @ weight.mT
    z = logit_scale * (z if bias is None else z + bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def inputs(*shape, dtype=torch.float32, std=1.5, seed=0) -> Any:
    """Random leaves of the given shapes, the last of which is that of ids, drawn below the second number."""
    generator = torch.Generator().manual_seed(seed)
    *floats, (ids_shape, vocabulary) = shape
    leaves = [(std * torch.randn(s, generator=generator)).to(dtype).requires_grad_() for s in floats]
    return *leaves, torch.randint(vocabulary, ids_shape, generator=generator)


def upstream(like, count, seed=1):
    """An arbitrary upstream gradient for each of `count` outputs; a third of the rows have none."""
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(count, *like.shape, generator=generator, dtype=torch.float64)
    grads[:, torch.rand(like.shape, generator=generator) < 1 / 3] = 0
    return grads


def asked(stats):
    return [x for x in stats if x is not None]


def assert_equals_oracle(stats, expected, leaves, double_leaves, mask, outputs):
    """Values and gradients of the named outputs against the oracle's; rows outside the mask are exactly 0."""
    assert [name for name in STATISTICS if getattr(stats, name) is not None] == sorted(outputs, key=STATISTICS.index)
    leaf = leaves[0]
    expected = [torch.where(mask, getattr(expected, name), 0) for name in STATISTICS if name in outputs]
    tolerance = VALUE_TOLERANCE.get(leaf.dtype, 1e-5)
    for x, e in zip(asked(stats), expected, strict=True):
        assert x.dtype is (torch.float64 if leaf.dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), e, rtol=tolerance, atol=tolerance)
        assert (x[~mask] == 0).all()
    g = upstream(mask, len(expected))
    grads = torch.autograd.grad(asked(stats), leaves, [x.to(s.dtype) for x, s in zip(g, asked(stats), strict=True)])
    for x, e in zip(grads, torch.autograd.grad(expected, double_leaves, list(g)), strict=True):
        assert x.dtype is leaf.dtype
        once = max(0.501 * torch.finfo(leaf.dtype).eps, tolerance)  # gradients are rounded once, at the very end
        torch.testing.assert_close(x.double(), e, rtol=once, atol=tolerance * e.abs().amax().item())


def assert_within_rounding(stats, expected, leaves, double_leaves, mask, eager, temperature):
    """What a head owes where the backend rounds its products: 2e-3 nats (at T = 1), gradients within twice eager's."""
    coldest = torch.as_tensor(temperature).min().item()
    expected = [torch.where(mask, getattr(expected, name), 0) for name in STATISTICS]
    for name, x, e in zip(STATISTICS, asked(stats), expected, strict=True):
        # far from the largest logit, which only the mean sees, an error is relative to the distance
        bound = 2e-3 / coldest if name != "mean_logprob" else 2e-3 + 2**-9 * e.abs().amax().item()
        torch.testing.assert_close(x.double(), e, rtol=0, atol=bound)
        assert (x[~mask] == 0).all()
    g = upstream(mask, len(expected))
    grads = torch.autograd.grad(asked(stats), leaves, list(g.float()))
    low = torch.autograd.grad([torch.where(mask, x, 0) for x in eager], leaves, list(g.float()))
    for x, y, e in zip(grads, low, torch.autograd.grad(expected, double_leaves, list(g)), strict=True):
        assert (x.double() - e).norm() <= 2 * (y.double() - e).norm()


def mask_and_temperature(ids, masked, temperature):
    mask = torch.ones(ids.shape, dtype=torch.bool)
    if masked:
        mask.view(-1)[::3] = False
    if temperature == "token":
        return mask, 0.5 + torch.arange(ids.numel()).view(ids.shape) / ids.numel()
    if temperature == "row":
        return mask, 0.5 + torch.arange(len(ids)) / len(ids)
    return mask, temperature


@pytest.fixture(params=["whole", "tiny"])
def tiles(request, monkeypatch):
    """Once as it is, and once with tiles so small that every case takes many."""
    if request.param == "tiny":
        monkeypatch.setattr(logits_entry, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(linear_tiled, "SCRATCH_BYTES", 1)
        monkeypatch.setattr(plan, "COLUMNS", 37)


@pytest.mark.parametrize("vocabulary", [3, 101, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, "token", "row"])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_entry_equals_oracle(tiles, dtype, vocabulary, masked, temperature):
    logits, ids = inputs((3, 5, vocabulary), ((3, 5), vocabulary), dtype=dtype, std=2.0)
    mask, temperature = mask_and_temperature(ids, masked, temperature)
    double = logits.detach().double().requires_grad_()
    stats = token_logprobs(logits, ids, temperature=temperature, loss_mask=mask if masked else None, outputs=STATISTICS)
    assert_equals_oracle(stats, oracle(double, ids, temperature), [logits], [double], mask, STATISTICS)


@pytest.mark.parametrize("vocabulary", [3, 101, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("masked", "temperature"), [(False, 1.0), (True, 0.7), (True, "token")])
def test_head_entry_equals_oracle(tiles, dtype, vocabulary, head, masked, temperature):
    # logits of deviation 1.6: an error of float32 logits is relative to their size, and so are those that follow
    *leaves, ids = inputs((3, 5, 8), (vocabulary, 8), (vocabulary,), ((3, 5), vocabulary), dtype=dtype, std=0.75)
    head = dict(head)
    if not head.pop("bias", False):
        leaves = leaves[:2]
    mask, temperature = mask_and_temperature(ids, masked, temperature)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    hidden, weight, bias = (*leaves, None)[:3]
    stats = linear_logprobs(
        hidden, weight, ids, bias=bias, temperature=temperature, loss_mask=mask, outputs=STATISTICS, **head
    )
    expected = oracle(head_logits(*doubles, **head), ids, temperature)
    if dtype is torch.bfloat16:
        eager = oracle(head_logits(*leaves, **head), ids, temperature, torch.float32)
        assert_within_rounding(stats, expected, leaves, doubles, mask, eager, temperature)
    else:
        assert_equals_oracle(stats, expected, leaves, doubles, mask, STATISTICS)


@pytest.mark.parametrize("outputs", SUBSETS, ids="-".join)
def test_every_subset_of_outputs_equals_oracle(tiles, outputs):
    logits, ids = inputs((7, 101), ((7,), 101))
    double = logits.detach().double().requires_grad_()
    everything = torch.ones(7, dtype=torch.bool)
    stats = token_logprobs(logits, ids, outputs=outputs)
    assert_equals_oracle(stats, oracle(double, ids), [logits], [double], everything, outputs)
    *leaves, ids = inputs((7, 8), (101, 8), ((7,), 101))
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    stats = linear_logprobs(*leaves, ids, outputs=list(reversed(outputs)))
    assert_equals_oracle(stats, oracle(head_logits(*doubles), ids), leaves, doubles, everything, outputs)


@pytest.mark.parametrize("outputs", [*[(name,) for name in STATISTICS], STATISTICS], ids="-".join)
def test_gradcheck(tiles, outputs):
    hidden, weight, bias, logits, ids = inputs((2, 3, 4), (11, 4), (11,), (2, 3, 11), ((2, 3), 11), dtype=torch.float64)
    mask, temperature = mask_and_temperature(ids, True, "token")
    keywords = {"temperature": temperature.double(), "loss_mask": mask, "outputs": outputs}
    assert gradcheck(lambda x: asked(token_logprobs(x, ids, **keywords)), logits)
    head = {"softcap": 1.5, "logit_scale": 0.5} | keywords
    assert gradcheck(lambda h, w, b: asked(linear_logprobs(h, w, ids, bias=b, **head)), (hidden, weight, bias))


@pytest.mark.parametrize("outputs", [("logprobs",), ("logprobs", "logsumexp")], ids="-".join)
def test_gradcheck_of_a_frozen_head(tiles, outputs):
    hidden, weight, bias, ids = inputs((2, 3, 4), (11, 4), (11,), ((2, 3), 11), dtype=torch.float64)
    mask, temperature = mask_and_temperature(ids, True, "token")
    head = {"bias": bias.detach(), "softcap": 1.5, "logit_scale": 0.5, "loss_mask": mask, "outputs": outputs}
    head["temperature"] = temperature.double()
    assert gradcheck(lambda h: asked(linear_logprobs(h, weight.detach(), ids, **head)), hidden)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 60, 100])
def test_padded_rows_of_a_head_are_no_tokens(tiles, size, dtype):
    hidden, weight, bias, logits, ids = inputs((7, 8), (101, 8), (101,), (7, 101), ((7,), size), dtype=dtype)
    g = upstream(ids, len(STATISTICS))

    def run(leaves, stats):
        values = asked(stats)
        grads = torch.autograd.grad(values, leaves, [x.to(v.dtype) for x, v in zip(g, values, strict=True)])
        return [*values, *grads]

    whole = run(
        (hidden, weight, bias), linear_logprobs(hidden, weight, ids, bias=bias, vocab_size=size, outputs=STATISTICS)
    )
    cut = run((hidden, weight, bias), linear_logprobs(hidden, weight[:size], ids, bias=bias[:size], outputs=STATISTICS))
    assert all(torch.equal(x, y) for x, y in zip(whole, cut, strict=True))
    whole = run((logits,), token_logprobs(logits, ids, vocab_size=size, outputs=STATISTICS))
    cut = run((logits,), token_logprobs(logits[:, :size], ids, outputs=STATISTICS))
    assert all(torch.equal(x, y) for x, y in zip(whole, cut, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles_kept", [0, 1, 2, 100])
def test_a_cache_changes_nothing_but_the_products(monkeypatch, dtype, tiles_kept):
    monkeypatch.setattr(plan, "COLUMNS", 64)
    *leaves, ids = inputs((9, 8), (300, 8), (300,), ((9,), 300), dtype=dtype)
    mask = torch.arange(9) % 4 > 0
    keywords = {"bias": leaves[2], "softcap": 3.0, "loss_mask": mask, "outputs": STATISTICS}
    size = torch.finfo(dtype).bits // 8
    g = [x.to(torch.float64 if dtype is torch.float64 else torch.float32) for x in upstream(ids, len(STATISTICS))]

    def run(cache_bytes):
        values = asked(linear_logprobs(*leaves[:2], ids, cache_bytes=cache_bytes, **keywords))
        return [*values, *torch.autograd.grad(values, leaves, g)]

    plain, cached = run(0), run(tiles_kept * 9 * 64 * size)
    # a kept tile has the rows of the forward pass; in bfloat16 it is also centred where it was made
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    for x, y in zip(plain, cached, strict=True):
        assert (x - y).norm() <= tolerance * y.norm()
    counts = [products_of(lambda b=b: run(b)) for b in (0, tiles_kept * 9 * 64 * size)]
    assert counts[0] - counts[1] == min(tiles_kept, 5)


def test_a_cache_is_not_kept_where_no_backward_pass_comes(monkeypatch):
    hidden, weight, ids = inputs((9, 8), (300, 8), ((9,), 300))
    sizes = []
    kept = linear._kept
    monkeypatch.setattr(linear, "_kept", lambda *a: (sizes.append(a[-1]), kept(*a))[1])
    with torch.no_grad():
        linear_logprobs(hidden, weight, ids, cache_bytes=1 << 20)
    linear_logprobs(hidden, weight.detach(), ids, cache_bytes=1 << 20)  # a frozen head makes nothing twice
    linear_logprobs(hidden, weight, ids, cache_bytes=1 << 20)
    assert sizes == [0, 0, 1 << 20]


def kept_sets(ids, count, vocabulary):
    """For each token its id among `count` others, a few of the places empty; one row keeps all but its id."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(*ids.shape, vocabulary, generator=generator)
    scores.scatter_(-1, ids[..., None], 2.0)
    kept = scores.topk(count, -1).indices[..., torch.randperm(count, generator=generator)]
    kept[(torch.rand(kept.shape, generator=generator) < 0.2) & (kept != ids[..., None])] = -1
    kept.view(-1, count)[-1] = (ids.flatten()[-1] + 1 + torch.arange(count)) % vocabulary
    return kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scratch_bytes", [None, 1])
def test_kept_ids_are_the_whole_vocabulary(dtype, head, scratch_bytes):
    *leaves, ids = inputs((3, 5, 8), (101, 8), (101,), ((3, 5), 101), dtype=dtype, std=0.75)
    head = dict(head)
    if not head.pop("bias", False):
        leaves = leaves[:2]
    kept, mask = kept_sets(ids, 7, 101), torch.arange(15).view(3, 5) % 4 > 0
    outputs = STATISTICS[:4]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    everywhere = torch.zeros(3, 5, 102, dtype=torch.bool).scatter_(2, torch.where(kept < 0, 101, kept), True)
    z = head_logits(*doubles, **head)
    truth = oracle(torch.where(everywhere[..., :101], z, -1e4), ids, 0.7)  # exp(-1e4) is 0
    kept[0, 0] = 10**6  # outside the mask
    stats = linear_logprobs(
        *leaves[:2],
        ids,
        bias=(*leaves, None)[2],
        kept_ids=kept.int(),
        loss_mask=mask,
        temperature=0.7,
        outputs=outputs,
        scratch_bytes=scratch_bytes,
        **head,
    )
    assert stats.logprobs[-1, -1] == -math.inf
    seen = mask.clone()
    seen[-1, -1] = False
    g = list(upstream(ids, 4))
    for x in g:
        x[-1, -1] = 0
    expected = [torch.where(mask, getattr(truth, name), 0) for name in outputs]
    for x, e in zip(asked(stats), expected, strict=True):
        torch.testing.assert_close(x[seen].double(), e[seen], rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(asked(stats), leaves, [x.to(s.dtype) for x, s in zip(g, asked(stats), strict=True)])
    exact = torch.autograd.grad([torch.where(seen, e, 0) for e in expected], doubles, g)
    for x, e in zip(grads, exact, strict=True):
        torch.testing.assert_close(
            x.double(), e, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-5 * e.abs().max().item()
        )


def test_kept_ids_of_logits_are_those_of_the_head():
    hidden, weight, ids = inputs((3, 5, 8), (101, 8), ((3, 5), 101), dtype=torch.float64)
    kept, mask = kept_sets(ids, 7, 101), torch.arange(15).view(3, 5) % 4 > 0
    keywords = {"kept_ids": kept, "loss_mask": mask, "temperature": 0.7, "outputs": ("logprobs", "entropy")}
    both = token_logprobs(hidden @ weight.mT, ids, **keywords), linear_logprobs(hidden, weight, ids, **keywords)
    results = []
    for stats in both:
        values = [torch.where(x == -math.inf, 0, x) for x in asked(stats)]
        results.append([*values, *torch.autograd.grad(values, (hidden, weight), list(upstream(ids, 2)))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_garbage_in_masked_rows_stays_out_of_kept_ids():
    hidden, weight, ids = inputs((6, 8), (101, 8), ((6,), 101))
    mask, kept = torch.arange(6) > 1, kept_sets(ids, 5, 101)
    mask[-1] = False
    results = []
    for garbage in (0.0, math.nan):
        h = hidden.detach().masked_fill(~mask[:, None], garbage).requires_grad_()
        values = linear_logprobs(h, weight, ids, kept_ids=kept, loss_mask=mask).logprobs
        results.append([values, *torch.autograd.grad(values.sum(), (h, weight))])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("std", [1.5, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, 1.0)], ids=["logprobs", "both"])
def test_rounded_products_cost_little_more_than_the_rounding_of_their_gradient(std, weights):
    hidden, weight, _ = inputs((256, 256), (8000, 256), ((1,), 2), dtype=torch.bfloat16, std=1.0)
    with torch.no_grad():
        weight *= std / 16
    products = (hidden.detach().double() @ weight.detach().double().mT).requires_grad_()
    p = products.detach().softmax(-1)
    ids = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    exact = oracle(products, ids)
    stats = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    for ours, theirs in ((stats.logprobs, exact.logprobs), (stats.entropy, exact.entropy)):
        assert (ours.double() - theirs).abs().max() <= 2e-3
    g = [w * x for w, x in zip(weights, torch.randn(2, 256, generator=torch.Generator().manual_seed(2)), strict=True)]
    (dz,) = torch.autograd.grad(exact[:2], products, [x.double() for x in g])
    rounded, (h, w) = dz.bfloat16().double(), (x.detach().double() for x in (hidden, weight))
    grads = torch.autograd.grad(stats[:2], (hidden, weight), g)
    for ours, floor, truth in zip(grads, (rounded @ w, rounded.mT @ h), (dz @ w, dz.mT @ h), strict=True):
        assert (ours.double() - truth).norm() <= 1.5 * (floor.bfloat16().double() - truth).norm()


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6])
def test_digits_survive_near_certainty(tiles, rest):
    logits, ids = inputs((16, 5000), ((16,), 5000), std=2.0)
    with torch.no_grad():
        others = logits.double().scatter(1, ids[:, None], -math.inf).logsumexp(1)
        logits.scatter_(1, ids[:, None], (others + math.log((1 - rest) / rest)).float()[:, None])
    double = logits.detach().double().requires_grad_()
    outputs = ("logprobs", "entropy")
    got, expected = (asked(f)[:2] for f in (token_logprobs(logits, ids, outputs=outputs), oracle(double, ids)))
    for x, e in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), e, rtol=1e-5, atol=0)
        # every entry on its own, so that neither the target's, 1 - p, nor a rare token's is lost in the sum
        (grad,) = torch.autograd.grad(x.sum(), logits, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(e.sum(), double, retain_graph=True)
        torch.testing.assert_close(grad.double(), expected_grad, rtol=2e-5, atol=rest * 1e-8)


GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
@pytest.mark.parametrize("bad_id", [-100, 10**6])
def test_masked_rows_change_nothing(tiles, garbage, bad_id):
    hidden, weight, logits, ids = inputs((4, 5, 8), (101, 8), (4, 5, 101), ((4, 5), 101))
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    outside = ~mask[..., None]
    keywords = {"loss_mask": mask, "temperature": torch.full((4, 5), 0.7), "outputs": STATISTICS}
    poisoned = keywords | {"temperature": torch.where(mask, 0.7, garbage)}
    bad_ids = torch.where(mask, ids, bad_id)

    def run(entry, leaves, ids, keywords, upstream_outside):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        stats = asked(entry(*leaves, ids, **keywords))
        g = [torch.where(mask, x, upstream_outside).float() for x in upstream(mask, 5)]
        return [*stats, *torch.autograd.grad(stats, leaves, g)]

    for entry, leaves, bad_leaves in (
        (token_logprobs, [logits], [torch.where(outside, garbage, logits)]),
        (linear_logprobs, [hidden, weight], [torch.where(outside, garbage, hidden), weight]),
    ):
        clean = run(entry, leaves, ids, keywords, 0.0)
        for x, e in zip(run(entry, bad_leaves, bad_ids, poisoned, garbage), clean, strict=True):
            assert torch.equal(x, e)
        assert all((x[~mask] == 0).all() for x in clean[:6])


def test_all_rows_masked_gives_zeros_on_the_graph():
    hidden, weight, ids = inputs((4, 8), (101, 8), ((4,), 101))
    out = linear_logprobs(hidden, weight, ids, loss_mask=torch.zeros(4, dtype=torch.bool)).logprobs
    assert (out == 0).all()
    assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_forbidden_tokens_have_no_probability_and_no_gradient(tiles, dtype):
    logits, ids = inputs((6, 1000), ((6,), 1000), dtype=dtype)
    forbidden = torch.rand(6, 1000, generator=torch.Generator().manual_seed(3)) < 0.9
    forbidden[0] = True  # all but the target
    forbidden.scatter_(1, ids[:, None], False)
    with torch.no_grad():
        logits[forbidden] = -math.inf
    double = logits.detach().double().requires_grad_()
    outputs = ("logprobs", "entropy", "logsumexp", "sum_p2")
    got, expected = asked(token_logprobs(logits, ids, outputs=outputs)), asked(oracle(double, ids))[:4]
    for x, e in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), e, rtol=1e-5, atol=1e-5)
    g = upstream(ids, 4) + 1
    (grad,) = torch.autograd.grad(got, logits, [x.to(got[0].dtype) for x in g])
    finite_oracle = double.detach().clamp(min=-1e4).requires_grad_()
    (expected,) = torch.autograd.grad(asked(oracle(finite_oracle, ids))[:4], finite_oracle, list(g))
    once = max(0.501 * torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(grad.double(), expected, rtol=once, atol=1e-6)
    assert (grad[forbidden] == 0).all()
    mean = token_logprobs(logits, ids, outputs=["mean_logprob"]).mean_logprob
    assert (mean == -math.inf).all()
    (grad,) = torch.autograd.grad(mean.sum(), logits)
    assert grad.isfinite().all()
    assert (grad[forbidden] == 0).all()


def test_a_forbidden_target_has_logprob_minus_infinity_and_no_gradient():
    logits, ids = inputs((4, 101), ((4,), 101))
    with torch.no_grad():
        logits.scatter_(1, ids[:, None], -math.inf)
    stats = token_logprobs(logits, ids, outputs=("logprobs", "entropy", "sum_p2"))
    assert (stats.logprobs == -math.inf).all()
    torch.testing.assert_close(stats.entropy.double(), oracle(logits, ids).entropy, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad([x.sum() for x in asked(stats)], logits)
    assert grad.isfinite().all()
    assert (grad.gather(1, ids[:, None]) == 0).all()


def test_a_forbidding_bias_is_legal_in_the_head(tiles):
    hidden, weight, bias, ids = inputs((6, 8), (101, 8), (101,), ((6,), 50))
    with torch.no_grad():
        bias[60:] = -math.inf
    out = linear_logprobs(hidden, weight, ids, bias=bias, outputs=("logprobs", "entropy"))
    grads = torch.autograd.grad([x.sum() for x in asked(out)], (hidden, weight, bias))
    allowed = [x.detach().clone().requires_grad_() for x in (hidden, weight[:60], bias[:60])]
    expected = linear_logprobs(*allowed[:2], ids, bias=allowed[2], outputs=("logprobs", "entropy"))
    expected_grads = torch.autograd.grad([x.sum() for x in asked(expected)], allowed)
    torch.testing.assert_close(asked(out), asked(expected))
    for x, e in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(x[: len(e)], e)
        assert (x[len(e) :] == 0).all()


def test_garbage_in_a_row_that_counts_stays_in_that_row():
    logits, ids = inputs((3, 101), ((3,), 101))
    with torch.no_grad():
        logits[0, 5] = math.nan
        logits[1, ids[1]] = math.inf
    stats = token_logprobs(logits, ids, outputs=STATISTICS)
    for x, e in zip(asked(stats), oracle(logits, ids), strict=True):
        torch.testing.assert_close(x.double(), e, equal_nan=True, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad([x.sum() for x in asked(stats)], logits)
    assert grad[2].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 4), (3, 0), (1, 1)], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 5])
def test_empty_and_single_batches(shape, vocabulary):
    hidden, weight, logits, ids = inputs((*shape, 4), (vocabulary, 4), (*shape, vocabulary), (shape, vocabulary))
    for stats, leaves in (
        (token_logprobs(logits, ids, outputs=STATISTICS), [logits]),
        (linear_logprobs(hidden, weight, ids, outputs=STATISTICS), [hidden, weight]),
    ):
        expected = oracle(logits if len(leaves) == 1 else head_logits(hidden, weight), ids)
        torch.testing.assert_close(torch.stack(asked(stats)).double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad([x.sum() for x in asked(stats)], leaves)
        assert [x.shape for x in grads] == [x.shape for x in leaves]


LAYOUTS = {
    "sliced": lambda x: torch.nn.functional.pad(x, (0, 0, 1, 2), value=9.0)[:, 1:-2],
    "time_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "width_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every_other": lambda x: x.repeat_interleave(2, 0)[::2].repeat_interleave(3, 2)[:, :, ::3],
    "one_row_expanded": lambda x: x[:1, :1].expand(x.shape),
    "columns_of_more": lambda x: torch.nn.functional.pad(x, (3, 4), value=9.0)[..., 3:-4],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(tiles, layout):
    hidden, weight, logits, ids = inputs((3, 5, 8), (101, 8), (3, 5, 101), ((3, 5), 101), dtype=torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 1:3] = False
    g = list(upstream(ids, 5))

    def run(change, weight_change):
        leaves = [x.detach().clone().requires_grad_() for x in (logits, hidden, weight)]
        x, h, w = change(leaves[0]), change(leaves[1]), weight_change(leaves[2])
        strided_ids, strided_mask = ids.t().contiguous().t(), mask.t().contiguous().t()
        keywords = {"loss_mask": strided_mask, "outputs": STATISTICS}
        first = asked(token_logprobs(x, strided_ids, **keywords))
        second = asked(linear_logprobs(h, w, strided_ids, **keywords))
        return [*first, *second, *torch.autograd.grad([*first, *second], leaves, [*g, *g])]

    strided = run(LAYOUTS[layout], lambda w: w.t().contiguous().t())
    plain = run(lambda x: LAYOUTS[layout](x).contiguous(), lambda w: w)
    torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


def test_integer_types_of_ids_agree():
    logits, ids = inputs((7, 101), ((7,), 101))
    assert torch.equal(token_logprobs(logits, ids).logprobs, token_logprobs(logits, ids.int()).logprobs)


def products_of(run):
    """How many matrix products a run makes, in this thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.profiler.profile() as profile:
        run()
    torch.set_num_threads(threads)
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::addmm_"))


@pytest.mark.parametrize("trainable", [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("outputs", [("logprobs",), ("logsumexp", "logprobs"), ("logprobs", "entropy")], ids="-".join)
@pytest.mark.parametrize("count", [7, 0])
def test_a_frozen_tensor_costs_no_product(tiles, trainable, outputs, count):
    *leaves, ids = inputs((7, 8), (101, 8), (101,), ((7,), 101))
    mask = torch.arange(7) < count
    g = [torch.linspace(0.5, 2, 7)] * len(outputs)

    def gradients(some):
        stats = linear_logprobs(*some[:2], ids, bias=some[2], outputs=outputs, softcap=3.0, loss_mask=mask)
        torch.autograd.backward(asked(stats), g)

    gradients(leaves)
    some = [x.detach().requires_grad_(i in trainable) for i, x in enumerate(leaves)]
    products = products_of(lambda: gradients(some))
    for i, (x, whole) in enumerate(zip(some, leaves, strict=True)):
        if i in trainable:
            torch.testing.assert_close(x.grad, whole.grad, rtol=1e-5, atol=1e-6)
        else:
            assert x.grad is None
    each = products_of(lambda: linear_logprobs(*[x.detach() for x in leaves[:2]], ids, loss_mask=mask))
    assert (each > 0) == (count > 0)
    is_direct = trainable == (0,) and "entropy" not in outputs
    of_weight = -(-101 // plan.COLUMNS) if 1 in trainable and count else 0  # of all rows at once
    assert products == each * (2 + (0 in trainable and not is_direct)) + of_weight


@pytest.mark.parametrize("entry", ["logits", "head"])
def test_masked_rows_and_rows_without_gradient_are_never_read(entry, monkeypatch):
    read = []
    for name in ("read", "gather"):
        reads = getattr(blocks.Rows, name)
        monkeypatch.setattr(
            blocks.Rows, name, lambda *a, reads=reads: (read.extend(a[1].positions.tolist()), reads(*a))[1]
        )
    hidden, weight, logits, ids = inputs((12, 8), (101, 8), (12, 101), ((12,), 101))
    mask = torch.arange(12) < 9
    keywords = {"loss_mask": mask, "outputs": ("logprobs", "entropy")}
    if entry == "logits":
        stats, leaf = token_logprobs(logits, ids, **keywords), logits
    else:
        stats, leaf = linear_logprobs(hidden, weight, ids, **keywords), hidden
    assert sorted(read) == list(range(9))
    read.clear()
    weights = torch.zeros(12)
    weights[[2, 10]] = 1.0
    ((stats.logprobs * weights).sum() + stats.entropy[5]).backward()
    assert sorted(read) == [2, 5]
    assert leaf.grad.abs().amax(1).nonzero().flatten().tolist() == [2, 5]


def test_losses_share_one_call_and_the_graph_is_kept():
    hidden, weight, ids = inputs((7, 8), (101, 8), ((7,), 101))
    stats = linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    first, second = stats.logprobs.square().sum(), (stats.entropy * stats.logprobs.exp()).sum()
    parts = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (first, second)]
    again = torch.autograd.grad(first, (hidden, weight), retain_graph=True)
    joint = torch.autograd.grad(first + second, (hidden, weight))
    assert all(torch.equal(x, y) for x, y in zip(again, parts[0], strict=True))
    for x, *summands in zip(joint, *parts, strict=True):
        torch.testing.assert_close(x, sum(summands), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_linear_in_what_comes_from_upstream(dtype):
    hidden, weight, logits, ids = inputs((7, 8), (101, 8), (7, 101), ((7,), 101), dtype=dtype)
    g = list(upstream(ids, 5).to(dtype))
    for leaves, stats in (
        ([logits], asked(token_logprobs(logits, ids, outputs=STATISTICS))),
        ([hidden, weight], asked(linear_logprobs(hidden, weight, ids, outputs=STATISTICS))),
    ):
        plain = torch.autograd.grad(stats, leaves, g, retain_graph=True)
        for factor in (-(2.0**20), 2.0**-20):
            scaled = torch.autograd.grad(stats, leaves, [factor * x for x in g], retain_graph=True)
            assert all(torch.equal(x, factor * y) for x, y in zip(scaled, plain, strict=True))


def test_nothing_is_mutated_and_results_repeat_to_the_bit(tiles):
    tensors = inputs((4, 5, 8), (101, 8), (101,), (4, 5, 101), ((4, 5), 101))
    hidden, weight, bias, logits, ids = tensors
    before = [x.detach().clone() for x in tensors]
    mask, temperature = mask_and_temperature(ids, True, "token")
    keywords = {"loss_mask": mask, "temperature": temperature, "outputs": STATISTICS}

    def run():
        first = asked(token_logprobs(logits, ids, **keywords))
        second = asked(linear_logprobs(hidden, weight, ids, bias=bias, softcap=2.0, **keywords))
        leaves = (logits, hidden, weight, bias)
        return [*first, *second, *torch.autograd.grad([x.square().sum() for x in first + second], leaves)]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))
    assert all(torch.equal(x, y) and x._version == 0 for x, y in zip(tensors, before, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("entry", ["logits", "head"])
def test_only_inputs_and_a_few_numbers_per_token_are_saved(entry, layout):
    hidden, weight, logits, ids = inputs((4, 6, 8), (101, 8), (4, 6, 101), ((4, 5), 101))
    cut = (lambda x: x[:, :-1]) if layout == "sliced" else (lambda x: x[:, :-1].detach().clone().requires_grad_())
    x = cut(logits if entry == "logits" else hidden)
    saved = []
    mask = torch.ones(4, 5, dtype=torch.bool)
    with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        keywords = {"loss_mask": mask, "temperature": 0.7, "outputs": STATISTICS}
        token_logprobs(x, ids, **keywords) if entry == "logits" else linear_logprobs(x, weight, ids, **keywords)
    given = {t.untyped_storage().data_ptr() for t in (x, weight, ids, mask)}
    made = [t for t in saved if t.untyped_storage().data_ptr() not in given]
    assert saved
    assert sum(t.untyped_storage().nbytes() for t in made) <= 12 * 4 * ids.numel()


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("entry", ["logits", "head"])
def test_nothing_of_the_size_of_the_logits_is_made(entry, layout, monkeypatch):
    for entry_module in (linear_tiled, logits_entry):
        monkeypatch.setattr(entry_module, "SCRATCH_BYTES", 1 << 17)
    hidden, weight, logits, ids = inputs((4, 41, 8), (5000, 8), (4, 41, 5000), ((4, 40), 5000))
    x = logits if entry == "logits" else hidden
    x = x[:, :-1] if layout == "sliced" else x[:, :-1].detach().clone().requires_grad_()
    keywords = {"loss_mask": torch.arange(160).view(4, 40) % 3 > 0, "outputs": STATISTICS}
    with torch.profiler.profile(profile_memory=True) as profile:
        stats = token_logprobs(x, ids, **keywords) if entry == "logits" else linear_logprobs(x, weight, ids, **keywords)
        torch.autograd.grad([s.sum() for s in asked(stats)], x if entry == "logits" else (x, weight))
    events = profile.events() or []
    large = [e.name for e in events if e.self_cpu_memory_usage > ids.numel() * 5000]  # a quarter of [N, V]
    assert len(large) == (1 if entry == "logits" else 0), large


@pytest.mark.usefixtures("threads_put_back")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", ["statistics", "kept ids", "two models"])
def test_autocast_changes_nothing(entry, dtype, threads):
    torch.set_num_threads(threads)
    hidden, weight, ref_hidden, ref_weight, ids = inputs((7, 8), (101, 8), (7, 8), (101, 8), ((7,), 101), dtype=dtype)

    def run():
        match entry:
            case "statistics":
                out = asked(linear_logprobs(hidden, weight, ids, outputs=STATISTICS))
            case "kept ids":
                out = [
                    linear_logprobs(
                        hidden, weight, torch.zeros_like(ids), kept_ids=torch.arange(5).expand(7, 5)
                    ).logprobs
                ]
            case _:
                out = [rlloss.linear_divergences(hidden, weight, ref_hidden, ref_weight).reverse_kl]
        return [*out, *torch.autograd.grad(out, (hidden, weight), list(upstream(ids, 5).float())[: len(out)])]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    assert all(torch.equal(x, y) for x, y in zip(inside, plain, strict=True))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-3), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("entry", ["logits", "head"])
def test_errors_are_below_those_of_eager(entry, dtype, bound):
    hidden, weight, ids = inputs((64, 64), (32000, 64), ((64,), 32000), dtype=dtype)
    with torch.no_grad():
        weight /= 1.5 * math.sqrt(64)  # logits of standard deviation 1.5
    if entry == "logits":
        leaves = [(hidden @ weight.mT).detach().requires_grad_()]
        stats = token_logprobs(*leaves, ids, outputs=STATISTICS)
    else:
        leaves = [hidden, weight]
        stats = linear_logprobs(*leaves, ids, outputs=STATISTICS)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = oracle(doubles[0] if entry == "logits" else head_logits(*doubles), ids)
    log_p = (leaves[0] if entry == "logits" else head_logits(*leaves)).float().log_softmax(-1)
    eager = (log_p.gather(1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(1))

    def worst(values):
        return [(x.double() - e).abs().amax().item() for x, e in zip(values, exact, strict=False)]

    assert max(worst(asked(stats))) <= bound
    for ours, theirs in zip(worst(asked(stats)), worst(eager), strict=False):
        assert ours <= 2 * theirs
    g = list(upstream(ids, 2).float())
    truth = torch.autograd.grad(exact[:2], doubles, [x.double() for x in g])
    grads = (torch.autograd.grad(values, leaves, g) for values in (asked(stats)[:2], eager))
    for ours, theirs, e in zip(*grads, truth, strict=True):
        assert (ours.double() - e).norm() <= 2 * (theirs.double() - e).norm()


def test_one_temperature_serves_all_tokens_whatever_its_form():
    logits, ids = inputs((3, 5, 101), ((3, 5), 101))
    expected = token_logprobs(logits, ids, temperature=0.5).logprobs
    for temperature in (torch.tensor(0.5), torch.full((3,), 0.5), torch.full((3, 5), 0.5, dtype=torch.bfloat16)):
        assert torch.equal(token_logprobs(logits, ids, temperature=temperature).logprobs, expected)


def test_sequence_logps_are_sums_and_means_over_the_mask():
    logprobs = torch.tensor([[-1.0, math.nan, -2.0], [-4.0, -5.0, math.inf], [-9.0, -9.0, -9.0]])
    mask = torch.tensor([[True, False, True], [True, True, False], [False] * 3])
    assert sequence_logps(logprobs, mask).tolist() == [-3.0, -9.0, 0.0]
    assert sequence_mean_logps(logprobs, mask).tolist() == [-1.5, -4.5, 0.0]
    packed = {"loss_mask": mask.flatten()[:6], "cu_seqlens": torch.tensor([0, 3, 6])}
    assert sequence_logps(logprobs.flatten()[:6], **packed).tolist() == [-3.0, -9.0]
    assert sequence_mean_logps(logprobs.flatten()[:6], **packed).tolist() == [-1.5, -4.5]


def test_an_id_outside_the_vocabulary_is_an_error_where_it_counts():
    logits, ids = inputs((3, 101), ((3,), 101))
    for bad in (-100, -1, 101):
        ids[1] = bad
        with pytest.raises(IndexError, match="loss_mask=False"):
            token_logprobs(logits, ids)


@pytest.mark.unhooked
def test_a_compiled_graph_holds_one_operator_for_all_lengths():
    torch._dynamo.reset()
    counters.clear()

    def loss(hidden, weight, bias, logits, ids, mask, temperature):
        first = token_logprobs(logits, ids, temperature=0.7, loss_mask=mask, outputs=("logprobs", "entropy"))
        head = {"bias": bias, "temperature": temperature, "softcap": 3.0, "loss_mask": mask}
        second = linear_logprobs(hidden, weight, ids, outputs=STATISTICS, **head)
        return first.logprobs.sum() + first.entropy.square().sum() + sum(x.square().sum() for x in asked(second))

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        *leaves, ids = inputs((2, length, 8), (101, 8), (101,), (2, length, 101), ((2, length), 101), seed=length)
        mask, temperature = mask_and_temperature(ids, True, "token")
        results = []
        for f in (loss, compiled):
            value = f(leaves[0], leaves[1], leaves[2], leaves[3], ids, mask, temperature)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def scored(**changed):
    """A legal call of `token_logprobs`, but for what is changed."""
    logits, ids = inputs((2, 3, 7), ((2, 3), 7))
    return token_logprobs(**{"logits": logits, "ids": ids} | changed)


def scored_by_head(**changed):
    hidden, weight, ids = inputs((2, 3, 4), (7, 4), ((2, 3), 7))
    return linear_logprobs(**{"hidden": hidden, "weight": weight, "ids": ids} | changed)


ERRORS = [
    (scored, {"ids": torch.zeros(2, 4, dtype=torch.long)}, r"logits \[2, 3, 7\] and ids \[2, 4\].*rlloss\.shift"),
    (scored, {"ids": torch.zeros(2, 3, 7, dtype=torch.long)}, r"ids \[2, 3, 7\]"),
    (scored, {"ids": torch.zeros(2, 3)}, "ids must be int32 or int64, got torch.float32"),
    (scored, {"ids": [[0, 1, 2]]}, "ids must be a tensor, got list"),
    (scored, {"ids": torch.zeros(2, 3, dtype=torch.long, device="meta")}, "ids is on meta but logits is on cpu"),
    (scored, {"logits": torch.zeros(2, 3, 7, dtype=torch.long)}, "logits must be bfloat16.*got torch.int64"),
    (scored, {"logits": torch.zeros(2, 3, 0)}, r"\[\*ids.shape, V\]"),
    (scored, {"loss_mask": torch.ones(2, 3)}, "loss_mask must be a bool tensor"),
    (scored, {"loss_mask": torch.ones(3, 2).bool()}, r"loss_mask must have the shape of ids, \[2, 3\], got \[3, 2\]"),
    (scored, {"outputs": ("entropi",)}, "got 'entropi'; did you mean 'entropy'"),
    (scored, {"outputs": "logprobs"}, r"such as \('logprobs',\), got 'logprobs'"),
    (scored, {"outputs": ()}, "outputs must be a sequence of names"),
    (scored, {"temperature": 0.0}, "temperature must be a positive number, got 0.0"),
    (scored, {"temperature": -1.0}, "temperature"),
    (scored, {"temperature": torch.ones(3)}, r"\[2, 3\], or one entry per row, \[2\], got \[3\]"),
    (scored, {"temperature": torch.ones(2, dtype=torch.long)}, "temperature must be a number or a float tensor"),
    (scored, {"temperature": torch.ones(2, requires_grad=True)}, "without gradient"),
    (scored_by_head, {"ids": torch.zeros(3, dtype=torch.long)}, r"hidden \[2, 3, 4\] and ids \[3\]"),
    (scored_by_head, {"weight": torch.zeros(4, 7)}, r"weight must be \[V, H\] with the width H=4 of hidden"),
    (scored_by_head, {"weight": torch.nn.Linear(4, 7)}, "got Linear; of a module pass its weight and bias"),
    (scored_by_head, {"weight": torch.zeros(7, 4).bfloat16()}, r"hidden is torch.float32 but weight is torch.bfloat16"),
    (scored_by_head, {"bias": torch.zeros(6)}, r"bias must be \[V\] = \[7\], got \[6\]"),
    (scored_by_head, {"bias": torch.zeros(7).double()}, "bias is torch.float64"),
    (scored_by_head, {"softcap": 0.0}, "softcap must be a positive number, got 0.0"),
    (scored_by_head, {"softcap": -30.0}, "softcap"),
    (scored_by_head, {"logit_scale": 0.0}, "logit_scale"),
    (scored_by_head, {"logit_scale": math.nan}, "logit_scale"),
    (
        scored_by_head,
        {"impl": "tilde"},
        r"impl must be one of \['auto', 'tiled', 'triton'\], got 'tilde'; did you mean 'tiled'",
    ),
    (
        scored_by_head,
        {"impl": "triton", "hidden": torch.zeros(2, 3, 4).double(), "weight": torch.zeros(7, 4).double()},
        "impl='triton' is impossible here: .*float64; impl='auto' takes plain PyTorch",
    ),
    (scored, {"vocab_size": 8}, "vocab_size must be an integer from 1 to the 7 columns of the logits, got 8"),
    (scored_by_head, {"vocab_size": 0}, "vocab_size must be an integer from 1 to the 7"),
    (scored, {"scratch_bytes": -1}, "scratch_bytes must be a number of bytes, got -1"),
    (scored_by_head, {"cache_bytes": 1e9}, r"cache_bytes must be a number of bytes, got 1000000000\.0"),
    (
        scored,
        {"kept_ids": torch.zeros(2, 3, dtype=torch.long)},
        r"kept_ids must be \[\*ids\.shape, K\] = \[2, 3, 'K'\]",
    ),
    (
        scored_by_head,
        {"kept_ids": torch.zeros(2, 3, 4)},
        "kept_ids must be an int32 or int64 tensor, got torch.float32",
    ),
    (
        scored_by_head,
        {"kept_ids": torch.zeros(2, 3, 4, dtype=torch.long), "outputs": ("mean_logprob",)},
        "mean_logprob is over the whole vocabulary",
    ),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("call", "changed", "message"), ERRORS)
def test_errors_teach(call, changed, message):
    call()
    with pytest.raises(ValueError, match=message):
        call(**changed)


@pytest.mark.unhooked
def test_half_precision_logprobs_are_refused():
    for f in (sequence_logps, sequence_mean_logps):
        with pytest.raises(ValueError, match=f"{f.__name__}: logprobs must be float32 or float64"):
            f(torch.zeros(2, 3).bfloat16(), torch.ones(2, 3, dtype=torch.bool))


def test_exported_from_the_package():
    for name in ("TokenStats", "linear_logprobs", "sequence_logps", "sequence_mean_logps", "token_logprobs"):
        assert getattr(rlloss, name) is globals()[name]
