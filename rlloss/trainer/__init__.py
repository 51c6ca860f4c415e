"""Training for a person who will not write a loop: `create_rl_trainer`, in the words of AlignTune and TRL."""

from rlloss.trainer.create import create_rl_trainer
from rlloss.trainer.parameters import PARAMETERS, Parameter
from rlloss.trainer.trainer import Trainer

__all__ = ["PARAMETERS", "Parameter", "Trainer", "create_rl_trainer"]
