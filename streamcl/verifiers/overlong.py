"""A penalty for answers that are nearly too long, instead of one for being cut off: DAPO's (Yu et al., 2025, arXiv 2503.14476).

Of an answer of n tokens: 0 up to `longest - cushion`, then down in a straight line to -1 at `longest`, and -1 beyond. It reads the column
`length`, which learners give their rewards. The only judgement below 0: a reward, no score. Defaults: the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.stream import Column
from streamcl.verifier import Verifier


class Overlong(Verifier):
    def __init__(self, *, longest: PositiveInt = 20480, cushion: PositiveInt = 4096, **options: Any) -> None:
        super().__init__(**options)
        if cushion > longest:
            raise ConfigError(f"overlong: cushion is {cushion} and longest {longest}: the cushion is the last part of the longest answer")
        self.longest, self.cushion = longest, cushion

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        lengths = torch.as_tensor(rows.get("length", ()), dtype=torch.float32).cpu()
        if len(lengths) != len(answers):
            held = "is missing" if "length" not in rows else f"has {len(lengths)} values"
            raise DataError(f"the rows' column 'length' {held}: overlong needs the tokens of each of the {len(answers)} answers")
        return ((self.longest - self.cushion - lengths) / self.cushion).clamp(-1.0, 0.0)
