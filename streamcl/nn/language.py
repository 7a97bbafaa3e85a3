"""Models that answer in words: what session strategies and learners may ask of one, whichever library it comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone
from streamcl.nn.model import Model
from streamcl.stream import Batch

SCORES = 2**28  # that are held of a policy at once, where answers are compared token by token: 1 GiB


@dataclass(frozen=True)
class Spoken:
    """What a model answered: `samples` answers for each row, side by side."""

    texts: list[str]  # (rows x samples,): without the signs that begin and end a text
    tokens: Tensor  # (rows x samples, T)
    mask: Tensor  # (rows x samples, T): 1 up to and with the token that ends the text
    samples: int

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(dim=1)


class LanguageModel(Backbone):
    """A backbone that answers in words: a causal language model of transformers that may read pictures, and its processor.

    `network` is transformers' own model (or PEFT's around it), `processor` what makes its inputs of conversations; both are there after
    `build`. `keep(name)` keeps the policy as it is now, frozen, under a name ("base" is kept by `build`, at no cost until something
    trains); with adapters that is a copy of the adapter, or the model without any.
    """

    network: Any
    processor: Any
    longest: int  # tokens of an answer
    at_once: int = 32  # rows that go through the network together

    @abstractmethod
    def conversations(self, batch: Batch) -> list[list[dict[str, Any]]]:
        """Each row's prompt as messages, in the form that chat templates take."""

    @abstractmethod
    def pictures(self, batch: Batch) -> list[list[Any]]:
        """Each row's pictures in the order of its messages: one, a video's frames, or none."""

    @abstractmethod
    def encode(self, batch: Batch, answers: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The processor's inputs for these prompts; with `answers` also `labels`, -100 everywhere but on the answers' tokens."""

    @abstractmethod
    def speak(
        self,
        batch: Batch,
        *,
        temperature: float = 0.0,
        samples: int = 1,
        generator: Any = None,
        longest: int | None = None,
    ) -> Spoken:
        """Answers; greedy ones where the temperature is 0. Gradients are off, and the network is in evaluation mode while it speaks."""

    @abstractmethod
    def logits(self, batch: Batch, spoken: Spoken) -> Tensor:
        """Of each of the answers' tokens  # (rows x samples, T, vocabulary)"""

    @torch.no_grad()
    def divergence(self, batch: Batch, spoken: Spoken, name: str) -> tuple[Tensor, Tensor]:
        """KL(kept || now) and KL(now || kept), exact over the vocabulary, at each of the answers' tokens; 0 beyond an answer's end.

        A few answers at a time, so that the scores of all are never there together  # (rows x samples, T), twice
        """
        rows = torch.arange(len(batch)).repeat_interleave(spoken.samples)
        forward, reverse = (torch.zeros(spoken.tokens.shape, device=spoken.tokens.device) for _ in range(2))
        start, step = 0, 1
        while start < len(rows):
            part = slice(start, start + step)
            its = Spoken([], spoken.tokens[part], spoken.mask[part], 1)
            now = self.logits(batch[rows[part]], its).float().log_softmax(dim=-1)
            with self.policy(name):
                then = self.logits(batch[rows[part]], its).float().log_softmax(dim=-1)
            forward[part], reverse[part] = _apart(then, now) * its.mask, _apart(now, then) * its.mask
            start += step
            step = max(1, min(self.at_once, SCORES // max(1, now[0].numel())))
        return forward, reverse

    def check_rows(self, batch: Batch, answers: Sequence[str] | None = None) -> None:
        """Raise DataError, with the row's id, where the model has no room for a prompt and an answer; at the cost of reading the words."""
        self.encode(batch, answers)

    def trainable(self) -> list[nn.Parameter]:
        """What learns. In less than 32 bits it would not: a small step is rounded away."""
        found = [value for value in self.network.parameters() if value.requires_grad]
        if not found:
            raise ConfigError("nothing of the language model can be trained: every weight is frozen")
        coarse = {str(value.dtype).removeprefix("torch.") for value in found if value.dtype in (torch.bfloat16, torch.float16)}
        if coarse:
            raise ConfigError(
                f"the weights that are to learn are kept in {' and '.join(sorted(coarse))}, where small steps are rounded away: set "
                "model.backbone.dtype: float32 (engine.precision says what is computed in), or train an adapter (strategy.adapter)"
            )
        return found

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Copy what the base has of these parameters: to be called before something else than training writes into them."""

    @abstractmethod
    def keep(self, name: str) -> None: ...

    @abstractmethod
    @contextmanager
    def policy(self, name: str) -> Iterator[nn.Module]:
        """For a while `network` computes by the policy that was kept under this name (no gradients)."""

    @abstractmethod
    def kept(self) -> dict[str, Any]:
        """The kept policies, as state of a checkpoint: tensors and JSON values; without "base" where `build` makes it again."""

    @abstractmethod
    def restore_kept(self, state: Mapping[str, Any]) -> None: ...


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """KL of ln p from ln p; what the one rules out counts nothing."""
    return (one.exp() * (one - other)).masked_fill_(one == -torch.inf, 0).sum(dim=-1)


def language_model(model: Model) -> LanguageModel | None:
    """The model that answers in words, or None."""
    backbone: Any = model.backbone
    backbone = getattr(backbone, "speaker", None) or backbone
    return backbone if isinstance(backbone, LanguageModel) else None


__all__ = ["LanguageModel", "Spoken", "language_model"]
