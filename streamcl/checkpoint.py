"""The state of a run on disk: safetensors and JSON with checksums, written aside and renamed, no pickle.

A checkpoint is a folder `checkpoints/00000012/` with `state.json` (a tree whose tensors are numbered), `tensors.safetensors`, and
`manifest.json` with the SHA-256 of both. It appears whole or not at all. The newest `keep` are kept; when one is damaged, the
one before it is used, and the damaged one is removed as soon as a newer whole one is written.

The memory, which can be large and changes little, lies beside them in parts (`parts.py`): written once, in two places, and named by the
manifest of every checkpoint that holds them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcl.errors import RunError
from streamcl.parts import Part, Parts
from streamcl.writing import FORMAT, disk_error, sha256

IN_PARTS = ("memory",)  # what of a state lies in parts
BLOCK = 4 << 20  # bytes of a tensor that are one part
SMALL = 64 << 10  # tensors of up to so many bytes are one part together


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
        if isinstance(value, Part):
            return {"$part": str(value)}
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
        if "$part" in tree:
            return Part(tree["$part"])
        return {key: unflatten(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    return tree


def tree_bytes(tree: Any) -> int:
    """The bytes of all tensors in a tree."""
    return sum(tensor.numel() * tensor.element_size() for tensor in flatten(tree)[1].values())


def fingerprint(state: Mapping[str, Any]) -> str:
    """The SHA-256 of what is discrete in a state: ids, labels, counts, draws. Sums of floats may differ between machines in a last bit."""
    tree, tensors = flatten(state)
    digest = hashlib.sha256(json.dumps(tree).encode())
    for tensor in tensors.values():
        if not tensor.is_floating_point():
            digest.update(_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep, self.parts = folder, keep, Parts(folder)
        self.bytes = 0  # that the last `save` wrote
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
        tree, tensors = flatten({key: value for key, value in state.items() if key not in IN_PARTS})
        tensors = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
        storages: set[int] = set()  # safetensors refuses tensors that share memory
        for name, value in tensors.items():
            storage = value.untyped_storage().data_ptr()
            if storage in storages:
                tensors[name] = value.clone()
            storages.add(storage)
        before = self.parts.written
        named = {key: self._put(state[key]) for key in IN_PARTS if key in state}
        tree |= {key: {"$index": index} for key, (index, _) in named.items()}
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(tensors, aside / "tensors.safetensors")
            (aside / "state.json").write_text(json.dumps(tree, allow_nan=False), encoding="utf-8")
            manifest = {
                "format": FORMAT,
                "sha256": {name: sha256(aside / name) for name in ("tensors.safetensors", "state.json")},
                "parts": sorted({name for _, names in named.values() for name in names}),
            }
            (aside / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            for name in ("tensors.safetensors", "state.json", "manifest.json"):
                _sync(aside / name)
            self.parts.sync()
            self.bytes = self.parts.written - before + sum(file.stat().st_size for file in aside.iterdir())
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
        self.parts.keep({name for number in self.numbers() for name in _parts_of(self.path(number))})
        return target

    def _put(self, state: Any) -> tuple[Part, set[str]]:
        """A state in parts: the name of its index, and the names of all of them."""
        tree, tensors = flatten(state)
        small, index = bytearray(), {}
        names = set(_named(tree))
        for key, tensor in tensors.items():
            values = tensor.detach().cpu().contiguous()
            content = _bytes(values)
            about: dict[str, Any] = {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape)}
            if content.nbytes <= SMALL:
                about["at"] = len(small)
                small += content
            else:
                about["blocks"] = [self.parts.put(content[at : at + BLOCK]) for at in range(0, content.nbytes, BLOCK)]
                names.update(about["blocks"])
            index[key] = about
        rest = self.parts.put(bytes(small))
        name = self.parts.put(json.dumps({"tree": tree, "tensors": index, "small": rest}, allow_nan=False).encode())
        return name, names | {rest, name}

    def _get(self, name: str) -> Any:
        """The reverse of `_put`."""
        index = json.loads(self.parts.read(name))
        small = self.parts.read(index["small"])
        tensors = {}
        for key, about in index["tensors"].items():
            dtype = getattr(torch, about["dtype"])
            values = torch.empty(about["shape"], dtype=dtype)
            size = values.numel() * values.element_size()
            if size:
                room = _bytes(values)
                if "at" in about:
                    room[:] = small[about["at"] : about["at"] + size]
                at = 0
                for block in about.get("blocks", ()):
                    content = self.parts.read(block)
                    room[at : at + len(content)] = content
                    at += len(content)
            tensors[key] = values
        return unflatten(index["tree"], tensors)

    def open(self, number: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """One checkpoint, which is whole."""
        path = self.path(number)
        tree = json.loads((path / "state.json").read_text(encoding="utf-8"))
        parts = {key: self._get(tree.pop(key)["$index"]) for key in IN_PARTS if key in tree}
        return {**unflatten(tree, load_file(path / "tensors.safetensors", device=str(device))), **parts}

    def load(self, warn: Callable[[str], None], device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The newest whole checkpoint; a damaged one is named to `warn` and the one before it is used. None where there is none."""
        numbers = self.numbers()
        for number in reversed(numbers):
            path = self.path(number)
            trouble = damage(path)
            if trouble is None:
                return self.open(number, device)
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
        parts = Parts(path.parent)
        if lost := next((name for name in manifest["parts"] if parts.find(name) is None), None):
            return f"{parts.path(lost)} and its copy are damaged or missing"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return memoryview(values.reshape(-1).view(torch.uint8).numpy()) if values.numel() else memoryview(b"")  # type: ignore[arg-type]


def _parts_of(path: Path) -> list[str]:
    try:
        return list(json.loads((path / "manifest.json").read_text(encoding="utf-8"))["parts"])
    except (OSError, ValueError, KeyError, TypeError):  # it is damaged: none of its parts can be found by it
        return []


def _named(tree: Any) -> Iterator[str]:
    """The parts that a tree names itself."""
    if isinstance(tree, dict):
        if "$part" in tree:
            yield tree["$part"]
        for value in tree.values():
            yield from _named(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _named(value)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
