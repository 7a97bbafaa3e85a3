"""What a corruption of images is made of: published parameters, what it draws for a whole batch, and what it does with both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Drawn = tuple[Tensor, ...]
Table = Literal["imagenet", "cifar"]


def _nothing(values: Tensor, level: Any, generator: torch.Generator) -> Drawn:
    return ()


@dataclass(frozen=True)
class Corruption:
    """`draw(values, level, generator)` is asked once for a batch; `apply(values, level, *drawn)` acts on each image alone.

    So a batch may be cut into parts that fit the caches. A level is the published parameters of one severity; `levels` holds
    the five of each table.
    """

    apply: Callable[..., Tensor]
    levels: Mapping[Table, tuple[Any, Any, Any, Any, Any]]
    draw: Callable[[Tensor, Any, torch.Generator], Drawn] = _nothing


# Random numbers are made where the generator lives and then brought to the images: one seed is one stream of numbers, whatever the device.


def uniform(values: Tensor, shape: tuple[int, ...], generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    if (low, high) != (0.0, 1.0):
        drawn.mul_(high - low).add_(low)
    return drawn.to(values.device)


def normal(values: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(values.device)
