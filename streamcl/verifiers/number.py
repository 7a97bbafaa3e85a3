"""The answer is the right number, however it is written, within a tolerance.

Read are whole and decimal numbers, signs, separators of thousands (1,234 and 1.234.567; a comma before other than three digits is the
decimal sign), fractions (3/4, 1 1/2, \\frac{3}{4}), powers of ten (1e-3, 2 \\times 10^5), number words below one hundred, scales
(3 million), percent, currency and units, which are left off. Nothing is evaluated: sqrt(2), 2^10 and 2 pi are no numbers.

Inside `<answer>...</answer>` or `\\boxed{...}`, and in the right answer, the text must be one number alone (what follows the last `=`
counts), so that `3 or 4` earns nothing. In a free sentence the number after the last "answer is" counts, or else the last one. Units
are not compared. Where one of the two numbers is in percent and the other is not, 50% agrees with 50 and with 0.5.

A right answer that is no number is not judged by (NaN).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from streamcl.options import NonNegativeFloat
from streamcl.verifier import AnswerVerifier

from ._numbers import Number as Read
from ._numbers import number_alone, numbers_in

_CUE = re.compile(r"\banswer\s*(?:is|:|=|would be|should be)", re.IGNORECASE)


class Number(AnswerVerifier):
    """Right is what differs by no more than `absolute`, or than `relative` times the right number.

    The defaults leave room for nothing but the last digit of a float. Computed exactly, so that a difference of just the tolerance is in.
    """

    def __init__(self, *, relative: NonNegativeFloat = 1e-6, absolute: NonNegativeFloat = 0.0) -> None:
        self.relative, self.absolute = Fraction(str(relative)), Fraction(str(absolute))

    def read(self, text: str, choices: Sequence[str], alone: bool) -> Read | None:
        number = number_alone(text)
        if alone or number is not None:
            return number
        cues = [found.end() for found in _CUE.finditer(text)]
        if cues:
            after, _ = numbers_in(text[cues[-1] :])
            return after[0] if after else None
        found, _ = numbers_in(text)
        return found[-1] if found else None

    def agree(self, given: Read, right: Read) -> bool:
        if given.percent == right.percent:
            return self._near(given.value, right.value)
        if given.percent:
            return any(self._near(value, right.value) for value in (given.value, given.value / 100))
        return any(self._near(given.value, value) for value in (right.value, right.value / 100))

    def _near(self, given: Fraction, right: Fraction) -> bool:
        return abs(given - right) <= max(self.absolute, self.relative * abs(right))
