"""What a loss may ask of a run besides its batch: a reference's log-probs and the critic's values."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from rlloss.adapters.signal.batches import Rows
from rlloss.adapters.signal.models import References, Version, check_vocabulary, frozen_module, version_of
from rlloss.loop.batch import Batch
from rlloss.loop.session import Session

__all__ = ["Reference", "Run"]

Reference = str | Path | nn.Module | None


@dataclass
class Run:
    """What losses may ask of a run.

    Args:
        session: Its model, critic and optimiser.
        references: Where reference models are found.
        base_model: What `reference_model="base"` loads where the session has no reference of its own.
    """

    session: Session
    references: References
    base_model: str | Path | None = None
    _base_version: Version | None = field(init=False, default=None)
    _kept: dict[str, nn.Module] = field(init=False, default_factory=dict)  # the newest reference of each name

    def __post_init__(self) -> None:
        self._base_version = None if self.base_model is None else version_of(self.base_model)

    def ref_logprobs(self, who: str, batch: Batch, reference: Reference, needed_by: str | None) -> dict[str, Tensor]:
        """The batch's field `ref_logprobs`, or nothing where there is neither a reference nor a need for one."""
        model = self._reference(who, reference)
        if model is None:
            if needed_by is None:
                return {}
            raise ValueError(
                f"{who}: {needed_by} needs a reference; pass loss_kwargs={{'reference_model': ...}}, a name, a folder "
                "or 'base' (what the run started from), or build the Session with reference="
            )
        own, self.session.reference = self.session.reference, model
        try:
            return {"ref_logprobs": self.session.logprobs(batch, reference=True)}
        finally:
            self.session.reference = own

    def values(self, who: str, rows: Rows, values: Tensor | None) -> Tensor:
        """The values of a batch: those that it came with, or the critic's."""
        if self.session.critic is None:
            raise ValueError(
                f"{who}: trains a value function, and this run has none; make it by create_run(..., critic='shared'), "
                "or build the Session with critic=rlloss.ScalarModel(model)"
            )
        return self.session.values(rows.batch) if values is None else rows.place("values", values)

    def _reference(self, who: str, reference: Reference) -> nn.Module | None:
        own = self.session.reference
        if reference is None or (reference == "base" and own is not None):
            return own
        if isinstance(reference, nn.Module):
            model = frozen_module(who, reference, self.session)
        elif not isinstance(reference, str | Path):
            raise ValueError(
                f"{who}: reference_model must be a name, a folder, 'base' or a model, got {type(reference).__name__}"
            )
        elif reference != "base":
            model = self._kept[str(reference)] = self.references.find(who, reference, self.session)
        elif self.base_model is None:
            raise ValueError(
                f"{who}: reference_model='base' is what the run started from, which a Session without a reference "
                "does not know; pass a name or a folder, or build the Session with reference=frozen_copy(model)"
            )
        else:
            model = self.references.find(who, self.base_model, self.session, self._base_version)
            self._kept["base"] = model
        check_vocabulary(who, model, self.session)
        return model
