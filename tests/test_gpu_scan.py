"""GAE's recurrence in Triton: against a loop, across the borders of its blocks and chunks, and behind `gae`."""

# pyright: reportArgumentType=false, reportCallIssue=false

import math
import re
from functools import partial

import pytest
import torch
from rlloss_kernels import reverse_recurrence_
from torch._dynamo.utils import counters

from rlloss.advantages.gae import gae

pytest.importorskip("triton")

NAN = math.nan
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["tiled", "triton"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Short rows then have several blocks and chunks, and folds of folds."""
    set_blocks(monkeypatch, 4, 1)


def set_blocks(monkeypatch, block, steps):
    monkeypatch.setattr("rlloss_kernels.gpu.scan.BLOCK", block)
    monkeypatch.setattr("rlloss_kernels.gpu.scan.STEPS", steps)


def draw(*shape, seed=0):
    """Decays, every ninth of which cuts, and rewards."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(shape, generator=generator).double(), torch.randn(shape, generator=generator).double()
    return torch.where(torch.rand(shape, generator=generator) < 1 / 9, 0, a).to(DEVICE), b.to(DEVICE)


def solved(a, b, impl="triton", cuts=True):
    y = b.clone()
    reverse_recurrence_(a.clone(), y, cuts=cuts, impl=impl)
    return y


def by_loop(a, b):
    y = b.clone()
    for t in reversed(range(b.shape[-1] - 1)):
        y[..., t] = b[..., t] + torch.where(a[..., t] == 0, 0, a[..., t] * y[..., t + 1])
    return y


assert_same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12, equal_nan=True)


# columns below, at and above whole blocks and chunks; from 65 on, the folds have folds
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 4), (2, 5), (3, 8), (3, 9), (2, 1, 17), (1, 65), (98,)])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_recurrence_agrees_with_a_loop(shape, impl):
    a, b = draw(*shape)
    assert_same(solved(a, b, impl), by_loop(a, b))
    a = a + 0.01
    assert_same(solved(a, b, impl, cuts=False), by_loop(a, b))


@pytest.mark.parametrize("shape", [(1, 1025), (2, 17)])
def test_blocks_of_their_true_size_agree_with_a_loop(shape, monkeypatch):
    set_blocks(monkeypatch, 1024, 8)
    a, b = draw(*shape)
    assert_same(solved(a, b), by_loop(a, b))


@pytest.mark.parametrize("size", [(2, 1), (4, 3), (16, 2), (128, 8)])
def test_the_size_of_blocks_changes_nothing(size, monkeypatch):
    set_blocks(monkeypatch, *size)
    a, b = draw(2, 50)
    assert_same(solved(a + 0.3, b), by_loop(a + 0.3, b))


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_passes_a_cut_wherever_it_is(impl, bad):
    a, b = draw(10, 11)
    a += 0.1
    a.diagonal().zero_()
    b.diagonal(1).fill_(bad)
    a.diagonal(1).zero_()
    y = solved(a, b, impl)
    assert_same(y, by_loop(a, b))
    assert torch.equal(y.isfinite(), b.isfinite())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_reaches_all_before_it(impl):
    a, b = draw(11, 11)
    a += 0.1
    b.diagonal().fill_(NAN)
    assert torch.equal(solved(a, b, impl).isnan(), torch.ones(11, 11, device=DEVICE).bool().tril())


def test_rows_and_what_lies_around_them_stay_apart():
    a, b = draw(5, 23)
    a += 0.1
    b[2] = NAN
    around_a, around_b = torch.full((2, 9, 23), NAN, dtype=torch.float64, device=DEVICE)
    around_a[2:-2], around_b[2:-2] = a, b
    reverse_recurrence_(around_a[2:-2], around_b[2:-2], cuts=True, impl="triton")
    assert_same(around_b[2:-2], by_loop(a, b))
    assert not around_b[[2, 3, 5, 6]].isnan().any()
    assert around_b[[0, 1, 4, 7, 8]].isnan().all()


def test_what_memory_held_is_not_read(monkeypatch):
    a, b = draw(2, 30)
    expected = solved(a, b)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **kind: new_empty(x, *size, **kind).fill_(NAN))
    assert torch.equal(solved(a, b), expected)


def test_a_result_is_the_same_again_and_in_every_batch():
    a, b = draw(2, 23)
    y = solved(a, b)
    assert torch.equal(solved(a, b), y)
    for row in range(2):
        assert torch.equal(solved(a[row], b[row]), y[row])


def test_any_strides():
    a, b = draw(3, 22)
    expected = by_loop(a, b)
    transposed = b.T.contiguous().T
    reverse_recurrence_(a.T.contiguous().T, transposed, cuts=True, impl="triton")
    assert_same(transposed, expected)
    columns = torch.full((3, 44), NAN, dtype=torch.float64, device=DEVICE)
    columns[:, ::2] = b
    reverse_recurrence_(a.clone(), columns[:, ::2], cuts=True, impl="triton")
    assert_same(columns[:, ::2], expected)
    assert columns[:, 1::2].isnan().all()
    one = a[:1].expand(3, 22)
    y = b.clone()
    torch.ops.rlloss_kernels.reverse_recurrence_(one, y, True, "triton")
    assert_same(y, by_loop(one, b))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (0, 0), (2, 0, 3)])
def test_nothing_to_do(shape):
    assert solved(*draw(*shape)).shape == shape


def test_lower_precision_is_that_of_the_result_alone():
    a, b = (x.float() for x in draw(2, 23))
    assert torch.equal(solved(a, b), solved(a.double(), b.double()).float())


def batch(rows=4, columns=13, seed=0):
    """Rewards, values, mask and last values in float64; the third row holds no trained token."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(rows, columns, generator=generator) > 0.3
    mask[2:3] = False
    last_value = torch.randn(rows, generator=generator, dtype=torch.float64)
    return tuple(x.to(DEVICE) for x in (rewards, values, mask, last_value))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.97, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("columns", [1, 13])
def test_gae_agrees_with_its_tiles(columns, gamma, gae_lambda):
    rewards, values, mask, last_value = batch(columns=columns)
    rewards[~mask] = NAN
    args = (gamma, gae_lambda, last_value)
    tiled, triton = (gae(rewards, values, mask, *args, impl=impl) for impl in IMPLS)
    assert_same(triton, tiled)
    cu_seqlens = torch.arange(5, device=DEVICE) * columns
    packed = gae(*(x.flatten() for x in (rewards, values, mask)), *args, cu_seqlens=cu_seqlens, impl="triton")
    assert_same(tuple(x.view(4, columns) for x in packed), tiled)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_gae_takes_the_implementation_that_it_is_told(impl, monkeypatch):
    taken = []
    monkeypatch.setattr("rlloss_kernels.gpu.scan.reverse_scan_", lambda a, b: taken.append(b.shape))
    rewards, values, mask, _ = batch()
    gae(rewards, values, mask, 0.9, 0.95, impl=impl)
    assert taken == ([(4, 14)] if impl == "triton" or (impl == "auto" and DEVICE == "cuda") else [])


def test_a_nan_stays_in_its_sequence_of_a_pack():
    rewards, values, mask, last_value = batch()
    mask[:, :1] = True
    cu_seqlens = torch.arange(5, device=DEVICE) * 13
    expected = gae(rewards, values, mask, 0.9, 0.9, last_value, impl="triton")
    rewards[1, 0] = NAN
    args = (x.flatten() for x in (rewards, values, mask))
    others = [0, 2, 3]
    for x, y in zip(gae(*args, 0.9, 0.9, last_value, cu_seqlens=cu_seqlens, impl="triton"), expected, strict=True):
        assert_same(x.view(4, 13)[others], y[others])
        assert x.view(4, 13)[1, 0].isnan()


def compiled(backend):
    torch._dynamo.reset()
    counters.clear()
    fixed = partial(gae, gamma=0.9, gae_lambda=0.95)
    return fixed, torch.compile(fixed, backend=backend, fullgraph=True, dynamic=True)


@pytest.mark.unhooked
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_graph_serves_every_length(packed):
    fixed, graph = compiled("aot_eager")
    for seed, (rows, columns) in enumerate([(2, 5), (3, 9)]):
        *tokens, last_value = batch(rows, columns, seed)
        more = {"last_value": last_value}
        if packed:
            more["cu_seqlens"] = torch.arange(rows + 1, device=DEVICE) * columns
            tokens = [x.flatten().clone() for x in tokens]
        assert_same(graph(*tokens, **more, impl="triton"), fixed(*tokens, **more, impl="tiled"))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.unhooked
def test_auto_can_be_compiled():
    fixed, graph = compiled("eager")
    tokens = batch(4, 5)[:3]
    assert_same(graph(*tokens), fixed(*tokens, impl="tiled"))


@pytest.mark.unhooked
def test_an_implementation_that_cannot_be_teaches(monkeypatch):
    x, mask = torch.zeros(2, 4), torch.ones(2, 4).bool()
    unknown = "gae: impl must be one of ['auto', 'tiled', 'triton'], got 'tritn'; did you mean 'triton'?"
    with pytest.raises(ValueError, match=re.escape(unknown)):
        gae(x, x, mask, 1.0, 0.95, impl="tritn")
    with pytest.raises(ValueError, match="impl must be one of"):
        reverse_recurrence_(x.double(), x.double(), cuts=True, impl="tritn")
    monkeypatch.setattr("rlloss_kernels.implementation.is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=re.escape("gae: impl='triton' is impossible here: the tensors are on cpu")):
        gae(x, x, mask, 1.0, 0.95, impl="triton")
    with pytest.raises(ValueError, match=r"^impl='triton' is impossible here: the tensors are on cpu"):
        reverse_recurrence_(x.double(), x.double(), cuts=True, impl="triton")
    expected = gae(x + 1, x, mask, 1.0, 0.95, impl="tiled")
    assert_same(gae(x + 1, x, mask, 1.0, 0.95), expected)
