"""R2-T2: the routing of each sample is moved towards what makes correctly answered neighbours right; no weight of the model changes.

Li, Li and Zhou, ICML 2025, arXiv 2502.20395; for mixtures of experts. A reference memory holds labelled samples that the model answers
rightly, with an embedding e_i, the routing r_i (the weights of all experts of all mixtures) and the class y_i. For a sample with embedding
e and the router's r0, its `k` nearest by cosine and a kernel K_i, one of

    ngd         r <- r - eta_t grad J(r),   J(r) = sum_i K_i l(f(x_i; r), y_i) / sum_i K_i,   eta a cosine from `lr` to `last_lr`
                (the neighbours are run with the sample's own r)
    regression  r = alpha r0 + (1 - alpha) sum_i K_i r_i / sum_i K_i,   alpha by the lowest J of eleven values in [0, 1], or as given
    mode        r <- alpha r + (1 - alpha) sum_i K_i r_i / sum_i K_i,   k nearest and kernel in the space of routings (mean shift)

and the sample is answered with the last r, which is then forgotten. Descent projects r on the simplex of each mixture after each step.

The released script does none of this: it trains the experts' attention on the neighbours' loss, by all parameters, and keeps what it
trained from sample to sample, which leaks the references' labels into the order of the stream. We follow the paper. There the embedding is
that of the question by a language model; here it is the model's own features, or the inputs. The Gaussian kernel's width is the distance
of the farthest of the k; `kernel: cosine` weighs by the similarity, as the released script does. For `mode` alpha is 0.5 unless given.

What it needs and a stream cannot give are labelled samples: `refer` takes them, before anything is served. Only those that the model
answers rightly are kept, the first `references` of them. Cost per sample: ngd k forward and backward passes and one forward pass for each
step, regression 11 k forward passes (none with alpha given), mode none; the samples of a batch go together.

Evidence: reconstruction
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from streamcl.adapting import AdaptingStrategy
from streamcl.context import Context
from streamcl.errors import ConfigError, DataError
from streamcl.nn.routing import given, joined, on_simplex, read, routings
from streamcl.options import Fraction, PositiveFloat, PositiveInt
from streamcl.stream import Batch, StreamInfo

GRID = 11  # values of alpha that are tried


class R2t2(AdaptingStrategy):
    """`how` the routing is found, from the `k` nearest of at most `references` labelled samples, in `steps` (ngd, mode) with a rate from
    `lr` to `last_lr` (ngd); `alpha` is how much of the old routing stays (regression, mode)."""

    batch_statistics: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    needs_references: ClassVar[str] = "the neighbours whose routing it learns from"
    window: int | None = 1

    def __init__(
        self,
        *,
        how: Literal["ngd", "regression", "mode"] = "ngd",
        k: PositiveInt = 5,
        steps: PositiveInt = 10,
        lr: PositiveFloat = 1e-2,
        last_lr: PositiveFloat = 1e-5,
        alpha: Fraction | None = None,
        kernel: Literal["gaussian", "cosine"] = "gaussian",
        embedding: Literal["features", "inputs"] = "features",
        references: PositiveInt = 1000,
    ) -> None:
        super().__init__()
        self.how, self.k, self.steps, self.lr, self.last_lr = how, k, steps, lr, last_lr
        self.alpha, self.kernel, self.embedding, self.references = alpha, kernel, embedding, references
        self.known: Batch | None = None  # the reference memory: samples with their classes
        self.embeddings = self.routes = torch.empty(0)

    def start(self, info: StreamInfo, context: Context) -> None:
        self.sizes = [layer.experts for layer in routings(context.model)]
        if not self.sizes:
            raise ConfigError(
                "r2t2 changes the routing of a mixture of experts: it looked for layers streamcl.nn.routing.Routing, which say where the "
                "weights of experts come out, and this model has none (the backbone mixture has)"
            )
        super().start(info, context)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {}

    # -- the reference memory -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def refer(self, batches: Iterable[Batch]) -> None:
        """Labelled data, before anything is served: prepared batches with their classes. It takes the place of what was referred to."""
        kept: list[Batch] = []
        told: list[tuple[Tensor, Tensor]] = []
        room = self.references
        for batch in batches:
            if batch.target is None:
                raise DataError("r2t2 refers to labelled samples, and these have no classes")
            logits, embeddings, routes = self.seen(batch)
            right = (logits.argmax(dim=1) == batch.target).nonzero()[:room, 0]
            chosen = batch[right]
            kept.append(Batch(chosen.inputs, chosen.target, chosen.ids, chosen.present))
            told.append((embeddings[right], routes[right]))
            room -= len(right)
            if not room:
                break
        if room == self.references:
            raise DataError("r2t2 refers to samples that the model answers rightly, and of these it answers none")
        self.known = Batch.cat(kept)
        self.embeddings, self.routes = (torch.cat(part) for part in zip(*told, strict=True))

    def seen(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, unit embeddings and the router's weights of samples."""
        with read(self.model) as told:
            logits, features = self.model.both(batch)
        if self.embedding == "inputs":
            numeric = [values.flatten(1).float() for values in batch.inputs.values() if isinstance(values, Tensor)]
            if not numeric:
                raise ConfigError("r2t2 takes inputs for embeddings, and this stream has text alone: set embedding: features")
            features = torch.cat(numeric, dim=1)
        return logits, normalize(features.flatten(1).float(), dim=1), joined(told).float()

    # -- serving ------------------------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> Tensor:
        if self.known is None:
            raise ConfigError(f"r2t2 needs labelled samples for {self.needs_references}, and it was given none (refer)")
        with torch.no_grad():
            _, embeddings, routes = self.seen(batch)
            if self.how == "mode":
                routes = self.shifted(routes)
            else:
                neighbours, weights = self.near(1 - embeddings @ self.embeddings.mT)
        if self.how == "ngd":
            routes = self.descended(routes, neighbours, weights)
        elif self.how == "regression":
            routes = self.regressed(routes, neighbours, weights)
        with torch.no_grad(), given(self.model, routes):
            return self.model(batch)

    def near(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest of each sample, and K_i / sum K_i  # (batch, k) each. `distances` are 1 - cosine, half of those squared."""
        nearest = distances.clamp(min=0).topk(min(self.k, distances.shape[1]), dim=1, largest=False)
        if self.kernel == "cosine" and self.how != "mode":
            similar = (1 - nearest.values).clamp(min=1e-12)
            return nearest.indices, similar / similar.sum(dim=1, keepdim=True)
        width = nearest.values[:, -1:].clamp(min=1e-12)
        return nearest.indices, (-0.5 * nearest.values / width).softmax(dim=1)

    def cost(self, routes: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
        """J of each sample  # (batch,)"""
        assert self.known is not None and self.known.target is not None
        run = self.known[neighbours.flatten()]
        assert run.target is not None
        with given(self.model, routes.repeat_interleave(neighbours.shape[1], dim=0)):
            each = cross_entropy(self.model(run), run.target, reduction="none")
        return (each.view_as(neighbours) * weights).sum(dim=1)

    def descended(self, routes: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
        for step in range(self.steps):
            done = step / max(1, self.steps - 1)
            rate = self.last_lr + (self.lr - self.last_lr) * (1 + math.cos(math.pi * done)) / 2
            routes = routes.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.cost(routes, neighbours, weights).sum(), routes)
            routes = on_simplex(routes.detach() - rate * gradient, self.sizes)
        return routes

    @torch.no_grad()
    def regressed(self, routes: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
        target = self.mean(neighbours, weights)
        if self.alpha is not None:
            return self.alpha * routes + (1 - self.alpha) * target
        alphas = torch.linspace(0, 1, GRID, device=routes.device)
        tried = [alpha * routes + (1 - alpha) * target for alpha in alphas]
        best = torch.stack([self.cost(one, neighbours, weights) for one in tried]).argmin(dim=0)
        return torch.stack(tried)[best, torch.arange(len(routes), device=routes.device)]

    def shifted(self, routes: Tensor) -> Tensor:
        alpha = 0.5 if self.alpha is None else self.alpha
        for _ in range(self.steps):
            squared = torch.cdist(routes, self.routes, compute_mode="donot_use_mm_for_euclid_dist").square()
            routes = alpha * routes + (1 - alpha) * self.mean(*self.near(squared))
        return routes

    def mean(self, neighbours: Tensor, weights: Tensor) -> Tensor:
        """The neighbours' routing  # (batch, routes)"""
        return (self.routes[neighbours] * weights[..., None]).sum(dim=1)

    # -- saving: the memory does not change while it serves, so no snapshot holds it ------------------------------------------------

    def state(self) -> dict[str, Any]:
        known = self.known
        memory = None
        if known is not None:
            memory = {
                "inputs": dict(known.inputs),
                "target": known.target,
                "present": None if known.present is None else dict(known.present),
                "embeddings": self.embeddings,
                "routes": self.routes,
            }
        return {**super().state(), "memory": memory}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        memory = state["memory"]
        if memory is not None:
            ids = torch.arange(len(memory["target"]), device=memory["target"].device)
            self.known = Batch(dict(memory["inputs"]), memory["target"], ids, memory["present"])
            self.embeddings, self.routes = memory["embeddings"], memory["routes"]
