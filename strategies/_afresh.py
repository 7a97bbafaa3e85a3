"""What the upper bounds of all families share: at every task the model begins as it was at first, and learns all data so far."""

from __future__ import annotations

from streamcl.context import Context
from streamcl.strategy import GradientStrategy
from streamcl.stream import StreamInfo, Task


class Afresh(GradientStrategy):
    reads_again = "earlier tasks again"

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.first = {name: value.clone() for name, value in self.model.backbone.state_dict().items()}

    def before_task(self, task: Task) -> None:
        self.model.backbone.load_state_dict(self.first)
        self.model.head.resize(0)
        self.model.grow(max(task.seen) + 1)
