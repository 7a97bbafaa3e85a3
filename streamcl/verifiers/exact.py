"""The answer is the right one, character for character; only white space around it is free.

Looks inside `<answer>...</answer>` or `\\boxed{...}` where there is one. A right answer that is empty cannot be judged by (NaN).
"""

from __future__ import annotations

from collections.abc import Sequence

from streamcl.verifier import AnswerVerifier


class Exact(AnswerVerifier):
    def read(self, text: str, choices: Sequence[str], alone: bool) -> str | None:
        return text or None
