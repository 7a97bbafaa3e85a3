"""CGGM: classifier-guided gradient modulation (Guo et al., NeurIPS 2024), as a term that any gradient strategy can carry.

A small classifier c_i on the features h_i of each modality, which pass it no gradient, tells how fast the modality improves and where its
own gradient points. With M modalities and e_i the metric of c_i on the batch (accuracy; for values the share on the right side of
`middle`; for masks the mean Dice), at every step

    D_i = e_i - e_i of the step before,      b_i = (sum_k D_k - D_i) / sum_k D_k,      sum_i b_i = M - 1
    magnitude:  the gradients of the encoder of modality i are multiplied by rho b_i
    direction:  lambda / M x sum_i (|b_i| - b_i cos(g_i, g)),   added to the loss, with the b of the step before

g is the gradient of the strategy's own loss with respect to the head's weights, g_i that of c_i's loss with respect to its output layer,
which is made of the head's shape. What improves fast gets smaller gradients, and the head follows what is slow. `directions: gradients`
is the paper's: g is differentiated through. The released code takes the cosine of the weights instead of their gradients, one step late,
which pulls on the head alone: `directions: weights`. Nothing of this is left at inference. Batches of exemplars count like any others.

The sum of D over two batches is often near zero or negative, and b then anything: the released code adds 1e-8 and relies on clipping the
gradients. Here e_i is an average over steps (`smooth`, the share that it keeps), only what rises counts, and `floor` is added to each D_i,
so that 0 <= b_i <= 1 and the sum stays M - 1. The average begins at 0, so for its first 1 / (1 - smooth) steps D follows the level that a
modality is at, and later its rise; the b of modalities that no longer improve go to and fro around (M - 1) / M as batches differ, the
less the larger `smooth` is. `smooth: 0, floor: null` are the formulas as published. `rho: null` leaves out the magnitude, `lambda: 0` the
direction.

A constant factor on gradients is undone by Adam and its kin: with them only the change of b tells; SGD feels all of it. The classifiers
are a hidden layer as wide as the head's input and a linear one (the paper's begin with two transformer layers over a sequence), trained by
an optimiser of their own, and begin anew with each task, as e does at 0; so nothing is kept between tasks. A sample that lacks a modality
is not counted for it. Label sets, which the paper does not have, are measured by the micro-averaged F1.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from streamcl.nn.losses import CRITERIA
from streamcl.nn.model import GrowingHead
from streamcl.options import Fraction, NonNegativeFloat, Optimizer, PositiveFloat
from streamcl.seeding import derived
from streamcl.strategy import GradientStrategy, Term, make_optimizer
from streamcl.stream import Batch, Task

from ._modalities import features_of, overlaps_of_labels, overlaps_of_masks, parts_of, ratio, right_classes, right_sides, rows_with, scale

NEARLY = 1e-8  # what the released code adds to the sum of D


class CGGM(Term):
    def __init__(
        self,
        *,
        rho: PositiveFloat | None = 1.3,
        lambda_: NonNegativeFloat = 0.2,
        directions: Literal["gradients", "weights"] = "gradients",
        smooth: Fraction = 0.9,
        floor: PositiveFloat | None = 1e-3,
        middle: float = 0.0,
        optimizer: Optimizer = Optimizer(name="adam", lr=5e-4),  # noqa: B008
    ) -> None:
        self.rho, self.lambda_, self.directions, self.smooth, self.floor, self.middle = rho, lambda_, directions, smooth, floor, middle
        self.settings = Optimizer.model_validate(optimizer)
        self.classifiers: dict[str, _Classifier] = {}  # of the task at hand
        self.optimizer: torch.optim.Optimizer | None = None
        self.metric: Tensor | None = None  # e  # (M,)
        self.balance: Tensor | None = None  # b  # (M,), None before the first step
        self.counts: dict[str, list[Tensor]] = {}  # of the metrics, over the batches whose gradients accumulate

    def start(self, strategy: GradientStrategy) -> None:
        super().start(strategy)
        self.parts = parts_of(strategy, "cggm")
        self.criterion_of_modality = CRITERIA[strategy.info.target]

    def before_task(self, task: Task) -> None:
        self.begin(self.strategy.model.classes, task.index)

    def begin(self, classes: int, task: int) -> None:
        """New classifiers, and an improvement that is counted from nothing."""
        context, dim = self.strategy.context, self.strategy.model.head.dim
        with torch.random.fork_rng(devices=[]):  # what the strategy draws is not moved
            torch.random.default_generator.manual_seed(derived(context.seed, "cggm", task))
            made = {name: _Classifier(_width(part.columns), dim, classes) for name, part in self.parts.items()}
        self.classifiers = {name: classifier.to(context.device) for name, classifier in made.items()}
        self.optimizer = make_optimizer([p for classifier in made.values() for p in classifier.parameters()], self.settings)
        self.metric, self.balance, self.counts = torch.zeros(len(self.parts), device=context.device), None, {}

    def loss(self, batch: Batch) -> Tensor | None:
        features, _ = features_of(self.strategy, batch)
        guides = self.guide(features.detach(), batch)
        if self.balance is None or not self.lambda_ or self.strategy.own_loss is None:
            return None
        own: Tensor = self.strategy.model.head.weight
        if self.directions == "weights":
            guides = {name: classifier.out.weight.detach() for name, classifier in self.classifiers.items()}
        else:
            own = torch.autograd.grad(self.strategy.own_loss, own, create_graph=True)[0]
        return self.lambda_ * direction(self.balance, list(guides.values()), own)

    def guide(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Each modality's g_i; the classifiers' gradients and the counts of their metrics are added to what there is."""
        assert batch.target is not None
        guides = {}
        for name, part in self.parts.items():
            classifier, own, target = self.classifiers[name], features[:, part.columns], batch.target
            rows = rows_with(batch, name)
            if rows is not None:
                own, target = own[rows], target[rows]
            out = classifier.out.weight
            if not len(own):
                guides[name] = torch.zeros_like(out)
                continue
            scores = classifier(own)
            parameters = list(classifier.parameters())
            found = torch.autograd.grad(self.criterion_of_modality(scores, target), parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                share = gradient / self.strategy.context.group
                parameter.grad = share if parameter.grad is None else parameter.grad + share
            guides[name] = next(gradient for parameter, gradient in zip(parameters, found, strict=True) if parameter is out)
            self.counts.setdefault(name, []).append(self.counted(scores.detach(), target))
        return guides

    def counted(self, scores: Tensor, target: Tensor) -> Tensor:
        kind = self.strategy.info.target
        if kind == "class":
            return right_classes(scores, target)
        if kind == "value":
            return right_sides(scores, target, self.middle)
        return overlaps_of_masks(scores, target) if kind == "mask" else overlaps_of_labels(scores, target)

    def after_backward(self, batch: Batch) -> None:
        assert self.metric is not None and self.optimizer is not None
        now = [ratio(self.counts[name]) if name in self.counts else old for name, old in zip(self.parts, self.metric, strict=True)]
        self.counts = {}
        metric = self.smooth * self.metric + (1 - self.smooth) * torch.stack(now)
        self.balance, self.metric = balance(metric - self.metric, self.floor), metric
        if self.rho is not None:
            scale(self.parts, self.rho * self.balance)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.strategy.context.log(**{f"balance_{name}": value for name, value in zip(self.parts, self.balance, strict=True)})

    def after_task(self, task: Task) -> None:
        self.classifiers, self.optimizer, self.metric, self.balance = {}, None, None, None

    def state(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {"classes": None}
        return {
            "classes": next(iter(self.classifiers.values())).out.classes,
            "classifiers": {name: dict(classifier.state_dict()) for name, classifier in self.classifiers.items()},
            "optimizer": self.optimizer.state_dict(),
            "metric": self.metric,
            "balance": self.balance,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.classifiers, self.optimizer, self.metric, self.balance = {}, None, None, None
        if state["classes"] is None:
            return
        self.begin(int(state["classes"]), 0)
        assert self.optimizer is not None
        for name, classifier in self.classifiers.items():
            classifier.load_state_dict(state["classifiers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        device = self.strategy.context.device
        self.metric, self.balance = (None if state[name] is None else state[name].to(device) for name in ("metric", "balance"))


class _Classifier(nn.Module):
    """A hidden layer as wide as what the head reads, and an output layer of the head's shape; of each place, where there are places."""

    def __init__(self, width: int, dim: int, classes: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, dim), GrowingHead(dim, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.out(self.hidden(features.movedim(1, -1)).relu().movedim(-1, 1))


def balance(rise: Tensor, floor: float | None) -> Tensor:
    """b from the modalities' improvement D  # (M,)"""
    if floor is None:
        total = rise.sum() + NEARLY
        return (total - rise) / total
    rise = rise.clamp(min=0) + floor
    return 1 - rise / rise.sum()


def direction(balance: Tensor, guides: list[Tensor], own: Tensor) -> Tensor:
    """How far `own` points elsewhere than the guides of the modalities that are slow."""
    cosines = torch.stack([cosine_similarity(guide.flatten(), own.flatten(), dim=0) for guide in guides])
    return (balance.abs() - balance * cosines).mean()


def _width(columns: slice) -> int:
    return int(columns.stop - columns.start)
