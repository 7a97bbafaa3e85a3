"""Concept streams: a few images each, and the words that go with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.scenarios.concepts import Concepts
from toy_streams import Toy, assert_repeatable, ids, opened, read

from streamcl.errors import ConfigError, DataError
from streamcl.stream import Scenario


def pets(samples: int = 6, **changes: Any) -> Toy:
    options: dict[str, Any] = {"names": ["cat", "dog", "owl"], "modalities": ("image",), "test": [], **changes}
    return Toy(torch.arange(3).repeat(samples), **options)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["given", "seed", "alphabetical"]), st.integers(0, 99))
def test_every_concept_gives_exactly_its_images_and_arrives_once(images: int, together: int, order: str, seed: int) -> None:
    scenario = opened(Concepts, pets(), seed, images=images, together=together, order=order)
    tasks = list(scenario)
    assert len(tasks) == len(scenario) == -(-3 // together) and [c for task in tasks for c in task.classes] == [0, 1, 2]
    assert scenario.info.target == "image" and scenario.info.metrics[0] == "image_alignment" and scenario.info.asks == ("text",)
    assert list(scenario.info.modalities) == ["image", "text"] and scenario.info.words == ("<new1>", "<new2>", "<new3>")
    if order != "seed":
        assert scenario.info.class_names == ("cat", "dog", "owl")
    for task in tasks:
        batch = read(task.train)
        assert batch.target is not None and torch.bincount(batch.target).tolist()[task.classes[0] :] == [images] * len(task.classes)
        assert [task.names[c] for c in batch.target.tolist()] == [["cat", "dog", "owl"][row % 3] for row in batch.ids.tolist()]
        assert len(set(batch.ids.tolist())) == len(batch)
        assert task.validation is None
        assert [concept["name"] for concept in task.concepts] == [task.names[c] for c in task.classes] == task.name.split(", ")
        assert task.shots == images and task.seen == tuple(range(task.classes[-1] + 1)) and len(task.names) == len(task.seen)
        told = {f"<new{c + 1}> {task.names[c]}" for c in task.classes}
        for caption, c in zip(batch.inputs["text"], batch.target.tolist(), strict=True):
            assert f"<new{c + 1}> {task.names[c]}" in caption and "{" not in caption
            assert sum(phrase in caption for phrase in told) == 1, "a caption names its own concept alone"


def test_the_words_of_a_concept_as_written_by_hand() -> None:
    scenario = opened(
        Concepts,
        pets(),
        concepts=["owl", "cat"],
        word="animal",
        placeholder="<v{}*>",
        templates=("one {}",),
        prompts=("{} in the snow", "a toy {}"),
        joint_prompts=("{1} behind {0}",),
    )
    owl, cat = scenario
    assert owl.concepts == [
        {
            "name": "owl",
            "placeholder": "<v1*>",
            "word": "animal",
            "phrase": "<v1*> animal",
            "prompts": ["<v1*> animal in the snow", "a toy <v1*> animal"],
            "joint_prompts": [],
        }
    ]
    assert cat.concepts[0]["joint_prompts"] == ["<v1*> animal behind <v2*> animal"], "the new one with each that came before"
    third = opened(Concepts, pets(), word="", joint_prompts=("{0} and {1}", "{1} with {0}")).task(2).concepts[0]
    assert third["joint_prompts"] == ["<new3> and <new1>", "<new1> with <new3>", "<new3> and <new2>", "<new2> with <new3>"]
    assert read(cat.train).inputs["text"] == ["one <v2*> animal"] * 5


class Counted(str):
    """A prompt that counts how often something is put into it."""

    filled = 0

    def replace(self, *given: Any) -> Any:
        Counted.filled += 1
        return super().replace(*given)


def test_joint_prompts_are_made_for_their_own_task_alone() -> None:
    Counted.filled = 0
    scenario = opened(Concepts, Toy(torch.arange(40).repeat(2), modalities=("image",), test=[]), images=2)
    scenario.joint_prompts = (Counted("{0} and {1}"),)  # type: ignore[attr-defined]
    scenario.open(0)
    assert Counted.filled == 0
    assert len(scenario.task(30).concepts[0]["joint_prompts"]) == 30 and Counted.filled == 1
    assert scenario.task(30).concepts == scenario.task(30).concepts


def test_a_word_may_be_given_for_each_concept_or_be_none() -> None:
    words = {"cat": "feline", "dog": "canine", "owl": ""}
    assert [task.concepts[0]["phrase"] for task in opened(Concepts, pets(), word=words)] == ["<new1> feline", "<new2> canine", "<new3>"]
    assert opened(Concepts, pets(), word="").task(0).concepts[0]["phrase"] == "<new1>"


def test_other_braces_in_the_words_are_left_as_they_are() -> None:
    options: dict[str, Any] = {"templates": ("{x} {}",), "prompts": ("{} in {",), "joint_prompts": ("{0} {y} {1}",)}
    scenario = opened(Concepts, pets(), placeholder="{w}{}", word="{z}", **options)
    _, second, _ = scenario
    assert read(second.train).inputs["text"] == ["{x} {w}2 {z}"] * 5
    assert second.concepts[0]["prompts"] == ["{w}2 {z} in {"]
    assert second.concepts[0]["joint_prompts"] == ["{w}2 {z} {y} {w}1 {z}"]


def test_every_template_is_used_and_a_caption_stays_with_its_image() -> None:
    scenario = opened(Concepts, pets(60), images=60)
    captions = dict(zip(ids(scenario.task(0).train), read(scenario.task(0).train).inputs["text"], strict=True))
    assert len(set(captions.values())) == 5
    part = scenario.task(0).train[torch.tensor([31, 4])]
    assert part.inputs["text"] == [captions[row] for row in part.ids.tolist()]


def test_prompts_are_asked_in_numbers_that_never_change_and_put_to_the_judge_in_words_that_it_knows() -> None:
    scenario = opened(Concepts, pets(), word="animal", prompts=("a {}", "two {}"), samples=2, joint_prompts=("{0} and {1}",))
    tasks = list(scenario)
    test = scenario.test(tasks[1], tasks[1])
    assert test is not None
    batch = read(test)
    assert list(batch.inputs) == ["text"] and batch.target is not None and batch.target.tolist() == [1] * 6
    assert batch.inputs["text"] == [t for t in ("a <new2> animal", "two <new2> animal", "<new2> animal and <new1> animal") for _ in "ab"]
    assert batch.extra["judged"] == [t for t in ("a dog", "two dog", "dog and cat") for _ in "ab"]
    assert batch.extra["named"].tolist() == [[0, 1, 0]] * 4 + [[1, 1, 0]] * 2
    later, other = scenario.test(tasks[1], tasks[2]), opened(Concepts, pets(), word="animal", seed=1).test(tasks[1], tasks[1])
    assert later is not None and other is not None and torch.equal(later.ids, test.ids), "the same noise after every task"
    assert not set(other.ids.tolist()) & set(test.ids.tolist()) and int(test.ids.min()) >= 2**60
    assert opened(Concepts, pets(), judge="none").test(tasks[0], tasks[0]) is None
    clip = opened(Concepts, pets(), word="animal", judge="open_clip:some/weights")
    asked = clip.test(tasks[0], tasks[0])
    assert asked is not None and read(asked).extra["judged"][0] == "a photo of animal"


def test_a_base_is_trained_on_captions_that_name_things_as_they_are() -> None:
    scenario = opened(Concepts, pets(), placeholder="{name}", word="animal", together=3, judge="none")
    (task,) = scenario
    said = {str(text).split()[-2] for text in read(task.train).inputs["text"]}
    assert scenario.info.words == ("cat", "dog", "owl") and said == {"cat", "dog", "owl"}
    assert scenario.info.metrics == ()


def test_only_the_images_of_a_source_are_handed_out() -> None:
    scenario = opened(Concepts, pets(modalities=("image", "text")), images=2)
    assert list(scenario.info.modalities) == ["image", "text"] == list(read(scenario.task(0).train).inputs)
    assert read(scenario.task(0).train).inputs["text"][0].endswith("<new1> cat"), "the caption, not the source's own text"


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"validation": 0.1}, ConfigError, "validation takes a share of a few images"),
        ({"judge": "me"}, ConfigError, "judge 'me' is unknown: own, none, or open_clip: and a model"),
        ({"placeholder": "<new>"}, ConfigError, "placeholder '<new>' is the same for every concept"),
        ({"templates": ("a photo",)}, ConfigError, "templates: 'a photo' names the concept 0 times"),
        ({"prompts": ("{} and {}",)}, ConfigError, "prompts: '{} and {}' names the concept 2 times"),
        ({"prompts": ()}, ConfigError, "prompts: there is none"),
        ({"joint_prompts": ("{0} and {}",)}, ConfigError, r"joint_prompts: '\{0\} and \{\}' lacks \{0\} or \{1\}"),
        ({"modality": "picture"}, ConfigError, r"'picture' is no modality of images; the source has image \(image\), text \(text\)"),
        ({"modality": "text"}, ConfigError, "'text' is no modality of images"),
        ({"concepts": ["cta"]}, ConfigError, "concepts: concepts names an unknown class 'cta': did you mean 'cat'"),
        ({"concepts": ["cat", "cat"]}, ConfigError, "names class 'cat' twice"),
        ({"concepts": []}, ConfigError, "concepts: concepts lists none"),
        ({"concepts": ["cat"], "order": "seed"}, ConfigError, "concepts already says the order"),
        ({"word": {"cat": "feline"}}, ConfigError, "word has none for dog, owl"),
        ({"images": 7}, DataError, r"7 images per concept are asked for and there are fewer of cat \(6\), dog \(6\), owl \(6\)"),
    ],
)
def test_concepts_refuses_what_cannot_be(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        opened(Concepts, pets(modalities=("image", "text")), **options)


def test_concepts_need_one_class_per_image() -> None:
    with pytest.raises(ConfigError, match="one class per sample, the concept"):
        opened(Concepts, Toy([[1, 0]], target="labels", modalities=("image",)))


def test_concepts_that_are_not_listed_may_have_too_few_images() -> None:
    source = Toy([0, 0, 1], names=["cat", "dog"], modalities=("image",))
    assert [ids(task.train) for task in opened(Concepts, source, concepts=["cat"], images=2)] == [[0, 1]]


def test_a_concept_stream_is_repeatable() -> None:
    def make(seed: int, workers: int | None) -> Scenario:
        return opened(Concepts, pets(workers=workers), seed, images=4, together=2, order="seed")

    assert_repeatable(make)
