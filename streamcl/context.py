"""What a strategy is given: the model, the memory, the device, and a way through the data that can stop and go on at any batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamcl.contracts import Memory
from streamcl.errors import ConfigError, PluginError
from streamcl.events import Events
from streamcl.nn.model import Model
from streamcl.preparing import Preparation
from streamcl.seeding import generator
from streamcl.stream import Batch, Dataset, Task

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TICK = 0.5  # seconds between two looks at the clock's business: progress lines, timed checkpoints


def chosen_precision(asked: str, device: torch.device) -> str:
    """What a run computes in: on a CPU, and where a GPU has no bfloat16, in float32 unless it is told otherwise."""
    if asked == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if asked == "float16" and device.type == "cpu":
        raise ConfigError("engine.precision is float16 and the device is a CPU: use bfloat16 or float32 there")
    return asked


class Context:
    """One per run. The engine sets it up and owns `tick`; strategies use the rest.

    `epochs` and `batches` know how far the task has got: on a resumed task they go on where the checkpoint was taken, and a pass
    that was finished yields nothing. So `learn` is simply entered again; what it does outside of a pass is done again and must
    give the same result.
    """

    def __init__(
        self,
        model: Model,
        memory: Memory,
        events: Events,
        preparation: Preparation,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        precision: str = "float32",
        workdir: Path | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.model, self.memory, self.events, self.preparation = model, memory, events, preparation
        self.seed, self.device, self.precision, self.workdir = seed, torch.device(device), precision, workdir
        self.rank, self.world = rank, world
        self.generator = generator(seed, "context")
        self.task: Task | None = None
        self.earlier: list[Task] = []  # for the upper bound that reads everything again; nobody else does
        self.passes: dict[str, list[int]] = {}  # name -> [epoch, step] to go on with, within this task
        self.steps = self.samples = 0
        self.logged: dict[str, Any] = {}
        self.position: dict[str, int | str] = {}
        self.tick: Callable[[], None] = lambda: None
        self.interrupted = False
        self.closes, self.group = True, 1  # whether the batch at hand is the last of those whose gradients accumulate, and of how many
        self.ends = False  # the batch at hand is a live source's last
        self.opened: set[str] = set()  # the passes that were begun since this task was entered
        self.next_tick = 0.0
        self.step_limit: float = float("inf")  # the step at which the engine has business; 0 for at once
        self.unused_parameters = False
        self._accelerator: Accelerator | None = None

    def begin(self, task: Task, passes: Mapping[str, Sequence[int]]) -> None:
        """The task at hand, and how far its passes had got when it was interrupted (nothing, for one that begins)."""
        self.task, self.logged, self.opened = task, {}, set()
        self.passes = {name: list(where) for name, where in passes.items()}

    def epochs(self, count: int, name: str = "train") -> Iterator[int]:
        """The epochs that are left of the pass `name`."""
        self._open(name)
        first = self.passes.setdefault(name, [0, 0])[0]
        self.position = {"pass": name, "epochs": count}
        for epoch in range(first, count):
            yield epoch
            self.passes[name] = [epoch + 1, 0]

    def batches(
        self, data: Dataset, size: int, *, epoch: int | None = None, name: str = "train", shuffle: bool = True, every: int = 1
    ) -> Iterator[Batch]:
        """The batches of one epoch that are left, raw and on the host; the order depends on the seed, the task and the epoch alone.

        With `epoch=None` this is a pass of its own. After each batch (each `every` batches, where gradients accumulate) the run
        may be saved, interrupted or scored.
        """
        alone = epoch is None
        if alone:
            self._open(name)
        epoch = epoch or 0
        at, first = self.passes.setdefault(name, [epoch, 0])
        if at > epoch:
            return
        if at < epoch:
            first = 0
        assert self.task is not None
        where = [epoch, first]
        self.passes[name] = where
        if hasattr(data, "read"):
            length = len(data)
            order = (
                torch.randperm(length, generator=generator(self.seed, "order", self.task.index, name, epoch))
                if shuffle
                else torch.arange(length)
            )
            source, steps = data.read(order[first * size :], size), -(-length // size)
        else:  # a live source cannot be read at an index: what was not yet acknowledged comes again from its own cursor
            source, steps = self._counted(data.batches(size)), 0
        self.position = {**self.position, "pass": name, "epoch": epoch, "steps": steps}
        clock, step = time.monotonic, first
        for batch in source:
            step += 1
            if every > 1:
                begun = (step - 1) // every * every
                self.group = min(every, steps - begun) if steps else every
            self.closes = closes = every == 1 or step % every == 0 or step == steps or self.ends
            yield batch
            self.steps += 1
            self.samples += batch.ids.shape[0]
            where[1] = step
            if closes and (self.steps >= self.step_limit or clock() >= self.next_tick):
                self.save_point()
        if alone:
            self.passes[name] = [1, 0]

    def _open(self, name: str) -> None:
        if name in self.opened:
            raise PluginError(f"the pass {name!r} was gone through already in this task: a second one needs a name of its own (name=...)")
        self.opened.add(name)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of unknown number; `ends` is set with the last one."""
        held = next(batches, None)
        while held is not None:
            following = next(batches, None)
            self.ends = following is None
            yield held
            held = following
        self.ends = False

    def finished(self, name: str, epochs: int) -> bool:
        """Whether the pass was gone through to its end before this task was resumed."""
        return name not in self.opened and self.passes.get(name, [0, 0])[0] >= epochs

    def save_point(self) -> None:
        """A place where the state of everything is consistent: the engine may write a checkpoint, score, or stop here."""
        self.next_tick = time.monotonic() + TICK
        self.tick()

    def prepare(self, batch: Batch, train: bool = True) -> Batch:
        """The batch on the device, as the model takes it."""
        return self.preparation(batch if batch.ids.device == self.device else batch.to(self.device), train, self.generator)

    def shard(self, batch: Batch) -> tuple[Batch, float]:
        """This process's part of a batch that all processes hold, and the weight of its mean in the mean over all."""
        if self.world == 1:
            return batch, 1.0
        count = len(batch)
        mine = torch.arange(self.rank, count, self.world)
        if not len(mine):
            return batch[torch.zeros(1, dtype=torch.int64)], 0.0
        return batch[mine], len(mine) * self.world / count

    def gather(self, values: Tensor, count: int) -> Tensor:
        """Rows of all processes in the order of the batch that `shard` divided, `count` in all."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        largest = -(-count // self.world)
        padded = values.new_zeros(largest, *values.shape[1:])
        mine = len(range(self.rank, count, self.world))
        padded[:mine] = values[:mine]
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def autocast(self) -> AbstractContextManager:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    @property
    def accelerator(self) -> Accelerator:
        """Accelerate's view of the processes, made when it is first needed."""
        if self._accelerator is None:
            from accelerate import Accelerator, DistributedDataParallelKwargs

            unused = DistributedDataParallelKwargs(find_unused_parameters=self.unused_parameters)
            self._accelerator = Accelerator(mixed_precision="no", cpu=self.device.type == "cpu", kwargs_handlers=[unused])
        return self._accelerator

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module so that its gradients are averaged over the processes; itself on one.

        A strategy whose loss leaves trainable parameters out sets `unused_parameters`.
        """
        return module if self.world == 1 else self.accelerator.prepare_model(module)

    def log(self, **figures: Any) -> None:
        """Figures for the next progress event. Tensors are read only then, so logging never waits for the device."""
        self.logged.update(figures)

    @torch.no_grad()
    def embedded(self, raw: Batch) -> tuple[Tensor, Tensor]:
        """Features in float64 of a raw batch by the model as it is, without augmentation, and its targets  # (batch, dim), (batch, ...)

        For statistics that are gathered batch by batch: of several processes each makes its part.
        """
        batch = self.prepare(raw, train=False)
        mine, _ = self.shard(batch)
        with self.autocast():
            features = self.model.features(mine)
        assert batch.target is not None
        return self.gather(features.double(), len(batch)), batch.target

    @torch.no_grad()
    def features(self, data: Dataset | Batch, size: int = 256) -> Tensor:
        """Features of samples by the current model in evaluation mode, without augmentation  # (samples, dim)"""
        parts = [data[s : s + size] for s in range(0, len(data), size)] if isinstance(data, Batch) else data.batches(size)
        with self.model.evaluating(), self.autocast():
            found = [self.model.features(self.prepare(part, train=False)).float() for part in parts]
        return torch.cat(found) if found else torch.empty(0, self.model.backbone.dim, device=self.device)
