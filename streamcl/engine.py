"""The loop: learn a task, score it, write a checkpoint, report. Everything that a run needs and no method should know."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy, entropy
from streamcl.checkpoint import Checkpoints, fingerprint, tree_bytes
from streamcl.config import EngineConfig, EvaluateConfig, GuardConfig, OnlineConfig
from streamcl.context import TICK, Context, chosen_precision
from streamcl.contracts import Memory
from streamcl.data import ArrayDataset, Subset
from streamcl.errors import ConfigError, DataError, DiskError, Interrupted, PluginError, StreamclError, TrainingError
from streamcl.evaluation import Evaluation
from streamcl.events import Events, Sink
from streamcl.guard import Guard
from streamcl.nn.backbone import Backbone
from streamcl.nn.model import GrowingHead, Model
from streamcl.online_loop import OnlineLoop
from streamcl.pictures import Gallery
from streamcl.plugins import find, package_folder, shown
from streamcl.preparing import Preparation
from streamcl.processes import Processes
from streamcl.run_folder import RunFolder, environment
from streamcl.seeding import generator, random_state, restore_random, seed_everything
from streamcl.strategy import Strategy, plugin_name
from streamcl.stream import Batch, Dataset, Prediction, Scenario, StreamInfo, Task, asked
from streamcl.writing import DISK_TROUBLE, disk_error

SERVED = 256  # samples between two events about what is served
CHANGED = "has changed since the run last used it"  # of a plug-in in a person's own file


class Engine:
    """One run of a strategy over a scenario. Without a folder nothing is written and the scores are returned.

    >>> scores = Engine(scenario, strategy, backbone).run()
    """

    def __init__(
        self,
        scenario: Scenario,
        strategy: Strategy,
        model: Backbone,
        memory: Memory | None = None,
        *,
        seed: int = 0,
        engine: EngineConfig | None = None,
        evaluate: EvaluateConfig | None = None,
        online: OnlineConfig | None = None,
        log: Sequence[Sink] = (),
        weights: Mapping[str, Tensor] | None = None,
        trained: Callable[[], tuple[Mapping[str, Tensor], Sequence[str]] | None] | None = None,
        folder: RunFolder | None = None,
        name: str = "run",
    ) -> None:
        self.scenario, self.strategy, self.seed, self.folder, self.name = scenario, strategy, seed, folder, name
        self.announced = False
        self.settings, self.evaluate, self.online = engine or EngineConfig(), evaluate or EvaluateConfig(), online or OnlineConfig()
        self.processes = Processes.join(self.settings, strategy)
        self.device = self.processes.device(self.settings.device)
        self.precision = chosen_precision(self.settings.precision, self.device)
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        if self.settings.deterministic and self.device.type == "cuda":  # on a CPU the kernels are deterministic as they are
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        seed_everything(seed)
        scenario.workdir = folder.path / "stream" if folder else None
        scenario.interrupted = lambda: "context" in self.__dict__ and self.context.interrupted
        scenario.tell = self._told_by_stream
        self.info = scenario.open(seed)
        model.build(self.info)
        if weights is not None:  # the backbone's first weights, where it does not start from its own
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                raise ConfigError(
                    f"the model was trained before on data of another form than this stream's ({_form(self.info)}): "
                    f"{' '.join(str(error).split())}. Let model.pretrain.scenario.data, or the run that model.run names, have the same form"
                ) from None
            model.origin = None
        trained_before = weights is not None or model.origin is not None
        self.model = Model(model).to(self.device)
        self.model.trained = trained_before
        if self.processes.world > 1 and self.device.type == "cuda":  # statistics of the whole batch, as on one process
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        elif self.processes.world > 1 and any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            raise ConfigError(
                "this backbone has batch normalisation, whose statistics several processes can share on CUDA only: start one process, "
                "or take a backbone without it"
            )
        if self.info.target == "image" and self.evaluate.future:
            raise ConfigError("evaluate.future scores a model that learned nothing yet, which cannot be asked to paint: leave it out")
        if self.info.test_time:
            self._check_test_time()
            self._take_head(trained() if trained is not None else None)
        self.model.remember()
        if self.settings.compile:
            self.model.backbone.compile()
        self.memory = memory if memory is not None else find("memory", "faiss").load()()
        self.events = Events(log if self.processes.first else ())
        if self.processes.world > 1 and not self.memory.shareable:
            raise ConfigError(
                f"this memory keeps files that several processes cannot share, and {self.processes.world} were started: "
                "set memory.disk=false, or start one"
            )
        self.memory.open(
            seed,
            strategy.selection,
            self.device,
            folder=folder.checkpoints if folder else None,
            log=lambda message: self.events.emit("note", message=message),
        )
        transforms = model.transforms() if scenario.transforms is None else scenario.transforms
        self.context = Context(
            self.model,
            self.memory,
            self.events,
            Preparation(self.info, transforms),
            seed=seed,
            device=self.device,
            precision=self.precision,
            workdir=folder.path if folder else None,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        self.context.tick = self._tick
        self.evaluation = Evaluation(
            self.info,
            tuple(self.evaluate.protocols),
            batch=self.evaluate.batch,
            rank=self.processes.rank,
            world=self.processes.world,
            device=self.device,
            judge=scenario.judge,
        )
        self.gallery = Gallery(folder.path) if folder and self.processes.first else None
        self.checkpoints = Checkpoints(folder.checkpoints, self.settings.checkpoint.keep) if folder else None
        self.tasks: list[Task] = []  # what was emitted so far
        self.forgotten = torch.empty(0, dtype=torch.int64)  # samples that were erased from the run: no task brings them again
        self.before: dict[str, Any] = {}  # the scenario's state before the task at hand
        self.phase = "learn"
        self.scored_at = 0  # samples seen at the last score within a task
        self.resumed_passes: dict[int, dict[str, list[int]]] = {}
        self.seconds = {"learn": 0.0, "evaluate": 0.0, "checkpoint": 0.0, "total": 0.0}
        self.memory_per_task: list[int] = []
        self.first_model_bytes = _tensor_bytes(self.model.backbone)  # and the head's of the first task: what a strategy adds is counted
        self.last_checkpoint = (0, time.monotonic())  # step and time
        self.last_path: Path | None = None
        self.last_progress: tuple[int, float] | None = None  # samples and time; None until a task's first batch is through
        self.stamp = time.monotonic()  # up to when `seconds` are accounted for
        self.revocable = False  # what fails before the next checkpoint is undone by whoever started it, who says how to go on
        self.notes = [f"left out of the data: {count} x {what}" for what, count in scenario.problems.items()]
        self.changed: dict[str, dict[str, Any]] = {}  # the plug-ins that are not what files.json says, and what it is to say
        self._figures: dict[str, list[float]] = {}
        self._measures = type(strategy).measure is not Strategy.measure
        if strategy.targets and self.info.target not in strategy.targets:
            raise ConfigError(
                f"{plugin_name(strategy)} learns {' or '.join(strategy.targets)}, and the target of this stream is {self.info.target}: "
                "take another strategy (streamcl list strategies); streamcl show CONFIG --picture draws the stream in any case"
            )
        if strategy.needs_exemplars:
            _check_exemplars(self.memory, plugin_name(strategy), self.info.classes)
        strategy.start(self.info, self.context)
        self.loop = self._loop()
        self.served: dict[str, float] = {}  # figures of what was served since the last `served` event
        self.late: tuple[Tensor, Tensor] | None = None  # labels that come back after the next batch

    def _loop(self) -> OnlineLoop | None:
        """The loop around a method of test-time adaptation, with what it needs from before any shift."""
        online, strategy = self.online, self.strategy
        asks = online != OnlineConfig(calibrate=online.calibrate)
        if not self.info.test_time or not isinstance(strategy, AdaptingStrategy):
            if asks:
                what = "serves a test-time stream" if not self.info.test_time else "stands around a method of test-time adaptation"
                raise ConfigError(f"online: the online loop {what}, and there is none: leave out online")
            return None
        limits = {} if isinstance(online.guard, bool) else dataclasses.asdict(online.guard)
        guard = Guard(**limits) if isinstance(online.guard, GuardConfig) or online.guard else None
        loop = OnlineLoop(strategy, guard=guard, every=online.every, window=online.window, budget=online.budget)
        refers = type(strategy).refer is not AdaptingStrategy.refer
        wanted = guard is not None or type(strategy).calibrate is not AdaptingStrategy.calibrate or refers
        before = self.scenario.unshifted() if wanted else None
        if before is None or not len(before):
            if online.canary or strategy.needs_references or (strategy.needs_calibration and online.calibrate):
                what = "online.canary" if online.canary else plugin_name(strategy)
                raise ConfigError(f"{what} needs data from before any shift, and this stream has none")
            return loop
        rows = torch.randperm(len(before), generator=generator(self.seed, "unshifted"))
        prepare = self.context.prepare
        if online.canary:
            batches = before.read(rows[: online.canary], 64)
            loop.watch([prepare(asked(raw, self.info).replace(target=raw.target), train=False) for raw in batches])
        if refers:
            labelled = before.read(rows[online.canary :], 256)
            loop.refer([prepare(asked(raw, self.info).replace(target=raw.target), train=False) for raw in labelled])
        if online.calibrate:
            rest = rows[online.canary : online.canary + online.calibrate]
            loop.calibrate([prepare(asked(raw, self.info), train=False) for raw in before.read(rest, 64)])
        return loop

    def _check_test_time(self) -> None:
        if type(self.strategy).adapt is Strategy.adapt:
            raise ConfigError(
                f"this stream serves samples without labels, and {plugin_name(self.strategy)} learns from labels: a test-time strategy is "
                "needed, which adapts to what it serves"
            )
        if self.evaluate.future or self.evaluate.every != "task":
            raise ConfigError("a test-time stream is scored by what it was answered: leave out evaluate.future and evaluate.every")
        if self.processes.world > 1:
            raise ConfigError(f"a test-time stream is served in one order: start one process, not {self.processes.world}")

    def _told_by_stream(self, message: str) -> None:
        if self.announced:
            self.events.emit("note", message=message)
        else:  # nobody listens yet, and a person waits
            print(message, file=sys.stderr, flush=True)

    def _take_head(self, trained: tuple[Mapping[str, Tensor], Sequence[str]] | None) -> None:
        """The classifier of the model that is deployed, whose classes must be those of the stream."""
        if trained is None:
            raise ConfigError(
                "a test-time stream is served by a model that was trained before, and this one is new: give model.pretrain (how to train "
                "it) or model.run (the run that did)"
            )
        tensors, classes = trained
        served = list(self.info.class_names)
        if list(classes) != served:
            raise ConfigError(
                f"the model was trained on {', '.join(classes)} in this order, and the stream has {', '.join(served)}: give both the same "
                "order of classes (scenario.order, and the same seed)"
            )
        self.model.head.resize(len(classes))
        self.model.head.load_state_dict(tensors)

    # -- the loop ---------------------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Go through the stream to its end and return what scores.json holds."""
        restored = bool(resume and self._restore())
        self.processes.any(False)  # nobody writes before all have read
        for sink in self.events.sinks:
            sink.open(self.folder.path if self.folder else Path())
        try:
            with self._signals():
                self._announce(restored)
                self._status("running")
                self._go_through(restored)
                self._save()
                scores = self._scores()
                self._finish(scores)
                return scores
        except KeyboardInterrupt:
            self._stopped("interrupted")
            raise Interrupted(self._stop_message("interrupted")) from None
        except Interrupted:
            self._stopped("interrupted")
            raise
        except Exception as error:
            told = self._told(error)
            self._stopped("failed", told)
            raise told from (error if told is not error else error.__cause__)
        finally:
            self.events.close()

    def _go_through(self, restored: bool) -> None:
        if self.evaluate.future and not restored:
            self._baseline()
        while (task := self._next_task()) is not None:
            if self.phase == "learn":  # else it was stopped while it was scored, and is learned already
                self._learn(task)
                self.phase = "score"
                self._save()  # what was learned is never lost to what goes wrong in scoring
            self._score(task)

    def _next_task(self) -> Task | None:
        self.before = self.scenario.state()
        try:
            task = next(iter(self.scenario), None)
        except Interrupted:  # a live stream was waiting for what comes next
            self.before = self.scenario.state()
            self._save()
            raise Interrupted(self._stop_message("interrupted")) from None
        if task is None:
            return None
        task = self._without_forgotten(task)
        if hasattr(task.train, "__len__") and len(task.train) == 0:
            raise DataError(f"task {task.index + 1} ({task.name}) has no sample to learn from")
        self.context.earlier = [] if self.info.test_time else list(self.tasks)
        self.tasks.append(task)
        return task

    def _without_forgotten(self, task: Task) -> Task:
        parts: dict[str, Any] = {}
        for name in ("train", "validation") if len(self.forgotten) and not self.info.test_time else ():
            data = getattr(task, name)
            if data is not None and hasattr(data, "ids") and bool((gone := torch.isin(data.ids, self.forgotten)).any()):
                parts[name] = Subset(data, (~gone).nonzero().squeeze(1))
        return dataclasses.replace(task, **parts) if parts else task

    def _learn(self, task: Task) -> None:
        context = self.context
        if self.scenario.validation and task.index == 0 and task.validation is None:
            raise ConfigError(
                f"scenario.validation is {self.scenario.validation:g}, and this scenario holds nothing out of its first task: leave it out"
            )
        context.begin(_blind(task) if self.info.test_time else task, self.resumed_passes.pop(task.index, {}))
        self.events.emit(
            "task_started",
            task=task.index,
            name=task.name,
            samples=len(task.train) if hasattr(task.train, "__len__") else None,
            classes=[task.names.get(c, str(c)) for c in task.classes],
            seen=len(task.seen),
        )
        self._set_limits()
        self.last_progress = None  # what comes before a task's first batch, and warms up with it, is not the pace of training
        self._account(None)
        self.memory.begin(task.index)
        if not self.info.test_time:
            self.strategy.learn(task)
        self.memory.end()
        self.model.eval()
        self._account("learn")
        if self.processes.world > 1 and not self.processes.agree(fingerprint(self.memory.state())):
            raise TrainingError(
                f"after {task.name} the {self.processes.world} processes remember different samples: {plugin_name(self.strategy)} must "
                "offer its memory the same samples in the same order on each of them, or run on one process"
            )
        self._check_finite()
        if not self.memory_per_task and isinstance(self.model.head, GrowingHead):
            self.first_model_bytes += _tensor_bytes(self.model.head)
        self.memory_per_task.append(
            self.memory.nbytes() + tree_bytes(self.strategy.state()) + max(0, _tensor_bytes(self.model) - self.first_model_bytes)
        )

    def _score(self, task: Task) -> None:
        self._account(None)
        if self.info.test_time and self.context.task is None:  # stopped while it was served, it is served from its beginning
            self.context.begin(_blind(task), {})
            self.model.eval()
        if self.gallery is not None:
            self.gallery.open(task.names)
        for part in ("test", "validation"):
            columns = self._columns(task, part)
            if columns or part == "test":
                self._figures = {}
                predict, size = (self._adapt, task.about.get("batch")) if self.info.test_time else (self._predict, None)
                fields = self.evaluation.score(task, columns, predict, part=part, between=self._between, batch=size)
                figures = self.processes.means(self._figures) if part == "test" and self._measures else {}
                if figures:
                    self.evaluation.figures(task, figures)
                    self.events.emit("figures", task=task.index, **figures)
                self.events.emit("scored", **fields)
                if fields["warning"]:
                    self.events.warn(fields["warning"])
        if self.gallery is not None:
            self.gallery.close(task.index)
        self._tell_served()
        self._account("evaluate")
        self.before, self.phase = self.scenario.state(), "learn"
        self.context.task = None
        self.events.emit(
            "task_finished",
            task=task.index,
            seconds=dict(self.seconds),
            memory_bytes=self.memory_per_task[-1],
            parameters=sum(p.numel() for p in self.model.parameters()),
        )
        if self.processes.any(self.context.interrupted):
            self._save()
            raise Interrupted(self._stop_message("interrupted"))

    def _account(self, kind: str | None) -> None:
        """The time since the last account was spent on this kind of work; None for what has no name of its own."""
        now = time.monotonic()
        if kind is not None:
            self.seconds[kind] += now - self.stamp
        self.seconds["total"] += now - self.stamp
        self.stamp = now

    def _columns(self, after: Task, part: str) -> list[tuple[Task, Dataset]]:
        tasks = self._every_task() if part == "test" and self.evaluate.future else self.tasks
        if self.info.test_time:  # what was answered as it was served is all that there is to score
            tasks = [after]
        pairs = ((task, self.scenario.test(task, after) if part == "test" else task.validation) for task in tasks)
        return [(task, data) for task, data in pairs if data is not None and len(data)]

    def _every_task(self) -> list[Task]:
        try:
            count = len(self.scenario)
        except TypeError:
            raise ConfigError(
                "evaluate.future needs a stream that knows its tasks in advance; this one does not: set evaluate.future=false"
            ) from None
        return self.tasks + [self.scenario.task(i) for i in range(len(self.tasks), count)]

    def _baseline(self) -> None:
        tasks = self._every_task()
        columns = [(task, data) for task in tasks if (data := self.scenario.test(task, task)) is not None]
        state = random_state()
        head = self.model.head
        head.resize(max(label for task in tasks for label in task.seen) + 1)
        self.evaluation.baseline(columns, lambda batch: Prediction(self._forward(batch)))
        head.resize(0)
        restore_random(state)

    # -- predicting -------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, batch: Batch) -> Tensor:
        self.model.eval()
        return self.model(self.context.prepare(batch, train=False))

    @torch.no_grad()
    def _predict(self, batch: Batch) -> Prediction:
        prepared = self.context.prepare(asked(batch, self.info), train=False)
        with self.context.autocast():
            prediction = self.strategy.predict(prepared)
            if self._measures:
                for name, value in self.strategy.measure(self.context.prepare(batch, train=False)).items():
                    total = self._figures.setdefault(name, [0.0, 0.0])
                    total[0] += float(value) * len(batch)
                    total[1] += len(batch)
        if prediction.images is not None and self.gallery is not None:
            self.gallery.add(batch, prediction.images)
        return prediction

    def _adapt(self, batch: Batch) -> Prediction:
        """What is served of a test-time stream: the samples alone, and what the strategy makes of them."""
        prepared = self.context.prepare(asked(batch, self.info), train=False)
        self.context.samples += len(batch)
        loop = self.loop
        if loop is None:
            with self.context.autocast():
                return self.strategy.adapt(prepared)
        prediction = loop(prepared)
        if self.online.frozen:
            frozen = loop.frozen(prepared).scores
            assert frozen is not None
            prediction.heads["frozen"] = frozen
        self._watch(batch, prediction)
        if self.late is not None:
            loop.feedback(*self.late)
            self.late = None
        if self.online.feedback and batch.target is not None:
            told = torch.rand(len(batch), generator=self.context.generator) < self.online.feedback
            self.late = (batch.ids[told], batch.target[told]) if bool(told.any()) else None
        return prediction

    def _watch(self, batch: Batch, prediction: Prediction) -> None:
        """Figures of what is served, told every 256 samples: for a person who looks on, and for the report."""
        loop, served, scores = self.loop, self.served, prediction.scores
        assert loop is not None
        kind = self.info.target
        if not self.events.sinks or scores is None or kind not in ("class", "value") or batch.target is None:
            return
        target = batch.target.to(scores.device)

        def scored(given: Tensor) -> float:
            """How many are right, or how far they are off, added up."""
            if kind == "class":
                return float((given.argmax(1) == target).sum())
            return float((given - target.view_as(given)).abs().reshape(len(batch), -1).mean(1).sum())

        figures = {"samples": float(len(batch)), "scored": scored(scores)}
        if kind == "class":
            figures["entropy"] = float(entropy(scores).sum())
        if isinstance(frozen := prediction.heads.get("frozen"), Tensor):
            figures["scored_frozen"] = scored(frozen)
        for name, value in figures.items():
            served[name] = served.get(name, 0.0) + value
        if served["samples"] < SERVED:
            return
        assert self.context.task is not None
        self._tell_served()

    def _tell_served(self) -> None:
        served, loop, task = self.served, self.loop, self.context.task
        if not served or loop is None or task is None:
            return
        count, metric = served["samples"], "accuracy" if "entropy" in served else "mae"
        self.events.emit(
            "served",
            task=task.index,
            name=task.name,
            samples=self.context.samples,
            **{
                metric: served["scored"] / count,
                f"{metric}_frozen": served["scored_frozen"] / count if "scored_frozen" in served else None,
            },
            **({"entropy": served["entropy"] / count} if "entropy" in served else {}),
            version=loop.version,
            counts={**loop.strategy.counts, **loop.counts},
        )
        served.clear()

    # -- between two batches ----------------------------------------------------------------------------------------------------

    def _set_limits(self) -> None:
        context, every = self.context, self.settings.checkpoint.every
        limit = math.inf
        if isinstance(every, dict) and "steps" in every:
            limit = self.last_checkpoint[0] + every["steps"]
        if self.processes.world > 1:
            limit = min(limit, context.steps + 10)
            context.next_tick = math.inf
        if isinstance(self.evaluate.every, dict):
            limit = 0  # samples are counted at every step
        context.step_limit = limit

    def _tick(self) -> None:
        context = self.context
        context.interrupted = self.processes.any(context.interrupted)
        now = time.monotonic()
        if self.last_progress is None:
            self.last_progress = (context.samples, now)
        elif now - self.last_progress[1] >= TICK:
            self._progress(now, *self.last_progress)
        if (
            isinstance(self.evaluate.every, dict)
            and context.samples // self.evaluate.every["samples"] > self.scored_at // self.evaluate.every["samples"]
        ):
            self._any_time()
        every = self.settings.checkpoint.every
        if context.interrupted:
            self._save()
            raise Interrupted(self._stop_message("interrupted"))
        if isinstance(every, dict):
            due = (
                context.steps - self.last_checkpoint[0] >= every["steps"]
                if "steps" in every
                else now - self.last_checkpoint[1] >= every["seconds"]
            )
            if due:
                self._save()
        self._set_limits()

    def _progress(self, now: float, samples: int, then: float) -> None:
        """Tell how training gets on; `samples` were through at the time `then`."""
        context = self.context
        figures = {name: float(value) for name, value in context.logged.items()}
        if not math.isfinite(figures.get("loss", 0.0)):
            raise TrainingError(f"the loss is {figures['loss']} at epoch {context.position.get('epoch', 0) + 1}")  # type: ignore[operator]
        name = str(context.position.get("pass", ""))
        epoch, step = context.passes.get(name, [0, 0])
        assert context.task is not None
        self.events.emit(
            "progress",
            task=context.task.index,
            **{"pass": name},
            epoch=epoch,
            epochs=context.position.get("epochs", 1),
            step=step,
            steps=context.position.get("steps", 0),
            global_step=context.steps,
            samples_per_second=(context.samples - samples) / (now - then),
            **figures,
        )
        self.last_progress = (context.samples, now)

    def _any_time(self) -> None:
        context = self.context
        assert context.task is not None
        self._account("learn")
        state, drawn = random_state(), context.generator.get_state()
        with self.model.evaluating():
            accuracy = self.evaluation.any_time(context.samples, context.task, self._columns(context.task, "test"), self._predict)
        restore_random(state)  # looking changes nothing
        context.generator.set_state(drawn)
        self._account("evaluate")
        self.scored_at = context.samples
        self.events.emit("any_time", task=context.task.index, samples=context.samples, accuracy=accuracy)

    def _between(self) -> None:
        """Between two batches of scoring: the checkpoint before it holds all that was learned, so a stop here writes nothing."""
        if self.context.interrupted and self.processes.world == 1:
            raise Interrupted(self._stop_message("interrupted"))

    # -- state ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        context = self.context
        return {
            "phase": self.phase,
            "task": context.task.index if context.task is not None else None,
            "passes": {name: list(where) for name, where in context.passes.items()} if context.task is not None else {},
            "steps": context.steps,
            "samples": context.samples,
            "scored_at": self.scored_at,
            "classes": self._class_names(),
            "generator": context.generator.get_state(),
            "scenario": self.before,
            "strategy": self.strategy.state(),
            "loop": None if self.loop is None else self.loop.state(),
            **({} if self.late is None else {"late": list(self.late)}),
            "model": self.model.state(),
            "memory": self.memory.state(),
            "evaluation": self.evaluation.state(),
            "random": random_state(),
            "seconds": dict(self.seconds),
            "memory_per_task": list(self.memory_per_task),
            "first_model_bytes": self.first_model_bytes,
            **({"forgotten": self.forgotten} if len(self.forgotten) else {}),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what `state` returned, on an engine that was built from the same settings."""
        context = self.context
        self.scenario.restore(state["scenario"])
        self.forgotten = state.get("forgotten", self.forgotten)
        self.tasks = [self._without_forgotten(task) for task in self.scenario.past()]
        self.strategy.restore(state["strategy"])
        self.model.restore(state["model"])
        self.model.to(self.device)
        if self.loop is not None and state.get("loop") is not None:
            self.loop.restore(state["loop"])
            self.late = tuple(state["late"]) if "late" in state else None
        self.memory.restore(state["memory"])
        self.evaluation.restore(state["evaluation"])
        context.steps, context.samples, self.scored_at = state["steps"], state["samples"], state["scored_at"]
        self.seconds.update(state["seconds"])
        self.memory_per_task, self.first_model_bytes = state["memory_per_task"], state["first_model_bytes"]
        self.phase = state["phase"]
        context.generator.set_state(state["generator"])
        if state["task"] is not None:  # inside a task: it is emitted again, and the passes know how far they got
            self.resumed_passes[state["task"]] = state["passes"]
        self.last_checkpoint = (context.steps, time.monotonic())
        restore_random(state["random"])

    def _class_names(self) -> list[str]:
        """The classes that have arrived, in that order: with them a checkpoint can be used without its stream."""
        last = self.tasks[-1] if self.tasks else None
        return [] if last is None else [last.names.get(label, str(label)) for label in sorted(last.seen)]

    def _restore(self) -> bool:
        assert self.checkpoints is not None, "a run without a folder cannot be resumed"
        warnings: list[str] = []
        state = self.checkpoints.load(warnings.append)
        self.notes += warnings
        if state is None:
            return False
        self.last_path = self.checkpoints.path(self.checkpoints.numbers()[-1 - len(warnings)])
        try:
            self.restore(state)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"the checkpoint {self.last_path} does not fit the code that is to go on with it ({error}): put back the code that wrote "
                "it, or start a new run"
            ) from error
        return True

    def _save(self) -> None:
        self._check_finite()
        self.last_checkpoint = (self.context.steps, time.monotonic())  # on every process: they must agree on when the next one is due
        if self.checkpoints is None or not self.processes.first:
            return
        self._account("learn" if self.phase == "learn" and self.context.task is not None else None)
        path = self.checkpoints.save(self.state())
        self.last_path, self.revocable, before = path, False, self.stamp
        self._account("checkpoint")
        self._status("running")
        task = self.tasks[-1].index if self.tasks else None
        self.events.emit("checkpoint", task=task, path=str(path), bytes=self.checkpoints.bytes, seconds=self.stamp - before)

    def _check_finite(self) -> None:
        """A checkpoint never holds weights that are not finite."""
        bad = [name for name, value in self.model.named_parameters() if not bool(torch.isfinite(value).all())]
        if bad:
            raise TrainingError(f"the weights are not finite any more ({bad[0]}{', ...' if len(bad) > 1 else ''})")

    # -- the record -------------------------------------------------------------------------------------------------------------

    def _announce(self, resumed: bool) -> None:
        self.events.emit(
            "run_started",
            name=self.name,
            directory=str(self.folder.path) if self.folder else None,
            seed=self.seed,
            device=str(self.device),
            precision=self.precision,
            tasks=self.info.tasks,
            parameters=sum(p.numel() for p in self.model.parameters()),
            resumed=resumed,
            strategy=plugin_name(self.strategy),
            scenario=plugin_name(getattr(self.scenario, "first", self.scenario)),  # of a run that was fed, what it began with
        )
        self.announced = True
        told = [f"{shown(Path(name))} {CHANGED}: what comes is learned by another method than what was" for name in self.changed]
        for message in [*self.notes, *(told if resumed else ())]:
            self.events.warn(message)
        if self.folder and self.processes.first:
            self.folder.write("environment.json", environment(self.seed, str(self.device)))
            if self.changed:
                begun: dict[str, Any] = {} if resumed else {"before": []}  # where nothing was saved, all is learned by the changed one
                self.folder.write("files.json", {**self.folder.files(), **{name: file | begun for name, file in self.changed.items()}})

    def _scores(self) -> dict[str, Any]:
        self._account(None)
        parameters = list(self.model.parameters())
        return {
            **self.evaluation.scores(),
            "memory_bytes": self.memory_per_task[-1] if self.memory_per_task else 0,
            "memory_per_task": self.memory_per_task,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "seconds": dict(self.seconds),
            "samples_seen": self.context.samples,
            "resume": self._promise(),
        }

    def _promise(self) -> dict[str, str]:
        """How far a run with these settings that is stopped and resumed has the scores of this one."""
        files = self.folder.files() if self.folder else {}
        changed = [Path(name).name for name, file in files.items() if file.get("before")]
        if changed:
            return {"kind": "none", "why": f"{', '.join(changed)} changed while the run was under way"}
        # Claimed where it is tested. On CUDA the kernels are deterministic as well (engine.deterministic), and no test has shown it yet.
        exact = self.device.type == "cpu" and self.precision == "float32" and self.processes.world == 1
        several = "" if self.processes.world == 1 else f", {self.processes.world} processes: sums are ordered by the network"
        return {"kind": "bitwise" if exact else "statistical", "why": f"{self.precision} on {self.device.type}{several}"}

    def _finish(self, scores: dict[str, Any]) -> None:
        report = None
        if self.folder and self.processes.first:
            self.folder.write("scores.json", scores)
            self._status("done")
            report = str(self.folder.path / "report.html")
        self.events.emit("run_finished", status="done", scores=scores, report=report)

    def _status(self, status: str, **more: Any) -> None:
        if self.folder and self.processes.first:
            task = self.context.task
            self.folder.set_status(
                status,
                cursor={"tasks_done": len(self.memory_per_task), "task": task.index if task else None, "step": self.context.steps},
                **more,
            )

    def _stopped(self, status: str, error: BaseException | None = None) -> None:
        try:
            self._status(status, **({"error": str(error).partition("\n")[0]} if error else {}))
            self.events.emit("run_finished", status=status, scores=None, report=None)
        except (DiskError, OSError):
            return  # the error that stopped the run is the one to tell; the last checkpoint is whole

    def _told(self, error: Exception) -> StreamclError:
        """An error as the person is told it: with where the run stopped, and how it goes on."""
        if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
            error = disk_error(error, Path(error.filename or (self.folder.path if self.folder else "")))
        stand = f"{self._where()}{self._how_on(error)}"
        if not isinstance(error, StreamclError):
            return _from_plugin(error, stand)
        error.args = (f"{error} {stand}",)
        return error

    def _where(self) -> str:
        task = self.context.task
        return f"(task {task.index + 1}, {task.name}, step {self.context.steps})" if task else "(between tasks)"

    def _how_on(self, error: Exception) -> str:
        """How a run that failed goes on, as the end of a message."""
        if self.folder is None or self.revocable:
            return ""
        saved = "there is no checkpoint yet" if self.last_path is None else f"the last good checkpoint is {self.last_path}"
        where = f" in {self.folder.path / 'config.yaml'}" if isinstance(error, ConfigError) else ""
        return f"; {saved}; after the fix{where}: streamcl resume {self.folder.path}"

    def _stop_message(self, what: str) -> str:
        return f"{what} {self._where()}; go on with: streamcl resume {self.folder.path}" if self.folder else f"{what} {self._where()}"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops at the next batch, with everything saved; a second Ctrl-C at once."""
        if threading.current_thread() is not threading.main_thread() or self.folder is None:
            yield
            return
        before: dict[signal.Signals, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            if self.context.interrupted and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.context.interrupted = True
            if self.processes.world == 1:  # several look together, at a step that they all know
                self.context.step_limit = 0

        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _form(info: StreamInfo) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, m.shape)) or m.kind}" for name, m in info.modalities.items())


def _blind(task: Task) -> Task:
    """What a strategy may know of a segment that is served to it: its number, and how many samples come at once."""
    nothing = ArrayDataset({}, torch.empty(0, dtype=torch.int64))
    about = {"batch": task.about["batch"]} if "batch" in task.about else {}
    return Task(task.index, f"segment {task.index + 1}", nothing, (), task.seen, (), names=task.names, about=about)


def _tensor_bytes(module: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in module.state_dict().values())


def _check_exemplars(memory: Memory, strategy: str, classes: int | None) -> None:
    exemplars = memory.exemplars
    few = not exemplars.streaming and exemplars.unit == "samples" and classes is not None and 0 < exemplars.budget < classes
    if few:
        raise ConfigError(f"memory.exemplars is {exemplars.budget}, less than one sample for each of the {classes} classes that will come")
    if exemplars.store in ("none", "features"):
        raise ConfigError(f"{strategy} needs raw exemplars and memory.store is {exemplars.store}: set it to raw")
    if exemplars.budget == 0:
        raise ConfigError(f"{strategy} needs exemplars and memory.exemplars is 0: set it to 200, say")


def _from_plugin(error: Exception, where: str) -> StreamclError:
    """An error of somebody's code: the message shows the lines outside of streamcl and torch, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [Path(__file__).resolve().parent, *(package_folder(f"streamcl.{room}") for room in ("scenarios", "strategies", "memory"))]
    theirs = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename
        and not frame.filename.startswith("<")
        and not any(folder in Path(frame.filename).parents for folder in own)
    ]
    if not theirs:
        return PluginError(f"{type(error).__name__}: {error} {where}")
    lines = [f"  {f.filename}:{f.lineno} in {f.name}: {f.line}" for f in theirs]
    problem = PluginError("\n".join([f"{type(error).__name__}: {error} {where}", *lines]))
    problem.exit_code = 2
    return problem
