"""What learners share that teach responses: the loss, its optimiser, how a session is saved inside, and the template of a response."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.errors import ConfigError, DataError, TrainingError
from streamcl.learner import Learner, Report
from streamcl.nn.language import LanguageModel, language_model
from streamcl.options import Optimizer, PositiveFloat, PositiveInt, Schedule
from streamcl.strategy import learning_rate_factor, make_optimizer
from streamcl.stream import Batch, StreamInfo, Task

LOOKED_AT = 256  # rows at once, where they are measured before anything is learned
RESPONSE = "response"  # the column that holds what a row is to be answered with, word for word


class Supervised(Learner):
    def __init__(
        self,
        *,
        batch: PositiveInt = 32,
        accumulate: PositiveInt = 1,
        optimizer: Optimizer = Optimizer(name="adamw", lr=1e-5, weight_decay=0.0),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        clip: PositiveFloat | None = 1.0,
    ) -> None:
        self.batch, self.accumulate, self.clip = batch, accumulate, clip
        self.optimizer_settings, self.schedule = Optimizer.model_validate(optimizer), Schedule.model_validate(schedule)
        self.optimizer: torch.optim.Optimizer | None = None  # of a session that runs
        self.saved: dict[str, Any] = {}  # of one that was interrupted

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        language = language_model(context.model)
        if language is None:
            raise ConfigError("this learner teaches a model to answer in words, and the backbone does not speak: take tiny_vlm, or hf:NAME")
        if context.precision == "float16":
            raise ConfigError("this learner computes in bfloat16 or float32: set engine.precision")
        if context.world > 1:
            raise ConfigError(f"this learner has not shown that {context.world} processes give it the result of one: start one")
        self.language: LanguageModel = language

    def check(self, task: Task) -> None:
        for raw in task.train.batches(LOOKED_AT):
            prepared, answers = self.context.prepare(raw, train=False), self.taught(raw)
            self.language.check_rows(prepared)
            if answers is not None:
                self.language.check_rows(prepared, answers)

    def taught(self, raw: Batch) -> list[str] | None:
        """What a batch's rows are to be answered with, where that is known before the session."""
        return None

    @abstractmethod
    def progress(self) -> tuple[int, int]:
        """How far the session got, of how much: what the schedule goes by."""

    def begin(self) -> None:
        """A fresh optimiser, or that of the session that was interrupted."""
        self.weights = self.language.trainable()
        self.step, self.sums = 0, [0.0, 0.0]
        self.optimizer = make_optimizer(self.weights, self.optimizer_settings)
        if self.saved:
            self.optimizer.load_state_dict(self.saved["optimizer"])
            self.step, self.sums = int(self.saved["step"]), list(self.saved["sums"])
            self.saved = {}
        self.language.network.train()

    def teach(self, batch: Batch, answers: list[str]) -> None:
        """One raw batch and its responses; the optimiser steps where the batch closes those whose gradients accumulate."""
        context, optimizer = self.context, self.optimizer
        assert optimizer is not None
        with context.autocast():
            loss = said_loss(self.language, context.prepare(batch), answers)
            extra = auxiliary(self.language.network)
            total = loss if extra is None else loss + extra
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {self.step + 1}")
        (total / context.group).backward()
        self.sums = [self.sums[0] + value, self.sums[1] + 1]
        if not context.closes:
            return
        rate = self.optimizer_settings.lr * learning_rate_factor(self.schedule, *self.progress())
        for group in optimizer.param_groups:
            group["lr"] = rate
        if self.clip:
            nn.utils.clip_grad_norm_(self.weights, self.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        context.log(loss=value, lr=rate)

    def end(self) -> Report:
        """The mean loss of the session's batches."""
        self.optimizer = None
        self.language.network.eval()
        return Report({"loss": self.sums[0] / self.sums[1]} if self.sums[1] else {})

    def inside(self) -> dict[str, Any]:
        """What a session that is saved now needs to go on."""
        if self.optimizer is None:
            return self.saved
        return {"optimizer": self.optimizer.state_dict(), "step": self.step, "sums": self.sums}

    def state(self) -> dict[str, Any]:
        return {"inside": self.inside()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.saved = dict(state["inside"])


class Template:
    """What a row is to be answered with."""

    def __init__(self, template: str) -> None:
        try:
            self.parts = [(text, name) for text, name, _, _ in Formatter().parse(template)]
        except ValueError as error:
            raise ConfigError(f"learner.template is {template!r}: {error}; a brace that is meant is doubled") from None
        self.names = {name for _, name in self.parts if name is not None}
        if not self.names & {"answer", "rationale"}:
            raise ConfigError(f"learner.template is {template!r}, in which nothing stands for the answer: put {{answer}} there")

    def filled(self, batch: Batch) -> list[str]:
        own = batch.extra.get(RESPONSE)
        given = own if isinstance(own, list) else [""] * len(batch)
        question = next((values for values in batch.inputs.values() if isinstance(values, list)), None)
        columns: dict[str, Any] = {"question": question, **batch.extra}
        for name in self.names:
            if not isinstance(columns.get(name), list):
                if all(given):
                    return list(given)
                words = [column for column, values in columns.items() if isinstance(values, list)]
                raise ConfigError(f"learner.template names {{{name}}}, and the rows have {', '.join(words)}")
        for place, row in enumerate(zip(given, *(columns[name] for name in ("answer",) if name in self.names), strict=True)):
            if not any(part.strip() for part in row):
                raise DataError(f"row {int(batch.ids[place])} has no answer to learn: take it out")
        return [
            response or "".join(text + (str(columns[name][row]) if name is not None else "") for text, name in self.parts)
            for row, response in enumerate(given)
        ]


def said_loss(language: LanguageModel, batch: Batch, answers: Sequence[str]) -> Tensor:
    """The mean cross-entropy of the answers' tokens, their ends included, of a prepared batch."""
    inputs = language.encode(batch, answers)
    labels = inputs.pop("labels")
    width = int((labels != -100).any(dim=0).sum())  # answers stand side by side at the end
    logits = language.network(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, -width:].flatten(), ignore_index=-100)


def auxiliary(network: Any) -> Tensor | None:
    """What a network adds to every loss (a mixture of experts, that its experts are used alike), where it has something to add."""
    found = getattr(getattr(network, "get_base_model", lambda: network)(), "auxiliary_loss", None)
    return None if found is None else found()
