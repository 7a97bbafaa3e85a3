"""Records on disk, memory-mapped: the inputs and features of exemplars that are larger than the machine's memory.

Records are appended and never changed. They gather in memory and are sealed, some megabytes at a time, into blocks that are parts of the
run's checkpoints (`streamcl/parts.py`): named by their content, in two places, never written twice. A record that was dropped stays in its
block until half of the block is dead; the rest then moves into new blocks. So the disk holds at most about twice what lives, in two
places, beside what the checkpoints that are kept still name.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import RunError
from streamcl.parts import Part, Parts
from streamcl.stream import Batch, Column, join, take

from .columns import Growing, row_size, size

SEALED = 8 << 20  # bytes of a block
SHIFT = 32  # a key is the number of a block, shifted, plus the row within it


class Disk:
    """`append` gives each record a key; `read` finds it by that."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:  # a run without a folder: gone with the process
            self._temporary = tempfile.TemporaryDirectory(prefix="streamcl-")
            folder = Path(self._temporary.name)
        self.parts = Parts(folder)
        self.clear()

    def clear(self) -> None:
        self.blocks: dict[int, dict[str, Any]] = {}  # number -> part, rows, and where each column lies in it
        self.maps: dict[int, np.memmap] = {}
        self.live: dict[int, int] = {}  # records of each block that are held
        self.open: dict[str, Growing] = {}  # the block that is being filled
        self.number, self.rows, self.bytes = 0, 0, 0  # its number, and what is in it

    def store(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Take in what is large of samples: the rest of them, and the key of each."""
        extra = dict(batch.extra)
        columns: dict[tuple[str, str], Column] = {("input", name): column for name, column in batch.inputs.items()}
        if "features" in extra:
            columns["features", ""] = extra.pop("features")
        keys = self.append({f"{kind} {name}": column for (kind, name), column in columns.items()})
        return batch.replace(inputs={}, extra=extra), keys

    def joined(self, batch: Batch, keys: Tensor) -> Batch:
        """The reverse of `store`."""
        columns = self.read(keys)
        inputs = {name.removeprefix("input "): column for name, column in columns.items() if name.startswith("input ")}
        extra = {"features": columns["features "]} if "features " in columns else {}
        return batch.replace(inputs=inputs, extra=batch.extra | extra)

    def append(self, columns: Mapping[str, Column]) -> Tensor:
        """Take in records  # their keys: (records,)"""
        count = len(next(iter(columns.values())))
        keys = torch.arange(self.rows, self.rows + count) + (self.number << SHIFT)
        for name, column in columns.items():
            filling = self.open.setdefault(name, Growing())
            filling.append(column)
            self.bytes += size(column)
        self.rows += count
        self.live[self.number] = self.live.get(self.number, 0) + count
        if self.bytes >= SEALED:
            self._seal()
        return keys

    def _filling(self) -> dict[str, Column]:
        """The records of the block that is being filled."""
        return {name: column.view for name, column in self.open.items()}

    def _seal(self) -> None:
        content, about, at = [], {}, 0
        for name, column in self._filling().items():
            if isinstance(column, Tensor):
                data = column.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                about[name] = {"at": at, "dtype": str(column.dtype).removeprefix("torch."), "shape": list(column.shape[1:])}
            else:
                texts = [str(value).encode(errors="surrogatepass") for value in column]
                ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
                data = ends.tobytes() + b"".join(texts)
                about[name] = {"at": at, "dtype": "text", "shape": []}
            data += b"\0" * (-len(data) % 8)  # every column begins where its numbers may lie
            content.append(data)
            at += len(data)
        self.blocks[self.number] = {"part": self.parts.put(b"".join(content)), "bytes": at, "rows": self.rows, "columns": about}
        self.open, self.rows, self.bytes, self.number = {}, 0, 0, self.number + 1

    def _map(self, number: int) -> np.memmap:
        found = self.maps.get(number)
        if found is None:
            part = self.blocks[number]["part"]
            path = self.parts.find(part)  # its content is checked once, when it is first needed
            if path is None:
                raise RunError(f"{self.parts.path(part)}, a block of exemplars, and its copy are damaged or missing")
            found = self.maps[number] = np.memmap(path, np.uint8, "r")
        return found

    def read(self, keys: Tensor) -> dict[str, Column]:
        """The records of these keys, in their order."""
        if len(keys) == 0:
            return self._none()
        numbers, which = (keys >> SHIFT).unique(return_inverse=True)
        rows = keys & ((1 << SHIFT) - 1)
        places = [(which == i).nonzero().squeeze(1) for i in range(len(numbers))]
        pieces = [self._rows(number, rows[place]) for number, place in zip(numbers.tolist(), places, strict=True)]
        order = torch.cat(places).argsort()
        return {name: take(join([piece[name] for piece in pieces]), order) for name in pieces[0]}

    def _none(self) -> dict[str, Column]:
        """No record, with the columns of all."""
        none = torch.zeros(0, dtype=torch.int64)
        number = next((number for number, live in self.live.items() if live), None)
        return {} if number is None else self._rows(number, none)

    def _rows(self, number: int, rows: Tensor) -> dict[str, Column]:
        if number == self.number:
            return {name: take(column, rows) for name, column in self._filling().items()}
        content, block, index = self._map(number), self.blocks[number], rows.numpy()
        found: dict[str, Column] = {}
        for name, about in block["columns"].items():
            at, count = about["at"], block["rows"]
            if about["dtype"] == "text":
                ends = content[at : at + 8 * (count + 1)].view(np.int64)
                first = at + 8 * (count + 1)
                found[name] = [
                    bytes(content[first + ends[row] : first + ends[row + 1]]).decode(errors="surrogatepass") for row in index.tolist()
                ]
            else:
                dtype = getattr(torch, about["dtype"])
                width = int(np.prod(about["shape"], dtype=np.int64)) * dtype.itemsize
                table = content[at : at + count * width].reshape(count, width)
                found[name] = torch.from_numpy(table[index]).view(-1).view(dtype).reshape(len(index), *about["shape"])
        return found

    def drop(self, keys: Tensor) -> None:
        """These records are no longer held."""
        numbers, counts = (keys >> SHIFT).unique(return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self.live[number] -= count
            if self.live[number] == 0 and number != self.number:
                self._forget(number)

    def _forget(self, number: int) -> None:
        del self.live[number]
        self.parts.release(self.blocks.pop(number)["part"])
        self.maps.pop(number, None)

    def sparse(self) -> list[int]:
        """The blocks of which at least half is dead: time to `move` what lives there."""
        return [number for number, block in self.blocks.items() if 2 * self.live[number] <= block["rows"]]

    def move(self, keys: Tensor, numbers: list[int]) -> Tensor:
        """Write the records of these blocks anew, of all that live (`keys`), and let the blocks go: `keys` as they are then.

        The block that is being filled can be among them: what is dead in it is gone as well.
        """
        mine = torch.isin(keys >> SHIFT, torch.tensor(numbers, dtype=torch.int64)).nonzero().squeeze(1)
        content = self.read(keys[mine]) if len(mine) else {}
        if self.number in numbers:
            self.live.pop(self.number, None)
            self.open, self.rows, self.bytes, self.number = {}, 0, 0, self.number + 1
        for number in numbers:
            if number in self.blocks:
                self._forget(number)
        keys = keys.clone()
        if len(mine):
            keys[mine] = self.append(content)
        return keys

    def sizes(self, keys: Tensor) -> Tensor:
        """The bytes of each record, without reading more than where its texts begin  # (keys,)"""
        sizes = torch.zeros(len(keys), dtype=torch.int64)
        rows = keys & ((1 << SHIFT) - 1)
        for number in (keys >> SHIFT).unique().tolist():
            mine = (keys >> SHIFT == number).nonzero().squeeze(1)
            if number == self.number:
                for column in self._filling().values():
                    each = row_size(column) if isinstance(column, Tensor) else torch.tensor([size([value]) for value in column])[rows[mine]]
                    sizes[mine] += each
                continue
            count = self.blocks[number]["rows"]
            for about in self.blocks[number]["columns"].values():
                if about["dtype"] == "text":
                    at = about["at"]
                    ends = torch.from_numpy(np.array(self._map(number)[at : at + 8 * (count + 1)].view(np.int64)))
                    sizes[mine] += (ends[1:] - ends[:-1])[rows[mine]]
                else:
                    sizes[mine] += int(np.prod(about["shape"], dtype=np.int64)) * getattr(torch, about["dtype"]).itemsize
        return sizes

    def frozen(self) -> Disk:
        """What can be read now, whatever is appended and dropped from now on."""
        still = copy.copy(self)
        still.blocks, still.live = dict(self.blocks), dict(self.live)
        still.maps = {number: self._map(number) for number in self.blocks}  # a mapped file can be read after it was removed
        still.open = {
            name: Growing(column.view.clone() if isinstance(column.view, Tensor) else list(column.view))
            for name, column in self.open.items()
        }
        return still

    def nbytes(self) -> int:
        """The records, those in the open block and those on disk (once, though each lies in two places), dead ones among them."""
        return self.bytes + self.on_disk()

    def on_disk(self) -> int:
        return sum(block["bytes"] for block in self.blocks.values())

    def state(self) -> dict[str, Any]:
        return {"number": self.number, "open": self._filling(), "blocks": [[number, block] for number, block in self.blocks.items()]}

    def restore(self, state: Mapping[str, Any], keys: Tensor) -> None:
        """Put back what `state` returned; `keys` are those of the records that live."""
        self.clear()
        self.number = int(state["number"])
        for number, block in state["blocks"]:
            self.blocks[int(number)] = {**block, "part": Part(block["part"])}
            self.live[int(number)] = 0
        for name, column in state["open"].items():
            self.open[name] = Growing(column if isinstance(column, Tensor) else list(column))
            self.rows, self.bytes = len(column), self.bytes + size(column)
        numbers, counts = (keys >> SHIFT).unique(return_counts=True)
        self.live.update(zip(numbers.tolist(), counts.tolist(), strict=True))
