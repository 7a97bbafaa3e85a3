"""Fine-tuning: train on each task as if there had been no other. The lower bound of every table.

The cross-entropy runs over all classes seen, so that old rows are pushed down (the naive baseline of Avalanche and Mammoth);
`over: task` takes it over the classes of the task at hand, whose baseline in PyCIL forgets less. The rest is as in PyCIL: 80
epochs, SGD at 0.1 with momentum, divided by 10 twice.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import Optimizer, PositiveInt, Schedule
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, Dataset, Task


class Finetune(GradientStrategy):
    processes = True

    def __init__(
        self,
        *,
        over: Literal["seen", "task"] = "seen",
        epochs: PositiveInt = 80,
        batch: PositiveInt = 128,
        optimizer: Optimizer = Optimizer(lr=0.1, momentum=0.9, weight_decay=2e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="steps", milestones=(0.5, 0.875)),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)
        if over == "task" and self.replay:
            raise ConfigError("over: task has no place for replayed classes: leave strategy.replay at 0, or set strategy.over=seen")
        self.over = over
        self.columns = torch.empty(0, dtype=torch.int64)

    def training_data(self, task: Task) -> Dataset:
        self.columns = torch.tensor(sorted(task.labels or task.classes), device=self.context.device)
        return task.train

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch)
        if self.over == "seen":
            return self.criterion(logits, batch.target)
        return self.criterion(logits[:, self.columns], torch.searchsorted(self.columns, batch.target))
