"""The answer is the right number, however it is written, within a tolerance.

Read are whole and decimal numbers, signs, separators of thousands (1,234 and 1.234.567; a comma before other than three digits is the
decimal sign), fractions (3/4, 1 1/2, \\frac{3}{4}), powers of ten (1e-3, 2 \\times 10^5), number words below one hundred, scales
(3 million), percent, currency and units, which are left off. Nothing is evaluated: sqrt(2), 2^10 and 2 pi are no numbers.

Inside `<answer>...</answer>` or `\\boxed{...}`, and in the right answer, the text must be one number alone (what follows the last `=`
counts), so that `3 or 4`, `not 3` and `at least 3` earn nothing. In a free sentence the number after the last "answer is" counts, or
else the last one; where it is denied, or one of several that are offered ("3 or 4", "3, 4"), there is none. Units are not compared.
Where one of the two numbers is in percent and the other is not, 50% agrees with 50 and with 0.5.

A right answer that is no number is not judged by (NaN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from streamcl.options import NonNegativeFloat
from streamcl.verifier import AnswerVerifier, denies, last_clause

from ._numbers import Number as Read
from ._numbers import number_alone, numbers_in

_CUE = re.compile(r"\banswer\s*(?:is|:|=|would be|should be)", re.IGNORECASE)
_OFFERED = re.compile(r"\s*(?:,|/|&|;|\||-|\n|and|or|to|,\s*and)?\s*(?:maybe|perhaps|possibly|also)?\s*", re.IGNORECASE)
_OTHERWISE = re.compile(r"[^\w.!?\n]*(?:[^\W\d_]+ ){0,2}?(?:or\b|(?:is |it is )?(?:not|wrong|incorrect|false)\b|isn['’]t\b)", re.IGNORECASE)


class Number(AnswerVerifier):
    """Right is what differs by no more than `absolute`, or than `relative` times the right number.

    The defaults leave room for nothing but the last digit of a float. Computed exactly, so that a difference of just the tolerance is in.
    """

    def __init__(self, *, relative: NonNegativeFloat = 1e-6, absolute: NonNegativeFloat = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.relative, self.absolute = Fraction(str(relative)), Fraction(str(absolute))

    def read(self, text: str, choices: Sequence[str], alone: bool) -> Read | None:
        number = number_alone(text)
        if alone or number is not None:
            return number
        cues = list(_CUE.finditer(text))
        numbers, rest = numbers_in(text[cues[-1].end() :] if cues else text)
        around = rest.split("\0")  # one piece before each number, and one at the end
        place = 0 if cues else len(numbers) - 1
        if not numbers or _OTHERWISE.match(around[place + 1]):
            return None
        before = last_clause((text[: cues[-1].end()] + " " if cues else "") + around[place])
        beside = around[1:-1][:1] if cues else around[1:-1][-1:]
        return None if denies(before) or any(_OFFERED.fullmatch(between) for between in beside) else numbers[place]

    def agree(self, given: Read, right: Read) -> bool:
        if given.percent == right.percent:
            return self._near(given.value, right.value)
        if given.percent:
            return any(self._near(value, right.value) for value in (given.value, given.value / 100))
        return any(self._near(given.value, value) for value in (right.value, right.value / 100))

    def _near(self, given: Fraction, right: Fraction) -> bool:
        return abs(given - right) <= max(self.absolute, self.relative * abs(right))
