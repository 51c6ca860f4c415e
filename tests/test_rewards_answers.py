"""Rewards for the right answer: hand-made cases of texts and numbers."""

import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rlloss.rewards import ExactMatch, NumericAnswer, get_reward
from rlloss.rewards.numbers import answer_number, number_in

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


@pytest.mark.parametrize(
    ("answer", "spellings"),
    [
        (4.0, ["4", "4.0"]),
        (1e6, ["1000000"]),
        (1e-5, ["0.00001", "1e-05"]),
        (np.int64(3), ["3"]),
        (np.float32(0.1), ["0.1"]),
        (torch.tensor(3), ["3"]),
        (torch.tensor(0.1), ["0.1"]),
        (np.str_("Paris"), ["Paris"]),
    ],
)
def test_a_number_has_its_spellings(answer, spellings):
    for text in spellings:
        assert ExactMatch()(["?"], [text], answer=[answer]) == [1.0]
        if text != "Paris":
            assert NumericAnswer()(["?"], [text], answer=[answer]) == [1.0]
    assert ExactMatch()(["?"], ["5"], answer=[answer]) == [0.0]


@pytest.mark.unhooked
def test_answers_may_be_a_whole_tensor_or_array():
    answers: Any
    for answers in (torch.tensor([3, 4]), np.array([3.0, 4.0])):
        assert ExactMatch()(["?"] * 2, ["3", "5"], answer=answers) == [1.0, 0.0]
        assert NumericAnswer()(["?"] * 2, ["3", "5"], answer=answers) == [1.0, 0.0]


@pytest.mark.parametrize("answer", [None, ["4"], True, np.bool_(True), torch.tensor([4])])
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
        ("x = - 5", -5),
        ("x = \u2013 5", -5),
        ("\u2212\u202f5", -5),
        ("- 5 apples", 5),  # an item of a list
        ("10 minus 7", 7),
        ("it is minus 7", -7),
        (r"the change is $-\$5$", -5),
        (r"-\frac34", "-3/4"),
        (r"\tfrac12", "1/2"),
        (r"\frac{-3}{4}", "-3/4"),
        (r"\frac{1}{-2}", "-1/2"),
        (r"\frac{ - 1 }{2}", "-1/2"),
        (r"so 3\frac{1}{2}", "7/2"),
        (r"-3\dfrac12", "-7/2"),
        ("1 1/2", "3/2"),
        ("-2 1/2 cups", "-5/2"),
        ("1½", "3/2"),
        ("10 000", 10000),
        ("10\u00a0000", 10000),
        ("1\u202f234\u202f567.5", "1234567.5"),
        ("1 2345", 2345),
        ("The answer is __18__", 18),
        ("**18**", 18),
        ("_-5_", -5),
        ("x_3 = 4", 4),
        ("10^{3}", 1000),
        (r"1.5 \times 10^{-3}", "3/2000"),
        ("5 x 10^3", 5000),
        ("-5\u00d710³", -5000),
        ("2^{10} = 1024", 1024),
        ("12 cm^2", 12),
        (r"12\text{ cm}^2", 12),
        ("12 m²", 12),
        (r"90^{\circ}", 90),
        ("$1.5 million", 1500000),
        ("3 dozen", 36),
    ],
)
def test_the_number_of_a_text(text, number):
    assert number_in(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "nan", "inf", "NaN", "H2O", "x²", r"\boxed{x}, not 3", r"\boxed{} 3", "4/0", "1e99999"),
        *("9" * 5000, r"so 2\sqrt{3}", r"\frac{\sqrt{3}}{3}", r"3\pi", r"0.\overline{3}", "2^3", "11_3", "10^{99999}"),
    ],
)
def test_a_text_without_a_number_has_none_and_earns_nothing(text):
    assert number_in(text) is None
    assert NumericAnswer()(["?"], [text], answer=[3]) == [0.0]


ALONE = [
    ("5", 5),
    ("- 5", -5),
    (r"-\$5", -5),
    (r"- \frac{1}{2}", "-1/2"),
    ("x = 5", 5),
    ("f(x) = 5", 5),
    (r"\theta = 30^\circ", 30),
    (r"$\left(5\right)$", 5),
    (r"50\%", 50),
    (r"\text{5 apples}", 5),
    (r"\text{(B) }5", 5),
    (r"\text{-}5", -5),
    (r"\mathbf{7}.", 7),
    (r"12\,\text{cm}^2", 12),
    (r"3 \text{ m}^3", 3),
    (r"72^\circ\text{F}", 72),
    (r"5 \text{ km/h}", 5),
    ("5km", 5),
    ("5 m", 5),
    ("a total of 1,234 apples", 1234),
    ("共42元", 42),
    ("7 / 2", "7/2"),
    (r"3.5 \times 10^{-2} \text{ m}", "0.035"),
]
NOT_ALONE = [
    *(
        r"\frac{\sqrt{3}}{2}",
        r"2\sqrt{3}",
        "sqrt(3)",
        r"2\pi",
        "2 pi",
        r"0.\overline{3}",
        r"\pm 5",
        "x > 5",
        "|5|",
        "5!",
    ),
    *("x^2 + 1", "(1, 2)", "1,2345", "1.234,56", "3:4", "p=2, q=7", r"x = 5 \text{ or } x = -5", "6 - 1", "6 + 1 = 7"),
    *("x + y = 5", "3x", "3 x", "5 i", "5e", "100k", "2^{10}", "1011_2", "5 and a half", "5 squared", "cos 5", "1 5/2"),
    *("2/3/4", "5 +", "x", ""),
]


@pytest.mark.parametrize(("text", "number"), ALONE)
def test_a_number_in_a_box_or_an_answer_may_have_words_and_units(text, number):
    assert number_in(rf"of 9, \boxed{{{text}}} and 8") == Fraction(number)
    assert answer_number(text) == Fraction(number)
    assert answer_number(rf"Add 1 and 2.\n\boxed{{{text}}}") == Fraction(number)


@pytest.mark.parametrize("text", NOT_ALONE)
def test_what_is_more_than_a_number_is_none_in_a_box_and_raises_as_an_answer(text):
    assert number_in(rf"\boxed{{{text}}}") is None
    assert answer_number(text) is None
    with pytest.raises(ValueError, match="must hold a number, alone, got"):
        NumericAnswer()(["?"], ["3"], answer=[text])


@pytest.mark.parametrize("text", ["#### 1/2", "####  .5", "in 3 steps\n#### $0.50.\n", "#### 0.5\nand 7"])
def test_a_last_line_is_read_alone(text):
    assert number_in(text) == answer_number(text) == Fraction(1, 2)


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
    with pytest.raises(
        ValueError, match=r"numeric_answer: the column 'answer' must hold a number, alone, got .* drop such"
    ):
        NumericAnswer()(["?"], ["3"], answer=[answer])


LONG = ["1,", "1/", "1 ", "1 1/", ".1", "1e+", "-$", "- ", "= - ", "_", "5_", "^{", "5^{", "10^", "5x10^{", "² ", "½"]
LONG += [
    "\\frac{",
    "\\frac1",
    "\\frac{1",
    "\\text{",
    "\\sqrt",
    "\\boxed{",
    "#### ",
    "#### 1.",
    " million",
    "minus ",
    "1 111",
    "x",
]


@pytest.mark.parametrize("piece", LONG)
@pytest.mark.parametrize("around", ["{}", "1{}x", "\\boxed{{5{}", "#### 1{}x", "={}5"])
def test_no_completion_takes_long_to_read(piece, around):
    text = around.format(piece * (20000 // len(piece)))
    start = time.process_time()
    number_in(text)
    answer_number(text)
    assert time.process_time() - start < 1  # quadratic time would be many seconds


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
