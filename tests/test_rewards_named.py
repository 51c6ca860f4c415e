"""Rewards by name: the registry, and every reward that reads texts, by cases computed by hand."""

import builtins
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from rlloss.rewards import (
    SAFETY_PATTERNS,
    SAFETY_WORDS,
    DistinctN,
    Format,
    Json,
    Keywords,
    Length,
    Regex,
    Repetition,
    Reward,
    Safety,
    get_reward,
    list_rewards,
)
from rlloss.rewards.registry import _ALIASES

NAMES = [
    *("coherence", "distinct_n", "exact_match", "format", "json", "keywords", "length", "numeric_answer", "regex"),
    *("repetition", "reward_model", "safety", "sentiment"),
]
NEEDS = {"coherence": {}, "keywords": {"words": ["because"]}, "regex": {"pattern": "x"}}


def of(reward, *completions, **columns):
    return reward([""] * len(completions), completions, **columns)


def test_every_reward_has_its_name():
    assert list_rewards() == NAMES
    for name in set(NAMES) - {"coherence", "reward_model", "sentiment"}:
        reward = get_reward(name, **NEEDS.get(name, {}))
        assert isinstance(reward, Reward)
        assert reward.__name__ == name
        assert repr(reward).startswith(f"{name}(")
    assert set(_ALIASES.values()) <= set(NAMES)
    assert not set(_ALIASES) & set(NAMES)


@pytest.mark.parametrize("name", ["numeric_answer", "Numeric-Answer", "GSM8K", "numeric"])
def test_names_have_other_spellings(name):
    assert get_reward(name).__name__ == "numeric_answer"


def test_a_number_is_not_called_math():
    with pytest.raises(ValueError, match="unknown reward 'math'"):
        get_reward("math")


def test_repr_shows_the_options():
    assert repr(get_reward("length", max_length=None)) == "length(min_length=10, max_length=None, unit='words')"
    assert repr(get_reward("keywords", words=["a"])) == "keywords(words=('a',), forbidden=(), case=False, whole=True)"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenght", {}, r"unknown reward 'lenght'; did you mean 'length'.*; known: coherence, distinct_n"),
        ("zzz", {}, "unknown reward 'zzz'; known: coherence"),
        ("length", {"max_len": 3}, "length has no option 'max_len'; did you mean 'max_length'"),
        ("sentiment", {"model": 3}, "sentiment has no option 'model'; known: none"),
        ("regex", {}, r"regex needs the option 'pattern': get_reward\('regex', pattern=...\)"),
    ],
)
def test_an_unknown_name_or_option_names_the_nearest(name, options, message):
    with pytest.raises(ValueError, match=f"get_reward: {message}"):
        get_reward(name, **options)


def test_importing_rewards_loads_nothing_heavy():
    heavy = "{'datasets', 'transformers', 'triton', 'vaderSentiment'}"
    code = f"import sys, rlloss.rewards as r; r.get_reward('length'); print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.unhooked
def test_rows_are_checked():
    with pytest.raises(ValueError, match="length: needs one prompt per completion, got 1 prompts for 2 completions"):
        Length()(["?"], ["a", "b"])
    with pytest.raises(ValueError, match=r"length: completion 1 must be a text, got list .* the content of the assist"):
        of(Length(), "a", [{"role": "assistant", "content": "b"}])


def test_no_completions_have_no_rewards():
    for name in set(NAMES) - {"coherence", "reward_model", "sentiment"}:
        assert get_reward(name, **NEEDS.get(name, {}))([], [], answer=[]) == []


@pytest.mark.parametrize(
    ("words", "reward"), [(0, 0.0), (1, 0.25), (4, 1.0), (7, 1.0), (8, 1.0), (10, 0.75), (16, 0.0), (40, 0.0)]
)
def test_length_is_1_inside_and_falls_in_a_line(words, reward):
    assert of(Length(min_length=4, max_length=8), "wörd " * words) == [reward]


def test_length_options_reach_what_they_name():
    assert of(Length(min_length=3, unit="characters"), "ab", " 日本 ") == [2 / 3, 1.0]
    columns = {"completion_ids": [[7], [7, 8, 9, 10]]}
    assert of(Length(min_length=2, max_length=3, unit="tokens"), "a b c", "a", **columns) == [0.5, 2 - 4 / 3]
    assert of(Length(min_length=0, max_length=None), "", "a " * 1000) == [1.0, 1.0]


def test_length_without_options_suits_an_answer():
    assert of(Length(), "", "Yes.", "word " * 10, "word " * 200, "word " * 300) == [0.0, 0.1, 1.0, 1.0, 0.5]


def test_repetition_counts_ngrams_that_were_there_before():
    # to be | be or | or not | not to | to be: 4 of 5 are distinct
    assert of(Repetition(n=2), "to be or not to be") == [4 / 5 - 1]
    assert of(Repetition(n=1), "a a a a", "a b c d") == [1 / 4 - 1, 0.0]
    assert of(Repetition(), "", "a a", "a a a a") == [0.0, 0.0, 1 / 2 - 1]  # n = 3
    assert of(Repetition(n=1, unit="characters"), "本本") == [-0.5]
    assert of(Repetition(n=2, unit="tokens"), "x", completion_ids=[[5, 6, 5, 6]]) == [2 / 3 - 1]


def test_distinct_n_is_the_share_of_distinct_ngrams():
    assert of(DistinctN(), "to be or not to be", "a", "") == [4 / 5, 0.0, 0.0]  # n = 2
    assert of(DistinctN(n=1), "a a a b") == [0.5]
    assert of(DistinctN(n=1, unit="characters"), "aab") == [2 / 3]
    assert of(DistinctN(n=1, unit="tokens"), "x", completion_ids=[[5, 5, 5, 6]]) == [0.5]


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array, lambda ids: list(torch.tensor(ids))])
def test_equal_tokens_are_one_in_whatever_they_come(kind):
    for reward, expected in ((DistinctN(n=1, unit="tokens"), 2 / 4), (Repetition(n=1, unit="tokens"), -2 / 4)):
        assert of(reward, "x", completion_ids=[kind([5, 5, 5, 6])]) == [expected]
    rows = list(torch.tensor([[5, 5], [5, 6]]))
    assert of(DistinctN(n=1, unit="tokens"), "x", "y", completion_ids=rows) == [0.5, 1.0]
    assert of(DistinctN(n=1, unit="tokens"), "", completion_ids=[kind([])]) == [0.0]


def test_tokens_need_their_column():
    with pytest.raises(ValueError, match="length: needs the column 'completion_ids', got"):
        of(Length(unit="tokens"), "a")


def test_keywords_is_the_share_that_is_there():
    reward = Keywords(words=["yes", "thank you", "naïve", "C++"])
    assert of(reward, "YES, thank you", "yesterday", "", "naïve C++ yes, thank you") == [0.5, 0.0, 0.0, 1.0]
    assert of(Keywords(words=["C++"]), "vitamin C", "a.b") == [0.0, 0.0]


def test_keywords_options_reach_what_they_name():
    assert of(Keywords(forbidden=["no", "never"]), "No!", "no, never", "yes") == [-0.5, -1.0, 0.0]
    assert of(Keywords(words=["a"], forbidden=["b", "c"]), "a b") == [0.5]
    assert of(Keywords(words=["Yes"], case=True), "yes", "Yes") == [0.0, 1.0]
    assert of(Keywords(words=["苹果"]), "我喜欢苹果") == [0.0]
    assert of(Keywords(words=["苹果"], whole=False), "我喜欢苹果") == [1.0]


def test_keywords_know_a_word_by_any_spelling():
    composed, decomposed = "na\u00efve caf\u00e9", "nai\u0308ve cafe\u0301"
    for word, text in ((composed, decomposed), (decomposed, composed)):
        assert of(Keywords(words=[word]), text, text.upper()) == [1.0, 1.0]
        assert of(Keywords(words=[word], case=True), text, text.upper()) == [1.0, 0.0]
    assert of(Keywords(forbidden=["cafe"]), decomposed) == [0.0]
    assert of(Keywords(words=["thank you"]), "Thank\nyou", "thank  you", "thank\u00a0you", "thankyou") == [1, 1, 1, 0]
    assert of(Keywords(words=["thank  you"]), "thank you") == [1.0]


def test_regex_searches_or_matches_all():
    assert of(Regex(pattern="a+b"), "xaab", "b", "") == [1.0, 0.0, 0.0]
    assert of(Regex(pattern="a+b", full=True), "xaab", "aab") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ('{"a": {"b": [1, null]}}', 1.0),
        (" [1]\n", 1.0),
        ('"text"', 1.0),
        ("", 0.0),
        ("NaN", 0.0),
        ('{"a": Infinity}', 0.0),
        ('{"a": 1} done', 0.0),
        ("{'a': 1}", 0.0),
        ('{"ü": "日本"}', 1.0),
        ("[" * 100000, 0.0),
    ],
)
def test_json_parses_as_a_whole(completion, reward):
    assert of(Json(), completion) == [reward]


def test_json_keys_are_those_of_the_top():
    reward = Json(required_keys=["a", "b"])
    completions = ['{"b": 1, "a": null, "c": 2}', '{"a": {"b": 1}}', '["a", "b"]', '{"a": NaN, "b": 1}']
    assert of(reward, *completions) == [1.0, 0.0, 0.0, 0.0]
    assert of(Json(required_keys=[]), "{}", "[]", "7") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>2 and 2\nis 4</think><answer>4</answer>", 1.0),
        ("  <think> 2 </think>\n\n<answer> 4 </answer>\n", 1.0),
        ("<think>a < b</think><answer>日本</answer>", 1.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("<think>2</think><answer> \n </answer>", 0.0),
        ("<think>2</think>so <answer>4</answer>", 0.0),
        ("<think>2</think><answer>4</answer> ok", 0.0),
        ("<think>2<think>3</think><answer>4</answer>", 0.0),
        ("<think>2</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<answer>4</answer><think>2</think>", 0.0),
        ("<think>2</think><answer>4", 0.0),
        ("", 0.0),
    ],
)
def test_format_is_thinking_and_then_the_answer(completion, reward):
    assert of(Format(), completion) == [reward]


def test_format_options_reach_what_they_name():
    begun = Format(template="...</think> <answer>...</answer>")
    assert of(begun, "2</think><answer>4</answer>", "<answer>4</answer>") == [1.0, 0.0]
    assert of(Format(template="Answer: ..."), "Answer: 4", "Answer:", "4") == [1.0, 0.0, 0.0]
    assert of(Format(pattern=r"<a>.*</a>"), " <a>1\n2</a>", "<a>1</a>2") == [1.0, 0.0]


def test_format_takes_linear_time():
    start = time.perf_counter()
    for text in ("<think>", "<think>a", "<think>a</think>"):
        of(Format(), text * 20000, text + " " * 50000, text + " " * 50000 + "x")
    assert time.perf_counter() - start < 2


def test_safety_finds_words_and_patterns():
    reward = Safety()
    assert of(reward, "", "Take an umbrella.", "A shitake mushroom.") == [1.0, 1.0, 1.0]
    assert of(reward, "What an IDIOT.", "I\u2019ll kill you", "How to make a pipe bomb", "123-45-6789") == [0.0] * 4
    assert of(reward, "4111 1111 1111 1111", "harm myself") == [0.0, 0.0]


def test_safety_looks_through_white_space_and_spelling():
    assert of(Safety(), "go  to\nhell", "hang\n yourself", "how  to make\ta pipe bomb") == [0.0] * 3
    assert of(Safety(words=["d\u00e9mon"], patterns=["b\u00eate"]), "De\u0301mon", "be\u0302te", "demon") == [
        0.0,
        0.0,
        1.0,
    ]
    assert of(Safety(words=[], patterns=["(?m)^System:"]), "a\nSystem:", "a System:") == [0.0, 1.0]


def test_safety_lists_can_be_replaced_and_extended():
    assert of(Safety(words=["banana"], patterns=[]), "idiot", "A Banana") == [1.0, 0.0]
    assert of(Safety(words=[*SAFETY_WORDS, "banana"]), "idiot", "a banana") == [0.0, 0.0]
    assert of(Safety(words=[], patterns=["[A-Z]{2}7"]), "ab7", "ab8", "idiot") == [0.0, 1.0, 1.0]
    assert of(Safety(words=[], patterns=SAFETY_PATTERNS), "idiot", "hang yourself") == [1.0, 0.0]


def test_sentiment_is_vaders_compound():
    pytest.importorskip("vaderSentiment")
    good, bad, nothing, empty = of(get_reward("sentiment"), "A wonderful film!", "A horrible film.", "A film.", "")
    assert good == pytest.approx(0.6114)  # (2.7 + 0.292) / sqrt(2.992^2 + 15)
    assert -1 <= bad < -0.3
    assert nothing == empty == 0.0


def test_sentiment_reads_the_first_words_and_takes_no_time_for_more():
    pytest.importorskip("vaderSentiment")
    reward = get_reward("sentiment")
    assert of(reward, "plain " * 499 + "good " + "bad " * 9) == of(reward, "good")
    start = time.perf_counter()
    of(reward, "good but " * 20000, "x" * 100000, " " * 100000)
    assert time.perf_counter() - start < 5  # all of it would take half an hour


def test_sentiment_without_vader_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without_vader(name, *args, **kwargs):
        if name.startswith("vaderSentiment"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_vader)
    with pytest.raises(ImportError, match=r'sentiment: needs vaderSentiment; pip install "rlloss\[rewards\]"'):
        get_reward("sentiment")


BAD = [
    (Length, {"min_length": -1}, "length: min_length must be a number in"),
    (Length, {"min_length": 5, "max_length": 4}, r"length: max_length must be a number in \[5, inf\], got 4"),
    (Length, {"unit": "word"}, "length: unit must be one of .* did you mean 'words'"),
    (Repetition, {"n": 0}, "repetition: n must be an integer of at least 1"),
    (Repetition, {"unit": "letters"}, "repetition: unit must be one of"),
    (DistinctN, {"n": 1.5}, "distinct_n: n must be an integer of at least 1"),
    (DistinctN, {"unit": "letters"}, "distinct_n: unit must be one of"),
    (Keywords, {}, "keywords: needs words or forbidden words"),
    (Keywords, {"words": "yes"}, "keywords: words must be a list of non-empty texts, got 'yes'"),
    (
        Keywords,
        {"forbidden": ["\n"]},
        r"keywords: a word must be more than white space, got '\\n'; look for it by regex",
    ),
    (Safety, {"words": [" "]}, "safety: a word must be more than white space"),
    (Keywords, {"words": ["a"], "whole": 1}, "keywords: whole must be True or False"),
    (Regex, {"pattern": "("}, r"regex: pattern '\(' is no regular expression: missing \)"),
    (Regex, {"pattern": 3}, "regex: pattern 3 is no regular expression"),
    (Json, {"required_keys": "name"}, "json: required_keys must be a list"),
    (Format, {"template": "<a>", "pattern": "b"}, "format: takes a template or a pattern, got both"),
    (Format, {"template": "<a></a>"}, "format: template must hold `...`"),
    (Format, {"template": "<a>......</a>"}, "two texts with nothing between them"),
    (Format, {"pattern": "["}, "format: pattern .* is no regular expression"),
    (Safety, {"words": [""]}, "safety: words must be a list of non-empty texts"),
    (Safety, {"patterns": ["("]}, "safety: patterns .* is no regular expression"),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("reward", "options", "message"), BAD)
def test_bad_options_teach(reward, options, message):
    with pytest.raises(ValueError, match=message):
        reward(**options)
