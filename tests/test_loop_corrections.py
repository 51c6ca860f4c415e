"""The loop with a sampler that is not quite the policy: corrections, and losses that take the sampler's log-probs."""

from functools import partial

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import Session, prompts, train_online


class Spy(rlloss.GRPOLoss):
    """GRPO that remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, *inputs, **keywords):
        self.seen.append((inputs, keywords))
        return super().forward(*inputs, **keywords)


class OffPolicySpy(Spy):
    needs_rollout = True


def session_of(temperature=1.0):
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Session(LlamaForCausalLM(config), tokenizer, learning_rate=0.0, temperature=temperature)


def trained(loss_fn, *, session=None, **options):
    session = session or session_of()
    (numbers,) = train_online(
        session,
        prompts([{"prompt": "ab"}, {"prompt": "cdefg"}], session.tokenizer),
        lambda prompts, completions, **columns: [float(c.count("a")) for c in completions],
        loss_fn,
        steps=1,
        prompts_per_step=2,
        max_new_tokens=4,
        progress=False,
        **options,
    )
    return numbers


def test_a_correction_becomes_the_losss_weights_and_its_statistics_are_told():
    loss_fn = Spy()

    def shifted(old, rollout, mask):
        return rlloss.importance_correction(old + 0.5, rollout, mask, "tis", ratio_max=1.25)

    numbers = trained(loss_fn, correction=shifted)
    ((inputs, keywords),) = loss_fn.seen
    assert numbers["rollout_ratio"] == pytest.approx(torch.tensor(0.5).exp().item(), abs=1e-4)
    assert numbers["rollout_clip_frac"] == 1
    weights, mask = keywords["token_weights"], inputs[3]
    assert torch.equal(weights, torch.where(mask, 1.25, 0))


def test_a_sampler_that_is_the_policy_owes_nothing():
    numbers = trained(rlloss.GRPOLoss(), correction=partial(rlloss.importance_correction, kind="icepop"))
    assert numbers["rollout_ratio"] == pytest.approx(1, abs=1e-4)
    assert numbers["rollout_kept_frac"] == 1
    assert numbers["rollout_ess"] == pytest.approx(1, abs=1e-4)


def test_a_loss_gets_the_samplers_logprobs_where_it_asks_for_them():
    asks, does_not = OffPolicySpy(), Spy()
    trained(asks)
    trained(does_not)
    (inputs, keywords), (_, others) = asks.seen[0], does_not.seen[0]
    mask = inputs[3]
    torch.testing.assert_close(keywords["rollout_logprobs"][mask], inputs[0].detach()[mask], atol=1e-4, rtol=0)
    assert "rollout_logprobs" not in others


def test_a_correction_of_the_samplers_own_logprobs_raises():
    with pytest.raises(ValueError, match="recompute_old_logprobs=False takes the sampler's for both"):
        trained(rlloss.GRPOLoss(), correction=rlloss.importance_correction, recompute_old_logprobs=False)
