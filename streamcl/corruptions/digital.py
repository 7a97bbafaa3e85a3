"""Brightness, contrast, elastic transform and pixelation."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from streamcl.corruptions.corruption import Corruption, Drawn, uniform
from streamcl.corruptions.filters import gaussian_blurred

Elastic = tuple[float, float, float]  # strength and smoothness of the displacement, shift of the corners, each as a share of the side


def _brightness(values: Tensor, more: float) -> Tensor:
    """The V of HSV raised: with hue and saturation kept all channels grow by one factor, and black turns grey."""
    if values.shape[1] == 1:
        return values + more
    value = values.amax(dim=1, keepdim=True)
    raised = (value + more).clamp_(max=1.0)
    return torch.where(value > 0, values * (raised / value), raised)


def _contrast(values: Tensor, factor: float) -> Tensor:
    return torch.lerp(values.mean(dim=(-2, -1), keepdim=True), values, factor)


def _elastic_draw(values: Tensor, level: Elastic, generator: torch.Generator) -> Drawn:
    corners = uniform(values, (len(values), 3, 2), generator, -1.0, 1.0)  # right, down
    return corners, uniform(values, (len(values), 2, *values.shape[-2:]), generator, -1.0, 1.0)


def _elastic(values: Tensor, level: Elastic, corners: Tensor, field: Tensor) -> Tensor:
    """Three points around the middle are shifted and the image with them; then every pixel is displaced by a smooth random field."""
    height, width = values.shape[-2:]
    side = min(height, width)
    strength, smoothness, shift = (share * side for share in level)
    warped = grid_sample(values, _affine_grid(values, corners * shift), padding_mode="reflection", align_corners=True)
    if strength == 0:
        return warped
    smooth = field if smoothness == 0 else gaussian_blurred(field, smoothness, 3.0, "symmetric")
    # Here a pixel is an area, not a point, so that the border is doubled as the published code doubles it.
    grid = values.new_empty(len(values), height, width, 2)
    for i, (size, line) in enumerate(((width, (1, -1)), (height, (-1, 1)))):
        middles = (2 * torch.arange(size, device=values.device) + 1) / size - 1
        torch.add(middles.view(line), smooth[:, i], alpha=2 * strength / size, out=grid[..., i])
    return grid_sample(warped, grid, padding_mode="reflection", align_corners=False)


def _affine_grid(values: Tensor, shifts: Tensor) -> Tensor:
    """Where each pixel is read when the three points have been moved by `shifts`  # (batch, height, width, 2), corners at -1 and 1"""
    height, width = values.shape[-2:]
    middle, reach = values.new_tensor([width // 2, height // 2]).double(), min(height, width) // 3
    before = middle + reach * values.new_tensor([[1, 1], [1, -1], [-1, -1]]).double()
    after = before + shifts
    # solved in closed form: what maps the moved points' two edges back onto the edges they had
    (a, c), (b, d) = (after[:, 1] - after[:, 0]).unbind(-1), (after[:, 2] - after[:, 0]).unbind(-1)
    determinant = a * d - b * c
    determinant = torch.where(determinant.abs() < 1e-6, 1e-6, determinant)
    inverse = torch.stack([torch.stack([d, -b], dim=-1), torch.stack([-c, a], dim=-1)], dim=-2) / determinant[:, None, None]
    edges = torch.stack([before[1] - before[0], before[2] - before[0]], dim=-1)  # (2, 2), an edge in each column
    turn = edges @ inverse
    start = before[0] - (turn @ after[:, 0, :, None])[..., 0]
    x, y = torch.arange(width, device=values.device), torch.arange(height, device=values.device)
    grid = values.new_empty(len(values), height, width, 2)
    for i, size in enumerate((width, height)):
        across, down, first = (part.float()[:, None, None] for part in (turn[:, i, 0], turn[:, i, 1], start[:, i]))
        scale = 2 / (size - 1)
        torch.add(x * (across * scale), y[:, None] * (down * scale) + (first * scale - 1), out=grid[..., i])
    return grid


def _pixelate(values: Tensor, factor: float) -> Tensor:
    height, width = values.shape[-2:]
    rows, columns = (_boxes(size, max(1, int(size * factor))).to(values.device) for size in (height, width))
    small = rows @ values @ columns.T
    down, across = (_nearest(size, max(1, int(size * factor)), values.device) for size in (height, width))
    return small.index_select(-2, down).index_select(-1, across)


@lru_cache(maxsize=32)
def _boxes(size: int, fewer: int) -> Tensor:
    """The box filter of image libraries: a pixel counts wholly where its middle lies in the box, else not  # (fewer, size)"""
    # A pixel on the edge of two boxes belongs to the one that Pillow's own order of operations rounds it into.
    scale = size / fewer
    pixels, middles = torch.arange(size), (torch.arange(fewer, dtype=torch.float64)[:, None] + 0.5) * scale
    offsets = (pixels - middles + 0.5) * (1 / scale)
    near = (pixels >= (middles - scale / 2 + 0.5).long()) & (pixels < (middles + scale / 2 + 0.5).long())
    inside = (near & (offsets > -0.5) & (offsets <= 0.5)).double()
    return (inside / inside.sum(dim=1, keepdim=True)).float()


def _nearest(size: int, fewer: int, device: torch.device) -> Tensor:
    return ((torch.arange(size, device=device, dtype=torch.float64) + 0.5) * fewer / size).long()


def _shares(side: float, *levels: tuple[float, float, float]) -> Any:
    """Published as multiples of 244 pixels where the images have 224."""
    return tuple(tuple(244 / side * part for part in level) for level in levels)


brightness = Corruption(_brightness, {"imagenet": (0.1, 0.2, 0.3, 0.4, 0.5), "cifar": (0.05, 0.1, 0.15, 0.2, 0.3)})
contrast = Corruption(_contrast, {"imagenet": (0.4, 0.3, 0.2, 0.1, 0.05), "cifar": (0.75, 0.5, 0.4, 0.3, 0.15)})
elastic_transform = Corruption(
    _elastic,
    {
        "imagenet": _shares(224.0, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        "cifar": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    },
    _elastic_draw,
)
pixelate = Corruption(_pixelate, {"imagenet": (0.6, 0.5, 0.4, 0.3, 0.25), "cifar": (0.95, 0.9, 0.85, 0.75, 0.65)})
