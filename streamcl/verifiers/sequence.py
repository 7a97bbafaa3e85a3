"""The answer lists the right things in the right order, all of them and nothing else.

Separators are a new line, `,`, `;`, `|`, arrows (`->`, `→`, `>`), the words "then" and "and", or plain spaces where there is none of these
and every part is a number or a single letter. Brackets around the list and the numbers or dashes of a list with one line each are left
off. A comma always parts: 1,000 is two things here. Things are compared as numbers where they are numbers, and else as by `text`. Single
letters or digits may also be written without a gap (BAC). In a free sentence the list is what follows the last ":", "is" or "are"; a
clause that denies it ("It isn't this: 3, 1, 2") earns nothing.

A right answer with nothing in it is not judged by (NaN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from streamcl.verifier import AnswerVerifier, denies, last_clause, tidied

from ._numbers import number_alone
from .text import normalised

_PARTS = re.compile(r" ?(?:\n|[,;|→>]|[-=]>|\\(?:right|to)\w*|\) ?\()(?: ?\b(?:and|then)\b)*| (?:and )?then | and ", re.IGNORECASE)
_LINE = re.compile(r"^(?:\(?(\d+)[.)]|[-*•]) ", re.MULTILINE)
_CUE = re.compile(r":|\bis\b|\bare\b", re.IGNORECASE)


class SequenceVerifier(AnswerVerifier):
    def read(self, text: str, choices: Sequence[str], alone: bool) -> tuple[str, ...] | None:
        text = tidied(text)
        cues = [] if alone else [found.end() for found in _CUE.finditer(text)]
        if cues and denies(last_clause(text[: cues[-1]].rstrip(" :"))):
            return None
        listed = _without_marks(text[cues[-1] :] if cues else text).strip()
        listed = listed.rstrip(".").strip("[](){}<>\"'$").replace("**", "")
        parts = [part for part in _PARTS.split(listed) if part.strip()]
        if len(parts) == 1 and all(re.fullmatch(r"-?\d+(\.\d+)?|[A-Za-z]", word) for word in listed.split()):
            parts = listed.split()
        return tuple(_thing(part) for part in parts) or None

    def agree(self, given: tuple[str, ...], right: tuple[str, ...]) -> bool:
        return given == right or (len(given) == 1 and all(len(part) == 1 for part in right) and given[0] == "".join(right))


def _without_marks(text: str) -> str:
    """A list of lines without its dashes, or without its numbers where these only count from one."""
    numbers = [found[1] for found in _LINE.finditer(text)]
    counted = [str(place + 1) for place in range(len(numbers))]
    return _LINE.sub("", text) if len(numbers) > 1 and (numbers == counted or not any(numbers)) else text


def _thing(part: str) -> str:
    words = part.strip().strip("\"'()[]")
    number = number_alone(words) if re.fullmatch(r"[-+\d.,/ \\{}a-z]*\d[\d.}]*", words) and words[:1] in "-+.0123456789\\" else None
    return str(number.value) if number else normalised(words)
