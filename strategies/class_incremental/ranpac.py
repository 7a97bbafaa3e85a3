"""RanPAC: a ridge regression on frozen features after a random ReLU layer (McDonnell et al., NeurIPS 2023).

W (dim, M) is drawn once from N(0, 1), h = ReLU(f W) (h = f for M 0), and of all samples so far only G = sum h h' and Q = sum h y' with
one-hot y are kept: W_o = (G + lambda I)^-1 Q, logits h W_o, without a bias and without normalising h or the rows of W_o (PILOT's port
does both, which changes the decision). Whatever the order, the batches and the tasks, W_o at a lambda is the joint ridge solution. All of
it is in float64: G at M 10,000 is ill-conditioned for small lambda.

lambda is one of 10^-8 to 10^8, chosen after each task: fitted on four fifths of the task's samples, the one with the least squared error
on the last fifth (`ridge: task`, the released way; a small last task can choose badly). `ridge: stream` chooses on the parts of all tasks
so far instead, at the price of keeping their statistics (two more matrices M x M); then lambda, too, is the same for every order. A
number fixes it. Which samples are held out goes by their ids, not by a shuffle; within the first task lambda is 1. Values at which
float64 cannot solve the regression are not taken; the squared error is computed from sums, never from kept samples.

M is 10,000 as in the paper (5,000 for CDDB). The paper's optional phase 1, which tunes adapters of the backbone on the first task, is not
here: the backbone stays as it comes.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from streamcl.options import NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Batch, Prediction, Task

from .simplecil import SimpleCIL

RIDGES = tuple(10.0**exponent for exponent in range(-8, 9))


class RanPAC(SimpleCIL):
    predicts_with = ("projection", "classifier")

    def __init__(
        self, *, M: NonNegativeInt = 10000, ridge: PositiveFloat | Literal["task", "stream"] = "task", batch: PositiveInt = 128
    ) -> None:
        super().__init__(batch=batch)
        self.M, self.choice = M, ridge
        self.chosen = 1.0 if isinstance(ridge, str) else float(ridge)
        self.energy = torch.zeros((), dtype=torch.float64)  # the trace of G, which its largest eigenvalue cannot exceed
        self.parts: dict[str, Tensor] = {}  # G and Q of what lambda is fitted on, and of what is held out

    def configure(self) -> None:
        dim = self.model.backbone.dim
        self.projection = torch.randn(dim, self.M, generator=generator(self.context.seed, "ranpac projection"), dtype=torch.float64)
        self.projection = self.projection.to(self.context.device)  # W
        self.energy = self.energy.to(self.context.device)
        self.memory.analytic.configure(self.M or dim, self.chosen)

    def expand(self, features: Tensor) -> Tensor:
        return torch.relu(features @ self.projection) if self.M else features

    def learn(self, task: Task) -> None:
        self.model.eval()
        for raw in self.context.batches(task.train, self.batch, shuffle=False):
            features, labels = self.context.embedded(raw)
            h = self.expand(features)
            self.memory.analytic.update(h, labels, max(task.seen) + 1)
            self.energy = self.energy + h.square().sum()
            self.split(h, labels, raw.ids, 1.0)
            self.changed()
        if isinstance(self.choice, str):
            self.choose()
            self.parts = self.parts if self.choice == "stream" else {}
            self.changed()

    # -- lambda -----------------------------------------------------------------------------------------------------------------

    def split(self, h: Tensor, labels: Tensor, ids: Tensor, times: float) -> None:
        """Add samples to what lambda is fitted on or to what is held out, or take them back."""
        if not isinstance(self.choice, str):
            return
        held, targets = held_out(ids).to(h.device), one_hot(labels).to(h)
        for part, rows in (("fitted", ~held), ("held", held)):
            x, y = h[rows], targets[rows]
            squares = self.parts.get(f"{part} G", h.new_zeros(h.shape[1], h.shape[1]))
            cross = self.parts.get(f"{part} Q", h.new_zeros(h.shape[1], 0))
            cross = pad(cross, (0, max(0, y.shape[1] - cross.shape[1])))
            cross[:, : y.shape[1]].addmm_(x.T, y, alpha=times)
            self.parts |= {f"{part} G": squares.addmm_(x.T, x, alpha=times), f"{part} Q": cross}

    def choose(self) -> None:
        """The lambda with the least squared error on what is held out, where there is something to go by."""
        if not self.parts or not all(bool(part.any()) for part in self.parts.values()):
            return
        g, q, held_g, held_q = (self.parts[name] for name in ("fitted G", "fitted Q", "held G", "held Q"))
        classes = max(q.shape[1], held_q.shape[1])
        q, held_q = (pad(part, (0, classes - part.shape[1])) for part in (q, held_q))
        least = float("inf")
        for ridge in (ridge for ridge in RIDGES if ridge >= self.floor()):
            shifted = g.clone()
            shifted.diagonal().add_(ridge)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if bool(failed):
                continue
            w = torch.cholesky_solve(q, factor)
            error = float(((held_g @ w - 2 * held_q) * w).sum())  # |h w - y|^2 summed, but for |y|^2
            if error < least:
                least, self.chosen = error, ridge

    def floor(self) -> float:
        """The lambda below which rounding, of G's largest eigenvalue, is larger."""
        return torch.finfo(torch.float64).eps * float(self.energy)

    @cached_property
    def classifier(self) -> Tensor:
        """W_o  # (M, classes)"""
        if not isinstance(self.choice, str):
            return self.memory.analytic.weights()
        return self.memory.analytic.weights(max(self.chosen, self.floor()))

    def changed(self) -> None:
        self.__dict__.pop("classifier", None)

    def predict(self, batch: Batch) -> Prediction:
        return Prediction(self.expand(self.model.features(batch).double()) @ self.classifier)

    # -- what is kept -----------------------------------------------------------------------------------------------------------

    def erase(self, samples: Batch) -> tuple[str, ...]:
        """Exact. A lambda that was chosen on a task's own samples stays as it is: their statistics are gone."""
        for start in range(0, len(samples), self.batch):
            raw = samples[start : start + self.batch]
            features, labels = self.context.embedded(raw)
            h = self.expand(features)
            self.memory.analytic.remove(h, labels)
            self.energy = self.energy - h.square().sum()
            if self.choice == "stream":
                self.split(h, labels, raw.ids, -1.0)
        if self.choice == "stream":
            self.choose()
        self.changed()
        return ("analytic", "energy", "parts") if self.choice == "task" else ("analytic", "energy", "parts", "chosen")

    def state(self) -> dict[str, Any]:
        chosen = torch.tensor(self.chosen, dtype=torch.float64)
        return {"projection": self.projection, "parts": self.parts, "chosen": chosen, "energy": self.energy}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.projection = state["projection"].to(self.context.device)
        self.chosen, self.energy = float(state["chosen"]), state["energy"].to(self.context.device)
        self.parts = {name: value.to(self.context.device) for name, value in state["parts"].items()}
        self.changed()


def held_out(ids: Tensor) -> Tensor:
    """A fifth of all samples, told by their ids alone: the upper bits of the id times 2^64 over the golden ratio  # (batch,)"""
    return ((ids * -7046029254386353131) >> 33) % 5 == 0
