"""Instruction sets one after another: what a dialogue becomes, which rows are whose, and what each kind of broken data is told."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from streamcl.scenarios.instruction import Instruction
from streamcl.scenarios.sources.conversations import Conversations
from streamcl.scenarios.sources.digit_scenes import DigitScenes
from streamcl.scenarios.sources.digits import Digits

from streamcl.data import whole
from streamcl.errors import ConfigError, DataError
from streamcl.metrics import Answer, Room
from streamcl.metrics.texts import Verified
from streamcl.stream import Task


def picture(value, width=4, height=3):
    stream = io.BytesIO()
    Image.new("L", (width, height), value).save(stream, "PNG")
    return stream.getvalue()


def dialogue(*said, **fields):
    """A record in the form of LLaVA; who speaks alternates."""
    return {"id": "x", **fields, "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]}


def written(file, records):
    file.parent.mkdir(exist_ok=True)
    text = json.dumps(records) if file.suffix == ".json" else "".join(json.dumps(record) + "\n" for record in records)
    file.write_text(text, encoding="utf-8")
    return file


def sets(folder, **content):
    return [written(folder / f"{name}.json", records) for name, records in content.items()]


def rows(dataset):
    batch = whole(dataset)
    return list(zip(batch.inputs["text"], batch.extra["answer"], strict=True))


# The source -----------------------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_dialogue_are_the_same_row(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(9))
    uri = "data:image/png;base64," + base64.b64encode(picture(9)).decode()
    parts = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "How many?"}]
    forms = [
        dialogue("<image>\nHow many?", "3", image="a.png"),
        {"messages": [{"role": "user", "content": "How many?<image>"}, {"role": "assistant", "content": "3"}], "images": ["a.png"]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "3 "}]}]},
    ]
    for ending in ("json", "jsonl"):
        batch = whole(Conversations(path=written(tmp_path / f"set.{ending}", forms)).load().train)
        assert (
            batch.inputs["text"] == ["How many?"] * 3 and batch.extra["answer"] == ["3"] * 3 and batch.extra["verifier"] == ["number"] * 3
        )
        assert bool((batch.inputs["image"] == 9).all()) and batch.present is None and batch.extra["skill"] == ["set"] * 3


def test_the_last_answer_or_every_answer_is_a_row_asked_for_by_all_before_it(tmp_path):
    record = dialogue("One?", "1", "Two?", "B")
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    path = written(tmp_path / "set.json", [record, dialogue("Alone?", "yes")])
    last = ("Be brief.\nUser: One?\nAssistant: 1\nUser: Two?", "B")
    assert rows(Conversations(path=path).load().train) == [last, ("Alone?", "yes")]
    every = Conversations(path=path, turns="all").load().train
    assert rows(every) == [("Be brief.\nOne?", "1"), last, ("Alone?", "yes")]
    assert whole(every).extra["verifier"] == ["number", "choice", "text"]
    assert set(whole(Conversations(path=path, verifier="exact").load().train).extra["verifier"]) == {"exact"}


def test_a_picture_shown_later_is_not_seen_by_an_earlier_answer(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(9))
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "And here?"}]
    said = [("user", "Hello"), ("assistant", "Hi"), ("user", parts), ("assistant", "9")]
    path = written(tmp_path / "set.json", [{"messages": [{"role": role, "content": content} for role, content in said]}])
    batch = whole(Conversations(path=path, turns="all").load().train)
    assert batch.present["image"].tolist() == [False, True] and batch.inputs["image"][:, 0, 0, 0].tolist() == [0, 9]


def test_a_test_part_is_drawn_by_dialogues_so_that_none_is_in_both(tmp_path):
    files = sets(tmp_path, a=[dialogue(f"a{n}?", "1", "more?", "2") for n in range(10)], b=[dialogue(f"b{n}?", "1") for n in range(10)])
    data = Conversations(path=files, turns="all", test_fraction=0.3).load()
    assert torch.bincount(data.test.targets).tolist() == [6, 3] and torch.bincount(data.train.targets).tolist() == [14, 7]
    train, test = ({question.removeprefix("User: ").split("?")[0] for question, _ in rows(part)} for part in (data.train, data.test))
    assert not train & test and len(train | test) == 20


def test_a_picture_that_two_sets_show_is_in_one_part(tmp_path):
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes(picture(n))
    shown = {name: [{**dialogue(f"{name}{n}?", "1"), "image": f"{n}.png"} for n in range(8)] for name in "ab"}
    data = Conversations(path=sets(tmp_path, **shown), test_fraction=0.25).load()
    train, test = (whole(part).inputs["image"][:, 0, 0, 0].tolist() for part in (data.train, data.test))
    assert not set(train) & set(test) and torch.bincount(data.test.targets).tolist() == [2, 2] and len(train) == 12


def test_files_are_named_by_a_list_a_pattern_or_a_folder_and_each_is_a_set(tmp_path):
    sets(tmp_path / "train", b=[dialogue("1?", "1")], a=[dialogue("2?", "2")])
    sets(tmp_path / "test", b=[dialogue("3?", "3")], a=[dialogue("4?", "4")])
    for path, names in ((tmp_path / "train", ["a", "b"]), (tmp_path / "train" / "*.json", ["a", "b"])):
        data = Conversations(path=path, test=str(path).replace("/train", "/test")).load()
        assert (
            data.class_names == names and rows(data.train) == [("2?", "2"), ("1?", "1")] and rows(data.test) == [("4?", "4"), ("3?", "3")]
        )
        assert data.target == "text" and data.train.ids.tolist() == [0, 1] and data.test.ids.tolist() == [2, 3]
    both = Conversations(path=[tmp_path / "train" / "b.json", tmp_path / "test" / "b.json"])
    assert both.load().class_names == ["train/b", "test/b"] and len(both.files()) == 2
    with pytest.raises(ConfigError, match="path means 2 sets and test means 1"):
        Conversations(path=tmp_path / "train", test=tmp_path / "test" / "a.json").load()
    with pytest.raises(ConfigError, match="two sets are called 'train/b'"):
        Conversations(path=[tmp_path / "train" / "b.json"] * 2).load()


@pytest.mark.parametrize(
    ("record", "message", "problem"),
    [
        ({"id": 1}, "neither 'conversations' nor 'messages', only id", "record without a dialogue"),
        (dialogue(), "dialogue without turns", "dialogue without turns"),
        (dialogue("q"), "the turns are user: user and assistant must alternate", "dialogue whose turns do not alternate"),
        (dialogue("q", "a", "q"), "the turns are user, assistant, user", "dialogue whose turns do not alternate"),
        (dialogue("q", " "), "the answer in turn 1 is empty", "dialogue with an empty answer"),
        (dialogue("<image>q", "a"), "<image> stands in the dialogue 1 times and there are 0 pictures", "dialogue that lacks a picture"),
        ({"messages": [{"role": "user", "content": 5}]}, "a turn holds 5: text", "turn without text"),
        ({"messages": ["q"]}, "turn that is no object", "turn that is no object"),
        ({"conversations": [{"from": "dog", "value": "q"}]}, "a turn is by 'dog'", "turn of an unknown speaker"),
    ],
)
def test_a_broken_dialogue_names_its_row_or_is_left_out_and_counted(tmp_path, record, message, problem):
    path = written(tmp_path / "set.json", [dialogue("q", "a"), record])
    with pytest.raises(DataError, match=rf"set\.json, row 1: .*{message}"):
        Conversations(path=path).load()
    scenario = Instruction(data=Conversations(path=path, test=path, on_error="skip"))
    scenario.open(0)
    assert scenario.problems == {problem: 2}, "once in training and once in the test"


# The stream -----------------------------------------------------------------------------------------------------------------------


def opened(seed=0, **options):
    scenario = Instruction(**options)
    scenario.open(seed)
    return scenario


def scenes(**options):
    return DigitScenes(as_="dialogues", scenes=100, test_scenes=25, **options)


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_every_set_is_a_task_and_every_row_appears_once(validation):
    scenario = opened(data=scenes(), validation=validation)
    info, tasks = scenario.info, list(scenario)
    assert info.class_names == ("count", "sum", "largest", "present", "position") and (info.classes, info.tasks) == (5, 5)
    assert (info.target, info.metrics, info.licence) == ("text", ("verified",), "CC BY 4.0")
    seen = []
    for index, task in enumerate(tasks):
        parts = [task.train] + ([task.validation] if validation else [])
        assert [len(part) for part in parts] == ([15, 5] if validation else [20])
        for part in (*parts, scenario.test(task, tasks[-1])):
            batch = whole(part)
            assert set(batch.extra["skill"]) == {task.set} == {task.name} and set(batch.target.tolist()) == {index}
            assert torch.equal(batch.target, part.targets)
        seen += [number for part in parts for number in part.ids.tolist()]
        assert (task.classes, task.seen, task.labels) == ((index,), tuple(range(index + 1)), (index,))
        assert list(task.names.values()) == list(info.class_names[: index + 1])
    assert sorted(seen) == list(range(100))
    assert [len(scenario.test(task, task)) for task in tasks] == [5] * 5


def test_the_order_is_given_listed_or_the_seeds_and_a_restored_stream_goes_on():
    names = ["position", "sum", "count", "present", "largest"]
    assert [task.name for task in opened(data=scenes(), order=names)] == names
    one, other = (opened(seed=seed, data=scenes(), order="seed") for seed in (1, 2))
    assert [task.name for task in one] != [task.name for task in other] and sorted(other.info.class_names) == sorted(names)
    first = opened(seed=1, data=scenes(), order="seed", validation=0.2)
    tasks = [(task.name, task.train.ids.tolist()) for task in first]
    again = opened(seed=1, data=scenes(), order="seed", validation=0.2)
    again.restore({"position": 3})
    assert [(task.name, task.train.ids.tolist()) for task in again] == tasks[3:] and len(again.past()) == 5


def test_another_grouping_makes_other_tasks():
    scenario = opened(data=scenes(domains=["plain", "inverted"]), by="domain")
    assert scenario.info.class_names == ("plain", "inverted")
    assert [set(whole(task.train).extra["skill"]) for task in scenario] == [{"count", "sum", "largest", "present", "position"}] * 2


def test_what_the_rows_say_is_what_the_metric_scores():
    scenario = opened(data=scenes())
    for task in scenario:
        batch = whole(scenario.test(task, task))
        count = Verified(Room(5))
        count.update(Answer(batch, texts=[f"<answer>{answer}</answer>" for answer in batch.extra["answer"]]))
        assert count.compute().value == 1
        count = Verified(Room(5))
        count.update(Answer(batch, texts=["-1"] * len(batch)))
        assert count.compute().value == 0


def test_sources_of_a_list_are_a_task_each_and_share_no_id(tmp_path):
    a, b = sets(tmp_path, a=[dialogue(f"a{n}", "1") for n in range(4)], b=[dialogue(f"b{n}", "1") for n in range(3)])
    sources = [Conversations(path=path, test=path) for path in (a, b)]
    scenario = opened(data=sources, names=["first", "second"])
    ids = []
    for task, name, count in zip(scenario, "ab", (4, 3), strict=True):
        assert rows(task.train) == [(f"{name}{n}", "1") for n in range(count)] == rows(scenario.test(task, task))
        ids += task.train.ids.tolist() + scenario.test(task, task).ids.tolist()
    assert len(set(ids)) == 14 and scenario.info.class_names == ("first", "second") and len(scenario.files()) == 4
    assert opened(data=sources).info.class_names == ("Conversations 1", "Conversations 2")


def test_an_online_stream_is_read_once():
    task = next(iter(opened(data=scenes(), online=True)))
    assert isinstance(task, Task) and len(list(task.train.batches(8))) == 3
    with pytest.raises(DataError, match="single-pass"):
        list(task.train.batches(8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": Digits()}, "questions with an answer in words and its verifier are needed, and this source has 'class' targets"),
        ({"data": DigitScenes(as_="captions", scenes=8, test_scenes=8)}, "this source has rows without verifier"),
        ({"data": scenes(), "by": "domains"}, "by names an unknown grouping 'domains': did you mean 'domain'"),
        ({"data": scenes(), "order": ["count", "sum"]}, "order lacks largest, present, position.*: it must list every set once"),
        ({"data": scenes(), "order": ["cont"]}, "order names an unknown set 'cont': did you mean 'count'"),
        ({"data": scenes(), "order": ["sum", "sum"]}, "order names set 'sum' twice: every set arrives once"),
        ({"data": [scenes(), scenes(size=40)]}, "image is image of 1 x 32 x 32 in DigitScenes 1 and image of 1 x 40 x 40 in DigitScenes 2"),
        ({"data": [scenes(), Digits()]}, "instruction: Digits: questions with an answer in words"),
        ({"data": []}, "data lists no source"),
        ({"data": [scenes()], "by": "domain"}, "by divides one source"),
        ({"data": scenes(), "names": ["a"]}, "names gives each source of the list data a name of its own"),
        ({"data": [scenes(), scenes()], "names": ["a", "a"]}, "no two alike"),
    ],
)
def test_what_cannot_be_a_stream_of_instructions_is_told_before_anything_is_trained(options, message):
    with pytest.raises(ConfigError, match=message):
        opened(**options)


def test_a_source_without_a_test_set_and_a_set_without_a_training_row_are_refused(tmp_path):
    a, b = sets(tmp_path, a=[dialogue("a", "1")], b=[dialogue("a", "1", "b")])
    with pytest.raises(ConfigError, match="the source has no test set"):
        opened(data=Conversations(path=a))
    with pytest.raises(DataError, match="instruction: no training sample of b"):
        opened(data=Conversations(path=[a, b], test=[a, b], on_error="skip"))
