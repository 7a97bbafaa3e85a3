"""A network whose statistics of the batch are gathered, for tests of methods that pass it several times for one answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.deployed import Deployed
from streamcl.events import Events
from streamcl.nn.norms import Gathered
from streamcl.preparing import Preparation
from streamcl.stream import Modality, StreamInfo


class Normed(nn.Module):
    """A network over two vectors, each with a batch normalisation of its own, that tells what it makes of them."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(5, 8), nn.Linear(7, 8)
        self.layers = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(16, outputs)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        apart = {"left": self.layers[0](self.left(left)), "right": self.layers[1](self.right(right))}
        return self.head(self.drop(torch.cat(list(apart.values()), dim=1)).relu()), apart


def shadow(strategy: Any, target: str = "class") -> Any:
    """The strategy around that network, as it gathers statistics beside what is served; and batches of 24 for it."""
    model = Deployed(Normed(1 if target == "value" else 3), lambda module, inputs: module(**inputs))
    info = StreamInfo({"left": Modality("vector", (5,)), "right": Modality("vector", (7,))}, target=target, test_time=True)
    strategy.start(info, Context(model, None, Events(), Preparation(info, {})))  # type: ignore[arg-type]
    strategy.gathered = Gathered(strategy.layers)
    draw = torch.Generator().manual_seed(0)
    return strategy, model.batch({"left": torch.randn(24, 5, generator=draw) + 3, "right": torch.randn(24, 7, generator=draw) - 2})


def statistics_of_one_pass(strategy: Any, batch: Any) -> dict[str, Tensor]:
    """What the layers of the source would have gathered of the batch and of nothing else."""
    fresh = Gathered(strategy.layers)
    with torch.no_grad(), fresh.gathering():
        strategy.model(batch)
    return fresh.values
