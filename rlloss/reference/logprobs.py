"""From logits, or from hidden states and a head, to the numbers of one token."""

import math

import numpy as np
from numpy.typing import ArrayLike


def token_stats(
    logits: ArrayLike,
    ids: ArrayLike,
    temperature: float | ArrayLike = 1.0,
    loss_mask: ArrayLike | None = None,
) -> dict[str, list[float]]:
    """Statistics of softmax(logits / temperature), row by row: logits `[N, V]`, ids `[N]`.

    logprobs: log p[id];  entropy: -sum_v p_v log p_v;  logsumexp: log sum_v exp(logit_v / temperature)
    sum_p2: sum_v p_v^2;  mean_logprob: (1 / V) sum_v log p_v

    The temperature is one number or one per row. Rows that `loss_mask` leaves out are 0.

    >>> stats = token_stats([[0.0, 0.0]], [1])
    >>> stats["logprobs"], stats["sum_p2"]
    ([-0.6931471805599453], [0.5])
    """
    rows = np.asarray(logits, dtype=np.float64).tolist()
    targets = np.asarray(ids).tolist()
    temperatures = np.broadcast_to(np.asarray(temperature, dtype=np.float64), len(rows)).tolist()
    mask = [True] * len(rows) if loss_mask is None else np.asarray(loss_mask).tolist()

    names = ("logprobs", "entropy", "logsumexp", "sum_p2", "mean_logprob")
    stats = {name: [0.0] * len(rows) for name in names}
    for n in range(len(rows)):
        if not mask[n]:
            continue
        z = [logit / temperatures[n] for logit in rows[n]]
        top = z.index(max(z))
        # the largest term is taken out of the sum, so that log p keeps its digits as p approaches 1
        log_sum = math.log1p(sum(math.exp(z[v] - z[top]) for v in range(len(z)) if v != top))
        log_p = [z_v - z[top] - log_sum for z_v in z]
        stats["logprobs"][n] = log_p[targets[n]]
        stats["logsumexp"][n] = z[top] + log_sum
        for log_p_v in log_p:
            p_v = math.exp(log_p_v)
            stats["entropy"][n] -= p_v * log_p_v if p_v > 0.0 else 0.0
            stats["sum_p2"][n] += p_v**2
            stats["mean_logprob"][n] += log_p_v / len(z)
    return stats


def linear_stats(
    hidden: ArrayLike,
    weight: ArrayLike,
    ids: ArrayLike,
    bias: ArrayLike | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | ArrayLike = 1.0,
    loss_mask: ArrayLike | None = None,
) -> dict[str, list[float]]:
    """`token_stats` of a language-model head: hidden `[N, H]`, weight `[V, H]`, bias `[V]`.

    logit = softcap * tanh(logit_scale * (hidden . weight_v + bias_v) / softcap)

    >>> linear_stats([[1.0]], [[2.0], [2.0]], [0])["entropy"]
    [0.6931471805599453]
    """
    states = np.asarray(hidden, dtype=np.float64).tolist()
    head = np.asarray(weight, dtype=np.float64).tolist()
    offset = [0.0] * len(head) if bias is None else np.asarray(bias, dtype=np.float64).tolist()
    logits: list[list[float]] = []
    for n in range(len(states)):
        logits.append([])
        for v in range(len(head)):
            logit = sum(h * w for h, w in zip(states[n], head[v], strict=True)) + offset[v]
            logit *= logit_scale
            if softcap is not None:
                logit = softcap * math.tanh(logit / softcap)
            logits[n].append(logit)
    return token_stats(logits, ids, temperature, loss_mask)
