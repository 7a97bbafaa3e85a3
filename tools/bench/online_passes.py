"""Which passes a method of test-time adaptation makes through its model: recorded while it runs, and made again by hand.

A pass is a call of the network: of the module that the loop stands around, or of the backbone of streamcl's own model. Whether it has a
graph is seen at what comes out of it, a backward pass by a hook on the same tensor, and a step where the method's template makes one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy, entropy
from streamcl.deployed import Deployed
from streamcl.nn.norms import batch_norms, by_batch


@dataclass(frozen=True)
class Pass:
    """One pass forward. `part`: of what each modality has to itself alone."""

    given: tuple[Any, ...]
    samples: int
    graph: bool
    by_batch: bool  # whether batch normalisation had a share of the batch's own statistics
    part: bool = False


@dataclass
class Trace:
    """What happened, in its order: (forward, number of the pass), (backward, number of the pass), (step, 0)."""

    passes: list[Pass] = field(default_factory=list)
    order: list[tuple[str, int]] = field(default_factory=list)
    own: float = 0.0  # seconds of processor time in the method's own operations that were to be timed

    def samples(self) -> dict[str, int]:
        """How many samples went forward without a graph, with one, backward, and through a part of the network."""
        backward = [self.passes[number] for what, number in self.order if what == "backward"]
        return {
            "without": sum(one.samples for one in self.passes if not one.graph and not one.part),
            "with": sum(one.samples for one in self.passes if one.graph and not one.part),
            "backward": sum(one.samples for one in backward),
            "part": sum(one.samples for one in self.passes if one.part),
            "steps": sum(what == "step" for what, _ in self.order),
        }


@contextmanager
def recorded(strategy: AdaptingStrategy, own: Sequence[str] = ()) -> Iterator[Trace]:
    """For a while, what the method does is recorded. `own` names methods of it (`pixels.augmented`) whose time is added up."""
    trace, model = Trace(), strategy.model
    network: Any = model.module if isinstance(model, Deployed) else model.backbone
    layer = next(iter(batch_norms(model).values()), None)
    before: list[Any] = [None, False]  # the statistics at hand when a pass began, and whether others were used in it

    def begin(module: nn.Module, given: tuple[Any, ...]) -> None:
        before[:] = [None if layer is None else layer._buffers["running_mean"], False]

    def normalised(module: nn.Module, given: Any, out: Any) -> None:
        mean = module._buffers["running_mean"]
        before[1] = mean is None or module.training or mean is not before[0] or "forward" in module.__dict__

    def end(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        keep(given, next(iter(out.values())) if isinstance(out, dict) else out)

    def keep(given: tuple[Any, ...], out: Tensor, part: bool = False) -> None:
        number = len(trace.passes)
        trace.passes.append(Pass(given, len(given[0]), out.requires_grad, before[1], part))
        trace.order.append(("forward", number))
        if out.requires_grad:
            out.register_hook(lambda gradient: trace.order.append(("backward", number)))

    hooks = [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
    if layer is not None:
        hooks.append(layer.register_forward_hook(normalised))
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.remove)
        if hasattr(network, "by_modality"):
            encode = network.by_modality

            def encoded(batch: Any) -> Any:
                before[:] = [None, False]
                told = encode(batch)
                keep((batch,), next(iter(told.values())), part=True)
                return told

            network.by_modality = encoded
            undo.callback(delattr, network, "by_modality")
        apply = strategy.apply

        def applied(loss: Tensor | None = None) -> bool:
            made = apply(loss)
            trace.order += [("step", 0)] * made
            return made

        strategy.apply = applied
        undo.callback(delattr, strategy, "apply")
        for path in own:
            holder, _, name = path.rpartition(".")
            held = attrgetter(holder)(strategy) if holder else strategy
            setattr(held, name, _timed(trace, getattr(held, name)))
            undo.callback(delattr, held, name)
        yield trace


def _timed(trace: Trace, do: Any) -> Any:
    def timed(*given: Any, **named: Any) -> Any:
        begun = time.process_time()
        try:
            return do(*given, **named)
        finally:
            trace.own += time.process_time() - begun

    return timed


def repeated(trace: Trace, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """The same passes and steps through this copy of the model, as one would write them without any method around: the loss of every
    pass with a graph is the entropy of its answers."""
    waiting: dict[int, Tensor] = {}
    layers = list(batch_norms(model).values())
    for what, events in groupby(trace.order, key=itemgetter(0)):
        numbers = [number for _, number in events]
        if what == "forward":
            for number in numbers:
                one = trace.passes[number]
                with torch.set_grad_enabled(one.graph), by_batch(layers) if one.by_batch and one.samples > 1 else nullcontext():
                    answered = _forward(model, one)
                    if one.graph and answered is not None:
                        waiting[number] = entropy(answered).mean()
        elif what == "backward":
            torch.stack([waiting.pop(number) for number in numbers if number in waiting]).sum().backward()
        elif optimizer is not None:
            for _ in numbers:
                optimizer.step()
                optimizer.zero_grad()


def _forward(model: Any, one: Pass) -> Tensor | None:
    if isinstance(model, Deployed):
        logits: Tensor = model.module(*one.given)
        return logits
    if one.part:
        model.backbone.by_modality(*one.given)
        return None
    head: Tensor = model.head(model.backbone(*one.given))
    return head
