"""The small files in which published sets list their samples: JSON, JSON lines, CSV and plain lines, read with the line of each record."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamcl.errors import DataError


def within(folder: Path, name: str | Path) -> Path:
    """A file or folder of a set, which must be there."""
    place = folder / name
    if not place.exists():
        raise DataError(f"{folder}: there is no {name} in it, which this set has in its official form")
    return place


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, stripped, with their number from 1."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a comma-separated file with the line in which each begins; a header is a row like any other."""
    reader = csv.reader(_text(file).splitlines(keepends=True), strict=True)
    line = 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {line}: this cannot be read as comma-separated values: {error}") from None


def json_file(file: Path, kind: type = dict) -> Any:
    """What a JSON file holds; `kind` is what its outermost value must be."""
    try:
        value = _parsed(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: this is no JSON: {error}") from None
    if not isinstance(value, kind):
        raise DataError(f"{file}: {'an object' if kind is dict else 'a list'} is expected as the outermost value")
    return value


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The object in each line; None where a line holds none."""
    for number, line in text_lines(file):
        try:
            value = _parsed(line)
        except (ValueError, RecursionError):
            value = None
        yield number, value if isinstance(value, dict) else None


def _parsed(written: str) -> Any:
    value = json.loads(written)
    if "\\ud" in written.lower():  # half of a surrogate pair is no text, though JSON lets it pass
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: this is no text in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{file}: this cannot be read: {error.strerror}") from None
