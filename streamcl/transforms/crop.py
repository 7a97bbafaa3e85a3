"""A random window of each image, cut from the image with a border around it: the usual augmentation of CIFAR-10 and CIFAR-100.

`size` is the window's (default: the image's own), `padding` the width of the border, `border` what it is filled with.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from streamcl.errors import ConfigError
from streamcl.options import NonNegativeInt, PositiveInt
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import draw


class Crop(Transform):
    def __init__(
        self, *, size: PositiveInt | None = None, padding: NonNegativeInt = 4, border: Literal["zero", "reflect"] = "zero"
    ) -> None:
        super().__init__()
        self.size, self.padding, self.mode = size, padding, "constant" if border == "zero" else border

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        height, width = values.shape[-2:]
        if self.mode == "reflect" and self.padding >= min(height, width):
            raise ConfigError(f"crop: a reflected border of {self.padding} needs images that are larger; they are {height}x{width}")
        rows, columns = (self.size, self.size) if self.size else (height, width)
        downs, rights = height + 2 * self.padding - rows + 1, width + 2 * self.padding - columns + 1  # how many offsets there are
        if min(downs, rights) < 1:
            raise ConfigError(
                f"crop: a window of {rows}x{columns} does not fit into images of {height}x{width} with padding {self.padding}"
            )
        top, left = (draw(len(values), 2, generator) * torch.tensor([downs, rights])).long().to(values.device).unbind(1)
        windows = pad(values, [self.padding] * 4, self.mode).unfold(2, rows, 1).unfold(3, columns, 1)  # a view, one window per offset
        return windows[torch.arange(len(values), device=values.device), :, top, left]
