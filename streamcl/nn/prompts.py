"""Prompts: learned vectors that join the tokens of a frozen transformer, and the one way in which every method puts them there.

A backbone that takes prompts offers its transformer in parts (`Promptable`): the tokens of each modality, the layers one by one, and what
makes features of the token that is read. A method writes what it learns as a `Prompts`, and sets it as the model's `prompts`; then
`encode` asks it

    embed       the modalities' tokens before the first layer: changed, exchanged, or left as they are
    before      what joins the sequence before a layer: tokens that stay from then on (`input`), or keys and values of that layer alone
                (`attention`, prefix tuning); where `drop` says so, the prompts that joined before are taken out first
    after       the features that were read

Prompts are put in front. Positions are added to the tokens of the modalities and to nothing else, so that it makes no difference where in
the sequence they stand. An insertion of length 0 leaves the frozen model as it is.

Where a sample lacks a modality its values are never read: the transformer embeds a dummy in their place, a text without a word or
an image of ones (Lee et al., CVPR 2023; other values are 0). `absent` says what becomes of its tokens: `dummy`, they are attended to like
any others; `drop`, nothing attends to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamcl.stream import Batch, Column

Absent = Literal["dummy", "drop"]


@dataclass(frozen=True)
class Embedded:
    """A batch as tokens: the one that is read, and those of each modality with which of them are no padding."""

    lead: Tensor  # (batch, 1, width)
    tokens: dict[str, Tensor]  # (batch, length, width) each
    masks: dict[str, Tensor]  # (batch, length) each


@dataclass(frozen=True)
class Insertion:
    """What joins before a layer: `tokens` in the sequence; with `values`, keys and values of this layer's attention alone."""

    tokens: Tensor  # (batch, length, width)
    values: Tensor | None = None  # (batch, length, width)
    mask: Tensor | None = None  # (batch, length): which of them are there; None for all
    drop: bool = False  # what joined before goes first


Prefix = tuple[Tensor, Tensor]  # keys and values  # (batch, length, width) each


class Promptable(ABC):
    """A transformer in parts."""

    reads: list[str]  # its modalities, in the order of the columns of `here`
    width: int  # the length of a token
    depth: int  # layers
    lengths: Mapping[str, int]  # how many tokens a modality has
    absent: Absent = "dummy"

    @abstractmethod
    def embed(self, batch: Batch, here: Tensor) -> Embedded:
        """Tokens with their positions and modalities in them, of dummies where `here` (batch, modalities) says that a value is absent."""

    @abstractmethod
    def layer(self, number: int, x: Tensor, mask: Tensor, prefix: Prefix | None) -> Tensor:
        """One layer. `mask` has the prefix's places first  # (batch, prefix + tokens)"""

    @abstractmethod
    def finish(self, lead: Tensor) -> Tensor:
        """Features from the token that is read  # (batch, width)"""

    @abstractmethod
    def pooler(self) -> list[nn.Parameter]:
        """The parameters of the last layer before the features."""

    @abstractmethod
    def projections(self) -> list[nn.Parameter]:
        """Those that make tokens of the raw values."""


class Prompts(nn.Module):
    """What a method learns around a frozen transformer. It overrides what it needs."""

    absent: Absent = "dummy"

    def embed(self, made: Embedded, here: Tensor) -> Embedded:
        """The modalities' tokens as they enter the first layer."""
        return made

    def before(self, layer: int, here: Tensor) -> Insertion | None:
        return None

    def after(self, features: Tensor) -> Tensor:
        return features


class Grown(nn.Module):
    """Parameters of which more come with the tasks, each frozen until a method says otherwise. Loading takes as many as were saved."""

    def grow(self, value: Tensor) -> None:
        self.register_parameter(str(len(self)), nn.Parameter(value.detach().clone(), requires_grad=False))

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, number: int) -> Tensor:
        return list(self.parameters())[number]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        while f"{prefix}{len(self)}" in state_dict:
            self.grow(state_dict[f"{prefix}{len(self)}"])
        while len(self) and f"{prefix}{len(self) - 1}" not in state_dict:
            del self._parameters[str(len(self) - 1)]
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def presence(batch: Batch, modalities: list[str]) -> Tensor:
    """Which sample has which modality  # (batch, modalities) bool"""
    masks, everything = batch.present or {}, torch.ones_like(batch.ids, dtype=torch.bool)
    return torch.stack([masks.get(name, everything) for name in modalities], dim=1)


def code(here: Tensor) -> Tensor:
    """The number of each sample's pattern: bit i is set where the i-th modality is absent, so that 0 is complete  # (batch,)"""
    weights = 2 ** torch.arange(here.shape[1], device=here.device)
    return (~here * weights).sum(dim=1)


def patterns(modalities: int, device: torch.device | None = None) -> Tensor:
    """Every pattern that keeps a modality, in the order of its code  # (2^modalities - 1, modalities) bool, True where present"""
    codes = torch.arange(2**modalities - 1, device=device)
    return (codes[:, None] >> torch.arange(modalities, device=device)) & 1 == 0


def filled(values: Column, here: Tensor, dummy: float | str) -> Column:
    """Values with the dummy where they are absent; the absent ones, NaN perhaps, reach nothing."""
    if isinstance(values, list):
        return [value if there else str(dummy) for value, there in zip(values, here.tolist(), strict=True)]
    return torch.where(
        here.reshape(-1, *[1] * (values.dim() - 1)), values, torch.as_tensor(dummy, dtype=values.dtype, device=values.device)
    )


def encode(transformer: Promptable, batch: Batch, prompts: Prompts | None = None) -> Tensor:
    """Features of a batch with these prompts in the transformer  # (batch, width)"""
    here = presence(batch, transformer.reads)
    made = transformer.embed(batch, here)
    if prompts is not None:
        made = prompts.embed(made, here)
    masks = [made.masks[name] for name in transformer.reads]
    if (transformer.absent if prompts is None else prompts.absent) == "drop":
        masks = [mask & here[:, place, None] for place, mask in enumerate(masks)]
    x = torch.cat([made.lead, *(made.tokens[name] for name in transformer.reads)], dim=1)
    mask = torch.cat([torch.ones_like(masks[0][:, :1]), *masks], dim=1)
    joined = 0  # prompts in front of the token that is read
    for number in range(transformer.depth):
        added = None if prompts is None else prompts.before(number, here)
        if added is None:
            x = transformer.layer(number, x, mask, None)
            continue
        if added.drop:
            x, mask, joined = x[:, joined:], mask[:, joined:], 0
        there = torch.ones(added.tokens.shape[:2], dtype=torch.bool, device=x.device) if added.mask is None else added.mask
        if added.values is not None:
            prefix = (added.tokens, added.values)
            x = transformer.layer(number, x, torch.cat([there, mask], dim=1), prefix)
            continue
        x, mask = torch.cat([added.tokens.to(x.dtype), x], dim=1), torch.cat([there, mask], dim=1)
        joined += added.tokens.shape[1]
        x = transformer.layer(number, x, mask, None)
    features = transformer.finish(x[:, joined])
    return features if prompts is None else prompts.after(features)
