"""The examples run as a person runs them, cut short: every part of their output is there."""

import json
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
