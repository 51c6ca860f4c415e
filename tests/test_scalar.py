import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

from rlloss.heads import lm_head
from rlloss.models import hidden_logprobs, model_hidden, model_logprobs
from rlloss.reduce import shift
from rlloss.scalar import ScalarModel

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="builds tiny Hugging Face models")

# PEFT still reads a property that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

V, B, T, H = 101, 3, 7, 32
SIZE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
GPT2 = {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
OPT = {"ffn_dim": 48, "do_layer_norm_before": False, "init_std": 0.2, "word_embed_proj_dim": 16}
MODELS = {
    "llama": ("LlamaForCausalLM", SIZE),
    "llama-tied": ("LlamaForCausalLM", SIZE | {"tie_word_embeddings": True}),
    "gpt2-tied": ("GPT2LMHeadModel", GPT2),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3ForCausalLM", SIZE | {"tie_word_embeddings": False}),
    "qwen3-tied": ("Qwen3ForCausalLM", SIZE | {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", SIZE),
    "opt-projects-out": ("OPTForCausalLM", SIZE | OPT),
}


def tiny(name="llama", dtype=torch.float32, **overrides):
    class_name, config = MODELS[name]
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    return cls(cls.config_class(**(config | overrides))).to(dtype).eval()


def scalar(model, *, seed=1, **options) -> ScalarModel:
    """A scalar model whose head is not zero, as it is when training starts."""
    torch.manual_seed(seed)
    wrapped = ScalarModel(model, **options)
    for parameter in wrapped.head.parameters():
        parameter.data = torch.randn_like(parameter)
    return wrapped


def tokens(seed=0) -> torch.Tensor:
    return torch.randint(4, V, (B, T), generator=torch.Generator().manual_seed(seed))


def by_hand(model, weight, bias, input_ids, **kwargs) -> torch.Tensor:
    """weight . hidden + bias in float64, on the last hidden states that the causal LM itself reports."""
    hidden = model(input_ids, output_hidden_states=True, use_cache=False, **kwargs).hidden_states[-1]
    return (hidden.double() * weight.double()[0]).sum(-1) + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "opt-projects-out"])
def test_row_t_is_the_head_on_the_hidden_state_of_token_t(name, dtype):
    model, input_ids = tiny(name, dtype), tokens()
    critic = scalar(model)
    got = critic(input_ids)
    assert got.shape == (B, T)
    assert got.dtype is dtype
    want = by_hand(model, critic.head.weight, critic.head.bias, input_ids)
    rtol = 1e-10 if dtype is torch.float64 else 2e-5
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol)


def test_a_token_changes_its_own_scalar_and_later_ones_alone():
    critic, input_ids = scalar(tiny()), tokens()
    changed = input_ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    same = torch.isclose(critic(input_ids), critic(changed), rtol=1e-5, atol=1e-5)
    assert same[:, :4].all()
    assert not same[:, 4:].any()


def test_it_starts_at_zero_and_the_first_step_moves_it_the_right_way():
    critic, input_ids = ScalarModel(tiny()), tokens()
    optimizer = torch.optim.SGD(critic.parameters(), lr=1e-3)
    values = critic(input_ids)
    assert (values == 0).all()
    (values - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert (critic.head.weight != 0).all()
    after = critic(input_ids)
    assert (after - 1).square().mean() < 1
    after.sum().backward()  # the trunk learns from the second step on
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.backbone.parameters())


def test_a_gradient_reaches_trunk_and_head_and_nothing_else():
    model, input_ids = tiny(), tokens()
    critic = scalar(model)
    critic(input_ids).square().sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert model.lm_head.weight.grad is None


# --- what belongs to it


@pytest.mark.parametrize("name", MODELS)
def test_its_parameters_are_the_backbone_and_the_head(name):
    model = tiny(name)
    critic = scalar(model)
    assert {key.split(".")[0] for key in critic.state_dict()} == {"backbone", "head"}
    assert {key for key in critic.state_dict() if key.startswith("head.")} == {"head.weight", "head.bias"}
    ids = {id(p) for p in critic.parameters()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (id(model.get_output_embeddings().weight) in ids) == tied
    assert ids >= {id(p) for p in model.parameters() if p is not model.get_output_embeddings().weight}


def test_a_state_dict_restores_it():
    critic, other = scalar(tiny()), scalar(tiny(initializer_range=0.1), seed=2)
    input_ids = tokens()
    assert not torch.allclose(critic(input_ids), other(input_ids))
    other.load_state_dict(critic.state_dict())
    assert torch.equal(critic(input_ids), other(input_ids))


def test_no_bias_where_none_is_wanted():
    critic = scalar(tiny(), bias=False)
    assert critic.head.bias is None
    want = by_hand(tiny(), critic.head.weight, torch.zeros(1), tokens())
    torch.testing.assert_close(critic(tokens()).double(), want, rtol=2e-5, atol=2e-5)


def test_the_backbone_is_shared_with_the_model_given_and_with_no_copy():
    model, input_ids = tiny(), tokens()
    shared, own = scalar(model), scalar(copy.deepcopy(model))
    assert shared.shares_backbone_with(model)
    assert not own.shares_backbone_with(model)
    assert scalar(model, seed=2).shares_backbone_with(model)
    before = own(input_ids)
    assert torch.equal(shared(input_ids), before)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert torch.equal(own(input_ids), before)
    assert not torch.allclose(shared(input_ids), before, atol=1e-3)


def test_the_width_is_that_of_the_hidden_states_where_the_model_projects_them():
    critic = scalar(tiny("opt-projects-out"))
    assert critic.head.in_features == 16
    assert critic(tokens()).shape == (B, T)


def test_without_an_output_embedding_the_config_knows_the_width():
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZE))
    assert model.get_output_embeddings() is None
    critic = scalar(model)
    assert critic.head.in_features == H
    assert critic(tokens()).shape == (B, T)


def test_one_forward_serves_logprobs_and_values():
    model, input_ids = tiny("gpt2", torch.float64), tokens()  # Llama's norm rounds gradients to float32
    critic, runs = scalar(model), []
    ids, loss_mask = shift(input_ids, torch.ones_like(input_ids, dtype=torch.bool))
    lm_head(model)

    def gradients(*losses) -> dict[str, Any]:
        nn.ModuleList([model, critic]).zero_grad()
        torch.stack(losses).sum().backward()
        return {key: p.grad for key, p in nn.ModuleList([model, critic]).named_parameters()}

    apart = gradients(model_logprobs(model, input_ids, ids, loss_mask).logprobs.sum(), critic(input_ids).square().sum())
    model.transformer.register_forward_pre_hook(lambda *args: runs.append(1))
    hidden = model_hidden(model, input_ids)
    logprobs, values = hidden_logprobs(model, hidden, ids, loss_mask).logprobs, critic.scalars(hidden)
    assert len(runs) == 1
    for name, grad in gradients(logprobs.sum(), values.square().sum()).items():
        torch.testing.assert_close(grad, apart[name], rtol=1e-9, atol=1e-11)


# --- padding


@pytest.mark.parametrize("name", MODELS)
def test_left_right_and_extra_padding_agree_at_real_tokens(name):
    critic, input_ids = scalar(tiny(name)), tokens()
    lengths = (T, T - 2, T - 3)
    alone = [critic(row[None, :length])[0] for row, length in zip(input_ids, lengths, strict=True)]
    for width, left in [(T, True), (T, False), (T + 4, True), (T + 4, False)]:
        rows, real = torch.zeros(B, width, dtype=torch.long), torch.zeros(B, width, dtype=torch.bool)
        for i, length in enumerate(lengths):
            where = slice(width - length, width) if left else slice(0, length)
            rows[i, where], real[i, where] = input_ids[i, :length], True
        values = critic(rows, attention_mask=real.long())
        last = torch.tensor([width - 1] * B) if left else torch.tensor(lengths) - 1
        scores = critic.score(rows, last, attention_mask=real.long())
        for i, want in enumerate(alone):
            torch.testing.assert_close(values[i][real[i]], want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(scores[i], want[-1], rtol=1e-5, atol=1e-5)


def test_given_positions_are_used_as_they_are():
    model, input_ids = tiny("gpt2"), tokens()
    critic, positions = scalar(model), torch.arange(T).expand(B, T) + 5
    got = critic(input_ids, position_ids=positions)
    want = by_hand(model, critic.head.weight, critic.head.bias, input_ids, position_ids=positions)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(got, critic(input_ids), atol=1e-3)


# --- precision


def assert_head_in_float32(critic, hidden, got):
    exact = (hidden.double() * critic.head.weight.double()[0]).sum(-1) + critic.head.bias.double()
    assert got.dtype is torch.float32
    # rounded to bfloat16 anywhere in the head, it would be off by 1e-3
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_backbone_has_a_head_and_scalars_in_float32():
    model, input_ids = tiny(dtype=torch.bfloat16), tokens()
    critic = scalar(model)
    assert critic.head.weight.dtype is torch.float32
    assert_head_in_float32(critic, model_hidden(model, input_ids), critic(input_ids))


def test_autocast_reaches_the_backbone_and_not_the_head():
    model, input_ids = tiny(), tokens()
    critic = scalar(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, hidden = critic(input_ids), model_hidden(model, input_ids)
        last = critic.score(input_ids, torch.full((B,), T - 1))
    assert_head_in_float32(critic, hidden, got)
    assert_head_in_float32(critic, hidden[:, -1], last)
    assert not torch.allclose(got, critic(input_ids), rtol=1e-5, atol=1e-5)


def test_a_head_cast_to_bfloat16_still_computes_in_float32():
    critic, input_ids = scalar(tiny()).bfloat16(), tokens()
    assert_head_in_float32(critic, critic.backbone(input_ids, use_cache=False)[0], critic(input_ids))


# --- the score of a sequence


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_a_score_is_the_scalar_at_the_index_given(dtype):
    critic, input_ids = scalar(tiny()), tokens()
    last_index = torch.tensor([2, T - 1, 0], dtype=dtype)
    values, got = critic(input_ids), critic.score(input_ids, last_index)
    assert got.shape == (B,)
    want = torch.stack([values[0, 2], values[1, T - 1], values[2, 0]])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_pad_token_within_the_text_is_read_as_any_other():
    critic, input_ids = scalar(tiny()), tokens()
    input_ids[:, 3] = 0  # the config's pad token
    last_index = torch.full((B,), T - 1)
    torch.testing.assert_close(critic.score(input_ids, last_index), critic(input_ids)[:, -1], rtol=1e-6, atol=1e-6)


def test_an_index_of_padding_scores_nan_and_the_other_rows_their_scalar():
    critic, input_ids = scalar(tiny()), tokens()
    real = torch.ones(B, T, dtype=torch.bool)
    real[1, 4:] = False
    got = critic.score(input_ids, torch.tensor([T - 1, 4, 3]), attention_mask=real)
    assert got.isnan().tolist() == [False, True, False]
    assert not critic.score(input_ids, torch.tensor([T - 1, 3, 3]), attention_mask=real.float()).isnan().any()


def test_an_index_outside_the_row_raises():
    critic = scalar(tiny())
    for outside in (-1, T):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            critic.score(tokens(), torch.tensor([0, outside, 0]))


# --- PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed; it is optional", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_an_adapted_model_gives_its_adapted_backbone(peft, name):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(tiny(name), config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data = torch.randn_like(parameter)
    critic, input_ids = scalar(model), tokens()
    assert critic.shares_backbone_with(model)
    assert critic.head.in_features == H
    assert not any("lm_head" in key for key, _ in critic.named_parameters())
    got = critic(input_ids)
    want = by_hand(model, critic.head.weight, critic.head.bias, input_ids)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    got.sum().backward()
    grads = {key for key, p in critic.named_parameters() if p.grad is not None}
    adapters = {key for key, _ in critic.named_parameters() if "lora_" in key}
    assert len(adapters) == 4
    assert grads == adapters | {"head.weight", "head.bias"}
    with model.disable_adapter():
        torch.testing.assert_close(critic(input_ids), scalar(tiny(name))(input_ids), rtol=1e-5, atol=1e-5)


def test_a_head_trained_as_a_copy_knows_the_width(peft):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    critic = scalar(peft.get_peft_model(tiny(), config))
    assert critic.head.in_features == H
    assert not any("modules_to_save" in key for key, _ in critic.named_parameters())


def test_a_learned_prompt_raises(peft):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"ScalarModel: PromptTuningConfig changes what.*get_base_model\(\)"):
        ScalarModel(peft.get_peft_model(tiny(), config))


# --- compiled and distributed


@pytest.mark.unhooked
def test_it_compiles_to_one_graph_and_takes_a_compiled_model():
    model, input_ids = tiny(num_hidden_layers=1), tokens()
    critic = scalar(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert critic.shares_backbone_with(compiled)
    assert ScalarModel(compiled).shares_backbone_with(model)
    one_graph = torch.compile(critic, fullgraph=True, backend="eager")
    mask = torch.ones_like(input_ids)
    torch.testing.assert_close(one_graph(input_ids, attention_mask=mask), critic(input_ids, attention_mask=mask))


def test_ddp_wraps_it(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        critic, plain = nn.parallel.DistributedDataParallel(scalar(tiny())), scalar(tiny())
        for module in (critic, plain):
            module(tokens()).square().sum().backward()
        for (name, got), want in zip(critic.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        torch.distributed.destroy_process_group()


# --- what cannot be a scalar model, and what it cannot read


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_a_backbone_alone_raises(compiled):
    backbone: Any = torch.compile(tiny().model, backend="eager") if compiled else tiny().model
    with pytest.raises(ValueError, match=r"ScalarModel: LlamaModel has no base_model.*\(\.\.\.ForCausalLM\)"):
        ScalarModel(backbone)


def test_an_encoder_decoder_raises():
    config = transformers.T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder, .*decoder-only"):
        ScalarModel(transformers.T5ForConditionalGeneration(config))


def test_an_unknown_width_raises():
    model = nn.Module()
    model.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"neither an output embedding nor config\.hidden_size.*ForCausalLM"):
        ScalarModel(model)


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("last_index", "message"),
    [
        (torch.zeros(B), r"last_index must be an int32 or int64 tensor \[B\], got torch\.float32"),
        (torch.zeros(B, dtype=torch.bool), r"last_index must be an int32 or int64 tensor \[B\], got torch\.bool"),
        ([0] * B, r"last_index must be an int32 or int64 tensor \[B\], got list"),
        (torch.zeros(B, 1, dtype=torch.long), r"last_index must be \[B\] = \[3\].*got \[3, 1\]"),
        (torch.zeros(B - 1, dtype=torch.long), r"last_index must be \[B\] = \[3\].*got \[2\]"),
        (torch.zeros(B, dtype=torch.long, device="meta"), "last_index is on meta but input_ids is on cpu"),
    ],
    ids=["float", "bool", "list", "column", "short", "elsewhere"],
)
def test_an_index_of_another_kind_raises(last_index, message):
    with pytest.raises(ValueError, match=f"ScalarModel: {message}"):
        ScalarModel(tiny()).score(tokens(), last_index)


@pytest.mark.parametrize("shape", [(B, T - 1), (B, 1, T, T)], ids=["short", "4-D"])
def test_a_score_under_a_mask_of_another_shape_raises(shape):
    with pytest.raises(ValueError, match=r"ScalarModel: attention_mask .* must have the shape of input_ids, \[3, 7\]"):
        ScalarModel(tiny()).score(tokens(), torch.zeros(B, dtype=torch.long), attention_mask=torch.ones(shape))


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("hidden", "got"),
    [
        (torch.zeros(B, T, H + 1), r"torch\.float32 \[3, 7, 33\]"),
        (torch.zeros(B, T, H, dtype=torch.long), r"torch\.int64 \[3, 7, 32\]"),
        ((torch.zeros(B, T, H),), "tuple"),
    ],
    ids=["wide", "integer", "tuple"],
)
def test_hidden_states_of_another_kind_raise(hidden, got):
    with pytest.raises(ValueError, match=rf"ScalarModel: hidden must be a float tensor of width 32, .*got {got}"):
        ScalarModel(tiny()).scalars(hidden)


def test_arguments_of_the_logits_path_raise():
    with pytest.raises(ValueError, match="ScalarModel: labels has no effect without logits"):
        ScalarModel(tiny())(tokens(), labels=tokens())
