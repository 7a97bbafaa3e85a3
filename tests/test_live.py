"""A live stream loses no record that it acknowledged, learns none twice, and cuts the same tasks whatever happens on the way."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from streamcl.scenarios._live.directory import Directory
from streamcl.scenarios._live.intake import Lines
from streamcl.scenarios._live.records import Line
from streamcl.scenarios.live import Live

from streamcl.data import whole
from streamcl.errors import ConfigError, DataError, Interrupted, RunError
from streamcl.seeding import derived
from streamcl.stream import Modality


def record(number, label="a", **more):
    return {"id": f"r{number}", "label": label, "features": [float(number), 0.5], **more}


def lines(*records):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def opened(folder, seed=0, **options):
    scenario = Live(**{"directory": folder / "in", "spool": folder / "spool", "idle": 0.05, **options})
    scenario.open(seed)
    return scenario


def inbox(folder, *records, name="a.jsonl"):
    (folder / "in").mkdir(exist_ok=True)
    (folder / "in" / name).write_text(lines(*records))
    return folder


def numbers(task):
    """Which records a task learns, by their first feature."""
    return whole(task.train).inputs["vector"][:, 0].long().tolist()


def fingerprint(task):
    batch = whole(task.train)
    columns = [value.numpy().tobytes() if isinstance(value, torch.Tensor) else value for value in batch.inputs.values()]
    return task.index, task.name, task.classes, task.seen, task.labels, dict(task.names), task.about, batch.target.tolist(), columns


# -- what is read ------------------------------------------------------------------------------------------------------------------


def test_records_are_cut_by_count_and_classes_are_numbered_as_they_arrive(tmp_path):
    labels = ["b", "a", "b", "c", "a", 7, "7"]
    scenario = opened(inbox(tmp_path, *(record(n, label) for n, label in enumerate(labels))), count=3)
    first, second, third = scenario
    assert [numbers(task) for task in (first, second, third)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [task.ended_by for task in (first, second, third)] == ["count", "count", "end"]
    assert third.names == {0: "b", 1: "a", 2: "c", 3: "7"}, "7 and '7' are one class"
    assert [task.classes for task in (first, second, third)] == [(0, 1), (2, 3), ()]
    assert first.train.targets.tolist() == [0, 1, 0] and second.train.targets.tolist() == [2, 1, 3] and third.labels == (3,)
    assert second.seen == (0, 1, 2, 3) and second.train.ids.tolist() == [3, 4, 5]
    assert scenario.info.modalities == {"vector": Modality("vector", (2,))} and scenario.info.classes is None


def png(colour, side=4):
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def wav(values, rate=8000):
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(np.asarray(values, dtype="<i2").tobytes())
    return file.getvalue()


def test_a_record_may_hold_several_modalities_and_name_its_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "red.png").write_bytes(png((255, 0, 0)))
    sound = base64.b64encode(wav([0, 16384])).decode()
    both = {"text": "red", "audio": sound}
    inbox(
        tmp_path,
        {"id": 1, "label": "x", "image": "red.png", **both},
        {"id": 2, "label": "x", "image": "data:image/png;base64," + base64.b64encode(png((0, 0, 255))).decode(), **both},
        {"id": 3, "label": "x", "image": "blue.png", **both},
    )
    scenario = opened(tmp_path, count=5)
    assert len(list(scenario)) == 1
    (tmp_path / "in" / "red.png").unlink()
    batch = whole(scenario.task(0).train)
    assert batch.inputs["image"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]] and batch.inputs["image"].dtype == torch.uint8
    assert batch.inputs["audio"].tolist() == [[0.0, 0.5], [0.0, 0.5]] and batch.inputs["text"] == ["red", "red"]
    shapes = {"image": Modality("image", (3, 4, 4), 255), "text": Modality("text"), "audio": Modality("audio", (2,))}
    assert scenario.info.modalities == shapes
    assert "neither a file that is there nor base64" in (tmp_path / "spool/quarantine.jsonl").read_text()


def test_images_in_class_folders_are_records_and_are_scaled_as_declared(tmp_path):
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "1.png").write_bytes(png(colour, side=9))
    (tmp_path / "in" / "red" / "2.png").write_bytes(b"no picture")
    (tmp_path / "in" / "red" / ".3.png").write_bytes(b"still being written")
    scenario = opened(tmp_path, count=5, fields={"image": 2})
    (task,) = scenario
    assert whole(task.train).inputs["image"][:, :, 1, 1].tolist() == [[0, 0, 255], [255, 0, 0]]
    assert task.names == {0: "blue", 1: "red"} and scenario.problems == {"record with unusable data": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "it is not JSON"),
        ("[1]", "a record is an object"),
        ('{"id": "x", "label": "a", "features": [NaN, 1]}', "NaN is no number of JSON"),
        ('{"id": "x", "label": "a", "features": [1e39, 1]}', "beyond what float32 can hold"),
        (f'{{"id": "x", "label": "a", "features": [1{"0" * 400}, 1]}}', "beyond what float32 can hold"),
        ('{"id": "x", "label": "a", "features": [true, 1]}', "a list of numbers is needed"),
        ('{"id": "x", "label": "a", "features": ["1", 1]}', "a list of numbers is needed"),
        ('{"id": "x", "label": "a", "features": [1, 2, 3]}', "it has 3 features, and the stream has 2 features"),
        ('{"id": "x", "label": "a", "text": "t"}', "it has text, and the stream has 2 features"),
        ('{"id": "x", "label": "a", "text": "\\ud800"}', "half of a character"),
        ('{"id": "x", "label": "a"}', "it holds none of features, text, image, audio"),
        ('{"id": "x", "features": [1, 2]}', "it has no label"),
        ('{"id": "", "label": "a", "features": [1, 2]}', "it has no id"),
        ('{"id": "x", "label": 1.5, "features": [1, 2]}', "1.5 is no label"),
        ('{"id": true, "label": "a", "features": [1, 2]}', "true is no id"),
        ('{"id": "x", "label": "a", "image": "' + base64.b64encode(b"no").decode() + '"}', "this is no image"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_record_is_put_aside_with_its_reason(tmp_path, line, reason):
    scenario = opened(inbox(tmp_path, record(0), line, record(1)), count=10)
    (task,) = scenario
    assert numbers(task) == [0, 1]
    (aside,) = map(json.loads, (tmp_path / "spool/quarantine.jsonl").read_text().splitlines())
    assert reason in aside["reason"] and aside["content"] == line and (aside["source"], aside["line"]) == ("a.jsonl", 2)
    assert sum(scenario.problems.values()) == sum(task.problems.values()) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=6).filter(lambda b: b"\n" not in b), max_size=12), st.lists(st.integers(1, 9), min_size=1), st.booleans()
)
def test_lines_are_cut_the_same_however_the_bytes_arrive(contents, sizes, ended):
    data = b"\n".join(contents) + b"\n" * (ended and bool(contents))
    cut, at, found = Lines("here", 4), 0, []
    while at < len(data):
        size = sizes[at % len(sizes)]
        found += cut.feed(data[at : at + size])
        at += size
    found += cut.end()
    expected = [(number, content) for number, content in enumerate(contents, 1) if content]
    assert [(f.number, f.content) if isinstance(f, Line) else (f.line.number, f.line.content) for f in found] == expected
    assert [not isinstance(f, Line) for f in found] == [len(content) > 4 for _, content in expected]
    for f in found:
        line = f if isinstance(f, Line) else f.line
        assert data[: line.end].rstrip(b"\n").endswith(line.content)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_interleaving_of_good_duplicate_and_malformed_lines_is_learned_once(tmp_path_factory, data):
    """Against a model of a few lines: the first line of each id counts, in the order of arrival; the rest is counted."""
    folder = tmp_path_factory.mktemp("live")
    (folder / "in").mkdir()
    kinds = st.one_of(st.tuples(st.just("good"), st.integers(0, 12)), st.just(("bad", 0)), st.just(("blank", 0)))
    written = data.draw(st.lists(kinds, min_size=1, max_size=40).filter(lambda found: any(kind == "good" for kind, _ in found)))
    count, holdout, seed = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 0.4])), data.draw(st.integers(0, 99))
    stops = data.draw(st.sets(st.integers(0, len(written)), max_size=3))
    ids, bad, again = [], 0, 0
    intake, scenario, file = None, None, folder / "in" / "a.jsonl"
    options = {"count": count, "holdout": holdout, "fields": {"features": 2}}
    for place, (kind, number) in enumerate(written):
        if intake is None or place in stops:  # the process ends here, and another one goes on with the same spool
            if scenario is not None:
                scenario._spool.release()
            scenario = opened(folder, seed, **options)
            intake = Directory(scenario._spool, scenario._reader, folder / "in", 100)
        text = {"good": json.dumps(record(number, "ab"[number % 2])), "bad": "{nothing", "blank": ""}[kind]
        with file.open("a") as stream:
            stream.write(text + "\n")
        bad += kind == "bad"
        again += kind == "good" and number in ids
        if kind == "good" and number not in ids:
            ids.append(number)
        if data.draw(st.booleans()):
            intake.look()
    intake.look()
    held = [n for n in ids if holdout and derived(seed, "holdout", f"r{n}") < holdout * 2**63]
    learned = [n for n in ids if n not in held]
    tasks = list(scenario)
    assert [number for task in tasks for number in numbers(task)] == learned
    assert [len(task.train) for task in tasks] == [len(learned[at : at + count]) for at in range(0, len(learned), count)]
    counted = {"line that is not a JSON object": bad, "known id, offered again": again}
    assert scenario.problems == {kind: count for kind, count in counted.items() if count}
    assert len((folder / "spool/quarantine.jsonl").read_text().splitlines() if bad else []) == bad
    order = list(dict.fromkeys("ab"[n % 2] for n in learned))
    tested = []
    for task in tasks:
        assert [task.names[t] for t in task.train.targets.tolist()] == ["ab"[n % 2] for n in numbers(task)]
        assert list(task.names.values()) == order[: len(task.seen)]
        test = scenario.test(task, tasks[-1])
        if test is not None:
            batch = whole(test)
            tested += batch.inputs["vector"][:, 0].long().tolist()
            assert [order[t] for t in batch.target.tolist()] == ["ab"[int(n) % 2] for n in batch.inputs["vector"][:, 0]]
            assert torch.equal(batch.target, test.targets)
    last = tasks[-1].train.ids[-1].item() if tasks else -1
    closing = [n for place, n in enumerate(ids) if tasks and place < scenario._spool.cuts[-1].stop and n in held and "ab"[n % 2] in order]
    assert tested == closing and last < len(ids)
    again = opened(folder, seed, **options)
    again.restore({"position": len(tasks), "spool": scenario.state()["spool"]})
    assert [fingerprint(task) for task in again.past()] == [fingerprint(task) for task in tasks]
    again._spool.release()


def test_a_line_that_is_still_being_written_is_waited_for(tmp_path):
    scenario = opened(inbox(tmp_path, record(0)), count=10, fields={"features": 2})
    intake = Directory(scenario._spool, scenario._reader, tmp_path / "in", 1000)
    with (tmp_path / "in/a.jsonl").open("a") as file:
        half = json.dumps(record(1))
        file.write(half[:20])
        file.flush()
        intake.look()
        assert scenario._spool.count == 1 and not scenario._spool.problems
        file.write(half[20:])  # whole, though its line has not ended
        file.flush()
        intake.look()
        assert scenario._spool.count == 2
        file.write("\n" + "{wrong\n")
        file.flush()
        intake.look()
    assert scenario._spool.problems == {"line that is not a JSON object": 1}
    assert json.loads((tmp_path / "spool/quarantine.jsonl").read_text())["line"] == 3
    (tmp_path / "in/b.jsonl").write_text(json.dumps(record(2))[:20])
    intake.look(last=True)
    assert scenario._spool.problems["line that is not a JSON object"] == 2


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    scenario = opened(inbox(tmp_path, record(0), record(1)), count=10, fields={"features": 2})
    intake = Directory(scenario._spool, scenario._reader, tmp_path / "in", 1000)
    intake.look()
    (tmp_path / "in/.new").write_text(lines(record(1), record(2), record(3)))
    (tmp_path / "in/.new").replace(tmp_path / "in/a.jsonl")
    intake.look()
    assert scenario._spool.count == 4 and scenario._spool.problems == {"known id, offered again": 1}


OTHER = [{"label": "b"}, {"features": [9.0, 0.5]}, {"load": 2}]


@pytest.mark.parametrize("other", OTHER)
def test_a_known_id_with_other_content_is_put_aside_and_the_same_again_is_counted(tmp_path, other):
    same = record(0, load=1)
    inbox(tmp_path, same, same, {**same, **other}, record(1, load=1), same)
    scenario, told = opened(tmp_path, count=5, change="page_hinkley", watch="load"), []
    scenario.tell = told.append
    (task,) = scenario
    expected = {"known id, offered again": 2, "known id with other content": 1}
    assert numbers(task) == [0, 1] and scenario.problems == task.problems == expected
    (aside,) = map(json.loads, (tmp_path / "spool/quarantine.jsonl").read_text().splitlines())
    what = {"load": "watched number"}.get(*other, *other)
    assert f"the id 'r0' is known with other content ({what})" in aside["reason"] and json.loads(aside["content"]) == {**same, **other}
    assert [message for message in told if "offered again" in message] == ["live: passed over: 2 x known id, offered again"]
    assert sum("1 x known id with other content" in message for message in told) == 1
    again = opened(tmp_path, count=5, change="page_hinkley", watch="load")
    assert again.problems == expected and len((tmp_path / "spool/quarantine.jsonl").read_text().splitlines()) == 1
    again._spool.release()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_picture_that_was_replaced_is_put_aside_and_one_that_was_only_touched_is_counted(tmp_path, in_place):
    (tmp_path / "in/red").mkdir(parents=True)
    files = [tmp_path / f"in/red/{n}.bmp" for n in range(3)]
    for file in files:
        Image.new("RGB", (4, 4), (255, 0, 0)).save(file, "BMP")
    scenario = opened(tmp_path, count=5, fields={"image": 4})
    intake = Directory(scenario._spool, scenario._reader, tmp_path / "in", 1000)
    intake.look(last=True)
    assert scenario._spool.count == 3 and not scenario._spool.problems
    old = files[0].stat()
    changed = files[0] if in_place else tmp_path / "in/red/.new"
    Image.new("RGB", (4, 4), (0, 255, 0)).save(changed, "BMP")
    changed.replace(files[0])
    assert files[0].stat().st_size == old.st_size, "neither its size nor, where it is written in place, its inode tells"
    for file in files[:2]:
        os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns + 10**9))
    intake.look(last=True)
    intake.look(last=True)
    assert scenario._spool.problems == {"known id with other content": 1, "known id, offered again": 1}
    assert "(image)" in json.loads((tmp_path / "spool/quarantine.jsonl").read_text())["reason"]
    (task,) = scenario
    assert whole(task.train).inputs["image"][:, 0, 0, 0].tolist() == [255] * 3, "the first counts"


# -- where tasks end ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "watch", "detector"),
    [("adwin", "features", {}), ("kswin", "load", {"alpha": 0.0001}), ("page_hinkley", "load", {"threshold": 5.0, "min_instances": 30})],
)
def test_a_planted_change_ends_the_task(tmp_path, change, watch, detector):
    draw = np.random.RandomState(0)
    level = [0.0] * 400 + [5.0] * 300
    records = [
        {"id": n, "label": "a", "features": [mean + draw.randn() * 0.1], "load": mean + draw.randn() * 0.1} for n, mean in enumerate(level)
    ]
    scenario = opened(inbox(tmp_path, *records), change=change, watch=watch, detector=detector)
    first, second = scenario
    # ADWIN looks at every 32nd value, Kolmogorov-Smirnov at the last 30: none can see the change before it, nor needs 64 values of it.
    assert 400 <= len(first.train) <= 464 and len(second.train) == 700 - len(first.train)
    assert (first.ended_by, second.ended_by) == ("change", "end")
    assert second.train.ids[0] == first.train.ids[-1] + 1


def test_other_labels_change_the_entropy(tmp_path):
    labels = ["a"] * 300 + ["b", "c"] * 150
    scenario = opened(inbox(tmp_path, *(record(n, label) for n, label in enumerate(labels))), change="adwin", watch="label_entropy")
    first, *_ = scenario
    assert first.ended_by == "change" and 300 < len(first.train) <= 400


def test_a_change_that_never_comes_ends_the_task_when_the_queue_is_full(tmp_path):
    scenario = opened(inbox(tmp_path, *(record(0, id=n) for n in range(120))), change="adwin", queue=50)
    tasks = list(scenario)
    assert {task.ended_by for task in tasks[:-1]} == {"queue"} and sum(len(task.train) for task in tasks) == 120


def test_a_task_ends_after_so_many_seconds(tmp_path):
    scenario = opened(inbox(tmp_path, record(0)), seconds=0.2, idle=1.0)
    stream = iter(scenario)
    begun = time.monotonic()
    first = next(stream)
    assert first.ended_by == "time" and time.monotonic() - begun < 10
    inbox(tmp_path, record(1), record(2), name="b.jsonl")
    second = next(stream)
    assert numbers(second) == [1, 2] and second.ended_by == "time"
    assert next(stream, None) is None


def test_what_arrived_later_than_the_time_belongs_to_the_next_task(tmp_path, monkeypatch):
    """Also when nobody looked in between: the times of arrival count, not the time of looking."""
    scenario = opened(tmp_path, seconds=10, fields={"features": 2})
    for second in (100, 105, 109, 110, 111, 125):
        monkeypatch.setattr("time.time", lambda second=second: float(second))
        line = Line("here", 1, json.dumps(record(second)).encode())
        scenario._spool.take(scenario._reader.lines([line], None))
    cuts = [scenario._cutter.look(130.0) for _ in range(3)]
    assert [(cut.start, cut.stop, cut.reason) for cut in cuts[:2]] == [(0, 3, "time"), (3, 5, "time")] and cuts[2] is None
    assert scenario._cutter.look(135.0).stop == 6
    scenario._spool.release()


def test_an_end_record_ends_the_stream_and_stays_the_end(tmp_path):
    scenario = opened(inbox(tmp_path, record(0), record(1), {"end": True}, record(2)), count=5, idle=60.0)
    assert [numbers(task) for task in scenario] == [[0, 1]]
    again = opened(tmp_path, count=5, idle=60.0)
    assert [numbers(task) for task in again] == [[0, 1]]


def test_the_stream_ends_after_so_many_tasks_and_keeps_the_rest(tmp_path):
    scenario, told = opened(inbox(tmp_path, *(record(n) for n in range(10))), count=3, tasks=2), []
    scenario.tell = told.append
    assert [numbers(task) for task in scenario] == [[0, 1, 2], [3, 4, 5]]
    assert any("4 records were taken in and not learned" in message for message in told)


def test_validation_and_a_test_file_keep_to_the_classes_of_their_task(tmp_path):
    inbox(tmp_path, *(record(n, "ab"[n >= 10]) for n in range(20)))
    (tmp_path / "test.jsonl").write_text(lines(record(90, "b"), record(91, "a"), record(92, "never")))
    scenario = opened(tmp_path, count=10, test=tmp_path / "test.jsonl", validation=0.2)
    first, second = scenario
    assert (len(first.train), len(first.validation)) == (8, 2) and sorted(numbers(first) + whole(first.validation).ids.tolist()) == [
        *range(10)
    ]
    tests = [whole(scenario.test(task, second)) for task in (first, second)]
    assert [(b.inputs["vector"][:, 0].tolist(), b.target.tolist()) for b in tests] == [([91.0], [0]), ([90.0], [1])]
    assert max(int(b.ids.max()) for b in tests) < 0 and scenario.files() == [str(tmp_path / "test.jsonl")]


def test_a_held_out_class_is_scored_once_it_was_learned(tmp_path):
    held = [n for n in range(200) if derived(0, "holdout", f"r{n}") < 0.5 * 2**63]
    kept = [n for n in range(200) if n not in held]
    inbox(tmp_path, record(kept[0], "a"), record(held[0], "b"), record(kept[1], "a"), record(kept[2], "b"))
    scenario = opened(tmp_path, count=2, holdout=0.5)
    first, second = scenario
    assert scenario.test(first, first) is None and first.seen == (0,)
    assert scenario.test(first, second).targets.tolist() == [1] and second.classes == (1,)


# -- HTTP --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pushed(tmp_path):
    scenario = Live(port=0, count=3, queue=5, body=500, fields={"features": 2}, spool=tmp_path / "spool", idle=60.0)
    scenario.open(0)
    scenario._start()
    yield scenario, json.loads((tmp_path / "spool/http.json").read_text())
    scenario._end()


def push(address, body, token=None, method="POST", path="/records", **headers):
    host = re.fullmatch(r"http://([\d.]+:\d+)/records", address["url"])[1]
    connection = http.client.HTTPConnection(host, timeout=10)
    bearer = {} if token == "" else {"Authorization": f"Bearer {token or address['token']}"}
    connection.request(method, path, body.encode() if isinstance(body, str) else body, {**bearer, **headers})
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer, content


def test_what_is_pushed_is_on_disk_when_it_is_acknowledged(pushed, tmp_path):
    _, address = pushed
    answer, content = push(address, lines(record(0), "{broken", record(0), record(1)))
    assert answer.status == 200 and content["accepted"] == 2 and content["duplicates"] == 1
    assert content["quarantined"] == 1 and content["problems"][0]["line"] == 2
    assert json.loads((tmp_path / "spool/quarantine.jsonl").read_text())["content"] == "{broken"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (tmp_path / "spool").iterdir():  # what another process would find after a kill
        (copy / file.name).write_bytes(file.read_bytes())
    other = Live(port=0, count=3, queue=5, body=500, fields={"features": 2}, spool=copy)
    other.open(0)
    assert other._spool.count == 2 and other.problems == {"line that is not a JSON object": 1, "known id, offered again": 1}
    other._end()
    changed, content = push(address, lines(record(1), {**record(1), "features": [7, 7]}))
    assert changed.status == 200 and (content["accepted"], content["duplicates"], content["quarantined"]) == (0, 1, 1)
    assert "other content (features)" in content["problems"][0]["reason"]
    assert stat.S_IMODE((tmp_path / "spool/http.json").stat().st_mode) == 0o600
    assert push(address, "", method="GET", path="/status")[1]["unlearned"] == 2


def test_pushes_that_cannot_be_taken_are_refused_with_the_reason(pushed):
    scenario, address = pushed
    wrong, _ = push(address, lines(record(0)), token="guessed")
    missing, _ = push(address, lines(record(0)), token="")
    large, content = push(address, "x" * 501)
    larger, _ = push(address, "x" * 400_000)
    asked, _ = push(address, "x" * 501, Expect="100-continue")
    elsewhere, _ = push(address, lines(record(0)), path="/other")
    packed, _ = push(address, lines(record(0)), **{"Content-Encoding": "gzip"})
    nothing, malformed = push(address, "{broken")
    assert [a.status for a in (wrong, missing, large, larger, asked, elsewhere, packed, nothing)] == [
        401,
        401,
        413,
        413,
        413,
        404,
        415,
        422,
    ]
    assert wrong.headers["WWW-Authenticate"] == "Bearer" and "500 bytes" in content["error"] and malformed["quarantined"] == 1
    host = re.fullmatch(r"http://([\d.]+:\d+)/records", address["url"])[1]
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request("POST", "/records", iter([b"{}\n"]), {"Authorization": f"Bearer {address['token']}"})  # chunked, of no known length
    assert connection.getresponse().status == 411
    connection.close()
    assert scenario._spool.count == 0 and scenario._spool.problems.total() == 1


def test_a_path_that_comes_over_http_is_not_read(tmp_path):
    (tmp_path / "secret.png").write_bytes(png((1, 2, 3)))
    scenario = Live(port=0, count=3, fields={"image": 4}, spool=tmp_path / "spool")
    scenario.open(0)
    scenario._start()
    address = json.loads((tmp_path / "spool/http.json").read_text())
    answer, content = push(address, lines({"id": 1, "label": "a", "image": str(tmp_path / "secret.png")}))
    assert answer.status == 422 and "a path is not read over HTTP" in content["problems"][0]["reason"]
    scenario._end()


def test_a_full_queue_holds_senders_back_until_a_task_was_learned(pushed):
    scenario, address = pushed
    assert push(address, lines(*(record(n) for n in range(5))))[0].status == 200
    refused, content = push(address, lines(record(5)))
    assert refused.status == 429 and int(refused.headers["Retry-After"]) > 0 and "queue" in content["error"]
    stream = iter(scenario)
    assert numbers(next(stream)) == [0, 1, 2]
    assert push(address, lines(record(5)))[0].status == 429, "the task at hand is not learned yet"
    asking = threading.Thread(target=lambda: tasks.append(next(stream)))
    tasks = []
    asking.start()
    until = time.monotonic() + 10
    while push(address, lines(record(5)))[0].status != 200 and time.monotonic() < until:
        time.sleep(0.01)
    asking.join(10)
    assert numbers(tasks[0]) == [3, 4, 5]


def test_the_token_may_be_chosen_and_a_stream_that_ended_takes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMCL_TOKEN", "chosen")
    scenario = Live(port=0, count=3, fields={"features": 2}, spool=tmp_path / "spool")
    scenario.open(0)
    scenario._start()
    written = (tmp_path / "spool/http.json").read_text()
    address = json.loads(written)
    assert "chosen" not in written
    assert push(address, lines(record(0)), token="chosen")[0].status == 200
    assert push(address, lines({"end": True}), token="chosen")[0].status == 200
    assert push(address, lines(record(1)), token="chosen")[0].status == 410
    assert [numbers(task) for task in scenario] == [[0]]


def test_a_port_that_is_taken_is_told(pushed, tmp_path):
    port = int(re.search(r":(\d+)/", pushed[1]["url"])[1])
    with pytest.raises(ConfigError, match=rf"cannot listen at 127\.0\.0\.1:{port}"):
        Live(port=port, count=1, spool=tmp_path / "other").open(0)
    assert not (tmp_path / "other").exists()


# -- stopping and going on ---------------------------------------------------------------------------------------------------------


def test_a_stream_that_waits_stops_when_it_is_asked_to(tmp_path):
    scenario = opened(inbox(tmp_path, record(0)), count=5, idle=60.0)
    asked = threading.Event()
    scenario.interrupted = asked.is_set
    threading.Timer(0.3, asked.set).start()
    with pytest.raises(Interrupted):
        next(iter(scenario))
    opened(tmp_path, count=5)._spool.release()  # nobody holds the spool any more


def test_a_spool_has_one_owner_and_is_not_read_in_another_way(tmp_path):
    scenario = opened(inbox(tmp_path, record(0)), count=5)
    with pytest.raises(RunError, match="in use by another process"):
        opened(tmp_path, count=5)
    list(scenario)
    with pytest.raises(ConfigError, match="fields is"):
        opened(tmp_path, count=5, fields={"features": 2})
    other = opened(tmp_path, count=5)
    with pytest.raises(DataError, match="is not the one that this run has learned from"):
        other.restore({"position": 1, "spool": "another"})


def test_a_damaged_spool_is_told(tmp_path):
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool/spool.db").write_bytes(b"not a database, and longer than one would think" * 100)
    with pytest.raises(DataError, match="cannot be read as the spool"):
        opened(inbox(tmp_path, record(0)), count=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1}, "nothing says where records come from"),
        ({"stdin": True}, "nothing says when a task ends"),
        ({"stdin": True, "count": 9, "queue": 5}, "only 5 records may wait"),
        ({"stdin": True, "count": 9, "detector": {"delta": 1}}, "none is named"),
        ({"stdin": True, "count": 9, "holdout": 1.0}, "leaves nothing to learn from"),
        ({"stdin": True, "count": 9, "holdout": 0.1, "test": Path("x")}, "not both"),
        ({"stdin": True, "count": 9, "fields": {}}, "declares nothing"),
        ({"stdin": True, "count": 9, "fields": {"image": [3, 4, 4]}}, "what can be declared is"),
        ({"stdin": True, "change": "adwin", "fields": {"text": True}}, "watch: features needs numbers"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Live(**options)


def test_what_can_only_be_seen_when_it_opens_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    for options, message in (
        ({"change": "adwin", "detector": {"width": 1}}, "adwin takes no width; it takes delta"),
        ({"count": 1, "directory": tmp_path / "none"}, "is no folder"),
        ({"count": 1, "wait": 0.2}, "no good record came within 0.2 s"),
        ({"count": 1, "test": tmp_path / "none", "fields": {"features": 2}}, "cannot be read"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            opened(inbox(tmp_path), **options)
        assert not (tmp_path / "spool").exists()
    inbox(tmp_path, record(0))
    (tmp_path / "test.jsonl").write_text(lines(record(1), {"id": 2, "label": "a", "features": [1]}))
    with pytest.raises(DataError, match="line 2: it has 1 features, and the stream has 2 features"):
        opened(tmp_path, count=1, test=tmp_path / "test.jsonl")
    monkeypatch.setitem(sys.modules, "river", None)
    with pytest.raises(ConfigError, match=r'pip install "streamcl\[live\]"'):
        opened(tmp_path, change="adwin")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start one"):
        opened(tmp_path, count=1)


# -- whole runs, killed ------------------------------------------------------------------------------------------------------------

TOTAL, TASK, EPOCHS = 400, 100, 2
# One process imports everything once, and forks for each command: a run begins in a moment and can be killed many times. Taking in
# and learning are slowed down as asked, so that a kill falls within them; what is done stays the same.
FORKING = """
import os, sys, time
import streamcl.running, streamcl.sinks.jsonl, streamcl.memory.faiss, streamcl.strategies.class_incremental.er, streamcl.metrics.classes
from streamcl.cli import main
from streamcl.engine import Engine
from streamcl.scenarios._live import intake, spool
take, set_limits = spool.Spool.take, Engine._set_limits
slow = {}
def slow_take(self, parsed, place=None):
    time.sleep(slow["intake"])
    return take(self, parsed, place)
def slow_step(self):
    set_limits(self)
    self.context.step_limit = 0
    time.sleep(slow["step"])
spool.Spool.take, Engine._set_limits, intake.LINES = slow_take, slow_step, 20
for line in sys.stdin:
    intake, step, source, output, *arguments = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    slow.update(intake=float(intake), step=float(step))
    sys.argv = ["streamcl", *arguments]
    written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for one, other in ((os.open(source, os.O_RDONLY), 0), (written, 1), (written, 2)):
        os.dup2(one, other)
    try:
        main()
    except SystemExit as ending:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code or 0)
    os._exit(99)
"""


class Commands:
    """Runs `streamcl` in processes that start at once and can be killed."""

    def __init__(self, folder):
        self.output = folder / "output.txt"
        self.server = subprocess.Popen([sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, *arguments, intake=0.0, step=0.0, source=os.devnull):
        print(intake, step, source, self.output, *arguments, sep="\t", file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def end(self):
        """The exit code of what was started."""
        return int(self.server.stdout.readline())

    def kill(self, process):
        os.kill(process, signal.SIGKILL)
        assert self.end() == -signal.SIGKILL, self.output.read_text()

    def run(self, *arguments, **options):
        self.start(*arguments, **options)
        assert self.end() == 0, self.output.read_text()

    def close(self):
        self.server.stdin.close()
        self.server.wait(30)


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    server = Commands(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


def config(folder, **scenario):
    stream = {"name": "live", "count": TASK, "test": str(folder / "test.jsonl"), **scenario}
    (folder / "test.jsonl").write_text(lines(*(record(n, "ab"[n % 2]) for n in range(10))))
    content = {
        "scenario": stream,
        "strategy": {"name": "er", "epochs": EPOCHS, "batch": 20},
        "model": {"backbone": {"name": "mlp", "hidden": [8]}},
        "engine": {"device": "cpu", "threads": 1, "checkpoint": {"every": {"steps": 3}}},
        "log": ["jsonl"],
    }
    (folder / "live.yaml").write_text(yaml.safe_dump(content))
    return folder / "live.yaml"


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def status(run):
    return json.loads((run / "status.json").read_text())


def scores(run):
    return {key: value for key, value in json.loads((run / "scores.json").read_text()).items() if key != "seconds"}


def learned_ids(run):
    """The records of every task, as the spool of a run that is over holds them."""
    scenario = Live(directory=run, count=TASK, spool=run / "stream")
    scenario.open(0)
    tasks = [numbers(scenario.task(index)) for index in range(len(scenario._spool.cuts))]
    scenario._spool.release()
    return tasks


def test_a_run_that_is_killed_again_and_again_learns_every_record_once_and_ends_with_the_same_scores(tmp_path, commands):
    inbox(tmp_path, *(record(n, "ab"[n % 2]) if n != 50 else "{broken" for n in range(TOTAL // 2)))
    run, settings = tmp_path / "run", config(tmp_path, directory=str(tmp_path / "in"), idle=0.5)
    process = commands.start("run", settings, "--out", run, intake=0.05)
    wait_for(lambda: (log := run / "stream/spool.db-wal").is_file() and log.stat().st_size > 60_000)
    commands.kill(process)
    assert not list((run / "checkpoints").glob("0*")), "it was killed while it took in"

    inbox(tmp_path, *(record(n, "ab"[n % 2]) for n in range(TOTAL // 2 - 20, TOTAL)), name="b.jsonl")
    process = commands.start("resume", run, step=0.03)
    wait_for(lambda: status(run)["cursor"]["step"] > 8)
    commands.kill(process)
    assert list((run / "checkpoints").glob("0*")), "it was killed while it learned"

    chance = random.Random(0)
    for _ in range(6):
        process = commands.start("resume", run, intake=0.02, step=0.01)
        time.sleep(chance.uniform(0, 0.8))
        if status(run)["status"] == "done":
            assert commands.end() == 0
            break
        os.kill(process, signal.SIGKILL)
        assert commands.end() in (0, -signal.SIGKILL)
    commands.run("resume", run)

    tasks = learned_ids(run)
    ids = [n for n in range(TOTAL) if n != 50]
    assert [number for task in tasks for number in task] == ids and [len(task) for task in tasks] == [100, 100, 100, 99]
    assert scores(run)["samples_seen"] == len(ids) * EPOCHS
    assert len((run / "stream/quarantine.jsonl").read_text().splitlines()) == 1
    commands.run("run", settings, "--out", tmp_path / "whole")
    assert scores(run) == scores(tmp_path / "whole")


def test_a_run_in_which_nothing_is_scored_still_has_its_report(tmp_path, commands):
    inbox(tmp_path, *(record(n, "ab"[n % 2]) for n in range(150)))
    settings, run = config(tmp_path, directory=str(tmp_path / "in"), idle=0.2, test=None), tmp_path / "run"
    settings.write_text(settings.read_text().replace("- jsonl", "- progress\n- report"))
    commands.run("run", settings, "--out", run)
    assert "Nothing was scored: the stream gave no test samples" in (run / "report.html").read_text()
    printed = commands.output.read_text()
    assert "warning" not in printed and "nothing was scored" in printed and f"report  {run / 'report.html'}" in printed


def test_a_run_that_waits_for_standard_input_is_interrupted_and_goes_on(tmp_path, commands):
    settings, run, source = config(tmp_path, stdin=True), tmp_path / "run", tmp_path / "source"
    os.mkfifo(source)
    process = commands.start("run", settings, "--out", run, source=source)
    with source.open("w") as sender:
        sender.write(lines(*(record(n, "ab"[n % 2]) for n in range(150))))
        sender.flush()
        wait_for(lambda: (log := run / "events.jsonl").is_file() and '"task_finished"' in log.read_text())
        time.sleep(0.3)  # by now it waits
        os.kill(process, signal.SIGINT)
        assert commands.end() == 130 and "interrupted" in commands.output.read_text()
    assert status(run)["status"] == "interrupted"
    (tmp_path / "again").write_text(lines(*(record(n, "ab"[n % 2]) for n in range(120, 220))))
    commands.run("resume", run, source=tmp_path / "again")
    assert [len(task) for task in learned_ids(run)] == [100, 100, 20]
    assert scores(run)["samples_seen"] == 220 * EPOCHS
