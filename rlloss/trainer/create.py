"""`create_rl_trainer`: a run from a model's name, a dataset's name and an algorithm's."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlloss.loop.online import check_group_size
from rlloss.trainer.algorithms import WHO, advantages_of, algorithm_named, loss_of
from rlloss.trainer.checks import check_reference
from rlloss.trainer.models import check_models, load_models, loaded_tokenizer
from rlloss.trainer.parameters import parsed
from rlloss.trainer.rewards import reward_functions, rewards_of
from rlloss.trainer.rows import data_of
from rlloss.trainer.trainer import Trainer

__all__ = ["create_rl_trainer"]


def create_rl_trainer(
    model_name: str | Path | nn.Module,
    dataset_name: Any = None,
    algorithm: str = "dpo",
    *,
    tokenizer: Any = None,
    **parameters: Any,
) -> Trainer:
    """A trainer for any loss of the registry, in the words of AlignTune and TRL.

    `algorithm` is sft, dpo, ipo, simpo, kto, reward, ppo, conservative_ppo, rloo, reinforce, grpo, gspo, dapo, drgrpo
    or any other name of `rlloss.list_losses()`. docs/trainer.md lists all parameters, what they reach and their
    defaults; any hyperparameter of the loss itself may stand among them. A parameter that would reach nothing raises.

    Args:
        model_name: Folder, hub name, or a loaded causal LM with its `tokenizer`.
        dataset_name: File, folder, hub name, list of dicts or Dataset: see `rlloss.loop.load_rows`.
        **parameters: See docs/trainer.md.

    The parts of the trainer that comes back, its `session` first, are those of `rlloss.loop`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model, tokenizer = LlamaForCausalLM(LlamaConfig(vocab_size=11, **size)), object()
    >>> create_rl_trainer(model, algorithm="simpo", tokenizer=tokenizer, beta=2.5).loss_fn
    SimPOLoss(beta=2.5, margin=0.5, label_smoothing=0.0)
    """
    chosen = algorithm_named(algorithm, parameters.pop("loss_type", None))
    values, of_loss = parsed(chosen, parameters)
    if values["backend"] != "auto":
        print(f"{WHO}: backend={values['backend']!r} is accepted for compatibility; rlloss trains with its own loop")
    loss_fn, advantages = loss_of(chosen, values, of_loss), advantages_of(chosen, values)
    needs_reference = loss_fn.needs_reference or (advantages is not None and advantages.needs_reference)
    check_reference(values, loss_fn, needed=needs_reference)
    check_models(model_name, values)
    if advantages is not None:
        check_group_size(WHO, values["group_size"], advantages)
        values["reward_functions"] = reward_functions(values)
    tokenizer = loaded_tokenizer(model_name, tokenizer)
    data = data_of(chosen, dataset_name, tokenizer, values)
    torch.manual_seed(values["seed"])
    random.seed(values["seed"])
    models = load_models(chosen, model_name, tokenizer, values, needs_reference)
    rewards = None if advantages is None else rewards_of(values, models)
    return Trainer(chosen, models, loss_fn, values, data, rewards=rewards, advantages=advantages)
