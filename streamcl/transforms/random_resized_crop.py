"""A random box of each image, brought to one size: the augmentation of ImageNet training (Szegedy et al., 2015).

A box covers a fraction of the image's area drawn from `scale`, with width over height drawn from `ratio` on a log scale; after ten
boxes that do not fit, the largest one in the middle is taken. Boxes lie on whole pixels. The box is resampled with antialiasing, as
`resize` does it, for all samples at once: resampling is linear and separable, so it is a matrix per sample and axis.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import Fraction, PositiveFloat, PositiveInt
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import between, draw

ATTEMPTS = 10


class RandomResizedCrop(Transform):
    def __init__(
        self,
        *,
        size: PositiveInt | tuple[PositiveInt, PositiveInt],
        scale: tuple[Fraction, Fraction] = (0.08, 1.0),
        ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333),
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> None:
        super().__init__()
        if not (0 < scale[0] <= scale[1] and ratio[0] <= ratio[1]):
            raise ConfigError(f"scale {scale} and ratio {ratio} must each run from a smaller number above 0 to a larger one")
        self.size = (size, size) if isinstance(size, int) else size
        self.scale, self.ratio, self.interpolation = scale, ratio, interpolation

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        height, width = values.shape[-2:]
        boxes = self.boxes(draw(len(values), 2 * ATTEMPTS + 2, generator), height, width)
        top, left, rows, columns = boxes.to(values.device)
        down = resampling(top, rows, height, self.size[0], self.interpolation).to(values.dtype)  # (batch, out, height)
        across = resampling(left, columns, width, self.size[1], self.interpolation).to(values.dtype)  # (batch, out, width)
        return down[:, None] @ values @ across[:, None].mT

    def boxes(self, uniform: Tensor, height: int, width: int) -> Tensor:
        """Top, left, rows and columns of a box per sample  # (4, batch)"""
        area = height * width * between(uniform[:, :ATTEMPTS], *self.scale)
        ratio = between(uniform[:, ATTEMPTS : 2 * ATTEMPTS], math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        rows, columns = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()  # (batch, attempts)
        fits = (rows > 0) & (rows <= height) & (columns > 0) & (columns <= width)
        first = fits.byte().argmax(dim=1, keepdim=True)
        widest = min(max(width / height, self.ratio[0]), self.ratio[1])
        largest = (min(height, round(width / widest)), min(width, round(height * widest)))
        found = fits.any(dim=1)
        rows = torch.where(found, rows.gather(1, first)[:, 0], largest[0])
        columns = torch.where(found, columns.gather(1, first)[:, 0], largest[1])
        top = torch.where(found, (uniform[:, -2] * (height - rows + 1)).floor(), (height - largest[0]) // 2)
        left = torch.where(found, (uniform[:, -1] * (width - columns + 1)).floor(), (width - largest[1]) // 2)
        return torch.stack([top, left, rows, columns])


def resampling(start: Tensor, length: Tensor, pixels: int, out: int, interpolation: str) -> Tensor:
    """The matrices that bring the pixels [start, start + length) of each sample to `out` pixels  # (batch, out, pixels)"""
    step = (length / out)[:, None, None]
    reach = step.clamp(min=1)  # a filter as wide as an output pixel is what keeps a smaller picture free of aliases
    centre = start[:, None, None] + step * (torch.arange(out, device=start.device) + 0.5)[:, None]
    position = torch.arange(pixels, device=start.device) + 0.5
    weights = (triangle if interpolation == "bilinear" else cubic)((position - centre) / reach)
    weights = weights * ((position > start[:, None, None]) & (position < (start + length)[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def triangle(x: Tensor) -> Tensor:
    """The filter of bilinear interpolation."""
    return (1 - x.abs()).clamp(min=0)


def cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """The filter of bicubic interpolation (Keys, 1981)."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
