"""A small mixture of experts: layers of perceptrons, side by side, weighed for each sample by a softmax router.

Each layer normalises what comes in (x) and is  sum_e w_e(x) expert_e(x),  w = softmax(router(x)),  expert_e a perceptron of one hidden
layer; a ReLU follows. Every expert is computed: this is for methods that read and change the routing (`streamcl.nn.routing`), not for
speed. It reads one numeric modality, flattened. Trained from scratch: no weights, no licence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from streamcl.nn.backbone import NUMERIC, Backbone, choose_modality, numbers
from streamcl.nn.expandable import Entry
from streamcl.nn.routing import Routing
from streamcl.options import PositiveInt
from streamcl.stream import Batch, StreamInfo


class Mixture(Backbone):
    """`layers` of `experts` each, with `hidden` units inside and `width` features coming out."""

    def __init__(
        self,
        *,
        experts: PositiveInt = 4,
        layers: PositiveInt = 1,
        hidden: PositiveInt = 64,
        width: PositiveInt = 64,
        modality: str | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.depth, self.hidden, self.width, self.modality = experts, layers, hidden, width, modality

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modality(info, self.modality, NUMERIC, "mixture")
        sizes = [math.prod(info.modalities[self.reads].shape)] + [self.width] * (self.depth - 1)
        self.layers = nn.ModuleList(_Mixed(size, self.hidden, self.width, self.experts) for size in sizes)
        self.dim = self.width

    def split(self) -> tuple[nn.Module, nn.Module]:
        return Entry(self.reads, nn.Flatten(), *self.layers[:-1]), self.layers[-1]

    def forward(self, batch: Batch) -> Tensor:
        values = numbers(batch, self.reads).flatten(1)
        for layer in self.layers:
            values = layer(values)
        return values


class _Mixed(nn.Module):
    def __init__(self, size: int, hidden: int, width: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.router, self.routing = nn.Linear(size, experts), Routing(experts)
        self.first = nn.ModuleList(nn.Linear(size, hidden) for _ in range(experts))
        self.second = nn.ModuleList(nn.Linear(hidden, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        weights = self.routing(self.router(x))
        answers = torch.stack([second(relu(first(x))) for first, second in zip(self.first, self.second, strict=True)], dim=1)
        return relu((weights[:, :, None] * answers).sum(dim=1))
