"""Rows end to end give what padded rows give, and models that would mix them are refused."""

import copy
from typing import Any

import pytest
import torch
import transformers

import rlloss
from rlloss.heads import backbone_of
from rlloss.loop import Labelled, Pair, Session, Tokens, WithoutAdapters, collate, frozen_copy, offline_batch
from rlloss.loop.padding_free import check_padding_free, packed_hidden
from rlloss.models import backbone_hidden

V = 31
SIZE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
GPT: dict[str, Any] = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LINEAR = {
    "shared_expert_intermediate_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZE),
    "qwen3": ("Qwen3ForCausalLM", SIZE),
    "qwen3-experts": ("Qwen3MoeForCausalLM", SIZE | EXPERTS),
    "gemma3-windows": ("Gemma3ForCausalLM", SIZE | {"sliding_window": 3, "num_hidden_layers": 6}),
    "gpt2-absolute-positions": ("GPT2LMHeadModel", GPT | {"initializer_range": 0.3}),
}
MIXES = "lets a row read the row before it"
BLOOM = {"vocab_size": V, "hidden_size": 16, "n_layer": 1, "n_head": 4}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 24}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomForCausalLM", BLOOM, "BloomModel reads no position_ids"),
    "gpt": ("OpenAIGPTLMHeadModel", GPT, f"OpenAIGPTModel .*{MIXES}"),
    "opt": ("OPTForCausalLM", SIZE | {"ffn_dim": 24}, f"OPTModel .*{MIXES}"),
    "linear attention": ("Qwen3NextForCausalLM", SIZE | EXPERTS | LINEAR, f"Qwen3NextModel .*{MIXES}"),
    "chunks": ("Llama4ForCausalLM", SIZE | LLAMA4, "has attention_chunk_size=8192, so that"),
    "an index": ("DeepseekV32ForCausalLM", SIZE | LATENT | {"n_routed_experts": 2}, "has index_topk=2048, so that"),
}
ATTENTION = ["eager", "sdpa"]


class EndOfSequence:
    eos_token_id = 1


def tiny(name: str, attention: str = "sdpa", seed: int = 0) -> Any:
    class_name, config = (ALIKE | REFUSED)[name][:2]  # pyright: ignore[reportOperatorIssue]
    cls: Any = getattr(transformers, class_name)
    torch.manual_seed(seed)
    made = cls.config_class(**config)
    made._attn_implementation = attention
    return cls(made).eval()


def sequence(prompt: int, completion: int, seed: int) -> Tokens:
    ids = torch.randint(2, V, (prompt + completion,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Tokens(ids, [False] * prompt + [True] * completion)


ROWS = [sequence(1 + i % 3, 1 + (5 * i) % 7, i) for i in range(6)]


def gradients(session: Session) -> dict[str, torch.Tensor]:
    modules = {"model": session.model, "critic": session.critic or torch.nn.Module()}
    named = ((f"{part}.{name}", p) for part, m in modules.items() for name, p in m.named_parameters())
    return {name: p.grad for name, p in named if p.grad is not None}


def assert_alike(padded: Session, packed: Session, batch: Any, loss_fn: rlloss.Loss) -> None:
    (loss, metrics), (packed_loss, packed_metrics) = (s.forward_backward(batch, loss_fn) for s in (padded, packed))
    assert packed_loss == pytest.approx(loss, rel=1e-9)
    assert rlloss.scalars(packed_metrics) == pytest.approx(rlloss.scalars(metrics), rel=1e-6, abs=1e-8)
    expected, actual = gradients(padded), gradients(packed)
    assert expected.keys() == actual.keys()
    assert max(float(grad.abs().max()) for grad in expected.values()) > 1e-4
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", ALIKE)
def test_rows_end_to_end_are_the_padded_rows(name: str, attention: str) -> None:
    model = tiny(name, attention)
    batch, backbone = collate(ROWS), backbone_of(model)
    packed = packed_hidden(backbone, batch.input_ids, batch.attention_mask)
    padded = backbone_hidden("test", backbone, batch.input_ids, attention_mask=batch.attention_mask)
    real = batch.attention_mask
    torch.testing.assert_close(packed[real], padded[real], rtol=1e-4, atol=1e-5)
    assert (packed[~real] == 0).all()


def policy(reference: bool = False, **options: Any) -> Session:
    model = tiny("llama").double()
    critic = None
    if options.pop("critic", False):
        critic = rlloss.ScalarModel(copy.deepcopy(model) if options.pop("own_trunk") else model)
        torch.nn.init.normal_(critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    of = frozen_copy(tiny("llama", seed=1).double()) if reference else None
    return Session(model, EndOfSequence(), reference=of, critic=critic, **options)


@pytest.mark.parametrize("tokens", [10_000, 16])
@pytest.mark.parametrize("own_trunk", [True, False], ids=["own_trunk", "shared_trunk"])
def test_a_policy_and_its_critic_train_alike(own_trunk: bool, tokens: int) -> None:
    options = {"critic": True, "own_trunk": own_trunk, "micro_batch_tokens": tokens}
    padded, packed = policy(**options), policy(padding_free=True, **options)
    batch, draw = collate(ROWS), torch.Generator().manual_seed(3)
    for name in ("old_logprobs", "old_values", "returns", "advantages"):
        batch.fields[name] = 0.3 * torch.randn(batch.ids.shape, generator=draw, dtype=torch.float64)
    batch.fields["old_logprobs"] += padded.logprobs(batch)
    policy_loss = rlloss.PPOLoss(entropy_coef=0.1)
    assert_alike(padded, packed, batch, rlloss.ActorCriticLoss(policy=policy_loss, value=rlloss.ValueLoss()))
    torch.testing.assert_close(packed.logprobs(batch), padded.logprobs(batch), rtol=1e-10, atol=1e-12)
    real = batch.attention_mask
    torch.testing.assert_close(packed.values(batch)[real], padded.values(batch)[real], rtol=1e-10, atol=1e-12)


PAIRS = [Pair(*ROWS[:2]), Pair(*ROWS[2:4]), Pair(*ROWS[4:])]
THUMBS = [Labelled(ROWS[i], i % 2 == 0, ROWS[5 - i]) for i in range(6)]


@pytest.mark.parametrize(
    ("examples", "loss_fn"),
    [
        (ROWS, rlloss.SFTLoss()),
        (PAIRS, rlloss.DPOLoss()),
        (THUMBS, rlloss.KTOLoss()),
        (ROWS, rlloss.ConservativePPOLoss(conservative_coef=5.0)),
    ],
    ids=["sft", "dpo", "kto", "through the waist"],
)
def test_every_family_trains_alike(examples: Any, loss_fn: rlloss.Loss) -> None:
    padded, packed = (policy(reference=True, padding_free=free, micro_batch_tokens=24) for free in (False, True))
    if loss_fn.family == "policy":
        batch = collate(examples)
        batch.fields["advantages"] = torch.linspace(-1, 1, 6, dtype=torch.float64)
        batch.fields["old_logprobs"] = padded.logprobs(batch) - 0.2 * batch.loss_mask
        batch.fields["ref_logprobs"] = padded.logprobs(batch, reference=True)
    else:
        batch, other = (offline_batch(session, examples, loss_fn) for session in (padded, packed))
        for name, field in batch.fields.items():
            torch.testing.assert_close(other.fields[name], field, rtol=1e-10, atol=1e-12)
    assert_alike(padded, packed, batch, loss_fn)


def test_a_reward_model_trains_alike() -> None:
    def session_of(padding_free: bool) -> Session:
        model = rlloss.ScalarModel(tiny("llama").double(), bias=False)
        torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
        return Session(model, EndOfSequence(), padding_free=padding_free, micro_batch_tokens=24)

    padded, packed = session_of(False), session_of(True)
    batch = offline_batch(padded, PAIRS, rlloss.BradleyTerryLoss())
    assert_alike(padded, packed, batch, rlloss.BradleyTerryLoss())


def test_under_autocast_every_weight_gets_its_gradient() -> None:
    packed = Session(tiny("llama"), EndOfSequence(), padding_free=True, autocast_dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        packed.model.set_attn_implementation("eager")  # which is proved when it is first used, inside the region
        packed.forward_backward(offline_batch(packed, ROWS, rlloss.SFTLoss()), rlloss.SFTLoss())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in packed.model.parameters())


# PEFT still reads a property that transformers renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_and_a_reference_without_them_are_packed() -> None:
    peft = pytest.importorskip("peft")

    def session_of(padding_free: bool) -> Session:
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny("llama").double(), lora)
        return Session(model, EndOfSequence(), reference=WithoutAdapters(model), padding_free=padding_free)

    padded, packed = session_of(False), session_of(True)
    batch, other = (offline_batch(session, PAIRS, rlloss.DPOLoss()) for session in (padded, packed))
    torch.testing.assert_close(other.fields["ref_logprobs"], batch.fields["ref_logprobs"], rtol=1e-10, atol=1e-12)
    assert_alike(padded, packed, batch, rlloss.DPOLoss())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_mix_rows_are_refused(name: str, dtype: torch.dtype) -> None:
    model = tiny(name, "eager").to(dtype)
    with pytest.raises(
        ValueError, match=rf"padding_free: .*{REFUSED[name][2]}.*pass Session\(\.\.\., padding_free=False"
    ):
        Session(model, EndOfSequence(), padding_free=True)
    Session(model, EndOfSequence())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ATTENTION)
def test_models_that_keep_rows_apart_are_accepted(attention: str, dtype: torch.dtype) -> None:
    for name in ALIKE:
        model = tiny(name, attention).to(dtype)
        model.train()
        before = copy.deepcopy(model.state_dict())
        check_padding_free(model)
        assert all(part.training for part in model.modules())
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_what_cannot_be_proved_is_refused() -> None:
    model = tiny("llama")
    for layer in model.model.layers:  # attention whose output is nothing, so that it does not show what it reads
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(ValueError, match="shows no gradient within a row, so that it cannot be proved"):
        check_padding_free(model)


def test_positions_that_run_on_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2-absolute-positions")
    positions = model.transformer.wpe.forward
    monkeypatch.setattr(model.transformer.wpe, "forward", lambda ids: positions(torch.arange(ids.shape[1])[None]))
    with pytest.raises(ValueError, match="makes another thing of a row behind a row than of the row alone"):
        check_padding_free(model)
