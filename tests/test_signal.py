"""Signal's interface: the blocks of its documentation, the order of calls, runs, checkpoints and errors that teach."""

import asyncio
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.adapters.signal import LOSSES, Client, TrainingClient
from rlloss.adapters.signal import models as models_of_signal
from rlloss.loop import Session, frozen_copy, load_scalar_model


def tiny_llama(seed=0, **changed):
    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2, "vocab_size": 10, "initializer_range": 0.2} | changed
    return LlamaForCausalLM(LlamaConfig(pad_token_id=0, eos_token_id=1, **size))


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model on disk, which stands for meta-llama/Llama-3.2-1B."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_llama(1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def session_of(tokenizer, **options):
    model = tiny_llama()
    critic = rlloss.ScalarModel(model)
    return Session(model, tokenizer, reference=frozen_copy(tiny_llama(1)), critic=critic, learning_rate=1e-2, **options)


def reward_session(tokenizer):
    return Session(rlloss.ScalarModel(tiny_llama(), bias=False), tokenizer, learning_rate=1e-2)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(seed=0):
    ids = torch.randint(2, 10, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask}


def ppo_batch():
    rewards = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0.5, 0, 0]).view(3, 6)
    return {**text(), "old_log_probs": numbers(3, 6) - 2.3, "rewards": rewards}


def pairs():
    return {f"{side}_{name}": x for i, side in enumerate(("chosen", "rejected")) for name, x in text(i).items()}


def grpo_batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "prompt_ids": torch.randint(2, 10, (2, 3), generator=generator),
        "response_ids": torch.randint(2, 10, (2, 4, 5), generator=generator),
        "rewards": numbers(2, 4, seed=3),
        "response_masks": torch.ones(2, 4, 5),
    }


def is_batch():
    return {**text(), "behavior_log_probs": torch.tensor([-13.0, -5.0, -8.0]), "rewards": numbers(3)}


def run(coroutine):
    return asyncio.run(coroutine)


# the blocks of Signal's documentation, with only the reference's name replaced


async def block_enhanced_ppo(training_client, llama):
    return await training_client.forward_backward(
        batch_data=ppo_batch(),
        loss_fn="enhanced_ppo",
        loss_kwargs={
            "use_gae": True,  # Enable GAE
            "gamma": 0.99,  # Discount factor
            "gae_lambda": 0.95,  # GAE lambda parameter
            "clip_epsilon": 0.2,  # PPO clip parameter
            "value_loss_coef": 0.5,  # Value function weight
            "entropy_coef": 0.01,  # Entropy bonus weight
            "beta": 0.01,  # KL penalty coefficient
            "clip_value_loss": True,  # Clip value loss
            "reference_model": llama,  # For KL penalty
        },
    )


async def block_dpo(training_client, llama):
    return await training_client.forward_backward(
        batch_data=pairs(),
        loss_fn="dpo",
        loss_kwargs={
            "beta": 0.1,  # KL penalty coefficient
            "reference_model": llama,
            "label_smoothing": 0.0,  # Conservative DPO (optional)
        },
    )


async def block_grpo(training_client, llama):
    return await training_client.forward_backward(
        batch_data=grpo_batch(),
        loss_fn="grpo",
        loss_kwargs={
            "beta": 0.01,  # KL penalty
            "clip_epsilon": 0.2,  # PPO clipping
            "reference_model": llama,
        },
    )


async def block_importance_sampling(training_client, llama):
    return await training_client.forward_backward(
        batch_data=is_batch(),
        loss_fn="importance_sampling",
        loss_kwargs={
            "beta": 0.1,  # KL penalty
            "clip_ratio": 10.0,  # Clip importance weights
            "reference_model": llama,
        },
    )


async def block_conservative_ppo(training_client, llama):
    return await training_client.forward_backward(
        batch_data=ppo_batch(),
        loss_fn="conservative_ppo",
        loss_kwargs={
            "conservative_coef": 0.1,  # Penalty coefficient
            "max_kl_divergence": 0.01,  # KL threshold
            "clip_epsilon": 0.2,
            "reference_model": llama,
        },
    )


async def block_reward_modeling(training_client, llama):
    return await training_client.forward_backward(
        batch_data=pairs(),
        loss_fn="reward_modeling",
        loss_kwargs={
            "margin": 1.0,  # Margin for preference
            "temperature": 0.1,  # Scaling temperature
        },
    )


BLOCKS = [
    (block_enhanced_ppo, "policy_loss value_loss entropy kl_divergence approx_kl clip_fraction advantage_mean "
     "advantage_std explained_variance value_mean return_mean reward_mean"),
    (block_dpo, "implicit_reward chosen_reward rejected_reward reward_margin preference_accuracy"),
    (block_grpo, ""),
    (block_importance_sampling, "is_ratio_mean is_ratio_max is_ratio_min clipped_fraction"),
    (block_conservative_ppo, "kl_violation kl_penalty max_kl_threshold"),
    (block_reward_modeling, "preference_accuracy reward_margin chosen_reward_mean rejected_reward_mean "
     "chosen_reward_std rejected_reward_std"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "names"), BLOCKS, ids=[block.__name__ for block, _ in BLOCKS])
def test_a_block_of_the_documentation_runs_and_trains(block, names, folder):
    client = Client()
    run_id = client.create_run(folder, reward_model=block is block_reward_modeling)
    training_client = client.get_training_client(run_id)
    before = torch.cat([p.detach().flatten() for p in training_client.session.model.parameters()])
    result = run(block(training_client, folder))
    assert set(names.split()) <= set(result["metrics"])
    assert result["step"] == 0
    step = run(training_client.optim_step())
    assert step["grad_norm"] > 0
    assert step["learning_rate"] == 1e-5
    assert step["step"] == 1
    after = torch.cat([p.detach().flatten() for p in training_client.session.model.parameters()])
    assert not torch.equal(before, after)


def test_the_three_stages_of_the_documentation_learn(folder):
    client = Client()
    training_client = client.get_training_client(client.create_run(folder, learning_rate=1e-2))
    reward_run_id = client.create_run(folder, reward_model=True, learning_rate=1e-2)
    sft_data, preference_data, rl_data = [text()] * 15, [pairs()] * 15, [ppo_batch()] * 3
    seen: dict[str, list[Any]] = {"causal_lm": [], "reward_modeling": [], "enhanced_ppo": []}

    async def pipeline():
        # Stage 1: Supervised Fine-Tuning
        for batch in sft_data:
            seen["causal_lm"].append(await training_client.forward_backward(batch, "causal_lm"))
            await training_client.optim_step()

        # Stage 2: Reward Model Training
        reward_client = client.get_training_client(reward_run_id)
        for batch in preference_data:
            seen["reward_modeling"].append(await reward_client.forward_backward(batch, "reward_modeling"))
            await reward_client.optim_step()

        # Stage 3: PPO Policy Training
        for batch in rl_data:
            result = await training_client.forward_backward(batch, "enhanced_ppo", {
                "use_gae": True,
                "reference_model": folder,
            })  # fmt: skip
            seen["enhanced_ppo"].append(result)
            await training_client.optim_step()

    run(pipeline())
    assert seen["causal_lm"][-1]["loss"] < 0.7 * seen["causal_lm"][0]["loss"]
    assert seen["reward_modeling"][-1]["metrics"]["preference_accuracy"] == 1
    assert seen["reward_modeling"][-1]["loss"] < 0.1 * seen["reward_modeling"][0]["loss"]
    assert [result["step"] for result in seen["enhanced_ppo"]] == [15, 16, 17]
    assert seen["enhanced_ppo"][0]["metrics"]["kl_divergence"] > 0.01  # the SFT has left the reference


# references


def test_a_reference_is_found_by_name_as_base_as_a_module_or_in_the_session(folder, tokenizer, monkeypatch):
    client = Client()
    first = client.get_training_client(client.create_run(folder, critic=None))
    second = client.get_training_client(client.create_run(folder, critic=None))
    loads, load = [], models_of_signal.load_language_model

    def counted(name, **options):
        loads.append(name)
        return load(name, **options)

    monkeypatch.setattr(models_of_signal, "load_language_model", counted)
    # a step away from the start, so that the reference shows
    run(first.forward_backward(text()))
    run(first.optim_step(learning_rate=0.1))
    by_name = run(first.forward_backward(pairs(), "dpo", {"reference_model": folder}))
    base = run(first.forward_backward(pairs(), "dpo", {"reference_model": "base"}))
    module = run(first.forward_backward(pairs(), "dpo", {"reference_model": frozen_copy(tiny_llama(1))}))
    assert by_name == base
    assert module["loss"] == pytest.approx(by_name["loss"], rel=1e-6)
    other = run(first.forward_backward(pairs(), "dpo", {"reference_model": frozen_copy(tiny_llama(3))}))
    assert other["loss"] != pytest.approx(by_name["loss"], rel=1e-3)
    run(second.forward_backward(pairs(), "dpo", {"reference_model": folder}))
    assert loads == [folder]  # once for both runs
    assert first.session.reference is None
    # a session's own stands in where none is named
    own = TrainingClient(session_of(tokenizer))
    unnamed = run(own.forward_backward(pairs(), "dpo"))
    assert unnamed == run(own.forward_backward(pairs(), "dpo", {"reference_model": "base"}))
    named = run(own.forward_backward(pairs(), "dpo", {"reference_model": frozen_copy(tiny_llama(3))}))
    assert named["loss"] != pytest.approx(unnamed["loss"], rel=1e-3)


def test_a_module_becomes_a_frozen_reference_and_never_the_trained_model(tokenizer):
    client = TrainingClient(session_of(tokenizer))
    reference = tiny_llama(1, attention_dropout=0.5).train()
    kls = [
        run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"reference_model": reference}))["metrics"]
        for _ in range(2)
    ]
    assert kls[0] == kls[1]
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    model = client.session.model
    for own in (model, model.model):  # the model, and what is in it
        with pytest.raises(ValueError, match=r"holds the weights that this run trains.*frozen_copy\(model\)"):
            run(client.forward_backward(pairs(), "dpo", {"reference_model": own}))
    assert all(p.requires_grad for p in model.parameters())


def test_a_folder_that_was_written_anew_is_read_anew(folder, tokenizer, tmp_path):
    client = Client()
    training_client = client.get_training_client(client.create_run(folder, critic=None))
    other = client.get_training_client(client.create_run(folder, critic=None))
    models = client._references._models

    async def margin_after_saving():
        await training_client.save_model(tmp_path / "now")
        kwargs = {"reference_model": tmp_path / "now"}
        result = await training_client.forward_backward(pairs(), "dpo", kwargs)
        await training_client.optim_step(learning_rate=1e-2)
        return result["metrics"]["reward_margin"]

    # the reference is what was saved just now
    assert [run(margin_after_saving()) for _ in range(3)] == pytest.approx([0.0] * 3, abs=1e-7)
    assert len(models) == 1  # those of before are gone
    relative = {"reference_model": os.path.relpath(tmp_path / "now")}
    run(training_client.forward_backward(pairs(), "dpo", relative))
    run(other.forward_backward(pairs(), "dpo", {"reference_model": str(tmp_path / "now")}))
    assert len(models) == 1  # one folder by three names


def test_base_is_what_the_run_started_from_even_where_its_folder_was_written(folder, tmp_path):
    start = shutil.copytree(folder, tmp_path / "start")
    client = Client()
    early, late = (client.get_training_client(client.create_run(start, critic=None)) for _ in range(2))

    async def from_base(training_client):
        return (await training_client.forward_backward(pairs(), "dpo", {"reference_model": "base"}))["loss"]

    run(early.forward_backward(text()))
    run(early.optim_step(learning_rate=1e-2))
    before = run(from_base(early))
    run(early.save_model(start))
    assert run(from_base(early)) == before  # it is in memory
    run(from_base(late))  # for all who started from there


def test_base_that_was_overwritten_before_it_was_read_is_missed(folder, tmp_path):
    start = shutil.copytree(folder, tmp_path / "start")
    client = Client()
    training_client = client.get_training_client(client.create_run(start, critic=None))
    run(training_client.save_model(start))
    with pytest.raises(ValueError, match=r"'base' is what the run started from, and the folder .* has been written"):
        run(training_client.forward_backward(pairs(), "dpo", {"reference_model": "base"}))


# the order of calls


def gradient_of(session):
    return torch.cat([p.grad.flatten() for p in session.model.parameters()])


def test_pipelined_calls_keep_their_order_and_add_up(tokenizer, monkeypatch):
    one, both = session_of(tokenizer), session_of(tokenizer)
    for batch in (text(0), text(5)):
        one.forward_backward(_loop_batch(batch), rlloss.SFTLoss())
    expected = gradient_of(one)
    client, order, seen = TrainingClient(both), [], []
    calls, step = both.forward_backward, both.optim_step

    def slow_first(batch, loss_fn):
        order.append("begin")
        time.sleep(0.2 if len(order) == 1 else 0)
        out = calls(batch, loss_fn)
        order.append("end")
        return out

    def watched_step():
        seen.append(gradient_of(both))
        order.append("step")
        return step()

    monkeypatch.setattr(both, "forward_backward", slow_first)
    monkeypatch.setattr(both, "optim_step", watched_step)

    async def pipelined():
        calls = [client.forward_backward(text(0)), client.forward_backward(text(5)), client.optim_step()]
        return await asyncio.gather(*calls)

    first, second, update = run(pipelined())
    assert order == ["begin", "end", "begin", "end", "step"]
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-8)
    assert first["loss"] != second["loss"]
    assert (first["step"], second["step"], update["step"]) == (0, 0, 1)


def _loop_batch(batch):
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(-1).tolist(), strict=True)
    return rlloss.loop.collate([rlloss.loop.Tokens(ids[:n], [False] + [True] * (n - 1)) for ids, n in rows])


def test_the_event_loop_stays_free_while_a_run_works(tokenizer, monkeypatch):
    session = session_of(tokenizer)
    threads = set()

    def slow(batch, loss_fn):
        threads.add(threading.current_thread())
        time.sleep(0.3)
        return 0.0, {}

    monkeypatch.setattr(session, "forward_backward", slow)
    client = TrainingClient(session)

    async def both():
        ticks = 0
        work = asyncio.create_task(client.forward_backward(pairs(), "dpo"))
        while not work.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(KeyError):  # the stand-in reports nothing
            await work
        return ticks

    assert run(both()) >= 10
    assert threading.main_thread() not in threads


def test_clients_of_one_session_share_its_queue_and_those_of_two_do_not(tokenizer, monkeypatch):
    shared = session_of(tokenizer)
    busy, most = [0], [0]

    def counted(folder, info=None):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.1)
        busy[0] -= 1
        return Path(folder)

    async def save(*clients):
        await asyncio.gather(*(client.save_state("nowhere") for client in clients))

    for session in (shared, other := session_of(tokenizer)):
        monkeypatch.setattr(session, "save_state", counted)
    run(save(TrainingClient(shared), TrainingClient(shared)))
    assert most == [1]
    run(save(TrainingClient(shared), TrainingClient(other)))
    assert most == [2]


def test_a_call_reads_what_it_was_given_when_it_was_started(tokenizer):
    expected = run(TrainingClient(session_of(tokenizer)).forward_backward(text(), "causal_lm"))["loss"]
    client = TrainingClient(session_of(tokenizer))
    ids = text()["input_ids"]
    batches = [{**text(), "input_ids": given} for given in (ids.clone(), ids.numpy().copy(), ids.tolist())]

    async def mutated():
        calls = [asyncio.create_task(client.forward_backward(batch, "causal_lm")) for batch in [text(), *batches]]
        await asyncio.sleep(0)  # all have started, and three wait
        batches[0]["input_ids"].fill_(3)
        batches[1]["input_ids"].fill(3)
        batches[2]["input_ids"][0][:] = [3] * 6
        return [result["loss"] for result in await asyncio.gather(*calls)]

    assert run(mutated()) == [expected] * 4


def test_a_cancelled_call_never_runs_or_is_finished_and_counts(tokenizer, monkeypatch):
    session = session_of(tokenizer)
    client, begun, go_on = TrainingClient(session), threading.Event(), threading.Event()
    calls, ran = session.forward_backward, []

    def held(batch, loss_fn):
        begun.set()
        go_on.wait()
        ran.append(batch)
        return calls(batch, loss_fn)

    monkeypatch.setattr(session, "forward_backward", held)

    async def cancelled():
        at_work, waiting = (asyncio.create_task(client.forward_backward(text())) for _ in range(2))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        at_work.cancel()
        waiting.cancel()
        results = await asyncio.gather(at_work, waiting, return_exceptions=True)
        go_on.set()
        return results, await client.optim_step()

    results, update = run(cancelled())
    assert [type(result) for result in results] == [asyncio.CancelledError] * 2
    assert len(ran) == 1
    assert update["grad_norm"] > 0


# the other verbs


def test_optim_step_takes_a_learning_rate_and_a_clip(tokenizer):
    client = TrainingClient(session_of(tokenizer))
    run(client.forward_backward(text()))
    first = run(client.optim_step(learning_rate=0.0))
    assert first["learning_rate"] == 0.0
    run(client.forward_backward(text()))
    second = run(client.optim_step())
    assert second["learning_rate"] == 0.0  # from that update on
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)  # it moved nothing


def test_learning_rates_of_groups_keep_their_ratio(tokenizer):
    client = TrainingClient(session_of(tokenizer, critic_learning_rate=1e-3))
    groups = client.session.optimizer.param_groups
    for learning_rate in (2e-2, 0.0, 5e-3):
        run(client.forward_backward(ppo_batch(), "enhanced_ppo"))
        assert run(client.optim_step(learning_rate=learning_rate))["learning_rate"] == learning_rate
        assert [group["lr"] for group in groups] == pytest.approx([learning_rate, learning_rate / 10], rel=1e-12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"learning_rate": 0.5, "max_grad_norm": -1.0}, "max_grad_norm must be a number in"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number in"),
        ({"learning_rate": -0.1}, "learning_rate must be a number in"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number in"),
    ],
)
def test_a_refused_update_changes_nothing(tokenizer, numbers, message):
    client = TrainingClient(session_of(tokenizer))
    run(client.forward_backward(text()))
    with pytest.raises(ValueError, match=message):
        run(client.optim_step(**numbers))
    assert {group["lr"] for group in client.session.optimizer.param_groups} == {1e-2}
    assert client._has_gradient()


def clip_of_the_update(client, monkeypatch):
    clips = []
    monkeypatch.setattr(client.session, "optim_step", lambda: clips.append(client.session.max_grad_norm) or {})
    return clips


def test_the_clip_of_an_update_is_the_calls_own_then_the_loss_then_the_sessions(tokenizer, monkeypatch):
    client = TrainingClient(session_of(tokenizer, max_grad_norm=0.7))
    clips = clip_of_the_update(client, monkeypatch)
    run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.25}))
    run(client.optim_step())
    run(client.optim_step())
    run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.25}))
    run(client.optim_step(max_grad_norm=0.1))
    assert clips == [0.25, 0.7, 0.1]
    assert client.session.max_grad_norm == 0.7


def test_sample_takes_texts_conversations_and_ids(tokenizer):
    client = TrainingClient(session_of(tokenizer))
    drawn = run(client.sample(["ab", [4, 5, 6]], max_new_tokens=4, num_samples=3))
    assert len(drawn) == 6
    for one in drawn:
        assert set(one) == {"text", "token_ids", "log_probs", "finished"}
        assert len(one["token_ids"]) == len(one["log_probs"]) <= 4
        assert one["text"] == tokenizer.decode(one["token_ids"], skip_special_tokens=True)
    greedy = [run(client.sample([p], max_new_tokens=4, temperature=0.0)) for p in ("ab", [2, 3], torch.tensor([2, 3]))]
    assert greedy[0][0]["token_ids"] == greedy[1][0]["token_ids"] == greedy[2][0]["token_ids"]
    json.dumps(drawn)


def test_sample_takes_ids_in_any_form_and_keeps_a_copy(tokenizer):
    client = TrainingClient(session_of(tokenizer))
    forms: list[Any] = [[[2, 3]], [np.array([2, 3])], [[np.int64(2), np.int64(3)]], torch.tensor([[2, 3]]), [(2, 3)]]
    forms += [np.array([[2, 3]]), ("ab",), [[{"role": "user", "content": "ab"}]]]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    client.session.tokenizer = tokenizer
    drawn = [run(client.sample(form, max_new_tokens=3, temperature=0.0)) for form in forms]
    assert drawn == [drawn[0]] * len(forms)

    async def mutated():
        ids = [4, 5]
        calls = [asyncio.create_task(client.sample([[2, 3]], max_new_tokens=3, temperature=0.0)) for _ in range(2)]
        calls.append(asyncio.create_task(client.sample([ids], max_new_tokens=3, temperature=0.0)))
        await asyncio.sleep(0)
        ids[:] = [2, 3]
        return [x["log_probs"] for x in (await asyncio.gather(*calls))[2]]

    assert run(mutated()) != [drawn[0][0]["log_probs"]]


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("2+2=", r"must be a list of prompts, got one text; pass \['2\+2='\]"),
        ([2, 3, 4], r"must be a list of prompts, got the token ids of one; pass \[prompt\]"),
        (torch.tensor([2, 3]), "got the token ids of one"),
        (np.array([2, 3]), "got the token ids of one"),
        ([{"role": "user", "content": "a"}], "got the messages of one"),
        ({"role": "user", "content": "a"}, "must be a list of prompts, got dict"),
        (None, "must be a list of prompts, got NoneType"),
        ([[]], r"prompts\[0\] is empty"),
        ([[2, 99]], "vocabulary is 0 to 9"),
    ],
)
def test_one_prompt_without_a_list_is_no_list_of_characters(tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        run(TrainingClient(session_of(tokenizer)).sample(prompts, max_new_tokens=2))


def test_what_was_sampled_trains(tokenizer):
    client = TrainingClient(session_of(tokenizer, temperature=0.7))
    prompt = [2, 3, 4]

    async def step():
        drawn = await client.sample([prompt] * 2, max_new_tokens=5, num_samples=4)
        lengths = torch.tensor([len(one["token_ids"]) for one in drawn])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        old = torch.zeros(mask.shape)
        ids[mask] = torch.tensor([i for one in drawn for i in one["token_ids"]])
        old[mask] = torch.tensor([x for one in drawn for x in one["log_probs"]])
        answers = {"response_ids": ids, "old_log_probs": old, "response_masks": mask}
        batch = {name: x.view(2, 4, -1) for name, x in answers.items()}
        batch |= {"prompt_ids": torch.tensor([prompt] * 2), "rewards": numbers(2, 4)}
        await client.forward_backward(batch, "grpo")
        whole = torch.nn.functional.pad(mask, (3, 0), value=True)
        replayed = {
            "input_ids": torch.cat([torch.tensor([prompt] * 8), ids], 1),
            "attention_mask": whole,
            "response_mask": whole & (torch.arange(whole.shape[1]) >= 3),
            "behavior_log_probs": torch.nn.functional.pad(old, (3, 0)),
            "rewards": numbers(8),
        }
        return await client.forward_backward(replayed, "importance_sampling"), await client.optim_step()

    result, update = run(step())
    # the sampler's log-probs are those that are trained: every weight is 1
    assert result["metrics"]["is_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert result["metrics"]["is_ratio_min"] == pytest.approx(1, abs=1e-4)
    assert update["grad_norm"] > 0


@pytest.mark.parametrize("kind", ["language", "reward"])
def test_a_checkpoint_goes_on_bit_for_bit(tokenizer, tmp_path, kind):
    make = session_of if kind == "language" else reward_session
    loss_fn, batch = ("enhanced_ppo", ppo_batch()) if kind == "language" else ("reward_modeling", pairs())

    async def train(client, steps):
        for _ in range(steps):
            await client.forward_backward(batch, loss_fn)
            await client.optim_step()

    whole, first, resumed = (TrainingClient(make(tokenizer)) for _ in range(3))
    run(train(whole, 3))
    run(train(first, 2))
    run(first.save_state(tmp_path / "state"))
    run(resumed.forward_backward(batch, loss_fn))  # a gradient of before, which must not count
    assert run(resumed.load_state(tmp_path / "state")) == {"step": 2}
    run(train(resumed, 1))
    for name, p in whole.session.model.state_dict().items():
        assert torch.equal(p, resumed.session.model.state_dict()[name]), name


def test_a_saved_reward_model_goes_on_as_a_run(folder, tokenizer, tmp_path):
    client = Client()
    training_client = client.get_training_client(client.create_run(folder, reward_model=True, run_id="first"))
    run(training_client.forward_backward(pairs(), "reward_modeling"))
    run(training_client.optim_step(learning_rate=1e-2))
    run(training_client.save_model(tmp_path / "rm"))
    again = client.get_training_client(client.create_run(tmp_path / "rm", reward_model=True))
    for model in (again.session.model, load_scalar_model(tmp_path / "rm")):
        assert torch.equal(model.head.weight, training_client.session.model.head.weight)
    with pytest.raises(ValueError, match="holds a reward model"):
        client.create_run(tmp_path / "rm")


@pytest.mark.parametrize(("critic", "trunks"), [("shared", 1), ("separate", 2), (None, 0)])
def test_a_run_has_the_critic_that_it_asks_for(folder, critic, trunks):
    client = Client()
    session = client.get_training_client(client.create_run(folder, critic=critic, learning_rate=3e-4)).session
    assert session.optimizer.param_groups[0]["lr"] == 3e-4
    if trunks == 0:
        assert session.critic is None
    else:
        assert session.critic is not None
        assert session.critic.shares_backbone_with(session.model) == (trunks == 1)


def test_an_own_session_becomes_a_run(tokenizer):
    client = Client()
    session = session_of(tokenizer)
    assert client.add_run(session, run_id="mine") == "mine"
    assert client.get_training_client("mine") is client.get_training_client("mine")
    assert client.get_training_client("mine").session is session


# errors teach


def without(batch, name):
    return {key: x for key, x in batch.items() if key != name}


BAD = {
    "a name of a loss": (text, "enhanced-ppo", {}, "unknown loss_fn 'enhanced-ppo'; did you mean 'enhanced_ppo'"),
    "an argument": (
        ppo_batch,
        "enhanced_ppo",
        {"clip_eps": 0.2},
        "enhanced_ppo: unknown loss_kwargs 'clip_eps'; did you mean 'clip_epsilon'",
    ),
    "an argument of no loss": (text, "causal_lm", {"beta": 0.1}, "unknown loss_kwargs 'beta'. Known: none"),
    "a key": (lambda: {**text(), "input_id": 1}, "causal_lm", {}, "unknown key 'input_id'; did you mean 'input_ids'"),
    "labels": (lambda: {**text(), "labels": 1}, "causal_lm", {}, r"response_mask = \(labels != -100\)"),
    "an id of another tokenizer": (
        lambda: {**text(), "input_ids": text()["input_ids"].index_fill(1, torch.tensor(1), 99)},
        "causal_lm",
        {},
        r"row 0 holds the token id 99, but the model's vocabulary is 0 to 9; is it another model's tokenizer",
    ),
    "a negative id": (
        lambda: {**pairs(), "rejected_input_ids": torch.full((3, 6), -100)},
        "dpo",
        {},
        "dpo: rejected: row 0 holds the token id -100, .* padding that the mask calls real",
    ),
    "an id of a response": (
        lambda: {**grpo_batch(), "response_ids": torch.full((2, 4, 5), 10)},
        "grpo",
        {},
        "row 0 holds the token id 10",
    ),
    "a clip that clips the values": (
        ppo_batch,
        "enhanced_ppo",
        {"clip_epsilon": 0},
        "enhanced_ppo: clip_epsilon=0 also clips the values.*, or clip_value_loss=False",
    ),
    "a missing key": (lambda: without(ppo_batch(), "old_log_probs"), "enhanced_ppo", {}, "needs 'old_log_probs', got"),
    "a list of examples": (lambda: [text()], "causal_lm", {}, "batch_data must be a dict of tensors, got list"),
    "ragged lists": (lambda: {**text(), "input_ids": [[1], [2, 3]]}, "causal_lm", {}, "pad shorter rows"),
    "float ids": (lambda: {**text(), "input_ids": torch.ones(3, 6)}, "causal_lm", {}, "must hold integer token ids"),
    "one row": (lambda: {**text(), "input_ids": torch.ones(6).long()}, "causal_lm", {}, "input_ids must be 2-D"),
    "another shape": (
        lambda: {**text(), "attention_mask": torch.ones(3, 5)},
        "causal_lm",
        {},
        r"attention_mask must have the shape of input_ids, \[3, 6\], got \[3, 5\]",
    ),
    "a mask of weights": (
        lambda: {**text(), "attention_mask": torch.full((3, 6), 0.5)},
        "causal_lm",
        {},
        "zeros and ones",
    ),
    "only padding": (
        lambda: {**text(), "attention_mask": torch.tensor([[1] * 6, [0] * 6, [1] * 6])},
        "causal_lm",
        {},
        "row 1 holds no real token",
    ),
    "nothing trained": (
        lambda: {**text(), "response_mask": torch.tensor([[1, 0, 0, 0, 0, 0]] * 3)},
        "causal_lm",
        {},
        "no token counts",
    ),
    "half precision": (
        lambda: {**ppo_batch(), "old_log_probs": torch.zeros(3, 6, dtype=torch.bfloat16)},
        "enhanced_ppo",
        {},
        "old_log_probs must be float32 or float64",
    ),
    "old log-probs per sequence": (
        lambda: {**ppo_batch(), "old_log_probs": torch.zeros(3)},
        "enhanced_ppo",
        {},
        "old_log_probs must be 2-D",
    ),
    "NaN": (
        lambda: {**ppo_batch(), "old_log_probs": torch.full((3, 6), torch.nan)},
        "enhanced_ppo",
        {},
        "old_log_probs must be finite where tokens count",
    ),
    "a reward on padding": (
        lambda: {**ppo_batch(), "rewards": torch.ones(3, 6)},
        "enhanced_ppo",
        {},
        r"rewards\[0, 0\] is 1, but token 0 is padding, the first of its row",
    ),
    "rewards of other rows": (
        lambda: {**ppo_batch(), "rewards": torch.ones(2)},
        "enhanced_ppo",
        {},
        r"rewards must have one value per sequence, \[3\], or per token, \[3, 6\], got \[2\]",
    ),
    "one sample": (
        lambda: {name: x if x.ndim == 2 and name == "prompt_ids" else x[:, :1] for name, x in grpo_batch().items()},
        "grpo",
        {},
        "needs at least 2, got 1",
    ),
    "rewards of a group": (
        lambda: {**grpo_batch(), "rewards": torch.ones(2, 3)},
        "grpo",
        {},
        r"rewards must be \[2, 4\], one per response, got \[2, 3\]",
    ),
    "other prompts": (
        lambda: {**grpo_batch(), "prompt_ids": torch.ones(3, 3).long()},
        "grpo",
        {},
        "one row per prompt",
    ),
    "a gap in a response": (
        lambda: {**grpo_batch(), "response_masks": torch.tensor([1, 1, 0, 1, 0]).expand(2, 4, 5)},
        "grpo",
        {},
        "has a gap in row 0.*loss_fn='enhanced_ppo'",
    ),
    "old log-probs of whole rows": (
        lambda: {**grpo_batch(), "old_log_probs": torch.zeros(2, 4, 8)},
        "grpo",
        {},
        r"old_log_probs must have the shape of response_ids, \[2, 4, 5\]",
    ),
    "a lone sequence": (
        lambda: {name: x[:1] for name, x in is_batch().items()},
        "importance_sampling",
        {},
        "one sequence has nothing to be compared with",
    ),
    "a lone sequence with rewards per token": (
        lambda: {**{name: x[:1] for name, x in is_batch().items()}, "rewards": torch.zeros(1, 6)},
        "importance_sampling",
        {},
        "one sequence has nothing to be compared with",
    ),
    "a lone sequence of PPO": (
        lambda: {name: x[:1] for name, x in ppo_batch().items()},
        "conservative_ppo",
        {},
        "one sequence has nothing to be compared with",
    ),
    "no rewards": (lambda: without(is_batch(), "rewards"), "importance_sampling", {}, "'rewards' or 'advantages'"),
    "advantages of other rows": (
        lambda: {**is_batch(), "advantages": torch.ones(2)},
        "importance_sampling",
        {},
        "advantages must have one value per sequence",
    ),
    "log-probs of other rows": (
        lambda: {**is_batch(), "behavior_log_probs": torch.ones(2)},
        "importance_sampling",
        {},
        "behavior_log_probs must have one sum per sequence",
    ),
    "incomplete pairs": (
        lambda: {name: x[:2] if name.startswith("chosen") else x for name, x in pairs().items()},
        "dpo",
        {},
        "2 chosen and 3 rejected",
    ),
    "pairs without answers": (
        lambda: {**pairs(), "chosen_response_mask": torch.zeros(3, 6)},
        "dpo",
        {},
        "chosen row 0 has no token that counts",
    ),
    "a flag": (ppo_batch, "enhanced_ppo", {"use_gae": 1}, "use_gae must be True or False, got 1"),
    "a negative beta": (ppo_batch, "enhanced_ppo", {"beta": -1}, r"beta must be a number in \[0, inf\], got -1"),
    "a wide clip": (ppo_batch, "enhanced_ppo", {"clip_epsilon": 20}, r"clip_epsilon must be a number in \[0, 1\]"),
    "a narrow ratio": (is_batch, "importance_sampling", {"clip_ratio": 0.5}, r"clip_ratio must be a number in \[1"),
    "a clip of nothing": (ppo_batch, "enhanced_ppo", {"max_grad_norm": 0}, r"max_grad_norm must be a number in \(0"),
    "adaptive_kl": (ppo_batch, "conservative_ppo", {"adaptive_kl": True}, "adapt conservative_coef between calls"),
    "two lambdas": (
        ppo_batch,
        "enhanced_ppo",
        {"use_gae": False, "gae_lambda": 0.9},
        "use_gae=False is gae_lambda=1",
    ),
    "a reward model's loss": (
        pairs,
        "reward_modeling",
        {},
        r"trains a reward model; .*create_run\(..., reward_model=T",
    ),
    "another vocabulary": (pairs, "dpo", {"reference_model": tiny_llama(vocab_size=11)}, "vocabulary of 11 tokens"),
    "a reference of no kind": (pairs, "dpo", {"reference_model": 3}, "must be a name, a folder, 'base' or a model"),
}


@pytest.mark.unhooked
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained_and_changes_nothing(tokenizer, name):
    make, loss_fn, kwargs, message = BAD[name]
    client = TrainingClient(session_of(tokenizer))
    with pytest.raises(ValueError, match=message):
        run(client.forward_backward(make(), loss_fn, kwargs))
    assert not client._has_gradient()


@pytest.mark.parametrize("loss_fn", [n for n in LOSSES if n not in ("causal_lm", "reward_modeling")])
def test_a_kl_needs_its_reference(tokenizer, loss_fn):
    batches = {"dpo": pairs, "grpo": grpo_batch, "importance_sampling": is_batch, "ppo": single_answers}
    session = session_of(tokenizer)
    session.reference = None
    client = TrainingClient(session)
    with pytest.raises(ValueError, match=r"needs a reference; pass loss_kwargs=\{'reference_model'"):
        run(client.forward_backward(batches.get(loss_fn, ppo_batch)(), loss_fn))
    with pytest.raises(ValueError, match="a Session without a reference does not know"):
        run(client.forward_backward(batches.get(loss_fn, ppo_batch)(), loss_fn, {"reference_model": "base"}))


def single_answers():
    batch = grpo_batch()
    return {"prompt_ids": batch["prompt_ids"], **{k: x[:, 0] for k, x in batch.items() if k != "prompt_ids"}}


def test_losses_ask_for_the_model_that_they_train(tokenizer):
    client = TrainingClient(Session(tiny_llama(), tokenizer))
    for loss_fn, batch in {"enhanced_ppo": ppo_batch(), "ppo": single_answers()}.items():
        with pytest.raises(ValueError, match=f"{loss_fn}: trains a value function.*critic='shared'"):
            run(client.forward_backward(batch, loss_fn, {"beta": 0}))
    with pytest.raises(ValueError, match="causal_lm: trains a language model; this run's model is a ScalarModel"):
        run(TrainingClient(reward_session(tokenizer)).forward_backward(text(), "causal_lm"))


def test_updates_and_checkpoints_need_their_turn(tokenizer, tmp_path):
    client = TrainingClient(session_of(tokenizer))
    with pytest.raises(ValueError, match="no gradient since the last update"):
        run(client.optim_step())
    run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.5}))
    with pytest.raises(ValueError, match="one update has one clip"):
        run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.6}))
    with pytest.raises(ValueError, match="a gradient waits for its update"):
        run(client.save_state(tmp_path / "state"))
    scheduled = session_of(tokenizer, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o))
    client = TrainingClient(scheduled)
    run(client.forward_backward(text()))
    with pytest.raises(ValueError, match="has a scheduler"):
        run(client.optim_step(learning_rate=1e-3))


def test_padding_may_hold_any_id(tokenizer):
    batch = text()
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    run(TrainingClient(session_of(tokenizer)).forward_backward(batch))
    pair = {"chosen_input_ids": [[2, 99]], "chosen_attention_mask": [[1, 1]]}
    pair |= {name.replace("chosen", "rejected"): x for name, x in pair.items()}
    with pytest.raises(ValueError, match="reward_modeling: chosen: row 0 holds the token id 99"):
        run(TrainingClient(reward_session(tokenizer)).forward_backward(pair, "reward_modeling"))


def failing_at(session, number):
    """The model fails in a forward pass that makes a gradient."""
    calls = []

    def failing(*_):
        calls.append(torch.is_grad_enabled())
        if calls[-1] and sum(calls) == number:
            raise RuntimeError("out of memory")

    session.model.model.register_forward_pre_hook(failing)


def test_a_call_that_fails_halfway_leaves_no_half_gradient(tokenizer):
    client = TrainingClient(session_of(tokenizer, micro_batch_tokens=6))
    failing_at(client.session, 2)
    with pytest.raises(RuntimeError, match="out of memory") as failed:
        run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.5}))
    assert failed.value.__notes__ == ["enhanced_ppo: dropped the gradient of this call"]
    assert not client._has_gradient()
    # the clip of the failed call is forgotten too
    run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.7}))
    assert run(client.optim_step())["step"] == 1


def test_a_call_that_fails_halfway_says_what_else_it_took_along(tokenizer):
    client = TrainingClient(session_of(tokenizer, micro_batch_tokens=6))
    run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.5}))
    failing_at(client.session, 2)
    with pytest.raises(RuntimeError, match="out of memory") as failed:
        run(client.forward_backward(text()))
    assert "of the earlier ones since the last update: make those again" in failed.value.__notes__[0]
    assert not client._has_gradient()
    assert client._worker.max_grad_norm is None


def test_a_gradient_that_is_not_finite_does_not_stop_the_run(tokenizer, monkeypatch):
    client = TrainingClient(session_of(tokenizer))
    batch = {**is_batch(), "advantages": torch.full((3,), 3e38), "behavior_log_probs": torch.full((3,), -40.0)}
    del batch["rewards"]
    run(client.forward_backward(batch, "importance_sampling"))
    run(client.forward_backward(ppo_batch(), "enhanced_ppo", {"max_grad_norm": 0.5}))
    with pytest.raises(FloatingPointError, match="nothing was updated") as failed:
        run(client.optim_step())
    assert failed.value.__notes__ == ["optim_step: dropped the gradient, so that the run can go on"]
    clips = []
    step = client.session.optim_step
    monkeypatch.setattr(client.session, "optim_step", lambda: clips.append(client.session.max_grad_norm) or step())
    run(client.forward_backward(text()))
    assert run(client.optim_step())["step"] == 1
    assert clips == [1.0]


def test_a_failed_call_leaves_the_queue_working(tokenizer):
    client = TrainingClient(session_of(tokenizer))

    async def both():
        calls = client.forward_backward({}, "causal_lm"), client.forward_backward(text()), client.optim_step()
        return await asyncio.gather(*calls, return_exceptions=True)

    failed, *went_on = run(both())
    assert isinstance(failed, ValueError)
    assert [result["step"] for result in went_on if isinstance(result, dict)] == [0, 1]


@pytest.mark.unhooked
def test_runs_by_unknown_names_are_explained(folder):
    client = Client()
    client.create_run(folder, run_id="policy", critic=None)
    with pytest.raises(ValueError, match="unknown run 'polcy'; did you mean 'policy'"):
        client.get_training_client("polcy")
    with pytest.raises(ValueError, match="run 'policy' exists"):
        client.create_run(folder, run_id="policy")
    with pytest.raises(ValueError, match="a reward model has no critic, got critic='separate'"):
        client.create_run(folder, reward_model=True, critic="separate")
    with pytest.raises(ValueError, match="critic must be one of"):
        client.create_run(folder, critic="own")  # pyright: ignore[reportArgumentType]


def test_importing_rlloss_does_not_import_its_adapters():
    code = "import sys, rlloss; print([m for m in sys.modules if m.startswith('rlloss.adapters')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


PAGE = (Path(__file__).parents[1] / "docs" / "signal.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_the_page_has_every_key_and_argument(loss_fn):
    (row,) = re.findall(rf"^\| `{loss_fn}` \| (.*) \|$", PAGE, flags=re.MULTILINE)
    loss, batch, kwargs, metrics = row.split(" | ")
    assert hasattr(rlloss, re.findall(r"`(\w+)`", loss)[0])
    required, _, optional = batch.partition("; optional ")
    assert tuple(re.findall(r"`(\w+)`", required)) == LOSSES[loss_fn].required
    assert tuple(re.findall(r"`(\w+)`", optional)) == LOSSES[loss_fn].optional
    defaults = {name: json.loads(x) for name, x in re.findall(r"`(\w+)=([\w.]+)`", kwargs)}
    assert defaults == LOSSES[loss_fn].loss_kwargs
    session = {"reward_modeling": reward_session}.get(loss_fn, session_of)(None)
    batches = {"causal_lm": text, "dpo": pairs, "reward_modeling": pairs, "grpo": grpo_batch, "ppo": single_answers}
    made = batches.get(loss_fn, is_batch if loss_fn == "importance_sampling" else ppo_batch)()
    result = run(TrainingClient(session).forward_backward(made, loss_fn))
    assert set(re.findall(r"`(\w+)`", metrics)) == set(result["metrics"])
