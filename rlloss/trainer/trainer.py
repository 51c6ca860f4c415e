"""A run behind four verbs: train, evaluate, predict, save."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlloss.loop.advantages import ShapedAdvantages
from rlloss.loop.data import Tokens
from rlloss.loop.data import prompts as tokenized_prompts
from rlloss.loop.modes import adapter_modules
from rlloss.loop.offline import evaluate_offline, train_offline
from rlloss.loop.online import sampled_scores, train_online
from rlloss.loop.peft import WithoutAdapters
from rlloss.loop.reference_cache import with_ref_logprobs
from rlloss.loop.rewards import Rewards
from rlloss.loop.session import Session
from rlloss.protocol import Loss
from rlloss.trainer.algorithms import WHO, Algorithm
from rlloss.trainer.checks import resumes
from rlloss.trainer.models import Models
from rlloss.trainer.rows import Data, eval_examples_of
from rlloss.trainer.schedules import optimizer_of, scheduler_of

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
        data: Data,
        *,
        rewards: Rewards | None = None,
        advantages: ShapedAdvantages | None = None,
    ) -> None:
        self.algorithm, self.loss_fn, self.values = algorithm, loss_fn, dict(values)
        self.rewards, self.advantages = rewards, advantages
        self.output_dir = Path(values["output_dir"])
        self.history: list[dict[str, float]] = []
        self.tokenizer = models.tokenizer
        self.examples, self.eval_examples, self._columns = data
        self.steps = self._number_of_steps()
        self.session = self._session(models)
        self._of_predictions = torch.Generator(self.session.device).manual_seed(values["seed"])
        self._has_begun = False
        if values.get("precompute_ref_log_probs"):
            self.examples = with_ref_logprobs(self.session, self.examples)
            self.eval_examples = with_ref_logprobs(self.session, self.eval_examples)
            if not isinstance(self.session.reference, WithoutAdapters):  # which takes no memory
                self.session.reference = None

    def train(self, *, resume: bool | str | Path | None = None) -> list[dict[str, float]]:
        """Trains, and returns the numbers of every step.

        They stand in `output_dir`/metrics.jsonl too, with checkpoint/ beside it.

        Args:
            resume: In place of the parameter of that name.
        """
        if not self.examples:
            raise ValueError(f"{WHO}: needs data to train on, got none; pass dataset_name=")
        options = self._options(resumes(self.values["resume"] if resume is None else resume, self.output_dir))
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
                epochs_per_step=self.values["num_ppo_epochs"],
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
        if self.loss_fn.needs_reference and self.session.reference is None:
            raise ValueError(
                f"{WHO}: evaluate() on other rows needs the reference, which precompute_ref_log_probs=True has set "
                "free; pass these rows as eval_dataset when the trainer is made, or leave that parameter out"
            )
        source = eval_examples_of(self.algorithm, eval_dataset, self.tokenizer, self.values, self._columns)
        return self._evaluation(source)

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
            max_new_tokens=self.values["max_new_tokens"] if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            generator=self._of_predictions,  # so that a look at the model changes no training
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
        return self.values.get("group_size", 1)

    def _options(self, resume: bool) -> dict[str, Any]:
        """Of the loop's run, which is this trainer's only one."""
        if self.history or (self._has_begun and self.session.step and not resume):
            raise ValueError(
                f"{WHO}: this trainer has trained already, {self.session.step} updates of a schedule of {self.steps} "
                "steps that is over; go on with a new trainer on the folder that save_model() wrote, or with one of "
                "more max_steps, the same output_dir and resume=True"
            )
        self._has_begun = True
        return {
            "steps": self.steps,
            "seed": self.values["seed"],
            "folder": self.output_dir,
            "evaluate": (lambda _: self._evaluation()) if self.eval_examples and self.values["eval_steps"] else None,
            "evaluate_every": self.values["eval_steps"],
            "save_every": self.values["save_steps"],
            "resume": resume,
            "progress": self.values["progress"],
        }

    def _session(self, models: Models) -> Session:
        values = self.values
        updates = self.steps * (values["num_ppo_epochs"] * self._updates_per_epoch() if self.rewards else 1)
        ratio = values["warmup_ratio"]
        warmup = values["warmup_steps"] if ratio is None else math.ceil(ratio * updates)
        half = torch.bfloat16 if values["bf16"] else None
        # a model that no one samples from in training is not copied for it, nor one that is small already
        is_whole = values["quantization"] is None and next(models.model.parameters()).dtype.itemsize > 2
        return Session(
            models.model,
            models.tokenizer,
            reference=models.reference,
            critic=models.critic,
            optimizer=optimizer_of(models.model, models.critic, values),
            scheduler=scheduler_of(values["scheduler"], warmup, updates),
            max_grad_norm=values["max_grad_norm"],
            temperature=values["temperature"],
            micro_batch_tokens=values["batch_size"] * self._tokens_per_example(),
            autocast_dtype=half,
            sampling_dtype=half if self.rewards and is_whole else None,
            padding_free=values["padding_free"],
            dropout=bool(adapter_modules(models.model.modules())),
            seed=values["seed"],
        )

    def _tokens_per_example(self) -> int:
        """What an example, or a prompt with its completions, takes at most."""
        if self.rewards:
            longest = max((len(prompt.ids) for prompt in self.examples), default=0)
            return self.group_size * (longest + self.values["max_new_tokens"])
        most = self.values["max_seq_length"]
        if most is None:
            parts = (part for example in self.examples for part in (example, *vars(example).values()))
            most = max((len(part.input_ids) for part in parts if isinstance(part, Tokens)), default=1)
        return most * (2 if self.algorithm.kind in ("preference", "reward") else 1)

    def _number_of_steps(self) -> int:
        if self.values["max_steps"] is not None:
            return self.values["max_steps"]
        return max(math.ceil(self.values["num_epochs"] * len(self.examples) / self.examples_per_update), 1)

    def _updates_per_epoch(self) -> int:
        size = self.values["mini_batch_size"]
        return 1 if size is None else self.examples_per_update * self.group_size // size

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
