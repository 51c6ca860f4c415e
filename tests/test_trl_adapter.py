"""TRL's names: what configs hand on, what they refuse, and that each trainer is the run that it stands for."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

import rlloss
from rlloss import ScalarModel, create_rl_trainer
from rlloss.adapters import trl
from rlloss.adapters.trl import (
    AutoModelForCausalLMWithValueHead,
    CPOConfig,
    CPOTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlloss.adapters.trl.configs import _OF_ALL
from rlloss.adapters.trl.words import ELSEWHERE
from rlloss.loop import WithoutAdapters, completions, prompts, read_metrics
from rlloss.loop.run import example_order

datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SEEDS = (Path(__file__).parents[1] / "docs" / "seeds.md").read_text("utf-8")
CONFIGS = [getattr(trl, name) for name in trl.__all__ if name.endswith("Config")]
PAIRS = [{"prompt": p, "chosen": c, "rejected": r} for p in ("ab", "cde", "f") for c, r in (("aab", "h"), ("ba", "gg"))]
ANSWERS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
THUMBS = [row | {"label": i % 2 == 0} for i, row in enumerate(ANSWERS)]
PROMPTS = [{"prompt": row["prompt"]} for row in PAIRS]


def tokenizer_of(*, bos=False, side="left", pad="<pad>") -> Any:
    raw = Tokenizer(models.WordLevel({s: i for i, s in enumerate(["<pad>", "<eos>", *"abcdefgh"])}, "<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    raw.decoder = decoders.Fuse()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token=pad, padding_side=side
    )


def tiny(kind="LlamaForCausalLM", seed=0, **options) -> Any:
    torch.manual_seed(seed)
    size = {
        "vocab_size": 10,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "initializer_range": 0.2,
    }
    size |= {"num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0, "eos_token_id": 1}
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**size | options))


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer():
    return tokenizer_of()


QUIET = {"progress": False, "max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}


def share_of_a(completions):
    return [completion.count("a") / max(len(completion), 1) for completion in completions]


def test_defaults_are_those_of_the_page():
    rows = dict(re.findall(r"^\| (all|`\w+Config`) \| (.*) \|$", SEEDS, re.MULTILINE))

    def shown(defaults):
        return " ".join(f'`{k}="{x}"`' if isinstance(x, str) else f"`{k}={x}`" for k, x in defaults.items())

    assert rows == {"all": shown(_OF_ALL)} | {f"`{c.__name__}`": shown(c.defaults) for c in CONFIGS}


def test_keywords_without_a_place_are_those_of_the_page():
    section = SEEDS.partition("Keywords without a place here")[2].partition("\n\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ((?:`\w+` ?)+) \| (any|\S+(?:, \S+)*) \| (.*) \|$", section, re.MULTILINE)
    listed = {word: (values, says) for words, values, says in rows for word in re.findall(r"\w+", words)}
    assert listed == {
        word: ("any" if e.harmless is None else ", ".join(map(str, e.harmless)), e.says)
        for word, e in ELSEWHERE.items()
    }


def test_dpo_config_hands_on_its_words_and_defaults():
    config = DPOConfig(beta=0.3, num_train_epochs=1, bf16=True, max_prompt_length=512, gradient_checkpointing=True)
    assert config.algorithm == "dpo"
    assert config.parameters() == {
        "output_dir": "trainer_output",
        "num_epochs": 1,
        "batch_size": 8,
        "seed": 42,
        "eval_fraction": 0.0,
        "learning_rate": 1e-6,
        "beta": 0.3,
        "max_seq_length": 1024,
        "bf16": True,
        "max_prompt_length": 512,
        "use_gradient_checkpointing": True,
    }


def test_a_word_under_another_of_its_names_replaces_the_default():
    parameters = DPOConfig(batch_size=3, max_seq_length=7).parameters()
    assert (parameters["batch_size"], parameters["max_seq_length"]) == (3, 7)


def test_a_config_changed_later_counts():
    config: Any = KTOConfig()
    config.beta = 0.7
    assert config.parameters()["beta"] == 0.7


def test_loss_types_are_losses():
    assert DPOConfig(loss_type="ipo").algorithm == "ipo"
    assert [GRPOConfig(loss_type=name).algorithm for name in ("grpo", "dr_grpo")] == ["grpo", "dr_grpo"]
    assert CPOConfig(loss_type="simpo", cpo_alpha=0.0).algorithm == "simpo"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
@pytest.mark.unhooked
def test_an_unknown_word_raises_and_names_the_nearest(config):
    with pytest.raises(
        ValueError, match=rf"{config.__name__}: unknown keyword 'learning_rats'; did you mean 'learning_rate'"
    ):
        config(learning_rats=1e-5)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DPOConfig(push_to_hub=True), r"push_to_hub=True does nothing here: .* trainer\.save_model\(folder\)"),
        (lambda: DPOConfig(fp16=True), r"fp16=True does nothing here: .* pass bf16=True"),
        (lambda: SFTConfig(packing=True), r"packing=True does nothing here: .* padding_free=True"),
        (lambda: DPOConfig(num_epochs=1, num_train_epochs=2), "num_epochs and num_train_epochs are one parameter"),
        (lambda: DPOConfig(kl_coef=0.1), "kl_coef .* is no parameter of 'dpo'"),
        (lambda: DPOConfig(loss_type="sigmid"), "unknown loss 'sigmid'"),
        (lambda: GRPOConfig(loss_type="gspo"), r"loss_type must be one of \['grpo', 'dr_grpo', 'dapo'\], got 'gspo'"),
        (lambda: GRPOConfig(per_device_train_batch_size=6, num_generations=4), "no whole number of groups"),
        (lambda: GRPOConfig(num_generations=0), "num_generations must be an integer of at least 1, got 0"),
        (lambda: PPOConfig(batch_size=10, mini_batch_size=4), "batch_size=10 must be a multiple of mini_batch_size=4"),
        (lambda: PPOConfig(kl_penalty="full"), "kl_penalty must be one of"),
        (lambda: PPOConfig(ppo_epochs=0), "PPOConfig: ppo_epochs must be an integer of at least 1, got 0"),
        (lambda: PPOConfig(mini_batch_size=0), "PPOConfig: mini_batch_size must be an integer of at least 1, got 0"),
        (lambda: PPOConfig(kl_coef=0.05, init_kl_coef=0.4), "kl_coef and init_kl_coef both set the weight of the KL"),
        (lambda: PPOConfig(beta=0.05, kl_coef=0.4), "kl_coef and beta both set the weight of the KL"),
        (
            lambda: DPOConfig(resume_from_checkpoint="out/checkpoint-500"),
            "resume must be True, False or the checkpoint",
        ),
        (lambda: DPOConfig(eval_strategy="epoch"), "eval_strategy='epoch' does nothing here: .* pass eval_steps"),
        (lambda: DPOConfig(eval_strategy="steps"), "eval_strategy='steps' needs eval_steps"),
        (lambda: DPOConfig(save_strategy="epoch"), "save_strategy='epoch' does nothing here: .* pass save_steps"),
        (lambda: DPOConfig(optim="adafactor"), "optim='adafactor' does nothing here: the optimiser is AdamW; for anot"),
        (lambda: DPOConfig(disable_dropout=False), "disable_dropout=False does nothing here: .* dropout=True"),
        (
            lambda: SFTConfig(assistant_only_loss=False),
            "assistant_only_loss=False does nothing here: .*apply_chat_template",
        ),
        (
            lambda: SFTConfig(completion_only_loss=False),
            "completion_only_loss=False does nothing here: .* rows of 'text'",
        ),
        (lambda: GRPOConfig(top_p=0.9), "top_p=0.9 does nothing here: .* temperature"),
        (lambda: GRPOConfig(scale_rewards="rows"), "scale must be one of"),
        (lambda: GRPOConfig(num_generations=1), "group_size=1 leaves nothing to compare with"),
        (lambda: DPOConfig(warmup_ratio=0.1, warmup_steps=3), "warmup_ratio and warmup_steps both say"),
        (lambda: DPOConfig(callbacks=None, foo=None), "unknown keyword 'callbacks'"),
        (lambda: CPOConfig(loss_type="simpo"), r"cpo_alpha=1\.0 \(its default is 1\.0\).* pass cpo_alpha=0\.0"),
    ],
)
def test_what_would_be_missed_raises(make, says):
    with pytest.raises(ValueError, match=says):
        create_from(make())


def create_from(config):
    """Where a word is only looked at when the run is made."""
    create_rl_trainer(
        tiny(), None, config.algorithm, tokenizer=tokenizer_of(), reward_functions=share_of_a, **config.parameters()
    )


def test_words_without_a_place_print_one_line_each(capsys):
    GRPOConfig(use_vllm=True, vllm_mode="colocate", push_to_hub=False, report_to=None, logging_steps=1)
    assert capsys.readouterr().out.splitlines() == [
        "GRPOConfig: use_vllm, vllm_mode: completions come from rlloss's own sampler",
        "GRPOConfig: push_to_hub: nothing is uploaded",
        "GRPOConfig: report_to, logging_steps: the numbers of every step go to metrics.jsonl in output_dir",
    ]


def test_grpo_counts_prompts_where_trl_counts_completions():
    def counts(**words):
        parameters = GRPOConfig(**words).parameters()
        return tuple(parameters[name] for name in ("batch_size", "gradient_accumulation_steps", "group_size"))

    assert counts() == (1, 1, 8)
    assert counts(per_device_train_batch_size=8, num_generations=4, gradient_accumulation_steps=3) == (2, 3, 4)
    assert counts(per_device_train_batch_size=4, num_generations=8, gradient_accumulation_steps=6) == (1, 3, 8)


def test_grpo_clips_both_sides_alike_unless_told():
    def clip(**words):
        parameters = GRPOConfig(**words).parameters()
        return parameters["clip_eps_low"], parameters["clip_eps_high"]

    assert clip() == (0.2, 0.2)
    assert clip(epsilon=0.1, epsilon_high=0.3) == (0.1, 0.3)


def test_ppo_counts_answers_per_step_update_and_forward():
    parameters = PPOConfig(batch_size=64, mini_batch_size=8, gradient_accumulation_steps=2, ppo_epochs=3).parameters()
    names = ("batch_size", "gradient_accumulation_steps", "mini_batch_size", "num_ppo_epochs")
    assert [parameters[name] for name in names] == [8, 8, 16, 3]


def test_a_fixed_kl_coefficient_takes_the_place_of_the_default_controller_alone():
    def kl(**words):
        parameters = PPOConfig(**words).parameters()
        return {
            word: parameters[word] for word in ("kl_coef", "beta", "init_kl_coef", "target_kl") if word in parameters
        }

    assert kl() == {"init_kl_coef": 0.2, "target_kl": 6.0}
    assert kl(kl_coef=0.05) == {"kl_coef": 0.05}
    assert kl(beta=0.05) == {"beta": 0.05}
    assert kl(kl_coef=0.05, target_kl=6.0) == {"kl_coef": 0.05, "target_kl": 6.0}  # the controller starts there
    assert kl(init_kl_coef=0.4) == {"init_kl_coef": 0.4, "target_kl": 6.0}
    assert kl(kl_coef=None) == kl()
    config: Any = PPOConfig(kl_coef=0.05)
    config.target_kl = 3.0
    assert config.parameters()["target_kl"] == 3.0


def test_words_that_every_script_of_trl_has_are_read_or_said_to_change_nothing(capsys):
    routine = {
        "warmup_ratio": 0.1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_steps": 5,
        "per_device_eval_batch_size": 4,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch",
        "save_total_limit": 2,
        "logging_first_step": True,
        "disable_dropout": True,
    }
    parameters = DPOConfig(**routine).parameters()
    assert parameters["warmup_ratio"] == 0.1
    assert not set(routine) - {"warmup_ratio"} & set(parameters)
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert DPOConfig(eval_strategy="steps", eval_steps=5).parameters()["eval_steps"] == 5
    assert "top_k" not in GRPOConfig(top_p=1.0, top_k=0).parameters()


def test_nones_are_defaults_of_trl():
    assert RewardConfig(center_rewards_coefficient=None).parameters() == RewardConfig().parameters()
    for word in ("max_length", "max_seq_length"):
        assert DPOConfig(**{word: None}).parameters()["max_seq_length"] is None
    assert "save_steps" not in vars(DPOConfig(save_steps=None))


def test_the_text_of_sft_may_have_any_name(tokenizer):
    rows = [{"body": "abc"}, {"body": "de"}]
    trainer = SFTTrainer(tiny(), SFTConfig(dataset_text_field="body"), train_dataset=rows, processing_class=tokenizer)
    assert trainer.trainer.examples == completions([{"text": row["body"]} for row in rows], tokenizer)
    assert "column_mapping" not in SFTConfig(dataset_text_field="text").parameters()


def test_ipo_takes_means_as_trl_does():
    assert DPOConfig(loss_type="ipo").parameters()["length_normalized"] is True
    assert DPOConfig(loss_type="ipo", length_normalized=False).parameters()["length_normalized"] is False
    assert "length_normalized" not in DPOConfig().parameters()


def test_rewards_are_scaled_as_grpo_is_told():
    words = {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}
    for word, ours in words.items():
        assert GRPOConfig(scale_rewards=word).parameters()["scale_rewards"] == ours
    assert "scale_rewards" not in GRPOConfig().parameters()


def weights(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


RUNS = [
    (SFTTrainer, SFTConfig, {}, ANSWERS, "sft", {"max_seq_length": 1024}),
    (DPOTrainer, DPOConfig, {"loss_type": "sigmoid"}, PAIRS, "dpo", {"beta": 0.1}),
    (DPOTrainer, DPOConfig, {"loss_type": "ipo", "beta": 0.2}, PAIRS, "ipo", {"beta": 0.2, "length_normalized": True}),
    (KTOTrainer, KTOConfig, {"desirable_weight": 2.0}, THUMBS, "kto", {"desirable_weight": 2.0}),
    (RewardTrainer, RewardConfig, {"center_rewards_coefficient": 0.1}, PAIRS, "reward", {"center_coef": 0.1}),
    (ORPOTrainer, ORPOConfig, {"beta": 0.2}, PAIRS, "orpo", {"beta": 0.2}),
    (CPOTrainer, CPOConfig, {"cpo_alpha": 0.0}, PAIRS, "cpo", {"beta": 0.1, "nll_coef": 0.0}),
    (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}, PAIRS, "simpo", {"beta": 0.1, "margin": 0.5}),
]


@pytest.mark.parametrize(
    ("trainer", "config", "words", "rows", "name", "ours"), RUNS, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_trainer_is_the_run_that_it_stands_for(trainer, config, words, rows, name, ours, tokenizer):
    theirs = trainer(model=tiny(), args=config(**QUIET, **words), train_dataset=rows, processing_class=tokenizer)
    common = {"batch_size": 2, "learning_rate": 1e-2, "max_steps": 2, "seed": 42, "eval_fraction": 0.0}
    run = create_rl_trainer(tiny(), rows, name, tokenizer=tokenizer, progress=False, **common, **ours)
    assert theirs.train() == run.train()
    assert equal(weights(theirs.model), weights(run.session.model))
    assert theirs.evaluate(rows) == run.evaluate(rows)


def test_grpo_is_the_run_that_it_stands_for(tokenizer):
    config = GRPOConfig(num_generations=4, max_completion_length=5, **QUIET | {"per_device_train_batch_size": 8})
    theirs = GRPOTrainer(tiny(), share_of_a, config, train_dataset=PROMPTS, processing_class=tokenizer)
    common = {"batch_size": 2, "learning_rate": 1e-2, "max_steps": 2, "seed": 42, "eval_fraction": 0.0}
    common |= {"group_size": 4, "max_new_tokens": 5, "clip_eps_low": 0.2, "clip_eps_high": 0.2, "progress": False}
    run = create_rl_trainer(
        tiny(), PROMPTS, "dapo", tokenizer=tokenizer, reward_functions=share_of_a, kl_coef=0.0, **common
    )
    assert theirs.train() == run.train()
    assert equal(weights(theirs.model), weights(run.session.model))


def test_words_of_the_config_may_stand_beside_the_model(tokenizer):
    trainer = DPOTrainer(tiny(), tokenizer=tokenizer, train_dataset=PAIRS, beta=0.3, **QUIET)
    assert repr(trainer.trainer.loss_fn) == repr(rlloss.DPOLoss(beta=0.3))


def test_a_reference_is_the_one_that_was_given(tokenizer, tmp_path):
    other = tiny(seed=1)
    trainer = DPOTrainer(tiny(), other, tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    before = weights(other)
    assert trainer.train()[0]["margin"] != 0
    assert trainer.session.reference is other
    assert equal(before, weights(other))
    other.save_pretrained(tmp_path / "other")
    named = DPOTrainer(tiny(), str(tmp_path / "other"), tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    assert named.train() == trainer.trainer.history


def test_adapters_are_those_of_the_peft_config_and_the_reference_is_without_them(tokenizer):
    lora = peft.LoraConfig(r=3, lora_alpha=5, lora_dropout=0.0, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(tiny(), None, tokenizer=tokenizer, train_dataset=PAIRS, peft_config=lora, **QUIET)
    assert trainer.model.peft_config["default"] is lora
    assert isinstance(trainer.session.reference, WithoutAdapters)
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("q_proj.lora_" in name for name in trained)
    assert trainer.train()[1]["margin"] != 0


def test_a_run_goes_on_where_train_is_told_to(tokenizer):
    def trainer(**words):
        return DPOTrainer(tiny(), tokenizer=tokenizer, train_dataset=PAIRS, callbacks=None, **QUIET | words)

    whole = trainer(max_steps=4, output_dir="whole", lr_scheduler_type="constant").train()
    trainer(lr_scheduler_type="constant").train()
    assert trainer(max_steps=4, lr_scheduler_type="constant").train(resume_from_checkpoint=True) == whole[2:]


def test_evaluation_without_data_is_left_aside_with_a_line(tokenizer, capsys):
    common = {"tokenizer": tokenizer, "train_dataset": PAIRS}
    silent = DPOTrainer(tiny(), **common, eval_steps=1, **QUIET)
    assert capsys.readouterr().out == "DPOTrainer: eval_steps is left aside, for want of an eval_dataset\n"
    assert "eval/loss" not in silent.train()[0]
    for given in ({"eval_dataset": PAIRS}, {"eval_fraction": 0.5}):
        assert "eval/loss" in DPOTrainer(tiny(), **common, eval_steps=1, **given, **QUIET).train()[0]
    assert capsys.readouterr().out == ""


def test_the_tokenizer_is_that_of_the_models_own_folder(tokenizer, tmp_path):
    tiny().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert DPOTrainer(model, train_dataset=PAIRS, **QUIET).train()
    assert DPOTrainer(tmp_path / "policy", train_dataset=PAIRS, **QUIET).train()


def test_half_precision_prints_a_line(tokenizer, capsys):
    DPOTrainer(tiny().bfloat16(), tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    assert "the weights are torch.bfloat16, in which small updates are rounded away" in capsys.readouterr().out
    DPOTrainer(tiny(), tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    assert capsys.readouterr().out == ""


def test_save_model_writes_to_the_output_dir(tokenizer, tmp_path):
    trainer = SFTTrainer(tiny(), tokenizer=tokenizer, train_dataset=ANSWERS, output_dir="out", **QUIET)
    assert trainer.save_model() == "out"
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert equal(weights(saved), weights(trainer.model))


def test_a_classifier_trains_as_itself(tokenizer, tmp_path):
    model = tiny("LlamaForSequenceClassification")
    before = weights(model)
    ids = torch.tensor([[2, 3, 4, 5]])
    trainer = RewardTrainer(model=model, tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    scored = trainer.model.score(ids, torch.tensor([3]))
    torch.testing.assert_close(scored, model(ids).logits[:, 0])
    trainer.train()
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert {"score.weight", "model.embed_tokens.weight"} <= moved
    torch.testing.assert_close(trainer.model.score(ids, torch.tensor([3])), model(ids).logits[:, 0])
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(trainer.save_model(tmp_path / "rm"))
    assert equal(weights(saved), weights(model))


@pytest.mark.unhooked
def test_a_classifier_that_is_no_scalar_model_raises(tokenizer):
    two = tiny("LlamaForSequenceClassification", num_labels=2)
    with pytest.raises(ValueError, match=r"2 outputs.* or pass the causal LM"):
        RewardTrainer(model=two, tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    bert = tiny("BertForSequenceClassification")
    with pytest.raises(ValueError, match="pass the causal LM, whose backbone gets a new head"):
        RewardTrainer(model=bert, tokenizer=tokenizer, train_dataset=PAIRS, **QUIET)
    bert_tokenizer = tokenizer_of(side="right")
    bert_tokenizer.cls_token, bert_tokenizer.sep_token = "a", "b"
    with pytest.raises(ValueError, match=r"gathers its score in another way.*pass the causal LM"):
        RewardTrainer(model=bert, tokenizer=bert_tokenizer, train_dataset=PAIRS, **QUIET)
    one, lora = tiny("LlamaForSequenceClassification"), peft.LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"peft_config adapts a causal LM here.*pass the causal LM"):
        RewardTrainer(model=one, tokenizer=tokenizer, train_dataset=PAIRS, peft_config=lora, **QUIET)


def test_adapters_of_a_reward_model_are_those_of_its_causal_lm(tokenizer):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0)
    trainer = RewardTrainer(tiny(), tokenizer=tokenizer, train_dataset=PAIRS, peft_config=lora, **QUIET)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in trained if "lora" in name} == {"lora_A", "lora_B"}
    assert {name for name in trained if "lora" not in name} == {"head.weight"}


def test_rewards_are_functions_names_and_models(tokenizer, tmp_path):
    scorer = tiny("LlamaForSequenceClassification", seed=1)
    scorer.save_pretrained(tmp_path / "scorer")
    tokenizer.save_pretrained(tmp_path / "scorer")
    config = GRPOConfig(num_generations=2, max_completion_length=4, **QUIET)
    trainer = GRPOTrainer(
        tiny(),
        [share_of_a, "length", str(tmp_path / "scorer"), scorer],
        config,
        reward_processing_classes=[None, None, None, tokenizer],
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    numbers = trainer.train()[0]
    assert numbers["reward/share_of_a"] <= 1
    assert {"reward/length", "reward/reward_model"} <= set(numbers)
    rewards: Any = trainer.trainer.rewards
    by_name, loaded = rewards.functions[2:]
    assert by_name(["ab"], ["cd"]) == loaded(["ab"], ["cd"])


def ppo(tokenizer, model=None, ref_model=None, **options):
    words = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-2, "max_new_tokens": 5}
    config = PPOConfig(**words | {"progress": False, "max_steps": 2} | options.pop("words", {}))
    model = AutoModelForCausalLMWithValueHead(tiny()) if model is None else model
    return PPOTrainer(config, model, ref_model, tokenizer, **options)


def test_the_loop_of_generate_and_step_is_train(tokenizer):
    whole, loop = ppo(tokenizer, dataset=PROMPTS, reward_model=share_of_a), ppo(tokenizer)
    for trainer in (whole, loop):
        trainer.session.micro_batch_tokens = 1000  # one cut for both, and so the same rounding
    history = whole.train()
    asked, order = prompts(PROMPTS, tokenizer), example_order(len(PROMPTS), 4, 0)
    for step in range(2):
        queries = [torch.tensor(asked[i].ids) for i in order(step)]
        responses = loop.generate(queries, max_new_tokens=5)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = [torch.tensor(score) for score in share_of_a(texts)]
        stats = loop.step(queries, responses, scores)
        assert stats == {name: history[step][name] for name in stats}
    assert equal(weights(whole.model), weights(loop.model))
    assert equal(weights(whole.session.critic), weights(loop.session.critic))


def test_the_value_head_is_the_critic_and_trains(tokenizer):
    model = AutoModelForCausalLMWithValueHead(tiny())
    trainer = ppo(tokenizer, model, dataset=PROMPTS, reward_model=share_of_a)
    assert trainer.session.critic is model.critic
    assert model.critic.shares_backbone_with(model.pretrained_model)
    trainer.train()
    assert model.v_head.weight.any()
    assert model.config is model.pretrained_model.config


def test_a_value_head_is_loaded_by_name(tmp_path):
    tiny().save_pretrained(tmp_path / "policy")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy", dtype=torch.float64)
    assert model.v_head.weight.dtype is torch.float64
    assert equal(weights(model.pretrained_model.float()), weights(tiny()))


def test_ppo_without_a_value_head_gets_a_critic_of_its_own(tokenizer):
    trainer = ppo(tokenizer, tiny(), tiny(seed=1), dataset=PROMPTS, reward_model=share_of_a)
    assert isinstance(trainer.session.critic, ScalarModel)
    assert not trainer.session.critic.shares_backbone_with(trainer.model)
    assert trainer.train()[0]["sequence_kl"] != 0  # to the reference that was given


@pytest.mark.parametrize("side", ["left", "right"])
def test_queries_may_be_a_padded_rectangle_a_list_or_one(side):
    tokenizer = tokenizer_of(side=side, pad="<eos>")
    texts = ["ab", "c", "defgh"]
    rectangle = tokenizer(texts, return_tensors="pt", padding=True).input_ids
    alone = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]

    def drawn(queries):
        return [x.tolist() for x in ppo(tokenizer).generate(queries, max_new_tokens=4)]

    assert drawn(rectangle) == drawn(alone)
    single = ppo(tokenizer).generate(alone[2], max_new_tokens=4)
    assert single.ndim == 1
    assert 1 <= len(single) <= 4
    responses = ppo(tokenizer).generate(alone, max_new_tokens=4)
    steps = [ppo(tokenizer).step(queries, responses, [1.0, 0.0, 0.5]) for queries in (rectangle, alone)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_rectangle_of_responses_is_cut_to_what_was_drawn(pad):
    tokenizer = tokenizer_of(pad=pad)
    fill = tokenizer.pad_token_id
    drawn = [[5, 1], [5, 6, 7, 5, 1], [2, 3, 4]]
    rectangle = torch.tensor([row + [fill] * (5 - len(row)) for row in drawn])
    if fill == 1:
        drawn[2] = [2, 3, 4, 1]  # its first padding is its end
    queries, scores = [torch.tensor([2, 3])] * 3, [1.0, 0.0, 0.5]
    steps = [ppo(tokenizer).step(queries, given, scores) for given in (rectangle, list(map(torch.tensor, drawn)))]
    assert steps[0] == steps[1]
    with pytest.raises(ValueError, match="begins with the end of sequence and goes on"):
        ppo(tokenizer).step(queries[:1], torch.tensor([[1, 1, 5, 6]]), [1.0])


@pytest.mark.parametrize("columns", [["query", "input_ids"], ["query"], ["input_ids"], ["prompt"]])
def test_the_loop_over_the_dataloader(tokenizer, columns):
    texts = ["ab", "cde", "f", "gh", "a", "b", "cd"]
    every = {"query": texts, "prompt": texts, "input_ids": tokenizer(texts)["input_ids"]}
    rows = datasets.Dataset.from_dict({name: every[name] for name in columns})
    if columns == ["query", "input_ids"]:
        rows.set_format("torch")
    trainer = ppo(tokenizer, dataset=rows)
    seen = []
    for _ in range(2):
        for batch in trainer.dataloader:
            assert [tokenizer.decode(ids) for ids in batch["input_ids"]] == batch["query"]
            responses = trainer.generate(batch["input_ids"], max_new_tokens=3)
            batch["response"] = tokenizer.batch_decode(responses)
            stats = trainer.step(batch["input_ids"], responses, [1.0, 0.0, 0.5, 0.0])
            trainer.log_stats(stats, batch, [1.0, 0.0, 0.5, 0.0])
            seen.append(batch["query"])
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert len(next(iter(ppo(tokenizer, dataset=rows, data_collator=list).dataloader))) == 4
    with pytest.raises(ValueError, match="needs batch_size=4 rows at least, got 0"):
        _ = ppo(tokenizer).dataloader
    assert ppo(tokenizer, dataset=rows, reward_model=share_of_a).train()


def test_a_step_without_a_kl_asks_no_reference(tokenizer):
    trainer = ppo(tokenizer, words={"kl_coef": 0.0})
    assert trainer.session.reference is None
    stats = trainer.step([torch.tensor([2, 3])] * 2, [torch.tensor([4]), torch.tensor([5, 1])], [1.0, 0.0])
    assert "sequence_kl" not in stats


def test_a_learning_rate_falls_over_a_number_of_steps(tokenizer):
    for known in ({"max_steps": 3}, {"dataset": PROMPTS}):
        words = {"lr_scheduler_type": "linear", "max_steps": known.pop("max_steps", None)}
        assert ppo(tokenizer, words=words, **known).trainer.steps > 1
    with pytest.raises(ValueError, match=r"'linear' falls to 0 over a number .* pass max_steps or a dataset"):
        ppo(tokenizer, words={"lr_scheduler_type": "linear", "max_steps": None})


def test_stats_are_logged_once_per_step(tokenizer, tmp_path):
    for _ in range(2):  # a second run in the same folder begins anew
        trainer, losses = ppo(tokenizer), []
        queries = [torch.tensor([2, 3]), torch.tensor([4])]
        for _ in range(2):
            responses = trainer.generate(queries, max_new_tokens=3)
            stats = trainer.step(queries, responses, [1.0, 0.0])
            trainer.log_stats(stats, {"query": ["ab", "c"]}, [torch.tensor(1.0), torch.tensor(0.0)])
            losses.append(stats["loss"])
        lines = [(line["step"], line["loss"], line["reward"]) for line in read_metrics(tmp_path / "trainer_output")]
        assert lines == [(0, losses[0], 0.5), (1, losses[1], 0.5)]


@pytest.mark.unhooked
def test_ppo_says_what_it_needs(tokenizer):
    queries, responses = [torch.tensor([2, 3])], [torch.tensor([4])]
    trainer = ppo(tokenizer, dataset=PROMPTS)
    with pytest.raises(ValueError, match=r"train\(\) needs a reward; pass reward_model="):
        trainer.train()
    with pytest.raises(ValueError, match="1 queries, 1 responses and 2 scores"):
        trainer.step(queries, responses, [1.0, 2.0])
    with pytest.raises(ValueError, match="a response of 0 tokens; both need one at least"):
        trainer.step(queries, [torch.tensor([], dtype=torch.long)], [1.0])
    for option in ({"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.5}, {"return_prompt": True}, {"num_beams": 4}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=.* leave it out"):
            trainer.generate(queries, max_new_tokens=2, **option)
    plain = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1, "pad_token_id": 0, "temperature": 1.0}
    assert len(trainer.generate(queries, max_new_tokens=2, **plain)) == 1
    with pytest.raises(ValueError, match="needs a model, got None"):
        PPOTrainer(PPOConfig())
    shared = AutoModelForCausalLMWithValueHead(tiny())
    with pytest.raises(ValueError, match="the reference shares trainable parameters with the policy"):
        ppo(tokenizer, shared, shared)


@pytest.mark.unhooked
def test_padding_that_every_text_begins_with_cannot_be_told():
    tokenizer = tokenizer_of(bos=True, pad="<eos>")
    with pytest.raises(ValueError, match="padding of a rectangle of queries cannot be told; pass a list of tensors"):
        ppo(tokenizer).generate(torch.tensor([[1, 1, 2], [1, 2, 3]]), max_new_tokens=2)
    assert len(ppo(tokenizer).generate([torch.tensor([1, 1, 2])], max_new_tokens=2)) == 1


@pytest.mark.unhooked
def test_trainers_say_what_contradicts_itself(tokenizer):
    with pytest.raises(ValueError, match="DPOTrainer: args must be a DPOConfig, got KTOConfig"):
        DPOTrainer(tiny(), args=KTOConfig(), tokenizer=tokenizer, train_dataset=PAIRS)
    with pytest.raises(ValueError, match="DPOTrainer: beta beside a config; pass them to DPOConfig"):
        DPOTrainer(tiny(), args=DPOConfig(), beta=0.2, tokenizer=tokenizer, train_dataset=PAIRS)
    with pytest.raises(ValueError, match="args and config are one parameter"):
        DPOTrainer(tiny(), args=DPOConfig(), config=DPOConfig(), tokenizer=tokenizer, train_dataset=PAIRS)
    with pytest.raises(ValueError, match="processing_class and tokenizer are one parameter"):
        DPOTrainer(tiny(), tokenizer=tokenizer, processing_class=tokenizer, train_dataset=PAIRS)
    with pytest.raises(ValueError, match="DPOConfig: unknown keyword 'callback'"):
        DPOTrainer(tiny(), tokenizer=tokenizer, train_dataset=PAIRS, callback=[])
    with pytest.raises(
        ValueError, match="reward_processing_classes must hold one entry for each of the 2 rewards, got 1"
    ):
        GRPOTrainer(tiny(), [share_of_a, "length"], reward_processing_classes=[None], tokenizer=tokenizer)
