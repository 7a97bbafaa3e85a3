"""Concept customization: a sequence of concepts, each with a few images, a placeholder word and a class word.

The stream that generators of pictures are customized on (DreamBooth, Custom Diffusion, and the continual work since). Every class of the
source is a concept, or those that `concepts` lists, in the order of the list; each gives `images` training images, drawn by
the seed. A task is one concept, or `together` of them.

The words: `placeholder` with the concept's number in place of {} ("<new1>"), and the class word, which is `word` for all
concepts ("digit"), a word per concept, or the concept's own name. `templates` are the captions of training: {} stands for the
placeholder and the class word. `prompts` are those of evaluation, and `joint_prompts` name two concepts at once ({0} and {1}), the new
one with each that came before. A training sample's caption is in `extra["caption"]` (one template each, drawn by the seed).

`task.concepts` lists for every concept of the task its name, placeholder, word, prompts and joint prompts. What a concept learner paints
is scored by the strategy's own figures; there is no test set.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from streamcl.data import Subset, View, place_in_class
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.seeding import derived, generator
from streamcl.stream import Batch, Dataset, Scenario, Source, StreamInfo, Task

from ._division import arranged, by_task, listing, need_target, numbered, refuse_repeats

KIND = "concepts"


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
        modality: str = "image",
        order: Literal["seed", "given", "alphabetical"] = "given",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.validation:
            raise ConfigError(f"{KIND}: validation takes a share of a few images per concept: leave it out")
        if "{}" not in placeholder:
            raise ConfigError(f"{KIND}: placeholder {placeholder!r} is the same for every concept: put {{}} where its number belongs")
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
        self.templates, self.prompts, self.joint_prompts = templates, prompts, joint_prompts

    def open(self, seed: int) -> StreamInfo:
        loaded = self.data.load()
        need_target(loaded, ("class",), KIND, "one class per sample, the concept")
        if self.modality not in loaded.modalities or loaded.modalities[self.modality].kind != "image":
            there = ", ".join(f"{name} ({m.kind})" for name, m in loaded.modalities.items())
            raise ConfigError(f"{KIND}: {self.modality!r} is no modality of images; the source has {there}: name one with modality")
        self.problems, self._seed, self._train = loaded.problems, seed, loaded.train
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
        self._all = [self._words(place, name) for place, name in enumerate(names)]
        self.info = StreamInfo(
            modalities={self.modality: loaded.modalities[self.modality]},
            target="image",
            metrics=(),
            classes=len(names),
            tasks=len(self._rows),
            licence=loaded.licence,
            class_names=tuple(names),
        )
        return self.info

    def __len__(self) -> int:
        return len(self._rows)

    def task(self, index: int) -> Task:
        first = index * self.together
        last = min(first + self.together, len(self._all))
        mine = [{**self._all[place], "joint_prompts": self._joint(place)} for place in range(first, last)]
        view = Subset(self._train, self._rows[index], self._relabel)
        phrases = [concept["phrase"] for concept in self._all]
        drawn = [derived(self._seed, "caption", identity) % len(self.templates) for identity in view.ids.tolist()]  # a few images
        captions = [self.templates[t].replace("{}", phrases[c]) for t, c in zip(drawn, view.targets.tolist(), strict=True)]
        return Task(
            index=index,
            name=", ".join(concept["name"] for concept in mine),
            train=_Captioned(view, captions, self.modality),
            classes=tuple(range(first, last)),
            seen=tuple(range(last)),
            labels=tuple(range(first, last)),
            names={place: concept["name"] for place, concept in enumerate(self._all[:last])},
            about={"concepts": mine, "shots": self.images},
        )

    def test(self, task: Task, after: Task) -> Dataset | None:
        return None

    def files(self) -> list[str]:
        return self.data.files()

    def _words(self, place: int, name: str) -> dict[str, Any]:
        """Everything that is said of a concept by itself."""
        word = self.word[name] if isinstance(self.word, dict) else self.word if self.word is not None else name
        token = self.placeholder.replace("{}", str(place + 1))  # whatever other braces it holds
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

    def __init__(self, dataset: Subset, captions: list[str], modality: str) -> None:
        super().__init__(dataset)
        self.captions, self.modality = captions, modality

    def _finish(self, batch: Batch, indices: torch.Tensor) -> Batch:
        captions: list[Any] = [self.captions[place] for place in indices.tolist()]
        return batch.replace(inputs={self.modality: batch.inputs[self.modality]}, extra={**batch.extra, "caption": captions})
