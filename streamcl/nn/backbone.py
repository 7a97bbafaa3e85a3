"""What every backbone offers: features of a batch, its own preprocessing, and where its weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from streamcl.errors import ConfigError, DataError
from streamcl.stream import Batch, StreamInfo, Transform

if TYPE_CHECKING:
    from streamcl.nn.prompts import Promptable

NUMERIC = ("image", "audio", "vector")


@dataclass(frozen=True)
class Part:
    """What of a backbone belongs to one modality: the columns that hold its features, and the parameters that serve it alone."""

    columns: slice
    parameters: tuple[nn.Parameter, ...]


class Backbone(nn.Module, ABC):
    """A plug-in that turns a batch into features. Its options are its constructor's keyword arguments.

    The constructor only keeps options; `build` makes the layers once the stream is known. A backbone whose weights come from a
    name (a hub, a file) says so in `origin`: while all of them are frozen, checkpoints name them and never copy them.
    """

    dim: int  # the length of a feature vector, set by `build`
    licence: str = "Apache-2.0"
    origin: dict[str, str] | None = None  # {"source": ..., "revision": ..., "sha256": ...} once weights were loaded by name

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def build(self, info: StreamInfo) -> None:
        """Make the layers for this stream; raises ConfigError where it lacks the modality that the backbone reads."""

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Features  # (batch, dim), or (batch, dim, height, width) where the stream's target is a mask"""

    def patches(self, batch: Batch) -> Tensor:
        """Features of each place of a picture, before they become one vector  # (batch, places, width), width is often `dim`"""
        name = type(self).__module__.rpartition(".")[2]
        raise ConfigError(
            f"the backbone {name} gives no features of single places: take convnet, resnet18, resnet32, or a vision model of timm"
        )

    def split(self) -> tuple[nn.Module, nn.Module]:
        """Its own layers in two parts, for methods that share the first and let the last ones grow.

        The first takes a batch, the second what the first gives and returns features; one after the other they are the backbone. The
        last block or stage is the second part: a backbone of one layer shares nothing.
        """
        name = type(self).__module__.rpartition(".")[2]
        raise ConfigError(
            f"the backbone {name} does not say how it is split into layers that are shared and layers that grow: take resnet32, resnet18, "
            "convnet or mlp"
        )

    def fused(self) -> dict[str, Part]:
        """Each modality's part of a backbone that puts the features of one encoder per modality side by side, for methods that weigh
        modalities against each other: `features[:, part.columns]` depend on `part.parameters` and on no other part's."""
        name = type(self).__module__.rpartition(".")[2]
        raise ConfigError(f"the backbone {name} does not keep an encoder for each modality: take fusion")

    def by_modality(self, batch: Batch) -> dict[str, Tensor]:
        """Features of each modality before they are brought together  # (batch, width), or (batch, tokens, width)"""
        name = type(self).__module__.rpartition(".")[2]
        raise ConfigError(f"the backbone {name} has no features of single modalities: take fusion or joint_transformer")

    def transformer(self) -> Promptable:
        """The transformer that it is, in parts, for methods that put prompts in between."""
        name = type(self).__module__.rpartition(".")[2]
        raise ConfigError(f"the backbone {name} takes no prompts: take multimodal_transformer, or a ViLT (hf:dandelin/vilt-b32-mlm)")

    def resize(self, dim: int) -> None:
        """Become the network whose features have `dim` entries: one that grows is given the size that it had."""
        if dim != self.dim:
            raise ValueError(f"its features have {self.dim} entries, and those of the saved model {dim}")

    def save(self, folder: Path) -> dict[str, Any]:
        """For an export: write the weights as the library that they belong to does, where it has a format of its own, and return the
        options that differ when `build` makes the same layers from there ("." is the folder). Otherwise the export writes the tensors."""
        return {}

    def transforms(self) -> dict[str, list[Transform]]:
        """What belongs between raw inputs and this backbone: lists under `train` and `test`. Floats from integers come before."""
        return {"train": [], "test": []}


def choose_modality(info: StreamInfo, wanted: str | None, kinds: tuple[str, ...], reader: str) -> str:
    """The modality that the backbone `reader` reads: `wanted`, or the stream's only one of these kinds."""
    fitting = [name for name, modality in info.modalities.items() if modality.kind in kinds]
    if wanted in fitting:
        return wanted
    if wanted is None and len(fitting) == 1:
        return fitting[0]
    if wanted is not None:
        problem = f"{wanted!r} is no modality that it reads (kind {' or '.join(kinds)})"
    elif fitting:
        problem = f"it reads one modality, and {' and '.join(fitting)} would do: set modality to one of them"
    else:
        problem = f"it reads a modality of kind {' or '.join(kinds)}"
    there = ", ".join(f"{name} ({modality.kind})" for name, modality in info.modalities.items())
    raise ConfigError(f"backbone {reader}: {problem}; the stream has {there or 'no modality'}")


def choose_modalities(info: StreamInfo, wanted: list[str] | None, reader: str) -> list[str]:
    """The modalities that the backbone `reader` reads, in the order of their names: `wanted`, or all that the stream has."""
    names = wanted if wanted is not None else list(info.modalities)
    unknown = [name for name in names if name not in info.modalities]
    if unknown or not names:
        told = f"{unknown[0]!r} is no modality of the stream; it has {', '.join(info.modalities)}" if unknown else "modalities is empty"
        raise ConfigError(f"backbone {reader}: {told}")
    return sorted(set(names))


def numbers(batch: Batch, modality: str) -> Tensor:
    """The values of a numeric modality."""
    values = batch.inputs[modality]
    if not isinstance(values, Tensor):
        raise DataError(f"modality {modality} holds {type(values[0]).__name__ if values else 'no'} values where numbers are expected")
    return values


def texts(batch: Batch, modality: str) -> list[str]:
    """The values of a text modality."""
    values = batch.inputs[modality]
    if not isinstance(values, list):
        raise DataError(f"modality {modality} holds numbers where text is expected")
    return values
