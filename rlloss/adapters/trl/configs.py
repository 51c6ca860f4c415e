"""TRL's configs: its keywords and its defaults, handed on as the parameters of `create_rl_trainer`."""

from typing import Any, ClassVar

from rlloss._checks import check_choice, check_count, nearest
from rlloss.adapters.trl.words import ELSEWHERE, checked_elsewhere
from rlloss.trainer.algorithms import advantages_of, algorithm_named, loss_of
from rlloss.trainer.parameters import PARAMETERS, parsed

__all__ = [
    "CPOConfig",
    "Config",
    "DPOConfig",
    "GRPOConfig",
    "KTOConfig",
    "ORPOConfig",
    "PPOConfig",
    "RewardConfig",
    "SFTConfig",
]

_TIMES = "gradient_accumulation_steps"
_OF_TRL = {"gradient_checkpointing": "use_gradient_checkpointing"}
_OURS = {spelling: p.name for p in PARAMETERS for spelling in (p.name, *p.also)} | _OF_TRL
_OF_ALL = {
    "output_dir": "trainer_output",
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "seed": 42,
    "eval_fraction": 0.0,  # TRL holds nothing out
}


class Config:
    """Base of the configs: keywords become attributes, and `parameters` those of `create_rl_trainer`.

    A keyword is one of TRL's, any parameter of the algorithm (docs/trainer.md), or a hyperparameter of its loss. An
    unknown one raises; one that has no place here prints a line, or raises where that would change the result.
    """

    name: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    spellings: ClassVar[dict[str, str]] = {}  # of TRL, beside those that create_rl_trainer knows

    def __init__(self, **words: Any) -> None:
        who, given = type(self).__name__, dict[str, str]()
        for word in words:
            other = given.setdefault(self._ours(word), word)
            if other != word:
                raise ValueError(f"{who}: {other} and {word} are one parameter; give one")
        defaults = _OF_ALL | self.defaults
        settings = {self._ours(word): (word, value) for word, value in (*defaults.items(), *words.items())}
        vars(self).update(settings.values())
        self._check_known()
        kept = {*map(self._ours, defaults), *ELSEWHERE}
        for word in [word for word, x in words.items() if x is None and self._ours(word) not in kept]:
            delattr(self, word)  # TRL's own default of many words
        self._given = frozenset(given)
        for line in checked_elsewhere(who, {word: x for word, x in words.items() if word in ELSEWHERE}):
            print(line)
        algorithm = algorithm_named(self.algorithm)
        values, of_loss = parsed(algorithm, self.parameters())
        loss_of(algorithm, values, of_loss)
        advantages_of(algorithm, values)

    @property
    def algorithm(self) -> str:
        """The loss's name in the registry."""
        return algorithm_named(self.name, vars(self).get("loss_type")).name

    def parameters(self) -> dict[str, Any]:
        """What `create_rl_trainer` is given beside the algorithm."""
        aside = {*ELSEWHERE, "loss_type"}
        ours = {self._ours(word): value for word, value in self._words().items() if word not in aside}
        strategies = {vars(self).get(word) for word in ("eval_strategy", "evaluation_strategy")}
        if "no" in strategies:
            ours.pop("eval_steps", None)
        elif "steps" in strategies and ours.get("eval_steps") is None:
            raise ValueError(f"{type(self).__name__}: eval_strategy='steps' needs eval_steps; TRL takes logging_steps")
        return ours

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{word}={value!r}' for word, value in self._words().items())})"

    def _words(self) -> dict[str, Any]:
        return {word: value for word, value in vars(self).items() if not word.startswith("_")}

    def _ours(self, word: str) -> str:
        return self.spellings.get(word) or _OURS.get(word, word)

    def _check_known(self) -> None:
        algorithm = algorithm_named(self.algorithm)
        own = {spelling for p in PARAMETERS if algorithm.kind in p.kinds for spelling in (p.name, *p.also)}
        known = {*own, *_OF_TRL, *self.spellings, *self.defaults, *algorithm.hyperparameters, *ELSEWHERE}
        for word in self._words():
            if word not in known and word not in _OURS:
                raise ValueError(
                    f"{type(self).__name__}: unknown keyword {word!r}{nearest(word, known)}; docs/trainer.md lists "
                    f"the parameters of {algorithm.name!r}"
                )


class SFTConfig(Config):
    """Of `SFTTrainer`.

    >>> SFTConfig(save_step=10)
    Traceback (most recent call last):
    ValueError: SFTConfig: unknown keyword 'save_step'; did you mean 'save_steps' or 'save_strategy' or 'max_steps'?; \
docs/trainer.md lists the parameters of 'sft'
    """

    name = "sft"
    defaults: ClassVar = {"learning_rate": 2e-5, "max_length": 1024, "dataset_text_field": "text"}

    def parameters(self) -> dict[str, Any]:
        """With the column that holds the text."""
        ours = super().parameters()
        text = ours.pop("dataset_text_field")
        if text != "text":
            ours["column_mapping"] = {**(ours.get("column_mapping") or {}), "text": text}
        return ours


class DPOConfig(Config):
    """Of `DPOTrainer`; `loss_type` names a preference loss, of which `sigmoid` is DPO."""

    name = "dpo"
    defaults: ClassVar = {"learning_rate": 1e-6, "beta": 0.1, "max_length": 1024, "loss_type": "sigmoid"}

    def parameters(self) -> dict[str, Any]:
        """With IPO's margin as a mean per token, which is TRL's reading of it."""
        means = {"length_normalized": True} if self.algorithm == "ipo" else {}
        return means | super().parameters()


class RewardConfig(Config):
    """Of `RewardTrainer`."""

    name = "bradley_terry"
    defaults: ClassVar = {"learning_rate": 1e-4, "max_length": 1024}
    spellings: ClassVar = {"center_rewards_coefficient": "center_coef"}


class KTOConfig(Config):
    """Of `KTOTrainer`."""

    name = "kto"
    defaults: ClassVar = {"learning_rate": 1e-6, "beta": 0.1, "max_length": 1024}


class ORPOConfig(Config):
    """Of `ORPOTrainer`; `beta` weighs the odds ratio's term."""

    name = "orpo"
    defaults: ClassVar = {"learning_rate": 1e-6, "beta": 0.1, "max_length": 1024}


class CPOConfig(Config):
    """Of `CPOTrainer`, with `cpo_alpha=0.0`; with `loss_type="simpo"` it is SimPO, whose margin is `simpo_gamma`.

    TRL's beta of 0.1 stays the default, twenty times weaker than SimPO's paper has it.
    """

    name = "cpo"
    defaults: ClassVar = {
        "learning_rate": 1e-6,
        "beta": 0.1,
        "max_length": 1024,
        "loss_type": "sigmoid",
        "cpo_alpha": 1.0,
        "simpo_gamma": 0.5,
    }

    @property
    def algorithm(self) -> str:
        """`simpo`, or `cpo` itself."""
        return algorithm_named("simpo" if vars(self)["loss_type"] == "simpo" else self.name).name

    def parameters(self) -> dict[str, Any]:
        """With a weight of the NLL term, which must be 0."""
        ours = super().parameters()
        weight = ours.pop("cpo_alpha")
        if weight:
            raise ValueError(
                f"CPOConfig: cpo_alpha={weight!r} (its default is 1.0) adds the mean NLL of chosen answers' tokens, "
                "in a loop of your own rlloss.combine(preference=..., nll=cpo_alpha * SFTLoss()(...)); "
                "pass cpo_alpha=0.0, which with loss_type='simpo' is SimPO as its paper has it, or "
                "create_rl_trainer(algorithm='cpo') for the paper's CPO, with the NLL of whole answers"
            )
        if self.algorithm != "simpo":
            del ours["simpo_gamma"]
            ours["nll_coef"] = weight
        return ours


class GRPOConfig(Config):
    """Of `GRPOTrainer`; TRL's batch sizes count completions, those of `create_rl_trainer` prompts."""

    name = "grpo"
    defaults: ClassVar = {
        "learning_rate": 1e-6,
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": None,
        "num_generations": 8,
        "max_completion_length": 512,
    }
    spellings: ClassVar = {"epsilon": "clip_eps_low", "epsilon_high": "clip_eps_high"}

    def parameters(self) -> dict[str, Any]:
        """With prompts per update, both sides of the clip, and what scales rewards."""
        check_choice("GRPOConfig", "loss_type", vars(self)["loss_type"], ("grpo", "dr_grpo", "dapo"))
        ours = super().parameters()
        if ours["clip_eps_high"] is None:
            ours["clip_eps_high"] = ours["clip_eps_low"]
        if isinstance(ours.get("scale_rewards"), bool):
            ours["scale_rewards"] = "group" if ours["scale_rewards"] else "none"
        group, rows, times = ours["group_size"], ours["batch_size"], ours.get("gradient_accumulation_steps", 1)
        for name, number in {"num_generations": group, "per_device_train_batch_size": rows}.items():
            check_count("GRPOConfig", name, number)
        if rows * times % group:
            raise ValueError(
                f"GRPOConfig: per_device_train_batch_size={rows} x gradient_accumulation_steps={times} completions "
                f"are no whole number of groups of num_generations={group}; make them a multiple of it"
            )
        fits = rows % group == 0
        ours |= {"batch_size": rows // group if fits else 1}
        ours |= {"gradient_accumulation_steps": times if fits else rows * times // group}
        return ours


class PPOConfig(Config):
    """Of `PPOTrainer`: a step takes `batch_size` answers, an update `mini_batch_size` of them."""

    name = "ppo"
    defaults: ClassVar = {
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "scheduler": "constant",
        "batch_size": 128,
        "mini_batch_size": None,
        "ppo_epochs": 4,
        "init_kl_coef": 0.2,
        "target_kl": 6.0,
        "kl_penalty": "kl",
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "seed": 0,
    }

    def parameters(self) -> dict[str, Any]:
        """With the answers that are in memory at once."""
        ours = super().parameters()
        if ours.get("kl_coef") is not None or ours.get("beta") is not None:
            for word in ("init_kl_coef", "target_kl"):  # a default controller makes room for a fixed weight
                if word not in self._given and ours[word] == self.defaults[word]:
                    del ours[word]
        batch, part, times = (ours.pop(name, 1) for name in ("batch_size", "mini_batch_size", _TIMES))
        part = batch if part is None else part
        counts = {"batch_size": batch, "mini_batch_size": part, _TIMES: times, "ppo_epochs": ours["num_ppo_epochs"]}
        for name, number in counts.items():
            check_count("PPOConfig", name, number)
        if batch % (part * times):
            raise ValueError(
                f"PPOConfig: batch_size={batch} must be a multiple of mini_batch_size={part} x "
                f"gradient_accumulation_steps={times}"
            )
        return ours | {
            "batch_size": part,
            "gradient_accumulation_steps": batch // part,
            "mini_batch_size": part * times,
        }
