"""What adapts to what it serves: the template that the methods of test-time adaptation fill in.

No label ever arrives here. The model is in evaluation mode throughout, so that dropout and stochastic depth stay off; batch normalisation
uses the batch at hand (`by_batch`), and what a method may change is frozen but for the tensors that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.norms import LOOKED_FOR, Gathered, affine, batch_norms, by_batch, with_values
from streamcl.options import Optimizer
from streamcl.strategy import Strategy, make_optimizer, plugin_name
from streamcl.stream import Batch, Prediction, StreamInfo, Task


class AdaptingStrategy(Strategy):
    """A method that adapts to what it serves. It fills in `loss`, or `update` where it does something else than one step on one loss.

    `adapt` answers a batch and learns from it; `predict` answers and learns nothing. Between them a method may rely on

    adapted     the tensors that it trains, by name (`parameters`); everything else of the model is frozen
    source      these tensors as they were deployed
    optimizer   over `adapted`; `step` does the backward pass and the step, unless the loss or a gradient is not finite

    What else changes while it adapts (a running mean, a teacher, a memory) is in `own_state` and comes back by `own_restore`; with that
    `snapshot`, `rewind` and `reset` are exact. Neither ever copies the model.
    """

    targets: ClassVar[tuple[str, ...]] = ("class",)
    batch_statistics: ClassVar[bool] = True  # batch normalisation uses the batch at hand
    changes_weights: ClassVar[bool] = True  # False for what changes answers alone, or forgets after each sample: nothing to promote
    window: int | None = None  # a method that is defined on windows of samples says how many, and is handed nothing less
    clip: float | None = None  # the largest norm that the gradients of a step may have
    reads_batch: ClassVar[bool] = False  # its answer to a sample depends on the others of the batch, in another way than by statistics
    needs_references: ClassVar[str] = ""  # what it wants labelled samples for before anything is served (`refer`), where it does
    needs_calibration: ClassVar[str] = ""  # what it wants unlabelled source data for, where it cannot do without

    def __init__(
        self,
        *,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-3),  # noqa: B008
        answer: Literal["before", "after"] = "before",
    ) -> None:
        self.optimizer_settings, self.answer = Optimizer.model_validate(optimizer), answer
        self.counts: dict[str, int] = {}
        self.gathered: Gathered | None = None
        self.adapted: dict[str, nn.Parameter] = {}
        self.source: dict[str, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    # -- what methods fill in ---------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is adapted, by the model's own names: by default weight and bias of every normalisation layer."""
        return affine(self.model)

    def loss(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """The loss of a batch, given its logits with their graph. None where there is nothing to learn from: then there is no step."""
        raise NotImplementedError(f"{type(self).__name__} must fill in `loss`, or `update`")

    def update(self, batch: Batch) -> Tensor:
        """Learn from a batch and return the answer to it  # (batch, classes). Gradients are on, the statistics are the batch's."""
        logits = self.model(batch)
        loss = self.loss(batch, logits)
        if loss is not None:
            self.step(loss)
        else:
            self.count("skipped")
        return self.again(batch) if self.answer == "after" else logits.detach()

    def forward(self, batch: Batch) -> Tensor:
        """The answer of the model as it is now, without a graph  # (batch, classes)"""
        with torch.no_grad():
            return self.model(batch)

    def again(self, batch: Batch) -> Tensor:
        """The answer to a batch after the update from it. Its statistics were taken in already, where they are gathered."""
        with self.statistics(gather=False):
            return self.forward(batch)

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Unlabelled data of the source, before anything is served: prepared batches."""

    def refer(self, batches: Iterable[Batch]) -> None:
        """Labelled data to keep and to refer to, before anything is served: prepared batches."""

    def own_state(self) -> dict[str, Any]:
        """What changes while it adapts, beside the adapted tensors and the optimiser: tensors and JSON values."""
        return {}

    def own_restore(self, state: Mapping[str, Any]) -> None:
        """The reverse of `own_state`."""

    def weights(self) -> dict[str, Tensor]:
        """The tensors by which it answers, by the model's names: those adapted, unless a teacher answers."""
        return {name: value.data for name, value in self.adapted.items()}

    # -- the template -----------------------------------------------------------------------------------------------------------

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if not info.test_time:
            raise ConfigError(
                f"{plugin_name(self)} adapts a trained model to what it serves and learns from no labels: it belongs on a test-time stream "
                "(scenario: test_time), or around a deployed model (streamcl.online)"
            )
        self.layers = batch_norms(self.model)
        several = self.parameters()
        first = {id(value): name for name, value in reversed(several.items())}  # a parameter that two modules share is one
        self.adapted = {name: value for name, value in several.items() if first[id(value)] == name}
        if not self.can_adapt():
            raise ConfigError(self.nothing_to_adapt())
        half = next((f"{name} is {str(v.dtype).removeprefix('torch.')}" for name, v in self.adapted.items() if v.dtype.itemsize < 4), None)
        if half is not None:
            raise ConfigError(
                f"{plugin_name(self)} adapts weights in small steps, which are lost in half precision, and {half}: keep the model in "
                "float32 and compute in bfloat16 (precision)"
            )
        self.model.eval().requires_grad_(False)
        for value in self.adapted.values():
            value.requires_grad_(True)
        self.source = {name: value.detach().clone() for name, value in self.adapted.items()}
        self.optimizer = make_optimizer(self.adapted.values(), self.optimizer_settings) if self.adapted else None
        self.scaler = torch.amp.GradScaler(context.device.type) if context.precision == "float16" else None
        self._random = context.generator.get_state()
        self._fresh = copied(self.own_state())

    def can_adapt(self) -> bool:
        """Whether the model has what this method changes. Asked when `layers` and `adapted` are known."""
        return bool(self.adapted) or not self.changes_weights

    def nothing_to_adapt(self) -> str:
        """The sentence for a model that has none of what this method changes."""
        return f"{plugin_name(self)} adapts weight and bias of normalisation layers: it looked for {LOOKED_FOR}, and this model has none"

    def learn(self, task: Task) -> None:
        """Nothing: a test-time stream is only served."""

    def adapt(self, batch: Batch) -> Prediction:
        try:
            with torch.enable_grad(), self.statistics():
                scores = self.update(batch)
        except BaseException:
            for value in self.adapted.values():  # half of a backward pass is no part of the next step
                value.grad = None
            raise
        return Prediction(scores, made=self.answer)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        with self.statistics():
            return Prediction(self.forward(batch), made="before")

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """What the source's tensors say under the statistics of the batch: what the adapted ones are compared with  # (batch, classes)"""
        with with_values(self.model, self.source), self.statistics(gather=False):
            return self.model(batch)

    @contextmanager
    def statistics(self, gather: bool = True) -> Iterator[None]:
        """For a while, batch normalisation uses the batch at hand, where the method does."""
        if not self.layers or not self.batch_statistics:
            context: Any = nullcontext()
        elif self.gathered is not None and gather and torch.is_grad_enabled():
            context = self.gathered.gathering()
        else:
            context = by_batch(list(self.layers.values()))
        with context:
            yield

    def step(self, loss: Tensor) -> bool:
        """One step of the optimiser on a loss; none, and counted, where the loss or a gradient is not finite."""
        self.backward(loss)
        return self.apply(loss)

    def backward(self, loss: Tensor) -> None:
        """The gradients of a loss, scaled where the precision asks for it, added to those that are there."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def apply(self, loss: Tensor | None = None) -> bool:
        """The optimiser's step on the gradients that are there, unless one of them is not finite; they are gone afterwards."""
        optimizer, scaler = self.optimizer, self.scaler
        assert optimizer is not None
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients = [value.grad for value in self.adapted.values() if value.grad is not None]
        size = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
        finite = bool((size if loss is None else size + 0 * loss.detach()).isfinite())
        if finite:
            if self.clip is not None:
                nn.utils.clip_grads_with_norm_(self.adapted.values(), self.clip, size)
            optimizer.step() if scaler is None else scaler.step(optimizer)
            torch.clear_autocast_cache()  # else the rest of an autocast answers with the weights before the step
        if scaler is not None:
            scaler.update()
        for value in self.adapted.values():
            value.grad = None
        self.count("updates" if finite else "not_finite")
        return finite

    def correct(self, batch: Batch) -> None:
        """Learn from samples whose labels came late: one step on their cross-entropy."""
        if self.optimizer is None or batch.target is None or self.info.target != "class":
            raise ConfigError(f"{plugin_name(self)} does not learn from labels that come late: it has nothing that it trains")
        with torch.enable_grad(), self.statistics(gather=False):
            self.step(cross_entropy(self.model(batch), batch.target))

    def count(self, what: str, number: int = 1) -> None:
        """What happened, for the figures of the loop: updates, skipped, not_finite, kept, and what a method adds."""
        self.counts[what] = self.counts.get(what, 0) + number

    # -- going back -------------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All that adapting has changed, copied."""
        return copied(
            {
                "adapted": {name: value.data for name, value in self.adapted.items()},
                "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
                "gathered": None if self.gathered is None else self.gathered.values,
                "random": self.context.generator.get_state(),
                "own": self.own_state(),
            }
        )

    @torch.no_grad()
    def rewind(self, snapshot: Mapping[str, Any]) -> None:
        """Be as at the time of the snapshot. What it says is copied: it can be used again."""
        for name, value in self.adapted.items():
            value.copy_(snapshot["adapted"][name])
            value.grad = None
        if self.optimizer is not None:
            self.optimizer.load_state_dict(copied(snapshot["optimizer"]))
        if self.gathered is not None:
            if snapshot["gathered"] is None:
                self.gathered = Gathered(self.layers, self.gathered.momentum)
            else:
                self.gathered.load(snapshot["gathered"])
        self.context.generator.set_state(snapshot["random"].cpu())
        self.own_restore(copied(snapshot["own"]))

    @torch.no_grad()
    def reset(self) -> None:
        """Be as deployed: the source's tensors, a new optimiser, the method's own state as it was after `start` and `calibrate`."""
        for name, value in self.adapted.items():
            value.copy_(self.source[name])
            value.grad = None
        if self.adapted:
            self.optimizer = make_optimizer(self.adapted.values(), self.optimizer_settings)
        if self.gathered is not None:
            self.gathered = Gathered(self.layers, self.gathered.momentum)
        self.context.generator.set_state(self._random)
        self.own_restore(copied(self._fresh))

    def calibrated(self) -> None:
        """What `own_state` holds now is what `reset` goes back to."""
        self._fresh = copied(self.own_state())

    def state(self) -> dict[str, Any]:
        return {"source": self.source, "counts": dict(self.counts), "fresh": self._fresh, "now": self.snapshot()}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name, value in self.source.items():
            value.copy_(state["source"][name])
        self.counts, self._fresh = {name: int(count) for name, count in state["counts"].items()}, dict(state["fresh"])
        self.rewind(state["now"])


def entropy(logits: Tensor) -> Tensor:
    """The entropy of each row's softmax, in nats  # (batch,)"""
    log = logits.log_softmax(dim=1)
    return -(log.exp() * log.masked_fill(log.isneginf(), 0.0)).sum(dim=1)  # a masked class has none


def alone(batch: Batch, modality: str) -> Batch:
    """The batch as if every other modality were absent: zeros (or empty text) that are masked."""
    inputs: dict[str, Any] = {}
    present = dict(batch.present or {})
    for name, values in batch.inputs.items():
        if name == modality:
            inputs[name] = values
            continue
        inputs[name] = torch.zeros_like(values) if isinstance(values, Tensor) else [""] * len(values)
        present[name] = torch.zeros_like(batch.ids, dtype=torch.bool)
    return batch.replace(inputs=inputs, present=present)


def copied(tree: Any) -> Any:
    """A tree of dicts, lists, tensors and JSON values with every tensor copied."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree
