"""What the methods for several modalities share."""

from __future__ import annotations

import torch
from torch import Tensor

from streamcl.adapting import entropy
from streamcl.errors import ConfigError
from streamcl.stream import Batch

FEWEST = 2  # samples: of one alone nothing can be said about how evenly classes are predicted


def balance(probabilities: Tensor) -> Tensor:
    """How evenly the classes are predicted: the entropy of the softmax of the *sum* of these probabilities  # (batch, classes) -> ()

    The sum is a temperature: a batch of one has nearly an even softmax whatever it says, a large one a sharp one.
    """
    return entropy(probabilities.sum(dim=0, keepdim=True)).squeeze(0)


def several(batch: Batch, method: str) -> list[str]:
    """The names of a batch's modalities, of which there are to be two or more."""
    names = list(batch.inputs)
    if len(names) < 2:
        raise ConfigError(f"{method} compares modalities: it needs two or more, and a batch has {', '.join(names) or 'none'}")
    return names


def here(batch: Batch, names: list[str]) -> Tensor:
    """Which sample has which of these modalities  # (batch, modalities) bool"""
    everything = torch.ones_like(batch.ids, dtype=torch.bool)
    return torch.stack([(batch.present or {}).get(name, everything) for name in names], dim=1)


def comparable(batch: Batch, names: list[str]) -> bool:
    """Whether how modalities go together can be learned from a batch: it is no single sample, and every modality is there for some."""
    return len(batch) >= FEWEST and (not batch.present or bool(here(batch, names).any(dim=0).all()))
