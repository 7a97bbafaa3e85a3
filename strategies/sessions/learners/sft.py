"""Supervised fine-tuning: the model learns to say the right answer, in the form that `template` gives it.

The loss is the cross-entropy of the response's tokens, its end included; what was asked is not learned. `{question}`, `{answer}` and every
column of words that rows have (`{skill}`, `{rationale}`) may stand in the template; a row with a `response` of its own is taught that. The
optimiser is fresh in each session, and the schedule goes by its steps.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streamcl.context import Context
from streamcl.learner import Report
from streamcl.nn.model import Model
from streamcl.options import PositiveInt
from streamcl.stream import Batch, Task

from ._supervised import Supervised, Template


class SFT(Supervised):
    """A session goes through its rows `epochs` times, or makes `steps` updates where they are given; in an order of its own where
    the task has none and `shuffle` is set."""

    def __init__(
        self,
        *,
        template: str = "{answer}",
        epochs: PositiveInt = 1,
        steps: PositiveInt | None = None,
        shuffle: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.template = Template(template)
        self.epochs, self.steps, self.shuffle = epochs, steps, shuffle

    def taught(self, raw: Batch) -> list[str]:
        return self.template.filled(raw)

    def fit(self, model: Model, task: Task, context: Context) -> Report:
        each = -(-len(task.train) // (self.batch * self.accumulate))
        self.total = self.steps or self.epochs * each
        self.begin()
        for raw in self._batches(task, context, -(-self.total // each)):
            self.teach(raw, self.template.filled(raw))
        return self.end()

    def progress(self) -> tuple[int, int]:
        return self.step, self.total

    def _batches(self, task: Task, context: Context, epochs: int) -> Iterator[Batch]:
        shuffle = self.shuffle and not task.about.get("ordered")
        for epoch in context.epochs(epochs, "session"):
            for raw in context.batches(task.train, self.batch, epoch=epoch, name="session", shuffle=shuffle, every=self.accumulate):
                if self.step == self.total:
                    return
                yield raw
