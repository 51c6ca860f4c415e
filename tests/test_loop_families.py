"""Every family through the loop: critics, labelled answers and reward models, with all that their checkpoints hold."""

import copy
import logging

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import (
    CriticAdvantages,
    GroupAdvantages,
    Pair,
    Session,
    Tokens,
    collate,
    evaluate_offline,
    frozen_copy,
    labelled,
    load_scalar_model,
    offline_batch,
    prompts,
    read_metrics,
    rollout,
    train_offline,
    train_online,
)
from rlloss.loop.rewards import Rewards


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


def critic_session(tokenizer, *, own_trunk=True, **options):
    model = tiny_llama()
    critic = rlloss.ScalarModel(copy.deepcopy(model) if own_trunk else model)
    torch.nn.init.normal_(critic.head.weight, std=0.1)
    return Session(model, tokenizer, reference=frozen_copy(model), critic=critic, **options)


def share_of_a(prompts, completions, **columns):
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


PROMPTS = [{"prompt": p} for p in ("ab", "cde", "f", "gh")]
PPO = rlloss.ActorCriticLoss(policy=rlloss.PPOLoss(entropy_coef=0.01), value=rlloss.ValueLoss())


def critic_batch(session, tokenizer):
    batch, _ = rollout(session, prompts(PROMPTS, tokenizer), Rewards(share_of_a), 2, 4)
    batch.fields["ref_logprobs"] = session.logprobs(batch, reference=True)
    CriticAdvantages(kl_coef=0.1, kl="k3")(session, batch)
    return batch


def gradients(session):
    modules = (session.model,) if session.critic is None else (session.model, session.critic)
    return [p.grad for module in modules for p in module.parameters() if p.grad is not None]


# critics


@pytest.mark.parametrize("own_trunk", [True, False], ids=["own_trunk", "shared_trunk"])
def test_a_critics_step_does_not_depend_on_micro_batches(tokenizer, own_trunk):
    batch = critic_batch(critic_session(tokenizer, own_trunk=own_trunk), tokenizer)
    results = []
    for micro_batch_tokens in (10_000, 14):
        session = critic_session(tokenizer, own_trunk=own_trunk, micro_batch_tokens=micro_batch_tokens)
        loss, metrics = session.forward_backward(batch, PPO)
        results.append((loss, gradients(session), rlloss.scalars(metrics)))
    (whole, whole_grads, whole_metrics), (split, split_grads, split_metrics) = results
    assert split == pytest.approx(whole, rel=1e-5)
    assert len(whole_grads) == len(split_grads)
    for grad, whole_grad in zip(split_grads, whole_grads, strict=True):
        torch.testing.assert_close(grad, whole_grad, rtol=1e-3, atol=1e-6)
    assert split_metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-5)
    assert {"clip_frac", "explained_variance", "value_error"} <= split_metrics.keys()


def test_a_loss_that_is_not_a_sum_trains_a_critic_through_the_waist(tokenizer):
    loss_fn = rlloss.ActorCriticLoss(policy=rlloss.ConservativePPOLoss(conservative_coef=5.0), value=rlloss.ValueLoss())
    batch = critic_batch(critic_session(tokenizer), tokenizer)
    losses, grads = [], []
    for micro_batch_tokens in (10_000, 14):
        session = critic_session(tokenizer, micro_batch_tokens=micro_batch_tokens)
        losses.append(session.forward_backward(batch, loss_fn)[0])
        grads.append(gradients(session))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for grad, whole_grad in zip(*grads, strict=True):
        torch.testing.assert_close(grad, whole_grad, rtol=1e-3, atol=1e-6)


def test_values_are_aligned_with_the_tokens_that_follow_them(tokenizer):
    session = critic_session(tokenizer)
    batch = collate([Tokens([2, 3, 4, 5, 1], [False, False, True, True, True]), Tokens([6, 7, 1], [False, True, True])])
    values = session.values(batch)
    assert session.critic is not None
    for row, length in enumerate((5, 3)):
        alone = session.critic(batch.input_ids[row : row + 1, :length])[0]
        torch.testing.assert_close(values[row, :length], alone, rtol=1e-4, atol=1e-6)
    assert batch.last_index.tolist() == [4, 2]


@pytest.mark.parametrize(("own_trunk", "forwards"), [(False, 1), (True, 2)])
def test_a_shared_trunk_takes_one_forward_and_an_own_trunk_two(tokenizer, own_trunk, forwards):
    session = critic_session(tokenizer, own_trunk=own_trunk)
    batch, calls = critic_batch(session, tokenizer), []
    session.forward_backward(batch, PPO)  # the first call proves the head, by forwards of its own
    assert session.critic is not None
    for module in {session.model.model, session.critic.backbone}:
        module.register_forward_hook(lambda *_: calls.append(1))
    session.forward_backward(batch, PPO)
    assert len(calls) == forwards


@pytest.mark.parametrize("bootstrap", [False, True])
def test_critic_advantages_are_gae_of_the_shaped_rewards(tokenizer, bootstrap):
    session = critic_session(tokenizer)
    batch, _ = rollout(session, prompts(PROMPTS, tokenizer), Rewards(share_of_a), 2, 3)
    ref = session.logprobs(batch) - 0.25 * batch.loss_mask
    batch.fields |= {"old_logprobs": session.logprobs(batch), "ref_logprobs": ref}
    numbers = CriticAdvantages(gamma=0.9, gae_lambda=0.8, kl_coef=0.5, whiten=False, bootstrap=bootstrap)(
        session, batch
    )
    lengths = batch.loss_mask.sum(-1)
    assert numbers["sequence_kl"] == pytest.approx(0.25 * float(lengths.float().mean()), rel=1e-4)
    assert numbers["kl_coef"] == 0.5
    values = session.values(batch)
    assert not batch.fields["finished"].all()  # so that bootstrapping is seen
    for row in range(len(lengths)):
        (trained,) = batch.loss_mask[row].nonzero(as_tuple=True)
        after = 0.0 if batch.fields["finished"][row] or not bootstrap else float(values[row, trained[-1] + 1])
        advantage = 0.0
        for t in reversed(trained.tolist()):
            is_last = t == trained[-1]
            reward = -0.5 * 0.25 + (float(batch.fields["rewards"][row]) if is_last else 0.0)
            following = after if is_last else float(values[row, t + 1])
            advantage = reward + 0.9 * following - float(values[row, t]) + 0.72 * advantage
            assert batch.fields["advantages"][row, t] == pytest.approx(advantage, abs=1e-4)
            assert batch.fields["returns"][row, t] == pytest.approx(advantage + float(values[row, t]), abs=1e-4)


def test_rewards_per_token_reach_the_tokens_that_earned_them(tokenizer):
    def a_by_a(prompts, completions, completion_ids, **columns):
        return [[float(i == 2) for i in ids] for ids in completion_ids]

    session = critic_session(tokenizer)
    batch, numbers = rollout(session, prompts(PROMPTS, tokenizer), Rewards(a_by_a), 4, 4)
    is_a = (batch.ids == 2) & batch.loss_mask
    assert is_a.any()
    assert torch.equal(batch.fields["token_rewards"], is_a.float())
    assert numbers["reward"] == pytest.approx(float(is_a.sum() / len(is_a)))
    CriticAdvantages(gae_lambda=0.0, whiten=False)(session, batch)
    values = session.values(batch)
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1) * ~rlloss.last_tokens(batch.loss_mask)
    expected = (is_a + following - values) * batch.loss_mask
    torch.testing.assert_close(batch.fields["advantages"], expected, rtol=1e-4, atol=1e-5)


def test_group_advantages_carry_the_kl_in_the_reward(tokenizer):
    session = critic_session(tokenizer)
    batch, _ = rollout(session, prompts(PROMPTS, tokenizer), Rewards(share_of_a), 3, 3)
    noise = torch.randn(batch.ids.shape, generator=torch.Generator().manual_seed(0))
    batch.fields["ref_logprobs"] = batch.fields["rollout_logprobs"] + noise
    GroupAdvantages(kl_coef=0.5, baseline="leave_one_out", scale="none")(session, batch)
    totals = batch.fields["rewards"] + 0.5 * (noise * batch.loss_mask).sum(-1)
    expected = totals - (totals.view(-1, 3).sum(1, keepdim=True).expand(-1, 3).reshape(-1) - totals) / 2
    torch.testing.assert_close(batch.fields["advantages"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own_trunk", [True, False], ids=["own_trunk", "shared_trunk"])
def test_ppo_learns_the_reward_and_its_critic_the_value(tokenizer, own_trunk):
    session = critic_session(tokenizer, own_trunk=own_trunk, learning_rate=1e-2)
    history = train_online(
        session,
        prompts(PROMPTS, tokenizer),
        share_of_a,
        PPO,
        steps=40,
        prompts_per_step=4,
        group_size=8,
        max_new_tokens=4,
        advantages=CriticAdvantages(),
        progress=False,
    )
    assert history[0]["reward"] < 0.3
    assert history[-1]["reward"] > 0.9
    assert history[-1]["value_error"] < 0.05 < history[0]["value_error"]


def test_a_value_loss_alone_trains_the_critic_alone(tokenizer):
    session = critic_session(tokenizer, learning_rate=1e-2)
    before = copy.deepcopy(session.model.state_dict())
    history = train_online(
        session,
        prompts(PROMPTS, tokenizer),
        share_of_a,
        rlloss.ValueLoss(value_clip=None),
        steps=60,
        prompts_per_step=4,
        group_size=8,
        max_new_tokens=4,
        advantages=CriticAdvantages(gae_lambda=1.0),
        progress=False,
    )
    assert all(torch.equal(x, before[name]) for name, x in session.model.state_dict().items())
    # what is drawn later is noise to any critic: after t of 4 tokens at most t / 4 of the variance is known
    explained = [numbers["explained_variance_before"] for numbers in history]
    assert sum(explained[-10:]) / 10 > 0.1 > explained[0]


def ppo_run(tokenizer, folder, steps, *, own_trunk, **options):
    session = critic_session(tokenizer, own_trunk=own_trunk, learning_rate=1e-2, critic_learning_rate=3e-3, seed=5)
    controller = rlloss.AdaptiveKLController(0.1, target_kl=0.05, horizon=64)
    advantages = CriticAdvantages(kl_coef=controller, reward_norm=rlloss.RunningRewardNorm())
    train_online(
        session,
        prompts(PROMPTS, tokenizer),
        share_of_a,
        PPO,
        steps=steps,
        prompts_per_step=2,
        group_size=4,
        max_new_tokens=4,
        advantages=advantages,
        updates_per_epoch=2,
        folder=folder,
        progress=False,
        **options,
    )
    return session, advantages


@pytest.mark.parametrize("own_trunk", [True, False], ids=["own_trunk", "shared_trunk"])
def test_a_checkpoint_holds_heads_and_controllers(tokenizer, tmp_path, own_trunk):
    whole, whole_advantages = ppo_run(tokenizer, tmp_path / "whole", 6, own_trunk=own_trunk)
    ppo_run(tokenizer, tmp_path / "parts", 3, own_trunk=own_trunk)
    resumed, advantages = ppo_run(tokenizer, tmp_path / "parts", 6, own_trunk=own_trunk, resume=True)
    assert whole.critic is not None
    assert resumed.critic is not None
    for module, again in ((whole.model, resumed.model), (whole.critic, resumed.critic), (whole_advantages, advantages)):
        for name, x in module.state_dict().items():
            assert torch.equal(x, again.state_dict()[name]), name
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    coefficients = [line["kl_coef"] for line in read_metrics(tmp_path / "whole")]
    assert len(set(coefficients)) > 2
    assert advantages.reward_norm is not None
    assert int(advantages.reward_norm.count) == 6 * 8


@pytest.mark.unhooked
def test_a_checkpoint_of_more_modules_is_refused(tokenizer, tmp_path):
    session, _ = ppo_run(tokenizer, tmp_path, 1, own_trunk=True)
    with pytest.raises(ValueError, match=r"holds 'tracked.advantages.*for which this session has no module"):
        critic_session(tokenizer).load_state(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"holds 'critic.*for which this session has no module"):
        Session(tiny_llama(), tokenizer).load_state(tmp_path / "checkpoint")
    session.load_state(tmp_path / "checkpoint")


def test_gradients_are_clipped_apart_where_nothing_is_shared(tokenizer):
    session = critic_session(tokenizer, max_grad_norm=1e-9)
    session.forward_backward(critic_batch(session, tokenizer), PPO)
    norms = session.optim_step()
    assert norms["grad_norm"] > 1e-3
    assert norms["critic_grad_norm"] > 1e-3
    shared = critic_session(tokenizer, own_trunk=False)
    shared.forward_backward(critic_batch(shared, tokenizer), PPO)
    assert "critic_grad_norm" not in shared.optim_step()


# labelled answers

THUMBS = [
    {"prompt": "ab", "completion": "cc", "label": True},
    {"prompt": "ab", "completion": "dd", "label": False},
    {"prompt": "ef", "completion": "cg", "label": 1},
    {"prompt": "h", "completion": "dg", "label": 0},
]


def test_labelled_rows_meet_the_answer_to_another_prompt(tokenizer):
    made = labelled(THUMBS, tokenizer)
    assert [example.desirable for example in made] == [True, False, True, False]
    decoded = [tokenizer.decode(example.mismatched.input_ids, skip_special_tokens=True) for example in made]
    assert decoded == ["abcg", "abcg", "efdg", "hcc"]
    assert made[3].mismatched.loss_mask == [False, True, True, True]


def test_one_prompt_meets_another_answer_and_says_so(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, logger="rlloss"):
        made = labelled(THUMBS[:2], tokenizer)
    assert "all 2 rows have the same prompt" in caplog.text
    assert [tokenizer.decode(e.mismatched.input_ids, skip_special_tokens=True) for e in made] == ["abdd", "abcc"]


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, r"row 1.*no column 'label'"),
        ({"prompt": "a", "completion": "b", "label": "yes"}, r"'label' must be True or False.*got 'yes'"),
        ({"prompt": "a", "completion": "b", "label": None}, r"'label' must be True or False.*got None"),
    ],
)
def test_bad_labels_teach(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        labelled([row], tokenizer)


def test_kto_learns_from_thumbs_and_its_kl_is_that_of_the_mismatched(tokenizer):
    model = tiny_llama()
    session = Session(model, tokenizer, reference=frozen_copy(model), learning_rate=3e-3)
    examples = labelled(THUMBS, tokenizer)
    loss_fn = rlloss.KTOLoss(beta=0.5)
    before = evaluate_offline(session, examples, loss_fn)
    assert before["eval/loss"] == pytest.approx(0.5)
    train_offline(session, examples, loss_fn, steps=40, batch_size=4, progress=False)
    after = evaluate_offline(session, examples, loss_fn)
    assert after["eval/loss"] < 0.3
    assert after["eval/accuracy"] == 1
    assert after["eval/desirable_reward"] > 0 > after["eval/undesirable_reward"]

    batch = offline_batch(session, examples, loss_fn)
    mismatched = collate([example.mismatched for example in examples])
    policy, ref = (session.logprobs(mismatched, reference=reference).sum(-1) for reference in (False, True))
    assert float(batch.fields["kl"]) == pytest.approx(max(0.0, float((policy - ref).mean())), abs=1e-5)


def test_kto_trains_on_one_row_and_in_micro_batches(tokenizer):
    results = []
    for micro_batch_tokens in (10_000, 5):
        model = tiny_llama()
        session = Session(model, tokenizer, reference=frozen_copy(tiny_llama(1)), micro_batch_tokens=micro_batch_tokens)
        batch = offline_batch(session, labelled(THUMBS, tokenizer), rlloss.KTOLoss())
        loss, metrics = session.forward_backward(batch, rlloss.KTOLoss())
        results.append((loss, gradients(session), rlloss.scalars(metrics)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert results[0][2] == pytest.approx(results[1][2], rel=1e-5, abs=1e-6)
    for whole, split in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-3, atol=1e-7)
    one = offline_batch(session, labelled(THUMBS, tokenizer)[:1], rlloss.KTOLoss())
    assert 0 < session.forward_backward(one, rlloss.KTOLoss())[0] < 1


# length-normalised preferences


def test_simpo_and_ipo_of_means_read_means(tokenizer):
    session = Session(tiny_llama(), tokenizer, reference=frozen_copy(tiny_llama(1)))
    pair = Pair(Tokens([2, 3, 4, 1], [False, True, True, True]), Tokens([2, 5, 1], [False, True, True]))
    batch = offline_batch(session, [pair], rlloss.DPOLoss())
    sums, refs = session.logprobs(batch).sum(-1), session.logprobs(batch, reference=True).sum(-1)
    means, ref_means = sums / torch.tensor([3, 2]), refs / torch.tensor([3, 2])
    for loss_fn, (chosen, rejected), (ref_chosen, ref_rejected) in (
        (rlloss.IPOLoss(), sums, refs),
        (rlloss.IPOLoss(length_normalized=True), means, ref_means),
    ):
        expected = ((chosen - ref_chosen) - (rejected - ref_rejected) - 5) ** 2
        assert session.forward(batch, loss_fn)[0] == pytest.approx(float(expected), rel=1e-4)
    simpo = session.forward(batch, rlloss.SimPOLoss(beta=2.0, margin=0.3))[0]
    x = 2 * (means[0] - means[1]) - 0.3
    assert simpo == pytest.approx(float(-torch.nn.functional.logsigmoid(x)), rel=1e-4)


# reward models


def reward_session(**options):
    return Session(rlloss.ScalarModel(tiny_llama(), bias=False), options.pop("tokenizer"), **options)


PAIRS = [
    Pair(Tokens([2, c, 4, 1], [False, True, True, True]), Tokens([2, r, 1], [False, True, True]))
    for c, r in ((3, 5), (6, 7), (3, 7), (6, 5))
]


def test_a_reward_model_learns_pairs_and_is_read_again(tokenizer, tmp_path):
    session = reward_session(tokenizer=tokenizer, learning_rate=1e-2)
    loss_fn = rlloss.BradleyTerryLoss(center_coef=0.01)
    before = evaluate_offline(session, PAIRS, loss_fn)
    assert before["eval/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert before["eval/accuracy"] == 0
    train_offline(session, PAIRS, loss_fn, steps=40, batch_size=4, folder=tmp_path / "run", progress=False)
    assert evaluate_offline(session, PAIRS, loss_fn)["eval/accuracy"] == 1
    again = load_scalar_model(session.save_model(tmp_path / "model"))
    ids = torch.tensor([[2, 3, 4, 1]])
    torch.testing.assert_close(again.score(ids, torch.tensor([3])), session.model.score(ids, torch.tensor([3])))
    fresh = reward_session(tokenizer=tokenizer, learning_rate=1e-2)
    fresh.track(loss=loss_fn)
    fresh.load_state(tmp_path / "run" / "checkpoint")
    torch.testing.assert_close(fresh.model.score(ids, torch.tensor([3])), again.score(ids, torch.tensor([3])))


def test_a_reward_is_read_at_the_last_trained_token(tokenizer):
    results = []
    for micro_batch_tokens in (10_000, 9):
        session = reward_session(tokenizer=tokenizer, micro_batch_tokens=micro_batch_tokens)
        torch.nn.init.normal_(session.model.head.weight, generator=torch.Generator().manual_seed(0))
        batch = offline_batch(session, PAIRS, rlloss.BradleyTerryLoss())
        loss, _ = session.forward_backward(batch, rlloss.BradleyTerryLoss())
        results.append((loss, gradients(session)))
    with torch.no_grad():
        chosen = [session.model(torch.tensor([p.chosen.input_ids]))[0, -1] for p in PAIRS]
        rejected = [session.model(torch.tensor([p.rejected.input_ids]))[0, -1] for p in PAIRS]
    differences = torch.stack(chosen) - torch.stack(rejected)
    assert results[0][0] == pytest.approx(float(-torch.nn.functional.logsigmoid(differences).mean()), rel=1e-4)
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for whole, split in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-3, atol=1e-6)


@pytest.mark.unhooked
def test_misuse_of_critics_and_reward_models_teaches(tokenizer, tmp_path):
    plain = Session(tiny_llama(), tokenizer)
    questions = prompts(PROMPTS, tokenizer)

    def train(session, loss_fn, advantages):
        train_online(
            session, questions, share_of_a, loss_fn, steps=1, max_new_tokens=2, advantages=advantages, progress=False
        )

    with pytest.raises(ValueError, match=r"CriticAdvantages needs a critic; pass Session\(\.\.\., critic="):
        train(plain, PPO, CriticAdvantages())
    with pytest.raises(ValueError, match="a critic takes both"):
        train(critic_session(tokenizer), rlloss.PPOLoss(), CriticAdvantages())
    with pytest.raises(ValueError, match="a critic takes both"):
        train(critic_session(tokenizer), PPO, GroupAdvantages())
    with pytest.raises(ValueError, match="GroupAdvantages needs a reference"):
        train(plain, rlloss.PPOLoss(), GroupAdvantages(kl_coef=0.1))
    with pytest.raises(ValueError, match="BradleyTerryLoss: trains a reward model; pass Session"):
        train_offline(plain, PAIRS, rlloss.BradleyTerryLoss(), steps=1, batch_size=2, progress=False)
    rewards = reward_session(tokenizer=tokenizer)
    with pytest.raises(ValueError, match="DPOLoss: needs a language model"):
        train_offline(rewards, PAIRS, rlloss.DPOLoss(reference_free=True), steps=1, batch_size=2, progress=False)
    with pytest.raises(ValueError, match=r"Session.sample: needs a language model"):
        rewards.sample([[2]], max_new_tokens=1)
    with pytest.raises(ValueError, match="the family 'policy' does not train on fixed data"):
        train_offline(plain, PAIRS, rlloss.GRPOLoss(), steps=1, batch_size=2, progress=False)
    with pytest.raises(ValueError, match=r"KTOLoss: trains on rlloss.loop.Labelled examples.*got Pair"):
        train_offline(plain, PAIRS, rlloss.KTOLoss(), steps=1, batch_size=2, progress=False)
    with pytest.raises(ValueError, match="critic_learning_rate is for the optimiser made here"):
        critic_session(tokenizer, optimizer=plain.optimizer, critic_learning_rate=1e-3)
    with pytest.raises(ValueError, match=r"Session: needs a critic, got None"):
        plain.values(collate([Tokens([2, 3], [False, True])]))
    with pytest.raises(ValueError, match=r"has no scalar_head.safetensors"):
        load_scalar_model(tmp_path)
    batch = collate([Tokens([2, 3, 1], [False, True, True])])
    with pytest.raises(ValueError, match=r"GRPOLoss: needs batch.fields\['advantages'\]"):
        plain.forward_backward(batch, rlloss.GRPOLoss())
