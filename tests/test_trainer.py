"""`create_rl_trainer`: every algorithm trains, and every parameter reaches what its line in the table names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import rlloss
from rlloss.loop import WithoutAdapters, offline_batch
from rlloss.trainer import PARAMETERS, create_rl_trainer
from rlloss.trainer.parameters import table

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning"),
]

PAIRS = [
    {"prompt": p, "chosen": c, "rejected": r} for p in ("ab", "cde", "f", "gh") for c, r in (("aab", "h"), ("ba", "gg"))
]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
THUMBS = [row | {"label": i % 2 == 0} for i, row in enumerate(ANSWERS)]
PROMPTS = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in PAIRS]
DATA = {"sft": ANSWERS, "kto": THUMBS} | dict.fromkeys(("dpo", "ipo", "simpo", "reward"), PAIRS)


def tokenizer(letters="abcdefgh"):
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def config(**options):
    size: dict[str, Any] = {"vocab_size": 10, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaConfig(num_attention_heads=2, pad_token_id=0, eos_token_id=1, **size | options)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    torch.manual_seed(1)
    LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def share_of_a(completions):
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


@pytest.fixture
def make(folder, tmp_path):
    def trainer(algorithm="dpo", dataset: Any = None, **parameters):
        online = algorithm not in DATA
        if online and not {"reward_functions", "reward_model_name", "reward_model_path"} & set(parameters):
            parameters["reward_functions"] = share_of_a
        if online:
            parameters = {"max_new_tokens": 4} | parameters
        quiet = {"progress": False, "output_dir": tmp_path / "run"}
        return create_rl_trainer(folder, dataset or DATA.get(algorithm, PROMPTS), algorithm, **quiet | parameters)

    return trainer


ALGORITHMS = ["sft", "dpo", "ipo", "simpo", "kto", "reward", "ppo", "conservative_ppo", "rloo", "reinforce", "grpo"]
ALGORITHMS += ["gspo", "dapo", "drgrpo", "importance_sampling"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_evaluates_predicts_and_is_saved(make, algorithm, tmp_path):
    trainer = make(algorithm, max_steps=2, batch_size=2, learning_rate=1e-2)
    before = {name: x.clone() for name, x in trainer.session.model.state_dict().items()}
    history = trainer.train()
    assert [numbers["step"] for numbers in history] == [0, 1]
    assert any(not torch.equal(x, before[name]) for name, x in trainer.session.model.state_dict().items())
    key = "eval/loss" if algorithm in DATA else "eval/reward"
    assert isinstance(trainer.evaluate()[key], float)
    assert trainer.evaluate(DATA.get(algorithm, PROMPTS))[key] is not None
    saved = trainer.save_model()
    assert list(Path(saved).glob("*.safetensors"))
    if algorithm != "reward":
        assert len(trainer.predict(["ab", "c"], max_new_tokens=3)) == 2
        AutoModelForCausalLM.from_pretrained(saved)


def test_losses_are_the_librarys(make):
    assert repr(make("dpo").loss_fn) == repr(rlloss.DPOLoss())
    assert repr(make("drgrpo").loss_fn) == repr(rlloss.DrGRPOLoss(max_completion_length=4))
    loss_fn = make("ppo").loss_fn
    assert repr(loss_fn) == repr(
        rlloss.ActorCriticLoss(policy=rlloss.PPOLoss(), value=rlloss.ValueLoss(), value_coef=0.1)
    )


# every parameter


def group(trainer, index=0):
    return trainer.session.optimizer.param_groups[index]


def rates(trainer, updates):
    seen = []
    for _ in range(updates):
        seen.append(group(trainer)["lr"])
        trainer.session.optimizer.step()
        trainer.session.scheduler.step()
    return seen


def adapters(trainer):
    return trainer.session.model.peft_config["default"]


LONG = [{"prompt": "abcdefgh", "chosen": "abc", "rejected": "hgf"}] * 4
MAPPED = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in PAIRS]
LORA = {"use_peft": True}

# parameter: (algorithm, parameters, what is observed, what is expected)
REACHES: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "num_epochs": ("dpo", {"num_epochs": 2.5, "batch_size": 2, "eval_fraction": 0}, lambda t: t.steps, 10),
    "max_steps": ("dpo", {"max_steps": 7}, lambda t: t.steps, 7),
    "batch_size": (
        "dpo",
        {"batch_size": 3, "max_length": 10},
        lambda t: (t.examples_per_update, t.session.micro_batch_tokens),
        (3, 3 * 2 * 10),
    ),
    "gradient_accumulation_steps": (
        "dpo",
        {"batch_size": 3, "gradient_accumulation_steps": 4, "max_length": 10},
        lambda t: (t.examples_per_update, t.session.micro_batch_tokens),
        (12, 3 * 2 * 10),
    ),
    "learning_rate": ("dpo", {"learning_rate": 0.25, "scheduler": "constant"}, lambda t: group(t)["lr"], 0.25),
    "critic_learning_rate": (
        "ppo",
        {"critic_learning_rate": 0.5, "scheduler": "constant"},
        lambda t: {g["lr"] for g in t.session.optimizer.param_groups},
        {1e-6, 0.5},
    ),
    "weight_decay": (
        "dpo",
        {"weight_decay": 0.1},
        lambda t: [x for g in t.session.optimizer.param_groups for x in (g["weight_decay"], g["params"][0].ndim)],
        [0.1, 2, 0.0, 1],
    ),
    "warmup_steps": (
        "dpo",
        {"warmup_steps": 2, "max_steps": 4, "learning_rate": 1.0},
        lambda t: rates(t, 4),
        [0.5, 1.0, 1.0, 0.5],
    ),
    "scheduler": (
        "dpo",
        {"scheduler": "cosine", "max_steps": 2, "learning_rate": 1.0},
        lambda t: rates(t, 2),
        [1.0, 0.5],
    ),
    "max_grad_norm": ("dpo", {"max_grad_norm": 0.3}, lambda t: t.session.max_grad_norm, 0.3),
    "seed": ("grpo", {"seed": 5}, lambda t: t.session.generator.initial_seed(), 5),
    "split": (
        "dpo",
        {"split": "good", "dataset": "splits", "eval_fraction": 0},
        lambda t: len(t.examples),
        len(PAIRS),
    ),
    "column_mapping": (
        "dpo",
        {"dataset": MAPPED, "column_mapping": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
        lambda t: len(t.examples) + len(t.eval_examples),
        len(PAIRS),
    ),
    "percent": ("dpo", {"percent": 50.0, "eval_fraction": 0}, lambda t: len(t.examples), 4),
    "max_samples": ("dpo", {"max_samples": 3, "eval_fraction": 0}, lambda t: len(t.examples), 3),
    "eval_dataset": ("dpo", {"eval_dataset": PAIRS[:3]}, lambda t: (len(t.examples), len(t.eval_examples)), (8, 3)),
    "eval_fraction": ("dpo", {"eval_fraction": 0.3}, lambda t: (len(t.examples), len(t.eval_examples)), (5, 3)),
    "max_seq_length": (
        "dpo",
        {"dataset": LONG, "max_seq_length": 10},
        lambda t: {len(pair.chosen.input_ids) for pair in t.examples},
        {10},
    ),
    "max_prompt_length": (
        "dpo",
        {"dataset": LONG, "max_prompt_length": 3},
        lambda t: {tuple(pair.chosen.input_ids[:4]) for pair in t.examples},
        {(7, 8, 9, 2)},
    ),
    "truncation_mode": (
        "dpo",
        {"dataset": LONG, "max_seq_length": 6, "truncation_mode": "keep_end"},
        lambda t: {tuple(pair.chosen.input_ids) for pair in t.examples},
        {(8, 9, 2, 3, 4, 1)},
    ),
    "padding_free": ("dpo", {"padding_free": True}, lambda t: t.session.padding_free, True),
    "torch_dtype": ("dpo", {"torch_dtype": "bfloat16"}, lambda t: t.session.model.dtype, torch.bfloat16),
    "bf16": (
        "dpo",
        {"bf16": True},
        lambda t: (t.session.autocast_dtype, t.session.model.dtype),
        (torch.bfloat16, torch.float32),
    ),
    "use_peft": (
        "dpo",
        LORA,
        lambda t: (isinstance(t.session.reference, WithoutAdapters), t.session.reference.model is t.session.model),
        (True, True),
    ),
    "lora_r": ("dpo", LORA | {"lora_r": 3}, lambda t: adapters(t).r, 3),
    "lora_alpha": ("dpo", LORA | {"lora_alpha": 5}, lambda t: adapters(t).lora_alpha, 5),
    "lora_dropout": (
        "dpo",
        LORA | {"lora_dropout": 0.5},
        lambda t: (adapters(t).lora_dropout, t.session.dropout),
        (0.5, True),
    ),
    "lora_target_modules": (
        "dpo",
        LORA | {"lora_target_modules": ["q_proj"]},
        lambda t: {name.split(".")[-4] for name, _ in t.session.model.named_parameters() if "lora_A" in name},
        {"q_proj"},
    ),
    "temperature": ("grpo", {"temperature": 0.7}, lambda t: t.session.temperature, 0.7),
    "group_size": ("grpo", {"num_generations": 3}, lambda t: t.group_size, 3),
    "max_new_tokens": ("drgrpo", {"max_new_tokens": 9}, lambda t: t.loss_fn.max_length, 9),
    "normalize_rewards": (
        "grpo",
        {"normalize_rewards": True},
        lambda t: type(t.advantages.reward_norm),
        rlloss.RunningRewardNorm,
    ),
    "reward_function_weights": (
        "grpo",
        {"reward_functions": [share_of_a, "length"], "reward_function_weights": [0.2, 0.8]},
        lambda t: (t.rewards.names, t.rewards.weights),
        (["share_of_a", "length"], [0.2, 0.8]),
    ),
    "loss_type": ("dpo", {"loss_type": "ipo"}, lambda t: type(t.loss_fn), rlloss.IPOLoss),
    "beta": ("dpo", {"beta": 0.3}, lambda t: t.loss_fn.beta, 0.3),
    "kl_coef": (
        "grpo",
        {"kl_coef": 0.2},
        lambda t: (t.loss_fn.kl_coef, t.session.reference is not None),
        (0.2, True),
    ),
    "init_kl_coef": (
        "ppo",
        {"init_kl_coef": 0.3},
        lambda t: (float(t.advantages.kl_controller.kl_coef), t.advantages.kl_controller.target_kl),
        (0.3, 6.0),
    ),
    "target_kl": ("ppo", {"target_kl": 2.0}, lambda t: t.advantages.kl_controller.target_kl, 2.0),
    "kl_penalty": ("ppo", {"kl_penalty": "mse"}, lambda t: t.advantages.kl, "k2"),
    "cliprange": (
        "ppo",
        {"cliprange": 0.3},
        lambda t: (t.loss_fn.policy.clip_eps_low, t.loss_fn.policy.clip_eps_high),
        (0.3, 0.3),
    ),
    "cliprange_value": ("ppo", {"cliprange_value": 0.4}, lambda t: t.loss_fn.value.value_clip, 0.4),
    "vf_coef": ("ppo", {"vf_coef": 0.6}, lambda t: t.loss_fn.value_coef, 0.6),
    "gamma": ("ppo", {"gamma": 0.9}, lambda t: t.advantages.gamma, 0.9),
    "lam": ("ppo", {"lam": 0.8}, lambda t: t.advantages.gae_lambda, 0.8),
    "shared_trunk": (
        "ppo",
        {"shared_trunk": True},
        lambda t: t.session.critic.shares_backbone_with(t.session.model),
        True,
    ),
    "simpo_gamma": ("simpo", {"simpo_gamma": 1.5}, lambda t: t.loss_fn.margin, 1.5),
    "reference_free": (
        "dpo",
        {"reference_free": True},
        lambda t: (t.loss_fn.reference_free, t.session.reference),
        (True, None),
    ),
}


@pytest.mark.parametrize("name", REACHES)
def test_a_parameter_reaches_what_it_names(make, name, tmp_path):
    algorithm, parameters, observed, expected = REACHES[name]
    parameters = dict(parameters)
    if parameters.get("dataset") == "splits":
        (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
        (tmp_path / "splits").mkdir()
        (tmp_path / "good.jsonl").rename(tmp_path / "splits" / "train.jsonl")
        (tmp_path / "splits" / "test.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
        parameters |= {"dataset": tmp_path / "splits", "split": "test"}
        expected = 1
    seen = observed(make(algorithm, **parameters))
    assert seen == (pytest.approx(expected) if isinstance(expected, float | list) else expected)


def test_runs_leave_their_files_and_resume(make, tmp_path):
    folder = tmp_path / "out"
    whole = make(max_steps=4, output_dir=tmp_path / "whole").train()
    make(max_steps=4, output_dir=folder, save_steps=2, eval_steps=2).train()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/loss" in line] == [1, 3]
    assert list((folder / "checkpoint").glob("*.safetensors"))
    assert lines[-1]["loss"] == whole[-1]["loss"]
    longer = make(max_steps=6, output_dir=folder, resume_from_checkpoint=True, scheduler="linear")
    assert [numbers["step"] for numbers in longer.train()] == [4, 5]


def test_progress_shows_a_bar(make, capsys):
    make(max_steps=1, progress=True).train()
    assert "1/1" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["auto", "trl", "unsloth"])
def test_backends_print_one_line(make, backend, capsys):
    make(backend=backend)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (backend != "auto")
    assert all(repr(backend) in line for line in printed)


def test_online_rows_in_memory_are_those_of_batch_size_prompts(make):
    trainer = make("grpo", batch_size=3, group_size=4, max_new_tokens=5)
    assert trainer.session.micro_batch_tokens == 3 * 4 * (3 + 5)  # the longest prompt has 3 tokens


def test_epochs_and_mini_batches_are_those_of_the_loop(make):
    trainer = make("ppo", max_steps=2, batch_size=4, mini_batch_size=2, num_ppo_epochs=3)
    trainer.train()
    assert trainer.session.step == 2 * 3 * 2
    with pytest.raises(ValueError, match=r"mini_batch_size=3 must divide the 4 completions of a step"):
        make("ppo", batch_size=4, mini_batch_size=3)


# adapters, bits, recomputed activations


def test_the_reference_of_an_adapted_model_is_the_model_without_adapters(make, folder):
    trainer = make("dpo", use_peft=True, max_steps=3, learning_rate=0.1)
    frozen = [x.clone() for name, x in trainer.session.model.named_parameters() if "lora_" not in name]
    assert trainer.train()[0]["margin"] == 0
    assert trainer.train()[0]["margin"] != 0
    kept = [x for name, x in trainer.session.model.named_parameters() if "lora_" not in name]
    assert all(torch.equal(x, y) for x, y in zip(frozen, kept, strict=True))
    batch = offline_batch(trainer.session, trainer.examples, rlloss.SimPOLoss())
    plain = rlloss.Session(LlamaForCausalLM.from_pretrained(folder), trainer.tokenizer)
    torch.testing.assert_close(trainer.session.logprobs(batch, reference=True), plain.logprobs(batch))


def test_a_peft_config_of_your_own_is_taken(make):
    from peft import LoraConfig

    mine = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    trainer = make("dpo", peft_config=mine)
    assert adapters(trainer) is mine
    assert isinstance(trainer.session.reference, WithoutAdapters)
    with pytest.raises(ValueError, match="lora_r needs no peft_config"):
        make("dpo", peft_config=mine, lora_r=3)
    with pytest.raises(ValueError, match="lora_r needs use_peft=True"):
        make("dpo", lora_r=3)


def test_recomputed_activations_change_no_gradient(make):
    def gradients(**parameters):
        trainer = make("dpo", **parameters)
        calls = []
        layer = trainer.session.model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        batch = offline_batch(trainer.session, trainer.examples, trainer.loss_fn)
        trainer.session.logprobs(batch)  # a model's first forward is preceded by a look at its head
        calls.clear()
        trainer.session.forward_backward(batch, trainer.loss_fn)
        assert not any(module.training for module in trainer.session.model.modules())
        return [p.grad for p in trainer.session.model.parameters()], len(calls)

    plain, calls = gradients()
    again, calls_again = gradients(use_gradient_checkpointing=True)
    assert (calls, calls_again) == (1, 2)
    for mine, theirs in zip(plain, again, strict=True):
        torch.testing.assert_close(mine, theirs)


class LoadedError(Exception):
    pass


@pytest.mark.parametrize("name", ["quantization", "reference_quantization"])
def test_bits_reach_the_loader(make, monkeypatch, name):
    from rlloss.trainer import models

    seen = []

    def from_pretrained(source, **options):
        if "quantization_config" not in options:
            return LlamaForCausalLM.from_pretrained(source)
        seen.append(options["quantization_config"])
        raise LoadedError

    monkeypatch.setattr(models, "needs_package", lambda *_: None)
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(LoadedError):
        make("dpo", **{name: {"load_in_8bit": True}}, **(LORA if name == "quantization" else {}))
    assert seen[0].load_in_8bit is True
    with pytest.raises(ValueError, match=r"quantization has no option 'load_in_4bits'; did you mean 'load_in_4bit'"):
        make("dpo", **{name: {"load_in_4bits": True}}, **LORA)
    if name == "quantization":
        with pytest.raises(ValueError, match=r"freezes the weights, and nothing would train; add use_peft=True"):
            make("dpo", quantization={"load_in_4bit": True})


@pytest.mark.parametrize(
    ("package", "parameters"), [("bitsandbytes", LORA | {"quantization": {"load_in_4bit": True}}), ("peft", LORA)]
)
def test_a_missing_extra_says_what_installs_it(make, monkeypatch, package, parameters):
    from rlloss.trainer import models

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    extra = "quantization" if package == "bitsandbytes" else "peft"
    with pytest.raises(ImportError, match=rf'{package}, which is not installed: pip install "rlloss\[{extra}\]"'):
        make("dpo", **parameters)


def test_a_reference_and_a_critic_of_your_own_are_taken(make, folder, tmp_path):
    other = LlamaForCausalLM(config())
    trainer = make("grpo", reference=other)
    assert trainer.session.reference is other
    assert "ref_kl" in make("grpo", reference=str(folder), max_steps=1, output_dir=tmp_path / "named").train()[-1]
    assert not any(p.requires_grad for p in other.parameters())
    model, critic = LlamaForCausalLM(config()), rlloss.ScalarModel(LlamaForCausalLM(config()))
    ppo = create_rl_trainer(model, PROMPTS, "ppo", tokenizer=tokenizer(), critic=critic, reward_functions="length")
    assert ppo.session.critic is critic
    with pytest.raises(ValueError, match="the reference shares trainable parameters with the policy"):
        create_rl_trainer(model, PAIRS, tokenizer=tokenizer(), reference=model)
    with pytest.raises(ValueError, match=r"critic must be a rlloss\.ScalarModel"):
        make("ppo", critic=other)


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_precomputed_reference_log_probs_train_alike_without_a_reference(make, algorithm, tmp_path):
    plain = make(algorithm, max_steps=3, learning_rate=1e-2)
    cached = make(algorithm, max_steps=3, learning_rate=1e-2, precompute_ref_log_probs=True, output_dir=tmp_path / "c")
    assert cached.session.reference is None
    assert cached.train()[-1]["loss"] == pytest.approx(plain.train()[-1]["loss"], rel=1e-4)


# rewards


def test_the_three_ways_to_give_a_reward(make, folder, reward_folder, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"needs a reward; pass reward_functions=.*reward_model_name=.*train_custom"):
        make("grpo", reward_functions=None)
    assert make("grpo", reward_functions="length").rewards.names == ["length"]
    for name in ("reward_model_name", "reward_model_path"):
        trainer = make("ppo", **{name: str(reward_folder)}, max_steps=1)
        assert trainer.rewards.names == ["reward_model"]
        assert trainer.train()[-1]["reward"] != 0
    both = {"reward_functions": ["length"], "reward_model_name": str(reward_folder)}
    trainer = make("grpo", **both, reward_function_weights=[0.5])
    means = trainer.evaluate()
    assert means["eval/reward"] == pytest.approx(
        0.5 * means["eval/reward/length"] + means["eval/reward/reward_model"], rel=1e-4
    )
    assert (trainer.rewards.names, trainer.rewards.weights) == (["length", "reward_model"], [0.5, 1.0])
    with pytest.raises(ValueError, match="name one model; give one"):
        make("ppo", reward_model_name="a", reward_model_path="b")


def test_coherence_is_that_of_the_policy_before_training(make):
    trainer = make("grpo", reward_functions=["coherence"])
    (reward,) = trainer.rewards.functions
    assert reward.model is not trainer.session.model
    assert 0 < reward(["ab"], ["ba"])[0] < 1


def test_a_reward_model_of_another_family_is_refused_or_reads_text(make, tmp_path):
    torch.manual_seed(1)
    LlamaForSequenceClassification(config(num_labels=1)).save_pretrained(tmp_path)
    tokenizer("hgfedcba").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"different families: .* or pass reward_on_text=True"):
        make("ppo", reward_model_name=str(tmp_path))
    trainer = make("ppo", reward_model_name=str(tmp_path), reward_on_text=True, max_steps=1)
    assert trainer.train()[-1]["reward"] != 0


def test_quantized_reward_models_reach_their_loader(make, reward_folder, monkeypatch):
    from rlloss.trainer import rewards

    seen = {}

    def loaded(**options):
        seen.update(options)
        raise LoadedError

    monkeypatch.setattr(rewards, "RewardModel", loaded)
    with pytest.raises(LoadedError):
        make("ppo", reward_model_name=str(reward_folder), reward_model_quantization={"load_in_4bit": True})
    assert seen["quantization"] == {"load_in_4bit": True}


def test_a_custom_reward_model_learns_what_the_functions_say(make, folder, tmp_path):
    texts = [letter * n for letter in "ab" for n in (2, 3, 4, 5)]
    custom = {
        "train_custom_reward_model": True,
        "reward_training_texts": texts,
        "reward_functions": [share_of_a],
        "reward_training_base_model": folder,
        "reward_training_output_dir": tmp_path / "learned",
        "reward_training_steps": 150,
    }
    trainer = make("ppo", **custom)
    (reward,) = trainer.rewards.functions
    high, low = reward(["", ""], ["aaaa", "bbbb"])
    assert high > 0.8
    assert low < 0.2
    assert (tmp_path / "learned" / "scalar_head.safetensors").exists()
    for name in set(custom) - {"train_custom_reward_model", "reward_training_steps"}:
        with pytest.raises(ValueError, match=f"train_custom_reward_model=True needs {name}, got None"):
            make("ppo", **custom | {name: None})
    with pytest.raises(ValueError, match="makes the reward model, and 'x' names one"):
        make("ppo", **custom, reward_model_name="x")
    untrained = make("ppo", **custom | {"reward_training_steps": 1, "reward_training_output_dir": tmp_path / "u"})
    assert abs(untrained.rewards.functions[0]([""], ["aaaa"])[0]) < 0.5


# what is refused


@pytest.mark.parametrize(
    ("algorithm", "parameters", "message"),
    [
        ("dpo", {"learning_rat": 1}, "unknown parameter 'learning_rat' of 'dpo'; did you mean 'learning_rate'"),
        ("dpo", {"kl_coef": 0.1}, r"kl_coef .* is no parameter of 'dpo', of the kind 'preference', and would reach"),
        ("dpo", {"max_length": 3, "max_seq_length": 4}, "max_length and max_seq_length are one parameter; give one"),
        ("simpo", {"cpo_alpha": 1.0}, "unknown parameter 'cpo_alpha' of 'simpo'"),
        ("dpo", {"simpo_gamma": 1.0}, r"simpo_gamma=1.0 is margin, which dpo has not; leave it out"),
        ("simpo", {"reference_free": False}, "reference_free=False is reference_free, which simpo has not"),
        ("reinforce", {"cliprange": 0.2}, "is clip_eps_low, which reinforce has not"),
        ("ipo", {"loss_type": "dpo"}, "algorithm='ipo' and loss_type='dpo' contradict each other"),
        ("ipo", {"loss_type": "sigmoid"}, "create_rl_trainer: unknown loss 'sigmoid'"),
        ("dpo", {"loss_type": "grpo"}, "algorithm='dpo' and loss_type='grpo' contradict each other"),
        ("dpo", {"loss_type": "nonsense"}, "create_rl_trainer: unknown loss 'nonsense'"),
        ("grpo", {"beta": 0.1, "kl_coef": 0.2}, "kl_coef and beta both set the weight of the KL; give one"),
        ("ppo", {"init_kl_coef": 0.1, "kl_coef": 0.2}, "kl_coef and init_kl_coef both set the weight of the KL"),
        ("ppo", {"kl_penalty": "full"}, "kl_penalty must be one of"),
        ("drgrpo", {"clip_eps_low": 0.1, "cliprange": 0.2}, "clip_eps_low=0.1 is given twice"),
        ("dpo", {"backend": "axolotl"}, "backend must be one of"),
        ("dpo", {"scheduler": "step"}, "scheduler must be one of"),
        ("dpo", {"torch_dtype": "float33"}, "torch_dtype must be a torch.dtype or its name"),
        ("dpo", {"column_mapping": {"question": "prompt text"}}, r"column_mapping must map this library"),
        ("dpo", {"percent": 0}, "percent must be a number"),
        ("value", {}, "'value' trains a critic alone; algorithm='ppo' trains one beside its policy"),
        ("gpro", {}, "create_rl_trainer: unknown loss 'gpro'; did you mean 'gspo' or 'grpo'"),
    ],
)
def test_a_mistake_teaches(make, algorithm, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(algorithm, **parameters)


def test_sigmoid_is_dpos_own_loss_and_nll_sfts(make):
    assert type(make("dpo", loss_type="sigmoid").loss_fn) is rlloss.DPOLoss
    assert type(make("sft", loss_type="nll").loss_fn) is rlloss.SFTLoss


def test_hyperparameters_of_the_loss_itself_pass(make):
    assert make("dpo", label_smoothing=0.2).loss_fn.label_smoothing == 0.2
    assert make("kto", desirable_weight=2.0, undesirable_weight=0.5).loss_fn.desirable_weight == 2.0
    assert make("ppo", entropy_coef=0.1).loss_fn.policy.entropy_coef == 0.1


def test_a_trainer_without_data_is_built_and_says_what_it_needs(folder):
    trainer = create_rl_trainer(folder, algorithm="dpo")
    with pytest.raises(ValueError, match="needs data to train on, got none; pass dataset_name="):
        trainer.train()
    with pytest.raises(ValueError, match=r"evaluate\(\) has nothing to evaluate on"):
        trainer.evaluate()


def test_a_loaded_model_comes_with_its_tokenizer(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    assert create_rl_trainer(model, PAIRS, tokenizer=tokenizer()).session.model is model
    with pytest.raises(ValueError, match="a loaded LlamaForCausalLM needs its tokenizer"):
        create_rl_trainer(model, PAIRS)


# the table

# by a test of their own
ELSEWHERE = {
    "critic": test_a_reference_and_a_critic_of_your_own_are_taken,
    "reference": test_a_reference_and_a_critic_of_your_own_are_taken,
    "backend": test_backends_print_one_line,
    "eval_steps": test_runs_leave_their_files_and_resume,
    "mini_batch_size": test_epochs_and_mini_batches_are_those_of_the_loop,
    "num_ppo_epochs": test_epochs_and_mini_batches_are_those_of_the_loop,
    "output_dir": test_runs_leave_their_files_and_resume,
    "peft_config": test_a_peft_config_of_your_own_is_taken,
    "precompute_ref_log_probs": test_precomputed_reference_log_probs_train_alike_without_a_reference,
    "progress": test_progress_shows_a_bar,
    "quantization": test_bits_reach_the_loader,
    "reference_quantization": test_bits_reach_the_loader,
    "resume": test_runs_leave_their_files_and_resume,
    "reward_functions": test_the_three_ways_to_give_a_reward,
    "reward_model_name": test_the_three_ways_to_give_a_reward,
    "reward_model_path": test_the_three_ways_to_give_a_reward,
    "reward_model_quantization": test_quantized_reward_models_reach_their_loader,
    "reward_on_text": test_a_reward_model_of_another_family_is_refused_or_reads_text,
    "reward_training_base_model": test_a_custom_reward_model_learns_what_the_functions_say,
    "reward_training_output_dir": test_a_custom_reward_model_learns_what_the_functions_say,
    "reward_training_steps": test_a_custom_reward_model_learns_what_the_functions_say,
    "reward_training_texts": test_a_custom_reward_model_learns_what_the_functions_say,
    "save_steps": test_runs_leave_their_files_and_resume,
    "train_custom_reward_model": test_a_custom_reward_model_learns_what_the_functions_say,
    "use_gradient_checkpointing": test_recomputed_activations_change_no_gradient,
}


def test_every_parameter_has_a_test():
    assert {p.name for p in PARAMETERS} == {*REACHES, *ELSEWHERE}
    assert not set(REACHES) & set(ELSEWHERE)


def test_the_page_holds_the_table():
    page = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text(encoding="utf-8")
    assert page.partition("## Parameters\n\n")[2] == table()
