"""DQN and double DQN in a house of rooms, with `rlloss.ValueLoss` as the squared error of Q.

https://arxiv.org/abs/1312.5602 and https://arxiv.org/abs/1509.06461: a replay memory, a target network, and targets
r + gamma max_a Q'(s', a); double DQN lets the network choose and the target network judge.

    pip install -c constraints.txt -e ".[examples]" && python examples/classic/dqn.py

Half a minute on a CPU.
"""

import argparse
import copy
from pathlib import Path

import torch
from drawing import draw, smooth
from grid_world import ROOMS, GridWorld, greedy_return
from torch import Tensor, nn

import rlloss

GAMMA, BATCH, WALKERS, MEMORY = 0.97, 128, 16, 10_000


def network(world: GridWorld) -> nn.Module:
    return nn.Sequential(nn.Embedding(world.states, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def target_values(q: nn.Module, frozen: nn.Module, state: Tensor, double: bool) -> Tensor:
    """What the state is worth to who acts greedily."""
    with torch.no_grad():
        judged = frozen(state)
        chooser = q(state) if double else judged
        return judged.gather(-1, chooser.argmax(-1, keepdim=True)).squeeze(-1)


def train(world: GridWorld, double: bool, updates: int, seed: int) -> tuple[nn.Module, list[float], list[float]]:
    """The network, and after every update what the episodes that ended last had earned and the value of the start."""
    torch.manual_seed(seed)
    q = network(world)
    frozen, optimizer = copy.deepcopy(q), torch.optim.Adam(q.parameters(), lr=1e-3)
    loss_fn = rlloss.ValueLoss(value_clip=None)
    kinds = torch.long, torch.long, torch.float, torch.long, torch.bool
    memory = [torch.zeros(MEMORY, dtype=kind) for kind in kinds]
    states, earned, ages = torch.full((WALKERS,), world.start), torch.zeros(WALKERS), torch.zeros(WALKERS)
    finished, optimism, size = [-100.0], [], 0
    for update in range(updates):
        epsilon = max(0.05, 1 - update / (0.5 * updates))
        with torch.no_grad():
            greedy = q(states).argmax(-1)
        actions = torch.where(torch.rand(WALKERS) < epsilon, torch.randint(4, (WALKERS,)), greedy)
        following, rewards, done = world.step(states, actions)
        place = torch.arange(size, size + WALKERS) % MEMORY
        for column, x in zip(memory, (states, actions, rewards, following, done), strict=True):
            column[place] = x
        size += WALKERS
        earned, ages = earned + rewards, ages + 1
        over = done | (ages >= 100)
        finished.append(float(earned[over].mean()) if over.any() else finished[-1])
        states = torch.where(over, world.start, following)
        earned, ages = torch.where(over, 0, earned), torch.where(over, 0, ages)

        rows = torch.randint(min(size, MEMORY), (BATCH,))
        s, a, r, then, arrived = (column[rows] for column in memory)
        returns = r + GAMMA * torch.where(arrived, 0, target_values(q, frozen, then, double))
        values = q(s).gather(1, a[:, None])
        loss = loss_fn(values, None, returns[:, None], torch.ones(BATCH, 1, dtype=torch.bool)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimism.append(float(q(torch.tensor(world.start)).max().detach()))
        if update % 100 == 99:
            frozen.load_state_dict(q.state_dict())
    return q, finished[1:], optimism


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/classic"))
    args = parser.parse_args()
    world, earnings, values = GridWorld(ROOMS), {}, {}
    for name, double in {"DQN": False, "double DQN": True}.items():
        q, finished, values[name] = train(world, double, args.updates, args.seed)
        earnings[name] = smooth(finished, 100)
        greedy = greedy_return(world, q(torch.arange(world.states)).argmax(-1))
        print(f"{name:10} walks greedily in {-greedy:.0f} steps")
    panels = {"earned by the last episodes": earnings, "value of the start": values}
    draw(args.folder / "dqn.png", "Rooms", panels, "update")


if __name__ == "__main__":
    main()
