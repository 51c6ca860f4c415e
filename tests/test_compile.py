"""Law 8: `torch.compile(fullgraph=True, dynamic=True)` makes one graph of every loss, and none waits for its device."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

pytestmark = pytest.mark.unhooked

SHAPES = [(4, 5), (6, 9), (3, 12)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()


def assert_compiles_to_one_graph(case, backend, rtol, layout=lambda step: step):
    compiled = torch.compile(case(), backend=CompileCounterWithBackend(backend), fullgraph=True, dynamic=True)
    for seed, (rows, columns) in enumerate(SHAPES):
        step = layout(case.step(rows, columns, seed=seed).to(torch.float32))
        out, grads = case.run(step, compiled)
        expected_out, expected_grads = case.run(step)
        torch.testing.assert_close(out.loss, expected_out.loss, rtol=rtol, atol=rtol)
        torch.testing.assert_close(grads, expected_grads, rtol=rtol, atol=rtol)
        torch.testing.assert_close(out.metrics, expected_out.metrics, rtol=rtol, atol=rtol)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_law_8_one_graph_serves_every_length(case):
    assert_compiles_to_one_graph(case, "eager", rtol=0, layout=lambda step: step.packed())


ONE_OF_EACH = [
    "sft",
    "sft_whole",
    "dft",
    "distillation",
    "apo_zero_unpaired",
    "bco",
    "margin_ranking",
    "rao_kupper",
    "davidson",
    "plackett_luce",
    "reward_regression",
    "process_reward",
    "dpo_smoothed",
    "ipo",
    "simpo",
    "kto_weighted",
    "bradley_terry",
    "value",
    "ppo",
    "actor_critic",
    "dapo",
    "reinforce",
    "rloo",
    "grpo_dual_clip",
    "dr_grpo",
    "gspo",
    "conservative_ppo",
    "conservative_ppo_sequence",
    "kimi",
    "dro",
    "a_star_po",
    "cpgd",
    "dppo_kl",
    "opsm",
    "decoupled_ppo",
    "clip_cov",
    "kl_cov",
    "m2po",
    "dpo_alpha",
    "discopop",
    "bco_pair",
    "beta_dpo",
    "tdpo",
    "aot_unpaired",
    "orpo",
]


@pytest.mark.parametrize("case", [*ONE_OF_EACH, "aot"], indirect=True)
def test_law_8_the_graph_has_a_backward(case):
    assert_compiles_to_one_graph(case, "aot_eager", rtol=1e-6)


@pytest.mark.parametrize("case", ["sft", "dpo", "grpo", "kto", "bradley_terry", "value"], indirect=True)
def test_law_8_inductor_agrees(case):
    assert_compiles_to_one_graph(case, "inductor", rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_law_8_a_loss_reads_no_value(case, packed):
    # a tensor without values can be computed with, but never waited for
    step = case.step()
    step = (step.packed() if packed else step).to("meta")
    out, _ = case.run(step)
    assert out.loss.is_meta
    assert all(x.is_meta for metric in out.metrics.values() for x in metric)
