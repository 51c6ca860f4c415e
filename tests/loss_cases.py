"""The losses that the laws are proved for: a new loss joins by one line in CASES, and so does a new option."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

import rlloss
import rlloss.reference
from rlloss import (
    ActorCriticLoss,
    BradleyTerryLoss,
    ConservativePPOLoss,
    Counts,
    DAPOLoss,
    DPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    ImportanceSamplingLoss,
    IPOLoss,
    KTOLoss,
    Loss,
    LossOutput,
    PPOLoss,
    REINFORCELoss,
    RLOOLoss,
    SFTLoss,
    SimPOLoss,
    ValueLoss,
)

CARRIES_GRADIENT = {
    "logprobs",
    "ref_kl",
    "entropy",
    "values",
    "chosen_logps",
    "rejected_logps",
    "chosen_mean_logps",
    "rejected_mean_logps",
    "logps",
    "chosen_rewards",
    "rejected_rewards",
    "divergence",
    "logits",
    "logsumexp",
    "mean_logprob",
    "rewards",
    "gold_logps",
    "rejected_kl",
    "chosen_kl",
}


class Step(dict[str, Tensor]):
    """A loss's inputs by argument name; every entry has one row per sequence (or pair) until it is packed.

    An entry without dimensions is a number of the whole step, which every part of it gets.
    """

    @property
    def mask(self) -> Tensor:
        return self["loss_mask"] if "loss_mask" in self else self["mask"]

    @property
    def waist(self) -> dict[str, Tensor]:
        return {k: x for k, x in self.items() if k in CARRIES_GRADIENT}

    @property
    def constants(self) -> dict[str, Tensor]:
        """The inputs that never carry a gradient."""
        return {k: x for k, x in self.items() if k not in CARRIES_GRADIENT and x.is_floating_point()}

    @property
    def counts(self) -> Counts:
        return rlloss.count(self.mask, self.get("cu_seqlens"))

    def but(self, **changed: Tensor) -> Self:
        return type(self)(self | changed)

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)({k: change(x) for k, x in self.items()})

    def to(self, where: torch.dtype | str) -> Self:
        return self.map(lambda x: x.to(where) if isinstance(where, str) or x.is_floating_point() else x)

    def leaves(self) -> Self:
        return self.but(**{k: x.detach().clone().requires_grad_() for k, x in self.waist.items()})

    @property
    def gradients(self) -> dict[str, Tensor]:
        """What `backward` left on the leaves; zeros where the loss does not use them."""
        return {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in self.waist.items()}

    def rows(self, index: Any) -> Self:
        return self.map(lambda x: x[index] if x.ndim else x)

    def padded(self, left: int, right: int, fill: float = 0.0) -> Self:
        """More columns (for pairs: more pairs) that do not count."""
        ndim = self.mask.ndim
        return self.map(
            lambda x: x if x.ndim < ndim else F.pad(x, (left, right), value=fill if x.is_floating_point() else False)
        )

    def packed(self, tail: int = 0, fill: float = 0.0) -> Self:
        """One row after the other, each up to its last trained token; pairs stay as they are."""
        if self.mask.ndim == 1:
            return self
        kept = self.mask.flip(-1).cumsum(-1).flip(-1) > 0
        cu_seqlens = F.pad(kept.sum(-1).cumsum(0), (1, 0))
        packed = self.map(lambda x: x[kept] if x.ndim == 2 else x)
        tokens = {k: x for k, x in packed.items() if self[k].ndim == 2}
        return packed.but(**Step(tokens).padded(0, tail, fill), cu_seqlens=cu_seqlens)

    def poisoned(self, value: float) -> Self:
        """`value` wherever the mask is False, in every input."""
        rows = self.mask if self.mask.ndim == 1 else self.mask.any(-1)

        def fill(x: Tensor) -> Tensor:
            if x.ndim == 0:
                return x
            return torch.where(self.mask if x.ndim == self.mask.ndim else rows, x, value)

        return self.map(lambda x: fill(x) if x.is_floating_point() else x)


Draw = Callable[..., Tensor]


def likelihood(mask: Tensor, draw: Draw) -> Step:
    return Step(logprobs=-draw(*mask.shape).abs(), loss_mask=mask, token_weights=draw(*mask.shape).clamp(min=0))


def policy(mask: Tensor, draw: Draw) -> Step:
    logprobs = -draw(*mask.shape).abs()
    return Step(
        logprobs=logprobs,
        old_logprobs=logprobs + 0.4 * draw(*mask.shape),
        advantages=draw(*mask.shape),
        loss_mask=mask,
        ref_logprobs=logprobs + 0.6 * draw(*mask.shape),
        entropy=draw(*mask.shape).abs(),
        token_weights=draw(*mask.shape).clamp(min=0),
    )


def with_exact_kl(mask: Tensor, draw: Draw) -> Step:
    """A policy's inputs with the divergence of the whole vocabulary, and no reference beside it."""
    step = policy(mask, draw)
    del step["ref_logprobs"]
    return step.but(ref_kl=draw(*mask.shape).abs())


def bare_policy(mask: Tensor, draw: Draw) -> Step:
    """The positional inputs alone, with one advantage per sequence."""
    step = policy(mask, draw).but(advantages=draw(mask.shape[0]))
    return Step({k: step[k] for k in ("logprobs", "old_logprobs", "advantages", "loss_mask")})


def pairs(mask: Tensor, draw: Draw) -> Step:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    logps = {name: 4 * draw(mask.shape[0]) - 10 for name in names}
    return Step(**logps, mask=mask.any(-1), weights=draw(mask.shape[0]).clamp(min=0))


def mean_pairs(mask: Tensor, draw: Draw) -> Step:
    means = {name: draw(mask.shape[0]) - 2 for name in ("chosen_mean_logps", "rejected_mean_logps")}
    return Step(**means, mask=mask.any(-1), weights=draw(mask.shape[0]).clamp(min=0))


def thumbs(mask: Tensor, draw: Draw) -> Step:
    logps = {name: 4 * draw(mask.shape[0]) - 10 for name in ("logps", "ref_logps")}
    extra = {"mask": mask.any(-1), "weights": draw(mask.shape[0]).clamp(min=0), "kl": draw(1).abs()[0]}
    return Step(**logps, desirable=draw(mask.shape[0]) > 0, **extra)


def scored_pairs(mask: Tensor, draw: Draw) -> Step:
    names = ("chosen_rewards", "rejected_rewards", "margin")
    scores = {name: draw(mask.shape[0]) for name in names}
    return Step(**scores, mask=mask.any(-1), weights=draw(mask.shape[0]).clamp(min=0))


def bare_scored_pairs(mask: Tensor, draw: Draw) -> Step:
    step = scored_pairs(mask, draw)
    return Step({k: step[k] for k in ("chosen_rewards", "rejected_rewards", "mask")})


def critic(mask: Tensor, draw: Draw) -> Step:
    values = draw(*mask.shape)
    return Step(
        values=values,
        old_values=values + 0.4 * draw(*mask.shape),
        returns=values + draw(*mask.shape),
        loss_mask=mask,
        token_weights=draw(*mask.shape).clamp(min=0),
    )


def bare_critic(mask: Tensor, draw: Draw) -> Step:
    step = critic(mask, draw)
    del step["token_weights"]
    return step


def policy_and_critic(mask: Tensor, draw: Draw) -> Step:
    return Step(critic(mask, draw) | policy(mask, draw))


def ppo_with_critic(*, value_coef: float, value_clip: float, **options: Any) -> ActorCriticLoss:
    return ActorCriticLoss(policy=PPOLoss(**options), value=ValueLoss(value_clip=value_clip), value_coef=value_coef)


def reference_free_pairs(mask: Tensor, draw: Draw) -> Step:
    step = pairs(mask, draw)
    return Step({k: x for k, x in step.items() if not k.startswith("ref_")})


def unweighted_pairs(mask: Tensor, draw: Draw) -> Step:
    step = pairs(mask, draw)
    del step["weights"]
    return step


@dataclass(frozen=True)
class Case:
    """A loss with some options, and inputs for it."""

    name: str
    loss: Callable[..., Loss]
    inputs: Callable[[Tensor, Draw], Step]
    options: dict[str, Any] = field(default_factory=dict)
    reference: Callable[..., float] | None = None  # else that of rlloss.reference

    def __call__(self) -> Loss:
        return self.loss(**self.options)

    @property
    def file(self) -> str:
        """The name of the loss's file, which is its name in the registry and in the reference."""
        return type(self()).__module__.rpartition(".")[2]

    def step(self, rows: int = 6, columns: int = 7, *, seed: int = 0) -> Step:
        """A random step in float64; the third row holds no trained token, every other row at least one."""
        generator = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        mask = draw(rows, columns) > -0.4
        mask[:, 1:2] = True
        mask[2:3] = False
        return self.inputs(mask, draw)

    def run(self, step: Step, loss_fn: Callable[..., LossOutput] | None = None) -> tuple[LossOutput, dict[str, Tensor]]:
        """The output on `step`, and the gradient of the loss."""
        leaves = step.leaves()
        out = (self() if loss_fn is None else loss_fn)(**leaves)
        out.loss.backward()
        return out, leaves.gradients

    def absolute_terms(self, step: Step) -> float:
        """The sum of |loss| over the rows, each under the step's normaliser: what 1e-12 is relative to."""
        loss_fn: Any = self()
        if loss_fn.exactness == "waist":
            return float(loss_fn(**step).loss)  # its terms are positive
        extra = loss_fn.statistics(**step) if loss_fn.exactness == "statistic" else {}
        step = step.but(**{name: extra.pop(name) for name in list(extra) if extra[name].ndim})
        rows = [step.rows([i]) for i in range(len(step.mask))]
        return sum(float(loss_fn(**row, normalizer=step.counts, **extra).loss.abs()) for row in rows)


CLIP = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}
ALL = CLIP | {"kl_coef": 0.3, "entropy_coef": 0.05}
DUAL = ALL | {"dual_clip": 1.4}
WEIGHTS = {"ratio_min": 0.8, "ratio_max": 1.2, "kl_coef": 0.3, "entropy_coef": 0.05}
WIDE = ALL | {"clip_eps_low": 0.1, "clip_eps_high": 0.15}

CASES = [
    Case("sft", SFTLoss, likelihood),
    Case("sft_sequence_mean", SFTLoss, likelihood, {"reduction": "sequence_mean"}),
    Case("sft_sequence_sum", SFTLoss, likelihood, {"reduction": "sequence_sum"}),
    Case("sft_fixed_length", SFTLoss, likelihood, {"reduction": "fixed_length", "max_length": 9}),
    Case("sft_sum", SFTLoss, likelihood, {"reduction": "sum"}),
    Case("dpo", DPOLoss, pairs, {"beta": 0.2}),
    Case("dpo_smoothed", DPOLoss, pairs, {"beta": 0.3, "label_smoothing": 0.1}),
    Case("dpo_reference_free", DPOLoss, reference_free_pairs, {"reference_free": True}),
    Case("ipo", IPOLoss, pairs, {"beta": 0.2}),
    Case("ipo_means", IPOLoss, pairs, {"beta": 0.4, "length_normalized": True}),
    Case("ipo_reference_free", IPOLoss, reference_free_pairs, {"reference_free": True}),
    Case("simpo", SimPOLoss, mean_pairs, {"margin": 0.7}),
    Case("simpo_smoothed", SimPOLoss, mean_pairs, {"beta": 1.5, "label_smoothing": 0.1}),
    Case("kto", KTOLoss, thumbs, {"beta": 0.2}),
    Case("kto_weighted", KTOLoss, thumbs, {"beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7}),
    Case("bradley_terry_bare", BradleyTerryLoss, bare_scored_pairs),
    Case("bradley_terry", BradleyTerryLoss, scored_pairs, {"temperature": 0.7, "center_coef": 0.05}),
    Case("bradley_terry_smoothed", BradleyTerryLoss, scored_pairs, {"label_smoothing": 0.2}),
    Case("value", ValueLoss, critic),
    Case("value_whole", ValueLoss, bare_critic, {"value_clip": 0.3, "halve": False}),
    Case("value_unclipped", ValueLoss, critic, {"value_clip": None}),
    Case("ppo_bare", PPOLoss, bare_policy, CLIP),
    Case("ppo", PPOLoss, policy, DUAL),
    Case("actor_critic", ppo_with_critic, policy_and_critic, DUAL | {"value_coef": 0.7, "value_clip": 0.3}),
    Case("dapo_bare", DAPOLoss, bare_policy),
    Case("dapo", DAPOLoss, policy, ALL),
    Case("reinforce_bare", REINFORCELoss, bare_policy),
    Case("reinforce", REINFORCELoss, policy, {"kl_coef": 0.3, "entropy_coef": 0.05}),
    Case("rloo_bare", RLOOLoss, bare_policy, CLIP),
    Case("rloo", RLOOLoss, policy, DUAL),
    Case("grpo_bare", GRPOLoss, bare_policy, CLIP),
    Case("grpo", GRPOLoss, policy, ALL),
    Case("grpo_dual_clip", GRPOLoss, policy, DUAL),
    Case("grpo_k1_reverse", GRPOLoss, policy, ALL | {"kl": "k1"}),
    Case("grpo_k2_reverse", GRPOLoss, policy, ALL | {"kl": "k2"}),
    Case("grpo_k2_literal", GRPOLoss, policy, ALL | {"kl": "k2", "kl_grad": "literal"}),
    Case("grpo_k3_forward", GRPOLoss, policy, ALL | {"kl_grad": "forward"}),
    Case("grpo_k3_literal", GRPOLoss, policy, ALL | {"kl_grad": "literal"}),
    Case("grpo_abs_literal", GRPOLoss, policy, ALL | {"kl": "abs", "kl_grad": "literal"}),
    Case("grpo_exact", GRPOLoss, with_exact_kl, ALL | {"kl": "exact"}),
    Case("importance_sampling_exact", ImportanceSamplingLoss, with_exact_kl, WEIGHTS | {"kl": "exact"}),
    Case("dr_grpo_bare", DrGRPOLoss, bare_policy, CLIP | {"max_completion_length": 9}),
    Case("dr_grpo", DrGRPOLoss, policy, DUAL | {"max_completion_length": 9}),
    Case("gspo_bare", GSPOLoss, bare_policy, {"clip_eps_low": 0.1, "clip_eps_high": 0.15}),
    Case("gspo", GSPOLoss, policy, WIDE | {"dual_clip": 1.2}),
    Case("importance_sampling_bare", ImportanceSamplingLoss, bare_policy),
    Case("importance_sampling", ImportanceSamplingLoss, policy, WEIGHTS | {"ratio_min": 0.3, "ratio_max": 3.0}),
    Case("importance_sampling_token", ImportanceSamplingLoss, policy, WEIGHTS | {"ratio_level": "token"}),
    Case("conservative_ppo", ConservativePPOLoss, policy, DUAL | {"conservative_coef": 2.0}),
    Case("conservative_ppo_k2", ConservativePPOLoss, policy, CLIP | {"conservative_coef": 2.0, "kl": "k2"}),
    Case("conservative_ppo_slack", ConservativePPOLoss, policy, CLIP | {"max_kl": 9.0}),
    Case(
        "conservative_ppo_sequence", ConservativePPOLoss, policy, ALL | {"conservative_coef": 2.0, "level": "sequence"}
    ),
]

from loss_cases_distillation import CASES as DISTILLATION  # noqa: E402 (their lines are of the kinds above)
from loss_cases_preference import CASES as PREFERENCE  # noqa: E402
from loss_cases_regions import CASES as REGIONS  # noqa: E402 (their lines are of the kinds above)
from loss_cases_rewards import CASES as REWARDS  # noqa: E402
from loss_cases_weighted import CASES as WEIGHTED  # noqa: E402

CASES += WEIGHTED + REGIONS
CASES += DISTILLATION + REWARDS
CASES += PREFERENCE
