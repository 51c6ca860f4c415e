"""TRL's own trainers beside our losses, in float64: their code computes the loss from the same log-probs."""

import importlib
import inspect
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rlloss
from rlloss import (
    CISPOLoss,
    DAPOLoss,
    DrGRPOLoss,
    GMPOLoss,
    GRPOLoss,
    GSPOLoss,
    LUSPOLoss,
    OPSMLoss,
    RLOOLoss,
    SAPOLoss,
    VESPOLoss,
)

pytest.importorskip("trl", reason="pip install -c constraints.txt '.[peers]' brings TRL")
pytestmark = pytest.mark.filterwarnings("ignore")  # what TRL says while it is imported

LENGTH = 7
EPSILONS: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.28}


def batch(seed):
    """Log-probs, their entropy, ragged rows of at least one token, and what their trainer calls the rest."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 2, 3, 6, 7, 7])  # 26 tokens
    draw = torch.randn(4, 6, LENGTH, generator=generator, dtype=torch.float64)
    logprobs = -draw[0].abs()
    inputs = {
        "old_per_token_logps": logprobs + 0.3 * draw[1],
        "ref_per_token_logps": logprobs + 0.3 * draw[2],
        "advantages": draw[3, :, 0],
        "mask": torch.arange(LENGTH) < lengths[:, None],
    }
    return logprobs, draw[3].abs(), inputs


def as_in_one_process(**changed):
    """What the trainers read of themselves, with TRL's defaults."""
    args = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1, "sapo_temperature_pos": 1.0}
    args |= {"sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0}
    args = SimpleNamespace(**args | {"vespo_lambda_neg": 2.0} | changed.pop("args", {}))
    accelerator = SimpleNamespace(
        num_processes=1,
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
        pad_across_processes=lambda x, dim, pad_index: x,
        sync_gradients=True,
    )
    settings = {"loss_type": "grpo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.28}
    settings |= {"beta": 0.0, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "use_vllm": False}
    settings |= {"vllm_importance_sampling_correction": True, "_entropy_bonus_enabled": False, "entropy_coef": 0.0}
    settings |= {"use_adaptive_entropy": False, "aux_loss_enabled": False, "current_gradient_accumulation_steps": 1}
    settings |= {"max_completion_length": LENGTH, "model": SimpleNamespace(training=True)}
    metrics = {"train": defaultdict(list)}
    return SimpleNamespace(args=args, accelerator=accelerator, _metrics=metrics, **settings | changed)


def theirs(trainer, logprobs, entropy, inputs, **settings):
    """The loss that a trainer's own method makes of log-probs instead of a model."""
    self = as_in_one_process(**settings)
    self._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, entropy, None)
    for name in ("get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights"):
        if hasattr(trainer, name):
            method = inspect.getattr_static(trainer, name)
            setattr(self, name, method.__get__(self))
    mask = inputs["mask"].long()
    given = {"prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask}
    sums = {"old_logps": (inputs["old_per_token_logps"] * mask).sum(1), "num_items_in_batch": mask.sum()}
    return trainer._compute_loss(self, None, given | sums | inputs)


def ours(loss_fn: Any, logprobs, entropy, inputs, **weights):
    reference = {"ref_logprobs": inputs["ref_per_token_logps"]} if loss_fn.kl_coef else {}
    bonus = {"entropy": entropy} if loss_fn.entropy_coef else {}
    old, mask = inputs["old_per_token_logps"], inputs["mask"]
    return loss_fn(logprobs, old, inputs["advantages"], mask, **reference, **bonus, **weights).loss


def both(trainer, settings, loss_fn, seed, weights=None):
    """Loss and gradients of TRL and of ours."""
    results = []
    for side in (0, 1):
        logprobs, entropy, inputs = batch(seed)
        leaves = logprobs, entropy = logprobs.requires_grad_(), entropy.requires_grad_()
        extra: dict[str, Any] = {} if weights is None else weights(entropy.detach(), inputs, side)
        if side == 0:
            loss = theirs(trainer, logprobs, entropy, inputs | extra, **settings)
        else:
            loss = ours(loss_fn, logprobs, entropy, inputs, **extra)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([loss.detach(), *(x for x in gradients if x is not None)])
    return results


def agree(results):
    assert len(results[0]) == len(results[1]) > 1
    for x, y in zip(*results, strict=True):
        assert x.dtype is y.dtype is torch.float64
        torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-9)


def trls(module, name):
    """One of its classes."""
    return getattr(importlib.import_module(f"trl.{module}"), name)


def grpo():
    return trls("trainer.grpo_trainer", "GRPOTrainer")


SEQUENCE: dict[str, Any] = {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}
LITERAL: dict[str, Any] = {"kl_coef": 0.04, "kl_grad": "literal"}
GRPO: list[tuple[str, dict[str, Any], Any]] = [
    ("grpo", {}, GRPOLoss(**EPSILONS)),
    ("grpo, delta", {"args": {"delta": 1.6}}, GRPOLoss(**EPSILONS, dual_clip=1.6)),
    ("grpo, beta", {"beta": 0.04}, GRPOLoss(**EPSILONS, **LITERAL)),
    (
        "grpo, unbiased kl",
        {"beta": 0.04, "args": {"use_bias_correction_kl": True}},
        GRPOLoss(clip_eps_low=0.2, clip_eps_high=0.28, kl_coef=0.04),
    ),
    ("bnpo", {"loss_type": "bnpo"}, DAPOLoss(**EPSILONS)),
    ("dapo", {"loss_type": "dapo"}, DAPOLoss(**EPSILONS)),
    ("dapo, beta", {"loss_type": "dapo", "beta": 0.04}, DAPOLoss(**EPSILONS, **LITERAL)),
    (
        "dapo, entropy",
        {"loss_type": "dapo", "_entropy_bonus_enabled": True, "entropy_coef": 0.1},
        DAPOLoss(**EPSILONS, entropy_coef=0.1),
    ),
    ("dr_grpo", {"loss_type": "dr_grpo"}, DrGRPOLoss(**EPSILONS, max_completion_length=LENGTH)),
    ("gspo", SEQUENCE, GSPOLoss()),
    ("gspo, beta", SEQUENCE | {"beta": 0.04}, GSPOLoss(**LITERAL)),
    ("luspo", SEQUENCE | {"loss_type": "luspo", "epsilon_low": 2e-3, "epsilon_high": 2.5e-3}, LUSPOLoss()),
    ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}, CISPOLoss(ratio_max=5.0)),
    ("sapo", {"loss_type": "sapo"}, SAPOLoss()),
    ("vespo", {"loss_type": "vespo"}, VESPOLoss()),
    ("opsm", {"off_policy_mask_threshold": 0.05}, OPSMLoss(threshold=0.05, **EPSILONS)),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("settings", "loss_fn"), [case[1:] for case in GRPO], ids=[case[0] for case in GRPO])
def test_a_loss_type_of_trls_grpo(settings, loss_fn, seed):
    agree(both(grpo(), settings, loss_fn, seed))


@pytest.mark.parametrize("seed", range(3))
def test_trls_entropy_quantile_is_a_correction(seed):
    # of 26 tokens, 8 lie above a quantile at 0.7 that is interpolated, and 0.3 of them, rounded up, are as many
    def weights(entropy, inputs, side):
        return {"token_weights": rlloss.top_entropy_correction(entropy, inputs["mask"], 0.3).weights} if side else {}

    agree(both(grpo(), {"top_entropy_quantile": 0.3}, GRPOLoss(**EPSILONS), seed, weights))


@pytest.mark.parametrize("seed", range(3))
def test_trls_correction_of_the_samplers_mismatch_is_a_weight(seed):
    def weights(entropy, inputs, side):
        rollout = inputs["old_per_token_logps"] + 0.2 * torch.sin(7 * entropy)
        found = rlloss.importance_correction(
            inputs["old_per_token_logps"], rollout, inputs["mask"], "tis", level="token", ratio_max=1.1
        )
        return {("importance_sampling_ratio", "token_weights")[side]: found.weights}

    agree(both(grpo(), {"use_vllm": True, "loss_type": "dapo"}, DAPOLoss(**EPSILONS), seed, weights))


@pytest.mark.parametrize("seed", range(3))
def test_trls_rloo_has_one_ratio_per_answer(seed):
    agree(both(trls("trainer.rloo_trainer", "RLOOTrainer"), {}, RLOOLoss(**EPSILONS), seed))


@pytest.mark.parametrize("seed", range(3))
def test_trls_gmpo(seed):
    agree(
        both(
            trls("experimental.gmpo.gmpo_trainer", "GMPOTrainer"),
            {"epsilon_low": 0.4, "epsilon_high": 0.4},
            GMPOLoss(),
            seed,
        )
    )
