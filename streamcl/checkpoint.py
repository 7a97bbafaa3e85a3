"""The state of a run on disk: safetensors and JSON with checksums, written aside and renamed, no pickle.

A checkpoint is a folder `checkpoints/00000012/` with `state.json` (a tree whose tensors are numbered), `tensors.safetensors`, and
`manifest.json` with the SHA-256 of both. It appears whole or not at all. The newest `keep` are kept; when one is damaged, the
one before it is used, and the damaged one is removed as soon as a newer whole one is written.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcl.errors import RunError
from streamcl.writing import FORMAT, disk_error, sha256


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree of dicts, lists, JSON values and tensors as plain JSON, and the tensors by the numbers that stand in their places."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))  # a path would not do: "a/b" may be one key or two, and 1 is not "1"
            tensors[name] = value
            return {"$tensor": name}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, f"{path}/{key}") for key, item in value.items()}
            return {"$items": [[walk(key, path), walk(item, f"{path}/{key}")] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"$tuple": [walk(item, f"{path}/{i}") for i, item in enumerate(value)]}
        if isinstance(value, list):
            return [walk(item, f"{path}/{i}") for i, item in enumerate(value)]
        if isinstance(value, float) and value != value:
            return {"$float": "nan"}
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return {"$float": str(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"the state at {path or 'its root'} holds a {type(value).__name__}: only tensors and JSON values can be saved")

    return walk(tree, ""), tensors


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `flatten`."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return tensors[tree["$tensor"]]
        if "$items" in tree:
            return {unflatten(key, tensors): unflatten(item, tensors) for key, item in tree["$items"]}
        if "$tuple" in tree:
            return tuple(unflatten(item, tensors) for item in tree["$tuple"])
        if "$float" in tree:
            return float(tree["$float"])
        return {key: unflatten(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    return tree


def tree_bytes(tree: Any) -> int:
    """The bytes of all tensors in a tree."""
    return sum(tensor.numel() * tensor.element_size() for tensor in flatten(tree)[1].values())


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.damaged: set[int] = set()  # those that `load` could not use

    def numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdigit())

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def save(self, state: Mapping[str, Any]) -> Path:
        """Write the next checkpoint, then forget the damaged and the oldest beyond `keep`."""
        numbers = self.numbers()
        target = self.path(numbers[-1] + 1 if numbers else 1)
        aside = self.folder / f".{target.name}.writing"
        tree, tensors = flatten(state)
        tensors = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
        storages: set[int] = set()  # safetensors refuses tensors that share memory
        for name, value in tensors.items():
            storage = value.untyped_storage().data_ptr()
            if storage in storages:
                tensors[name] = value.clone()
            storages.add(storage)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(tensors, aside / "tensors.safetensors")
            (aside / "state.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
            manifest = {"format": FORMAT, "sha256": {name: sha256(aside / name) for name in ("tensors.safetensors", "state.json")}}
            (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            for name in ("tensors.safetensors", "state.json", "manifest.json"):
                _sync(aside / name)
            aside.rename(target)
            _sync(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise disk_error(error, target) from error
        except Exception as error:
            shutil.rmtree(aside, ignore_errors=True)
            if type(error).__name__ == "SafetensorError":  # its way of passing an OSError on
                number = errno.ENOSPC if "os error 28" in str(error) or "No space left" in str(error) else errno.EIO
                raise disk_error(OSError(number, str(error)), target) from error
            raise
        whole = [number for number in self.numbers() if number not in self.damaged]
        for number in {*self.damaged, *whole[: -self.keep]}:
            shutil.rmtree(self.path(number), ignore_errors=True)
        self.damaged.clear()
        return target

    def load(self, warn: Callable[[str], None], device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest whole checkpoint; a damaged one is named to `warn` and the one before it is used. None where there is none."""
        numbers = self.numbers()
        for number in reversed(numbers):
            path = self.path(number)
            trouble = damage(path)
            if trouble is None:
                tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
                return unflatten(tree, load_file(path / "tensors.safetensors", device=str(device)))
            self.damaged.add(number)
            warn(f"checkpoint {path} is damaged ({trouble}); the one before it is used")
        if numbers:
            raise RunError(f"every checkpoint in {self.folder} is damaged; start the run again in another folder")
        return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] > FORMAT:
            raise RunError(
                f"{path} was written by a newer streamcl (format {manifest['format']}, this one reads {FORMAT}): upgrade streamcl"
            )
        for name, expected in manifest["sha256"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if sha256(path / name) != expected:
                return f"{name} does not have its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
