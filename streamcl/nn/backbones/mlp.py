"""A multi-layer perceptron: linear layers with a ReLU (and dropout) after each, on one numeric modality, flattened.

The default of one hidden layer of 256 is what small continual-learning benchmarks use. Trained from scratch: no weights, no licence.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from streamcl.errors import ConfigError
from streamcl.nn.backbone import NUMERIC, Backbone, choose_modality, numbers
from streamcl.nn.expandable import Entry
from streamcl.options import Fraction, PositiveInt
from streamcl.stream import Batch, StreamInfo


class Mlp(Backbone):
    def __init__(self, *, hidden: list[PositiveInt] = [256], dropout: Fraction = 0.0, modality: str | None = None) -> None:  # noqa: B006
        super().__init__()
        if not hidden:
            raise ConfigError("hidden needs at least one layer; the backbone without layers is called identity")
        self.hidden, self.dropout, self.modality = list(hidden), dropout, modality

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modality(info, self.modality, NUMERIC, "mlp")
        sizes = [math.prod(info.modalities[self.reads].shape), *self.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()] + ([nn.Dropout(self.dropout)] if self.dropout else [])
        self.layers = nn.Sequential(*layers)
        self.dim = sizes[-1]

    def split(self) -> tuple[nn.Module, nn.Module]:
        last = 2 if not self.dropout else 3  # modules of one layer
        return Entry(self.reads, nn.Flatten(), *self.layers[:-last]), nn.Sequential(*self.layers[-last:])

    def forward(self, batch: Batch) -> Tensor:
        values = numbers(batch, self.reads).flatten(1)
        for layer in self.layers:  # without the frame of a call to Sequential, which a small model feels
            values = layer(values)
        return values
