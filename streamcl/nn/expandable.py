"""Networks that grow: the first layers are shared, and the last ones are there once for each stage of growth.

A backbone says in `split` where it may be divided; `Entry` and `Pooled` are the two parts of most.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from streamcl.nn.backbone import Backbone, numbers
from streamcl.stream import Batch, StreamInfo


class Entry(nn.Module):
    """The first layers of a backbone, from the batch on."""

    def __init__(self, reads: str, *layers: nn.Module) -> None:
        super().__init__()
        self.reads, self.layers = reads, nn.Sequential(*layers)

    def forward(self, batch: Batch) -> Tensor:
        return self.layers(numbers(batch, self.reads))


class Pooled(nn.Module):
    """The last layers of a convolutional backbone, and the average over the positions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values).mean(dim=(2, 3))


class Expandable(Backbone):
    """A backbone made of its two parts: `general`, and blocks in `special` whose features stand side by side.

    With one block it is the backbone that it was made from. A new block begins as a copy of the newest; from then on the ones before
    it are frozen and stay in evaluation mode.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.general, first = backbone.split()
        self.special = nn.ModuleList([first])
        self.block = self.dim = backbone.dim  # features of one block, and of all
        self.licence = backbone.licence
        self.train(backbone.training)

    def build(self, info: StreamInfo) -> None:
        """Its layers are there already."""

    def forward(self, batch: Batch) -> Tensor:
        shared = self.general(batch)
        found = [block(shared) for block in self.special]
        return torch.cat(found, dim=1) if len(found) > 1 else found[0]  # (batch, blocks x block)

    def train(self, mode: bool = True) -> Expandable:
        super().train(mode)
        for block in self.special[:-1]:
            block.eval()
        return self

    def resize(self, dim: int) -> None:
        if dim < self.block or dim % self.block:
            raise ValueError(f"the features of each block have {self.block} entries, and {dim} is no multiple of that")
        while self.dim < dim:
            newest = copy.deepcopy(self.special[-1])
            self.special[-1].requires_grad_(False).eval()
            self.special.append(newest)
            self.dim += self.block
        self.special, self.dim = self.special[: dim // self.block], dim
