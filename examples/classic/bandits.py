"""The ten-armed testbed: epsilon-greedy, upper confidence bounds, and a policy gradient by `rlloss.REINFORCELoss`.

Chapter 2 of Sutton and Barto: 2,000 bandits, whose arms pay N(q, 1) with q from N(0, 1). The gradient bandit's baseline
is the running mean of what each bandit has paid.

    pip install -c constraints.txt -e ".[examples]" && python examples/classic/bandits.py

A few seconds on a CPU.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from drawing import draw
from torch import Tensor

import rlloss

ARMS = 10


class ActionValues:
    """Means of what every arm of every bandit has paid, and how often it was pulled."""

    def __init__(self, bandits: int):
        self.values, self.pulls = torch.zeros(bandits, ARMS), torch.zeros(bandits, ARMS)

    def learn(self, arms: Tensor, rewards: Tensor) -> None:
        """Incremental means, equation 2.3."""
        here = torch.arange(len(arms)), arms
        self.pulls[here] += 1
        self.values[here] += (rewards - self.values[here]) / self.pulls[here]


class EpsilonGreedy(ActionValues):
    """The best arm so far; with probability epsilon any."""

    def __init__(self, bandits: int, epsilon: float):
        super().__init__(bandits)
        self.epsilon = epsilon

    def arms(self, step: int) -> Tensor:
        """One per bandit."""
        explores = torch.rand(len(self.values)) < self.epsilon
        return torch.where(explores, torch.randint(ARMS, explores.shape), self.values.argmax(1))


class UpperConfidenceBound(ActionValues):
    """The arm that could be best, equation 2.10: its mean and what so few pulls leave open."""

    def __init__(self, bandits: int, width: float):
        super().__init__(bandits)
        self.width = width

    def arms(self, step: int) -> Tensor:
        """One per bandit; an arm that was never pulled comes first."""
        open_ = self.width * (torch.tensor(step + 1.0).log() / self.pulls).sqrt()
        return torch.where(self.pulls == 0, torch.inf, self.values + open_).argmax(1)


class GradientBandit:
    """Section 2.8: softmax preferences, moved along the policy gradient of `rlloss.REINFORCELoss`."""

    def __init__(self, bandits: int, step_size: float):
        self.preferences = torch.zeros(bandits, ARMS, requires_grad=True)
        self.optimizer = torch.optim.SGD([self.preferences], lr=step_size)
        self.baseline, self.steps = torch.zeros(bandits), 0
        self.loss_fn = rlloss.REINFORCELoss()

    def arms(self, step: int) -> Tensor:
        """One per bandit."""
        return torch.distributions.Categorical(logits=self.preferences.detach()).sample()

    def learn(self, arms: Tensor, rewards: Tensor) -> None:
        """One step of SGD per bandit: a sequence of one token each, and a normaliser of 1 keeps them apart."""
        mask = torch.ones(len(arms), 1, dtype=torch.bool)
        logprobs = rlloss.token_logprobs(self.preferences[:, None], arms[:, None]).logprobs
        self.optimizer.zero_grad()
        self.loss_fn(logprobs, None, rewards - self.baseline, mask, normalizer=1).loss.backward()
        self.optimizer.step()
        self.steps += 1
        self.baseline += (rewards - self.baseline) / self.steps


ALGORITHMS: dict[str, Callable[[int], EpsilonGreedy | UpperConfidenceBound | GradientBandit]] = {
    "greedy": lambda n: EpsilonGreedy(n, epsilon=0.0),
    "epsilon-greedy, 0.1": lambda n: EpsilonGreedy(n, epsilon=0.1),
    "UCB, c = 2": lambda n: UpperConfidenceBound(n, width=2.0),
    "gradient, 0.1": lambda n: GradientBandit(n, step_size=0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bandits", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/classic"))
    args = parser.parse_args()
    rewards, optimal = {}, {}
    for name, make in ALGORITHMS.items():
        torch.manual_seed(args.seed)
        payout = torch.randn(args.bandits, ARMS)
        best, algorithm = payout.argmax(1), make(args.bandits)
        rewards[name], optimal[name] = [], []
        for step in range(args.steps):
            arms = algorithm.arms(step)
            paid = payout.gather(1, arms[:, None]).squeeze(1) + torch.randn(args.bandits)
            algorithm.learn(arms, paid)
            rewards[name].append(float(paid.mean()))
            optimal[name].append(float((arms == best).double().mean()))
        late = slice(-max(args.steps // 10, 1), None)
        print(f"{name:22} reward {mean(rewards[name][late]):.3f}   best arm {mean(optimal[name][late]):.3f}")
    draw(args.folder / "bandits.png", "Ten arms", {"reward": rewards, "best arm pulled": optimal}, "step")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
