"""What text-to-image models, their judges and the report do with pictures alike: values from 0 to 1, whole batches at once."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamcl.stream import Batch
from streamcl.writing import write_atomically

SHOWN = 8  # pictures of a concept in a report


def resized(pictures: Tensor, size: int, channels: int = 0) -> Tensor:
    """Pictures of this size; their one channel is repeated where more are wanted."""
    if pictures.shape[-2:] != (size, size):
        pictures = interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False, antialias=pictures.shape[-1] > size)
    return pictures.expand(-1, channels, -1, -1) if channels > pictures.shape[1] else pictures


def side_by_side(left: Tensor, right: Tensor, background: float = 0.0) -> Tensor:
    """Pictures of the same size that show two at once, each at half its size  # (batch, channels, size, size)"""
    size = left.shape[-1]
    half, top = size // 2, size // 4
    canvas = torch.full_like(left, background)
    canvas[:, :, top : top + half, :half] = resized(left, half)
    canvas[:, :, top : top + half, half : 2 * half] = resized(right, half)
    return canvas


def noise_of(ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that follow from each sample's id alone, whatever else is in the batch  # (batch, *shape[1:])"""
    count = math.prod(shape[1:])
    places = torch.arange(2 * count, device=ids.device)
    bits = _mixed(_mixed(ids)[:, None] + places)
    even = ((bits >> 11) & ((1 << 53) - 1)).double().add(0.5) / (1 << 53)  # (batch, 2 x count), from 0 to 1 without both
    radius = (-2 * even[:, :count].log()).sqrt()
    return (radius * (2 * math.pi * even[:, count:]).cos()).float().view(len(ids), *shape[1:])


class Sheet(NamedTuple):
    """A PNG of a gallery, taken apart: each row as a PNG of its own in a data URI, and how many pictures it shows."""

    after: int  # the number of the task, from 1
    rows: dict[str, tuple[str, int]]


def read_sheets(run: Path) -> list[Sheet]:
    """The pictures that were painted in a run, task by task; one that cannot be read is left out."""
    from PIL import Image, UnidentifiedImageError

    sheets = []
    for file in sorted((run / "pictures").glob("after-*.png")):
        try:
            with Image.open(file) as image:
                image.load()
                lines = str(getattr(image, "text", {}).get("rows", "")).splitlines()
                height, width, rows = image.height // max(1, len(lines)), image.width // SHOWN, {}
                for place, line in enumerate(lines):
                    count, _, name = line.partition("\t")
                    content = io.BytesIO()
                    image.crop((0, place * height, int(count) * width, (place + 1) * height)).save(content, format="png")
                    rows[name] = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}", int(count)
                sheets.append(Sheet(int(file.stem.rpartition("-")[2]), rows))
        except (OSError, ValueError, UnidentifiedImageError):
            continue
    return sheets


def _mixed(numbers: Tensor) -> Tensor:
    """Sebastiano Vigna's splitmix64: neighbouring numbers become unrelated ones. The products wrap around, as they are meant to."""
    numbers = numbers + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift & (1 << (64 - shift)) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


class Gallery:
    """The first few pictures that were painted of each concept after a task, as one PNG in the run's folder: a row for each concept, or
    for each two that a prompt names. The names of the rows stand in a text of the PNG, so that a report needs nothing else.
    """

    def __init__(self, run: Path) -> None:
        self.folder = run / "pictures"
        self.names: Mapping[int, str] = {}
        self.rows: dict[tuple[int, ...], list[Tensor]] = {}  # by the classes that a prompt names

    def open(self, names: Mapping[int, str]) -> None:
        """What is added from now on was painted after one task; `names` are those of the classes."""
        self.names, self.rows = names, {}

    def add(self, batch: Batch, pictures: Tensor) -> None:
        named = batch.extra.get("named")
        if not isinstance(named, Tensor):
            return
        kinds, which = named.unique(dim=0, return_inverse=True)
        for kind, labels in enumerate((kinds == 1).tolist()):
            kept = self.rows.setdefault(tuple(label for label, there in enumerate(labels) if there), [])
            first = (which == kind).nonzero().squeeze(1)[: SHOWN - len(kept)]
            kept += list(pictures[first.to(pictures.device)].detach().float().cpu())

    def close(self, after: int) -> None:
        """Write what was painted after task `after`."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        several = sorted(self.rows, key=lambda labels: (len(labels), labels))  # those of one concept first
        rows = {" + ".join(self.names.get(label, str(label)) for label in labels): self.rows[labels] for labels in several}
        if not rows:
            return
        blank = torch.ones_like(next(iter(rows.values()))[0])
        lines = [torch.cat([*kept, *[blank] * (SHOWN - len(kept))], dim=2) for kept in rows.values()]
        values = (torch.cat(lines, dim=1).clamp(0, 1) * 255).round().to(torch.uint8)  # (channels, rows x height, SHOWN x width)
        image = Image.fromarray(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).numpy())
        about: Any = PngInfo()
        about.add_itxt("rows", "\n".join(f"{len(kept)}\t{name}" for name, kept in rows.items()))
        content = io.BytesIO()
        image.save(content, format="png", pnginfo=about)
        self.folder.mkdir(exist_ok=True)
        write_atomically(self.folder / f"after-{after + 1:04d}.png", content.getvalue())
        self.rows = {}
