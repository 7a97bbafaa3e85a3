"""What every strategy and every term keeps to, whoever wrote it: one that appears is covered the day its file does.

Resuming, feeding and exporting are asked of all of them too, in files of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import classifying, family, learning, small_run
from test_strategies import learn

from streamcl import running
from streamcl.checkpoint import fingerprint, flatten
from streamcl.config import from_mapping
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.listing import as_yaml, show
from streamcl.plugins import find
from streamcl.seeding import random_state
from streamcl.stream import Batch, Task


def built(name: str, **changes: Any) -> Engine:
    return running.build(from_mapping(small_run(name, log=[], **changes)), None)


def to_answer(run: Engine, tasks: list[Task]) -> Batch:
    """Test samples of the first task, as they are scored after the last."""
    test = run.scenario.test(tasks[0], tasks[-1])
    assert test is not None
    return test[torch.arange(min(40, len(test)))]


def answers(run: Engine, batch: Batch) -> dict[str, Any]:
    given = run._predict(batch)
    return {"scores": given.scores, "texts": given.texts, "images": given.images, **given.heads, **given.embeddings}


@pytest.mark.parametrize("name", learning())
def test_show_names_every_option_with_its_default_and_how_far_the_evidence_goes(name: str) -> None:
    kind = "term" if family(name) == "terms" else "strategy"
    plugin = find(kind, name)
    told = show(name, kind)
    assert plugin.doc.splitlines()[0] in told and "Evidence: " in told
    lines = [line for line in told[told.index("\noptions") :].splitlines() if line.strip()]
    rows = {line.split()[0]: line for line in lines if not line.startswith("   ")}  # what is indented more belongs to an option
    for key, option in plugin.options.items():
        assert key in rows, f"{key} is not shown"
        if isinstance(option.default, (int, float, str, bool)):
            assert f"= {as_yaml(option.default)}" in rows[key]


@pytest.mark.parametrize("name", learning())
def test_a_misspelt_option_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.no_such_option: unknown option"):
        from_mapping(small_run(name, strategy={"name": name, "no_such_option": 1}))


@pytest.mark.parametrize("name", learning())
def test_its_state_is_plain_and_complete(name: str) -> None:
    """What is restored from the state answers as what was saved, and has that state."""
    first = built(name)
    tasks = learn(first, 2)
    state = first.state()
    flatten(state["strategy"])  # nothing but tensors and JSON values
    other = built(name)
    other.restore(state)
    for mine, theirs in zip(*(flatten(run.strategy.state())[1].items() for run in (first, other)), strict=True):
        assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1]), mine[0]
    assert flatten(first.strategy.state())[0] == flatten(other.strategy.state())[0]
    assert other.memory.nbytes() == first.memory.nbytes()
    first.model.eval(), other.model.eval()
    batch = to_answer(first, tasks)
    mine, theirs = answers(first, batch), answers(other, batch)
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key


@pytest.mark.parametrize("name", learning())
def test_nothing_is_learned_from_what_it_is_asked(name: str) -> None:
    run = built(name)
    batch = to_answer(run, learn(run, 2))
    run.model.eval()
    before = fingerprint(run.strategy.state()), fingerprint(run.memory.state()), fingerprint(dict(run.model.state_dict()))
    drawn = run.context.generator.get_state(), random_state()["torch"]
    first, second = answers(run, batch), answers(run, batch)
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key
    assert before == (fingerprint(run.strategy.state()), fingerprint(run.memory.state()), fingerprint(dict(run.model.state_dict())))
    assert torch.equal(drawn[0], run.context.generator.get_state()) and torch.equal(drawn[1], random_state()["torch"])


@pytest.mark.parametrize("name", learning())
def test_it_learns_in_bfloat16(name: str, tmp_path: Path) -> None:
    scores = running.run(small_run(name, engine={"precision": "bfloat16"}, log=[]), out=tmp_path / "run")
    assert scores["resume"]["kind"] == "statistical" and "bfloat16" in scores["resume"]["why"]
    assert scores["final"] is None or np.isfinite(scores["final"])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Bright and dark corners: a class of one sample, tasks with a single class, and classes that come back in later tasks."""
    drawn = np.random.default_rng(0)
    counts = [24, 24, 1, 24, 24]
    labels = np.repeat(np.arange(5), counts)
    images = drawn.integers(0, 40, (len(labels), 1, 8, 8), dtype=np.uint8)
    for row, label in enumerate(labels):
        images[row, 0, label : label + 3, :] += 200
    folder = tmp_path_factory.mktemp("uneven")
    for part in ("data", "test"):
        np.savez(folder / f"{part}.npz", image=images, y=labels)
    source = {"name": "arrays", "path": str(folder / "data.npz"), "test": str(folder / "test.npz"), "inputs": {"image": "image"}}
    return {"name": "class_incremental", "data": source, "classes": [["0"], ["1", "2"], ["3"], ["4"]]}


@pytest.mark.parametrize("repeat", [0.0, 0.25])
@pytest.mark.parametrize("name", classifying())
def test_a_class_of_one_sample_a_task_of_one_class_and_a_class_that_comes_back_are_learn(
    name: str, repeat: float, uneven: dict[str, Any], tmp_path: Path
) -> None:
    scores = running.run(small_run(name, scenario={**uneven, "repeat": repeat}, log=[]), out=tmp_path / "run")
    assert [len(row) for row in scores["matrix"]] == [4] * 4
    assert all(value is not None and 0 <= value <= 100 for i, row in enumerate(scores["matrix"]) for value in row[: i + 1])
    assert scores["memory_bytes"] >= 0 and np.isfinite(scores["final"])


def test_float16_needs_a_device_that_has_it() -> None:
    with pytest.raises(ConfigError, match="float16 and the device is a CPU: use bfloat16"):
        built("finetune", engine={"precision": "float16"})
