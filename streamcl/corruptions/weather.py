"""Snow, frost and fog."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from streamcl.corruptions.corruption import Corruption, Drawn, normal, uniform
from streamcl.corruptions.filters import streaked, zoomed

Snow = tuple[float, float, float, float, int, float, float]  # mean, deviation, zoom, threshold, radius and deviation of the streaks, blend
Frost = tuple[float, float]  # weight of the image, of the frost
Fog = tuple[float, float]  # strength, by what the wobble falls from step to step

FALLING = (-135.0, -45.0)
ICE = (0.86, 0.94, 1.0)
LUMA = (0.299, 0.587, 0.114)


def _snow_draw(values: Tensor, level: Snow, generator: torch.Generator) -> Drawn:
    flakes = normal(values, (len(values), 1, *values.shape[-2:]), generator)
    return flakes, uniform(values, (len(values),), generator, *FALLING)


def _snow(values: Tensor, level: Snow, flakes: Tensor, degrees: Tensor) -> Tensor:
    mean, deviation, zoom, threshold, radius, sigma, blend = level
    layer = zoomed(flakes * deviation + mean, zoom)
    layer = torch.where(layer < threshold, 0.0, layer).clamp_(max=1.0)
    layer = streaked(layer, radius, sigma, degrees, FALLING)
    whitened = torch.maximum(values, _gray(values) * 1.5 + 0.5)
    return blend * values + (1 - blend) * whitened + layer + layer.flip(-1, -2)


def _gray(values: Tensor) -> Tensor:
    if values.shape[1] != 3:
        return values.mean(dim=1, keepdim=True)
    return (values * values.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)


def _frost_draw(values: Tensor, level: Frost, generator: torch.Generator) -> Drawn:
    return (normal(values, (len(values), 2, *values.shape[-2:]), generator),)


def _frost(values: Tensor, level: Frost, noise: Tensor) -> Tensor:
    """A cover that is thick here and thin there, and bright veins in it where a second field of noise passes through zero."""
    height, width = noise.shape[-2:]
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) * _frost_spectrum(height, width).to(noise.device), s=(height, width))
    cover, veins = (fields / fields.std(dim=(-2, -1), keepdim=True)).split(1, dim=1)
    crystals = (1 - veins.abs() / 1.5).clamp_(min=0).pow_(2)
    frost = (0.35 + 0.15 * cover + 0.45 * crystals).clamp_(0, 1)
    ice = values.new_tensor(ICE).view(3, 1, 1) if values.shape[1] == 3 else 1.0
    return level[0] * values + level[1] * frost * ice


@lru_cache(maxsize=8)
def _frost_spectrum(height: int, width: int) -> Tensor:
    """Of the cover and of the veins, which are finer."""
    waves = torch.hypot(torch.fft.fftfreq(height)[:, None] * height, torch.fft.rfftfreq(width) * width)  # whole waves across the image
    spectrum = torch.stack([(1 + waves).pow(-2.0), (4 + waves).pow(-2.2)])
    spectrum[:, 0, 0] = 0
    return spectrum


def _fog_draw(values: Tensor, level: Fog, generator: torch.Generator) -> Drawn:
    side = 1 << (max(values.shape[-2:]) - 1).bit_length()
    return (uniform(values, (len(values), side, side), generator, -1.0, 1.0),)


def _fog(values: Tensor, level: Fog, wobbles: Tensor) -> Tensor:
    strength, decay = level
    height, width = values.shape[-2:]
    fog = _plasma(wobbles, decay)[:, None, :height, :width]
    brightest = values.amax(dim=(1, 2, 3), keepdim=True)
    return (values + strength * fog) * (brightest / (brightest + strength))


def _plasma(wobbles: Tensor, decay: float) -> Tensor:
    """Heights by the diamond-square algorithm on a torus, from 0 to 1; each point's own random number is given.

    Each step halves the grid: the middle of a square is the mean of its corners, the middle of an edge that of its four neighbours, each
    with a wobble that falls by `decay` squared from step to step (the published code multiplies by it twice).
    """
    side = wobbles.shape[-1]
    heights = torch.zeros_like(wobbles)
    step, wobble = side, 100.0
    while step >= 2:
        half, size = step // 2, wobble**2
        corners = heights[:, ::step, ::step]
        pairs = corners + corners.roll(-1, dims=1)
        squares = pairs + pairs.roll(-1, dims=2)
        middle = squares / 4 + size * wobbles[:, half::step, half::step]
        heights[:, half::step, half::step] = middle
        along = middle + middle.roll(1, dims=1) + corners + corners.roll(-1, dims=2)
        heights[:, ::step, half::step] = along / 4 + size * wobbles[:, ::step, half::step]
        down = middle + middle.roll(1, dims=2) + pairs
        heights[:, half::step, ::step] = down / 4 + size * wobbles[:, half::step, ::step]
        step, wobble = half, wobble / decay
    heights -= heights.amin(dim=(1, 2), keepdim=True)
    return heights / heights.amax(dim=(1, 2), keepdim=True)


snow = Corruption(
    _snow,
    {
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    },
    _snow_draw,
)
frost = Corruption(
    _frost,
    {
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    },
    _frost_draw,
)
fog = Corruption(
    _fog,
    {
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
    },
    _fog_draw,
)
