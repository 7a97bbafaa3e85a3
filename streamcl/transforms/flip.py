"""Each image mirrored left to right with some `probability`."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.options import Fraction
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import draw


class Flip(Transform):
    def __init__(self, *, probability: Fraction = 0.5) -> None:
        super().__init__()
        self.probability = probability

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        chosen = (draw(len(values), 1, generator) < self.probability).to(values.device)[:, :, None, None]
        return torch.where(chosen, values.flip(-1), values)
