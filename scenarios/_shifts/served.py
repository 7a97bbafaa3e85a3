"""Samples as a deployed model is served them: corrupted on the way, in blocks of the stream, and with nothing beside their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamcl.corruptions import corrupt
from streamcl.corruptions.corruption import Table
from streamcl.data import View, blanked
from streamcl.errors import DataError
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Dataset, Modality

from .domains import Shift

BLOCK = 64  # positions of the stream that are corrupted together, whatever the size of the batches


@dataclass(frozen=True)
class Corruptor:
    """Corrupts one block: which shift each of its rows has decides by which corruption, and the block's number by which random numbers.

    Each modality has random numbers of its own, so that an image does not depend on whether the sound is corrupted too.
    """

    shifts: Sequence[Shift]
    modalities: Mapping[str, Modality]  # the corrupted ones
    rates: Mapping[str, float]  # of waveforms, samples a second
    table: Table | None
    device: torch.device
    seed: int
    segment: int

    def __call__(self, number: int, block: Batch, which: Tensor | None) -> Batch:
        inputs = dict(block.inputs)
        for name, modality in self.modalities.items():
            values = inputs[name]
            assert isinstance(values, Tensor)
            random = generator(self.seed, "corrupt", self.segment, number, name)
            out = self._modality(values, name, modality, which, random)
            inputs[name] = out if block.present is None else blanked(out, block.present.get(name))
        return Batch(inputs, block.target, block.ids, block.present)

    def _modality(self, values: Tensor, name: str, modality: Modality, which: Tensor | None, random: torch.Generator) -> Tensor:
        if which is None:
            return self._corrupted(values, name, modality, self.shifts[0], random)
        out = values.clone()
        for place in which.unique().tolist():
            rows = (which == place).nonzero().squeeze(1)
            out[rows] = self._corrupted(values[rows], name, modality, self.shifts[place], random)
        return out

    def _corrupted(self, values: Tensor, name: str, modality: Modality, shift: Shift, random: torch.Generator) -> Tensor:
        corruption = shift.corruptions.get(name)
        if corruption is None:
            return values
        assert shift.severity is not None
        sound = modality.kind == "audio"
        scaled = values if values.is_floating_point() else values / _highest(values, name, modality)
        if values.is_floating_point():
            _check_range(values, name, -1.0 if sound else 0.0)
        frames = scaled.flatten(0, 1) if modality.kind == "video" else scaled  # every frame by itself, as Kinetics50-C
        out = corrupt(
            corruption, frames.to(self.device), shift.severity, random, table=self.table or "auto", rate=self.rates.get(name, 16000.0)
        )
        out = out.to(values.device).view(scaled.shape)
        if values.is_floating_point():
            return out
        return out.mul_(_highest(values, name, modality)).round_().to(values.dtype)


def _highest(values: Tensor, name: str, modality: Modality) -> float:
    if modality.high is None:
        raise DataError(f"test_time: {name} holds {values.dtype} and the source does not say which value is the largest (Modality.high)")
    return modality.high


def _check_range(values: Tensor, name: str, low: float) -> None:
    outside = ((values < low) | (values > 1)).flatten(1).any(dim=1)  # a missing value (NaN) is not outside
    if bool(outside.any()):
        bad = values[outside].nan_to_num(0)
        raise DataError(
            f"test_time: {name} holds values from {bad.min():g} to {bad.max():g}, and corruptions are of values from {low:g} to 1: "
            "scale them in the source"
        )


class Served(View):
    """The samples of one segment, corrupted a block at a time; the order of the data set is the order of serving.

    What comes out does not depend on the size of the batches, the order of reading, or the number of workers: a block is always
    corrupted as a whole. The last one is kept, so that reading in order corrupts each block once. Nothing that the source keeps beside
    a sample is handed on, not even its id: ids count the positions, from `first`. `told` (position -> columns) is what is said instead,
    and with it the source's id.
    """

    def __init__(
        self,
        dataset: Dataset,
        corruptor: Corruptor | None,
        which: Tensor | None = None,
        told: Callable[[Tensor], dict[str, Column]] | None = None,
        first: int = 0,
    ) -> None:
        super().__init__(dataset)
        self.workers, self.in_memory = 0, False  # what decodes files reads ahead behind this; corrupting happens here, on the device
        self.corruptor, self.which, self.told, self.first = corruptor, which, told, first
        self._kept: tuple[int, Batch] | None = None

    def _ids(self) -> Tensor:
        return torch.arange(self.first, self.first + len(self))

    def __getitem__(self, indices: Tensor) -> Batch:
        if self.corruptor is None:
            return self._bare(self.dataset[indices], indices)
        blocks = indices.div(BLOCK, rounding_mode="floor").unique().tolist()
        return self._gathered(indices, blocks, self._block)

    def read(self, order: Tensor, size: int) -> Iterator[Batch]:
        parts = order.split(size) if len(order) else ()
        if self.corruptor is None:
            return map(self._bare, self.dataset.read(order, size), parts)
        return self._read_blocks(order, parts, size)

    def _bare(self, batch: Batch, positions: Tensor) -> Batch:
        extra = {**self.told(positions), "source_id": batch.ids} if self.told else {}
        return Batch(batch.inputs, batch.target, positions + self.first, batch.present, None, extra)

    def _rows(self, number: int) -> Tensor:
        return torch.arange(number * BLOCK, min((number + 1) * BLOCK, len(self)))

    def _corrupted(self, number: int, block: Batch) -> Batch:
        assert self.corruptor is not None
        which = None if self.which is None else self.which[number * BLOCK : number * BLOCK + len(block)].long()
        return self.corruptor(number, block, which)

    def _block(self, number: int) -> Batch:
        if self._kept is None or self._kept[0] != number:
            self._kept = number, self._corrupted(number, self.dataset[self._rows(number)])
        return self._kept[1]

    def _read_blocks(self, order: Tensor, parts: Sequence[Tensor], size: int) -> Iterator[Batch]:
        count = -(-len(self) // BLOCK)
        batch = torch.arange(len(order)).div(size, rounding_mode="floor")
        pairs = (batch * count + order.div(BLOCK, rounding_mode="floor")).unique()  # each batch with each of its blocks, in order
        touched = pairs % count
        needed = touched.unique_consecutive()  # the block that the last batch ended with is still at hand
        blocks = _in_blocks(self.dataset, needed, len(self))
        kept: tuple[int, Batch] | None = None

        def following(number: int) -> Batch:
            nonlocal kept
            if kept is None or kept[0] != number:
                kept = number, self._corrupted(number, next(blocks))
            return kept[1]

        each = torch.bincount(pairs.div(count, rounding_mode="floor"), minlength=len(parts)).tolist()
        for positions, numbers in zip(parts, touched.split(each), strict=True):
            yield self._gathered(positions, numbers.tolist(), following)

    def _gathered(self, positions: Tensor, numbers: list[int], block: Callable[[int], Batch]) -> Batch:
        if len(numbers) == 1:
            return self._bare(block(numbers[0])[positions - numbers[0] * BLOCK], positions)
        owner = positions.div(BLOCK, rounding_mode="floor")
        pieces, places = [], []
        for number in numbers:
            mine = (owner == number).nonzero().squeeze(1)
            places.append(mine)
            pieces.append(block(number)[positions[mine] - number * BLOCK])
        if not pieces:
            return self._bare(self.dataset[positions], positions)
        joined, place = Batch.cat(pieces), torch.cat(places)
        in_order = bool((place.diff() > 0).all())
        return self._bare(joined if in_order else joined[place.argsort()], positions)


def _in_blocks(dataset: Dataset, numbers: Tensor, count: int) -> Iterator[Batch]:
    """Whole blocks in this order. What is on disk reads ahead in blocks of one size, so a short block in between is filled up."""
    rows = (numbers[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    if len(numbers) and int(numbers[-1]) == (count - 1) // BLOCK:
        rows = rows[: len(rows) - (BLOCK - 1 - (count - 1) % BLOCK)]
    for number, batch in zip(numbers.tolist(), dataset.read(rows.clamp(max=count - 1), BLOCK), strict=True):
        yield batch[: count - number * BLOCK]
