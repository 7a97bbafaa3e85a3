"""ER-ACE: experience replay with an asymmetric cross-entropy (Caccia et al., ICLR 2022).

    L = CE(f(x), y) over the classes of the batch and those not seen yet  +  CE(f(x'), y') over all classes seen

x are new samples, x' as many from a reservoir, each in a forward pass of its own. New samples thus never push old classes down: rows of
the head that belong to a class seen before and absent from the batch get no gradient from them. A class is seen once a sample of it
has passed; released code also leaves the largest of them open, which is off by one. With `task_free`, as in Mammoth's settings, this
holds from the second batch of the stream; without it the first task is learned plainly. The head is linear, as in Mammoth (the
authors' own code has a cosine head with a scale of 10). Each sample is offered to the reservoir once, in its task's first epoch, as in
`er` (Mammoth offers it again in each epoch).

Defaults of Mammoth: SGD at 0.1, 50 epochs of batches of 32 + 32.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.options import Optimizer, PositiveInt
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, StreamInfo


class ERACE(GradientStrategy):
    targets = ("class",)
    selection = "reservoir"
    needs_exemplars = True

    def __init__(
        self,
        *,
        task_free: bool = True,
        epochs: PositiveInt = 50,
        batch: PositiveInt = 32,
        replay: PositiveInt = 32,
        optimizer: Optimizer = Optimizer(lr=0.1),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, replay=replay, optimizer=optimizer, **options)
        self.task_free = task_free
        self.seen: Tensor = torch.empty(0, dtype=torch.bool)  # (classes,): those of which a sample has passed

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.seen = self.seen.to(context.device)

    @property
    def plain(self) -> bool:
        """Whether this is the first task of a strategy that learns it without replay and mask."""
        return not self.task_free and self.begun == 0

    def compose(self, batch: Batch) -> Batch:
        return batch if self.plain else super().compose(batch)

    def loss(self, batch: Batch) -> Tensor:
        new = len(batch) if batch.new is None else batch.new
        own, again = batch[:new], batch[new:]
        logits, features = self.forward(own), self.features
        loss = cross_entropy(logits if self.plain else logits.masked_fill(self.closed(own.target, logits.shape[1]), -torch.inf), own.target)
        if len(again):
            replayed = self.forward(again)
            loss = loss + cross_entropy(replayed, again.target)
            self.logits, self.features = torch.cat([logits, replayed]), torch.cat([features, self.features])
        return loss

    def closed(self, target: Tensor, classes: int) -> Tensor:
        """The classes that new samples with these labels say nothing of: seen before, and absent here  # (classes,)"""
        closed = target.new_zeros(classes, dtype=torch.bool)
        closed[: len(self.seen)] = self.seen
        closed[target] = False
        return closed

    def after_step(self, batch: Batch) -> None:
        if len(self.seen) < self.model.classes:
            self.seen = torch.cat([self.seen, self.seen.new_zeros(self.model.classes - len(self.seen))])
        self.seen[batch.target.to(self.seen.device)] = True

    def state(self) -> dict[str, Any]:
        return {**super().state(), "seen": self.seen}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.seen = state["seen"].to(self.context.device)
