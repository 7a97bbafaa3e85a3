"""MEMO: a network that grows by one block for each task, and the contract for such networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import comparable, small_run
from test_resume import stopped_and_resumed
from test_strategies import begun, engine, learn, make, prepared
from torch.nn.functional import cross_entropy

from streamcl import exporting, running
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone
from streamcl.nn.expandable import Expandable
from streamcl.nn.model import Model
from streamcl.stream import Batch, Modality, StreamInfo

BACKBONES: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [24, 16]},
    "convnet": {"width": 8, "blocks": 3},
    "resnet18": {"width": 4},
    "resnet32": {},
}
IMAGES = StreamInfo({"image": Modality("image", (3, 8, 8), 255)})


def memo(**options: Any) -> Any:
    return make("strategy", "memo", **{"epochs": 2, "batch": 64, "optimizer": {"lr": 0.05}, "schedule": "constant", **options})


def grown(**options: Any) -> Engine:
    return engine(memo(**options), backbone=make("backbone", "mlp", hidden=[24, 16]))


def built(name: str, **options: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = make("backbone", name, **options)
    backbone.build(IMAGES)
    return backbone


def pictures() -> Batch:
    return Batch({"image": torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))}, None, torch.arange(5))


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# The network --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BACKBONES))
def test_one_block_is_the_backbone_that_it_was_made_from_bit_for_bit(name: str) -> None:
    one, other = built(name, **BACKBONES[name]), Expandable(built(name, **BACKBONES[name]))
    for mode in (True, False):
        assert torch.equal(one.train(mode)(pictures()), other.train(mode)(pictures()))
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_new_block_begins_as_a_copy_of_the_newest_which_stays_as_it_is(name: str) -> None:
    network = Expandable(built(name, **BACKBONES[name]))
    network.resize(2 * network.block)
    network.eval()
    first, second = network(pictures()).split(network.block, dim=1)
    assert torch.equal(first, second)
    network.train()
    assert not any(module.training for module in network.special[0].modules()) and network.special[1].training
    assert not any(p.requires_grad for p in network.special[0].parameters())
    assert all(p.requires_grad for p in network.special[1].parameters())


def test_resnet32_has_the_papers_parts_and_they_weigh_what_it_says() -> None:
    general, special = built("resnet32").split()
    sizes = [sum(p.numel() for p in part.parameters()) for part in (general, special)]
    assert sizes == [112_016, 351_488] and sum(sizes) == 463_504
    image, whole_network = 3 * 32 * 32, 4 * 463_504
    assert round(whole_network / image, 2) == 603.52
    budget = 10 * whole_network + 2000 * image  # where DER ends after ten tasks with 2000 exemplars
    assert round(budget / 2**20, 2) == 23.54
    assert (budget - whole_network) // image == 7431
    assert (budget - 4 * (112_016 + 10 * 351_488)) // image == 3312
    assert round((4 * (112_016 + 10 * 351_488) + 2000 * image) / 2**20, 2) == 19.69


def test_resnet32_grows_by_one_stage_and_the_head_for_each_task() -> None:
    run = engine(memo(epochs=1), backbone=make("backbone", "resnet32"), tasks=5)
    counts = []
    for _ in range(2):
        learn(run, 1)
        counts.append(sum(p.numel() for p in run.model.parameters()))
    assert counts[0] == 463_504 - 2 * 16 * 9 + 2 * 64 + 2  # digits have one channel
    assert counts[1] - counts[0] == 351_488 + (4 * 128 + 4) - (2 * 64 + 2)
    statistics = 10 * (1 + 2 * 64) * 4 + 10 * 4  # of the ten normalisations of a stage; the count of batches is of 8 bytes
    added = run.memory_per_task[1] - run.memory.nbytes()
    assert abs(added - 4 * (counts[1] - counts[0]) - statistics) < 100


def test_a_backbone_that_does_not_say_how_it_is_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backbone identity does not say how it is split .* resnet32, resnet18, convnet or mlp"):
        engine(memo(), backbone=make("backbone", "identity"))


# Learning -----------------------------------------------------------------------------------------------------------------------


def test_the_first_task_is_learned_as_fine_tuning_does() -> None:
    options = {"epochs": 2, "batch": 64, "optimizer": {"lr": 0.05}, "schedule": "constant"}
    plain = engine(make("strategy", "finetune", **options), backbone=make("backbone", "mlp", hidden=[24, 16]))
    learn(plain, 1)
    run = grown()
    (task,) = learn(run, 1)
    batch = prepared(run, whole(task.train))
    assert torch.equal(run.model(batch), plain.model(batch))


@pytest.mark.parametrize("train_base", [True, False])
def test_blocks_of_earlier_tasks_never_change(train_base: bool) -> None:
    run = engine(memo(train_base=train_base), backbone=make("backbone", "convnet", width=8, blocks=2))
    (task,) = learn(run, 1)
    batch, network = prepared(run, whole(task.train)[torch.arange(40)]), run.strategy.network
    for tasks in range(2, 5):
        run.model.eval()
        before, blocks, base = network(batch), [tensors(block) for block in network.special], tensors(network.general)
        learn(run, 1)
        assert len(network.special) == tasks and network.dim == 8 * tasks
        assert all(same(tensors(block), old) for block, old in zip(network.special, blocks, strict=False))
        assert same(tensors(network.general), base) != train_base
        assert torch.equal(network(batch)[:, : before.shape[1]], before) != train_base
        assert not same(tensors(network.special[-1]), blocks[-1])


def test_the_head_keeps_what_it_had_when_it_grows() -> None:
    run = grown()
    learn(run, 2)
    weight, bias = run.model.head.weight.detach().clone(), run.model.head.bias.detach().clone()
    begun(run)
    head = run.model.head
    assert head.weight.shape == (6, 48) and head.bias.shape == (6,) and head.dim == 48
    assert torch.equal(head.weight[:4, :32], weight) and torch.equal(head.bias[:4], bias)
    assert (head.weight[:, 32:].abs() <= 48**-0.5).all() and (head.weight[4:].abs() <= 48**-0.5).all()
    assert (head.weight[4:] != 0).all() and (head.weight[:, 32:] != 0).all()


@pytest.mark.parametrize("auxiliary", [0.0, 0.7])
def test_the_second_head_tells_new_classes_apart_and_all_old_ones_from_them(auxiliary: float) -> None:
    run = grown(auxiliary=auxiliary)
    learn(run, 2)
    task = begun(run)
    strategy = run.strategy
    data = strategy.training_data(task)
    rows = torch.tensor([0, 1, 2, len(data) - 1, len(data) - 30, len(data) - 50])  # new ones, and exemplars of old classes
    batch = prepared(run, data[rows])
    assert len(data) == len(task.train) + len(run.memory.exemplars) and (batch.target[3:] < 4).all()
    features = run.model.features(batch)
    among = torch.tensor([0 if label < 4 else label - 3 for label in batch.target.tolist()])
    second = strategy.second(features[:, 32:])
    assert second.shape == (6, 3)
    by_hand = cross_entropy(run.model.head(features), batch.target) + auxiliary * cross_entropy(second, among)
    torch.testing.assert_close(strategy.loss(batch), by_hand)


def test_weight_aligning_makes_new_rows_as_long_as_old_ones() -> None:
    run = grown()
    learn(run, 1)
    begun(run)
    head = run.model.head
    head.weight.data = torch.zeros(4, 32)
    head.weight.data[0, :2] = torch.tensor([3.0, 4.0])  # 5 long
    head.weight.data[1, 20] = 1.0  # the old ones are 3 long in the mean
    head.weight.data[2, 31] = 8.0
    head.weight.data[3, 0] = 4.0  # and the new ones 6
    old, bias = head.weight[:2].clone(), head.bias.clone()
    run.strategy.align()
    assert torch.equal(head.weight[:2], old) and torch.equal(head.bias, bias)
    assert head.weight[2, 31] == 4.0 and head.weight[3, 0] == 2.0


def test_the_second_head_is_gone_after_its_task_and_a_task_without_a_new_class_adds_no_block() -> None:
    run = engine(memo(), backbone=make("backbone", "mlp", hidden=[24, 16]))
    learned = learn(run, 2)
    assert run.strategy.second is None
    run._next_task = lambda: task  # type: ignore[method-assign]
    task = learned[0]
    task.index, task.classes, task.seen = 2, [], learned[1].seen
    newest = tensors(run.strategy.network.special[-1])
    learn(run, 1)
    assert len(run.strategy.network.special) == 2 and run.model.head.weight.shape == (4, 32)
    assert not same(tensors(run.strategy.network.special[-1]), newest)


def test_a_stream_that_can_be_read_once_or_has_no_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads a task again"):
        engine(memo(epochs=1), online=True)


# The contract for networks that grow --------------------------------------------------------------------------------------------


def test_a_saved_model_that_grew_is_rebuilt_at_its_size_and_so_is_a_smaller_one() -> None:
    run = grown()
    learn(run, 1)
    teacher = run.model.copy()
    small = teacher.state()
    learn(run, 2)
    large = run.model.state()
    batch = prepared(run, whole(run.tasks[0].train))
    fresh = Model(Expandable(built_for(run)))
    fresh.restore(large)
    fresh.eval()
    assert torch.equal(fresh(batch), run.model(batch)) and fresh.backbone.dim == 48
    shrunk = run.model.copy()  # what a term does whose teacher was saved before the network grew
    shrunk.restore(small)
    assert torch.equal(shrunk(batch), teacher(batch))


def built_for(run: Engine) -> Backbone:
    backbone = make("backbone", "mlp", hidden=[24, 16])
    backbone.build(run.info)
    return backbone


def test_a_network_that_does_not_grow_refuses_the_tensors_of_one_that_did() -> None:
    run = grown()
    learn(run, 2)
    with pytest.raises(ValueError, match=r"its features have 16 entries, and those of the saved model 32"):
        Model(built_for(run)).restore(run.model.state())


def test_a_term_with_a_teacher_of_the_smaller_network_survives_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("memo", model={"backbone": {"name": "mlp", "hidden": [24, 16]}}, strategy={"epochs": 2, "with": ["lwf"]}, log=[])
    expected = running.run(config, out=tmp_path / "whole")
    for stop in (7, 12, 18):
        assert comparable(stopped_and_resumed(config, tmp_path / str(stop), monkeypatch, stop)) == comparable(expected)


def test_a_network_that_grew_is_loaded_and_exported(tmp_path: Path) -> None:
    config = small_run("memo", model={"backbone": {"name": "convnet", "width": 8, "blocks": 2}}, strategy={"epochs": 1}, log=[])
    running.run(config, out=tmp_path / "run")
    learned = running.load(tmp_path / "run")
    exported = running.load(exporting.export(tmp_path / "run", tmp_path / "model"))
    inputs = np.random.default_rng(0).integers(0, 17, (20, 1, 8, 8)).astype(np.uint8)
    assert learned.model.backbone.dim == exported.model.backbone.dim == 40
    assert torch.equal(learned.scores(inputs), exported.scores(inputs))


def test_a_run_cannot_start_from_a_network_that_grew(tmp_path: Path) -> None:
    config = small_run("memo", strategy={"epochs": 1}, log=[])
    running.run(config, out=tmp_path / "run")
    with pytest.raises(ConfigError, match="grew"):
        running.run(small_run("finetune", model={"backbone": None, "run": str(tmp_path / "run")}, log=[]), out=tmp_path / "next")
