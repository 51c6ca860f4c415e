"""Other systems' token losses and distillation, installed or written from their equations, against ours in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rlloss import (
    DFTLoss,
    DistillationLoss,
    SFTLoss,
    XPOLoss,
    combine,
    distillation_advantages,
    minillm_advantages,
    token_divergences,
    token_logprobs,
    top_k_divergence,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MASK = torch.arange(5) < torch.tensor([[5], [2], [4]])
LABELS = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0)).masked_fill(~MASK, -100)


def assert_same(theirs, ours, x):
    """Loss and gradient."""
    results = []
    for call in (theirs, ours):
        leaf = x.clone().requires_grad_()
        loss = call(leaf)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("beta", "divergence"), [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.5, "js"), (0.2, "js")])
def test_trls_gkd_is_ours(beta, divergence):
    trainer: Any = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    teacher = draws(3, 5, 7, seed=1)
    loss_fn = DistillationLoss(divergence=divergence, beta=beta if divergence == "js" else None)

    def ours(logits):
        found = token_divergences(logits, teacher, temperature=1.5, outputs=(divergence,), beta=loss_fn.beta)
        return loss_fn(getattr(found, divergence), MASK).loss

    assert_same(
        lambda logits: trainer.generalized_jsd_loss(logits, teacher, LABELS, beta=beta, temperature=1.5),
        ours,
        draws(3, 5, 7),
    )


@pytest.mark.parametrize("add_tail", [0, 1])
def test_trls_tail_bucket_is_ours_where_the_student_is_not_too_sure(add_tail):
    found: Any = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    teacher = draws(4, 9, seed=1)
    ids = teacher.topk(3).indices
    known = teacher.log_softmax(-1).gather(-1, ids)
    valid = torch.ones_like(known).bool()

    def trl(logits):
        student, _ = found._add_tail_bucket(logits.log_softmax(-1).gather(-1, ids), valid)
        of_teacher, _ = found._add_tail_bucket(known, valid)
        kl = (of_teacher.exp() * (of_teacher - student)).sum(-1)
        return kl.mean() if add_tail else (student.exp() * (student - of_teacher)).sum(-1).mean()

    divergence = "forward_kl" if add_tail else "reverse_kl"
    assert_same(
        trl,
        lambda x: top_k_divergence(x.log_softmax(-1).gather(-1, ids), known, divergence=divergence).mean(),
        draws(4, 9),
    )


def test_trls_tail_bucket_loses_the_gradient_of_a_sure_student():
    found: Any = pytest.importorskip("trl.experimental.server_distillation.server_distillation_trainer")
    known, valid = torch.tensor([[0.5, 0.25]]).log(), torch.ones(1, 2).bool()
    sure = torch.tensor([[-1e-9, -21.0]], requires_grad=True)
    tail, _ = found._add_tail_bucket(sure, valid)
    assert not torch.autograd.grad(tail[..., -1].sum(), sure)[0].any()
    slope = torch.autograd.grad(top_k_divergence(sure, known).sum(), sure)[0]
    assert slope[0, 0] > 1e4  # -q + q_tail p / p_tail: down goes what the student is too sure of


def test_trls_dft_is_ours():
    ids = LABELS.clamp(min=0)

    def trl(logits):
        logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return (-logprobs * logprobs.exp().detach() * MASK).sum() / MASK.sum()

    assert_same(trl, lambda x: DFTLoss()(token_logprobs(x, ids).logprobs, MASK).loss, draws(3, 5, 7))


def test_hugging_faces_label_smoother_is_ours():
    ids = LABELS.clamp(min=0)

    def smoother(logits):
        logprobs = -logits.log_softmax(-1)
        nll = (logprobs.gather(-1, ids[..., None])[..., 0] * MASK).sum() / MASK.sum()
        smoothed = (logprobs.sum(-1) * MASK).sum() / (MASK.sum() * logits.shape[-1])
        return 0.9 * nll + 0.1 * smoothed

    def ours(logits):
        stats = token_logprobs(logits, ids, outputs=("logprobs", "mean_logprob"))
        return SFTLoss(label_smoothing=0.1)(stats.logprobs, MASK, mean_logprob=stats.mean_logprob).loss

    assert_same(smoother, ours, draws(3, 5, 7))
    assert_same(lambda x: F.cross_entropy(x.flatten(0, 1), LABELS.flatten(), label_smoothing=0.1), ours, draws(3, 5, 7))


def test_trls_xpo_is_ours_beside_dpo():
    logps = draws(3, 5)
    dpo = SFTLoss()(logps, MASK)  # whatever it is joined to

    def trl(x):
        return SFTLoss()(x, MASK).loss + (1e-5 * (x * MASK).sum(1)).mean()

    assert_same(trl, lambda x: combine(dpo=SFTLoss()(x, MASK), xpo=XPOLoss()(x, MASK)).loss, logps)
    assert dpo.loss.isfinite()


def minillm_code(rewards, mask):
    """The authors' code at gamma = 1, without whitening: the mean reward of the token and of what follows it."""
    mask = mask.double()
    left = mask - mask.cumsum(-1) + mask.sum(-1, keepdim=True)
    return (rewards * mask).flip(-1).cumsum(-1).flip(-1) / left.clamp(min=1)


def test_minillms_code_takes_the_tokens_own_reward_in():
    student, teacher = -draws(3, 5).abs(), -draws(3, 5, seed=1).abs()
    reward = distillation_advantages(student, teacher, MASK)
    theirs, ours = minillm_code(reward, MASK), minillm_advantages(student, teacher, MASK)
    left = (MASK.sum(-1, keepdim=True) - MASK.cumsum(-1)).clamp(min=0).double()  # tokens that follow
    torch.testing.assert_close(((left * ours + reward) / (left + 1))[MASK], theirs[MASK], rtol=1e-12, atol=1e-14)
    assert (theirs - ours)[MASK].abs().max() > 0.1
