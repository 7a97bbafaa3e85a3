"""LwF: learning without forgetting (Li and Hoiem, ECCV 2016), as a term that any gradient strategy can carry.

    strength x KD(o[:, old] || o'[:, old]; T),    KD(a || b; T) = -mean over the batch of sum_c softmax(b / T)_c log softmax(a / T)_c

o are the logits of the model, o' those that the model of the last task gives for the very same view; no sample is kept. Without the
factor T^2, as in PyCIL, whose strength 3 and temperature 2 are the defaults. Named as the strategy itself it is carried by fine-tuning
with PyCIL's settings: the cross-entropy runs over the new classes only, 250 epochs, SGD at 0.1 divided by 10 at epochs 60, 120, 180 and
220 (PyCIL's first task, 200 epochs with a weight decay of 5e-4, is a matter of `stages`). The warm-up of the new head in the paper is
left out, as in PyCIL. Under another strategy everything in its batches is distilled, replayed samples too.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.losses import distillation
from streamcl.nn.model import Model
from streamcl.options import NonNegativeFloat, PositiveFloat
from streamcl.strategy import GradientStrategy, Term
from streamcl.stream import Batch, Task


class LwF(Term):
    alone: ClassVar[dict[str, Any]] = {
        "over": "task",
        "epochs": 250,
        "optimizer": {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4},
        "schedule": {"name": "steps", "milestones": [0.24, 0.48, 0.72, 0.88]},
    }

    def __init__(self, *, strength: NonNegativeFloat = 3.0, temperature: PositiveFloat = 2.0) -> None:
        self.strength, self.temperature = strength, temperature
        self.teacher: Model | None = None

    def start(self, strategy: GradientStrategy) -> None:
        super().start(strategy)
        if strategy.info.target != "class":
            raise ConfigError(
                f"lwf distils the scores of classes, and the target of this stream is {strategy.info.target}: leave it out of strategy.with"
            )

    def before_task(self, task: Task) -> None:
        if task.index > 0:
            self.teacher = self.strategy.model.copy()
            self.teacher.head.resize(len(task.seen) - len(task.classes))

    def loss(self, batch: Batch) -> Tensor | None:
        if self.teacher is None:
            return None
        logits = self.strategy.logits if self.strategy.logits is not None else self.strategy.forward(batch)
        with torch.no_grad():
            old = self.teacher(batch)  # (batch, old classes)
        return self.strength * distillation(logits[:, : old.shape[1]], old, self.temperature)

    def after_task(self, task: Task) -> None:
        self.teacher = None

    def state(self) -> dict[str, Any]:
        return {"teacher": None if self.teacher is None else self.teacher.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = self.strategy.model.copy()
            self.teacher.restore(state["teacher"])
