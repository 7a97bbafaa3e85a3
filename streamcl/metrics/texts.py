"""Answers in words: the share that each row's own verifier accepts.

A row names its verifier in `extra["verifier"]`. A row whose own right answer cannot be read (NaN) is left out of the share.
"""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from torch import Tensor

from streamcl.config import plugin_spec
from streamcl.errors import DataError, PluginError
from streamcl.metrics import Answer, Room, Score
from streamcl.stream import take


class Verified(torchmetrics.Metric):
    """The mean of what the verifiers give, over all rows and per group of rows."""

    sums: Tensor  # (2, groups): what was given, and how many rows

    def __init__(self, room: Room, **settings: Any) -> None:
        super().__init__(**settings)
        self.set_dtype(torch.float64)
        self.add_state("sums", torch.zeros(2, max(room.classes, 1), dtype=torch.float64), dist_reduce_fx="sum")
        self._verifiers: dict[str, Any] = {}

    def update(self, answer: Answer) -> None:
        batch, texts = answer.batch, answer.texts
        if texts is None or len(texts) != len(batch):
            told = "none" if texts is None else len(texts)
            raise PluginError(
                f"this stream is answered in words: predict must return a text for each of {len(batch)} rows, and gave {told}"
            )
        names = batch.extra.get("verifier")
        if not isinstance(names, list):
            raise DataError("a row of this stream names no verifier (extra['verifier'])")
        extra = batch.to("cpu").extra
        given = torch.zeros(len(batch), dtype=torch.float64)
        for name in dict.fromkeys(names):
            mine = torch.tensor([place for place, other in enumerate(names) if other == name])
            if name not in self._verifiers:
                self._verifiers[name] = plugin_spec("verifier", name).build()
            rows = {column: take(values, mine) for column, values in extra.items()}
            given[mine] = self._verifiers[name]([texts[place] for place in mine.tolist()], rows).double().cpu()
        known = given.isfinite()
        group = answer.target.cpu() if batch.target is not None else torch.zeros(len(batch), dtype=torch.int64)
        groups = self.sums.shape[1]
        for row, values in enumerate((given[known], torch.ones(int(known.sum()), dtype=torch.float64))):
            self.sums[row] += torch.zeros(groups, dtype=torch.float64).index_add_(0, group[known], values).to(self.sums.device)

    def compute(self) -> Score:
        given, rows = self.sums.tolist()
        total = sum(rows)
        return Score(sum(given) / total if total else None, [g / n if n else None for g, n in zip(given, rows, strict=True)])
