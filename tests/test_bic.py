"""BiC: distillation from the corrected network, and the correction itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_strategies import begun, engine, learn, make, prepared
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from streamcl.data import Joined, Subset, whole
from streamcl.errors import ConfigError
from streamcl.nn.model import Model
from streamcl.strategy import GradientStrategy
from streamcl.stream import Batch, Dataset, Task

QUICK: dict[str, Any] = {"epochs": 2, "batch": 32, "optimizer": {"lr": 0.1}, "schedule": "constant"}


def bic(**options: Any) -> Any:
    return make("strategy", "bic", **{**QUICK, "bias_epochs": 50, **options})


class ReplayWithDistillation(GradientStrategy):
    """What BiC is without its second stage, written down by itself."""

    selection = "herding"
    fills_memory = True
    teacher: Model | None = None

    def before_task(self, task: Task) -> None:
        if task.index:
            self.teacher = self.model.copy()
            self.teacher.head.resize(2 * task.index)

    def training_data(self, task: Task) -> Dataset:
        exemplars = self.memory.exemplars
        return Joined([task.train, exemplars.dataset()]) if len(exemplars) else task.train

    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch)
        loss = cross_entropy(logits, batch.target)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            old = self.teacher(batch)
        known, total = old.shape[1], logits.shape[1]
        soft = cross_entropy(logits[:, :known] / 2, softmax(old / 2, dim=1))
        return known / total * soft + (1 - known / total) * loss

    def after_task(self, task: Task) -> None:
        self.keep(task.train)


class WithoutSome(ReplayWithDistillation):
    """The same, on what BiC would train on."""

    def training_data(self, task: Task) -> Dataset:
        twin = bic()
        twin.context, twin.memory, twin.known = self.context, self.memory, 2 * task.index
        return twin.split(task)[0]


@pytest.mark.parametrize(("options", "plain"), [({"held_out": 0.0}, ReplayWithDistillation), ({"bias_epochs": 0}, WithoutSome)])
def test_alpha_1_and_beta_0_is_replay_with_distillation_bit_for_bit(options: dict[str, Any], plain: Any) -> None:
    corrected = engine(bic(**options))
    tasks = learn(corrected, 3)
    reference = engine(plain(**QUICK))
    learn(reference, 3)
    batch = prepared(corrected, whole(tasks[1].train))
    assert torch.equal(corrected.strategy.predict(batch).scores, reference.strategy.predict(batch).scores)
    assert torch.equal(corrected.strategy.correction, torch.tensor([[1.0] * 6, [0.0] * 6]))


def test_stage_2_changes_no_weight_no_statistic_and_no_logit_of_an_old_class() -> None:
    run = engine(bic(), backbone=make("backbone", "convnet", width=8, blocks=2))
    strategy, correct, seen = run.strategy, run.strategy.correct, []

    def watched(validation: Dataset) -> None:
        run.model.eval()
        batch = prepared(run, whole(validation))
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        logits = strategy.predict(batch).scores
        correct(validation)
        assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
        after = strategy.predict(batch).scores
        known = strategy.known
        alpha, beta = strategy.correction[:, -1]
        assert torch.equal(after[:, :known], logits[:, :known])
        assert torch.equal(after[:, known:], logits[:, known:] * alpha + beta) and not torch.equal(after, logits)
        assert (strategy.correction[:, known:] == strategy.correction[:, -1:]).all()
        seen.append(known)

    strategy.correct = watched
    learn(run, 4)
    assert seen == [2, 4, 6]  # the first task has no old class


@pytest.mark.parametrize("rate", [0.001, 0.1, 30.0])
def test_the_cross_entropy_on_what_was_held_out_never_rises(rate: float) -> None:
    run = engine(bic(bias_optimizer={"lr": rate, "momentum": 0.9}))
    strategy, correct, changes = run.strategy, run.strategy.correct, []

    def watched(validation: Dataset) -> None:
        run.model.eval()
        batch = prepared(run, whole(validation))
        before = cross_entropy(strategy.predict(batch).scores, batch.target)
        correct(validation)
        changes.append(cross_entropy(strategy.predict(batch).scores, batch.target) - before)

    strategy.correct = watched
    learn(run, 4)
    assert len(changes) == 3 and all(change <= 1e-6 for change in changes)
    assert all(strategy.correction[0] >= 0)


def test_stage_2_finds_the_pair_that_is_best() -> None:
    """Its loss is convex in the pair; scipy finds the same minimum."""
    from scipy.optimize import minimize

    run = engine(bic(bias_epochs=2000, held_out=0.5, batch=500))
    learn(run, 1)
    strategy, correct, found = run.strategy, run.strategy.correct, []

    def watched(validation: Dataset) -> None:
        run.model.eval()
        batch = prepared(run, whole(validation))
        logits, known = strategy.predict(batch).scores.detach().double(), strategy.known
        correct(validation)

        def objective(pair: Any) -> float:
            q = torch.cat([logits[:, :known], pair[0] * logits[:, known:] + pair[1]], dim=1)
            return float(cross_entropy(q, batch.target)) + 0.05 * pair[1] ** 2

        best = minimize(objective, [1.0, 0.0], bounds=[(0, None), (None, None)])
        found.append((strategy.correction[:, -1].tolist(), best.x.tolist()))

    strategy.correct = watched
    learn(run, 1)
    ((pair, best),) = found
    assert pair == pytest.approx(best, abs=5e-3) and pair != pytest.approx([1.0, 0.0], abs=0.05)


def test_lambda_is_the_share_of_old_classes_and_the_teacher_is_the_corrected_network() -> None:
    run = engine(bic())
    learn(run, 2)
    strategy, model = run.strategy, run.model.copy()
    correction = torch.tensor([[1.0, 1.0, 0.6, 0.6], [0.0, 0.0, -0.3, -0.3]])
    strategy.correction = correction
    task = begun(run)
    data = strategy.training_data(task)
    batch = prepared(run, data[torch.tensor([0, 1, len(data) - 2, len(data) - 1])])
    assert strategy.weight == 4 / 6
    old = model(batch)  # the network before, and by hand its newest two columns
    old = torch.stack([old[:, 0], old[:, 1], 0.6 * old[:, 2] - 0.3, 0.6 * old[:, 3] - 0.3], dim=1)
    logits = run.model(batch)
    kd = -(softmax(old / 2, dim=1) * log_softmax(logits[:, :4] / 2, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(strategy.loss(batch), 4 / 6 * kd + 2 / 6 * cross_entropy(logits, batch.target))
    assert torch.equal(strategy.predict(batch).scores, logits)  # the network of this task begins uncorrected


def test_as_many_samples_of_each_class_are_held_out_and_none_is_trained_on() -> None:
    run = engine(bic(), exemplars=200)
    before: set[int] = set()
    for tasks in range(1, 6):
        task = begun(run)
        strategy, old = run.strategy, 2 * tasks - 2
        if tasks == 1:
            assert strategy.validation is None and strategy.training_data(task) is task.train
        else:
            each = 200 // old // 10
            held, rest = strategy.validation, strategy.training_data(task)
            assert held.targets.bincount().tolist() == [each] * (2 * tasks)
            assert len(held) + len(rest) == len(task.train) + len(run.memory.exemplars)
            assert not set(held.ids.tolist()) & set(rest.ids.tolist())
            assert set(held.ids.tolist()) <= set(task.train.ids.tolist()) | set(run.memory.exemplars.dataset().ids.tolist())
            assert not set(held.ids.tolist()) <= before  # drawn anew
            before = set(held.ids.tolist())
            assert strategy.split(task)[1].ids.tolist() == held.ids.tolist()  # on a resumed task the same
        strategy.rest = Subset(task.train, torch.arange(40))
        strategy.train(task)
        strategy.after_task(task)


@pytest.mark.parametrize("exemplars", [60, 10])
def test_few_exemplars_give_one_each_and_no_class_its_last(exemplars: int) -> None:
    run = engine(bic(), exemplars=exemplars)
    learn(run, 4)
    assert run.memory.exemplars.classes() == dict.fromkeys(range(8), exemplars // 8)
    begun(run)
    held = run.strategy.validation.targets.bincount(minlength=10).tolist()
    assert held == ([1] * 8 if exemplars // 8 > 1 else [0] * 8) + [1] * 2


def test_the_correction_holds_new_classes_back_and_raises_balanced_accuracy() -> None:
    """Where it matters: few exemplars of six old classes against all samples of two new ones."""
    run = engine(bic(epochs=10, bias_epochs=200), exemplars=120)
    tasks = learn(run, 4)
    alpha, beta = run.strategy.correction[:, -1].tolist()
    run.model.eval()
    right: dict[bool, list[float]] = {True: [], False: []}
    lowered = []
    for task in tasks:
        batch = prepared(run, whole(run.scenario.test(task, tasks[-1])))
        plain, corrected = run.model(batch), run.strategy.predict(batch).scores
        lowered.append(float((corrected - plain)[:, 6:].mean().detach()))
        for label in task.classes:
            for kind, scores in ((True, corrected), (False, plain)):
                right[kind].append(float((scores.argmax(dim=1) == batch.target)[batch.target == label].float().mean()))
    assert alpha < 1 or beta < 0
    assert sum(lowered) < 0
    assert sum(right[True]) >= sum(right[False])


def test_weight_decay_falls_with_the_number_of_the_task() -> None:
    run = engine(bic(optimizer={"lr": 0.1, "weight_decay": 1e-3}))
    found = []
    for _ in range(5):
        begun(run)
        (group,) = run.strategy.parameter_groups()
        found.append(group["weight_decay"])
    assert found == pytest.approx([1e-3 * 5 / number for number in range(1, 6)])


@pytest.mark.parametrize(
    ("options", "scenario", "message"),
    [
        ({"epochs": 1}, {"online": True}, "reads a task again"),
        ({"replay": 8}, {}, "set replay=0"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], scenario: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine(bic(**options), **scenario)


def test_without_exemplars_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"bic needs exemplars and memory\.exemplars is 0"):
        engine(bic(), exemplars=0)
