"""The threads under the kernels: who works on what, and what of the process they leave alone."""

import multiprocessing
import threading

import pytest
import torch
from rlloss_kernels.workers import in_parallel, shares, worker_count

import rlloss


@pytest.fixture(params=[1, 2, 3])
def threads(request, threads_put_back):
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.parametrize(("count", "workers"), [(0, 3), (1, 3), (3, 3), (7, 3), (8, 2), (2, 5)])
def test_shares_are_whole_ordered_and_even(count, workers):
    cut = shares(range(count), workers)
    assert [i for share in cut for i in share] == list(range(count))
    assert len(cut) == min(count, workers)
    assert max(map(len, cut), default=0) - min(map(len, cut), default=0) <= 1


def test_every_part_has_a_thread_with_one_core_and_no_gradients(threads):
    seen = {}

    def work(part):
        seen[part] = threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()
        barrier.wait(10)  # all at the same time

    barrier = threading.Barrier(threads)
    in_parallel(work, range(threads))
    assert len({ident for ident, _, _ in seen.values()}) == threads
    if threads > 1:
        assert {(cores, grad) for _, cores, grad in seen.values()} == {(1, False)}
    assert torch.get_num_threads() == threads == worker_count(torch.device("cpu"))
    assert worker_count(torch.device("meta")) == 1
    found = []
    new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert found == [threads]


@pytest.mark.unhooked
def test_what_a_worker_raises_is_raised(threads):
    def work(part):
        if part == threads - 1:
            raise ZeroDivisionError(part)

    with pytest.raises(ZeroDivisionError, match=str(threads - 1)):
        in_parallel(work, range(threads))


def results(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 8, generator=generator).requires_grad_() for n in (50, 300))
    ids = torch.randint(300, (50,), generator=generator)
    stats = rlloss.linear_logprobs(hidden, weight, ids, outputs=("logprobs", "entropy"))
    of_logits = rlloss.token_logprobs((hidden @ weight.mT).detach().requires_grad_(), ids).logprobs
    grads = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), (hidden, weight))
    return [x.detach() for x in (*stats[:2], of_logits, *grads)]


def test_the_number_of_threads_changes_no_result(threads):
    torch.set_num_threads(1)
    alone = results()
    torch.set_num_threads(threads)
    for x, y in zip(results(), alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip(results(), results(), strict=True))


def _in_child(queue):
    seen = []
    in_parallel(seen.append, range(2))
    queue.put(sorted(seen))


@pytest.mark.unhooked
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own():
    in_parallel(lambda part: None, range(2))  # threads that the child does not inherit
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=60) == [0, 1]
    child.join()
