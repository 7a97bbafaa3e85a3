"""torchvision's classification sets by their names there: `torchvision:CIFAR100`, `torchvision:Food101`, `torchvision:FakeData`.

They are downloaded by torchvision once, into `root` (by default `torchvision` under STREAMCL_DATA, or under the cache folder,
STREAMCL_CACHE or ~/.cache/streamcl), or read from there with `download: false`. Sets that torchvision holds in memory are taken whole, as
uint8; the images of the others are decoded when they are read and need `size` where they differ. A set without a test part gives
`test_fraction`. Each set has its own licence, which its page in torchvision's documentation names.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from streamcl.data_files import cache_folder, roots
from streamcl.errors import ConfigError, DataError
from streamcl.options import Fraction, NonNegativeInt, PositiveInt
from streamcl.plugins import near_name
from streamcl.stream import SourceData

from ._media import Encoded
from ._records import Place, Records, RecordSource

_PARTS = {  # where the two parts are not called train and test
    "CLEVRClassification": ("train", "val"),
    "FGVCAircraft": ("trainval", "test"),
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
    "Places365": ("train-standard", "val"),
}


class Torchvision(RecordSource):
    """`options` are further arguments of the set's class: `{split: balanced}` for EMNIST, `{annotation_level: family}` for FGVCAircraft."""

    licence = "the set's own"
    class_count: ClassVar = {"MNIST": 10, "FashionMNIST": 10, "KMNIST": 10, "SVHN": 10, "CIFAR10": 10, "CIFAR100": 100, "Food101": 101}

    def __init__(
        self,
        *,
        set: str,
        root: Path | None = None,
        download: bool = True,
        options: dict[str, Any] | None = None,
        size: PositiveInt | None = None,
        decode: Literal["eager", "lazy", "auto"] = "auto",
        workers: NonNegativeInt = 2,
        test_fraction: Fraction = 0.2,
        split_seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(test_fraction=test_fraction, split_seed=split_seed, size=size, decode=decode, workers=workers)
        self.set, self.root, self.download, self.options = set, root, download, options or {}

    def files(self) -> list[str]:
        return [] if self.set == "FakeData" else [str(self._root())]

    def load(self) -> SourceData:
        from torchvision import datasets

        kinds = {name: kind for name in datasets.__all__ if inspect.isclass(kind := getattr(datasets, name))}
        if self.set not in kinds:
            raise ConfigError(f"torchvision has no set {self.set!r}{near_name(self.set, kinds)}")
        taken = inspect.signature(kinds[self.set].__init__).parameters
        if "train" in taken or self.set in ("EMNIST", "QMNIST"):
            parts: list[dict[str, Any]] = [{"train": True}, {"train": False}]
        elif "split" in taken and "split" not in self.options:
            parts = [{"split": part} for part in _PARTS.get(self.set, ("train", "test"))]
        else:
            parts = [{}]
        opened = [self._open(kinds[self.set], taken, part) for part in parts]
        targets = [_targets(part, self.set) for part in opened]
        names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in getattr(opened[0], "classes", ())]
        used = np.unique(np.concatenate(targets))  # some sets list a class that no sample has
        class_names = [names[number] if used[-1] < len(names) else str(number) for number in used.tolist()]
        train, *test = (
            self._records(part, np.searchsorted(used, numbers), name)
            for part, numbers, name in zip(opened, targets, ("training part", "test part"), strict=False)
        )
        return self.assemble(train, test[0] if test else None, class_names)

    def _root(self) -> Path:
        if self.root is not None:
            return Path(self.root).expanduser().absolute()
        under_data = [place / "torchvision" for place in roots()[1:]]
        return next((place for place in under_data if place.is_dir()), cache_folder("torchvision"))

    def _open(self, kind: Any, taken: Any, part: dict[str, Any]) -> Any:
        arguments = {**part, **self.options}
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
        if "root" in taken:
            arguments["root"] = str(self._root())
        if "download" in taken or (passes_on and self.set != "ImageNet"):
            arguments["download"] = self.download
        try:
            if "root" in arguments:
                Path(arguments["root"]).mkdir(parents=True, exist_ok=True)
            return kind(**arguments)
        except TypeError as error:
            raise ConfigError(f"torchvision's {self.set} refuses its options {self.options}: {error}") from None
        except Exception as error:  # a refused download, a missing file and a wrong value are of many types there
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"torchvision's {self.set} could not be had ({arguments.get('root', 'in memory')}): {reason}") from None

    def _records(self, part: Any, targets: np.ndarray, name: str) -> Records:
        import pyarrow as pa

        where = Place([f"torchvision's {self.set}, {name}"], [len(targets)])
        images = _pixels(part, len(targets))
        if images is None or (self.size is not None and images.shape[2:] != (self.size, self.size)):
            return Records({"image": Encoded("image", _Items(part), where, np.arange(len(targets)))}, pa.array(targets), where)
        return Records({"image": images}, pa.array(targets), where)


class _Items:
    """Fetches images through torchvision's own reading."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, row: int) -> Any:
        return self.part[row][0]


def _pixels(part: Any, count: int) -> torch.Tensor | None:
    """What torchvision holds in memory as uint8, channels first  # (images, channels, height, width)"""
    data = getattr(part, "data", None)
    if not isinstance(data, (np.ndarray, torch.Tensor)) or len(data) != count:
        return None
    pixels = torch.as_tensor(data)
    if pixels.dtype != torch.uint8 or pixels.dim() not in (3, 4):
        return None
    if pixels.dim() == 3:
        return pixels.unsqueeze(1)
    return pixels.permute(0, 3, 1, 2).contiguous() if pixels.shape[3] == 3 else pixels


def _targets(part: Any, name: str) -> np.ndarray:
    """The class of every sample, without decoding images where the set keeps its labels in one of the usual places."""
    found: Any = next(
        (v for n in ("targets", "labels", "_labels", "y") if (v := getattr(part, n, None)) is not None and len(v) == len(part)), None
    )
    if found is None or np.asarray(found).ndim != 1:
        pairs = next((v for n in ("samples", "_samples") if (v := getattr(part, n, None)) is not None and len(v) == len(part)), None)
        found = [pair[1] for pair in pairs] if pairs is not None else [part[row][1] for row in range(len(part))]
    targets = np.asarray(found)
    if targets.ndim != 1 or targets.dtype.kind not in "iu" or not len(targets) or targets.min() < 0:
        raise ConfigError(f"torchvision's {name} is no classification set with one class per image")
    return targets.astype(np.int64)
