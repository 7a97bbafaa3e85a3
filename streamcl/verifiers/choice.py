"""The answer picks the right one of several choices, by its letter or by its own words.

Understood are a letter from A to Z as `B`, `b`, `B.`, `(B)`, `B) the cat`, in a sentence ("the answer is B", "option (B)"), and a choice's
words, alone or as the only choice that a sentence names; words are compared as by `text`. The row's `choices` (one per line, with or
without letters of their own) say which letters and words there are; a row without them knows letters only. Where the choices are
themselves single letters, their words go first.

Inside `<answer>...</answer>` or `\\boxed{...}`, and in the right answer, nothing else may stand: a letter, the words of one choice, or
both. In a free sentence what follows the last "answer is", "choose" or the like counts, or else the one choice that is named at all.

Two different choices in one answer are no choice, letters beyond the last choice are none, the words of a choice beside the letter of
another contradict it, and what is denied (not, isn't, never, except) or taken back in the next sentence is not chosen: all earn 0. What
follows "because" or "since" is a reason, which may name other choices. A right answer that names no choice is not judged by (NaN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from streamcl.verifier import AnswerVerifier, denies, last_clause, tidied

from .text import normalised

_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\*\*|__|\$|`")
_LETTER = re.compile(r"""["'(\[]*([A-Za-z])["')\].:,]*""")
_BEFORE = re.compile(r"""[(\["']*([A-Za-z])\s*(?:[)\]."']*[).:]|\s[-–]\s)\s*(?P<words>\S.*)""", re.DOTALL)
_FILLER = r"(?:\s+(?:not|never|definitely|clearly|probably|likely|most|therefore|thus|certainly|surely|either|both))*"
_CUE = re.compile(
    rf"""\b(?i:(?P<firm>answer|choose|pick|select)|choice|option)(?i:\s+(?:is|would\s+be|should\s+be|must\s+be))?(?i:{_FILLER})"""
    r"""\s*:?\s*(?i:(?:option|choice|answer)\s*)?"""
    r"""(?:\(\s*([A-Za-z])\s*\)|["'\[]?([A-Z])"""
    r"""(?=["'\]]?\s*(?:[.,;:!?/&+)\n]|\Z|(?:because|since|as|for|is|isn['’]t|or|and|but|maybe|not)\b)))"""
)
_BRACKETED = re.compile(r"\(\s*([A-Za-z])\s*\)")
_BARE = re.compile(r"(?<![\w'’-])(?![AI]\s+(?!(?:or|and)\b)[a-z])([A-Z])(?![\w'’-])")  # but for "A cat" and "I think"
_JOINED = re.compile(r"(?:\b(?:or|and)\s+|[,/&+]\s*)[(\[\"']?([b-hj-z])(?![\w'’-])")  # a small letter that goes on a list
_SENTENCE = re.compile(r"[.!?]+[\"')\]]*(?:\s+|\Z)|\n")
_REASON = re.compile(r"\b(?:because|since|given that|due to|as (?:the|it|they|there|this|that|we|only))\b", re.IGNORECASE)
_TAKEN_BACK = re.compile(
    r"(?:or|and|but|not?|nope|maybe|perhaps|possibly|alternatively|also|wait|actually|unless|hmm|sorry|just kidding)\b", re.IGNORECASE
)


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
            if offered and said == offered[place]:
                return place
            if not offered and not _hedged(before["words"] if alone else plain[before.end(1) :], place, offered):
                return place
            if not offered or any(re.match(rf"{re.escape(words)}(?!\S)", said) for words in offered if words != offered[place]):
                return None
        return None if alone else _in_a_sentence(plain, offered)


def _in_a_sentence(plain: str, offered: list[str]) -> int | None:
    cues = list(_CUE.finditer(plain))
    cues = [found for found in cues if found["firm"]] or cues
    if cues:
        letter = cues[-1].lastindex or 0
        place = _place(cues[-1][letter], offered)
        if place is None or denies(last_clause(plain[: cues[-1].start()]) + plain[cues[-1].start() : cues[-1].start(letter)]):
            return None
        return None if _hedged(_said_on(plain[cues[-1].end(letter) :], offered), place, offered) else place
    for kind in (_BRACKETED, _BARE):
        found = [match for match in kind.finditer(plain) if _place(match[1], offered) is not None]
        if found:
            named = {_place(match[1], offered) for match in found}
            place = named.pop()
            if named or place is None:
                return None
            before, after = last_clause(plain[: found[0].start()]), _said_on(plain[found[-1].end() :], offered)
            return None if denies(_without(_stated(before), place, offered)) or _hedged(after, place, offered) else place
    named_in_words = _only_one_named(normalised(plain), offered)
    if named_in_words is None or denies(offered[named_in_words]):
        return named_in_words  # "no" and "not enough is told" are choices that deny by themselves
    return None if denies(_stated(plain)) else named_in_words


def _said_on(rest: str, offered: Sequence[str]) -> str:
    """What is said of a choice after its letter: the rest of the sentence, and what takes it back or goes on with the list."""
    kept, end = [""], 0
    for stop in [*(found.end() for found in _SENTENCE.finditer(rest)), len(rest)]:
        sentence = rest[end:stop]
        only_choice = normalised(sentence) in offered or _LETTER.fullmatch(sentence.strip())
        if end and sentence.strip() and not only_choice and not _TAKEN_BACK.match(sentence):
            break
        kept.append(_stated(sentence))
        end = stop
    return " ".join(kept)


def _stated(sentence: str) -> str:
    """A sentence without the reason that it gives."""
    reason = _REASON.search(sentence)
    return sentence[: reason.start()] if reason else sentence


def _hedged(text: str, place: int, offered: Sequence[str]) -> bool:
    """Whether a text that follows a choice denies it, or names another one."""
    text = _without(text, place, offered)
    if denies(text):
        return True
    for kind in (_BRACKETED, _BARE, _JOINED):
        if any(_place(match[1], offered) not in (None, place) for match in kind.finditer(text)):
            return True
    words = normalised(text)
    return any(re.search(rf"(?<!\S){re.escape(other)}(?!\S)", words) for other in offered if other and other != offered[place])


def _without(text: str, place: int, offered: Sequence[str]) -> str:
    """The text without the choice's own words: "vitamin C" names no third choice."""
    own = r"\W+(?:(?:a|an|the) )?".join(map(re.escape, offered[place].split())) if offered else ""
    return re.sub(rf"(?i)(?<!\w){own}(?!\w)", " ", text) if own else text


def _place(letter: str, offered: Sequence[str]) -> int | None:
    if letter.lower() in offered:  # choices that are letters themselves
        return offered.index(letter.lower())
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
