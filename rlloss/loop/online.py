"""Online training: sample, score, advantages, optimise."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from einops import repeat
from torch import Tensor, nn

from rlloss._checks import check_count
from rlloss.advantages.group import group_advantages
from rlloss.correction import Correction
from rlloss.loop.advantages import CriticAdvantages, GroupAdvantages, ShapedAdvantages
from rlloss.loop.batch import Batch, collate
from rlloss.loop.data import Prompt, Tokens
from rlloss.loop.encoding import answered
from rlloss.loop.rewards import RewardFunction, Rewards, Scores
from rlloss.loop.run import RunOptions, example_order, generator_of, run_steps
from rlloss.loop.sampling import Completion
from rlloss.loop.session import Session
from rlloss.output import merge_metrics, scalars
from rlloss.protocol import Loss

__all__ = ["check_group_size", "evaluate_online", "rollout", "sampled_scores", "train_online"]

Advantages = str | Callable[[Tensor, Tensor], Tensor] | ShapedAdvantages
Corrected = Callable[[Tensor, Tensor, Tensor], Correction]


def train_online(
    session: Session,
    prompts: Sequence[Prompt],
    rewards: Rewards | RewardFunction | Sequence[RewardFunction],
    loss_fn: Loss,
    *,
    steps: int,
    prompts_per_step: int = 8,
    group_size: int = 8,
    max_new_tokens: int,
    advantages: Advantages = group_advantages,
    epochs_per_step: int = 1,
    updates_per_epoch: int = 1,
    recompute_old_logprobs: bool = True,
    correction: Corrected | None = None,
    seed: int = 0,
    **options: Unpack[RunOptions],
) -> list[dict[str, float]]:
    """Trains a policy on rewards of its own completions with any loss of the family `policy`.

    Every step draws `group_size` completions of `prompts_per_step` prompts, scores them, and passes over them
    `epochs_per_step` times in `updates_per_epoch` updates each. Returns one dictionary of numbers per step.

    Args:
        prompts: From `rlloss.loop.prompts`.
        rewards: (prompts, completions, **columns) -> list of numbers, or several of them (`Rewards` weighs them); the
            columns are those of the prompts, and completion_ids. One with a state is a module, and is saved.
        advantages: A name of `rlloss.list_advantages()`; (rewards, group_ids) -> advantages, one per completion; or
            `CriticAdvantages` for PPO, `GroupAdvantages` for a KL in the reward.
        recompute_old_logprobs: Takes the policy's own log-probs as `old_logprobs`, at the cost of a forward pass;
            False takes those that the sampler recorded.
        correction: (old_logprobs, rollout_logprobs, loss_mask) -> `rlloss.Correction`, whose weights become the loss's
            `token_weights`: what a sampler that is not quite the policy owes, `rlloss.importance_correction`.
        seed: Of the order of prompts and mini-batches.
        **options: `RunOptions`: folder, evaluation, checkpoints, resumption.
    """
    for name, number in {"epochs_per_step": epochs_per_step, "updates_per_epoch": updates_per_epoch}.items():
        check_count("train_online", name, number)
    advantages = GroupAdvantages(advantages) if isinstance(advantages, str) else advantages
    shaping = advantages if isinstance(advantages, ShapedAdvantages) else None
    if prompts_per_step * group_size < updates_per_epoch:
        raise ValueError(
            f"train_online: {updates_per_epoch=} needs as many completions, got {prompts_per_step=} x {group_size=}"
        )
    check_group_size("train_online", group_size, advantages)
    if correction is not None and not recompute_old_logprobs:
        raise ValueError(
            "train_online: correction compares the policy's own log-probs with the sampler's, and "
            "recompute_old_logprobs=False takes the sampler's for both"
        )
    _check_models(session, loss_fn, shaping)
    score = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
    stateful = {"loss": loss_fn, "advantages": advantages, **score.modules()}
    session.track(**{name: part for name, part in stateful.items() if isinstance(part, nn.Module)})
    order = example_order(len(prompts), prompts_per_step, seed)

    def train_step(step: int) -> dict[str, float]:
        chosen = [prompts[i] for i in order(step)]
        batch, numbers = rollout(session, chosen, score, group_size, max_new_tokens)
        # one update of a policy that is its own old policy needs no old log-probs, unless the reward does
        is_own_old = recompute_old_logprobs and epochs_per_step * updates_per_epoch == 1
        if not recompute_old_logprobs:
            batch.fields["old_logprobs"] = batch.fields["rollout_logprobs"]
        elif not is_own_old or (shaping is not None and shaping.needs_reference) or correction is not None:
            batch.fields["old_logprobs"] = session.logprobs(batch)
        if correction is not None:
            held = correction(batch.fields["old_logprobs"], batch.fields["rollout_logprobs"], batch.loss_mask)
            batch.fields["token_weights"] = held.weights
            numbers |= scalars(held.metrics)
        if session.reference is not None:
            batch.fields["ref_logprobs"] = session.logprobs(batch, reference=True)
        if isinstance(advantages, ShapedAdvantages):
            if advantages.needs_greedy:
                greedy, _ = sampled_scores(session, chosen, score, max_new_tokens, seed, temperature=0.0)
                batch.fields["greedy_rewards"] = greedy.total.repeat_interleave(group_size)
                numbers["greedy_reward"] = float(greedy.total.mean())
            numbers |= advantages(session, batch)
        else:
            batch.fields["advantages"] = advantages(batch.fields["rewards"], batch.fields["group_ids"])
        if is_own_old:
            batch.fields.pop("old_logprobs", None)
        return numbers | optimise(session, batch, loss_fn, epochs_per_step, updates_per_epoch, generator_of(seed, step))

    return run_steps(
        session,
        train_step,
        steps,
        bar_keys=("reward", "accuracy", "ref_kl", "entropy", "clip_frac"),
        **options,
    )


def check_group_size(who: str, group_size: int, advantages: Advantages) -> None:
    """Raises ValueError where advantages of a group are asked of groups of one."""
    check_count(who, "group_size", group_size)
    advantages = GroupAdvantages() if advantages is group_advantages else advantages
    if group_size == 1 and isinstance(advantages, GroupAdvantages) and advantages.compares_within_groups:
        raise ValueError(
            f"{who}: group_size=1 leaves nothing to compare with, and every advantage would be 0; pass group_size=2 or "
            "more, or advantages=CriticAdvantages(), which algorithm='ppo' has"
        )


def rollout(
    session: Session,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    group_size: int,
    max_new_tokens: int,
) -> tuple[Batch, dict[str, float]]:
    """Samples groups and scores them: the step's batch with its `rewards`, and what is logged of it.

    Its other fields: `group_ids` (the prompt's number), `finished` (False where `max_new_tokens` cut), the sampler's
    `rollout_logprobs`, and `token_rewards` where a reward function gave them.
    """
    completions = session.sample([p.ids for p in prompts], group_size=group_size, max_new_tokens=max_new_tokens)
    asked = [p for p in prompts for _ in range(group_size)]
    scores, _ = _scored(session, asked, completions, rewards)
    batch = collate([Tokens(*answered(p.ids, c.ids)) for p, c in zip(asked, completions, strict=True)])
    batch.fields["rewards"] = scores.total
    if scores.per_token is not None:
        batch.fields["token_rewards"] = _placed(batch, [x for row in scores.per_token for x in row])
    batch.fields["group_ids"] = repeat(torch.arange(len(prompts)), "prompts -> (prompts group)", group=group_size)
    batch.fields["finished"] = torch.tensor([c.finished for c in completions])
    batch.fields["rollout_logprobs"] = _placed(batch, [x for c in completions for x in c.logprobs])
    return batch, scores.means | {
        "reward": float(scores.total.mean()),
        "reward_std": float(scores.total.std(correction=0)),
        "completion_length": float(batch.loss_mask.sum(-1).float().mean()),
        "finished_frac": sum(c.finished for c in completions) / len(completions),
    }


def evaluate_online(
    session: Session,
    prompts: Sequence[Prompt],
    rewards: Rewards | RewardFunction | Sequence[RewardFunction],
    *,
    max_new_tokens: int,
    seed: int = 0,
) -> tuple[float, list[str]]:
    """The mean reward of one sampled completion per prompt, and the completions.

    It draws from a generator of its own: an evaluation leaves the run's random numbers alone.
    """
    rewards = rewards if isinstance(rewards, Rewards) else Rewards(rewards)
    scores, texts = sampled_scores(session, prompts, rewards, max_new_tokens, seed)
    return float(scores.total.mean()), texts


def sampled_scores(
    session: Session,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    max_new_tokens: int,
    seed: int,
    temperature: float | None = None,
) -> tuple[Scores, list[str]]:
    """What one sampled completion per prompt earned, in all and by each function, and the completions."""
    generator = torch.Generator(session.device).manual_seed(seed)
    drawn = session.sample(
        [p.ids for p in prompts], max_new_tokens=max_new_tokens, temperature=temperature, generator=generator
    )
    with rewards.frozen():
        return _scored(session, prompts, drawn, rewards)


def _scored(
    session: Session, prompts: Sequence[Prompt], completions: Sequence[Completion], rewards: Rewards
) -> tuple[Scores, list[str]]:
    texts = session.tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
    columns: dict[str, list[Any]] = {name: [p.columns[name] for p in prompts] for name in prompts[0].columns}
    columns["completion_ids"] = [c.ids for c in completions]
    return rewards([p.text for p in prompts], texts, columns), texts


def _placed(batch: Batch, numbers: list[float]) -> Tensor:
    """One number per trained token, at its place in the batch."""
    return torch.zeros(batch.ids.shape).masked_scatter_(batch.loss_mask, torch.tensor(numbers))


def optimise(
    session: Session,
    batch: Batch,
    loss_fn: Loss,
    epochs: int,
    updates_per_epoch: int,
    generator: torch.Generator,
) -> dict[str, float]:
    """Passes over a batch in mini-batches, one update each; the numbers are those of all updates together."""
    losses, metrics, norms = [], [], []
    for _ in range(epochs):
        shuffled = torch.randperm(len(batch.ids), generator=generator)
        for rows in shuffled.tensor_split(updates_per_epoch):
            loss, part = session.forward_backward(batch.select(rows), loss_fn)
            norms.append(session.optim_step())
            loss_fn.after_step(part)
            losses.append(loss)
            metrics.append(part)
    of_updates = {name: sum(n[name] for n in norms) / len(norms) for name in norms[0]}
    return {
        "loss": sum(losses) / len(losses),
        **scalars(merge_metrics(metrics)),
        **of_updates,
        "learning_rate": norms[-1]["learning_rate"],
    }


def _check_models(session: Session, loss_fn: Loss, shaping: ShapedAdvantages | None) -> None:
    for part in (loss_fn, shaping):
        if part is not None and part.needs_reference and session.reference is None:
            raise ValueError(
                f"train_online: {type(part).__name__} needs a reference; "
                "pass Session(..., reference=frozen_copy(model))"
            )
    has_critic, critic = isinstance(shaping, CriticAdvantages), "Session(..., critic=rlloss.ScalarModel(model))"
    if (has_critic or loss_fn.needs_critic) and session.critic is None:
        who = type(shaping if has_critic else loss_fn).__name__
        raise ValueError(f"train_online: {who} needs a critic; pass {critic}")
    if loss_fn.needs_critic != has_critic:
        raise ValueError(
            f"train_online: a critic takes both, a loss that trains it and advantages that ask it, got "
            f"{type(loss_fn).__name__} with {type(shaping).__name__}; pass rlloss.ActorCriticLoss(policy=..., "
            "value=rlloss.ValueLoss()) and advantages=CriticAdvantages()"
        )
