"""Vectors minus a mean and divided by a deviation, per feature.

`mean` and `std` have one value per feature, or one for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import PositiveFloat
from streamcl.stream import Modality, Transform


class Standardize(Transform):
    kinds = ("vector",)

    def __init__(self, *, mean: list[float], std: list[PositiveFloat]) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ConfigError(f"mean has {len(mean)} values and std has {len(std)}; they must be equally many")
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        if len(self.mean) not in (1, values.shape[-1]):
            raise ConfigError(f"standardize: mean and std have {len(self.mean)} values and the vectors have {values.shape[-1]} features")
        return (values - self.mean.to(values)) / self.std.to(values)
