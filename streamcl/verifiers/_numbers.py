"""Numbers as people and models write them, read exactly: as fractions of whole numbers, by rules alone, never by evaluating."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from streamcl.verifier import denies, tidied

LONGEST = 400  # digits, and the largest exponent: beyond that it is no answer, and would take any time to compute with

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: number for number, word in enumerate(_SMALL.split())} | {word: 10 * number for number, word in enumerate(_TENS.split(), 2)}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_GLYPHS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5", "⅘": "4/5", "⅙": "1/6"}
_GLYPHS |= {"⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8"}

_SPACES = "\u00a0\u2007\u2009\u202f"
_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}|\\(?:left|right|displaystyle|[,;:!])|\$|\*\*|\\(?=[%$ (\[)\]])")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}|(\d)\s*(\d))")
_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+|\d+[.,]\d+|\d+|\.\d+"
_POWER = r"\s*(?:×|\\times|\\cdot|·|x|\*)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d+)\s*\}?"
_NUMBER = re.compile(
    rf"(?<![\w^.,])(?<!\^\{{)(?P<sign>(?:(?<![\w)\]}}])[+-]\s*(?=[\d.]))?)(?:(?P<whole>\d+)\s+(?=\d+/\d))?"
    rf"(?P<digits>{_DIGITS})(?:\s*/\s*(?P<below>\d+)|{_POWER}|[eE](?P<exponent>[+-]?\d+))?(?![\d/])",
    re.ASCII,
)
_NAMED = re.compile(
    rf"(?<![\w-])(?P<sign>(?:minus |negative )?)(?:(?P<ten>{'|'.join(_TENS.split())})(?:[ -](?P<one>{'|'.join(_SMALL.split()[1:10])}))?"
    rf"|(?P<small>{'|'.join(_SMALL.split())}))(?![\w-])",
    re.IGNORECASE,
)
_SCALE = re.compile(rf"\s*({'|'.join(_SCALES)})\b", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:%|percent\b|per cent\b)", re.IGNORECASE)
_HEDGED = re.compile(r"\bor\b|\band\b|±|\\pm", re.IGNORECASE)
_LISTED = re.compile(r"[;|\n<>!~≠]|,\s")  # before an "=" it is no chain of equal values
_NO_UNIT = re.compile(
    r"[\\√π∞±²³⁰¹⁴-⁹^!<>≤≥≠]|-\s*[(\[{]|\bpi\b|\bsqrt\b|\bor\b|\band\b|\bto\b|\bat (?:least|most)\b|\bthan\b"
    r"|\b(?:half|twice|double|root|squared|cubed|factorial|plus|times|minus|negative|between)\b",
    re.IGNORECASE,
)
_MINUS = re.compile(r"\b(?:minus|negative) (?=\.?\d)", re.IGNORECASE)
_UNIT_POWER = re.compile(r"(?<=[A-Za-zµ°])(?:\^\s*\{?\s*[+-]?\d\s*\}?|[²³])")


@dataclass(frozen=True)
class Number:
    value: Fraction
    percent: bool = False


def numbers_in(text: str) -> tuple[list[Number], str]:
    """The numbers that stand in a text, in order, and the text without them. A number that cannot be read leaves its signs there."""
    plain = _plain(text)
    found: list[tuple[int, int, Number]] = []
    for match in _NUMBER.finditer(plain):
        value = _value(match)
        if value is not None:
            found.append((match.start(), match.end(), Number(value)))
    for match in _NAMED.finditer(plain):
        ten, one, small = (_WORDS.get((match[part] or "").lower(), 0) for part in ("ten", "one", "small"))
        found.append((match.start(), match.end(), Number(Fraction((-1 if match["sign"] else 1) * (ten + one + small)))))
    numbers, rest, end = [], [], 0
    for start, stop, number in sorted(found, key=lambda item: item[0]):
        if start < end:
            continue
        value = number.value
        while scale := _SCALE.match(plain, stop):
            value, stop = value * _SCALES[scale[1].lower()], scale.end()
        percent = _PERCENT.match(plain, stop)
        rest.append(plain[end:start])
        numbers.append(Number(value, percent is not None))
        end = percent.end() if percent else stop
    return numbers, "\0".join([*rest, plain[end:]])


def number_alone(text: str) -> Number | None:
    """The one number of a text that is nothing but a number with its unit, currency or name (`x = 3 cm`); None for anything else."""
    before, _, after = text.rpartition("=")
    found, rest = numbers_in(after)
    if len(found) != 1 or any(sign.isdigit() for sign in rest) or _NO_UNIT.search(rest) or denies(rest):
        return None
    return None if _HEDGED.search(before) or _LISTED.search(before.strip()) or denies(before) else found[0]


def _plain(text: str) -> str:
    plain = text.replace("\0", " ").replace("\u2212", "-").replace("–", "-").replace("\uff0c", ",").replace("{,}", ",")
    for glyph, written in _GLYPHS.items():
        plain = plain.replace(glyph, f" {written}")
    plain = re.sub(rf"(?<=\d)[{_SPACES}](?=\d{{3}})", ",", plain)
    plain = _MINUS.sub("-", _MARKUP.sub(lambda found: found[1] or "", tidied(plain)))
    plain = _LATEX_FRACTION.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]} ", plain)
    return (
        _UNIT_POWER.sub("", re.sub(r"(?<![\w)])([+-])\s+(?=\d+/\d)", r"\1", plain))
        .replace("°", " ")
        .replace("\\circ", " ")
        .replace("^ ", " ")
    )


def _value(match: re.Match[str]) -> Fraction | None:
    power = match[match.re.groupindex["below"] + 1]
    exponent = int_of(power or match["exponent"] or "0")
    value = _decimal(match["digits"])
    if value is None or exponent is None or abs(exponent) > LONGEST:
        return None
    if match["below"] is not None:
        below = int_of(match["below"])
        if not below:
            return None
        value /= below
    if match["whole"] is not None:
        whole = int_of(match["whole"])
        if whole is None:
            return None
        value += whole
    return (-1 if match["sign"].startswith("-") else 1) * value * Fraction(10) ** exponent


def _decimal(digits: str) -> Fraction | None:
    """`1,234.5`, `1.234,5` and `2,5`: a comma before three digits parts thousands, before any other count it is the decimal sign."""
    if len(digits) > LONGEST:
        return None
    if re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", digits):
        return Fraction(digits.replace(",", ""))
    if "," in digits:
        return Fraction(digits.replace(".", "").replace(",", "."))
    return Fraction(digits if digits.count(".") < 2 else digits.replace(".", ""))


def int_of(text: str) -> int | None:
    return int(text) if len(text) <= LONGEST else None
