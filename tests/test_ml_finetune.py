"""The naive baseline of multi-label streams: what is not annotated is taken for absent."""

from __future__ import annotations

import pytest
import torch
from test_asl import scenes
from test_strategies import begun, engine, learn, make, prepared
from torch.nn.functional import binary_cross_entropy_with_logits

from streamcl.data import whole
from streamcl.errors import ConfigError


def test_old_classes_are_taught_to_be_absent() -> None:
    run = scenes(make("strategy", "ml_finetune", epochs=1, batch=32))
    learn(run, 1)
    task = begun(run)
    batch = prepared(run, whole(task.train))
    assert bool((batch.target[:, :2] == -1).all())
    logits = run.model(batch)
    target = torch.cat([torch.zeros(len(batch), 2), batch.target[:, 2:].float()], dim=1)
    torch.testing.assert_close(run.strategy.loss(batch), binary_cross_entropy_with_logits(logits, target))


def test_in_the_first_task_it_is_fine_tuning_over_what_is_annotated_bit_for_bit() -> None:
    models = []
    for name in ("ml_finetune", "ml_masked"):
        run = scenes(make("strategy", name, epochs=2, batch=32, optimizer={"name": "adam", "lr": 1e-3}))
        learn(run, 1)
        models.append(run.model.state_dict())
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_replayed_samples_may_be_narrower_than_the_classes_seen() -> None:
    run = scenes(make("strategy", "ml_finetune", epochs=1, batch=32, replay=16))
    learn(run, 2)
    assert len(run.memory.exemplars) == 60


def test_a_stream_of_single_classes_is_refused() -> None:
    for name in ("ml_finetune", "ml_masked", "ml_joint"):
        with pytest.raises(ConfigError, match="learns labels, and the target of this stream is class: take another strategy"):
            engine(make("strategy", name, epochs=1))
