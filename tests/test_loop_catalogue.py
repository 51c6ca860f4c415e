"""Losses that read more than their family does, or keep something from step to step, through the loop."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlloss
from rlloss.loop import (
    Labelled,
    Session,
    Tokens,
    collate,
    evaluate_offline,
    frozen_copy,
    offline_batch,
    train_offline,
    train_online,
)
from rlloss.loop.data import Prompt


class NoTokenizer:
    pad_token_id, eos_token_id = 0, 1

    def batch_decode(self, rows, **options):
        return [" ".join(map(str, ids)) for ids in rows]


def answer(*ids):
    return Tokens(list(ids), [False, *[True] * (len(ids) - 1)])


THUMBS = [
    Labelled(answer(2, 3, 4, 5), True, answer(2, 6)),
    Labelled(answer(3, 8, 9), False, answer(3, 4)),
    Labelled(answer(5, 6), False, answer(5, 3)),
    Labelled(answer(6, 7, 7, 2, 4), True, answer(6, 2)),
]
TEXTS = [answer(2, 3, 4, 5), answer(3, 8, 9), answer(5, 6), answer(6, 7, 7, 2, 4)]


def session(**options):
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, pad_token_id=0, eos_token_id=1, **sizes))
    return Session(model, NoTokenizer(), reference=frozen_copy(model), learning_rate=1e-2, **options)


def train(loss_fn, examples, steps, batch_size=4, ours=None, **options):
    ours = ours or session()
    return ours, train_offline(ours, examples, loss_fn, steps=steps, batch_size=batch_size, progress=False, **options)


def test_bco_learns_its_shift_from_the_steps_before():
    loss_fn = rlloss.BCOLoss(beta=1.0)
    _, history = train(loss_fn, THUMBS, 3)
    rewards = [(numbers["desirable_reward"] + numbers["undesirable_reward"]) / 2 for numbers in history]
    assert history[0]["delta"] == 0.0
    assert history[1]["delta"] == pytest.approx(rewards[0], abs=1e-6)
    assert history[2]["delta"] == pytest.approx((rewards[0] + rewards[1]) / 2, abs=1e-6)
    assert history[2]["delta"] != 0
    assert float(loss_fn.delta) == pytest.approx(sum(rewards) / 3, abs=1e-6)


def test_to_evaluate_is_not_to_learn():
    loss_fn = rlloss.BCOLoss(beta=1.0)
    ours, _ = train(loss_fn, THUMBS, 1)
    before = loss_fn.delta
    evaluate_offline(ours, THUMBS, loss_fn)
    assert loss_fn.delta == before


def test_a_resumed_run_has_the_shift(tmp_path):
    whole = rlloss.BCOLoss(beta=1.0)
    train(whole, THUMBS, 4, batch_size=2)
    train(rlloss.BCOLoss(beta=1.0), THUMBS, 2, batch_size=2, folder=tmp_path)
    resumed = rlloss.BCOLoss(beta=1.0)
    train(resumed, THUMBS, 4, batch_size=2, folder=tmp_path, resume=True)
    assert resumed.delta == whole.delta != 0


def test_only_kto_pays_for_mismatched_answers():
    ours = session()
    assert "kl" in offline_batch(ours, THUMBS, rlloss.KTOLoss()).fields
    batch = offline_batch(ours, THUMBS, rlloss.BCOLoss())
    assert "kl" not in batch.fields
    with pytest.raises(ValueError, match=r"KTOLoss: needs batch.fields\['kl'\], which holds"):
        ours.forward_backward(batch, rlloss.KTOLoss())


@pytest.mark.parametrize("micro_batch_tokens", [6, 1000])
def test_smoothing_and_the_z_loss_read_the_whole_vocabulary(micro_batch_tokens):
    ours = session(micro_batch_tokens=micro_batch_tokens)
    loss_fn = rlloss.SFTLoss(label_smoothing=0.2, z_coef=0.1)
    batch = collate(TEXTS)
    loss, metrics = ours.forward_backward(batch, loss_fn)
    gradients = [p.grad.clone() for p in ours.model.parameters()]
    ours.model.zero_grad()
    logits = ours.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    log_p = logits.log_softmax(-1)
    own = log_p.gather(-1, batch.ids[..., None]).squeeze(-1)
    tokens = -0.8 * own - 0.2 * log_p.mean(-1) + 0.1 * logits.logsumexp(-1) ** 2
    expected = tokens[batch.loss_mask].mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert float(metrics["logsumexp"]) == pytest.approx(logits.logsumexp(-1)[batch.loss_mask].mean().item(), rel=1e-5)
    for found, parameter in zip(gradients, ours.model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_entropy_controller_sees_every_update():
    target = rlloss.AdaptiveEntropyController(target_entropy=5.0, step=0.01)  # more than ten tokens have
    history = train_online(
        session(),
        [Prompt([2, 3], "ab", {}), Prompt([4], "c", {})],
        lambda prompts, completions, **columns: [float("3" in text) for text in completions],
        rlloss.GRPOLoss(entropy_coef=target),
        steps=2,
        prompts_per_step=2,
        group_size=4,
        max_new_tokens=3,
        updates_per_epoch=2,
        progress=False,
    )
    assert len(history) == 2
    assert float(target.entropy_coef) == pytest.approx(4 * 0.01)


def test_a_critics_policy_loss_keeps_its_controller():
    target = rlloss.AdaptiveEntropyController(target_entropy=5.0, step=0.01)
    loss_fn = rlloss.ActorCriticLoss(policy=rlloss.PPOLoss(entropy_coef=target), value=rlloss.ValueLoss())
    loss_fn.after_step({"entropy": rlloss.Mean.constant(torch.tensor(1.0), torch.tensor(3))})
    assert float(target.entropy_coef) == pytest.approx(0.01)
