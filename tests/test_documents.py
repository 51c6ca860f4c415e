"""The documents that users come with: each of their code blocks runs here, or raises and says the way out.

tests/documents holds the blocks as they stand there. A block runs in a namespace of what earlier blocks of its
document define (NEEDS) and of what the document takes for granted (`assumed`). IMPORTS, MODELS and DATA are all that is
replaced in its text; a run that names no number of steps is bounded by two. docs/seeds.md says the same in words.
"""

import ast
import asyncio
import importlib.util
import json
import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import rlloss
import rlloss.adapters.trl.trainers
import rlloss.trainer
from rlloss.adapters.signal import Client
from rlloss.loop import WithoutAdapters, completions, pairs, read_metrics

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft", reason="the documents train adapters")
pytest.importorskip("vaderSentiment", reason="the documents reward sentiment")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning"),
]
ROOT = Path(__file__).parents[1]
GUIDE, PATTERNS, NOTES = "AlignTune: RL training guide", "Patterns guide", "TRL notes"
OVERVIEW, SIGNAL = "AlignTune: RL algorithms overview", "Signal: RL algorithms"


class Block(NamedTuple):
    document: str
    number: int
    heading: str
    language: str
    text: str


def blocks_of(path):
    title, text = path.read_text("utf-8").removeprefix("# ").split("\n", 1)
    for number, *parts in re.findall(r"^## (\d+)\. (.*?)\n\n```(.*?)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(title, int(number), *parts)


BLOCKS = {b[:2]: b for path in sorted((ROOT / "tests" / "documents").glob("*.md")) for b in blocks_of(path)}

IMPORTS = {
    "from aligntune.core.backend_factory import": "from rlloss import",
    "from trl import": "from rlloss.adapters.trl import",
}
MODELS = {
    "meta-llama/Llama-3.2-3B": "llama",
    "meta-llama/Llama-3.2-1B": "llama",
    "meta-llama/Llama-3.1-8B-Instruct": "llama",
    "meta-llama/Llama-3.1-8B": "llama",
    "meta-llama/Llama-3-8b-instruct": "llama",
    "meta-llama/Llama-3-8b": "llama",
    "meta-llama/Llama-2-7b-hf": "llama",
    "unsloth/Llama-3.2-1B-Instruct-bnb-4bit": "llama",
    "Qwen/Qwen3-0.6B": "qwen",
    "Qwen/Qwen2-1.5B-Instruct": "qwen",
    "Qwen/Qwen2-0.5B-Instruct": "qwen",
    "microsoft/DialoGPT-medium": "gpt2",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "qwen_reward",
    "OpenAssistant/reward-model-deberta-v3-large": "deberta_reward",
    "your-reward-model": "llama_reward",
    "./reward_models/my_reward_model": "llama_reward",
}
DATA = {
    "Anthropic/hh-rlhf": "hh-rlhf",
    "HuggingFaceH4/ultrafeedback_binarized": "ultrafeedback",
    "trl-lib/tldr": "tldr",
}
# what stands for `...` in a call, which is no Python
ELLIPSES = {
    (PATTERNS, 7): "tokenizer=tokenizer, train_dataset=labelled_dataset",
    (PATTERNS, 8): "tokenizer=tokenizer, train_dataset=preference_dataset",
    (PATTERNS, 9): "tokenizer=tokenizer, train_dataset=preference_dataset",
}
NEEDS = {
    **dict.fromkeys([(GUIDE, 19), (GUIDE, 20), (GUIDE, 21)], (GUIDE, 1)),
    (GUIDE, 29): (GUIDE, 6),
    (PATTERNS, 6): (PATTERNS, 4),
    (NOTES, 10): (NOTES, 9),
    (NOTES, 11): (NOTES, 9),
}


@dataclass(frozen=True)
class Raises:
    """What a block raises, and the way out that its message names: parameters to add and to leave out, or an edit."""

    error: type[Exception]
    says: str
    adds: Mapping[str, Any] = field(default_factory=dict)
    drops: tuple[str, ...] = ()
    edit: tuple[str, str] = ("", "")

    def but(self, **adds: Any) -> "Raises":
        return Raises(self.error, self.says, {**self.adds, **adds}, self.drops, self.edit)


NO_REWARD = Raises(ValueError, "needs a reward; pass reward_functions=", {"reward_functions": ["length"]})
FAMILIES = Raises(ValueError, "of different families: .* pass reward_on_text=True", {"reward_on_text": True})
SPLIT = Raises(ValueError, "no files of split 'train'; .*train_prefs", {"split": "train_prefs"})
BITS = Raises(ImportError, r'pip install "rlloss\[quantization\]"', drops=("quantization", "reward_model_quantization"))
RAISES = {
    (GUIDE, 2): FAMILIES,
    (GUIDE, 5): FAMILIES,
    (GUIDE, 6): SPLIT,
    (GUIDE, 7): NO_REWARD,
    (GUIDE, 8): NO_REWARD,
    (GUIDE, 10): NO_REWARD,
    (GUIDE, 11): BITS.but(reward_on_text=True),
    (GUIDE, 12): Raises(ValueError, "kl_coef .* leave it out", drops=("kl_coef", "cliprange")),
    (GUIDE, 14): FAMILIES,
    (GUIDE, 15): SPLIT,
    (GUIDE, 16): FAMILIES,
    (GUIDE, 17): BITS.but(reward_functions=["length"]),
    (GUIDE, 18): NO_REWARD,
    (GUIDE, 23): BITS.but(reward_functions=["length"]),
    (GUIDE, 24): Raises(
        ValueError, "add use_peft=True", {"use_peft": True, "reward_functions": ["length"]}, ("quantization",)
    ),
    (GUIDE, 26): NO_REWARD,
    (GUIDE, 29): SPLIT,
    **{(OVERVIEW, number): NO_REWARD for number in range(3, 8)},
    (PATTERNS, 9): Raises(ValueError, r"pass cpo_alpha=0\.0", edit=("cpo_alpha=1.0", "cpo_alpha=0.0")),
}
NOT_RUN = {(NOTES, 1): "no code"}
BATCH_FORMATS = {(SIGNAL, 2): 1, (SIGNAL, 6): 5, (SIGNAL, 8): 7, (SIGNAL, 11): 10, (SIGNAL, 16): 15}
FORMULAS = {(NOTES, 4), (NOTES, 5), (NOTES, 6), *((SIGNAL, number) for number in (3, 4, 9, 12, 14))}
ROWS = {key for key, block in BLOCKS.items() if block.language == "json"}
CODE = [key for key in BLOCKS if key not in {*NOT_RUN, *BATCH_FORMATS, *FORMULAS, *ROWS}]


def tokenizer_of(family):
    """One token per letter; families number the letters differently, and Llama's begins a text with a BOS."""
    shift = ("llama", "qwen", "gpt2", "deberta").index(family) * 7
    letters = [*string.ascii_letters, *string.digits, *" .,:;?!'-_/()\n"]
    special = ["<s>", "</s>", "<unk>", "<turn>", "[CLS]", "[SEP]", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters[shift:], *letters[:shift]])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family == "llama":
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if family == "deberta":
        pair = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B [SEP]"}
        raw.post_processor = processors.TemplateProcessing(special_tokens=[("[CLS]", 4), ("[SEP]", 5)], **pair)
        marks |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "<pad>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=["<turn>"], **marks)
    made.chat_template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    return made


def model_of(kind, family):
    size = {"vocab_size": len(tokenizer_of(family)), "pad_token_id": 6, "bos_token_id": 0, "eos_token_id": 1}
    if kind.startswith("GPT2"):
        size |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 2048}
    else:
        size |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        size |= {"max_position_embeddings": 4096}
    if kind.startswith(("Llama", "Qwen3")):
        size |= {"num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(len(kind))
    cls = getattr(transformers, kind)
    return cls(cls.config_class(num_labels=1, **size))


QUESTIONS = ["How do I bake bread?", "What is rain?", "Who wrote it?", "Why is it so?", "Can you sing?", "Is it far?"]
HH = [
    {side: f"\n\nHuman: {q}\n\nAssistant: {answer}" for side, answer in (("chosen", good), ("rejected", bad))}
    for q in QUESTIONS
    for good, bad in (("Gladly. Take flour, and time.", "No."), ("Let me explain.", "Go away, will you?"))
]
TLDR = [{"prompt": f"TITLE: {q}\n\nPOST: I ask again.\n\nTL;DR:", "completion": f" {q}"} for q in QUESTIONS * 2]
PAIRS = [{"prompt": q, "chosen": "Gladly. It is thus.", "rejected": "No."} for q in QUESTIONS * 2]
LABELLED = [{"prompt": q, "completion": a, "label": a != "No."} for q in QUESTIONS for a in ("Gladly.", "No.")]


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ULTRAFEEDBACK = [
    {"prompt": row["prompt"], "prompt_id": str(i), "score_chosen": 8.0, "score_rejected": 3.0}
    | {side: chat(row["prompt"], row[side]) for side in ("chosen", "rejected")}
    | {"messages": chat(row["prompt"], row["chosen"])}
    for i, row in enumerate(PAIRS)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What stands for the names of models and datasets."""
    root = tmp_path_factory.mktemp("hub")
    policies = {"llama": "LlamaForCausalLM", "qwen": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel"}
    scorers = {"llama": "Llama", "qwen": "Qwen3", "deberta": "DebertaV2"}
    kinds = policies | {f"{family}_reward": f"{kind}ForSequenceClassification" for family, kind in scorers.items()}
    for name, kind in kinds.items():
        family = name.removesuffix("_reward")
        model_of(kind, family).save_pretrained(root / name)
        tokenizer_of(family).save_pretrained(root / name)
    files = {
        "hh-rlhf": {"train": HH, "test": HH[:4]},
        "ultrafeedback": {"train_prefs": ULTRAFEEDBACK, "test_prefs": ULTRAFEEDBACK[:4], "train_sft": ULTRAFEEDBACK},
        "tldr": {"train": TLDR, "validation": TLDR[:4]},
    }
    for name, splits in files.items():
        (root / name).mkdir()
        for split, rows in splits.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{split}.jsonl").write_text(text, "utf-8")
    return {name: str(root / name) for name in (*kinds, *files)}


class Outcome(NamedTuple):
    names: dict[str, Any]
    error: Exception | None
    folder: Path  # where it ran


class Documents:
    """Runs blocks on demand, each once as it stands and once by the way out that its error names."""

    def __init__(self, folders, monkeypatch, root):
        self.folders, self.monkeypatch, self.root = folders, monkeypatch, root
        self._outcomes: dict[Any, Outcome] = {}

    def outcome(self, key, *, way_out=False):
        if (key, way_out) not in self._outcomes:
            names = assumed(key, self.folders)
            if key in NEEDS:
                names |= self.outcome(NEEDS[key]).names
            self._outcomes[key, way_out] = self._run(key, names, RAISES[key] if way_out else None)
        return self._outcomes[key, way_out]

    def final(self, key):
        """The block's outcome, by its way out where it needs one."""
        return self.outcome(key, way_out=key in RAISES)

    def _run(self, key, names, detour):
        folder = self.root / f"{len(self._outcomes)}"
        folder.mkdir()
        self.monkeypatch.chdir(folder)
        text = self.replaced(key)
        if detour is not None:
            text = text.replace(*detour.edit)
        for module in (rlloss.trainer, rlloss.adapters.trl.trainers):
            self.monkeypatch.setattr(module, "create_rl_trainer", bounded(detour))
        names["create_rl_trainer"] = rlloss.trainer.create_rl_trainer
        code = compile(text, f"{key[0]}, {key[1]}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        try:
            waiting = eval(code, names)
            if asyncio.iscoroutine(waiting):
                asyncio.run(waiting)
        except Exception as error:
            return Outcome(names, error, folder)
        return Outcome(names, None, folder)

    def replaced(self, key):
        text = BLOCKS[key].text
        for theirs, ours in IMPORTS.items():
            text = text.replace(theirs, ours)
        # the document's other family, in the place of a reward model
        text = text.replace('reward_model_name="meta-llama/Llama-2', 'reward_model_name="your-reward-model" # Llama-2')
        for name, ours in (MODELS | DATA).items():
            text = text.replace(f'"{name}"', f'"{self.folders[ours]}"')
        return text.replace("...", ELLIPSES[key]) if key in ELLIPSES else text


create_rl_trainer = rlloss.trainer.create_rl_trainer


def bounded(detour):
    def bounded_create_rl_trainer(*arguments, **parameters):
        parameters = {"max_steps": 2, "progress": False} | parameters
        if detour is not None:
            parameters = {name: x for name, x in parameters.items() if name not in detour.drops} | dict(detour.adds)
        return create_rl_trainer(*arguments, **parameters)

    return bounded_create_rl_trainer


@pytest.fixture(scope="module")
def documents(folders, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield Documents(folders, monkeypatch, tmp_path_factory.mktemp("runs"))


def assumed(key, folders):
    """What a document takes for granted."""
    document, number = key
    names: dict[str, Any] = {"torch": torch}
    if document == GUIDE:
        names["training_texts"] = ["A clear and helpful answer.", "I am not sure.", "Concise, and right."]
    if document == PATTERNS:
        names["preference_dataset"] = datasets.Dataset.from_list(PAIRS)
        names["labelled_dataset"] = datasets.Dataset.from_list(LABELLED)
        names["model"] = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"])
        names["tokenizer"] = transformers.AutoTokenizer.from_pretrained(folders["llama"])
        names["dataloader"] = [{"prompt": QUESTIONS[:4]}, {"prompt": QUESTIONS[2:]}]
        names["reward_model"] = SimpleNamespace(score=lambda query, response: response.count("e") - len(query) / 100)
    if document == SIGNAL:
        client = Client()
        policy = client.create_run(folders["llama"], learning_rate=1e-3)
        names["reward_run_id"] = client.create_run(folders["llama"], reward_model=True, learning_rate=1e-3)
        run_id = names["reward_run_id"] if number == 15 else policy
        names |= {"client": client, "training_client": client.get_training_client(run_id), **BATCHES}
        names |= {"sft_data": [TEXT] * 2, "preference_data": [PAIR] * 2, "rl_data": [BATCHES["ppo_batch"]] * 2}
    return names


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_ids(*shape, seed=0):
    return torch.randint(7, 60, shape, generator=torch.Generator().manual_seed(seed))


REAL = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
REWARDS = numbers(3, 6, seed=1) * (REAL * torch.tensor([0, 1, 1, 1, 1, 1]))  # of tokens that were chosen
TEXT = {"input_ids": token_ids(3, 6), "attention_mask": REAL}
PAIR = {f"{side}_{name}": x for side in ("chosen", "rejected") for name, x in TEXT.items()}
PAIR["rejected_input_ids"] = token_ids(3, 6, seed=1)
BATCHES = {
    "ppo_batch": {
        **TEXT,
        "old_log_probs": numbers(3, 6) - 4,
        "rewards": REWARDS,
        "values": numbers(3, 6, seed=2),
        "old_values": numbers(3, 6, seed=3),
    },
    "dpo_batch": PAIR,
    "rm_batch": PAIR,
    "grpo_batch": {
        "prompt_ids": token_ids(2, 3),
        "response_ids": token_ids(2, 4, 5, seed=1),
        "rewards": numbers(2, 4),
        "response_masks": torch.ones(2, 4, 5),
    },
    "is_batch": {**TEXT, "behavior_log_probs": torch.tensor([-20.0, -8.0, -12.0]), "rewards": numbers(3)},
    "cppo_batch": {**TEXT, "old_log_probs": numbers(3, 6) - 4, "rewards": REWARDS},
}


def test_the_folder_holds_every_block():
    count = {title: sum(key[0] == title for key in BLOCKS) for title in (GUIDE, PATTERNS, NOTES, OVERVIEW, SIGNAL)}
    assert count == {GUIDE: 29, PATTERNS: 9, NOTES: 11, OVERVIEW: 7, SIGNAL: 17}
    assert len(BLOCKS) == sum(count.values())


def named(key):
    return f"{key[0]}, {key[1]}"


@pytest.mark.parametrize("key", CODE, ids=named)
def test_a_block_runs_or_says_the_way_out(key, documents):
    outcome = documents.outcome(key)
    if key not in RAISES:
        if outcome.error is not None:
            raise outcome.error
    else:
        expected = RAISES[key]
        if expected.error is ImportError and importlib.util.find_spec("bitsandbytes"):
            pytest.skip("4 bits are installed here, and their block would run")
        assert type(outcome.error) is expected.error, repr(outcome.error)
        assert re.search(expected.says, str(outcome.error), re.DOTALL), str(outcome.error)
        outcome = documents.outcome(key, way_out=True)
        if outcome.error is not None:
            raise outcome.error
    if ".train()" in BLOCKS[key].text:
        history = history_of(outcome.names.get("trainer") or outcome.names["ppo_trainer"])
        assert all(math.isfinite(step["loss"]) for step in history)
        assert any(step["grad_norm"] > 0 for step in history)


def history_of(trainer):
    return getattr(trainer, "trainer", trainer).history


def test_the_guides_dpo_is_dpo(documents):
    trainer = documents.final((GUIDE, 3)).names["trainer"]
    assert repr(trainer.loss_fn) == repr(rlloss.DPOLoss(beta=0.1))
    first = trainer.history[0]
    assert (first["margin"], first["learning_rate"]) == (0, 5e-5)  # at the reference
    assert len(trainer.examples) + len(trainer.eval_examples) == len(HH)
    assert trainer.session.reference is not None


def test_the_guides_ppo_is_ppo_with_its_numbers(documents):
    trainer = documents.final((GUIDE, 5)).names["trainer"]
    loss_fn, advantages = trainer.loss_fn, trainer.advantages
    assert (loss_fn.policy.clip_eps_low, loss_fn.policy.clip_eps_high, loss_fn.value_coef) == (0.2, 0.2, 0.1)
    assert (advantages.gamma, advantages.gae_lambda, float(advantages.kl_controller.kl_coef)) == (1.0, 0.95, 0.1)
    assert trainer.rewards.functions[0].tokenizer.get_vocab() == tokenizer_of("qwen").get_vocab()
    assert (trainer.history[0]["sequence_kl"], trainer.history[0]["ref_kl"] >= 0) == (0, True)


@pytest.mark.parametrize("number", [6, 15, 29])
def test_the_guides_reward_model_is_trained_and_pays(documents, number):
    outcome = documents.final((GUIDE, number))
    assert [reward.__name__ for reward in outcome.names["trainer"].rewards.functions] == ["reward_model"]
    saved = {path.name for path in (outcome.folder / "reward_models" / "custom").iterdir()}
    assert saved >= {"scalar_head.safetensors", "config.json"}


def test_the_guides_configurations_reach_what_they_name(documents):
    trainer = documents.final((GUIDE, 11)).names["trainer"]
    lora = trainer.session.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.05)
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.session.model.modules())
    trainer = documents.final((GUIDE, 12)).names["trainer"]
    assert (trainer.examples_per_update, trainer.session.temperature, trainer.steps) == (16, 0.7, 1)
    assert {group["weight_decay"] for group in trainer.session.optimizer.param_groups} == {0.0, 0.01}
    trainer = documents.final((GUIDE, 13)).names["trainer"]
    assert len(trainer.examples) + len(trainer.eval_examples) == math.ceil(0.1 * len(HH))
    trainer = documents.final((GUIDE, 17)).names["trainer"]
    assert trainer.session.model.peft_config["default"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_guides_evaluation_predicts_and_saves(documents):
    for number in (19, 20, 28):
        metrics = documents.final((GUIDE, number)).names["metrics"]
        assert math.isfinite(metrics["eval/loss"])
        assert 0 <= metrics["eval/accuracy"] <= 1
    assert all(isinstance(text, str) for text in documents.final((GUIDE, 21)).names["results"])
    assert len(documents.final((GUIDE, 21)).names["results"]) == 2
    outcome = documents.final((GUIDE, 28))
    folder = outcome.folder / outcome.names["model_path"]
    trained = outcome.names["trainer"].session.model.state_dict()
    for name, saved in transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(saved, trained[name])


def test_the_overviews_rewards_are_all_that_is_missing(documents):
    kinds = {3: rlloss.GRPOLoss, 4: rlloss.GSPOLoss, 5: rlloss.DAPOLoss, 6: rlloss.DrGRPOLoss, 7: rlloss.DrGRPOLoss}
    for number, loss in kinds.items():
        assert type(documents.final((OVERVIEW, number)).names["trainer"].loss_fn) is loss


def test_the_patterns_rows_are_read(documents, folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    build = documents.final((PATTERNS, 2)).names["build_preference_dataset"]
    rows = build(["Why?", "Who?"], ["So.", "Me."], ["No.", "You."], ["a", "b"])
    assert rows["chosen"] == ["So.", "You."]
    for row in (*rows, documents.final((PATTERNS, 1)).names["preference_example"]):
        [pair] = pairs([row], tokenizer)
        assert tokenizer.decode(pair.rejected.input_ids, skip_special_tokens=True) == row["prompt"] + row["rejected"]
    chats = documents.final((PATTERNS, 3)).names["preference_example_chat"]
    [pair] = pairs([chats], tokenizer)
    answer = [token for token, counts in zip(pair.chosen.input_ids, pair.chosen.loss_mask, strict=True) if counts]
    assert tokenizer.decode(answer, skip_special_tokens=True) == chats["chosen"][1]["content"]


def test_the_patterns_reward_model_is_the_classifier_itself(documents, folders, tmp_path):
    names = documents.final((PATTERNS, 4)).names
    trainer, model = names["trainer"], names["model"]
    assert trainer.model.backbone is model.model
    assert trainer.model.head is model.score
    kind = transformers.AutoModelForSequenceClassification
    assert not torch.equal(model.score.weight, model_of("LlamaForSequenceClassification", "llama").score.weight)
    saved = kind.from_pretrained(trainer.save_model(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(saved.score.weight, model.score.weight)


def test_the_patterns_dpo_honours_its_adapters(documents, folders):
    names = documents.final((PATTERNS, 5)).names
    session, trainer = names["trainer"].session, names["trainer"].trainer
    lora = session.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.05)
    assert isinstance(session.reference, WithoutAdapters)
    base = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16).state_dict()
    for name, x in session.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(x, base[name.replace("base_layer.", "")])
    assert any(x.any() for name, x in session.model.state_dict().items() if "lora_B" in name)
    limits = {name: trainer.values[name] for name in ("max_seq_length", "max_prompt_length", "bf16")}
    assert limits == {"max_seq_length": 1024, "max_prompt_length": 512, "bf16": True}
    assert trainer.examples_per_update == 16


def test_the_patterns_ppo_loop_steps(documents):
    names = documents.final((PATTERNS, 6)).names
    ppo_trainer, stats = names["ppo_trainer"], names["stats"]
    session, advantages = ppo_trainer.session, ppo_trainer.trainer.advantages
    assert session.model is names["model"].pretrained_model
    assert session.critic is names["model"].critic
    assert session.reference is names["ref_model"].pretrained_model
    assert (advantages.kl, float(advantages.kl_controller.target_kl)) == ("k1", 6.0)
    assert stats["kl_coef"] == pytest.approx(0.2, rel=0.01)
    assert stats["sequence_kl"] != 0  # the second step's policy is no longer the reference
    assert stats["explained_variance"] <= 1
    assert session.step == 2 * 4  # two batches of four answers, four passes, each one mini-batch
    logged = read_metrics(documents.final((PATTERNS, 6)).folder / ppo_trainer.args.output_dir)
    assert [line["step"] for line in logged] == [0, 1]
    assert logged[-1]["reward"] == pytest.approx(float(sum(names["rewards"]) / 4))


def test_the_patterns_other_losses_are_theirs(documents):
    kto = documents.final((PATTERNS, 7)).names["trainer"].trainer
    assert repr(kto.loss_fn) == repr(rlloss.KTOLoss(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0))
    simpo = documents.final((PATTERNS, 9)).names["trainer"].trainer
    assert repr(simpo.loss_fn) == repr(rlloss.SimPOLoss(beta=0.1, margin=0.5))


def test_the_notes_ppo_scores_text_by_the_reward_models_own_tokenizer(documents):
    trainer = documents.final((NOTES, 8)).names["ppo_trainer"].trainer
    [reward] = trainer.rewards.functions
    assert type(reward.model).__name__ == "DebertaV2ForSequenceClassification"
    assert reward.tokenizer.cls_token == "[CLS]"
    assert trainer.examples_per_update == 16
    assert {group["initial_lr"] for group in trainer.session.optimizer.param_groups} == {1.41e-5}


def test_the_notes_grpo_is_trls(documents):
    trainer = documents.final((NOTES, 9)).names["trainer"].trainer
    assert repr(trainer.loss_fn) == repr(rlloss.DAPOLoss(clip_eps_low=0.2, clip_eps_high=0.2))
    assert (trainer.group_size, trainer.examples_per_update, trainer.steps) == (4, 1, 2)
    assert (trainer.values["max_new_tokens"], trainer.values["max_prompt_length"]) == (1024, 512)
    assert trainer.session.reference is None
    assert trainer.history[0]["reward"] < 0


def test_the_notes_grpo_with_a_reference_measures_against_it(documents):
    trainer = documents.final((NOTES, 10)).names["trainer"].trainer
    assert trainer.loss_fn.kl_coef == 0
    assert trainer.history[0]["ref_kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.history[1]["ref_kl"] > 0


def test_the_notes_dpo_takes_beta_beside_the_model(documents):
    trainer = documents.final((NOTES, 11)).names["trainer"]
    assert repr(trainer.trainer.loss_fn) == repr(rlloss.DPOLoss(beta=0.1))
    assert trainer.session.model is documents.final((NOTES, 11)).names["model"]


def test_signals_blocks_train(documents):
    for number in (1, 5, 7, 10, 13, 15):
        assert math.isfinite(documents.final((SIGNAL, number)).names["result"]["loss"])
    names = documents.final((SIGNAL, 17)).names
    assert names["training_client"].session.step == 4
    assert names["reward_client"].session.step == 2


@pytest.mark.parametrize(("key", "usage"), BATCH_FORMATS.items(), ids=map(named, BATCH_FORMATS))
def test_signals_batches_have_the_form_that_it_prints(key, usage):
    (name,) = re.findall(r"batch_data=(\w+)", BLOCKS[SIGNAL, usage].text)
    lines = [line for line in BLOCKS[key].text.splitlines() if '": ' in line]
    printed = dict(re.findall(r'"(\w+)": \[(.*?)\]', "\n".join(lines)))
    optional = {field for field in printed for line in lines if f'"{field}"' in line and "optional" in line}
    assert set(printed) - optional <= set(BATCHES[name]) <= set(printed)
    for field_, value in BATCHES[name].items():
        assert value.ndim == len(printed[field_].split(",")), field_


@pytest.mark.parametrize("key", sorted(ROWS), ids=named)
def test_rows_of_the_documents_are_read(key, folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["llama"])
    row = json.loads(re.sub(r"\s# .*", "", BLOCKS[key].text))  # the notes comment their JSON
    if "chosen" not in row:
        [tokens] = completions([row], tokenizer)
        assert tokenizer.decode(tokens.input_ids, skip_special_tokens=True) == "".join(row.values()).replace("#", "")
        return
    [pair] = pairs([row], tokenizer)
    assert tokenizer.decode(pair.chosen.input_ids, skip_special_tokens=True) == row["prompt"] + row["chosen"]


def dpo_formula():
    theta, ref = numbers(2, 5).double(), numbers(2, 5, seed=1).double()
    chosen, rejected = (theta - ref).unbind()
    theirs = -torch.log(torch.sigmoid(0.1 * (chosen - rejected)))
    return theirs.mean(), rlloss.DPOLoss(beta=0.1)(*theta, *ref).loss


def gae_formula():
    rewards, values = numbers(1, 5).double(), numbers(1, 5, seed=1).double()
    after = torch.cat([values[:, 1:], torch.zeros(1, 1)], 1)
    delta = rewards + 0.99 * after - values
    theirs = [sum((0.99 * 0.95) ** k * float(delta[0, t + k]) for k in range(5 - t)) for t in range(5)]
    ours, _ = rlloss.gae(rewards, values, torch.ones(1, 5, dtype=torch.bool), 0.99, 0.95)
    return torch.tensor([theirs], dtype=torch.float64), ours


def importance_formula():
    """Its gradient, which is that of -E[w A]; the value is that of a score function."""
    policy, behaviour, advantages = (numbers(3, 4, seed=seed).double() for seed in range(3))
    gradients = []
    for loss in (
        lambda x: -((x - behaviour).sum(1).exp() * advantages[:, 0]).mean(),
        lambda x: (
            rlloss.ImportanceSamplingLoss(ratio_max=math.inf)(
                x, behaviour, advantages[:, 0], torch.ones(3, 4, dtype=torch.bool)
            ).loss
        ),
    ):
        x = policy.clone().requires_grad_()
        loss(x).backward()
        gradients.append(x.grad)
    return gradients


def penalty_formula():
    policy, reference = numbers(3, 4).double(), numbers(3, 4, seed=1).double()
    mask = torch.ones(3, 4, dtype=torch.bool)
    loss_fn = rlloss.ConservativePPOLoss(conservative_coef=0.1, max_kl=0.01)
    _, metrics = loss_fn(policy, policy, torch.zeros(3).double(), mask, ref_logprobs=reference)
    kl = rlloss.kl_k3(policy, reference).mean()
    return 0.1 * (kl - 0.01).clamp(min=0) ** 2, metrics["kl_penalty"].value


def preference_formula():
    chosen, rejected = numbers(2, 5).double().unbind()
    theirs = -torch.log(torch.sigmoid((chosen - rejected) / 0.1))
    return theirs.mean(), rlloss.BradleyTerryLoss(temperature=0.1)(chosen, rejected).loss


FORMULAS_HERE: dict[Any, Callable[[], Any]] = {
    **dict.fromkeys([(NOTES, 4), (NOTES, 5), (NOTES, 6), (SIGNAL, 4)], dpo_formula),
    (SIGNAL, 3): gae_formula,
    (SIGNAL, 9): importance_formula,
    (SIGNAL, 12): penalty_formula,
    (SIGNAL, 14): preference_formula,
}


@pytest.mark.parametrize("key", sorted(FORMULAS), ids=named)
def test_a_formula_of_the_documents_is_the_librarys(key):
    theirs, ours = FORMULAS_HERE[key]()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


SEEDS = (ROOT / "docs" / "seeds.md").read_text("utf-8")


def test_the_page_lists_every_block_with_what_it_does_here():
    listed = {}
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", SEEDS, re.MULTILINE | re.DOTALL):
        for number, heading, word, rest in re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (.*)\|$", body, re.MULTILINE):
            listed[title, int(number)] = (heading, word)
            assert rest.strip() or word != "raises", "what raises has a reason and a way out"
    words = {**dict.fromkeys(CODE, "runs"), **dict.fromkeys(RAISES, "raises"), **dict.fromkeys(ROWS, "rows")}
    words |= {**dict.fromkeys(BATCH_FORMATS, "batch"), **dict.fromkeys(FORMULAS, "formula"), **NOT_RUN}
    assert listed == {key: (block.heading, words[key]) for key, block in BLOCKS.items()}
