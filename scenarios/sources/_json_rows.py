"""Objects from JSON files: one in each line (.jsonl), or a list of them (.json), with the words for where each stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamcl.data_files import locate, locate_all
from streamcl.errors import ConfigError, DataError

Row = dict[str, Any]
LINES = (".jsonl", ".ndjson")


def files_at(path: Path, endings: Sequence[str]) -> list[Path]:
    """The files that a path means: itself, those that a glob pattern matches, or those with these endings in a folder."""
    if any(sign in str(path) for sign in "*?["):
        return locate_all(str(path))
    place = locate(path)
    found = sorted(file for file in place.iterdir() if file.suffix.lower() in endings) if place.is_dir() else [place]
    if not found:
        raise DataError(f"{place}: there is no {' or '.join(endings)} file in this folder")
    wrong = next((file for file in found if file.suffix.lower() not in endings), None)
    if wrong is not None:
        raise ConfigError(f"{wrong}: {wrong.suffix or 'a file without an ending'} is not read here; understood are {', '.join(endings)}")
    return found


def read_objects(file: Path) -> tuple[list[Row], list[str]]:
    """The objects of a file, and where each stands."""
    try:
        with file.open(encoding="utf-8-sig") as text:
            if file.suffix.lower() not in LINES:
                return _listed(file, json.load(text))
            rows: list[Row] = []
            places: list[str] = []
            for line, written in enumerate(text, 1):
                if written.strip():
                    rows.append(_object(_parsed(written, f"{file}, line {line}"), f"{file}, line {line}"))
                    places.append(f"{file}, line {line}")
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}: this cannot be read as JSON: {error}") from None
    return _not_empty(file, rows), places


def _listed(file: Path, content: Any) -> tuple[list[Row], list[str]]:
    if not isinstance(content, list):
        raise DataError(f"{file}: a list of objects is needed, and this file holds {_kind(content)}")
    places = [f"{file}, row {row}" for row in range(len(content))]
    return _not_empty(file, [_object(value, place) for value, place in zip(content, places, strict=True)]), places


def _parsed(written: str, where: str) -> Any:
    try:
        return json.loads(written)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this is no JSON: {error}") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: an object is needed, and this is {_kind(value)}")
    return value


def _not_empty(file: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise DataError(f"{file}: there is not a single record in it")
    return rows


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")
