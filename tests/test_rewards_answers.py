"""Rewards for the right answer: hand-made cases of texts and numbers."""

from fractions import Fraction

import pytest

from rlloss.rewards import ExactMatch, NumericAnswer, get_reward
from rlloss.rewards.answers import number_in

GSM8K = "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total is 2+1=<<2+1=3>>3 bolts\n#### 3"


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("", "", 1.0),
        ("4", 4, 1.0),
        ("4.5", 4.5, 1.0),
        ("caf\u00e9", "cafe\u0301", 1.0),  # the same text, composed and decomposed
        ("日本", "日本", 1.0),
    ],
)
def test_exact_match_is_the_same_text(completion, answer, reward):
    assert ExactMatch()(["?"], [completion], answer=[answer]) == [reward]


def test_exact_match_options_reach_what_they_name():
    assert ExactMatch(strip=False)(["?"], [" Paris"], answer=["Paris"]) == [0.0]
    assert ExactMatch(case=False)(["?"], ["STRASSE"], answer=["straße"]) == [1.0]


@pytest.mark.parametrize("answer", [None, ["4"], True])
def test_exact_match_wants_texts_or_numbers(answer):
    with pytest.raises(ValueError, match="exact_match: the column 'answer' must hold texts or numbers, got"):
        ExactMatch()(["?"], ["4"], answer=[answer])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("3 apples and 4 pears are 7 fruits", 7),
        ("$1,234,567.89 in all", "1234567.89"),
        ("one of 1,2,3", 3),
        ("12345,678", 678),  # commas group by three, from the front
        ("1,2345", 2345),
        ("x=-5", -5),
        ("x = \u22127", -7),
        ("a loss of -$5", -5),
        ("+8", 8),
        ("10-4", 4),
        ("(3)-4", 4),
        ("10 - 4 = 6", 6),
        (".5", "1/2"),
        ("0.125", "1/8"),
        ("2.5e3 and 1e-3", "1/1000"),
        ("3/4 of it", "3/4"),
        ("-3/4", "-3/4"),
        (r"so -\frac{3}{4}", "-3/4"),
        (r"\dfrac{1,000}{3}", "1000/3"),
        ("50%", 50),
        (r"50\%", 50),
        (r"\boxed{7}, which took 3 steps", 7),
        (r"\boxed{1} no, \boxed{\text{about } \frac{1}{2}} of 9", "1/2"),
        (r"\boxed{12", 12),
        (r"1{,}234", 1234),
        (r"5\,678", 5678),
        (r"9,\!012", 9012),
        (GSM8K, 3),
        ("#### -1,200\nI checked it 3 times.", -1200),
        ("#### $18.00.\nin 2 parts", 18),
        ("#### 5\n\\boxed{6}, 7", 6),
        ("\\boxed{6}\n#### 5\n7", 5),
        ("#### Step 1: add\nSo 9", 9),  # a heading is no answer
        ("9 H2O, v1.5 and x_3", 9),
        ("the 1st of 100k", 100),
        ("答案是42", 42),
        ("٤٢", 42),
    ],
)
def test_the_number_of_a_text(text, number):
    assert number_in(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    ["", "none", "nan", "inf", "NaN", "H2O", "x²", r"\boxed{x}, not 3", r"\boxed{} 3", "4/0", "1e99999", "9" * 5000],
)
def test_a_text_without_a_number_has_none_and_earns_nothing(text):
    assert number_in(text) is None
    assert NumericAnswer()(["?"], [text], answer=[3]) == [0.0]


def test_numeric_answer_reads_both_sides():
    reward = NumericAnswer()
    completions = ["1 + 2 is 3", "3.0", "2.999999999", "4", "1/3", "0.1"]
    assert reward(["?"] * 6, completions, answer=[GSM8K, "3", 3, 3.0, "1/3", 0.1]) == [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_long_numbers_are_compared_to_the_last_digit():
    product = 123456789 * 987654321
    assert NumericAnswer()(["?"] * 2, [str(product), str(product + 1)], answer=[product, product]) == [1.0, 0.0]


def test_tolerance_is_a_distance_that_counts_itself():
    reward = NumericAnswer(tolerance=0.5)
    assert reward(["?"] * 4, ["3.5", "2.5", "3.51", "-3"], answer=[3] * 4) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("answer", ["no number", "", None, True, float("nan"), [3]])
def test_an_answer_without_a_number_is_a_row_to_drop(answer):
    with pytest.raises(ValueError, match=r"numeric_answer: the column 'answer' must hold a number, got .* drop such"):
        NumericAnswer()(["?"], ["3"], answer=[answer])


@pytest.mark.parametrize("number", ["1," * 50000, "1" * 100000 + "x", "1/" * 50000, "#### " + "1." * 50000 + "x"])
def test_no_completion_takes_long_to_read(number):
    number_in(number)  # quadratic time would be minutes


@pytest.mark.unhooked
def test_bad_options_and_columns_teach():
    with pytest.raises(ValueError, match="exact_match: strip must be True or False, got 1"):
        ExactMatch(strip=1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="numeric_answer: tolerance must be a number in"):
        NumericAnswer(tolerance=-1)
    reward = get_reward("exact_match")
    with pytest.raises(
        ValueError, match=r"needs the column 'answer', got \['answers'\]; did you mean 'answers'\?; rename"
    ):
        reward(["?"], ["4"], answers=["4"])
    with pytest.raises(ValueError, match="'answer' must have an entry for each of the 1 completions, got 2"):
        reward(["?"], ["4"], answer=["4", "5"])
