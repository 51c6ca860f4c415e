"""A reference that follows the policy."""

from dataclasses import dataclass

import torch

from rlloss._checks import check_count, check_range
from rlloss.loop.peft import WithoutAdapters
from rlloss.loop.session import Session

__all__ = ["ReferenceMix"]


@dataclass(frozen=True)
class ReferenceMix:
    """TR-DPO, https://arxiv.org/abs/2404.09656: the reference moves to the policy now and then.

        pi_ref <- alpha pi + (1 - alpha) pi_ref    after every `every` updates

    of the weights; alpha = 1 takes the policy as it is. A loss that is bound to its reference may then go further than
    beta lets it. Pass it to `train_offline` or `train_online` as `reference_mix`; checkpoints carry the reference.

    Args:
        alpha: The policy's share, in (0, 1].
        every: Steps of the run between two moves.

    >>> ReferenceMix(alpha=0.6, every=512)
    ReferenceMix(alpha=0.6, every=512)
    """

    alpha: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        check_range("ReferenceMix", "alpha", self.alpha, 0, 1, open_low=True)
        check_count("ReferenceMix", "every", self.every)

    def begin(self, session: Session) -> None:
        """Makes the reference a part of the session's checkpoint; raises ValueError where none can move."""
        if session.reference is None:
            raise ValueError(
                "ReferenceMix: needs a reference to move, got None; pass Session(..., reference=frozen_copy(model))"
            )
        if isinstance(session.reference, WithoutAdapters):
            raise ValueError(
                "ReferenceMix: this reference is the policy without its adapters, whose weights are not its own; pass "
                "Session(..., reference=frozen_copy(model))"
            )
        names, ours = (dict(model.named_parameters()) for model in (session.reference, session.model))
        if names.keys() != ours.keys():
            odd = sorted(names.keys() ^ ours.keys())[0]
            raise ValueError(
                f"ReferenceMix: reference and policy must be of one make, and only one of them has {odd!r}; a mean of "
                "weights needs them in pairs"
            )
        session.track(reference=session.reference)

    def after(self, step: int, session: Session) -> None:
        """Moves the reference if it is time to."""
        if (step + 1) % self.every or session.reference is None:
            return
        policy = dict(session.model.named_parameters())
        with torch.no_grad():
            for name, parameter in session.reference.named_parameters():
                parameter.lerp_(policy[name].to(parameter), self.alpha)
