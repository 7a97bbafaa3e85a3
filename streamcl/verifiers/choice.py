"""The answer picks the right one of several choices, by its letter or by its own words.

Understood are a letter from A to Z as `B`, `b`, `B.`, `(B)`, `B) the cat`, in a sentence ("the answer is B", "option (B)"), and a choice's
words, alone or as the only choice that a sentence names; words are compared as by `text`. The row's `choices` (one per line, with or
without letters of their own) say which letters and words there are; a row without them knows letters only. Where the choices are
themselves single letters, their words go first.

Two different choices in one answer are no choice, letters beyond the last choice are none, and the words of a choice beside the
letter of another contradict it: all earn 0. A right answer that names no choice is not judged by (NaN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from streamcl.verifier import AnswerVerifier, tidied

from .text import normalised

_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\*\*|__|\$|`")
_LETTER = re.compile(r"""["'(\[]*([A-Za-z])["')\].:,]*""")
_BEFORE = re.compile(r"""[(\["']*([A-Za-z])\s*(?:[)\]."']*[).:]|\s[-–]\s)\s*(?P<words>\S.*)""", re.DOTALL)
_CUE = re.compile(
    r"""\b(?i:(?:answer|choice|option)(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?|choose|pick|select)"""
    r"""\s*:?\s*(?i:(?:option|choice|answer)\s*)?"""
    r"""(?:\(\s*([A-Za-z])\s*\)|["'\[]?([A-Z])(?=["'\]]?\s*(?:[.,;:!)\n]|\Z|(?:because|since|as|for|is)\b)))"""
)
_BRACKETED = re.compile(r"\(\s*([A-Za-z])\s*\)")
_BARE = re.compile(r"(?<![\w'’-])(?![AI]\s+(?!(?:or|and)\b)[a-z])([A-Z])(?![\w'’-])")  # but for "A cat" and "I think"


class Choice(AnswerVerifier):
    def read(self, text: str, choices: Sequence[str], alone: bool) -> int | None:
        """The place of the choice."""
        plain = _MARKUP.sub(lambda found: found[1] or "", tidied(text)).strip()
        offered = _own_words(choices)
        named = [place for place, words in enumerate(offered) if words == normalised(plain)]
        if len(named) == 1 and plain:
            return named[0]
        single = _LETTER.fullmatch(plain)
        if single:
            return _place(single[1], offered)
        before = _BEFORE.fullmatch(plain)
        if before and (place := _place(before[1], offered)) is not None:
            said = normalised(before["words"])
            if not offered or said == offered[place]:
                return place
            if said in offered:
                return None
        return self._in_a_sentence(plain, offered)

    def _in_a_sentence(self, plain: str, offered: list[str]) -> int | None:
        cues = [found[1] or found[2] for found in _CUE.finditer(plain)]
        if cues:
            return _place(cues[-1], offered)
        for letters in (_BRACKETED.findall(plain), _BARE.findall(plain)):
            named = {place for letter in letters if (place := _place(letter, offered)) is not None}
            if named:
                return named.pop() if len(named) == 1 else None
        return _only_one_named(normalised(plain), offered)


def _place(letter: str, offered: Sequence[str]) -> int | None:
    place = ord(letter.upper()) - ord("A")
    return place if place < (len(offered) or 26) else None


def _own_words(choices: Sequence[str]) -> list[str]:
    """The choices as they are compared, without the letters before them where each has its own."""
    lettered = [_BEFORE.fullmatch(choice.strip()) for choice in choices]
    if all(found and _place(found[1], choices) == place for place, found in enumerate(lettered)):
        return [normalised(found["words"]) for found in lettered if found]
    return [normalised(choice) for choice in choices]


def _only_one_named(text: str, offered: Sequence[str]) -> int | None:
    """The one choice whose words occur in the text; words inside the words of a longer choice are not its own."""
    named: list[int] = []
    for words in sorted(set(offered) - {""}, key=lambda words: (-len(words), words)):
        whole = re.compile(rf"(?<!\S){re.escape(words)}(?!\S)")
        if whole.search(text):
            named += [place for place, other in enumerate(offered) if other == words]
            text = whole.sub("|", text)
    return named[0] if len(named) == 1 else None
