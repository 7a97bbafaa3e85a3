"""JPEG compression without a file: what its encoder throws away is thrown away, for a batch at once.

The steps and roundings are those of the JPEG group's library: Y, Cb and Cr, chroma at half the resolution, 8 x 8 cosine transforms,
the standard quantisation tables scaled by the quality, and chroma enlarged again by triangles. The entropy coding, which loses nothing, is
left out. Images whose channels are not three are coded as grey, each channel by itself.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamcl.corruptions.corruption import Corruption
from streamcl.corruptions.filters import padded

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))


def _jpeg(values: Tensor, quality: int) -> Tensor:
    batch, channels, height, width = values.shape
    pixels = (values * 255).round_()
    if channels != 3:
        return _coded(pixels.flatten(0, 1), LUMINANCE, quality).view(values.shape) / 255
    planes = (values.new_tensor(TO_YCC) @ pixels.flatten(2)).view(values.shape)
    luma = _coded(planes[:, 0].round(), LUMINANCE, quality)
    # The encoder repeats the last column before it halves the chroma, and the last row only as far as there is a pair.
    chroma = padded(planes[:, 1:].add_(128).round_(), (0, height % 2), (0, -width % 16), "nearest").flatten(0, 1)
    fours = chroma[:, ::2, ::2] + chroma[:, ::2, 1::2] + chroma[:, 1::2, ::2] + chroma[:, 1::2, 1::2]
    fours[..., ::2] += 1
    fours[..., 1::2] += 2
    halved = _coded(fours.mul_(0.25).floor_(), CHROMINANCE, quality)[..., : -(-width // 2)]
    wide = interpolate(halved[None], scale_factor=2, mode="bilinear", align_corners=False)[0, :, :height, :width].round_()
    back = torch.cat([luma[:, None], wide.reshape(batch, 2, height, width) - 128], dim=1)
    return (values.new_tensor(TO_RGB) @ back.flatten(2)).view(values.shape).round_().clamp_(0, 255) / 255


def _coded(planes: Tensor, table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Whole numbers of 0 to 255 through transform, quantisation and back  # (planes, height, width)"""
    count, height, width = planes.shape
    forward, steps, backward = (matrix.to(planes.device) for matrix in _transforms(table, quality))
    whole = padded(planes, (0, -height % 8), (0, -width % 8), "nearest") if height % 8 or width % 8 else planes
    down, across = whole.shape[1] // 8, whole.shape[2] // 8
    blocks = whole.view(count, down, 8, across, 8).transpose(2, 3).reshape(-1, 64)
    coded = ((blocks - 128) @ forward).round_().mul_(steps).round_() @ backward
    back = coded.add_(128).round_().clamp_(0, 255).view(count, down, across, 8, 8).transpose(2, 3)
    return back.reshape(whole.shape)[:, :height, :width]


@lru_cache(maxsize=32)
def _transforms(table: tuple[tuple[int, ...], ...], quality: int) -> tuple[Tensor, Tensor, Tensor]:
    """A block's 64 numbers to eighths of coefficients, which the library holds in whole numbers; these to the steps of the table; and back.

    A number halfway between two steps goes away from 0, which is what the small excess is for.
    """
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = ((torch.tensor(table) * percent + 50) // 100).clamp(1, 255).double().flatten()
    line = torch.arange(8, dtype=torch.float64)
    cosines = torch.cos((2 * line + 1) * line[:, None] * (math.pi / 16)) / 2
    cosines[0] /= math.sqrt(2)
    both = torch.kron(cosines, cosines)  # (coefficient, pixel), orthogonal
    return (8 * both).T.contiguous().float(), ((1 + 1e-6) / (8 * steps)).float(), (both * steps[:, None]).float()


jpeg_compression = Corruption(_jpeg, {"imagenet": (25, 18, 15, 10, 7), "cifar": (80, 65, 58, 50, 40)})
