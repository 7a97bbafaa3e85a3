"""ConceptGuard (CVPR 2025, arXiv 2503.10358): one shared adapter that goes on learning, and four guards of what it learned before.

One low-rank update dW = B A of the keys and values of cross-attention is shared by all concepts and keeps moving. In session t:

    L = L_diff(new) + sum over i in Q of L_diff(replay_i ; e_i + s_i) + L_diff(bound) + preserve sum over layers of mean((dW_t - dW_t-1)^2)

Shift embedding (`shift`): the word e_i of an old concept no longer fits the moved dW, so it gets an offset s_i that is zero at the start of
every session, learns on the replay of its concept, and is added to the word at the end. Concept binding (`bind`): a prompt that names
concepts S is read as "<bind> ... {w_i b_i, e_i} for i in S": one common word, one of each concept, and weights w that are a softmax of
learned importances over S; from the second session on it is trained on a new and a replayed picture side by side. Memory preservation
(`preserve`, 0 for none) holds the product dW, not A and B, to what it was; there is nothing to hold in the first session. Priority queue
(`queue`, 0 for no replay): of the concepts in the exemplar memory those `queue` are replayed whose priority is highest, `age` x the rank
of how long ago they were visited + (1 - age) x their importance; what is replayed gets a new stamp, so that all are visited in turn.
`replay_from: generated` keeps no pictures and replays `generated` of each queued concept, painted at the start of the session. Inference
needs no task: the words of a prompt select everything, and one dW serves all.

The abstract names these parts; no code is public and the equations could not be read. Reconstructions of ours: the pictures side by side
of the binding prompts, the form of the weights, the norm of the preservation (a mean over entries, so that `preserve` does not depend on
the layers' size), the rule of the priority, and every default (rank and learning rates are those of CIDM). Cutting subjects out of
replayed pictures by a segmenter is left out: the loss is over whole pictures.

Evidence: reconstruction
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.nn.backbone import texts
from streamcl.options import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt
from streamcl.pictures import noise_of, side_by_side
from streamcl.seeding import derived
from streamcl.stream import Batch, StreamInfo, Task

from ._lora import delta, inject, parameters
from ._painting import ConceptLearner

BIND = "<bind>"


class ConceptGuard(ConceptLearner):
    fills_memory = True
    predicts_with = ("binding", "common", "importance")

    def __init__(
        self,
        *,
        rank: PositiveInt = 4,
        layers: Literal["keys_values", "cross", "all"] = "keys_values",
        shift: bool = True,
        bind: bool = True,
        preserve: NonNegativeFloat = 1.0,
        queue: NonNegativeInt = 3,
        age: Fraction = 0.5,
        each: PositiveInt = 4,  # replayed pictures of a queued concept in a step
        replay_from: Literal["memory", "generated"] = "memory",
        generated: PositiveInt = 16,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.rank, self.layers, self.shifts, self.binds, self.preserve = rank, layers, shift, bind, preserve
        self.queue_size, self.age, self.each, self.replay_from, self.generated = queue, age, each, replay_from, generated
        self.needs_exemplars = queue > 0 and replay_from == "memory"
        self.stamps: dict[int, int] = {}  # concept -> the session in which it was last learned or replayed
        self.queued: list[int] = []  # the concepts that this session replays
        self.painted: dict[str, Tensor] = {}  # of a session that replays what it painted: concept -> pictures as bytes
        self.before: dict[str, Tensor] = {}  # dW of the last session, by layer, while there is a session

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        if self.binds and not self.queue_size:
            raise ConfigError("conceptguard binds new concepts to replayed ones: with strategy.queue=0 set strategy.bind=false")
        self.adapted = inject(self.backbone, self.rank, self.layers)
        concepts, dim = len(info.words), self.backbone.dim
        spread = self.backbone.encoders[0].get_input_embeddings().weight.std().item()

        def made(*shape: int, scale: float = 0.0) -> nn.Parameter:
            return nn.Parameter((torch.randn(*shape) * scale).to(context.device))

        self.offset = made(concepts, dim)
        self.binding, self.common, self.importance = made(concepts, dim, scale=spread), made(dim, scale=spread), made(concepts)
        self.model.to(context.device).remember()

    # -- words -------------------------------------------------------------------------------------------------------------------

    def tokens(self, words: Sequence[str]) -> list[str]:
        self.word = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in words]
        self.binders = [f"<bind:{place + 1}>" for place in range(len(words))]
        return [*words, *self.binders, BIND]

    def bound(self, prompt: str) -> str:
        """The prompt with binding words where it names several concepts."""
        named = [label for label, word in enumerate(self.word) if word.search(prompt)]
        if not self.binds or len(named) < 2:
            return prompt
        for label in named:
            prompt = self.word[label].sub(f"{self.binders[label]} {self.info.words[label]}", prompt)
        return f"{BIND} {prompt}"

    def table(self, prompts: Sequence[str], words: Tensor) -> Tensor:
        """The vectors of all words of `tokens` for these prompts  # (prompts, tokens, dim), or (tokens, dim) where nothing is bound"""
        concepts = len(self.info.words)
        words = torch.cat([words, words.new_zeros(concepts - len(words), words.shape[1])])
        if not self.binds:
            return torch.cat([words, words.new_zeros(concepts + 1, words.shape[1])])
        named = torch.tensor([[binder in text for binder in self.binders] for text in prompts], device=words.device)
        named[~named.any(dim=1)] = True  # of no importance: no binding word is read there
        weights = self.importance.masked_fill(~named, -torch.inf).softmax(dim=1)  # (prompts, concepts)
        parts = [words.expand(len(prompts), -1, -1), weights[:, :, None] * self.binding, self.common.expand(len(prompts), 1, -1)]
        return torch.cat(parts, dim=1)

    def vectors(self) -> Tensor:
        """New words learn; those of the queue stand at e + s; the others stay."""
        words = super().vectors()
        return words + torch.where(self.shifted[: len(words), None], self.offset[: len(words)], 0.0) if self.shifts else words

    def read(self, prompts: Sequence[str]) -> dict[str, Any]:
        said = [self.bound(text) for text in prompts]
        return self.backbone.read(said, self.table(said, self.model.head.weight))

    def check(self, task: Task) -> None:
        super().check(task)
        for concept in task.concepts:
            cut = self.backbone.without([self.bound(text) for text in concept["joint_prompts"]], concept["placeholder"])
            if cut:
                raise ConfigError(f"with its binding words {cut[0]!r} is too long for the text encoder: shorten scenario.joint_prompts")

    # -- a session ---------------------------------------------------------------------------------------------------------------

    def enter_task(self, task: Task) -> None:
        super().enter_task(task)
        self.templates = task.joint_templates
        self.set_queue(self.queued)

    def set_queue(self, queued: list[int]) -> None:
        self.queued = queued
        self.shifted = torch.zeros(len(self.info.words), dtype=torch.bool, device=self.context.device)
        self.shifted[queued] = True

    @torch.no_grad()
    def before_task(self, task: Task) -> None:
        super().before_task(task)
        self.set_queue(self.priorities()[: self.queue_size])
        self.offset.zero_()
        self.before = {name: delta(layer).clone() for name, layer in self.adapted.items()} if task.index and self.preserve else {}
        self.painted = {}
        if self.replay_from == "generated":
            for label in self.queued:
                text = f"a photo of {self.phrase(label)}"
                first = derived(self.context.seed, "replay", task.index, label) >> 8
                noise = noise_of(torch.arange(first, first + self.generated), self.backbone.latent_shape(self.generated))
                pictures = self.backbone.paint(self.read([text] * self.generated), noise.to(self.context.device))
                self.painted[str(label)] = (pictures * 255).round().to(torch.uint8).cpu()

    def priorities(self) -> list[int]:
        """The concepts that can be replayed, the most urgent first."""
        held = self.memory.exemplars.classes() if self.replay_from == "memory" and self.queue_size else self.stamps
        known = [label for label in self.stamps if label in held]
        if not known:
            return []
        importance = self.importance[known].softmax(dim=0).tolist()
        ages = sorted({self.stamps[label] for label in known}, reverse=True)  # the oldest has the highest rank
        heap: list[tuple[float, int]] = []
        for label, weight in zip(known, importance, strict=True):
            rank = (ages.index(self.stamps[label]) + 1) / len(ages)
            heapq.heappush(heap, (-(self.age * rank + (1 - self.age) * weight), label))
        return [heapq.heappop(heap)[1] for _ in range(len(heap))]

    def trained(self) -> list[nn.Parameter]:
        return parameters(self.adapted)

    def parameter_groups(self) -> list[dict[str, Any]]:
        generator, *words = super().parameter_groups()
        beside = [*([self.offset] if self.shifts else []), *([self.binding, self.common, self.importance] if self.binds else [])]
        return [generator, *words, *([{"params": beside, "lr": self.token_lr, "weight_decay": 0.0}] if beside and self.token_lr else [])]

    def loss(self, batch: Batch) -> Tensor:
        pictures, prompts = self.backbone.pictures(batch), list(texts(batch, "text"))
        shares = [len(prompts)]  # one UNet pass for all; each part is a mean of its own
        replayed = [self.replayed(label) for label in self.queued]
        for old, captions in replayed:
            pictures, prompts = torch.cat([pictures, old]), prompts + captions
            shares.append(len(captions))
        if self.binds and self.queued and self.templates:
            joint, captions = self.joined(batch, pictures[: shares[0]], replayed)
            pictures, prompts = torch.cat([pictures, joint]), prompts + captions
            shares.append(len(captions))
        errors = self.errors(pictures, prompts, self.table(prompts, self.vectors()))
        loss = torch.stack([part.mean() for part in errors.split(shares)]).sum()
        if self.before:
            moved = torch.stack([((delta(layer) - self.before[name]) ** 2).mean() for name, layer in self.adapted.items()]).sum()
            self.context.log(moved=moved.detach())
            loss = loss + self.preserve * moved
        return loss

    def replayed(self, label: int) -> tuple[Tensor, list[str]]:
        """A few pictures of an old concept, from -1 to 1, and their captions."""
        random = self.context.generator
        if self.replay_from == "generated":
            held = self.painted[str(label)]
            chosen = held[torch.randint(len(held), (self.each,), generator=random)]
            return chosen.to(self.context.device).float() / 127.5 - 1, [f"a photo of {self.phrase(label)}"] * self.each
        kept = self.memory.exemplars.of(label)
        batch = self.context.prepare(kept[torch.randint(len(kept), (self.each,), generator=random)])
        return self.backbone.pictures(batch), list(texts(batch, "text"))

    def joined(self, batch: Batch, new: Tensor, replayed: list[tuple[Tensor, list[str]]]) -> tuple[Tensor, list[str]]:
        """New and old pictures side by side, half of them the other way round, under a binding prompt."""
        random, count = self.context.generator, self.each
        mine = torch.randint(len(new), (count,), generator=random)
        place = torch.randint(len(replayed), (count,), generator=random).tolist()
        old = torch.stack([replayed[p][0][row] for row, p in enumerate(place)])
        labels, mine_there = batch.target.tolist(), new[mine.to(new.device)]
        prompts, pictures = [], []
        for row, p in enumerate(place):
            names = [self.phrase(labels[mine[row]]), self.phrase(self.queued[p])]
            pair = [mine_there[row], old[row]]
            if row % 2:
                names, pair = names[::-1], pair[::-1]
            template = self.templates[int(torch.randint(len(self.templates), (), generator=random))]
            prompts.append(self.bound(template.replace("{0}", names[0]).replace("{1}", names[1])))
            pictures.append(torch.stack(pair))
        left, right = torch.stack(pictures, dim=1)
        return side_by_side(left, right, background=-1.0), prompts

    def phrase(self, label: int) -> str:
        return f"{self.info.words[label]} {self.info.nouns[label]}".strip()

    @torch.no_grad()
    def after_task(self, task: Task) -> None:
        if self.shifts:
            weight = self.model.head.weight
            weight.add_(torch.where(self.shifted[: len(weight), None], self.offset[: len(weight)], 0.0))
            self.offset.zero_()
        for label in (*self.queued, *task.classes):
            self.stamps[label] = task.index
        self.set_queue([])
        self.painted, self.before = {}, {}
        if self.needs_exemplars:
            self.keep(task.train if self.memory.exemplars.streaming else self.candidates(task))

    # -- state -------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        learned = {name: getattr(self, name).detach() for name in ("offset", "binding", "common", "importance")}
        session = {"queued": self.queued, "painted": self.painted, "before": self.before}
        return {**super().state(), **learned, **session, "stamps": {str(label): stamp for label, stamp in self.stamps.items()}}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        for name in ("offset", "binding", "common", "importance"):
            getattr(self, name)[: len(state[name])].copy_(state[name])  # of concepts that came since (a feed) there is nothing yet
        self.stamps = {int(label): int(stamp) for label, stamp in state["stamps"].items()}
        self.painted = dict(state["painted"])
        self.before = {name: value.to(self.context.device) for name, value in state["before"].items()}
        self.set_queue([int(label) for label in state["queued"]])
