"""What learns: the verbs of a strategy, the training loop written once, and the terms that any gradient strategy can carry."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.data import ArrayDataset, Joined
from streamcl.errors import ConfigError, PluginError, TrainingError
from streamcl.nn.losses import CRITERIA
from streamcl.options import NonNegativeInt, Optimizer, PositiveFloat, PositiveInt, Schedule, Stage, Stages
from streamcl.plugins import shown
from streamcl.stream import Batch, Dataset, Prediction, StreamInfo, Task


class Strategy(ABC):
    """A plug-in that learns from tasks, one after another. Its options are its constructor's keyword arguments.

    `start` is called once, `learn` for every task (a session), `predict` at any time. `state` holds tensors and JSON values only;
    `restore` is called after `start` and before the model's own weights are put back, so it must rebuild what it added to the
    model. On a resumed task `learn` is entered again: see `Context.batches`.
    """

    selection: ClassVar[str | None] = None  # the policy by which it likes its exemplars kept, unless the YAML names one
    processes: ClassVar[bool] = False  # it has shown that several processes give the result of one
    needs_exemplars: bool = False  # it cannot run with an empty memory
    targets: ClassVar[tuple[str, ...]] = ()  # the kinds of target that it learns (class, labels, value, mask, text, image); () for any
    predicts_with: ClassVar[
        tuple[str, ...]
    ] = ()  # attributes (tensors, never samples) that `predict` needs beside the model and the memory

    def start(self, info: StreamInfo, context: Context) -> None:
        self.info, self.context = info, context
        self.model, self.memory = context.model, context.memory

    @abstractmethod
    def learn(self, task: Task) -> None: ...

    def check(self, task: Task) -> None:
        """Raise ConfigError for a task that was fed and cannot be learned, before anything of it is recorded."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ConfigError for a prompt that a model which paints would read as something else than what it says."""

    def predict(self, batch: Batch) -> Prediction:
        """Scores of a prepared batch for the classes seen so far. The model is in evaluation mode and gradients are off."""
        return Prediction(self.model(batch), threshold=self.info.threshold if self.info.target == "labels" else None)

    def adapt(self, batch: Batch) -> Prediction:
        """Predict, and learn from what is served."""
        raise ConfigError(f"{type(self).__name__} does not adapt to what it serves: a test-time stream needs a test-time strategy")

    def measure(self, batch: Batch) -> dict[str, float]:
        """Further figures of a prepared test batch, averaged over the test set."""
        return {}

    def erase(self, samples: Batch) -> Iterable[str]:
        """Take samples, raw as the stream had them and gone from the memory already, back out of what was computed from them.

        The names of what is then as if they had never come: "prototypes", "analytic", or a key of `state`. Exactly, or not at all.
        """
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The reverse of `state`; nothing to do where there is none."""
        if state:
            raise ValueError(f"{type(self).__name__} saved a state and does not restore it: {sorted(state)}")


class Term:
    """A plug-in that any gradient strategy carries under `with`: a loss, a regulariser, or a modulator of gradients.

    Its hooks run when the strategy's of the same name do.
    It overrides the hooks that it needs. `loss` adds to the strategy's; `strategy.logits` and `strategy.features` hold what the
    model gave for the batch, so a term needs no forward pass of its own, and `strategy.own_loss` the loss that it adds to. A term that
    sets `criterion` replaces the strategy's.

    Where the YAML names a term as the strategy itself, fine-tuning carries it, with the options of `alone` (a literal) that are not given.
    """

    alone: ClassVar[Mapping[str, Any]] = {}
    reads_again: str = ""  # as for a strategy
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None

    def start(self, strategy: GradientStrategy) -> None:
        self.strategy = strategy

    def enter_task(self, task: Task) -> None: ...

    def before_task(self, task: Task) -> None: ...

    def loss(self, batch: Batch) -> Tensor | None: ...

    def after_backward(self, batch: Batch) -> None: ...

    def after_step(self, batch: Batch) -> None: ...

    def after_task(self, task: Task) -> None: ...

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} saved a state and does not restore it: {sorted(state)}")


class GradientStrategy(Strategy):
    """The training loop. A method fills in `loss`, and any of `enter_task`, `before_task`, `training_data`, `train`, `compose`,
    `after_backward`, `after_step`, `after_epoch`, `after_task`, `parameter_groups`, `training_mode`.

    On a resumed task a hook that had finished is not run again. So what `before_task` makes belongs in `state`; what only follows
    from the task belongs in `enter_task`. A hook that goes through data by a pass of its own (`fit`, `Context.batches`, each with a
    name of its own) is entered again when it was stopped in that pass, and its finished passes yield nothing.

    With `replay` above 0, that many exemplars join every batch, and the memory is filled with what the stream brings: as it passes
    in a task's first epoch, or after the task where the selection policy ranks whole classes. A method that fills its memory itself
    says so in `fills_memory`.

    The optimiser is made anew for each task, as the literature does. A batch goes: raw from the stream -> `compose` (replay joins
    it) -> device and transforms -> `loss`. With several processes all see the same raw batch and each takes its part of the loss.
    """

    fills_memory: ClassVar[bool] = False
    reads_again: str = ""  # what it goes through once more, and what for ("a task again to choose exemplars"): no stream that is read once
    targets: ClassVar[tuple[str, ...]] = ("class", "labels", "value", "mask")

    def __init__(
        self,
        *,
        epochs: PositiveInt = 1,
        batch: PositiveInt = 32,
        optimizer: Optimizer = Optimizer(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
        accumulate: PositiveInt = 1,
        clip: PositiveFloat | None = None,
        replay: NonNegativeInt = 0,
        patience: PositiveInt | None = None,
        stages: Stages = Stages(),  # noqa: B008
        with_: tuple[Term, ...] = (),
    ) -> None:
        self.epochs, self.batch, self.accumulate, self.clip = epochs, batch, accumulate, clip
        self.optimizer_settings, self.schedule = Optimizer.model_validate(optimizer), Schedule.model_validate(schedule)
        self.replay, self.patience, self.stages, self.terms = replay, patience, Stages.model_validate(stages), list(with_)
        self.needs_exemplars = self.needs_exemplars or replay > 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.epoch = 0
        self.logits: Tensor | None = None
        self.features: Tensor | None = None
        self.own_loss: Tensor | None = None  # the method's loss of the batch, with its graph, while its terms add theirs
        self.begun, self.hooks_done = -1, 0  # the task at hand, and how many of its hooks have run
        self.saved: dict[str, Any] = {}  # of an interrupted pass: its name, the optimiser, the best weights so far

    # -- what methods fill in ---------------------------------------------------------------------------------------------------

    def enter_task(self, task: Task) -> None:
        """Called whenever a task is entered, also when it is resumed, before everything else."""

    def before_task(self, task: Task) -> None:
        """Called once for a task. The head has its rows for the new classes; nothing was trained on them yet."""

    def training_data(self, task: Task) -> Dataset:
        """What one epoch goes through."""
        return task.train

    def compose(self, batch: Batch) -> Batch:
        """The raw batch that is trained on: by default the stream's, with `replay` exemplars appended."""
        exemplars = self.memory.exemplars
        if self.replay == 0 or len(exemplars) == 0:
            return batch
        return exemplars.join(batch, self.replay, self.context.generator)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss of a prepared batch."""
        return self.criterion(self.forward(batch), batch.target)

    def after_backward(self, batch: Batch) -> None:
        """Gradients are there and not yet clipped."""

    def after_step(self, batch: Batch) -> None:
        """`batch` is the stream's own raw batch, without replay."""

    def after_epoch(self, epoch: int) -> None:
        """An epoch is over."""

    def after_task(self, task: Task) -> None:
        """Training is over; the model is in evaluation mode."""

    def parameter_groups(self) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
        return [p for p in self.model.parameters() if p.requires_grad]

    # -- the loop ---------------------------------------------------------------------------------------------------------------

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        longest = max(self.epochs, self.stages.first.epochs or 0, self.stages.later.epochs or 0)
        if info.passes is not None and longest > info.passes:
            raise ConfigError(
                f"strategy.epochs is {longest} and the stream can be read {info.passes} time(s): set strategy.epochs={info.passes}"
            )
        carried: list[GradientStrategy | Term] = [self, *self.terms]
        for plugin in carried:
            if info.passes is not None and plugin.reads_again:
                raise ConfigError(
                    f"{plugin_name(plugin)} reads {plugin.reads_again}, and this stream can be read once: set scenario.online=false"
                )
        for term in self.terms:
            term.start(self)
        usual = CRITERIA[info.target]
        self.criterion: Callable[..., Tensor] = next((t.criterion for t in self.terms if t.criterion), usual)
        overriding = {
            hook: [getattr(t, hook) for t in self.terms if _overrides(t, Term, hook)] for hook in ("loss", "after_backward", "after_step")
        }
        self._term_losses, self._term_backward, self._term_steps = overriding.values()
        self._hears_backward = _overrides(self, GradientStrategy, "after_backward") or bool(self._term_backward)
        self._hears_steps = _overrides(self, GradientStrategy, "after_step") or bool(self._term_steps)
        self.scaler = torch.amp.GradScaler(context.device.type) if context.precision == "float16" else None

    def learn(self, task: Task) -> None:
        if self.begun != task.index:
            self.begun, self.hooks_done = task.index, 0
        self.enter_task(task)
        for term in self.terms:
            term.enter_task(task)
        before, after = [term.before_task for term in self.terms], [term.after_task for term in self.terms]
        for number, hook in enumerate([self._grow, *before, self.before_task, self.train, self.after_task, *after]):
            if number >= self.hooks_done:
                hook(task)
                self.hooks_done = number + 1

    def _grow(self, task: Task) -> None:
        self.model.grow(max(task.seen) + 1)

    def train(self, task: Task) -> None:
        """Training itself: `training_data` is gone through, and a memory that ranks whole classes is filled."""
        self.fit(task, self.training_data(task), self.stages.first if task.index == 0 else self.stages.later)
        self.model.eval()
        exemplars = self.memory.exemplars
        if self.replay and not self.fills_memory and not exemplars.streaming:
            self.keep(self.candidates(task))

    def candidates(self, task: Task) -> Dataset:
        """What exemplars of a task's classes are chosen from once it is learned: its samples, and those held of classes that came back."""
        exemplars = self.memory.exemplars
        held = [exemplars.of(label) for label in task.labels if label in exemplars.classes()]
        held = [b[(~torch.isin(b.ids, task.train.ids)).nonzero().squeeze(1)] for b in held]
        again = [ArrayDataset(b.inputs, b.target, b.ids, b.present, b.extra) for b in held if len(b) and b.target is not None]
        return Joined([task.train, *again]) if again else task.train

    def keep(self, samples: Dataset) -> None:
        """Offer samples to a memory that ranks whole classes, with what its policy goes by: features, logits, or the loss of each."""
        exemplars, features = self.memory.exemplars, self.context.features(samples)
        scores = None
        if {"logits", "scores"} & set(exemplars.needs):
            with torch.no_grad():
                scores = torch.cat([self.model.head(part).float() for part in features.split(4096)])
        if scores is not None and "logits" not in exemplars.needs:
            scores = cross_entropy(scores, samples.targets.to(scores.device), reduction="none")
        exemplars.add(samples, features=features, scores=scores)

    def training_mode(self) -> None:
        """What is in training mode while an epoch runs: everything, unless a method keeps parts as they are."""
        self.model.train()

    def fit(
        self,
        task: Task,
        data: Dataset,
        stage: Stage = Stage(),  # noqa: B008
        name: str = "train",
        parameters: Iterable[nn.Parameter] | list[dict[str, Any]] | None = None,
    ) -> None:
        """Train `parameters` (those of `parameter_groups`) on `data`. A second pass within a task has a name of its own."""
        context, model = self.context, self.model
        epochs, size = stage.epochs or self.epochs, stage.batch or self.batch
        if context.finished(name, epochs):
            return
        if self.patience is not None and task.validation is None:
            raise ConfigError("strategy.patience watches the validation part of a task, and there is none: set scenario.validation=0.1")
        settings, schedule = stage.optimizer or self.optimizer_settings, stage.schedule or self.schedule
        optimizer = self.optimizer = make_optimizer(self.parameter_groups() if parameters is None else parameters, settings)
        rates = [group["lr"] for group in optimizer.param_groups]
        best = Best(self.patience)
        if self.saved.get("pass") == name:
            optimizer.load_state_dict(self.saved["optimizer"])
            best.restore(self.saved["best"])
            self.saved = {}
        self._best, self._pass = best, name
        averaged = context.wrap(_Objective(self)) if context.world > 1 else None
        model.zero_grad(set_to_none=True)  # of parameters that another pass did not clear
        for epoch in context.epochs(epochs, name):
            self.epoch = epoch
            if best.stopped:
                continue
            self.training_mode()
            factor = learning_rate_factor(schedule, epoch, epochs)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            self._epoch(data, size, epoch, name, optimizer, averaged)
            self.after_epoch(epoch)
            if self.patience is not None and task.validation is not None:
                best.offer(self.validate(task.validation), model)
        best.put_back(model)
        model.zero_grad(set_to_none=True)
        self.optimizer = None
        self.logits = self.features = None

    def _epoch(self, data: Dataset, size: int, epoch: int, name: str, optimizer: torch.optim.Optimizer, averaged: nn.Module | None) -> None:
        context, accumulate, scaler = self.context, self.accumulate, self.scaler
        logged = context.logged
        on_cpu, plain = context.device.type == "cpu", context.precision == "float32"
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        objective = self.total_loss if self._term_losses else self.loss
        compose, prepare, clip = self.compose, context.prepare, self.clip
        hears_backward, hears_steps = self._hears_backward, self._hears_steps
        exemplars = self.memory.exemplars
        offers = self.replay > 0 and not self.fills_memory and exemplars.streaming and epoch == 0 and name == "train"
        for raw in context.batches(data, size, epoch=epoch, name=name, every=accumulate):
            batch = prepare(compose(raw))
            if averaged is not None:
                mine, weight = context.shard(batch)
                with context.autocast():
                    loss = averaged(mine) * weight
            elif plain:
                loss = objective(batch)
            else:
                with context.autocast():
                    loss = objective(batch)
            if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
                raise no_loss(self, loss)
            scaled = loss / context.group if accumulate > 1 else loss
            if scaler is not None:
                scaled = scaler.scale(scaled)
            scaled.backward()
            if context.closes:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                if hears_backward:
                    self.after_backward(batch)
                    for hook in self._term_backward:
                        hook(batch)
                if clip:
                    nn.utils.clip_grad_norm_(parameters, clip)
                if scaler is not None:
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    optimizer.step()
                for parameter in parameters:  # what zero_grad does, at a tenth of its cost on a small model
                    parameter.grad = None
            if offers:
                exemplars.add(raw, features=self.context.features(raw) if "features" in exemplars.needs else None)
            if hears_steps:
                self.after_step(raw)
                for hook in self._term_steps:
                    hook(raw)
            if on_cpu:
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(f"the loss is {value} at epoch {epoch + 1}")
                logged["loss"] = value
            else:  # read when it is shown, so that the device is never waited for
                logged["loss"] = loss.detach()
            del loss, scaled  # the graph goes before the next one is made, so that its memory is used again
            self.logits = self.features = self.own_loss = None
        logged["lr"] = optimizer.param_groups[0]["lr"]

    def total_loss(self, batch: Batch) -> Tensor:
        """The method's loss and those of its terms."""
        loss = self.loss(batch)
        if not isinstance(loss, Tensor):
            raise no_loss(self, loss)
        self.own_loss = loss
        for term_loss in self._term_losses:
            more = term_loss(batch)
            if more is not None:
                loss = loss + more
        return loss

    def forward(self, batch: Batch) -> Tensor:
        """Logits, kept with the features for the terms."""
        features = self.features = self.model.features(batch)
        logits = self.logits = self.model.head(features)
        return logits

    @torch.no_grad()
    def validate(self, data: Dataset) -> float:
        """What early stopping watches, higher is better: the accuracy of the logits, or minus the mean loss where there are no classes."""
        right = 0.0
        with self.model.evaluating(), self.context.autocast():
            for raw in data.batches(512):
                batch = self.context.prepare(raw, train=False)
                answer, target = self.forward(batch), batch.target
                assert target is not None
                if self.info.target == "class":
                    right += int((answer.argmax(dim=1) == target).sum())
                else:
                    right -= float(self.criterion(answer, target)) * len(batch)
        return right / max(1, len(data))

    # -- state ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        training = {}
        if self.optimizer is not None:
            training = {"pass": self._pass, "optimizer": self.optimizer.state_dict(), "best": self._best.state()}
        return {
            "begun": self.begun,
            "hooks_done": self.hooks_done,
            "training": training,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "terms": [term.state() for term in self.terms],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.begun, self.hooks_done, self.saved = int(state["begun"]), int(state["hooks_done"]), dict(state["training"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        for term, saved in zip(self.terms, state["terms"], strict=True):
            term.restore(saved)


class _Objective(nn.Module):
    """The strategy's whole loss as a module, so that gradients are averaged whatever parts of the model it calls."""

    def __init__(self, strategy: GradientStrategy) -> None:
        super().__init__()
        self.model = strategy.model
        self.total_loss = strategy.total_loss

    def forward(self, batch: Batch) -> Tensor:
        return self.total_loss(batch)


class Best:
    """Early stopping: the weights of the epoch with the best validation accuracy, and how long ago that was."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.accuracy, self.waited = patience, -math.inf, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def stopped(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    def offer(self, accuracy: float, model: nn.Module) -> None:
        if accuracy > self.accuracy:
            self.accuracy, self.waited = accuracy, 0
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        else:
            self.waited += 1

    def put_back(self, model: nn.Module) -> None:
        if self.weights:
            model.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        accuracy = self.accuracy if math.isfinite(self.accuracy) else None
        return {"accuracy": accuracy, "waited": self.waited, "weights": self.weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.accuracy = -math.inf if state["accuracy"] is None else float(state["accuracy"])
        self.waited, self.weights = int(state["waited"]), dict(state["weights"])


def plugin_name(plugin: object) -> str:
    """What a person calls it: the name in the YAML, or the class where the file is their own."""
    kind = type(plugin)
    return kind.__module__.rsplit(".", 1)[-1] if kind.__module__.startswith("streamcl.") else kind.__name__


def no_loss(strategy: GradientStrategy, returned: Any) -> PluginError:
    """The error for a `loss` that gave nothing to train with; a backward pass would fail in lines that its author did not write."""
    method = inspect.unwrap(type(strategy).loss)
    what = f"a {type(returned).__name__}"
    if returned is None:
        what = "None"
    elif isinstance(returned, Tensor):
        shape = f"a tensor of shape {tuple(returned.shape)}"
        what = shape if returned.numel() != 1 else "a tensor without a graph (detached, or computed under no_grad)"
    where = f"{shown(Path(method.__code__.co_filename))}:{method.__code__.co_firstlineno}: {type(strategy).__name__}"
    error = PluginError(f"{where}.loss returned {what}: it must return the mean loss of the batch, one number with the graph that made it")
    if not method.__module__.startswith("streamcl."):
        error.exit_code = ConfigError.exit_code  # the person named this file, so the mistake is in what they gave
    return error


class PlainSGD(torch.optim.SGD):
    """SGD without momentum and decay on a CPU: torch's update, without the Python that its own step puts around four small tensors."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = -group["lr"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=rate)

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps every other step for its profiler


def make_optimizer(groups: Any, settings: Optimizer) -> torch.optim.Optimizer:
    """The optimiser by name, in the form that costs least: fused, where torch has that, is one kernel for all parameters."""
    kinds = {kind.__name__.lower(): kind for kind in vars(torch.optim).values() if isinstance(kind, type)}
    groups, arguments = list(groups), settings.arguments()
    parameters = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
    on = {p.device.type for p in parameters}
    plain = settings.name == "sgd" and not any(arguments.values()) and not any(isinstance(group, dict) for group in groups)
    if plain and on == {"cpu"}:
        return PlainSGD(groups, lr=settings.lr)
    fusible = (
        settings.name in ("sgd", "adam", "adamw", "adagrad") and on <= {"cpu", "cuda"} and all(p.is_floating_point() for p in parameters)
    )
    return kinds[settings.name](groups, lr=settings.lr, **arguments, **({"fused": True} if fusible else {}))


def learning_rate_factor(schedule: Schedule, epoch: int, epochs: int) -> float:
    """What the learning rate is multiplied by in this epoch (counted from 0): a pure function, so there is no state to save."""
    warmup = schedule.warmup if schedule.warmup >= 1 else schedule.warmup * epochs
    if epoch < warmup:
        return (epoch + 1) / (math.floor(warmup) + 1)
    if schedule.name == "steps":
        reached = sum(epoch >= (m if m >= 1 else m * epochs) for m in schedule.milestones)
        return schedule.gamma**reached
    progress = (epoch - warmup) / max(1.0, epochs - warmup)
    if schedule.name == "cosine":
        return schedule.end + (1 - schedule.end) * (1 + math.cos(math.pi * progress)) / 2
    if schedule.name == "linear":
        return 1 - (1 - schedule.end) * progress
    return 1.0


def _overrides(plugin: object, base: type, hook: str) -> bool:
    return getattr(type(plugin), hook) is not getattr(base, hook)
