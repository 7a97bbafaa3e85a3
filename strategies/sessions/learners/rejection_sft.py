"""Iterative rejection sampling: the model answers, and what is right of its own answers it is taught; round after round.

RAFT (Dong et al., TMLR 2023, arXiv 2304.06767), also known as expert iteration: the honest baseline of reinforcement, since its data are on
policy and it has neither negative examples nor advantages. In each of `rounds` the policy of the moment answers `prompts` prompts `group`
times. An answer is kept where the weighted mean of its `rewards` (the rows' own verifiers, unless others are named) is at least `accept`;
`most` limits how many are kept of one prompt, so that easy prompts do not outweigh the others. What is kept is learned `epochs` times, as
by sft; the schedule goes by rounds. The optimiser lasts a session.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

import torch

from streamcl.context import Context
from streamcl.data import ArrayDataset
from streamcl.learner import Report
from streamcl.nn.model import Model
from streamcl.options import Fraction, PositiveFloat, PositiveInt
from streamcl.seeding import generator
from streamcl.stream import Batch, Task
from streamcl.verifier import Verifier
from streamcl.verifiers.own import Own

from ._judging import judged, names_of, repeated
from ._supervised import RESPONSE, Supervised


class RejectionSFT(Supervised):
    def __init__(
        self,
        *,
        rounds: PositiveInt = 4,
        prompts: PositiveInt = 64,
        group: PositiveInt = 8,
        rewards: tuple[Verifier, ...] = (),
        accept: Fraction = 0.5,
        most: PositiveInt | None = None,
        temperature: PositiveFloat = 1.0,
        epochs: PositiveInt = 1,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.rounds, self.prompts, self.group, self.epochs, self.temperature = rounds, prompts, group, epochs, temperature
        self.rewards: tuple[Verifier, ...] = tuple(rewards) or (Own(),)
        self.accept, self.most = accept, most
        self.round = 0
        self.kept: list[tuple[int, str]] | None = None  # of the round at hand: rows, and what they were answered with
        self.shares: list[float] = []  # of the answers of each round, those that were kept
        self.lengths: list[float] = []

    def progress(self) -> tuple[int, int]:
        return self.round, self.rounds

    def fit(self, model: Model, task: Task, context: Context) -> Report:
        saved = self.saved
        self.round = int(saved.get("round", 0))
        self.kept = [(int(row), str(answer)) for row, answer in saved["kept"]] if saved.get("kept") is not None else None
        self.shares, self.lengths = list(saved.get("shares", [])), list(saved.get("lengths", []))
        self.begin()
        while self.round < self.rounds:
            if self.kept is None:
                self.kept = self._answers(task)
            self._learn(task, self.kept)
            self.round, self.kept = self.round + 1, None
        report = self.end()
        figures = {"accepted": self.shares[-1], "accepted_at_first": self.shares[0], "length": self.lengths[-1]}
        self.round = 0
        return Report({**report.figures, **figures})

    def _answers(self, task: Task) -> list[tuple[int, str]]:
        """What of this round's answers is kept."""
        context, number = self.context, self.round
        draw = generator(context.seed, "rejection", task.index, number)
        count = len(task.train)
        if task.about.get("ordered"):  # on from where the last round ended
            rows = torch.arange(self.prompts)[:count].add(number * self.prompts).remainder(count)
        else:
            rows = torch.randperm(count, generator=draw)[: self.prompts]
        raw = task.train[rows]
        spoken = self.language.speak(context.prepare(raw, train=False), temperature=self.temperature, samples=self.group, generator=draw)
        fits = self._judged(spoken.texts, raw) >= self.accept
        if self.most is not None:
            groups = fits.view(-1, self.group)
            fits = (groups & (groups.long().cumsum(dim=1) <= self.most)).flatten()
        self.shares.append(float(fits.float().mean()))
        self.lengths.append(float(spoken.lengths.float().mean()))
        context.log(accepted=self.shares[-1], length=self.lengths[-1])
        if not bool(fits.any()):
            context.events.warn(
                f"round {number + 1} of {self.rounds}: none of {len(fits)} answers was accepted, so that nothing is learned from it: take "
                "easier prompts, more answers to each (learner.group), or warm the model up (a session of sft)"
            )
        return [(int(rows[place // self.group]), spoken.texts[place]) for place in fits.nonzero().squeeze(1).tolist()]

    def _judged(self, answers: list[str], raw: Batch) -> torch.Tensor:
        """The weighted mean of the rewards that say something of an answer; 0 where none does  # (answers,)"""
        rows = repeated(raw, self.group)
        found = torch.stack(
            [judged(*named, answers, rows).cpu() for named in zip(self.rewards, names_of(self.rewards), strict=True)], dim=1
        )
        weights = torch.tensor([verifier.weight for verifier in self.rewards]) * ~found.isnan()
        return ((found.nan_to_num(0.0) * weights).sum(dim=1) / weights.sum(dim=1)).nan_to_num(0.0)

    def _learn(self, task: Task, kept: list[tuple[int, str]]) -> None:
        if not kept:
            return
        context, name, ordered = self.context, f"round {self.round + 1}", bool(task.about.get("ordered"))
        rows = task.train[torch.tensor([row for row, _ in kept])]
        assert rows.target is not None
        data = ArrayDataset(rows.inputs, rows.target, rows.ids, rows.present, {**rows.extra, RESPONSE: [answer for _, answer in kept]})
        for epoch in context.epochs(self.epochs, name):
            for raw in context.batches(data, self.batch, epoch=epoch, name=name, shuffle=not ordered, every=self.accumulate):
                answers = raw.extra[RESPONSE]
                assert isinstance(answers, list)
                self.teach(raw, answers)

    def inside(self) -> dict[str, Any]:
        found = super().inside()
        if self.optimizer is None:
            return found
        return {**found, "round": self.round, "kept": self.kept, "shares": self.shares, "lengths": self.lengths}
