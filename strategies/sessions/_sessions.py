"""What all session strategies share: a learner is run on each task, with earlier prompts among the new ones, and scored by what it says.

The optimiser is fresh in every session. What is kept between sessions: the weights, the policies that a penalty holds on to (`base`, the
model as the stream found it, and `previous`, as the session found it), exemplars where there is replay, and what the learner carries.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.data import ArrayDataset, Joined, Subset
from streamcl.errors import ConfigError
from streamcl.learner import Learner
from streamcl.nn.language import LanguageModel, Spoken, language_model
from streamcl.options import Fraction, Lora, NonNegativeInt
from streamcl.seeding import generator
from streamcl.strategy import Strategy
from streamcl.stream import Batch, Prediction, StreamInfo, Task, take
from streamcl.verifier import Verifier
from streamcl.verifiers.own import Own

POLICIES = ("base", "previous")


class Sessions(Strategy):
    """`replay` is the share of a session's rows that are earlier prompts, from the memory of exemplars; `reference` the policy that a
    learner's penalty holds on to. Of each test row `samples` further answers are drawn, for pass@k; `probes` rows of each batch tell how
    far the policy went from those it came from; `format` judges how an answer is written. With `ladder`, so many answers are drawn to each
    question of a session before it begins, and its rows stand from those that the policy mostly answers right to those it does not, of
    equal ones the shorter answers first: Observe-R1's order (arXiv 2505.12432) by the policy of the moment."""

    targets = ("text", "class")
    selection = "reservoir"
    processes = True

    def __init__(
        self,
        *,
        learner: Learner,
        replay: Fraction = 0.0,
        reference: Literal["base", "previous"] = "previous",
        adapter: Lora | None = None,
        samples: NonNegativeInt = 0,
        probes: NonNegativeInt = 0,
        format: Verifier | None = None,
        ladder: NonNegativeInt = 0,
    ) -> None:
        if replay == 1:
            raise ConfigError("strategy.replay is 1, which leaves no room for what is new: take a share below 1")
        self.learner, self.replay, self.reference = learner, replay, reference
        self.adapter = None if adapter is None else Lora.model_validate(adapter)
        self.samples, self.probes, self.format = samples, probes, format
        self.ladder = ladder
        self.order: Tensor | None = None  # of the rows of the session at hand, where there is a ladder
        self.needs_exemplars = replay > 0
        self.begun = -1  # the session at hand, once what comes before it is done
        self.spoken: Spoken | None = None  # the greedy answers to the batch at hand
        self.still: list[str] = []  # layers that the backbone froze: the vision tower's

    # -- what strategies fill in ------------------------------------------------------------------------------------------------

    def before_session(self, task: Task) -> None:
        """Called once for a task, before the learner sees it: the policy as it is now is the previous one."""
        if self.language is not None:
            self.language.keep("previous")

    def after_session(self, task: Task) -> None:
        """Called once for a task, when it was learned."""

    # -- a session --------------------------------------------------------------------------------------------------------------

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.language = language_model(context.model)
        if info.target == "text" and self.language is None:
            raise ConfigError(
                "this stream is answered in words, and the backbone does not speak: take model.backbone=tiny_vlm, or a language model by "
                "its name (hf:Qwen/Qwen2.5-VL-7B-Instruct)"
            )
        if info.target != "text" and self.language is not None:
            raise ConfigError(f"the backbone answers in words, and the target of this stream is {info.target}: take a classifier (mlp)")
        if self.language is None and (self.adapter or self.samples or self.probes or self.format or self.ladder):
            raise ConfigError("strategy: adapter, samples, probes, format and ladder belong to models that answer in words: leave them out")
        if self.language is not None:
            self.still = [
                name
                for name, part in self.language.network.named_modules()
                if isinstance(part, nn.Linear) and not part.weight.requires_grad
            ]
        if self.adapter is not None:
            self.wrap(self.adapter)
        self.learner.reference = self.reference
        self.learner.start(info, context)

    def learn(self, task: Task) -> None:
        mine = self.with_replay(task)
        self.learner.check(mine)
        if self.begun != task.index:
            self.before_session(task)
            self.order = self.climbed(mine) if self.ladder else None
            self.begun = task.index
        if self.order is not None:
            mine = dataclasses.replace(mine, train=Subset(mine.train, self.order), about={**mine.about, "ordered": True})
        report = self.learner.fit(self.model, mine, self.context)
        if report.figures:
            self.context.events.emit("figures", task=task.index, **report.figures)
        self.after_session(task)
        if self.replay:
            self.memory.exemplars.add(task.train, group=task.index)

    def with_replay(self, task: Task) -> Task:
        """The task with earlier prompts among its rows: drawn from the memory, the same ones where a session is entered again."""
        exemplars = self.memory.exemplars
        if not self.replay or not len(exemplars):
            return task
        wanted = max(1, round(len(task.train) * self.replay / (1 - self.replay)))
        held = exemplars.sample(min(wanted, len(exemplars)), generator(self.context.seed, "replay", task.index))
        assert held.target is not None
        earlier = ArrayDataset(held.inputs, held.target, held.ids, held.present, held.extra)
        # An order from easy to hard is the task's own: what is earlier is strewn in.
        places = torch.randperm(len(task.train) + len(earlier), generator=generator(self.context.seed, "replayed", task.index))
        return _with_rows(task, Joined([task.train, earlier]), places[: len(earlier)].sort().values)

    def climbed(self, task: Task) -> Tensor:
        """The rows from easy to hard, as the policy finds them now  # (rows,)"""
        assert self.language is not None
        verifier, draw = Own(), generator(self.context.seed, "ladder", task.index)
        rates, lengths = [], []
        for raw in task.train.batches(256):
            spoken = self.language.speak(self.context.prepare(raw, train=False), temperature=1.0, samples=self.ladder, generator=draw)
            rows = torch.arange(len(raw)).repeat_interleave(self.ladder)
            right = verifier(spoken.texts, {name: take(column, rows) for name, column in raw.extra.items()})
            rates.append(right.view(-1, self.ladder).nanmean(dim=1).nan_to_num(0.0))
            lengths.append(spoken.lengths.view(-1, self.ladder).float().mean(dim=1).cpu())
        shortest_first = torch.cat(lengths).argsort(stable=True)
        return shortest_first[torch.cat(rates)[shortest_first].argsort(stable=True, descending=True)]

    def wrap(self, settings: Lora, name: str = "default") -> None:
        """Put a fresh adapter around the network, whose own weights are frozen from then on. What the backbone froze gets none."""
        from peft import LoraConfig, PeftModel, get_peft_model

        assert self.language is not None
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.layers,
            exclude_modules=self.still or None,
        )
        network = self.language.network
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of transformers, on a name that PEFT still has
                if isinstance(network, PeftModel):
                    network.add_adapter(name, config)
                else:
                    self.language.network = get_peft_model(network, config, adapter_name=name)
        except ValueError as error:
            raise ConfigError(f"strategy.adapter: {' '.join(str(error).split())}") from error

    # -- answering --------------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> Prediction:
        language = self.language
        if language is None:
            return super().predict(batch)
        self.spoken = self.answer(batch)
        heads: dict[str, Tensor | list[list[str]]] = {}
        if self.samples:
            drawn = self.answer(batch, temperature=1.0, samples=self.samples, generator=self.draw("samples", batch)).texts
            heads[f"pass@{self.samples}"] = [drawn[row : row + self.samples] for row in range(0, len(drawn), self.samples)]
        return Prediction(texts=self.spoken.texts, heads=heads)

    def draw(self, purpose: str, batch: Batch) -> torch.Generator:
        """What is drawn of a batch is the same whenever it is asked, so that answers differ only by the policy."""
        return generator(self.context.seed, purpose, *batch.ids[:1].tolist())

    def answer(self, batch: Batch, **how: Any) -> Spoken:
        """What is said to each row: greedily, unless `how` says otherwise (see LanguageModel.speak)."""
        assert self.language is not None
        return self.language.speak(batch, **how)

    def measure(self, batch: Batch) -> dict[str, float]:
        if self.language is None or self.spoken is None:
            return {}
        figures = {"length": float(self.spoken.lengths.float().mean())}
        if self.format is not None:
            figures["format_rate"] = float(self.format(self.spoken.texts, batch.extra).nanmean())
        task = self.context.task
        if self.probes and task is not None and batch.target is not None:
            new = bool(torch.isin(batch.target.cpu(), torch.tensor(task.labels or task.classes)).any())
            probe = batch[: self.probes]
            for name in POLICIES:
                forward, reverse = divergences(self.language, probe, name, self.draw("probes", batch))
                figures[f"kl_{name}_{'new' if new else 'old'}"] = forward
                figures[f"reverse_kl_{name}_{'new' if new else 'old'}"] = reverse
        return figures

    # -- state ------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        kept = {} if self.language is None else self.language.kept()
        return {"begun": self.begun, "order": self.order, "learner": self.learner.state(), "kept": kept}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.begun, self.order = int(state["begun"]), state["order"]
        if self.language is not None:
            self.language.restore_kept(state["kept"])
        self.learner.restore(state["learner"])


@torch.no_grad()
def divergences(language: LanguageModel, batch: Batch, name: str, draw: torch.Generator) -> tuple[float, float]:
    """KL(kept || now) over answers of the policy that was kept, and KL(now || kept) over answers of the one at hand.

    Of an answer it is the sum over its tokens, exact over the vocabulary; the mean over rows. The first, on prompts of the new task, is
    what forgetting of the old ones goes with (RL's Razor, Shenfeld et al., arXiv 2509.04259).
    """
    with language.policy(name):
        its = language.speak(batch, temperature=1.0, generator=draw)
    mine = language.speak(batch, temperature=1.0, generator=draw)
    forward, _ = language.divergence(batch, its, name)
    _, reverse = language.divergence(batch, mine, name)
    return float(forward.sum()) / len(batch), float(reverse.sum()) / len(batch)


def _with_rows(task: Task, both: Joined, places: Tensor) -> Task:
    """The task with `both` for its training data: its own rows in their order, and the others, which come last there, at `places`."""
    order = torch.empty(len(both), dtype=torch.int64)
    own = torch.ones(len(both), dtype=torch.bool)
    own[places] = False
    order[own] = torch.arange(int(own.sum()))
    order[places] = torch.arange(int(own.sum()), len(both))
    return dataclasses.replace(task, train=Subset(both, order))
