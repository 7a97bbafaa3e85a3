"""Joint training on sets of labels: at every task, a fresh model on all data so far, with all that any task said of each sample.

The upper bound of multi-label streams. A sample that came in several tasks is learned once, with its labels of all of them. It comes in
every task for which it carries a class, so of the classes of a task that it did not come in it carries none: with `complete` these labels
are 0, which makes the truth whole. Where the stream does not say so of a task (samples that come once, `scenario.occurrences: once`, and
what was fed later) they stay unannotated.

It reads earlier tasks again from the stream, which no continual learner may; that data is not counted as its memory. Settings as in `krt`.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

from streamcl.context import Context
from streamcl.data import Joined, Subset
from streamcl.errors import ConfigError
from streamcl.stream import Dataset, StreamInfo, Task

from .._afresh import Afresh
from ._label_sets import LabelSets, together


class MLJoint(LabelSets, Afresh):
    def __init__(self, *, complete: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.complete = complete

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.replay:
            raise ConfigError("ml_joint learns all samples so far, and replay would bring some of them twice: set strategy.replay=0")

    def training_data(self, task: Task) -> Dataset:
        parts = [*(earlier.train for earlier in self.context.earlier), task.train]
        complete = [self.complete and one.about.get("complete", False) for one in (*self.context.earlier, task)]
        rows, labels = together(parts, max(task.seen) + 1, complete)
        return Subset(Joined(parts), rows, targets=labels)
