"""An adapter for each session: the model's own weights stay as they are, and every session trains a fresh low-rank adapter of PEFT.

What becomes of an adapter when its session is over, is said by `after`:

    routed   it is put aside. A question is answered by the adapter of the session whose prompts are nearest to it: by the mean of
             what the base model holds of a prompt when an answer is to begin, kept as prototypes by the memory. No task is told.
    kept     it stays active, frozen: what later sessions add comes on top of it.
    merged   it is added to the model's own weights, and costs nothing more.

Evidence: small real data
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.language import Spoken
from streamcl.options import Lora
from streamcl.stream import Batch, StreamInfo, Task

from ._sessions import Sessions


class AdapterPerSession(Sessions):
    """`adapter` is the form of all of them; `after` what becomes of one."""

    predicts_with = ("sessions",)

    def __init__(
        self,
        *,
        adapter: Lora = Lora(),  # noqa: B008
        after: Literal["routed", "kept", "merged"] = "routed",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.form, self.after = Lora.model_validate(adapter), after
        self.open: list[str] = []  # the adapters around the network, in the order of their sessions
        if after == "routed" and self.probes:
            raise ConfigError("strategy.probes measures one policy, and after=routed has one for each session: set probes=0")

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.language is None:
            raise ConfigError("adapter_per_session adapts models that answer in words, and this one does not: take sequential")
        self.language.network.requires_grad_(False)

    def before_session(self, task: Task) -> None:
        if self.after == "routed":  # each begins with the model alone
            self.attach(f"session{task.index}")
            super().before_session(task)
        else:
            super().before_session(task)
            self.attach(f"session{task.index}")

    def attach(self, name: str) -> None:
        self.wrap(self.form, name)
        self.open.append(name)
        self.activate(self.open if self.after == "kept" else [name])

    @property
    def sessions(self) -> torch.Tensor:
        """The sessions whose adapters are around the network; setting them makes those."""
        return torch.tensor([int(name.removeprefix("session")) for name in self.open], dtype=torch.int64)

    @sessions.setter
    def sessions(self, numbers: torch.Tensor) -> None:
        for number in numbers.tolist():
            self.attach(f"session{number}")

    def activate(self, names: list[str]) -> None:
        """Answer by these adapters; the newest of all is the one that learns."""
        self.language.network.base_model.set_adapter(names)
        for name, value in self.language.network.named_parameters():
            value.requires_grad_(f".{self.open[-1]}." in name)

    def after_session(self, task: Task) -> None:
        if self.after == "merged":
            self.language.hold(module.weight for module in self.language.network.modules() if hasattr(module, "lora_A"))
            self.language.network = self.language.network.merge_and_unload()
            self.language.network.requires_grad_(False)
            self.open.clear()
        elif self.after == "routed":
            for raw in task.train.batches(256):
                features = self.features(self.context.prepare(raw, train=False))
                self.memory.prototypes.update(features, torch.full((len(features),), task.index, device=features.device))

    def features(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), self.language.policy("base"):
            return self.language(batch).float()

    def answer(self, batch: Batch, **how: Any) -> Spoken:
        if self.after != "routed" or len(self.open) < 2:
            return super().answer(batch, **how)
        _, nearest = self.memory.prototypes.nearest(self.features(batch))
        owner, answers, places = nearest[:, 0].cpu(), [], []
        for session in owner.unique().tolist():
            mine = (owner == session).nonzero().squeeze(1)
            self.activate([self.open[session]])
            answers.append(super().answer(batch[mine], **how))
            places.append(mine)
        self.activate(self.open[-1:])
        return _in_order(answers, torch.cat(places))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "sessions": self.sessions}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.sessions = state["sessions"]
        super().restore(state)


def _in_order(answers: list[Spoken], places: torch.Tensor) -> Spoken:
    """Answers to parts of a batch as those to the whole; `places` says which row each part's rows are."""
    samples, width = answers[0].samples, max(spoken.tokens.shape[1] for spoken in answers)
    order = (places.argsort()[:, None] * samples + torch.arange(samples)).flatten()
    texts = [text for spoken in answers for text in spoken.texts]
    tokens, mask = (
        torch.cat([torch.nn.functional.pad(getattr(spoken, part), (0, width - spoken.tokens.shape[1])) for spoken in answers])
        for part in ("tokens", "mask")
    )
    on = order.to(tokens.device)
    return Spoken([texts[place] for place in order.tolist()], tokens[on], mask[on], samples)
