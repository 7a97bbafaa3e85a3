"""What a person sees of a test-time run: the lines while it goes on, the curves, and the page, all from recorded events."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from torch import nn

import streamcl
from streamcl.comparing import matrix_text
from streamcl.evaluation import DEFINITIONS, summarise
from streamcl.events import Event, Sink
from streamcl.report_page import Block, read_served, render
from streamcl.sinks.jsonl import Jsonl
from streamcl.sinks.progress import Progress
from streamcl.sinks.report import Report
from streamcl.sinks.tensorboard import Tensorboard

REASON = "drift: 12% of the decisions differ from the source's, and 4% may; version 3 is restored <\"&>"


def started(resumed: bool = False) -> Event:
    facts = {"name": "run", "directory": "run", "seed": 0, "device": "cpu", "precision": "float32", "tasks": 2, "parameters": 1000}
    return Event("run_started", {**facts, "resumed": resumed, "strategy": "tent", "scenario": "test_time"})


def task(index: int, name: str, samples: int = 600) -> Event:
    return Event("task_started", {"task": index, "name": name, "samples": samples, "classes": [], "seen": 10})


def served(index: int, samples: int, accuracy: float, frozen: float | None = 0.25, adapted: int | None = None, **more: Any) -> Event:
    counts = {"updates": samples // 64, "adapted": samples if adapted is None else adapted}
    told = {"entropy": 0.5, "version": samples // 64, "counts": counts, **more}
    return Event(
        "served",
        {"task": index, "name": f"segment {index + 1}", "samples": samples, "accuracy": accuracy, "accuracy_frozen": frozen, **told},
    )


def guard(samples: int, what: str = "restore", reason: str = REASON, **more: Any) -> Event:
    return Event("guard", {"batch": samples // 64 + 1, "samples": samples, "what": what, "reason": reason, **more})


def scored(index: int, accuracy: float) -> Event:
    row = [None] * index + [accuracy]
    return Event("scored", {"task": index, "part": "test", "row": row, "per_task": accuracy, "metric": "accuracy", "warning": None})


STREAM = [
    started(),
    task(0, "fog, severity 5"),
    guard(0, "statistics", "statistics of the batch: the deployed model is more certain without them", serves="frozen"),
    served(0, 256, 0.5, adapted=128),
    served(0, 512, 0.75, adapted=384),
    scored(0, 0.625),
    served(0, 600, 1.0, adapted=472),
    task(1, "contrast, severity 5"),
    guard(728, version=3),
    served(1, 856, 0.875, adapted=664, entropy=0.25),
    scored(1, 0.875),
]


def made_up_run(folder: Path, what: Sequence[Event], status: str = "done", deployed: bool = True, strategy: str = "tent") -> Path:
    folder.mkdir(parents=True)
    config = {"seed": 0, "scenario": {"name": "test_time", "data": {"name": "digits"}}, "strategy": {"name": strategy}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "status.json").write_text(json.dumps({"status": status}))
    seen = [event.fields["per_task"] for event in what if event.kind == "scored"]
    if status == "done":
        matrix = [[None] * i + [value] + [None] * (len(seen) - 1 - i) for i, value in enumerate(seen)]
        frozen = {"metric": "accuracy", **summarise([[0.25]], [0.25] * len(seen))}
        scores = {
            "metric": "accuracy",
            **summarise(matrix, seen),
            "heads": {"frozen": frozen} if deployed else {},
            "definitions": DEFINITIONS,
            "samples_seen": 856,
        }
        (folder / "scores.json").write_text(json.dumps(scores))
    play(Jsonl(), folder, what)
    return folder


def play(sink: Sink, folder: Path, what: Sequence[Event]) -> None:
    sink.open(folder)
    for event in what:
        sink.write(event)
    sink.close()


def figures(page: str) -> dict[str, ElementTree.Element]:
    """The drawings of a page by what they are called; each must be well-formed XML."""
    drawn = [
        ElementTree.fromstring(one.replace(' xmlns="http://www.w3.org/2000/svg"', "")) for one in re.findall(r"<svg.*?</svg>", page, re.S)
    ]
    return {one.get("aria-label", ""): one for one in drawn}


def curves(drawing: ElementTree.Element) -> list[str]:
    return [one.get("d", "") for one in drawing.findall("path")]


ACCURACY, ENTROPY, ADAPTED = (f"{what} over samples served" for what in ("Accuracy", "Entropy", "Samples adapted to"))


# -- what is read --------------------------------------------------------------------------------------------------------------


def test_events_become_blocks_segments_and_acts_of_the_guard(tmp_path: Path) -> None:
    found = read_served(made_up_run(tmp_path / "run", STREAM))
    assert found.blocks == [
        Block(0, 256, 0.5, 0.25, 0.5, 128),
        Block(256, 512, 0.75, 0.25, 0.5, 384),
        Block(512, 600, 1.0, 0.25, 0.5, 472),
        Block(600, 856, 0.875, 0.25, 0.25, 664),
    ]
    assert found.segments == [(0, "fog, severity 5", 0, 600), (1, "contrast, severity 5", 600, 856)]
    assert [act["what"] for act in found.guard] == ["statistics", "restore"]
    assert (found.samples, found.adapted) == (856, 664)
    assert [found.segment(sample) for sample in (0, 599, 600, 855, 856, None)] == [0, 0, 1, 1, None, None]


@pytest.mark.parametrize("again", [True, False], ids=["learned again", "served again"])
def test_a_segment_that_was_served_again_counts_once(again: bool, tmp_path: Path) -> None:
    torn = [*STREAM[:-1], guard(900), served(1, 1112, 0.1), guard(1120)]  # and killed, before the second segment was over
    begun = [task(1, "contrast, severity 5")] if again else []
    rest = [guard(664, version=2), served(1, 856, 0.9), scored(1, 0.9), served(1, 1000, 0.95)]
    found = read_served(made_up_run(tmp_path / "run", [*torn, started(resumed=True), *begun, *rest]))
    assert [(block.end, block.score) for block in found.blocks] == [(256, 0.5), (512, 0.75), (600, 1.0), (856, 0.9), (1000, 0.95)]
    assert [act["samples"] for act in found.guard] == [0, 664]
    assert found.segments[1] == (1, "contrast, severity 5", 600, 1000)


def test_a_process_that_was_stopped_before_it_served_changes_nothing(tmp_path: Path) -> None:
    once = read_served(made_up_run(tmp_path / "once", STREAM))
    twice = read_served(made_up_run(tmp_path / "twice", [*STREAM, started(resumed=True), guard(600)]))
    assert twice == once


def test_what_the_guard_did_last_is_kept_though_nothing_more_was_served(tmp_path: Path) -> None:
    found = read_served(made_up_run(tmp_path / "run", [*STREAM, guard(900)]))
    assert [act["samples"] for act in found.guard] == [0, 728, 900]
    assert "900" in render(tmp_path / "run")


# -- the page ------------------------------------------------------------------------------------------------------------------


def test_the_page_draws_what_was_served_over_time_against_the_deployed_model(tmp_path: Path) -> None:
    page = render(made_up_run(tmp_path / "run", STREAM))
    drawn = figures(page)
    assert {ACCURACY, ENTROPY, ADAPTED} <= drawn.keys()
    theirs, ours = curves(drawn[ACCURACY])  # its own line is drawn over the other
    assert ours.count("H") == theirs.count("H") == 4  # a step for each block
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", ours)]
    assert heights[0] > heights[1] > heights[3] > heights[2]  # upside down: 50, 75, 100 and 87.5 %
    assert len({y for y in re.findall(r"[ML][\d.]+ ([\d.]+)", theirs)}) == 1
    texts = [one.text for one in drawn[ACCURACY].iter("text")]
    assert {"tent", "as deployed", "fog", "contrast", "samples served"} <= set(texts)
    assert "(severity 5)" in page  # what all segments share is said once
    assert "<dt>As deployed</dt><dd>25.0 %</dd>" in page
    assert "2 segments" in page and "664 of them adapted to" in page
    assert "<th>fog, severity 5</th><td class=n>600</td><td class=n>62.5</td><td class=n>25.0</td><td class=n>37.5</td>" in page
    assert ">test set of task<" not in page  # each segment is served once: there is no matrix
    assert "<script" not in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_of_values_the_error_is_drawn_against_the_deployed_models_and_there_is_no_entropy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(samples: int, mae: float) -> Event:
        counts = {"updates": samples // 64, "adapted": samples}
        fields = {"task": 0, "name": "segment 1", "samples": samples, "mae": mae, "mae_frozen": 1.5, "version": samples // 64}
        return Event("served", {**fields, "counts": counts})

    end = Event("scored", {**scored(0, 1.0).fields, "metric": "mae"})
    stream = [started(), task(0, "fog, severity 5"), told(256, 1.5), told(512, 0.5), end]
    run = made_up_run(tmp_path / "run", stream, status="interrupted")
    assert read_served(run).metric == "mae" and read_served(run).blocks[1] == Block(256, 512, 0.5, 1.5, None, 512)
    page = render(run, [made_up_run(tmp_path / "other", STREAM)])
    drawn = figures(page)
    assert ENTROPY not in drawn and ACCURACY not in drawn and ADAPTED in drawn
    theirs, ours = curves(drawn["Mean absolute error over samples served"])  # a run of classes is not drawn beside
    (first, last), (level, _) = ([float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", one)] for one in (ours, theirs))
    assert first == level and last > first, "less is lower"
    texts = {one.text for one in drawn["Mean absolute error over samples served"].iter("text")}
    assert {"0", "0.5", "1.5"} <= texts and not any("%" in (text or "") for text in texts)
    assert "<b>Mean absolute error of what was served</b> (less is better)" in page
    play(Progress(plain_every=0), tmp_path, [started(), told(256, 1.5)])
    assert capsys.readouterr().out.splitlines()[-1].endswith("256 served, mae 1.5 (1.5 as deployed), version 4, 256 adapted to")


def test_a_step_ends_where_its_samples_end(tmp_path: Path) -> None:
    ours = figures(render(made_up_run(tmp_path / "run", STREAM)))[ACCURACY].findall("path")[-1].get("d", "")
    ends = [float(x) for x in re.findall(r"H([\d.]+)", ours)]
    first = float(re.match(r"M([\d.]+)", ours).group(1))  # type: ignore[union-attr]
    width = ends[-1] - first
    assert [round((x - first) / width * 856) for x in ends] == pytest.approx([256, 512, 600, 856], abs=1)


def test_each_act_of_the_guard_is_a_mark_with_its_reason_and_a_row(tmp_path: Path) -> None:
    page = render(made_up_run(tmp_path / "run", STREAM))
    titles = [one.text or "" for one in figures(page)[ACCURACY].iter("title")]
    assert f"after 728 samples, restore: {REASON}" in titles
    marks = {kind: len(figures(page)[ACCURACY].findall(f".//*[@class='{kind}']")) for kind in ("against", "other")}
    assert marks == {"against": 1, "other": 1}
    assert not figures(page)[ENTROPY].findall(".//*[@class='against']")
    assert '<td class="n">728</td><td>contrast</td><td>restore</td>' in page
    assert "&lt;&quot;&amp;&gt;" in page and '<"&>' not in page
    assert "<td>version\u00a03</td>" in page and "<td>as\u00a0deployed</td>" in page
    assert "1 × statistics, 1 × restore" in page


def test_of_many_acts_fifty_are_listed_and_marks_too_close_together_are_one(tmp_path: Path) -> None:
    many = [guard(i, "promoted", "the guard is content", version=i) for i in range(73)]
    page = render(made_up_run(tmp_path / "run", [*STREAM[:2], *many, *STREAM[3:]]))
    assert page.count("<td>promoted</td>") == 50
    assert "The first 50 are shown; 24 more are in events.jsonl." in page
    marks = figures(page)[ACCURACY].findall(".//circle")
    assert 1 < len(marks) < 73
    assert any(re.search(r"and \d+ more$", one.text or "") for one in figures(page)[ACCURACY].iter("title"))


def test_without_the_deployed_model_and_without_a_guard_the_page_says_so(tmp_path: Path) -> None:
    plain = [Event(e.kind, {**e.fields, "accuracy_frozen": None}) if e.kind == "served" else e for e in STREAM if e.kind != "guard"]
    page = render(made_up_run(tmp_path / "run", plain, deployed=False))
    assert "the deployed model was not run beside" in page
    assert len(curves(figures(page)[ACCURACY])) == 1
    assert "What the guard did" not in page and "triangles" not in page and "As deployed" not in page


def test_recorded_figures_that_are_no_numbers_leave_a_gap(tmp_path: Path) -> None:
    broken = [
        Event(e.kind, {**e.fields, "entropy": math.nan, "accuracy_frozen": math.nan if e.fields["samples"] == 512 else 0.25})
        if e.kind == "served"
        else e
        for e in STREAM
    ]
    drawn = figures(render(made_up_run(tmp_path / "run", broken)))
    assert ENTROPY not in drawn
    assert sorted(path.count("M") for path in curves(drawn[ACCURACY])) == [1, 2]


def test_a_long_stream_is_drawn_in_few_steps_and_their_means_are_the_streams(tmp_path: Path) -> None:
    per, names = 300, ["fog", "elastic_transform", "jpeg_compression", "gaussian_noise"] * 15
    long: list[Event] = [started()]
    for index, name in enumerate(names):
        long.append(task(index, f"{name}, severity 3, round {index // 4 + 1}"))
        long += [served(index, 256 * (per * index + i + 1), (i % 3) / 4) for i in range(per)]
        long.append(scored(index, 0.25))
    page = render(made_up_run(tmp_path / "run", long))
    drawn = figures(page)[ACCURACY]
    assert len(page) < 300_000
    assert max(path.count("H") for path in curves(drawn)) <= 300
    heights = {y for path in curves(drawn) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)}
    assert len(heights) == 1  # 25 % wherever one looks, as the deployed model's
    assert "a step for each 19 200 samples" in page
    assert {"1", "60"} & {one.text for one in drawn.iter("text")}  # too many to be named: numbered
    assert "<summary>Segments</summary>" in page


def test_another_run_is_drawn_beside(tmp_path: Path) -> None:
    first = made_up_run(tmp_path / "one", STREAM)
    second = made_up_run(tmp_path / "two", STREAM, strategy="eata")
    drawn = figures(render(first, [second]))[ACCURACY]
    assert len(curves(drawn)) == 3
    assert {"tent", "eata", "as deployed"} <= {one.text for one in drawn.iter("text")}


def test_acts_that_do_not_say_where_are_listed_and_not_drawn(tmp_path: Path) -> None:
    older = [Event(e.kind, {k: v for k, v in e.fields.items() if k != "samples"}) if e.kind == "guard" else e for e in STREAM]
    page = render(made_up_run(tmp_path / "run", older))
    assert '<td class="n">–</td><td>–</td><td>restore</td>' in page
    assert "triangles" not in page


def test_a_run_that_stopped_in_its_first_segment_has_a_page(tmp_path: Path) -> None:
    folder = made_up_run(tmp_path / "run", STREAM[:4], status="interrupted")
    play(Report(), folder, [Event("run_finished", {"status": "interrupted", "scores": None, "report": None})])
    page = (folder / "report.html").read_text()
    assert ACCURACY in figures(page)
    assert "Nothing was scored yet" in page and "not finished" in page


def test_a_run_that_only_learned_has_nothing_of_this(tmp_path: Path) -> None:
    page = render(made_up_run(tmp_path / "run", [e for e in STREAM if e.kind not in ("served", "guard")]))
    assert ">test set of task<" in page and "samples served" not in page


# -- while it goes on ----------------------------------------------------------------------------------------------------------


def test_progress_says_what_is_served_and_all_that_the_guard_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(plain_every=0), tmp_path, [*STREAM, guard(856, "promoted", "the guard is content", version=9)])
    lines = [re.sub(r", [\d.]+ s left", "", line) for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        "task 1/2: 600 samples of fog, severity 5",
        "guard after 0 samples, statistics of the batch: the deployed model is more certain without them",
        "task 1/2: 256 served, accuracy 50.0 % (25.0 % as deployed), entropy 0.5, version 4, 128 adapted to",
        "task 1/2: 512 served, accuracy 75.0 % (25.0 % as deployed), entropy 0.5, version 8, 384 adapted to",
        "task 1/2: accuracy  62.5 % on all seen,  62.5 % on this task",
        "task 1/2: 600 served, accuracy 100.0 % (25.0 % as deployed), entropy 0.5, version 9, 472 adapted to",
        "task 2/2: 600 samples of contrast, severity 5",
        f"guard after 728 samples, restore: {REASON}",
        "task 2/2: 856 served, accuracy 87.5 % (25.0 % as deployed), entropy 0.25, version 13, 664 adapted to",
        "task 2/2: accuracy  87.5 % on all seen,  87.5 % on this task",
        "guard after 856 samples, promoted: the guard is content, version 9",
    ]


def test_at_the_end_the_domains_are_listed_beside_the_deployed_model_and_there_is_no_matrix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {
        "metric": "accuracy",
        **summarise([[0.5], [None, 0.75], [None, None, 0.25]], [0.5, 0.75, 0.25]),
        "per_domain": {"fog": 0.375, "contrast": 0.75},
        "tasks": [{"name": name} for name in ("fog, round 1", "contrast, round 1", "fog, round 2")],
        "heads": {"frozen": {"per_task": [0.25, 0.5, 0.25], "per_domain": {"fog": 0.25, "contrast": 0.5}, "final": 0.3125}},
        "memory_bytes": 0,
        "seconds": {"total": 1.0},
    }
    done = Event("run_finished", {"status": "done", "scores": scores, "report": None})
    play(Progress(), tmp_path, [started(), done])
    out = capsys.readouterr().out.splitlines()[2:]
    table = [
        "accuracy in % in each domain, as it was served",
        "  domain    as served  as deployed  difference",
        "  fog            37.5         25.0        12.5",
        "  contrast       75.0         50.0        25.0",
    ]
    assert out == ["", *table, "", "final 25.0 % · as deployed 31.2 % · memory 0 B · 1.0 s"]
    assert matrix_text(scores).splitlines() == table
    bare = {**scores, "heads": None, "per_domain": None}
    assert matrix_text(bare).splitlines()[1:3] == ["  segment            as served", "  fog, round 1            50.0"]
    assert matrix_text({**bare, "tasks": None}).splitlines()[2:] == ["  1             50.0", "  2             75.0", "  3             25.0"]
    learned = {**scores, **summarise([[0.5], [0.25, 0.75]], [0.5, 0.5])}
    assert "after each task (down)" in matrix_text(learned)
    assert "after each task (down)" in matrix_text({**scores, **summarise([[0.5]], [0.5])})


def test_progress_of_a_long_stream_is_a_line_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(plain_every=1000), tmp_path, STREAM)
    out = capsys.readouterr().out
    assert out.count(" served, ") == 1
    assert out.count("guard after") == 2


def test_a_resumed_stream_without_the_deployed_model_is_told_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play(Progress(plain_every=0), tmp_path, [started(resumed=True), served(1, 856, 0.5, frozen=None)])
    assert capsys.readouterr().out.splitlines()[-1] == "task 2/2: 856 served, accuracy 50.0 %, entropy 0.5, version 13, 856 adapted to"


def test_tensorboard_holds_what_is_served_over_samples(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    play(Tensorboard(), tmp_path, [*STREAM, served(1, 1112, 0.5, frozen=None)])
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    points = {tag: [(point.step, round(point.value, 6)) for point in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert points["served/accuracy"] == [(256, 0.5), (512, 0.75), (600, 1.0), (856, 0.875), (1112, 0.5)]
    assert [step for step, _ in points["served/accuracy_frozen"]] == [256, 512, 600, 856]
    assert points["served/adapted"][0] == (256, 128)
    assert {"served/entropy", "served/version"} <= points.keys()
    told = read.Tensors("guard/text_summary")
    assert [one.step for one in told] == [0, 728]
    assert REASON in told[1].tensor_proto.string_val[0].decode()


def test_an_act_of_the_guard_says_after_how_many_samples_it_was() -> None:
    loop = streamcl.online(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), "tent", guard=False)
    loop(torch.randn(8, 3))
    loop.reset()
    assert loop.status()["events"][-1]["samples"] == 8
