"""Where local data lies, and which source reads it: paths are looked up in the current directory, then under STREAMCL_DATA."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from streamcl.errors import ConfigError, DataError

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"})
_SOURCES = {".csv": "csv", ".tsv": "csv", ".jsonl": "csv", ".parquet": "parquet", ".npz": "arrays", ".npy": "arrays"}


def roots() -> list[Path]:
    """The folders that a relative path may start from."""
    given = os.environ.get("STREAMCL_DATA")
    return [Path.cwd()] + ([Path(given).expanduser().absolute()] if given else [])


def cache_folder(purpose: str) -> Path:
    """Where what can be made or fetched again is kept: under STREAMCL_CACHE, or ~/.cache/streamcl."""
    return Path(os.environ.get("STREAMCL_CACHE") or "~/.cache/streamcl").expanduser().absolute() / purpose


def locate(path: str | Path) -> Path:
    """The file or folder, as an absolute path; DataError says where it was looked for and what comes nearest."""
    wanted = Path(path).expanduser()
    places = [root / wanted for root in roots()]  # an absolute path stays itself
    for place in places:
        if place.exists():
            return place
    near = {name for place in places for name in difflib.get_close_matches(place.name, _names(place.parent), n=3)}
    looked = " and ".join(dict.fromkeys(str(place.parent) for place in places))
    hint = f"; there is {', '.join(sorted(near))}" if near else ""
    advice = "" if wanted.is_absolute() or len(places) > 1 else " (STREAMCL_DATA, a second place to look in, is not set)"
    raise DataError(f"there is no {wanted.name!r} in {looked}{hint}{advice}")


def locate_all(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, by name, in the first place where there are any; a plain path is one of them."""
    if not any(sign in pattern for sign in "*?["):
        return [locate(pattern)]
    wanted = Path(pattern).expanduser()
    places = [Path(wanted.anchor)] if wanted.is_absolute() else roots()
    relative = str(wanted.relative_to(wanted.anchor)) if wanted.is_absolute() else str(wanted)
    for place in places:
        found = sorted(match for match in place.glob(relative) if match.is_file())
        if found:
            return found
    raise DataError(f"no file matches {pattern!r} in {' or '.join(str(place) for place in places)}")


def reader_of(place: Path) -> str | None:
    """The source that reads a file or folder, by its ending or by what is inside; None where there is none."""
    return _folder_source(place) if place.is_dir() else _SOURCES.get(place.suffix.lower())


def source_for(path: str | Path) -> dict[str, Any]:
    """The source that reads this file or folder, as the YAML would name it, guessed from the ending and from what is inside."""
    place = locate(path)
    name = reader_of(place)
    if name is None:
        what = (
            "a folder without a sub-folder of images or sounds for each class"
            if place.is_dir()
            else f"{place.suffix or 'a file without an ending'}"
        )
        raise ConfigError(
            f"{place}: no source reads {what}; understood are {', '.join(_SOURCES)}, a folder of Parquet files, a folder saved by "
            "datasets, and a folder with a sub-folder of images or .wav files for each class"
        )
    return {"name": name, "path": str(place)}


def _folder_source(folder: Path) -> str | None:
    if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
        return "huggingface"
    for here, _, names in os.walk(folder):
        endings = {Path(name).suffix.lower() for name in names}
        if ".parquet" in endings:
            return "parquet"
        if Path(here) != folder and endings & (IMAGES | {".wav"}):
            return "folder"
    return None


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
