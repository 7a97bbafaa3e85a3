"""A checkpoint gives back the tree that was saved, and damage to one costs no whole one."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamcl.checkpoint import Checkpoints, damage
from streamcl.errors import RunError


def back(tree: dict[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        Checkpoints(Path(folder)).save(tree)
        return Checkpoints(Path(folder)).load(pytest.fail)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()
    if isinstance(one, dict):
        return list(one) == list(other) and [*map(type, one)] == [*map(type, other)] and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return (one == other and math.copysign(1, one) == math.copysign(1, other)) or (one != one and other != other)
    return bool(one == other)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
BANK = torch.arange(24.0)
KEYS = st.one_of(st.text(max_size=3), st.sampled_from(["a/b", "a", "b", "1", "$tensor", "$items"]), st.integers(), st.booleans())
TENSORS = st.one_of(
    st.builds(
        lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(DTYPES),
    ),
    st.builds(lambda start, stop: BANK[start:stop], st.integers(0, 24), st.integers(0, 24)),
    st.sampled_from([BANK, BANK.reshape(4, 6).T, BANK[::2], BANK[3], BANK[:0]]),
)
TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), TENSORS),
    lambda inside: st.one_of(
        st.lists(inside, max_size=4), st.lists(inside, max_size=4).map(tuple), st.dictionaries(KEYS, inside, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=3), TREES, max_size=4))
def test_what_is_saved_is_what_is_loaded(tree: dict[str, Any]) -> None:
    assert same(back(tree), tree)


def test_keys_that_look_alike_keep_their_own_tensors() -> None:
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    for tree in ({"a/b": x, "a": {"b": y}}, {"t": {1: x, "1": y}}, {"t": {(1, "a"): x, True: y}}):
        assert same(back(tree), tree)


def test_overlapping_views_are_saved_each_as_it_stands() -> None:
    bank = torch.arange(8.0)
    tree = {"bank": bank, "tail": bank[4:], "again": bank, "row": bank.reshape(2, 4)[1]}
    assert same(back(tree), tree)


def test_what_is_no_plain_value_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"the state at /a/1 holds a set"):
        Checkpoints(tmp_path).save({"a": [1, {2}]})
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_makes_room_and_the_whole_ones_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    warnings: list[str] = []
    for step in range(3):
        checkpoints.save({"step": step})
    assert checkpoints.numbers() == [2, 3]
    (checkpoints.path(3) / "state.json").write_text("{}")
    resumed = Checkpoints(tmp_path, keep=2)
    state = resumed.load(warnings.append)
    assert state == {"step": 1} and len(warnings) == 1 and "00000003 is damaged" in warnings[0]
    assert resumed.numbers() == [2, 3]  # until something better is on the disk
    resumed.save({"step": 3})
    assert resumed.numbers() == [2, 4] and all(damage(resumed.path(number)) is None for number in resumed.numbers())
    resumed.save({"step": 4})
    assert resumed.numbers() == [4, 5]


def test_damage_everywhere_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.load(pytest.fail) is None
    checkpoints.save({"step": 0})
    (checkpoints.path(1) / "manifest.json").write_text("[]")
    with pytest.raises(RunError, match=r"every checkpoint .* is damaged"):
        Checkpoints(tmp_path / "new").load(lambda message: None)
