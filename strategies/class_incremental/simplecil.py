"""SimpleCIL: the class mean of frozen features is the classifier (Zhou et al., Revisiting class-incremental learning, IJCV 2024).

Nothing is trained. The row of class c is w_c = (1/n_c) sum of f over its samples, the mean of the raw features under the test transform,
and a sample goes to the class with the largest cosine cos(f, w_c). It is the floor that every method on a frozen backbone has to beat.
(The mean of normalised features is another classifier, that of iCaRL.) Means are kept in float64 by count, so the result is that of one
pass over all data whatever the order, the batches and the tasks, also where a class comes back; the released code overwrites the mean of
such a class. The default is the released one: features are extracted 128 at a time; its learning rates and epochs are not used.

Evidence: small real data
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.context import Context
from streamcl.options import PositiveInt
from streamcl.strategy import Strategy
from streamcl.stream import Batch, Prediction, StreamInfo, Task


class SimpleCIL(Strategy):
    targets = ("class",)
    processes = True

    def __init__(self, *, batch: PositiveInt = 128) -> None:
        self.batch = batch

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.model.requires_grad_(False)
        self.configure()

    def configure(self) -> None:
        """What is kept of a class."""
        self.memory.prototypes.configure(dtype=torch.float64)

    def learn(self, task: Task) -> None:
        self.model.eval()
        for raw in self.context.batches(task.train, self.batch, shuffle=False):
            self.take_in(*self.context.embedded(raw))

    def take_in(self, features: Tensor, labels: Tensor) -> None:
        self.memory.prototypes.update(features, labels)

    def give_back(self, features: Tensor, labels: Tensor) -> None:
        self.memory.prototypes.remove(features, labels)

    def predict(self, batch: Batch) -> Prediction:
        features = self.model.features(batch).double()
        known = self.memory.prototypes.labels()
        if not len(known):
            return Prediction(features[:, :0])
        scores = features.new_full((len(features), int(known.max()) + 1), -torch.inf)
        scores[:, known] = self.score(features)
        return Prediction(scores)

    def score(self, features: Tensor) -> Tensor:
        """Higher is likelier, in the order of the memory's prototypes  # (batch, prototypes)"""
        return normalize(features, dim=1) @ normalize(self.memory.prototypes.means(), dim=1).T

    def erase(self, samples: Batch) -> tuple[str, ...]:
        for start in range(0, len(samples), self.batch):
            self.give_back(*self.context.embedded(samples[start : start + self.batch]))
        return ("prototypes",)
