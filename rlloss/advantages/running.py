"""What is carried from step to step: the KL coefficient and the statistics of all rewards, saved by `state_dict`."""

import torch
from torch import Tensor, nn

from rlloss._checks import check_full_precision, check_range
from rlloss._typing import Float
from rlloss.advantages.whiten import check_moments, deviation, rounding, sample_variance
from rlloss.output import Moments

__all__ = ["AdaptiveEntropyController", "AdaptiveKLController", "FixedKLController", "RunningRewardNorm"]


class FixedKLController(nn.Module):
    """The KL coefficient that never changes, with the interface of `AdaptiveKLController`.

    It is a hyperparameter and not a state: `state_dict` does not carry it.

    >>> controller = FixedKLController(0.1)
    >>> controller.update(kl=3.0, n=256)
    >>> controller.kl_coef
    tensor(0.1000, dtype=torch.float64)
    """

    kl_coef: Tensor

    def __init__(self, kl_coef: float) -> None:
        super().__init__()
        check_range("FixedKLController", "kl_coef", kl_coef, 0)
        self.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64), persistent=False)

    def update(self, kl: Tensor | float, n: int) -> None:
        """Does nothing."""

    def extra_repr(self) -> str:
        """The coefficient."""
        return f"kl_coef={float(self.kl_coef):g}"


class AdaptiveKLController(nn.Module):
    """The KL coefficient that steers the KL to a target, section 2.2 of https://arxiv.org/abs/1909.08593.

        kl_coef <- kl_coef (1 + clip(kl / target_kl - 1, -0.2, 0.2) n / horizon)

    n / horizon stands where the paper has the constant K = 0.1, so that the speed does not depend on the batch size.
    `kl_coef` is a 0-dim float64 tensor, in which tiny factors add up without loss and which `state_dict` carries. It
    stands on the CPU until the controller is moved; where the KL is, no update waits for the device.

    Args:
        target_kl: The KL per sequence (or per token) to hold, in the unit of the `kl` that `update` gets.
        horizon: Sequences over which the coefficient moves by a factor of about e^0.2 at most.

    >>> controller = AdaptiveKLController(0.1, target_kl=6.0, horizon=1000)
    >>> controller.update(kl=12.0, n=500)  # far above the target: 0.1 (1 + 0.2 / 2)
    >>> controller.kl_coef
    tensor(0.1100, dtype=torch.float64)
    """

    kl_coef: Tensor

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: int = 10000) -> None:
        super().__init__()
        who = "AdaptiveKLController"
        check_range(who, "init_kl_coef", init_kl_coef, 0, open_low=True)  # no factor moves it away from 0
        check_range(who, "target_kl", target_kl, 0, open_low=True)
        check_range(who, "horizon", horizon, 0, open_low=True)
        self.target_kl, self.horizon = target_kl, horizon
        self.register_buffer("kl_coef", torch.tensor(init_kl_coef, dtype=torch.float64))

    def update(self, kl: Tensor | float, n: int) -> None:
        """One step: `kl` was the mean over the `n` sequences of the whole step, those of all ranks."""
        who = "AdaptiveKLController.update"
        check_range(who, "n", n, 0)
        if n >= 5 * self.horizon:
            raise ValueError(
                f"{who}: n={n} is 5 times horizon={self.horizon} or more, and a low KL would turn the coefficient "
                "negative; n counts sequences, not tokens, or raise the horizon"
            )
        if not isinstance(kl, Tensor):
            check_range(who, "kl", kl)
        elif kl.ndim != 0:
            raise ValueError(f"{who}: kl must be one number, got a tensor of shape {list(kl.shape)}")
        kl = kl.detach().to(self.kl_coef) if isinstance(kl, Tensor) else self.kl_coef.new_full((), kl)
        error = (kl / self.target_kl - 1).clamp(-0.2, 0.2)
        self.kl_coef = self.kl_coef * (1 + error * (n / self.horizon))

    def extra_repr(self) -> str:
        """The hyperparameters and the present coefficient."""
        return f"kl_coef={float(self.kl_coef):g}, target_kl={self.target_kl}, horizon={self.horizon}"


class AdaptiveEntropyController(nn.Module):
    """The entropy coefficient that keeps the entropy above a target, adaptive entropy control of https://arxiv.org/abs/2505.22312.

        coef <- clip(coef + step if entropy < target_entropy else coef - step, 0, max_coef)
        entropy_coef = coef where the last entropy was at or below the target, else 0

    Pass it to a policy loss as `entropy_coef`; before the first update the bonus is off. `coef` and `entropy_coef` are
    0-dim float64 tensors, which `state_dict` carries; they stand on the CPU until the controller is moved.

    Args:
        target_entropy: The entropy per token to hold, in nats.
        init_coef: Where `coef` begins.
        step: By how much an update moves it.
        max_coef: Its largest value.

    >>> controller = AdaptiveEntropyController(target_entropy=0.2)
    >>> controller.update(entropy=0.1)
    >>> controller.entropy_coef
    tensor(0.0050, dtype=torch.float64)
    """

    coef: Tensor
    entropy_coef: Tensor

    def __init__(
        self, target_entropy: float, *, init_coef: float = 0.0, step: float = 0.005, max_coef: float = 1.0
    ) -> None:
        super().__init__()
        who = "AdaptiveEntropyController"
        check_range(who, "target_entropy", target_entropy, 0)
        check_range(who, "step", step, 0, open_low=True)
        check_range(who, "max_coef", max_coef, 0, open_low=True)
        check_range(who, "init_coef", init_coef, 0, max_coef)
        self.target_entropy, self.step, self.max_coef = target_entropy, step, max_coef
        self.register_buffer("coef", torch.tensor(init_coef, dtype=torch.float64))
        self.register_buffer("entropy_coef", torch.zeros((), dtype=torch.float64))

    def update(self, entropy: Tensor | float) -> None:
        """One step: `entropy` was the mean over the tokens of the whole step, those of all ranks."""
        who = "AdaptiveEntropyController.update"
        if not isinstance(entropy, Tensor):
            check_range(who, "entropy", entropy)
        elif entropy.ndim != 0:
            raise ValueError(f"{who}: entropy must be one number, got a tensor of shape {list(entropy.shape)}")
        now = entropy.detach().to(self.coef) if isinstance(entropy, Tensor) else self.coef.new_full((), entropy)
        direction = torch.where(now < self.target_entropy, 1.0, -1.0).to(self.coef)
        self.coef = (self.coef + self.step * direction).clamp(0, self.max_coef)
        self.entropy_coef = torch.where(now <= self.target_entropy, self.coef, 0)

    def extra_repr(self) -> str:
        """The hyperparameters and the present coefficient."""
        return f"entropy_coef={float(self.entropy_coef):g}, target_entropy={self.target_entropy}, step={self.step}"


class RunningRewardNorm(nn.Module):
    """Rewards in units of all rewards seen so far, merged by Chan's https://doi.org/10.1080/00031305.1983.10483115.

        (R - mean) / sqrt(var + eps),   or R / sqrt(var + eps) without `center`;   var with n - 1

    `update` learns and `forward` only reads. As long as no two different rewards have been seen there is no
    scale: the divisor is 1, and before the first update rewards pass as they are. Identical rewards give exact
    zeros. The statistics are float64 buffers, which `state_dict` carries; they stand on the CPU until moved.

    >>> norm = RunningRewardNorm()
    >>> rewards = torch.tensor([1.0, 2.0, 3.0])
    >>> norm.update(Moments.of(rewards.double(), ~rewards.isnan()))
    >>> norm(rewards).tolist()
    [-1.0, 0.0, 1.0]
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, center: bool = True, eps: float = 1e-8) -> None:
        super().__init__()
        check_range("RunningRewardNorm", "eps", eps, 0)
        self.center, self.eps = center, eps
        for name in Moments._fields:
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def moments(self) -> Moments:
        """Of all rewards seen."""
        return Moments(self.count, self.mean, self.m2)

    def update(self, moments: Moments) -> None:
        """Adds a step's rewards: `Moments.of(rewards.double(), valid)`, summed over ranks."""
        if moments is None:
            raise ValueError("RunningRewardNorm.update: moments must be rlloss.Moments, got None")
        check_moments("RunningRewardNorm.update", moments)
        step = Moments(*(x.detach().to(self.mean) for x in moments))
        self.count, self.mean, self.m2 = self.moments + step

    def forward(self, rewards: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The rewards, normalised by what has been seen; a NaN stays one."""
        check_full_precision("RunningRewardNorm", "rewards", rewards)
        x = rewards.detach().double()
        variance = sample_variance(self.moments)
        has_spread = variance > rounding(self.mean).square()
        scale = torch.where(has_spread, (variance + self.eps).rsqrt(), 1)
        return ((deviation(x, self.mean) if self.center else x) * scale).to(rewards.dtype)

    def extra_repr(self) -> str:
        """The hyperparameters."""
        return f"center={self.center}, eps={self.eps}"
