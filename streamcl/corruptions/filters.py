"""Linear filters of batches of images: matrices for what is separable, Fourier transforms for what is not, and zooming."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy
import torch
from scipy.fft import next_fast_len
from torch import Tensor
from torch.nn.functional import interpolate

Border = Literal["nearest", "mirror", "symmetric"]
WHOLE = 32  # the shorter side from which on a zoom goes by whole pixels
WIDE = 12  # the radius from which on a matrix costs less than shifting


def inside(indices: Tensor, size: int, border: Border) -> Tensor:
    """Where to read for indices beyond the ends: the edge itself (aaa|abc), mirrored at it (cb|abc), or with it doubled (ba|abc)."""
    if border == "nearest":
        return indices.clamp(0, size - 1)
    period = max(1, 2 * size - 2) if border == "mirror" else 2 * size
    folded = indices.remainder(period)
    return torch.where(folded < size, folded, (period if border == "mirror" else period - 1) - folded)


def padded(values: Tensor, rows: tuple[int, int], columns: tuple[int, int], border: Border) -> Tensor:
    """Any width of border, also one that is wider than the image."""
    height, width = values.shape[-2:]
    if any(columns):
        values = values.index_select(-1, inside(torch.arange(-columns[0], width + columns[1], device=values.device), width, border))
    if any(rows):
        values = values.index_select(-2, inside(torch.arange(-rows[0], height + rows[1], device=values.device), height, border))
    return values


def _gaussian(sigma: float, radius: int) -> Tensor:
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()


@lru_cache(maxsize=64)
def _gaussian_matrix(size: int, sigma: float, radius: int, border: Border) -> Tensor:
    read = inside(torch.arange(size)[:, None] + torch.arange(-radius, radius + 1), size, border)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, read, _gaussian(sigma, radius).expand(size, -1)).float()


def gaussian_blurred(values: Tensor, sigma: float, truncate: float, border: Border) -> Tensor:
    """Few taps as a sum of shifted images, many as a product with one matrix per axis that holds the borders too."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return values
    height, width = values.shape[-2:]
    if radius > WIDE:
        rows, columns = (_gaussian_matrix(size, sigma, radius, border).to(values.device) for size in (height, width))
        return rows @ values @ columns.T
    weights = _gaussian(sigma, radius).tolist()
    for axis, size in ((-2, height), (-1, width)):
        ends = (radius, radius)
        around = padded(values, ends, (0, 0), border) if axis == -2 else padded(values, (0, 0), ends, border)
        values = around.narrow(axis, radius, size) * weights[radius]
        for k in range(radius):
            values.add_(around.narrow(axis, k, size), alpha=weights[k])
            values.add_(around.narrow(axis, 2 * radius - k, size), alpha=weights[k])
    return values


def correlated(values: Tensor, kernels: Tensor) -> Tensor:
    """out[y, x] = sum of kernel[j, i] * values[y + j, x + i], where the kernel lies wholly inside."""
    height, width = (size - taps + 1 for size, taps in zip(values.shape[-2:], kernels.shape[-2:], strict=True))
    size = [next_fast_len(side, real=True) for side in values.shape[-2:]]
    spectrum = torch.fft.rfft2(values, s=size) * torch.fft.rfft2(kernels, s=size).conj()
    return torch.fft.irfft2(spectrum, s=size)[..., :height, :width]


def streaked(values: Tensor, radius: int, sigma: float, degrees: Tensor, between: tuple[float, float]) -> Tensor:
    """A motion blur with a direction for each image, as ImageMagick does it: half a Gaussian along a line of whole pixels.

    `between` are the limits of the directions: they bound how far beyond the edge anything is read.
    """
    taps = 2 * radius + 1
    steps = torch.arange(taps, device=values.device)
    weights = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    weights = (weights / weights.sum()).float()
    turn = degrees.double().deg2rad()[:, None]
    right, down = ((steps * part - 0.5).ceil().long() for part in (turn.cos(), turn.sin()))  # (batch, taps)
    turns = numpy.deg2rad(numpy.linspace(*between, 181))
    (left, far), (up, low) = (
        (math.ceil(max(0.0, -taps * part.min())), math.ceil(max(0.0, taps * part.max()))) for part in (numpy.cos(turns), numpy.sin(turns))
    )
    wide = left + far + 1
    kernels = values.new_zeros(len(values), (up + low + 1) * wide)
    kernels.scatter_add_(1, (down + up) * wide + right + left, weights.expand(len(values), -1))
    return correlated(padded(values, (up, low), (left, far), "nearest"), kernels.view(len(values), 1, -1, wide))


def zoomed(values: Tensor, factor: float) -> Tensor:
    """The middle of each image, enlarged linearly to the image's own size.

    As published the middle is cut out along whole pixels. In images under 32 pixels a small zoom would cut nothing: there it is exact.
    """
    if factor == 1:
        return values
    height, width = values.shape[-2:]
    if min(height, width) < WHOLE:
        return _zoom_matrix(height, factor).to(values.device) @ values @ _zoom_matrix(width, factor).to(values.device).T
    (top, tall, high, above), (left, wide, broad, before) = (_window(size, factor) for size in (height, width))
    middle = values[..., top : top + tall, left : left + wide]
    enlarged = interpolate(middle, size=(high, broad), mode="bilinear", align_corners=True)
    return enlarged[..., above : above + height, before : before + width]


@lru_cache(maxsize=64)
def _zoom_matrix(size: int, factor: float) -> Tensor:
    middle = (size - 1) / 2
    read = middle + (torch.arange(size, dtype=torch.float64) - middle) / factor
    return (1 - (read[:, None] - torch.arange(size)).abs()).clamp_(min=0).float()


def _window(size: int, factor: float) -> tuple[int, int, int, int]:
    """Along one axis: where the middle begins, how long it is, how long it becomes, and what is trimmed in front."""
    taken = math.ceil(size / factor)
    grown = round(taken * factor)
    return (size - taken) // 2, taken, grown, (grown - size) // 2
