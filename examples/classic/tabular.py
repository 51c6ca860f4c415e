"""Q-learning and SARSA on the cliff: the shortest way along the edge, or the safe way round.

Example 6.6 of Sutton and Barto. Both learn on the way; SARSA counts its own careless steps (epsilon = 0.1) and keeps
away from the edge, so it earns more while it explores; Q-learning finds the shortest way, which it seldom survives.

    pip install -c constraints.txt -e ".[examples]" && python examples/classic/tabular.py

Half a minute on a CPU.
"""

import argparse
import random
from pathlib import Path

import torch
from drawing import draw, smooth
from grid_world import CLIFF, GridWorld, greedy_return


def learn(world: GridWorld, on_policy: bool, episodes: int, seed: int, epsilon: float = 0.1, step_size: float = 0.5):
    """The table of action values [states, actions], and what every episode earned; gamma is 1."""
    rng = random.Random(seed)
    next_state, reward, done = world.next_state.tolist(), world.reward.tolist(), world.done.tolist()
    q = [[0.0] * world.actions for _ in range(world.states)]

    def chosen(state: int) -> int:
        if rng.random() < epsilon:
            return rng.randrange(world.actions)
        best = max(q[state])
        return rng.choice([a for a, value in enumerate(q[state]) if value == best])

    earned = []
    for _ in range(episodes):
        state, total, arrived = world.start, 0.0, False
        action = chosen(state)
        while not arrived:
            r, then, arrived = reward[state][action], next_state[state][action], done[state][action]
            following = chosen(then)
            ahead = q[then][following] if on_policy else max(q[then])
            q[state][action] += step_size * (r + (0.0 if arrived else ahead) - q[state][action])
            state, action, total = then, following, total + r
        earned.append(total)
    return torch.tensor(q), earned


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--folder", type=Path, default=Path("runs/classic"))
    args = parser.parse_args()
    world, lines = GridWorld(CLIFF), {}
    for name, on_policy in {"Q-learning": False, "SARSA": True}.items():
        runs = [learn(world, on_policy, args.episodes, seed) for seed in range(args.runs)]
        mean = [sum(episode) / len(runs) for episode in zip(*(earned for _, earned in runs), strict=True)]
        greedy = sorted(greedy_return(world, q.argmax(1)) for q, _ in runs)
        lines[name] = [max(x, -100.0) for x in smooth(mean, 10)]
        late = mean[-args.episodes // 5 :]
        print(
            f"{name:10} earns {sum(late) / len(late):7.1f} while it explores, {greedy[len(greedy) // 2]:.0f} greedily"
        )
    draw(args.folder / "cliff.png", "Cliff walking", {"earned per episode": lines}, "episode")


if __name__ == "__main__":
    main()
