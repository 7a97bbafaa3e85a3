"""Brightness, contrast and saturation of each image changed by random factors, in this order.

A strength of s draws the factor from [max(0, 1 - s), 1 + s]. Images run from 0 to 1, so it stands before `normalize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.options import NonNegativeFloat
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import between, draw

LUMINANCE = (0.2989, 0.587, 0.114)  # ITU-R BT.601


class Jitter(Transform):
    def __init__(self, *, brightness: NonNegativeFloat = 0.0, contrast: NonNegativeFloat = 0.0, saturation: NonNegativeFloat = 0.0) -> None:
        super().__init__()
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        uniform = draw(len(values), 3, generator).to(values)[:, :, None, None, None]
        if self.brightness:
            values = self.blend(values, torch.zeros_like(values), uniform[:, 0], self.brightness)
        if self.contrast:
            values = self.blend(values, grey(values).mean(dim=(1, 2, 3), keepdim=True), uniform[:, 1], self.contrast)
        if self.saturation:
            values = self.blend(values, grey(values), uniform[:, 2], self.saturation)
        return values

    @staticmethod
    def blend(values: Tensor, other: Tensor, uniform: Tensor, strength: float) -> Tensor:
        factor = between(uniform, max(0.0, 1 - strength), 1 + strength)
        return (factor * values + (1 - factor) * other).clamp(0, 1)


def grey(values: Tensor) -> Tensor:
    """The luminance  # (batch, 1, height, width)"""
    if values.shape[1] != 3:
        return values.mean(dim=1, keepdim=True)
    return (values * torch.tensor(LUMINANCE).to(values)[:, None, None]).sum(dim=1, keepdim=True)
