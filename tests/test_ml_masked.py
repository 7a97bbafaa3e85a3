"""The masked baseline of multi-label streams: the loss over what is annotated, and what a strange annotation is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_asl import scenes
from test_strategies import begun, learn, make, prepared
from torch.nn.functional import binary_cross_entropy_with_logits
from toy_streams import Toy

from streamcl.data import ArrayDataset, whole
from streamcl.engine import Engine
from streamcl.errors import DataError
from streamcl.stream import Task


def test_the_loss_is_the_binary_cross_entropy_of_the_annotated_columns() -> None:
    run = scenes(make("strategy", "ml_masked", epochs=1, batch=32))
    learn(run, 1)
    task = begun(run)
    batch = prepared(run, whole(task.train))
    logits = run.model(batch)
    expected = binary_cross_entropy_with_logits(logits[:, 2:], batch.target[:, 2:].float())
    torch.testing.assert_close(run.strategy.loss(batch), expected)
    run.strategy.loss(batch).backward()
    assert not run.model.head.weight.grad[:2].any() and bool(run.model.head.weight.grad[2:].any())


def test_it_is_what_plain_fine_tuning_does_bit_for_bit() -> None:
    settings: dict[str, Any] = {"epochs": 2, "batch": 32, "optimizer": {"name": "adam", "lr": 1e-3}, "schedule": "constant"}
    one, other = (scenes(make("strategy", name, **settings)).run() for name in ("ml_masked", "finetune"))
    assert one["matrix"] == other["matrix"] and one["metrics"] == other["metrics"]


def annotated(targets: Any) -> Engine:
    """The strategy on a task with these annotations of its two classes."""
    stream = make("scenario", "multi_label", data=Toy([[1, 0], [0, 1], [1, 1]], target="labels"), increment=2)
    run = Engine(stream, make("strategy", "ml_masked", epochs=1), make("backbone", "mlp", hidden=[4]), make("memory", "faiss"))
    targets = torch.as_tensor(targets)
    data = ArrayDataset({"vector": torch.zeros(len(targets), 1)}, targets, torch.arange(len(targets)) + 40)
    run.strategy.enter_task(Task(0, "the task", data, (0, 1), (0, 1)))
    return run


def test_labels_outside_of_the_vocabulary_are_refused() -> None:
    annotated([[1, -1], [0, 1]])
    for targets, told in (
        ([[1, 0, 1]], "the labels have 3 columns, and 2 classes have arrived"),
        ([[1, 0], [0, 2]], "sample 41 has labels other than 1 .* 0 .* and -1"),
        ([0, 1], "a matrix of labels is needed"),
        ([[0.5, 1.0]], "a matrix of labels is needed"),
    ):
        with pytest.raises(DataError, match=told):
            annotated(targets)
