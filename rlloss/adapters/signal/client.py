"""The client and its training clients: coroutines that queue a run's work on one thread of its own, in order."""

import asyncio
import copy
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch

from rlloss._checks import check_choice, check_count, check_range, nearest
from rlloss.adapters.signal.given import copied, prompts_given
from rlloss.adapters.signal.models import References, load_language_model, load_reward_model
from rlloss.adapters.signal.registry import prepared
from rlloss.adapters.signal.run import Run
from rlloss.loop.data import prompts as prompts_of_rows
from rlloss.loop.pretrained import default_device, load_tokenizer
from rlloss.loop.session import Session
from rlloss.output import scalars
from rlloss.scalar import ScalarModel

__all__ = ["Client", "TrainingClient"]

T = TypeVar("T")


@dataclass
class _Worker:
    """A session's own thread, on which calls run in the order of their start, and what its next update is to know.

    Args:
        max_grad_norm: The clip that losses asked for.
        shares: Learning rates of the parameter groups as multiples of the first one's.
    """

    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rlloss-signal"))
    max_grad_norm: float | None = None
    shares: list[float] | None = None


_WORKERS: WeakKeyDictionary[Session, _Worker] = WeakKeyDictionary()
_WORKERS_LOCK = threading.Lock()


class TrainingClient:
    """Signal's training client over a session.

    Every method is a coroutine whose work runs on the session's own thread: the event loop stays free, and calls that
    were started before others have ended (`asyncio.gather`, tasks) run in the order in which they were started, each
    on a copy of what it was given then. Gradients of several `forward_backward` calls add up until `optim_step`.

    A call that is cancelled while it waits never runs. One whose work has begun is finished all the same, and counts: a
    thread cannot be stopped. A call that fails leaves no gradient of its own, nor, where its work had begun, those of
    earlier calls, which cannot be told from it; the error's notes say so.

    Args:
        session: Model, optimiser, and where losses need them critic and reference. The session of a `ScalarModel`
            trains a reward model.
        base_model: Name or folder that `reference_model="base"` stands for, where the session has no reference.
        references: Shares loaded references with other clients.
    """

    def __init__(
        self, session: Session, *, base_model: str | Path | None = None, references: References | None = None
    ) -> None:
        self.session = session
        self._run = Run(session, References() if references is None else references, base_model)
        with _WORKERS_LOCK:
            self._worker = _WORKERS.setdefault(session, _Worker())

    async def forward_backward(
        self,
        batch_data: Mapping[str, Any],
        loss_fn: str = "causal_lm",
        loss_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds the gradient of a loss; returns `loss`, `metrics` and `step`, the number of updates so far.

        Args:
            batch_data: Tensors or nested lists, by the keys of docs/signal.md.
            loss_fn: One of `rlloss.adapters.signal.LOSSES`.
            loss_kwargs: Its hyperparameters.
        """
        return await self._queued(self._forward_backward, copied(batch_data), loss_fn, dict(loss_kwargs or {}))

    async def optim_step(
        self, *, learning_rate: float | None = None, max_grad_norm: float | None = None
    ) -> dict[str, Any]:
        """Updates the model; returns `grad_norm` before its clip, `learning_rate` and `step`.

        Args:
            learning_rate: From this update on, of the first parameter group, the policy's; others (a critic's own)
                keep their ratio to it. The session's own where None.
            max_grad_norm: For this update; what the losses since the last one asked for, or the session's own.
        """
        return await self._queued(self._optim_step, learning_rate, max_grad_norm)

    async def sample(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int,
        num_samples: int = 1,
        temperature: float | None = None,
    ) -> list[dict[str, Any]]:
        """Completions, those of the first prompt first: `text`, `token_ids`, their `log_probs`, and `finished`.

        Args:
            prompts: A list of texts, conversations (lists of messages) or lists, tensors or arrays of token ids.
            max_new_tokens: Where a completion that has not ended is cut; then `finished` is False.
            num_samples: Completions per prompt.
            temperature: The session's own where None.
        """
        return await self._queued(self._sample, prompts_given(prompts), max_new_tokens, num_samples, temperature)

    async def save_state(self, folder: str | Path) -> Path:
        """Writes a checkpoint that `load_state` continues bit for bit."""
        return await self._queued(self._save_state, folder)

    async def load_state(self, folder: str | Path) -> dict[str, Any]:
        """Restores a checkpoint, dropping gradients that wait for an update; returns `step`."""
        return await self._queued(self._load_state, folder)

    async def save_model(self, folder: str | Path) -> Path:
        """Writes model and tokenizer as a transformers folder, which `create_run` and `reference_model` read."""
        return await self._queued(self.session.save_model, folder)

    async def _queued(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker.thread, work, *arguments)

    def _forward_backward(self, batch_data: Mapping[str, Any], loss_fn: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        clip = kwargs.get("max_grad_norm")
        step = prepared(self._run, loss_fn, batch_data, kwargs)
        if clip is not None and self._worker.max_grad_norm not in (None, clip):
            raise ValueError(
                f"{loss_fn}: max_grad_norm={clip}, but another forward_backward of this update asked for "
                f"{self._worker.max_grad_norm}; one update has one clip"
            )
        had_gradient = self._has_gradient()
        try:
            loss, metrics = self.session.forward_backward(step.batch, step.loss_fn)
            reported = step.report({"loss": loss, **scalars(metrics)})
        except BaseException as error:
            earlier = " and, since they add up, of the earlier ones since the last update: make those again"
            self._drop_gradient(error, f"{loss_fn}: dropped the gradient of this call{earlier if had_gradient else ''}")
            raise
        self._worker.max_grad_norm = self._worker.max_grad_norm if clip is None else clip
        return {"loss": loss, "metrics": reported, "step": self.session.step}

    def _optim_step(self, learning_rate: float | None, max_grad_norm: float | None) -> dict[str, Any]:
        session = self.session
        if not self._has_gradient():
            raise ValueError("optim_step: no gradient since the last update; call forward_backward first")
        if max_grad_norm is not None:
            check_range("optim_step", "max_grad_norm", max_grad_norm, 0, open_low=True)
        if learning_rate is not None:
            check_range("optim_step", "learning_rate", learning_rate, 0, sys.float_info.max)
            if session.scheduler is not None:
                raise ValueError("optim_step: this session has a scheduler, which sets the learning rate; pass none")
            self._set_learning_rate(learning_rate)
        own, asked = session.max_grad_norm, self._worker.max_grad_norm
        session.max_grad_norm = next(x for x in (max_grad_norm, asked, own) if x is not None)
        try:
            numbers = session.optim_step()
        except FloatingPointError as error:
            self._drop_gradient(error, "optim_step: dropped the gradient, so that the run can go on")
            raise
        finally:
            session.max_grad_norm = own
        self._worker.max_grad_norm = None
        return {**numbers, "step": session.step}

    def _set_learning_rate(self, learning_rate: float) -> None:
        groups = self.session.optimizer.param_groups
        first = float(groups[0]["lr"])
        if first > 0:  # of a zero there is no multiple: then the ratios of before hold
            self._worker.shares = [float(group["lr"]) / first for group in groups]
        for group, share in zip(groups, self._worker.shares or [1.0] * len(groups), strict=True):
            group["lr"] = learning_rate * share

    def _drop_gradient(self, error: BaseException, note: str) -> None:
        self.session.optimizer.zero_grad(set_to_none=True)
        self._worker.max_grad_norm = None
        error.add_note(note)

    def _sample(
        self, prompts: list[Any], max_new_tokens: int, num_samples: int, temperature: float | None
    ) -> list[dict[str, Any]]:
        check_count("sample", "num_samples", num_samples)
        are_ids = [isinstance(prompt, list) and all(isinstance(i, int) for i in prompt) for prompt in prompts]
        rows = [{"prompt": p} for p, is_ids in zip(prompts, are_ids, strict=True) if not is_ids]
        encoded = iter(prompts_of_rows(rows, self.session.tokenizer))
        ids = [p if is_ids else next(encoded).ids for p, is_ids in zip(prompts, are_ids, strict=True)]
        drawn = self.session.sample(ids, max_new_tokens=max_new_tokens, group_size=num_samples, temperature=temperature)
        texts = self.session.tokenizer.batch_decode([c.ids for c in drawn], skip_special_tokens=True)
        return [
            {"text": text, "token_ids": c.ids, "log_probs": c.logprobs, "finished": c.finished}
            for text, c in zip(texts, drawn, strict=True)
        ]

    def _save_state(self, folder: str | Path) -> Path:
        if self._has_gradient():
            raise ValueError(
                "save_state: a gradient waits for its update, and checkpoints hold none; call optim_step first"
            )
        return self.session.save_state(folder)

    def _load_state(self, folder: str | Path) -> dict[str, Any]:
        self.session.load_state(folder)
        self.session.optimizer.zero_grad(set_to_none=True)
        self._worker.max_grad_norm = None
        return {"step": self.session.step}

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for group in self.session.optimizer.param_groups for p in group["params"])


class Client:
    """Runs by their id, in this process, and the references that they share.

    >>> Client().get_training_client("reward-run")
    Traceback (most recent call last):
    ValueError: get_training_client: unknown run 'reward-run'. Known: none; create_run makes one
    """

    def __init__(self) -> None:
        self._clients: dict[str, TrainingClient] = {}
        self._references = References()

    def create_run(
        self,
        model: str | Path,
        *,
        run_id: str | None = None,
        reward_model: bool = False,
        critic: Literal["shared", "separate"] | None = "shared",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        learning_rate: float = 1e-5,
        **session_options: Any,
    ) -> str:
        """Makes a run of a model and returns its id.

        Args:
            model: A folder or hub name.
            run_id: Its id; a new one where None.
            reward_model: Trains a scalar head on the model's backbone in place of the language model; a folder that
                `save_model` wrote of such a run goes on.
            critic: The value function of `ppo` and `enhanced_ppo`: a head on the policy's trunk, or on a copy of it.
                A shared one costs nothing until a loss trains it. A reward model has none.
            dtype: Of the weights that are trained; for speed add `autocast_dtype=torch.bfloat16`.
            device: A GPU where there is one, if None.
            learning_rate: Of AdamW.
            **session_options: Of `rlloss.Session`, such as `temperature`, `micro_batch_tokens`, `max_grad_norm`.
        """
        self._check_new(run_id)
        if critic is not None:
            check_choice("create_run", "critic", critic, ("shared", "separate"))
        if reward_model and critic == "separate":
            raise ValueError("create_run: a reward model has no critic, got critic='separate'; leave it out")
        place = device or default_device()
        own = (load_reward_model if reward_model else load_language_model)(model, dtype=dtype).to(place)
        head = None
        if critic is not None and not reward_model:
            head = ScalarModel(own if critic == "shared" else copy.deepcopy(own))
        tokenizer = load_tokenizer(model)
        session = Session(own, tokenizer, critic=head, learning_rate=learning_rate, **session_options)
        return self.add_run(session, run_id=run_id, base_model=None if reward_model else model)

    def add_run(self, session: Session, *, run_id: str | None = None, base_model: str | Path | None = None) -> str:
        """Makes a run of a session of your own and returns its id; `base_model` as in `TrainingClient`."""
        run_id = f"run_{uuid.uuid4().hex[:12]}" if run_id is None else run_id
        self._check_new(run_id)
        self._clients[run_id] = TrainingClient(session, base_model=base_model, references=self._references)
        return run_id

    def get_training_client(self, run_id: str) -> TrainingClient:
        """The training client of a run."""
        if run_id not in self._clients:
            known = ", ".join(self._clients) or "none; create_run makes one"
            raise ValueError(
                f"get_training_client: unknown run {run_id!r}{nearest(run_id, self._clients)}. Known: {known}"
            )
        return self._clients[run_id]

    def _check_new(self, run_id: str | None) -> None:
        if run_id in self._clients:
            raise ValueError(f"create_run: run {run_id!r} exists; choose another run_id")
