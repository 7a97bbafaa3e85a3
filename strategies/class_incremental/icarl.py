"""iCaRL: incremental classifier and representation learning (Rebuffi et al., CVPR 2017).

One sigmoid per class. The columns of old classes are trained towards the previous network's own outputs on the very view that the
student sees, also for exemplars, whose hard labels they never see; the columns of new classes towards the labels. Exemplars are
chosen by herding, `budget // classes` each, and a sample is classified by the nearest class mean of exemplar features under the
current network. The network's own head is scored beside it as `head`.

Defaults are those of the released code for CIFAR-100 (70 epochs, SGD at 2.0 divided by 5 at epochs 49 and 63, batch 128). Two
choices: the loss is averaged over the columns of the classes seen (the released code averages over a fixed 100-wide head whose
unseen columns are trained towards 0), and `mirror` (the released code adds horizontally flipped exemplars to each class mean;
the paper does not) is off.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, one_hot

from streamcl.data import Joined
from streamcl.nn.model import Model
from streamcl.options import Optimizer, PositiveInt, Schedule
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, Dataset, Prediction, Task


class ICaRL(GradientStrategy):
    reads_again = "a task again to choose exemplars"
    targets = ("class",)
    selection = "herding"
    needs_exemplars = True
    fills_memory = True

    def __init__(
        self,
        *,
        mirror: bool = False,
        epochs: PositiveInt = 70,
        batch: PositiveInt = 128,
        optimizer: Optimizer = Optimizer(lr=2.0, momentum=0.9, weight_decay=1e-5),  # noqa: B008
        schedule: Schedule = Schedule(name="steps", milestones=(0.7, 0.9), gamma=0.2),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)
        self.mirror = mirror
        self.teacher: Model | None = None

    def before_task(self, task: Task) -> None:
        if task.index > 0:
            self.teacher = self.model.copy()
            self.teacher.head.resize(len(task.seen) - len(task.classes))

    def training_data(self, task: Task) -> Dataset:
        exemplars = self.memory.exemplars
        return Joined([task.train, exemplars.dataset()]) if len(exemplars) else task.train

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch)
        target = one_hot(batch.target, logits.shape[1]).to(logits)
        if self.teacher is not None:
            with torch.no_grad():
                old = self.teacher(batch).sigmoid()  # (batch, old classes)
            target[:, : old.shape[1]] = old
        return binary_cross_entropy_with_logits(logits, target)

    def after_task(self, task: Task) -> None:
        self.keep(self.candidates(task))
        self.find_means()
        self.teacher = None

    def find_means(self) -> None:
        """The mean of each class's exemplars, as the network sees them now."""
        exemplars, prototypes = self.memory.exemplars, self.memory.prototypes
        prototypes.clear()
        for label in exemplars.classes():
            kept = exemplars.of(label)
            mean = normalize(self.context.features(kept), dim=1).mean(dim=0)
            if self.mirror:
                flipped = kept.replace(inputs={name: _flipped(values) for name, values in kept.inputs.items()})
                mean = (mean + normalize(self.context.features(flipped), dim=1).mean(dim=0)) / 2
            prototypes.set(label, normalize(mean, dim=0), len(kept))

    def erase(self, samples: Batch) -> tuple[str, ...]:
        self.find_means()
        return ("prototypes",)

    def predict(self, batch: Batch) -> Prediction:
        features = self.model.features(batch)
        logits = self.model.head(features)
        known = self.memory.prototypes.labels()
        if len(known) == 0:  # within the first task there is no mean yet
            return Prediction(logits)
        distances = torch.cdist(normalize(features.float(), dim=1), self.memory.prototypes.means())  # (batch, classes with a mean)
        scores = torch.full_like(logits, -torch.inf, dtype=distances.dtype)
        scores[:, known] = -distances
        return Prediction(scores, heads={"head": logits})

    def state(self) -> dict[str, Any]:
        return {**super().state(), "teacher": None if self.teacher is None else self.teacher.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        if state["teacher"] is not None:
            self.teacher = self.model.copy()
            self.teacher.restore(state["teacher"])


def _flipped(values: Any) -> Any:
    return values.flip(-1) if isinstance(values, Tensor) and values.dim() == 4 else values
