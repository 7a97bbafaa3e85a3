"""The middle of each image: `size` rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import PositiveInt
from streamcl.stream import Modality, Transform


class CenterCrop(Transform):
    def __init__(self, *, size: PositiveInt | tuple[PositiveInt, PositiveInt]) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        (height, width), (rows, columns) = values.shape[-2:], self.size
        if rows > height or columns > width:
            raise ConfigError(
                f"center_crop: a crop of {rows}x{columns} does not fit into images of {height}x{width}; put a resize before it"
            )
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        return values[..., top : top + rows, left : left + columns]
