"""A grid world as three tables, so that a thousand walkers take a step in three look-ups."""

from typing import NamedTuple

import torch
from torch import Tensor

CLIFF = ["............", "............", "............", "SCCCCCCCCCCG"]  # example 6.6 of Sutton and Barto
ROOMS = ["S..#..", "...#..", "......", ".#.#.#", ".#...#", ".#.#.G"]
MOVES = [(-1, 0), (0, 1), (1, 0), (0, -1)]


class GridWorld:
    """Every step costs 1 until the walker stands on G; C is a cliff, costs 100 and leads back to S; # is a wall.

    `next_state`, `reward` and `done` are [states, 4 moves]: up, right, down, left.
    """

    def __init__(self, rows: list[str]):
        self.width = len(rows[0])
        cells = "".join(rows)
        self.states, self.actions, self.start = len(cells), len(MOVES), cells.index("S")
        self.next_state = torch.zeros(self.states, self.actions, dtype=torch.long)
        for state in range(self.states):
            for action, (down, right) in enumerate(MOVES):
                row, column = state // self.width + down, state % self.width + right
                inside = 0 <= row < len(rows) and 0 <= column < self.width and rows[row][column] != "#"
                self.next_state[state, action] = row * self.width + column if inside else state
        fell = torch.tensor([cell == "C" for cell in cells])[self.next_state]
        self.reward = torch.where(fell, -100.0, -1.0)
        self.next_state[fell] = self.start
        self.done = torch.tensor([cell == "G" for cell in cells])[self.next_state]

    def step(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each walker stands now, what it earned, and whether it has arrived."""
        return self.next_state[states, actions], self.reward[states, actions], self.done[states, actions]


def greedy_return(world: GridWorld, actions: Tensor, steps: int = 100) -> float:
    """What one walker earns that takes `actions` [states]."""
    state, total = torch.tensor(world.start), 0.0
    for _ in range(steps):
        state, reward, done = world.step(state, actions[state])
        total += float(reward)
        if done:
            break
    return total


class Walk(NamedTuple):
    """What walkers did, [walkers, steps] each."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    mask: Tensor  # the steps before they arrived
    last_state: Tensor  # [walkers]
    arrived: Tensor  # [walkers]


def rollout(world: GridWorld, policy: torch.nn.Module, walkers: int, steps: int) -> Walk:
    """They start together and take actions as the policy's logits say."""
    state, arrived = torch.full((walkers,), world.start), torch.zeros(walkers, dtype=torch.bool)
    taken = []
    with torch.no_grad():
        for _ in range(steps):
            action = torch.distributions.Categorical(logits=policy(state)).sample()
            following, reward, done = world.step(state, action)
            taken.append((state, action, reward, ~arrived))
            state, arrived = torch.where(arrived, state, following), arrived | done
    states, actions, rewards, mask = (torch.stack(x, 1) for x in zip(*taken, strict=True))
    return Walk(states, actions, rewards, mask, state, arrived)
