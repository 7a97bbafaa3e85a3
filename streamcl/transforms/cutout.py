"""A square of each image set to 0 (DeVries and Taylor, 2017: Improved Regularization of Convolutional Neural Networks with Cutout).

The square's middle lies anywhere in the image, so that a part of it may lie outside. Use it after `normalize`, where 0 is the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.options import PositiveInt
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import draw


class Cutout(Transform):
    def __init__(self, *, size: PositiveInt = 8) -> None:
        super().__init__()
        self.size = size

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        uniform = draw(len(values), 2, generator).to(values.device)
        rows, columns = (self.covered(uniform[:, axis], values.shape[axis + 2]) for axis in (0, 1))
        return values.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)

    def covered(self, uniform: Tensor, pixels: int) -> Tensor:
        """Which pixels of one axis the square covers  # (batch, pixels)"""
        start = (uniform * pixels).long() - self.size // 2
        distance = torch.arange(pixels, device=uniform.device) - start[:, None]
        return (distance >= 0) & (distance < self.size)
