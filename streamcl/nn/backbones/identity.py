"""The inputs themselves as features: one numeric modality, flattened. It has no parameters.

For analytic methods on raw pixels or on features that were computed before. The features of an image of integers run from 0 to 1,
because the engine divides integers by the largest value that the modality declares.
"""

from __future__ import annotations

import math

from torch import Tensor

from streamcl.nn.backbone import NUMERIC, Backbone, choose_modality, numbers
from streamcl.stream import Batch, StreamInfo


class Identity(Backbone):
    def __init__(self, *, modality: str | None = None) -> None:
        super().__init__()
        self.modality = modality

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modality(info, self.modality, NUMERIC, "identity")
        self.dim = math.prod(info.modalities[self.reads].shape)

    def forward(self, batch: Batch) -> Tensor:
        return numbers(batch, self.reads).flatten(1)
