"""Answers in words: the share that each row's own verifier accepts.

A row names its verifier in `extra["verifier"]`. A row whose own right answer cannot be read (NaN) is left out of the share.
"""

from __future__ import annotations

import math
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
        self._verifier = plugin_spec("verifier", "own").build()

    def update(self, answer: Answer) -> None:
        batch, texts = answer.batch, answer.texts
        if texts is None or len(texts) != len(batch):
            told = "none" if texts is None else len(texts)
            raise PluginError(
                f"this stream is answered in words: predict must return a text for each of {len(batch)} rows, and gave {told}"
            )
        if not isinstance(batch.extra.get("verifier"), list):
            raise DataError("a row of this stream names no verifier (extra['verifier'])")
        extra = batch.to("cpu").extra
        if texts and not isinstance(texts[0], str):  # several for each row: one that is right is enough
            each = torch.tensor([len(several) for several in texts])
            owner = torch.arange(len(texts)).repeat_interleave(each)
            rows = {name: take(values, owner) for name, values in extra.items()}
            judged = self._verifier([text for several in texts for text in several], rows).double().cpu()
            given = torch.full((len(texts),), -math.inf, dtype=torch.float64).scatter_reduce(0, owner, judged, "amax")
        else:
            given = self._verifier(texts, extra).double().cpu()
        known = given.isfinite()
        group = answer.target.cpu() if batch.target is not None else torch.zeros(len(batch), dtype=torch.int64)
        groups = self.sums.shape[1]
        for row, values in enumerate((given[known], torch.ones(int(known.sum()), dtype=torch.float64))):
            self.sums[row] += torch.zeros(groups, dtype=torch.float64).index_add_(0, group[known], values).to(self.sums.device)

    def compute(self) -> Score:
        given, rows = self.sums.tolist()
        total = sum(rows)
        return Score(sum(given) / total if total else None, [g / n if n else None for g, n in zip(given, rows, strict=True)])
