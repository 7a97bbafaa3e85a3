"""The metrics beside accuracy: against scikit-learn, scipy and values worked out by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, jaccard_score

from streamcl.data import ArrayDataset
from streamcl.errors import ConfigError, PluginError
from streamcl.evaluation import Evaluation, summarise
from streamcl.metrics import METRICS, Answer, Room
from streamcl.stream import Batch, Prediction, StreamInfo, Task
from streamcl.wording import LOWER


def answer(scores=None, target=None, **more):
    count = len(target)
    return Answer(Batch({}, target, torch.arange(count), extra=more.pop("extra", {})), scores, **more)


def computed(name, room, *answers):
    metric = METRICS[name].load()(room)
    for one in answers:
        metric.update(one)
    return metric.compute()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 5), st.booleans())
def test_average_precision_and_f1_are_those_of_scikit_learn_in_any_batches(seed, samples, classes, ties):
    draw = np.random.RandomState(seed)
    scores = draw.randint(-2, 3, (samples, classes)).astype("f4") if ties else draw.randn(samples, classes).astype("f4")
    target = draw.randint(0, 2, (samples, classes))
    target[0] = 1  # every class has a positive, without which scikit-learn warns
    cut = draw.randint(1, samples)
    parts = [answer(torch.tensor(scores[p]), torch.tensor(target[p], dtype=torch.int8)) for p in (slice(cut), slice(cut, None))]
    room = Room(classes, {0: range(classes)}, threshold=0.6)
    expected = [average_precision_score(target[:, c], scores[:, c]) for c in range(classes)]
    found = computed("map", room, *parts)
    assert found.per_class == pytest.approx(expected, abs=1e-12) and found.value == pytest.approx(np.mean(expected), abs=1e-12)
    given_labels = 1 / (1 + np.exp(-scores.astype("f8"))) > 0.6
    for name, average in (("macro_f1", "macro"), ("of1", "micro")):
        expected = f1_score(target, given_labels, average=average, zero_division=0)
        assert computed(name, room, *parts).value == pytest.approx(expected, abs=1e-12)


def test_cf1_is_the_f1_of_mean_precision_and_mean_recall():
    # Class 0: one given, right, of two true. Class 1: two given, one right, of one true. Precision 1 and 1/2, recall 1/2 and 1.
    scores = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])
    target = torch.tensor([[1, 1], [1, 0], [0, 0]], dtype=torch.int8)
    room = Room(2, {0: [0], 1: [1]})
    cf1, macro = computed("cf1", room, answer(scores, target)), computed("macro_f1", room, answer(scores, target))
    assert cf1.value == pytest.approx(0.75) and macro.value == pytest.approx(2 / 3)
    assert cf1.per_task == pytest.approx({0: 2 / 3, 1: 2 / 3})


def test_labels_that_are_not_annotated_count_for_nothing():
    scores, target = torch.tensor([[2.0], [1.0], [0.5]]), torch.tensor([[1], [-1], [0]], dtype=torch.int8)
    for name in ("map", "cf1", "of1", "macro_f1"):
        with_unknown = computed(name, Room(1, {0: [0]}), answer(scores, target))
        assert with_unknown == computed(name, Room(1, {0: [0]}), answer(scores[[0, 2]], target[[0, 2]])), name


def test_a_class_without_a_score_ranks_last_and_is_never_given():
    target = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]], dtype=torch.int8)
    found = computed("map", Room(2, {0: [0, 1]}), answer(torch.tensor([[3.0], [1.0], [2.0], [0.0]]), target))
    assert found.per_class == [1.0, 0.5], "a perfect ranking, and one that says nothing: the class's frequency"


def test_errors_and_correlation_by_hand():
    target, values = torch.tensor([1.0, 2.0, -3.0, 0.0]), torch.tensor([[1.5], [2.0], [-1.0], [0.5]])
    room = Room(1)
    batches = [answer(values[:3], target[:3]), answer(values[3:], target[3:])]
    assert computed("mae", room, *batches).value == pytest.approx((0.5 + 0 + 2 + 0.5) / 4)
    assert computed("rmse", room, *batches).value == pytest.approx(((0.25 + 0 + 4 + 0.25) / 4) ** 0.5)
    assert computed("correlation", room, *batches).value == pytest.approx(np.corrcoef(values[:, 0], target)[0, 1])
    assert computed("acc_2", room, *batches).value == 1.0, "the sample whose target is zero has no sign"
    assert computed("acc_7", room, *batches).value == 0.5, "1.5 rounds to 2, which is wrong; 2 is right, -1 wrong, 0.5 rounds to 0"
    assert computed("correlation", room, answer(torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0]))).value is None


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_intersection_over_union_is_that_of_scikit_learn_where_annotated(seed):
    draw = np.random.RandomState(seed)
    target, scores = draw.randint(0, 3, (2, 4, 5)), draw.randn(2, 3, 4, 5)
    target[0, 0, 0] = 255
    known = target != 255
    predicted = scores.argmax(1)
    given_answer = answer(torch.tensor(scores), torch.tensor(target, dtype=torch.uint8))
    occurring = sorted(set(target[known]) | set(predicted[known]))
    expected = jaccard_score(target[known], predicted[known], labels=occurring, average="macro")
    assert computed("miou", Room(3), given_answer).value == pytest.approx(expected, abs=1e-12)
    assert computed("pixel_accuracy", Room(3), given_answer).value == pytest.approx((target == predicted)[known].mean())


def test_recall_goes_both_ways_and_a_picture_may_have_several_texts():
    # Two pictures along the axes; texts 0 and 1 belong to picture 7, text 2 to picture 9. Text 1 points at the wrong picture.
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.2, 0.9]])
    one = answer(
        None, torch.zeros(3, dtype=torch.int64), embeddings={"image": images, "text": texts}, extra={"pair": torch.tensor([7, 7, 9])}
    )
    # Text to picture: 0 right, 1 wrong, 2 right. Picture to text: 7 finds text 0, 9 finds text 1, which is not its own.
    assert computed("recall_1", Room(1), one).value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert computed("recall_5", Room(1), one).value == 1.0


def test_harmonic_mean_is_of_the_first_classes_and_the_later_ones():
    scores = torch.eye(4)[[0, 1, 1, 2, 0]]
    target = torch.tensor([0, 1, 0, 2, 3])  # base 2 of 3 right, new 1 of 2
    room = Room(4, {0: [0, 1], 1: [2], 2: [3]})
    base, new = 2 / 3, 1 / 2
    assert computed("base_accuracy", room, answer(scores, target)).value == base
    assert computed("new_accuracy", room, answer(scores, target)).value == new
    assert computed("harmonic_mean", room, answer(scores, target)).value == pytest.approx(2 * base * new / (base + new))
    assert computed("base_as_new", room, answer(scores, target)).value == 0.0
    assert computed("new_as_base", room, answer(scores, target)).value == 0.5, "class 3 was taken for class 0"
    assert computed("harmonic_mean", Room(2, {0: [0, 1]}), answer(scores[:3], target[:3])).value is None


def columns_of(count, target, seen):
    dataset = ArrayDataset({"vector": torch.arange(float(len(target)))[:, None]}, target)
    return Task(count, f"t{count}", dataset, (), seen), dataset


def test_the_matrix_of_label_sets_is_by_the_classes_of_each_task():
    info = StreamInfo({}, target="labels", metrics=("map", "of1"))
    evaluation = Evaluation(info)
    truth = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.int8)
    scores = torch.tensor([[3.0, 0.2, -2.0], [1.0, 0.1, 3.0], [2.0, 0.9, 1.0], [0.0, 0.3, 2.0]])
    columns = []
    for index, classes in enumerate([(0, 1), (2,)]):
        rows = torch.tensor([[0, 1, 2], [3]][index])
        dataset = ArrayDataset({"vector": rows.float()[:, None]}, truth[rows], rows)
        columns.append((Task(index, f"t{index}", dataset, classes, (0, 1, 2)), dataset))
    evaluation.score(columns[1][0], columns, lambda batch: Prediction(scores[batch.ids]))
    result = evaluation.scores()
    per_class = [average_precision_score(truth[:, c], scores[:, c]) for c in range(3)]
    assert result["matrix"][1] == pytest.approx([np.mean(per_class[:2]), per_class[2]])
    assert result["final"] == pytest.approx(np.mean(per_class)) and result["per_class"]["matrix"][1] == pytest.approx(per_class)
    assert set(result["metrics"]) == {"of1"}


def test_where_no_task_brings_classes_the_matrix_of_label_sets_is_by_each_tasks_own_samples():
    truth = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 1]], dtype=torch.int8)
    scores = torch.tensor([[3.0, 0.2], [1.0, 0.1], [0.2, 0.9], [2.0, 0.3]])
    columns = []
    for index, rows in enumerate([[0, 1], [2, 3]]):
        dataset = ArrayDataset({"vector": torch.tensor(rows).float()[:, None]}, truth[rows], torch.tensor(rows))
        columns.append((Task(index, f"t{index}", dataset, (0, 1) if index == 0 else (), (0, 1), about={"domain": f"d{index}"}), dataset))
    evaluation = Evaluation(StreamInfo({}, target="labels", metrics=("map",)))
    evaluation.score(columns[1][0], columns, lambda batch: Prediction(scores[batch.ids]))
    result = evaluation.scores()
    own = [np.mean([average_precision_score(truth[rows, c], scores[rows, c]) for c in range(2)]) for rows in ([0, 1], [2, 3])]
    assert result["matrix"][1] == pytest.approx(own) and result["per_domain"] == pytest.approx(dict(zip(("d0", "d1"), own, strict=True)))


def test_a_prediction_may_bring_its_own_threshold_and_a_class_without_a_positive_counts_zero():
    scores, target = torch.tensor([[0.0, -9.0], [2.0, -9.0]]), torch.tensor([[1, 0], [1, 0]], dtype=torch.int8)
    room = Room(2, {0: [0, 1]}, threshold=0.6)
    assert computed("of1", room, answer(scores, target)).value == pytest.approx(2 / 3)
    assert computed("of1", room, answer(scores, target, threshold=0.4)).value == 1.0
    assert computed("macro_f1", room, answer(scores, target, threshold=0.4)).value == 0.5
    unknown = torch.tensor([[1, -1], [1, -1]], dtype=torch.int8)
    assert computed("macro_f1", room, answer(scores, unknown, threshold=0.4)).value == 1.0, "what is not annotated is no class here"


def test_where_less_is_better_the_signs_are_turned():
    rows = [[1.0, None], [2.5, 0.5]]
    worse, same = summarise(rows, [1.0, 2.0], lower=True), summarise(rows, [1.0, 2.0])
    assert worse["forgetting"] == 1.5 and worse["backward_transfer"] == -1.5 and worse["performance_drop"] == 1.0
    assert same["forgetting"] == -1.5 and same["performance_drop"] == -1.0
    assert {name for name, entry in METRICS.items() if entry.lower} == LOWER


def test_performance_drop_is_from_the_first_to_the_last():
    assert summarise([[0.9], [0.5, 0.7]], [0.9, 0.6])["performance_drop"] == pytest.approx(0.3)
    assert summarise([], [])["performance_drop"] is None


def test_a_metric_that_does_not_fit_the_target_is_refused_and_told_what_does():
    with pytest.raises(ConfigError, match="'accuracy' does not score a stream whose target is labels: map, cf1"):
        Evaluation(StreamInfo({}, target="labels"))
    with pytest.raises(ConfigError, match="task_incremental decides among"):
        Evaluation(StreamInfo({}, target="value", metrics=("mae",)), protocols=("task_incremental",))


def test_scores_of_the_wrong_shape_are_the_strategys_fault():
    task, dataset = columns_of(0, torch.tensor([1.0, 2.0]), (0,))
    evaluation = Evaluation(StreamInfo({}, target="value", metrics=("mae",)))
    with pytest.raises(PluginError, match=r"predicts 2 values and the targets have 1"):
        evaluation.score(task, [(task, dataset)], lambda batch: Prediction(torch.zeros(len(batch), 2)))


def test_a_stream_without_a_metric_keeps_the_strategys_own_figures():
    evaluation = Evaluation(StreamInfo({}, target="image", metrics=()))
    task, _ = columns_of(0, torch.zeros(1, dtype=torch.int64), (0,))
    evaluation.score(task, [], lambda batch: Prediction())
    evaluation.figures(task, {"alignment": 0.5})
    scores = evaluation.scores()
    assert scores["metric"] == "none" and scores["final"] is None and scores["metrics"]["alignment"]["final"] == 0.5


def test_the_classes_among_which_a_test_set_is_decided_can_be_told():
    task, dataset = columns_of(0, torch.tensor([0, 1]), (0, 1, 2))
    evaluation = Evaluation(StreamInfo({}))
    scores = torch.tensor([[0.1, 0.0, 9.0], [0.0, 0.1, 9.0]])
    predict = lambda batch: Prediction(scores[batch.ids])  # noqa: E731
    evaluation.score(task, [(task, dataset)], predict)
    assert evaluation.scores()["final"] == 0.0
    dataset.among = (0, 1)
    evaluation.score(task, [(task, dataset)], predict)
    assert evaluation.scores()["final"] == 1.0
