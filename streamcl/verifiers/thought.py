"""A rule that rates thinking by its form, for models that are too small for a judge: it is neither missing, nor too short, nor circling.

Of the words in <think>...</think>, the share of pairs of neighbours that are not a repetition of earlier ones, times how nearly the number
of words lies between `shortest` and `longest`: n / shortest below, longest / n above. 0 where nothing is thought. What was thought, and
whether the answer follows from it, it cannot tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import PositiveInt
from streamcl.stream import Column
from streamcl.verifier import Verifier

_BLOCK = re.compile(r"<think>((?:(?!</?think>).)*)</think>", re.DOTALL)


class Thought(Verifier):
    def __init__(self, *, shortest: PositiveInt = 4, longest: PositiveInt = 200, **options: Any) -> None:
        super().__init__(**options)
        if shortest > longest:
            raise ConfigError(f"thought: shortest is {shortest} and longest {longest}: no number of words is in between")
        self.shortest, self.longest = shortest, longest

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        return torch.tensor([self._rated(answer) for answer in answers], dtype=torch.float32)

    def _rated(self, answer: str) -> float:
        block = _BLOCK.search(answer)
        words = block[1].casefold().split() if block else []
        if not words:
            return 0.0
        pairs = list(pairwise(words))
        fresh = len(set(pairs)) / len(pairs) if pairs else 1.0
        return fresh * min(1.0, len(words) / self.shortest, self.longest / len(words))
