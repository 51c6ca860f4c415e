"""The formulas as anyone would first write them, in the dtype of their inputs: the naive peer, the judge's losses."""

import torch
import torch.nn.functional as F
from torch import Tensor


def log_softmax_statistics(logits: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """Log-probs of the ids and the entropy, through the whole float32 log-softmax."""
    logprobs = F.log_softmax(logits.float(), -1)
    chosen = logprobs.gather(-1, ids[:, None])[:, 0]
    return (chosen, -(logprobs.exp() * logprobs).sum(-1)) if entropy else (chosen,)


def grpo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """All `[B, T]`, with advantages `[B]`: PPO's clipped surrogate at 0.2, each sequence weighing the same."""
    ratio = torch.exp(logprobs - old_logprobs)
    surrogate = torch.min(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    return -surrogate.mean()


def dpo_loss(logprobs: Tensor) -> Tensor:
    """`[B, T]`, chosen rows first: beta = 0.1, the reference taken as uniform."""
    chosen, rejected = logprobs.sum(-1).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def gae(rewards: Tensor, values: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages `[B, T]`: a loop over T, all sequences at once."""
    advantages = torch.empty_like(values)
    running = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = rewards[:, t] + gamma * next_value - values[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
        next_value = values[:, t]
    return advantages
