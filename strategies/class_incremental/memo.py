"""MEMO: memory-efficient expandable model (Zhou et al., A Model or 603 Exemplars, ICLR 2023).

Shallow layers barely differ between tasks, so they are shared and only the last block of the network is there once for each task; the
memory that other expanding methods give to whole networks can hold exemplars. For each task that brings new classes

    features = [s_1(g(x)), ..., s_t(g(x))]        s_t begins as a copy of s_(t-1); s_1 ... s_(t-1) are frozen, in evaluation mode
    head over all of them, the block of the old classes over the old features kept from the head before
    L = CE(head, y) + auxiliary x CE(a second head on s_t alone: one output for all old classes, one for each new, made anew)

on the new samples and all exemplars; then the head's new rows are multiplied by mean ||w_old|| / mean ||w_new||. No distillation. What is
shared learns in every task, also under the frozen blocks (`train_base`, the released default where tasks are of one size); off, it stays
as the first task left it. A backbone says in `split` what is shared: a ResNet all but its last stage. Growth counts as memory from the
second task on; the second head is gone after its task. A task without a new class (the paper has none) trains the newest block.

Defaults are the released ones of the later tasks: 170 epochs, batch 128, SGD at 0.1 divided by 10 at epochs 80, 120 and 150. Its first
task has 200 epochs, steps at 60, 120 and 170 and a weight decay of 5e-4, which is a matter of `stages`.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.data import Joined
from streamcl.nn.expandable import Expandable
from streamcl.options import NonNegativeFloat, Optimizer, PositiveInt, Schedule
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, Dataset, StreamInfo, Task


class MEMO(GradientStrategy):
    reads_again = "a task again to choose exemplars"
    targets = ("class",)
    selection = "herding"
    needs_exemplars = True
    fills_memory = True

    def __init__(
        self,
        *,
        auxiliary: NonNegativeFloat = 1.0,
        train_base: bool = True,
        epochs: PositiveInt = 170,
        batch: PositiveInt = 128,
        optimizer: Optimizer = Optimizer(lr=0.1, momentum=0.9, weight_decay=2e-4),  # noqa: B008
        schedule: Schedule = Schedule(name="steps", milestones=(0.47, 0.705, 0.882)),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, schedule=schedule, **options)
        self.auxiliary, self.train_base = auxiliary, train_base
        self.second: nn.Linear | None = None  # the auxiliary head, within a task

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.network = self.model.backbone = Expandable(self.model.backbone)
        self.model.remember()

    def enter_task(self, task: Task) -> None:
        self.known = len(task.seen) - len(task.classes)

    def before_task(self, task: Task) -> None:
        if self.known and task.classes:
            self.model.head.resize(self.known)
            self.model.resize(len(task.seen), self.network.dim + self.network.block)
            self.hold_base()
            self.second = nn.Linear(self.network.block, 1 + len(task.classes)).to(self.context.device)

    def hold_base(self) -> None:
        if len(self.network.special) > 1:
            self.network.general.requires_grad_(self.train_base)

    def training_mode(self) -> None:
        self.model.train()
        if len(self.network.special) > 1:
            self.network.general.train(self.train_base)

    def parameter_groups(self) -> list[nn.Parameter]:
        own = [] if self.second is None else list(self.second.parameters())
        return [p for p in self.model.parameters() if p.requires_grad] + own

    def training_data(self, task: Task) -> Dataset:
        exemplars = self.memory.exemplars
        return Joined([task.train, exemplars.dataset()]) if len(exemplars) else task.train

    def loss(self, batch: Batch) -> Tensor:
        loss = super().loss(batch)
        if self.second is None:
            return loss
        assert self.features is not None
        among = (batch.target - (self.known - 1)).clamp(min=0)  # 0 for every old class
        return loss + self.auxiliary * cross_entropy(self.second(self.features[:, -self.network.block :]), among)

    def after_task(self, task: Task) -> None:
        self.second = None
        if self.known and task.classes:
            self.align()
        self.keep(self.candidates(task))

    @torch.no_grad()
    def align(self) -> None:
        """Weight aligning: the new rows of the head become as long, in the mean, as the old ones."""
        lengths = self.model.head.weight.norm(dim=1)  # (classes,)
        self.model.head.weight[self.known :] *= lengths[: self.known].mean() / lengths[self.known :].mean()

    def state(self) -> dict[str, Any]:
        second = None if self.second is None else dict(self.second.state_dict())
        return {**super().state(), "blocks": len(self.network.special), "second": second}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.resize(0, state["blocks"] * self.network.block)
        self.hold_base()
        super().restore(state)
        self.second = None
        if state["second"] is not None:
            self.second = nn.Linear(self.network.block, len(state["second"]["bias"])).to(self.context.device)
            self.second.load_state_dict(state["second"])
