"""The ResNet-18 for 32x32 images of continual learning (GEM: Lopez-Paz and Ranzato, 2017; Mammoth's default backbone).

He et al.'s ResNet-18 with a 3x3 first convolution and no max pooling, so that small images keep their resolution. `width` is the
channels of the first stage: 64 is the usual network (11,173,962 parameters with a head of ten classes), 20 GEM's reduced one. The
features have 8 * width entries, averaged over all positions. Trained from scratch.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from streamcl.nn.backbone import Backbone, choose_modality, numbers
from streamcl.nn.expandable import Entry, Pooled
from streamcl.options import PositiveInt
from streamcl.stream import Batch, StreamInfo


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        return relu(self.shortcut(x) + y)


class Resnet18(Backbone):
    def __init__(self, *, width: PositiveInt = 64, modality: str | None = None) -> None:
        super().__init__()
        self.width, self.modality = width, modality

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modality(info, self.modality, ("image",), "resnet18")
        layers: list[nn.Module] = [
            nn.Conv2d(info.modalities[self.reads].shape[0], self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
        ]
        before = self.width
        for stage in range(4):
            after = self.width * 2**stage
            layers += [_Block(before, after, stride=1 if stage == 0 else 2), _Block(after, after, stride=1)]
            before = after
        self.layers = nn.Sequential(*layers)
        self.dim = before

    def split(self) -> tuple[nn.Module, nn.Module]:
        return Entry(self.reads, *self.layers[:-2]), Pooled(*self.layers[-2:])

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(numbers(batch, self.reads)).mean(dim=(2, 3))

    def patches(self, batch: Batch) -> Tensor:
        return self.layers(numbers(batch, self.reads)).flatten(2).transpose(1, 2)
