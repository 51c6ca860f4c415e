"""A session: one policy with its optimiser, reference and sampler, behind four verbs."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlloss._checks import check_count, check_range
from rlloss.logprobs import TokenStats
from rlloss.loop.batch import Batch, micro_batches
from rlloss.loop.checkpoint import read_checkpoint, write_checkpoint
from rlloss.loop.objective import Objective, objective_of
from rlloss.loop.sampling import Completion, sample
from rlloss.loop.state import optimizer_tensors, restore_model, restore_optimizer, restore_rng, rng_tensors
from rlloss.models import model_logprobs
from rlloss.output import LossOutput, Metric, merge_metrics, waist_gradient
from rlloss.protocol import Loss

__all__ = ["Session", "frozen_copy"]


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that takes no gradient: the usual reference, or a sampler in half precision.

    >>> frozen_copy(nn.Linear(2, 2)).weight.requires_grad
    False
    """
    return copy.deepcopy(model).to(dtype=dtype).requires_grad_(False).eval()


class Session:
    """One policy under training: `sample`, `forward_backward`, `optim_step`, `save_state` and `load_state`.

    The policy stays in eval mode: dropout would make the ratio differ from 1 at the first update for no reason.

    Args:
        model: Any Hugging Face causal LM; parameters with `requires_grad=False` stay frozen.
        tokenizer: Its tokenizer: end-of-sequence, padding, and text for reward functions.
        reference: The frozen model of KL terms and preference losses: `frozen_copy(model)`, or None.
        learning_rate: Of AdamW with betas (0.9, 0.95) and no weight decay, where `optimizer` is None.
        optimizer: An optimiser of your own over the model's parameters.
        scheduler: A function that makes a learning-rate scheduler of the optimiser; stepped by `optim_step`.
        max_grad_norm: Gradient-norm clip.
        temperature: Divides the logits, when sampling and when scoring alike.
        micro_batch_tokens: Padded tokens per forward pass.
        sample_rows: Completions that are decoded at once.
        autocast_dtype: Runs forward passes under autocast, over the model's own master weights.
        sampling_dtype: Samples from a copy in this dtype, refreshed after every step.
        seed: Of the sampler's generator.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        reference: nn.Module | None = None,
        learning_rate: float = 1e-6,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        micro_batch_tokens: int = 16384,
        sample_rows: int = 512,
        autocast_dtype: torch.dtype | None = None,
        sampling_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        for name, number in {"max_grad_norm": max_grad_norm, "temperature": temperature}.items():
            check_range("Session", name, number, 0, open_low=True)
        check_count("Session", "micro_batch_tokens", micro_batch_tokens)
        check_count("Session", "sample_rows", sample_rows)
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("Session: no parameter of the model requires a gradient; unfreeze what should train")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.reference = None if reference is None else reference.eval()
        if optimizer is None:
            check_range("Session", "learning_rate", learning_rate, 0)
            optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.optimizer = optimizer
        self.scheduler = None if scheduler is None else scheduler(optimizer)
        self.max_grad_norm, self.temperature = max_grad_norm, temperature
        self.micro_batch_tokens, self.sample_rows = micro_batch_tokens, sample_rows
        self.autocast_dtype, self.sampling_dtype = autocast_dtype, sampling_dtype
        self.device = next(model.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.step = 0
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
        return sample(
            self._current_sampler(),
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=self.temperature if temperature is None else temperature,
            eos_token_id=self.tokenizer.eos_token_id,
            generator=generator or self.generator,
            max_rows=self.sample_rows,
        )

    def logprobs(self, batch: Batch, *, reference: bool = False) -> Tensor:
        """Log-probs `[B, T]` of a batch under the policy, or under the reference, without gradient."""
        model = self.reference if reference else self.model
        if model is None:
            raise ValueError("Session: needs a reference, got None; pass Session(..., reference=frozen_copy(model))")
        return self._waist(model, batch, ("logprobs",))["logprobs"].cpu()

    def forward(self, batch: Batch, loss_fn: Loss) -> tuple[float, dict[str, Metric]]:
        """The loss of a batch and its metrics, without gradient."""
        objective = self._objective(batch, loss_fn)
        waist = self._waist(self.model, batch, objective.outputs)
        with torch.no_grad():
            out = objective.call(loss_fn, TokenStats(**waist), batch.to(self.device), {})
        return float(out.loss), out.metrics

    def forward_backward(self, batch: Batch, loss_fn: Loss) -> tuple[float, dict[str, Metric]]:
        """Adds the gradient of a whole step's loss; micro-batches, however cut, do not change it.

        Returns the step's loss and its metrics.
        """
        objective = self._objective(batch, loss_fn)
        parts = micro_batches(batch, self.micro_batch_tokens)
        if loss_fn.exactness == "sum" or len(parts) == 1:
            outputs = self._backward_in_parts(batch, loss_fn, objective, parts)
        else:
            outputs = [self._backward_through_waist(batch, loss_fn, objective, parts)]
        loss = torch.stack([out.loss.detach() for out in outputs]).sum()
        return float(loss), merge_metrics(out.metrics for out in outputs)

    def optim_step(self) -> dict[str, float]:
        """Clips the gradient, updates the policy and clears the gradient."""
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = float(nn.utils.clip_grad_norm_(trainable, self.max_grad_norm))
        if not grad_norm < float("inf"):
            raise FloatingPointError(
                f"Session: the gradient norm of update {self.step} is {grad_norm}; nothing was updated"
            )
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        return {"grad_norm": grad_norm, "learning_rate": float(learning_rate)}

    def save_state(self, folder: str | Path, info: dict[str, Any] | None = None) -> Path:
        """Writes everything that a resumed run needs, atomically: safetensors and JSON, no pickle."""
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        optimizer, optimizer_info = optimizer_tensors(self.optimizer)
        rng, rng_info = rng_tensors()
        tensors |= {f"optimizer.{name}": x for name, x in optimizer.items()}
        tensors |= {f"rng.{name}": x for name, x in rng.items()}
        tensors["generator"] = self.generator.get_state()
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        state = {"step": self.step, "optimizer": optimizer_info, "rng": rng_info, "scheduler": scheduler}
        return write_checkpoint(folder, tensors, {"session": state, "info": info or {}})

    def load_state(self, folder: str | Path) -> dict[str, Any]:
        """Restores what `save_state` wrote, bit for bit, and returns its `info`."""
        tensors, saved = read_checkpoint(folder)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

        state = saved["session"]
        restore_model(self.model, part("model."))
        restore_optimizer(self.optimizer, part("optimizer."), state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        restore_rng(part("rng."), state["rng"])
        self.generator.set_state(tensors["generator"])
        self.step, self._sampler_step = state["step"], -1
        return saved["info"]

    def save_model(self, folder: str | Path) -> Path:
        """Writes policy and tokenizer as an ordinary transformers folder, with safetensors weights."""
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
            out = objective.call(loss_fn, self._score(self.model, part, objective.outputs), part, keywords)
            out.loss.backward()
            outputs.append(LossOutput(out.loss.detach(), out.metrics))
        return outputs

    def _backward_through_waist(
        self, batch: Batch, loss_fn: Loss, objective: Objective, parts: list[Tensor]
    ) -> LossOutput:
        waist, step = self._waist(self.model, batch, objective.outputs), batch.to(self.device)
        out, gradients = waist_gradient(
            lambda *values: objective.call(loss_fn, TokenStats(**dict(zip(waist, values, strict=True))), step, {}),
            *waist.values(),
        )
        for rows in parts:
            stats = self._score(self.model, batch.select(rows, self.device), objective.outputs)
            values = [getattr(stats, name) for name in waist]
            width = values[0].shape[1]
            torch.autograd.backward(values, [g[rows.to(self.device), :width] for g in gradients])
        return out

    def _waist(self, model: nn.Module, batch: Batch, outputs: Sequence[str]) -> dict[str, Tensor]:
        waist: dict[str, Tensor] = {}
        with torch.no_grad():
            for rows in micro_batches(batch, self.micro_batch_tokens):
                stats = self._score(model, batch.select(rows, self.device), outputs)
                for name in outputs:
                    part = getattr(stats, name)
                    whole = waist.setdefault(name, part.new_zeros(batch.ids.shape))
                    whole[rows.to(self.device), : part.shape[1]] = part
        return waist

    def _objective(self, batch: Batch, loss_fn: Loss) -> Objective:
        objective = objective_of(loss_fn)
        if loss_fn.needs_reference and "ref_logprobs" not in batch.fields:
            raise ValueError(
                f"{type(loss_fn).__name__}: needs the reference's log-probs; set "
                "batch.fields['ref_logprobs'] = session.logprobs(batch, reference=True)"
            )
        if batch.rows_per_example != objective.rows_per_example:
            raise ValueError(
                f"{type(loss_fn).__name__}: its family trains {objective.rows_per_example} rows per example, got a "
                f"batch with {batch.rows_per_example}"
            )
        return objective

    def _score(self, model: nn.Module, batch: Batch, outputs: Sequence[str]) -> TokenStats:
        with self._autocast():
            return model_logprobs(
                model,
                batch.input_ids,
                batch.ids,
                batch.loss_mask,
                attention_mask=batch.attention_mask,
                temperature=self.temperature,
                outputs=outputs,
            )

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
