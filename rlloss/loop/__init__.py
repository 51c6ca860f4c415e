"""The minimal rollout-and-optimise loop; the only place that imports transformers, datasets and safetensors."""

from rlloss.loop.advantages import CriticAdvantages, GroupAdvantages, ShapedAdvantages
from rlloss.loop.batch import Batch, collate, micro_batches
from rlloss.loop.curves import plot_curves
from rlloss.loop.data import Pair, Prompt, Tokens, completions, pairs, prompts
from rlloss.loop.frozen import frozen_copy
from rlloss.loop.labelled import Labelled, labelled
from rlloss.loop.offline import evaluate_offline, offline_batch, train_offline
from rlloss.loop.online import evaluate_online, rollout, train_online
from rlloss.loop.peft import WithoutAdapters
from rlloss.loop.preferences import dialogue_rows, preference_rows, without_ties
from rlloss.loop.reference_cache import with_ref_logprobs
from rlloss.loop.reference_mix import ReferenceMix
from rlloss.loop.report import RunLog, before_after_table, read_metrics
from rlloss.loop.rewards import Rewards
from rlloss.loop.rows import load_rows
from rlloss.loop.run import run_steps
from rlloss.loop.sampling import Completion, sample
from rlloss.loop.scalar_folder import load_scalar_model, save_scalar_model
from rlloss.loop.session import Session

__all__ = [
    "Batch",
    "Completion",
    "CriticAdvantages",
    "GroupAdvantages",
    "Labelled",
    "Pair",
    "Prompt",
    "ReferenceMix",
    "Rewards",
    "RunLog",
    "Session",
    "ShapedAdvantages",
    "Tokens",
    "WithoutAdapters",
    "before_after_table",
    "collate",
    "completions",
    "dialogue_rows",
    "evaluate_offline",
    "evaluate_online",
    "frozen_copy",
    "labelled",
    "load_rows",
    "load_scalar_model",
    "micro_batches",
    "offline_batch",
    "pairs",
    "plot_curves",
    "preference_rows",
    "prompts",
    "read_metrics",
    "rollout",
    "run_steps",
    "sample",
    "save_scalar_model",
    "train_offline",
    "train_online",
    "with_ref_logprobs",
    "without_ties",
]
