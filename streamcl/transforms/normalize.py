"""Images minus a mean and divided by a deviation, per channel.

`mean` and `std` have one value per channel, or one for all; they belong to images whose values run from 0 to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import PositiveFloat
from streamcl.stream import Modality, Transform


class Normalize(Transform):
    def __init__(self, *, mean: list[float], std: list[PositiveFloat]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ConfigError(f"mean has {len(mean)} values and std has {len(std)}; they must be equally many")
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        if len(self.mean) not in (1, values.shape[1]):
            raise ConfigError(f"normalize: mean and std have {len(self.mean)} values and the images have {values.shape[1]} channels")
        return (values - self.mean.to(values)) / self.std.to(values)
