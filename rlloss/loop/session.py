"""A session: one model with its optimiser, reference, critic and sampler, behind four verbs."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlloss._checks import check_count, check_range
from rlloss.loop.batch import Batch, micro_batches
from rlloss.loop.checkpoint import read_checkpoint, write_checkpoint
from rlloss.loop.frozen import frozen_copy
from rlloss.loop.modes import gradient_mode
from rlloss.loop.objective import Objective, check_batch, check_language_model, objective_of, outputs_of
from rlloss.loop.optimizer import adamw, check_optimizer, clipped_apart, trainable_parameters
from rlloss.loop.padding_free import check_padding_free
from rlloss.loop.peft import WithoutAdapters
from rlloss.loop.sampling import Completion, sample, stop_tokens
from rlloss.loop.scalar_folder import save_scalar_model
from rlloss.loop.scoring import score
from rlloss.loop.session_state import restore_session, session_state
from rlloss.output import LossOutput, Metric, merge_metrics, waist_gradient
from rlloss.protocol import Loss
from rlloss.scalar import ScalarModel

__all__ = ["Session"]


class Session:
    """One policy under training: `sample`, `forward_backward`, `optim_step`, `save_state` and `load_state`.

    The policy stays in eval mode: dropout would make the ratio differ from 1 at the first update for no reason. Layers
    for which transformers' checkpointing is on compute their activations again in the backward.

    Args:
        model: Any Hugging Face causal LM; parameters with `requires_grad=False` stay frozen. A `ScalarModel` makes it
            the session of a reward model.
        tokenizer: Its tokenizer: end-of-sequence, padding, and text for reward functions. A completion also ends at the
            tokens that the model's generation config names.
        reference: The frozen model of KL terms and preference losses: `frozen_copy(model)`, or `WithoutAdapters(model)`
            of a PEFT model, or None.
        critic: The value function of losses that need one: `ScalarModel(model)` is a head on the policy's trunk, which
            one forward then serves; `ScalarModel(copy.deepcopy(model))` has a trunk of its own.
        learning_rate: Of AdamW with betas (0.9, 0.95) and no weight decay, where `optimizer` is None.
        critic_learning_rate: Of the parameters that are the critic's alone; `learning_rate` where None.
        optimizer: An optimiser of your own over the model's parameters, and the critic's.
        scheduler: A function that makes a learning-rate scheduler of the optimiser; stepped by `optim_step`.
        max_grad_norm: Gradient-norm clip, of policy and critic apart where they share nothing.
        temperature: Divides the logits, when sampling and when scoring alike.
        micro_batch_tokens: Padded tokens per forward pass.
        sample_rows: Completions that are decoded at once.
        autocast_dtype: Runs forward passes under autocast, over the model's own master weights.
        sampling_dtype: Samples from a copy in this dtype, refreshed after every step.
        padding_free: Lays the rows of a micro-batch end to end for the model, without padding, where attention that
            reads positions keeps them apart: less work with flash attention, more with `sdpa` and `eager`.
        dropout: Drops out where a gradient is made, as the adapters of a PEFT model say, or the layers of any other.
        seed: Of the sampler's generator.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        reference: nn.Module | None = None,
        critic: ScalarModel | None = None,
        learning_rate: float = 1e-6,
        critic_learning_rate: float | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        micro_batch_tokens: int = 16384,
        sample_rows: int = 512,
        autocast_dtype: torch.dtype | None = None,
        sampling_dtype: torch.dtype | None = None,
        padding_free: bool = False,
        dropout: bool = False,
        seed: int = 0,
    ) -> None:
        for name, number in {"max_grad_norm": max_grad_norm, "temperature": temperature}.items():
            check_range("Session", name, number, 0, open_low=True)
        check_count("Session", "micro_batch_tokens", micro_batch_tokens)
        check_count("Session", "sample_rows", sample_rows)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.reference = None if reference is None else reference.eval()
        self.critic = None if critic is None else critic.eval()
        if critic is None and critic_learning_rate is not None:
            raise ValueError(f"Session: {critic_learning_rate=} needs a critic, got None")
        if critic is not None:
            check_language_model("Session: a critic", isinstance(model, ScalarModel))
        trainable, of_critic = trainable_parameters(model, critic)
        if optimizer is None:
            optimizer = adamw(trainable, of_critic, learning_rate, critic_learning_rate)
        elif critic_learning_rate is not None:
            raise ValueError("Session: critic_learning_rate is for the optimiser made here; set it in your own")
        check_optimizer(optimizer, trainable, of_critic)
        self.optimizer = optimizer
        self.scheduler = None if scheduler is None else scheduler(optimizer)
        self.max_grad_norm, self.temperature = max_grad_norm, temperature
        self.micro_batch_tokens, self.sample_rows = micro_batch_tokens, sample_rows
        self.autocast_dtype, self.sampling_dtype, self.dropout = autocast_dtype, sampling_dtype, dropout
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.padding_free = padding_free
        if padding_free:
            with self._autocast():
                check_padding_free(model)
        self.step = 0
        self.tracked: dict[str, nn.Module] = {}
        self._sampler: nn.Module | None = None
        self._sampler_step = -1

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        group_size: int = 1,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Completion]:
        """Completions of token prompts, prompt-major, with the log-probs that they were drawn with."""
        check_language_model("Session.sample", isinstance(self.model, ScalarModel))
        return sample(
            self._current_sampler(),
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature if temperature is None else temperature,
            eos_token_id=stop_tokens(self.model, self.tokenizer),
            generator=generator or self.generator,
            max_rows=self.sample_rows,
        )

    def logprobs(self, batch: Batch, *, reference: bool = False) -> Tensor:
        """Log-probs `[B, T]` of a batch under the policy, or under the reference, without gradient."""
        model = self.reference if reference else self.model
        if model is None:
            raise ValueError("Session: needs a reference, got None; pass Session(..., reference=frozen_copy(model))")
        if isinstance(model, WithoutAdapters):
            with model.model.disable_adapter():
                return self._waist(model.model, batch, ("logprobs",))["logprobs"].cpu()
        return self._waist(model, batch, ("logprobs",))["logprobs"].cpu()

    def values(self, batch: Batch) -> Tensor:
        """The critic's values `[B, T]` of every real token, without gradient: row t is that after reading token t.

        So it is aligned with the log-probs: the value of the state in which `batch.ids[:, t]` is chosen.
        """
        if self.critic is None:
            raise ValueError("Session: needs a critic, got None; pass Session(..., critic=rlloss.ScalarModel(model))")
        return self._waist(self.model, batch, ("values",))["values"].cpu()

    def forward(self, batch: Batch, loss_fn: Loss) -> tuple[float, dict[str, Metric]]:
        """The loss of a batch and its metrics, without gradient."""
        objective = self._objective(batch, loss_fn)
        waist = self._waist(self.model, batch, outputs_of(loss_fn))
        with torch.no_grad():
            out = objective.call(loss_fn, waist, batch.to(self.device), {})
        return float(out.loss), out.metrics

    def forward_backward(self, batch: Batch, loss_fn: Loss) -> tuple[float, dict[str, Metric]]:
        """Adds the gradient of a whole step's loss; micro-batches, however cut, do not change it.

        Returns the step's loss and its metrics.
        """
        objective = self._objective(batch, loss_fn)
        parts = micro_batches(batch, self.micro_batch_tokens)
        with gradient_mode(self.model, self.critic, dropout=self.dropout):
            if loss_fn.exactness == "sum" or len(parts) == 1:
                outputs = self._backward_in_parts(batch, loss_fn, objective, parts)
            else:
                outputs = [self._backward_through_waist(batch, loss_fn, objective, parts)]
        loss = torch.stack([out.loss.detach() for out in outputs]).sum()
        return float(loss), merge_metrics(out.metrics for out in outputs)

    def optim_step(self) -> dict[str, float]:
        """Clips the gradient, updates the policy and clears the gradient."""
        norms = {}
        for name, parameters in clipped_apart(self.optimizer, self.model, self.critic).items():
            norms[name] = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
            if not norms[name] < float("inf"):
                which = "critic's gradient" if name.startswith("critic") else "gradient"
                raise FloatingPointError(
                    f"Session: the {which} norm of update {self.step} is {norms[name]}; nothing was updated"
                )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        return {**norms, "learning_rate": float(learning_rate)}

    def track(self, **modules: nn.Module) -> None:
        """Modules whose state joins the checkpoint, by name: controllers, running statistics, losses with a memory."""
        self.tracked |= modules

    def save_state(self, folder: str | Path, info: dict[str, Any] | None = None) -> Path:
        """Writes everything that a resumed run needs, atomically: safetensors and JSON, no pickle."""
        tensors, state = session_state(self)
        return write_checkpoint(folder, tensors, {"session": state, "info": info or {}})

    def load_state(self, folder: str | Path) -> dict[str, Any]:
        """Restores what `save_state` wrote, bit for bit, and returns its `info`."""
        tensors, saved = read_checkpoint(folder)
        restore_session(self, tensors, saved["session"])
        self._sampler_step = -1
        return saved["info"]

    def save_model(self, folder: str | Path) -> Path:
        """Writes model and tokenizer as an ordinary transformers folder, with safetensors weights.

        A reward model's folder is read by `rlloss.loop.load_scalar_model`.
        """
        if isinstance(self.model, ScalarModel):
            save_scalar_model(self.model, folder)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return Path(folder)

    def _backward_in_parts(
        self, batch: Batch, loss_fn: Loss, objective: Objective, parts: list[Tensor]
    ) -> list[LossOutput]:
        # a loss that couples the rows of a step sees no normaliser where one part is the whole of it
        keywords = {"normalizer": objective.counts(batch)} if loss_fn.exactness == "sum" else {}
        outputs = []
        for rows in parts:
            part = batch.select(rows, self.device)
            out = objective.call(loss_fn, self._score(self.model, part, outputs_of(loss_fn)), part, keywords)
            out.loss.backward()
            outputs.append(LossOutput(out.loss.detach(), out.metrics))
        return outputs

    def _backward_through_waist(
        self, batch: Batch, loss_fn: Loss, objective: Objective, parts: list[Tensor]
    ) -> LossOutput:
        waist, step = self._waist(self.model, batch, outputs_of(loss_fn)), batch.to(self.device)
        out, gradients = waist_gradient(
            lambda *values: objective.call(loss_fn, dict(zip(waist, values, strict=True)), step, {}), *waist.values()
        )
        for rows in parts:
            part = self._score(self.model, batch.select(rows, self.device), tuple(waist))
            own = [g[rows.to(self.device)] for g in gradients]
            values = list(part.values())
            own = [g if g.ndim == 1 else g[:, : x.shape[1]] for g, x in zip(own, values, strict=True)]
            torch.autograd.backward(values, own)
        return out

    def _waist(self, model: nn.Module, batch: Batch, outputs: Sequence[str]) -> dict[str, Tensor]:
        waist: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in micro_batches(batch, self.micro_batch_tokens):
                for name, part in self._score(model, batch.select(rows, self.device), outputs).items():
                    shape = batch.ids.shape if part.ndim == 2 else batch.ids.shape[:1]
                    whole = waist.setdefault(name, part.new_zeros(shape))
                    if part.ndim == 2:
                        whole[rows.to(self.device), : part.shape[1]] = part
                    else:
                        whole[rows.to(self.device)] = part
        return waist

    def _objective(self, batch: Batch, loss_fn: Loss) -> Objective:
        check_batch(loss_fn, batch, scalar_model=isinstance(self.model, ScalarModel), critic=self.critic is not None)
        return objective_of(loss_fn)

    def _score(self, model: nn.Module, batch: Batch, outputs: Sequence[str]) -> dict[str, Tensor]:
        with self._autocast():
            return score(model, self.critic, batch, outputs, self.temperature, padding_free=self.padding_free)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _current_sampler(self) -> nn.Module:
        if self.sampling_dtype is None:
            return self.model
        if self._sampler is None:
            self._sampler = frozen_copy(self.model, self.sampling_dtype)
        elif self._sampler_step != self.step:
            with torch.no_grad():
                for ours, theirs in zip(self._sampler.parameters(), self.model.parameters(), strict=True):
                    ours.copy_(theirs)
        self._sampler_step = self.step
        return self._sampler
