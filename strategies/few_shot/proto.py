"""Prototypes over a base session: the classifier that few-shot class-incremental methods start from (as in CEC, CVPR 2021, and TEEN).

    base session    cross-entropy over scale x cos(f, w_c), SGD; then the rows w_c give way to prototypes
    any session     p_c = the mean of f over the class's samples, under the test transform; the network stays as it is
    prediction      argmax over all classes seen of cos(f, p_c)

Training needs many samples, a mean needs few: so everything is learned from the base classes, and a new class costs one vector. Defaults
are those of the published CIFAR-100 runs: scale 16, SGD with Nesterov's momentum at 0.1, weight decay 5e-4, cosine schedule, 600 epochs,
batches of 256. Released code picks the base epoch on test data; here `patience` watches the validation part of the base session, if any.
Prototypes replace the head for the base session as well; the released code reports the better of the two there. A class that comes back
adds to its mean. With `frozen` nothing is trained: the backbone was before (`model.pretrain`, or weights by name).

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.options import Optimizer, PositiveFloat, PositiveInt, Schedule
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, Prediction, StreamInfo, Task


class Proto(GradientStrategy):
    targets: ClassVar[tuple[str, ...]] = ("class",)
    predicts_with = ("prototypes",)

    def __init__(
        self,
        *,
        scale: PositiveFloat = 16.0,
        frozen: bool = False,
        epochs: PositiveInt = 600,
        batch: PositiveInt = 256,
        optimizer: Optimizer = Optimizer(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="cosine"),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)
        self.scale, self.frozen = scale, frozen
        if self.replay:
            raise ConfigError(f"strategy.replay is {self.replay}: prototypes are of the samples of a class, and none is replayed")

    def start(self, info: StreamInfo, context: Context) -> None:
        if self.frozen:
            self.epochs = 1  # there is one pass
            context.model.requires_grad_(False)
        elif info.passes is not None:
            raise ConfigError(
                "the base session is read again for its prototypes, and this stream can be read "
                f"{info.passes} time(s): set strategy.frozen=true for a backbone that is trained already, or let the stream be read again"
            )
        super().start(info, context)
        self.memory.prototypes.configure(dtype=torch.float64)

    def forward(self, batch: Batch) -> Tensor:
        self.features = self.model.features(batch)
        self.logits = self.scale * linear(normalize(self.features, dim=1), normalize(self.model.head.weight, dim=1))
        return self.logits

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy(self.forward(batch), batch.target)

    def train(self, task: Task) -> None:
        if task.index == 0 and not self.frozen:
            super().train(task)

    def after_task(self, task: Task) -> None:
        self.model.eval()
        for raw in self.context.batches(task.train, self.batch, name="prototypes", shuffle=False):
            self.memory.prototypes.update(*self.context.embedded(raw))
        self.changed()

    # -- the rule ---------------------------------------------------------------------------------------------------------------

    @cached_property
    def prototypes(self) -> Tensor:
        """What a sample is compared with, in the order of the memory's prototypes  # (prototypes, dim)"""
        return normalize(self.memory.prototypes.means(), dim=1)

    def changed(self) -> None:
        self.__dict__.pop("prototypes", None)

    def predict(self, batch: Batch) -> Prediction:
        features = self.model.features(batch).double()
        known = self.memory.prototypes.labels()
        if not len(known):
            return Prediction(features[:, :0])
        scores = features.new_full((len(features), int(known.max()) + 1), -torch.inf)
        scores[:, known] = self.scale * linear(normalize(features, dim=1), normalize(self.prototypes, dim=1))
        return Prediction(scores)

    # -- what is kept -----------------------------------------------------------------------------------------------------------

    def erase(self, samples: Batch) -> tuple[str, ...]:
        for start in range(0, len(samples), self.batch):
            self.memory.prototypes.remove(*self.context.embedded(samples[start : start + self.batch]))
        self.changed()
        return ("prototypes",)

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.changed()
