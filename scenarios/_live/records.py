"""From a line of JSON to a record of the stream: what it must hold, and why one does not fit."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from streamcl.errors import ConfigError, DataError
from streamcl.stream import Modality

from ..sources._media import Encoded

FIELDS = ("features", "text", "image", "audio")  # of a record -> one modality each
END = "end"  # {"end": true} ends the stream
WORDS = 200  # characters of a wrong value that a reason quotes

# What lines that are put aside are counted by.
NO_JSON, NO_ID, NO_LABEL = "line that is not a JSON object", "record without a usable id", "record without a usable label"
EMPTY, WRONG, UNWATCHED = "record without any data", "record with unusable data", "record without the number that is watched"
UNLIKE, LONG = "record that does not fit the stream", "line that is too long"
CHANGED = "known id with other content"
AGAIN = "known id, offered again"  # counted beside them, and not put aside: nothing is lost with it

Shapes = dict[str, list[int]]  # field -> [length], [] for text, [3, height, width], or [samples, samples per second]


class Unfit(Exception):
    """Why a line is put aside: the kind by which it is counted, and the reason in full."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(slots=True)
class Line:
    """A line as it came: where from (lines count from 1), its bytes, and where in its file it ends."""

    source: str
    number: int
    content: bytes
    end: int = 0


@dataclass(slots=True)
class Record:
    """One sample as it is kept: `values` holds float32 or encoded bytes, and text as such. `watched` is the number a detector looks at."""

    id: str
    label: str
    values: dict[str, bytes | str]
    shapes: Shapes
    watched: float | None
    line: Line


@dataclass(slots=True)
class Problem:
    """A line that was put aside, and why."""

    line: Line
    kind: str
    reason: str


@dataclass(slots=True)
class Parsed:
    """What some lines hold. After an end record nothing more is read."""

    records: list[Record] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    ended: bool = False


class Reader:
    """Reads lines as records of the declared fields (all that occur, where none are declared). `watch` is what a detector looks at.

    `files` allows an image or a sound to be named by its path; without it, as over a network, it must be there itself.
    """

    def __init__(self, declared: Mapping[str, Any] | None, watch: str | None) -> None:
        self.declared, self.watch = declared_shapes(declared), watch
        self.side = None if declared is None or "image" not in declared else int(declared["image"])
        self.seconds = None if declared is None or "audio" not in declared else float(declared["audio"]["seconds"])

    def lines(self, lines: Iterable[Line], folder: Path | None) -> Parsed:
        """What lines hold; paths in them start from `folder`, and are refused where that is None."""
        parsed = Parsed()
        for line in lines:
            if not line.content.strip():
                continue
            try:
                content = _object(line.content)
                if content.get(END) is True and "label" not in content:
                    parsed.ended = True
                    break
                parsed.records.append(self._record(content, line, folder))
            except Unfit as why:
                parsed.problems.append(Problem(line, why.kind, str(why)))
        return parsed

    def media(self, own_id: str, label: str, kind: str, data: bytes, source: str) -> Parsed:
        """What a file holds that is the sample itself."""
        line = Line(source, 1, b"")
        try:
            shape, mean = self._decoded(kind, data)
            watched = self._watched({}, {kind: mean})
            return Parsed([Record(_text(own_id, "id"), _text(label, "label"), {kind: data}, {kind: shape}, watched, line)])
        except Unfit as why:
            return Parsed(problems=[Problem(line, why.kind, str(why))])

    def _record(self, content: Mapping[str, Any], line: Line, folder: Path | None) -> Record:
        own_id, label = _word(content, "id"), _word(content, "label")
        fields = [name for name in FIELDS if content.get(name) is not None]
        if not fields:
            raise Unfit(EMPTY, f"it holds none of {', '.join(FIELDS)}")
        values: dict[str, bytes | str] = {}
        shapes: Shapes = {}
        means: dict[str, float] = {}
        for name in fields:
            if name == "features":
                numbers = _features(content[name])
                values[name], shapes[name], means[name] = numbers.tobytes(), [len(numbers)], float(numbers.mean(dtype=np.float64))
            elif name == "text":
                values[name], shapes[name] = _text(content[name], name), []
            else:
                data = _bytes(content[name], name, folder)
                values[name], (shapes[name], means[name]) = data, self._decoded(name, data)
        return Record(own_id, label, values, shapes, self._watched(content, means), line)

    def _decoded(self, kind: str, data: bytes) -> tuple[list[int], float]:
        column = encoded(kind, [data], self.side, self.seconds)
        try:
            sample = column.one(0)
        except DataError as error:
            raise Unfit(WRONG, str(error)) from None
        if not sample.size:
            raise Unfit(WRONG, f"{kind}: it is empty")
        shape = [int(n) for n in sample.shape] + ([column.rate] if kind == "audio" else [])
        return shape, float(sample.mean(dtype=np.float64))

    def _watched(self, content: Mapping[str, Any], means: Mapping[str, float]) -> float | None:
        if self.watch is None or self.watch == "label_entropy":
            return None
        if self.watch == "features":
            if not means:
                raise Unfit(
                    UNWATCHED, "the mean of the features is watched and it holds no numbers: watch a field of its own (watch: NAME)"
                )
            return next(iter(means.values()))
        value = content.get(self.watch)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise Unfit(UNWATCHED, f"{self.watch!r} is watched and is {_short(value)} here: a number is needed")
        return float(value)


def encoded(kind: str, data: list[bytes], side: int | None, seconds: float | None) -> Encoded:
    """Images or sounds that lie in memory, decoded as the sources decode theirs."""
    column = Encoded(kind, data.__getitem__, lambda row: kind, np.arange(len(data)))
    column.size, column.seconds = side, seconds
    return column


def declared_shapes(declared: Mapping[str, Any] | None) -> Shapes | None:
    """The shapes that the option `fields` declares; ConfigError where they are none."""
    if declared is None:
        return None
    shapes: Shapes = {}
    for name in sorted(declared, key=lambda name: FIELDS.index(name) if name in FIELDS else -1):
        value = declared[name]
        if name == "features" and _whole(value):
            shapes[name] = [value]
        elif name == "text" and value is True:
            shapes[name] = []
        elif name == "image" and _whole(value):
            shapes[name] = [3, value, value]
        elif name == "audio" and isinstance(value, Mapping) and value.keys() == {"seconds", "rate"} and _whole(value["rate"]):
            if isinstance(value["seconds"], bool) or not isinstance(value["seconds"], int | float) or not value["seconds"] > 0:
                raise ConfigError(f"live: fields.audio.seconds is {_short(value['seconds'])}: a number above 0 is needed")
            shapes[name] = [round(value["seconds"] * value["rate"]), value["rate"]]
        else:
            right = "features: 64 (how many numbers), text: true, image: 32 (pixels a side), audio: {seconds: 1.0, rate: 16000}"
            raise ConfigError(f"live: fields.{name} is {_short(value)}: what can be declared is {right}")
    if not shapes:
        raise ConfigError(f"live: fields declares nothing: name one of {', '.join(FIELDS)}, or leave it out and let the first record say")
    return shapes


def modalities(shapes: Shapes) -> dict[str, Modality]:
    """What the stream consists of, as StreamInfo tells it."""
    found = {}
    for name in (name for name in FIELDS if name in shapes):
        if name == "text":
            found[name] = Modality("text")
        elif name == "features":
            found["vector"] = Modality("vector", tuple(shapes[name]))
        elif name == "image":
            found[name] = Modality("image", tuple(shapes[name]), high=255)
        else:
            found[name] = Modality("audio", (shapes[name][0],))
    return found


def told(shapes: Shapes) -> str:
    """Shapes in words, for a reason."""
    words = {
        "features": lambda s: f"{s[0]} features",
        "text": lambda s: "text",
        "image": lambda s: f"an image of {s[2]} x {s[1]}",
        "audio": lambda s: f"a sound of {s[0]} samples at {s[1]} per second",
    }
    return " and ".join(words[name](shapes[name]) for name in FIELDS if name in shapes)


def _object(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Unfit(NO_JSON, f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise Unfit(NO_JSON, "it is nested too deeply") from None
    except ValueError as error:
        raise Unfit(NO_JSON, f"it is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise Unfit(NO_JSON, "a record is an object, {...} on one line, and this is " + _short(content))
    return content


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _word(content: Mapping[str, Any], name: str) -> str:
    """An id or a label: a word or a whole number, which are the same where they read the same."""
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        what = "it has no" if value is None or value == "" else f"{_short(value)} is no"
        raise Unfit(NO_ID if name == "id" else NO_LABEL, f"{what} {name}: a word or a whole number is needed")
    return _text(str(value), name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unfit(WRONG, f"{name} is {_short(value)}: words are needed")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unfit(WRONG, f"{name} holds half of a character (a lone surrogate)") from None
    if "\0" in value:
        raise Unfit(WRONG, f"{name} holds a zero character")
    return value


def _features(value: Any) -> np.ndarray:
    if not isinstance(value, list) or not value or any(type(number) not in (int, float) for number in value):
        raise Unfit(WRONG, f"features is {_short(value)}: a list of numbers is needed")
    try:
        with np.errstate(over="ignore"):
            numbers = np.asarray(value, dtype=np.float64).astype(np.float32)
    except OverflowError:
        raise Unfit(WRONG, "features holds a number beyond what float32 can hold") from None
    if not np.isfinite(numbers).all():
        raise Unfit(WRONG, "features holds a number beyond what float32 can hold")
    return numbers


def _bytes(value: Any, name: str, folder: Path | None) -> bytes:
    """An image or a sound: base64 (a data: URL as well), or a file's path where these are allowed."""
    text = _text(value, name)
    if not text.startswith("data:") and folder is not None and len(text) < 4096:
        try:
            if (folder / text).is_file():
                return (folder / text).read_bytes()
        except OSError as error:
            raise Unfit(WRONG, f"{name}: {_short(text)} cannot be read: {error.strerror}") from None
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        neither = "neither a file that is there nor base64" if folder is not None else "not base64 (a path is not read over HTTP)"
        raise Unfit(WRONG, f"{name}: {_short(text)} is {neither}") from None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: Any) -> str:
    if value is None:
        return "missing"
    try:
        shown = json.dumps(value)
    except ValueError:  # a number of thousands of digits
        shown = "a very long number"
    return shown if len(shown) <= WORDS else f"{shown[:WORDS]}..."
