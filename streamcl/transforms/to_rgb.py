"""One-channel images repeated in three channels, for models that were trained on colour; colour images stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.stream import Modality, Transform


class ToRgb(Transform):
    def __call__(self, values: Tensor, modality: Modality, generator: torch.Generator) -> Tensor:
        if values.shape[1] not in (1, 3):
            raise ConfigError(f"to_rgb: images of 1 or 3 channels are expected, and these have {values.shape[1]}")
        return values.expand(-1, 3, -1, -1)
