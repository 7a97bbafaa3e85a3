"""G-ACIL: generalized analytic class-incremental learning (NeurIPS 2024).

On a frozen backbone and a fixed random ReLU expansion, the classifier is a ridge regression that is kept equal to the ridge regression
on all data seen so far, whatever the order, the batch sizes and the mix of old and new classes: the classifier forgets nothing, by
construction. All of it in float64: with ReLU features float32 loses the identity.

The paper updates the weights with each batch X and its labels Y (columns of zeros appended to W for new classes):
    R <- R - R X' (I + X R X')^-1 X R          W <- W + R X' (Y - X W)      with the new R
which is its sum of [W - R X'X W, R X'Y_new] and the exposed-class gain [R X'Y_old, 0]. The memory sums X'X and X'Y instead and solves
for W when it is asked for: the same weights (a test compares the two), at a fraction of the time. No sample is kept; within a task the
expanded features of up to 127 samples wait to be summed.

Defaults are the released ones: expansion 5000, gamma 100, batch 64, and `online_iter` 3, which feeds each batch three times; that
equals the ridge regression with gamma / online_iter, and is computed so. Training transforms are not applied (the identity would
hold for the augmented samples).

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from streamcl.context import Context
from streamcl.options import PositiveFloat, PositiveInt
from streamcl.seeding import generator
from streamcl.strategy import Strategy
from streamcl.stream import Batch, Prediction, StreamInfo, Task


class GACIL(Strategy):
    targets = ("class",)
    processes = True
    predicts_with = ("expansion",)

    def __init__(
        self, *, buffer: PositiveInt = 5000, gamma: PositiveFloat = 100.0, online_iter: PositiveInt = 3, batch: PositiveInt = 64
    ) -> None:
        self.buffer, self.gamma, self.online_iter, self.batch = buffer, gamma, online_iter, batch

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.model.requires_grad_(False)
        dim = self.model.backbone.dim
        uniform = torch.rand(dim, self.buffer, generator=generator(context.seed, "gacil buffer"), dtype=torch.float64)
        self.expansion = ((2 * uniform - 1) / dim**0.5).to(context.device)  # A'  # (dim, buffer)
        self.memory.analytic.configure(self.buffer, self.gamma / self.online_iter)

    def expand(self, batch: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(self.context.device.type, enabled=False):
            return torch.relu(self.model.features(batch).double() @ self.expansion)  # (batch, buffer)

    def learn(self, task: Task) -> None:
        self.model.eval()
        classes = max(task.seen) + 1
        for raw in self.context.batches(task.train, self.batch, shuffle=False):
            batch = self.context.prepare(raw, train=False)
            mine, _ = self.context.shard(batch)
            expanded = self.context.gather(self.expand(mine), len(batch))
            self.memory.analytic.update(expanded, batch.target, classes)

    def predict(self, batch: Batch) -> Prediction:
        return Prediction(self.expand(batch) @ self.memory.analytic.weights())

    def erase(self, samples: Batch) -> tuple[str, ...]:
        for start in range(0, len(samples), self.batch):
            batch = self.context.prepare(samples[start : start + self.batch], train=False)
            self.memory.analytic.remove(self.expand(batch), batch.target)
        return ("analytic",)

    def state(self) -> dict[str, Any]:
        return {"expansion": self.expansion}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.expansion = state["expansion"].to(self.context.device)
