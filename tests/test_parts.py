"""Parts of a state: written once, in two places, found by their content, gone when nothing names them."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamcl import checkpoint as checkpoint_module
from streamcl.checkpoint import Checkpoints
from streamcl.errors import RunError
from streamcl.parts import Part, Parts


def places(folder: Path, name: str) -> list[Path]:
    return [folder / place / name for place in ("parts", "copies")]


def state(step: int, rows: int = 50_000) -> dict:
    """A memory of which one block changes with each step, beside a model that changes as a whole."""
    held = torch.arange(4 * rows, dtype=torch.int64)
    held[:10] = step
    return {"model": {"w": torch.full((3,), float(step))}, "memory": {"held": held, "ids": torch.arange(5), "none": None, "n": step}}


def test_a_part_is_written_once_and_lies_twice(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    name = parts.put(b"something")
    assert [place.read_bytes() for place in places(tmp_path, name)] == [b"something"] * 2 and parts.written == 18
    assert Parts(tmp_path).put(b"something") == name and parts.put(b"something") == name and parts.written == 18


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("how", ["flipped", "torn", "lost"])
def test_what_is_damaged_in_one_place_is_read_and_mended_from_the_other(place: int, how: str, tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    name = parts.put(b"something")
    path = places(tmp_path, name)[place]
    if how == "lost":
        path.unlink()
    else:
        path.write_bytes(b"somethinG" if how == "flipped" else b"some")
    assert parts.read(name) == b"something"
    assert Parts(tmp_path).find(name) is not None
    assert [file.read_bytes() for file in places(tmp_path, name)] == [b"something"] * 2


def test_what_is_damaged_in_both_places_is_an_error(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    name = parts.put(b"something")
    for path in places(tmp_path, name):
        path.write_bytes(b"somethinG")
    assert parts.find(name) is None
    with pytest.raises(RunError, match="and its copy are damaged or missing"):
        parts.read(name)


def test_what_did_not_change_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "BLOCK", 100_000)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1))
    first = checkpoints.bytes
    checkpoints.save(state(2))
    assert first > 2 * 4 * 50_000 * 8 and checkpoints.bytes < 2 * 100_000 + 5_000  # one block of sixteen, twice
    loaded = Checkpoints(tmp_path).load(pytest.fail)
    assert loaded is not None and torch.equal(loaded["memory"]["held"], state(2)["memory"]["held"])
    assert loaded["memory"]["n"] == 2 and loaded["memory"]["none"] is None and loaded["model"]["w"].tolist() == [2.0] * 3
    for step in (3, 4, 5):
        checkpoints.save(state(step))
    assert len(list((tmp_path / "parts").iterdir())) == len(list((tmp_path / "copies").iterdir())) == 15 + 1 + 2 * 2
    # 15 blocks that are shared, and of each of two checkpoints one block and the index; what is small is the same in both


def test_any_flipped_bit_of_the_memory_loses_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state(7))
    files = [path for path in tmp_path.rglob("*") if path.parent.name in ("parts", "copies")]
    assert len(files) == 6
    for path in files:
        content = bytearray(path.read_bytes())
        content[random.Random(path.name).randrange(len(content))] ^= 4
        path.write_bytes(content)
        loaded = Checkpoints(tmp_path).load(pytest.fail)
        assert loaded is not None and torch.equal(loaded["memory"]["held"], state(7)["memory"]["held"])
        assert loaded["memory"]["ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_part_that_is_lost_in_both_places_costs_one_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state(1))
    before = {path.name for path in (tmp_path / "parts").iterdir()}
    checkpoints.save(state(2))
    lost = next(path.name for path in (tmp_path / "parts").iterdir() if path.name not in before)
    for path in places(tmp_path, lost):
        path.unlink()
    said: list[str] = []
    loaded = Checkpoints(tmp_path).load(said.append)
    assert loaded is not None and loaded["memory"]["n"] == 1
    assert len(said) == 1 and "and its copy are damaged or missing); the one before it is used" in said[0]


def test_a_part_that_a_state_names_is_kept_as_long_as_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    name = checkpoints.parts.put(b"a block of exemplars")
    stray = checkpoints.parts.put(b"a block that nothing names")
    checkpoints.save({"memory": {"blocks": [{"part": name}]}})
    assert not any(path.exists() for path in places(tmp_path, stray))
    loaded = Checkpoints(tmp_path).load(pytest.fail)
    assert loaded is not None and isinstance(loaded["memory"]["blocks"][0]["part"], Part)
    assert checkpoints.parts.read(loaded["memory"]["blocks"][0]["part"]) == b"a block of exemplars"
    checkpoints.save({"memory": {"blocks": []}})
    assert not any(path.exists() for path in places(tmp_path, name))


@given(st.lists(st.tuples(st.sampled_from(["float32", "bfloat16", "int64", "bool", "uint8"]), st.lists(st.integers(0, 5), max_size=3))))
def test_tensors_of_any_kind_come_back_from_parts(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:
    folder = tmp_path_factory.mktemp("kinds")
    tensors = [torch.randint(0, 2, shape).to(getattr(torch, dtype)) for dtype, shape in kinds]
    Checkpoints(folder).save({"memory": tensors})
    loaded = Checkpoints(folder).load(pytest.fail)
    assert loaded is not None and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(loaded["memory"], tensors, strict=True))


SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_parts import state
from streamcl import checkpoint
checkpoint.BLOCK = 50_000
checkpoints = checkpoint.Checkpoints(Path({folder!r}))
loaded = checkpoints.load(print)
step = 0 if loaded is None else loaded["memory"]["n"]
print("ready", flush=True)
while True:
    step += 1
    checkpoints.save(state(step))
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_memory(tmp_path: Path) -> None:
    """SIGKILL at random moments of saving without pause: whatever is there loads, and is one state, whole."""
    source = SAVER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    chance, last, inside = random.Random(0), 0, 0
    for tried in range(12):
        if tried >= 3 and inside:
            break
        process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.05 + chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += any(path.name.startswith(".") for path in tmp_path.rglob("*"))
        loaded = Checkpoints(tmp_path).load(pytest.fail)
        if loaded is not None:
            step = loaded["memory"]["n"]
            assert step >= last and torch.equal(loaded["memory"]["held"], state(step)["memory"]["held"])
            assert loaded["model"]["w"].tolist() == [float(step)] * 3
            last = step
    assert last > 0 and inside > 0  # at least one of them was killed while something was half-written
    Checkpoints(tmp_path).save(state(last + 1))
    assert not [path for path in tmp_path.rglob(".*") if path.parent.name in ("parts", "copies")]  # nothing half-written is left
