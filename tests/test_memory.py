"""The memory keeps what its contract says: right by identity, bounded, restorable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from streamcl.errors import ConfigError, DataError
from streamcl.plugins import find
from streamcl.stream import Batch


def memory(policy: str = "reservoir", exemplars: int = 20, seed: int = 0) -> Any:
    made = find("memory", "faiss").load()(exemplars=exemplars)
    made.open(seed, policy, torch.device("cpu"))
    return made


def batch(ids: list[int], labels: list[int] | None = None, **extra: Any) -> Batch:
    index = torch.tensor(ids)
    return Batch(
        {"x": index[:, None].float(), "text": [str(i) for i in ids]}, torch.tensor(labels or [i % 3 for i in ids]), index, extra=extra
    )


def test_every_sample_is_held_with_the_same_probability() -> None:
    held = torch.zeros(100)
    rounds = 600
    for seed in range(rounds):
        exemplars = memory(seed=seed).exemplars
        for start in range(0, 100, 7):
            exemplars.add(batch(list(range(start, min(start + 7, 100)))))
        held[exemplars.held.ids] += 1
    expected = rounds * 20 / 100
    chi_square = float(((held - expected) ** 2 / (expected * 0.8)).sum())
    assert chi_square < 148.2  # the 0.999 quantile at 99 degrees of freedom


def test_the_reservoir_places_batches_as_it_places_single_samples() -> None:
    whole, single = memory().exemplars, memory().exemplars
    whole.add(batch(list(range(90))))
    for i in range(90):
        single.add(batch([i]))
    assert len(whole) == len(single) == 20
    assert torch.equal(whole.held.ids.sort().values, single.held.ids.sort().values)


def test_fields_of_a_sample_stay_together() -> None:
    exemplars = memory().exemplars
    for start in range(0, 200, 10):
        ids = list(range(start, start + 10))
        exemplars.add(batch(ids, logits=torch.tensor(ids)[:, None] * 2.0))
    held = exemplars.held
    assert len(held) == 20 and held.inputs["x"].squeeze(1).tolist() == held.ids.tolist()
    assert held.inputs["text"] == [str(i) for i in held.ids.tolist()]
    assert torch.equal(held.extra["logits"].squeeze(1), held.ids * 2.0) and torch.equal(held.target, held.ids % 3)


def test_herding_equals_the_rule_tried_on_every_candidate() -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    policy = find("policy", "herding").load()()
    unit = normalize(features, dim=1)
    mean, chosen = unit.mean(dim=0), []
    for k in range(1, 41):
        distances = [float("inf") if i in chosen else float((mean - (unit[i] + unit[chosen].sum(dim=0)) / k).norm()) for i in range(40)]
        chosen.append(min(range(40), key=distances.__getitem__))
    assert policy.rank(features, None, 40, torch.Generator()).tolist() == chosen


def test_herding_all_samples_has_the_class_mean() -> None:
    features = normalize(torch.randn(30, 5, dtype=torch.float64), dim=1)
    order = find("policy", "herding").load()().rank(features, None, 30, torch.Generator())
    assert sorted(order.tolist()) == list(range(30))
    torch.testing.assert_close(features[order].mean(dim=0), features.mean(dim=0), rtol=0, atol=1e-12)


def test_a_ranking_policy_keeps_equal_shares_and_prefixes() -> None:
    exemplars = memory("herding", exemplars=12).exemplars
    generator = torch.Generator().manual_seed(0)
    exemplars.add(batch(list(range(20)), [0] * 10 + [1] * 10), features=torch.randn(20, 4, generator=generator))
    first = {label: exemplars.of(label).ids.tolist() for label in (0, 1)}
    assert exemplars.classes() == {0: 6, 1: 6}
    exemplars.add(batch(list(range(20, 30)), [2] * 10), features=torch.randn(10, 4, generator=generator))
    assert exemplars.classes() == {0: 4, 1: 4, 2: 4}
    assert all(exemplars.of(label).ids.tolist() == ids[:4] for label, ids in first.items())


def test_join_is_the_batch_followed_by_a_sample() -> None:
    one, other = memory(), memory()
    for made in (one, other):
        made.exemplars.add(batch(list(range(15))))
    new = batch([100, 101])
    joined = one.exemplars.join(new, 6, torch.Generator().manual_seed(5))
    apart = Batch.cat([new, other.exemplars.sample(6, torch.Generator().manual_seed(5))])
    assert torch.equal(joined.ids, apart.ids) and torch.equal(joined.target, apart.target)
    assert torch.equal(joined.inputs["x"], apart.inputs["x"]) and joined.inputs["text"] == apart.inputs["text"]


def test_a_sample_repeats_only_where_there_are_too_few() -> None:
    exemplars = memory().exemplars
    exemplars.add(batch(list(range(5))))
    assert sorted(exemplars.sample(5).ids.tolist()) == [0, 1, 2, 3, 4]
    many = exemplars.sample(12).ids.tolist()
    assert len(many) == 12 and set(many) == {0, 1, 2, 3, 4}


def test_a_sample_that_comes_back_replaces_itself() -> None:
    exemplars = memory().exemplars
    exemplars.add(batch([1, 2, 3], [0, 0, 0]))
    exemplars.add(batch([2], [7]))
    assert len(exemplars) == 3 and exemplars.of(7).ids.tolist() == [2]


def test_removed_samples_are_gone_and_counted() -> None:
    made = memory()
    made.exemplars.add(batch(list(range(10))))
    made.index(3).add(torch.arange(10), torch.rand(10, 3))
    assert made.remove(torch.tensor([3, 4, 99])) == {"exemplars": 2, "index default": 2}
    assert 3 not in made.exemplars.held.ids.tolist() and len(made.index(3)) == 8
    made.exemplars.add(batch([50, 51, 52]))
    assert len(made.exemplars) == 11


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 9)),
            st.tuples(st.just("remove"), st.integers(0, 60)),
            st.tuples(st.just("reload"), st.just(0)),
        ),
        max_size=25,
    )
)
def test_any_sequence_of_calls_keeps_the_invariants(steps: list[tuple[str, int]]) -> None:
    made, offered, removed = memory(exemplars=7), 0, set()
    for verb, number in steps:
        if verb == "add":
            made.exemplars.add(batch(list(range(offered, offered + number))))
            offered += number
        elif verb == "remove":
            made.exemplars.remove(torch.tensor([number]))
            removed.add(number) if number < offered else None
        else:
            fresh = memory(exemplars=7)
            fresh.restore(made.state())
            made = fresh
        held = [] if made.exemplars.held is None else made.exemplars.held.ids.tolist()
        assert len(held) == len(set(held)) <= 7 and set(held) <= set(range(offered)) - removed
        assert sum(made.exemplars.classes().values()) == len(made.exemplars) == len(held)


def test_prototypes_in_batches_equal_the_means_of_everything() -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(500, 8, generator=generator, dtype=torch.float64) + 100
    labels = torch.randint(4, (500,), generator=generator)
    prototypes = memory().prototypes
    for x, y in zip(features.split(33), labels.split(33), strict=True):
        prototypes.update(x, y)
    for label, mean in zip(prototypes.labels().tolist(), prototypes.means(), strict=True):
        torch.testing.assert_close(mean, features[labels == label].mean(dim=0), rtol=1e-12, atol=0)
    assert prototypes.counts().sum() == 500
    distances, nearest = prototypes.nearest(prototypes.means(), k=2)
    assert torch.equal(nearest[:, 0], prototypes.labels()) and float(distances[:, 0].max()) < 1e-5


@pytest.mark.parametrize("size", [1, 7, 64, 200])
def test_the_analytic_solution_does_not_depend_on_how_the_stream_is_cut(size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = torch.rand(200, 30, generator=generator), torch.randint(5, (200,), generator=generator)
    analytic = memory().analytic
    analytic.configure(30, 0.1)
    for part, labels in zip(x.split(size), y.split(size), strict=True):
        analytic.update(part, labels, 5)
    design = x.double()
    targets = torch.nn.functional.one_hot(y, 5).double()
    joint = torch.linalg.solve(design.T @ design + 0.1 * torch.eye(30, dtype=torch.float64), design.T @ targets)
    torch.testing.assert_close(analytic.weights(), joint, rtol=1e-9, atol=1e-10)


def test_the_index_finds_what_a_full_search_finds() -> None:
    vectors, queries = torch.randn(300, 16), torch.randn(20, 16)
    index = memory().index(16)
    index.add(torch.arange(300) + 1000, vectors)
    distances, found = index.search(queries, 5)
    exact = torch.cdist(queries, vectors).topk(5, largest=False)
    assert torch.equal(found, exact.indices + 1000)
    torch.testing.assert_close(distances.sqrt(), exact.values, rtol=1e-4, atol=1e-4)


def test_the_memory_survives_its_state() -> None:
    made = memory()
    made.exemplars.add(batch(list(range(50))))
    made.prototypes.update(torch.rand(30, 4), torch.arange(30) % 3)
    made.analytic.configure(4, 1.0)
    made.analytic.update(torch.rand(30, 4), torch.arange(30) % 3, 3)
    made.index(4, "faces").add(torch.arange(9), torch.rand(9, 4))
    other = memory(seed=9)
    other.restore(made.state())
    assert other.nbytes() == made.nbytes() > 0
    for both in (made, other):
        both.exemplars.add(batch(list(range(50, 200))))
    assert torch.equal(made.exemplars.held.ids, other.exemplars.held.ids)
    query = torch.rand(2, 4)
    assert torch.equal(made.index(4, "faces").search(query, 3)[1], other.index(4, "faces").search(query, 3)[1])


def test_what_cannot_be_kept_is_refused_with_a_reason() -> None:
    with pytest.raises(DataError, match="offers a sample twice: id 4"):
        memory().exemplars.add(batch([4, 5, 4]))
    with pytest.raises(DataError, match="offered have x, text, and those held have x, text, logits"):
        with_logits = memory().exemplars
        with_logits.add(batch([1, 2], logits=torch.rand(2, 3)))
        with_logits.add(batch([3]))
    with pytest.raises(DataError, match="without labels"):
        memory().exemplars.add(batch([1]).replace(target=None))
    with pytest.raises(DataError, match="the exemplar memory is empty"):
        memory().exemplars.sample(3)
    with pytest.raises(ConfigError, match=r"memory.exemplars is 2, less than one sample for each of the 3 classes"):
        memory("herding", exemplars=2).exemplars.add(batch(list(range(9))), features=torch.rand(9, 2))
    with pytest.raises(DataError, match="herding goes by features, and none were given"):
        memory("herding").exemplars.add(batch([1, 2]))
    with pytest.raises(DataError, match=r"1 features are NaN or infinite \(rows \[1\]\)"):
        memory().prototypes.update(torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, 0]))
    with pytest.raises(DataError, match="3 dimensions and the prototypes 2"):
        prototypes = memory().prototypes
        prototypes.update(torch.rand(2, 2), torch.tensor([0, 1]))
        prototypes.update(torch.rand(2, 3), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="in the index already"):
        index = memory().index(2)
        index.add(torch.tensor([1]), torch.rand(1, 2))
        index.add(torch.tensor([1]), torch.rand(1, 2))


def test_every_column_is_overwritten_and_survives_the_state() -> None:
    made = memory(exemplars=4)

    def full(ids: list[int], task: int) -> Batch:
        one = batch(ids, [task] * len(ids), logits=torch.full((len(ids), 2), float(task)), answer=[f"{task}"] * len(ids))
        return one.replace(task=torch.full((len(ids),), task), present={"x": torch.tensor([task > 1] * len(ids))})

    made.exemplars.add(full([1, 2, 3], 1))
    made.exemplars.add(full([2], 5))
    other = memory(exemplars=4)
    other.restore(made.state())
    assert other.nbytes() == made.nbytes()
    for exemplars in (made.exemplars, other.exemplars):
        held = exemplars.held
        assert held.task.tolist() == held.target.tolist() == [1, 5, 1] and held.present["x"].tolist() == [False, True, False]
        assert held.extra["logits"][:, 0].tolist() == [1, 5, 1] and held.extra["answer"] == ["1", "5", "1"]
    with pytest.raises(DataError, match=r"offered have x, text, and those held have x, text, task"):
        bare = memory().exemplars
        bare.add(batch([1]).replace(task=torch.tensor([0])))
        bare.add(batch([2]))


@pytest.mark.parametrize("masked_first", [True, False])
def test_a_sample_without_a_mask_has_all_its_modalities(masked_first: bool) -> None:
    exemplars = memory(exemplars=6).exemplars
    masked = batch([1, 2]).replace(present={"text": torch.tensor([False, True])})
    for one in (masked, batch([3, 4])) if masked_first else (batch([3, 4]), masked):
        exemplars.add(one)
    exemplars.add(batch([4, 5]))
    present = dict(zip(exemplars.held.ids.tolist(), exemplars.held.present["text"].tolist(), strict=True))
    assert present == {1: False, 2: True, 3: True, 4: True, 5: True}
    exemplars.add(batch([1]))
    assert exemplars.held.present["text"][exemplars.held.ids == 1].tolist() == [True]
    exemplars.add(batch([5]).replace(present={"text": torch.tensor([False])}))
    assert exemplars.held.present["text"][exemplars.held.ids == 5].tolist() == [False]
    joined = exemplars.join(batch([9]), 5)
    assert joined.present is not None and joined.present["text"].sum() == 5 and bool(joined.present["text"][0])


@pytest.mark.parametrize("policy", ["reservoir", "herding"])
def test_a_data_set_of_the_memory_is_a_snapshot(policy: str) -> None:
    exemplars = memory(policy, exemplars=4).exemplars
    exemplars.add(batch([1, 2, 3, 4], [0, 0, 1, 1], logits=torch.ones(4, 2)), features=torch.rand(4, 2))
    kept = exemplars.dataset()
    before = kept[torch.arange(4)]
    exemplars.replace(torch.tensor([1, 3]), logits=torch.zeros(2, 2))
    exemplars.add(batch([1, 2, 3, 4], [7, 7, 8, 8], logits=torch.zeros(4, 2)), features=torch.rand(4, 2))
    after = kept[torch.arange(4)]
    assert torch.equal(after.ids, before.ids) and torch.equal(after.target, before.target)
    assert torch.equal(after.extra["logits"], torch.ones(4, 2)) and torch.equal(kept.targets, before.target)


def test_columns_of_fewer_classes_are_widened_when_more_come() -> None:
    exemplars = memory().exemplars
    exemplars.add(batch([1, 2, 3], logits=torch.ones(3, 2)).replace(target=torch.tensor([[1, 0], [0, 1], [1, 1]])))
    exemplars.add(batch([2, 4], logits=torch.full((2, 3), 2.0)).replace(target=torch.tensor([[0, 0, 1], [1, 0, 1]])))
    exemplars.add(batch([3], logits=torch.full((1, 1), 3.0)).replace(target=torch.tensor([[1]])))
    assert exemplars.held.target.tolist() == [[1, 0, -1], [0, 0, 1], [1, 1, -1], [1, 0, 1]]  # what was known of a label stays
    logits = exemplars.held.extra["logits"]
    assert logits.nan_to_num(-9).tolist() == [[1, 1, -9], [2, 2, 2], [3, -9, -9], [2, 2, 2]]
    exemplars.replace(torch.tensor([1, 99]), logits=torch.full((2, 4), 5.0, dtype=torch.bfloat16))
    logits = exemplars.held.extra["logits"]
    assert logits.dtype == torch.float32 and logits.nan_to_num(-9)[:2].tolist() == [[5, 5, 5, 5], [2, 2, 2, -9]]
    exemplars.replace(torch.tensor([1]), logits=torch.zeros(1, 2))
    assert exemplars.held.extra["logits"].nan_to_num(-9)[0].tolist() == [0, 0, -9, -9]


def test_join_says_which_samples_are_new_and_keeps_what_is_stored_beside_the_others() -> None:
    exemplars = memory().exemplars
    exemplars.add(batch([1, 2, 3], logits=torch.ones(3, 2)))
    joined = exemplars.join(batch([8, 9]), 3)
    assert joined.new == 2 and joined.extra["logits"].isnan().all(dim=1).tolist() == [True, True, False, False, False]
    assert exemplars.join(joined, 2).new == 2
    plain = memory().exemplars
    x = Batch({"x": torch.rand(3, 2)}, torch.tensor([0, 1, 2]), torch.arange(3))
    plain.add(x)
    assert plain.join(x, 2).new == 3 and len(plain.join(x, 2)) == 5 and plain.sample(2).new is None
