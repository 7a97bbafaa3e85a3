"""Samples are erased from a run's memory and checkpoints, and the receipt says what that covers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_run

import streamcl
from streamcl import feeding, forgetting, running
from streamcl.checkpoint import Checkpoints
from streamcl.cli import main
from streamcl.errors import DataError, Interrupted, RunError


def held_ids(run: Path) -> list[int]:
    learned, _, _ = running.restored(run)
    exemplars: Any = learned.context.memory.exemplars
    return exemplars.held.ids.tolist()


def test_erased_samples_are_in_no_checkpoint_and_the_model_still_answers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    running.run(small_run("icarl"), out=run)
    ids = held_ids(run)[:7]
    pixels = [running.restored(run)[0].context.memory.exemplars.dataset()[torch.tensor([i])].inputs["image"] for i in range(7)]
    receipt = forgetting.forget(run, [*ids, 10**15])
    assert receipt["ids"] == 8 and receipt["learned_from"] == 7 and receipt["removed"] == {"exemplars": 7}
    assert not set(ids) & set(held_ids(run)) and len(held_ids(run)) == 53
    content = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert not any(image.numpy().tobytes() in content for image in pixels)
    for number in Checkpoints(run / "checkpoints").numbers():
        state = Checkpoints(run / "checkpoints").open(number)
        assert not set(ids) & set(state["memory"]["exemplars"]["held"]["ids"].tolist())
    assert streamcl.load(run).predict(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert json.loads((run / "forgotten.json").read_text())[-1] == receipt


def test_the_means_of_icarl_are_those_of_the_exemplars_that_remain(tmp_path: Path) -> None:
    running.run(small_run("icarl"), out=tmp_path / "run")
    before = running.restored(tmp_path / "run")[0].context.memory.prototypes.means().clone()
    receipt = forgetting.forget(tmp_path / "run", held_ids(tmp_path / "run")[:3])
    learned, _, _ = running.restored(tmp_path / "run")
    after = learned.context.memory.prototypes.means().clone()
    learned.strategy.find_means()  # type: ignore[attr-defined]
    assert torch.equal(after, learned.context.memory.prototypes.means()) and not torch.equal(after, before)
    assert receipt["recomputed"] == ["prototypes"]
    assert any("the weights of the network" in line for line in receipt["not_covered"])
    assert not any("prototypes" in line for line in receipt["not_covered"])


def test_gacil_is_afterwards_as_if_the_samples_had_never_come(tmp_path: Path) -> None:
    run = tmp_path / "run"
    running.run(small_run("gacil"), out=run)
    engine = running.build(running.as_config(small_run("gacil")), None)
    tasks = list(engine.scenario)
    ids = torch.cat([task.train.ids[::9] for task in tasks])
    receipt = forgetting.forget(run, ids.tolist())
    strategy, memory = engine.strategy, engine.memory
    for task in tasks:
        keep = (~torch.isin(task.train.ids, ids)).nonzero().squeeze(1)
        batch = engine.context.prepare(task.train[keep], train=False)
        memory.analytic.update(strategy.expand(batch), batch.target, 10)  # type: ignore[attr-defined, arg-type]
    torch.testing.assert_close(running.restored(run)[0].context.memory.analytic.weights(), memory.analytic.weights(), rtol=1e-7, atol=1e-9)
    assert receipt["recomputed"] == ["analytic"] and receipt["learned_from"] == len(ids)
    assert len(receipt["not_covered"]) == 2  # the expansion, drawn before any sample; the data itself
    assert not any("the weights of the network" in line for line in receipt["not_covered"])


def test_a_run_of_which_samples_were_erased_can_be_fed(tmp_path: Path) -> None:
    import numpy as np

    running.run(small_run("er"), out=tmp_path / "run")
    forgetting.forget(tmp_path / "run", held_ids(tmp_path / "run")[:5])
    np.savez(tmp_path / "new.npz", x=np.random.default_rng(0).integers(0, 16, (40, 8, 8), dtype=np.uint8), y=np.array(["new"] * 40))
    scores = feeding.feed(tmp_path / "run", str(tmp_path / "new.npz"))
    assert len(scores["per_task"]) == 6 and 55 <= len(held_ids(tmp_path / "run")) <= 60


def test_ids_that_the_run_never_saw_change_nothing_and_say_so(tmp_path: Path) -> None:
    running.run(small_run("er"), out=tmp_path / "run")
    before = held_ids(tmp_path / "run")
    receipt = forgetting.forget(tmp_path / "run", [10**12])
    assert receipt["removed"] == {} and receipt["not_covered"] == [
        "nothing: the run did not learn from any of these samples, or they were erased before"
    ]
    assert held_ids(tmp_path / "run") == before


def test_an_unfinished_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_resume import stop_at

    with monkeypatch.context() as patch:
        stop_at(patch, 30)
        with pytest.raises(Interrupted):
            running.run(small_run("er"), out=tmp_path / "run")
    with pytest.raises(RunError, match="is not finished, and going on with it would read these samples again"):
        forgetting.forget(tmp_path / "run", [1])


@pytest.mark.parametrize(
    ("text", "ids"), [("5\n# a comment\n\n 3,\n3\n", [3, 5]), ("[7, 1, 7]", [1, 7]), ("-4", [-4])], ids=["lines", "json", "negative"]
)
def test_ids_are_read_from_lines_or_json(text: str, ids: list[int], tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(text)
    assert forgetting.read_ids(tmp_path / "ids").tolist() == ids


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5\nfive\n", r"ids:2: 'five' is no sample id: one whole number in a line"),
        ("[1, 2.5]", r"ids holds 2.5: sample ids are whole numbers"),
        ("[1,", "begins as a JSON list and is none"),
        ("# none\n", "names no sample"),
        ("99999999999999999999", "holds a number beyond 64 bits"),
    ],
)
def test_a_file_that_holds_no_ids_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text(text)
    with pytest.raises(DataError, match=message):
        forgetting.read_ids(tmp_path / "ids")


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["streamcl", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_commands_say_what_is_remembered_and_what_was_erased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    running.run(small_run("icarl"), out=run)
    said = command(monkeypatch, capsys, "memory", str(run), "--pictures")
    assert "exemplars: 60 samples (raw)" in said and "by herding; the budget is 60 samples" in said
    assert "prototypes: classes 10, means 10, samples 60" in said
    assert all((run / "memory" / name).read_bytes()[:4] == b"\x89PNG" for name in ("exemplars.png", "prototypes.png"))
    table = [line.split() for line in said.splitlines() if line.startswith("  ")]
    assert ["1", "12", "960", "B"] in table  # of the first task 12 samples, each with 64 bytes of image, a label and an id
    (tmp_path / "ids.txt").write_text("\n".join(map(str, held_ids(run)[:2])))
    said = command(monkeypatch, capsys, "forget", str(run), "--ids", str(tmp_path / "ids.txt"))
    assert "2 from exemplars" in said and "the weights of the network" in said
    assert not (run / "memory").exists()
    assert "exemplars: 58 samples" in command(monkeypatch, capsys, "memory", str(run))


def test_what_was_taken_back_once_is_not_taken_back_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    running.run(small_run("gacil"), out=run)
    engine = running.build(running.as_config(small_run("gacil")), None)
    ids = next(iter(engine.scenario)).train.ids[:40].tolist()
    forgetting.forget(run, ids)
    once = running.restored(run)[0].context.memory.analytic.weights().clone()
    receipt = forgetting.forget(run, ids)
    assert receipt["erased_before"] == 40 and receipt["recomputed"] == []
    assert torch.equal(running.restored(run)[0].context.memory.analytic.weights(), once)


def test_a_later_task_does_not_learn_from_erased_samples_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from streamcl.context import Context

    run = tmp_path / "run"
    running.run(small_run("joint"), out=run)
    engine = running.build(running.as_config(small_run("joint")), None)
    ids = next(iter(engine.scenario)).train.ids[:40]
    forgetting.forget(run, ids.tolist())
    np.savez(tmp_path / "new.npz", x=np.random.default_rng(0).integers(0, 16, (40, 8, 8), dtype=np.uint8), y=np.array(["new"] * 40))
    seen, batches = [], Context.batches

    def watched(self: Context, data: Any, *arguments: Any, **options: Any) -> Any:
        for batch in batches(self, data, *arguments, **options):
            seen.append(batch.ids)
            yield batch

    monkeypatch.setattr(Context, "batches", watched)
    feeding.feed(run, str(tmp_path / "new.npz"))
    learned = torch.cat(seen).unique()
    assert len(learned) > 1000 and not bool(torch.isin(ids, learned).any())


def test_samples_that_choices_were_made_on_are_told(tmp_path: Path) -> None:
    config = small_run("er")
    config["scenario"]["validation"] = 0.2
    running.run(config, out=tmp_path / "run")
    engine = running.build(running.as_config(config), None)
    held_out = next(iter(engine.scenario)).validation
    assert held_out is not None
    receipt = forgetting.forget(tmp_path / "run", held_out.ids[:5].tolist())
    assert receipt["validated_with"] == 5 and "5 of these among them" in receipt["not_covered"][0]
