"""Concepts that are fed to a finished run: new words with pictures of their own, scored by prompts beside the old ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import comparable, copies, small_run
from streamcl.scenarios.concepts import Concepts
from streamcl.scenarios.sources.digits import Digits
from streamcl.strategies.concepts._painting import Painter
from test_feed import DIGITS, PIXELS, contents, images

from streamcl import feeding, running, scoring
from streamcl.data import ArrayDataset, Subset
from streamcl.engine import Engine
from streamcl.errors import ConfigError, DataError, Interrupted, StreamclError
from streamcl.run_folder import RunFolder

LEARNERS = ["textual_inversion", "dreambooth_lora", "custom_diffusion", "c_lora", "conceptguard"]
PROMPTS = ["a photo of <new1> digit", "a photo of <new3> digit next to <new1> digit"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of three concepts, made once for each strategy, and copied for each test."""

    def finish(strategy: str, to: Path, /, **scenario: Any) -> None:
        settings = small_run(strategy, log=[])
        settings["scenario"] |= scenario
        if "data" in scenario:  # the base model was trained on digits
            del settings["model"]["pretrain"]
        running.run(settings, out=to)

    return copies(tmp_path_factory.mktemp("finished"), finish)


def both(path: Path) -> str:
    """Five pictures each of two concepts: the judge was trained on twos, and never heard of a turned three."""
    rows = np.concatenate([np.flatnonzero(digit == DIGITS)[:5] for digit in (2, 3)])
    values = np.concatenate([PIXELS[rows[:5]], PIXELS[rows[5:]].transpose(0, 1, 3, 2)])
    np.savez(path, x=values, y=np.array(["2"] * 5 + ["turned 3"] * 5))
    return str(path)


@pytest.mark.parametrize("strategy", LEARNERS)
def test_every_method_learns_further_concepts_and_old_ones_stay_scored(strategy: str, tmp_path: Path, finished: Any) -> None:
    run = finished(strategy, tmp_path / "run")
    before = json.loads((run / "scores.json").read_text())
    painted = running.load(run).paint(PROMPTS)
    scores = feeding.feed(run, both(tmp_path / "more.npz"))
    assert [row[:3] for row in scores["matrix"][:3]] == before["matrix"] and [len(row) for row in scores["matrix"]] == [4] * 4
    assert all(value is not None for value in scores["matrix"][3]) and scores["metric"] == "image_alignment"
    task = scores["tasks"][3]
    assert (task["name"], task["classes"], task["train"]) == ("more", ["2", "turned 3"], 10)
    assert task["test"] == 2 * (1 + 3) + 2 * (1 + 4), "prompts alone and with each concept before, two samples each"
    said = scores["metrics"]["text_alignment"]["per_class"]
    assert said["classes"] == ["6", "7", "8", "2", "turned 3"]
    assert [value is None for value in said["matrix"][3]] == [False] * 4 + [True], "no number for a name that the judge cannot read"
    joint = scores["metrics"]["joint_image_alignment"]
    assert joint["matrix"][3][0] is None and None not in joint["matrix"][3][1:] and None not in joint["per_class"]["matrix"][3]
    after = running.load(run)
    assert after.classes == said["classes"] and after.info.words[3:] == ("<new4>", "<new5>")
    assert after.paint(["a photo of <new5> digit next to <new1> digit"]).shape == (1, 1, 8, 8)
    assert (run / "pictures/after-0004.png").is_file() and scoring.score(run)["overall"] == pytest.approx(scores["final"])
    if strategy == "textual_inversion":
        assert torch.equal(after.paint(PROMPTS), painted)
        for name in ("text_alignment", "recognised", "joint_image_alignment", "joint_text_alignment"):
            matrix = scores["metrics"][name]["matrix"]
            assert matrix[3][:3] == matrix[2][:3], f"{name} of what did not change"
        assert scores["matrix"][3][:3] == scores["matrix"][2][:3]


@pytest.mark.parametrize("at", [0, 4, "learning"])
def test_a_feed_that_fails_or_dies_leaves_the_run_as_it_was_or_is_finished_by_resume(
    at: int | str, tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = finished("textual_inversion", tmp_path / "run"), both(tmp_path / "more.npz")
    scores, before = json.loads((run / "scores.json").read_text()), contents(run)
    from streamcl import run_folder, writing

    written: list[str] = []

    def dying(path: Path, text: str) -> None:
        if len(written) == at:
            raise SystemExit  # as a kill would: nothing below gets to clean up
        written.append(path.name)
        writing.write_atomically(path, text)

    def failing(*given: Any) -> None:
        raise ConfigError("it cannot be learned")

    with monkeypatch.context() as patch:
        if at == "learning":
            patch.setattr(Painter, "errors", failing)
            with pytest.raises(ConfigError, match=r"it cannot be learned(.|\n)*The data was not taken"):
                feeding.feed(run, data)
            assert contents(run) == before
            return
        for module in (run_folder, feeding):
            patch.setattr(module, "write_atomically", dying)
        with pytest.raises(SystemExit):
            feeding.feed(run, data)
    recorded = (run / "fed/0001.json").exists()
    assert recorded == (at == 4) and running.load(run).paint(PROMPTS).shape == (2, 1, 8, 8)
    resumed = running.resume(run)
    assert len(resumed["matrix"]) == (4 if recorded else 3) and (recorded or comparable(resumed) == comparable(scores))


@pytest.mark.parametrize("strategy", ["c_lora", "conceptguard"])
def test_an_interrupted_feed_is_resumed_to_the_same_scores(
    strategy: str, tmp_path: Path, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = both(tmp_path / "more.npz")
    whole = feeding.feed(finished(strategy, tmp_path / "whole"), data)
    run, tick, steps = finished(strategy, tmp_path / "run"), Engine._tick, []

    def stop(engine: Engine) -> None:
        steps.append(engine.context.steps)
        engine.context.interrupted = len(steps) == 2
        tick(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_set_limits", lambda engine: setattr(engine.context, "step_limit", 0))  # looked at every step
        patch.setattr(Engine, "_tick", stop)
        with pytest.raises(Interrupted, match="streamcl resume"):
            feeding.feed(run, data)
    assert comparable(running.resume(run)) == comparable(whole)


def test_a_run_is_fed_again_and_its_pictures_are_asked_for_as_long_as_they_are_compared_with(tmp_path: Path, finished: Any) -> None:
    run = finished("textual_inversion", tmp_path / "run")
    first = Path(both(tmp_path / "first.npz"))
    feeding.feed(run, str(first))
    scores = feeding.feed(run, images(tmp_path / "second.npz", 4, turned=True, limit=7), name="fours")
    assert len(scores["matrix"]) == 5 and None not in scores["matrix"][4] and scores["tasks"][4]["train"] == 7
    assert scores["metrics"]["text_alignment"]["matrix"][4][4] is None
    assert scores["metrics"]["recognised"]["matrix"][4][:4] == scores["metrics"]["recognised"]["matrix"][3][:4]
    before = contents(run)
    first.unlink()
    with pytest.raises(
        DataError, match=r"first\.npz is gone; .*put it back: what is painted of task 4 \(first\) is compared with its"
    ) as told:
        feeding.feed(run, images(tmp_path / "third.npz", 5, turned=True, limit=3))
    assert "\n" not in str(told.value) and contents(run) == before
    unjudged = finished("textual_inversion", tmp_path / "unjudged", judge="none")
    gone = Path(images(tmp_path / "gone.npz", 4, turned=True, limit=3))
    feeding.feed(unjudged, str(gone))
    gone.unlink()
    assert [task["test"] for task in feeding.feed(unjudged, both(tmp_path / "more.npz"))["tasks"]] == [None] * 5


def test_what_cannot_be_taken_is_refused_and_the_run_is_as_it_was(tmp_path: Path, finished: Any) -> None:
    run = finished("textual_inversion", tmp_path / "run", word={"6": "digit", "7": "digit", "8": "digit"})
    before, new = contents(run), images(tmp_path / "new.npz", 3, turned=True, limit=4)
    np.savez(tmp_path / "wide.npz", x=np.zeros((4, 1, 8, 9), np.uint8), y=np.array(["wide"] * 4))
    np.savez(tmp_path / "rows.npz", x=np.zeros((4, 6), np.float32), y=np.array(["row"] * 4))
    refused: list[tuple[dict[str, Any], type[StreamclError], str]] = [
        ({"data": new, "test": new}, ConfigError, "what is scored are the prompts of its concepts: leave out --test"),
        ({"data": new, "holdout": 0.2}, ConfigError, "what is scored are the prompts of its concepts: leave out --holdout"),
        ({"data": images(tmp_path / "old.npz", 7, limit=4)}, DataError, r"old has pictures of '7', a concept of the run .*\(7 2\)"),
        ({"data": "digits"}, DataError, "digits has pictures of '6', a concept of the run already"),
        (
            {"data": new},
            ConfigError,
            r"does not know the word 'turned'.*(.|\n)*was not taken.*as it was before.*its own name for its class",
        ),
        ({"data": str(tmp_path / "wide.npz")}, DataError, r"wide has image \(.* 1 x 8 x 9\), and this run takes image \(.*1 x 8 x 8\)"),
        ({"data": str(tmp_path / "rows.npz")}, DataError, "rows has vector"),
    ]
    for given, kind, message in refused:
        with pytest.raises(kind, match=message):
            feeding.feed(run, **given)
        assert contents(run) == before
    np.savez(tmp_path / "five.npz", x=PIXELS[DIGITS == 5][:3], y=np.array(["5"] * 3))
    feeding.feed(run, str(tmp_path / "five.npz"))
    assert running.load(run).info.nouns == ("digit", "digit", "digit", "5"), "a concept that no word was given for is called by its name"


def test_a_folder_for_each_concept_is_fed_with_all_its_pictures(tmp_path: Path, finished: Any) -> None:
    def folder(name: str, counts: dict[int, int]) -> str:
        for digit, count in counts.items():
            (tmp_path / name / f"shape {digit}").mkdir(parents=True)
            for row in np.flatnonzero(digit == DIGITS)[:count]:
                Image.fromarray(PIXELS[row, 0] * 15).save(tmp_path / name / f"shape {digit}" / f"{row}.png")
        return str(tmp_path / name)

    scenario = {"data": {"name": "folder", "path": folder("first", {1: 4, 2: 4, 3: 5})}, "concepts": None, "together": 2, "judge": "none"}
    run = finished("textual_inversion", tmp_path / "run", **scenario)
    scores = feeding.feed(run, folder("my_concepts", {4: 6, 5: 1}))
    task = scores["tasks"][2]
    assert (task["name"], task["classes"], task["train"]) == ("my_concepts", ["shape 4", "shape 5"], 7)
    stream = running.continued(RunFolder(run)).scenario
    first, third = stream.task(0), stream.task(2)
    assert first.shots == 4 and "shots" not in third.about and third.classes == (3, 4) and stream.task(1).classes == (2,)
    [batch] = third.train.batches(10)
    assert list(batch.inputs) == ["image", "text"] and len({*first.train.ids.tolist(), *batch.ids.tolist()}) == 15
    told = zip(batch.inputs["text"], batch.target.tolist(), strict=True)
    assert all(f"<new{label + 1}> digit" in text for text, label in told)


def test_the_judge_stays_as_it_was_and_reads_only_names_that_it_knows() -> None:
    stream = Concepts(data=Digits(), concepts=[6, 7], images=4, word="digit")
    stream.open(0)
    first = stream.judge()
    prompts = stream.test(stream.task(0), stream.task(1))
    threes = (Digits().load().train.targets == 3).nonzero().squeeze(1)[:6]
    delivered = Subset(Digits().load().train, threes, targets=torch.tensor([2, 2, 2, 3, 3, 3]))
    info = stream.take("threes", ["3", "turned 3"], delivered)
    assert (info.classes, info.tasks, info.words[2:], info.nouns[2:]) == (4, 3, ("<new3>", "<new4>"), ("digit", "digit"))
    judge, again = stream.judge(), stream.test(stream.task(0), stream.task(2))
    states = first.encoder.state_dict(), judge.encoder.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert torch.equal(judge.means[:2], first.means[:2]) and judge.means.shape == (4 + 8, 64)
    assert isinstance(prompts, ArrayDataset) and isinstance(again, ArrayDataset)
    assert torch.equal(again.ids, prompts.ids) and again.inputs == prompts.inputs, "the same pictures are asked for"
    assert judge.read.tolist() == [True, True, True, False]
    # 6 and 7 are told from all but what came later; the delivered threes are told from each other, a 3 not from the source's own
    assert judge.rivals[:2].sum(dim=1).tolist() == [2 + 8] * 2 and not bool(judge.rivals[:2, 2:4].any())
    assert judge.rivals[2:].sum(dim=1).tolist() == [4 + 7, 4 + 8]
    with pytest.raises(DataError, match=r"'3', a concept of the run already.*\(3 2\)"):
        stream.take("more", ["3"], delivered)
    clip = Concepts(data=Digits(), concepts=[6, 7], images=4, word="digit", judge="open_clip:some")
    clip.open(0)
    clip.take("threes", ["turned 3"], delivered)
    asked: Any = clip.test(clip.task(2), clip.task(2))
    assert asked.extra["judged"][0] == "a photo of digit", "CLIP is told the class word"


def test_what_is_asked_to_be_painted_is_read_as_it_stands(tmp_path: Path, finished: Any) -> None:
    learned = running.load(finished("c_lora", tmp_path / "run"))
    prompt = "a photo of <new1> digit"
    assert torch.equal(learned.paint(prompt), learned.paint([prompt]))
    for wrong in ("a photo of <new9> digit", "a photo of <new1> unicorn"):
        with pytest.raises(ConfigError, match="does not know the word"):
            learned.paint([wrong])
