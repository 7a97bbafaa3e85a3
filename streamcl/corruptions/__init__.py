"""Corruptions of images and sounds, for whole batches on the device that holds them.

Images: the 15 common corruptions of Hendrycks and Dietterich (ICLR 2019, arXiv 1903.12261) at severities 1 to 5 with the
parameters of their two published sets: table `imagenet` (ImageNet-C, 224 pixels; also that of Kinetics50-C and VGGSound-C)
and `cifar` (CIFAR-10-C, 32 pixels). `auto` takes the table whose size is nearer in ratio: cifar where the shorter side has
fewer than 85 pixels. Sides of at least 8 pixels; three channels are taken as red, green and blue, any others as grey.
Parameters in pixels (the radius of a disk, the length of a streak) are the published ones at any size, also below 32: made
smaller with an image of 8 x 8 they would fall inside one pixel and do nothing. What is published as a share of the side (the
elastic displacement, the zooms) and the grid of the fog go with the size.

Where this differs from the published code: values stay floats, so that nothing is rounded to 8 bits on the way, except by
`jpeg_compression`, whose codec does; images need not be square; under 32 pixels the zooms of zoom blur and snow are exact, where the
published ones, along whole pixels, would do nothing; and `frost` is synthesised on the spot, a cover and crystal veins from
filtered noise, weighted as published, because the published pictures cannot be given on.

Sounds: `gaussian_noise`, `traffic`, `crowd`, `rain`, `thunder`, `wind` of Kinetics50-C and VGGSound-C, synthesised where the
benchmark overlays recordings: see `streamcl/corruptions/audio.py` for what the severities mean there.

All randomness comes from the caller's generator and is drawn for the whole batch at once: the same generator and batch give
the same bytes on one device. A batch that is cut otherwise draws otherwise. The six that draw nothing (defocus and zoom blur,
brightness, contrast, pixelate, jpeg) leave the generator as it was and treat an image alone as they do in a batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from streamcl.corruptions.audio import NOISES, noisy
from streamcl.corruptions.blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from streamcl.corruptions.corruption import Corruption, Table
from streamcl.corruptions.digital import brightness, contrast, elastic_transform, pixelate
from streamcl.corruptions.jpeg import jpeg_compression
from streamcl.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from streamcl.corruptions.weather import fog, frost, snow
from streamcl.errors import ConfigError, DataError
from streamcl.plugins import near_name

SEVERITIES = (1, 2, 3, 4, 5)

IMAGE: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}
# The names, in the order of the papers.
IMAGE_CORRUPTIONS: tuple[str, ...] = tuple(IMAGE)
AUDIO_CORRUPTIONS: tuple[str, ...] = ("gaussian_noise", *NOISES)

TABLES = ("imagenet", "cifar")
SMALLEST = 8
BETWEEN_TABLES = 85  # the square root of 32 x 224, rounded up
# How many values are worked on at once: what fits a core's cache, what fills a GPU.
AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


def corrupt(
    name: str,
    values: Tensor,
    severity: int,
    generator: torch.Generator,
    *,
    table: Table | Literal["auto"] = "auto",
    rate: float = 16000.0,
) -> Tensor:
    """The batch corrupted, in its own shape, type and device; what was given is left as it was.

    Images (batch, channels, height, width) in [0, 1] come out in [0, 1]; sounds (batch, samples) in [-1, 1], of `rate` samples a
    second, in [-1, 1]. A sample that is missing (NaN) stays missing and touches no other.
    """
    _check_values(name, values)
    check(name, "image" if values.dim() == 4 else "audio", severity, table=table)
    with torch.no_grad():
        work = values.detach().float()
        missing = work.flatten(1)[:, :1].isnan().any(dim=1)
        gaps = bool(missing.any())
        if gaps:
            work = torch.where(missing.view(-1, *(1,) * (work.dim() - 1)), 0.0, work)
        if values.dim() == 2:
            if not rate > 0:
                raise ConfigError(f"corruption {name}: the sampling rate is {rate}, it must be above 0")
            out = noisy(name, work, severity, rate, generator).clamp_(-1, 1) if work.numel() else work.clone()
        else:
            out = _image(IMAGE[name], work, severity, generator, _table(values, table))
        if gaps:
            out[missing] = torch.nan
        return out.to(values.dtype)


def check(name: str, kind: Literal["image", "audio"], severity: int, *, table: str = "auto") -> None:
    """Refuses what cannot work, before there is any data."""
    names = IMAGE_CORRUPTIONS if kind == "image" else AUDIO_CORRUPTIONS
    if name not in names:
        raise ConfigError(f"unknown corruption {name!r} of {kind}{near_name(name, names) or '; there are ' + ', '.join(names)}")
    if type(severity) is not int or severity not in SEVERITIES:
        raise ConfigError(f"corruption {name}: severity {severity!r}, it must be a whole number from 1 to 5")
    if table not in (*TABLES, "auto"):
        raise ConfigError(f"corruption {name}: unknown table {table!r}; there are {', '.join(TABLES)} and auto")


def _check_values(name: str, values: Tensor) -> None:
    shape = tuple(values.shape)
    if values.dim() not in (2, 4):
        raise DataError(f"corruption {name}: shape {shape}, it must be (batch, channels, height, width) or, for sounds, (batch, samples)")
    if not values.is_floating_point():
        raise DataError(f"corruption {name}: values of type {values.dtype}, they must be floats (images in [0, 1], sounds in [-1, 1])")
    if values.dim() == 4 and (shape[1] < 1 or min(shape[2:]) < SMALLEST):
        raise DataError(f"corruption {name}: images of shape {shape[1:]}, they need a channel and sides of at least {SMALLEST} pixels")
    if values.dim() == 2 and shape[1] < 2:
        raise DataError(f"corruption {name}: clips of {shape[1]} samples, they need at least 2")


def _table(values: Tensor, table: Table | Literal["auto"]) -> Table:
    if table != "auto":
        return table
    return "cifar" if min(values.shape[-2:]) < BETWEEN_TABLES else "imagenet"


def _image(corruption: Corruption, values: Tensor, severity: int, generator: torch.Generator, table: Table) -> Tensor:
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if not len(values):
        return out
    level = corruption.levels[table][severity - 1]
    drawn = corruption.draw(values, level, generator)
    rows = max(1, AT_ONCE.get(values.device.type, AT_ONCE["cuda"]) // values[0].numel())
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        torch.clamp(corruption.apply(values[part], level, *(numbers[part] for numbers in drawn)), 0, 1, out=out[part])
    return out
