"""The Triton kernels of two models, and vocabularies that are spread over ranks, against tiles in float64."""

# pyright: reportArgumentType=false

import copy
import itertools
import math

import pytest
import torch
from rlloss_kernels import (
    DIVERGENCES,
    linear_divergences,
    linear_statistics,
    logits_divergences,
    logits_statistics,
)
from rlloss_kernels.gpu import logits as gpu_logits
from rlloss_kernels.gpu import pair_logits
from rlloss_kernels.shards import Shard

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["tiled", "triton"]
TOKENS = {"heads": 25, "rows": 10}  # more than one block of rows; every row is a program
SUBSETS = [(name,) for name in DIVERGENCES] + [("forward_kl", "js", "logprobs"), ("reverse_kl", "entropy", "renyi")]


@pytest.fixture(autouse=True)
def device(triton_device):
    return triton_device


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, device):
    """So that a small vocabulary takes several of everything."""
    if device.type == "cpu":
        for module in (gpu_logits, pair_logits):
            monkeypatch.setattr(module, "BLOCK", 32)
            monkeypatch.setattr(module, "CHUNK", 64)


class Problem:
    """Two heads, two tensors of logits, and tokens, of which some are masked and hold what nobody may read."""

    def __init__(self, device, tokens=25, widths=(40, 24), vocabulary=69, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        self.hidden, self.ref_hidden = (draw(tokens, width) for width in widths)
        self.weight = draw(vocabulary + 3, widths[0], scale=0.3)
        self.ref_weight = draw(vocabulary + 5, widths[1], scale=0.3)
        self.bias, self.ref_bias = draw(vocabulary + 3), draw(vocabulary + 5)
        self.logits, self.ref_logits = draw(tokens, vocabulary + 3, scale=2.0), draw(tokens, vocabulary, scale=2.0)
        self.ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
        self.mask = (torch.rand(tokens, generator=generator) > 0.3).to(device)
        self.heat = (torch.rand(tokens, generator=generator) + 0.5).to(device)
        self.grad = torch.randn(8, tokens, generator=generator).to(device)
        self.grad[:, 3:6] = 0  # rows that a backward pass leaves out
        self.vocabulary = vocabulary

    def poisoned(self):
        masked = ~self.mask
        for x in (self.hidden, self.ref_hidden, self.logits, self.ref_logits, self.heat):
            x[masked] = math.nan
        self.ref_hidden[masked.nonzero()[::2]] = self.ref_logits[masked.nonzero()[::2]] = math.inf
        self.ids[masked], self.grad[:, masked] = -100, math.nan
        return self

    def options(self, dtype, **changed):
        keywords = {"loss_mask": self.mask, "temperature": self.heat, "vocabulary": self.vocabulary, "ids": self.ids}
        keywords |= {"alpha": 0.3, "beta": 0.2, "outputs": DIVERGENCES} | changed
        if keywords["temperature"] is not None and dtype is torch.float64:
            keywords["temperature"] = keywords["temperature"].double()
        return keywords

    def upstream(self, found, outputs):
        """Its own gradients for the finite ones of the outputs, 0 for the others."""
        wanted = torch.tensor([name in outputs for name in DIVERGENCES], device=found.device)
        return torch.where(wanted[:, None] & found.isfinite(), self.grad, 0).to(found.dtype)

    def heads(self, dtype=None, impl="triton", trains=(True, True, True), use_bias=True, **options):
        """Divergences and the gradients of hidden, weight and bias, those of `trains`."""
        as_asked = [x.detach().to(dtype or x.dtype).clone() for x in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = tensors = [x.requires_grad_(t) for x, t in zip(as_asked, trains, strict=True)]
        reference = [x.to(dtype or x.dtype) for x in (self.ref_hidden, self.ref_weight, self.ref_bias)]
        biases = {"bias": bias, "ref_bias": reference[2]} if use_bias else {}
        keywords = self.options(dtype, **options)
        found = linear_divergences(hidden, weight, *reference[:2], **biases, impl=impl, **keywords)
        chosen = [x for x, t in zip(tensors, trains, strict=True) if t and (use_bias or x is not bias)]
        return found.detach(), torch.autograd.grad(found, chosen, self.upstream(found, keywords["outputs"]))

    def rows(self, dtype=None, impl="triton", **options):
        """Divergences of the logits, and the gradient of the policy's."""
        logits, ref_logits = (x.detach().to(dtype or x.dtype) for x in (self.logits, self.ref_logits))
        logits, keywords = logits.clone().requires_grad_(), self.options(dtype, **options)
        found = logits_divergences(logits, ref_logits, impl=impl, **keywords)
        return found.detach(), torch.autograd.grad(found, [logits], self.upstream(found, keywords["outputs"]))

    def run(self, entry, dtype=None, impl="triton", **options):
        return getattr(self, entry)(dtype, impl, **options)


def assert_right(found, expected, dtype, counts, value=1e-5, rounding=None):
    """Divergences within 1e-5, gradients within what their own dtype makes of the exact ones, twice."""
    (values, gradients), (right, exact) = found, expected
    torch.testing.assert_close(values.double(), right, rtol=value, atol=value, equal_nan=True)
    assert not values[:, ~counts].any()
    rounding = rounding or (torch.finfo(dtype).eps if dtype is not torch.float32 else 2e-6)
    for x, y in zip(gradients, exact, strict=True):
        assert x.dtype is dtype
        assert torch.equal(x.isnan(), y.isnan())
        x, y = x.double().nan_to_num(), y.nan_to_num()
        assert (x - y).norm() <= rounding * y.norm() + 1e-5, (x - y).norm() / y.norm()


ALL = {"softcaps": (3.0, 4.0), "logit_scales": (0.7, 1.3)}
HEADS = [
    *((dtype, (40, 24), 69, extra) for dtype in DTYPES for extra in ({}, ALL)),  # rows that bulk loads can read
    *((dtype, (33, 40), 37, ALL) for dtype in DTYPES),  # others
    (torch.float32, (40, 33), 1, {}),
    (torch.float32, (40, 24), 2, {"softcaps": (None, 2.0)}),
    (torch.float32, (33, 24), 133, {"softcaps": (4.0, None), "use_bias": False}),
    (torch.float32, (40, 24), 301, {}),  # more than one range of columns
]


@pytest.mark.parametrize(("dtype", "widths", "vocabulary", "extra"), HEADS, ids=str)
def test_heads_agree_with_float64(device, dtype, widths, vocabulary, extra):
    problem = Problem(device, widths=widths, vocabulary=vocabulary, dtype=dtype).poisoned()
    found = problem.heads(scratch_bytes=1, **extra)
    assert_right(found, problem.heads(torch.float64, "tiled", **extra), dtype, problem.mask)


def spoilt(problem, kind):
    """With logits as no ordinary model makes them."""
    z, u = problem.logits, problem.ref_logits
    generator = torch.Generator().manual_seed(1)
    if kind == "large":
        for x in (z, u):
            x += 1e4 * torch.randint(-1, 2, x.shape, generator=generator).to(x)
    if kind == "forbidden":
        for x in (z, u):
            x[torch.rand(x.shape, generator=generator).to(x.device) > 0.7] = -math.inf
        z[0], z[0, 1] = -math.inf, 0.0  # a single token each, and not the same
        u[0], u[0, 2] = -math.inf, 0.0
        z[1], u[1] = -math.inf, 0.0  # no distribution at all
        z[2:9, 5:] = u[2:9, 5:] = -math.inf  # the same tokens, from here on nothing but these
        z[2:9, :5], u[2:9, :5] = (torch.randn(7, 5, generator=generator).to(z) for _ in range(2))
    return problem


ROWS = [
    *((torch.float32, vocabulary, "plain", 0.3) for vocabulary in (1, 2, 37, 64, 69)),
    *((dtype, 69, kind, 2.0) for dtype in DTYPES[1:] for kind in ("plain", "forbidden")),
    *((torch.float32, vocabulary, "large", 0.3) for vocabulary in (1, 2, 37)),
    *((torch.float32, 69, kind, alpha) for kind in ("large", "forbidden") for alpha in (0.3, 2.0)),
]


@pytest.mark.parametrize(("dtype", "vocabulary", "kind", "alpha"), ROWS, ids=str)
def test_logits_agree_with_float64(device, dtype, vocabulary, kind, alpha):
    problem = spoilt(Problem(device, 13, vocabulary=vocabulary, dtype=dtype), kind).poisoned()
    found, (right, exact) = (
        problem.rows(d, impl, alpha=alpha) for d, impl in ((None, "triton"), (torch.float64, "tiled"))
    )
    # a quotient of two rounded numbers of 1e4 is off by their rounding, and so is what is multiplied with it
    loose = {"value": 5e-3, "rounding": 3e-3} if kind == "large" else {}
    assert_right(found, (right, exact), dtype, problem.mask, **loose)
    assert not found[1][0][~problem.mask].any()
    assert not found[1][0][:, vocabulary:].any()
    if kind == "forbidden":
        finite = right[:, problem.mask].isfinite().sum(1)
        assert (finite > 1).all()
        assert right.isinf().any(1)[:2].all()


@pytest.mark.parametrize("entry", ["heads", "rows"])
@pytest.mark.parametrize("outputs", SUBSETS, ids="-".join)
def test_any_divergences(device, entry, outputs):
    problem = Problem(device, TOKENS[entry])
    found, expected = (problem.run(entry, *how, outputs=outputs) for how in ((), (torch.float64, "tiled")))
    assert_right(found, expected, torch.float32, problem.mask)
    chosen = torch.tensor([name in outputs for name in DIVERGENCES], device=device)
    assert not found[0][~chosen].any()
    assert found[0][chosen].any(1).all()


@pytest.mark.parametrize("entry", ["heads", "rows"])
@pytest.mark.parametrize("orders", [(0.5, 0.5), (2.0, 0.1), (0.01, 0.99), (7.0, 0.9)], ids=str)
def test_any_orders(device, entry, orders):
    problem = Problem(device, TOKENS[entry])
    options = {"outputs": ("renyi", "js"), "alpha": orders[0], "beta": orders[1]}
    found, expected = problem.run(entry, **options), problem.run(entry, torch.float64, "tiled", **options)
    assert_right(found, expected, torch.float32, problem.mask, rounding=1e-5)


@pytest.mark.parametrize("trains", [t for t in itertools.product([True, False], repeat=3) if any(t)], ids=str)
def test_only_the_gradients_that_are_needed(device, trains):
    problem = Problem(device)
    expected = problem.heads(torch.float64, "tiled", trains)
    assert_right(problem.heads(trains=trains), expected, torch.float32, problem.mask)


@pytest.mark.parametrize("entry", ["heads", "rows"])
@pytest.mark.parametrize("absent", [("ids",), ("loss_mask", "temperature"), ("vocabulary",)], ids=str)
def test_what_may_be_left_out(device, entry, absent):
    problem = Problem(device, TOKENS[entry], dtype=torch.bfloat16)
    options = dict.fromkeys(absent) | {"outputs": DIVERGENCES[: 6 if absent == ("ids",) else 8]}
    found, expected = problem.run(entry, **options), problem.run(entry, torch.float64, "tiled", **options)
    counts = torch.ones_like(problem.mask) if "loss_mask" in absent else problem.mask
    assert_right(found, expected, torch.bfloat16, counts)


@pytest.mark.parametrize("entry", ["heads", "rows"])
@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_model_forbids(device, entry, impl):
    allowed = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0]], device=device).bool()
    ref_allowed = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 0]], device=device).bool()
    generator = torch.Generator().manual_seed(0)
    z, u = (torch.randn(3, 4, generator=generator).to(device) for _ in range(2))
    z, u = z.masked_fill(~allowed, -math.inf), u.masked_fill(~ref_allowed, -math.inf)
    for alpha in (0.5, 2.0):
        found, gradients = [], []
        for row in range(3):
            options = {"impl": impl, "alpha": alpha, "outputs": DIVERGENCES[:6]}
            if entry == "rows":
                x = z[row : row + 1].detach().requires_grad_()
                values = logits_divergences(x, u[row : row + 1], **options)
            else:  # the logits of a bias alone
                nothing = torch.zeros(1, 16, device=device), torch.zeros(4, 16, device=device)
                x = z[row].detach().requires_grad_()
                values = linear_divergences(*nothing, *nothing, bias=x, ref_bias=u[row], **options)
            finite = torch.where(values.isfinite(), 1.0, 0.0)
            gradients.append(torch.autograd.grad(values, x, finite)[0].flatten())
            found.append(values[:6, 0])
        reverse_kl, forward_kl, renyi = torch.stack(found).T[:3]
        assert not torch.stack(found).isnan().any()
        assert reverse_kl.isinf().tolist() == [False, True, False]
        assert forward_kl.isinf().tolist() == [False, False, True]
        assert renyi.isinf().tolist() == [False, alpha > 1, False]
        gradient = torch.stack(gradients)
        assert gradient.isfinite().all()
        assert not gradient[~allowed].any()
        torch.testing.assert_close(gradient.sum(1), torch.zeros(3, device=device), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_a_nan_is_seen(device, impl, entry):
    problem = Problem(device, TOKENS[entry])
    (problem.hidden if entry == "heads" else problem.logits)[2] = math.nan
    (problem.ref_hidden if entry == "heads" else problem.ref_logits)[1] = math.nan
    problem.grad[:] = 1
    found, gradients = (
        problem.run(entry, None, impl, loss_mask=None, trains=(True, False, False))
        if entry == ("heads")
        else problem.run(entry, None, impl, loss_mask=None)
    )
    own = [DIVERGENCES.index(name) for name in ("reverse_kl", "forward_kl", "renyi", "js")]
    assert found[own][:, [1, 2]].isnan().all()
    assert not found[:, 3:].isnan().any()
    assert not gradients[0][3:].isnan().any()


def test_a_total_that_a_shift_takes_away(device):
    # the reference forbids what the policy hardly allows: its weight is 0 once a larger logit has come
    bias, ref_bias = torch.zeros(101, device=device), torch.zeros(101, device=device)
    bias[90], ref_bias[0] = 300.0, -math.inf
    nothing = torch.zeros(1, 16, device=device), torch.zeros(101, 16, device=device)
    for impl in IMPLS:
        found = linear_divergences(*nothing, *nothing, bias=bias, ref_bias=ref_bias, impl=impl, scratch_bytes=1)
        assert found[0].item() == pytest.approx(math.log(100), abs=1e-4)
        z = logits_divergences(bias[None], ref_bias[None], impl=impl)
        assert z[0].item() == pytest.approx(math.log(100), abs=1e-4)


@pytest.mark.parametrize("how", ["sliced", "transposed", "shifted", "expanded"])
@pytest.mark.parametrize("entry", ["heads", "rows"])
@pytest.mark.parametrize("masked", [True, False])
def test_any_strides(device, how, entry, masked, strided):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(3, 9, 24, generator=generator).to(device) for _ in range(2))
    x, y = (z[:1].expand(3, 9, 24) if how == "expanded" else z for z in (x, y))
    weight, ref_weight = (torch.randn(53, 24, generator=generator).to(device) * 0.3 for _ in range(2))
    ids = torch.randint(24 if entry == "rows" else 53, (3, 9), generator=generator).to(device)
    mask = (torch.rand(3, 9, generator=generator) > 0.3).to(device) if masked else None
    heat = (torch.rand(3, 1, generator=generator) + 0.5).to(device).expand(3, 9)
    results = []
    for impl in ("triton", "tiled"):

        def shaped(z, impl=impl):
            if impl == "tiled":
                return z.double().contiguous()
            return z if how == "expanded" else strided(z, how)

        a, b = shaped(x).detach().requires_grad_(), shaped(y)
        w, v = (strided(z, "sliced") if impl == "triton" else z.double() for z in (weight, ref_weight))
        w = w.detach().requires_grad_()
        options = {"ids": ids, "loss_mask": mask, "temperature": heat.to(a.dtype), "impl": impl}
        found = logits_divergences(a, b, **options) if entry == "rows" else linear_divergences(a, w, b, v, **options)
        found.square().sum().backward()
        results.append((found, a.grad, w.grad))
    for found, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("whose", [0, 1])
def test_logits_that_do_not_lie_alike(device, whose, strided):
    generator = torch.Generator().manual_seed(1)
    both = [torch.randn(4, 9, 24, generator=generator).to(device) for _ in range(2)]

    def measured(z, u):
        z = z.detach().requires_grad_()
        found = logits_divergences(z, u, impl="triton")
        return found.detach(), torch.autograd.grad(found.square().sum(), z)[0]

    expected = measured(*both)
    both[whose] = strided(both[whose], "shifted")
    assert all(torch.equal(x, y) for x, y in zip(measured(*both), expected, strict=True))


@pytest.mark.parametrize("entry", ["heads", "rows"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(device, tokens, entry):
    problem = Problem(device, tokens=tokens)
    found, gradients = problem.run(entry, loss_mask=None)
    assert found.shape == (8, tokens)
    assert not any(x.isnan().any() for x in (found, *gradients))


@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_a_batch_in_which_nothing_counts(device, entry):
    problem = Problem(device, TOKENS[entry])
    problem.mask[:] = False
    found, gradients = problem.poisoned().run(entry)
    assert not found.any()
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_rows_without_an_upstream_gradient(device, entry):
    problem = Problem(device, TOKENS[entry])
    problem.hidden[3:6], problem.logits[3:6] = math.inf, math.nan  # nothing of these rows is read again
    found, gradients = problem.run(entry)
    assert found[:, 3:6][:, problem.mask[3:6]].isnan().any()
    assert not any(x.isnan().any() for x in gradients)
    assert not gradients[0][3:6].any()


@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_rows_apart_do_not_change_a_row(device, entry):
    sizes = {"tokens": {"heads": 40, "rows": 20}[entry], "vocabulary": 69, "dtype": torch.bfloat16}
    problem, alone = Problem(device, **sizes), Problem(device, **sizes)
    once, again = problem.run(entry), problem.run(entry)
    assert torch.equal(once[0], again[0])
    assert all(torch.equal(x, y) for x, y in zip(once[1], again[1], strict=True))
    for name in ("hidden", "ref_hidden", "logits", "ref_logits", "ids", "mask", "heat"):
        setattr(alone, name, getattr(problem, name)[11:18])
    alone.grad = problem.grad[:, 11:18]
    part = alone.run(entry)
    assert torch.equal(part[0], once[0][:, 11:18])
    if entry == "rows":
        assert torch.equal(part[1][0], once[1][0][11:18])


def test_a_model_is_at_no_distance_from_itself(device):
    problem = Problem(device, widths=(40, 40))
    problem.ref_hidden, problem.ref_logits = problem.hidden, problem.logits
    problem.ref_weight, problem.ref_bias = problem.weight, problem.bias
    problem.logits += 30  # what all logits of a row have in common costs no digits
    problem.bias += 30
    for entry in ("heads", "rows"):
        found, gradients = problem.run(entry, outputs=DIVERGENCES[:4])
        assert found.abs().max() < 1e-6
        assert max(x.abs().max() for x in gradients) < 2e-5


@pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES[1::-1], DTYPES[1:]], ids=str)
def test_the_reference_may_have_another_precision(device, dtypes):
    problem, other = (Problem(device, dtype=dtype) for dtype in dtypes)
    for name in ("ref_hidden", "ref_weight", "ref_bias", "ref_logits"):
        setattr(problem, name, getattr(other, name))
    for entry in ("heads", "rows"):
        found, expected = problem.run(entry), problem.run(entry, torch.float64, "tiled")
        assert_right(found, expected, dtypes[0], problem.mask)


@pytest.mark.parametrize("bad", [-1, 69])
@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_an_id_outside_of_the_vocabulary(device, bad, entry):
    if device.type == "cuda":
        pytest.skip("the assertion ends all work on a GPU")
    problem = Problem(device, TOKENS[entry])
    problem.ids[1] = bad
    with pytest.raises(RuntimeError, match=r"ids of tokens that count must lie in \[0, 69\)"):
        problem.run(entry, loss_mask=None)


@pytest.mark.unhooked
@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_one_graph(device, entry):
    problem = Problem(device, TOKENS[entry])
    hidden, reference = problem.hidden.requires_grad_(), (problem.ref_hidden, problem.ref_weight[:69])

    def measured(x, mask):
        options = {"ids": problem.ids, "loss_mask": mask, "impl": "triton"}
        weight = problem.weight[:69]
        if entry == "rows":
            return logits_divergences(x @ weight.T, reference[0] @ reference[1].T, **options).square().sum()
        return linear_divergences(x, weight, *reference, **options).square().sum()

    compiled = torch.compile(measured, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(measured(hidden, problem.mask), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, problem.mask), hidden)[0], expected)


# uneven parts, one of a single column, one of padding alone
CUTS = {1: [0, 69], 2: [0, 60, 69], 3: [0, 1, 60, 69], 5: [0, 33, 34, 50, 69, 69]}
COLUMNS = {"weight": 0, "bias": 0, "ref_weight": 0, "ref_bias": 0, "logits": 1, "ref_logits": 1}


def part_of(problem, first, last):
    """All that has a column per token cut to a rank's part, with two more columns that are padding."""
    part = copy.copy(problem)
    for name, axis in COLUMNS.items():
        whole = getattr(problem, name)
        padding = torch.full_like(whole.narrow(axis, 0, 2 if whole.shape[axis] > 1 else 1), 50.0)
        setattr(part, name, torch.cat([whole.narrow(axis, first, last - first), padding], axis))
    part.vocabulary = last - first
    return part


def parts_agree(results, cuts, expected, tolerance, axes):
    """All ranks found the same as one process does, and their gradients are its parts along `axes`; None for all."""
    (right, exact), (found, gradients) = expected, results[0]
    torch.testing.assert_close(found.double(), right, **tolerance)
    assert all(torch.equal(other, found) for other, _ in results)
    for k, (whole, axis) in enumerate(zip(exact, axes, strict=True)):
        if axis is None:
            torch.testing.assert_close(gradients[k].double(), whole, **tolerance)
            assert all(torch.equal(own[k], gradients[k]) for _, own in results)
            continue
        widths = [last - first for first, last in itertools.pairwise(cuts)]
        pieces = [own[k].split([n, own[k].shape[axis] - n], axis) for n, (_, own) in zip(widths, results, strict=True)]
        ours = torch.cat([piece for piece, _ in pieces], axis)
        torch.testing.assert_close(ours.double(), whole.narrow(axis, 0, cuts[-1]), **tolerance)
        assert not any(padding.any() for _, padding in pieces)


def close(impl):
    return {"rtol": 1e-11, "atol": 1e-11} if impl == "tiled" else {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("entry", ["heads", "rows"])
def test_shards_of_two_models_are_the_whole(device, entry, impl, size, simulated_group):
    problem = Problem(device, TOKENS[entry], widths=(33, 40))
    problem.ids[::2] = 60  # where a tile reaches over the end of a shard
    problem.poisoned()
    dtype = torch.float64 if impl == "tiled" else torch.float32
    cuts, group = CUTS[size], simulated_group(size)

    def rank(i):
        part, shard = part_of(problem, cuts[i], cuts[i + 1]), Shard(cuts[i], 69, group.group_name)
        return part.run(entry, dtype, impl, shard=shard)

    expected = problem.run(entry, torch.float64, "tiled")
    parts_agree(group.run(rank), cuts, expected, close(impl), (None, 0, 0) if entry == "heads" else (1,))


@pytest.mark.parametrize("size", CUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_shards_of_logits_are_the_whole(device, impl, size, simulated_group):
    problem = Problem(device, 13)
    problem.ids[::2] = 60
    problem.poisoned()
    dtype = torch.float64 if impl == "tiled" else torch.float32
    cuts, group = CUTS[size], simulated_group(size)

    def run(part, dtype, impl, shard=None):
        x, heat = part.logits.to(dtype).clone().requires_grad_(), part.heat.to(dtype)
        options = {"loss_mask": part.mask, "temperature": heat, "vocabulary": part.vocabulary, "impl": impl}
        found = logits_statistics(x, part.ids, shard=shard, **options)
        return found.detach(), torch.autograd.grad(found, [x], part.grad[:5].to(dtype))

    def rank(i):
        shard = Shard(cuts[i], 69, group.group_name)
        return run(part_of(problem, cuts[i], cuts[i + 1]), dtype, impl, shard)

    parts_agree(group.run(rank), cuts, run(problem, torch.float64, "tiled"), close(impl), (1,))


def test_a_target_behind_the_end_of_a_shard(device, simulated_group):
    problem, cuts, group = Problem(device, widths=(33, 33)), CUTS[2], simulated_group(2)
    problem.ids[:] = torch.arange(25) + 44

    def rank(i):
        shard = Shard(cuts[i], 69, group.group_name)
        return linear_statistics(
            problem.hidden, problem.weight[cuts[i] : cuts[i + 1]], problem.ids, impl="triton", shard=shard
        )

    whole = problem.hidden.double(), problem.weight[:69].double()
    expected = linear_statistics(*whole, problem.ids, impl="tiled")
    for found in group.run(rank):
        torch.testing.assert_close(found.double(), expected, **close("triton"))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_sum_over_shards_is_rounded_once(device, impl, simulated_group):
    problem, cuts, group = Problem(device, dtype=torch.bfloat16), CUTS[3], simulated_group(3)

    def rank(i):
        part, shard = part_of(problem, cuts[i], cuts[i + 1]), Shard(cuts[i], 69, group.group_name)
        return part.heads(None, impl, (True, False, False), shard=shard)

    exact, whole = (problem.heads(dtype, impl)[1][0] for dtype, impl in ((torch.float64, "tiled"), (None, impl)))
    for _, (found,) in group.run(rank):
        assert found.dtype is torch.bfloat16
        assert (found.double() - exact).norm() <= 1.05 * (whole.double() - exact).norm()
