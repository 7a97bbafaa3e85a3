"""The model of a run: a backbone and a linear head that grows with the classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from streamcl.nn.backbone import Backbone
from streamcl.nn.prompts import Prompts, encode
from streamcl.stream import Batch


class GrowingHead(nn.Module):
    """A linear classifier whose rows are the classes in order of arrival. Growing keeps the old rows bit for bit."""

    def __init__(self, dim: int, classes: int = 0, bias: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(0, dim))
        self.bias = nn.Parameter(torch.empty(0)) if bias else None
        self.resize(classes)

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    def resize(self, classes: int) -> None:
        """Append freshly initialised rows, or drop the newest ones."""
        known = self.classes
        if classes == known:
            return
        if classes < known:
            weight = self.weight.data[:classes].clone()
            bias = None if self.bias is None else self.bias.data[:classes].clone()
        else:
            fresh = nn.Linear(self.dim, classes - known, bias=self.bias is not None, device=self.weight.device, dtype=self.weight.dtype)
            weight = torch.cat([self.weight.data, fresh.weight.data])
            bias = None if self.bias is None else torch.cat([self.bias.data, fresh.bias.data])
        self.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if self.bias is not None and bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)

    def widen(self, dim: int) -> None:
        """Append freshly initialised columns for features that were added, or drop the last ones. The others are kept bit for bit."""
        weight, kept = self.weight.data.new_empty(self.classes, dim), min(dim, self.dim)
        if self.classes:
            weight = nn.Linear(dim, self.classes, bias=False, device=weight.device, dtype=weight.dtype).weight.data
        weight[:, :kept] = self.weight.data[:, :kept]
        self.weight, self.dim = nn.Parameter(weight, requires_grad=self.weight.requires_grad), dim

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() > 2:  # of places: each has logits of its own
            return linear(features.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)  # (batch, classes, height, width)
        return linear(features, self.weight, self.bias)  # (batch, classes)


class Model(nn.Module):
    """`model(batch)` gives logits over the classes seen so far, `model.features(batch)` what lies before the head.

    `prompts` is what a method learns around a frozen transformer: it is no part of the backbone, which checkpoints may only name.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.prompts: Prompts | None = None
        self.trained = False  # whether the backbone began with weights that something had trained
        self.head = GrowingHead(backbone.dim)
        self._named: dict[str, Tensor] = {}  # fingerprints of the weights that a named source gave
        self.remember()

    @property
    def classes(self) -> int:
        return self.head.classes

    def grow(self, classes: int) -> None:
        """Make room for `classes` in all; no effect where there is room."""
        if classes > self.head.classes:
            self.head.resize(classes)

    def features(self, batch: Batch) -> Tensor:
        return self.backbone(batch) if self.prompts is None else encode(self.backbone.transformer(), batch, self.prompts)

    def resize(self, classes: int, dim: int) -> None:
        """Take this shape: so many classes, over `dim` features of a backbone that grows."""
        if dim != self.backbone.dim:
            self.backbone.resize(dim)
            self.head.widen(dim)
        self.head.resize(classes)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.features(batch))

    def both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits, and the features that they were made from, of one forward pass."""
        features = self.features(batch)
        return self.head(features), features

    def by_modality(self, batch: Batch) -> dict[str, Tensor]:
        """What the backbone makes of each modality before it brings them together  # (batch, ...) each"""
        return self.backbone.by_modality(batch)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode for a while; afterwards every part is in the mode that it was in."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def copy(self) -> Model:
        """A frozen copy in evaluation mode: the teacher of many methods."""
        twin = copy.deepcopy(self)
        return twin.eval().requires_grad_(False)

    def remember(self) -> None:
        """Take the backbone's weights as they are now for those of its named source: a checkpoint will name what stays so.

        To be called again where the model has moved to another device, whose sums may differ in their last bits.
        """
        held = self.backbone.state_dict() if self.backbone.origin else {}
        self._named = {plain_name(name): _fingerprint(value) for name, value in held.items()}

    def named_elsewhere(self) -> set[str]:
        """The names of tensors that are still what a named source gave: a checkpoint names them and does not copy them.

        Each is told by its content: what was trained, even if it is frozen now, is copied.
        """
        return self._as_named() - {f"backbone.{name}" for name, value in self.backbone.named_parameters() if value.requires_grad}

    def _as_named(self) -> set[str]:
        held = self.backbone.state_dict() if self._named else {}
        return {
            f"backbone.{name}"
            for name, value in held.items()
            if (plain := plain_name(name)) in self._named and torch.equal(self._named[plain], _fingerprint(value))
        }

    def state(self) -> dict[str, Any]:
        """All that is needed to restore the model: its shape, the tensors, and where frozen weights come from."""
        frozen = self.named_elsewhere()
        return {
            "classes": self.classes,
            "dim": self.backbone.dim,
            "tensors": {name: value for name, value in self.state_dict().items() if name not in frozen},
            "origin": self.backbone.origin if frozen else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`, on a model that was built from the same settings."""
        origin = state["origin"]
        at_hand = self.backbone.origin or {}
        if origin is not None and origin["sha256"] != at_hand.get("sha256"):  # wherever they lie, they are the same by their hash
            raise ValueError(f"the frozen weights were {origin}, and those at hand are {at_hand or 'none'}")
        self.resize(int(state["classes"]), int(state.get("dim", self.backbone.dim)))
        missing, unexpected = self.load_state_dict(state["tensors"], strict=False)
        absent = set(missing) - (self._as_named() if origin is not None else set())
        if absent or unexpected:
            raise ValueError(f"the saved model has other tensors: missing {sorted(absent)[:3]}, unexpected {sorted(unexpected)[:3]}")


def plain_name(name: str) -> str:
    """What a tensor was called before PEFT put an adapter around its layer."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".")


def _fingerprint(value: Tensor) -> Tensor:
    """Two sums that change when the tensor does."""
    flat = value.detach().flatten()
    exact = torch.int64 if not value.is_floating_point() else torch.float64
    return torch.stack([flat.sum(dtype=exact), flat[::2].sum(dtype=exact)]).cpu()
