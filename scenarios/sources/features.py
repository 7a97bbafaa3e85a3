"""Any source passed once through a frozen backbone: the features are the data, and they are kept on disk.

Methods on top of a frozen network (prototypes, analytic classifiers) then train in seconds. The backbone's own test preprocessing and
the scale of whole numbers are applied as in a run. Features are cached as safetensors in `cache` (by default `features` under
STREAMCL_CACHE, or ~/.cache/streamcl) under the hash of everything that they depend on: the options of both plug-ins, the files of the data
and of local weights (path, size, time of change) and the versions of streamcl and torch; weights from a hub are taken to be what their
name says. A backbone without trained weights is initialised from a fixed seed.

The licence is that of the data behind it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcl.data import ArrayDataset, check_finite
from streamcl.data_files import cache_folder
from streamcl.nn.backbone import Backbone
from streamcl.options import PositiveInt
from streamcl.preparing import Preparation
from streamcl.stream import Dataset, Modality, Source, SourceData, StreamInfo


class Features(Source):
    """`data` is the source behind it, `backbone` what it goes through, `batch` samples at a time."""

    def __init__(self, *, data: Source, backbone: Backbone, batch: PositiveInt = 256, cache: Path | None = None) -> None:
        self.data, self.backbone, self.batch, self.cache = data, backbone, batch, cache
        self.described = [_described(data), _described(backbone)]  # as given: a backbone that was built holds more than its options

    def files(self) -> list[str]:
        return self.data.files()

    def load(self) -> SourceData:
        folder = cache_folder("features") if self.cache is None else Path(self.cache).expanduser().absolute()
        file = folder / f"{self.key()}.safetensors"
        cached = _read(file)
        if cached is None:
            cached = self._extract()
            _write(file, *cached)
        tensors, about = cached
        parts = [
            ArrayDataset({"vector": tensors[f"{part}.features"]}, tensors[f"{part}.targets"], tensors[f"{part}.ids"])
            for part in ("train", "test")
            if f"{part}.features" in tensors
        ]
        modality = Modality("vector", tuple(tensors["train.features"].shape[1:]))
        return SourceData(parts[0], parts[1] if len(parts) > 1 else None, modalities={"vector": modality}, **about)

    def key(self) -> str:
        """The hash of everything that the features depend on."""
        depends = {
            "plugins": self.described,
            "files": [_stamp(Path(file)) for file in sorted(self.data.files())],
            "versions": [version("streamcl"), torch.__version__],
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]

    def _extract(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        data = self.data.load()
        info = StreamInfo(
            data.modalities, target=data.target, licence=data.licence, classes=len(data.class_names), class_names=tuple(data.class_names)
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.random.fork_rng():  # whether the cache was there must not change the run's randomness
            torch.manual_seed(0)
            self.backbone.build(info)
            model = self.backbone.to(device).eval()
            prepare = Preparation(info, self.backbone.transforms())
            tensors: dict[str, Tensor] = {}
            for part, dataset in (("train", data.train), ("test", data.test)):
                if dataset is not None:
                    features = self._pass(model, prepare, dataset, device)
                    check_finite({"the features": features}, f"the {part} part through {type(model).__name__}")
                    tensors |= {f"{part}.features": features, f"{part}.targets": dataset.targets, f"{part}.ids": dataset.ids}
        model.cpu()
        about = {"class_names": data.class_names, "target": data.target, "licence": data.licence, "problems": data.problems}
        return tensors, about

    @torch.no_grad()
    def _pass(self, model: Backbone, prepare: Preparation, dataset: Dataset, device: torch.device) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        found = [model(prepare(batch.to(device), train=False, generator=generator)).float().cpu() for batch in dataset.batches(self.batch)]
        return torch.cat(found) if found else torch.empty(0, model.dim)


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The cached features; None where there are none, or where the file was damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as held:
            return {name: held.get_tensor(name) for name in held.keys()}, json.loads(held.metadata()["about"])  # noqa: SIM118
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def _write(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write aside and rename: a reader never sees half a file. A cache that cannot be written costs time, not the run."""
    from safetensors.torch import save_file

    aside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata={"about": json.dumps(about)})
        aside.replace(file)
    except Exception as error:  # safetensors has errors of its own for a full disk
        aside.unlink(missing_ok=True)
        warnings.warn(f"the features could not be cached in {file.parent} and will be made again next time: {error}")


def _described(value: Any) -> Any:
    """A plug-in as its class and its options, as JSON; what only a built module has (layers, weights) is no part of it."""
    match value:
        case str() if value.endswith(".safetensors") or os.sep in value:
            place = Path(value).expanduser()
            return [value, *(_stamp(place) if place.exists() else [])]
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_described(item) for item in value]
        case Mapping():
            return {str(name): _described(item) for name, item in value.items()}
        case Path():
            return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    own = {name: item for name, item in vars(value).items() if not name.startswith("_") and name != "training"}
    return [f"{type(value).__module__}.{type(value).__qualname__}", _described(own)]


def _stamp(place: Path) -> list[Any]:
    """What tells whether a file, or anything in a folder, has changed."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [[str(file), status.st_size, status.st_mtime_ns] for file in files for status in (file.stat(),)]
