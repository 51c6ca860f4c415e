"""The number that a text gives: the last one of free text, and the one that stands alone in a box or an answer."""

# ruff: noqa: RUF001 (signs, spaces and multiplication as models and typesetters write them)

import re
import unicodedata
from fractions import Fraction

__all__ = ["answer_number", "number_in"]

_GAP, _SIGN, _MONEY = "[ \u00a0\u2009\u202f]", "[-+−–]", "[$€£¥]"
_GROUPED = rf"\d{{1,3}}(?:(?:,\d{{3}})+|(?:{_GAP}\d{{3}})+)(?!\d)"
_PLAIN = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?"
_PART = rf"(?:\{{{_GAP}?{_SIGN}?{_PLAIN}{_GAP}?\}}|\d)"  # of \frac: braces, or one digit
_TENS = rf"10\^(?:\{{{_SIGN}?\d+\}}|{_SIGN}?\d+)"
_BRACED = r"(?:\{[^{}]*\}|-?\w+)"
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NUMBER = re.compile(
    rf"""(?P<sign> (?<![\w.)\]}}]){_SIGN}[\u00a0\u2009\u202f]?       # no sign after what it subtracts from
                 | (?<![\d)\]}}%]\s)\b(?i:minus|negative)\s+ )?
      (?:{_MONEY}{_GAP}?)?
      (?: (?:(?P<whole>\d+){_GAP}?)?\\[dtc]?frac[ ]?(?P<over>{_PART})[ ]?(?P<under>{_PART})
        | (?P<units>\d{{1,3}})[ \u00a0](?P<part>\d+/\d+)(?!\d)       # 1 1/2
        | (?P<power>{_TENS})
        | (?P<number>{_PLAIN})(?:{_GAP}?[×x*]{_GAP}?(?P<tens>{_TENS})|{_GAP}?/{_GAP}?(?P<divisor>{_PLAIN}))?
      )
      (?P<scales>(?:{_GAP}(?i:{"|".join(_SCALES)})s?\b){{0,3}})
      (?P<more>{_GAP}?\^{_BRACED}|_{_BRACED})?                        # a power or a base: another number than it seems
    | (?P<refused>\\(?:[dtc]?frac|sqrt|overline|bar|pi|binom|log|ln|sin|cos|tan)(?![A-Za-z])\S*)
    | \^{_BRACED}                                                  # the exponent of a unit
    | [A-Za-z_][A-Za-z0-9_]*(?:\.\d+)*                               # a word, with the digits that belong to it""",
    re.VERBOSE,
)
_GSM8K = re.compile(rf"^[ \t]*+####[ \t]*+([-+−–$€£¥]{{0,2}} ?(?:(?:[.,/]|{_GAP})?\d)+)[ \t.%]*$", re.MULTILINE)
_DIGITS, _EXPONENT = 1000, 4  # longer ones nobody means, and a policy could stop the run by them

_WRITTEN = {"{,}": ",", "\\,": "", "\\!": "", "\\$": "$", "\\%": "%", "^\\circ": "°", "^{\\circ}": "°"}
_WRITTEN |= dict.fromkeys(("\\;", "\\:", "\\ ", "~", "\\(", "\\)", "\\[", "\\]"), " ")
_COMMANDS = {"left": "", "right": "", "times": "×", "cdot": "×", "approx": "≈", "degree": "°", "quad": " "}
_COMMAND = re.compile(rf"\\({'|'.join(_COMMANDS)})(?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox)\{([^{}]*)\}")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_LOOSE_SIGN = re.compile(rf"(?<=[=(:{{\[,≈]){_GAP}*({_SIGN}){_GAP}+(?=[$€£¥\\.\d])")
_EMPHASIS = re.compile(r"(?<!\w)_+(?=[-+−–$\d.])|(?<=[\d%.])_+(?![\w{])")

_NAME = re.compile(r"[\w\s(){}\\,=$]*")
_PIECE = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\S")
_TOUCHING = re.compile("[A-Za-z]")
_UNIT_POWER = re.compile(r"(?<=[^\W\d_])\s?\^(?:\{-?\d+\}|-?\d+)")
_MARKS = set("$€£¥.,:;\"'`*≈")
_BEFORE = set("([{aAI")
_BEHIND = set(")]}%°/mgshdLlJNWVACF")  # units of one letter among them, not where they touch their number, as in 3m
_UNITS = {"km", "cm", "mm", "kg", "mg", "ml", "mL", "lb", "lbs", "oz", "ft", "mph", "hr", "hrs", "min", "sec", "am"}
_UNITS |= {"pm", "st", "nd", "rd", "th"}
_CHANGES = {"minus", "negative", "plus", "times", "over", "half", "squared", "cubed", "root", "not", "pi", *_SCALES}
_CHANGES |= {"sqrt", "log", "ln", "sin", "cos", "tan", "exp", "mod"}


def number_in(text: str) -> Fraction | None:
    r"""The number that a completion gives as its answer, by the rules of `NumericAnswer`; None where it has none.

    >>> number_in(r"3 + 4 = 7, so \boxed{\frac{7}{2}} of 10"), number_in("none")
    (Fraction(7, 2), None)
    """
    final = _final(text)
    if final is not None:
        return _alone(final)
    last = None
    for match in _NUMBER.finditer(_plain(text)):
        last = match if _is_number(match) or match["refused"] else last
    return None if last is None or last["refused"] else _value(last)


def answer_number(text: str) -> Fraction | None:
    """The number of a right answer: of its box or its `####` line, else of a text that gives one number alone.

    >>> answer_number("about 12 km"), answer_number("(1, 2)")
    (Fraction(12, 1), None)
    """
    final = _final(text)
    return _alone(text if final is None else final)


def _final(text: str) -> str | None:
    """What stands in the last box or on the last `####` line, whichever comes later."""
    start = text.rfind("\\boxed{")
    lines = [match for match in _GSM8K.finditer(text) if match.start() > start]
    if lines:
        return lines[-1][1]
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return text[start:]


def _plain(text: str) -> str:
    """The text without what only sets it: LaTeX's spaces and fonts, emphasis, raised digits, a space behind a sign."""
    for written, plain in _WRITTEN.items():
        text = text.replace(written, plain)
    text = _TEXT.sub(r" \1 ", _COMMAND.sub(lambda match: _COMMANDS[match[1]], text))
    text = _RAISED.sub(lambda match: f"^{{{unicodedata.normalize('NFKC', match[0]).replace('−', '-')}}}", text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"), text)
    return _LOOSE_SIGN.sub(r"\1", _EMPHASIS.sub("", text))


def _alone(text: str) -> Fraction | None:
    """The number of a text that holds one number, and beside it words and units alone."""
    text = _plain(f"= {text}")  # so that a sign at its beginning is one
    found = [match for match in _NUMBER.finditer(text) if _is_number(match) or match["refused"]]
    if len(found) != 1 or found[0]["refused"]:
        return None
    name, _, before = text[: found[0].start()].rpartition("=")
    before, after = re.sub(r"\([A-Z]\)", "", before), _UNIT_POWER.sub("", text[found[0].end() :])
    is_alone = (
        _NAME.fullmatch(name) is not None
        and all(piece in _BEFORE or _says_nothing(piece) for piece in _PIECE.findall(before))
        and all(piece in _BEHIND or _says_nothing(piece) for piece in _PIECE.findall(after))
        and (not _TOUCHING.match(after) or _PIECE.findall(after)[0] in _UNITS)
    )
    return _value(found[0]) if is_alone else None


def _says_nothing(piece: str) -> bool:
    """Whether a word or a mark beside a number leaves it what it is; a single letter with case may be a variable."""
    is_word = len(piece) > 1 or (piece.isalpha() and piece.lower() == piece.upper())
    return piece.casefold() not in _CHANGES if is_word else piece in _MARKS


def _is_number(match: re.Match[str]) -> bool:
    return bool(match["number"] or match["over"] or match["part"] or match["power"])


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a match of `_NUMBER`; None where it is no number, or too long a one."""
    part, _, of = (match["part"] or "").partition("/")
    over = _fraction(match["number"] or match["over"] or part or "1")
    under = _fraction(match["divisor"] or match["under"] or of or "1")
    whole, tens = _fraction(match["whole"] or match["units"] or "0"), _power(match["tens"] or match["power"])
    if match["more"] or over is None or not under or whole is None or tens is None:
        return None
    if match["units"] and over >= under:
        return None
    value = (whole + over / under) * tens
    for scale in match["scales"].casefold().split():
        value *= _SCALES[scale.removesuffix("s")]
    return -value if (match["sign"] or "+").strip().casefold() in ("-", "−", "–", "minus", "negative") else value


def _fraction(digits: str) -> Fraction | None:
    digits = re.sub(rf"[{{}},]|{_GAP}", "", digits).replace("−", "-").replace("–", "-")
    exponent = digits.lower().partition("e")[2]
    return None if len(digits) > _DIGITS or len(exponent) > _EXPONENT else Fraction(digits)


def _power(tens: str | None) -> Fraction | None:
    """10 to an exponent, as `_TENS` reads it; 1 for none."""
    if tens is None:
        return Fraction(1)
    exponent = tens.removeprefix("10^").strip("{}").replace("−", "-").replace("–", "-")
    return None if len(exponent) > _EXPONENT else Fraction(10) ** int(exponent)
