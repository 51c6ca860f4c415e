"""A reference that moves to the policy: by how much, when, what a resumed run has of it, and what cannot move."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlloss
from rlloss.loop import (
    Pair,
    ReferenceMix,
    Session,
    Tokens,
    WithoutAdapters,
    frozen_copy,
    train_offline,
    with_ref_logprobs,
)

PAIRS = [
    Pair(Tokens([2, 3, 4, 5], [False, True, True, True]), Tokens([2, 6, 7], [False, True, True])),
    Pair(Tokens([3, 8, 9], [False, True, True]), Tokens([3, 4, 4, 2], [False, True, True, True])),
]


class NoTokenizer:
    pad_token_id, eos_token_id = 0, 1


def tiny_llama(hidden_layers=1):
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=hidden_layers, pad_token_id=0, eos_token_id=1, **sizes))


def session(**options):
    model = tiny_llama()
    return Session(model, NoTokenizer(), reference=frozen_copy(model), learning_rate=1e-2, **options)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def train(session, steps, **options):
    return train_offline(session, PAIRS, rlloss.DPOLoss(beta=0.5), steps=steps, batch_size=2, progress=False, **options)


def test_the_reference_moves_by_its_share_every_so_many_steps():
    ours, start, seen = session(), weights(tiny_llama()), []

    def look(s):
        seen.append((weights(s.model), weights(s.reference)))
        return {}

    train(ours, 5, reference_mix=ReferenceMix(alpha=0.25, every=2), evaluate=look, evaluate_every=1)
    policies, references = zip(*seen, strict=True)
    assert torch.equal(references[0], start)
    second = 0.25 * policies[1] + 0.75 * start
    torch.testing.assert_close(references[1], second)
    assert torch.equal(references[2], references[1])
    torch.testing.assert_close(references[3], 0.25 * policies[3] + 0.75 * second)
    assert torch.equal(references[4], references[3])
    assert not torch.equal(references[4], start)


def test_a_share_of_one_takes_the_policy_so_that_the_margin_starts_again():
    history = train(session(), 4, reference_mix=ReferenceMix(alpha=1.0, every=2))
    margins = [numbers["margin"] for numbers in history]
    assert margins[0] == margins[2] == 0.0
    assert margins[1] > 0 < margins[3]
    assert [n["margin"] for n in train(session(), 4)][2] > 0


def test_a_resumed_run_has_the_reference_where_it_was(tmp_path):
    mix = ReferenceMix(alpha=0.5, every=1)
    whole = session()
    train(whole, 4, reference_mix=mix)
    train(session(), 2, reference_mix=mix, folder=tmp_path)
    resumed = session()
    train(resumed, 4, reference_mix=mix, folder=tmp_path, resume=True)
    assert torch.equal(weights(resumed.reference), weights(whole.reference))
    assert torch.equal(weights(resumed.model), weights(whole.model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_what_cannot_move_raises_before_the_first_step():
    mix = ReferenceMix(alpha=0.5, every=1)
    with pytest.raises(ValueError, match=r"needs a reference to move, got None; pass Session\(\.\.\., reference="):
        train(Session(tiny_llama(), NoTokenizer()), 1, reference_mix=mix)
    deeper = Session(tiny_llama(), NoTokenizer(), reference=frozen_copy(tiny_llama(2)))
    with pytest.raises(ValueError, match=r"must be of one make, and only one of them has 'model\.layers\.1"):
        train(deeper, 1, reference_mix=mix)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the policy without its adapters, whose weights are not its own"):
        train(Session(adapted, NoTokenizer(), reference=WithoutAdapters(adapted)), 1, reference_mix=mix)


def test_log_probs_of_a_reference_that_has_moved_are_not_taken():
    ours = session()
    examples = with_ref_logprobs(ours, PAIRS)
    with pytest.raises(ValueError, match="carry log-probs of a reference that reference_mix"):
        train_offline(
            ours,
            examples,
            rlloss.DPOLoss(),
            steps=1,
            batch_size=2,
            progress=False,
            reference_mix=ReferenceMix(),
        )


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "name"), [({"alpha": 0.0}, "alpha"), ({"alpha": 1.1}, "alpha"), ({"every": 0}, "every")]
)
def test_bad_options_teach(options, name):
    with pytest.raises(ValueError, match=f"ReferenceMix: {name}"):
        ReferenceMix(**options)
