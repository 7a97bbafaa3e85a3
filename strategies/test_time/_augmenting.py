"""Random views of images for methods that adapt by them: every image of a batch gets numbers of its own, and all are changed at once.

`strong` is CoTTA's set (arXiv 2203.13591), which RoTTA shares; `augmix` is AugMix (arXiv 1912.02781) as MEMO has it. Both want pixels from
0 to 1, so `Pixels` says which modalities of a batch are images and undoes the normalisation that the model's preparation ends with.

Numbers come from the run's generator. What there is many of (noise for every pixel) is drawn on the device itself, by a generator that
begins with a number from the run's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.stream import Batch, Modality, StreamInfo
from streamcl.transforms._draw import between, draw
from streamcl.transforms.crop import Crop
from streamcl.transforms.jitter import grey
from streamcl.transforms.normalize import Normalize
from streamcl.transforms.random_resized_crop import RandomResizedCrop

Augmentation = Callable[[Tensor, torch.Generator], Tensor]
SLACK = 0.5  # how far outside of 0 to 1 pixels may lie before they are taken for normalised ones or for integers


class Pixels:
    """Which modalities are images, and the way from what the model takes to pixels from 0 to 1 and back.

    `mean` and `std` are what images were normalised by. Where none are given, those of the stream's own preparation are undone.
    """

    def __init__(self, reader: str, info: StreamInfo, context: Context, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        if len(mean) != len(std):
            raise ConfigError(f"{reader}: mean has {len(mean)} values and std has {len(std)}; they must be equally many")
        self.reader, self.info, self.checked = reader, info, False
        self.normalised: dict[str, list[tuple[Tensor, Tensor]]] = {}
        given = [(torch.tensor(list(mean)).view(-1, 1, 1), torch.tensor(list(std)).view(-1, 1, 1))] if mean else []
        for name, modality, transforms in getattr(getattr(context, "preparation", None), "test", ()):
            if modality.kind == "image" and not given:
                self.normalised[name] = [(t.mean, t.std) for t in transforms if isinstance(t, Normalize)]
        self.given = given
        if info.modalities and not any(m.kind == "image" for m in info.modalities.values()):
            raise ConfigError(self._none(", ".join(f"{name} ({m.kind})" for name, m in info.modalities.items())))

    def _none(self, there: str) -> str:
        return f"{self.reader} learns from random views of images: it looked for a modality of kind image, and this stream has {there}"

    def names(self, batch: Batch) -> list[str]:
        """The modalities of a batch that are images."""
        if self.info.modalities:
            return [name for name, modality in self.info.modalities.items() if modality.kind == "image" and name in batch.inputs]
        found = [
            name
            for name, values in batch.inputs.items()
            if isinstance(values, Tensor) and values.dim() == 4 and values.is_floating_point() and values.shape[1] in (1, 3, 4)
        ]
        if not found:
            raise ConfigError(self._none(", ".join(batch.inputs)))
        return found

    def augmented(self, batch: Batch, augmentation: Augmentation, generator: torch.Generator) -> Batch:
        """The batch with a random view of each image."""
        inputs = dict(batch.inputs)
        for name in self.names(batch):
            values = inputs[name]
            assert isinstance(values, Tensor)
            steps = self.given or self.normalised.get(name, [])
            if self.given and len(self.given[0][0]) not in (1, values.shape[1]):
                raise ConfigError(
                    f"{self.reader}: mean and std have {len(self.given[0][0])} values and {name} has {values.shape[1]} channels"
                )
            pixels = values.float()
            for mean, std in reversed(steps):
                pixels = pixels * std.to(pixels) + mean.to(pixels)
            if not self.checked:
                self._check(name, pixels)
            pixels = augmentation(pixels, generator)
            for mean, std in steps:
                pixels = (pixels - mean.to(pixels)) / std.to(pixels)
            inputs[name] = pixels.to(values.dtype)
        self.checked = True
        return batch.replace(inputs=inputs)

    def _check(self, name: str, pixels: Tensor) -> None:
        finite = pixels[pixels.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        if low < -SLACK or high > 1 + SLACK:
            raise ConfigError(
                f"{self.reader} makes random views of pixels that run from 0 to 1, and those of {name} run from {low:.3g} to {high:.3g}: "
                "say mean and std, by which they were normalised"
            )


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator for numbers that are drawn on the device: the run's own on a CPU, else one that begins with a number from it."""
    if device.type == "cpu":
        return generator
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


# CoTTA's set -----------------------------------------------------------------------------------------------------------------------


def strong(values: Tensor, generator: torch.Generator, flip: float = 0.5) -> Tensor:
    """Colours, a small turn and shift and zoom, a blur, a mirror image and noise; pixels from 0 to 1, whatever they were before.

    The strengths are the released ones. There one draw serves the whole batch, here each image has its own; the order of the five changes
    of colour is the batch's, as there.
    """
    uniform = draw(len(values), 11, generator).to(values)[:, :, None, None, None]
    order = torch.randperm(len(_COLOURS), generator=generator).tolist()
    values = values.clamp(0, 1)
    for number in order:
        change, low, high = _COLOURS[number]
        values = change(values, between(uniform[:, number], low, high))
    values = _moved(values, uniform[:, 5:9, 0, 0, 0])
    values = _blurred(values, between(uniform[:, 9, 0], 0.001, 0.5))
    values = torch.where(uniform[:, 10] < flip, values.flip(-1), values)
    noise = torch.randn(values.shape, generator=on_device(generator, values.device), device=values.device, dtype=values.dtype)
    return (values + 0.005 * noise).clamp(0, 1)


def _brightness(values: Tensor, factor: Tensor) -> Tensor:
    return (values * factor).clamp(0, 1)


def _contrast(values: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grey(values).mean(dim=(1, 2, 3), keepdim=True), values, factor).clamp(0, 1)


def _saturation(values: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grey(values), values, factor).clamp(0, 1) if values.shape[1] == 3 else values


def _gamma(values: Tensor, exponent: Tensor) -> Tensor:
    return values.clamp(1e-8, 1) ** exponent


def _hue(values: Tensor, turn: Tensor) -> Tensor:
    """Hue, saturation and value, the hue turned, and back; a grey image has no hue."""
    if values.shape[1] != 3:
        return values
    red, green, blue = values.unbind(1)
    value, low = values.amax(dim=1), values.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == red, (green - blue) / safe, torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    sector = sector + 6 * turn[:, 0]
    steps = (torch.tensor([5.0, 3.0, 1.0]).to(values).view(-1, 1, 1) + sector[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(steps, 4 - steps).clamp(0, 1)


_COLOURS: tuple[tuple[Callable[[Tensor, Tensor], Tensor], float, float], ...] = (
    (_brightness, 0.6, 1.4),
    (_contrast, 0.7, 1.3),
    (_saturation, 0.5, 1.5),
    (_hue, -0.06, 0.06),
    (_gamma, 0.7, 1.3),
)
_BLUR = 2  # pixels that the blur reaches to each side


def _moved(values: Tensor, uniform: Tensor) -> Tensor:
    """Turned, shifted and zoomed, with a margin for the blur; what comes in from outside continues the edge.

    The release moves an image that was continued by half its width on each side, and its shift of 1/16 is one of that: 1/8 of the image.
    """
    height, width = values.shape[-2:]
    angle = between(uniform[:, 0], -15, 15) * (math.pi / 180)
    zoom = between(uniform[:, 3], 0.9, 1.1)
    right, down = (between(uniform[:, 1:3], -1 / 4, 1 / 4)).unbind(1)  # of half the image, in which a grid is measured
    tall, wide = height + 2 * _BLUR, width + 2 * _BLUR
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [
            torch.stack([cos * (wide / width), -sin * (tall / width), right], dim=1),
            torch.stack([sin * (wide / height), cos * (tall / height), down], dim=1),
        ],
        dim=1,
    )
    grid = affine_grid(theta, [len(values), values.shape[1], tall, wide], align_corners=False)
    return grid_sample(values, grid, padding_mode="border", align_corners=False)


def _blurred(values: Tensor, deviation: Tensor) -> Tensor:
    """A Gaussian blur of five pixels; the margin goes."""
    taps = torch.arange(-_BLUR, _BLUR + 1, device=values.device, dtype=values.dtype)
    weights = (-0.5 * (taps / deviation.flatten(1)) ** 2).exp()
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None, None]  # (batch, taps, 1, 1, 1)
    for axis in (2, 3):
        inner = values.shape[axis] - 2 * _BLUR
        values = torch.stack([weights[:, tap] * values.narrow(axis, tap, inner) for tap in range(2 * _BLUR + 1)]).sum(dim=0)
    return values


# AugMix ----------------------------------------------------------------------------------------------------------------------------

_CHAINS, _DEPTH = 3, 3


def augmix(values: Tensor, generator: torch.Generator, flip: float = 0.5, severity: float = 1.0, crop: str = "padded") -> Tensor:
    """A random crop (with a border, or `resized`), mirrored, and its mixture with three chains of one to three random operations each.

    Dirichlet(1, 1, 1) weighs the chains and Beta(1, 1) the mixture against the image. The strength of an operation is drawn from 0.1 to
    `severity` (of 10). The border of the crop is an eighth of the image (4 of 32 pixels). The released operations work on whole levels
    and whole degrees and shear about a corner; here strengths are continuous, and about the middle.
    """
    count = len(values)
    cut = RandomResizedCrop(size=(values.shape[-2], values.shape[-1])) if crop == "resized" else Crop(padding=max(1, values.shape[-1] // 8))
    values = cut(values.clamp(0, 1), _ANY, generator)
    values = torch.where((draw(count, 1, generator) < flip).to(values.device)[:, :, None, None], values.flip(-1), values)
    weights = -draw(count, _CHAINS, generator).clamp(min=1e-12).log()
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(values)
    kept = draw(count, 1, generator).to(values)[:, :, None, None]
    depth = (draw(count, _CHAINS, generator) * _DEPTH).long()  # one less than the operations of each chain
    which = (draw(count, _CHAINS * _DEPTH, generator) * len(_OPERATIONS)).long().view(count, _CHAINS, _DEPTH)
    strength = draw(count, _CHAINS * _DEPTH * 2, generator).view(count, _CHAINS, _DEPTH, 2)
    mixture = torch.zeros_like(values)
    for chain in range(_CHAINS):
        changed = values
        for step in range(_DEPTH):
            of_step = which[:, chain, step].masked_fill(depth[:, chain] < step, -1)
            changed = _operated(changed, of_step, strength[:, chain, step], severity)
        mixture += weights[:, chain, None, None, None] * changed
    return kept * values + (1 - kept) * mixture


def _operated(values: Tensor, which: Tensor, uniform: Tensor, severity: float) -> Tensor:
    """Each image changed by the operation of its number, or left as it is at -1. `which` and `uniform` lie on the host: nothing waits."""
    level = between(uniform[:, 0], 0.1, severity) / 10
    signed = torch.where(uniform[:, 1] < 0.5, -level, level)
    values = values.clone()
    for number, operation in enumerate(_OPERATIONS):
        rows = (which == number).nonzero()[:, 0]
        if len(rows):
            strengths = (level if operation in (_solarize, _posterize) else signed)[rows].to(values)
            there = rows.to(values.device)
            values[there] = operation(values[there], strengths)
    return values


def _warped(values: Tensor, rows: Sequence[Sequence[Tensor | float]], like: Tensor) -> Tensor:
    """Sampled through an affine map that is given in half heights and widths; what comes in from outside is black."""
    theta = torch.stack([torch.stack([torch.as_tensor(e, device=like.device).to(like).expand_as(like) for e in r], 1) for r in rows], 1)
    return grid_sample(values, affine_grid(theta, list(values.shape), align_corners=False), align_corners=False)


def _rotate(values: Tensor, strength: Tensor) -> Tensor:
    angle, ratio = strength * (30 * math.pi / 180), values.shape[-2] / values.shape[-1]
    return _warped(values, [[angle.cos(), -angle.sin() * ratio, 0.0], [angle.sin() / ratio, angle.cos(), 0.0]], angle)


def _shear_x(values: Tensor, strength: Tensor) -> Tensor:
    return _warped(values, [[1.0, strength * 0.3 * values.shape[-2] / values.shape[-1], 0.0], [0.0, 1.0, 0.0]], strength)


def _shear_y(values: Tensor, strength: Tensor) -> Tensor:
    return _warped(values, [[1.0, 0.0, 0.0], [strength * 0.3 * values.shape[-1] / values.shape[-2], 1.0, 0.0]], strength)


def _translate_x(values: Tensor, strength: Tensor) -> Tensor:
    return _warped(values, [[1.0, 0.0, strength * 2 / 3], [0.0, 1.0, 0.0]], strength)


def _translate_y(values: Tensor, strength: Tensor) -> Tensor:
    return _warped(values, [[1.0, 0.0, 0.0], [0.0, 1.0, strength * 2 / 3]], strength)


def _autocontrast(values: Tensor, strength: Tensor) -> Tensor:
    low, high = values.amin(dim=(2, 3), keepdim=True), values.amax(dim=(2, 3), keepdim=True)
    reach = high - low
    return torch.where(reach > 0, (values - low) / torch.where(reach > 0, reach, 1), values)


def _equalize(values: Tensor, strength: Tensor) -> Tensor:
    """Levels of each channel so that all are about equally frequent, as Pillow computes them."""
    levels = (values.nan_to_num().clamp(0, 1) * 255).round().long().flatten(2)  # (batch, channels, pixels)
    counts = torch.zeros(*levels.shape[:2], 256, device=values.device, dtype=torch.int64).scatter_add_(2, levels, torch.ones_like(levels))
    highest = (counts > 0).long().mul(torch.arange(256, device=values.device)).amax(dim=2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, highest)) // 255
    table = ((counts.cumsum(dim=2) - counts + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where((step > 0)[..., None], (table.gather(2, levels) / 255).view_as(values), values)


def _posterize(values: Tensor, strength: Tensor) -> Tensor:
    kept = 2 ** (4 + (strength * 4).floor())[:, None, None, None]  # a mask of so few levels
    return ((values.clamp(0, 1) * 255).round() / kept).floor() * kept / 255


def _solarize(values: Tensor, strength: Tensor) -> Tensor:
    return torch.where(values >= 1 - strength[:, None, None, None], 1 - values, values)


_OPERATIONS = (_autocontrast, _equalize, _posterize, _rotate, _solarize, _shear_x, _shear_y, _translate_x, _translate_y)
_ANY = Modality("image")  # a crop asks nothing of it
