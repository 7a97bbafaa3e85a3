"""Exemplars under any budget, policy and store: bounded, whole, restorable, the same on disk as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streamcl.memory import disk as disk_module
from streamcl.memory.disk import Disk
from streamcl.memory.exemplars import Exemplars

from streamcl.checkpoint import Checkpoints
from streamcl.contracts import SelectionPolicy
from streamcl.errors import ConfigError, DataError
from streamcl.plugins import find
from streamcl.stream import Batch

POLICIES = ["reservoir", "class_balanced", "ring", "hierarchical", "herding", "random", "entropy", "cluster", "priority"]


def policy(name: str, **options: Any) -> SelectionPolicy:
    return find("policy", name).load()(**options)


def batch(ids: list[int], labels: list[int], width: int = 3) -> Batch:
    index = torch.tensor(ids)
    return Batch({"x": index[:, None].float().repeat(1, width), "text": [f"n{i}" for i in ids]}, torch.tensor(labels), index)


def offered(ids: list[int], labels: list[int]) -> dict[str, Any]:
    index = torch.tensor(ids, dtype=torch.float64)
    features = torch.stack([(index * 0.7).sin(), (index * 1.3).cos(), index / 50], dim=1)
    return {"samples": batch(ids, labels), "features": features, "scores": (index * 0.31).sin()}


def whole(exemplars: Exemplars) -> Batch | None:
    """What is held, as a reader gets it; every field of a sample still belongs to its id."""
    if len(exemplars) == 0:
        return None
    held = exemplars._take(torch.arange(len(exemplars)))
    ids = held.ids.tolist()
    assert len(set(ids)) == len(ids)
    if exemplars.store != "features":
        assert held.inputs["x"].tolist() == [[float(i)] * 3 for i in ids] and held.inputs["text"] == [f"n{i}" for i in ids]
    if exemplars.store in ("features", "both"):
        torch.testing.assert_close(held.extra["features"], offered(ids, [0] * len(ids))["features"].float())
    assert exemplars.row_of == {i: row for row, i in enumerate(ids)} and exemplars.id_of == ids
    assert all(len(column) == len(ids) for column in exemplars.aside.values())
    return held


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 14), st.integers(0, 3)),
        st.tuples(st.just("again"), st.integers(1, 6), st.integers(0, 3)),
        st.tuples(st.just("remove"), st.integers(1, 9), st.integers(0, 9)),
        st.tuples(st.just("resize"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("restore"), st.just(0), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(POLICIES), st.sampled_from(["samples", "per_class", "bytes"]), st.sampled_from(["raw", "features", "both"]))
def test_any_sequence_of_calls_keeps_every_promise_in_memory_and_on_disk(steps: list, name: str, unit: str, store: str) -> None:
    sizes = {"samples": (24, 12, 40, 30), "per_class": (6, 3, 10, 1), "bytes": (4000, 1500, 9000, 2500)}[unit]

    def made(on_disk: bool) -> Exemplars:
        return Exemplars(sizes[0], policy(name), 5, unit=unit, store=store, disk=Disk() if on_disk else None)  # type: ignore[arg-type]

    plain, twin, next_id = made(False), made(True), 0
    gone: set[int] = set()
    said: dict[int, int] = {}  # the last label that was offered of each sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_module, "SEALED", 150)
        for what, count, extra in steps:
            label_of = [(next_id + n * (extra + 1)) % 4 for n in range(count)]
            for exemplars in (plain, twin):
                if what == "add":
                    exemplars.add(**offered(list(range(next_id, next_id + count)), label_of))
                    said |= dict(zip(range(next_id, next_id + count), label_of, strict=True))
                elif what == "again" and next_id:  # samples that were offered before, some under another label
                    ids = sorted({(n * 7 + extra) % next_id for n in range(count)} - gone)
                    if ids:
                        exemplars.add(**offered(ids, [(i + extra) % 4 for i in ids]))
                        said |= {i: (i + extra) % 4 for i in ids}
                elif what == "remove" and next_id:
                    ids = [(n * 5 + extra) % next_id for n in range(count)]
                    before = set() if exemplars.held is None else set(exemplars.held.ids.tolist())
                    assert exemplars.remove(torch.tensor(ids)) == len(before & set(ids))
                    gone |= set(ids)
                elif what == "resize":
                    exemplars.resize(sizes[count])
            if what == "restore":
                for old, on_disk in ((plain, False), (twin, True)):
                    new = made(on_disk)
                    if new.disk is not None and old.disk is not None:
                        new.disk = old.disk
                    new.restore(old.state())
                    assert new.budget == old.budget
                    plain, twin = (plain, new) if on_disk else (new, twin)
            next_id += count if what == "add" else 0
            one, other = whole(plain), whole(twin)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert [said[i] for i in one.ids.tolist()] == one.target.tolist()  # type: ignore[union-attr]  # the label that came last
                assert one.ids.tolist() == other.ids.tolist() and one.target.tolist() == other.target.tolist()  # type: ignore[union-attr]
                assert not gone & set(one.ids.tolist())
            limit = plain.budget
            if unit == "samples":
                assert len(plain) <= limit
            elif unit == "per_class":
                assert all(n <= limit for n in plain.classes().values())
            else:
                assert plain.nbytes() <= limit
            if twin.disk is not None and twin.held is not None:
                live = sum(twin.disk.live.values())
                assert live == len(twin)


@pytest.mark.parametrize("name", POLICIES)
def test_a_memory_put_back_has_the_same_future(name: str) -> None:
    one = Exemplars(20, policy(name), 3)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, 60, 12):
        labels = torch.randint(5, (12,), generator=generator).tolist()
        one.add(**offered(list(range(start, start + 12)), labels))
    other = Exemplars(20, policy(name), 99)
    other.restore(one.state())
    for start in range(60, 140, 16):
        labels = torch.randint(6, (16,), generator=generator).tolist()
        for exemplars in (one, other):
            exemplars.add(**offered(list(range(start, start + 16)), labels))
        assert one.held.ids.tolist() == other.held.ids.tolist()  # type: ignore[union-attr]
        one.remove(torch.tensor([start]))
        other.remove(torch.tensor([start]))


def test_per_class_each_class_has_a_reservoir_of_its_own() -> None:
    exemplars = Exemplars(5, policy("reservoir"), 0, unit="per_class")
    for start in range(0, 400, 50):
        exemplars.add(batch(list(range(start, start + 50)), [0 if i % 50 < 40 else i % 3 for i in range(start, start + 50)]))
    assert exemplars.classes() == {0: 5, 1: 5, 2: 5}
    late = [i for i in exemplars.of(0).ids.tolist() if i >= 100]
    assert late  # the first class went on changing after it was full


def test_groups_that_the_caller_names_share_the_budget() -> None:
    exemplars = Exemplars(12, policy("herding"), 0)
    exemplars.add(**offered(list(range(10)), [0] * 5 + [1] * 5), group=0)
    assert len(exemplars) == 10
    exemplars.add(**offered(list(range(10, 20)), [2] * 10), group=1)
    exemplars.add(**offered(list(range(20, 30)), [0] * 10), group=2)
    assert exemplars.aside["groups"].bincount().tolist() == [4, 4, 4]


def test_a_policy_that_merges_keeps_the_best_of_all_that_was_offered() -> None:
    exemplars = Exemplars(8, policy("priority"), 0)
    for start in (0, 30, 60):
        exemplars.add(**offered(list(range(start, start + 30)), [i % 2 for i in range(start, start + 30)]))
    for label in (0, 1):
        ids = sorted(range(label, 90, 2), key=lambda i: -float(offered([i], [0])["scores"]))[:4]
        assert exemplars.of(label).ids.tolist() == ids


def test_nothing_of_a_sample_is_kept_where_nothing_may_be() -> None:
    exemplars = Exemplars(8, policy("reservoir"), 0, store="none")
    exemplars.add(**offered([1, 2], [0, 1]))
    assert len(exemplars) == 0 and exemplars.nbytes() == 0 and exemplars.budget == 0


def test_features_alone_hold_no_input_and_do_not_join_a_raw_batch() -> None:
    exemplars = Exemplars(8, policy("reservoir"), 0, store="features")
    exemplars.add(**offered([1, 2], [0, 1]))
    assert exemplars.sample(2).inputs == {} and exemplars.nbytes() == 2 * (8 + 8 + 3 * 4 + 4)
    with pytest.raises(DataError, match=r"memory.store is features: its samples have no raw inputs"):
        exemplars.join(batch([5], [0]), 1)
    with pytest.raises(DataError, match=r"memory.store is features, and samples were offered without their features"):
        exemplars.add(batch([3], [0]))


def test_a_budget_in_bytes_holds_what_fits_and_no_more() -> None:
    exemplars = Exemplars(100 * (3 * 4 + 4 + 8 + 8 + 4 + 8), policy("reservoir"), 0, unit="bytes")
    for start in range(100, 900, 50):
        exemplars.add(batch(list(range(start, start + 50)), [0] * 50))
    assert len(exemplars) == 100 and exemplars.nbytes() == exemplars.budget  # x, text, label, id, task and size
    one = batch([1000], [0])
    one.inputs["text"] = ["long" * 2000]
    exemplars.add(one)  # alone larger than the budget: it is left out, and counted
    assert len(exemplars) == 100 and exemplars.about()["too_large"] == 1
    one.inputs["text"], one.ids = ["long" * 300], torch.tensor([1001])
    for _ in range(30):
        exemplars.add(one)
    for start in range(2000, 3000, 50):
        exemplars.add(batch(list(range(start, start + 50)), [0] * 50))
    assert 60 <= len(exemplars) <= 100 and exemplars.nbytes() <= exemplars.budget  # one long sample does not empty it for good


def test_bad_features_and_scores_are_named_by_the_samples_ids() -> None:
    exemplars = Exemplars(8, policy("herding"), 0)
    features = torch.ones(4, 3)
    features[2, 1] = torch.nan
    with pytest.raises(DataError, match=r"1 samples were offered with features that are NaN or infinite \(ids \[12\]\)"):
        exemplars.add(batch([10, 11, 12, 13], [0] * 4), features=features)
    with pytest.raises(DataError, match="4 samples were offered with 3 features"):
        exemplars.add(batch([10, 11, 12, 13], [0] * 4), features=torch.ones(3, 3))
    with pytest.raises(DataError, match="the selection policy priority goes by scores, and none were given"):
        Exemplars(8, policy("priority"), 0).add(batch([1], [0]))
    with pytest.raises(DataError, match="name their group"):
        multi = Batch({"x": torch.zeros(2, 1)}, torch.tensor([[1, 0], [1, 1]]), torch.arange(2))
        exemplars.add(multi, features=torch.ones(2, 3))
    assert len(exemplars) == 0


def test_a_million_samples_pass_through_a_small_reservoir() -> None:
    exemplars = Exemplars(2000, policy("reservoir"), 0)
    x, largest = torch.zeros(10_000, 1), 0
    for start in range(0, 1_000_000, 10_000):
        exemplars.add(Batch({"x": x}, torch.zeros(10_000, dtype=torch.int64), torch.arange(start, start + 10_000)))
        largest = max(largest, exemplars.nbytes())
    assert len(exemplars) == 2000 and largest == 2000 * (4 + 8 + 8 + 4)
    assert len(exemplars.row_of) == len(exemplars.id_of) == 2000


def test_what_is_erased_lies_in_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "SEALED", 300)
    exemplars = Exemplars(60, policy("reservoir"), 0, disk=Disk(tmp_path))
    for start in range(1000, 1060, 20):
        exemplars.add(batch(list(range(start, start + 20)), [0] * 20))
    assert exemplars.remove(torch.tensor([1003, 1030, 1059])) == 3 and exemplars.disk is not None
    exemplars.disk.parts.keep([block["part"] for block in exemplars.disk.blocks.values()])  # as the next checkpoint does
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + str(exemplars.disk.open).encode()
    assert b"n1002" in content and not any(word in content for word in (b"n1003", b"n1030", b"n1059"))


def test_a_damaged_block_is_read_from_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "SEALED", 100)
    exemplars = Exemplars(60, policy("reservoir"), 0, disk=Disk(tmp_path))
    exemplars.add(batch(list(range(20)), [0] * 20))
    (file,) = (tmp_path / "parts").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    exemplars.disk.maps.clear()  # type: ignore[union-attr]
    assert whole(exemplars) is not None
    assert file.read_bytes() == (tmp_path / "copies" / file.name).read_bytes()  # and mended


def test_a_held_sample_that_comes_back_has_its_new_label_wherever_the_policy_would_have_put_it() -> None:
    exemplars = Exemplars(10, policy("reservoir"), 0)
    exemplars.add(batch(list(range(1000)), [0] * 1000))
    exemplars.add(batch(exemplars.held.ids.tolist(), [7] * 10))  # type: ignore[union-attr]
    assert exemplars.classes() == {7: 10}


def test_labels_that_are_not_annotated_now_keep_what_was_known() -> None:
    exemplars = Exemplars(10, policy("reservoir"), 0)
    exemplars.add(Batch({"x": torch.zeros(2, 1)}, torch.tensor([[1, 0], [0, 1]]), torch.arange(2)))
    exemplars.add(Batch({"x": torch.zeros(2, 1)}, torch.tensor([[-1, -1, 1], [-1, 0, 0]]), torch.arange(2)))
    assert exemplars.held.target.tolist() == [[1, 0, 1], [0, 0, 0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("on_disk", [False, True])
def test_samples_of_another_form_are_refused_and_change_nothing(on_disk: bool) -> None:
    exemplars = Exemplars(8, policy("reservoir"), 0, store="both", disk=Disk() if on_disk else None)
    exemplars.add(**offered([1, 2], [0, 1]))
    with pytest.raises(DataError, match=r"samples were offered \(id 5\) whose x is float32 \[4\], and those held have float32 \[3\]"):
        exemplars.add(batch([5], [0], width=4), features=torch.ones(1, 3))
    with pytest.raises(DataError, match=r"whose features is float32 \[5\], and those held have float32 \[3\]"):
        exemplars.add(batch([5], [0]), features=torch.ones(1, 5))
    other = batch([5], [0])
    other.inputs["x"] = other.inputs["x"].to(torch.uint8)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"whose x is uint8 \[3\]"):
        exemplars.add(other, features=torch.ones(1, 3))
    with pytest.raises(DataError, match="the samples offered have y, features, and those held have x, text, features"):
        exemplars.add(Batch({"y": torch.zeros(1, 3)}, torch.zeros(1, dtype=torch.int64), torch.tensor([5])), features=torch.ones(1, 3))
    with pytest.raises(DataError, match="labels that are no class"):
        exemplars.add(batch([5], [-1]), features=torch.ones(1, 3))
    held = whole(exemplars)
    assert held is not None and sorted(held.ids.tolist()) == [1, 2] and exemplars.shares[0].slots.seen == 2


def test_disk_keeps_text_of_any_kind_and_refuses_what_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "SEALED", 1)
    exemplars = Exemplars(8, policy("reservoir"), 0, disk=Disk())
    texts = ["", "\ud800 alone", "größer\n"]
    exemplars.add(Batch({"t": texts}, torch.zeros(3, dtype=torch.int64), torch.arange(3)))
    assert exemplars._take(torch.arange(3)).inputs["t"] == texts
    with pytest.raises(DataError, match="t holds what is neither text nor a tensor"):
        exemplars.add(Batch({"t": [None]}, torch.zeros(1, dtype=torch.int64), torch.tensor([9])))


def test_a_data_set_on_disk_is_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "SEALED", 500)
    exemplars = Exemplars(20, policy("ring"), 0, disk=Disk())
    exemplars.add(batch(list(range(20)), [0] * 20))
    snapshot = exemplars.dataset()
    exemplars.add(batch(list(range(20, 60)), [0] * 40))
    assert snapshot[torch.arange(20)].inputs["text"] == [f"n{i}" for i in range(20)]


def test_a_block_that_was_let_go_and_comes_again_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "SEALED", 100)
    exemplars = Exemplars(10, policy("ring"), 0, disk=Disk(tmp_path))
    checkpoints = Checkpoints(tmp_path, keep=1)
    for start in (0, 10, 0):
        exemplars.add(batch(list(range(start, start + 10)), [0] * 10))
        checkpoints.save({"memory": exemplars.state()})
    assert Checkpoints(tmp_path).load(pytest.fail) is not None and whole(exemplars) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "per_class"}, "memory.unit was samples when this run was begun, and is per_class"),
        ({"store": "both"}, "memory.store was raw when this run was begun, and is both"),
        ({"disk": Disk()}, "memory.disk was memory when this run was begun, and is disk"),
        ({"policy": policy("ring")}, "memory.select was reservoir when this run was begun, and is ring"),
    ],
    ids=["unit", "store", "disk", "select"],
)
def test_an_option_that_was_changed_since_is_named(changes: dict[str, Any], message: str) -> None:
    one = Exemplars(8, policy("reservoir"), 0)
    one.add(batch([1], [0]))
    with pytest.raises(ConfigError, match=message):
        Exemplars(8, **{"policy": policy("reservoir"), "seed": 0, **changes}).restore(one.state())


def test_a_budget_that_was_changed_since_holds_from_there_on() -> None:
    one = Exemplars(8, policy("herding"), 0)
    one.add(**offered(list(range(20)), [i % 2 for i in range(20)]))
    fewer, more = Exemplars(4, policy("herding"), 0), Exemplars(20, policy("herding"), 0)
    for other in (fewer, more):
        other.restore(one.state())
    assert fewer.classes() == {0: 2, 1: 2} and fewer.of(0).ids.tolist() == one.of(0).ids.tolist()[:2]
    assert more.classes() == {0: 4, 1: 4} and more.budget == 20


def test_filling_a_memory_copies_each_sample_a_few_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    exemplars, copied = Exemplars(4000, policy("reservoir"), 0), 0
    before = 0
    for start in range(0, 4000, 20):
        exemplars.add(Batch({"x": torch.zeros(20, 4)}, torch.zeros(20, dtype=torch.int64), torch.arange(start, start + 20)))
        place = exemplars.held.inputs["x"].data_ptr()  # type: ignore[union-attr]
        copied += len(exemplars) if place != before else 0
        before = place
    assert copied < 3 * 4000
