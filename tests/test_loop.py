"""The loop: four verbs, exact micro-batches, runs that resume bit for bit and policies that learn."""

import copy

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import (
    Pair,
    Rewards,
    Session,
    Tokens,
    collate,
    evaluate_offline,
    evaluate_online,
    frozen_copy,
    micro_batches,
    prompts,
    read_metrics,
    train_offline,
    train_online,
)
from rlloss.loop.run import example_order


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def session_of(tokenizer, *, reference=True, **options):
    model = tiny_llama()
    return Session(model, tokenizer, reference=frozen_copy(model) if reference else None, **options)


def share_of_a(prompts, completions, **columns):
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


def policy_batch(session, rows=7):
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for i in range(rows):
        ids = torch.randint(2, 10, (3 + i,), generator=generator).tolist()
        sequences.append(Tokens(ids, [False] * 2 + [True] * (1 + i)))
    batch = collate(sequences)
    batch.fields["advantages"] = torch.randn(rows, generator=generator)
    batch.fields["old_logprobs"] = session.logprobs(batch) + 0.1 * torch.randn(batch.ids.shape, generator=generator)
    batch.fields["ref_logprobs"] = session.logprobs(batch) + 0.3 * torch.randn(batch.ids.shape, generator=generator)
    return batch


def pair_batch(session):
    batch = policy_batch(session, rows=8)
    batch.rows_per_example = 2
    return batch


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


LOSSES = {
    "sft": (rlloss.SFTLoss(), policy_batch),
    "dpo": (rlloss.DPOLoss(), pair_batch),
    "grpo": (rlloss.GRPOLoss(kl_coef=0.1, entropy_coef=0.01), policy_batch),
    "dr_grpo": (rlloss.DrGRPOLoss(max_completion_length=9), policy_batch),
    "gspo": (rlloss.GSPOLoss(clip_eps_low=0.2, clip_eps_high=0.2), policy_batch),
    "conservative_ppo": (rlloss.ConservativePPOLoss(conservative_coef=5.0), policy_batch),
    "conservative_ppo per sequence": (rlloss.ConservativePPOLoss(level="sequence"), policy_batch),
}


@pytest.mark.parametrize("name", LOSSES)
def test_forward_backward_does_not_depend_on_micro_batches(tokenizer, name):
    loss_fn, make_batch = LOSSES[name]
    results = []
    for micro_batch_tokens in (10_000, 12):
        session = session_of(tokenizer, micro_batch_tokens=micro_batch_tokens)
        session.model.double()
        batch = make_batch(session)
        loss, metrics = session.forward_backward(batch, loss_fn)
        results.append((loss, gradient_of(session.model), rlloss.scalars(metrics), len(micro_batches(batch, 12))))
    (whole, whole_grad, whole_metrics, parts), (split, split_grad, split_metrics, _) = results
    assert parts >= 3
    assert split == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(split_grad, whole_grad, rtol=1e-6, atol=1e-9)
    assert split_metrics == pytest.approx(whole_metrics, rel=1e-5, abs=1e-7)


def test_forward_equals_forward_backward(tokenizer):
    session = session_of(tokenizer, micro_batch_tokens=12)
    batch, loss_fn = policy_batch(session), rlloss.GRPOLoss(kl_coef=0.1)
    loss, metrics = session.forward(batch, loss_fn)
    assert all(p.grad is None for p in session.model.parameters())
    trained_loss, trained_metrics = session.forward_backward(batch, loss_fn)
    assert loss == pytest.approx(trained_loss, rel=1e-5)
    assert rlloss.scalars(metrics) == pytest.approx(rlloss.scalars(trained_metrics), rel=1e-4, abs=1e-6)


def test_logprobs_are_those_of_the_models_own_logits(tokenizer):
    session = session_of(tokenizer, micro_batch_tokens=12, temperature=0.7)
    batch = policy_batch(session)
    got = session.logprobs(batch)
    for row in range(len(batch.ids)):
        length = int(batch.lengths[row])
        logits = session.model(batch.input_ids[row : row + 1, :length]).logits[0] / 0.7
        own = torch.log_softmax(logits, -1)
        for t in range(length - 1):
            if batch.loss_mask[row, t]:
                expected = own[t, batch.input_ids[row, t + 1]].item()
                assert got[row, t].item() == pytest.approx(expected, abs=1e-5)
    assert (got[~batch.loss_mask] == 0).all()


def test_micro_batches_cover_every_row_within_the_budget(tokenizer):
    batch = policy_batch(session_of(tokenizer))
    parts = micro_batches(batch, 14)
    assert sorted(torch.cat(parts).tolist()) == list(range(7))
    for rows in parts:
        assert len(rows) == 1 or batch.select(rows).input_ids.numel() <= 14


def test_micro_batches_keep_pairs_together(tokenizer):
    batch = pair_batch(session_of(tokenizer))
    for rows in micro_batches(batch, 14):
        assert (rows.view(-1, 2)[:, 0] % 2 == 0).all()
        assert (rows.view(-1, 2)[:, 1] == rows.view(-1, 2)[:, 0] + 1).all()


def test_train_online_learns_the_reward(tokenizer):
    session = session_of(tokenizer, learning_rate=1e-2)
    questions = prompts([{"prompt": p} for p in ("ab", "cde", "f", "gh")], tokenizer)
    before, _ = evaluate_online(session, questions * 20, share_of_a, max_new_tokens=4)
    history = train_online(
        session,
        questions,
        share_of_a,
        rlloss.GRPOLoss(),
        steps=25,
        prompts_per_step=4,
        max_new_tokens=4,
        progress=False,
    )
    after, texts = evaluate_online(session, questions * 20, share_of_a, max_new_tokens=4)
    assert before < 0.3
    assert after > 0.9
    assert history[-1]["reward"] > 0.9 > 0.3 > history[0]["reward"]
    assert history[0]["ref_kl"] == pytest.approx(0, abs=1e-9)
    assert history[-1]["ref_kl"] > 0.1
    assert "aa" in texts[0]


@pytest.mark.parametrize("recompute", [True, False])
def test_train_online_starts_at_ratio_one(tokenizer, recompute):
    session = session_of(tokenizer, learning_rate=0.0)
    (numbers,) = train_online(
        session,
        prompts([{"prompt": "ab"}, {"prompt": "cdefg"}], tokenizer),
        share_of_a,
        rlloss.GRPOLoss(),
        steps=1,
        prompts_per_step=2,
        max_new_tokens=4,
        updates_per_epoch=2,
        recompute_old_logprobs=recompute,
        progress=False,
    )
    assert numbers["ratio"] == pytest.approx(1, abs=1e-5)
    assert numbers["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert numbers["clip_frac"] == 0


def test_train_offline_fits_and_prefers(tokenizer):
    session = session_of(tokenizer, learning_rate=3e-3)
    likely, unlikely = Tokens([2, 3, 4, 5, 1], [False] + [True] * 4), Tokens([2, 9, 9, 9, 1], [False] + [True] * 4)
    first = evaluate_offline(session, [likely], rlloss.SFTLoss())["eval/nll"]
    train_offline(session, [likely], rlloss.SFTLoss(), steps=60, batch_size=1, progress=False)
    assert evaluate_offline(session, [likely], rlloss.SFTLoss())["eval/nll"] < 0.2 < 1.5 < first
    session = session_of(tokenizer, learning_rate=3e-3)
    history = train_offline(session, [Pair(unlikely, likely)], rlloss.DPOLoss(), steps=30, batch_size=1, progress=False)
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert history[-1]["accuracy"] == 1
    assert history[-1]["margin"] > 0.5


def run_online(tokenizer, folder, steps, **options):
    session = session_of(tokenizer, learning_rate=1e-2, seed=5)
    questions = prompts([{"prompt": p} for p in ("ab", "cde", "f", "gh", "hh")], tokenizer)
    train_online(
        session,
        questions,
        share_of_a,
        rlloss.GRPOLoss(kl_coef=0.05),
        steps=steps,
        prompts_per_step=2,
        max_new_tokens=4,
        updates_per_epoch=2,
        folder=folder,
        progress=False,
        **options,
    )
    return session


def test_resume_continues_bit_for_bit(tokenizer, tmp_path):
    whole = run_online(tokenizer, tmp_path / "whole", 6)
    run_online(tokenizer, tmp_path / "parts", 3)
    resumed = run_online(tokenizer, tmp_path / "parts", 6, resume=True)
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")


def test_evaluation_leaves_the_run_alone(tokenizer, tmp_path):
    questions = prompts([{"prompt": "abc"}], tokenizer)

    def evaluate(session):
        return {"accuracy": evaluate_online(session, questions, share_of_a, max_new_tokens=3)[0]}

    plain = run_online(tokenizer, tmp_path / "plain", 4)
    watched = run_online(tokenizer, tmp_path / "watched", 4, evaluate=evaluate, evaluate_every=2)
    for ours, theirs in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert ["accuracy" in line for line in read_metrics(tmp_path / "watched")] == [False, True, False, True]


def test_until_ends_a_run_and_saves_it(tokenizer, tmp_path):
    run_online(tokenizer, tmp_path, 9, until=lambda numbers: True)
    assert len(read_metrics(tmp_path)) == 1
    assert (tmp_path / "checkpoint").is_dir()


def test_sampler_copy_follows_the_policy(tokenizer):
    session = session_of(tokenizer, sampling_dtype=torch.bfloat16, learning_rate=0.1)
    session.sample([[2, 3]], max_new_tokens=2)
    session.forward_backward(policy_batch(session), rlloss.SFTLoss())
    session.optim_step()
    session.sample([[2, 3]], max_new_tokens=2)
    assert session._sampler is not None
    for ours, theirs in zip(session._sampler.parameters(), session.model.parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.to(torch.bfloat16))


def test_frozen_parameters_stay(tokenizer):
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    session = Session(model, tokenizer, learning_rate=0.1)
    session.forward_backward(policy_batch(session), rlloss.SFTLoss())
    session.optim_step()
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_save_model_is_a_transformers_folder(tokenizer, tmp_path):
    session = session_of(tokenizer)
    session.save_model(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for ours, theirs in zip(session.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_example_order_visits_everything_once_per_epoch():
    order = example_order(7, 3, seed=1)
    drawn = [i for step in range(7) for i in order(step)]
    for epoch in range(3):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert drawn[:7] != drawn[7:14]


def test_rewards_are_weighed():
    def one(prompts, completions, **columns):
        return [1] * len(completions)

    def given(prompts, completions, score, **columns):
        return score

    scores = Rewards([one, given], weights=[0.5, 2.0])(["p"] * 2, ["a", "b"], {"score": [3, 4]})
    assert scores.total.tolist() == [6.5, 8.5]
    assert scores.means == {"reward/one": 1.0, "reward/given": 3.5}
    assert scores.per_token is None


def test_rewards_may_come_token_by_token():
    def per_token(prompts, completions, completion_ids, **columns):
        return [[float(i) for i in ids] for ids in completion_ids]

    def whole(prompts, completions, **columns):
        return [10.0, 20.0]

    ids = {"completion_ids": [[1, 2, 3], [4]]}
    scores = Rewards([per_token, whole], weights=[1.0, 0.5])(["p"] * 2, ["abc", "d"], ids)
    assert scores.total.tolist() == [11.0, 14.0]
    assert scores.per_token == [[1.0, 2.0, 8.0], [14.0]]  # the answer's own reward stands at its last token


def too_few(prompts, completions, **columns):
    return [1.0]


def not_a_number(prompts, completions, **columns):
    return [0.0] * (len(completions) - 1) + [float("nan")]


def too_few_tokens(prompts, completions, **columns):
    return [[1.0], [1.0], [1.0]]


def mixed(prompts, completions, **columns):
    return [[1.0, 2.0], 1.0, [1.0]]


def nan_token(prompts, completions, **columns):
    return [[1.0, float("nan")], [1.0], [1.0]]


def nothing(prompts, completions, **columns):
    return None


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (too_few, r"'too_few'.*got 3 completions but returned 1"),
        (not_a_number, r"'not_a_number'.*nan for completion 2 \('c'\).*finite"),
        (nothing, r"'nothing'.*one number per completion, got None"),
        (too_few_tokens, r"'too_few_tokens'.*each of the 2 tokens of completion 0 \('ab'\), got 1 numbers"),
        (mixed, r"'mixed'.*each of the 1 tokens of completion 1 .*got one number"),
        (nan_token, r"'nan_token'.*returned nan for completion 0"),
    ],
)
def test_bad_rewards_raise(function, message):
    with pytest.raises(ValueError, match=message):
        Rewards(function)(["p"] * 3, ["ab", "b", "c"], {"completion_ids": [[2, 3], [3], [4]]})


@pytest.mark.unhooked
def test_misuse_raises(tokenizer):
    session = session_of(tokenizer, reference=False)
    questions = prompts([{"prompt": "ab"}], tokenizer)
    with pytest.raises(ValueError, match="GRPOLoss needs a reference; pass Session"):
        train_online(session, questions, share_of_a, rlloss.GRPOLoss(kl_coef=0.1), steps=1, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"DPOLoss: trains on rlloss.loop.Pair examples.*got Tokens"):
        train_offline(session, [Tokens([2, 3], [False, True])], rlloss.DPOLoss(), steps=1, batch_size=1)
    batch = policy_batch(session)
    with pytest.raises(ValueError, match=r"DPOLoss: its family trains 2 rows per example"):
        session.forward_backward(batch, rlloss.DPOLoss(reference_free=True))
    del batch.fields["ref_logprobs"]
    with pytest.raises(ValueError, match="GRPOLoss: needs the reference's log-probs"):
        session.forward_backward(batch, rlloss.GRPOLoss(kl_coef=0.1))
    with pytest.raises(ValueError, match="MSELoss: the loop calls a loss by its family"):
        session.forward_backward(batch, torch.nn.MSELoss())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        Session(frozen_copy(tiny_llama()), tokenizer)
    with pytest.raises(ValueError, match="temperature must be a number"):
        session_of(tokenizer, temperature=0.0)
    with pytest.raises(ValueError, match="resume and save_every need a folder"):
        train_online(
            session, questions, share_of_a, rlloss.GRPOLoss(), steps=1, max_new_tokens=2, resume=True, progress=False
        )


def test_a_gradient_that_is_not_finite_stops_the_run(tokenizer):
    session = session_of(tokenizer)
    session.forward_backward(policy_batch(session), rlloss.SFTLoss())
    parameter = next(session.model.parameters())
    assert parameter.grad is not None
    parameter.grad[0] = torch.nan
    before = parameter.detach().clone()
    with pytest.raises(FloatingPointError, match="gradient norm of update 0 is nan"):
        session.optim_step()
    assert torch.equal(parameter, before)
