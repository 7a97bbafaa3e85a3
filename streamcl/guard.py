"""The guard of the online loop: what it watches without a label, and when it steps in.

On a share of the batches three answers are compared, that of the model that adapts (A), that of the source's weights under the statistics
of the batch, or whatever else the method normalises by (R), and that of the model as it was deployed (F).

statistics   Entropy is no judge of a model that was trained to lower it, but R and F have the same weights. Where they decide differently
             in more than a few samples, R must be the more certain one to be used; else F is served, and nothing is learned, until it
             is. Statistics of a batch do harm where neighbouring samples are of few classes. Whether they are is seen in the decisions of R
             and F: of blocks of samples, how much of the diversity of the decisions lies between the blocks. Where it is `correlation` of
             the logarithm of the number of classes or more, R must earn its place: more certain by `gain` of that logarithm for each
             sample in which it decides differently. Models without batch normalisation have R = F and nothing to choose between. Methods
             that count on such neighbours (LAME) are served only where they are seen.
drift        The share of samples in which A and R decide differently may be `disagreement`, and `slack` times the share of which R
             itself is unsure (1 minus its mean confidence). Beyond it, adapting has gone astray: the earliest sign of a collapse.
diversity    The entropy of the classes that A decided for over the newest samples is not below `diversity` of that of R, and no class
             has `share` more of A's decisions than of R's. R is the yardstick, so that a stream sorted by class is no alarm.
fisher       With calibration data: half the squared distance to the source's weights in the Fisher metric of the source, in nats
             (the divergence of the answers, to second order), stays under `drift`.
canary       With labelled samples: their accuracy does not fall more than `drop` below that of the deployed model.
feedback     With labels that come late: the model that adapts is not worse than the deployed one on the same samples, beyond `drop` and
             two standard errors. If it is better by as much, that overrules the choice by certainty: a shift can make the deployed model
             certain of the wrong class, and only labels tell.
not finite   Answers that are not finite are never served. A step whose loss or gradient is not finite is not made at all.

What drift, diversity, fisher and canary say is a strike. The first ones restore the last state that the guard was content with, and updates
rest for `cooldown` batches; after `strikes` of them the source's weights are restored and adapting stops: R or F are served, and it is
tried again after `retry` batches, then after twice as many, and so on up to 64 times as many. After as many looks without a fault a strike
is forgotten.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.plugins import near_name

Remedy = Literal["restore", "bypass"]
CHANGED = 0.05  # nats of mean entropy, beside a third of it: answers that are not what they were
QUICK = 32  # samples by which the statistics are chosen
HARDLY = 0.02  # the share of decisions by which two models hardly differ
NOTHING = 0.01  # nats: a difference in certainty that is no reason to exchange what is served


class Guard:
    """The limits that a guard watches over, and what it has seen. One guard belongs to one loop."""

    def __init__(
        self,
        *,
        compare: int = 4,
        memory: int = 256,
        z: float = 2.0,
        gain: float = 0.2,
        correlation: float = 0.05,
        disagreement: float = 0.01,
        slack: float = 1.0,
        shift: float = 0.5,
        diversity: float = 0.7,
        share: float = 0.3,
        drift: float = 1.0,
        drop: float = 0.02,
        canary_every: int = 16,
        strikes: int = 2,
        cooldown: int = 8,
        retry: int | None = 200,
    ) -> None:
        for name, number in (("compare", compare), ("memory", memory), ("canary_every", canary_every), ("strikes", strikes)):
            if number < 1:
                raise ConfigError(f"guard: {name} is {number}: 1 or more is needed")
        self.compare, self.memory, self.z, self.gain, self.correlation = compare, memory, z, gain, correlation
        self.disagreement, self.slack, self.shift = disagreement, slack, shift
        self.diversity, self.share = diversity, share
        self.drift, self.drop, self.canary_every = drift, drop, canary_every
        self.limit, self.cooldown, self.retry = strikes, cooldown, retry
        self.struck = 0  # strikes since the last restart
        self.bypasses = 0
        self.until: int | None = None  # the batch at which adapting is tried again; None while it goes on, or for ever
        self.bypassing = False
        self.prefers_frozen = False
        self.alert = True  # whether every batch is compared: at the beginning, after a restart, and while something is near its limit
        self.figures: dict[str, float] = {}
        self.canary_source: float | None = None
        self.distrusts = False  # labels have shown that it may be the statistics
        self.quiet = 0  # looks since anything was wrong
        self.overruled = False  # labels have shown that what adapts is better
        self._arrival = _Arrival()
        self._sums: Tensor | None = None
        self._certain: Tensor | None = None  # of the choice of statistics, which has to be quick

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Guard:
        """From a mapping, as a person writes it."""
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        for name in options:
            if name not in known:
                raise ConfigError(f"guard: there is no {name!r}{near_name(name, known) or '; there are ' + ', '.join(known)}")
        return cls(**options)

    @property
    def serves_frozen(self) -> bool:
        """Whether the deployed model is served: statistics of the batch do harm, or labels have shown that they may."""
        return self.prefers_frozen or self.distrusts

    def due(self, number: int, entropy: float) -> bool:
        """Whether this batch is compared: one in `compare`, and each while something is near its limit or the answers, by their mean
        entropy, are not what they were when they were last compared. That entropy is of the batch at hand, which makes whoever answers wait
        for the device: a batch later the first answers after an abrupt shift, or ones that are not finite, would be served unseen."""
        if self.bypassing:
            return number % self.compare == 0
        before = self.figures.get("entropy_last", math.inf)
        changed = abs(entropy - before) > 0.3 * before + CHANGED if math.isfinite(before) else False
        return self.alert or self.prefers_frozen or number % self.compare == 0 or changed

    def look(
        self, answered: Tensor, reference: Tensor, frozen: Tensor, target: str = "class", needs_correlation: bool = False
    ) -> str | None:
        """Take in three answers to one batch, and say what is wrong, if anything is. With `needs_correlation`, A is a method that is right
        only where neighbouring samples are of few classes."""
        if target != "class":
            return self._look_at_values(answered.double(), reference.double())
        now = _signals(answered.float(), reference.float(), frozen.float()).cpu()
        if not bool(now.isfinite().all()):
            self.alert = True
            return "an answer is not finite"
        count = len(answered)
        kept = math.exp(-count / self.memory)
        self._sums = now if self._sums is None else kept * self._sums + now
        fresh, kept = now[[0, 3, 4, 7]], math.exp(-count / QUICK)
        self._certain = fresh if self._certain is None else kept * self._certain + fresh
        chosen_by, lower, squared, apart = self._certain.tolist()
        mean = lower / chosen_by
        error = math.sqrt(max(0.0, squared / chosen_by - mean**2) / chosen_by)
        samples, differs, unsure, _, _, certain_a, certain_f = self._sums[:7].tolist()
        mine, yours, _ = self._sums[8:].view(3, -1)
        limit = self.disagreement + self.slack * unsure / samples
        spread, usual = _spread(mine), _spread(yours)
        lead = float(((mine - yours) / samples).max()) if len(mine) else 0.0
        together = self._arrival.take(now[8:].view(3, -1)[1:], count)
        log_classes = math.log(max(2, mine.numel()))
        earned = self.z * error + NOTHING
        if apart > HARDLY * chosen_by:
            correlated = together is None or together > self.correlation * log_classes
            earned = -self.gain * log_classes * apart / chosen_by if correlated else 0.0
        unfit = mean > earned
        if needs_correlation:
            unfit = together is None or together <= self.correlation * log_classes
        self.prefers_frozen = unfit and not self.overruled
        self.figures = {
            "disagreement": differs / samples,
            "limit": limit,
            "entropy": certain_a / samples,
            "entropy_last": float(now[5]) / count,
            "entropy_frozen": certain_f / samples,
            "statistics": mean,
            "earned_at": earned,
            **({} if together is None else {"correlation": together}),
            "diversity": spread,
            "diversity_source": usual,
        }
        enough = samples >= min(32, self.memory / 2)
        self.alert = not enough or differs / samples > 0.6 * limit
        if enough and differs / samples > limit:
            return f"drift: {differs / samples:.0%} of the decisions differ from the source's, and {limit:.0%} may"
        if enough and samples >= 64 and spread < self.diversity * usual and usual > 0.1:
            return f"diversity: the decisions spread over classes with an entropy of {spread:.2f}, the source's with {usual:.2f}"
        if enough and samples >= 64 and lead > self.share:
            return f"diversity: one class has {lead:.0%} more of the decisions than the source gives it"
        return None

    def _look_at_values(self, answered: Tensor, reference: Tensor) -> str | None:
        """Of values: their mean distance from R's, in standard deviations of what R has said over the newest samples."""
        count = len(answered)
        sums = [(answered - reference).abs().mean(1).sum(), reference.mean(1).sum(), (reference**2).mean(1).sum()]
        now = torch.stack([sums[0].new_tensor(float(count)), *sums]).cpu()
        if not bool(now.isfinite().all()):
            return "an answer is not finite"
        self._sums = now if self._sums is None else math.exp(-count / self.memory) * self._sums + now
        samples, apart, first, second = self._sums.tolist()
        scale = math.sqrt(max(1e-12, second / samples - (first / samples) ** 2))
        self.figures = {"distance": apart / samples / scale, "limit": self.shift}
        enough = samples >= min(32, self.memory / 2)
        self.alert = not enough
        if enough and apart / samples > self.shift * scale:
            return f"drift: the answers are {apart / samples / scale:.2f} standard deviations from the source's, and {self.shift:g} may be"
        return None

    def look_at_canary(self, accuracy: float, samples: int) -> str | None:
        """What is wrong with this accuracy on the canary, if anything is."""
        self.figures["canary"] = accuracy
        assert self.canary_source is not None
        if accuracy < self.canary_source - max(self.drop, 1.5 / samples):
            return f"canary: {accuracy:.1%} of the labelled samples are right, and {self.canary_source:.1%} were with the deployed model"
        return None

    def look_at_labels(self, ours: int, theirs: int, apart: int, samples: int) -> str | None:
        """What labelled samples say: how many answers of the adapting model were right, of the deployed one, and of one alone."""
        lead, beyond = (ours - theirs) / samples, max(self.drop, 2 * apart**0.5 / samples)
        self.figures["feedback"] = lead
        self.overruled = lead > (0 if self.overruled else beyond)
        if lead < -beyond:
            return f"feedback: {ours / samples:.1%} of the labelled answers were right, and {theirs / samples:.1%} of the deployed model's"
        return None

    def look_at_drift(self, distance: float) -> str | None:
        """What is wrong with this distance to the source in nats, if anything is."""
        self.figures["fisher"] = distance
        return (
            f"fisher: the weights are {distance:.2f} nats from the source's, and {self.drift:g} may be" if distance > self.drift else None
        )

    def strike(self, number: int, final: bool = False, statistics: bool = False) -> Remedy:
        """What to do about it, at this batch: `final` where there is nothing to restore. With `statistics` it may be those that do harm."""
        self.struck, self.quiet = self.struck + 1, 0
        self.forget()
        if self.struck < self.limit and not final:
            return "restore"
        self.bypassing, self.bypasses, self.distrusts = True, self.bypasses + 1, statistics
        self.until = None if self.retry is None else number + self.retry * 2 ** min(self.bypasses - 1, 6)
        return "bypass"

    def calm(self) -> None:
        """Nothing is wrong. After as many such looks as a retry has batches an old strike is forgotten, and so is a bypass."""
        self.quiet += 1
        if self.quiet >= (self.retry or 200):
            self.struck, self.bypasses, self.quiet = max(0, self.struck - 1), max(0, self.bypasses - 1), 0

    def retries(self, number: int) -> bool:
        """Whether adapting, which was stopped, is tried again at this batch; then it is."""
        if not self.bypassing or self.until is None or number < self.until:
            return False
        self.bypassing, self.until, self.struck, self.distrusts = False, None, self.limit - 1, False
        self.forget()
        return True

    def forget(self) -> None:
        """What was seen is of a model that is no longer there. The choice of statistics, which is not about that model, stays."""
        self._sums, self.alert = None, True

    def restart(self) -> None:
        """As at the beginning."""
        self.struck = self.bypasses = 0
        self.bypassing, self.until, self.prefers_frozen, self.overruled, self.distrusts = False, None, False, False, False
        self.quiet = 0
        self._sums, self._certain, self.alert, self.figures, self._arrival = None, None, True, {}, _Arrival()

    def state(self) -> dict[str, Any]:
        return {
            "struck": self.struck,
            "bypasses": self.bypasses,
            "until": self.until,
            "bypassing": self.bypassing,
            "prefers_frozen": self.prefers_frozen,
            "alert": self.alert,
            "overruled": self.overruled,
            "distrusts": self.distrusts,
            "quiet": self.quiet,
            "figures": dict(self.figures),
            "canary_source": self.canary_source,
            "sums": None if self._sums is None else self._sums.clone(),
            "certain": None if self._certain is None else self._certain.clone(),
            "blocks": list(self._arrival.blocks),
            "open": self._arrival.open,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in (
            "struck",
            "bypasses",
            "until",
            "bypassing",
            "prefers_frozen",
            "alert",
            "overruled",
            "distrusts",
            "quiet",
            "canary_source",
        ):
            setattr(self, name, state[name])
        self.figures = dict(state["figures"])
        self._sums, self._certain = (None if state[name] is None else state[name].clone() for name in ("sums", "certain"))
        self._arrival.blocks, self._arrival.open = list(state["blocks"]), state["open"]


class _Arrival:
    """How correlated neighbouring samples are, by the decisions of two models: of blocks of samples, the information that a block's number
    tells about a decision (with Miller and Madow's correction for few samples). Classes are folded into a few bins, so that a block says
    something about them. Known once there are three blocks."""

    BINS, BLOCK, BLOCKS = 16, 32, 16

    def __init__(self) -> None:
        self.blocks: list[Tensor] = []  # (models, bins) each
        self.open: Tensor | None = None

    def take(self, counts: Tensor, samples: int) -> float | None:
        """`counts` of decisions by model and class  # (2, classes)"""
        folded = torch.zeros(len(counts), self.BINS, dtype=counts.dtype)
        folded.index_add_(1, torch.arange(counts.shape[1]) % self.BINS, counts)
        self.open = folded if self.open is None else self.open + folded
        if float(self.open[0].sum()) >= self.BLOCK:
            self.blocks, self.open = [*self.blocks[1 - self.BLOCKS :], self.open], None
        if len(self.blocks) < 3:
            return None
        blocks = torch.stack(self.blocks)  # (blocks, models, bins)
        sizes = blocks.sum(2)  # (blocks, models)
        within = (sizes * _corrected(blocks)).sum(0) / sizes.sum(0)
        return float((_corrected(blocks.sum(0)) - within).max().clamp(min=0))


def _corrected(counts: Tensor) -> Tensor:
    """The entropy of counts along their last dimension."""
    totals = counts.sum(-1, keepdim=True).clamp(min=1)
    shares = counts / totals
    return -(shares * (shares + 1e-12).log()).sum(-1) + ((counts > 0).sum(-1) - 1).clamp(min=0) / (2 * totals.squeeze(-1))


def _signals(a: Tensor, r: Tensor, f: Tensor) -> Tensor:
    """Sums over a batch: samples, decisions that differ, how unsure R is, H(R) - H(F) and its square, H(A), H(F), samples in which R
    and F differ, decisions by class of A, R and F."""
    log_r = r.log_softmax(1)
    h_a, h_r, h_f = (torch.special.entr(scores.softmax(1)).sum(1) for scores in (a, r, f))
    said, usual, first = a.argmax(1), r.argmax(1), f.argmax(1)
    lower, classes = h_r - h_f, a.shape[1]
    sums = torch.stack(
        [
            torch.full_like(h_a[0], len(a)),
            (said != usual).sum().to(h_a.dtype),
            (1 - log_r.max(1).values.exp()).sum(),
            lower.sum(),
            (lower**2).sum(),
            h_a.sum(),
            h_f.sum(),
            (usual != first).sum().to(h_a.dtype),
        ]
    )
    counts = [
        torch.zeros(classes, device=a.device, dtype=h_a.dtype).scatter_add_(0, which, torch.ones_like(h_a))
        for which in (said, usual, first)
    ]
    return torch.cat([sums, *counts]).double()


def _spread(counts: Tensor) -> float:
    """The entropy of decisions by class."""
    shares = counts / counts.sum().clamp(min=1e-12)
    return float(-(shares * (shares + 1e-12).log()).sum()) if len(counts) else 0.0
