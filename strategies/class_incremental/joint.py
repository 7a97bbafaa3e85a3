"""Joint training: at every task, a fresh model on all data so far. The upper bound of every table.

It reads earlier tasks again from the stream, which no continual learner may; that data is not counted as its memory.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

from streamcl.context import Context
from streamcl.data import Joined
from streamcl.errors import ConfigError
from streamcl.options import Optimizer, PositiveInt, Schedule
from streamcl.strategy import GradientStrategy
from streamcl.stream import Dataset, StreamInfo, Task


class Joint(GradientStrategy):
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

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if info.passes is not None:
            raise ConfigError("joint reads earlier tasks again, and this stream can be read once: set scenario.online=false")
        self.first = {name: value.clone() for name, value in self.model.backbone.state_dict().items()}

    def before_task(self, task: Task) -> None:
        self.model.backbone.load_state_dict(self.first)
        self.model.head.resize(0)
        self.model.grow(max(task.seen) + 1)

    def training_data(self, task: Task) -> Dataset:
        return Joined([*(earlier.train for earlier in self.context.earlier), task.train])
