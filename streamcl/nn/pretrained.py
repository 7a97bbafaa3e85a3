"""Weights that come from a name: where they are found, what checkpoints call them, and how they are kept frozen."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, Self

import torch
import yaml
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone
from streamcl.stream import Batch, Modality, StreamInfo, Transform


class Pretrained(Backbone):
    """A backbone whose weights come from a name. While `frozen`, it stays in evaluation mode and its weights in place.

    A subclass fills in `load`, which makes the layers and sets `dim`, `licence` and `origin`, and `encode`.
    """

    licence = "see the model card"

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen

    @abstractmethod
    def load(self, info: StreamInfo) -> None: ...

    @abstractmethod
    def encode(self, batch: Batch) -> Tensor:
        """Features  # (batch, dim)"""

    def build(self, info: StreamInfo) -> None:
        self.load(info)
        if self.frozen:
            self.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def forward(self, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns):
            return self.encode(batch)

    @property
    def learns(self) -> bool:
        """Whether a graph is of use: an adapter inside frozen layers has parameters that learn."""
        return not self.frozen or any(p.requires_grad for p in self.parameters())


def origin(source: str, files: Sequence[Path]) -> dict[str, str]:
    """What checkpoints say of weights that they do not copy. A file of the hub's cache lies in a folder named by its commit."""
    folder = files[0].parent
    return {"source": source, "revision": folder.name if folder.parent.name == "snapshots" else "", "sha256": sha256(files)}


def sha256(files: Sequence[Path]) -> str:
    """The hash of a file; of several (a model in shards), the hash of the list that sha256sum would print."""
    hashes = []
    for file in sorted(files):
        stat = file.stat()
        hashes.append(_sha256(str(file.resolve()), stat.st_mtime_ns, stat.st_size))
    if len(hashes) == 1:
        return hashes[0]
    lines = "".join(f"{value}  {file.name}\n" for value, file in zip(hashes, sorted(files), strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


@lru_cache(maxsize=256)
def _sha256(path: str, changed: int, size: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: Exception) -> str:
    """An error of a library in one line, for a message of ours."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def cached(name: str, files: Sequence[str], revision: str | None = None, network: bool = False) -> Path | None:
    """The folder of the local Hugging Face cache with these files of a repository, None without its weights (the first pattern)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=["*/*"], local_files_only=not network)
        )
    except LocalEntryNotFoundError:
        if network:
            raise
        return None
    return folder if any(folder.glob(files[0])) else None


def fetch(reader: str, name: str, files: Sequence[str], option: str, revision: str | None = None) -> Path:
    """The local folder with these files of a repository on the Hugging Face hub; the first pattern is the weights'.

    The cache is asked first: what is there needs no network, and does not change under a run. `option` is where a person would
    name a local folder instead.
    """
    try:
        folder = cached(name, files, revision) or cached(name, files, revision, network=True)
        problem = f"the repository has no {files[0]}"
    except Exception as error:  # whatever the hub's client raises, the person has the same two ways out
        folder, problem = None, first_line(error)
    if folder is not None:
        return folder
    at = f"{name} at revision {revision}" if revision else name
    raise ConfigError(
        f"backbone {reader}: {at} is not in the local Hugging Face cache and cannot be fetched from the hub ({problem}); "
        f"set {option} to a local folder with its files, or run `hf download {name}` once where there is a network"
    )


def weight_file(reader: str, path: str | Path, preferred: Sequence[str] = ("model.safetensors",)) -> Path:
    """The .safetensors file at `path`: itself, or that of the folder (one of the preferred names, else the only one)."""
    place = Path(path).expanduser()
    if place.is_file() and place.suffix == ".safetensors":
        return place
    found = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    known = [place / name for name in preferred if place / name in found]
    if known or len(found) == 1:
        return (known or found)[0]
    if found:
        raise ConfigError(f"backbone {reader}: {path} holds {', '.join(f.name for f in found)}: name the file that is meant")
    what = "holds no .safetensors file" if place.is_dir() else "is no .safetensors file" if place.exists() else "does not exist"
    raise ConfigError(f"backbone {reader}: {path} {what}; a .safetensors file, or a folder with one, is expected")


def licence_of(folder: Path, name: str) -> str:
    """What the model card in a model's folder says."""
    card = folder / "README.md"
    header = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL) if card.is_file() else None
    try:
        fields = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        fields = None
    licence = fields.get("license") if isinstance(fields, dict) else None
    return str(licence) if licence else f"see the model card of {name}"


def colour(modality: Modality, reader: str) -> bool:
    """Whether the images have three channels already; a model of three channels reads images of one or three."""
    channels = modality.shape[0] if len(modality.shape) == 3 else 0
    if channels not in (1, 3):
        raise ConfigError(
            f"backbone {reader}: it reads images (channels, height, width) of 1 or 3 channels, and the stream's are {modality.shape}"
        )
    return channels == 3


def vision_transforms(
    size: tuple[int, int],
    resize: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    coloured: bool,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
) -> dict[str, list[Transform]]:
    """What pre-trained vision models expect: resized and cropped in the middle, or a random box and a flip; then normalised.

    Images of one channel are repeated in three here, and nowhere else.
    """
    from streamcl.transforms.center_crop import CenterCrop
    from streamcl.transforms.flip import Flip
    from streamcl.transforms.normalize import Normalize
    from streamcl.transforms.random_resized_crop import RandomResizedCrop
    from streamcl.transforms.resize import Resize
    from streamcl.transforms.to_rgb import ToRgb

    filter_: Literal["bilinear", "bicubic"] = "bilinear" if interpolation == "bilinear" else "bicubic"
    rgb: list[Transform] = [] if coloured else [ToRgb()]
    normalize = Normalize(mean=list(mean), std=list(std))
    box = RandomResizedCrop(size=size, scale=scale, interpolation=filter_)
    return {
        "train": [*rgb, box, *([Flip()] if flip else []), normalize],
        "test": [*rgb, Resize(size=resize, interpolation=filter_), CenterCrop(size=size), normalize],
    }
