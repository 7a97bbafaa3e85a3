"""Dialogues as instruction and problem sets write them: who says what, and which pictures belong to it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TOKEN = re.compile(r"\s*<image>\s*")

Picture = bytes | str  # encoded, or the path of its file


class Unusable(ValueError):
    """What is wrong with a record, said twice: in few words for counting, and with its values for the person."""

    def __init__(self, problem: str, told: str = "") -> None:
        super().__init__(told or problem)
        self.problem = problem


@dataclass
class Turn:
    speaker: str  # user | assistant | system
    text: str
    pictures: list[Picture] = field(default_factory=list)


def turns_of(messages: Any, folder: Path) -> list[Turn]:
    """The turns of a dialogue, as {from, value} or as {role, content}; paths of pictures start from `folder`."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise Unusable("dialogue without turns")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise Unusable("turn that is no object")
        said_by = message.get("from", message.get("role"))
        speaker = SPEAKERS.get(str(said_by).lower())
        if speaker is None:
            raise Unusable("turn of an unknown speaker", f"a turn is by {said_by!r}: understood are {', '.join(SPEAKERS)}")
        text, pictures = _content(message.get("value", message.get("content")), folder)
        turns.append(Turn(speaker, text, pictures))
    return turns


def _content(content: Any, folder: Path) -> tuple[str, list[Picture]]:
    if isinstance(content, str):
        return content, []
    texts: list[str] = []
    pictures: list[Picture] = []
    for part in content if isinstance(content, Sequence) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "image"):
            held = part.get("image_url", part.get("image"))
            pictures += pictures_of(held.get("url") if isinstance(held, dict) and "url" in held else held, folder)
        else:
            raise Unusable(
                "turn without text", f"a turn holds {_short(part)}: text, or parts of type text, image_url and image, are needed"
            )
    return "\n".join(texts), pictures


def pictures_of(value: Any, folder: Path) -> list[Picture]:
    """The pictures of a field: bytes, a path, a data URI, {bytes, path}, a list of these, or nothing."""
    if value is None or (isinstance(value, str) and not value):
        return []
    if isinstance(value, (list, tuple)):
        return [picture for inner in value for picture in pictures_of(inner, folder)]
    if isinstance(value, dict) and value.keys() & {"bytes", "path"}:
        return pictures_of(value.get("bytes") or value.get("path"), folder)
    if isinstance(value, bytes):
        return [value]
    if not isinstance(value, str):
        raise Unusable(
            "picture of an unknown form", f"{_short(value)} is no picture: a path, bytes, {{bytes, path}} or a data URI is needed"
        )
    if value.startswith("data:"):
        header, _, written = value.partition(",")
        try:
            return [base64.b64decode(written, validate=True) if header.endswith(";base64") else unquote(written).encode("latin-1")]
        except (binascii.Error, ValueError) as error:
            raise Unusable("picture that does not decode", f"the data URI of the picture is damaged: {error}") from None
    if re.match(r"https?://", value):
        raise Unusable(
            "picture at a web address", f"the picture is at {_short(value)}: fetch it and write its path, nothing is downloaded here"
        )
    return [str(folder / value.removeprefix("file://"))]


def prompt(turns: Sequence[Turn]) -> str:
    """What is asked, as one text: the last question, with the turns before it and who said them where there are any."""
    told = [without_tokens(turn.text) for turn in turns if turn.speaker == "system"]
    said = [turn for turn in turns if turn.speaker != "system"]
    if len(said) == 1:
        return "\n".join([*told, without_tokens(said[0].text)])
    return "\n".join([*told, *(f"{turn.speaker.capitalize()}: {without_tokens(turn.text)}" for turn in said)])


def without_tokens(text: str) -> str:
    """A text without `<image>`, which stands where a model's own processor will put its own sign."""
    return _TOKEN.sub("\n", text).strip()


def tokens(text: str) -> int:
    return len(_TOKEN.findall(text))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
