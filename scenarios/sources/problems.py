"""Problems with a verifiable answer, as the public sets for reinforcement learning write them: JSON lines, JSON or Parquet.

Columns are found by their usual names (each has an option that names it; a dot goes inside: `reward_model.ground_truth`):

- `question`: problem, question, prompt, query. A list of messages is taken as a dialogue whose last turn is asked;
- `image`: image, images, image_path, path: bytes, {bytes, path}, a path that starts from `images` (by default the file's folder), a
  data URI, or a list of these. The first is used; rows with more are counted among the problems. A row may have none;
- `answer`: answer, solution, ground_truth, gt_answer, reward_model.ground_truth. What stands in `<answer>` or
  `\\boxed{}` counts, where there is one;
- `choices`: choices, options: a list, or an object of letters;
- `skill`: skill, category, data_source, task, subject: the row's group. Without one all rows are of the skill "all";
- `difficulty`: difficulty, level: a number, a text that ends in one (Level 3), or easy, medium, hard; or `pass_rate`: pass_rate,
  solve_rate, the share that a reference model solved, which makes the difficulty 1 - pass_rate. Larger is harder; NaN where a row has none;
- each row's verifier: `verifier` for all, or else by a column verifier or problem_type (also the types of Video-R1: multiple choice,
  numerical, regression, free-form, OCR), or else the one that fits the answer: choice, number or text.

`<image>` is taken out of the text, for a model's own processor puts its sign there. A right answer that its verifier cannot read is
kept and counted among the problems: no answer to it is right or wrong, and scores leave it out.

The data and its licence are whatever the files hold. Errors name the file and the row, counted from 0, or the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.plugins import near_name, plugins
from streamcl.stream import SourceData
from streamcl.verifier import extract

from ._dialogue import Picture, Unusable, pictures_of, prompt, tokens, turns_of, without_tokens
from ._json_rows import Row, files_at, read_objects
from ._listed import Refused
from ._questions import Question, QuestionSource

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")
USUAL = {
    "question": ("problem", "question", "prompt", "query"),
    "answer": ("answer", "solution", "ground_truth", "gt_answer", "reward_model.ground_truth"),
    "image": ("image", "images", "image_path", "path"),
    "choices": ("choices", "options"),
    "skill": ("skill", "category", "data_source", "task", "subject"),
    "difficulty": ("difficulty", "level"),
    "pass_rate": ("pass_rate", "solve_rate"),
}
VERIFIER = ("verifier", "problem_type")
TYPES = {"multiple choice": "choice", "multiple_choice": "choice", "numerical": "number", "regression": "number"}
TYPES |= {"free-form": "text", "free_form": "text", "ocr": "text"}
LEVELS = {"easy": 1.0, "medium": 2.0, "hard": 3.0}


class Problems(QuestionSource):
    """`path` is a file, a glob pattern or a folder, `test` a second one; without it `test_fraction` of every skill is held back.

    Rows with the same picture (the same path, or the same bytes) are held back together, so that no picture is in both parts.
    """

    def __init__(
        self,
        *,
        path: Path,
        test: Path | None = None,
        question: str | None = None,
        answer: str | None = None,
        image: str | None = None,
        choices: str | None = None,
        skill: str | None = None,
        difficulty: str | None = None,
        pass_rate: str | None = None,
        **questions: Any,
    ) -> None:
        super().__init__(**questions)
        self.refuse_both(test)
        if difficulty is not None and pass_rate is not None:
            raise ConfigError("difficulty and pass_rate contradict each other: one column says how hard a row is")
        self.path, self.test = path, test
        self.asked = {"question": question, "answer": answer, "image": image, "choices": choices, "skill": skill}
        self.asked |= {"difficulty": difficulty, "pass_rate": pass_rate}

    def files(self) -> list[str]:
        return [str(file) for path in (self.path, self.test) if path is not None for file in files_at(path, ENDINGS)]

    def load(self) -> SourceData:
        refused = Refused(self.on_error)
        rows = self._questions(self.path, refused)
        train, test = self.divided(rows) if self.test is None else (rows, self._questions(self.test, refused))
        names = sorted({question.group for question in [*train, *test]})
        return self.assembled(train, test, names, refused)

    def _questions(self, path: Path, refused: Refused) -> list[Question]:
        found: list[Question] = []
        known = plugins("verifier", [])
        for file in files_at(path, ENDINGS):
            rows, places = _read_parquet(file) if file.suffix.lower() == ".parquet" else read_objects(file)
            columns = self._columns(rows, str(file))
            folder = locate(self.images) if self.images is not None else file.parent
            for row, where in zip(rows, places, strict=True):
                try:
                    found.append(self._question(row, columns, folder, where, len(found), known))
                except Unusable as error:
                    refused.add(error.problem, f"{where}: {error}")
        return found

    def _columns(self, rows: Sequence[Row], where: str) -> dict[str, str]:
        """The name of each column that is there; what is asked for must be, and so must a question and an answer."""
        names = dict.fromkeys(name for row in rows for name in row)
        nested = [f"{name}.{inner}" for name in names for row in rows[:1] if isinstance(row.get(name), Mapping) for inner in row[name]]
        found: dict[str, str] = {}
        for option, usual in USUAL.items():
            asked = self.asked[option]
            if asked is not None and asked not in names and asked not in nested:
                raise DataError(
                    f"{where}: there is no {asked!r} ({option})"
                    + (near_name(asked, [*names, *nested]) or f": there are {', '.join(names)}")
                )
            name = asked or next((name for name in usual if name in names or name in nested), None)
            if name is not None:
                found[option] = name
            elif option in ("question", "answer"):
                raise ConfigError(f"{where}: no column is named {', '.join(usual)}: say which of {', '.join(names)} is the `{option}`")
        if self.asked["difficulty"] is not None or (self.asked["pass_rate"] is None and "difficulty" in found):
            found.pop("pass_rate", None)
        else:
            found.pop("difficulty", None)
        return found

    def _question(self, row: Row, columns: Mapping[str, str], folder: Path, where: str, number: int, known: Mapping[str, Any]) -> Question:
        held = {option: _inside(row, name) for option, name in columns.items()}
        pictures = pictures_of(held.get("image"), folder)
        text, asked = self._text(held["question"], folder, pictures)
        if asked > len(pictures):
            raise Unusable(
                "question that lacks a picture", f"<image> stands in the question {asked} times and there are {len(pictures)} pictures"
            )
        answer = _answer(held["answer"])
        skill = held.get("skill")
        if "skill" in columns and skill in (None, ""):
            raise Unusable("row without a skill", f"the skill ({columns['skill']}) is empty")
        return Question(
            text,
            answer,
            "all" if skill is None else str(skill),
            where,
            number,
            pictures,
            self.verifier or next((name for column in VERIFIER if (name := _verifier(row.get(column), known))), ""),
            _choices(held.get("choices")),
            1 - _level(held["pass_rate"]) if "pass_rate" in columns else _level(held.get("difficulty")),
        )

    def _text(self, question: Any, folder: Path, pictures: list[Picture]) -> tuple[str, int]:
        """The question, and how many pictures it asks for; those that lie inside of messages are added to the row's."""
        if isinstance(question, list):
            turns = turns_of(question, folder)
            pictures += [picture for turn in turns for picture in turn.pictures]
            if turns[-1].speaker != "user":
                raise Unusable("dialogue that asks nothing", f"the last turn is by the {turns[-1].speaker}, and a question is needed")
            return prompt(turns), sum(tokens(turn.text) for turn in turns)
        if not isinstance(question, str) or not question.strip():
            raise Unusable("row without a question", f"the question is {'empty' if question in (None, '') else 'no text'}")
        return without_tokens(question), tokens(question)


def _inside(row: Row, name: str) -> Any:
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    held = row.get(outer)
    return held.get(inner) if isinstance(held, Mapping) else None


def _answer(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Unusable("row without an answer", f"the answer is {'empty' if value is None else f'{value!r}: text or a number is needed'}")
    answer = extract(str(value))
    if not answer:
        raise Unusable("row without an answer", "the answer is empty")
    return answer


def _choices(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{letter}. {words}" for letter, words in value.items() if words is not None]
    if value is None or value == "" or value == []:
        return ""
    if not isinstance(value, list):
        raise Unusable("choices that are no list", f"the choices are {value!r}: a list is needed")
    return "\n".join(" ".join(str(choice).split()) for choice in value)


def _level(value: Any) -> float:
    if value is None or value == "":
        return math.nan
    if isinstance(value, str):
        named = LEVELS.get(value.strip().lower())
        if named is not None:
            return named
        found = re.search(r"-?\d+(?:\.\d+)?\s*$", value)
        value = float(found[0]) if found else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Unusable("difficulty that is no number", f"the difficulty is {value!r}: a number, or easy, medium or hard, is needed")
    return float(value)


def _verifier(value: Any, known: Mapping[str, Any]) -> str:
    name = str(value).strip().lower()
    return name if name in known else TYPES.get(name, "")


def _read_parquet(file: Path) -> tuple[list[Row], list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file, partitioning=None).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: this is no Parquet file that can be read: {error}") from None
    if not rows:
        raise DataError(f"{file}: there is not a single record in it")
    return rows, [f"{file}, row {row}" for row in range(len(rows))]
