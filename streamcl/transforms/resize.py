"""Images at another size, antialiased.

`size` is the length of the shorter side, and the longer one follows; a pair is height and width, whatever the shape was.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamcl.options import PositiveInt
from streamcl.stream import Modality, Transform


class Resize(Transform):
    def __init__(
        self,
        *,
        size: PositiveInt | tuple[PositiveInt, PositiveInt],
        interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear",
    ) -> None:
        super().__init__()
        self.size, self.interpolation = size, interpolation

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        height, width = values.shape[-2:]
        if isinstance(self.size, int):
            shorter = min(height, width)
            size = (self.size * height // shorter, self.size * width // shorter)
        else:
            size = (self.size[0], self.size[1])
        if size == (height, width):
            return values
        if self.interpolation == "nearest":
            return interpolate(values, size, mode="nearest-exact")
        return interpolate(values, size, mode=self.interpolation, antialias=True)
