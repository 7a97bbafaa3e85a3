"""Pictures of streams: what is drawn of each task and sample, the same bytes every time, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PolyCollection
from matplotlib.text import Text
from PIL import Image

from streamcl import contact_sheet, picturing
from streamcl.cli import main
from streamcl.contact_sheet import Group, evenly, is_waveform, pixels, spectrogram, stretches, value_range
from streamcl.data import ArrayDataset, SinglePass, Subset, Unlabelled
from streamcl.errors import ConfigError, DataError
from streamcl.seeding import generator
from streamcl.stream import Batch, Modality, Scenario, StreamInfo, Task

Answer = tuple[int, str, str]  # exit code, standard output, standard error
DIGITS = {"scenario": {"name": "class_incremental", "data": "digits", "tasks": 5}}


@pytest.fixture
def streamcl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["streamcl", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text of the figures that are drawn, from the top to the bottom."""
    found: list[str] = []

    def written(figure, path, dpi, **how):
        texts = sorted(figure.axes[0].findobj(Text), key=lambda text: (round(text.get_position()[1], 3), text.get_position()[0]))
        found.extend(text.get_text() for text in texts if text.get_text())

    monkeypatch.setattr(picturing, "write", written)
    return found


def write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def drawn(monkeypatch: pytest.MonkeyPatch, scenario: Scenario, folder: Path, **options) -> str:
    """The picture of a scenario that is there already."""

    class Spec:
        name = "mine"

        def build(self):
            return scenario

    monkeypatch.setattr(picturing, "stream_of", lambda name: (Spec(), 0))
    return picturing.picture("mine.yaml", folder / "out.png", **options)


class Given(Scenario):
    """A stream of the data sets that it is given."""

    def __init__(self, info, train, test=None, **task):
        super().__init__()
        self.info, self.train, self.tests, self.words = info, train, test, task

    def open(self, seed):
        return self.info

    def task(self, index):
        return Task(index, **{"name": f"part {index}", "train": self.train[index], "classes": (), "seen": (), **self.words})

    def __len__(self):
        return len(self.train)

    def test(self, task, after):
        return self.tests


# -- the command ------------------------------------------------------------------------------------------------------------------


def test_a_stream_is_drawn_although_its_strategy_is_not_there_yet(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    write(tmp_path / "config.yaml", {**DIGITS, "strategy": "not_written_yet", "model": {"backbone": "nor_this"}, "seed": 3})
    code, out, err = streamcl("show", "config.yaml", "--picture", "out.png")
    assert (code, out, err) == (0, "picture: out.png (5 of 5 tasks)\n", "")
    with Image.open(tmp_path / "out.png") as image:
        assert image.width == 1400 and len(set(image.convert("L").getdata())) > 16
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "out.png"}


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    config = write(tmp_path / "config.yaml", DIGITS)
    first, again, other = (tmp_path / f"{name}.{ending}" for name in ("first", "again", "other"))
    picturing.picture(str(config), first, 2)
    torch.rand(3)  # what else was drawn from the global generators does not matter
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    picturing.picture(str(config), again, 2)
    assert first.read_bytes() == again.read_bytes()
    write(config, {**DIGITS, "seed": 1})
    picturing.picture(str(config), other, 2)
    assert first.read_bytes() != other.read_bytes()


def test_at_most_twelve_tasks_are_drawn_or_as_many_as_are_asked_for(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    write(tmp_path / "config.yaml", {"scenario": {"name": "class_incremental", "data": "digits", "tasks": 10}})
    assert streamcl("show", "config.yaml", "--picture", "out.svg", "--tasks", "1")[1] == "picture: out.svg (1 of 10 tasks)\n"
    assert evenly(100, 12)[0] == 0 and evenly(100, 12)[-1] == 99 and evenly(7, 3) == [0, 3, 6] and evenly(5, 1) == [0]


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 100))
def test_the_tasks_that_are_drawn_are_spread_evenly(count: int, most: int) -> None:
    chosen = evenly(count, most)
    assert len(chosen) == min(count, most) and chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] < count
    gaps = {b - a for a, b in pairwise(chosen)}
    assert len(chosen) == 1 or (chosen[-1] == count - 1 and max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["config.yaml", "--picture", "out.jpg"], "out.jpg must end in .png, .svg or .pdf"),
        (["config.yaml", "--picture", "out"], "out must end in .png, .svg or .pdf"),
        (["config.yaml", "--picture", "no/such/out.png"], "there is no folder no/such"),
        (["config.yaml", "--picture", "folder.png"], "folder.png is a folder: name a file"),
        (
            ["run", "--picture", "out.png"],
            "run is a run, and --picture draws the stream of a configuration: name the run's, run/config.yaml",
        ),
        (
            ["er", "--picture", "out.png"],
            "er is a strategy, and --picture draws the stream of a configuration: name one that uses it, such as ",
        ),
        (["class_incremental", "--picture", "out.png"], "class_incremental is a scenario"),
        (["mine.py:Mine", "--picture", "out.png"], "name a YAML file that uses it"),
        (["quickstrat", "--picture", "out.png"], "did you mean 'quickstart'?"),
        (["empty.yaml", "--picture", "out.png"], "empty.yaml:1:1: scenario: is missing"),
        (["typo.yaml", "--picture", "out.png"], "typo.yaml:2:9: scenario.task: unknown option of class_incremental: did you mean 'tasks'?"),
        (["many.yaml", "--picture", "out.png"], "tasks is 11 and there are only 10 classes"),
        (["config.yaml", "--picture", "out.png", "--tasks", "0"], "'--tasks'"),
        (["config.yaml", "--tasks", "3"], "--tasks belongs to it"),
        (["config.yaml", "--kind", "source", "--picture", "out.png"], "leave out --kind"),
    ],
)
def test_what_cannot_be_drawn_is_told_with_what_would_be_right(
    words: list[str], message: str, streamcl: Callable[..., Answer], tmp_path: Path
) -> None:
    write(tmp_path / "config.yaml", DIGITS)
    write(tmp_path / "empty.yaml", {"seed": 1})
    (tmp_path / "typo.yaml").write_text("scenario: {name: class_incremental, data: digits,\n        task: 5}\n")
    write(tmp_path / "many.yaml", {"scenario": {"name": "class_incremental", "data": "digits", "tasks": 11}})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    (tmp_path / "folder.png").mkdir()
    before = {path for path in tmp_path.rglob("*")}
    code, out, err = streamcl("show", *words)
    assert (code, out) == (2, "") and message in err and err.startswith("streamcl: ") and err.count("\n") == 1
    assert {path for path in tmp_path.rglob("*")} == before


class Live(Given):
    def open(self, seed):
        raise AssertionError("a live stream must not be opened for a picture")

    def __iter__(self):
        return iter(())


class Endless(Given):
    __len__ = Scenario.__len__


@pytest.mark.parametrize("kind", [Live, Endless])
def test_a_live_stream_is_refused_before_it_is_opened(kind: type[Given], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="live stream"):
        drawn(monkeypatch, kind(StreamInfo({}), []), tmp_path)


BROKEN = """from streamcl.stream import Scenario


class Mine(Scenario):
    def __len__(self):
        return 1

    def task(self, index):
        pass

    def test(self, task, after):
        pass

    def open(self, seed):
        return 1 / 0
"""


def test_a_persons_own_scenario_that_fails_is_told_with_its_lines(streamcl: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BROKEN)
    write(tmp_path / "config.yaml", {"scenario": "mine.py:Mine"})
    code, _, err = streamcl("show", "config.yaml", "--picture", "out.png")
    assert code == 2 and "ZeroDivisionError" in err and "mine.py:15 in open" in err and "fault of streamcl" not in err


def test_a_stream_without_a_task_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task"):
        drawn(monkeypatch, Given(StreamInfo({}), []), tmp_path)


# -- what is said of tasks and samples --------------------------------------------------------------------------------------------

IMAGE = {"image": Modality("image", (1, 2, 2), 255)}


def images(count: int) -> dict[str, torch.Tensor]:
    return {"image": torch.zeros(count, 1, 2, 2, dtype=torch.uint8)}


def test_a_row_names_its_task_with_its_facts_and_its_samples_with_their_classes(said, monkeypatch, tmp_path) -> None:
    data = ArrayDataset(images(6), torch.tensor([0, 0, 0, 0, 0, 1]))
    scenario = Given(
        StreamInfo(IMAGE, classes=2, class_names=("ant", "bee"), licence="CC0"),
        [data, Subset(data, torch.arange(0))],
        name="a costs $1 or $2",
        classes=(1,),
        seen=(0, 1),
        labels=(0, 1),
        about={"level": 3, "shots": 5, "missing": {"image": 0.25}, "online": True, "other": None, "weights": torch.zeros(4)},
    )
    answer = drawn(monkeypatch, scenario, tmp_path)
    assert answer == f"picture: {tmp_path / 'out.png'} (2 of 2 tasks)"
    assert said[:2] == [
        "mine.yaml: mine",
        "seed 0 · 2 tasks · 2 classes · target: class · modalities: image · licence: CC0 · each task: level: 3, online, weights: 4 values",
    ]
    title = said.index("Task 1: a costs $1 or $2")
    assert said[title + 1 : title + 3] == ["6 samples · missing: image 0.25 · shots: 5 · new: bee · again: ant", "ant"]
    assert said.count("ant") == 5 and said.count("bee") == 1
    assert said[-1] == "0 samples · missing: image 0.25 · shots: 5 · new: bee · again: ant"


def test_every_class_of_a_task_is_shown_before_any_is_shown_twice() -> None:
    targets = torch.cat([torch.zeros(1000), torch.arange(1, 6)]).long()
    task = Task(0, "", ArrayDataset(images(1005), targets), (), ())
    for seed in range(5):
        order = picturing._drawn(task, generator(seed))
        assert len(set(order.tolist())) == len(order) == contact_sheet.MOST and set(targets[order[:6]].tolist()) == set(range(6))
        shown = order[picturing._side_by_side(task, order)]
        assert targets[shown].tolist() == sorted(targets[shown].tolist())


def test_a_single_pass_stream_is_read_once(said, monkeypatch, tmp_path) -> None:
    data = SinglePass(ArrayDataset(images(20), torch.arange(20) % 2))
    drawn(monkeypatch, Given(StreamInfo(IMAGE), [data]), tmp_path)
    assert int(data.read_already.sum()) == contact_sheet.MOST


def test_an_unlabelled_stream_gets_its_captions_from_the_test_set_with_the_same_samples(said, monkeypatch, tmp_path) -> None:
    ids = torch.tensor([40, 10, 30, 20])
    served = Unlabelled(ArrayDataset(images(4), torch.zeros(4).long(), ids))
    info = StreamInfo(IMAGE, class_names=("ant", "bee", "cat", "dog"), test_time=True)
    test = ArrayDataset(images(5), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([10, 20, 30, 40, 50]))
    drawn(monkeypatch, Given(info, [served], test), tmp_path)
    assert said[-4:] == ["dog", "ant", "cat", "bee"]
    said.clear()
    drawn(monkeypatch, Given(info, [served], Subset(test, torch.arange(3))), tmp_path)
    assert said[-1].endswith("4 samples · unlabelled")


@pytest.mark.parametrize(
    ("target", "targets", "expected"),
    [
        ("value", torch.tensor([[0.5, 2.0]]), ["0.5, 2"]),
        ("labels", torch.tensor([[1, -1, 1]], dtype=torch.int8), ["ant, cat", "1 of 3 classes not annotated"]),
        ("labels", torch.tensor([[0, 0, 0]], dtype=torch.int8), ["none of them"]),
        ("mask", torch.tensor([[[1, 1], [255, 2]]], dtype=torch.uint8), ["bee", "cat", "25 % not annotated"]),
    ],
)
def test_targets_beside_classes_are_captions(target, targets, expected) -> None:
    info = StreamInfo(IMAGE, target=target, class_names=("ant", "bee", "cat"))
    task = Task(0, "t", ArrayDataset(images(1), targets), (), ())
    lines = picturing._caption(info, task, task.train[torch.tensor([0])], targets, 0)
    assert [line.text for line in lines] == expected


def test_a_question_has_its_choices_answer_and_verifier_below_it(said, monkeypatch, tmp_path) -> None:
    extra = {
        "answer": ["two", "three"],
        "choices": ["two\nthree", ""],
        "verifier": ["choice", "exact"],
        "difficulty": torch.tensor([1.0, 2.5]),
        "skill": ["counting", "counting"],
    }
    data = ArrayDataset({"text": ["How many?", "And now?"]}, torch.zeros(2).long(), extra=extra)
    drawn(monkeypatch, Given(StreamInfo({"text": Modality("text")}, target="text"), [data], name="counting"), tmp_path)
    first = ["How many?", "choices: two / three", "→ two", "difficulty 1 · verifier choice"]
    assert [text for text in said if text in first] == first
    assert {"And now?", "→ three", "difficulty 2.5 · verifier exact"} <= set(said)


def test_what_is_missing_is_an_empty_frame_that_says_so(said, monkeypatch, tmp_path) -> None:
    present = {"image": torch.tensor([True, False]), "text": torch.tensor([False, True])}
    data = ArrayDataset({"image": torch.full((2, 1, 2, 2), torch.nan), "text": ["", "words"]}, torch.zeros(2).long(), present=present)
    info = StreamInfo({"image": Modality("image", (1, 2, 2)), "text": Modality("text")})
    drawn(monkeypatch, Given(info, [data]), tmp_path)
    assert said.count("missing") == 1 and said.count("text missing") == 1 and said.count("words") == 1
    assert picturing._lacking(info, Batch({"text": ["", ""]}, None, torch.arange(2), {"text": torch.tensor([False, False])})) == [
        "image",
        "text",
    ]


def test_every_modality_is_drawn_into_its_own_cell(monkeypatch, tmp_path) -> None:
    shapes = {"video": (9, 3, 4, 4), "audio": (800,), "bands": (8, 20), "series": (5, 7), "vector": (300,), "image": (4, 4, 8)}
    kinds = {"bands": "audio", "series": "vector"}
    modalities = {name: Modality(kinds.get(name, name), shape) for name, shape in shapes.items()}
    data = ArrayDataset({name: torch.rand(1, *shape) for name, shape in shapes.items()}, torch.zeros(1).long())
    figures = []
    monkeypatch.setattr(picturing, "write", lambda figure, path, dpi: figures.append(figure))
    drawn(monkeypatch, Given(StreamInfo(modalities), [data]), tmp_path)
    axes = figures[0].axes[0]
    assert len(axes.images) == contact_sheet.FRAMES + 4  # frames, the spectrogram, the bands, the series, the image
    (bars,) = axes.findobj(PolyCollection)
    assert len(bars.get_paths()) == contact_sheet.BARS
    boxes = [image.get_extent() for image in axes.images]
    assert all(0 <= left < right <= contact_sheet.WIDTH for left, right, _, _ in boxes)
    order = sorted(boxes)
    assert all(a[1] <= b[0] for a, b in pairwise(order))  # one sample: nothing lies on anything else


def test_masks_lie_over_their_images_and_what_is_background_or_not_annotated_stays_clear(monkeypatch, tmp_path) -> None:
    targets = torch.tensor([[[0, 1], [255, 2]]], dtype=torch.uint8)
    info = StreamInfo(IMAGE, target="mask", class_names=("ant", "bee", "background"))
    figures = []
    monkeypatch.setattr(picturing, "write", lambda figure, path, dpi: figures.append(figure))
    drawn(monkeypatch, Given(info, [ArrayDataset(images(1), targets)]), tmp_path)
    image, mask = figures[0].axes[0].images
    assert image.get_extent() == mask.get_extent()
    shown = mask.get_array()
    assert (shown[..., 3] > 0).tolist() == [[True, True], [False, False]] and not np.allclose(shown[0, 0], shown[0, 1])


def test_text_fits_its_room_and_ends_in_an_ellipsis_where_it_is_cut() -> None:
    ruler = contact_sheet._Ruler()
    text = "a sentence of words " * 20 + "and_one_word_without_any_space_that_is_far_too_long_for_a_line/" * 3
    lines = ruler.wrapped(text, 1.5, 8.0, 100)
    assert all(ruler.width(line, 8.0) <= 1.5 for line in lines) and "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = ruler.wrapped(text, 1.5, 8.0, 4)
    assert len(cut) == 4 and cut[:3] == lines[:3] and cut[3].endswith("…") and ruler.width(cut[3], 8.0) <= 1.5


def test_characters_without_a_glyph_are_counted(monkeypatch, tmp_path) -> None:
    data = ArrayDataset({"text": ["\U00020bb7 \U00020bb8 and a \x00 \n line"]}, torch.zeros(1).long())
    answer = drawn(monkeypatch, Given(StreamInfo({"text": Modality("text")}), [data]), tmp_path)
    assert answer.endswith("note: the font lacks 2 of the characters, which are drawn as boxes")


def test_a_picture_that_is_too_tall_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(contact_sheet, "TALLEST", 200)
    with pytest.raises(ConfigError, match=r"--tasks: .* ask for fewer"):
        drawn(monkeypatch, Given(StreamInfo(IMAGE), [ArrayDataset(images(1), torch.zeros(1).long())]), tmp_path)


# -- values as pictures -----------------------------------------------------------------------------------------------------------


def test_whole_numbers_are_scaled_by_their_highest_and_floats_as_far_as_they_go() -> None:
    grey = torch.tensor([[[0, 8], [16, 4]]], dtype=torch.uint8)
    np.testing.assert_allclose(pixels(grey, *value_range(grey, 16)), [[0, 0.5], [1, 0.25]])
    assert value_range(grey, None) == (0, 255)
    assert value_range(torch.tensor([0.25, 0.5]), None) == (0, 1)
    assert value_range(torch.tensor([-1.0, torch.nan, 3.0]), None) == (-1, 3)
    assert value_range(torch.tensor([torch.nan]), None) == (0, 1)
    assert pixels(torch.rand(3, 4, 5), 0, 1).shape == (4, 5, 3) and pixels(torch.rand(2, 4, 5), 0, 1).shape == (4, 5)
    assert pixels(torch.full((1, 1, 1), torch.nan), 0, 1).item() == 0.5


@pytest.mark.parametrize("cycles", [100, 250])
def test_a_tone_is_a_line_at_its_frequency(cycles: int) -> None:
    time = torch.arange(1000) / 1000
    power = spectrogram(torch.sin(2 * torch.pi * cycles * time))  # (frequencies, frames)
    loudest = power[:, 5:-5].argmax(dim=0).double() / (len(power) - 1) * 500
    assert (loudest - cycles).abs().max() <= 500 / (len(power) - 1) and power.max() == 0 and power.min() >= -80


@pytest.mark.parametrize("samples", [1, 3, 40, 100_000])
def test_a_silence_and_a_sound_of_any_length_have_a_spectrogram(samples: int) -> None:
    assert spectrogram(torch.zeros(samples)).isfinite().all() and spectrogram(torch.randn(2, samples)).isfinite().all()


def test_waveforms_are_told_from_bands() -> None:
    assert is_waveform((8000,)) and is_waveform((1, 8000)) and is_waveform((2, 8000)) and not is_waveform((40, 60))


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=300))
def test_bars_of_a_vector_reach_as_far_as_its_values(values: list[float]) -> None:
    lows, highs = stretches(torch.tensor(values))
    assert len(lows) == min(len(values), contact_sheet.BARS) and lows.min() == min(0.0, *values) and highs.max() == max(0.0, *values)
    if len(values) <= contact_sheet.BARS:
        np.testing.assert_array_equal(lows + highs, values)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.sampled_from(["image", "audio", "vector", "video", "text"]), st.integers(1, 9)), min_size=1
    ),
    st.integers(1, 8),
)
def test_as_many_samples_stand_side_by_side_as_have_room(kinds: dict[str, tuple[str, int]], least: int) -> None:
    group = Group({name: Modality(kind, (size, 3, 8 * size, 8)) for name, (kind, size) in kinds.items()}, least)
    assert group.samples % group.abreast == 0 and (group.samples >= least or group.samples + group.abreast > contact_sheet.MOST)
    if sum(1 for kind, _ in kinds.values() if kind == "video") < 2:
        assert group.abreast * (group.width + contact_sheet.GAP) - contact_sheet.GAP <= contact_sheet.ROOM + 1e-9
        assert sum(width for _, _, width in group.cells) <= group.inner + 1e-9
