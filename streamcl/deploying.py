"""Putting the online loop around a model that is deployed: what is around what, the checks, and the data that is given beforehand.

One loop stands around a module at a time. What it adapts is the module's own, so that a second loop would take what the first has
learned for the model as it was deployed; `close` ends a loop, and so does dropping it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.config import PluginSpec, plugin_spec
from streamcl.context import PRECISIONS, Context
from streamcl.deployed import Deployed, Forward, wrapped
from streamcl.errors import ConfigError, DataError
from streamcl.events import Events
from streamcl.guard import Guard
from streamcl.learned import Learned
from streamcl.online_loop import Mode, OnlineLoop
from streamcl.plugins import find
from streamcl.preparing import Preparation
from streamcl.strategy import plugin_name
from streamcl.stream import Batch, StreamInfo, asked

_STANDING: weakref.WeakSet[OnlineLoop] = weakref.WeakSet()  # the loops that somebody holds


def online(
    model: nn.Module | Learned,
    strategy: str | Mapping[str, Any] | PluginSpec | AdaptingStrategy = "tent",
    *,
    mode: Mode = "inline",
    guard: Guard | Mapping[str, Any] | bool = True,
    forward: Forward | None = None,
    calibrate: Iterable[Any] | None = None,
    canary: Iterable[tuple[Any, Tensor]] | None = None,
    references: Iterable[tuple[Any, Tensor]] | None = None,
    every: int = 1,
    window: int | None = 32,
    budget: float | None = None,
    keep: int | None = None,
    promote: int = 8,
    remember: int = 0,
    target: Literal["class", "value"] = "class",
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
    events: Events | None = None,
) -> OnlineLoop:
    """Put a loop around a deployed model: any torch.nn.Module, or what `streamcl.load` gave.

    `forward` takes the module and the inputs as they are given and returns logits, or logits and features, where the module does not
    itself. `calibrate` are unlabelled batches of the data that the model was trained on, `canary` labelled ones, (inputs, classes), and
    `references` those that a method refers to.
    `target` is value for regression. The other options are those of `OnlineLoop`; `guard` takes a Guard, its options, or False.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}: {', '.join(PRECISIONS)} are there")
    prepare: Callable[[Any], Batch]
    itself: Callable[[], OnlineLoop | None]

    def reserve(count: int) -> int:
        one = itself()  # weakly, so that a loop which nobody holds is gone at once, and its module is free
        assert one is not None
        return one.reserve(count)

    if isinstance(model, Learned):
        if forward is not None:
            raise ConfigError("a model that streamcl.load gave says itself where its logits come out: leave out `forward`")
        learned, info = model, replace(model.info, test_time=True)
        served: nn.Module = learned.model
        device, precision = learned.context.device, learned.context.precision  # type: ignore[assignment]
        preparation = learned.context.preparation

        def prepare(given: Any) -> Batch:
            batch = given
            if not isinstance(given, Batch):
                batch = learned.batch(given)
                batch.ids += reserve(len(batch))
            return context.prepare(asked(batch, info), train=False)

    else:
        served, info = wrapped(model, forward), StreamInfo({}, target=target, test_time=True)
        first = next(iter(served.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
        preparation = Preparation(info, {"train": [], "test": []})

        def prepare(given: Any) -> Batch:
            batch = served.batch(given, reserve) if isinstance(served, Deployed) else given
            if not isinstance(batch, Batch):
                raise DataError(f"a model of streamcl takes a streamcl Batch, and this is a {type(batch).__name__}")
            _check_finite(batch)
            return asked(batch, info).to(device)

    _check_free(served)
    served.eval()
    flags = [(value, value.requires_grad) for value in served.parameters()]
    memory = find("memory", "faiss").load()()
    memory.open(seed, None, device)
    adapting = served if mode == "inline" else _twin(served)
    context = Context(adapting, memory, events or Events(), preparation, seed=seed, device=device, precision=precision)  # type: ignore[arg-type]
    method = _method(strategy, info)
    method.start(info, context)
    if mode == "shadow":
        _part(adapting, method)
        method.start(info, context)
    watch = guard if isinstance(guard, Guard) else Guard.of(guard) if isinstance(guard, Mapping) else Guard() if guard else None
    loop = OnlineLoop(
        method,
        served=served,
        prepare=prepare,
        mode=mode,
        guard=watch,
        every=every,
        window=window,
        budget=budget,
        keep=keep,
        promote=promote,
        remember=remember,
    )
    loop.flags, itself = flags, weakref.ref(loop)
    if canary is not None:
        loop.watch(_labelled(canary, prepare, device, "canary"))
    if references is not None:
        loop.refer(_labelled(references, prepare, device, "references"))
    elif method.needs_references:
        raise ConfigError(f"{plugin_name(method)} needs labelled samples for {method.needs_references}: give `references`")
    if calibrate is not None:
        loop.calibrate(calibrate)
    elif method.needs_calibration:
        raise ConfigError(f"{plugin_name(method)} needs unlabelled data of the source for {method.needs_calibration}: give `calibrate`")
    _STANDING.add(loop)
    return loop


def _check_free(served: nn.Module) -> None:
    mine = {id(value) for value in served.parameters()}
    for other in list(_STANDING):
        if not other.closed and any(id(value) in mine for value in other.served.parameters()):
            raise ConfigError(
                f"a loop with {plugin_name(other.strategy)} stands around this module already, and what it has learned would be taken for "
                "the model as it was deployed: close() that loop first, and reset() it before that to have the model as it was"
            )


def _method(strategy: str | Mapping[str, Any] | PluginSpec | AdaptingStrategy, info: StreamInfo) -> AdaptingStrategy:
    """The strategy that is meant, where it is one that adapts models of this kind."""
    method: Any = strategy
    if not isinstance(strategy, AdaptingStrategy):
        spec = strategy if isinstance(strategy, PluginSpec) else plugin_spec("strategy", strategy)
        method = spec.build()
    if not isinstance(method, AdaptingStrategy):
        raise ConfigError(
            f"{plugin_name(method)} learns from labels: the online loop takes a method of test-time adaptation, tent for one "
            "(streamcl list strategies)"
        )
    if method.targets and info.target not in method.targets:
        raise ConfigError(
            f"{plugin_name(method)} adapts models that answer with {' or '.join(method.targets)}, and this one answers with {info.target}"
        )
    return method


def _part(adapting: nn.Module, method: AdaptingStrategy) -> None:
    """What is adapted becomes the copy's own, wherever it is used."""
    own = {id(value): nn.Parameter(value.detach().clone()) for value in method.adapted.values()}
    for module in adapting.modules():
        for name, value in module._parameters.items():
            if id(value) in own:
                module._parameters[name] = own[id(value)]


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares every tensor."""
    shared: dict[int, Any] = {id(value): value for value in [*model.parameters(), *model.buffers()]}
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        raise ConfigError(f"shadow mode needs a copy of the modules, and this model cannot be copied ({error}): take mode inline") from None


def _check_finite(batch: Batch) -> None:
    for name, values in batch.inputs.items():
        if not isinstance(values, Tensor) or not values.is_floating_point():
            continue
        if bool(values.sum().isfinite()):  # thirty times as fast as to ask of each; the sum of finite values may still be infinite
            continue
        wrong = ~values.flatten(1).isfinite().all(dim=1) if values.dim() > 1 else ~values.isfinite()
        if batch.present is not None and name in batch.present:
            wrong &= batch.present[name].to(wrong.device)
        if bool(wrong.any()):
            sample = int(wrong.nonzero()[0])
            raise DataError(
                f"{name} of sample {sample} of the batch holds NaN or infinite values ({int(wrong.sum())} such); nothing was learned"
            )


def _labelled(pairs: Iterable[Any], prepare: Callable[[Any], Batch], device: torch.device, what: str) -> list[Batch]:
    """Batches of (inputs, classes), prepared."""
    found = []
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise DataError(f"{what} is a list of batches (inputs, classes), and holds a {type(pair).__name__}")
        batch, classes = prepare(pair[0]), torch.as_tensor(pair[1])
        if classes.dim() != 1 or classes.is_floating_point() or len(classes) != len(batch):
            raise DataError(f"{what} is a list of batches (inputs, classes), with one whole number for each sample")
        found.append(batch.replace(target=classes.to(device)))
    return found
