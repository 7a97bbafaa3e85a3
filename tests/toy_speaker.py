"""A language model of three words whose probabilities are a table, so that what is said of it can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.nn.language import LanguageModel, Spoken
from streamcl.stream import Batch, StreamInfo

WORDS = ("", "yes", "no")  # the first ends an answer
BEGIN = len(WORDS)


class ToySpeaker(LanguageModel):
    """`table` holds ln p of each word after each other one; its last row is how an answer begins. Its prompts say nothing to it."""

    def __init__(self, table: Tensor, longest: int = 2) -> None:
        super().__init__()
        self.longest, self.dim = longest, 1
        self.network = nn.Embedding.from_pretrained(table, freeze=False)
        self.tables = {"base": table.clone()}

    def build(self, info: StreamInfo) -> None: ...

    def forward(self, batch: Batch) -> Tensor:
        return torch.zeros(len(batch), 1)

    def conversations(self, batch: Batch) -> list[list[dict[str, Any]]]:
        return [[] for _ in range(len(batch))]

    def pictures(self, batch: Batch) -> list[list[Any]]:
        return [[] for _ in range(len(batch))]

    def encode(self, batch: Batch, answers: Sequence[str] | None = None) -> dict[str, Tensor]:
        return {}

    def say(self, table: Tensor) -> None:
        self.network.weight.data = table.clone()

    @torch.no_grad()
    def speak(
        self, batch: Batch, *, temperature: float = 0.0, samples: int = 1, generator: Any = None, longest: int | None = None
    ) -> Spoken:
        last, ended = torch.full((len(batch) * samples,), BEGIN), torch.zeros(len(batch) * samples, dtype=torch.bool)
        tokens, mask = [], []
        for _ in range(longest or self.longest):
            scores = self.network(last)
            said = torch.multinomial(scores.softmax(dim=1), 1, generator=generator).squeeze(1) if temperature else scores.argmax(dim=1)
            last = said.masked_fill(ended, 0)
            tokens.append(last)
            mask.append((~ended).long())
            ended = ended | (last == 0)
        written = torch.stack(tokens, dim=1)
        texts = [" ".join(WORDS[word] for word in row if word) for row in written.tolist()]
        return Spoken(texts, written, torch.stack(mask, dim=1), samples)

    def logits(self, batch: Batch, spoken: Spoken) -> Tensor:
        begin = torch.full((len(spoken.tokens), 1), BEGIN)
        return self.network(torch.cat([begin, spoken.tokens[:, :-1]], dim=1))

    def keep(self, name: str) -> None:
        self.tables[name] = self.network.weight.detach().clone()

    @contextmanager
    def policy(self, name: str) -> Iterator[nn.Module]:
        now = self.network.weight.data
        self.network.weight.data = self.tables[name]
        try:
            with torch.no_grad():
                yield self.network
        finally:
            self.network.weight.data = now

    def kept(self) -> dict[str, Any]:
        return dict(self.tables)

    def restore_kept(self, state: Mapping[str, Any]) -> None:
        self.tables = dict(state)
