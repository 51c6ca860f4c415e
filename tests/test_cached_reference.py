"""Reference log-probs that are computed once train what the reference itself would, and are never another's."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rlloss
from rlloss.loop import (
    Labelled,
    Pair,
    Session,
    Tokens,
    WithoutAdapters,
    collate,
    evaluate_offline,
    frozen_copy,
    offline_batch,
    train_offline,
    with_ref_logprobs,
)
from rlloss.loop.checkpoint import write_checkpoint


class EndOfSequence:
    eos_token_id = 1


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, num_hidden_layers=2, initializer_range=0.2, **size))


def session_of(*, reference: bool = True, **options: Any) -> Session:
    of = frozen_copy(tiny_llama(1)) if reference else None
    return Session(tiny_llama(), EndOfSequence(), reference=of, learning_rate=1e-3, **options)


def sequence(prompt: int, completion: int, seed: int) -> Tokens:
    ids = torch.randint(2, 12, (prompt + completion,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Tokens(ids, [False] * prompt + [True] * completion)


PAIRS = [Pair(sequence(2 + i, 1 + i, 10 * i), sequence(2 + i, 6 - i, 10 * i + 1)) for i in range(6)]
THUMBS = [Labelled(sequence(2, 3 + i, i), i % 2 == 0, sequence(2, 7 - i, 50 + i)) for i in range(6)]
CASES: dict[str, tuple[Any, rlloss.Loss]] = {
    "dpo": (PAIRS, rlloss.DPOLoss()),
    "ipo of means": (PAIRS, rlloss.IPOLoss(length_normalized=True)),
    "kto": (THUMBS, rlloss.KTOLoss()),
}


def step(session: Session, examples: Any, loss_fn: rlloss.Loss) -> tuple[float, torch.Tensor, dict[str, float]]:
    session.optimizer.zero_grad()
    loss, metrics = session.forward_backward(offline_batch(session, examples, loss_fn), loss_fn)
    gradients = [p.grad.flatten() for p in session.model.parameters() if p.grad is not None]
    return loss, torch.cat(gradients), rlloss.scalars(metrics)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("from_folder", [False, True], ids=["in_memory", "from_folder"])
def test_cached_log_probs_train_what_the_reference_would(name: str, from_folder: bool, tmp_path: Path) -> None:
    examples, loss_fn = CASES[name]
    session = session_of(temperature=0.8)
    whole = step(session, examples, loss_fn)
    cached = with_ref_logprobs(session, examples, tmp_path / "reference" if from_folder else None)
    if from_folder:
        session.logprobs = None  # pyright: ignore[reportAttributeAccessIssue]
        cached = with_ref_logprobs(session, examples, tmp_path / "reference")
    assert cached == examples  # but for the log-probs
    lonely = session_of(reference=False, temperature=0.8, micro_batch_tokens=20)
    loss, gradient, metrics = step(lonely, cached, loss_fn)
    assert loss == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(gradient, whole[1], rtol=1e-4, atol=1e-6)
    assert metrics == pytest.approx(whole[2], rel=1e-4, abs=1e-5)
    evaluated = evaluate_offline(lonely, cached, loss_fn)
    assert evaluated["eval/loss"] == pytest.approx(whole[0], rel=1e-5)


def test_float64_log_probs_stay_float64_and_land_on_their_tokens(tmp_path: Path) -> None:
    session = session_of()
    for model in (session.model, session.reference):
        assert model is not None
        model.double()
    rows = [tokens for pair in PAIRS for tokens in (pair.chosen, pair.rejected)]
    expected = session.logprobs(collate(rows), reference=True)
    computed, read = (with_ref_logprobs(session, PAIRS, tmp_path / "reference") for _ in range(2))
    for cached in (computed, read):
        field = offline_batch(session, cached, rlloss.DPOLoss()).fields["ref_logprobs"]
        assert field.dtype == torch.float64
        torch.testing.assert_close(field, expected, rtol=1e-12, atol=1e-14)
    tokens = read[0].chosen
    assert tokens.ref_logprobs is not None
    assert len(tokens.ref_logprobs) == len(tokens.input_ids)
    assert ((tokens.ref_logprobs != 0) == torch.tensor(tokens.loss_mask)).all()


def test_the_order_and_the_number_of_examples_are_free(tmp_path: Path) -> None:
    session = session_of()
    known = with_ref_logprobs(session, PAIRS, tmp_path / "reference")
    numbers = [4, 1, 4]
    some = with_ref_logprobs(session, [PAIRS[i] for i in numbers], tmp_path / "reference")
    for number, cached in zip(numbers, some, strict=True):
        torch.testing.assert_close(cached.rejected.ref_logprobs, known[number].rejected.ref_logprobs, rtol=0, atol=0)
    assert with_ref_logprobs(session, []) == []


def test_a_run_without_a_reference_is_the_run_with_one() -> None:
    losses = []
    for reference in (True, False):
        examples = PAIRS if reference else with_ref_logprobs(session_of(), PAIRS)
        history = train_offline(
            session_of(reference=reference), examples, rlloss.DPOLoss(), steps=4, batch_size=3, progress=False
        )
        losses.append([numbers["loss"] for numbers in history])
    assert losses[0][0] != losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def other_weights(session: Session) -> None:
    with torch.no_grad():
        session.reference.model.norm.weight[3] += 1e-6  # pyright: ignore


def other_shape(session: Session) -> None:
    session.reference.lm_head.bias = torch.nn.Parameter(torch.zeros(12))  # pyright: ignore


def other_dtype(session: Session) -> None:
    session.reference.double()  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            other_weights,
            r"made by another reference: 1 of 21 weights differ, the first is 'model\.norm\.weight'; delete",
        ),
        (other_shape, r"made by another reference: only this one has 'lm_head\.bias'; did you mean 'lm_head\.weight'"),
        (other_dtype, r"made by another reference: 21 of 21 weights differ"),
        (lambda s: setattr(s, "temperature", 0.5), r"was made with temperature=1\.0, the session has 0\.5; delete"),
        (lambda s: setattr(s, "autocast_dtype", torch.bfloat16), r"with autocast_dtype=None, .* 'torch\.bfloat16'"),
    ],
)
def test_another_reference_is_refused_by_what_differs(change: Any, match: str, tmp_path: Path) -> None:
    session = session_of()
    with_ref_logprobs(session, PAIRS, tmp_path / "reference")
    with_ref_logprobs(session, PAIRS, tmp_path / "reference")
    change(session)
    with pytest.raises(ValueError, match=match):
        with_ref_logprobs(session, PAIRS, tmp_path / "reference")


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    session = session_of()
    with_ref_logprobs(session, PAIRS, tmp_path / "reference")
    chosen = PAIRS[2].chosen
    for changed in (
        Tokens([*chosen.input_ids[:-1], 1], chosen.loss_mask),
        Tokens(chosen.input_ids, [True, *chosen.loss_mask[1:]]),
    ):
        examples = [*PAIRS[:2], Pair(changed, PAIRS[2].rejected)]
        with pytest.raises(ValueError, match=r"lacks 1 of 6 sequences, the first of which is number 5 and begins with"):
            with_ref_logprobs(session, examples, tmp_path / "reference")


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    session = session_of()
    write_checkpoint(tmp_path / "other", {"weight": torch.ones(2)}, {"step": 1})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for name, match in (("other", "holds another checkpoint, no reference log-probs"), ("notes", "is no checkpoint")):
        with pytest.raises(ValueError, match=match):
            with_ref_logprobs(session, PAIRS, tmp_path / name)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_a_session_without_a_reference_reads_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_ref_logprobs(session_of(), PAIRS, tmp_path / "reference")
    with caplog.at_level(logging.WARNING, logger="rlloss"):
        cached = with_ref_logprobs(session_of(reference=False), PAIRS, tmp_path / "reference")
    assert cached[0].chosen.ref_logprobs is not None
    assert "has no reference to compare the weights" in caplog.text
    with pytest.raises(ValueError, match="Session: needs a reference, got None"):
        with_ref_logprobs(session_of(reference=False), PAIRS)
    with pytest.raises(ValueError, match="2 of 4 sequences have the reference's log-probs; pass all examples"):
        offline_batch(session_of(), [cached[0], PAIRS[1]], rlloss.DPOLoss())


# PEFT still reads a property that transformers renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_what_the_session_trains_is_no_part_of_the_reference(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with_adapters = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    session = Session(with_adapters, EndOfSequence(), reference=WithoutAdapters(with_adapters), learning_rate=1e-1)
    first = with_ref_logprobs(session, PAIRS, tmp_path / "reference")
    before = copy.deepcopy(with_adapters.state_dict())
    step(session, first, rlloss.DPOLoss())
    session.optim_step()
    assert any(not torch.equal(x, before[name]) for name, x in with_adapters.state_dict().items())
    with_ref_logprobs(session, PAIRS, tmp_path / "reference")
