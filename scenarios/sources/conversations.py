"""Instruction sets as dialogues in JSON: each file is a set, its rows are questions with an optional picture, answered in words.

Read are the form of LLaVA (Liu et al., NeurIPS 2023), `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`, and
messages as chat services take them, `{"messages": [{"role": "user" | "assistant" | "system", "content"}]}`, where the content is text or a
list of parts of type text, image_url or image. Pictures are paths that start from `images` (by default the file's folder), or data URIs;
nothing is fetched from the web. Files are .json (a list) or .jsonl.

`turns: last` takes a dialogue as one row: its last answer, asked for by everything before it. `turns: all` makes every answer a row of its
own. Several turns become one text with "User:" and "Assistant:" before each. `<image>` is taken out of the text, for a model's own
processor puts its sign there. Of several pictures the first is used; such rows are counted among the problems. The group of a row is
its set. Each row names its verifier: `verifier`, or else the one that fits its answer (a letter: choice, a number: number, or text).
A test set without a file of its own is drawn by dialogues and pictures, so that neither is in both parts.

The data and its licence are whatever the files hold. Errors name the file and the row, counted from 0, or the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from streamcl.data_files import locate
from streamcl.errors import ConfigError
from streamcl.stream import SourceData

from ._dialogue import Turn, Unusable, pictures_of, prompt, tokens, turns_of
from ._json_rows import Row, files_at, read_objects
from ._listed import Refused
from ._questions import Question, QuestionSource

ENDINGS = (".json", ".jsonl", ".ndjson")


class Conversations(QuestionSource):
    """`path` is a file, a glob pattern, a folder, or a list of these; `test` the same with a file for each set, in the same order."""

    def __init__(
        self,
        *,
        path: Path | list[Path],
        test: Path | list[Path] | None = None,
        turns: Literal["last", "all"] = "last",
        **questions: Any,
    ) -> None:
        super().__init__(**questions)
        self.refuse_both(test)
        self.path, self.test, self.turns = path, test, turns

    def files(self) -> list[str]:
        return [str(file) for part in self._parts() for file in part]

    def load(self) -> SourceData:
        train_files, test_files = self._parts()
        names = _set_names(train_files)
        refused = Refused(self.on_error)
        rows = [q for file, name in zip(train_files, names, strict=True) for q in self._questions(file, name, refused)]
        if test_files:
            train = rows
            test = [q for file, name in zip(test_files, names, strict=True) for q in self._questions(file, name, refused)]
        else:
            train, test = self.divided(_of_their_own(rows))
        return self.assembled(train, test, names, refused)

    def _parts(self) -> tuple[list[Path], list[Path]]:
        train, test = (_all_files(path) for path in (self.path, self.test))
        if self.test is not None and len(test) != len(train):
            raise ConfigError(
                f"path means {len(train)} sets and test means {len(test)}: a test file for each set is needed, in the same order"
            )
        return train, test

    def _questions(self, file: Path, name: str, refused: Refused) -> list[Question]:
        folder = locate(self.images) if self.images is not None else file.parent
        found: list[Question] = []
        for number, (row, where) in enumerate(zip(*read_objects(file), strict=True)):
            try:
                found += self._rows(row, folder, name, where, number)
            except Unusable as error:
                refused.add(error.problem, f"{where}: {error}")
        return found

    def _rows(self, row: Row, folder: Path, name: str, where: str, number: int) -> list[Question]:
        held = row.get("conversations", row.get("messages"))
        if held is None:
            raise Unusable(
                "record without a dialogue", f"there is neither 'conversations' nor 'messages', only {', '.join(row) or 'nothing'}"
            )
        turns = turns_of(held, folder)
        _check_order(turns)
        pictures = pictures_of(row.get("image", row.get("images")), folder)
        asked = sum(tokens(turn.text) for turn in turns)
        there = len(pictures) + sum(len(turn.pictures) for turn in turns)
        if asked > there:
            raise Unusable("dialogue that lacks a picture", f"<image> stands in the dialogue {asked} times and there are {there} pictures")
        answers = [place for place, turn in enumerate(turns) if turn.speaker == "assistant"]
        return [
            Question(
                prompt(turns[:place]),
                turns[place].text.strip(),
                name,
                where,
                number,
                pictures + [picture for turn in turns[:place] for picture in turn.pictures],
                self.verifier or "",
            )
            for place in (answers if self.turns == "all" else answers[-1:])
        ]


def _check_order(turns: Sequence[Turn]) -> None:
    said = [turn for turn in turns if turn.speaker != "system"]
    expected = ["user", "assistant"] * (len(said) // 2)
    if not said or [turn.speaker for turn in said] != expected:
        order = ", ".join(turn.speaker for turn in turns)
        raise Unusable(
            "dialogue whose turns do not alternate", f"the turns are {order}: user and assistant must alternate, the assistant last"
        )
    silent = next((place for place, turn in enumerate(turns) if turn.speaker == "assistant" and not turn.text.strip()), None)
    if silent is not None:
        raise Unusable("dialogue with an empty answer", f"the answer in turn {silent} is empty")


def _all_files(path: Path | list[Path] | None) -> list[Path]:
    several = path if isinstance(path, list) else [] if path is None else [path]
    return [file for one in several for file in files_at(one, ENDINGS)]


def _set_names(files: Sequence[Path]) -> list[str]:
    """The sets' names: those of the files, with their folder's where these are the same."""
    stems = [file.stem for file in files]
    names = [stem if stems.count(stem) == 1 else f"{file.parent.name}/{stem}" for file, stem in zip(files, stems, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ConfigError(f"two sets are called {twice!r}: a file can be in the list once")
    return names


def _of_their_own(questions: Sequence[Question]) -> list[Question]:
    """The rows with a number for each dialogue over all files."""
    numbers: dict[tuple[str, int], int] = {}
    for question in questions:
        question.origin = numbers.setdefault((question.group, question.origin), len(numbers))
    return list(questions)
