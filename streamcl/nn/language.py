"""Models that answer in words: what session strategies and learners may ask of one, whichever library it comes from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamcl.nn.backbone import Backbone
from streamcl.nn.model import Model
from streamcl.stream import Batch


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


def language_model(model: Model) -> LanguageModel | None:
    """The model that answers in words, or None."""
    backbone: Any = model.backbone
    backbone = getattr(backbone, "speaker", None) or backbone
    return backbone if isinstance(backbone, LanguageModel) else None


__all__ = ["LanguageModel", "Spoken", "language_model"]
