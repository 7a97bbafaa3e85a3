"""Concept customization: a sequence of concepts, each with a few images, a placeholder word and a class word.

The stream that generators of pictures are customized on (DreamBooth, Custom Diffusion, and the continual work since). Every class of the
source is a concept, or those that `concepts` lists, in the order of the list; each gives `images` training images, drawn by
the seed. A task is one concept, or `together` of them.

The words: `placeholder` with the concept's number in place of {} ("<new1>"), or its own name in place of {name}, for pictures that are
not of new concepts (a base that is trained on captions); and the class word, which is `word` for all concepts ("digit"), a word per
concept, or the concept's own name. `templates` are the captions of training: {} stands for the placeholder and the class word. `prompts`
are those of evaluation, and `joint_prompts` name two concepts at once ({0} and {1}), the new one with each that came before. A training
sample is a picture and, as its text, a caption (one template each, drawn by the seed).

`task.concepts` lists for every concept of the task its name, placeholder, word, phrase, prompts and joint prompts.

What is scored of a task are `samples` pictures for each of its prompts, whose ids seed the noise that they are painted from. Who judges
them says `judge`: `own`, a small encoder of pictures and class names that is trained on the source's real pictures of all its classes
before the stream (once, and cached; never on painted ones), or CLIP where its weights are at hand (`open_clip:ViT-B-32/laion2b_s34b_b79k`,
or `open_clip:` and a folder), or `none`. In what the judge reads, the placeholder and class word are replaced by the concept's own name
for `own`, which knows no other words, and by the class word for CLIP. The real pictures that painted ones are compared with are the
concept's training pictures.

`streamcl feed` brings further concepts: the classes of a delivery, with all pictures that it has of each. Their class word is `word`, or
the concept's own name where `word` does not list it. The own judge stays as it was trained: it compares with the delivered pictures, and
gives no text alignment for a name that is none of its source's classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch

from streamcl.data import ArrayDataset, Subset, View, place_in_class
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.seeding import derived, generator
from streamcl.stream import Batch, Dataset, Modality, Scenario, Source, StreamInfo, Task

from ._division import arranged, by_task, listing, need_target, numbered, refuse_repeats

KIND = "concepts"
METRICS = ("image_alignment", "text_alignment", "recognised", "confusion", "joint_image_alignment", "joint_text_alignment")
CLIP = "open_clip:"
QUESTIONS = 2**60  # prompts are numbered from here, so that their ids are none of a picture's
JUDGED = 200  # real pictures of each class, at most, that an own judge is trained on


class Concepts(Scenario):
    """A few images of one new concept per task."""

    def __init__(
        self,
        *,
        data: Source,
        concepts: list[str | int] | None = None,
        images: PositiveInt = 5,
        together: PositiveInt = 1,
        placeholder: str = "<new{}>",
        word: str | dict[str, str] | None = None,
        templates: tuple[str, ...] = (
            "a photo of {}",
            "a picture of {}",
            "a close-up photo of {}",
            "a cropped photo of {}",
            "a bright photo of {}",
        ),
        prompts: tuple[str, ...] = ("a photo of {}", "a drawing of {}", "{} on a black background", "two of {} side by side"),
        joint_prompts: tuple[str, ...] = ("a photo of {0} next to {1}",),
        samples: PositiveInt = 6,
        judge: str = "own",
        modality: str = "image",
        order: Literal["seed", "given", "alphabetical"] = "given",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.validation:
            raise ConfigError(f"{KIND}: validation takes a share of a few images per concept: leave it out")
        if "{}" not in placeholder and "{name}" not in placeholder:
            raise ConfigError(f"{KIND}: placeholder {placeholder!r} is the same for every concept: put {{}} where its number belongs")
        if judge not in ("own", "none") and (not judge.startswith(CLIP) or judge == CLIP):
            raise ConfigError(
                f"{KIND}: judge {judge!r} is unknown: own, none, or open_clip: and a model ({CLIP}ViT-B-32/laion2b_s34b_b79k)"
            )
        for option, texts in (("templates", templates), ("prompts", prompts)):
            wrong = [text for text in texts if text.count("{}") != 1]
            if wrong or not texts:
                told = f"{wrong[0]!r} names the concept {wrong[0].count('{}')} times" if wrong else "there is none"
                raise ConfigError(f"{KIND}: {option}: {told}: each needs {{}} once, where the concept belongs")
        if concepts is not None and (order != "given" or not concepts):
            told = "lists none" if not concepts else "already says the order: leave out order"
            raise ConfigError(f"{KIND}: concepts {told}")
        wrong = [text for text in joint_prompts if "{0}" not in text or "{1}" not in text]
        if wrong:
            raise ConfigError(f"{KIND}: joint_prompts: {wrong[0]!r} lacks {{0}} or {{1}}: each names two concepts")
        self.data, self.concepts, self.images, self.together = data, concepts, images, together
        self.placeholder, self.word, self.modality, self.order = placeholder, word, modality, order
        self.templates, self.prompts, self.joint_prompts, self.samples = templates, prompts, joint_prompts, samples
        self.by = judge
        self._judge: Any = None

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class",), KIND, "one class per sample, the concept")
        if self.modality not in loaded.modalities or loaded.modalities[self.modality].kind != "image":
            there = ", ".join(f"{name} ({m.kind})" for name, m in loaded.modalities.items())
            raise ConfigError(f"{KIND}: {self.modality!r} is no modality of images; the source has {there}: name one with modality")
        self.problems, self._seed, self._train, self._classes = loaded.problems, seed, loaded.train, list(loaded.class_names)
        number = {name: place for place, name in enumerate(loaded.class_names)}
        if self.concepts is not None:
            arrival = [numbered(name, number, f"{KIND}: concepts") for name in self.concepts]
            refuse_repeats([loaded.class_names[n] for n in arrival], f"{KIND}: concepts")
        else:
            arrival = arranged(loaded.class_names, self.order, seed, KIND)
        names = [loaded.class_names[n] for n in arrival]
        if isinstance(self.word, dict) and (lacking := [name for name in names if name not in self.word]):
            raise ConfigError(f"{KIND}: word has none for {listing(lacking)}: give every concept its class word, or one for all")
        self._relabel = torch.full((len(number),), -1, dtype=torch.int64)
        self._relabel[arrival] = torch.arange(len(arrival))
        arrived = self._relabel[loaded.train.targets]
        counts = torch.bincount(arrived[arrived >= 0], minlength=len(arrival))
        short = [f"{names[c]} ({counts[c]})" for c in (counts < self.images).nonzero().squeeze(1).tolist()]
        if short:
            raise DataError(f"{KIND}: {self.images} images per concept are asked for and there are fewer of {listing(short)}")
        shuffled = torch.randperm(len(arrived), generator=generator(seed, "images"))
        nth = torch.empty_like(arrived)
        nth[shuffled] = place_in_class(arrived[shuffled])
        chosen = torch.where((nth < self.images) & (arrived >= 0), torch.div(arrived, self.together, rounding_mode="floor"), -1)
        self._rows = by_task(chosen, -(-len(arrival) // self.together))
        self._bounds = [*range(0, len(arrival), self.together), len(arrival)]  # the concepts of each task
        self._taken: list[tuple[str, Dataset]] = []  # the name and the pictures of each task that was delivered
        self._all = [self._words(place, name) for place, name in enumerate(names)]
        self.info = StreamInfo(
            modalities={self.modality: loaded.modalities[self.modality], "text": Modality("text")},
            target="image",
            metrics=() if self.by == "none" else METRICS,
            classes=len(names),
            tasks=len(self._rows),
            licence=loaded.licence,
            class_names=tuple(names),
            asks=("text",),
            words=tuple(concept["placeholder"] for concept in self._all),
            nouns=tuple(concept["word"] for concept in self._all),
        )
        self._arrival, self._judge = arrival, None
        return self.info

    def takes(self) -> StreamInfo:
        return StreamInfo({self.modality: self.info.modalities[self.modality]})

    def take(self, name: str, classes: Sequence[str], train: Dataset) -> StreamInfo:
        """Each class is a new concept, with all its pictures."""
        known = [concept["name"] for concept in self._all]
        for again in classes:
            if again in known:
                raise DataError(
                    f"{name} has pictures of {again!r}, a concept of the run already, whose word was learned: give the new ones another "
                    f"name ({again} 2), which becomes a concept of its own, or leave them out"
                )
        self._all += [self._words(len(known) + place, concept) for place, concept in enumerate(classes)]
        self._bounds.append(len(self._all))
        self._taken.append((name, train))
        self._judge = None
        self.info = dataclasses.replace(
            self.info,
            classes=len(self._all),
            tasks=len(self),
            class_names=tuple(concept["name"] for concept in self._all),
            words=tuple(concept["placeholder"] for concept in self._all),
            nouns=tuple(concept["word"] for concept in self._all),
        )
        return self.info

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def task(self, index: int) -> Task:
        first, last = self._bounds[index : index + 2]
        mine = [{**self._all[place], "joint_prompts": self._joint(place)} for place in range(first, last)]
        place = index - len(self._rows)
        about = {"concepts": mine, "joint_templates": list(self.joint_prompts)}
        return Task(
            index=index,
            name=", ".join(concept["name"] for concept in mine) if place < 0 else self._taken[place][0],
            train=_Captioned(self._pictures(index), self),
            classes=tuple(range(first, last)),
            seen=tuple(range(last)),
            labels=tuple(range(first, last)),
            names={place: concept["name"] for place, concept in enumerate(self._all[:last])},
            about=about | {"shots": self.images} if place < 0 else about,
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        """The prompts of a task's concepts, `samples` times each; the joint ones name concepts that came before it."""
        if self.by == "none":
            return None
        texts: list[Any] = []
        judged: list[Any] = []
        concepts: list[tuple[int, ...]] = []
        for place in task.classes:
            asked: list[tuple[str, tuple[int, ...]]] = [(text, (place,)) for text in self.prompts]
            asked += [(text, (place, earlier)) for earlier in range(place) for text in self.joint_prompts]
            for text, named in asked:
                said = [self._all[label]["phrase"] for label in named]
                told = [self._said_to_judge(label) for label in named]
                texts += [_filled(text, said)] * self.samples
                judged += [_filled(text, told)] * self.samples
                concepts += [named] * self.samples
        marks = torch.zeros(len(texts), len(self._all), dtype=torch.uint8)
        for row, both in enumerate(concepts):
            marks[row, list(both)] = 1
        first = QUESTIONS + derived(self._seed, "prompts", task.index) % 2**32 * 2**20
        ids = torch.arange(first, first + len(texts))
        return ArrayDataset({"text": texts}, torch.tensor([n[0] for n in concepts]), ids, extra={"judged": judged, "named": marks})

    def judge(self) -> Any:
        if self._judge is None and self.by != "none":
            from streamcl import judging

            real = self._real_pictures()
            if self.by.startswith(CLIP):
                encoder: Any = judging.Clip(self.by.removeprefix(CLIP), real[0].shape[1])
            else:
                labels = torch.cat([torch.full((len(pictures),), c) for c, pictures in enumerate(real)])
                encoder = judging.trained(self._classes, torch.cat(real), labels, self.tell)
            mine, since = [], []  # the pictures of each concept, and how many concepts there were when it came
            for index, (first, last) in enumerate(pairwise(self._bounds)):
                view = self._pictures(index)
                mine += [self._scaled(view[(view.targets == c).nonzero().squeeze(1)]) for c in range(first, last)]
                since += [max(last, len(self._arrival))] * (last - first)
            others = [n for n in range(len(real)) if n not in self._arrival]
            names = [concept["name"] for concept in self._all]
            there = torch.tensor(since)[:, None] > torch.arange(len(names))  # what comes later changes no score of what came before
            differs = torch.tensor([[self._classes[n] != name for n in others] for name in names], dtype=torch.bool)
            read = torch.tensor([self.by != "own" or name in self._classes for name in names])
            self._judge = judging.Judge(encoder, mine, [real[n] for n in others], torch.cat([there, differs], dim=1), read)
        return self._judge

    def _real_pictures(self) -> list[torch.Tensor]:
        """Real pictures of every class of the source, from 0 to 1, in the source's order."""
        targets = self._train.targets
        return [self._scaled(self._train[(targets == c).nonzero().squeeze(1)[:JUDGED]]) for c in range(len(self._classes))]

    def _pictures(self, index: int) -> Dataset:
        """What a task learns from, without captions."""
        place = index - len(self._rows)
        return Subset(self._train, self._rows[index], self._relabel) if place < 0 else self._taken[place][1]

    def caption(self, identity: int, concept: int) -> str:
        template = self.templates[derived(self._seed, "caption", identity) % len(self.templates)]
        return template.replace("{}", self._all[concept]["phrase"])

    def _scaled(self, batch: Batch) -> torch.Tensor:
        values, high = batch.inputs[self.modality], self.info.modalities[self.modality].high
        assert isinstance(values, torch.Tensor)
        return values.float() if values.is_floating_point() or high is None else values / high

    def _said_to_judge(self, concept: int) -> str:
        about = self._all[concept]
        return about["name"] if self.by == "own" else about["word"] or about["name"]

    def files(self) -> list[str]:
        return self.data.files()

    def _words(self, place: int, name: str) -> dict[str, Any]:
        """Everything that is said of a concept by itself."""
        word = self.word.get(name, name) if isinstance(self.word, dict) else self.word if self.word is not None else name
        token = self.placeholder.replace("{name}", name).replace("{}", str(place + 1))  # whatever other braces it holds
        phrase = f"{token} {word}".strip()
        return {
            "name": name,
            "placeholder": token,
            "word": word,
            "phrase": phrase,
            "prompts": [prompt.replace("{}", phrase) for prompt in self.prompts],
        }

    def _joint(self, place: int) -> list[str]:
        """The prompts of a concept with each that came before; made for its task, since all pairs of a long stream are many."""
        mine = [text.replace("{0}", self._all[place]["phrase"]) for text in self.joint_prompts]
        return [text.replace("{1}", earlier["phrase"]) for earlier in self._all[:place] for text in mine]


class _Captioned(View):
    """Images with the sentence that describes each."""

    def __init__(self, dataset: Dataset, stream: Concepts) -> None:
        super().__init__(dataset)
        self.stream = stream

    @cached_property
    def captions(self) -> list[str]:
        return [self.stream.caption(*one) for one in zip(self.ids.tolist(), self.targets.tolist(), strict=True)]  # a few images

    def _finish(self, batch: Batch, indices: torch.Tensor) -> Batch:
        captions: list[Any] = [self.captions[place] for place in indices.tolist()]
        modality = self.stream.modality
        return batch.replace(inputs={modality: batch.inputs[modality], "text": captions})


def _filled(text: str, phrases: list[str]) -> str:
    """A prompt with the phrases of the concepts that it names."""
    if len(phrases) == 1:
        return text.replace("{}", phrases[0])
    return text.replace("{0}", phrases[0]).replace("{1}", phrases[1])
