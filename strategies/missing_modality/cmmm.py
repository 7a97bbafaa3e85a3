"""CMMM: continual adaptation to missing modalities with three kinds of prompts (Guo and others, NAACL 2025, arXiv 2503.00528).

Ways to lack modalities arrive one after another, a pattern s^k in {0, 1}^M in each task, and no sample is kept. In a frozen transformer

    modality-specific   P_m, shared by all tasks; those of the modalities that are there
    task-aware          A(s) = 1/M sum_m P_m K_m[s_m]: from the P_m by keys for missing and present, for any pattern, also one never seen
    task-specific       T^k, begun as the mean of the earlier ones, learned in task k alone and then frozen
    L = L_task + contrast * L_con,   L_con = -1/|Pos| sum_(j in Pos) log( exp(a_k a_j / t) / sum_(j < k) exp(a_k a_j / t) )

a is the mean row of A, normalised, and Pos are the earlier tasks of which |s^j and s^k| / |s^j or s^k| >= 1/2: task-aware prompts of tasks
that share modalities are drawn together. In serving, A is made of the sample's own pattern, and T is that of the task in which this
pattern was (most) frequent, or the mean of all where none had it.

There is no public code. Known from the paper: tasks of constant patterns, the three prompts attached to self-attention layers in this
order, task-aware prompts from modality-specific ones and missing keys, and that the contrast relates tasks. RECONSTRUCTED by us, each
with its switch: the linear form of A (`aware: mean`; `attention` weights the P_m by softmax <key, mean P_m> / sqrt(width) instead; `none`),
the split of the layers into three consecutive groups with one kind of prompt in each, which goes when the next group begins (`specific`,
`aware`, `task`), T frozen after its task (`task: own`; `shared` is one that all tasks train; `none`), the form of L_con (`contrast: 0`
leaves it out), the tokens of what is absent (`absent`: `drop`, a learned `placeholder`, or the `dummy`), input projections that learn
(`projections`), 16 tokens, t 0.1, and contrast 0.1. Adam at 1e-3, batches of 64, 40 epochs and clipping at 0.8 are those of MPLMM, by the
same first author. A task of several patterns (the paper has none) is described by the share of its samples that have each modality; min
and max take the place of and and or. P and K are protected by nothing but L_con: how far they moved in a task is logged as `drift`.

Evidence: reconstruction
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from streamcl.errors import ConfigError
from streamcl.nn.prompts import Embedded, Grown, Insertion, Promptable, Prompts, code, patterns, presence
from streamcl.options import NonNegativeFloat, Optimizer, PositiveFloat, PositiveInt
from streamcl.stream import Batch, Task

from ._prompted import Prompted


class CMMM(Prompted):
    def __init__(
        self,
        *,
        length: PositiveInt = 16,
        specific: bool = True,
        aware: Literal["mean", "attention", "none"] = "mean",
        task: Literal["own", "shared", "none"] = "own",
        contrast: NonNegativeFloat = 0.1,
        temperature: PositiveFloat = 0.1,
        absent: Literal["drop", "placeholder", "dummy"] = "drop",
        projections: bool = True,
        epochs: PositiveInt = 40,
        batch: PositiveInt = 64,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-3),  # noqa: B008
        clip: PositiveFloat | None = 0.8,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, clip=clip, **options)
        if self.replay:
            raise ConfigError("cmmm keeps no samples, and a task's prompt would learn from those of others: set strategy.replay=0")
        self.length, self.specific, self.aware, self.task, self.absent = length, specific, aware, task, absent
        self.contrast, self.temperature, self.projections = contrast, temperature, projections
        self.before_drift: Tensor | None = None

    def prompts_for(self, transformer: Promptable) -> Prompts:
        if transformer.depth < 3:
            raise ConfigError(
                f"cmmm has a group of layers for each of three kinds of prompts, and the transformer has {transformer.depth}: 3 are needed"
            )
        self.prompts = _TaskPrompts(transformer, self.length, self.specific, self.aware, self.task, self.absent)
        return self.prompts

    def opened(self, transformer: Promptable) -> list[nn.Parameter]:
        return transformer.projections() if self.projections else []

    def enter_task(self, task: Task) -> None:
        self.prompts.begin(task.index)

    def before_task(self, task: Task) -> None:
        super().before_task(task)
        self.prompts.add(task.index)
        self.prompts.begin(task.index)
        self.before_drift = self.prompts.shared()

    def loss(self, batch: Batch) -> Tensor:
        here = presence(batch, self.transformer.reads)
        self.prompts.count(here)
        loss = super().loss(batch)
        if self.contrast and (interaction := self.prompts.interaction(here, self.temperature)) is not None:
            loss = loss + self.contrast * interaction
        return loss

    def after_task(self, task: Task) -> None:
        assert self.before_drift is not None
        self.context.log(drift=(self.prompts.shared() - self.before_drift).norm() / self.before_drift.norm())
        self.before_drift = None
        self.prompts.begin(None)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "before_drift": self.before_drift}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.before_drift = None if state["before_drift"] is None else state["before_drift"].to(self.context.device)


class _TaskPrompts(Prompts):
    """The three kinds of prompts, and how many samples of each pattern every task had."""

    def __init__(self, transformer: Promptable, length: int, specific: bool, aware: str, task: str, absent: str) -> None:
        super().__init__()
        self.reads, self.length, self.width = transformer.reads, length, transformer.width
        self.places = {name: transformer.lengths[name] for name in self.reads}
        self.use_specific, self.form, self.task, self.absent = specific, aware, task, "drop" if absent == "drop" else "dummy"
        depth, count = transformer.depth, len(self.reads)
        self.groups = {0: self.modality_specific, -(-depth // 3): self.task_aware, -(-2 * depth // 3): self.task_specific}
        self.specific = nn.Parameter(0.02 * torch.randn(count, length, self.width))  # P
        self.keys: nn.Parameter | None = None
        if aware == "mean":
            self.keys = nn.Parameter(torch.eye(self.width) + 0.02 * torch.randn(count, 2, self.width, self.width))  # missing, present
        elif aware == "attention":
            self.keys = nn.Parameter(0.02 * torch.randn(count, 2, self.width))
        self.specific.requires_grad_(specific or aware != "none")
        self.tasks, self.counts = Grown(), Grown()
        self.placeholder = nn.Parameter(torch.zeros(count, self.width)) if absent == "placeholder" else None
        self.current: int | None = None

    # -- tasks ------------------------------------------------------------------------------------------------------------------

    def add(self, index: int) -> None:
        """Room for a task: its prompt, and its counts."""
        like = self.specific
        while len(self.counts) <= index:
            self.counts.grow(like.new_zeros(2 ** len(self.reads) - 1))
        wanted = {"own": index + 1, "shared": 1, "none": 0}[self.task]
        while len(self.tasks) < wanted:
            self.tasks.grow(torch.stack([*self.tasks]).mean(dim=0) if len(self.tasks) else 0.02 * torch.randn_like(like[0]))

    def begin(self, index: int | None) -> None:
        """The task that learns; the prompts of all others are frozen."""
        self.current = index
        learning = None if index is None else 0 if self.task == "shared" else index
        for number, prompt in enumerate(self.tasks):
            prompt.requires_grad_(number == learning)

    @torch.no_grad()
    def count(self, here: Tensor) -> None:
        assert self.current is not None
        mine = self.counts[self.current]
        mine += torch.bincount(code(here), minlength=len(mine)).to(mine)

    def shared(self) -> Tensor:
        """P and K in one row, as they are now."""
        return torch.cat([p.detach().flatten() for p in (self.specific, self.keys) if p is not None])

    # -- prompts ----------------------------------------------------------------------------------------------------------------

    def embed(self, made: Embedded, here: Tensor) -> Embedded:
        if self.placeholder is None:
            return made
        tokens, masks = dict(made.tokens), dict(made.masks)
        for place, name in enumerate(self.reads):
            there = here[:, place, None]
            tokens[name] = torch.where(there[:, :, None], tokens[name], self.placeholder[place])
            first = torch.arange(self.places[name], device=here.device) == 0
            masks[name] = torch.where(there, masks[name], first)
        return replace(made, tokens=tokens, masks=masks)

    def before(self, layer: int, here: Tensor) -> Insertion | None:
        return self.groups[layer](here) if layer in self.groups else None

    def modality_specific(self, here: Tensor) -> Insertion | None:
        if not self.use_specific:
            return None
        tokens = self.specific.flatten(0, 1).expand(len(here), -1, -1)
        return Insertion(tokens, mask=here.repeat_interleave(self.length, dim=1))

    def task_aware(self, here: Tensor) -> Insertion:
        if self.form == "none":
            return self.nothing(here)
        return Insertion(self.composed().index_select(0, self.case(here)), drop=True)

    def task_specific(self, here: Tensor) -> Insertion:
        if not len(self.tasks):
            return self.nothing(here)
        if self.training and self.current is not None:
            return Insertion(self.tasks[self.current if self.task == "own" else 0].expand(len(here), -1, -1), drop=True)
        return Insertion(self.looked_up().index_select(0, self.case(here)), drop=True)

    def nothing(self, here: Tensor) -> Insertion:
        return Insertion(self.specific.new_zeros(len(here), 0, self.width), drop=True)

    def case(self, here: Tensor) -> Tensor:
        return code(here).clamp(max=2 ** len(self.reads) - 2)

    def composed(self) -> Tensor:
        """A of every pattern  # (patterns, length, width)"""
        assert self.keys is not None
        states = patterns(len(self.reads), self.keys.device)
        if self.form == "attention":
            scores = (self.keys * self.specific.mean(dim=1)[:, None]).sum(dim=2) / math.sqrt(self.width)  # (modalities, 2)
            chosen = torch.where(states, scores[:, 1], scores[:, 0])  # (patterns, modalities)
            return torch.einsum("sm,mld->sld", chosen.softmax(dim=1), self.specific)
        each = self.specific[:, None] @ self.keys  # (modalities, 2, length, width)
        chosen = torch.where(states[:, :, None, None], each[:, 1], each[:, 0])  # (patterns, modalities, length, width)
        return chosen.mean(dim=1)

    def looked_up(self) -> Tensor:
        """T of every pattern: of the task that had the largest share of it, the latest of several  # (patterns, length, width)"""
        prompts = torch.stack([*self.tasks])  # (tasks, length, width)
        if len(prompts) == 1:
            return prompts.expand(len(self.counts[0]), -1, -1)
        counts = torch.stack([*self.counts])
        shares = (counts / counts.sum(dim=1, keepdim=True).clamp(min=1)).flip(0)  # (tasks, patterns), the latest first
        known = shares.amax(dim=0) > 0
        return torch.where(known[:, None, None], prompts.flip(0)[shares.argmax(dim=0)], prompts.mean(dim=0))

    # -- contrastive task interaction -------------------------------------------------------------------------------------------

    def interaction(self, here: Tensor, temperature: float) -> Tensor | None:
        """L_con of a batch of the task at hand; None before the second task, and without task-aware prompts."""
        if self.form == "none" or not self.current:
            return None
        counts = torch.stack([*self.counts][: self.current])  # (earlier tasks, patterns)
        now = torch.bincount(self.case(here), minlength=counts.shape[1]).to(counts)
        shares = normalize(torch.cat([counts, now[None]]), p=1, dim=1)  # this task last
        rows = normalize(shares @ self.composed().mean(dim=1), dim=1)  # a  # (tasks, width)
        states = shares @ patterns(len(self.reads), shares.device).to(shares)  # how many have each modality  # (tasks, modalities)
        alike = torch.minimum(states[:-1], states[-1]).sum(dim=1) / torch.maximum(states[:-1], states[-1]).sum(dim=1)
        positive = (alike >= 0.5 - 1e-6).to(rows)
        logarithms = (rows[:-1] @ rows[-1] / temperature).log_softmax(dim=0)
        return -(positive * logarithms).sum() / positive.sum().clamp(min=1)
