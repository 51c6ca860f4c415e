"""Monte-Carlo policy gradient and A2C in a house of rooms: `rlloss` losses without a language model.

The same losses that train language models, on episodes of a grid world: a token is a step, a sequence an episode.
REINFORCE weighs each step by the return that followed; A2C by `rlloss.gae` over a critic that learns beside it.

    pip install -c constraints.txt -e ".[examples]" && python examples/classic/actor_critic.py

Half a minute on a CPU.
"""

import argparse
from pathlib import Path

import torch
from drawing import draw
from grid_world import ROOMS, GridWorld, greedy_return, rollout
from torch import nn

import rlloss

GAMMA, LAMBDA, WALKERS, STEPS = 0.97, 0.9, 32, 60


def train(world: GridWorld, with_critic: bool, updates: int, seed: int) -> tuple[nn.Module, list[float]]:
    """The policy, and the mean return of the episodes behind every update."""
    torch.manual_seed(seed)
    policy, critic = nn.Embedding(world.states, world.actions), nn.Embedding(world.states, 1)
    nn.init.zeros_(policy.weight)
    nn.init.zeros_(critic.weight)
    optimizer = torch.optim.Adam(
        [{"params": policy.parameters(), "lr": 0.05}, {"params": critic.parameters(), "lr": 0.5}]
    )
    policy_loss, value_loss = rlloss.A2CLoss(entropy_coef=0.01), rlloss.ValueLoss(value_clip=None)
    earned = []
    for _ in range(updates):
        walk = rollout(world, policy, WALKERS, STEPS)
        values = critic(walk.states).squeeze(-1)
        if with_critic:
            behind = torch.where(walk.arrived, 0, critic(walk.last_state).squeeze(-1).detach())
            advantages, returns = rlloss.gae(walk.rewards, values.detach(), walk.mask, GAMMA, LAMBDA, behind)
        else:
            advantages = returns = rlloss.returns_to_go(walk.rewards, walk.mask, GAMMA)
        stats = rlloss.token_logprobs(policy(walk.states), walk.actions, outputs=("logprobs", "entropy"))
        advantages = rlloss.whiten(advantages, walk.mask)
        out = policy_loss(stats.logprobs, None, advantages, walk.mask, entropy=stats.entropy)
        if with_critic:
            out = rlloss.combine(policy=out, value=value_loss(values, None, returns, walk.mask))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        earned.append(float((walk.rewards * walk.mask).sum(1).mean()))
    return policy, earned


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/classic"))
    args = parser.parse_args()
    world, lines = GridWorld(ROOMS), {}
    for name, with_critic in {"Monte-Carlo policy gradient": False, "A2C": True}.items():
        policy, lines[name] = train(world, with_critic, args.updates, args.seed)
        greedy = greedy_return(world, policy(torch.arange(world.states)).argmax(-1))
        print(f"{name:28} earns {lines[name][0]:6.1f} at first, {lines[name][-1]:6.1f} at last; greedily {greedy:.0f}")
    draw(args.folder / "actor_critic.png", "Rooms", {"earned per episode": lines}, "update")


if __name__ == "__main__":
    main()
