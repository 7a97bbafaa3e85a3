"""Records from a directory that fills up: lines of .jsonl files, and images and sounds in a folder for each class."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from streamcl.errors import DataError

from .intake import Intake, Lines
from .records import Line, Problem, Reader
from .spool import Place, Spool

KINDS = {".png": "image", ".jpg": "image", ".jpeg": "image", ".bmp": "image", ".webp": "image", ".wav": "audio"}
READ = 1 << 20  # bytes of a .jsonl file that are read at once
INTERVAL = 0.25  # seconds between two looks, at least; a look takes at most a tenth of the time


class Directory(Intake):
    """Looks again and again at what is new. How far each file was read stands in the spool, so nothing is moved or deleted.

    A .jsonl file may grow: a line counts once it ends, or once it reads as a whole object. An image or a sound counts once two looks find
    it unchanged, and is looked at again when it has changed. What begins with a dot is passed over, so a file can be written under such
    a name and then renamed.
    """

    def __init__(self, spool: Spool, reader: Reader, folder: Path, limit: int) -> None:
        super().__init__(spool, reader)
        self.folder, self.limit = folder, limit
        self.watched: dict[str, tuple[int, int]] = {}  # size and time of media files at the last look

    @property
    def where(self) -> str:
        return f"the directory {self.folder}"

    def start(self) -> None:
        if not self.folder.is_dir():
            raise DataError(f"live: directory: {self.folder} is no folder: make it, or name another one")
        super().start()

    def run(self) -> None:
        while not self.stopping:
            begun, last = time.monotonic(), self.finishing
            self.look(last)
            if last or self.spool.closed or self.spool.ended:
                return
            self.pause(max(INTERVAL, 10 * (time.monotonic() - begun)))

    def look(self, last: bool = False) -> None:
        """Take in what is new; with `last` also lines that never ended and files that have just been written."""
        for file, label in self._files():
            if self.stopping or self.spool.closed or self.spool.ended:
                return
            name = os.fsencode(file.relative_to(self.folder)).decode("utf-8", "backslashreplace")
            try:
                if label is None:
                    self._read_lines(file, name, last)
                else:
                    self._read_media(file, name, label, last)
            except FileNotFoundError:  # it was taken away again before it was read
                continue
            except OSError as error:
                raise DataError(f"live: directory: {file} cannot be read: {error.strerror}") from None

    def _files(self) -> Iterator[tuple[Path, str | None]]:
        """Files with records, and files that are one, with the class that their folder names."""
        for entry in _sorted(self.folder):
            if entry.is_dir():
                for inside in _sorted(Path(entry.path)):
                    if Path(inside.name).suffix.lower() in KINDS and inside.is_file():
                        yield Path(inside.path), entry.name
            elif entry.name.endswith(".jsonl"):
                yield Path(entry.path), None

    def _read_lines(self, file: Path, name: str, last: bool) -> None:
        with file.open("rb") as stream:
            status = os.fstat(stream.fileno())
            place = self.spool.places.get(name)
            if place is None or place.inode != status.st_ino or place.offset > status.st_size:  # new, or another one under the old name
                place = Place(name, status.st_ino, 0, 0)
            stream.seek(place.offset)
            lines = Lines(name, self.limit, place.line, place.offset)
            while data := stream.read(READ):
                if not self._take(list(lines.feed(data)), place):
                    return
            if lines.rest and (last or not self.reader.lines([Line(name, 0, lines.rest)], self.folder).problems):
                self._take(list(lines.end()), place, ended=False)

    def _take(self, found: list[Line | Problem], place: Place, ended: bool = True) -> bool:
        """Take these lines in, and with them how far the file was read. A line that has not `ended` may still get its line end."""
        for start in range(0, len(found), self.size):
            part = found[start : start + self.size]
            line = part[-1] if isinstance(part[-1], Line) else part[-1].line
            reached = Place(place.name, place.inode, line.end, line.number if ended else line.number - 1)
            if self.take(part, self.folder, reached) is None:
                return False
        return True

    def _read_media(self, file: Path, name: str, label: str, last: bool) -> None:
        status = file.stat()
        place = self.spool.places.get(name)
        reached = Place(name, status.st_ino, status.st_size, status.st_mtime_ns)  # it has no lines: its time tells whether it is the same
        if place == reached:
            return
        now = (status.st_size, status.st_mtime_ns)
        if self.watched.get(name) != now and not last:
            self.watched[name] = now
            return
        self.watched.pop(name, None)
        parsed = self.reader.media(name, label, KINDS[file.suffix.lower()], file.read_bytes(), name)
        self.keep(parsed, reached)


def _sorted(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
