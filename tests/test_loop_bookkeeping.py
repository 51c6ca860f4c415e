"""Nothing is lost on the way: parameters, updates, state, rows without a trained token, adapters, arguments."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import (
    GroupAdvantages,
    Labelled,
    Pair,
    Session,
    Tokens,
    frozen_copy,
    load_scalar_model,
    offline_batch,
    prompts,
    save_scalar_model,
    train_online,
)
from rlloss.loop.rewards import Rewards

PROMPTS = [{"prompt": p} for p in ("ab", "cde", "f", "gh")]
IDS = torch.tensor([[2, 3, 4, 5]])


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(seed=0, **config) -> Any:
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=10, pad_token_id=0, eos_token_id=1, **size | config))


def share_of_a(prompts, completions):
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


def train(session, tokenizer, steps, **options):
    few: dict[str, Any] = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 3, "progress": False} | options
    return train_online(session, prompts(PROMPTS, tokenizer), share_of_a, rlloss.GRPOLoss(), steps=steps, **few)


# parameters


def test_a_copy_in_half_precision_keeps_its_buffers():
    model = tiny_llama(tie_word_embeddings=True)
    copied: Any = frozen_copy(model, torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    buffers = dict(model.named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in copied.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_an_optimizer_that_leaves_something_out_is_refused(tokenizer):
    model = tiny_llama()
    critic = rlloss.ScalarModel(copy.deepcopy(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"22 of the 22 trainable parameters of the critic are not in the optimizer"):
        Session(model, tokenizer, critic=critic, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"20 of the 21 trainable parameters of the model are not in the optimizer"):
        Session(model, tokenizer, optimizer=torch.optim.SGD([model.lm_head.weight], lr=0.1))
    critic.requires_grad_(False)
    Session(model, tokenizer, critic=critic, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"critic_learning_rate=0.1 needs a critic"):
        Session(model, tokenizer, critic_learning_rate=0.1)
    with pytest.raises(ValueError, match=r"a critic: needs a language model"):
        Session(critic, tokenizer, critic=critic)


# updates


@pytest.mark.parametrize(("rows", "updates"), [(9, 4), (8, 3), (4, 4)])
def test_an_epoch_has_as_many_updates_as_asked(tokenizer, rows, updates):
    session = Session(tiny_llama(), tokenizer)
    train(session, tokenizer, 1, prompts_per_step=1, group_size=rows, updates_per_epoch=updates)
    assert session.step == updates


def test_steps_that_could_teach_nothing_are_refused(tokenizer):
    session = Session(tiny_llama(), tokenizer)
    with pytest.raises(ValueError, match=r"updates_per_epoch=9 needs as many completions"):
        train(session, tokenizer, 1, updates_per_epoch=9)
    for advantages in (rlloss.group_advantages, GroupAdvantages()):
        with pytest.raises(ValueError, match=r"group_size=1 leaves nothing to compare with"):
            train(session, tokenizer, 1, group_size=1, advantages=advantages)


# state


class NormalisedGroups(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = rlloss.RunningRewardNorm()

    def forward(self, rewards, group_ids):
        self.norm.update(rlloss.Moments.of(rewards.double(), torch.ones_like(rewards, dtype=torch.bool)))
        return self.norm(rewards)


class CountingReward(nn.Module):
    calls: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, prompts, completions, **columns):
        self.calls += 1
        return [float(self.calls) * len(completion) for completion in completions]


def test_advantages_and_rewards_that_are_modules_are_saved_with_the_run(tokenizer, tmp_path):
    def run(steps, resume):
        session = Session(tiny_llama(), tokenizer, learning_rate=1e-2)
        return train_online(
            session,
            prompts(PROMPTS, tokenizer),
            [CountingReward(), share_of_a],
            rlloss.GRPOLoss(),
            steps=steps,
            prompts_per_step=2,
            group_size=4,
            max_new_tokens=3,
            advantages=NormalisedGroups(),
            progress=False,
            folder=tmp_path / str(resume),
            resume=resume,
        )

    whole = run(4, False)
    run(2, True)
    assert run(4, True)[-1] == whole[-1]


def test_a_scheduler_in_one_of_checkpoint_and_session_alone_is_an_error(tokenizer, tmp_path):
    def session(scheduler):
        make = (lambda optimizer: LambdaLR(optimizer, lambda _: 1.0)) if scheduler else None
        return Session(tiny_llama(), tokenizer, scheduler=make)

    for saved in (True, False):
        session(saved).save_state(tmp_path / str(saved))
        session(saved).load_state(tmp_path / str(saved))
        has = "checkpoint" if saved else "session"
        with pytest.raises(ValueError, match=f"the {has} has a scheduler"):
            session(not saved).load_state(tmp_path / str(saved))


# rows


FULL, EMPTY = Tokens([2, 3, 4, 1], [False, False, True, True]), Tokens([5, 6, 1], [False] * 3)
OTHER = Tokens([2, 3, 7, 8, 1], [False, False, True, True, True])
ROWS = [
    (rlloss.DPOLoss(), [Pair(FULL, OTHER), Pair(EMPTY, OTHER), Pair(OTHER, EMPTY)]),
    (rlloss.IPOLoss(), [Pair(FULL, OTHER), Pair(EMPTY, OTHER), Pair(OTHER, EMPTY)]),
    (rlloss.BradleyTerryLoss(), [Pair(FULL, OTHER), Pair(EMPTY, OTHER), Pair(OTHER, EMPTY)]),
    (rlloss.KTOLoss(), [Labelled(FULL, True, FULL), Labelled(EMPTY, False, OTHER)]),
]


def family_session(loss_fn, tokenizer, **options):
    model = tiny_llama()
    reference = tiny_llama(seed=1)
    if loss_fn.family == "reward":
        model, reference = rlloss.ScalarModel(model), None
        nn.init.normal_(model.head.weight)
    return Session(model, tokenizer, reference=reference, **options)


@pytest.mark.parametrize(("loss_fn", "examples"), ROWS, ids=lambda x: type(x).__name__)
def test_a_row_without_a_trained_token_counts_nowhere(loss_fn, examples, tokenizer):
    session = family_session(loss_fn, tokenizer, micro_batch_tokens=12)
    alone, _ = session.forward(offline_batch(session, examples[:1], loss_fn), loss_fn)
    batch = offline_batch(session, examples, loss_fn)
    batch.fields |= {"kl": torch.zeros(())} if "kl" in batch.fields else {}
    assert session.forward(batch, loss_fn)[0] == pytest.approx(alone, rel=1e-5)
    assert session.forward_backward(batch, loss_fn)[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(("loss_fn", "examples"), ROWS, ids=lambda x: type(x).__name__)
def test_weights_of_rows_reach_their_loss(loss_fn, examples, tokenizer):
    session = family_session(loss_fn, tokenizer, micro_batch_tokens=12)
    batch = offline_batch(session, [examples[0]] * 3, loss_fn)
    plain, _ = session.forward(batch, loss_fn)
    weights = torch.tensor([2.0, 0.0, 1.5])
    batch.fields["weights"] = weights.repeat_interleave(batch.rows_per_example)
    assert session.forward_backward(batch, loss_fn)[0] == pytest.approx(plain * 3.5 / 3, rel=1e-5)


def test_margins_of_pairs_reach_their_loss(tokenizer):
    loss_fn = rlloss.BradleyTerryLoss()
    session = family_session(loss_fn, tokenizer)
    batch = offline_batch(session, [Pair(FULL, OTHER)], loss_fn)
    gap = session.forward(batch, loss_fn)[1]["margin"]
    batch.fields["margin"] = torch.full((2,), 5.0)
    expected = -nn.functional.logsigmoid(torch.tensor(float(gap) - 5))
    assert session.forward(batch, loss_fn)[0] == pytest.approx(float(expected), rel=1e-5)


# adapters


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapted_reward_model_is_saved_whole(tmp_path):
    adapted = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model = rlloss.ScalarModel(adapted)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    expected = model.score(IDS, torch.tensor([3]))
    again = load_scalar_model(save_scalar_model(model, tmp_path))
    torch.testing.assert_close(again.score(IDS, torch.tensor([3])), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.score(IDS, torch.tensor([3])), expected)  # the adapters are still there
    assert any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_scalar_model_loads_in_another_dtype(tmp_path, dtype):
    model = rlloss.ScalarModel(tiny_llama())
    nn.init.normal_(model.head.weight)
    again: Any = load_scalar_model(save_scalar_model(model, tmp_path), dtype=dtype)
    assert again.backbone.embed_tokens.weight.dtype is dtype
    score, last = model.score(IDS, torch.tensor([3])), torch.tensor([3])
    torch.testing.assert_close(again.score(IDS, last).to(score.dtype), score, rtol=5e-2, atol=5e-2)


def test_a_folder_without_all_weights_is_an_error(tmp_path):
    model: Any = rlloss.ScalarModel(tiny_llama())
    save_scalar_model(model, tmp_path)
    some = {name: x for name, x in model.backbone.state_dict().items() if "q_proj" not in name}
    model.backbone.save_pretrained(tmp_path, state_dict=some)
    with pytest.raises(ValueError, match=r"lacks 2 of the backbone's weights"):
        load_scalar_model(tmp_path)


# arguments


def test_a_reward_function_gets_what_it_takes():
    columns = {"answer": ["x", "y"], "completion_ids": [[1], [2, 3]]}

    def bare(prompts, completions):
        return [1.0, 2.0]

    def only_completions(completions, **columns):
        assert set(columns) == {"prompts", "answer", "completion_ids"}
        return [len(c) for c in completions]

    def other_names(p, c, answer):
        assert answer == ["x", "y"]
        return [float(a == b) for a, b in zip(c, answer, strict=True)]

    class Callable:
        def __call__(self, completions, answer):
            return [float(a == b) for a, b in zip(completions, answer, strict=True)]

    scores = Rewards([bare, only_completions, other_names, Callable()])(["p", "q"], ["x", "zz"], columns)
    assert scores.total.tolist() == [1 + 1 + 1 + 1, 2 + 2 + 0 + 0]


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_rewards_per_token_may_be_lists_or_tensors(kind):
    scores = Rewards(lambda prompts, completions: [kind([0.5]), kind([1.0, 2.0])])
    columns = {"completion_ids": [[1], [2, 3]]}
    assert scores(["p", "q"], ["x", "zz"], columns).per_token == [[0.5], [1.0, 2.0]]
    with pytest.raises(ValueError, match="need the column completion_ids, got none"):
        scores(["p", "q"], ["x", "zz"], {})


def test_a_kl_weight_is_a_number_or_a_controller():
    with pytest.raises(ValueError, match=r"GroupAdvantages: kl_coef must be a number or a KL controller, got tensor"):
        GroupAdvantages(kl_coef=torch.tensor(0.1))  # pyright: ignore[reportArgumentType]
