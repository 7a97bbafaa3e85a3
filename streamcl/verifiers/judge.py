"""A language model rates answers from 0 to 1: a reward model by its name on the Hugging Face hub or its folder.

`{name: judge, model: Qwen/Qwen2.5-VL-7B-Instruct}` (Apache-2.0), or any model that the backbone `language_model` takes. It reads the row's
question and choices where there are some, and the answer, as words alone: no picture. It is asked for one of 0, 0.1, ..., 1 and answers
greedily; the last number that it says is its rating. What says no such number is rated 0, and an empty answer too, unasked.

It is read at its first use, onto the GPU where there is one, and its weights stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.options import PositiveInt
from streamcl.seeding import random_state, restore_random
from streamcl.stream import Batch, Column, Modality, StreamInfo
from streamcl.verifier import Verifier

PROMPT = (
    "Rate how sound the following reasoning is: whether its steps follow from the question and from each other, without repetition or "
    "contradiction. Do not solve the question.\n\nQuestion: {question}\n\nReasoning: {answer}\n\nSay nothing but one number out of 0, 0.1, "
    "0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, where 1 is sound throughout."
)
_NUMBER = re.compile(r"(?<![\d.,/-])-?\d+(?:\.\d+)?(?:\s*/\s*\d+|\s*%)?")
_SCORE = re.compile(r"0(?:\.\d0*)?|1(?:\.0+)?")


class Judge(Verifier):
    """`prompt` is what the model is asked, with {question} and {answer}: whether reasoning is sound, unless it is given. It says at most
    `longest` tokens, about `at_once` answers side by side."""

    def __init__(
        self,
        *,
        model: str | None = None,
        prompt: str | None = None,
        longest: PositiveInt = 16,
        at_once: PositiveInt = 32,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        prompt = prompt or PROMPT
        if "{answer}" not in prompt:
            raise ConfigError("judge: nothing in its prompt stands for the answer: put {answer} there")
        self.model, self.prompt, self.longest, self.at_once = model, prompt, longest, at_once
        self.speaker: Any = None

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        asked = [place for place, answer in enumerate(answers) if answer.strip()]
        scores = torch.zeros(len(answers))
        if not asked:
            return scores
        prompts = [self._prompt(answers[place], rows, place) for place in asked]
        different = list(dict.fromkeys(prompts))
        batch = Batch({"text": different}, None, torch.arange(len(different)))
        said = dict(zip(different, map(score, self._speaker().speak(batch).texts), strict=True))
        scores[asked] = torch.tensor([said[prompt] for prompt in prompts])
        return scores

    def _prompt(self, answer: str, rows: Mapping[str, Column], place: int) -> str:
        question, choices = (str(rows[name][place]) if name in rows else "" for name in ("question", "choices"))
        whole = "\n".join(part for part in (question, choices) if part)
        return "".join(
            {"{question}": whole, "{answer}": answer}.get(part, part) for part in re.split(r"(\{question\}|\{answer\})", self.prompt)
        )

    def _speaker(self) -> Any:
        if self.speaker is None:
            from streamcl.nn.backbones.language_model import Speaker

            if self.model is None:
                raise ConfigError("judge: no model is named: set model to a language model's name or folder")
            before = random_state()  # libraries draw as they read a model
            speaker = Speaker(model=self.model, longest=self.longest, at_once=self.at_once)
            speaker.build(StreamInfo({"text": Modality("text")}))
            restore_random(before)
            self.speaker = speaker.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return self.speaker


def score(said: str) -> float:
    """The last number of what a judge said, where it is one of 0, 0.1, ..., 1; else 0."""
    numbers = _NUMBER.findall(said)
    return float(numbers[-1]) if numbers and _SCORE.fullmatch(numbers[-1]) else 0.0
