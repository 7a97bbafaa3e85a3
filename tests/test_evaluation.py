"""The scores: hand-computed matrices, unions, masks, heads, several processes, resuming."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, DataError, PluginError
from streamcl.evaluation import Evaluation, forgetting_per_task, summarise
from streamcl.stream import Batch, Modality, Prediction, StreamInfo, Task

INFO = StreamInfo({"x": Modality("vector", (1,))})


def dataset(targets: list[int], answers: list[int]) -> ArrayDataset:
    """Samples whose input is the class that `answer` will give them."""
    return ArrayDataset({"x": torch.tensor(answers, dtype=torch.float32)[:, None]}, torch.tensor(targets))


def task(index: int, classes: tuple[int, ...], **more: Any) -> Task:
    seen = tuple(range(max(classes) + 1)) if classes else more.pop("seen")
    labels = more.pop("labels", classes)
    return Task(index, f"task {index}", dataset([], []), classes, seen, labels, names={c: f"class {c}" for c in seen}, **more)


def answer(classes: int, **heads: int) -> Any:
    """A predictor that gives each sample the class in its input; head `name` shifts it by so many classes."""

    def predict(batch: Batch) -> Prediction:
        wanted = batch.inputs["x"][:, 0].long()  # type: ignore[call-overload]
        one_hot = torch.nn.functional.one_hot
        shifted = {name: one_hot((wanted + by) % classes, classes).float() for name, by in heads.items()}
        return Prediction(one_hot(wanted, classes).float(), heads=shifted)

    return predict


def test_every_number_of_a_three_task_run_is_the_one_computed_by_hand() -> None:
    matrix = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.7, 0.5, 0.4]]
    per_task = [0.9, 0.7, 0.5]
    found = summarise(matrix, per_task, baseline=[0.3, 0.05, 0.1])
    expected = {
        "average_incremental": (0.9 + 0.7 + 0.5) / 3,
        "final": 0.5,
        "final_task_mean": (0.7 + 0.5 + 0.4) / 3,
        # task 0: max(.9, .6) - .7 = .2; task 1: max(.1, .8) - .5 = .3
        "forgetting": (0.2 + 0.3) / 2,
        # task 0: .7 - .9; task 1: .5 - .8
        "backward_transfer": (-0.2 - 0.3) / 2,
        # task 1 before it was learned: .1 - .05; task 2: .2 - .1
        "forward_transfer": (0.05 + 0.1) / 2,
        "learning_accuracy": (0.9 + 0.8 + 0.4) / 3,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert forgetting_per_task(matrix) == pytest.approx([0.2, 0.3])


def test_forgetting_is_negative_when_a_task_improved_in_the_end() -> None:
    assert summarise([[0.5], [0.7, 0.9]], [0.5, 0.8])["forgetting"] == pytest.approx(-0.2)


def test_one_task_has_no_forgetting_and_no_transfer() -> None:
    found = summarise([[0.5]], [0.5], baseline=[0.1])
    assert (found["forgetting"], found["backward_transfer"], found["forward_transfer"]) == (None, None, None)
    assert found["final_task_mean"] == found["learning_accuracy"] == 0.5


def test_a_task_without_a_test_set_is_left_out_of_every_mean() -> None:
    # task 1 has no test set: only task 0 can have been forgotten, .9 - .4
    found = summarise([[0.9], [0.8, None], [0.4, None, 0.6]], [0.9, 0.8, 0.5])
    assert found["forgetting"] == pytest.approx(0.5)
    assert found["final_task_mean"] == pytest.approx(0.5)
    assert found["learning_accuracy"] == pytest.approx(0.75)


def test_the_score_on_all_seen_weighs_samples_and_not_tasks() -> None:
    evaluation = Evaluation(INFO, batch=2)
    small, large = task(0, (0, 1)), task(1, (2, 3))
    # 1 of 2 right; 6 of 6 right
    columns = [(small, dataset([0, 1], [0, 0])), (large, dataset([2, 3, 2, 3, 2, 2], [2, 3, 2, 3, 2, 2]))]
    fields = evaluation.score(large, columns, answer(4))
    assert fields["row"] == [0.5, 1.0]
    assert fields["per_task"] == 7 / 8
    scores = evaluation.scores()
    assert (scores["final"], scores["final_task_mean"]) == (7 / 8, 0.75)
    assert scores["per_class"] == {
        "classes": ["class 0", "class 1", "class 2", "class 3"],
        "matrix": [[None] * 4, [1.0, 0.0, 1.0, 1.0]],
    }
    assert [note["test"] for note in scores["tasks"]] == [2, 6]


def test_a_run_fills_the_matrix_row_by_row_and_json_takes_all_of_it() -> None:
    evaluation = Evaluation(INFO)
    first, second = task(0, (0, 1)), task(1, (2, 3))
    one, two = dataset([0, 1, 0, 1], [0, 1, 0, 1]), dataset([2, 3], [2, 3])
    event = evaluation.score(first, [(first, one)], answer(2))
    assert (event["task"], event["part"], event["metric"], event["final_matrix"]) == (0, "test", "accuracy", [[1.0]])
    forgot = dataset([0, 1, 0, 1], [0, 3, 2, 3])
    evaluation.score(second, [(first, forgot), (second, two)], answer(4))
    scores = json.loads(json.dumps(evaluation.scores(), allow_nan=False))
    assert scores["matrix"] == [[1.0, None], [0.25, 1.0]]
    assert scores["per_task"] == [1.0, 0.5]
    assert scores["forgetting"] == 0.75
    assert {"forgetting", "forward_transfer", "any_time", "matrix"} <= scores["definitions"].keys()
    assert all(scores[key] is None for key in ("forward_transfer", "any_time", "per_domain", "protocols", "heads", "metrics", "validation"))


def test_task_incremental_decides_among_the_tasks_own_classes_only() -> None:
    evaluation = Evaluation(INFO, ("class_incremental", "task_incremental"))
    first, second = task(0, (0, 1)), task(1, (2, 3))

    def prefers_the_new(batch: Batch) -> Prediction:
        # every sample looks most like class 3; behind it, the right class leads
        scores = torch.nn.functional.one_hot(batch.inputs["x"][:, 0].long(), 4).float()  # type: ignore[call-overload]
        scores[:, 3] += 2
        return Prediction(scores)

    columns = [(first, dataset([0, 1, 1], [0, 1, 1])), (second, dataset([2, 3], [2, 3]))]
    evaluation.score(second, columns, prefers_the_new)
    protocols = evaluation.scores()["protocols"]
    assert protocols["class_incremental"]["matrix"][1] == [0.0, 0.5]
    assert protocols["task_incremental"]["matrix"][1] == [1.0, 0.5]
    assert protocols["task_incremental"]["per_task"][1] == 4 / 5
    assert evaluation.scores()["matrix"] == protocols["class_incremental"]["matrix"]


def test_a_task_without_new_classes_is_masked_to_the_labels_that_occur_in_it() -> None:
    evaluation = Evaluation(INFO, ("task_incremental",))
    again = task(0, (), seen=(0, 1, 2), labels=(0, 1))
    evaluation.score(
        again, [(again, dataset([0, 1], [2, 2]))], lambda batch: Prediction(torch.tensor([[0.0, 0.1, 9.0]]).repeat(len(batch), 1))
    )
    assert evaluation.scores()["matrix"] == [[0.5]]  # class 2 is masked, so that both samples are said to be class 1


def test_heads_are_scored_beside_the_decision_from_the_same_predictions() -> None:
    evaluation = Evaluation(INFO)
    first = task(0, (0, 1, 2))
    calls = []

    def predict(batch: Batch) -> Prediction:
        calls.append(len(batch))
        return answer(3, shifted=1)(batch)

    evaluation.score(first, [(first, dataset([0, 1, 2, 0], [0, 1, 2, 2]))], predict)
    scores = evaluation.scores()
    assert calls == [4]
    assert scores["final"] == 0.75
    assert scores["heads"]["shifted"]["final"] == 0.25  # the sample that was wrong by one class is right when shifted by one


def test_a_future_tasks_classes_may_have_no_score_yet_and_then_are_wrong() -> None:
    evaluation = Evaluation(INFO)
    first, second = task(0, (0, 1)), task(1, (2, 3))
    columns = [(first, dataset([0, 1], [0, 1])), (second, dataset([2, 3, 3], [0, 1, 1]))]
    evaluation.baseline(columns, answer(2))
    fields = evaluation.score(first, columns, answer(2))
    assert fields["row"] == [1.0, 0.0]
    assert fields["per_task"] == 1.0  # the future is no part of what was seen
    evaluation.score(second, columns, answer(4))
    assert evaluation.scores()["forward_transfer"] == 0.0


def test_scores_that_are_not_finite_count_as_wrong_and_are_counted() -> None:
    evaluation = Evaluation(INFO)
    first = task(0, (0, 1))

    def predict(batch: Batch) -> Prediction:
        scores = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf]])
        return Prediction(scores)

    fields = evaluation.score(first, [(first, dataset([0, 0, 0, 0], [0, 0, 0, 0]))], predict)
    assert fields["row"] == [0.5]  # a class at -inf is one that is not offered: the last sample is right
    assert fields["warning"].startswith("2 of 4 samples")


def test_any_time_is_the_area_by_the_trapezoid_rule_over_the_span() -> None:
    evaluation = Evaluation(INFO)
    first = task(0, (0, 1))
    for samples, answers in ((100, [0, 0]), (200, [0, 1]), (400, [0, 1])):
        evaluation.any_time(samples, first, [(first, dataset([0, 1], answers))], answer(2))
    # (100 * (.5 + 1) / 2 + 200 * (1 + 1) / 2) / 300
    assert evaluation.scores()["any_time"] == pytest.approx((75 + 200) / 300)


def test_domains_are_scored_on_the_union_of_their_tasks() -> None:
    evaluation = Evaluation(INFO)
    tasks = [task(i, (0, 1), about={"domain": domain}) for i, domain in enumerate(("sketch", "photo", "sketch"))]
    columns = list(zip(tasks, [dataset([0], [0]), dataset([1], [0]), dataset([0, 1, 1], [0, 0, 0])], strict=True))
    evaluation.score(tasks[2], columns, answer(2))
    assert evaluation.scores()["per_domain"] == {"sketch": 0.5, "photo": 0.0}


def test_figures_of_the_strategy_stand_under_metrics() -> None:
    evaluation = Evaluation(INFO)
    tasks = [task(0, (0,)), task(1, (1,))]
    for one, drift in zip(tasks, (0.5, 1.5), strict=True):
        evaluation.score(one, [], answer(2))
        evaluation.figures(one, {"drift": drift})
    drift = evaluation.scores()["metrics"]["drift"]
    assert (drift["per_task"], drift["final"], drift["average_incremental"]) == ([0.5, 1.5], 1.5, 1.0)
    with pytest.raises(PluginError, match=r"'accuracy'.*another name"):
        evaluation.figures(tasks[0], {"accuracy": 1.0})


def test_the_validation_part_is_summed_up_apart_from_the_test_part() -> None:
    evaluation = Evaluation(INFO)
    first = task(0, (0, 1))
    evaluation.score(first, [(first, dataset([0, 1], [0, 1]))], answer(2))
    evaluation.score(first, [(first, dataset([0, 1], [0, 0]))], answer(2), part="validation")
    scores = evaluation.scores()
    assert (scores["final"], scores["validation"]["final"]) == (1.0, 0.5)


def test_what_is_raised_between_two_batches_leaves_no_half_row() -> None:
    evaluation = Evaluation(INFO, batch=1)
    first = task(0, (0, 1))
    columns = [(first, dataset([0, 1, 1], [0, 1, 1]))]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.score(first, columns, answer(2), between=stop)
    assert evaluation.scores()["matrix"] == []
    evaluation.score(first, columns, answer(2))
    assert evaluation.scores()["matrix"] == [[1.0]]


def run(evaluation: Evaluation, start: int = 0, stop: int = 3) -> None:
    """Three tasks of odd sizes, the last of one sample, with answers that are wrong here and there."""
    tasks = [task(i, (2 * i, 2 * i + 1), about={"domain": "even" if i % 2 == 0 else "odd"}) for i in range(3)]
    for after in tasks[start:stop]:
        columns = []
        for one, size in zip(tasks, (7, 5, 1), strict=True):
            targets = [2 * one.index + k % 2 for k in range(size)]
            answers = [(label + (k * (after.index + 1)) % 3) % 6 for k, label in enumerate(targets)]
            columns.append((one, dataset(targets, answers)))
        evaluation.score(after, columns, answer(6, second=1))
        evaluation.any_time(100 * (after.index + 1), after, columns, answer(6))
        evaluation.figures(after, {"size": after.index / 3})


def test_state_goes_through_json_and_gives_bit_identical_scores() -> None:
    whole, before, resumed = (Evaluation(INFO, ("class_incremental", "task_incremental"), batch=3) for _ in range(3))
    run(whole)
    run(before, stop=2)
    resumed.restore(json.loads(json.dumps(before.state(), allow_nan=False)))
    run(resumed, start=2)
    assert json.dumps(resumed.scores()) == json.dumps(whole.scores())


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    evaluation = Evaluation(INFO, ("class_incremental", "task_incremental"), batch=2, rank=rank, world=2)
    run(evaluation)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(evaluation.scores()))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    alone = Evaluation(INFO, ("class_incremental", "task_incremental"), batch=2)
    run(alone)
    multiprocessing.set_forkserver_preload(["torchmetrics"])  # imported once for both
    mp.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="forkserver")
    expected = json.dumps(alone.scores())
    assert [(tmp_path / f"{rank}.json").read_text() for rank in (0, 1)] == [expected, expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Prediction(texts=["a", "b"]), "returned no scores"),
        (Prediction(torch.zeros(3, 2)), r"shape \(3, 2\) for 2 samples"),
        (Prediction(torch.zeros(2, 2), heads={"mean": torch.zeros(2)}), "head 'mean' of shape"),
    ],
)
def test_a_prediction_that_does_not_fit_is_the_strategys_fault_and_says_why(given: Prediction, message: str) -> None:
    first = task(0, (0, 1))
    with pytest.raises(PluginError, match=message):
        Evaluation(INFO).score(first, [(first, dataset([0, 1], [0, 1]))], lambda batch: given)


def test_a_test_sample_without_a_class_names_its_row() -> None:
    first = task(0, (0, 1))
    with pytest.raises(DataError, match="'task 0' has no class in row 1"):
        Evaluation(INFO).score(first, [(first, dataset([0, -1], [0, 1]))], answer(2))


def test_unknown_metrics_and_protocols_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"metric 'acuracy'.*accuracy"):
        Evaluation(StreamInfo({}, metrics=("acuracy",)))
    with pytest.raises(ConfigError, match=r"protocol 'task'.*class_incremental, task_incremental"):
        Evaluation(INFO, ("task",))
