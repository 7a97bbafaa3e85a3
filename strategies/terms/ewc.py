"""EWC: elastic weight consolidation (Kirkpatrick et al., PNAS 2017), as a term that any gradient strategy can carry.

    strength / 2 x sum_i F_i (theta_i - theta*_i)^2

theta* are the weights after a task and F the diagonal of the Fisher information of each sample, averaged over the task's data in
evaluation mode. `fisher: empirical` squares the gradient of a sample's own loss (its true label); `exact` takes the expectation
under the model's own predictions, sum_c p_c (d log p_c / d theta)^2, in one backward pass for each class. The head's rows that came
later are free. `mode` says what becomes of several tasks:

    average     F <- a F + (1 - a) F_task with a = old classes / all classes; rows that are new get F_task      (PyCIL)
    online      F <- gamma F + F_task, one anchor: the weights after the last task                (Schwarz et al., 2018; Mammoth)
    separate    every task keeps its penalty around its own theta*                                                (the paper)

The penalties of `separate` add up to one quadratic with F = sum F_k and the mean of the theta*_k weighted by F_k, up to a constant: so
nothing grows with the tasks. Where a task brings no class, a is the share of the tasks before it.

Defaults are PyCIL's: strength 1000, `average`, F clamped at 1e-4 (`ceiling`), which bounds strength x F and so keeps SGD stable. PyCIL
squares the gradient of a mini-batch in training mode instead, too small by about the batch size and moving batch normalisation;
Mammoth weights a sample by the probability of its label. Both are left out. Named as the strategy itself it is carried by fine-tuning
with PyCIL's settings: the cross-entropy over the new classes only, 180 epochs, SGD at 0.1 divided by 10 at epochs 70, 120 and 150.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from streamcl.errors import ConfigError
from streamcl.nn.model import Model
from streamcl.options import NonNegativeFloat, PositiveFloat
from streamcl.strategy import GradientStrategy, Term
from streamcl.stream import Batch, Task

GRADIENTS = 2**26  # numbers in the gradients of the samples that are gone through at once


class EWC(Term):
    reads_again = "a task again to measure the Fisher information"
    alone: ClassVar[dict[str, Any]] = {
        "over": "task",
        "epochs": 180,
        "optimizer": {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4},
        "schedule": {"name": "steps", "milestones": [0.3888, 0.6666, 0.8333]},
    }

    def __init__(
        self,
        *,
        strength: NonNegativeFloat = 1000.0,
        mode: Literal["average", "online", "separate"] = "average",
        gamma: NonNegativeFloat = 1.0,
        fisher: Literal["empirical", "exact"] = "empirical",
        ceiling: PositiveFloat | None = 1e-4,
    ) -> None:
        self.strength, self.mode, self.gamma, self.fisher, self.ceiling = strength, mode, gamma, fisher, ceiling
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the parameters that have an importance, in the order of the two vectors
        self.importance: Tensor | None = None  # F  # (numbers in these parameters,)
        self.anchor: Tensor | None = None  # theta*, the same
        self.squares: Tensor | None = None  # of the pass over a task's data that is under way

    def start(self, strategy: GradientStrategy) -> None:
        super().start(strategy)
        if self.fisher == "exact" and strategy.info.target not in EXPECTED:
            raise ConfigError(
                f"the exact Fisher information is there for {', '.join(EXPECTED)}, and this stream's target is {strategy.info.target}: "
                "set fisher: empirical"
            )

    def loss(self, batch: Batch) -> Tensor | None:
        if self.importance is None or self.anchor is None:
            return None
        named = dict(self.strategy.model.named_parameters())
        here = torch.cat([named[name][corner(shape)].flatten() for name, shape in self.shapes.items()])
        drift = here - self.anchor
        return self.strength / 2 * torch.dot(self.importance * drift, drift)

    def after_task(self, task: Task) -> None:
        strategy, context, model = self.strategy, self.strategy.context, self.strategy.model
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        count = sum(p.numel() for p in trained.values())
        if self.squares is None:
            self.squares = torch.zeros(count, device=context.device)
        for raw in context.batches(task.train, max(1, min(strategy.batch, GRADIENTS // count)), name="ewc", shuffle=False):
            with model.evaluating():
                self.squares += self.squared_gradients(context.prepare(raw, train=False), trained)
        measured, self.squares = self.squares / len(task.train), None
        self.merge(task, trained, measured if self.ceiling is None else measured.clamp(max=self.ceiling))

    def squared_gradients(self, batch: Batch, trained: dict[str, Tensor]) -> Tensor:
        """The sum of F over the samples of a batch."""
        strategy = self.strategy
        if self.fisher == "empirical":
            return sample_gradients(strategy.model, trained, batch, strategy.criterion).square().sum(0)
        score, weights_of = EXPECTED[strategy.info.target]
        with torch.no_grad():
            weights = weights_of(strategy.model(batch))  # (batch, outputs)
        squares = torch.zeros_like(self.squares)
        for column in range(weights.shape[1]):
            gradients = sample_gradients(strategy.model, trained, batch, lambda outputs, _: score(outputs)[0, column])  # noqa: B023
            squares += (weights[:, column, None] * gradients.square()).sum(0)
        return squares

    def merge(self, task: Task, trained: dict[str, Tensor], fisher: Tensor) -> None:
        """Take the Fisher information of a task and the weights after it in among those of the tasks before."""
        share = 1 - len(task.classes) / len(task.seen) if task.classes else task.index / (task.index + 1)
        keep, take = {"average": (share, 1 - share), "online": (self.gamma, 1.0), "separate": (1.0, 1.0)}[self.mode]
        shapes = {name: tuple(p.shape) for name, p in trained.items()}
        anchor = torch.cat([p.flatten() for p in trained.values()])
        if self.importance is not None and self.anchor is not None:
            now = dict(zip(shapes, zip(parts(fisher, shapes), parts(anchor, shapes), strict=True), strict=True))
            before = zip(parts(self.importance, self.shapes), parts(self.anchor, self.shapes), strict=True)
            for (name, shape), (old, old_anchor) in zip(self.shapes.items(), before, strict=True):
                if name not in now:
                    continue
                new, new_anchor = (part[corner(shape)] for part in now[name])
                total = keep * old + take * new
                if self.mode == "separate":
                    new_anchor.copy_(torch.where(total > 0, (old * old_anchor + new * new_anchor) / total, new_anchor))
                new.copy_(total)
        self.shapes, self.importance, self.anchor = shapes, fisher, anchor

    def state(self) -> dict[str, Any]:
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "importance": self.importance,
            "anchor": self.anchor,
            "squares": self.squares,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        device = self.strategy.context.device
        self.shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        vectors = (state[name] for name in ("importance", "anchor", "squares"))
        self.importance, self.anchor, self.squares = (None if vector is None else vector.to(device) for vector in vectors)


# What the exact Fisher information of a target is made of: numbers whose gradients are squared, and the weight of each square.
EXPECTED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "class": (lambda outputs: outputs.log_softmax(1), lambda outputs: outputs.softmax(1)),
    "labels": (lambda outputs: outputs, lambda outputs: outputs.sigmoid() * (1 - outputs.sigmoid())),
    "value": (lambda outputs: outputs, torch.ones_like),  # of a Gaussian with variance 1
}


def sample_gradients(model: Model, trained: dict[str, Tensor], batch: Batch, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The gradient of `score(outputs, target)` of each sample alone  # (batch, numbers in `trained`)"""
    assert batch.target is not None
    module: nn.Module = model
    inputs: dict[str, Any] = batch.inputs
    headed = all(name.startswith("head.") for name in trained)
    if headed:  # a frozen backbone is gone through once, whatever it reads
        with torch.no_grad():
            inputs = {"features": model.features(batch)}
        module, trained = model.head, {name.removeprefix("head."): p for name, p in trained.items()}

    def scored(parameters: dict[str, Tensor], inputs: dict[str, Any], target: Tensor) -> Tensor:
        given = inputs["features"] if headed else Batch(inputs, target, batch.ids[: len(target)])
        return score(functional_call(module, parameters, (given,)), target)

    def scored_alone(parameters: dict[str, Tensor], inputs: dict[str, Tensor], target: Tensor) -> Tensor:
        return scored(parameters, {name: values[None] for name, values in inputs.items()}, target[None])

    if headed or (batch.present is None and all(isinstance(values, Tensor) for values in inputs.values())):
        found = vmap(grad(scored_alone), in_dims=(None, 0, 0))(trained, inputs, batch.target)
        return torch.cat([values.flatten(1) for values in found.values()], dim=1)
    of_sample = grad(lambda parameters, one: score(functional_call(module, parameters, (one,)), one.target))
    rows = [of_sample(trained, batch[row : row + 1]) for row in range(len(batch))]  # texts, and what may be absent, go one by one
    return torch.stack([torch.cat([values.flatten() for values in row.values()]) for row in rows])


def corner(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a parameter that has grown holds what it was."""
    return tuple(slice(0, size) for size in shape)


def parts(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """Views of the vector, each in the shape of its parameter."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    return (part.view(shape) for part, shape in zip(vector.split(sizes), shapes.values(), strict=True))
