"""The engine for policies that are no language models: any model with classes, of which an answer names one.

Of each prompt `group` answers are drawn from softmax(logits / temperature); an answer is one token long. It is right (1) or wrong (0),
unless the learner names rewards, which then judge the class's name against the rows' `answer`. All of a batch is done at once, and the
model is asked once for each update.

The policy is asked and trained in evaluation mode: with dropout, or statistics of the batch, it would not be the one that answered.
Classes that come later have in a reference policy the rows of the head that they begin with. `updates` above 1 divide the rows of a batch
of rollouts among so many steps, as the released trainers do, so that each answer is learned from once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.errors import ConfigError, TrainingError
from streamcl.learner import Report
from streamcl.nn.model import Model
from streamcl.strategy import learning_rate_factor, make_optimizer, plugin_name
from streamcl.stream import Batch, Column, StreamInfo, Task

from ._judging import judged, names_of, repeated
from ._policy import PolicyLearner
from ._rollouts import Rollouts

PASS = "rollouts"
SILENT = (
    "no reward says anything of any answer of a batch of rollouts (all are NaN), so that nothing is learned from it: look at the rows' "
    "right answers, and at what the rewards need"
)
WARN_AFTER = 20  # batches of rollouts in which every group earned the same


class ActionSession:
    """Runs a learner on tasks whose answers are classes."""

    def __init__(self, learner: PolicyLearner) -> None:
        self.learner = learner
        self.session, self.done, self.earlier = -1, 0, 0  # the task at hand, its updates so far, and those of all tasks before it
        self.sums: dict[str, list[float]] = {}  # of each figure of this session's batches of rollouts: its sum, and of how many
        self.silent = False  # whether the last batch had no reward at all
        self.flat = 0  # batches in a row in which no group told its answers apart
        self.reference: Model | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.saved: dict[str, Any] = {}

    def start(self, info: StreamInfo, context: Context) -> None:
        self.info, self.context = info, context
        if info.target != "class":
            raise ConfigError(f"learner: a model without words answers with a class, and the target of this stream is {info.target}")
        self.videos = [name for name, modality in info.modalities.items() if modality.kind == "video" and modality.shape[:1] > (1,)]
        if self.learner.shuffles and not self.videos:
            raise ConfigError(
                f"learner: {type(self.learner).__name__} also answers with frames in random order, and this stream has no modality of kind "
                "video with several frames: take another learner, such as grpo"
            )
        if self.learner.vllm or self.learner.at_once:
            raise ConfigError("learner: vllm and at_once belong to models that answer in words: leave them out")
        if self.learner.reference not in ("base", "previous"):
            raise ConfigError(
                f"learner: the reference is {self.learner.reference!r}, and a model without words keeps base and previous alone"
            )

    def check(self, task: Task) -> None:
        learner, passes = self.learner, self.info.passes
        if not hasattr(task.train, "read"):
            return
        if len(task.train) == 0:
            raise ConfigError(f"task {task.name} has no samples to answer")
        if passes is not None and self._epochs(task) > passes:
            raise ConfigError(
                f"learner.steps is {learner.steps}, for which {len(task.train)} samples are gone through {self._epochs(task)} times, and "
                f"the stream can be read {passes} time(s): take fewer steps"
            )

    def _epochs(self, task: Task) -> int:
        """How often the samples are gone through: a batch with fewer answers than updates gives as many updates as it has answers."""
        learner, (full, last) = self.learner, divmod(len(task.train), self.learner.prompts)
        updates = full * min(learner.updates, learner.prompts * learner.group) + min(learner.updates, last * learner.group)
        return -(-learner.steps // updates)

    def fit(self, model: Model, task: Task, context: Context) -> Report:
        learner = self.learner
        self._enter(model, task)
        if self.done < learner.steps:
            self._run(model, task, context)
        if learner.reference == "previous":
            self.reference = None
        means = {name: value / count for name, (value, count) in self.sums.items()}
        return Report({"updates": float(self.done), **means})

    def _run(self, model: Model, task: Task, context: Context) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.optimizer = make_optimizer(parameters, self.learner.optimizer_settings)
        if self.saved:
            optimizer.load_state_dict(self.saved)
            self.saved = {}
        model.zero_grad(set_to_none=True)
        shuffle = not task.about.get("ordered", False)
        with model.evaluating():
            for epoch in context.epochs(self._epochs(task) if hasattr(task.train, "read") else 1, PASS):
                for raw in context.batches(task.train, self.learner.prompts, epoch=epoch, name=PASS, shuffle=shuffle):
                    if self.done >= self.learner.steps:
                        break
                    self._learn(model, raw, task, optimizer, parameters)
        self.optimizer = None

    def _enter(self, model: Model, task: Task) -> None:
        """Room for the task's classes, and the policy that the divergence is measured to; nothing, where a session is gone on with."""
        if self.session == task.index:
            return
        before = model.classes
        model.grow(max(task.seen) + 1)
        self.session, self.earlier, self.done = task.index, self.earlier + self.done, 0
        self.sums, self.flat, self.saved = {}, 0, {}  # the optimiser of a session that was over is not the next one's
        if self.learner.beta == 0:
            return
        if self.reference is None or self.learner.reference == "previous":
            self.reference = model.copy()
        elif model.classes > before:
            kept = self.reference.head
            known = kept.classes
            for name, values in model.head.named_parameters():
                rows = torch.cat([getattr(kept, name), values.detach()[known:]])
                setattr(kept, name, nn.Parameter(rows, requires_grad=False))

    def _learn(self, model: Model, raw: Batch, task: Task, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """Answer a batch of prompts, and learn from the answers."""
        learner, context = self.learner, self.context
        batch = context.prepare(raw)
        once = learner.updates == 1
        with torch.set_grad_enabled(once):
            scores = self._scores(model, batch)  # (prompts, classes), with the graph of the update where there is one
        actions = self._drawn(scores.detach(), learner.group)  # (N,)
        old = _chosen(scores.detach(), actions)  # (N, 1)
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = _chosen(self._scores(self.reference, batch), actions)
        rollouts = self._rollouts(model, raw, batch, task, actions, None if reference is None else reference - old)
        earned = learner.shaped(rollouts)
        advantages = learner.advantages(rollouts, earned)
        weights = learner.kl_weights(rollouts, advantages)
        rows = torch.arange(len(actions), device=actions.device)
        parts = [rows] if once else self._divided(rows, learner.updates)
        for part in parts[: learner.steps - self.done]:
            if once:
                policy = _chosen(scores, actions)
            else:  # the policy moves from part to part
                asked = (part // learner.group).unique()
                mine = self._scores(model, batch[asked])
                policy = mine[torch.searchsorted(asked, part // learner.group), actions[part]][:, None]
            loss = learner.loss(
                policy,
                old[part],
                advantages[part],
                rollouts.mask[part],
                1,
                None if reference is None else reference[part],
                None if weights is None else weights[part],
            )
            self._step(loss, optimizer, parameters)
        self._tell(rollouts, scores.detach())

    def _scores(self, model: Model, batch: Batch) -> Tensor:
        """ln p of every class  # (batch, classes)"""
        with self.context.autocast() if self.context.precision != "float32" else nullcontext():
            logits = model(batch)
        return (logits.float() / self.learner.temperature).log_softmax(dim=1)

    def _drawn(self, scores: Tensor, count: int) -> Tensor:
        """`count` classes for each row, those of one row side by side  # (rows x count,)

        By the distribution function, so that the randomness is the run's own on every device, and the device is not waited for.
        """
        chances = scores.double().exp()
        if self.learner.top_p < 1:
            likely, place = chances.sort(dim=1, descending=True)
            rare = likely.cumsum(dim=1) - likely >= self.learner.top_p
            chances = chances.scatter(1, place, likely.masked_fill(rare, 0.0))
        reached = chances.cumsum(dim=1)
        drawn = torch.rand(len(scores), count, dtype=torch.float64, generator=self.context.generator).to(scores.device)
        return torch.searchsorted(reached, drawn * reached[:, -1:], right=True).clamp(max=scores.shape[1] - 1).flatten()

    def _divided(self, rows: Tensor, parts: int) -> Sequence[Tensor]:
        order = torch.randperm(len(rows), generator=self.context.generator).to(rows.device)
        return [part.sort().values for part in rows[order].tensor_split(parts) if len(part)]

    def _rollouts(self, model: Model, raw: Batch, batch: Batch, task: Task, actions: Tensor, drift: Tensor | None) -> Rollouts:
        learner, group = self.learner, self.learner.group
        extra: dict[str, Tensor] = {}
        answers, rows = self._in_words(raw, task, actions, group) if self._words_are_asked_for() else ([], {})
        rewards = self._rewards(batch, actions, group, answers, rows)
        if type(learner).judge is not PolicyLearner.judge:
            extra |= {name: values.to(actions.device) for name, values in learner.judge(answers, rows).items()}
        if learner.shuffles:
            extra["shuffled"] = self._shuffled(model, raw, batch, task).repeat_interleave(group)
        return Rollouts(
            rewards=rewards,
            weights=torch.tensor([reward.weight for reward in learner.rewards] or [1.0], device=actions.device),
            columns=tuple(map(plugin_name, learner.rewards)) or ("right",),
            mask=torch.ones(len(actions), 1, device=actions.device),
            group=group,
            drift=drift,
            step=self.done,
            steps=learner.steps,
            stream_step=self.earlier + self.done,
            stream_steps=learner.steps * max(self.info.tasks or 1, task.index + 1),
            extra=extra,
        )

    def _rewards(
        self, batch: Batch, actions: Tensor, count: int, answers: list[str], rows: Mapping[str, Column], first: bool = False
    ) -> Tensor:
        """What each reward (or the first alone) says of `count` answers to each row  # (rows x count, rewards)"""
        assert batch.target is not None
        rewards = self.learner.rewards[:1] if first else self.learner.rewards
        if not rewards:
            return (actions == batch.target.repeat_interleave(count)).float()[:, None]
        return torch.stack([judged(*named, answers, rows) for named in zip(rewards, names_of(rewards), strict=True)], dim=1).to(
            actions.device
        )

    def _words_are_asked_for(self) -> bool:
        return bool(self.learner.rewards) or type(self.learner).judge is not PolicyLearner.judge

    def _in_words(self, raw: Batch, task: Task, actions: Tensor, count: int) -> tuple[list[str], dict[str, Column]]:
        """The names of the classes that were answered, and the columns of the rows that these are judged by."""
        assert raw.target is not None
        names = [task.names.get(label, str(label)) for label in range(max(task.seen) + 1)]
        rows = repeated(raw, count)
        rows["answer"] = [names[label] for label in raw.target.repeat_interleave(count).tolist()]
        rows["length"] = torch.ones(len(raw) * count)
        return [names[action] for action in actions.tolist()], rows

    @torch.no_grad()
    def _shuffled(self, model: Model, raw: Batch, batch: Batch, task: Task) -> Tensor:
        """The mean outcome of half as many answers to the frames in random order, the same for all videos of a row  # (rows,)"""
        count, inputs = max(1, self.learner.group // 2), dict(batch.inputs)
        for name in self.videos:
            frames: Any = batch.inputs[name]
            order = disordered(len(frames), frames.shape[1], self.context.generator).to(frames.device)
            inputs[name] = frames.take_along_dim(order.view(*order.shape, *[1] * (frames.dim() - 2)), dim=1)
        actions = self._drawn(self._scores(model, batch.replace(inputs=inputs)), count)
        words = self._in_words(raw, task, actions, count) if self.learner.rewards else ([], {})
        return self._rewards(batch, actions, count, *words, first=True)[:, 0].unflatten(0, (-1, count)).nanmean(dim=1)

    def _step(self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        learner = self.learner
        factor = learning_rate_factor(learner.schedule, self.done, learner.steps)
        for group in optimizer.param_groups:
            group["lr"] = learner.optimizer_settings.lr * factor
        if self.context.device.type == "cpu" and not math.isfinite(loss.item()):  # on a GPU it would be waited for
            raise TrainingError(f"the loss is {loss.item()} at update {self.done + 1}")
        loss.backward()
        if learner.clip:
            nn.utils.clip_grad_norm_(parameters, learner.clip)
        optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        self.done += 1
        self.context.log(loss=loss.detach(), lr=optimizer.param_groups[0]["lr"])

    def _tell(self, rollouts: Rollouts, scores: Tensor) -> None:
        """Figures of a batch of rollouts, for the log and for the session's report."""
        figures = {"reward": rollouts.rewards[:, 0].nanmean(), "entropy": -(scores.exp() * scores).sum(dim=1).mean()}
        if rollouts.drift is not None:
            figures["kl"] = (rollouts.drift.expm1() - rollouts.drift).mean()
        told = {name: float(value) for name, value in figures.items()} | self.learner.figures(rollouts)
        self.context.log(**told)
        for name, value in told.items():
            if math.isfinite(value):
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value, count + 1]
        silent = bool(rollouts.rewards.isnan().all())
        if silent and not self.silent:
            self.context.events.warn(SILENT)
        self.silent = silent
        groups = rollouts.grouped(rollouts.rewards.nan_to_num(0.0))
        self.flat = self.flat + 1 if bool((groups == groups[:, :1]).all()) else 0
        if self.flat == WARN_AFTER and not silent:
            self.context.events.warn(
                f"no group has variance: in {WARN_AFTER} batches of rollouts all answers to a prompt earned the same, so nothing is learned"
            )

    # -- state ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        if self.session < 0:
            return {}
        return {
            "session": self.session,
            "done": self.done,
            "earlier": self.earlier,
            "sums": {name: list(values) for name, values in self.sums.items()},
            "flat": self.flat,
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "reference": None if self.reference is None else {"classes": self.reference.classes, "tensors": self.reference.state_dict()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        self.session, self.done, self.earlier = int(state["session"]), int(state["done"]), int(state["earlier"])
        self.sums, self.flat, self.saved = (
            {name: list(values) for name, values in state["sums"].items()},
            int(state["flat"]),
            dict(state["optimizer"] or {}),
        )
        held = state["reference"]
        if held is not None:
            self.reference = self.context.model.copy()
            self.reference.resize(int(held["classes"]), self.reference.backbone.dim)
            self.reference.load_state_dict(held["tensors"])
            self.reference.requires_grad_(False)


def disordered(count: int, frames: int, generator: torch.Generator) -> Tensor:
    """An order of the frames for each row, any but the one that they have  # (count, frames)"""
    order = torch.rand(count, frames, generator=generator).argsort(dim=1)
    kept = (order == torch.arange(frames)).all(dim=1)
    while kept.any():
        order[kept] = torch.rand(int(kept.sum()), frames, generator=generator).argsort(dim=1)
        kept = (order == torch.arange(frames)).all(dim=1)
    return order


def _chosen(scores: Tensor, actions: Tensor) -> Tensor:
    """ln p of the actions, of which each row has equally many  # (N, 1)"""
    return scores.gather(1, actions.view(len(scores), -1)).flatten()[:, None]
