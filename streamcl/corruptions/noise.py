"""Gaussian, shot and impulse noise."""

from __future__ import annotations

from functools import lru_cache

import torch
from scipy.stats import poisson
from torch import Tensor

from streamcl.corruptions.corruption import Corruption, Drawn, normal, uniform

GUIDES = 256
NO_MORE = 1e-4  # so near below a level of 8 bits a float is that level


def _gaussian_draw(values: Tensor, deviation: float, generator: torch.Generator) -> Drawn:
    return (normal(values, tuple(values.shape), generator),)


def _gaussian(values: Tensor, deviation: float, noise: Tensor) -> Tensor:
    return torch.add(values, noise, alpha=deviation)


def _shot_draw(values: Tensor, rate: float, generator: torch.Generator) -> Drawn:
    """A number that decides the count at the level of 8 bits below each value, and the counts for what the value has above that level.

    A sum of Poisson counts is one of the sum of their rates, so that any float is right; images of 8 bits have nothing above.
    """
    chance = uniform(values, tuple(values.shape), generator)
    above = values * 255 - _levels(values)
    if not bool((above > NO_MORE).any()):
        return chance, values.new_zeros(()).expand(values.shape)
    return chance, torch.poisson(above.clamp_(min=0).mul_(rate / 255).to(generator.device), generator=generator).to(values.device)


def _levels(values: Tensor) -> Tensor:
    return (values * 255 + NO_MORE).clamp_(0, 255).long()


def _shot(values: Tensor, rate: float, chance: Tensor, more: Tensor) -> Tensor:
    """The smallest count whose cumulative probability is above the chance: mostly the one that a guide names, else it is searched for."""
    cumulative, guide = (table.to(values.device) for table in _poisson(rate))
    counts = cumulative.shape[1]
    level = _levels(values).flatten()
    drawn = chance.flatten()
    place = guide.view(-1).index_select(0, level * GUIDES + (drawn * GUIDES).long()) + level * counts
    wanted = drawn.double() + level  # in float64, as the level takes digits away
    behind = (wanted >= cumulative.view(-1).index_select(0, place)).nonzero()[:, 0]
    place.index_copy_(0, behind, torch.searchsorted(cumulative.view(-1), wanted.index_select(0, behind), right=True))
    return ((place - level * counts).view(values.shape) + more) / rate


@lru_cache(maxsize=10)
def _poisson(rate: float) -> tuple[Tensor, Tensor]:
    """Cumulative probabilities of counts, one level of 8 bits after the other in a rising row, and where to look by 1/256 of chance."""
    counts = int(poisson.isf(1e-12, rate)) + 2
    cumulative = torch.from_numpy(poisson.cdf(range(counts), [[level * rate / 255] for level in range(256)]))
    cumulative[:, -1] = 1.0
    begins = (torch.arange(GUIDES) / GUIDES).double().expand(256, -1).contiguous()
    return cumulative + torch.arange(256)[:, None], torch.searchsorted(cumulative, begins, right=True)


def _impulse_draw(values: Tensor, amount: float, generator: torch.Generator) -> Drawn:
    return (uniform(values, tuple(values.shape), generator),)


def _impulse(values: Tensor, amount: float, chance: Tensor) -> Tensor:
    """Half of the amount turns white, half black, each value of each channel by itself."""
    return torch.where(chance < amount / 2, 1.0, values).masked_fill_(chance > 1 - amount / 2, 0.0)


gaussian_noise = Corruption(
    _gaussian, {"imagenet": (0.08, 0.12, 0.18, 0.26, 0.38), "cifar": (0.04, 0.06, 0.08, 0.09, 0.10)}, _gaussian_draw
)
shot_noise = Corruption(_shot, {"imagenet": (60, 25, 12, 5, 3), "cifar": (500, 250, 100, 75, 50)}, _shot_draw)
impulse_noise = Corruption(_impulse, {"imagenet": (0.03, 0.06, 0.09, 0.17, 0.27), "cifar": (0.01, 0.02, 0.03, 0.05, 0.07)}, _impulse_draw)
