"""Defocus, glass, motion and zoom blur."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from streamcl.corruptions.corruption import Corruption, Drawn, uniform
from streamcl.corruptions.filters import correlated, gaussian_blurred, padded, streaked, zoomed

Disk = tuple[float, float]  # radius, the deviation of the Gaussian that smooths its edge
Glass = tuple[float, int, int]  # deviation of the blur, farthest shift, iterations
Motion = tuple[int, float]  # radius, deviation


@lru_cache(maxsize=16)
def _disk(radius: float, smooth: float) -> Tensor:
    """A disk whose edge is smoothed by a Gaussian of 3 x 3 taps, of 5 x 5 where the radius is over 8; cut to where it is not 0.

    It is brought to a sum of 1 after the smoothing, the published one before, which at radius 8 and 10 changes the brightness a little.
    """
    reach, side = (8, 1) if radius <= 8 else (int(radius), 2)
    line = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = ((line[:, None] ** 2 + line**2) <= radius**2).double()
    taps = torch.exp(-0.5 * (torch.arange(-side, side + 1, dtype=torch.float64) / smooth) ** 2)
    taps = taps / taps.sum()
    around = padded(disk, (side, side), (side, side), "mirror")
    kernel = conv2d(around[None, None], torch.outer(taps, taps)[None, None])[0, 0]
    kernel = kernel / kernel.sum()
    used = line[(kernel.sum(dim=0) > 1e-9)].abs().max().int()
    return kernel[reach - used : reach + used + 1, reach - used : reach + used + 1].float()


def _defocus(values: Tensor, level: Disk) -> Tensor:
    kernel = _disk(*level).to(values.device)
    side = len(kernel) // 2
    around = padded(values, (side, side), (side, side), "mirror")
    if side > 2:
        return correlated(around, kernel)
    return conv2d(around.flatten(0, 1)[:, None], kernel[None, None]).view(values.shape)


def _glass_draw(values: Tensor, level: Glass, generator: torch.Generator) -> Drawn:
    _, farthest, iterations = level
    shape = (len(values), iterations, 2, *values.shape[-2:])  # how far down, how far right
    shifts = torch.randint(-farthest, farthest, shape, generator=generator, device=generator.device, dtype=torch.int8)
    return (shifts.to(values.device),)


def _glass(values: Tensor, level: Glass, shifts: Tensor) -> Tensor:
    """Each pixel, from the last to the first, takes the value that a pixel near it has by then; blurred before and after.

    The published loop means to swap two pixels, but its assignment of NumPy views copies one onto the other; the data sets were
    made so. As a pixel may copy one that copied before, each follows its chain of copies to where the value came from, all at
    once, in doubling steps.
    """
    sigma, farthest, iterations = level
    batch, _, height, width = values.shape
    rows = torch.arange(height, device=values.device, dtype=torch.int16)[:, None]
    columns = torch.arange(width, device=values.device, dtype=torch.int16)

    def moved(row: Tensor, column: Tensor) -> Tensor:
        return (row > farthest) & (row <= height - farthest) & (column > farthest) & (column <= width - farthest)

    # pixels are numbered through the whole batch
    position = torch.arange(batch * height * width, device=values.device)
    source = position
    for step in range(iterations):
        down, right = (shifts[:, step] * moved(rows, columns)).short().unbind(1)
        away = down.int() * width + right
        # A pixel behind in the order copied before this one did: go on from there. Else the chain ends, which a negative number says.
        follows = (away > 0) & moved(rows + down, columns + right)
        near = position + away.flatten()
        chain = torch.where(follows.flatten(), near, -1 - near)
        unfinished = follows.flatten().nonzero()[:, 0]
        while len(unfinished):
            farther = chain.index_select(0, chain.index_select(0, unfinished))
            chain.index_copy_(0, unfinished, farther)
            unfinished = unfinished[farther >= 0]
        source = source.index_select(0, -1 - chain)
    blurred = gaussian_blurred(values, sigma, 4.0, "nearest").flatten(2)
    within = source.view(batch, 1, -1) - position[:: height * width].view(batch, 1, 1)
    shuffled = blurred.gather(2, within.expand_as(blurred)).view(values.shape)
    return gaussian_blurred(shuffled, sigma, 4.0, "nearest")


def _motion_draw(values: Tensor, level: Motion, generator: torch.Generator) -> Drawn:
    return (uniform(values, (len(values),), generator, -45.0, 45.0),)


def _motion(values: Tensor, level: Motion, degrees: Tensor) -> Tensor:
    return streaked(values, *level, degrees, (-45.0, 45.0))


def _zoom(values: Tensor, factors: list[float]) -> Tensor:
    out = values.clone()
    for factor in factors:
        out += zoomed(values, factor)
    return out.div_(len(factors) + 1)


def _factors(*ends: tuple[float, float]) -> Any:
    """As published, by NumPy's arange, which now and then takes the end too."""
    return tuple(numpy.arange(1, end, step).tolist() for end, step in ends)


defocus_blur = Corruption(
    _defocus,
    {
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    },
)
glass_blur = Corruption(
    _glass,
    {
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    },
    _glass_draw,
)
motion_blur = Corruption(
    _motion,
    {
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    },
    _motion_draw,
)
_IMAGENET_ZOOM = _factors((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))
_CIFAR_ZOOM = _factors((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01))
zoom_blur = Corruption(_zoom, {"imagenet": _IMAGENET_ZOOM, "cifar": _CIFAR_ZOOM})
