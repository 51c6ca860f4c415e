"""A run behind four verbs: train, evaluate, predict, save."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlloss._checks import check_count, check_range
from rlloss.loop.advantages import ShapedAdvantages
from rlloss.loop.data import prompts as tokenized_prompts
from rlloss.loop.offline import evaluate_offline, train_offline
from rlloss.loop.online import sampled_scores, train_online
from rlloss.loop.reference_cache import with_ref_logprobs
from rlloss.loop.rewards import Rewards
from rlloss.loop.session import Session
from rlloss.protocol import Loss
from rlloss.trainer.algorithms import WHO, Algorithm
from rlloss.trainer.models import Models
from rlloss.trainer.rows import examples_of, held_out, rows_of
from rlloss.trainer.schedules import optimizer_of, scheduler_of

if TYPE_CHECKING:
    import datasets

__all__ = ["Trainer"]


class Trainer:
    """What `create_rl_trainer` makes: an algorithm over a `Session`, its data and its rewards.

    Its parts are those of the loop, to look at and to take over: `session`, `loss_fn`, `rewards`, `advantages`,
    `examples`; `history` holds the numbers of every step.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        models: Models,
        loss_fn: Loss,
        values: Mapping[str, Any],
        *,
        dataset: Any = None,
        rewards: Rewards | None = None,
        advantages: ShapedAdvantages | None = None,
    ) -> None:
        self.algorithm, self.loss_fn, self.values = algorithm, loss_fn, dict(values)
        self.rewards, self.advantages = rewards, advantages
        self.output_dir = Path(values["output_dir"])
        self.history: list[dict[str, float]] = []
        self.tokenizer = models.tokenizer
        self.examples: Sequence[Any] = []
        self.eval_examples: Sequence[Any] = []
        if dataset is not None:
            rows, eval_rows = self._split(rows_of(dataset, values))
            self.examples = examples_of(algorithm, rows, self.tokenizer, values)
            self.eval_examples = [] if eval_rows is None else self._examples(eval_rows)
        self.steps = self._number_of_steps()
        self.session = self._session(models)
        if values.get("precompute_ref_log_probs") and loss_fn.needs_reference:
            self.examples = with_ref_logprobs(self.session, self.examples)
            self.eval_examples = with_ref_logprobs(self.session, self.eval_examples)
            self.session.reference = None

    def train(self) -> list[dict[str, float]]:
        """Trains, and returns the numbers of every step.

        They stand in `output_dir`/metrics.jsonl too, with checkpoint/ beside it.
        """
        if not self.examples:
            raise ValueError(f"{WHO}: needs data to train on, got none; pass dataset_name=")
        options: dict[str, Any] = {
            "steps": self.steps,
            "seed": self.values["seed"],
            "folder": self.output_dir,
            "evaluate": (lambda _: self._evaluation()) if self.eval_examples and self.values["eval_steps"] else None,
            "evaluate_every": self.values["eval_steps"],
            "save_every": self.values["save_steps"],
            "resume": self.values["resume"],
            "progress": self.values["progress"],
        }
        if self.rewards is None:
            self.history = train_offline(
                self.session, self.examples, self.loss_fn, batch_size=self.examples_per_update, **options
            )
        else:
            assert self.advantages is not None
            self.history = train_online(
                self.session,
                self.examples,
                self.rewards,
                self.loss_fn,
                prompts_per_step=self.examples_per_update,
                group_size=self.group_size,
                max_new_tokens=self.values["max_new_tokens"],
                advantages=self.advantages,
                epochs_per_step=self._epochs_per_step(),
                updates_per_epoch=self._updates_per_epoch(),
                **options,
            )
        return self.history

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Loss and metrics on held-out examples, or mean rewards, in all and by function, of one completion per prompt.

        Args:
            eval_dataset: Anything that `dataset_name` may be; the part that was held out where None.
        """
        if eval_dataset is None:
            return self._evaluation()
        # the row limits are those of training data; the split is the dataset's own where it has but one
        limits = {"percent": None, "max_samples": None, "split": _only_split(eval_dataset, self.values["split"])}
        return self._evaluation(self._examples(rows_of(eval_dataset, self.values | limits)))

    def predict(
        self,
        prompts: Sequence[str | list[dict[str, Any]]] | str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
    ) -> list[str]:
        """One completion of each prompt, a text or messages, at the run's temperature; 0 is greedy."""
        rows = [{"prompt": p} for p in ([prompts] if isinstance(prompts, str) else prompts)]
        asked = tokenized_prompts(rows, self.tokenizer, max_prompt_length=self.values["max_prompt_length"])
        drawn = self.session.sample(
            [p.ids for p in asked],
            max_new_tokens=max_new_tokens or self.values["max_new_tokens"],
            temperature=temperature,
        )
        return self.tokenizer.batch_decode([c.ids for c in drawn], skip_special_tokens=True)

    def save_model(self, output_dir: str | Path | None = None) -> str:
        """Writes model and tokenizer as a transformers folder (a PEFT model its adapters) and returns its path."""
        return str(self.session.save_model(self.output_dir / "model" if output_dir is None else output_dir))

    @property
    def examples_per_update(self) -> int:
        """`batch_size` times `gradient_accumulation_steps`: examples, or prompts of an online algorithm."""
        return self.values["batch_size"] * self.values["gradient_accumulation_steps"]

    @property
    def group_size(self) -> int:
        """Completions per prompt."""
        return self.values.get("group_size") or (1 if self.algorithm.kind == "critic" else 8)

    def _split(self, rows: "datasets.Dataset") -> "tuple[datasets.Dataset, datasets.Dataset | None]":
        source = self.values["eval_dataset"]
        if source is None:
            return held_out(rows, self.values["eval_fraction"], self.values["seed"])
        limits = {"percent": None, "max_samples": None, "split": _only_split(source, self.values["split"])}
        return rows, rows_of(source, self.values | limits)

    def _examples(self, rows: "datasets.Dataset") -> Sequence[Any]:
        return examples_of(self.algorithm, rows, self.tokenizer, self.values)

    def _session(self, models: Models) -> Session:
        values = self.values
        rate = self.algorithm.learning_rate if values["learning_rate"] is None else values["learning_rate"]
        updates = self.steps * (self._epochs_per_step() * self._updates_per_epoch() if self.rewards else 1)
        rows, length = 2 if self.algorithm.kind in ("preference", "reward") else 1, values["max_seq_length"]
        if self.rewards:
            rows, length = self.group_size, self._longest_prompt() + values["max_new_tokens"]
        return Session(
            models.model,
            models.tokenizer,
            reference=models.reference,
            critic=models.critic,
            optimizer=optimizer_of(models.model, models.critic, values, rate),
            scheduler=scheduler_of(values["scheduler"], values["warmup_steps"], updates),
            max_grad_norm=values["max_grad_norm"],
            temperature=values["temperature"],
            micro_batch_tokens=values["batch_size"] * rows * length,
            autocast_dtype=torch.bfloat16 if values["bf16"] else None,
            padding_free=values["padding_free"],
            dropout=values["use_peft"] or values["peft_config"] is not None,
            seed=values["seed"],
        )

    def _longest_prompt(self) -> int:
        return max((len(prompt.ids) for prompt in self.examples), default=0)

    def _number_of_steps(self) -> int:
        values = self.values
        check_count(WHO, "batch_size", values["batch_size"])
        check_count(WHO, "gradient_accumulation_steps", values["gradient_accumulation_steps"])
        check_range(WHO, "num_epochs", values["num_epochs"], 0, open_low=True)
        if values["max_steps"] is not None:
            check_count(WHO, "max_steps", values["max_steps"])
            return values["max_steps"]
        return max(math.ceil(values["num_epochs"] * len(self.examples) / self.examples_per_update), 1)

    def _epochs_per_step(self) -> int:
        return self.values.get("num_ppo_epochs") or (4 if self.algorithm.kind == "critic" else 1)

    def _updates_per_epoch(self) -> int:
        size, completions = self.values.get("mini_batch_size"), self.examples_per_update * self.group_size
        if size is None:
            return 1
        check_count(WHO, "mini_batch_size", size)
        if completions % size:
            raise ValueError(
                f"{WHO}: mini_batch_size={size} must divide the {completions} completions of a step (batch_size x "
                "gradient_accumulation_steps x group_size)"
            )
        return completions // size

    def _evaluation(self, examples: Sequence[Any] | None = None) -> dict[str, float]:
        examples = self.eval_examples if examples is None else examples
        if not examples:
            raise ValueError(
                f"{WHO}: evaluate() has nothing to evaluate on; pass eval_dataset, or eval_fraction and more rows"
            )
        if self.rewards is None:
            return evaluate_offline(self.session, examples, self.loss_fn)
        scores, _ = sampled_scores(
            self.session, examples, self.rewards, self.values["max_new_tokens"], self.values["seed"]
        )
        return {"eval/reward": float(scores.total.mean())} | {f"eval/{k}": mean for k, mean in scores.means.items()}


def _only_split(source: Any, split: str) -> str:
    """The split of a source that has but one."""
    splits = list(source) if type(source).__name__ == "DatasetDict" else []
    return splits[0] if len(splits) == 1 else split
