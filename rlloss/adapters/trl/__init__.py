"""TRL's trainers and configs, in TRL's words and with its defaults, over `create_rl_trainer` and `Session`.

    from rlloss.adapters.trl import DPOConfig, DPOTrainer
    DPOTrainer(model=model, args=DPOConfig(beta=0.1), tokenizer=tokenizer, train_dataset=rows).train()

docs/seeds.md lists the defaults, the keywords that reach nothing here, and what differs from TRL.
"""

from rlloss.adapters.trl.configs import (
    CPOConfig,
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    ORPOConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
)
from rlloss.adapters.trl.models import AutoModelForCausalLMWithValueHead
from rlloss.adapters.trl.ppo import PPOTrainer
from rlloss.adapters.trl.trainers import (
    CPOTrainer,
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    ORPOTrainer,
    RewardTrainer,
    SFTTrainer,
)

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "CPOConfig",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "KTOConfig",
    "KTOTrainer",
    "ORPOConfig",
    "ORPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
]
