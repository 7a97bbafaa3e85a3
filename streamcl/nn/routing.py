"""Mixtures of experts whose routing can be read, and given from outside.

A model says where its routing is by a layer `Routing` in the place of the softmax over a router's scores; that is all it has to do. The
routing of a sample is then one row of numbers: the weights of the experts of every such layer, one layer after another, each layer's on
the simplex.

    with read(model) as routes:          with given(model, routes):
        model(batch)                         model(batch)
    joined(routes)    # (batch, routes)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Routing(nn.Module):
    """The weights of one mixture's experts: the softmax of its router's scores, unless others are given.

    Scores are (batch, experts), or (batch, places, experts) where each place is routed by itself: what is read is then the mean over the
    places, and what is given holds for all of them.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.instead: Tensor | None = None
        self.told: list[Tensor] | None = None

    def forward(self, scores: Tensor) -> Tensor:
        if self.instead is not None:
            between = [1] * (scores.dim() - 2)
            weights = self.instead.view(-1, *between, self.experts).to(scores).expand(scores.shape)
        else:
            weights = scores.softmax(dim=-1)
        if self.told is not None:
            self.told.append(weights if weights.dim() == 2 else weights.flatten(1, -2).mean(dim=1))
        return weights


def routings(model: nn.Module) -> list[Routing]:
    """The mixtures of a model, in the order in which it holds them. None where it is no mixture of experts."""
    return [module for module in model.modules() if isinstance(module, Routing)]


@contextmanager
def read(model: nn.Module) -> Iterator[list[list[Tensor]]]:
    """For a while, what each mixture routes by is kept in a list of its own."""
    layers = routings(model)
    for layer in layers:
        layer.told = []
    try:
        yield [layer.told for layer in layers if layer.told is not None]
    finally:
        for layer in layers:
            layer.told = None


def joined(told: Sequence[Sequence[Tensor]]) -> Tensor:
    """The routing of the last forward pass that was read  # (batch, routes)"""
    return torch.cat([layer[-1] for layer in told], dim=1)


@contextmanager
def given(model: nn.Module, routes: Tensor) -> Iterator[None]:
    """For a while, every sample of a batch is routed by its row  # routes: (batch, routes). Gradients go to them."""
    layers = routings(model)
    parts = routes.split([layer.experts for layer in layers], dim=1)
    for layer, part in zip(layers, parts, strict=True):
        layer.instead = part
    try:
        yield
    finally:
        for layer in layers:
            layer.instead = None


def on_simplex(routes: Tensor, sizes: Sequence[int]) -> Tensor:
    """The nearest routing: each mixture's weights not negative, with a sum of 1  # (batch, routes)"""
    return torch.cat([_projected(part) for part in routes.split(list(sizes), dim=1)], dim=1)


def _projected(rows: Tensor) -> Tensor:
    """Each row's Euclidean projection: as much is taken off every weight, down to 0, that they sum to 1 (Held, Wolfe and Crowder, 1974)."""
    sorted_rows = rows.sort(dim=1, descending=True).values
    counts = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    excess = (sorted_rows.cumsum(dim=1) - 1) / counts  # what would be taken off, if so many stay above 0
    stay = (sorted_rows > excess).sum(dim=1, keepdim=True).clamp(min=1)
    return (rows - excess.gather(1, stay - 1)).clamp(min=0)
