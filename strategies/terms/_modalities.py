"""What terms that weigh modalities against each other share: whose features are whose, and how well each tells the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.nn.backbone import Part
from streamcl.nn.losses import NOT_ANNOTATED
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch


def parts_of(strategy: GradientStrategy, term: str) -> dict[str, Part]:
    """Each modality's part of the model, where there are several to weigh against each other."""
    parts = strategy.model.backbone.fused()
    if len(parts) < 2:
        raise ConfigError(
            f"{term} weighs modalities against each other, and the model reads {', '.join(parts)} alone: leave it out of strategy.with, or "
            "give the backbone more modalities"
        )
    others = [type(one).__name__ for one in strategy.terms if type(one).__module__.rpartition(".")[2] in ("cggm", "ogm_ge")]
    if len(others) > 1:
        raise ConfigError(f"{' and '.join(others)} both scale the gradients of each modality's encoder: carry one of them")
    if strategy.context.world > 1:
        raise ConfigError(f"{term} compares the modalities over the whole batch, and several processes each see a part of it: start one")
    return parts


def features_of(strategy: GradientStrategy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Features and logits of a batch as the strategy computed them, or computed here where it kept none."""
    features, logits = strategy.features, strategy.logits
    if features is None or logits is None or len(features) != len(batch):
        features = strategy.model.features(batch)
        logits = strategy.model.head(features)
    return features, logits


def rows_with(batch: Batch, modality: str) -> Tensor | None:
    """Where the samples lie that have the modality; None for all of them."""
    here = (batch.present or {}).get(modality)
    return None if here is None else here.nonzero().squeeze(1)


def scale(parts: Mapping[str, Part], factors: Tensor, *, weights_only: bool = False) -> None:
    """Multiply the gradients of each modality's parameters by its factor."""
    for part, factor in zip(parts.values(), factors, strict=True):
        gradients = gradients_of(part, weights_only=weights_only)
        if gradients:
            torch._foreach_mul_(gradients, factor)


def gradients_of(part: Part, *, weights_only: bool = False) -> list[Tensor]:
    """The gradients that there are; `weights_only` leaves out vectors: biases, and the parameters of normalisations."""
    return [p.grad for p in part.parameters if p.grad is not None and (p.dim() > 1 or not weights_only)]


def right_classes(scores: Tensor, target: Tensor) -> Tensor:
    """Accuracy: the samples that are right, and all  # (2,)"""
    right = (scores.argmax(dim=1) == target).sum()
    return torch.stack([right, torch.full_like(right, len(target))]).float()


def right_sides(values: Tensor, target: Tensor, middle: float) -> Tensor:
    """How many values lie on the right side of the middle, and how many there are  # (2,)"""
    values, target = values.reshape(len(target), -1), target.reshape(len(target), -1)
    right = ((values > middle) == (target > middle)).sum()
    return torch.stack([right, torch.full_like(right, target.numel())]).float()


def overlaps(given: Tensor, wanted: Tensor) -> Tensor:
    """Of each class (column) twice what is in both, and the sum of what is in each: Dice is their ratio  # (2, classes)"""
    return torch.stack([2 * (given & wanted).sum(0), given.sum(0) + wanted.sum(0)]).float()


def overlaps_of_masks(scores: Tensor, target: Tensor) -> Tensor:
    """The same for the classes of pixels, of those that are annotated."""
    known, classes = target != NOT_ANNOTATED, scores.shape[1]
    given, wanted = scores.argmax(dim=1)[known], target[known].long()
    counts = [torch.bincount(labels, minlength=classes)[:classes] for labels in (given[given == wanted], given, wanted)]
    return torch.stack([2 * counts[0], counts[1] + counts[2]]).float()


def overlaps_of_labels(scores: Tensor, target: Tensor) -> Tensor:
    """The same for sets of labels, all classes as one: the micro-averaged F1 of what is annotated."""
    scores = scores[:, : target.shape[1]]
    known = target >= 0
    return overlaps(((scores > 0) & known).flatten()[:, None], ((target > 0) & known).flatten()[:, None])


def ratio(counts: Sequence[Tensor]) -> Tensor:
    """The metric from its counts: the mean over the classes that occur of the first row over the second."""
    above, below = torch.stack(list(counts)).sum(0).reshape(2, -1)
    occurs = below > 0
    return (above / below.clamp(min=1)).sum() / occurs.sum().clamp(min=1)
