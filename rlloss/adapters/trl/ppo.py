"""TRL's PPOTrainer in both of its forms: a loop of `generate` and `step`, or a dataset, a reward model and `train`."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlloss.adapters.trl.configs import Config, PPOConfig
from rlloss.adapters.trl.models import AutoModelForCausalLMWithValueHead, on_device, one_of, reward_of, tokenizer_of
from rlloss.adapters.trl.queries import columns_of, prompt_rows, query_row
from rlloss.adapters.trl.trainers import Model, Run
from rlloss.loop.batch import collate
from rlloss.loop.data import Tokens
from rlloss.loop.encoding import answered
from rlloss.loop.online import optimise
from rlloss.loop.report import RunLog
from rlloss.loop.run import generator_of
from rlloss.loop.sampling import stop_tokens

__all__ = ["PPOTrainer"]

_PLAIN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "top_k": (0, None),
    "top_p": (1, None),
    "min_length": (-1, 0, None),
}


class PPOTrainer(Run):
    """PPO with a critic, its KL in the reward.

        responses = ppo_trainer.generate(queries, max_new_tokens=256)
        stats = ppo_trainer.step(queries, responses, scores)
        ppo_trainer.log_stats(stats, batch, scores)

    or, with `dataset` and `reward_model`, `ppo_trainer.train()`.

    Args:
        model: With a value head (`AutoModelForCausalLMWithValueHead`), which is the critic; or a name or a causal LM,
            whose critic is a model of its own.
        ref_model: The frozen model of the KL; a frozen copy where None.
        dataset: Rows of prompts, or of queries as TRL's older loops have them (`query` texts, `input_ids`), for `train`
            and for `dataloader`.
        reward_model: A sequence classifier, its name, or a reward function, for `train`.
        data_collator: Makes a batch of `dataloader` from a list of rows; else it is a dict of lists.
    """

    config_class = PPOConfig

    def __init__(
        self,
        config: Config | None = None,
        model: Model | AutoModelForCausalLMWithValueHead | None = None,
        ref_model: Model | AutoModelForCausalLMWithValueHead | None = None,
        tokenizer: Any = None,
        dataset: Any = None,
        *,
        args: Config | None = None,
        processing_class: Any = None,
        reward_model: Any = None,
        data_collator: Callable[[list[dict[str, Any]]], Any] | None = None,
        **words: Any,
    ) -> None:
        if model is None:
            raise ValueError("PPOTrainer: needs a model, got None; pass model=")
        policy, reference = (_language_model(on_device(given)) for given in (model, ref_model))
        parameters = {
            "critic": model.critic if isinstance(model, AutoModelForCausalLMWithValueHead) else None,
            "reference": reference,
            "reward_functions": [_no_reward if reward_model is None else reward_of(reward_model)],
        }
        tokenizer = tokenizer_of(policy, processing_class, tokenizer)
        rows = one_of("dataset", dataset, "train_dataset", words.pop("train_dataset", None))
        super().__init__(
            policy,
            one_of("args", args, "config", config),
            dataset=prompt_rows(rows, tokenizer),
            tokenizer=tokenizer,
            parameters=parameters,
            **words,
        )
        self._check_schedule()
        self._collator = columns_of if data_collator is None else data_collator
        assert self.trainer.advantages is not None  # PPO has them
        self._advantages = self.trainer.advantages
        self.session.track(loss=self.trainer.loss_fn, advantages=self._advantages)
        self._steps = 0
        self._log: RunLog | None = None
        self._of_batches = torch.Generator().manual_seed(self.trainer.values["seed"])

    @property
    def dataloader(self) -> DataLoader[dict[str, Any]]:
        """The dataset in batches of `batch_size`, in a new order whenever it is gone through; `input_ids` are tensors.

        for batch in ppo_trainer.dataloader:
            responses = ppo_trainer.generate(batch["input_ids"])
        """
        size, examples = self.trainer.examples_per_update, self.trainer.examples
        if len(examples) < size:
            raise ValueError(f"PPOTrainer.dataloader: needs batch_size={size} rows at least, got {len(examples)}")
        rows: Any = [query_row(prompt) for prompt in examples]
        return DataLoader(
            rows, size, shuffle=True, drop_last=True, collate_fn=self._collator, generator=self._of_batches
        )

    def generate(
        self, query_tensor: Tensor | Sequence[Tensor], *, max_new_tokens: int | None = None, **options: Any
    ) -> Any:
        """One response per query, without the query: a list of tensors of tokens, or a tensor for a single query.

        Args:
            query_tensor: Tokens of one query, a list of such, or a rectangle that the tokenizer has padded.
            max_new_tokens: Where a response is cut; the config's where None.
            **options: Of TRL's loops; what would sample from another distribution than PPO scores raises.
        """
        self._check_sampling(options)
        single = isinstance(query_tensor, Tensor) and query_tensor.ndim == 1
        queries = self._token_lists(query_tensor)
        limit = self.trainer.values["max_new_tokens"] if max_new_tokens is None else max_new_tokens
        drawn = self.session.sample(queries, max_new_tokens=limit)
        responses = [torch.tensor(completion.ids) for completion in drawn]
        return responses[0] if single else responses

    def step(
        self, queries: Tensor | Sequence[Tensor], responses: Tensor | Sequence[Tensor], scores: Sequence[Tensor | float]
    ) -> dict[str, float]:
        """One step of PPO on responses of the policy, one score each; returns its numbers.

        A rectangle of responses is cut to what was drawn: each row ends with its first end of sequence.
        """
        asked = self._token_lists(queries)
        if not len(asked) == len(responses) == len(scores):
            raise ValueError(
                f"PPOTrainer.step: needs a response and a score for each query, got {len(asked)} queries, "
                f"{len(responses)} responses and {len(scores)} scores"
            )
        session, trainer = self.session, self.trainer
        answers = self._answers(responses)
        batch = collate([_sequence(q, a) for q, a in zip(asked, answers, strict=True)])
        in_memory = trainer.values["batch_size"] * batch.ids.shape[1]  # mini_batch_size answers of this length
        session.micro_batch_tokens = max(session.micro_batch_tokens, in_memory)
        batch.fields["rewards"] = torch.tensor([float(score) for score in scores])
        batch.fields["old_logprobs"] = session.logprobs(batch)
        if session.reference is not None:
            batch.fields["ref_logprobs"] = session.logprobs(batch, reference=True)
        numbers = {"reward": float(batch.fields["rewards"].mean())} | self._advantages(session, batch)
        updates = max(len(asked) // trainer.values["mini_batch_size"], 1)
        generator = generator_of(trainer.values["seed"], self._steps)
        numbers |= optimise(session, batch, trainer.loss_fn, trainer.values["num_ppo_epochs"], updates, generator)
        self._steps += 1
        return numbers

    def log_stats(self, stats: dict[str, float], batch: Any, rewards: Sequence[Tensor | float]) -> None:
        """Writes the numbers of the last step, and the mean of the rewards, to metrics.jsonl in `output_dir`."""
        if self._log is None:  # what an earlier run left from this step on goes
            self._log = RunLog(self.trainer.output_dir, progress=False, resume_from=max(self._steps - 1, 0))
            weakref.finalize(self, self._log.close)
        mean = sum(float(reward) for reward in rewards) / len(rewards)
        self._log.log(max(self._steps - 1, 0), stats | {"reward": mean})

    def _check_sampling(self, options: dict[str, Any]) -> None:
        session = self.session
        plain = _PLAIN_SAMPLING | {
            "temperature": (session.temperature,),
            "return_prompt": (False,),
            "pad_token_id": (session.tokenizer.pad_token_id,),
            "eos_token_id": (session.tokenizer.eos_token_id, stop_tokens(session.model, session.tokenizer)),
        }
        for name, value in options.items():
            if name not in plain or value not in plain[name]:
                raise ValueError(
                    f"PPOTrainer.generate: {name}={value!r}, but responses are drawn as PPO scores them: from the "
                    "whole distribution, at PPOConfig(temperature=...), without their query; leave it out"
                )

    def _check_schedule(self) -> None:
        values = self.trainer.values
        if values["scheduler"] != "constant" and values["max_steps"] is None and not self.trainer.examples:
            raise ValueError(
                f"PPOTrainer: the scheduler {values['scheduler']!r} falls to 0 over a number of steps that nothing "
                "says; pass max_steps or a dataset, or take the scheduler 'constant', the default"
            )

    def _answers(self, responses: Tensor | Sequence[Tensor]) -> list[list[int]]:
        """Tokens of each response; of a padded rectangle up to its end of sequence, or without its padding."""
        rows = [torch.as_tensor(response).tolist() for response in responses]
        if not isinstance(responses, Tensor):
            return rows
        stops = set(stop_tokens(self.session.model, self.session.tokenizer))
        pad = self.session.tokenizer.pad_token_id
        made = []
        for row in rows:
            kept = [i for i, token in enumerate(row) if token in stops or token != pad]
            row = row[kept[0] : kept[-1] + 1] if kept else []
            end = next((i for i, token in enumerate(row) if token in stops), len(row))
            if end == 0 and set(row) - stops - {pad}:
                raise ValueError(
                    "PPOTrainer.step: a row of the responses begins with the end of sequence and goes on, as one that "
                    "is padded on the left does; pass a list of tensors without padding"
                )
            made.append(row[: end + 1])
        return made

    def _token_lists(self, queries: Tensor | Sequence[Tensor]) -> list[list[int]]:
        """Tokens of each query; of a padded rectangle without the padding on the tokenizer's side."""
        if not isinstance(queries, Tensor):
            return [torch.as_tensor(query).tolist() for query in queries]
        if queries.ndim == 1:
            return [queries.tolist()]
        tokenizer = self.session.tokenizer
        pad, is_left = tokenizer.pad_token_id, tokenizer.padding_side == "left"
        if pad in tokenizer("")["input_ids"]:
            raise ValueError(
                f"PPOTrainer: the padding token {pad} is also what the tokenizer puts around every text, so that the "
                "padding of a rectangle of queries cannot be told; pass a list of tensors"
            )
        made = []
        for row in queries.tolist():
            kept = [i for i, token in enumerate(row) if token != pad]
            made.append((row[kept[0] :] if is_left else row[: kept[-1] + 1]) if kept else [])
        return made


def _sequence(query: list[int], response: list[int]) -> Tokens:
    if not query or not response:
        raise ValueError(
            f"PPOTrainer.step: a query of {len(query)} and a response of {len(response)} tokens; both need one at least"
        )
    return Tokens(*answered(query, response))


def _language_model(model: Any) -> Any:
    return model.pretrained_model if isinstance(model, AutoModelForCausalLMWithValueHead) else model


def _no_reward(completions: Sequence[str]) -> list[float]:
    raise ValueError(
        "PPOTrainer: train() needs a reward; pass reward_model=, or score the responses of generate() yourself and "
        "pass the scores to step()"
    )
