"""Data made on the spot, for benchmarks in which nothing is to be learned: random bytes, or random vectors around a centre per class."""

from __future__ import annotations

import torch

from streamcl.data import ArrayDataset
from streamcl.stream import Modality, Source, SourceData


class Noise(Source):
    """`per_class` training samples of each class and `test_per_class` test samples; images (3, 32, 32) of uint8, vectors of float32."""

    licence = "none"

    def __init__(self, classes: int, per_class: int, test_per_class: int, shape: tuple[int, ...] = (3, 32, 32)) -> None:
        self.classes, self.counts, self.shape = classes, (per_class, test_per_class), shape

    def load(self) -> SourceData:
        draw = torch.Generator().manual_seed(0)
        image = len(self.shape) == 3
        centres = torch.randn(self.classes, *self.shape, generator=draw)
        parts, first = [], 0
        for count in self.counts:
            targets = torch.arange(self.classes).repeat_interleave(count)
            if image:
                values = torch.randint(0, 256, (len(targets), *self.shape), generator=draw, dtype=torch.uint8)
            else:
                values = centres[targets] + torch.randn(len(targets), *self.shape, generator=draw)
            name = "image" if image else "vector"
            parts.append(ArrayDataset({name: values}, targets, first + torch.arange(len(targets))))
            first += len(targets)
        modality = Modality("image", self.shape, 255) if image else Modality("vector", self.shape)
        return SourceData(parts[0], parts[1], [str(c) for c in range(self.classes)], {name: modality}, licence=self.licence)
