"""Each row's own verifier, which its data names (`extra["verifier"]`): what a stream is scored by, as a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.config import plugin_spec
from streamcl.stream import Column, take
from streamcl.verifier import Verifier, words


class Own(Verifier):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.named: dict[str, Verifier] = {}

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        names = words(rows, "verifier", len(answers))
        judged = torch.zeros(len(answers))
        for name in dict.fromkeys(names):
            if name not in self.named:
                self.named[name] = plugin_spec("verifier", name).build()
            mine = torch.tensor([place for place, other in enumerate(names) if other == name])
            its_rows = {column: take(values, mine) for column, values in rows.items()}
            judged[mine] = self.named[name]([answers[place] for place in mine.tolist()], its_rows).float()
        return judged
