"""Checks answers in words against the right ones, exactly and by rule: used by scenarios, scoring and learners alike."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import DataError
from streamcl.stream import Column

_TAGGED = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.IGNORECASE | re.DOTALL)
_OPENED = re.compile(r"<answer>((?:(?!</?answer>).)*)\Z", re.IGNORECASE | re.DOTALL)
_BRACES = re.compile(r"\\[fd]?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
_DENIED = re.compile(
    r"\b(?:not|never|neither|nor|cannot|except|excluding|wrong|incorrect|false|unlikely|no|none)\b|n['’]t\b|\b(?:all|\w+thing) but\b"
    r"|\b(?:is|are|was|were|do|does|did|ca|could|wo|would|should|must)nt\b",
    re.IGNORECASE,
)
_DENIED_MARK = re.compile(r"(?:\b(?:not|never|neither|nor|except|cannot be)|n['’]t(?: be)?)[\s:$(\[*]*\Z", re.IGNORECASE)
_LISTED_MARKS = re.compile(r"[\s$)\].*]*(?:,?\s*\b(?:or|and)\b(?:\s+(?:maybe|perhaps|possibly|also))?|[,;/&|])[\s$(\[*]*", re.IGNORECASE)
_CLAUSE = re.compile(r"[.!?;,:\n]|\b(?:so|therefore|thus|hence|then|(?<!all )(?<!thing )but)\b", re.IGNORECASE)
_THOUGHT = re.compile(r"</think>", re.IGNORECASE)


class Verifier(ABC):
    """A plug-in that judges answers. A data row names its verifier in `extra["verifier"]`, so every option has a default.

    `answers` are whole responses; `rows` holds the columns of their data rows, first dimension the batch (`answer`, the right one;
    `choices`; and whatever else a verifier needs). One judgement each, float32 from 0 to 1  # (batch,). NaN says that there is nothing
    to judge by, because the right answer is missing or cannot be read: that is not a wrong answer, and is left out of every mean.

    As a reward of a learner it counts `weight` times.
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        self.weight = weight

    @abstractmethod
    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor: ...


class AnswerVerifier(Verifier):
    """Reads the right answer and the given one in the same way and compares what they mean: 1 or 0 for each row."""

    @abstractmethod
    def read(self, text: str, choices: Sequence[str], alone: bool) -> Any:
        """What a text means, None where it cannot be read. `alone` says that the text is nothing but the answer."""

    def agree(self, given: Any, right: Any) -> bool:
        return bool(given == right)

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        right = words(rows, "answer", len(answers))
        choices = words(rows, "choices", len(answers)) if "choices" in rows else [""] * len(answers)
        known: dict[tuple[str, str], Any] = {}  # a row comes once for each of its rollouts
        judged = []
        for answer, gold, offered in zip(answers, right, choices, strict=True):
            listed = offered.split("\n") if offered else []
            if (gold, offered) not in known:
                known[gold, offered] = self.read(extract(gold), listed, True)
            meant = known[gold, offered]
            if meant is None:
                judged.append(math.nan)
                continue
            inside = marked(answer)
            given = self.read(extract(answer) if inside is None else inside, listed, inside is not None)
            judged.append(float(given is not None and self.agree(given, meant)))
        return torch.tensor(judged, dtype=torch.float32)


def words(rows: Mapping[str, Column], name: str, count: int) -> list[str]:
    """A column of text, one for each answer."""
    column = rows.get(name)
    if not isinstance(column, list) or len(column) != count:
        held = "is missing" if column is None else f"has {len(column)} values"
        raise DataError(f"the rows' column {name!r} {held}: a verifier needs one text for each of the {count} answers")
    return column


def marked(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, or else in the last `\\boxed{...}` after the thinking; None without either.

    Of tags or boxes inside each other the inner one counts. An `<answer>` that is never closed reaches to the end of the text, because
    generation is often stopped at the closing tag; a box that is never closed is none. Two that are offered as a list ("or", a comma), and
    one that is denied ("not"), hold no answer: "".
    """
    spoken = _spoken(text)
    tagged = list(_TAGGED.finditer(spoken)) or list(_OPENED.finditer(spoken))
    inside = tagged[-1][1] if tagged else spoken
    if tagged and _taken_back(spoken, [found.span() for found in tagged]):
        return ""
    boxes = _boxes(inside)
    if boxes:
        return "" if _taken_back(inside, [(start, end) for start, _, end in boxes]) else inside[boxes[-1][1] : boxes[-1][2] - 1].strip()
    return inside.strip() if tagged else None


def denies(text: str) -> bool:
    """Whether a text says no: not, isn't, never, neither, except, wrong."""
    return _DENIED.search(text) is not None


def last_clause(text: str) -> str:
    """What was said since the last comma, full stop, "so" or "but"."""
    start = 0
    for found in _CLAUSE.finditer(text):
        start = found.end()
    return text[start:]


def _taken_back(text: str, marks: Sequence[tuple[int, int]]) -> bool:
    """Whether the last mark is one of a list of different ones, or is denied."""
    (*_, (before, after)), (start, end) = [(0, 0), *marks[:-1]], marks[-1]
    between = tidied(text[after:start])
    if _DENIED_MARK.search(between):
        return True
    return len(marks) > 1 and text[before:after] != text[start:end] and _LISTED_MARKS.fullmatch(between) is not None


def extract(text: str) -> str:
    """The part of a response that is the answer: what is marked, or else all that follows the thinking (`</think>`)."""
    inside = marked(text)
    return _spoken(text).strip() if inside is None else inside


def tidied(text: str) -> str:
    """A text without empty lines, and with single spaces: rules over it then take time in proportion to its length."""
    return "\n".join(tidy for line in text.splitlines() if (tidy := " ".join(line.split())))


def _spoken(text: str) -> str:
    """What follows the last `</think>`; everything, where nothing does."""
    rest = _THOUGHT.split(text)[-1]
    return rest if rest.strip() else text


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """The boxes that hold no other: where each begins, its inside begins, and it ends. One pass with a stack, for a response may be
    nothing but opened boxes."""
    opened: list[tuple[bool, int, int]] = []  # whether it is a box, where it begins, and its inside
    closed: list[tuple[int, int, int]] = []
    for found in _BRACES.finditer(text):
        sign = found.group()
        if sign.endswith("{") and sign != r"\{":
            opened.append((len(sign) > 1, found.start(), found.end()))
        elif sign == "}" and opened:
            box, start, inside = opened.pop()
            if box and (not closed or start > closed[-1][0]):
                closed.append((start, inside, found.end()))
    return closed


__all__ = ["AnswerVerifier", "Verifier", "denies", "extract", "last_clause", "marked", "tidied", "words"]
