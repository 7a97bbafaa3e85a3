"""Pieces of state that never change, each named by the SHA-256 of its content and lying in two places.

What did not change has its name already and is not written again; a piece that is damaged in one place is found by its name and mended
from the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from streamcl.errors import DiskError, RunError
from streamcl.writing import disk_error

PLACES = ("parts", "copies")


class Part(str):
    """The name of a part, in a state: what it names is kept as long as a checkpoint with that state is."""


class Parts:
    """The parts under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written = 0  # bytes, by this object
        self._whole: set[str] = set()  # those that this object has written, or whose content it has checked, in both places

    def path(self, name: str, place: str = PLACES[0]) -> Path:
        return self.folder / place / name

    def put(self, content: bytes | memoryview) -> Part:
        """Write it in both places, each whole or not at all, where it does not lie already."""
        name = Part(hashlib.sha256(content).hexdigest())
        size = content.nbytes if isinstance(content, memoryview) else len(content)
        for place in PLACES:
            path = self.path(name, place)
            if not (path.is_file() if name in self._whole else _sum(path) == name):  # what lies there may be damaged
                self._write(path, content)
                self.written += size
        self._whole.add(name)
        return name

    def release(self, name: str) -> None:
        """This part is not needed here any more; it goes when no checkpoint names it."""
        self._whole.discard(name)

    def _write(self, path: Path, content: bytes | memoryview) -> None:
        aside = path.with_name(f".{path.name}.{os.getpid()}.writing")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise disk_error(error, path) from error

    def find(self, name: str) -> Path | None:
        """A place where the part lies whole, its content checked; the other place is mended where it does not. None: it is lost."""
        bad = [place for place in PLACES if _sum(self.path(name, place)) != name]
        good = next((self.path(name, place) for place in PLACES if place not in bad), None)
        for place in bad if good and os.access(self.folder, os.W_OK) else ():
            with contextlib.suppress(DiskError):  # a full disk: what was to be read is there all the same
                self._write(self.path(name, place), good.read_bytes())  # type: ignore[union-attr]
        return good

    def read(self, name: str) -> bytes:
        """The content of a part: of its first place, or of the other where that one is damaged."""
        try:
            content = self.path(name).read_bytes()
        except OSError:
            content = b""
        if hashlib.sha256(content).hexdigest() == name:
            return content
        place = self.find(name)
        if place is None:
            raise RunError(f"{self.path(name)} and its copy are damaged or missing")
        return place.read_bytes()

    def sync(self) -> None:
        """What was written is there also after a power cut."""
        for place in PLACES:
            if (self.folder / place).is_dir():
                descriptor = os.open(self.folder / place, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def keep(self, names: Iterable[str]) -> None:
        """Remove every other part, and what a killed process left half-written."""
        kept = set(names)
        self._whole &= kept
        for place in PLACES:
            if (self.folder / place).is_dir():
                for entry in os.scandir(self.folder / place):
                    if entry.name not in kept:
                        Path(entry.path).unlink()


def _sum(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
