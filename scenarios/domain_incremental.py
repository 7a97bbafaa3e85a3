"""Domain-incremental learning: the task stays what it is, and the data's domain changes from task to task.

`by` names a grouping of the source whose groups are the domains: a speaker, an alphabet, a background. Or the domains are made of one
data set's images by `shift`: `permute` puts the pixels of every domain but the first in another order (as Permuted MNIST), `rotate`
turns the images by `angles` (as Rotated MNIST; by default `tasks` angles from 0 to below 180 degrees, bilinear). `share: whole`
gives every such domain all samples, as those benchmarks do, and every copy an id of its own; `share: parts` divides them. Masks go
with their images: permuted alike, or turned to the nearest pixel, where what comes from outside is not annotated. Boxes and whatever
else the source says of places in the original image is left out of a stream of shifts: `extra` keeps what the target needs.

All classes (labels, values, masks) are known from the first task on (`task.labels` are those that occur in its training samples), and
`task.domain` names the domain, by which the report also scores.

`order` is that of the domains: the source's ("given"), the seed's, or a list of names. `task_ids` tells the task with
every batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from streamcl.data import MapDataset, SinglePass, Told, View
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.plugins import near_name
from streamcl.seeding import generator
from streamcl.stream import Batch, Dataset, Modality, Scenario, Source, SourceData, StreamInfo, Task

from ._division import arranged, by_task, held_back, need_test
from ._targets import all_classes, stream_info
from ._views import Picked, needed, only

KIND = "domain_incremental"
UNKNOWN = 255  # in masks: not annotated
CHUNK = 256  # masks that are turned together


class DomainIncremental(Scenario):
    """The same classes in another domain per task: the groups of `by`, or `tasks` shifts of the images."""

    def __init__(
        self,
        *,
        data: Source,
        by: str | None = None,
        shift: Literal["permute", "rotate"] | None = None,
        tasks: PositiveInt | None = None,
        angles: list[float] | None = None,
        share: Literal["whole", "parts"] = "whole",
        modality: str | None = None,
        order: Literal["seed", "given", "alphabetical"] | list[str | int] = "given",
        task_ids: bool = False,
        online: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if (by is None) == (shift is None):
            raise ConfigError(f"{KIND}: give either by (a grouping of the source) or shift (permute or rotate)")
        if by is not None and (tasks or angles or share != "whole" or modality):
            raise ConfigError(f"{KIND}: tasks, angles, share and modality belong to shift; with by the domains are the groups of {by!r}")
        if shift == "permute" and (tasks is None or angles):
            raise ConfigError(f"{KIND}: shift: permute needs tasks, the number of domains, and takes no angles")
        if angles == []:
            raise ConfigError(f"{KIND}: angles is empty: one angle for each domain is needed")
        if shift == "rotate" and (tasks is None) == (angles is None):
            raise ConfigError(f"{KIND}: shift: rotate needs either tasks (equal steps below 180 degrees) or angles")
        if shift is not None and order != "given":
            raise ConfigError(f"{KIND}: order is that of the groups of a source; the domains of a shift come as they are made")
        self.data, self.by, self.shift, self.share, self.modality = data, by, shift, share, modality
        self.order, self.task_ids, self.online = order, task_ids, online
        self.angles = angles if angles is not None else [180.0 * step / (tasks or 1) for step in range(tasks or 0)]

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_test(loaded, KIND)
        assert loaded.test is not None
        self.problems, self._loaded, self._seed = loaded.problems, loaded, seed
        self._train_of: tuple[Tensor, ...]
        self._test_of: tuple[Tensor, ...]
        if self.by is not None:
            self._by_group(loaded, self.by, seed)
        else:
            self._by_shift(loaded, seed)
        self._validation_of: tuple[Tensor, ...] = ()
        if self.validation:
            groups = loaded.train.targets if loaded.target in ("class", "text") else None
            self._train_of, self._validation_of = held_back(self._train_of, groups, self.validation, seed)
        self._names = all_classes(loaded)
        self.info = stream_info(loaded, tasks=len(self), passes=1 if self.online else None, task_ids=self.task_ids)
        return self.info

    def __len__(self) -> int:
        return len(self._domains)

    def task(self, index: int) -> Task:
        train = self._view(self._loaded.train, self._train_of[index], index)
        validation = self._view(self._loaded.train, self._validation_of[index], index) if self.validation else None
        classes = labels = tuple(self._names)
        if self._loaded.target == "class":
            labels = tuple(train.targets.unique().tolist())
        return Task(
            index=index,
            name=f"domain {self._domains[index]}",
            train=SinglePass(train) if self.online else train,
            classes=classes if index == 0 else (),
            seen=classes,
            labels=labels,
            validation=validation,
            names=self._names,
            about={"domain": self._domains[index]},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        assert self._loaded.test is not None
        rows = self._test_of[task.index]
        return self._view(self._loaded.test, rows, task.index) if len(rows) else None

    def files(self) -> list[str]:
        return self.data.files()

    def _by_group(self, loaded: SourceData, by: str, seed: int) -> None:
        if by not in loaded.groupings:
            hint = near_name(by, loaded.groupings) or f": it has {', '.join(loaded.groupings) or 'none'}"
            raise ConfigError(f"{KIND}: by names {by!r}, which is no grouping of this source{hint}")
        grouping = loaded.groupings[by]
        order = arranged(grouping.names, self.order, seed, KIND, "domain")
        place = torch.empty(len(order), dtype=torch.int64)
        place[order] = torch.arange(len(order))
        train = by_task(place[grouping.train], len(order))
        test = by_task(place[grouping.test], len(order)) if grouping.test is not None else tuple(grouping.train[:0] for _ in order)
        used = [index for index, rows in enumerate(train) if len(rows)]
        self._domains = [grouping.names[order[index]] for index in used]
        self._train_of, self._test_of = tuple(train[index] for index in used), tuple(test[index] for index in used)
        if loaded.target == "class" and len(used) > 1:
            occurs = torch.zeros(len(order), len(loaded.class_names), dtype=torch.bool)
            occurs[place[grouping.train], loaded.train.targets] = True
            if int(occurs.sum(0).max()) < 2:
                raise ConfigError(
                    f"{KIND}: no two groups of {by!r} share a class, so every domain would bring classes of its own: that is "
                    "class_incremental (order: given, or classes by group)"
                )
        unused = sum(map(len, test)) - sum(map(len, self._test_of))
        if unused:
            self.problems = {**loaded.problems, f"test samples in a group of {by!r} without training samples": unused}
        if not any(map(len, self._test_of)):
            raise DataError(f"{KIND}: no test sample lies in a group of {by!r} that has training samples")

    def _by_shift(self, loaded: SourceData, seed: int) -> None:
        assert loaded.test is not None
        images = {name: m for name, m in loaded.modalities.items() if m.kind == "image" or (self.shift == "permute" and m.kind == "vector")}
        chosen = self.modality or next(iter(images), None)
        if chosen not in images:
            there = ", ".join(images) or "none that fits"
            raise ConfigError(f"{KIND}: shift: {self.shift} changes images, and the source has {there}: set modality to one of them")
        self._shifted, self._moves_masks = chosen, loaded.target == "mask" and images[chosen].kind == "image"
        size = images[chosen].shape[-2:]
        for masks in (loaded.train.targets, loaded.test.targets) if self._moves_masks else ():
            if masks.shape[1:] != size:
                there, its = (" x ".join(map(str, shape)) for shape in (size, masks.shape[1:]))
                raise ConfigError(
                    f"{KIND}: {chosen} is of {there} pixels and its masks are of {its}: shift moves both alike, so they must be of one size"
                )
        needs = needed(loaded.target)
        self._loaded = replace(loaded, train=only(loaded.train, needs), test=only(loaded.test, needs))
        count = len(self.angles)
        self._stride = int(max(dataset.ids.max() for dataset in (loaded.train, loaded.test))) + 1
        if self.shift == "rotate":
            self._domains = [f"{angle:g} degrees" for angle in self.angles]
        else:
            self._domains = [f"permutation {index}" if index else "as it is" for index in range(count)]
        parts = []
        for dataset, purpose in ((loaded.train, "train"), (loaded.test, "test")):
            everything = torch.arange(len(dataset))
            if self.share == "whole":
                parts.append((everything,) * count)
            else:
                dealt = torch.randperm(len(dataset), generator=generator(seed, "domains", purpose)) % count
                parts.append(by_task(dealt, count))
        self._train_of, self._test_of = parts
        if not all(map(len, self._train_of)):
            raise ConfigError(
                f"{KIND}: {count} domains are asked for and there are {len(loaded.train)} training samples to divide: take fewer"
            )

    def _view(self, dataset: Dataset, rows: Tensor, index: int) -> MapDataset:
        view: MapDataset = Picked(dataset, rows)
        if self.shift is not None:
            modality = self._loaded.modalities[self._shifted]
            first = index * self._stride if self.share == "whole" else 0
            angle = self.angles[index] if self.shift == "rotate" else None
            view = _Shifted(view, self._shifted, first, angle, self._permutation(index, modality), self._moves_masks)
        return Told(view, index) if self.task_ids else view

    def _permutation(self, index: int, modality: Modality) -> Tensor | None:
        if self.shift != "permute" or index == 0:
            return None
        return torch.randperm(math.prod(modality.shape[-2:]), generator=generator(self._seed, "permutation", index))


class _Shifted(View):
    """Samples whose images are turned, or whose pixels stand in another order, their masks with them; ids begin at `first`."""

    def __init__(
        self, dataset: MapDataset, name: str, first: int, angle: float | None, permutation: Tensor | None, moves_masks: bool
    ) -> None:
        super().__init__(dataset)
        self.name, self.first, self.angle, self.permutation, self.moves_masks = name, first, angle, permutation, moves_masks

    def _targets(self) -> Tensor:
        own = super()._targets()
        return torch.cat([self._moved(part) for part in own.split(CHUNK)]) if self.moves_masks and len(own) else own

    def _ids(self) -> Tensor:
        return super()._ids() + self.first

    def _moved(self, masks: Tensor) -> Tensor:
        if self.permutation is not None:
            return permuted(masks, self.permutation)
        return turned_masks(masks, self.angle) if self.angle else masks

    def _finish(self, batch: Batch, indices: Tensor) -> Batch:
        values, target = batch.inputs[self.name], batch.target
        assert isinstance(values, Tensor)
        if self.permutation is not None:
            values = permuted(values, self.permutation)
        elif self.angle:
            values = turned(values, self.angle)
        if self.moves_masks and target is not None:
            target = self._moved(target)
        return batch.replace(inputs={**batch.inputs, self.name: values}, target=target, ids=batch.ids + self.first)


def permuted(values: Tensor, order: Tensor) -> Tensor:
    """Images, masks or vectors (batch, ...) with their pixels in another order, the same in every channel."""
    flat = values.flatten(-2) if values.dim() > 2 else values
    return flat.index_select(-1, order).reshape(values.shape)


def turned(images: Tensor, angle: float) -> Tensor:
    """Images (batch, channels, height, width) turned anticlockwise about their centre, bilinear; what comes from outside is 0."""
    result = _sampled(images.float(), angle, "bilinear")
    return result if images.is_floating_point() else result.round().to(images.dtype)


def turned_masks(masks: Tensor, angle: float) -> Tensor:
    """Masks (batch, height, width) turned alike, to the nearest pixel; what comes from outside is not annotated."""
    return (_sampled(masks[:, None].float() - UNKNOWN, angle, "nearest")[:, 0] + UNKNOWN).round().to(masks.dtype)


def _sampled(images: Tensor, angle: float, mode: str) -> Tensor:
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    theta = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]).expand(len(images), 2, 3)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)
