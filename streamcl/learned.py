"""What a run has learned, apart from its data: a model that answers by the classes' own names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.context import Context, chosen_precision
from streamcl.contracts import Memory
from streamcl.errors import DataError
from streamcl.events import Events
from streamcl.nn.backbone import Backbone
from streamcl.nn.model import Model
from streamcl.preparing import Preparation
from streamcl.seeding import random_state, restore_random, seed_everything
from streamcl.strategy import Strategy
from streamcl.stream import Batch, Modality, Prediction, StreamInfo, Transform, asked

CHUNK = 512  # samples that are predicted at a time


class Learned:
    """A model that predicts. `streamcl.load` makes one from a run's folder or from an exported one; neither needs the data.

    `classes` are the names of its classes, in the order of its scores. `answer` takes a batch as the stream has it.
    """

    def __init__(
        self,
        info: StreamInfo,
        backbone: Backbone,
        strategy: Strategy,
        memory: Memory,
        classes: Sequence[str],
        *,
        transforms: Mapping[str, Sequence[Transform]] | None = None,  # None: the backbone's own
        weights: Mapping[str, Tensor] | None = None,  # of the backbone, where what is restored later does not hold them
        seed: int = 0,
        device: torch.device | str = "cpu",
        precision: str = "float32",
    ) -> None:
        self.info, self.strategy, self.classes = info, strategy, list(classes)
        backbone.build(info)
        if weights is not None:
            backbone.load_state_dict(weights)
        self.model = Model(backbone).to(device).eval()
        if info.test_time:  # it came with its head, which some methods adapt
            self.model.head.resize(len(classes))
        self.model.remember()
        self.transforms = backbone.transforms() if transforms is None else transforms
        preparation = Preparation(info, self.transforms)
        self.context = Context(self.model, memory, Events(), preparation, seed=seed, device=device, precision=precision)
        strategy.start(info, self.context)

    @torch.no_grad()
    def answer(self, batch: Batch) -> Prediction:
        """What the strategy says of a raw batch."""
        self.model.eval()
        prepared = self.context.prepare(asked(batch, self.info), train=False)
        with self.context.autocast():
            return self.strategy.predict(prepared)

    def scores(self, inputs: Any) -> Tensor:
        """Scores of raw inputs (tensors, arrays, lists of text) for every class  # (batch, classes)

        A mapping of the stream's modalities, or the one modality bare. Images may be laid out as files of arrays may be: with the
        channels first or last, or without where there is one.
        """
        batch = self.batch(inputs)
        found = [self.answer(batch[start : start + CHUNK]).scores for start in range(0, len(batch), CHUNK)]
        if any(scores is None for scores in found):
            raise DataError("this model answers with something else than scores for classes")
        return torch.cat(found) if found else torch.empty(0, len(self.classes))  # type: ignore[arg-type]

    def paint(self, prompts: Sequence[str], first: int = 0) -> Tensor:
        """A picture for each prompt, from 0 to 1; its number, from `first`, seeds its noise  # (prompts, channels, height, width)"""
        if self.info.target != "image":
            raise DataError(f"this model paints no pictures, it learned {self.info.target}: ask it by predict")
        if isinstance(prompts, str):
            prompts = [prompts]
        self.strategy.check_prompts(prompts)
        batch = Batch({"text": list(prompts)}, None, torch.arange(first, first + len(prompts)))
        found = [self.answer(batch[start : start + CHUNK]).images for start in range(0, len(batch), CHUNK)]
        if not found or any(images is None for images in found):
            raise DataError("this model paints no pictures" if found else "there is no prompt")
        return torch.cat([images for images in found if images is not None])

    def predict(self, inputs: Any) -> list[Any]:
        """The name of each sample's class; a list of names where a sample may have several, or of values where there are no classes; or
        what the model says, where it answers in words."""
        if self.info.target == "text":
            batch = self.batch(inputs)
            found = [self.answer(batch[start : start + CHUNK]).texts for start in range(0, len(batch), CHUNK)]
            return [text for texts in found for text in texts or ()]
        scores = self.scores(inputs)
        if self.info.target == "labels":
            given = Prediction(scores, threshold=self.info.threshold).labels()
            assert isinstance(given, Tensor)
            return [[name for name, there in zip(self.classes, row, strict=True) if there] for row in given.tolist()]
        if self.info.target == "value":
            return scores.squeeze(1).tolist() if scores.shape[1] == 1 else scores.tolist()
        return [self.classes[label] for label in scores.argmax(dim=1).tolist()]

    def batch(self, inputs: Any, present: Mapping[str, Tensor] | None = None) -> Batch:
        """Raw inputs, checked, as a batch of the stream; DataError says what is wrong with them. `present` says which samples have a
        modality, where some have not: what is given for those that lack it is not read."""
        modalities = self.info.modalities
        takes = f"this model takes {described(modalities)}"
        if not isinstance(inputs, Mapping):
            if len(modalities) != 1:
                raise DataError(f"{takes}: give a mapping of them")
            inputs = {next(iter(modalities)): inputs}
        if inputs.keys() != modalities.keys():
            raise DataError(f"{takes}, and was given {', '.join(map(str, inputs)) or 'nothing'}")
        columns = {name: _column(inputs[name], modality, name) for name, modality in modalities.items()}
        counts = {name: len(column) for name, column in columns.items()}
        if len(set(counts.values())) > 1:
            raise DataError(f"the modalities are of different lengths: {', '.join(f'{name} {count}' for name, count in counts.items())}")
        count = next(iter(counts.values()))
        for name, mask in (present or {}).items():
            if name not in modalities or mask.shape != (count,) or mask.dtype != torch.bool:
                raise DataError(f"present must say of each of the {count} samples whether it has a modality ({', '.join(modalities)})")
        batch = Batch(columns, None, torch.arange(count), dict(present) if present else None)
        check_inputs(batch, self.info, "the inputs")
        return batch


def _column(values: Any, modality: Modality, name: str) -> Tensor | list:
    if modality.kind == "text":
        return values.tolist() if isinstance(values, np.ndarray) else list(values) if isinstance(values, tuple) else values
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
            values = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
        except (TypeError, ValueError) as error:
            raise DataError(f"{name} must be {_kind(modality)}, and these are no numbers: {error}") from None
    if values.dim() == 0:
        raise DataError(f"{name} must be {_kind(modality)}, one for each sample, and is a single number")
    if modality.kind == "image":
        values = _channels_first(values, modality.shape)
    return values.float() if modality.high is None else values


def _channels_first(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Images of this shape, channels first, where they could be meant as such."""
    given = tuple(images.shape[1:])
    if given == tuple(shape) or len(shape) != 3:
        return images
    if given == tuple(shape[1:]) and shape[0] == 1:
        return images[:, None]
    return images.permute(0, 3, 1, 2) if given == (*shape[1:], shape[0]) else images


def check_inputs(batch: Batch, info: StreamInfo, where: str, first: int = 0) -> None:
    """Raise DataError unless these raw inputs are what the stream has; `first` is the number of the batch's first sample."""
    for name, modality in info.modalities.items():
        if name not in batch.inputs and info.asks and name not in info.asks:
            continue
        values, must = batch.inputs[name], f"{where}: {name} must be {_kind(modality)}"
        if modality.kind == "text":
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise DataError(f"{must}, a list of it")
            continue
        if not isinstance(values, Tensor):
            raise DataError(f"{must}, and is text")
        if tuple(values.shape[1:]) != modality.shape:
            same = values.dim() == len(modality.shape) + 1
            shape = _times(("n", *values.shape[1:]) if same else values.shape)
            raise DataError(f"{where}: {name} must be {_numbers(modality)}, {_times(('n', *modality.shape))}, and has the shape {shape}")
        if values.is_floating_point() != (modality.high is None):
            raise DataError(f"{must}, and holds {str(values.dtype).removeprefix('torch.')}")
        rows = values.flatten(1) if values.dim() > 1 else values[:, None]
        good = rows.isfinite() if modality.high is None else (rows >= 0) & (rows <= modality.high)
        wrong = ~good.all(dim=1)
        if batch.present is not None and name in batch.present:
            wrong &= batch.present[name]
        if bool(wrong.any()):
            sample = first + int(wrong.nonzero()[0])
            what = "NaN or infinite values" if modality.high is None else f"values outside of 0 to {modality.high:g}"
            raise DataError(f"{where}: {name} of sample {sample} holds {what} ({int(wrong.sum())} such from there)")


def described(modalities: Mapping[str, Modality]) -> str:
    """What a stream's inputs are, in words: image (whole numbers from 0 to 16, 1 x 8 x 8)."""
    return " and ".join(
        name if modality.kind == name == "text" else f"{name} ({_kind(modality, '' if modality.kind == name else modality.kind)})"
        for name, modality in modalities.items()
    )


def _kind(modality: Modality, kind: str = "") -> str:
    if modality.kind == "text":
        return "text"
    return f"{kind + ' of ' if kind else ''}{_numbers(modality)}, {_times(modality.shape)}"


def _numbers(modality: Modality) -> str:
    return "decimal numbers" if modality.high is None else f"whole numbers from 0 to {modality.high:g}"


def _times(shape: Sequence[int | str]) -> str:
    return " x ".join(map(str, shape)) or "one number"


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Making layers draws random numbers, and whoever loads a model has a use of their own for theirs."""
    before = random_state()
    seed_everything(seed)
    try:
        yield
    finally:
        restore_random(before)


def precision_on(device: torch.device, asked: str) -> str:
    """In what a run's model computes on this device: float16 needs a GPU."""
    return "float32" if asked == "float16" and device.type == "cpu" else chosen_precision(asked, device)


def plain_info(info: StreamInfo) -> dict[str, Any]:
    """What is known of a stream, as JSON holds it."""
    return dataclasses.asdict(dataclasses.replace(info, modalities=dict(info.modalities)))


def info_from(plain: Mapping[str, Any]) -> StreamInfo:
    """The reverse of `plain_info`."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}
    fields["modalities"] = {name: Modality(one["kind"], tuple(one["shape"]), one["high"]) for name, one in plain["modalities"].items()}
    return StreamInfo(**fields)
