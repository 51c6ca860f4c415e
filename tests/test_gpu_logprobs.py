"""The Triton kernels of one model: on a GPU, or on the CPU by Triton's interpreter."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from rlloss_kernels import STATISTICS, linear_statistics, logits_statistics
from rlloss_kernels.gpu import frozen, logits
from rlloss_kernels.gpu.rows import active_rows
from torch import Tensor

import rlloss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FROZEN = ("logprobs", "logsumexp")


@pytest.fixture(autouse=True)
def device(triton_device):
    return triton_device


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, device):
    """So that a small vocabulary takes several of everything, and a gradient several ranges of columns."""
    if device.type == "cpu":
        for name, size in {"BLOCK": 32, "CHUNK": 64}.items():
            monkeypatch.setattr(logits, name, size)


class Problem:
    """Hidden states, a head and tokens, of which some are masked and hold what nobody may read."""

    def __init__(self, device, tokens=37, width=40, vocabulary=101, dtype=torch.float32, seed=0, spread=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = (torch.randn(tokens, width, generator=generator) * spread).to(device, dtype)
        self.weight = torch.randn(vocabulary + 3, width, generator=generator).to(device, dtype)
        self.bias = torch.randn(vocabulary + 3, generator=generator).to(device, dtype)
        self.ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.mask = (torch.rand(tokens, generator=generator) > 0.3).to(device)
        self.heat = (torch.rand(tokens, generator=generator) + 0.5).to(device)
        self.grad = torch.randn(5, tokens, generator=generator).to(device)
        self.grad[:, 3:9] = 0  # rows that a backward pass leaves out
        self.vocabulary = vocabulary

    def poisoned(self):
        masked = ~self.mask
        self.hidden[masked], self.heat[masked], self.ids[masked] = math.nan, math.nan, -100
        self.grad[:, masked] = math.nan
        return self

    def options(self, **changed):
        plain = {"loss_mask": self.mask, "temperature": self.heat, "vocabulary": self.vocabulary}
        return plain | changed

    def head(self, dtype=None, impl="triton", trains=(True, True, True), use_bias=True, **options):
        """Statistics and gradients, those of `trains`."""
        tensors = [x.detach().to(dtype or x.dtype).clone() for x in (self.hidden, self.weight, self.bias)]
        tensors = [x.requires_grad_(t) for x, t in zip(tensors, trains, strict=True)]
        hidden, weight, bias = tensors
        keywords = self.options(**options)
        if keywords["temperature"] is not None and dtype is torch.float64:
            keywords["temperature"] = keywords["temperature"].double()
        found = linear_statistics(hidden, weight, self.ids, bias=bias if use_bias else None, impl=impl, **keywords)
        chosen = [x for x, t in zip(tensors, trains, strict=True) if t and (use_bias or x is not bias)]
        return found.detach(), torch.autograd.grad(found, chosen, self.grad.to(found.dtype))


def assert_right(found, expected, dtype, counts):
    """Statistics within 1e-5, gradients within what their own dtype makes of the exact ones, twice."""
    (statistics, gradients), (right, exact) = found, expected
    torch.testing.assert_close(statistics.double(), right, rtol=1e-5, atol=1e-5)
    assert not statistics[:, ~counts].any()
    for x, y in zip(gradients, exact, strict=True):
        assert x.dtype is dtype
        rounding = torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-6
        assert (x.double() - y).norm() <= rounding * y.norm() + 1e-30, (x.double() - y).norm() / y.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 33])  # rows that bulk loads can read, and others
@pytest.mark.parametrize(
    ("vocabulary", "extra"), [(1, {}), (2, {}), (37, {"softcap": 3.0}), (101, {"logit_scale": 0.7})]
)
def test_a_head_agrees_with_float64(device, dtype, width, vocabulary, extra):
    problem = Problem(device, width=width, vocabulary=vocabulary, dtype=dtype).poisoned()
    found = problem.head(scratch_bytes=1, **extra)
    assert_right(found, problem.head(torch.float64, "tiled", **extra), dtype, problem.mask)


@pytest.mark.parametrize("outputs", [*([name] for name in STATISTICS), ["logprobs", "entropy"]], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_any_statistics_of_a_head(device, outputs, masked):
    problem = Problem(device)
    options = {"outputs": outputs} | ({} if masked else {"loss_mask": None, "temperature": None})
    counts = problem.mask if masked else torch.ones_like(problem.mask)
    chosen = torch.tensor([name in outputs for name in STATISTICS], device=device)
    problem.grad[~chosen] = 0
    (found, gradients), (right, exact) = problem.head(**options), problem.head(torch.float64, "tiled", **options)
    assert_right((found[chosen], gradients), (right[chosen], exact), torch.float32, counts)


@pytest.mark.parametrize("trains", [t for t in itertools.product([True, False], repeat=3) if any(t)], ids=str)
def test_only_the_gradients_that_are_needed(device, trains):
    problem = Problem(device)
    expected = problem.head(torch.float64, "tiled", trains)
    assert_right(problem.head(trains=trains), expected, torch.float32, problem.mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 33])
@pytest.mark.parametrize(
    ("vocabulary", "extra"), [(1, {}), (2, {}), (37, {"softcap": 3.0}), (601, {"logit_scale": 0.7})]
)
def test_a_frozen_head_agrees_with_float64(device, dtype, width, vocabulary, extra):
    problem = Problem(device, width=width, vocabulary=vocabulary, dtype=dtype).poisoned()
    options = {"outputs": FROZEN, "trains": (True, False, False), "scratch_bytes": 1} | extra
    problem.grad[[1, 3, 4]] = 0
    found, (right, exact) = problem.head(**options), problem.head(torch.float64, "tiled", **options)
    torch.testing.assert_close(found[0].double(), right, rtol=1e-5, atol=1e-5)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    # the direction is rounded once, and its product with the upstream gradient again
    assert (found[1][0].double() - exact[0]).norm() <= rounding * exact[0].norm() + 1e-30


@pytest.mark.parametrize("jump", [-500.0, 30.0, 110.0, 500.0])
@pytest.mark.parametrize("target", ["the one", "another"])
def test_a_frozen_head_whose_logits_jump(device, jump, target, monkeypatch):
    problem = Problem(device, vocabulary=601)
    problem.bias[450] = jump
    if target == "the one":
        problem.ids[::2] = 450
    again = []
    kept = frozen.partial_sums

    def noted(*arguments):
        if arguments[-1].only is not None:
            again.append(arguments[-1].only.clone())
        return kept(*arguments)

    monkeypatch.setattr(frozen, "partial_sums", noted)
    options = {"outputs": FROZEN, "trains": (True, False, False), "scratch_bytes": 1, "temperature": None}
    problem.grad[[1, 3, 4]] = 0
    assert_right(problem.head(**options), problem.head(torch.float64, "tiled", **options), torch.float32, problem.mask)
    assert any(blocks.any() for blocks in again) == (jump > 60 + 30)  # over the largest of the others
    assert not torch.stack(again).all()


def test_a_frozen_head_with_a_forbidden_token(device):
    problem = Problem(device)
    problem.bias[5], problem.ids[:9] = -math.inf, 5
    options = {"outputs": FROZEN, "trains": (True, False, False), "loss_mask": None}
    problem.grad[[1, 2, 3, 4]] = 0
    (_, gradient), (_, exact) = problem.head(**options), problem.head(torch.float64, "tiled", **options)
    assert not gradient[0][:9].any()
    assert (gradient[0].double() - exact[0]).norm() <= 2e-6 * exact[0].norm()


def test_a_frozen_head_near_certainty(device):
    # 1 - p of 1e-6: the difference of the target's row and the mean of all would lose every digit
    problem = Problem(device)
    problem.bias.zero_()
    with torch.no_grad():
        logits_ = problem.hidden.double() @ problem.weight[: problem.vocabulary].double().T
        rest = logits_.scatter(1, problem.ids[:, None], -math.inf).logsumexp(1)
        own = problem.weight[problem.ids].double()
        gap = rest + 14 - (problem.hidden.double() * own).sum(1)
        problem.hidden = (problem.hidden.double() + gap[:, None] * own / own.square().sum(1, keepdim=True)).float()
    options = {"outputs": FROZEN, "trains": (True, False, False), "temperature": None, "loss_mask": None}
    problem.grad[[1, 2, 3, 4]] = 0
    (found, gradient), (right, exact) = problem.head(**options), problem.head(torch.float64, "tiled", **options)
    torch.testing.assert_close(found[0].double(), right[0], rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient[0].double(), exact[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("frozen_head", [False, True])
def test_rows_apart_do_not_change_a_row(device, frozen_head):
    problem = Problem(device, vocabulary=601, dtype=torch.bfloat16)
    options = {"scratch_bytes": 1} | ({"outputs": FROZEN, "trains": (True, False, False)} if frozen_head else {})
    problem.grad[[1, 3, 4]] = 0
    once, again = problem.head(**options), problem.head(**options)
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(x, y) for x, y in zip(once[1], again[1], strict=True))
    alone = Problem(device, vocabulary=601, dtype=torch.bfloat16)
    for name in ("hidden", "ids", "mask", "heat"):
        setattr(alone, name, getattr(problem, name)[11:30])
    alone.grad = problem.grad[:, 11:30]
    part = alone.head(**options)
    assert torch.equal(part[0], once[0][:, 11:30])
    assert torch.equal(alone.head(**options | {"scratch_bytes": None})[0], part[0])  # in other ranges of columns
    if device.type == "cpu":  # the products of a GPU's library may be cut otherwise for another number of rows
        torch.testing.assert_close(part[1][0], once[1][0][11:30], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("entry", ["head", "frozen", "logits"])
@pytest.mark.parametrize(
    ("how", "masked"),
    [("sliced", True), ("sliced", False), ("transposed", True), ("shifted", False), ("expanded", True)],
)
def test_any_strides(device, how, entry, masked, strided):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 9, 24, generator=generator).to(device)
    x = x[:1].expand(3, 9, 24) if how == "expanded" else x
    weight = torch.randn(53, 24, generator=generator).to(device)
    ids = torch.randint(24 if entry == "logits" else 53, (3, 9), generator=generator).to(device)
    mask = (torch.rand(3, 9, generator=generator) > 0.3).to(device) if masked else None
    results = []
    for impl in ("triton", "tiled"):
        y = (x if how == "expanded" else strided(x, how)) if impl == "triton" else x.contiguous()
        y = y.detach().requires_grad_()
        w = (strided(weight, "sliced") if impl == "triton" else weight).detach().requires_grad_(entry != "frozen")
        options = {"loss_mask": mask, "impl": impl, "outputs": FROZEN if entry == "frozen" else STATISTICS}
        found = logits_statistics(y, ids, **options) if entry == "logits" else linear_statistics(y, w, ids, **options)
        found.square().sum().backward()
        results.append((found, y.grad, w.grad))
    for found, expected in zip(*results, strict=True):
        if expected is not None:
            assert (found - expected).norm() <= 2e-6 * expected.norm()


def logits_problem(device, dtype, vocabulary, kind):
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(9, vocabulary + 3, generator=generator) * 3
    z += {"low": -1e4, "high": 1e4}.get(kind, 0.0)
    ids = torch.randint(vocabulary, (9,), generator=generator)
    if kind == "forbidden":
        z[torch.rand(z.shape, generator=generator) > 0.5] = -math.inf
        z[0, :vocabulary], z[0, ids[0]] = -math.inf, 1.0  # nothing but the target
        z[1, ids[1]] = -math.inf
    mask = torch.arange(9) % 4 != 3
    z[~mask], ids[~mask] = math.nan, -100
    grad = torch.randn(5, 9, generator=generator)
    grad[:, 5:7], grad[:, 3] = 0, math.nan
    heat = torch.rand(9, generator=generator) + 0.5
    return (x.to(device) for x in (z.to(dtype), ids, mask, grad, heat))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 2, 37, 160])
@pytest.mark.parametrize("kind", ["plain", "low", "high", "forbidden"])
def test_logits_agree_with_float64(device, dtype, vocabulary, kind):
    if kind == "forbidden" and vocabulary < 3:
        pytest.skip("nothing would be left")
    if kind in ("low", "high") and dtype is not torch.float32:
        pytest.skip("their logits differ by less than the dtype can tell")
    z, ids, mask, grad, heat = logits_problem(device, dtype, vocabulary, kind)
    results = []
    for impl, kind_of_number in (("triton", dtype), ("tiled", torch.float64)):
        x = z.to(kind_of_number).requires_grad_()
        temperature = heat.to(torch.float64 if impl == "tiled" else torch.float32)
        found = logits_statistics(x, ids, loss_mask=mask, temperature=temperature, vocabulary=vocabulary, impl=impl)
        used = torch.where(mask, grad, 0)
        results.append((found.detach(), torch.autograd.grad(found, x, used.to(found.dtype))[0]))
    (found, gradient), (right, exact) = results
    is_far = kind in ("low", "high")
    unit = 2**-9 if is_far else 1e-6  # 2e4, to which a temperature takes 1e4, is a multiple of that in float32
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=unit)
    rounding = unit if is_far else torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-6
    assert (gradient.double() - exact).norm() <= rounding * exact.norm() + 1e-30
    assert not gradient[~mask].any()
    assert not gradient[:, vocabulary:].any()


def test_entropy_where_nothing_but_the_target_is_left(device):
    z = torch.full((2, 40), -math.inf, device=device)
    z[:, 7] = 1.0
    z = z.requires_grad_()
    ids = torch.full((2,), 7, device=device)
    found = logits_statistics(z, ids, impl="triton", outputs=["logprobs", "entropy"])[:2]
    assert not found.any()
    found.sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_log_probs_near_certainty_keep_their_digits(device):
    z = torch.zeros(6, 101, device=device)
    z[:, 7] = torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 40.0])
    ids = torch.full((6,), 7, device=device)
    found = logits_statistics(z, ids, impl="triton", outputs=["logprobs", "entropy"])
    exact = logits_statistics(z.double(), ids, impl="tiled", outputs=["logprobs", "entropy"])
    torch.testing.assert_close(found[:2].double(), exact[:2], rtol=2e-6, atol=0)


@pytest.mark.parametrize("at", [7, 8])
def test_a_logit_of_infinity_is_no_number(device, at):
    z = torch.zeros(3, 40, device=device)
    z[1, at] = math.inf
    ids = torch.full((3,), 7, device=device)
    found = logits_statistics(z, ids, impl="triton", outputs=["logprobs"])[0]
    torch.testing.assert_close(found, F.log_softmax(z, -1)[:, 7], equal_nan=True)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(device, tokens):
    for options in ({}, {"outputs": FROZEN, "trains": (True, False, False)}):
        found, gradients = Problem(device, tokens=tokens).head(loss_mask=None, **options)
        assert found.shape == (5, tokens)
        assert not any(x.isnan().any() for x in (found, *gradients))
    z = torch.randn(tokens, 11, device=device, requires_grad=True)
    found = logits_statistics(z, torch.zeros(tokens, dtype=torch.long, device=device), impl="triton")
    found.sum().backward()
    assert z.grad.shape == (tokens, 11)


def test_a_batch_in_which_nothing_counts(device):
    problem = Problem(device)
    nothing = torch.zeros_like(problem.mask)
    problem.ids[:] = -100
    for options in ({}, {"outputs": FROZEN, "trains": (True, False, False)}):
        found, gradients = problem.head(loss_mask=nothing, **options)
        assert not found.any()
        assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("tokens", [1, 1024, 2500])
def test_active_rows_are_found_in_their_order(device, tokens):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(50, (tokens,), generator=generator).to(device)
    mask = (torch.rand(tokens, generator=generator) > 0.5).to(device)
    grad = (torch.randn(5, tokens, generator=generator) * (torch.rand(5, tokens, generator=generator) > 0.8)).to(device)
    heat = torch.rand(tokens, generator=generator).to(device)
    found = active_rows(ids, mask, heat, 50, grad, first=7)
    expected = (mask & (grad != 0).any(0)).nonzero().squeeze(1)
    number = int(found.number)
    assert torch.equal(found.positions[:number], expected)
    assert torch.equal(found.ids[:number], ids[expected] - 7)
    assert torch.equal(found.temperature[:number], heat[expected])


@pytest.mark.parametrize("bad", [-1, 50, -100])
@pytest.mark.parametrize("entry", ["head", "logits"])
def test_an_id_outside_of_the_vocabulary(device, bad, entry):
    if device.type == "cuda":
        pytest.skip("the assertion ends all work on a GPU")
    x = torch.zeros(3, 50, device=device)
    ids = torch.tensor([1, bad, 2], device=device)
    mask = torch.tensor([True, True, False], device=device)
    score = rlloss.token_logprobs if entry == "logits" else partial(rlloss.linear_logprobs, weight=torch.zeros(50, 50))
    for loss_mask in (None, mask):
        with pytest.raises(RuntimeError, match=r"ids of tokens that count must lie in \[0, 50\)"):
            score(x, ids=ids, loss_mask=loss_mask, impl="triton")
    rlloss.token_logprobs(x, ids, loss_mask=torch.tensor([True, False, True], device=device), impl="triton")


@pytest.mark.unhooked
@pytest.mark.parametrize("entry", ["head", "frozen", "logits"])
def test_one_graph(device, entry):
    problem = Problem(device)
    hidden = problem.hidden.requires_grad_()
    weight = problem.weight.requires_grad_(entry != "frozen")

    def scored(x: Tensor, mask: Tensor) -> Tensor:
        if entry == "logits":
            stats = rlloss.token_logprobs(x @ weight.T, problem.ids, loss_mask=mask, impl="triton")
        else:
            stats = rlloss.linear_logprobs(x, weight, problem.ids, loss_mask=mask, impl="triton", cache_bytes=1 << 20)
        return stats.logprobs

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(scored(hidden, problem.mask).square().sum(), hidden)[0]
    found = torch.autograd.grad(compiled(hidden, problem.mask).square().sum(), hidden)[0]
    torch.testing.assert_close(found, expected)


def test_a_shared_result_may_be_differentiated_twice_over(device):
    problem = Problem(device)
    hidden = problem.hidden.requires_grad_()
    stats = rlloss.linear_logprobs(hidden, problem.weight, problem.ids, impl="triton", outputs=["logprobs", "entropy"])
    first = torch.autograd.grad(stats.logprobs.sum(), hidden, retain_graph=True)[0]
    second = torch.autograd.grad(stats.entropy.sum(), hidden, retain_graph=True)[0]
    both = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), hidden)[0]
    torch.testing.assert_close(first + second, both, rtol=1e-4, atol=1e-5)


def one_head(device):
    """A head of whose tokens some have the first id, the only one of a shard below."""
    problem = Problem(device, vocabulary=101)
    problem.ids[:9] = 0
    return problem.poisoned()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("impl", ["tiled", "triton"])
def test_shards_of_a_head_are_the_whole(device, impl, size, simulated_group):
    problem = one_head(device)
    dtype = torch.float64 if impl == "tiled" else torch.float32
    right, exact = problem.head(torch.float64, "tiled", use_bias=True)
    # uneven parts, one of a single column and one of padding alone
    cuts = {1: [0, 104], 2: [0, 60, 104], 3: [0, 1, 60, 104], 5: [0, 33, 34, 77, 101, 104]}[size]
    group = simulated_group(size)

    def rank(i):
        part = one_head(device)
        tensors = (part.hidden, part.weight[cuts[i] : cuts[i + 1]], part.bias[cuts[i] : cuts[i + 1]])
        hidden, weight, bias = (x.to(dtype).detach().clone().requires_grad_() for x in tensors)
        stats = rlloss.linear_logprobs(
            hidden,
            weight,
            part.ids,
            bias=bias,
            loss_mask=part.mask,
            temperature=torch.where(part.mask, part.heat, 1.0).to(dtype),
            outputs=STATISTICS,
            impl=impl,
            vocab_shard=rlloss.VocabShard(group, min(cuts[i], 101), 101),
        )
        found = torch.stack([getattr(stats, name) for name in STATISTICS])
        return found.detach(), torch.autograd.grad(found, (hidden, weight, bias), part.grad.to(dtype))

    results = group.run(rank)
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if impl == "tiled" else {"rtol": 2e-5, "atol": 2e-5}
    for found, (d_hidden, _, _) in results:
        assert torch.equal(found, results[0][0])
        assert torch.equal(d_hidden, results[0][1][0])
    torch.testing.assert_close(results[0][0].double(), right, **tolerance)
    torch.testing.assert_close(results[0][1][0].double(), exact[0], **tolerance)
    for i in (1, 2):
        whole = torch.cat([gradients[i] for _, gradients in results])
        torch.testing.assert_close(whole.double(), exact[i], **tolerance)
