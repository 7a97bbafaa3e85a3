"""What must be exactly true of the strategies, by identity or by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from streamcl.config import EngineConfig
from streamcl.data import ArrayDataset, whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.plugins import find
from streamcl.stream import Batch, Task

CPU = EngineConfig(device="cpu", threads=1)


def make(kind: str, name: str, **options: Any) -> Any:
    return find(kind, name).load()(**options)


def engine(strategy: Any, *, tasks: int = 5, backbone: Any = None, exemplars: int = 60, seed: int = 0, **scenario: Any) -> Engine:
    stream = make("scenario", "class_incremental", data=make("source", "digits"), tasks=tasks, **scenario)
    model = backbone if backbone is not None else make("backbone", "mlp", hidden=[32])
    return Engine(stream, strategy, model, make("memory", "faiss", exemplars=exemplars), seed=seed, engine=CPU)


def learn(run: Engine, tasks: int) -> list[Task]:
    """Learn the first tasks, without scoring."""
    learned = []
    for _ in range(tasks):
        task = run._next_task()
        assert task is not None
        run._learn(task)
        run.context.task = None
        learned.append(task)
    return learned


def begun(run: Engine) -> Any:
    """The next task with its hooks before training run."""
    task = run._next_task()
    assert task is not None
    run.context.begin(task, {})
    run.strategy.enter_task(task)
    run.strategy._grow(task)
    run.strategy.before_task(task)
    return task


def prepared(run: Engine, batch: Batch) -> Batch:
    return run.context.prepare(batch, train=False)


# G-ACIL -------------------------------------------------------------------------------------------------------------------------


def ridge(x: Tensor, labels: Tensor, gamma: float) -> Tensor:
    y = torch.nn.functional.one_hot(labels).double()
    return torch.linalg.solve(x.T @ x + gamma * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)


@pytest.mark.parametrize("online_iter", [1, 3])
@pytest.mark.parametrize("options", [{"tasks": 5}, {"tasks": 10, "repeat": 0.4}, {"tasks": 1}])
def test_gacil_equals_the_joint_ridge_regression(options: dict, online_iter: int) -> None:
    run = engine(
        make("strategy", "gacil", buffer=200, gamma=0.3, online_iter=online_iter, batch=17),
        backbone=make("backbone", "identity"),
        **options,
    )
    tasks = learn(run, options["tasks"])
    batches = [prepared(run, whole(task.train)) for task in tasks]
    x = torch.cat([run.strategy.expand(batch) for batch in batches])
    labels = torch.cat([batch.target for batch in batches])  # type: ignore[misc]
    expected = ridge(x, labels, 0.3 / online_iter)
    torch.testing.assert_close(run.memory.analytic.weights(), expected, rtol=1e-7, atol=1e-9)


def test_gacil_fed_each_batch_three_times_is_gacil_with_a_third_of_the_ridge() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(90, 20, generator=generator, dtype=torch.float64), torch.randint(4, (90,), generator=generator)
    thrice, third = make("memory", "faiss"), make("memory", "faiss")
    for memory, ridge_, times in ((thrice, 6.0, 3), (third, 2.0, 1)):
        memory.open(0, None, torch.device("cpu"))
        memory.analytic.configure(20, ridge_)
        for part, labels in zip(x.split(9), y.split(9), strict=True):
            for _ in range(times):
                memory.analytic.update(part, labels, 4)
    torch.testing.assert_close(thrice.analytic.weights(), third.analytic.weights(), rtol=1e-10, atol=1e-12)


def test_gacil_update_is_the_papers_sum_with_the_exposed_class_gain() -> None:
    """[W - R X'X W, R X'Y_new] + [R X'Y_old, 0], worked out beside the recursion on a batch of old and new classes."""
    generator = torch.Generator().manual_seed(1)
    memory = make("memory", "faiss")
    memory.open(0, None, torch.device("cpu"))
    analytic = memory.analytic
    analytic.configure(8, 0.5)
    analytic.update(torch.rand(20, 8, generator=generator, dtype=torch.float64), torch.randint(2, (20,), generator=generator), 2)
    before = analytic.weights().clone()
    x, y = torch.rand(12, 8, generator=generator, dtype=torch.float64), torch.randint(4, (12,), generator=generator)
    targets = torch.nn.functional.one_hot(y, 4).double()
    analytic.update(x, y, 4)
    r = analytic.inverse
    expected = torch.cat([before - r @ x.T @ x @ before, r @ x.T @ targets[:, 2:]], dim=1)
    expected[:, :2] += r @ x.T @ targets[:, :2]
    torch.testing.assert_close(analytic.weights(), expected, rtol=1e-12, atol=1e-13)


def test_gacil_final_accuracy_does_not_depend_on_the_number_of_tasks() -> None:
    def final(tasks: int) -> float:
        strategy = make("strategy", "gacil", buffer=300, gamma=0.1, online_iter=1)
        return engine(strategy, tasks=tasks, backbone=make("backbone", "identity")).run()["final"]

    assert final(1) == final(5) == final(10)


# iCaRL --------------------------------------------------------------------------------------------------------------------------


def test_icarl_old_columns_follow_the_old_network_and_never_see_a_hard_label() -> None:
    run = engine(make("strategy", "icarl", epochs=1, batch=32, optimizer={"lr": 1.0}))
    learn(run, 1)
    strategy = run.strategy
    task = run._next_task()
    run.context.begin(task, {})
    run.model.grow(4)
    strategy.before_task(task)
    batch = prepared(
        run, strategy.training_data(task)[torch.tensor([0, 1, len(task.train), len(task.train) + 1])]
    )  # two new, two exemplars
    logits = run.model(batch)
    old = strategy.teacher(batch).sigmoid()
    assert old.shape == (4, 2)
    target = torch.zeros(4, 4)
    target[:, :2] = old
    for row, label in enumerate(batch.target.tolist()):
        if label >= 2:
            target[row, label] = 1.0
    p = logits.sigmoid()
    by_hand = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    torch.testing.assert_close(strategy.loss(batch), by_hand)
    swapped = batch.replace(target=torch.where(batch.target < 2, 1 - batch.target, batch.target))  # other old labels: the same loss
    torch.testing.assert_close(strategy.loss(swapped), by_hand)


def test_icarl_shrunken_lists_are_prefixes_of_what_was_stored_before() -> None:
    run = engine(make("strategy", "icarl", epochs=1, batch=32, optimizer={"lr": 1.0}))
    exemplars, before = run.memory.exemplars, {}
    for tasks in range(1, 6):
        learn(run, 1)
        quota = 60 // (2 * tasks)
        for label, count in exemplars.classes().items():
            assert count == quota
            ids = exemplars.of(label).ids.tolist()
            if label in before:
                assert ids == before[label][:quota]
            before[label] = ids


def test_icarl_classifies_by_the_nearest_mean_under_the_current_network() -> None:
    run = engine(make("strategy", "icarl", epochs=2, batch=32, optimizer={"lr": 1.0}))
    tasks = learn(run, 3)
    run.model.eval()
    test = prepared(run, whole(run.scenario.test(tasks[0], tasks[-1])))
    means = []
    for label in range(6):
        kept = normalize(run.model.features(prepared(run, run.memory.exemplars.of(label))), dim=1)
        means.append(normalize(kept.mean(dim=0), dim=0))
    features = normalize(run.model.features(test), dim=1)
    by_hand = torch.cdist(features, torch.stack(means)).argmin(dim=1)
    assert torch.equal(run.strategy.predict(test).labels(), by_hand)


def test_icarl_mirrored_means_average_the_two_views() -> None:
    plain = engine(make("strategy", "icarl", epochs=1, batch=32, optimizer={"lr": 1.0}))
    learn(plain, 1)
    mirrored = engine(make("strategy", "icarl", mirror=True, epochs=1, batch=32, optimizer={"lr": 1.0}))
    learn(mirrored, 1)
    kept = plain.memory.exemplars.of(0)
    assert torch.equal(kept.ids, mirrored.memory.exemplars.of(0).ids)
    views = [kept, kept.replace(inputs={"image": kept.inputs["image"].flip(-1)})]
    sides = [normalize(mirrored.model.features(prepared(mirrored, view)), dim=1).mean(dim=0) for view in views]
    torch.testing.assert_close(mirrored.memory.prototypes.means()[0], normalize(sum(sides) / 2, dim=0))


def test_icarl_returns_to_a_class_with_all_its_samples_as_candidates() -> None:
    run = engine(make("strategy", "icarl", epochs=1, batch=32, optimizer={"lr": 1.0}), repeat=0.3)
    tasks = learn(run, 3)
    again = [label for label in tasks[2].labels if label not in tasks[2].classes]
    assert again
    for label in again:
        assert run.memory.exemplars.classes()[label] == 60 // 6


# ER, fine-tuning, joint ---------------------------------------------------------------------------------------------------------


def test_er_without_replay_is_fine_tuning_bit_for_bit() -> None:
    options = {"epochs": 2, "batch": 32, "optimizer": {"lr": 0.1}}
    plain = engine(make("strategy", "finetune", schedule="constant", **options)).run()
    replayed = engine(make("strategy", "er", replay=0, **options)).run()
    assert plain["matrix"] == replayed["matrix"]


def test_er_loss_is_one_cross_entropy_over_the_new_and_the_replayed() -> None:
    run = engine(make("strategy", "er", epochs=1, replay=16))
    learn(run, 2)
    raw = next(iter(run.tasks[1].train.batches(32)))
    composed = run.strategy.compose(raw)
    assert len(composed) == 48 and torch.equal(composed.ids[:32], raw.ids)
    batch = prepared(run, composed)
    logs = run.model(batch).log_softmax(dim=1)
    by_hand = -logs[torch.arange(48), batch.target].mean()
    torch.testing.assert_close(run.strategy.loss(batch), by_hand)


def test_er_offers_each_sample_once_and_keeps_the_raw_values() -> None:
    run = engine(make("strategy", "er", epochs=3), exemplars=2000)
    tasks = learn(run, 5)
    exemplars = run.memory.exemplars
    everything = torch.cat([task.train.ids for task in tasks])
    assert torch.equal(exemplars.held.ids.sort().values, everything.sort().values)
    first = whole(tasks[0].train)
    place = {i: row for row, i in enumerate(exemplars.held.ids.tolist())}
    rows = torch.tensor([place[i] for i in first.ids.tolist()])
    assert exemplars.held.inputs["image"].dtype == torch.uint8
    assert torch.equal(exemplars.held.inputs["image"][rows], first.inputs["image"])


def test_fine_tuning_over_the_task_leaves_old_rows_of_the_head_alone() -> None:
    run = engine(make("strategy", "finetune", over="task", epochs=1, batch=32, optimizer={"lr": 0.1}))
    learn(run, 1)
    before = run.model.head.weight.detach().clone()
    learn(run, 1)
    assert torch.equal(run.model.head.weight[:2], before)
    assert not torch.equal(run.model.head.weight[2:4], torch.zeros(2, 32))


def test_joint_learns_every_task_from_the_same_first_weights_on_all_data_so_far() -> None:
    run = engine(make("strategy", "joint", epochs=1, batch=64))
    first = {name: value.clone() for name, value in run.model.backbone.state_dict().items()}
    seen = []
    original = type(run.strategy).training_data

    def watch(strategy: Any, task: Task) -> Any:
        data = original(strategy, task)
        seen.append(len(data))
        assert all(torch.equal(value, first[name]) for name, value in run.model.backbone.state_dict().items())
        return data

    type(run.strategy).training_data = watch
    try:
        tasks = learn(run, 3)
    finally:
        type(run.strategy).training_data = original
    sizes = [len(task.train) for task in tasks]
    assert seen == [sizes[0], sum(sizes[:2]), sum(sizes)]


def test_joint_refuses_a_stream_that_can_be_read_once() -> None:
    with pytest.raises(ConfigError, match="set scenario"):
        engine(make("strategy", "joint", epochs=1), online=True)


# All of them --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["er", "finetune", "gacil"])
def test_a_single_pass_stream_is_learned_in_one_pass(strategy: str) -> None:
    options = {"gacil": {"buffer": 100}}.get(strategy, {"epochs": 1})
    run = engine(make("strategy", strategy, **options), backbone=make("backbone", "identity"), online=True)
    scores = run.run()
    assert scores["samples_seen"] == sum(len(task.train) for task in run.tasks) and scores["final"] > 0.15


@pytest.mark.parametrize("strategy", ["er", "finetune"])
def test_more_epochs_than_the_stream_allows_are_refused(strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"strategy.epochs is 3 .* set strategy.epochs=1"):
        engine(make("strategy", strategy, epochs=3), online=True)


def test_a_strategy_never_sees_the_labels_that_it_is_scored_on() -> None:
    run = engine(make("strategy", "er", epochs=1))
    (task,) = learn(run, 1)
    seen = []
    run.strategy.predict = lambda batch: seen.append(batch.target) or type(run.strategy).predict(run.strategy, batch)
    run._score(task)
    assert seen and all(target is None for target in seen)


def test_exemplars_of_a_data_set_that_lies_on_disk_are_read_only_where_they_are_kept() -> None:
    class Watched(ArrayDataset):
        read_rows: list[int] = []  # noqa: RUF012

        def __getitem__(self, indices: Tensor) -> Batch:
            self.read_rows.extend(indices.tolist())
            return super().__getitem__(indices)

    data = Watched({"x": torch.rand(100, 4)}, torch.arange(100) % 2)
    memory = make("memory", "faiss", exemplars=10)
    memory.open(0, "herding", torch.device("cpu"))
    memory.exemplars.add(data, features=torch.rand(100, 4))
    assert len(memory.exemplars) == 10 and len(data.read_rows) == 10


def test_replay_is_an_option_of_every_strategy_and_makes_fine_tuning_into_er() -> None:
    options = {"epochs": 3, "batch": 32, "optimizer": {"lr": 0.1}, "replay": 32}
    tuned = engine(make("strategy", "finetune", schedule="constant", **options)).run()
    replayed = engine(make("strategy", "er", **options)).run()
    assert tuned["matrix"] == replayed["matrix"] and tuned["final"] > 0.3


def test_a_ranking_policy_fills_the_memory_after_the_task() -> None:
    run = engine(make("strategy", "er", epochs=1), exemplars=40)
    memory = make("memory", "faiss", exemplars=40, select=make("policy", "herding"))
    run = Engine(run.scenario, make("strategy", "er", epochs=1), make("backbone", "mlp"), memory, engine=CPU)
    learn(run, 2)
    assert run.memory.exemplars.classes() == {0: 10, 1: 10, 2: 10, 3: 10}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("er", {}, "er needs exemplars and memory.exemplars is 0"),
        ("icarl", {}, "icarl needs exemplars and memory.exemplars is 0"),
        ("finetune", {"over": "task", "replay": 8}, "has no place for replayed classes"),
    ],
)
def test_what_cannot_work_is_refused_before_training(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(make("strategy", name, **options), exemplars=0)


def test_icarl_refuses_a_stream_that_can_be_read_once() -> None:
    with pytest.raises(ConfigError, match="reads a task again"):
        engine(make("strategy", "icarl", epochs=1), online=True)
