"""Signal's eight loss names against the library's losses, called by hand on the model's own logits."""

import asyncio
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import rlloss
from rlloss.adapters.signal import LOSSES, TrainingClient
from rlloss.loop import Session, frozen_copy

REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
WIDTH = REAL.shape[1]
TRAINED = REAL.bool() & (torch.arange(WIDTH) > 0)
IDS = torch.randint(2, 9, REAL.shape, generator=torch.Generator().manual_seed(1)) * REAL
SIDES = ("chosen", "rejected")


class Tokens:
    """All that a session asks of a tokenizer."""

    eos_token_id = 1


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=10, initializer_range=0.2, **size)).double().eval()


def session_of(*, reward_model=False, critic=True, **options):
    model: Any = tiny_llama()
    head = rlloss.ScalarModel(model, bias=not reward_model)
    torch.nn.init.normal_(head.head.weight, std=0.3)
    if reward_model:
        return Session(head, Tokens(), micro_batch_tokens=10, **options)
    reference = frozen_copy(tiny_llama(1))
    return Session(
        model, Tokens(), reference=reference, critic=head if critic else None, micro_batch_tokens=10, **options
    )


def noise(*shape, seed, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs_of(model, ids=IDS, real=REAL):
    """The log-prob and the entropy of every token, where the token stands; 0 for the first of a row."""
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].log_softmax(-1)
    own = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return F.pad(own, (1, 0)), F.pad(-(logits.exp() * logits).sum(-1), (1, 0))


def values_of(session, ids=IDS, real=REAL):
    """The critic's value of the state in which every token is chosen."""
    return F.pad(session.critic(ids, attention_mask=real)[:, :-1], (1, 0))


def old_logprobs(model, scale=0.3):
    with torch.no_grad():
        return logprobs_of(model)[0] + noise(*REAL.shape, seed=2, scale=scale)


def text_batch(session, **more):
    return {"input_ids": IDS, "attention_mask": REAL, **more}


def reward_per_token():
    return torch.where(TRAINED, noise(*REAL.shape, seed=3), 0)


def pairs_batch(session):
    other = torch.randint(2, 10, (3, 5), generator=torch.Generator().manual_seed(4))
    return {
        "chosen_input_ids": IDS,
        "chosen_attention_mask": REAL,
        "rejected_input_ids": other,
        "rejected_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]),
    }


def answers_batch(session, **more):
    """Two prompts of three tokens, three responses each of up to four."""
    generator = torch.Generator().manual_seed(5)
    masks = torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]])
    return {
        "prompt_ids": torch.randint(2, 10, (2, 3), generator=generator),
        "response_ids": torch.randint(2, 10, (2, 3, 4), generator=generator) * masks,
        "rewards": torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]], dtype=torch.float64),
        "response_masks": masks,
        **more,
    }


def single_answers(session, **more):
    """The first response to each prompt and to each prompt again the second: `[B, L]`."""
    batch = answers_batch(session)
    batch["prompt_ids"] = batch["prompt_ids"].repeat_interleave(3, 0)
    for name in ("response_ids", "response_masks"):
        batch[name] = batch[name].flatten(0, 1)
    batch["rewards"] = batch["rewards"].flatten()
    return batch | more


def joined(batch):
    """Prompt and response as one text: ids, what is real, what is trained."""
    prompts, answers, masks = (batch[name] for name in ("prompt_ids", "response_ids", "response_masks"))
    if answers.ndim == 3:
        prompts, answers, masks = prompts.repeat_interleave(3, 0), answers.flatten(0, 1), masks.flatten(0, 1)
    real = torch.cat([torch.ones_like(prompts), masks], 1)
    return torch.cat([prompts, answers], 1), real, torch.cat([prompts * 0, masks], 1).bool()


# by hand: what each loss name stands for


def by_hand_causal_lm(session, batch):
    logprobs, _ = logprobs_of(session.model)
    return rlloss.SFTLoss()(logprobs, TRAINED).loss


def by_hand_dpo(session, batch, beta=0.1, label_smoothing=0.0):
    def side(name):
        ids, real = batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"]
        trained = real.bool() & (torch.arange(ids.shape[1]) > 0)
        models = (session.model, session.reference)
        return [rlloss.sequence_logps(logprobs_of(model, ids, real)[0], trained) for model in models]

    (chosen, ref_chosen), (rejected, ref_rejected) = side("chosen"), side("rejected")
    loss_fn = rlloss.DPOLoss(beta=beta, label_smoothing=label_smoothing)
    return loss_fn(chosen, rejected, ref_chosen.detach(), ref_rejected.detach()).loss


def by_hand_grpo(session, batch, beta=0.01, clip_epsilon=0.2):
    ids, real, trained = joined(batch)
    old = None
    if "old_log_probs" in batch:
        old = F.pad(batch["old_log_probs"].flatten(0, 1), (3, 0))
    advantages = rlloss.group_advantages(batch["rewards"].flatten(), torch.arange(6) // 3)
    loss_fn = rlloss.GRPOLoss(clip_eps_low=clip_epsilon, clip_eps_high=clip_epsilon, kl_coef=beta)
    logprobs = logprobs_of(session.model, ids, real)[0]
    ref = logprobs_of(session.reference, ids, real)[0].detach()
    return loss_fn(logprobs, old, advantages, trained, ref_logprobs=ref).loss


def actor_critic(session, ids, real, trained, rewards, old, values, old_values, gamma, gae_lambda, **options):
    logprobs, entropy = logprobs_of(session.model, ids, real)
    ref = logprobs_of(session.reference, ids, real)[0].detach()
    now = values_of(session, ids, real)
    values = now.detach() if values is None else values
    advantages, returns = rlloss.gae(rewards, values, trained, gamma, gae_lambda)
    clip = options["clip_epsilon"]
    loss_fn = rlloss.ActorCriticLoss(
        policy=rlloss.PPOLoss(
            clip_eps_low=clip, clip_eps_high=clip, kl_coef=options["beta"], entropy_coef=options["entropy_coef"]
        ),
        value=rlloss.ValueLoss(value_clip=clip if options["clip_value_loss"] else None, halve=False),
        value_coef=options["value_loss_coef"],
    )
    return loss_fn(
        logprobs,
        old,
        rlloss.whiten(advantages, trained),
        trained,
        values=now,
        old_values=values if old_values is None else old_values,
        returns=returns,
        ref_logprobs=ref,
        entropy=entropy,
    ).loss


def by_hand_ppo(session, batch, beta=0.01, clip_epsilon=0.2, gamma=0.99):
    ids, real, trained = joined(batch)
    rewards = torch.where(rlloss.last_tokens(trained), batch["rewards"][:, None], 0)
    given = {name: F.pad(batch[name], (3, 0)) if name in batch else None for name in ("old_log_probs", "values")}
    options = {"entropy_coef": 0.01, "value_loss_coef": 0.5, "clip_value_loss": True}
    return actor_critic(
        session,
        *(ids, real, trained, rewards, given["old_log_probs"], given["values"], None, gamma, 0.95),
        beta=beta,
        clip_epsilon=clip_epsilon,
        **options,
    )


def by_hand_enhanced_ppo(
    session,
    batch,
    beta=0.01,
    clip_epsilon=0.2,
    value_loss_coef=0.5,
    entropy_coef=0.01,
    gamma=0.99,
    gae_lambda=0.95,
    use_gae=True,
    clip_value_loss=True,
    max_grad_norm=None,
):
    rewards = batch["rewards"]
    if rewards.ndim == 1:
        rewards = torch.where(rlloss.last_tokens(TRAINED), rewards[:, None], 0)
    return actor_critic(
        session,
        *(IDS, REAL, TRAINED, rewards, batch["old_log_probs"], batch.get("values"), batch.get("old_values")),
        gamma,
        gae_lambda if use_gae else 1.0,
        beta=beta,
        clip_epsilon=clip_epsilon,
        entropy_coef=entropy_coef,
        value_loss_coef=value_loss_coef,
        clip_value_loss=clip_value_loss,
    )


def centred(batch):
    if "advantages" in batch:
        return batch["advantages"]
    rewards = batch["rewards"]
    to_go = rewards.flip(-1).cumsum(-1).flip(-1) if rewards.ndim == 2 else rewards[:, None].expand(REAL.shape)
    return rlloss.whiten(to_go, TRAINED)


def by_hand_importance_sampling(session, batch, beta=0.1, clip_ratio=10.0):
    logprobs, _ = logprobs_of(session.model)
    behavior = batch["behavior_log_probs"]
    if behavior.ndim == 1:
        log_ratio = (rlloss.sequence_sum(logprobs.detach(), TRAINED) - behavior) / TRAINED.sum(-1)
        behavior = logprobs.detach() - log_ratio[:, None]
    loss_fn = rlloss.ImportanceSamplingLoss(ratio_min=1 / clip_ratio, ratio_max=clip_ratio, kl_coef=beta)
    ref = logprobs_of(session.reference)[0].detach()
    return loss_fn(logprobs, behavior, centred(batch), TRAINED, ref_logprobs=ref).loss


def by_hand_conservative_ppo(
    session, batch, conservative_coef=0.1, max_kl_divergence=0.01, clip_epsilon=0.2, adaptive_kl=False
):
    logprobs, _ = logprobs_of(session.model)
    clip: dict[str, Any] = {"clip_eps_low": clip_epsilon, "clip_eps_high": clip_epsilon}
    loss_fn = rlloss.ConservativePPOLoss(conservative_coef=conservative_coef, max_kl=max_kl_divergence, **clip)
    ref = logprobs_of(session.reference)[0].detach()
    return loss_fn(logprobs, batch["old_log_probs"], centred(batch), TRAINED, ref_logprobs=ref).loss


def by_hand_reward_modeling(session, batch, margin=1.0, temperature=0.1):
    def score(name):
        ids, real = batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"]
        return session.model(ids, attention_mask=real).gather(1, real.sum(-1, keepdim=True) - 1).squeeze(1)

    # as Signal writes it
    return -F.logsigmoid((score("chosen") - score("rejected")) / temperature - margin).mean()


def replayed(session, **more):
    return {
        **text_batch(session),
        "behavior_log_probs": old_logprobs(session.model, scale=0.5),
        "rewards": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
        **more,
    }


def rolled_out(session, **more):
    given = {"old_log_probs": old_logprobs(session.model), "rewards": reward_per_token()}
    return text_batch(session, **given | more)


BATCHES = {
    "causal_lm": text_batch,
    "dpo": pairs_batch,
    "grpo": lambda s: answers_batch(s, old_log_probs=noise(2, 3, 4, seed=6, scale=0.4) - 2.3),
    "ppo": lambda s: single_answers(s, old_log_probs=noise(6, 4, seed=6, scale=0.4) - 2.3),
    "enhanced_ppo": rolled_out,
    "importance_sampling": replayed,
    "conservative_ppo": rolled_out,
    "reward_modeling": pairs_batch,
}
BY_HAND = {name.removeprefix("by_hand_"): f for name, f in globals().items() if name.startswith("by_hand_")}
CHANGED = {
    "beta": 0.7,
    "clip_epsilon": 0.05,
    "clip_ratio": 1.05,
    "clip_value_loss": False,
    "conservative_coef": 2.0,
    "entropy_coef": 0.3,
    "gae_lambda": 0.3,
    "gamma": 0.6,
    "label_smoothing": 0.2,
    "margin": -0.5,
    "max_kl_divergence": 0.001,
    "temperature": 0.8,
    "use_gae": False,
    "value_loss_coef": 2.0,
}
# what reaches something else than the loss, and is tested there
ELSEWHERE = {"reference_model", "max_grad_norm", "adaptive_kl"}


def forward_backward(session, batch, loss_fn, kwargs=None):
    return asyncio.run(TrainingClient(session).forward_backward(batch, loss_fn, kwargs))


def parameters_of(session):
    modules = [m for m in (session.model, session.critic) if m is not None]
    return list(dict.fromkeys(p for m in modules for p in m.parameters()))


def gradient_of(session, loss=None):
    parameters = parameters_of(session)
    if loss is None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    else:
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


def assert_by_hand(loss_fn, session, batch, kwargs):
    result = forward_backward(session, batch, loss_fn, kwargs)
    expected = BY_HAND[loss_fn](session, batch, **kwargs)
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
    torch.testing.assert_close(
        gradient_of(session), gradient_of(session, expected), rtol=1e-5, atol=2e-6
    )  # its norms are float32
    return result


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_a_loss_is_the_librarys_own(loss_fn):
    session = session_of(reward_model=loss_fn == "reward_modeling")
    assert_by_hand(loss_fn, session, BATCHES[loss_fn](session), {})
    assert gradient_of(session).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("loss_fn", "name"), [(f, k) for f, loss in LOSSES.items() for k in loss.loss_kwargs if k not in ELSEWHERE]
)
def test_every_keyword_argument_reaches_what_it_names(loss_fn, name):
    session = session_of(reward_model=loss_fn == "reward_modeling")
    batch = BATCHES[loss_fn](session)
    if name == "clip_value_loss":  # the clip binds where the critic has moved
        batch["old_values"] = values_of(session).detach() + noise(*REAL.shape, seed=8, scale=2.0)
    plain = forward_backward(session, batch, loss_fn)["loss"]
    session.optimizer.zero_grad()
    changed = assert_by_hand(loss_fn, session, batch, {name: CHANGED[name]})
    assert abs(changed["loss"] - plain) > 1e-4


DEFAULTS = {
    "causal_lm": {},
    "dpo": {"beta": 0.1, "label_smoothing": 0.0, "reference_model": None},
    "grpo": {"beta": 0.01, "clip_epsilon": 0.2, "reference_model": None},
    "ppo": {"beta": 0.01, "clip_epsilon": 0.2, "gamma": 0.99, "reference_model": None},
    "enhanced_ppo": {
        "beta": 0.01,
        "clip_epsilon": 0.2,
        "value_loss_coef": 0.5,
        "entropy_coef": 0.01,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "use_gae": True,
        "clip_value_loss": True,
        "max_grad_norm": None,
        "reference_model": None,
    },
    "importance_sampling": {"beta": 0.1, "clip_ratio": 10.0, "reference_model": None},
    "conservative_ppo": {
        "conservative_coef": 0.1,
        "max_kl_divergence": 0.01,
        "clip_epsilon": 0.2,
        "adaptive_kl": False,
        "reference_model": None,
    },
    "reward_modeling": {"margin": 1.0, "temperature": 0.1},
}


def test_keyword_arguments_have_signals_names_and_defaults():
    assert {name: loss.loss_kwargs for name, loss in LOSSES.items()} == DEFAULTS


# batches in every form


def test_causal_lm_is_cross_entropy_of_the_model_itself():
    session = session_of()
    result = forward_backward(session, text_batch(session), "causal_lm")
    loss = session.model(input_ids=IDS, attention_mask=REAL, labels=IDS.masked_fill(REAL == 0, -100)).loss
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient_of(session), gradient_of(session, loss), rtol=1e-5, atol=2e-6)
    assert result["metrics"] == {
        "loss": pytest.approx(loss.item(), rel=1e-6),
        "perplexity": pytest.approx(loss.exp().item(), rel=1e-6),
    }


OPTIONAL = [
    ("grpo", lambda s: answers_batch(s)),
    ("ppo", lambda s: single_answers(s)),
    ("ppo", lambda s: single_answers(s, values=noise(6, 4, seed=7))),
    ("enhanced_ppo", lambda s: rolled_out(s, rewards=torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))),
    ("enhanced_ppo", lambda s: rolled_out(s, values=noise(*REAL.shape, seed=7))),
    ("enhanced_ppo", lambda s: rolled_out(s, old_values=values_of(s).detach() + noise(*REAL.shape, seed=7, scale=0.4))),
    ("importance_sampling", lambda s: replayed(s, behavior_log_probs=noise(3, seed=7) - 11)),
    ("importance_sampling", lambda s: replayed(s, rewards=reward_per_token())),
    ("importance_sampling", lambda s: replayed(s, advantages=noise(3, seed=7))),
    ("importance_sampling", lambda s: replayed(s, advantages=noise(*REAL.shape, seed=7))),
    ("conservative_ppo", lambda s: rolled_out(s, advantages=noise(3, seed=7))),
    ("conservative_ppo", lambda s: rolled_out(s, rewards=torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))),
]


@pytest.mark.parametrize(("loss_fn", "make"), OPTIONAL, ids=[f"{f}-{i}" for i, (f, _) in enumerate(OPTIONAL)])
def test_optional_tensors_mean_what_they_say(loss_fn, make):
    session = session_of()
    assert_by_hand(loss_fn, session, make(session), {"beta": 0.3} if loss_fn != "conservative_ppo" else {})


def padded(batch, side):
    """The same batch with three more columns of padding per tensor that has one column per token."""
    as_they_are = {"prompt_ids", "rewards"} if "prompt_ids" in batch else set()

    def pad(name, x):
        if x.ndim < 2 or name in as_they_are:
            return x
        fill = 7 if name.endswith("ids") else 0 if name.endswith(("mask", "masks", "rewards")) else 123.0
        return F.pad(x, (3, 0) if side == "left" else (0, 3), value=fill)

    return {name: pad(name, x) for name, x in batch.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("loss_fn", LOSSES)
def test_padding_changes_nothing(loss_fn, side):
    reward_model = loss_fn == "reward_modeling"
    plain, wide = session_of(reward_model=reward_model), session_of(reward_model=reward_model)
    batch = BATCHES[loss_fn](plain)
    result = forward_backward(plain, batch, loss_fn)
    again = forward_backward(wide, padded(batch, side), loss_fn)
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-9)
    assert again["metrics"] == pytest.approx(result["metrics"], rel=1e-6, abs=1e-9)
    torch.testing.assert_close(gradient_of(wide), gradient_of(plain), rtol=1e-8, atol=1e-11)


def test_prompt_padding_is_named_by_prompt_masks():
    plain, wide = session_of(), session_of()
    batch = answers_batch(plain)
    result = forward_backward(plain, batch, "grpo")
    mask = F.pad(torch.ones(2, 3), (2, 0))
    prompts = {"prompt_ids": F.pad(batch["prompt_ids"], (2, 0), value=5), "prompt_masks": mask}
    assert forward_backward(wide, batch | prompts, "grpo")["loss"] == pytest.approx(result["loss"], rel=1e-9)
    del prompts["prompt_masks"]
    assert forward_backward(session_of(), batch | prompts, "grpo", {"beta": 0.5})["loss"] != pytest.approx(
        forward_backward(session_of(), batch, "grpo", {"beta": 0.5})["loss"], rel=1e-3
    )


def test_nested_lists_are_tensors():
    session = session_of()
    batch = BATCHES["enhanced_ppo"](session)
    result = forward_backward(session, batch, "enhanced_ppo")
    lists = {name: x.tolist() for name, x in batch.items()}
    again = forward_backward(session_of(), lists, "enhanced_ppo")
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-5)  # lists of floats are float32


def test_what_padding_holds_is_not_looked_at():
    session, poisoned = session_of(), session_of()
    batch = BATCHES["enhanced_ppo"](session)
    result = forward_backward(session, batch, "enhanced_ppo")
    bad = batch | {"old_log_probs": torch.where(TRAINED, batch["old_log_probs"], torch.nan)}
    assert forward_backward(poisoned, bad, "enhanced_ppo") == result
    assert torch.equal(gradient_of(poisoned), gradient_of(session))


def test_a_response_mask_says_which_tokens_count():
    session = session_of()
    mask = REAL * (torch.arange(WIDTH) >= 3)
    batch = text_batch(session, response_mask=mask)
    result = forward_backward(session, batch, "causal_lm")
    expected = rlloss.SFTLoss()(logprobs_of(session.model)[0], mask.bool()).loss
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-9)
    # a DPO margin is blind to a prompt that both sides share; the rewards of each side are not
    shared = {f"{side}_input_ids": torch.cat([IDS[:, :3], IDS[:, 3:] + i], 1) for i, side in enumerate(SIDES)}
    shared |= {f"{side}_attention_mask": REAL for side in SIDES}
    whole = forward_backward(session_of(), shared, "dpo")
    answers = forward_backward(session_of(), shared | {f"{side}_response_mask": mask for side in SIDES}, "dpo")
    assert answers["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert answers["metrics"]["chosen_reward"] != pytest.approx(whole["metrics"]["chosen_reward"], rel=1e-3)


# metrics


NAMES = {
    "causal_lm": "loss perplexity",
    "dpo": "implicit_reward chosen_reward rejected_reward reward_margin preference_accuracy",
    "grpo": "policy_loss kl_divergence ref_kl_seq mean_reward advantage_std num_samples",
    "ppo": "policy_loss value_loss entropy mean_advantage advantage_std",
    "enhanced_ppo": "policy_loss value_loss entropy kl_divergence ref_kl_seq approx_kl clip_fraction advantage_mean "
    "advantage_std explained_variance value_mean return_mean reward_mean",
    "importance_sampling": "policy_loss kl_penalty is_ratio_mean is_ratio_max is_ratio_min clipped_fraction "
    "advantage_mean",
    "conservative_ppo": "policy_loss kl_divergence ref_kl_seq kl_penalty kl_violation clip_fraction max_kl_threshold",
    "reward_modeling": "preference_accuracy reward_margin chosen_reward_mean rejected_reward_mean chosen_reward_std "
    "rejected_reward_std",
}


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_metrics_have_signals_names(loss_fn):
    session = session_of(reward_model=loss_fn == "reward_modeling")
    result = forward_backward(session, BATCHES[loss_fn](session), loss_fn)
    assert set(result) == {"loss", "metrics", "step"}
    assert set(result["metrics"]) == set(NAMES[loss_fn].split())
    assert all(type(x) is float for x in result["metrics"].values())


@pytest.mark.parametrize("loss_fn", ["grpo", "ppo", "enhanced_ppo", "importance_sampling"])
def test_without_a_reference_and_beta_no_kl_is_made_up(loss_fn):
    session = session_of()
    batch = BATCHES[loss_fn](session)
    session.reference = None
    result = forward_backward(session, batch, loss_fn, {"beta": 0})
    assert set(result["metrics"]) == set(NAMES[loss_fn].split()) - {"kl_divergence", "ref_kl_seq"}


def test_metrics_of_enhanced_ppo_by_hand():
    session = session_of()
    batch = BATCHES["enhanced_ppo"](session)
    metrics = forward_backward(session, batch, "enhanced_ppo")["metrics"]
    with torch.no_grad():
        logprobs, entropy = logprobs_of(session.model)
        ref, values = logprobs_of(session.reference)[0], values_of(session)
    advantages, returns = rlloss.gae(batch["rewards"], values, TRAINED, 0.99, 0.95)
    whitened, k3 = rlloss.whiten(advantages, TRAINED), rlloss.kl_k3(logprobs, ref)
    ratio, count = (logprobs - batch["old_log_probs"]).exp(), TRAINED.sum()
    clipped = torch.where(whitened > 0, ratio > 1.2, ratio < 0.8) & TRAINED
    surrogate = torch.maximum(-ratio * whitened, -ratio.clamp(0.8, 1.2) * whitened)
    mean = {
        "policy_loss": surrogate,
        "value_loss": (values - returns) ** 2,  # no old values but its own: no clip binds
        "entropy": entropy,
        "kl_divergence": k3,
        "approx_kl": ratio - 1 - ratio.log(),
        "clip_fraction": clipped.double(),
        "advantage_mean": whitened,
        "value_mean": values,
        "return_mean": returns,
    }
    expected = {name: ((x * TRAINED).sum() / count).item() for name, x in mean.items()}
    expected |= {
        "ref_kl_seq": ((k3 * TRAINED).sum() / 3).item(),
        "advantage_std": whitened[TRAINED].std(correction=0).item(),
        "reward_mean": batch["rewards"].sum().item() / 3,
        "explained_variance": (1 - (values - returns)[TRAINED].var() / returns[TRAINED].var()).item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_metrics_of_importance_sampling_count_each_sequence_once():
    session = session_of()
    log_ratio = torch.tensor([0.5, -4.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        behavior = rlloss.sequence_sum(logprobs_of(session.model)[0], TRAINED) - log_ratio
    batch = replayed(session, behavior_log_probs=behavior, advantages=torch.tensor([1.0, 2.0, -1.0]).double())
    metrics = forward_backward(session, batch, "importance_sampling", {"clip_ratio": 2.5})["metrics"]
    ratio = log_ratio.exp()
    assert metrics["is_ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-6)
    assert metrics["is_ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-6)
    assert metrics["is_ratio_min"] == pytest.approx(ratio.min().item(), rel=1e-6)
    assert metrics["clipped_fraction"] == pytest.approx(2 / 3)
    assert metrics["advantage_mean"] == pytest.approx((1 + 2 - 1) / 3)


def test_the_kl_of_answers_of_long_ago_is_held_as_their_weights_are():
    session = session_of()
    with torch.no_grad():
        logprobs, ref = (logprobs_of(model)[0] for model in (session.model, session.reference))
    k3 = torch.where(TRAINED, rlloss.kl_k3(logprobs, ref), 0).sum()
    advantages = torch.zeros(3, dtype=torch.float64)
    sums = rlloss.sequence_sum(logprobs, TRAINED)
    for behavior, held in ((sums - 60, 10.0), (sums + 60, 0.1), (sums - TRAINED.sum(-1), torch.e)):
        # a sum says nothing of its tokens, and each gets the same share: a ratio of e^+-10 or more, or of e
        batch = replayed(session, behavior_log_probs=behavior, advantages=advantages)
        metrics = forward_backward(session, batch, "importance_sampling")["metrics"]
        assert metrics["kl_penalty"] == pytest.approx(0.1 * held * k3.item() / 3, rel=1e-5)


def test_parts_of_a_policy_loss_add_up_to_it():
    session = session_of()
    for loss_fn, total in {
        "importance_sampling": lambda m: m["policy_loss"] + m["kl_penalty"],
        "conservative_ppo": lambda m: m["policy_loss"] + m["kl_penalty"],
    }.items():
        result = forward_backward(session, BATCHES[loss_fn](session), loss_fn)
        assert result["loss"] == pytest.approx(total(result["metrics"]), rel=1e-9)
        assert result["metrics"]["kl_penalty"] > 0
    numbers = forward_backward(session, rolled_out(session), "enhanced_ppo", {"beta": 0})
    m = numbers["metrics"]
    assert numbers["loss"] == pytest.approx(m["policy_loss"] + 0.5 * m["value_loss"] - 0.01 * m["entropy"], rel=1e-9)


def test_kl_violation_says_whether():
    session = session_of()
    violations = [
        forward_backward(session, rolled_out(session), "conservative_ppo", {"max_kl_divergence": limit})["metrics"]
        for limit in (1e-4, 50)
    ]
    assert [m["kl_violation"] for m in violations] == [1.0, 0.0]
    assert [m["max_kl_threshold"] for m in violations] == [1e-4, 50.0]
    assert type(violations[1]["max_kl_threshold"]) is float
    assert violations[1]["kl_penalty"] == 0


def test_metrics_of_preferences_by_hand():
    session = session_of(reward_model=True)
    batch = pairs_batch(session)
    metrics = forward_backward(session, batch, "reward_modeling")["metrics"]
    with torch.no_grad():
        chosen, rejected = (
            session.model.score(ids, real.sum(-1) - 1, attention_mask=real)
            for ids, real in ((batch[f"{s}_input_ids"], batch[f"{s}_attention_mask"]) for s in SIDES)
        )
    assert metrics == pytest.approx(
        {
            "preference_accuracy": (chosen > rejected).double().mean().item(),
            "reward_margin": (chosen - rejected).mean().item(),
            "chosen_reward_mean": chosen.mean().item(),
            "rejected_reward_mean": rejected.mean().item(),
            "chosen_reward_std": chosen.std(correction=0).item(),
            "rejected_reward_std": rejected.std(correction=0).item(),
        },
        rel=1e-6,
    )
    dpo = forward_backward(session_of(), batch, "dpo")["metrics"]
    assert dpo["implicit_reward"] == dpo["reward_margin"]
    assert dpo["reward_margin"] == pytest.approx(dpo["chosen_reward"] - dpo["rejected_reward"])


def test_grpo_reports_its_samples():
    session = session_of()
    metrics = forward_backward(session, BATCHES["grpo"](session), "grpo")["metrics"]
    assert metrics["num_samples"] == 3
    assert metrics["mean_reward"] == pytest.approx(3.5 / 6)
    advantages = rlloss.group_advantages(BATCHES["grpo"](session)["rewards"].flatten(), torch.arange(6) // 3)
    assert metrics["advantage_std"] == pytest.approx(advantages.std(correction=0).item())
