"""TRL's trainers: each is a run of `create_rl_trainer` under the names that TRL's users know."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from rlloss.adapters.trl.configs import (
    Config,
    CPOConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlloss.adapters.trl.models import on_device, one_of, reward_of, scalar_model_of, tokenizer_of
from rlloss.loop.session import Session
from rlloss.trainer import Trainer, create_rl_trainer

__all__ = [
    "CPOTrainer",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "ORPOTrainer",
    "RewardTrainer",
    "Run",
    "SFTTrainer",
]

Model = str | Path | nn.Module


class Run:
    """Base of the trainers: `trainer` is what `create_rl_trainer` made, with its `session`, and `args` the config.

    Args:
        model: A name or folder, or a loaded model, which is itself what trains.
        args: The config, also spelled `config`; without one, its keywords may stand here.
        train_dataset: Rows in any form that `rlloss.loop.load_rows` reads; also spelled `dataset`.
        eval_dataset: What `evaluate()` is about.
        processing_class: The tokenizer, also spelled `tokenizer`; that of the model's own folder where None.
        peft_config: Of peft: its adapters train, and the reference is the model without them.
        parameters: Of `create_rl_trainer`, beside those of the config.
    """

    config_class: ClassVar[type[Config]]

    def __init__(
        self,
        model: Model,
        args: Config | None = None,
        *,
        config: Config | None = None,
        train_dataset: Any = None,
        dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: Any = None,
        parameters: Mapping[str, Any] | None = None,
        **words: Any,
    ) -> None:
        words = {name: x for name, x in words.items() if x is not None}  # such as callbacks=None
        self.args = self._config(one_of("args", args, "config", config), words)
        settings = self.args.parameters()
        has_eval = eval_dataset is not None or settings.get("eval_dataset") is not None or settings["eval_fraction"]
        if not has_eval and settings.pop("eval_steps", None) is not None:
            print(f"{type(self).__name__}: eval_steps is left aside, for want of an eval_dataset")
        given = {"eval_dataset": eval_dataset, "peft_config": peft_config, **(parameters or {})}
        self.trainer: Trainer = create_rl_trainer(
            on_device(model),
            one_of("train_dataset", train_dataset, "dataset", dataset),
            self.args.algorithm,
            tokenizer=tokenizer_of(model, processing_class, tokenizer),
            **settings,
            **{name: x for name, x in given.items() if x is not None},
        )

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> list[dict[str, float]]:
        """Trains, and returns the numbers of every step; they stand in `output_dir`/metrics.jsonl too."""
        return self.trainer.train(resume=resume_from_checkpoint)

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Loss and metrics on held-out rows, or their mean reward."""
        return self.trainer.evaluate(eval_dataset)

    def predict(self, prompts: Sequence[Any] | str, **options: Any) -> list[str]:
        """One completion of each prompt."""
        return self.trainer.predict(prompts, **options)

    def save_model(self, output_dir: str | Path | None = None) -> str:
        """Writes model and tokenizer as a transformers folder, `output_dir` of the config where None."""
        return self.trainer.save_model(self.trainer.output_dir if output_dir is None else output_dir)

    @property
    def session(self) -> Session:
        """Model, optimiser, reference and critic."""
        return self.trainer.session

    @property
    def model(self) -> Any:
        """What trains."""
        return self.session.model

    def _config(self, given: Config | None, words: dict[str, Any]) -> Config:
        who, wanted = type(self).__name__, self.config_class
        if given is None:
            return wanted(**words)
        if not isinstance(given, wanted):
            raise ValueError(f"{who}: args must be a {wanted.__name__}, got {type(given).__name__}")
        if words:
            raise ValueError(f"{who}: {', '.join(words)} beside a config; pass them to {wanted.__name__}")
        return given


class SFTTrainer(Run):
    """Next-token likelihood; rows of prompt and completion (or response), messages, or text."""

    config_class = SFTConfig


class DPOTrainer(Run):
    """DPO, or another preference loss by its `loss_type`; rows of chosen and rejected.

    `ref_model=None` is the model without its adapters, or a frozen copy where it has none.
    """

    config_class = DPOConfig

    def __init__(self, model: Model, ref_model: Model | None = None, args: Config | None = None, **words: Any) -> None:
        super().__init__(model, args, parameters={"reference": on_device(ref_model)}, **words)


class KTOTrainer(DPOTrainer):
    """KTO; rows of prompt, completion and label."""

    config_class = KTOConfig


class ORPOTrainer(Run):
    """ORPO; rows of chosen and rejected."""

    config_class = ORPOConfig


class CPOTrainer(Run):
    """SimPO, and CPO; rows of chosen and rejected."""

    config_class = CPOConfig


class RewardTrainer(Run):
    """A reward model on pairs.

    The model is a sequence classifier with one output, whose own backbone and head are trained, or a causal LM, whose
    backbone gets a new head.
    """

    config_class = RewardConfig

    def __init__(
        self,
        model: Model,
        args: Config | None = None,
        *,
        processing_class: Any = None,
        tokenizer: Any = None,
        peft_config: Any = None,
        **words: Any,
    ) -> None:
        tokenizer = tokenizer_of(model, processing_class, tokenizer)
        scored = scalar_model_of("RewardTrainer", model, tokenizer)
        self._classifier: Any = None if scored is model else model
        if peft_config is not None and self._classifier is not None:
            raise ValueError(
                f"RewardTrainer: peft_config adapts a causal LM here, got a {type(model).__name__}; pass the causal "
                "LM, whose backbone gets adapters and a new head"
            )
        super().__init__(scored, args, tokenizer=tokenizer, peft_config=peft_config, **words)

    def save_model(self, output_dir: str | Path | None = None) -> str:
        """Writes a classifier as transformers reads it, and any other for `rlloss.loop.load_scalar_model`."""
        if self._classifier is None:
            return super().save_model(output_dir)
        folder = self.trainer.output_dir if output_dir is None else Path(output_dir)
        self._classifier.save_pretrained(folder)
        self.trainer.tokenizer.save_pretrained(folder)
        return str(folder)


class GRPOTrainer(Run):
    """GRPO; rows of prompts.

    Args:
        reward_funcs: Functions of prompts, completions (as texts) and columns, named rewards, sequence classifiers,
            or names of such models; one or several.
        reward_processing_classes: The tokenizers of those that are models, in their order; None for their own.
        reward_model: One more of `reward_funcs`.
        ref_model: The frozen model of the KL; with `beta=0` it is only measured against.
    """

    config_class = GRPOConfig

    def __init__(
        self,
        model: Model,
        reward_funcs: Any = None,
        args: Config | None = None,
        *,
        reward_processing_classes: Any = None,
        reward_model: Any = None,
        ref_model: Model | None = None,
        **words: Any,
    ) -> None:
        funcs = [*_listed(reward_funcs), *_listed(reward_model)]
        tokenizers = _listed(reward_processing_classes) or [None] * len(funcs)
        if len(tokenizers) != len(funcs):
            raise ValueError(
                f"GRPOTrainer: reward_processing_classes must hold one entry for each of the {len(funcs)} rewards, "
                f"got {len(tokenizers)}; None for a function"
            )
        rewards = [reward_of(given, its) for given, its in zip(funcs, tokenizers, strict=True)]
        parameters = {"reward_functions": rewards or None, "reference": on_device(ref_model)}
        super().__init__(model, args, parameters=parameters, **words)


def _listed(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
