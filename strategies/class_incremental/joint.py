"""Joint training: at every task, a fresh model on all data so far. The upper bound of every table.

It reads earlier tasks again from the stream, which no continual learner may; that data is not counted as its memory.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

from streamcl.data import Joined
from streamcl.options import Optimizer, PositiveInt, Schedule
from streamcl.stream import Dataset, Task

from .._afresh import Afresh


class Joint(Afresh):
    def __init__(
        self,
        *,
        epochs: PositiveInt = 80,
        batch: PositiveInt = 128,
        optimizer: Optimizer = Optimizer(lr=0.1, momentum=0.9, weight_decay=2e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="steps", milestones=(0.5, 0.875)),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)

    def training_data(self, task: Task) -> Dataset:
        return Joined([*(earlier.train for earlier in self.context.earlier), task.train])
