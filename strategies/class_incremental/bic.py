"""BiC: bias correction (Wu et al., Large Scale Incremental Learning, CVPR 2019).

The head prefers new classes, of which it sees many more samples. A part V of the exemplars, and as many samples of each new class, is
held out of training. With n_old classes before the task and n_new in it:

    1. all weights, on the rest:  L = lambda KD(o[:, old] || q'; T) + (1 - lambda) CE(o, y),   lambda = n_old / (n_old + n_new)
       q' are the corrected logits of the network before, on the very view that the student sees; no factor T^2
    2. two numbers, on V, the network frozen and in evaluation mode:  q = o for old classes, alpha o + beta for those of this task,
       L = CE(q, y) + offset_decay / 2 beta^2,   from alpha = 1 and beta = 0, alpha kept from below 0

and q decides. Each task has a pair of its own, and only the newest one is applied: the network of the next task begins uncorrected and
learns the corrected logits as a student. Logits of V are computed once, without augmentation, and (1, 0) stays where the cross-entropy
on V would end higher. The head as it is stands beside as `uncorrected`. `bias_epochs: 0` leaves stage 2 out: what is left is plain
replay with distillation.

Defaults are those of the released ImageNet code: T 2, 100 epochs of batches of 256, SGD at 0.1 divided by 10 at epochs 30, 60, 80 and
90, twice as many epochs in stage 2 at the same rates, offset decay 0.1, and a weight decay of 1e-4 x tasks / (number of the task), where
the stream knows its tasks. Choices: V is a tenth of what is held of a class, one sample at least, drawn at random, and no class gives
its last one; a task without a new class (the paper has none) counts those that occur in it as n_new.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.data import Joined, Subset, place_in_class
from streamcl.errors import ConfigError
from streamcl.nn.losses import distillation
from streamcl.nn.model import Model
from streamcl.options import Fraction, NonNegativeFloat, NonNegativeInt, Optimizer, PositiveFloat, PositiveInt, Schedule
from streamcl.seeding import generator
from streamcl.strategy import GradientStrategy, learning_rate_factor, make_optimizer
from streamcl.stream import Batch, Dataset, Prediction, StreamInfo, Task


class BiC(GradientStrategy):
    reads_again = "a task again to choose exemplars"
    targets = ("class",)
    selection = "herding"
    needs_exemplars = True
    fills_memory = True
    predicts_with = ("correction",)

    def __init__(
        self,
        *,
        temperature: PositiveFloat = 2.0,
        held_out: Fraction = 0.1,
        bias_epochs: NonNegativeInt | None = None,
        bias_optimizer: Optimizer = Optimizer(lr=0.1, momentum=0.9),  # noqa: B008
        offset_decay: NonNegativeFloat = 0.1,
        epochs: PositiveInt = 100,
        batch: PositiveInt = 256,
        optimizer: Optimizer = Optimizer(lr=0.1, momentum=0.9, weight_decay=1e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="steps", milestones=(0.3, 0.6, 0.8, 0.9)),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)
        self.temperature, self.held_out, self.offset_decay = temperature, held_out, offset_decay
        self.bias_epochs, self.bias_optimizer = bias_epochs, Optimizer.model_validate(bias_optimizer)
        self.teacher: Model | None = None
        self.correction = unbiased(0)

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.replay:
            raise ConfigError("bic trains on all its exemplars but those that it holds out, and replay would bring these in: set replay=0")

    def enter_task(self, task: Task) -> None:
        self.known = len(task.seen) - len(task.classes)
        self.weight = self.known / (self.known + (len(task.classes) or len(task.labels)))  # lambda
        self.stage = self.stages.later if task.index else self.stages.first
        self.number = task.index + 1
        self.rest, self.validation = self.split(task)

    def split(self, task: Task) -> tuple[Dataset, Dataset | None]:
        """What stage 1 is trained on, and V: as many samples of each class, drawn from the exemplars and what is new."""
        exemplars = self.memory.exemplars
        if not len(exemplars):
            return task.train, None
        data = Joined([task.train, exemplars.dataset()])
        if not (self.known and task.classes and self.held_out):
            return data, None
        share = max(1, int(self.held_out * len(exemplars) / len(exemplars.classes())))
        order = torch.randperm(len(data), generator=generator(self.context.seed, "bic split", task.index))
        labels = data.targets[order]
        held = order[place_in_class(labels) < (labels.bincount() - 1).clamp(max=share)[labels]]
        left = ~torch.isin(data.ids, data.ids[held])
        return Subset(data, left.nonzero().squeeze(1)), Subset(data, held)

    def before_task(self, task: Task) -> None:
        if self.known:
            self.teacher = self.model.copy()
            head = self.teacher.head
            head.resize(self.known)
            alpha, beta = self.correction[:, : self.known]
            head.weight.data *= alpha[:, None]
            head.bias.data = head.bias.data * alpha + beta
        self.correction = unbiased(self.model.classes).to(self.context.device)

    def training_data(self, task: Task) -> Dataset:
        return self.rest

    def parameter_groups(self) -> list[Any]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        decay = (self.stage.optimizer or self.optimizer_settings).weight_decay
        if not decay or self.info.tasks is None:
            return parameters
        return [{"params": parameters, "weight_decay": decay * self.info.tasks / self.number}]

    def loss(self, batch: Batch) -> Tensor:
        hard = super().loss(batch)
        if self.teacher is None:
            return hard
        assert self.logits is not None
        with torch.no_grad():
            old = self.teacher(batch)  # (batch, old classes)
        soft = distillation(self.logits[:, : self.known], old, self.temperature)
        return self.weight * soft + (1 - self.weight) * hard

    def after_task(self, task: Task) -> None:
        self.teacher = None
        if self.validation is not None:
            self.correct(self.validation)
        self.keep(self.candidates(task))

    def correct(self, validation: Dataset) -> None:
        """Stage 2: alpha and beta of this task's classes, on the logits that the network gives now."""
        device, epochs = self.context.device, 2 * self.epochs if self.bias_epochs is None else self.bias_epochs
        with torch.no_grad():
            logits, target = self.model.head(self.context.features(validation)), validation.targets.to(device)
        pair = torch.tensor([1.0, 0.0], device=device, requires_grad=True)  # alpha, beta
        new = torch.arange(logits.shape[1], device=device) >= self.known

        def error(rows: Tensor | slice = slice(None)) -> Tensor:
            return cross_entropy(torch.where(new, pair[0] * logits[rows] + pair[1], logits[rows]), target[rows])

        before = error().item()
        optimizer, random = make_optimizer([pair], self.bias_optimizer), generator(self.context.seed, "bic bias", self.number)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = self.bias_optimizer.lr * learning_rate_factor(self.schedule, epoch, epochs)
            for rows in torch.randperm(len(target), generator=random).to(device).split(self.stage.batch or self.batch):
                optimizer.zero_grad()
                (error(rows) + self.offset_decay / 2 * pair[1] ** 2).backward()
                optimizer.step()
                pair.data[0].clamp_(min=0)  # a negative factor would turn the order of the classes round
        if error().item() <= before:
            self.correction[:, new] = pair.detach()[:, None]
        self.context.log(alpha=self.correction[0, -1], beta=self.correction[1, -1])

    def predict(self, batch: Batch) -> Prediction:
        alpha, beta = self.correction
        logits = self.model(batch)
        return Prediction(logits * alpha + beta, heads={"uncorrected": logits})

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "correction": self.correction,
            "teacher": None if self.teacher is None else self.teacher.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.correction = state["correction"].to(self.context.device)
        if state["teacher"] is not None:
            self.teacher = self.model.copy()
            self.teacher.restore(state["teacher"])


def unbiased(classes: int) -> Tensor:
    """alpha and beta of each class's logit as it is  # (2, classes)"""
    return torch.stack([torch.ones(classes), torch.zeros(classes)])
