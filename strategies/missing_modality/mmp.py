"""MMP: missing-aware prompts (Lee et al., Multimodal Prompting with Missing Modalities for Visual Recognition, CVPR 2023).

One set of prompts for each case of what is missing, in front of the first layers of a frozen multimodal transformer:

    P in R^(cases x layers x length x width),   case(sample) = the modalities that it lacks
    input       x <- layer_i([P[case, i], x])                                  what joined earlier stays: layers * length in the end
    attention   the first half of P[case, i] are more keys, the second more values, of layer i's attention alone

Absent values are dummies whose tokens are attended to. Prompts, the transformer's pooler and the classifier learn: a linear layer to twice
the width, LayerNorm, GELU, and the head. `length: 0` is the frozen model with that classifier alone, which the prompts have to beat.

The released code knows image and text and three cases; here M modalities have 2^M - 1 (all patterns that leave one), in the order of the
code that the scenario writes (0 is complete, bit i the i-th modality in alphabetical order). As there, all rows are zero but one of ones:
row 0 for complete, 1 for image missing, 2 for text missing, so the row of a case is its code modulo the length (of either half with
`attention`). A sample without anything is refused in training; in serving it takes the last case. Defaults are the released ones: length
16, the first 6 layers, AdamW at 1e-2 with weight decay 2e-2, batches of 256, 20 epochs, a tenth of warm-up, then linearly to 0. Two
things differ: the rate changes by epochs and not by steps, and biases and norms decay like everything else; a ViLT reads the 40 tokens
of text that it was trained with, where the release stretches its table of places to hundreds.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.prompts import Insertion, Promptable, Prompts, code
from streamcl.options import NonNegativeInt, Optimizer, PositiveInt, Schedule
from streamcl.stream import StreamInfo

from ._prompted import Prompted


class MMP(Prompted):
    def __init__(
        self,
        *,
        length: NonNegativeInt = 16,
        layers: PositiveInt = 6,
        form: Literal["input", "attention"] = "input",
        epochs: PositiveInt = 20,
        batch: PositiveInt = 256,
        optimizer: Optimizer = Optimizer(name="adamw", lr=1e-2, weight_decay=2e-2),  # noqa: B008
        schedule: Schedule = Schedule(name="linear", warmup=0.1),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)
        if form == "attention" and length % 2:
            raise ConfigError(f"mmp: with form: attention half of a prompt are keys and half values, and length is {length}: make it even")
        self.length, self.layers, self.form = length, layers, form

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.model.head.widen(2 * self.transformer.width)

    def prompts_for(self, transformer: Promptable) -> Prompts:
        if self.layers > transformer.depth:
            raise ConfigError(
                f"mmp: layers is {self.layers}, and the transformer has {transformer.depth}: set strategy.layers to at most that"
            )
        return _CasePrompts(len(transformer.reads), self.layers, self.length, transformer.width, self.form)

    def opened(self, transformer: Promptable) -> list[nn.Parameter]:
        return transformer.pooler()


class _CasePrompts(Prompts):
    """The prompts of every case, and the first part of the classifier."""

    def __init__(self, modalities: int, layers: int, length: int, width: int, form: str) -> None:
        super().__init__()
        self.layers, self.form, cases = layers, form, 2**modalities - 1
        prompts = torch.zeros(cases, layers, length, width)
        for first, size in ((0, length // 2), (length // 2, length // 2)) if form == "attention" else ((0, length),):
            for case in range(cases if size else 0):
                prompts[case, :, first + case % size] = 1
        self.cases = nn.Parameter(prompts)
        self.classifier = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU())

    def before(self, layer: int, here: Tensor) -> Insertion | None:
        if layer >= self.layers:
            return None
        mine = self.cases[:, layer].index_select(0, code(here).clamp(max=len(self.cases) - 1))  # (batch, length, width)
        if self.form == "input":
            return Insertion(mine)
        keys, values = mine.chunk(2, dim=1)
        return Insertion(keys, values)

    def after(self, features: Tensor) -> Tensor:
        return self.classifier(features)
