"""Each image turned about its middle by an angle drawn from [-degrees, degrees]; what comes in from outside is 0."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from streamcl.options import NonNegativeFloat
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import between, draw


class Rotate(Transform):
    def __init__(self, *, degrees: NonNegativeFloat = 15.0) -> None:
        super().__init__()
        self.degrees = degrees

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        angle = between(draw(len(values), 1, generator)[:, 0], -self.degrees, self.degrees) * (math.pi / 180)  # counter-clockwise
        height, width = values.shape[-2:]
        # a grid runs from -1 to 1 along both axes: the ratio of the sides keeps the turn from shearing
        row_x = torch.stack([angle.cos(), -angle.sin() * (height / width), torch.zeros_like(angle)], dim=1)
        row_y = torch.stack([angle.sin() * (width / height), angle.cos(), torch.zeros_like(angle)], dim=1)
        grid = affine_grid(torch.stack([row_x, row_y], dim=1).to(values), list(values.shape), align_corners=False)
        return grid_sample(values, grid, align_corners=False)
