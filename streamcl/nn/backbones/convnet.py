"""A small plain convolutional network: the 'ConvNet-4' of few-shot learning (Vinyals et al., 2016; Snell et al., 2017).

Each block is a 3x3 convolution, batch normalisation, a ReLU and 2x2 max pooling; a picture of one row or column is not pooled
further, so that images from 8x8 up pass through any number of blocks. In the end the average over the positions is taken, where the
few-shot papers flatten them: the features have `width` entries for any size of image. Trained from scratch. With `norm: group` there is
group normalisation (groups of 16 channels, as far as they go) in the place of batch normalisation: no sample is tied to its batch.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from streamcl.nn.backbone import Backbone, choose_modality, numbers
from streamcl.nn.expandable import Entry, Pooled
from streamcl.options import PositiveInt
from streamcl.stream import Batch, StreamInfo


class _Block(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = relu(super().forward(x))
        return max_pool2d(x, 2) if min(x.shape[-2:]) > 1 else x


class Convnet(Backbone):
    def __init__(
        self, *, width: PositiveInt = 64, blocks: PositiveInt = 4, norm: Literal["batch", "group"] = "batch", modality: str | None = None
    ) -> None:
        super().__init__()
        self.width, self.blocks, self.norm, self.modality = width, blocks, norm, modality

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modality(info, self.modality, ("image",), "convnet")
        channels = [info.modalities[self.reads].shape[0]] + [self.width] * (self.blocks - 1)
        self.layers = nn.ModuleList(_Block(nn.Conv2d(c, self.width, 3, padding=1, bias=False), self._normalisation()) for c in channels)
        self.dim = self.width

    def _normalisation(self) -> nn.Module:
        if self.norm == "batch":
            return nn.BatchNorm2d(self.width)
        return nn.GroupNorm(self.width // 16 if self.width % 16 == 0 else 1, self.width)

    def split(self) -> tuple[nn.Module, nn.Module]:
        return Entry(self.reads, *self.layers[:-1]), Pooled(self.layers[-1])

    def forward(self, batch: Batch) -> Tensor:
        return self.maps(batch).mean(dim=(2, 3))

    def patches(self, batch: Batch) -> Tensor:
        return self.maps(batch).flatten(2).transpose(1, 2)

    def maps(self, batch: Batch) -> Tensor:
        """What the last block gives  # (batch, dim, rows, columns)"""
        x = numbers(batch, self.reads)
        for layer in self.layers:
            x = layer(x)
        return x
