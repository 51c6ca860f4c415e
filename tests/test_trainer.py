"""`create_rl_trainer`: every algorithm trains, and every parameter reaches what its line in the table names."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import rlloss
from rlloss.loop import WithoutAdapters, offline_batch
from rlloss.loop.modes import adapter_modules, gradient_mode
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
# names that only others give to one with some options, too
PREFERENCES = ["dpo", "ipo", "simpo", "orpo", "cpo", "alpha_po", "hinge", "slic_hf", "robust", "exo", "nca", "sppo"]
PREFERENCES += ["aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "bco_pair", "beta_dpo", "cal_dpo"]
PREFERENCES += ["sigmoid_norm"]
DATA: dict[str, Any] = dict.fromkeys(("sft", "dft"), ANSWERS)
DATA |= dict.fromkeys(("kto", "bco", "apo_zero_unpaired"), THUMBS)
DATA |= dict.fromkeys((*PREFERENCES, "reward", "margin_ranking", "rao_kupper", "davidson"), PAIRS)


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


ALGORITHMS = [*DATA, "ppo", "conservative_ppo", "rloo", "reinforce", "grpo"]
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
    if not isinstance(trainer.session.model, rlloss.ScalarModel):
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
    "warmup_ratio": (
        "dpo",
        {"warmup_ratio": 0.3, "max_steps": 4, "learning_rate": 1.0},
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
    "eval_split": (
        "dpo",
        {"eval_dataset": {"train": PAIRS, "mine": PAIRS[:3], "test": PAIRS[:2]}, "eval_split": "mine"},
        lambda t: len(t.eval_examples),
        3,
    ),
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
    "advantages": (
        "grpo",
        {"adv_estimator": "opo"},
        lambda t: (t.advantages.baseline, t.advantages.needs_lengths),
        ("weighted_mean", True),
    ),
    "scale_rewards": ("grpo", {"scale_rewards": "batch"}, lambda t: t.advantages.scale, "batch"),
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
    if isinstance(parameters.get("eval_dataset"), dict):
        rows = parameters["eval_dataset"].items()
        parameters["eval_dataset"] = datasets.DatasetDict({k: datasets.Dataset.from_list(x) for k, x in rows})
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
    trainer = make("dpo", use_peft=True, max_steps=4, learning_rate=0.1)
    frozen = [x.clone() for name, x in trainer.session.model.named_parameters() if "lora_" not in name]
    history = trainer.train()
    assert history[0]["margin"] == 0
    assert history[3]["margin"] != 0
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
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
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


# rows


@pytest.fixture
def splits():
    def rows(number):
        return datasets.Dataset.from_list(PAIRS[:number])

    return datasets.DatasetDict({"train_prefs": rows(8), "test_prefs": rows(3), "train": rows(7), "test": rows(2)})


def test_rows_to_evaluate_on_have_the_split_that_goes_with_the_trained_one(make, splits, tmp_path):
    def evaluated(source, **parameters):
        return len(make("dpo", splits, eval_dataset=source, **parameters).eval_examples)

    assert evaluated(splits) == 2
    assert evaluated(splits, split="train_prefs") == 3
    assert evaluated(datasets.DatasetDict({"any": splits["test"]}), split="train_prefs") == 2
    assert evaluated(datasets.DatasetDict({"train": splits["test"], "validation": splits["test_prefs"]})) == 3
    assert evaluated(PAIRS[:4], split="train_prefs") == evaluated(splits["train"].select(range(4))) == 4
    held_out = datasets.DatasetDict({"test": splits["test"], "validation": splits["test_prefs"]})
    assert len(make("dpo", held_out, split="test", eval_dataset=held_out).eval_examples) == 3
    splits.save_to_disk(tmp_path / "saved")
    assert evaluated(tmp_path / "saved", split="train_prefs") == 3
    (tmp_path / "folder").mkdir()
    for name, number in (("train-00000-of-00001", 8), ("test-00000-of-00001", 5)):
        splits["train_prefs"].select(range(number)).to_json(tmp_path / "folder" / f"{name}.jsonl")
    assert evaluated(tmp_path / "folder") == 5
    assert evaluated(tmp_path / "folder" / "test-00000-of-00001.jsonl", split="train_prefs") == 5
    trainer = make("dpo", splits, split="train_prefs")
    assert trainer.evaluate(PAIRS[:2]) == trainer.evaluate(splits["test"])
    with pytest.raises(ValueError, match="not 'tests'; did you mean 'test'"):
        evaluated(splits, eval_split="tests")


def test_a_mapping_leaves_columns_alone_that_have_our_names(make):
    theirs = [{"question": row["prompt"], "completion": row["completion"]} for row in ANSWERS]
    for mapping in ({"prompt": "question"}, {"question": "prompt"}):
        trainer = make("sft", theirs, column_mapping=mapping, eval_dataset=ANSWERS)
        assert len(trainer.eval_examples) == len(ANSWERS)
        assert trainer.evaluate(ANSWERS) == trainer.evaluate(theirs) == trainer.evaluate()
        with pytest.raises(ValueError, match="no column 'question', only"):
            trainer.evaluate([{"query": "ab", "completion": "a"}])


def test_rows_that_teach_nothing_are_left_out_with_one_line(make, capsys):
    long = {"prompt": "abcdefgh", "chosen": "abc", "rejected": "hgf"}
    empty = [PAIRS[0] | {"rejected": " "}, PAIRS[1] | {"chosen": ""}]
    rows = [*PAIRS[:2], long, *PAIRS[2:], *empty]
    trainer = make("dpo", rows, max_seq_length=8, eval_fraction=0)
    assert trainer.examples == make("dpo", PAIRS, max_seq_length=8, eval_fraction=0).examples
    assert capsys.readouterr().out.splitlines() == [
        "create_rl_trainer: dropped 3 of 11 rows: 2 without an answer, 1 of whose answer max_seq_length=8 leaves "
        "nothing (raise it, or cut their prompts: max_prompt_length, truncation_mode='keep_end')"
    ]
    trainer.evaluate(rows)
    assert "dropped 3 of 11 rows to evaluate on: 2 without" in capsys.readouterr().out
    for seed in range(4):  # whichever part they fall into
        held_out = make("dpo", [long, *PAIRS[:2]], max_seq_length=8, eval_fraction=0.3, seed=seed)
        assert len(held_out.examples) + len(held_out.eval_examples) == 2
        assert len(capsys.readouterr().out.splitlines()) == 1
    assert len(make("kto", [*THUMBS, THUMBS[0] | {"prompt": "abcdefgh"}], max_length=8, eval_fraction=0).examples) == 8
    with pytest.raises(ValueError, match=r"row 1: of its 12 tokens none is trained .* so it is with 3 of 3 rows"):
        make("dpo", [long] * 3, max_seq_length=8, eval_fraction=0)
    with pytest.raises(ValueError, match="row 1: field 'rejected' must be a non-empty text"):
        make("dpo", empty[:1])


def test_answers_are_empty_in_every_form_of_rows(make):
    asked, answer = [{"role": "user", "content": "ab"}], {"role": "assistant", "content": "a"}
    silent = {"role": "assistant", "content": ""}
    for algorithm, rows in {
        "dpo": [
            {"prompt": asked, "chosen": [answer], "rejected": [answer | {"content": "h"}]},
            {"prompt": asked, "chosen": [answer], "rejected": [silent]},
            {"prompt": asked, "chosen": [], "rejected": [answer]},
        ],
        "sft": [{"messages": messages} for messages in ([*asked, answer], [*asked, silent], [], asked)],
    }.items():
        with_template = tokenizer()
        with_template.chat_template = (
            "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}{% endif %}"
        )
        assert len(make(algorithm, rows, tokenizer=with_template, eval_fraction=0).examples) == 1
    dialogue = "\n\nHuman: Hi\n\nAssistant:"
    rows = [{"chosen": dialogue + " abc", "rejected": dialogue + end} for end in (" h", " ", "")]
    assert len(make("dpo", rows, eval_fraction=0).examples) == 1


def test_online_a_prompt_leaves_room_for_its_completion(make):
    long = [{"prompt": "abcdefgh"}] * 4
    trainer = make("grpo", long, max_seq_length=7, max_new_tokens=4)
    assert {tuple(prompt.ids) for prompt in trainer.examples} == {(7, 8, 9)}
    assert {len(prompt.ids) for prompt in make("grpo", long).examples} == {8}
    shorter = make("ppo", long, max_length=9, max_prompt_length=2)
    assert {len(prompt.ids) for prompt in shorter.examples} == {2}
    with pytest.raises(ValueError, match=r"max_seq_length=4 leaves no room for a prompt before max_new_tokens=4"):
        make("grpo", long, max_seq_length=4)


def test_no_limit_is_no_limit(make):
    trainer = make("dpo", LONG, max_length=None, batch_size=3, eval_fraction=0)
    assert trainer.session.micro_batch_tokens == 3 * 2 * 12
    assert {len(pair.chosen.input_ids) for pair in trainer.examples} == {12}


def test_one_row_of_kto_to_evaluate_on_says_what_its_kl_is(make, capsys):
    make("kto").evaluate()
    make("kto", eval_dataset=THUMBS[:1])
    assert capsys.readouterr().out.count("there is one row to evaluate on, so that its KL is that of its own") == 2
    make("kto", eval_dataset=THUMBS)
    assert capsys.readouterr().out == ""


# one run after another


class DiedError(Exception):
    pass


def stopped(trainer, saves):
    """Trains up to a number of checkpoints."""
    save, seen = trainer.session.save_state, []

    def save_state(*arguments):
        save(*arguments)
        seen.append(arguments)
        if len(seen) == saves:
            raise DiedError

    trainer.session.save_state = save_state
    with pytest.raises(DiedError):
        trainer.train()
    trainer.session.save_state = save


def test_a_run_goes_on_from_the_checkpoint_before_an_interrupted_write(make, tmp_path):
    run = {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "output_dir": tmp_path / "run"}
    whole = make("dpo", **run | {"output_dir": tmp_path / "whole"}).train()
    stopped(make("dpo", **run), saves=2)
    (tmp_path / "run" / "checkpoint").rename(tmp_path / "run" / ".checkpoint.old")  # between the writer's two renames
    assert make("dpo", resume=True, **run).train() == whole[4:]


def test_a_trainer_trains_once(make, tmp_path):
    run = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "output_dir": tmp_path / "run"}
    trainer = make("dpo", **run)
    history = trainer.train()
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"has trained already, 4 updates .* more max_steps, .* and resume=True"):
            trainer.train(resume=resume)
    assert trainer.history == history
    again = make("dpo", **run | {"output_dir": tmp_path / "again"})
    stopped(again, saves=1)
    with pytest.raises(ValueError, match="has trained already, 2 updates"):
        again.train()
    assert again.train(resume=True) == history[2:]
    assert make("dpo", **run).train(resume=tmp_path / "run" / "checkpoint") == []


def test_resume_names_the_runs_own_checkpoint(make, tmp_path):
    for elsewhere in ("/no/such/checkpoint-500", tmp_path / "other" / "checkpoint", 3):
        with pytest.raises(
            ValueError, match=r"resume must be True, False or the checkpoint of output_dir, .*run/check"
        ):
            make("dpo", resume=elsewhere)
    with pytest.raises(FileNotFoundError, match="run/checkpoint' does not exist; resume=True begins anew"):
        make("dpo", resume=tmp_path / "run" / "checkpoint")
    assert make("dpo", resume=None, max_steps=1).train()[0]["step"] == 0


def test_predictions_leave_training_alone(make, tmp_path):
    def rewards(name, *, looks):
        trainer = make("grpo", max_steps=2, learning_rate=1e-2, output_dir=tmp_path / name)
        for _ in range(looks):
            trainer.predict(["ab", "cde"])
        return [numbers["reward"] for numbers in trainer.train()]

    assert rewards("none", looks=0) == rewards("two", looks=2)


def test_precomputed_adapters_keep_a_reference_that_costs_nothing(make):
    plain, cached = (
        make("dpo", use_peft=True, max_steps=2, learning_rate=0.1, precompute_ref_log_probs=flag)
        for flag in (False, True)
    )
    assert cached.train() == plain.train()
    assert cached.evaluate(PAIRS) == plain.evaluate(PAIRS)
    freed = make("dpo", precompute_ref_log_probs=True)
    with pytest.raises(
        ValueError, match=r"evaluate\(\) on other rows needs the reference.* pass these rows as eval_data"
    ):
        freed.evaluate(PAIRS)
    assert freed.evaluate()["eval/margin"] == 0


# dropout


def gpt2(**options):
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 10,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**size | options))


def opt():
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 10,
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return OPTForCausalLM(OPTConfig(max_position_embeddings=64, word_embed_proj_dim=16, layerdrop=0.5, **size, **ids))


def falcon():
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": 10,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "eos_token_id": 1,
    }
    return FalconForCausalLM(FalconConfig(hidden_dropout=0.5, attention_dropout=0.5, pad_token_id=0, **size))


def losses(model, **parameters):
    """Without a gradient, and twice with one: all alike unless something is dropped."""
    quiet = {"progress": False, "tokenizer": tokenizer(), "eval_fraction": 0}
    trainer = create_rl_trainer(model, PAIRS, "dpo", **quiet, **parameters)
    for name, p in trainer.session.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))
    batch = offline_batch(trainer.session, trainer.examples, trainer.loss_fn)
    first, _ = trainer.session.forward(batch, trainer.loss_fn)
    return [first, *(trainer.session.forward_backward(batch, trainer.loss_fn)[0] for _ in range(2))]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
def test_adapters_do_not_wake_the_dropout_of_the_model_itself():
    first, *others = losses(gpt2(), use_peft=True, lora_r=2)
    assert others == pytest.approx([first] * 2, abs=1e-6)
    # 1 - 1e-9 of the model's own activations would be gone
    first, *others = losses(gpt2(resid_pdrop=1 - 1e-9), use_peft=True, lora_r=2, lora_dropout=1e-9)
    assert others == pytest.approx([first] * 2, abs=1e-6)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_dropout_of_adapters_that_were_loaded_is_theirs(use_dora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], task_type="CAUSAL_LM", use_dora=use_dora)
    first, *others = losses(get_peft_model(gpt2(), config))
    assert len({first, *others}) == 3


@pytest.mark.parametrize("model", [opt, falcon])
def test_recomputed_layers_drop_nothing(model):
    first, *others = losses(model(), use_gradient_checkpointing=True)
    assert others == pytest.approx([first] * 2, abs=1e-6)


def test_the_layer_that_is_adapted_is_no_part_of_its_adapters():
    adapted = torch.nn.ModuleDict({"base_layer": torch.nn.Dropout(), "lora_dropout": torch.nn.Dropout()})
    model = torch.nn.Sequential(adapted, torch.nn.Dropout())
    assert adapter_modules(model.modules()) == {adapted, adapted["lora_dropout"]}


def test_rates_of_dropout_are_put_back():
    model = opt()
    model.gradient_checkpointing_enable()
    model.eval()

    def state():
        return [(m.training, getattr(m, "dropout", None), getattr(m, "layerdrop", None)) for m in model.modules()]

    before = state()
    during = []

    def die():
        with gradient_mode(model):
            during.extend(state())
            raise DiedError

    with pytest.raises(DiedError):
        die()
    assert during != before
    assert state() == before


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
        ("ipo", {"loss_type": "sigmoid"}, "algorithm='ipo' and loss_type='sigmoid' contradict each other"),
        ("cpo", {"loss_type": "hinge"}, "algorithm='cpo' and loss_type='hinge' contradict each other"),
        ("tdpo", {}, "'tdpo' needs the KL over the whole vocabulary along both answers, which this trainer does not"),
        ("tpo_l", {}, "'tpo_l' needs a third, gold answer to every prompt"),
        ("xpo", {}, "'xpo' needs an answer of the reference to every prompt"),
        ("gkd", {}, r"needs other data than rows of text \(its family is 'distillation'\), which .*\.get_loss\('disti"),
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
        ("dpo", {"learning_rate": -1e-3}, "learning_rate must be a number in"),
        ("dpo", {"learning_rate": "1e-4"}, "learning_rate must be a number in"),
        ("dpo", {"warmup_steps": -5}, "warmup_steps must be a number in"),
        ("dpo", {"warmup_steps": True}, "warmup_steps must be a number in"),
        ("dpo", {"warmup_ratio": 1.5}, "warmup_ratio must be a number in"),
        ("dpo", {"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio and warmup_steps both say how long"),
        ("dpo", {"save_steps": 0}, "save_steps must be an integer of at least 1"),
        ("dpo", {"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ("ppo", {"critic_learning_rate": -1.0}, "critic_learning_rate must be a number in"),
        ("ppo", {"num_ppo_epochs": 0}, "num_ppo_epochs must be an integer of at least 1, got 0"),
        ("ppo", {"mini_batch_size": 0}, "mini_batch_size must be an integer of at least 1, got 0"),
        ("grpo", {"group_size": 0}, "group_size must be an integer of at least 1, got 0"),
        ("grpo", {"group_size": 1}, "group_size=1 leaves nothing to compare with"),
        ("rloo", {"beta": 0.1, "kl_coef": 0.2}, "kl_coef and beta both set the weight of the KL; give one"),
        ("grpo", {"reward_functions": "lenght"}, "unknown reward 'lenght'; did you mean 'length'"),
        ("dpo", {"eval_steps": 2, "eval_fraction": 0}, "eval_steps=2 has nothing to evaluate on; pass eval_dataset"),
        ("grpo", {"reward_training_texts": ["a"]}, "reward_training_texts would reach nothing without train_custom"),
        ("grpo", {"reward_training_base_model": "a"}, "reward_training_base_model would reach nothing without train_c"),
        ("grpo", {"reward_training_output_dir": "a"}, "reward_training_output_dir would reach nothing without train_c"),
        ("grpo", {"reward_training_steps": 3}, "reward_training_steps would reach nothing without train_custom"),
        ("grpo", {"reward_on_text": True}, "reward_on_text would reach nothing without reward_model_name or"),
        (
            "grpo",
            {"reward_model_quantization": {"load_in_8bit": True}},
            "reward_model_quantization would reach nothing",
        ),
        ("simpo", {"reference": "named"}, "reference would reach nothing, since SimPOLoss.* leave it out"),
        ("simpo", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs would reach nothing, since SimPOLoss"),
        ("dpo", {"reference_free": True, "precompute_ref_log_probs": True}, "precompute_ref_log_probs would reach no"),
        ("grpo", {"reference_quantization": {"load_in_8bit": True}}, "would reach nothing, .*; pass kl_coef too"),
        ("sft", {"reduction": "fixed_length", "max_length": None}, "SFTLoss: max_length is for fixed_length"),
        ("value", {}, "'value' trains a critic alone; algorithm='ppo' trains one beside its policy"),
        ("gpro", {}, "create_rl_trainer: unknown loss 'gpro'; did you mean 'gspo' or 'grpo'"),
    ],
)
def test_a_mistake_teaches(make, algorithm, parameters, message):
    with pytest.raises(ValueError, match=message):
        make(algorithm, **parameters)


@pytest.mark.parametrize(
    ("algorithm", "parameters"),
    [
        ("grpo", {"reward_functions": None}),
        ("grpo", {"reward_functions": "lenght"}),
        ("grpo", {"group_size": 1}),
        ("grpo", {"mini_batch_size": 3}),
        ("grpo", {"dataset": [{"promt": "ab"}]}),
        ("dpo", {"scheduler": "cosin"}),
        ("dpo", {"learning_rate": -1}),
        ("dpo", {"save_steps": 0}),
        ("dpo", {"dataset": [{"prompt": "ab", "choosen": "a", "rejected": "b"}]}),
        ("dpo", {"eval_dataset": [{"prompt": "ab"}]}),
    ],
)
def test_nothing_is_loaded_for_a_mistake(make, monkeypatch, algorithm, parameters):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError):  # noqa: PT011 (each has its message above)
        make(algorithm, **parameters)


def test_no_reward_model_is_trained_for_rows_that_cannot_be_read(make, folder, tmp_path):
    custom = {"train_custom_reward_model": True, "reward_training_texts": ["ab", "cd"], "reward_functions": "length"}
    custom |= {"reward_training_base_model": folder, "reward_training_output_dir": tmp_path / "learned"}
    with pytest.raises(ValueError, match="no column 'prompt' among"):
        make("ppo", [{"promt": "ab"}], **custom)
    assert not (tmp_path / "learned").exists()


def test_what_is_switched_off_needs_nothing(make):
    off = {"reward_on_text": False, "reward_training_texts": None, "reward_model_quantization": None}
    assert make("grpo", **off, reference=None).rewards.names == ["share_of_a"]
    assert make("simpo", precompute_ref_log_probs=False, warmup_ratio=0.0).session.reference is None


def test_zero_is_a_value(make):
    trainer = make("ppo", learning_rate=1e-3, critic_learning_rate=0.0, max_new_tokens=3)
    assert {group["initial_lr"] for group in trainer.session.optimizer.param_groups} == {1e-3, 0.0}
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1, got 0"):
        trainer.predict(["ab"], max_new_tokens=0)


def test_warm_up_below_one_is_a_share_of_the_updates(make):
    assert rates(make("dpo", warmup_steps=0.3, max_steps=4, learning_rate=1.0), 4) == [0.5, 1.0, 1.0, 0.5]
    for steps in (2.0, 2.5):
        assert rates(make("dpo", warmup_steps=steps, max_steps=4, learning_rate=1.0), 4) == [0.5, 1.0, 1.0, 0.5]
    online = make("grpo", warmup_ratio=0.25, max_steps=2, num_ppo_epochs=4, learning_rate=1.0, scheduler="constant")
    assert rates(online, 4) == [0.5, 1.0, 1.0, 1.0]  # of the 8 updates, not of the 2 steps


@pytest.mark.parametrize("algorithm", ["rloo", "reinforce"])
def test_beta_is_the_weight_of_the_kl_in_the_reward(make, algorithm):
    assert float(make(algorithm, beta=0.5).advantages.kl_controller.kl_coef) == 0.5
    assert float(make(algorithm, kl_coef=0.5).advantages.kl_controller.kl_coef) == 0.5
    assert float(make(algorithm).advantages.kl_controller.kl_coef) == 0.05
    assert make(algorithm, beta=0.0).session.reference is None


def test_hyperparameters_that_share_a_name_reach_the_loss(make):
    assert make("reward", temperature=5.0).loss_fn.temperature == 5.0
    assert repr(make("sft", reduction="fixed_length", max_length=64).loss_fn) == repr(
        rlloss.SFTLoss(reduction="fixed_length", max_length=64)
    )
    assert make("sft", reduction="fixed_length").loss_fn.max_length == 512


def test_a_policy_in_half_precision_says_what_it_costs(make, capsys):
    make("dpo", torch_dtype="bfloat16")
    assert "the weights are torch.bfloat16, in which small updates are rounded away" in capsys.readouterr().out
    make("dpo", torch_dtype="bfloat16", use_peft=True)
    assert capsys.readouterr().out == ""


def test_bf16_samples_in_bf16(make):
    trainer = make("grpo", bf16=True, max_steps=1)
    assert trainer.session.sampling_dtype is torch.bfloat16
    trainer.train()
    assert trainer.session.model.dtype is torch.float32
    assert make("dpo", bf16=True).session.sampling_dtype is None
    assert make("grpo", bf16=True, torch_dtype="bfloat16").session.sampling_dtype is None


def test_adapters_with_biases_need_a_reference_of_their_own(make, folder):
    from peft import LoraConfig

    def parameters(**options):
        return {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)}

    def policy():
        torch.manual_seed(0)
        return LlamaForCausalLM(config(attention_bias=True))

    quiet = {"tokenizer": tokenizer(), "progress": False}
    with pytest.raises(ValueError, match=r"8 trainable parameters .* are no adapters, .*bias.*reference=frozen_copy"):
        create_rl_trainer(policy(), PAIRS, "dpo", **quiet, **parameters(bias="all"))
    own = create_rl_trainer(policy(), PAIRS, "dpo", reference=policy(), **quiet, **parameters(bias="all"))
    assert not isinstance(own.session.reference, WithoutAdapters)
    saved = make("dpo", **parameters(modules_to_save=["lm_head"]))
    assert isinstance(saved.session.reference, WithoutAdapters)


def test_completions_end_where_the_generation_config_says(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [1, 5, 999]
    trainer = create_rl_trainer(model, tokenizer=tokenizer())
    drawn = trainer.session.sample([[2, 3]], max_new_tokens=40, group_size=16)
    assert any(completion.ids[-1] == 5 for completion in drawn)
    assert not any({1, 5} & set(completion.ids[:-1]) for completion in drawn)


def test_sigmoid_is_dpos_own_loss_and_nll_sfts(make):
    assert type(make("dpo", loss_type="sigmoid").loss_fn) is rlloss.DPOLoss
    assert type(make("sft", loss_type="nll").loss_fn) is rlloss.SFTLoss
    assert type(make("cpo", loss_type="sigmoid").loss_fn) is rlloss.CPOLoss


def test_trls_names_of_dpos_variants_are_known(make):
    assert type(make("dpo", loss_type="sppo_hard").loss_fn) is rlloss.SPPOLoss
    assert make("dpo", loss_type="sigmoid_norm").loss_fn.length_normalized


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
    assert create_rl_trainer(folder, algorithm="dpo", eval_dataset=PAIRS).evaluate() == trainer.evaluate(PAIRS)


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
