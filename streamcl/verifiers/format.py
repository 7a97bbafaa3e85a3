"""The answer has the form that was asked for: a block for each tag, in this order, each tag once, and nothing outside of the blocks.

`tags: [think, answer]` is <think>...</think><answer>...</answer>, as APO, SophiaVL-R1 and Video-R1 ask for it; white space may stand around
the blocks. With three tags or more the first block may also stand inside the second: `tags: [observe, think, answer]` are the two forms of
Observe-R1. What stands in the blocks, and whether it is right, is not judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.stream import Column
from streamcl.verifier import Verifier


class Format(Verifier):
    def __init__(self, *, tags: list[str] = ["think", "answer"], **options: Any) -> None:  # noqa: B006
        super().__init__(**options)
        if not tags or len(set(tags)) < len(tags) or not all(re.fullmatch(r"\w+", tag) for tag in tags):
            raise ConfigError(f"format: tags is {tags}: name at least one tag, each once and without its brackets: [think, answer]")
        self.marks = re.compile(rf"</?(?:{'|'.join(tags)})>")
        blocks = [(f"<{tag}>", f"</{tag}>") for tag in tags]
        self.forms = [[mark for block in blocks for mark in block]]
        if len(tags) > 2:
            (first, second), rest = blocks[:2], blocks[2:]
            self.forms.append([second[0], *first, second[1], *(mark for block in rest for mark in block)])

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        return torch.tensor([float(self._fits(answer)) for answer in answers], dtype=torch.float32)

    def _fits(self, answer: str) -> bool:
        if [found.group() for found in self.marks.finditer(answer)] not in self.forms:
            return False
        depth, end = 0, 0
        for found in self.marks.finditer(answer):
            if depth == 0 and answer[end : found.start()].strip():
                return False
            depth, end = depth + (-1 if found.group().startswith("</") else 1), found.end()
        return not answer[end:].strip()
