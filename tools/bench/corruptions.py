"""Batched corruptions against their usual form, one image after the other in NumPy, SciPy and Pillow: ratios and differences.

    OMP_NUM_THREADS=1 python tools/bench/corruptions.py [--quick] [--severity 3]

Each row: time per image of the reference over that of the batch (how many times faster), and the absolute difference of the
two mean images, averaged over pixels, in units of 1/255. The deterministic ones get the same images. The random ones are
compared twice: with each side's own random numbers, where the two mean images of so few images differ by the luck of the draw,
and, except shot noise, with the numbers that the batch drew given to the reference. The last rows are sums over the 15, with
and without glass blur (in the reference a loop over pixels).

The reference follows the published code of ImageNet-C and CIFAR-10-C with SciPy and Pillow in the place of OpenCV,
scikit-image and ImageMagick; in each place the form that is fast there was taken (Fourier transforms for large kernels, shifted
slices for streaks). It is for images of at least 32 pixels.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage, signal

from streamcl.corruptions import IMAGE, IMAGE_CORRUPTIONS, corrupt

Array = np.ndarray
Rng = np.random.Generator


class Reference(NamedTuple):
    """One image (height, width, 3) of floats in [0, 1] with a severity's parameters and the numbers drawn for it."""

    apply: Callable[..., Array]
    draw: Callable[[Array, Any, Rng], tuple[Any, ...]] = lambda image, level, rng: ()


def truncated(values: Array) -> Array:
    """Through 8 bits, as the published code casts."""
    return np.uint8(np.clip(values, 0, 1) * 255) / 255.0


def clipped_zoom(image: Array, factor: float) -> Array:
    height, width = image.shape[:2]
    tall, wide = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - tall) // 2, (width - wide) // 2
    large = ndimage.zoom(image[top : top + tall, left : left + wide], (factor, factor, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]


def streak(image: Array, radius: int, sigma: float, degrees: float) -> Array:
    taps = 2 * radius + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2.0 * sigma**2))
    weights /= weights.sum()
    height, width = image.shape[:2]
    around = np.pad(image, ((taps, taps), (taps, taps), (0, 0)), mode="edge")
    out = np.zeros_like(image)
    for i, weight in enumerate(weights):
        right = taps + math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        down = taps + math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        out += weight * around[down : down + height, right : right + width]
    return out


def defocus_blur(image: Array, level: Any) -> Array:
    radius, smooth = level
    reach, side = (8, 1) if radius <= 8 else (radius, 2)
    x, y = np.meshgrid(np.arange(-reach, reach + 1), np.arange(-reach, reach + 1))
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-side, side + 1) ** 2) / (2 * smooth**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, taps / taps.sum(), axis=axis, mode="mirror")
    disk /= disk.sum()
    if radius < 3:
        small = disk[reach - 3 : reach + 4, reach - 3 : reach + 4]
        return np.stack([ndimage.correlate(image[..., c], small, mode="mirror") for c in range(3)], axis=-1)
    around = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return np.stack([signal.fftconvolve(around[..., c], disk, mode="valid") for c in range(3)], axis=-1)


def glass_blur(image: Array, level: Any, shifts: Array) -> Array:
    sigma, farthest, iterations = level
    pixels, shifts = truncated(ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest")), shifts.astype(int)
    height, width = image.shape[:2]
    for i in range(iterations):
        for h in range(height - farthest, farthest, -1):
            for w in range(width - farthest, farthest, -1):
                pixels[h, w] = pixels[h + shifts[i, 0, h, w], w + shifts[i, 1, h, w]]
    return ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")


def draw_glass(image: Array, level: Any, rng: Rng) -> tuple[Any, ...]:
    return (rng.integers(-level[1], level[1], size=(level[2], 2, *image.shape[:2])),)


def zoom_blur(image: Array, factors: Any) -> Array:
    return (image + sum(clipped_zoom(image, factor) for factor in factors)) / (len(factors) + 1)


def snow(image: Array, level: Any, flakes: Array, degrees: float) -> Array:
    mean, deviation, zoom, threshold, radius, sigma, blend = level
    layer = clipped_zoom((mean + deviation * flakes.reshape(image.shape[:2]))[..., None], zoom)
    layer = truncated(np.where(layer < threshold, 0, layer))
    layer = truncated(streak(layer, radius, sigma, degrees))
    gray = image @ np.array([0.299, 0.587, 0.114])
    return blend * image + (1 - blend) * np.maximum(image, gray[..., None] * 1.5 + 0.5) + layer + np.rot90(layer, k=2)


def frost(image: Array, level: Any, noise: Array) -> Array:
    """The engine's own texture, for the published pictures cannot be given on."""
    height, width = image.shape[:2]
    waves = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    fields = []
    for plane, spectrum in zip(noise, ((1 + waves) ** -2.0, (4 + waves) ** -2.2), strict=True):
        spectrum[0, 0] = 0
        field = np.fft.irfft2(np.fft.rfft2(plane) * spectrum, s=(height, width))
        fields.append(field / field.std(ddof=1))
    texture = 0.35 + 0.15 * fields[0] + 0.45 * np.maximum(0, 1 - np.abs(fields[1]) / 1.5) ** 2
    return level[0] * image + level[1] * np.clip(texture, 0, 1)[..., None] * np.array([0.86, 0.94, 1.0])


def plasma(wobbles: Array, decay: float) -> Array:
    side = len(wobbles)
    heights, step, wobble = np.zeros((side, side)), side, 100.0
    while step >= 2:
        half = step // 2
        near = np.arange(0, side, step)
        middle = near + half
        # the four corners of every square, then the two ends and the two sides of every edge
        corners = sum(heights[np.ix_((near + a) % side, (near + b) % side)] for a in (0, step) for b in (0, step))
        heights[np.ix_(middle, middle)] = corners / 4 + wobble**2 * wobbles[np.ix_(middle, middle)]
        for rows, columns in ((near, middle), (middle, near)):
            around = sum(
                heights[np.ix_((rows + a) % side, (columns + b) % side)] for a, b in ((-half, 0), (half, 0), (0, -half), (0, half))
            )
            heights[np.ix_(rows, columns)] = around / 4 + wobble**2 * wobbles[np.ix_(rows, columns)]
        step, wobble = half, wobble / decay
    heights -= heights.min()
    return heights / heights.max()


def fog(image: Array, level: Any, wobbles: Array) -> Array:
    layer = level[0] * plasma(wobbles, level[1])[: image.shape[0], : image.shape[1], None]
    return (image + layer) * image.max() / (image.max() + level[0])


def draw_fog(image: Array, level: Any, rng: Rng) -> tuple[Any, ...]:
    side = 2 ** math.ceil(math.log2(max(image.shape[:2])))
    return (rng.uniform(-1, 1, (side, side)),)


def brightness(image: Array, more: float) -> Array:
    hsv = rgb_to_hsv(image)
    hsv[..., 2] = np.clip(hsv[..., 2] + more, 0, 1)
    return hsv_to_rgb(hsv)


def contrast(image: Array, factor: float) -> Array:
    means = image.mean(axis=(0, 1), keepdims=True)
    return (image - means) * factor + means


def elastic_transform(image: Array, level: Any, corners: Array, field: Array) -> Array:
    height, width = image.shape[:2]
    strength, smoothness, shift = (share * min(height, width) for share in level)
    middle, reach = np.array([width // 2, height // 2]), min(height, width) // 3
    before = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + shift * corners
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)  # where a moved point was
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    was = np.stack([x, y, np.ones_like(x)], axis=-1) @ back
    warped = [ndimage.map_coordinates(image[..., c], [was[..., 1], was[..., 0]], order=1, mode="mirror") for c in range(3)]
    right, down = (
        strength * (ndimage.gaussian_filter(part, smoothness, mode="reflect", truncate=3) if smoothness else part) for part in field
    )
    return np.stack([ndimage.map_coordinates(plane, [y + down, x + right], order=1, mode="reflect") for plane in warped], axis=-1)


def pixelate(image: Array, factor: float) -> Array:
    height, width = image.shape[:2]
    picture = Image.fromarray(np.uint8(np.rint(image * 255)))
    small = picture.resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)) / 255.0


def jpeg_compression(image: Array, quality: int) -> Array:
    file = io.BytesIO()
    Image.fromarray(np.uint8(np.rint(image * 255))).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)) / 255.0


def impulse_noise(image: Array, amount: float, chance: Array) -> Array:
    chance = chance.transpose(1, 2, 0)
    return np.where(chance < amount / 2, 1.0, np.where(chance > 1 - amount / 2, 0.0, image))


def channels_first(image: Array) -> tuple[int, int, int]:
    return (image.shape[2], *image.shape[:2])


REFERENCE: dict[str, Reference] = {
    "gaussian_noise": Reference(
        lambda image, deviation, noise: image + deviation * noise.transpose(1, 2, 0),
        lambda image, level, rng: (rng.standard_normal(channels_first(image)),),
    ),
    "shot_noise": Reference(
        lambda image, rate, counts: counts.transpose(1, 2, 0) / rate,
        lambda image, rate, rng: (rng.poisson(image.transpose(2, 0, 1) * rate),),
    ),
    "impulse_noise": Reference(impulse_noise, lambda image, level, rng: (rng.random(channels_first(image)),)),
    "defocus_blur": Reference(defocus_blur),
    "glass_blur": Reference(glass_blur, draw_glass),
    "motion_blur": Reference(
        lambda image, level, degrees: streak(image, *level, float(degrees)), lambda image, level, rng: (rng.uniform(-45, 45),)
    ),
    "zoom_blur": Reference(zoom_blur),
    "snow": Reference(snow, lambda image, level, rng: (rng.standard_normal(image.shape[:2]), rng.uniform(-135, -45))),
    "frost": Reference(frost, lambda image, level, rng: (rng.standard_normal((2, *image.shape[:2])),)),
    "fog": Reference(fog, draw_fog),
    "brightness": Reference(brightness),
    "contrast": Reference(contrast),
    "elastic_transform": Reference(
        elastic_transform, lambda image, level, rng: (rng.uniform(-1, 1, (3, 2)), rng.uniform(-1, 1, (2, *image.shape[:2])))
    ),
    "pixelate": Reference(pixelate),
    "jpeg_compression": Reference(jpeg_compression),
}


def pictures(count: int, side: int) -> torch.Tensor:
    """Like photographs in how their contrast falls with the frequency; of 256 levels."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    waves = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)) * side
    planes = torch.fft.irfft2(torch.fft.rfft2(noise + noise.mean(dim=1, keepdim=True) * 2) / (1 + waves), s=(side, side))
    planes = planes / planes.std(dim=(1, 2, 3), keepdim=True)
    return (planes * 0.2 + 0.5).clamp(0, 1).mul(255).round().div(255)


def images_of(batch: torch.Tensor) -> list[Array]:
    return list(batch.permute(0, 2, 3, 1).double().numpy())


def referred(name: str, batch: torch.Tensor, severity: int, table: Any, rng: Rng) -> Array:
    """The reference over a batch, with numbers of its own  # (batch, height, width, 3)"""
    kind, level = REFERENCE[name], IMAGE[name].levels[table][severity - 1]
    return np.stack([np.clip(kind.apply(image, level, *kind.draw(image, level, rng)), 0, 1) for image in images_of(batch)])


def referred_alike(name: str, batch: torch.Tensor, severity: int, table: Any, generator: torch.Generator) -> Array:
    """The reference over a batch, with the numbers that the engine draws from this generator."""
    kind, level = REFERENCE[name], IMAGE[name].levels[table][severity - 1]
    drawn = [numbers.numpy() for numbers in IMAGE[name].draw(batch, level, generator)]
    shown = images_of(batch)
    return np.stack([np.clip(kind.apply(shown[i], level, *(numbers[i] for numbers in drawn)), 0, 1) for i in range(len(shown))])


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The shortest of the repeats, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def apart(ours: torch.Tensor, theirs: Array) -> float:
    """The mean over pixels of the absolute difference of the two mean images, in units of 1/255."""
    return float(np.abs(ours.double().mean(dim=0).permute(1, 2, 0).numpy() - theirs.mean(axis=0)).mean() * 255)


def rows(table: Any, side: int, count: int, few: int, severity: int) -> list[tuple[str, float, float, float | None, float]]:
    """For each corruption: name, seconds per image of the reference, of the batch, the differences with like and with own numbers."""
    batch = pictures(count, side)
    out = []
    for name in IMAGE_CORRUPTIONS:

        def ours(name: str = name, batch: torch.Tensor = batch) -> torch.Tensor:
            return corrupt(name, batch, severity, torch.Generator().manual_seed(1), table=table)

        theirs: list[Array] = []
        shown = few if name == "glass_blur" else min(count, 4 * few)

        def reference(name: str = name, shown: int = shown, theirs: list[Array] = theirs) -> None:
            theirs.append(referred(name, batch[:shown], severity, table, np.random.default_rng(1)))

        slow, fast = seconds(reference, 1 if name == "glass_blur" else 3) / shown, seconds(ours, 3) / count
        mine = corrupt(name, batch[:few], severity, torch.Generator().manual_seed(2), table=table)
        alike: float | None = None
        if name != "shot_noise":
            alike = apart(mine, referred_alike(name, batch[:few], severity, table, torch.Generator().manual_seed(2)))
        out.append((name, slow, fast, alike, apart(ours()[:shown], theirs[-1])))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--severity", type=int, default=3, choices=range(1, 6))
    options = parser.parse_args()
    print(f"threads: torch {torch.get_num_threads()}; severity {options.severity}")
    for table, side, count, few in (("cifar", 32, 256, 16), ("imagenet", 224, 32, 2)):
        count, few = (count // 4, max(1, few // 4)) if options.quick else (count, few)
        print(f"\n{table}, {count} images of 3 x {side} x {side}")
        print(f"{'':20} {'reference':>12} {'batched':>12} {'ratio':>8} {'apart, same draws':>18} {'own draws':>10}   (apart in 1/255)")
        measured = rows(table, side, count, few, options.severity)
        for name, slow, fast, alike, own in measured:
            same = "" if alike is None else f"{alike:.4f}"
            print(f"{name:20} {1e3 * slow:9.3f} ms {1e3 * fast:9.3f} ms {slow / fast:8.1f} {same:>18} {own:10.3f}")
        for what, chosen in (("the 15", measured), ("without glass_blur", [row for row in measured if row[0] != "glass_blur"])):
            slow, fast = (sum(row[column] for row in chosen) for column in (1, 2))
            middle = math.exp(sum(math.log(row[1] / row[2]) for row in chosen) / len(chosen))
            bar = "  at least 5" if what == "the 15" else ""
            print(f"{what:20} {1e3 * slow:9.3f} ms {1e3 * fast:9.3f} ms {slow / fast:8.1f}{bar}  (geometric mean {middle:.1f})")


if __name__ == "__main__":
    main()
