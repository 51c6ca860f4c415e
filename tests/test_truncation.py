"""Sequences cut at either end: what is kept, what stays trained, what is counted."""

from typing import Any

import pytest

from rlloss.loop import Pair, Tokens, completions, labelled, pairs
from rlloss.loop.truncation import Limits, NothingTrainedError, truncated


def letters(texts: Any, add_special_tokens: bool) -> dict[str, list[list[int]]]:
    """A tokenizer of characters without a beginning of sequence."""
    return {"input_ids": [[ord(c) for c in text] for text in texts]}


letters.eos_token_id = 0  # pyright: ignore[reportFunctionMemberAccess]
END = "\0"


def text(tokens: Tokens) -> tuple[str, str]:
    """The untrained beginning and the trained end."""
    assert len(tokens.input_ids) == len(tokens.loss_mask)
    first = tokens.loss_mask.index(True)
    assert all(tokens.loss_mask[first:])
    return "".join(map(chr, tokens.input_ids[:first])), "".join(map(chr, tokens.input_ids[first:]))


def texts(pair: Pair) -> list[tuple[str, str]]:
    return [text(pair.chosen), text(pair.rejected)]


ROWS = [{"prompt": "abcdef", "completion": "12345"}, {"prompt": "ab", "completion": "1"}]


def test_keep_start_cuts_the_completion_and_keep_end_the_prompt() -> None:
    assert [text(t) for t in completions(ROWS, letters)] == [("abcdef", "12345\0"), ("ab", "1\0")]
    assert text(completions(ROWS, letters, max_length=9)[0]) == ("abcdef", "123")
    cut = completions(ROWS, letters, max_length=9, truncation_mode="keep_end")
    assert [text(t) for t in cut] == [("def", "12345\0"), ("ab", "1\0")]
    # a completion that alone is too long loses its beginning, and the token that then nothing predicts counts as lost
    assert text(completions(ROWS, letters, max_length=4, truncation_mode="keep_end")[0]) == ("", "345\0")


def test_a_prompt_keeps_its_end() -> None:
    assert text(completions(ROWS, letters, max_prompt_length=2)[0]) == ("ef", "12345\0")
    assert text(completions(ROWS, letters, max_prompt_length=2, max_length=5)[0]) == ("ef", "123")
    both = completions(ROWS, letters, max_prompt_length=4, max_length=8, truncation_mode="keep_end")
    assert text(both[0]) == ("ef", "12345\0")
    assert completions(ROWS, letters, max_prompt_length=6, max_length=12) == completions(ROWS, letters)


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [r.getMessage() for r in caplog.records]
    caplog.clear()
    return messages


def test_cut_rows_and_lost_trained_tokens_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    completions(ROWS, letters, max_length=12)
    assert messages_of(caplog) == []
    completions(ROWS, letters, max_length=9)
    assert messages_of(caplog) == [
        "completions: 1 of 2 sequences are longer than max_length=9 and were cut (longest: 12 tokens); "
        "3 of 8 trained tokens were lost"
    ]
    completions(ROWS, letters, max_length=9, truncation_mode="keep_end")
    assert messages_of(caplog)[0].endswith("(longest: 12 tokens); 0 of 8 trained tokens were lost")
    completions(ROWS, letters, max_length=4, truncation_mode="keep_end")
    assert messages_of(caplog)[0].endswith("(longest: 12 tokens); 3 of 8 trained tokens were lost")
    completions(ROWS, letters, max_prompt_length=1, max_length=6)
    assert messages_of(caplog) == [
        "completions: 2 of 2 prompts are longer than max_prompt_length=1 and were cut (longest: 6 tokens)",
        "completions: 1 of 2 sequences are longer than max_length=6 and were cut (longest: 7 tokens); "
        "1 of 8 trained tokens were lost",
    ]


PAIR = {"prompt": "abcdef", "chosen": "1234", "rejected": "5"}


def test_both_sides_of_a_pair_keep_one_prompt(caplog: pytest.LogCaptureFixture) -> None:
    [pair] = pairs([PAIR], letters, max_length=8, truncation_mode="keep_end")
    assert texts(pair) == [("def", "1234\0"), ("def", "5\0")]
    assert messages_of(caplog) == [
        "pairs: 1 of 2 sequences are longer than max_length=8 and were cut (longest: 11 tokens); 0 of 7 trained tokens "
        "were lost, and 1 beside them lost the same beginning of their prompt"
    ]
    [pair] = pairs([PAIR], letters, max_length=3, truncation_mode="keep_end")
    assert texts(pair) == [("", "34\0"), ("", "5\0")]
    assert messages_of(caplog)[0].endswith("; 4 of 7 trained tokens were lost")
    [pair] = pairs([PAIR], letters, max_length=8)
    assert texts(pair) == [("abcdef", "12"), ("abcdef", "5\0")]
    [pair] = pairs([PAIR], letters, max_prompt_length=2, max_length=6)
    assert texts(pair) == [("ef", "1234"), ("ef", "5\0")]


THUMBS = [
    {"prompt": "abcdef", "completion": "12", "label": True},
    {"prompt": "x", "completion": "345678", "label": False},
]


def test_labelled_rows_and_their_mismatched_twins_are_cut_alike(caplog: pytest.LogCaptureFixture) -> None:
    made = labelled(THUMBS, letters, max_length=9, truncation_mode="keep_end")
    assert [text(one.tokens) for one in made] == [("abcdef", "12\0"), ("x", "345678\0")]
    assert [text(one.mismatched) for one in made] == [("ef", "345678\0"), ("x", "12\0")]
    assert messages_of(caplog) == [
        "labelled: 1 of 2 mismatched sequences are longer than max_length=9 and were cut (longest: 13 tokens); "
        "0 of 10 trained tokens were lost"
    ]
    made = labelled(THUMBS, letters, max_length=7, max_prompt_length=3)
    assert [text(one.tokens) for one in made] == [("def", "12\0"), ("x", "345678")]
    assert [text(one.mismatched) for one in made] == [("def", "3456"), ("x", "12\0")]
    # an answer that was cut to fit behind its own prompt is whole behind a shorter one
    rows = [{"prompt": "abcdef", "completion": "12345", "label": True}, {"prompt": "x", "completion": "6", "label": 0}]
    assert text(labelled(rows, letters, max_length=8)[1].mismatched) == ("x", "12345\0")


def test_a_row_that_would_train_nothing_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        ValueError,
        match=r"completions: row 1: of its 12 tokens none is trained within max_length=6: the first is token 6; raise "
        r"max_length, cut the prompt by max_prompt_length or truncation_mode='keep_end', or remove the row",
    ):
        completions(ROWS, letters, max_length=6)
    with pytest.raises(ValueError, match="pairs: row 1: of its 11 tokens none is trained within max_length=5"):
        pairs([PAIR], letters, max_length=5)
    with pytest.raises(ValueError, match="labelled: row 1: of its 9 tokens none is trained within max_length=6"):
        labelled(THUMBS, letters, max_length=6)
    turns = ([1, 2, 3, 4, 5], [False, True, False, False, False])  # a conversation that ends with the user
    with pytest.raises(
        ValueError, match="row 9: of its 5 tokens none is trained within the last max_length=3: the last is token 1"
    ):
        truncated("completions", Limits(max_length=3, truncation_mode="keep_end"), ["row 9"], [turns])
    kept = truncated("completions", Limits(max_length=3), ["row 9"], [turns])
    assert kept == [([1, 2, 3], [False, True, False])]


def test_all_rows_that_would_train_nothing_are_named_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    short = {"prompt": "a", "chosen": "1", "rejected": "2"}
    with pytest.raises(NothingTrainedError, match=r"pairs: row 2: .*; so it is with 2 of 4 rows") as raised:
        pairs([short, PAIR, short, PAIR], letters, max_length=5)
    assert raised.value.rows == [1, 3]
    assert messages_of(caplog) == []
    with pytest.raises(NothingTrainedError, match=r"or remove the row$"):
        pairs([short, PAIR], letters, max_length=5)


@pytest.mark.unhooked
@pytest.mark.parametrize("read", [completions, pairs, labelled])
def test_bad_limits_are_refused(read: Any) -> None:
    for name in ("max_length", "max_prompt_length"):
        with pytest.raises(ValueError, match=f"{read.__name__}: {name} must be an integer of at least 1, got 0"):
            read([], letters, **{name: 0})
    with pytest.raises(ValueError, match=f"{read.__name__}: truncation_mode must be one of .*did you mean 'keep_end'"):
        read([], letters, truncation_mode="keep_ends")
