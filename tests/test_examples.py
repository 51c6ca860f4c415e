"""The examples run as a person runs them, cut short: every part of their output is there."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


def run(monkeypatch, script, *arguments):
    monkeypatch.syspath_prepend(EXAMPLES)  # as python does for a script
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def assert_run_folder(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]) >= {"step", "loss", "reward", "accuracy", "ref_kl", "entropy", "clip_frac", "grad_norm"}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "checkpoint").glob("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(folder / "model")
    return lines


def test_grpo_addition(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "grpo_addition.py", "--steps", 2, "--warm-start", 0, "--folder", tmp_path)
    lines = assert_run_folder(tmp_path)
    assert [line["step"] for line in lines] == [0, 1]
    printed = capsys.readouterr().out
    assert "held-out accuracy" in printed
    assert len([line for line in printed.splitlines() if line.strip()[2:3] == "+"]) == 6


def test_ppo_with_critic(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "ppo_with_critic.py", "--steps", 2, "--warm-start", 0, "--folder", tmp_path)
    lines = assert_run_folder(tmp_path)
    assert set(lines[-1]) >= {"explained_variance_before", "sequence_kl", "kl_coef", "critic_grad_norm"}
    assert "held-out accuracy" in capsys.readouterr().out


def writes_a_one(prompts, completions, answer, completion_ids):
    return [float(3 in ids) for ids in completion_ids]


def test_packed_grpo(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    addition = importlib.import_module("addition")
    # an untrained model never gets a sum right, and all alike would teach nothing
    monkeypatch.setattr(addition, "exact_match", writes_a_one)
    run(monkeypatch, "packed_grpo.py", "--steps", 2, "--warm-start", 0)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("first step:")]
    tokens, slots, packed, padded, difference = (float(x) for x in re.findall(r"[+-]?\d[\d.]*(?:e-?\d+)?", line))
    assert packed == pytest.approx(padded, abs=1e-5)
    assert difference < 1e-4
    assert tokens < slots
    assert "step 2: reward" in printed


@pytest.fixture
def chat_model(tmp_path):
    symbols = ["<pad>", "<eos>", "<s>", "</s>", *"0123456789+?= ", *"Whatis"]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(dict.fromkeys(symbols))}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    chat = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<s>", "</s>"],
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "chat")
    chat.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_smollm2_addition_takes_a_local_folder(monkeypatch, tmp_path, capsys, chat_model):
    run(monkeypatch, "smollm2_addition.py", "--model", chat_model, "--steps", 2, "--folder", tmp_path / "run")
    assert_run_folder(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "What is" in printed
    assert "held-out accuracy" in printed
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (chat_model, tmp_path / "run" / "model")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(".layers.1." in name or name == "model.norm.weight" for name in moved), moved


PAIRS = [{"prompt": f"{i} + {i}?", "chosen": f"What is {2 * i}", "rejected": f"What is {i}"} for i in range(10, 30)]
THUMBS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}], "label": up}
    for row in PAIRS
    for side, up in (("chosen", True), ("rejected", False))
]


def assert_offline_run(folder, printed, names):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {f"eval/{name}" for name in names} <= set(lines[-1])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "model").glob("*.safetensors"))
    assert "held out" in printed
    for name in names:
        assert f"\n{name} " in printed


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo"])
def test_dpo(monkeypatch, tmp_path, capsys, chat_model, loss):
    data, folder = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    options = ("--model", chat_model, "--data", data, "--loss", loss, "--steps", 2, "--batch-size", 4)
    run(monkeypatch, "dpo.py", *options, "--folder", folder)
    assert_offline_run(folder, capsys.readouterr().out, ("accuracy", "margin", "loss"))
    AutoModelForCausalLM.from_pretrained(folder / "model")


def test_kto(monkeypatch, tmp_path, capsys, chat_model):
    data, folder = written(tmp_path / "thumbs.jsonl", THUMBS), tmp_path / "run"
    run(monkeypatch, "kto.py", "--model", chat_model, "--data", data, "--steps", 2, "--folder", folder)
    assert_offline_run(folder, capsys.readouterr().out, ("loss", "accuracy", "desirable_reward", "kl"))
    AutoModelForCausalLM.from_pretrained(folder / "model")


def test_reward_model(monkeypatch, tmp_path, capsys, chat_model):
    data, folder = written(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "run"
    run(monkeypatch, "reward_model.py", "--model", chat_model, "--data", data, "--steps", 2, "--folder", folder)
    printed = capsys.readouterr().out
    assert_offline_run(folder, printed, ("accuracy", "margin", "loss"))
    assert "  chosen: " in printed


WORDS = ["once", "upon", "a", "time", "there", "was", "dog", "cat", "good", "bad", "happy", "sad", "love", "hate"]


@pytest.fixture
def story_model(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(["<pad>", "<eos>", *WORDS])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "s")
    fast.save_pretrained(tmp_path / "s")
    return tmp_path / "s"


def test_rlhf(monkeypatch, tmp_path, capsys, story_model):
    pytest.importorskip("vaderSentiment")
    stories = [{"text": " ".join(WORDS[(i * j + j) % 14] for j in range(20))} for i in range(96)]
    data, steps = written(tmp_path / "stories.jsonl", stories), ("--sft-steps", 2, "--reward-steps", 2)
    options = ("--model", story_model, "--data", data, *steps, "--ppo-steps", 2, "--ppo-batch-size", 8)
    run(monkeypatch, "rlhf.py", *options, "--pairs", 24, "--folder", tmp_path / "run")
    printed = capsys.readouterr().out
    stages = (
        r"1\. .*held-out nll .*\n2\. .* from \d+ annotated pairs.* ranked rightly .*\n3\. .*KL to the start .* opinion"
    )
    assert re.search(stages, printed, re.DOTALL)
    for stage in ("sft", "reward", "ppo"):
        assert len((tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()) == 2
        assert list((tmp_path / "run" / stage / "model").glob("*.safetensors"))


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path.name
