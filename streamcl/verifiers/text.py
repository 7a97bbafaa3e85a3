"""The answer is the right one but for how it is written: case, articles, punctuation, spacing, number words.

Between the normalisations of SQuAD 1.1 (Rajpurkar et al., EMNLP 2016: lower case, no punctuation, no articles, single spaces) and of
VQA (Antol et al., ICCV 2015: the same, and number words up to ten as digits). Where the two differ or harm, we chose: points and
commas between digits and a minus before a number stay what they are, or 3.5 would be 35 and -5 would be 5, but commas of thousands go;
an apostrophe and a point go without a gap (don't, U.S.), other punctuation leaves one (T-shirt is T shirt); `+`, `#`, `%`, currency and
mathematical signs stay (C++ is not C). An answer of nothing but articles or punctuation keeps them (the band The The). Accents count.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from streamcl.verifier import AnswerVerifier

_DIGITS = {
    word: str(number) for number, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
_ARTICLES = {"a", "an", "the"}
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NUMBER = re.compile(r"(?:(?<!\S)-)?\d+(?:[.,:]\d+)*")
_KEPT, _CLOSED = set("#%&@"), set(".'’`´")


class Text(AnswerVerifier):
    def read(self, text: str, choices: Sequence[str], alone: bool) -> str | None:
        return normalised(text) or None


def normalised(text: str) -> str:
    """The words of a text as they are compared; empty only for a text without a sign."""
    plain = unicodedata.normalize("NFC", text.replace("\u2212", "-")).casefold().strip()
    grouped = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), plain)
    pieces, end = [], 0
    for number in _NUMBER.finditer(grouped):
        pieces += [_without_signs(grouped[end : number.start()]), number[0]]
        end = number.end()
    pieces.append(_without_signs(grouped[end:]))
    words = [_DIGITS.get(word, word) for word in "".join(pieces).split()]
    return " ".join(word for word in words if word not in _ARTICLES) or " ".join(words) or plain


def _without_signs(text: str) -> str:
    return "".join(
        "" if sign in _CLOSED else " " if unicodedata.category(sign).startswith("P") and sign not in _KEPT else sign for sign in text
    )
