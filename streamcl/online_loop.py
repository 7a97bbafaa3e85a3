"""The online loop: a deployed model answers each batch that it is served, and adapts to it, under guard.

    loop = streamcl.online(model, strategy="tent")
    for x in traffic:
        answer = loop(x)            # answer.scores, answer.labels(), answer.made, answer.version

`inline` serves the model that adapts. `shadow` serves a model that changes only when a new version is promoted: a copy adapts, of which
only the adapted tensors are its own. Version 0 is the model as it was deployed.

Without labels nothing can be guaranteed about accuracy. What the guard watches, and what it does, is in `streamcl/guard.py`; what it
reached on every stream and with every method stands in docs/results/online.md.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamcl.adapting import AdaptingStrategy, copied, entropy
from streamcl.deployed import Deployed
from streamcl.errors import ConfigError, DataError
from streamcl.guard import Guard
from streamcl.late_labels import LateLabels
from streamcl.nn.norms import Gathered, exchanged, with_values
from streamcl.strategy import plugin_name
from streamcl.stream import Batch, Prediction

Mode = Literal["inline", "shadow"]
AGAIN = 100  # batches after which a latency budget that adapting exceeds is tried again
FEWEST = 32  # labelled answers by which the model that adapts is compared with the deployed one
TOLD = 200  # events that `status` shows


@dataclass
class _Passed:
    """A batch that went through: the answer, the deployed model's scores where they were made, and what the model that adapts decided."""

    prediction: Prediction
    frozen: Tensor | None = None
    decided: Tensor | None = None


@dataclass
class Version:
    """A model that can be gone back to: all that adapting had changed, and, in shadow mode, the tensors that are served."""

    number: int
    batch: int  # how many batches the loop had seen
    snapshot: dict[str, Any]
    weights: dict[str, Tensor]


class OnlineLoop:
    """Serve and adapt. `strategy` is started on the model that adapts; `served` answers in shadow mode.

    `every`: learn from every n-th batch. `window`: a batch smaller than a quarter of it is joined with the samples before it, so that
    statistics of a batch mean something, and there is one update for as many new samples as the window has. `budget`: milliseconds that
    one call may take; a batch whose update would take longer is only answered. `keep` versions (5 in shadow mode, else 1) can be rolled
    back to, and one is promoted after `promote` updates, when the guard is content. `remember` samples are kept for labels that come
    late.
    """

    def __init__(
        self,
        strategy: AdaptingStrategy,
        *,
        served: nn.Module | None = None,
        prepare: Callable[[Any], Batch] | None = None,
        mode: Mode = "inline",
        guard: Guard | None = None,
        every: int = 1,
        window: int | None = None,
        budget: float | None = None,
        keep: int | None = None,
        promote: int = 8,
        remember: int = 0,
        canary: Sequence[Batch] = (),
    ) -> None:
        if mode not in ("inline", "shadow"):
            raise ConfigError(f"online: mode is {mode!r}: inline or shadow")
        for name, number in (("window", window), ("budget", budget), ("remember", remember)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float) or number < 0):
                raise ConfigError(f"online: {name} is {number!r}: a number from 0 up is needed")
        if mode == "shadow" and served is None:
            raise ConfigError("shadow mode serves one model while another adapts: streamcl.online makes both")
        if mode == "shadow" and not strategy.changes_weights:
            raise ConfigError(
                f"{plugin_name(strategy)} changes answers and no weights: there is nothing that shadow mode could promote, take mode inline"
            )
        keep = keep if keep is not None else 5 if mode == "shadow" else 1
        for name, number in (("every", every), ("keep", keep), ("promote", promote)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"online: {name} is {number!r}: 1 or more is needed")
        self.strategy, self.context, self.mode, self.guard = strategy, strategy.context, mode, guard
        self.model = strategy.model
        self.served: nn.Module = served if served is not None else strategy.model
        self.prepare = prepare or (lambda batch: batch)
        self.every, self.window, self.budget, self.promote_after = every, window or 0, budget, promote
        self.version = self.newest = 0
        self.batches = self.samples = 0  # batches that passed the model which adapts, and samples that were answered
        self.cooling = 0  # batches that are still to be answered without an update
        self.counts: dict[str, int] = {}
        self.happened: deque[dict[str, Any]] = deque(maxlen=TOLD)
        self._serving, self._learning, self._noting = threading.RLock(), threading.RLock(), threading.RLock()
        self._ids = 0  # the next sample's, where the samples come without
        self._lessons = 0  # batches and windows that could have been learned from
        self._warm: set[str] = set()
        self._recent: Batch | None = None  # the newest samples, up to a window of them
        self._new = 0  # how many of them no update has seen
        self._costs: dict[str, float] = {}  # milliseconds of answering and of adapting, for each sample
        self._tried = 0  # the batch at which the budget was last tried
        self._since = 0  # updates since the last version
        self.labels = LateLabels(int(remember))
        if mode == "shadow" and self._by_batch and strategy.gathered is None:
            strategy.gathered = Gathered(strategy.layers)
        self.versions: deque[Version] = deque(maxlen=keep)
        self._deployed = self._named(self.served) if mode == "shadow" else {}
        self._fisher: dict[str, Tensor] = {}
        self.closed = False
        self.flags: list[tuple[nn.Parameter, bool]] = []  # which parameters of the deployed module wanted gradients
        self._canary_at = 0
        self.canary: list[Batch] = []
        if canary:
            self.watch(canary)

    @property
    def _by_batch(self) -> bool:
        """Whether what the model answers depends on the statistics of the batch."""
        return bool(self.strategy.layers) and self.strategy.batch_statistics

    # -- serving ----------------------------------------------------------------------------------------------------------------

    def __call__(self, given: Any) -> Prediction:
        """Answer a batch and adapt to it."""
        with self._entered():
            batch = self._take(given)
            answer = self._answer(batch) if self.mode == "shadow" else None
            passed = self._pass(batch, learn=True)
            return self._noted(batch, answer or passed.prediction, passed)

    def predict(self, given: Any) -> Prediction:
        """Answer a batch with the model that is served, and learn nothing from it. In shadow mode any thread may, at any time."""
        with self._entered(learning=self.mode == "inline"):
            batch = self._take(given)
            passed = _Passed(self._answer(batch)) if self.mode == "shadow" else self._asked(batch)
            return self._noted(batch, passed.prediction, passed)

    def learn(self, given: Any) -> None:
        """Adapt to a batch that was answered before. In shadow mode another thread than the one that answers may do this."""
        with self._entered():
            self._pass(self._take(given), learn=True)

    def frozen(self, given: Any) -> Prediction:
        """What the model as it was deployed says of a batch."""
        with self._entered():
            return self._made(self._frozen(self._take(given)), 0)

    def reserve(self, count: int) -> int:
        """The first of so many ids that no sample had yet."""
        with self._noting:
            first = self._ids
            self._ids += count
        return first

    @contextmanager
    def _entered(self, learning: bool = True) -> Iterator[None]:
        """Whatever the caller has switched off or on: graphs can be made in here, and the model is in evaluation mode."""
        if self.closed:
            raise ConfigError("this loop is closed: put a new one around the module (streamcl.online)")
        with torch.inference_mode(False), torch.no_grad(), self._learning if learning else nullcontext(), self.context.autocast():
            for model in (self.model, self.served) if learning else (self.served,):  # what another thread adapts is in modes of its own
                inner = model.module if isinstance(model, Deployed) else model  # whoever holds it may have asked for training mode
                if model.training or inner.training or (learning and any(layer.training for layer in self.strategy.layers.values())):
                    model.eval()
            yield

    def _take(self, given: Any) -> Batch:
        batch = self.prepare(given)
        if len(batch) == 0:
            raise DataError("the batch is empty: give at least one sample")
        if any(isinstance(values, Tensor) and values.is_inference() for values in batch.inputs.values()):
            inputs = {name: values.clone() if isinstance(values, Tensor) else values for name, values in batch.inputs.items()}
            batch = batch.replace(inputs=inputs)
        return batch

    def _answer(self, batch: Batch) -> Prediction:
        """By the version that is served, in shadow mode: for each sample alone, whatever else is in the batch."""
        with self._serving:
            return self._made(self.served(batch), self.version)

    def _asked(self, batch: Batch) -> _Passed:
        """By the model that adapts, as it is: nothing is counted, kept or looked at."""
        whole = batch
        if self._joined(batch):
            recent = self._recent if _fits(self._recent, batch) else None
            if recent is None or len(recent) + len(batch) < self.window:
                return self._by_frozen(batch)
            whole = Batch.cat([recent, batch])
            whole = whole[len(whole) - self.window :]
        return self._by_choice(batch, whole)

    def _by_choice(self, batch: Batch, whole: Batch) -> _Passed:
        """What is served while nothing is learned: by the deployed model, by the source's weights, or by those that adapted."""
        guard = self.guard
        if guard is not None and guard.serves_frozen:
            return self._by_frozen(batch)
        if guard is not None and guard.bypassing:
            return _Passed(_last(self._made(self.strategy.reference(whole), 0), len(batch)))
        prediction = self._timed("answer", self.strategy.predict, whole)
        return _Passed(_last(replace(prediction, version=self.version), len(batch)))

    def _by_frozen(self, batch: Batch) -> _Passed:
        frozen = self._frozen(batch)
        return _Passed(self._made(frozen, 0), frozen)

    def _made(self, scores: Tensor, version: int) -> Prediction:
        info = self.strategy.info
        return Prediction(scores, threshold=info.threshold if info.target == "labels" else None, made="before", version=version)

    def _noted(self, batch: Batch, prediction: Prediction, passed: _Passed) -> Prediction:
        """What was answered, kept for labels that may come."""
        assert prediction.scores is not None
        prediction.ids = batch.ids
        with self._noting:
            self.samples += len(batch)
        if self.strategy.info.target == "class":
            self.labels.note(batch, prediction.scores, passed.frozen, passed.decided)
        return prediction

    # -- adapting ---------------------------------------------------------------------------------------------------------------

    def _pass(self, batch: Batch, learn: bool) -> _Passed:
        """Answer with the model that adapts, learn where that is due, and let the guard look.

        A batch that the model cannot take leaves no trace, in a window least of all. Once an update was made from it, it is used up."""
        before, updates = (self.batches, self._recent, self._new, self.cooling), self.strategy.counts.get("updates", 0)
        try:
            guard, number = self.guard, self.batches
            self.batches = number + 1
            if guard is not None and guard.retries(number):
                self._tell("retry", "adapting is tried again")
            return self._windowed(batch, learn, number) if self._small(batch) else self._whole(batch, learn, number)
        except Exception:
            if self.strategy.counts.get("updates", 0) == updates:
                self.batches, self._recent, self._new, self.cooling = before
            raise

    def _whole(self, batch: Batch, learn: bool, number: int) -> _Passed:
        """A batch that is a lesson by itself."""
        guard = self.guard
        if self._recent is not None and self.strategy.window is None:
            self._recent = batch[max(0, len(batch) - self.window) :]
        resting = guard is not None and (guard.bypassing or guard.serves_frozen or self.cooling > 0)
        self.cooling = max(0, self.cooling - 1)
        version = self.version
        if learn and not resting and self._affordable(len(batch)):
            prediction = self._adapted(batch)
            prediction.version = version if prediction.made == "before" else self.version
        elif guard is not None and guard.bypassing and guard.serves_frozen and not guard.due(number, math.nan):
            return self._by_frozen(batch)
        elif guard is not None and guard.bypassing:
            prediction = self._made(self.strategy.reference(batch), 0)
        else:
            prediction = replace(self._timed("answer", self.strategy.predict, batch), version=version)
        if guard is None:
            if self.mode == "shadow" and self._since >= self.promote_after:
                self._publish("after so many updates")
            return _Passed(prediction)
        assert prediction.scores is not None
        decided = prediction.scores.argmax(dim=1) if self.strategy.info.target == "class" else None
        served, frozen = self._guarded(batch, prediction, number)
        return _Passed(served, frozen, decided)

    def _windowed(self, batch: Batch, learn: bool, number: int) -> _Passed:
        """A batch too small to be a lesson: it is answered, alone or with the samples before it, and there is a lesson once a window is
        full of samples that none has held. The guard looks at what the lesson made of the model before anybody is answered by it."""
        guard, strategy = self.guard, self.strategy
        size = strategy.window or self.window
        recent = self._recent if _fits(self._recent, batch) else None
        recent = batch if recent is None else Batch.cat([recent, batch])
        self._recent = recent = recent[max(0, len(recent) - max(size, len(batch))) :]
        self._new = min(self._new + len(batch), len(recent))
        if self._joined(batch):
            passed = self._by_frozen(batch) if len(recent) < size else self._by_choice(batch, recent)
        else:
            passed = self._by_choice(batch, batch)
        assert passed.prediction.scores is not None
        if not _sound(passed.prediction.scores):
            if guard is not None and not guard.bypassing:
                self._strike("an answer is not finite", number)
            passed = self._by_frozen(batch) if guard is not None else passed
        if self._new < size or not learn:
            return passed
        resting = guard is not None and (guard.bypassing or guard.serves_frozen or self.cooling > 0)
        self.cooling = max(0, self.cooling - 1)
        if not resting and self._affordable(len(recent)):
            self._adapted(recent)
        self._new = 0
        if guard is not None:
            prediction = self._made(strategy.reference(recent), 0) if guard.bypassing else strategy.predict(recent)
            self._guarded(recent, prediction, number, look=True)
        elif self.mode == "shadow" and self._since >= self.promote_after:
            self._publish("after so many updates")
        if strategy.window is not None:
            self._recent = None
        return passed

    def _small(self, batch: Batch) -> bool:
        """Whether such a batch is too small to learn from by itself."""
        if self.strategy.window is not None:
            return self.strategy.window > 1
        return len(batch) * 4 < self.window

    def _joined(self, batch: Batch) -> bool:
        """Whether such a batch is answered together with the samples before it."""
        return self.strategy.window is None and self._small(batch) and (self._by_batch or self.strategy.reads_batch)

    def _affordable(self, count: int) -> bool:
        """Whether a lesson of so many samples is learned: one in `every`, within the budget."""
        self._lessons += 1
        if (self._lessons - 1) % self.every:
            return False
        if self.budget is not None and self._costs.get("adapt", 0.0) * count > self.budget:
            if self.batches - self._tried < AGAIN:
                self._count("over_budget")
                return False
            self._tried = self.batches
        return True

    def _adapted(self, batch: Batch) -> Prediction:
        before = self.strategy.counts.get("updates", 0)
        prediction: Prediction = self._timed("adapt", self.strategy.adapt, batch)
        made = self.strategy.counts.get("updates", 0) - before
        self._since += made
        if made and self.mode == "inline":
            self.newest += 1
            self.version = self.newest
        if made:
            self._count("adapted", len(batch))
        return prediction

    def _timed(self, what: str, do: Callable[[Batch], Any], batch: Batch) -> Any:
        """Do it, and keep how long it takes for each sample where somebody set a budget; a device is waited for only then. The first time
        warms up and is no measure of the next."""
        if self.budget is None:
            return do(batch)
        begun = time.perf_counter()
        done = do(batch)
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        taken = 1000 * (time.perf_counter() - begun) / len(batch)
        if what not in self._warm:
            self._warm.add(what)
        else:
            self._costs[what] = 0.8 * self._costs[what] + 0.2 * taken if what in self._costs else taken
        return done

    def _frozen(self, batch: Batch) -> Tensor:
        with with_values(self.model, self.strategy.source):
            return self.model(batch)

    # -- the guard --------------------------------------------------------------------------------------------------------------

    def _guarded(self, batch: Batch, prediction: Prediction, number: int, look: bool = False) -> tuple[Prediction, Tensor | None]:
        """What is served after the guard has looked, and the deployed model's answer where it was made."""
        guard = self.guard
        assert guard is not None and prediction.scores is not None
        if self.strategy.info.target == "value":
            certain, sound = math.nan, _sound(prediction.scores)
        else:  # one number read from the device says both: the entropy of an answer is finite where the answer can be served
            certain = float(entropy(prediction.scores.float()).mean())
            sound = math.isfinite(certain)
        due = look or guard.due(number, certain) or (self.mode == "shadow" and self._since >= self.promote_after)
        if not due and sound:
            return prediction, None
        frozen = self._frozen(batch)
        answered, reference = self._compared(batch, prediction.scores, frozen)
        preferred = guard.serves_frozen
        reason = guard.look(answered, reference, frozen, self.strategy.info.target, self.strategy.reads_batch)
        if reason is None and not guard.bypassing:
            reason = self._further(number)
        if guard.serves_frozen != preferred:
            self._tell("statistics", self._choice(guard), serves="frozen" if guard.serves_frozen else "adapting")
            if guard.serves_frozen and self.mode == "shadow":
                self.serve(0, {})
        if reason is None and not guard.bypassing and not guard.serves_frozen and not guard.alert:
            reason = self._content()
        if reason is not None and not guard.bypassing:
            self._strike(reason, number)
            prediction = self._made(reference, 0)
        assert prediction.scores is not None
        if guard.serves_frozen or not _sound(prediction.scores):
            prediction = self._made(frozen, 0)
        return prediction, frozen

    def _choice(self, guard: Guard) -> str:
        """Why what is served has changed."""
        if guard.overruled:
            return "labels show that the model which adapts is the better one"
        if self.strategy.reads_batch:
            there = "" if guard.prefers_frozen else "again "
            return f"neighbouring samples are {there}{'not ' if guard.prefers_frozen else ''}seen to be of few classes"
        chosen = "the deployed model is more certain without them" if guard.prefers_frozen else "they make the model more certain again"
        return f"statistics of the batch: {chosen}"

    def _compared(self, batch: Batch, answered: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
        """What the model that adapts says, or the one that would be promoted; and the source's weights under the same statistics."""
        strategy = self.strategy
        if self.mode == "shadow":
            with with_values(self.model, self._candidate()):
                answered = self.model(batch)
            if strategy.gathered is None:
                return answered, frozen
            with with_values(self.model, {**strategy.source, **strategy.gathered.values}):
                return answered, self.model(batch)
        if self.guard is not None and self.guard.bypassing:  # then it is R that is served
            return answered, answered
        if not self._by_batch:
            return answered, frozen
        return answered, strategy.reference(batch) if strategy.adapted else answered

    def _further(self, number: int) -> str | None:
        """What the canary, late labels and the distance to the source say."""
        guard, reason = self.guard, None
        assert guard is not None
        if self._fisher:
            reason = guard.look_at_drift(self.distance())
        if reason is None and self.canary and number - self._canary_at >= guard.canary_every:
            reason = self._canaries(number)
        compared = self.labels.compared
        if reason is None and len(compared) >= FEWEST:
            ours, theirs = (sum(int(one[which]) for one in compared) for which in (0, 1))
            reason = guard.look_at_labels(ours, theirs, sum(one[0] != one[1] for one in compared), len(compared))
            if reason is not None:
                compared.clear()
        return reason

    def _canaries(self, number: int) -> str | None:
        assert self.guard is not None
        self._canary_at = number
        return self.guard.look_at_canary(self._on_canary(self._as_served), sum(len(one) for one in self.canary))

    def _as_served(self, batch: Batch) -> Tensor:
        if self.mode == "shadow":
            with with_values(self.model, self._candidate()):
                return self.model(batch)
        scores = self.strategy.predict(batch).scores
        assert scores is not None
        return scores

    def _on_canary(self, answer: Callable[[Batch], Tensor]) -> float:
        right = sum(int(answer(one).argmax(dim=1).eq(one.target).sum()) for one in self.canary if one.target is not None)
        return right / sum(len(one) for one in self.canary)

    def distance(self) -> float:
        """Half the squared distance of the adapted tensors to the source's in the Fisher metric of the source, in nats."""
        strategy = self.strategy
        parts = [(w * (strategy.adapted[name].detach() - strategy.source[name]) ** 2).sum() for name, w in self._fisher.items()]
        return 0.5 * float(torch.stack(parts).sum())

    def _strike(self, reason: str, number: int) -> None:
        guard = self.guard
        assert guard is not None
        labels = reason.startswith(("canary", "feedback"))  # then it may be the statistics, which the source's weights share
        remedy = guard.strike(number, final=not self.strategy.adapted, statistics=labels)
        good = self.versions.pop() if self.versions and remedy == "restore" else None  # should it come to the same again: the one before
        if good is not None:
            self.strategy.rewind(good.snapshot)
        else:
            self.strategy.reset()
        self.cooling, self._since = guard.cooldown, 0
        number = good.number if good else 0
        if self.mode == "shadow":
            shown = good if good is not None and not guard.serves_frozen else None
            self.serve(shown.number if shown else 0, shown.weights if shown else {})
        self.version = self.version if self.mode == "shadow" else number
        to = f"version {number}" if number else "the deployed model"
        told = f"{reason}; {to} is restored" + ("" if remedy == "restore" else ", and adapting stops")
        self._tell(remedy, told, version=self.version)

    def _content(self) -> str | None:
        """The guard finds nothing: what is there can be gone back to, and in shadow mode it is promoted, unless the canary says no."""
        assert self.guard is not None
        self.guard.calm()
        if self._since < self.promote_after or not self.strategy.changes_weights:
            return None
        if self.canary and (reason := self._canaries(self.batches)) is not None:
            return reason
        if any(not bool(value.isfinite().all()) for value in self._candidate().values()):
            return "what was learned holds values that are not finite"
        self._publish("the guard is content")
        return None

    # -- versions ---------------------------------------------------------------------------------------------------------------

    def _named(self, model: nn.Module) -> dict[str, Tensor]:
        """The deployed model's own tensors of those that a version exchanges."""
        values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {name: values[name].detach() for name in self._candidate()}

    def _candidate(self) -> dict[str, Tensor]:
        gathered = self.strategy.gathered
        return {**self.strategy.weights(), **(gathered.values if gathered is not None else {})}

    def _publish(self, reason: str) -> int:
        """A new version: in shadow mode it is served from now on, inline it is one more to go back to."""
        self._since = 0
        if self.mode == "shadow":
            if any(not bool(value.isfinite().all()) for value in self._candidate().values()):
                self.strategy.reset()
                self._tell("reset", "what was learned holds values that are not finite: nothing of it is kept", version=self.version)
                return self.version
            self.newest += 1
            weights = copied(self._candidate())
            self.serve(self.newest, weights)
        else:
            weights = {}
        self.versions.append(Version(self.version, self.batches, self.strategy.snapshot(), weights))
        if self.mode == "shadow":
            self._tell("promoted", reason, version=self.version)
        return self.version

    def serve(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """In shadow mode: answer with these tensors in the place of the deployed model's, as this version; none for version 0."""
        with self._serving:
            exchanged(self.served, {**self._deployed, **weights})
            self.version = number

    def promote(self) -> int:
        """Serve what has been learned so far as a new version, whatever the guard thinks; inline: keep it to go back to. Its number."""
        with self._entered():
            if any(not bool(value.isfinite().all()) for value in self._candidate().values()):
                raise ConfigError("what was learned holds values that are not finite, and is not promoted: roll back or reset first")
            return self._publish("asked for")

    def rollback(self, version: int | None = None) -> int:
        """Go back to the version before the one that is served, or to a numbered one; 0 is the model as it was deployed. Its number."""
        with self._entered():
            now = self.version or (self.versions[-1].number + 1 if self.versions else 0)  # 0 may be served for a while
            there = [one for one in self.versions if one.number < now] if version is None else self.versions
            chosen = next((one for one in reversed(there) if version is None or one.number == version), None)
            if chosen is None and version is None and not self.version and not self.versions:
                raise ConfigError("there is no version before this one: it is the model as it was deployed")
            if chosen is None and version not in (None, 0):
                known = ", ".join(str(number) for number in [0, *(one.number for one in self.versions)])
                raise ConfigError(f"there is no version {version} to go back to; there {'are' if self.versions else 'is'} {known}")
            if chosen is None:
                self.strategy.reset()
            else:
                self.strategy.rewind(chosen.snapshot)
            while self.versions and self.versions[-1].number > (chosen.number if chosen else 0):
                self.versions.pop()
            number = chosen.number if chosen else 0
            if self.mode == "shadow":
                self.serve(number, chosen.weights if chosen else {})
            self.version, self._since = number, 0
            self.labels.compared.clear()
            if self.guard is not None:
                self.guard.forget()
            self._tell("rollback", "asked for", version=number)
            return number

    def reset(self) -> None:
        """Be as deployed: the model, what the method keeps, the guard. Counts and events stay; versions are numbered on."""
        with self._entered():
            self.strategy.reset()
            self.versions.clear()
            if self.mode == "shadow":
                self.serve(0, {})
            self.version = self.cooling = self._since = self._new = 0
            self._recent = None
            self.labels.compared.clear()
            if self.guard is not None:
                self.guard.restart()
            self._tell("reset", "asked for", version=0)

    def close(self) -> None:
        """Leave the module as it is now, with the gradients wanted that were wanted before the loop: for who goes on training it, or puts
        another loop around it. This one does nothing more."""
        if self.closed:
            return
        with self._entered():
            for value, wanted in self.flags:
                value.requires_grad_(wanted)
            self.closed = True

    def snapshot(self) -> dict[str, Any]:
        """What adapting has changed: the adapted tensors and what the method keeps, never the model. `restore` takes it."""
        with self._entered():
            return {"version": self.version, "snapshot": self.strategy.snapshot(), "weights": copied(self.served_weights())}

    def state(self) -> dict[str, Any]:
        """All that the loop needs to go on where it was, as a tree of tensors and JSON values, but for the canary, which is given anew, and
        for samples: what they were answered is kept, so that labels which come later are matched and scored, and they are not.
        `restore` takes it, on a loop that was made in the same way."""
        with self._entered():
            recent = self._recent
            return {
                "strategy": self.strategy.state(),
                "fisher": dict(self._fisher),
                "ids": self._ids,
                "version": self.version,
                "newest": self.newest,
                "weights": copied(self.served_weights()),
                "versions": [
                    {"number": one.number, "batch": one.batch, "snapshot": one.snapshot, "weights": one.weights} for one in self.versions
                ],
                "counts": {"loop": dict(self.counts), "strategy": dict(self.strategy.counts)},
                "numbers": [self.batches, self.samples, self.cooling, self._since, self._new, self._canary_at, self._lessons],
                "recent": None if recent is None else {"inputs": recent.inputs, "ids": recent.ids, "present": recent.present},
                "labels": self.labels.state(),
                "events": [dict(one) for one in self.happened],
                "guard": None if self.guard is None else self.guard.state(),
            }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when `state` or `snapshot` was called."""
        if not isinstance(state, Mapping) or not {"version", "weights"} <= state.keys() or not {"strategy", "snapshot"} & state.keys():
            raise ConfigError("this is no state of an online loop: give what `state` or `snapshot` returned")
        if "versions" in state and "labels" not in state:
            raise ConfigError("this state of an online loop was written by another version of streamcl: put that back, or begin anew")
        with self._entered():
            fresh = state["strategy"]["now"] if "strategy" in state else state["snapshot"]
            self._check_fit(fresh)
            if "strategy" in state:
                self.strategy.restore(state["strategy"])
            else:
                self.strategy.rewind(fresh)
            number = int(state["version"])
            if self.mode == "shadow":
                self.serve(number, copied(state["weights"]))
            self.version, self.newest = number, max(self.newest, number)
            if "versions" not in state:
                if self.guard is not None:
                    self.guard.forget()
                return
            self.newest = int(state["newest"])
            self.versions.clear()
            self.versions.extend(Version(int(v["number"]), int(v["batch"]), v["snapshot"], v["weights"]) for v in state["versions"])
            counts = state["counts"]
            self.counts, self.strategy.counts = dict(counts["loop"]), dict(counts["strategy"])
            self.batches, self.samples, self.cooling, self._since, self._new, self._canary_at, self._lessons = state["numbers"]
            self._fisher, self._ids = dict(state["fisher"]), int(state["ids"])
            recent = state["recent"]
            self._recent = (
                None if recent is None else Batch(dict(recent["inputs"]), None, recent["ids"], recent["present"]).to(self.context.device)
            )
            self.labels.restore(state["labels"])
            self.happened.clear()
            self.happened.extend(dict(one) for one in state["events"])
            if self.guard is not None and state["guard"] is not None:
                self.guard.restore(state["guard"])

    def _check_fit(self, snapshot: Mapping[str, Any]) -> None:
        """Raise ConfigError for what another method or another model has left, before anything is touched."""
        mine, theirs = self.strategy.snapshot(), snapshot
        own, given = mine["own"], theirs["own"]
        same = {name: tuple(value.shape) for name, value in mine["adapted"].items()} == {
            name: tuple(value.shape) for name, value in theirs["adapted"].items()
        }
        if not same or own.keys() != given.keys() or (mine["optimizer"] is None) != (theirs["optimizer"] is None):
            raise ConfigError(f"this state is of another model or of another method than {plugin_name(self.strategy)}: nothing was changed")

    def served_weights(self) -> dict[str, Tensor]:
        """In shadow mode: the tensors in which the version that is served differs from the deployed model; none for version 0."""
        if self.mode != "shadow" or self.version == 0:
            return {}
        return self._named(self.served)

    # -- labels that come late --------------------------------------------------------------------------------------------------

    def feedback(self, ids: Tensor | Sequence[int], targets: Tensor | Sequence[int], correct: bool = False) -> dict[str, Any]:
        """Labels of samples that were answered, by their ids. They are scored, and compared with the deployed model where the samples are
        still there (`remember`) or were compared anyway; the guard heeds them. With `correct` the model learns from them as well."""
        with self._entered():
            if self.strategy.info.target != "class":
                raise ConfigError("feedback takes classes, and this model's answers are something else")
            ids, targets = self.labels.checked(ids, targets)
            if correct and not self.labels.remember:
                raise ConfigError("to learn from labels that come late the loop must keep the samples until then: set remember")
            found = self.labels.take(ids, targets, self._frozen)
            learned = self._correct(self.labels.labelled(ids, targets)) if correct else 0
            return {**self.labels.figures(), "found": found, "learned": learned}

    def _correct(self, samples: Batch | None) -> int:
        if samples is None:
            return 0
        self.strategy.correct(samples)
        self._since += 1
        if self.mode == "inline":
            self.newest += 1
            self.version = self.newest
        return len(samples)

    # -- before, and what is told -----------------------------------------------------------------------------------------------

    def watch(self, canary: Sequence[Batch]) -> None:
        """Labelled samples, prepared, that decide about promotion and going back."""
        if self.guard is None:
            raise ConfigError("a canary is watched by the guard, and there is none: set guard")
        with self._entered():
            self.canary = list(canary)
            count = self._frozen(self.canary[0]).shape[1]
            for one in self.canary:
                if one.target is None or bool(((one.target < 0) | (one.target >= count)).any()):
                    raise DataError(f"the canary holds a class that the model does not have: it has 0 to {count - 1}")
            self.guard.canary_source = self._on_canary(self._frozen)

    def refer(self, batches: Sequence[Batch]) -> None:
        """Labelled samples, prepared, for a method that refers to them. Before anything is served."""
        with self._entered():
            self.strategy.refer(batches)

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Unlabelled data of the source: for methods that need it, and for the guard's measure of distance. Before anything is served."""
        strategy = self.strategy
        with self._entered():
            taken = [self._take(one) for one in batches]
            if not taken:
                raise DataError("calibration data was given, and there is no batch in it")
            with torch.enable_grad():
                strategy.calibrate(iter(taken))
            strategy.calibrated()
            if self.guard is None or strategy.info.target != "class" or not strategy.adapted:
                return
            draw = torch.Generator(device=self.context.device).manual_seed(0)
            total, samples = {name: torch.zeros_like(value) for name, value in strategy.adapted.items()}, 0
            for batch in taken:  # of batches, which is a lower bound of that of samples by up to the batch's size: so it is scaled
                with torch.enable_grad():
                    logits = self.model(batch)
                    drawn = logits.softmax(dim=1).multinomial(1, generator=draw).squeeze(1)
                    cross_entropy(logits, drawn).backward()
                for name, value in strategy.adapted.items():
                    if value.grad is not None:
                        total[name] += len(batch) ** 2 * value.grad**2
                        value.grad = None
                samples += len(batch)
            self._fisher = {name: value / samples for name, value in total.items()}

    def status(self) -> dict[str, Any]:
        """What is going on, in JSON values."""
        guard, strategy = self.guard, self.strategy
        return {
            "mode": self.mode,
            "strategy": plugin_name(strategy),
            "version": self.version,
            "versions": [0, *(one.number for one in self.versions)],
            "batches": self.batches,
            "samples": self.samples,
            "counts": {**strategy.counts, **self.counts},
            "milliseconds": {name: round(value, 3) for name, value in self._costs.items()},
            "guard": None
            if guard is None
            else {
                "bypassing": guard.bypassing,
                "resumes_at": guard.until,
                "prefers_frozen": guard.serves_frozen,
                "strikes": guard.struck,
                "cooling": self.cooling,
                **{name: round(value, 5) for name, value in guard.figures.items()},
            },
            "feedback": self.labels.figures(),
            "events": [dict(one) for one in self.happened],
        }

    def _tell(self, kind: str, reason: str, **more: Any) -> None:
        event = {"batch": self.batches, "samples": self.samples, "what": kind, "reason": reason, **more}
        self.happened.append(event)
        self._count(kind)
        self.context.events.emit("guard", **event)

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number


def _fits(recent: Batch | None, batch: Batch) -> bool:
    """Whether samples can stand in one batch with those before them: of one shape and kind."""
    if recent is None or recent.inputs.keys() != batch.inputs.keys():
        return False
    pairs = [(one, batch.inputs[name]) for name, one in recent.inputs.items()]
    return all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b)
        for a, b in pairs
    )


def _last(prediction: Prediction, count: int) -> Prediction:
    """The answers to the last samples of a window."""
    assert prediction.scores is not None
    return prediction if len(prediction.scores) == count else replace(prediction, scores=prediction.scores[-count:])


def _sound(scores: Tensor) -> bool:
    """Whether scores can be served; minus infinity is a class that is masked."""
    return not bool((scores.isnan() | scores.isposinf()).any())
