"""What a stream is scored by, and what its outputs are, for the kinds whose classes are all known from the first task on."""

from __future__ import annotations

from typing import Any

from streamcl.stream import SourceData, StreamInfo

METRICS = {
    "class": ("accuracy",),
    "labels": ("map", "cf1", "macro_f1", "of1"),
    "value": ("mae", "rmse", "correlation"),
    "mask": ("miou", "pixel_accuracy"),
    "text": ("verified",),
}


def all_classes(data: SourceData) -> dict[int, str]:
    """Every class of the source by its number; for values one per value, for answers in words one per group of rows."""
    if data.target == "value":
        count = data.train.targets.shape[1] if data.train.targets.dim() > 1 else 1
        names = data.class_names if len(data.class_names) == count else [f"value {place + 1}" for place in range(count)]
        return dict(enumerate(names))
    return dict(enumerate(data.class_names))


def stream_info(data: SourceData, **more: Any) -> StreamInfo:
    names = tuple(all_classes(data).values())
    return StreamInfo(
        modalities=data.modalities,
        target=data.target,
        metrics=METRICS[data.target],
        classes=len(names),
        licence=data.licence,
        class_names=names,
        **more,
    )
