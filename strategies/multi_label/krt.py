"""KRT: knowledge restore and transfer for multi-label class-incremental learning (Dong et al., ICCV 2023).

Classes of earlier tasks are in the new samples, and nobody annotates them. From the second task on the model before it, the teacher, gives
pseudo-labels, and one block of cross-attention reads the places of a picture for each session, with what old sessions saw held in place:

    restore    y_c = 1 for old c with p_c > eta;  0 where else nothing is annotated       p: the teacher's on the very view that is learned
    eta        before each task from its last value (0.8 at first) in at most 100 steps of 0.005 until | m(eta) - mu | <= 0.1
               m: old classes above eta per sample of the task;   mu = cardinality x old classes / all classes
    transfer   `_cross_attention.py`: e_i = block(k; r_i; places), a head for each session; old r_i and heads frozen
    L          ASL(z, y) + token_weight sqrt(seen / new) (1 - cos(E, E'))      E: e_1 ... e_(t-1) side by side, E' the teacher's

`cardinality` is the number of classes that a sample of the data carries (the paper: 2.9 for COCO, 1.4 for VOC). Where it is not given it
is estimated from the first task, in which every sample has one of its n classes at least: if each class is there with the same chance q,
a sample of it carries n q / (1 - (1 - q)^n), which is solved for q. `threshold`: a number for one that stays, null for no pseudo-labels.
`attention: false` keeps the backbone's own features and a linear head: pseudo-labels alone, on any backbone. The cross-attention needs
features by place (`Backbone.patches`).

`replay_labels` makes it KRT-R: `memory.exemplars` are herded for each class, by features of length 1, and learned with every later task.
`original` leaves them the annotations of their own task; `widened` is what the released code does: they get the true labels of later tasks
too, so numbers of the two do not compare. It follows from a stream whose samples come back in every task that has one of their classes.

Defaults are those of the released code for COCO B0-C10: width 384, 8 heads, token_weight 100 (80 and 300 elsewhere), Adam at 1e-4, weight
decay 1e-4 on matrices only, 20 epochs, batch 64 (a step of a process), ASL with gamma 4 and 0 unless a term brings another criterion. Its
base session learns at 4e-5, which is a matter of `stages`; its one-cycle rate is a cosine with a fifth of warm-up here, by epochs.
Choices: cosines are averaged over the batch; queries, keys and values have no bias; annotated old labels (replay) stay what they are;
where 100 steps do not suffice, the best eta is kept and a warning says so (the released code stops).

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from streamcl.context import Context
from streamcl.data import Joined, Subset, whole
from streamcl.errors import ConfigError
from streamcl.nn.model import Model
from streamcl.options import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from streamcl.stream import Batch, Dataset, StreamInfo, Task

from ..terms.asl import ASL
from ._cross_attention import CrossAttention, Spread
from ._label_sets import LabelSets, widened

FIRST, STEP, STEPS, TOLERANCE = 0.8, 0.005, 100, 0.1
LOWEST, HIGHEST = 1e-4, 0.999999
NONE, OTHER = -1, -2  # no class, and one of an earlier task
COLUMN = "annotated"  # beside an exemplar: its labels, those of later tasks too


class KRT(LabelSets):
    selection = "herding"
    fills_memory = True
    predicts_with = ("sizes",)

    def __init__(
        self,
        *,
        cardinality: PositiveFloat | None = None,
        threshold: Fraction | Literal["dynamic"] | None = "dynamic",
        attention: bool = True,
        dim: PositiveInt = 384,
        heads: PositiveInt = 8,
        token_weight: NonNegativeFloat = 100.0,
        replay_labels: Literal["original", "widened"] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if attention and dim % heads:
            raise ConfigError(f"krt: dim is {dim} and heads is {heads}: dim must be a multiple of it")
        if cardinality is not None and threshold != "dynamic":
            raise ConfigError("krt: cardinality tunes the threshold of the pseudo-labels, and this one is fixed: leave it out")
        if self.replay:
            raise ConfigError("krt learns all its exemplars with every task, and replay would bring these in again: set replay_labels only")
        self.cardinality, self.threshold, self.attention, self.dim, self.heads = cardinality, threshold, attention, dim, heads
        self.token_weight, self.replay_labels = token_weight, replay_labels
        self.needs_exemplars = replay_labels is not None
        if threshold == "dynamic" or replay_labels:
            self.reads_again = "a task again to tune its threshold and to choose exemplars"
        self.teacher: Model | None = None
        self.eta = FIRST if threshold == "dynamic" else threshold
        self.chance: float | None = None  # that a sample carries a class
        self.above: Tensor | None = None  # labels above each candidate for eta, while these are counted
        self.known = 0

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.cardinality is not None:
            if info.classes is None or self.cardinality > info.classes:
                there = "does not say how many classes it has" if info.classes is None else f"has {info.classes} classes"
                raise ConfigError(f"krt: cardinality is {self.cardinality:g} labels per sample, and the stream {there}: leave it out")
            self.chance = self.cardinality / info.classes
        if not any(term.criterion for term in self.terms):
            self.criterion = ASL().loss_of
        if self.attention:
            self.read_places(info, context)

    def read_places(self, info: StreamInfo, context: Context) -> None:
        try:
            spread = Spread(self.model.backbone, info, context)
        except ConfigError as error:
            raise ConfigError(f"krt reads a picture place by place: {error}; or set strategy.attention=false for a plain head") from None
        self.model.backbone = spread
        self.model.head = CrossAttention(spread.places, spread.width, self.dim, self.heads).to(context.device)  # type: ignore[assignment]
        self.model.remember()

    @property
    def sizes(self) -> Tensor:
        """The classes of each session; none without cross-attention."""
        head = self.model.head
        return torch.tensor(head.sizes if isinstance(head, CrossAttention) else [], dtype=torch.int64)

    @sizes.setter
    def sizes(self, sizes: Tensor) -> None:
        if isinstance(self.model.head, CrossAttention):
            self.model.head.divide(sizes.tolist())

    # -- a task -----------------------------------------------------------------------------------------------------------------

    def enter_task(self, task: Task) -> None:
        super().enter_task(task)
        self.known = len(task.seen) - len(task.classes)
        self.balance = math.sqrt(len(task.seen) / max(1, len(task.classes)))
        if isinstance(self.model.head, CrossAttention):
            self.model.head.hold(all_sessions=not task.classes)

    def before_task(self, task: Task) -> None:
        if self.threshold == "dynamic" and self.chance is None:
            self.chance = chance_of_a_class(task.train.targets, len(task.classes))
        if self.known:
            self.teacher = self.model.copy()
            self.teacher.head.resize(self.known)
            if self.threshold == "dynamic":
                self.tune(task)

    def training_data(self, task: Task) -> Dataset:
        return Joined([task.train, self.rehearsed()]) if len(self.memory.exemplars) and self.replay_labels else task.train

    def loss(self, batch: Batch) -> Tensor:
        model = self.model
        features = self.features = model.backbone(batch)
        embeddings = model.head.embed(features) if isinstance(model.head, CrossAttention) else features
        logits = self.logits = model.head.classify(embeddings) if isinstance(model.head, CrossAttention) else model.head(features)
        assert batch.target is not None
        target = widened(batch.target, logits.shape[1])
        if self.teacher is None:
            return self.criterion(logits, target)
        with torch.no_grad():
            before = self.teacher.backbone(batch)
            if isinstance(self.teacher.head, CrossAttention):
                before = self.teacher.head.embed(before)
                old = self.teacher.head.classify(before)
            else:
                old = self.teacher.head(before)
        loss = self.criterion(logits, self.restored(target, old.double().sigmoid()))
        if self.attention and self.token_weight:
            drift = 1 - cosine_similarity(embeddings[:, : before.shape[1]].flatten(1), before.flatten(1))  # (batch,)
            loss = loss + self.token_weight * self.balance * drift.mean()
        return loss

    def restored(self, target: Tensor, old: Tensor) -> Tensor:
        """The labels with the teacher's, of whose probabilities `old` those above eta say that a class is there."""
        if self.eta is None:
            return target
        annotated = target[:, : self.known]
        labels = torch.where(annotated < 0, (old > self.eta).to(target.dtype), annotated)
        return torch.cat([labels, target[:, self.known :]], dim=1)

    @torch.no_grad()
    def tune(self, task: Task) -> None:
        """Move eta until the teacher finds as many old classes in a sample as there should be."""
        assert self.teacher is not None and self.chance is not None and self.eta is not None
        context, data = self.context, self.training_data(task)
        candidates = (self.eta + STEP * torch.arange(-STEPS, STEPS + 1, dtype=torch.float64)).clamp(LOWEST, HIGHEST)
        if self.above is None:
            self.above = torch.zeros(len(candidates), dtype=torch.float64, device=context.device)
        thresholds = candidates.to(context.device)
        for raw in context.batches(data, self.batch, name="threshold", shuffle=False):
            with context.autocast():
                found = self.teacher(context.prepare(raw)).double().sigmoid().flatten()
            places = torch.searchsorted(thresholds, found)  # how many candidates each probability is above
            counts = torch.bincount(places, minlength=len(thresholds) + 1).to(self.above)
            self.above += counts.flip(0).cumsum(0).flip(0)[1:]
        per_sample, self.above = (self.above / len(data)).tolist(), None
        wanted = self.chance * self.known
        place, reached = settle(per_sample, STEPS, wanted)
        self.eta = candidates[place].item()
        if not reached:
            context.events.warn(
                f"krt: with {task.name} no threshold within {STEPS} steps gives {wanted:.2f} old classes per sample as they should be "
                f"({self.eta:.3f} gives {per_sample[place]:.2f}): set strategy.cardinality to the number of labels that samples really have"
            )
        context.log(eta=self.eta)

    def after_task(self, task: Task) -> None:
        self.teacher = None
        if self.replay_labels:
            self.widen(task)
            self.choose(task)

    def parameter_groups(self) -> list[dict[str, Any]]:
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {"params": [p for p in learned if p.dim() > 1]},
            {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
        ]

    # -- exemplars --------------------------------------------------------------------------------------------------------------

    def rehearsed(self) -> Dataset:
        """The exemplars, with the labels that they are learned with."""
        data = self.memory.exemplars.dataset()
        if self.replay_labels == "original":
            return data
        labels = whole(data).extra[COLUMN]
        assert isinstance(labels, Tensor)
        return Subset(data, torch.arange(len(data)), targets=labels)

    def widen(self, task: Task) -> None:
        """What the task says of the exemplars that came with it; of its classes, those that did not come carry none."""
        exemplars = self.memory.exemplars
        if self.replay_labels != "widened" or not len(exemplars):
            return
        data = exemplars.dataset()
        labels = whole(data).extra[COLUMN]
        assert isinstance(labels, Tensor)
        absent = 0 if task.about.get("complete", False) else -1
        own = torch.full((len(data), len(task.classes)), absent, dtype=labels.dtype)
        order = task.train.ids.argsort()
        rows = order[torch.searchsorted(task.train.ids[order], data.ids).clamp(max=len(order) - 1)]
        came = task.train.ids[rows] == data.ids
        own[came] = task.train.targets[rows[came]][:, list(task.classes)].to(own)
        exemplars.replace(data.ids, **{COLUMN: torch.cat([widened(labels, self.known), own], dim=1)})

    def choose(self, task: Task) -> None:
        """Herd exemplars of each new class among its samples that are not held for another one."""
        exemplars, targets, ids = self.memory.exemplars, task.train.targets, task.train.ids
        features = self.pooled(task.train)
        held = exemplars.dataset().ids if len(exemplars) else ids[:0]
        kept_for = torch.where(torch.isin(ids, held), OTHER, NONE)
        for _ in range(2):  # what the first class gives up as the others take their share is free for them in the second round
            for label in task.classes:
                rows = ((targets[:, label] == 1) & ((kept_for == label) | (kept_for == NONE))).nonzero().squeeze(1)
                if not len(rows):
                    continue
                batch = whole(Subset(task.train, rows))
                assert batch.target is not None
                extra = {**batch.extra, COLUMN: batch.target} if self.replay_labels == "widened" else batch.extra
                exemplars.add(batch.replace(extra=extra), group=label, features=features[rows.to(features.device)])
                kept_for[rows] = label
                kept_for[~torch.isin(ids, exemplars.dataset().ids)] = NONE

    @torch.no_grad()
    def pooled(self, data: Dataset) -> Tensor:
        """Features of length 1, averaged over the places  # (samples, features)"""
        model, context = self.model, self.context
        backbone = model.backbone.inner if isinstance(model.backbone, Spread) else model.backbone
        with model.evaluating(), context.autocast():
            found = [backbone(context.prepare(part, train=False)).float() for part in data.batches(256)]
        return normalize(torch.cat(found), dim=1)

    # -- state ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            **super().state(),
            "sizes": self.sizes.tolist(),
            "eta": self.eta,
            "chance": self.chance,
            "above": self.above,
            "teacher": None if self.teacher is None else self.teacher.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.sizes = torch.tensor(state["sizes"], dtype=torch.int64)
        self.eta, self.chance = state["eta"], state["chance"]
        self.above = None if state["above"] is None else state["above"].to(self.context.device)
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = self.model.copy()
            self.teacher.restore(state["teacher"])


def settle(per_sample: list[float], place: int, wanted: float) -> tuple[int, bool]:
    """Where steps from `place` end, along candidates that rise, each of which gives so many labels per sample; and whether it is near.

    Where it is not within the number of steps that there are, the nearest of those that were passed.
    """
    passed = [place]
    for _ in range(STEPS):
        excess = per_sample[place] - wanted
        if abs(excess) <= TOLERANCE:
            return place, True
        place += 1 if excess > 0 else -1
        passed.append(place)
    best = min(passed, key=lambda one: abs(per_sample[one] - wanted))
    return best, abs(per_sample[best] - wanted) <= TOLERANCE


def chance_of_a_class(targets: Tensor, classes: int) -> float:
    """The chance q of each of n classes, from samples that carry one of them at least: they carry n q / (1 - (1 - q)^n) in the mean."""
    advice = "set strategy.cardinality to the number of labels that a sample of the data carries, or strategy.threshold to a number"
    if classes < 2:
        raise ConfigError(f"krt: the first task brings one class, from which nothing can be told of how many a sample carries: {advice}")
    carried = (targets[:, -classes:] == 1).sum(dim=1)
    mean = carried[carried > 0].double().mean().item()
    if not mean > 1:
        raise ConfigError(
            f"krt: no sample of the first task has two labels, from which nothing can be told of how many it carries: {advice}"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if classes * middle / (1 - (1 - middle) ** classes) < mean else (low, middle)
    return high
