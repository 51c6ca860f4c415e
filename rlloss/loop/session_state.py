"""A session's state as the tensors and the numbers of a checkpoint, and back, bit for bit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rlloss.loop.state import optimizer_tensors, restore_model, restore_optimizer, restore_rng, rng_tensors

if TYPE_CHECKING:
    from rlloss.loop.session import Session

__all__ = ["restore_session", "session_state"]


def session_state(session: "Session") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that a resumed run needs: tensors, and what JSON holds."""
    tensors = {
        f"{part}.{name}": x for part, module in _modules(session).items() for name, x in module.state_dict().items()
    }
    optimizer, optimizer_info = optimizer_tensors(session.optimizer)
    rng, rng_info = rng_tensors()
    tensors |= {f"optimizer.{name}": x for name, x in optimizer.items()}
    tensors |= {f"rng.{name}": x for name, x in rng.items()}
    tensors["generator"] = session.generator.get_state()
    scheduler = None if session.scheduler is None else session.scheduler.state_dict()
    return tensors, {"step": session.step, "optimizer": optimizer_info, "rng": rng_info, "scheduler": scheduler}


def restore_session(session: "Session", tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Puts back what `session_state` gave, into a session that was built alike."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

    if (state["scheduler"] is None) != (session.scheduler is None):
        has, lacks = ("checkpoint", "session") if session.scheduler is None else ("session", "checkpoint")
        raise ValueError(f"Session: the {has} has a scheduler and the {lacks} has none; build the session as saved")
    modules = _modules(session)
    for name in tensors:
        if name.startswith(("critic.", "tracked.")) and not name.startswith(tuple(f"{known}." for known in modules)):
            raise ValueError(
                f"Session: the checkpoint holds {name!r}, for which this session has no module; build it with the "
                "critic that was saved, and Session.track(...) what was tracked: losses, advantages, rewards"
            )
    for name, module in modules.items():
        restore_model(module, part(f"{name}."))
    restore_optimizer(session.optimizer, part("optimizer."), state["optimizer"])
    if session.scheduler is not None:
        session.scheduler.load_state_dict(state["scheduler"])
    restore_rng(part("rng."), state["rng"])
    session.generator.set_state(tensors["generator"])
    session.step = state["step"]


def _modules(session: "Session") -> dict[str, nn.Module]:
    """What a checkpoint holds of modules; a trunk that the critic shares is the model's."""
    modules: dict[str, nn.Module] = {"model": session.model}
    if session.critic is not None:
        shares = session.critic.shares_backbone_with(session.model)
        modules["critic"] = session.critic.head if shares else session.critic
    return modules | {f"tracked.{name}": module for name, module in session.tracked.items()}
