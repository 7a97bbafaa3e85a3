"""The loss that each kind of target is learned by, unless a method brings its own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

NOT_ANNOTATED = 255  # in masks


def annotated_binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy over the labels that are annotated: 1 and 0 count, -1 does not.

    Both are (batch, classes); samples from before a class arrived may come without its column.
    """
    logits = logits[:, : target.shape[1]]
    known = (target >= 0).to(logits.dtype)
    losses = binary_cross_entropy_with_logits(logits, target.clamp(min=0).to(logits.dtype), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def squared_error(values: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of (batch, values) against (batch,) or (batch, values)."""
    return mse_loss(values.reshape(len(target), -1), target.reshape(len(target), -1).to(values.dtype))


def pixel_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of (batch, classes, height, width) over the annotated pixels of (batch, height, width)."""
    total = cross_entropy(logits, target.long(), ignore_index=NOT_ANNOTATED, reduction="sum")
    return total / (target != NOT_ANNOTATED).sum().clamp(min=1)  # a batch without an annotation has nothing to learn, and its mean is NaN


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of the student's softened scores against the teacher's; smallest, the teacher's entropy, where the two agree."""
    return cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))


CRITERIA: dict[str, Callable[..., Tensor]] = {
    "class": cross_entropy,
    "labels": annotated_binary_cross_entropy,
    "value": squared_error,
    "mask": pixel_cross_entropy,
    "image": mse_loss,  # of the noise that a diffusion model is to find
}
