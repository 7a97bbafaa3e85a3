"""From the body of a request to a checked batch: JSON, raw NumPy, or a form with images and sounds. What does not fit is one sentence.

Nothing that a body claims is believed before it is measured: an array's header must fit its bytes, a picture must have the model's size
before it is decoded, and pickled objects are refused unread.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import warnings
import wave
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from streamcl.errors import DataError
from streamcl.learned import Learned
from streamcl.stream import Batch, Modality

ENCODED = ("npy", "images", "wav")  # how JSON holds values that are not lists of numbers or text
NUMPY = ("application/x-npy", "application/x-npz", "application/octet-stream")
JSON = "application/json"
FORM = "multipart/form-data"
DEPTH = 6  # brackets inside each other that an array of samples may need: samples of video have five


class Refused(Exception):
    """A request that is answered with this status and one sentence, and changes nothing."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.why, self.headers = status, why, dict(headers or {})


@dataclass
class Uploaded:
    """One part of a form: the name of its field, its file's name where it is a file, and its bytes."""

    field: str
    filename: str | None
    content: bytes


@dataclass
class Body:
    """What a request held: inputs by modality, which of them are present, and what else was beside them."""

    inputs: dict[str, Any] = field(default_factory=dict)
    present: dict[str, list[bool]] | None = None
    other: dict[str, Any] = field(default_factory=dict)  # labels, for deliveries


class Decoder:
    """Reads bodies for one model. `most` samples may come in one."""

    def __init__(self, learned: Learned, most: int) -> None:
        self.learned, self.info, self.most = learned, learned.info, most
        self.modalities: Mapping[str, Modality] = {
            name: modality for name, modality in learned.info.modalities.items() if not learned.info.asks or name in learned.info.asks
        }

    def json(self, content: bytes, labels: bool = False) -> Body:
        """`{"inputs": ...}`: a mapping of modalities, or the values of the one that there is."""
        body = json_object(content, ("inputs", "present", "labels") if labels else ("inputs", "present"))
        if "inputs" not in body:
            raise Refused(422, 'the body holds no inputs: give {"inputs": ...}')
        given = body.pop("inputs")
        encoded = isinstance(given, dict) and len(given) == 1 and next(iter(given)) in ENCODED
        if not isinstance(given, dict) or (encoded and not given.keys() <= self.modalities.keys()):
            given = {self._only(): given}
        present = body.pop("present", None)
        return Body({name: self._values(name, value) for name, value in given.items()}, self._present(present), body)

    def numpy(self, content: bytes) -> Body:
        """An .npy file of the one modality, or an .npz file of several by their names."""
        if content[:2] == b"PK":
            return Body(dict(unzipped(content, self._bytes())))
        return Body({self._only(): array_of(content, "the body")})

    def form(self, parts: Sequence[Uploaded], labels: bool = False) -> Body:
        """Files and texts, each under the name of its modality; several of one name are several samples."""
        body = Body()
        values: dict[str, list[Any]] = {}
        for part in parts:
            modality = self.modalities.get(part.field)
            if modality is None and part.field != "present" and not (labels and part.field == "labels"):
                raise self._unknown(part.field)
            if modality is None:
                body.other.setdefault(part.field, []).append(_utf8(part.content, part.field))
            elif part.content[:6] == b"\x93NUMPY":
                if part.field in body.inputs:
                    raise Refused(422, f"{part.field} came twice as an array: put its samples into one")
                body.inputs[part.field] = array_of(part.content, part.field)
            elif modality.kind == "text":
                values.setdefault(part.field, []).append(_utf8(part.content, part.field))
            else:
                values.setdefault(part.field, []).append(self._medium(part.field, modality, part.content))
        for name, several in values.items():
            if name in body.inputs:
                raise Refused(422, f"{name} came as an array and as single samples: choose one")
            body.inputs[name] = several if self.modalities[name].kind == "text" else np.stack(several)
        if "present" in body.other:
            body.present = self._present(json_object(body.other.pop("present")[0].encode()))
        return body

    def batch(self, body: Body) -> Batch:
        """The checked batch of a body."""
        inputs = body.inputs
        missing = [name for name in self.modalities if name not in inputs]
        if missing and inputs:
            raise Refused(422, f"{missing[0]} is missing: this model takes {' and '.join(self.modalities)} with every sample")
        for name, values in inputs.items():
            if hasattr(values, "__len__") and len(values) > self.most:
                raise Refused(413, f"{name} has {len(values)} samples, and at most {self.most} are taken at once: send less at a time")
        try:
            inputs = {name: self._typed(name, values) for name, values in inputs.items()}
            if not body.present and (plain := self._plain(inputs)) is not None:
                return plain
            if not body.present:
                batch = self.learned.batch(inputs)
            else:
                batch = self.learned.batch(inputs, present={name: torch.tensor(mask) for name, mask in body.present.items()})
        except DataError as error:
            raise Refused(422, str(error)) from None
        if len(batch) == 0:
            raise Refused(422, "the batch is empty: give at least one sample")
        return batch

    def _typed(self, name: str, values: Any) -> Any:
        """Arrays in the type of their modality."""
        modality = self.modalities.get(name)
        if modality is None or not isinstance(values, np.ndarray):
            return values
        if (values.dtype.kind == "U") != (modality.kind == "text"):
            raise Refused(422, f"{name} must be {'text' if modality.kind == 'text' else 'numbers'}, and is an array of {values.dtype}")
        return values if modality.kind == "text" else whole_or_decimal(values, modality, name)

    def _plain(self, inputs: Mapping[str, Any]) -> Batch | None:
        """Arrays that are just as the model has them, checked here: many small operations of torch, each of which lets other threads in,
        would take longer than the model itself where it is small. None where something is to be looked at, or told."""
        if inputs.keys() != self.modalities.keys():
            return None
        size = len(next(iter(inputs.values())))
        for name, modality in self.modalities.items():
            values = inputs[name]
            if not isinstance(values, np.ndarray) or values.dtype.kind == "U" or values.shape != (size, *modality.shape) or not size:
                return None
            if modality.high is None and not np.isfinite(values).all():
                return None
        columns: dict[str, Any] = {name: torch.from_numpy(inputs[name]) for name in self.modalities}
        return Batch(columns, None, torch.from_numpy(np.arange(size)))

    # -- single values ----------------------------------------------------------------------------------------------------------

    def _only(self) -> str:
        if len(self.modalities) != 1:
            raise Refused(422, f"this model takes {' and '.join(self.modalities)}: give a mapping of them")
        return next(iter(self.modalities))

    def _unknown(self, name: str) -> Refused:
        return Refused(422, f"there is no modality {name[:80]!r}: this model takes {' and '.join(self.modalities)}")

    def _bytes(self) -> int:
        """What the largest batch takes when it is unpacked, twice over: integers may come as 64 bits."""
        return 2 * 8 * self.most * sum(math.prod(modality.shape) or 1 for modality in self.modalities.values()) + (1 << 16)

    def _present(self, given: Any) -> dict[str, list[bool]] | None:
        if given is None:
            return None
        if not isinstance(given, dict) or not all(
            isinstance(mask, list) and all(isinstance(one, bool) for one in mask) for mask in given.values()
        ):
            raise Refused(422, 'present says of each modality which samples have it: {"image": [true, false]}')
        for name in given:
            if name not in self.modalities:
                raise Refused(422, f"present names {name!r}, and this model takes {' and '.join(self.modalities)}")
        return given

    def _values(self, name: str, value: Any) -> Any:
        """The values of one modality as JSON holds them, for all samples."""
        modality = self.modalities.get(name)
        if modality is None:
            raise self._unknown(name)
        if isinstance(value, dict):
            if len(value) != 1 or next(iter(value)) not in ENCODED:
                raise Refused(422, f"{name} must be a list, or hold one of {', '.join(ENCODED)}")
            ((form, content),) = value.items()
            if form == "npy":
                return array_of(unbased(content, name), name)
            if (form == "images") != (modality.kind == "image") or (form == "wav") != (modality.kind == "audio"):
                raise Refused(422, f"{name} is {modality.kind}, and {form} was given")
            if not isinstance(content, list) or not content:
                raise Refused(422, f"{name}: {form} must be a list of base64, one for each sample")
            if len(content) > self.most:
                raise Refused(413, f"{name} has {len(content)} samples, and at most {self.most} are taken at once: send less at a time")
            return np.stack([self._medium(name, modality, unbased(one, name)) for one in content])
        if modality.kind == "text":
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise Refused(422, f"{name} must be a list of text, one for each sample")
            return value
        return numbers(value, name)

    def _medium(self, name: str, modality: Modality, content: bytes) -> np.ndarray:
        if modality.kind == "image":
            return image(content, modality, name)
        if modality.kind == "audio":
            return sound(content, modality, name)
        raise Refused(422, f"{name} is {modality.kind}: send it as numbers, or as an .npy file")


def nowhere(constant: str) -> Any:
    raise Refused(422, f"the body holds {constant}: numbers must be finite")


DECODER = json.JSONDecoder(parse_constant=nowhere)


def json_object(content: bytes, known: Sequence[str] | None = None) -> dict[str, Any]:
    """A body that is one JSON object, and holds nothing but what is `known`."""
    try:
        found = DECODER.decode(content.decode(json.detect_encoding(content), "surrogatepass"))
    except (ValueError, RecursionError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"the body is no JSON: {what}") from None
    if not isinstance(found, dict):
        raise Refused(422, 'the body must be a JSON object such as {"inputs": ...}')
    strange = next((name for name in found if known is not None and name not in known), None)
    if strange is not None:
        why = ": the server numbers samples, and tells the ids in its answer" if strange == "ids" else ""
        what = ", ".join(known or ()) or "nothing"
        raise Refused(422, f"the body holds {strange[:80]!r}, and only {what} may be in it{why}")
    return found


def numbers(value: Any, name: str) -> np.ndarray:
    """Nested lists of numbers as an array."""
    if not isinstance(value, list):
        raise Refused(422, f"{name} must be a list, with one entry for each sample")
    deepest = value
    for _ in range(DEPTH):
        if not isinstance(deepest, list) or not deepest:
            break
        deepest = deepest[0]
    if isinstance(deepest, (list, dict, str)) and deepest:
        raise Refused(422, f"{name} must be lists of numbers")
    try:
        array = np.array(value)
    except ValueError:
        raise Refused(422, f"the lists of {name} are of different lengths") from None
    except (OverflowError, RecursionError):
        raise Refused(422, f"{name} holds numbers that are too large") from None
    if array.size == 0:
        raise Refused(422, "the batch is empty: give at least one sample")
    if array.dtype.kind not in "iuf":
        raise Refused(422, f"{name} must be lists of numbers, and holds something else")
    return array


def whole_or_decimal(array: np.ndarray, modality: Modality, name: str) -> np.ndarray:
    """An array of numbers in the type of the stream: uint8 or int64 where it has whole numbers, float32 elsewhere."""
    if array.dtype.kind not in "iuf":
        raise Refused(422, f"{name} must be numbers, and is an array of {array.dtype}")
    if modality.high is None:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype.kind == "f":
        raise Refused(422, f"{name} must be whole numbers from 0 to {modality.high:g}, and holds decimal ones")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch has no operations on wider unsigned numbers
        array = np.minimum(array, np.iinfo(np.int64).max).astype(np.int64)
    if array.size and (array.min() < 0 or array.max() > modality.high):
        raise Refused(422, f"{name} must be whole numbers from 0 to {modality.high:g}, and holds {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype=np.uint8 if modality.high <= 255 else np.int64)


def array_of(content: bytes, name: str) -> np.ndarray:
    """An .npy file, whose header must fit its bytes."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version[0]]
        shape, fortran, dtype = read(stream)
    except Exception:  # a broken header raises nearly anything
        raise Refused(422, f"{name} is no .npy file that can be read") from None
    if dtype.kind not in "iufU":
        raise Refused(422, f"{name} is an array of {dtype}: numbers or text are needed")
    wanted, there = dtype.itemsize * math.prod(shape), len(content) - stream.tell()
    if wanted != there or any(length < 0 for length in shape) or not shape:
        raise Refused(
            422, f"{name}: its header says {' x '.join(map(str, shape)) or 'one number'} of {dtype}, and its {there} bytes are not that"
        )
    if wanted == 0:
        raise Refused(422, "the batch is empty: give at least one sample")
    flat = np.frombuffer(content, dtype=dtype, offset=stream.tell())
    array = flat.reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")


def unzipped(content: bytes, most: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, which may take `most` bytes unpacked."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > 64 or sum(entry.file_size for entry in entries) > most:
                raise Refused(413, f"the .npz file unpacks to more than {most} bytes: send less at a time")
            found = {}
            for entry in entries:
                with archive.open(entry) as file:
                    found[entry.filename.removesuffix(".npy")] = array_of(file.read(entry.file_size + 1), entry.filename)
            return found
    except Refused:
        raise
    except Exception:  # a damaged zip raises errors of many kinds
        raise Refused(422, "the body is no .npz file that can be read") from None


def unbased(text: Any, name: str) -> bytes:
    """Base64, bare or in a `data:` URL."""
    if not isinstance(text, str):
        raise Refused(422, f"{name} must be base64, which is text")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(422, f"{name} is no base64") from None


def image(content: bytes, modality: Modality, name: str) -> np.ndarray:
    """An encoded picture of the model's size and channels; it is not scaled, for only the caller knows how training did it."""
    from PIL import Image, ImageOps

    if len(modality.shape) != 3 or modality.high is None:
        raise Refused(422, f"{name} is no picture of whole numbers in this model: send it as numbers, or as an .npy file")
    channels, height, width = modality.shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(content))
            if {picture.width, picture.height} != {width, height}:
                raise Refused(422, f"{name} is {picture.width} x {picture.height}, and this model takes {width} x {height}")
            if picture.mode.startswith(("I", "F")):
                raise Refused(422, f"{name} has more than 8 bits per channel: convert it to 8 bits")
            ImageOps.exif_transpose(picture, in_place=True)
            values = np.asarray(picture.convert({1: "L", 3: "RGB", 4: "RGBA"}.get(channels, "RGB")))
    except Refused:
        raise
    except Exception as error:  # broken bytes make Pillow raise nearly anything
        told = str(error).partition("<")[0].strip().rstrip(".") or "it ends too early"
        raise Refused(422, f"{name} is no picture that can be read: {told}") from None
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if values.shape != modality.shape:
        raise Refused(422, f"{name} is {_times(values.shape)}, and this model takes {_times(modality.shape)}")
    if modality.high < 255:  # the stream's own numbers are coarser than those of a picture
        values = np.round(values * (modality.high / 255)).astype(np.uint8)
    return np.ascontiguousarray(values)


def sound(content: bytes, modality: Modality, name: str) -> np.ndarray:
    """A WAV file of 16-bit PCM, mixed to one channel, which must be as long as the model's."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            if file.getsampwidth() != 2:
                raise Refused(422, f"{name} has {8 * file.getsampwidth()} bits per sample and only 16-bit PCM is read")
            channels = file.getnchannels()
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32768
    except Refused:
        raise
    except Exception as error:
        raise Refused(422, f"{name} is no WAV file that can be read: {str(error) or 'it ends too early'}") from None
    if len(samples) % channels:
        raise Refused(422, f"{name} ends in the middle of a sample")
    mono = samples.reshape(-1, channels).mean(axis=1) if channels > 1 else samples
    if mono.size != math.prod(modality.shape):
        raise Refused(422, f"{name} is {mono.size} samples long, and this model takes {_times(modality.shape)}")
    return mono.reshape(modality.shape)


def _utf8(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Refused(422, f"{name} is no UTF-8 text") from None


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


Parse = Callable[[bytes], Body]
