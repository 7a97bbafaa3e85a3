"""The ResNet-32 for CIFAR (He et al., 2016: Deep Residual Learning for Image Recognition, section 4.2), as class-incremental work uses it.

Three stages of five blocks with 16, 32 and 64 channels, and parameter-free shortcuts (option A: every second pixel, and channels of
zeros appended); 463,504 parameters for three input channels. The last ReLU is kept, as PyCIL's default does (iCaRL's and LUCIR's own
code drop it): features are not negative. The average is taken over all positions, so images of any size from 8x8 pass. Trained from
scratch.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from streamcl.nn.backbone import Backbone, choose_modality, numbers
from streamcl.nn.expandable import Entry, Pooled
from streamcl.stream import Batch, StreamInfo

BLOCKS = 5  # per stage: 2 * 3 * 5 convolutions in blocks, the first one, and the classifier make 32 layers


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.grown = after // before, after - before
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(relu(self.norm1(self.conv1(x)))))
        if self.grown:
            x = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grown))
        return relu(x + y)


class Resnet32(Backbone):
    dim = 64

    def __init__(self, *, modality: str | None = None) -> None:
        super().__init__()
        self.modality = modality

    def build(self, info: StreamInfo) -> None:
        self.reads = choose_modality(info, self.modality, ("image",), "resnet32")
        channels = [16] * (BLOCKS + 1) + [32] * BLOCKS + [64] * BLOCKS
        self.stem = nn.Sequential(
            nn.Conv2d(info.modalities[self.reads].shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(_Block(before, after) for before, after in pairwise(channels)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def split(self) -> tuple[nn.Module, nn.Module]:
        return Entry(self.reads, self.stem, *self.blocks[: 2 * BLOCKS]), Pooled(*self.blocks[2 * BLOCKS :])

    def forward(self, batch: Batch) -> Tensor:
        return self.blocks(self.stem(numbers(batch, self.reads))).mean(dim=(2, 3))

    def patches(self, batch: Batch) -> Tensor:
        return self.blocks(self.stem(numbers(batch, self.reads))).flatten(2).transpose(1, 2)
