"""A learner: one session of training, for a model that answers in words, or for one that acts. A session strategy runs it on each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamcl.context import Context
from streamcl.nn.model import Model
from streamcl.stream import StreamInfo, Task


@dataclass(frozen=True)
class Report:
    """What a session came to: figures by name, each of the whole session or of its end; they stand in the report beside the task."""

    figures: Mapping[str, float] = field(default_factory=dict)


class Learner(ABC):
    """A plug-in that trains a model on one task, by reinforcement or under supervision. Its options are its constructor's keyword
    arguments.

    `start` is called once, `fit` for every task, with a fresh optimiser. What happens between tasks (replay, which model is the
    reference, adapters) is the session strategy's business: `task.train` holds what is to be learned from, earlier rows included, and
    `reference` names the policy that a penalty holds on to: one that the language model keeps (`LanguageModel.keep`).

    `fit` calls `context.save_point()` wherever its state is consistent: there the run may be saved or stopped. `state` then holds all
    that `fit` needs to go on (the optimiser, how far it got), and is empty between sessions but for what the method carries along.
    On a resumed task `fit` is entered again after `restore`.
    """

    reference: str = "base"

    def start(self, info: StreamInfo, context: Context) -> None:
        self.info, self.context = info, context

    def check(self, task: Task) -> None:
        """Raise ConfigError or DataError for a task that cannot be learned, before anything of it is."""

    @abstractmethod
    def fit(self, model: Model, task: Task, context: Context) -> Report: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} saved a state and does not restore it: {sorted(state)}")


__all__ = ["Learner", "Report"]
