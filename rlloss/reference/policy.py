"""Policy losses: all share `token_losses`; a paper adds its ratio, its defaults and its reduction."""

from typing import Any

from numpy.typing import ArrayLike

from rlloss.reference.divergence import check_kl, kl_k3, kl_term
from rlloss.reference.reduce import advantage_rows, mean, reduced, rows
from rlloss.reference.surrogate import importance_log_ratio, importance_ratio, surrogate


def token_losses(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    ratio_level: str = "token",
    ref_logprobs: ArrayLike | None = None,
    ref_kl: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    kl_grad: str = "reverse",
    entropy_coef: float = 0.0,
    max_log_ratio: float = 20.0,
) -> list[list[float]]:
    """The loss of every counted token, one row per sequence.

    loss_t = weight_t * (surrogate_t + kl_coef * kl_t) - entropy_coef * entropy_t

    `old_logprobs=None` is the policy itself, its gradient stopped. `frozen_logprobs` is the policy wherever
    the gradient is stopped: central differences move `logprobs` and leave it where it is.
    """
    check_kl(kl, kl_grad)
    needed = ref_kl if kl == "exact" else ref_logprobs
    if kl_coef != 0.0 and needed is None:
        raise ValueError(
            f"token_losses: kl_coef={kl_coef} needs {'ref_kl' if kl == 'exact' else 'ref_logprobs'}, got None"
        )
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"token_losses: entropy_coef={entropy_coef} needs entropy, got None")
    mask = rows(loss_mask, cu_seqlens)
    new = rows(logprobs, cu_seqlens)
    frozen = new if frozen_logprobs is None else rows(frozen_logprobs, cu_seqlens)
    old = frozen if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    ref, exact = rows(ref_logprobs, cu_seqlens), rows(ref_kl, cu_seqlens)
    bonus = rows(entropy, cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)  # a counted token weighs 1
    advantage = advantage_rows(advantages, mask, cu_seqlens)

    losses: list[list[float]] = []
    for i in range(len(mask)):
        losses.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            loss = 0.0
            if weight[i][t] != 0.0:  # weight 0 is rejection: no numerator, whatever its value
                if ratio_level == "none":  # REINFORCE
                    loss = -advantage[i][t] * new[i][t]
                else:
                    r = importance_ratio(new[i], old[i], mask[i], t, ratio_level, max_log_ratio)
                    loss = surrogate(r, advantage[i][t], clip_eps_low, clip_eps_high, dual_clip)
                if kl_coef != 0.0 and kl == "exact":
                    loss += kl_coef * exact[i][t]
                elif kl_coef != 0.0:
                    loss += kl_coef * kl_term(new[i][t], old[i][t], ref[i][t], frozen[i][t], kl, kl_grad, max_log_ratio)
                loss *= weight[i][t]
            if entropy_coef != 0.0:
                loss -= entropy_coef * bonus[i][t]
            losses[i].append(loss)
    return losses


def grpo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    **terms: Any,
) -> float:
    """GRPO, equation 3 of https://arxiv.org/abs/2402.03300, with the KL estimator of its equation 4.

    loss = (1 / S) sum_i (1 / L_i) sum_t loss_t, with `token_losses` of `terms`

    The paper prints the KL term of kl_grad="literal".

    >>> grpo([[-1.0, -1.0]], None, [0.5], [[True, True]])
    -0.5
    """
    return reduced(token_losses(logprobs, old_logprobs, advantages, loss_mask, **terms), "sequence_mean")


def dr_grpo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    max_completion_length: int,
    **terms: Any,
) -> float:
    """Dr. GRPO, figure 1 and listing 1 of https://arxiv.org/abs/2503.20783: GRPO blind to the answer's length.

    loss = sum_i sum_t loss_t / (S * max_completion_length), with `token_losses` of `terms`

    >>> dr_grpo([[-1.0, -1.0]], None, [0.5], [[True, True]], max_completion_length=4)
    -0.25
    """
    losses = token_losses(logprobs, old_logprobs, advantages, loss_mask, **terms)
    return reduced(losses, "fixed_length", max_completion_length)


def gspo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_eps_low: float = 3e-4,
    clip_eps_high: float = 4e-4,
    **terms: Any,
) -> float:
    """GSPO, equations 5 to 7 of https://arxiv.org/abs/2507.18071: GRPO with one ratio per sequence.

    s_i = exp((1 / L_i) sum_t log(pi / pi_old))
    loss = (1 / S) sum_i (1 / L_i) sum_t loss_t, with s_i as the ratio of `token_losses` of `terms`

    >>> gspo([[-1.0, -1.0]], [[-2.0, 0.0]], [0.5], [[True, True]])
    -0.5
    """
    losses = token_losses(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        ratio_level="geometric",
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        **terms,
    )
    return reduced(losses, "sequence_mean")


def ppo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    **terms: Any,
) -> float:
    """PPO, equation 7 of https://arxiv.org/abs/1707.06347: the mean over all tokens of the clipped surrogate.

    loss = sum_it loss_it / tokens, with `token_losses` of `terms`

    >>> ppo([[-1.0, -1.0]], [[-2.0, -1.0]], [1.0], [[True, True]])  # -(1.2 + 1) / 2
    -1.1
    """
    return reduced(token_losses(logprobs, old_logprobs, advantages, loss_mask, **terms), "token_mean")


def dapo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_eps_high: float = 0.28,
    **terms: Any,
) -> float:
    """DAPO, equation 8 of https://arxiv.org/abs/2503.14476: PPO's mean with more room above.

    loss = sum_i sum_t loss_it / sum_i L_i, with `token_losses` of `terms`

    >>> dapo([[-1.0]], [[-2.0]], [1.0], [[True]])
    -1.28
    """
    losses = token_losses(logprobs, old_logprobs, advantages, loss_mask, clip_eps_high=clip_eps_high, **terms)
    return reduced(losses, "token_mean")


def reinforce(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    **terms: Any,
) -> float:
    """REINFORCE, https://doi.org/10.1007/BF00992696: log-probs of whole sequences times their advantages.

    loss = -(1 / S) sum_i sum_t A_it logprob_it, and the other `terms` of `token_losses`

    >>> reinforce([[-1.0, -2.0]], None, [0.5], [[True, True]])
    1.5
    """
    losses = token_losses(logprobs, old_logprobs, advantages, loss_mask, ratio_level="none", **terms)
    return reduced(losses, "sequence_sum")


def rloo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    **terms: Any,
) -> float:
    """RLOO, https://arxiv.org/abs/2402.14740, with the ratio of whole sequences, clipped as PPO clips.

    r_i = exp(sum_t log(pi / pi_old))
    loss = (1 / S) sum_i (1 / L_i) sum_t loss_t, with r_i as the ratio of `token_losses` of `terms`

    >>> rloo([[-1.0, -1.0]], [[-1.5, -0.5]], [0.5], [[True, True]])
    -0.5
    """
    losses = token_losses(logprobs, old_logprobs, advantages, loss_mask, ratio_level="sequence", **terms)
    return reduced(losses, "sequence_mean")


def policy_metrics(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    ref_logprobs: ArrayLike | None = None,
    ref_kl: ArrayLike | None = None,
    entropy: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    ratio_level: str = "token",
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
) -> dict[str, float]:
    """Means over the counted tokens of what a policy loss reports; 0 where there is no token.

    clip_frac: tokens whose surrogate gradient is cut, by the clip or by the dual clip
    ratio: that of the surrogate
    approx_kl, ref_kl: k3 of KL(pi_old || pi), and of KL(pi || ref) where a reference is given, or `ref_kl` itself
    ref_kl_seq: the same summed over each sequence, and averaged over those with a counted token
    entropy: where given
    bounded_frac: tokens whose log ratio, that of `ratio`, is larger in size than `max_log_ratio`

    >>> policy_metrics([[0.0]], [[-1.0]], [1.0], [[True]], clip_eps_low=0.2, clip_eps_high=0.2)["clip_frac"]
    1.0
    """
    mask = rows(loss_mask, cu_seqlens)
    new = rows(logprobs, cu_seqlens)
    old = new if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    ref, exact = rows(ref_logprobs, cu_seqlens), rows(ref_kl, cu_seqlens)
    bonus = rows(entropy, cu_seqlens)
    advantage = advantage_rows(advantages, mask, cu_seqlens)

    def reference_kl(i: int, t: int) -> float:
        return exact[i][t] if exact else kl_k3(new[i][t], ref[i][t], max_log_ratio)

    values: dict[str, list[float]] = {"clip_frac": [], "ratio": [], "approx_kl": [], "bounded_frac": []}
    values |= {"ref_kl": [], "ref_kl_seq": []} if ref or exact else {}
    values |= {"entropy": []} if bonus else {}
    for i in range(len(mask)):
        if (ref or exact) and any(mask[i]):
            counted = [t for t in range(len(mask[i])) if mask[i][t]]
            values["ref_kl_seq"].append(sum(reference_kl(i, t) for t in counted))
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            r = importance_ratio(new[i], old[i], mask[i], t, ratio_level, max_log_ratio)
            cut_above = r > 1.0 + clip_eps_high and advantage[i][t] > 0.0
            cut_below = r < 1.0 - clip_eps_low and advantage[i][t] < 0.0
            cut_dual = dual_clip is not None and r > dual_clip and advantage[i][t] < 0.0
            values["clip_frac"].append(float(cut_above or cut_below or cut_dual))
            values["ratio"].append(r)
            values["approx_kl"].append(kl_k3(old[i][t], new[i][t], max_log_ratio))
            log_ratio = importance_log_ratio(new[i], old[i], mask[i], t, ratio_level)
            values["bounded_frac"].append(float(abs(log_ratio) > max_log_ratio))
            if ref or exact:
                values["ref_kl"].append(reference_kl(i, t))
            if bonus:
                values["entropy"].append(bonus[i][t])
    return {name: mean(tokens) for name, tokens in values.items()}
