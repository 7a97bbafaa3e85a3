"""What happens between raw inputs and the model: integers become floats, then the transforms, a whole batch at a time on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamcl.stream import Batch, Modality, StreamInfo, Transform


class Preparation:
    """Applies the stream's integer scale and the transforms of a part (`train` or `test`) to every modality that they fit."""

    def __init__(self, info: StreamInfo, transforms: Mapping[str, Sequence[Transform]]) -> None:
        self.train, self.test = (
            [(name, m, [t for t in transforms.get(part, ()) if m.kind in t.kinds]) for name, m in _numeric(info)]
            for part in ("train", "test")
        )

    def __call__(self, batch: Batch, train: bool, generator: torch.Generator) -> Batch:
        inputs = dict(batch.inputs)
        for name, modality, transforms in self.train if train else self.test:
            values = inputs.get(name)
            if values is None:
                continue
            assert isinstance(values, Tensor)
            if modality.high is not None and not values.is_floating_point():
                values = values / modality.high
            for transform in transforms:
                values = transform(values, modality, generator)
            inputs[name] = values
        return Batch(inputs, batch.target, batch.ids, batch.present, batch.task, batch.extra, batch.new)


def _numeric(info: StreamInfo) -> list[tuple[str, Modality]]:
    return [(name, modality) for name, modality in info.modalities.items() if modality.kind != "text"]
