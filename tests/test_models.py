import gc
import os
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlloss.heads import lm_head
from rlloss.logprobs import token_logprobs
from rlloss.models import hidden_logprobs, model_hidden, model_logprobs
from rlloss.reduce import shift

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="builds tiny Hugging Face models")

# PEFT still reads a property that transformers renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

V, B, T = 101, 3, 7
WAY_OUT = r"token_logprobs\(model\(\.\.\.\)\.logits, ids\)"
SIZE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # logits of a size where a forgotten softcap or scale is plain to see
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
EXPERTS = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "experts_implementation": "eager",  # the grouped GEMM has no float64
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
OPT = {"ffn_dim": 48, "do_layer_norm_before": False, "init_std": 0.2}

MODELS = {
    "llama": ("LlamaForCausalLM", SIZE),
    "qwen3-tied": ("Qwen3ForCausalLM", SIZE | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SIZE),
    "olmo2": ("Olmo2ForCausalLM", SIZE),
    "gemma2-softcap": ("Gemma2ForCausalLM", SIZE | {"final_logit_softcapping": 2.0}),
    "gemma3-softcap": ("Gemma3ForCausalLM", SIZE | {"final_logit_softcapping": 2.0}),
    "cohere-multiplies": ("CohereForCausalLM", SIZE | {"logit_scale": 0.25}),
    "cohere2-multiplies": ("Cohere2ForCausalLM", SIZE | {"logit_scale": 0.25}),
    "granite-divides": ("GraniteForCausalLM", SIZE | {"logits_scaling": 3.0}),
    "hyperclovax-multiplies": ("HyperCLOVAXForCausalLM", SIZE | {"logits_scaling": 3.0}),
    "falcon-h1-multiplies": ("FalconH1ForCausalLM", SIZE | MAMBA | {"lm_head_multiplier": 0.3}),
    "minicpm3-divides-hidden": ("MiniCPM3ForCausalLM", SIZE | LATENT | {"dim_model_base": 16}),
    "gpt2-tied": ("GPT2LMHeadModel", GPT2),
    "phi-biased": ("PhiForCausalLM", SIZE),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZE),
    "opt": ("OPTForCausalLM", SIZE | OPT),
    "opt-projects-out": ("OPTForCausalLM", SIZE | OPT | {"word_embed_proj_dim": 16}),
    "deepseek-v3": ("DeepseekV3ForCausalLM", SIZE | EXPERTS | LATENT),
    "llama4": ("Llama4ForCausalLM", SIZE | {"num_local_experts": 2, "intermediate_size_mlp": 48}),
}


def tiny(name, dtype=torch.float32, cls=None, **overrides):
    class_name, config = MODELS[name]
    cls = cls or getattr(transformers, class_name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**(config | overrides)))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and gains start at constants that would hide a missing one
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def batch(seed=0):
    input_ids = torch.randint(4, V, (B, T), generator=torch.Generator().manual_seed(seed))
    loss_mask = torch.ones_like(input_ids, dtype=torch.bool)
    loss_mask[0, :4] = False
    return input_ids, *shift(input_ids, loss_mask)


def score(model, input_ids, ids, loss_mask, **kwargs) -> torch.Tensor:
    logprobs = model_logprobs(model, input_ids, ids, loss_mask, **kwargs).logprobs
    assert logprobs is not None
    return logprobs


def eager(model, input_ids, ids, loss_mask, temperature=1.0, **kwargs):
    """The naive formula on the model's own logits."""
    logits = model(input_ids, use_cache=False, **kwargs).logits
    logits = logits if logits.dtype is torch.float64 else logits.float()
    logprobs = (logits / temperature).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    return torch.where(loss_mask, logprobs, 0)


def gradients(model, logprobs) -> dict[str, Any]:
    model.zero_grad()
    upstream = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=logprobs.dtype)
    (upstream * logprobs).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, got, want, dtype=torch.float32):
    """Values, and the gradient of every parameter that the eager path reaches."""
    rtol, atol = (1e-9, 1e-11) if dtype is torch.float64 else (2e-4, 2e-5)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    expected = gradients(model, want)
    actual = gradients(model, got)
    assert expected
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_model_logprobs_equal_the_logits_path(name, dtype):
    model, (input_ids, ids, loss_mask) = tiny(name, dtype), batch()
    got = score(model, input_ids, ids, loss_mask, temperature=0.7)
    want = eager(model, input_ids, ids, loss_mask, temperature=0.7)
    assert got.dtype == dtype
    assert_same(model, got, want, dtype)


def test_every_statistic_equals_that_of_the_logits():
    model, (input_ids, ids, loss_mask) = tiny("gemma2-softcap"), batch()
    outputs = ("logprobs", "entropy", "logsumexp")
    got = model_logprobs(model, input_ids, ids, loss_mask, temperature=0.7, outputs=outputs)
    logits = model(input_ids).logits
    want = token_logprobs(logits, ids, temperature=0.7, loss_mask=loss_mask, outputs=outputs)
    for name in outputs:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-5)
    assert got.sum_p2 is None


def test_after_the_proof_only_the_backbone_runs_and_without_a_cache():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    lm_head(model)
    calls = []
    for module in (model, model.model, model.lm_head):
        module.register_forward_pre_hook(lambda module, args, kwargs: calls.append((module, kwargs)), with_kwargs=True)
    score(model, input_ids, ids, loss_mask)
    assert calls == [(model.model, {"input_ids": input_ids, "use_cache": False})]


def test_masked_positions_give_zero_and_their_ids_change_nothing():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    got = score(model, input_ids, ids, loss_mask)
    assert (got[~loss_mask] == 0).all()
    assert_same(model, score(model, input_ids, torch.where(loss_mask, ids, 5), loss_mask), got)


def test_a_frozen_head_gets_no_gradient_and_passes_one():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    model.lm_head.weight.requires_grad_(False)
    assert_same(model, score(model, input_ids, ids, loss_mask), eager(model, input_ids, ids, loss_mask))
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.abs().sum() > 0


# --- the two halves

HALVES = ["llama", "gpt2-tied", "gemma2-softcap", "cohere-multiplies", "phi-biased"]


def halves(model, input_ids, ids, loss_mask, *, attention_mask=None, **kwargs):
    hidden = model_hidden(model, input_ids, attention_mask=attention_mask)
    return hidden_logprobs(model, hidden, ids, loss_mask, **kwargs)


def assert_identical(model, got, want):
    assert torch.equal(got, want)
    expected, actual = gradients(model, want), gradients(model, got)
    assert expected
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", HALVES)
def test_the_halves_are_the_whole_to_the_bit(name, autocast):
    model, (input_ids, _, _) = tiny(name), batch()
    rows, real = padded(input_ids, (T, T - 2, T - 3), "left")
    ids, loss_mask = shift(rows, real)
    options = {"attention_mask": real.long(), "temperature": 0.7, "outputs": ("logprobs", "entropy")}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = halves(model, rows, ids, loss_mask & real, **options)
        want = model_logprobs(model, rows, ids, loss_mask & real, **options)
    assert_identical(model, got.logprobs + got.entropy, want.logprobs + want.entropy)


def test_hidden_states_are_what_the_head_reads_and_in_its_dtype():
    model, (input_ids, _, _) = tiny("llama", torch.bfloat16), batch()
    hidden = model_hidden(model, input_ids)
    assert hidden.dtype is torch.bfloat16
    assert torch.equal(model.lm_head(hidden), model(input_ids).logits)


def test_rows_of_the_hidden_states_are_scored_alone():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    got = hidden_logprobs(model, model_hidden(model, input_ids)[loss_mask], ids[loss_mask]).logprobs
    torch.testing.assert_close(got, score(model, input_ids, ids, loss_mask)[loss_mask], rtol=1e-6, atol=1e-6)


def test_scoring_hidden_states_proves_the_head_and_runs_no_backbone_after_it():
    unknown, (input_ids, ids, _) = tiny("llama", cls=Scales), batch()
    hidden = model_hidden(unknown, input_ids)
    with pytest.raises(ValueError, match="Scales does something to its logits"):
        hidden_logprobs(unknown, hidden, ids)
    hidden_logprobs(unknown, hidden, ids, verify_head=False)
    model, calls = tiny("llama"), []
    lm_head(model)
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    hidden_logprobs(model, hidden, ids)
    assert not calls


def test_an_unknown_head_raises_before_the_forward_is_paid_for():
    model, (input_ids, ids, _) = tiny("llama", cls=Scales), batch()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with pytest.raises(ValueError, match="does something to its logits"):
        model_logprobs(model, input_ids, ids)
    assert set(lengths) == {3}


@pytest.mark.unhooked
def test_a_model_output_in_place_of_hidden_states_raises():
    model, (input_ids, ids, _) = tiny("llama"), batch()
    with pytest.raises(ValueError, match="hidden must be a tensor, as model_hidden returns it, got BaseModelOutput"):
        hidden_logprobs(model, model.model(input_ids), ids)


def test_hidden_states_without_a_backbone_raise():
    with pytest.raises(ValueError, match="model_hidden: LlamaModel has no base_model apart from itself"):
        model_hidden(tiny("llama").model, batch()[0])


def test_hidden_states_take_no_arguments_of_the_logits_path():
    with pytest.raises(ValueError, match="model_hidden: labels has no effect"):
        model_hidden(tiny("llama"), batch()[0], labels=batch()[0])


# --- precision


def test_bfloat16_models_are_scored_in_float32_from_their_own_hidden_states():
    model, (input_ids, ids, loss_mask) = tiny("llama", torch.bfloat16), batch()
    got = score(model, input_ids, ids, loss_mask)
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    exact = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    exact = torch.where(loss_mask, exact.gather(-1, ids[..., None]).squeeze(-1), 0)
    assert got.dtype is torch.float32
    # a bfloat16 logit would be off by 1e-2 here; a CPU rounds what is left after centring
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-3)


def test_budgets_and_kept_ids_reach_the_head():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    kept = torch.stack([ids, (ids + 1) % V], -1)
    got = model_logprobs(model, input_ids, ids, loss_mask, kept_ids=kept, scratch_bytes=1 << 20, cache_bytes=99)
    logits = model(input_ids).logits.gather(-1, kept).log_softmax(-1)[..., 0]
    torch.testing.assert_close(got.logprobs, torch.where(loss_mask, logits, 0))
    wrong: Any
    for wrong in ({"scratch_bytes": -1}, {"cache_bytes": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a number of bytes, got -1"):
            model_logprobs(model, input_ids, ids, loss_mask, **wrong)


def test_a_head_in_float32_reads_a_bfloat16_backbone_in_float32():
    model, (input_ids, ids, loss_mask) = tiny("llama", torch.bfloat16), batch()
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    got, want = score(model, input_ids, ids, loss_mask), eager(model, input_ids, ids, loss_mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_autocast_gives_the_head_what_its_own_forward_would_get():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        got = score(model, input_ids, ids, loss_mask)
        hidden = model.model(input_ids, use_cache=False).last_hidden_state
    logits = hidden.bfloat16().double() @ model.lm_head.weight.bfloat16().double().T
    exact = torch.where(loss_mask, logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1), 0)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-3)
    got.sum().backward()
    assert model.lm_head.weight.grad.dtype is torch.float32


# --- padding


def padded(input_ids, lengths, side):
    real = torch.arange(T) < torch.tensor(lengths)[:, None]
    if side == "left":
        real = real.flip(-1)
    rows = torch.zeros_like(input_ids)
    for row, tokens, where, length in zip(rows, input_ids, real, lengths, strict=True):
        row[where] = tokens[:length]
    return rows, real


@pytest.mark.parametrize("name", ["llama", "gpt2-tied", "opt", "gpt-neox", "gemma3-softcap"])
def test_left_and_right_padding_agree_with_no_padding(name):
    model, (input_ids, _, _) = tiny(name, torch.float64), batch()
    lengths = (T, T - 2, T - 3)
    scores = {}
    for side in ("left", "right"):
        rows, real = padded(input_ids, lengths, side)
        ids, loss_mask = shift(rows, real)
        loss_mask &= real  # the position before a left-padded row's first token predicts nothing
        logprobs = score(model, rows, ids, loss_mask, attention_mask=real.long())
        scores[side] = [row[mask] for row, mask in zip(logprobs, loss_mask, strict=True)]
    for row, (tokens, length) in enumerate(zip(input_ids, lengths, strict=True)):
        alone = tokens[None, :length]
        ids, loss_mask = shift(alone, torch.ones_like(alone, dtype=torch.bool))
        want = eager(model, alone, ids, loss_mask)[0, :-1]
        torch.testing.assert_close(scores["left"][row], want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(scores["right"][row], want, rtol=1e-9, atol=1e-11)


def test_right_padding_needs_no_attention_mask():
    model, (input_ids, _, _) = tiny("llama", torch.float64), batch()
    rows, real = padded(input_ids, (T, T - 2, T - 3), "right")
    ids, loss_mask = shift(rows, real)
    with_mask = score(model, rows, ids, loss_mask, attention_mask=real)
    torch.testing.assert_close(with_mask, score(model, rows, ids, loss_mask), rtol=1e-9, atol=1e-11)


def test_given_positions_are_used_as_they_are():
    model, (input_ids, ids, loss_mask) = tiny("gpt2-tied"), batch()
    position_ids = torch.arange(T).expand(B, T) + 5
    mask = torch.ones_like(input_ids)
    got = score(model, input_ids, ids, loss_mask, attention_mask=mask, position_ids=position_ids)
    want = eager(model, input_ids, ids, loss_mask, attention_mask=mask, position_ids=position_ids)
    assert_same(model, got, want)
    assert not torch.allclose(want, eager(model, input_ids, ids, loss_mask))


def test_packed_rows_are_scored_by_their_positions():
    model, (input_ids, _, _) = tiny("llama", torch.float64), batch()
    cu_seqlens = torch.tensor([0, 3, T])
    packed = input_ids[0]
    ids, loss_mask = shift(packed, torch.ones(T, dtype=torch.bool), cu_seqlens)
    position_ids = torch.cat([torch.arange(3), torch.arange(T - 3)])
    got = score(model, packed[None], ids[None], loss_mask[None], position_ids=position_ids[None])
    parts = packed[None, :3], packed[None, 3:]
    alone = [eager(model, tokens, *shift(tokens, torch.ones_like(tokens, dtype=torch.bool)))[0] for tokens in parts]
    torch.testing.assert_close(got[0], torch.cat(alone), rtol=1e-9, atol=1e-11)


def test_a_backbone_that_reads_no_attention_mask_raises():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    forward = model.model.forward
    model.model.forward = lambda input_ids, use_cache=False: forward(input_ids=input_ids, use_cache=use_cache)
    with pytest.raises(ValueError, match="LlamaModel reads no attention_mask; pad on the right"):
        model_logprobs(model, input_ids, ids, loss_mask, attention_mask=torch.ones_like(input_ids), verify_head=False)


def test_a_vision_model_places_its_own_positions_and_reads_the_image():
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    text = SIZE | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    ).eval()
    row = torch.tensor([[0, 0, 5, 92, 90, 90, 90, 90, 93, 7, 8]])
    image: dict[str, Any] = {
        "pixel_values": torch.randn(16, 3 * 2 * 16),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (row == 90).int(),
        "attention_mask": (row > 0).long(),
    }
    ids, loss_mask = shift(row, row > 5)
    got, want = score(model, row, ids, loss_mask, **image), eager(model, row, ids, loss_mask, **image)
    assert_same(model, got, want)
    assert not torch.allclose(got, eager(model, row, ids, loss_mask, attention_mask=image["attention_mask"]), atol=1e-3)


# --- the proof of the head


class Offsets(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + 0.3
        return output


class Scales(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        return output


class HidesASoftcap(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 50 * torch.tanh(output.logits / 50)
        return output


class BansAToken(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 7] = -10.0
        return output


class ScalesHidden(transformers.LlamaForCausalLM):
    def forward(self, input_ids, use_cache=False, **kwargs):
        hidden = self.model(input_ids, use_cache=False, **kwargs)[0]
        return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden / 2))


class Prefixes(transformers.LlamaForCausalLM):
    def forward(self, input_ids, use_cache=False, **kwargs):
        prefixed = torch.cat([torch.full_like(input_ids[:, :1], 9), input_ids], dim=1)
        return transformers.modeling_outputs.CausalLMOutput(logits=super().forward(prefixed, **kwargs).logits[:, 1:])


class CutsTheVocabulary(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :-1]
        return output


UNKNOWN = [Offsets, Scales, HidesASoftcap, BansAToken, ScalesHidden, Prefixes, CutsTheVocabulary]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cls", UNKNOWN)
def test_an_unknown_step_between_backbone_and_logits_raises(cls, dtype):
    model, (input_ids, ids, loss_mask) = tiny("llama", dtype, cls=cls, pad_token_id=None), batch()
    for _ in range(2):  # a failed proof is not remembered as a passed one
        with pytest.raises(ValueError, match=f"{cls.__name__} does something to its logits.*{WAY_OUT}"):
            model_logprobs(model, input_ids, ids, loss_mask)
    assert not model._forward_hooks
    assert not model.model._forward_hooks


def test_a_softcap_shows_even_where_logits_are_small():
    model = tiny("llama", torch.bfloat16, cls=HidesASoftcap, initializer_range=0.02)
    assert model(torch.arange(3)[None]).logits.abs().max() < 2  # 2 of 50: the cap changes less than bfloat16 can tell
    with pytest.raises(ValueError, match="does something to its logits"):
        lm_head(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*MODELS])
def test_half_precision_raises_no_false_alarm(name, dtype):
    lm_head(tiny(name, dtype))


def test_autocast_raises_no_false_alarm_where_logits_are_cast_back():
    model = tiny("granite-divides")

    def to_float32(module, args, output):  # as accelerate does for a mixed-precision model
        output.logits = output.logits.float()

    model.register_forward_hook(to_float32)
    with torch.autocast("cpu", torch.bfloat16):
        lm_head(model)


def test_the_proof_runs_once_per_model_and_recipe():
    model = tiny("gemma2-softcap")
    calls = []
    model.register_forward_pre_hook(lambda *args: calls.append(1))
    lm_head(model)
    lm_head(model)
    assert len(calls) == 1
    model.config.final_logit_softcapping = 3.0
    assert lm_head(model).softcap == 3.0
    assert len(calls) == 2


def test_the_proof_does_not_keep_the_model_alive():
    model = tiny("llama")
    lm_head(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_dropout_is_no_false_alarm_and_its_random_stream_is_left_alone():
    model, (input_ids, ids, loss_mask) = tiny("gpt2-tied").train(), batch()
    assert model.transformer.drop.p > 0
    before = torch.get_rng_state()
    lm_head(model)
    assert torch.equal(torch.get_rng_state(), before)
    got = score(model, input_ids, ids, loss_mask)
    torch.set_rng_state(before)
    torch.testing.assert_close(got, eager(model, input_ids, ids, loss_mask), rtol=1e-5, atol=1e-5)


def test_verify_head_false_trusts_the_recipe():
    model, (input_ids, ids, loss_mask) = tiny("llama", cls=Scales), batch()
    got = score(model, input_ids, ids, loss_mask, verify_head=False)
    assert not torch.allclose(got, eager(model, input_ids, ids, loss_mask), atol=1e-3)


@pytest.mark.unhooked
def test_one_graph_compiles_after_the_proof_and_none_before():
    model, (input_ids, ids, loss_mask) = tiny("granite-divides", num_hidden_layers=1), batch()
    compiled = torch.compile(score, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="the head cannot be verified while compiling"):
        compiled(model, input_ids, ids, loss_mask)
    lm_head(model)
    mask = torch.ones_like(input_ids)
    got = compiled(model, input_ids, ids, loss_mask, attention_mask=mask)
    torch.testing.assert_close(got, score(model, input_ids, ids, loss_mask, attention_mask=mask))


def test_a_compiled_model_is_proved_by_its_original():
    def backend(*args):
        raise AssertionError("the probe's three tokens are not worth a graph")

    model = tiny("llama")
    compiled: Any = torch.compile(model, backend=backend)
    assert lm_head(compiled) == lm_head(model)


# --- what cannot be scored


def test_ids_that_are_the_input_raise():
    model, (input_ids, _, loss_mask) = tiny("llama"), batch()
    with pytest.raises(ValueError, match=r"rlloss\.shift"):
        model_logprobs(model, input_ids, input_ids, loss_mask)


@pytest.mark.parametrize("name", ["labels", "logits_to_keep"])
def test_arguments_of_the_logits_path_raise(name):
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    with pytest.raises(ValueError, match=f"{name} has no effect"):
        score(model, input_ids, ids, loss_mask, **{name: 1})


def test_an_attention_mask_of_another_shape_raises():
    model, (input_ids, ids, loss_mask) = tiny("llama"), batch()
    with pytest.raises(ValueError, match=r"attention_mask \[3, 6\] must have the shape of input_ids, \[3, 7\]"):
        model_logprobs(model, input_ids, ids, loss_mask, attention_mask=torch.ones(B, T - 1))


def test_an_encoder_decoder_raises():
    config = transformers.T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=f"T5ForConditionalGeneration is an encoder-decoder.*{WAY_OUT}"):
        lm_head(transformers.T5ForConditionalGeneration(config))


def test_a_backbone_without_a_head_raises():
    with pytest.raises(ValueError, match="LlamaModel has no output embedding"):
        lm_head(tiny("llama").model)


def test_a_head_behind_a_transform_raises():
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=V, is_decoder=True, **size))
    with pytest.raises(ValueError, match="BertLMHeadModel does something to its logits"):
        lm_head(model)


def test_a_head_that_is_not_linear_raises():
    model = tiny("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, V))
    with pytest.raises(ValueError, match=f"the head is a Sequential.*{WAY_OUT}"):
        lm_head(model)


def test_a_head_of_another_width_than_the_hidden_states_raises():
    model = tiny("llama")
    model.lm_head = nn.Linear(16, V)
    with pytest.raises(ValueError, match=f"hidden states of width 32 but the head reads 16.*{WAY_OUT}"):
        lm_head(model)


def test_a_head_without_its_weight_raises():
    model = tiny("llama")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="sharded or offloaded"):
        lm_head(model)


# --- data parallel, in a world of one process


class Scorer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return score(self.model, *args).clone()  # FSDP warns of views


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_wraps_the_scoring_and_not_the_model(process_group):
    with pytest.raises(ValueError, match="wrap a module whose forward calls model_logprobs"):
        lm_head(nn.parallel.DistributedDataParallel(tiny("llama")))
    scorer = nn.parallel.DistributedDataParallel(Scorer(tiny("llama")))
    got = gradients(scorer, scorer(*batch()))
    for name, grad in gradients(model := tiny("llama"), eager(model, *batch())).items():
        torch.testing.assert_close(got[f"module.model.{name}"], grad, rtol=2e-4, atol=2e-5)


def test_fsdp_wraps_the_scoring_and_not_the_model(process_group):
    mesh = init_device_mesh("cpu", (1,))
    model = tiny("llama")
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="sharded or offloaded"):
        lm_head(model)
    scorer = Scorer(tiny("llama"))
    for layer in scorer.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
    got = gradients(scorer, scorer(*batch()))
    for name, grad in gradients(model := tiny("llama"), eager(model, *batch())).items():
        torch.testing.assert_close(got[f"model.{name}"].full_tensor(), grad, rtol=2e-4, atol=2e-5)


# --- PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed; it is optional", exc_type=ImportError)


def adapted(peft, model, *, targets=("lm_head", "q_proj"), seed=1, name="default", **lora):
    """A LoRA model whose up-projections are not zero, as they are when training starts."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **lora)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    else:
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_B" in key and name in key:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("lm_head",), ("lm_head", "q_proj")], ids="+".join)
@pytest.mark.parametrize("name", ["llama", "cohere-multiplies", "gemma2-softcap"])
def test_lora_equals_the_logits_path(peft, name, targets, dtype):
    model = adapted(peft, tiny(name, dtype, tie_word_embeddings=False), targets=targets)
    input_ids, ids, loss_mask = batch()
    got = score(model, input_ids, ids, loss_mask)
    want = eager(model, input_ids, ids, loss_mask)
    assert_same(model, got, want, dtype)
    with model.disable_adapter():  # the reference model of LoRA training
        base = score(model, input_ids, ids, loss_mask)
        torch.testing.assert_close(base, eager(model, input_ids, ids, loss_mask), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, base, atol=1e-3)


def test_lora_dropout_on_the_head_is_that_of_the_logits_path(peft):
    model, (input_ids, ids, loss_mask) = adapted(peft, tiny("llama"), lora_dropout=0.4).train(), batch()
    lm_head(model)
    torch.manual_seed(3)
    got = score(model, input_ids, ids, loss_mask)
    torch.manual_seed(3)
    want = eager(model, input_ids, ids, loss_mask)
    assert not torch.allclose(want, eager(model, input_ids, ids, loss_mask), atol=1e-3)
    assert_same(model, got, want)


def test_the_halves_are_the_whole_under_lora_and_its_dropout(peft):
    model, (input_ids, ids, loss_mask) = adapted(peft, tiny("llama"), lora_dropout=0.4).train(), batch()
    lm_head(model)
    torch.manual_seed(3)
    got = halves(model, input_ids, ids, loss_mask).logprobs
    torch.manual_seed(3)
    assert_identical(model, got, score(model, input_ids, ids, loss_mask))


def test_lora_bias_several_adapters_and_a_merged_one(peft):
    model, (input_ids, ids, loss_mask) = tiny("phi-biased"), batch()
    model = adapted(peft, model, targets=["lm_head"], lora_bias=True)
    assert_same(model, score(model, input_ids, ids, loss_mask), eager(model, input_ids, ids, loss_mask))
    model = adapted(peft, model, targets=["lm_head"], name="second", seed=2)
    model.base_model.set_adapter(["default", "second"])
    assert len(lm_head(model).adapters) == 2
    both = eager(model, input_ids, ids, loss_mask)
    assert_same(model, score(model, input_ids, ids, loss_mask), both)
    model.merge_adapter(["default", "second"])
    assert not lm_head(model).adapters
    torch.testing.assert_close(score(model, input_ids, ids, loss_mask), both, rtol=1e-4, atol=1e-5)


def test_lora_in_bfloat16_raises_no_false_alarm(peft):
    model, (input_ids, ids, loss_mask) = adapted(peft, tiny("llama", torch.bfloat16)), batch()
    for key, parameter in model.named_parameters():
        if "lora_" in key:  # as PEFT keeps adapters by default
            parameter.data = parameter.data.float()
    got = score(model, input_ids, ids, loss_mask)
    torch.testing.assert_close(got, eager(model, input_ids, ids, loss_mask), rtol=0, atol=0.05)


def test_a_head_trained_as_a_copy_is_scored_by_the_copy(peft):
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model, (input_ids, ids, loss_mask) = peft.get_peft_model(tiny("llama"), config), batch()
    wrapper = model.get_base_model().lm_head
    wrapper.modules_to_save["default"].weight.data.mul_(1.5)
    got = score(model, input_ids, ids, loss_mask)
    assert_same(model, got, eager(model, input_ids, ids, loss_mask))
    with model.disable_adapter():
        assert lm_head(model).weight is wrapper.original_module.weight


def test_a_head_adapter_that_is_not_plain_lora_raises_even_while_it_is_zero(peft):
    size = {"r": 4, "target_modules": ["lm_head"]}
    dora = peft.get_peft_model(tiny("llama"), peft.LoraConfig(use_dora=True, **size))
    with pytest.raises(ValueError, match=f"'default' on the head is a LoRA variant.*{WAY_OUT}"):
        lm_head(dora)
    hadamard = peft.get_peft_model(tiny("llama"), peft.LoHaConfig(**size))
    with pytest.raises(ValueError, match=f"not a linear layer.*{WAY_OUT}"):
        lm_head(hadamard)
    config = peft.TrainableTokensConfig(target_modules=["lm_head"], token_indices=[5])
    tokens = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(ValueError, match=f"not a linear layer.*{WAY_OUT}"):
        lm_head(tokens)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_learned_prompt_raises(peft, kind):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=f"{kind} changes what.*{WAY_OUT}"):
        lm_head(peft.get_peft_model(tiny("llama"), config))
