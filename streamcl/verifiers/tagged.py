"""The answer is right and stands where it was asked for: inside `<answer>...</answer>`, or inside `\\boxed{...}`.

Any other verifier takes an answer without tags as well; this one says 0 to it, whatever it holds. `verifier` judges what is inside
(`text` where none is named). A whole format with thinking and order of tags is a reward of its own, not this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from streamcl.stream import Column
from streamcl.verifier import Verifier, marked

from .text import Text


class Tagged(Verifier):
    def __init__(self, *, verifier: Verifier | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.verifier = verifier or Text()

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        inside = [marked(answer) for answer in answers]
        judged = self.verifier([f"<answer>{text or ''}</answer>" for text in inside], rows)
        for place, text in enumerate(inside):
            if text is None and not judged[place].isnan():
                judged[place] = 0
        return judged
