"""KRT: what its attention reads and keeps, the pseudo-labels and their threshold by hand, its loss, exemplars, and runs that stop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import comparable, small_run
from test_asl import scenes
from test_resume import stopped_and_resumed
from test_strategies import begun, engine, learn, make, prepared
from torch.nn.functional import cosine_similarity, layer_norm, normalize
from toy_streams import Toy

import streamcl
from streamcl import exporting, running
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError
from streamcl.nn.backbone import Backbone
from streamcl.plugins import find
from streamcl.stream import Batch, Modality, StreamInfo

QUICK: dict[str, Any] = {"epochs": 1, "batch": 32, "dim": 16, "heads": 2, "optimizer": {"name": "adam", "lr": 2e-3}, "schedule": "constant"}
MODULE = find("strategy", "krt").load().__module__


def krt(**options: Any) -> Any:
    return make("strategy", "krt", **{**QUICK, **options})


def after(tasks: int, **options: Any) -> Engine:
    """A run after its first tasks, with the hooks before the next one's training run."""
    run = scenes(krt(**options))
    learn(run, tasks)
    run.task = begun(run)  # type: ignore[attr-defined]
    return run


def module() -> Any:
    import importlib

    return importlib.import_module(MODULE)


# What a backbone gives by place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [("convnet", {"width": 8}), ("resnet18", {"width": 4}), ("resnet32", {})])
def test_the_average_of_the_places_is_the_feature_vector(name: str, options: dict[str, Any]) -> None:
    backbone: Backbone = make("backbone", name, **options)
    backbone.build(StreamInfo({"image": Modality("image", (3, 16, 16), 255)}))
    backbone.eval()
    batch = Batch({"image": torch.rand(4, 3, 16, 16)}, None, torch.arange(4))
    patches = backbone.patches(batch)
    assert patches.dim() == 3 and patches.shape[2] == backbone.dim
    torch.testing.assert_close(patches.mean(dim=1), backbone(batch))


@pytest.mark.parametrize(
    ("name", "places"), [("resnet10t", 4), ("test_vit", 16), ("swin_tiny_patch4_window7_224", 4), ("swinv2_cr_tiny_ns_224", 4)]
)
def test_vision_models_of_timm_give_their_places(name: str, places: int) -> None:
    timm = pytest.importorskip("timm")
    size = 64
    settings = {} if name == "resnet10t" else {"img_size": size}
    if "swin" in name:
        settings |= {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    backbone = make("backbone", "timm", model=name, pretrained=False)
    backbone.net, backbone.reads = timm.create_model(name, num_classes=0, pretrained=False, **settings).eval(), "image"
    batch = Batch({"image": torch.rand(2, 3, size, size)}, None, torch.arange(2))
    patches = backbone.patches(batch)
    assert patches.shape == (2, places, backbone.net.num_features)
    if "vit" not in name:
        torch.testing.assert_close(patches.mean(dim=1), backbone.encode(batch), rtol=1e-4, atol=1e-4)


# Cross-attention --------------------------------------------------------------------------------------------------------------


def test_an_embedding_by_hand() -> None:
    run = scenes(krt())
    learn(run, 2)
    head, batch = run.model.head, prepared(run, whole(run.tasks[0].train)[:3])
    with torch.no_grad():
        for p in head.parameters():
            p += 0.1 * torch.randn(p.shape)
        features = run.model.backbone(batch)
        found = head.embed(features)
        assert found.shape == (3, 2, 16)
        for session in range(2):
            for row in range(3):
                patches = head.project(features[row].view(head.places, -1)) + head.position
                s = torch.cat([head.transfer, head.retention[session], patches])
                normed = layer_norm(s, (16,), head.norm.weight, head.norm.bias)
                parts = []
                for part in (slice(0, 8), slice(8, 16)):  # two heads
                    q = normed[0] @ head.query.weight.T[:, part]
                    k, v = normed @ head.key.weight.T[:, part], normed @ head.value.weight.T[:, part]
                    parts.append((k @ q / math.sqrt(8)).softmax(0) @ v)
                u = head.transfer[0] + head.out(torch.cat(parts))
                e = u + head.mlp(layer_norm(u, (16,), head.norm_mlp.weight, head.norm_mlp.bias))
                torch.testing.assert_close(found[row, session], e, rtol=1e-4, atol=1e-5)
        logits = head(features)
        scores = [head.sessions[session](found[:, session]) for session in range(2)]
        torch.testing.assert_close(logits, torch.cat(scores, dim=1))
        torch.testing.assert_close(run.model(batch), logits)


def test_a_new_session_leaves_the_embeddings_and_scores_of_the_others_bit_for_bit() -> None:
    run = scenes(krt())
    learn(run, 2)
    run.model.eval()
    batch = prepared(run, whole(run.tasks[0].train)[:40])
    with torch.no_grad():
        features = run.model.backbone(batch)
        embeddings, scores = run.model.head.embed(features), run.model.head(features)
        run.model.grow(6)
        assert torch.equal(run.model.head.embed(features)[:, :2], embeddings) and torch.equal(run.model.head(features)[:, :4], scores)
    assert run.model.head.sizes == [2, 2, 2]


def test_the_tokens_and_heads_of_old_sessions_stay_as_they_are_and_all_else_learns() -> None:
    run = after(2)
    head, strategy, task = run.model.head, run.strategy, run.task
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    strategy.fit(task, strategy.training_data(task))
    old = ("retention.0", "retention.1", "sessions.0", "sessions.1")
    for name, value in run.model.named_parameters():
        frozen = name.removeprefix("head.").startswith(old)
        assert torch.equal(value, before[name]) == frozen, name
    strategy.training_mode()
    assert [session.training for session in head.sessions] == [False, False, True] and head.training


# Pseudo-labels ----------------------------------------------------------------------------------------------------------------


def test_the_teacher_says_which_old_classes_are_there_and_annotations_stay() -> None:
    run = after(2)
    run.strategy.eta = 0.6
    target = torch.tensor([[-1, -1, -1, -1, 1, 0], [-1, 1, 0, -1, -1, 1]], dtype=torch.int8)
    old = torch.tensor([[0.61, 0.6, 0.1, 0.99], [0.2, 0.1, 0.9, 0.7]])
    assert run.strategy.restored(target, old).tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 0, 1, -1, 1]]
    run.strategy.eta = None
    assert torch.equal(run.strategy.restored(target, old), target)


def test_the_threshold_is_stepped_to_the_number_of_labels_that_a_sample_should_have() -> None:
    """By the loop of the paper, one step of 0.005 at a time, on the teacher's own probabilities."""
    for cardinality in (1.0, 2.5, 4.0):
        run = scenes(krt(cardinality=cardinality))
        learn(run, 1)
        with torch.no_grad():  # probabilities of every size, far from each other
            batch = prepared(run, whole(run.scenario.task(1).train))
            last = run.model.eval().head.sessions[0][1]
            scores = run.model(batch)
            last.weight *= 3 / scores.std(0)[:, None]
            last.bias.copy_((last.bias - scores.mean(0)) * 3 / scores.std(0))
        strategy, task = run.strategy, begun(run)
        with torch.no_grad():
            p = strategy.teacher(prepared(run, whole(task.train))).double().sigmoid()
        assert p.shape[1] == 2
        wanted, eta = cardinality * 2 / 10, 0.8
        for _ in range(100):
            m = (p > eta).sum(dim=1).double().mean().item()
            if abs(m - wanted) <= 0.1:
                break
            eta = min(eta + 0.005, 0.999999) if m > wanted else max(eta - 0.005, 1e-4)
        assert abs((p > eta).sum(dim=1).double().mean().item() - wanted) <= 0.1
        assert strategy.eta == pytest.approx(eta, abs=1e-9)


def test_half_precision_labels_what_the_threshold_was_tuned_on() -> None:
    """0.9985 is 1 in bfloat16, and so is every probability above it: the comparison is made in double precision."""
    run = after(2, threshold=0.9985)
    with torch.no_grad():
        for session in run.strategy.teacher.head.sessions:
            session[1].bias += 8
    batch = prepared(run, whole(run.task.train))
    seen: list[torch.Tensor] = []
    run.strategy.criterion = lambda logits, target: seen.append(target) or logits.sum()  # type: ignore[func-returns-value]
    run.context.precision = "bfloat16"
    with run.context.autocast():
        run.strategy.loss(batch)
        with torch.no_grad():
            p = run.strategy.teacher(batch).double().sigmoid()
    assert torch.equal(seen[0][:, :4] == 1, p > 0.9985) and bool((p > 0.9985).any())


def test_a_prior_that_no_threshold_meets_is_told_and_the_nearest_one_kept() -> None:
    settle = module().settle
    rising = [1.0 - 0.004 * place for place in range(201)]  # m at each candidate
    assert settle(rising, 100, 0.65) == (100, True)
    assert settle(rising, 100, 0.801) == (74, True) and settle(rising, 100, 0.401) == (125, True)
    assert settle(rising, 100, 5.0) == (0, False)
    assert settle([0.9] * 101 + [0.1] * 100, 100, 0.45) == (101, False)  # it jumps to and fro
    run = scenes(krt(cardinality=10.0))
    warnings: list[str] = []
    run.events.warn = warnings.append  # type: ignore[method-assign]
    learn(run, 1)
    with torch.no_grad():
        run.model.head.sessions[0][1].bias -= 30
    begun(run)
    assert len(warnings) == 1 and "gives 2.00 old classes per sample" in warnings[0] and "set strategy.cardinality" in warnings[0]


def test_the_chance_of_a_class_from_samples_that_carry_one_at_least() -> None:
    chance = module().chance_of_a_class
    targets = torch.tensor([[1, 0], [0, 1], [1, 1], [1, 0], [0, 0]])
    assert chance(targets, 2) == pytest.approx(2 - 2 / 1.25)  # of two classes the equation can be solved by hand
    drawn = (torch.rand(20000, 6, generator=torch.Generator().manual_seed(0)) < 0.2).long()
    assert chance(drawn[drawn.any(dim=1)], 6) == pytest.approx(0.2, abs=0.01)
    with pytest.raises(ConfigError, match=r"brings one class.*set strategy.cardinality"):
        chance(targets[:, :1], 1)
    with pytest.raises(ConfigError, match=r"no sample of the first task has two labels.*set strategy.cardinality"):
        chance(torch.eye(3), 3)


def test_the_prior_is_the_chance_or_what_is_given() -> None:
    given = after(1, cardinality=2.5)
    assert given.strategy.chance == 0.25
    told = after(1)
    data = told.tasks[0].train.targets
    assert told.strategy.chance == module().chance_of_a_class(data, 2) and 0.05 < told.strategy.chance < 0.3


# The loss ---------------------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    run = after(2, token_weight=30.0)
    strategy, task = run.strategy, run.task
    with torch.no_grad():
        for p in run.model.parameters():
            p += 0.05 * torch.randn(p.shape)
    run.model.eval()
    batch = prepared(run, whole(task.train)[:20])
    with torch.no_grad():
        head, teacher = run.model.head, strategy.teacher
        new = head.embed(run.model.backbone(batch))[:, :2].flatten(1)
        old = teacher.head.embed(teacher.backbone(batch)).flatten(1)
        target = strategy.restored(batch.target, teacher(batch).sigmoid())
        expected = make("term", "asl").criterion(run.model(batch), target)
        expected += 30 * math.sqrt(6 / 2) * (1 - cosine_similarity(new, old)).mean()
        assert set(target.unique().tolist()) == {0, 1}
    torch.testing.assert_close(strategy.loss(batch), expected)


def test_where_student_and_teacher_agree_there_is_no_token_loss() -> None:
    run, other = after(2), after(2, token_weight=0.0)
    batch = prepared(run, whole(run.task.train)[:20])
    for engine_ in (run, other):
        engine_.model.eval()
        engine_.strategy.eta = 0.7
    drift = run.strategy.loss(batch) - other.strategy.criterion(
        run.model(batch), run.strategy.restored(batch.target, run.strategy.teacher(batch).sigmoid())
    )
    assert abs(drift.item()) < 1e-3  # 100 x sqrt(3) x a rounding error


def test_the_first_task_is_plain_training_with_asl() -> None:
    runs = []
    for name, options in SAME.items():
        runs.append(scenes(make("strategy", name, **options)))
        learn(runs[-1], 1)
    mine, theirs = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


SHARED: dict[str, Any] = {"epochs": 2, "batch": 32, "optimizer": {"name": "adam", "lr": 2e-3}}
SAME: dict[str, dict[str, Any]] = {
    "krt": {**SHARED, "attention": False},
    "ml_masked": {**SHARED, "with_": (make("term", "asl"),)},
}


def test_without_pseudo_labels_and_attention_it_is_the_masked_baseline() -> None:
    one = scenes(make("strategy", "krt", threshold=None, **SAME["krt"])).run()
    other = scenes(make("strategy", "ml_masked", **SHARED, with_=(make("term", "asl"),))).run()
    assert one["matrix"] == other["matrix"]


def test_matrices_decay_and_vectors_do_not() -> None:
    strategy = after(1, optimizer={"name": "adam", "lr": 1e-3, "weight_decay": 0.1}).strategy
    decayed, free = strategy.parameter_groups()
    assert all(p.dim() > 1 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"]) and free["weight_decay"] == 0
    known = {id(p) for group in (decayed, free) for p in group["params"]}
    assert {id(p) for p in strategy.model.parameters() if p.requires_grad} == known


# Exemplars --------------------------------------------------------------------------------------------------------------------


def test_exemplars_are_herded_for_each_class_by_features_of_length_one() -> None:
    run = scenes(krt(replay_labels="original", attention=False, epochs=2), exemplars=20)
    learn(run, 1)
    exemplars, task = run.memory.exemplars, run.tasks[0]
    rows = (task.train.targets[:, 0] == 1).nonzero().squeeze(1)
    features = normalize(run.context.features(task.train), dim=1)[rows]
    chosen: list[int] = []
    for count in range(1, 11):  # by hand: the sample that brings the running mean nearest to the mean
        sums = features[chosen].sum(0) + features
        distance = (features.mean(0) - sums / count).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
    held = set(exemplars.dataset().ids.tolist())
    assert len(held) == 20 and set(task.train.ids[rows[chosen]].tolist()) <= held


def test_original_labels_are_those_of_their_own_task_and_widened_ones_the_truth() -> None:
    for mode in ("original", "widened"):
        run = scenes(krt(replay_labels=mode), exemplars=30)
        learn(run, 3)
        source = run.scenario.data.load()
        truth = dict(zip(source.train.ids.tolist(), source.train.targets.tolist(), strict=True))
        names = [int(run.tasks[-1].names[label]) for label in range(6)]
        data, own = run.strategy.rehearsed(), run.memory.exemplars
        arrived = {int(i): int(task) for i, task in zip(own.held.ids, own.aside["arrived"], strict=True)}
        for identity, labels in zip(data.ids.tolist(), data.targets.tolist(), strict=True):
            said = [truth[identity][name] for name in names]
            first = 2 * arrived[identity]
            since = range(first, 6) if mode == "widened" else range(first, first + 2)
            assert labels == [label if column in since else -1 for column, label in enumerate(said)]
        batch = whole(run.strategy.training_data(run._next_task()))
        assert len(batch) == len(run.tasks[3].train) + 30
        assert batch.target.shape[1] == 8


# Runs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"attention": False, "threshold": 0.8}, {"replay_labels": "widened"}])
def test_a_run_that_stops_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run("krt", strategy=options)
    uncut = running.run(config, out=tmp_path / "whole")
    for stop in (9, 13, 20):
        assert comparable(stopped_and_resumed(config, tmp_path / str(stop), monkeypatch, stop)) == comparable(uncut)


def test_the_run_and_its_export_answer_the_same(tmp_path: Path) -> None:
    running.run(small_run("krt", log=[]), out=tmp_path / "run")
    exported = streamcl.load(exporting.export(tmp_path / "run", tmp_path / "model"), device="cpu")
    assert exported.model.head.sizes == [2, 2, 2, 2, 2]
    pictures = np.random.default_rng(0).integers(0, 256, (9, 1, 8, 8), dtype=np.uint8)
    assert torch.equal(exported.scores(pictures), streamcl.load(tmp_path / "run").scores(pictures))
    assert "`head.*` is a head of krt's own" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


def test_growth_counts_as_memory_and_nothing_else_stays_between_tasks() -> None:
    run = scenes(krt())
    scores = run.run()
    session = 16 + 2 * 16 + 2 * 16 + 2  # a token, a LayerNorm, and a head of two classes
    assert [b - a for a, b in zip([0, *run.memory_per_task], run.memory_per_task, strict=False)][1:] == [4 * session] * 4
    assert scores["parameters"] == sum(p.numel() for p in run.model.parameters()) and run.strategy.teacher is None


# Refusals ---------------------------------------------------------------------------------------------------------------------


def test_what_it_cannot_serve_is_refused_with_what_to_change() -> None:
    with pytest.raises(ConfigError, match="learns labels, and the target of this stream is class: take another strategy"):
        engine(krt())
    with pytest.raises(ConfigError, match=r"mlp gives no features of single places: take convnet.*or set strategy.attention=false"):
        vectors = make("scenario", "multi_label", data=Toy([[1, 0], [0, 1], [1, 1]], target="labels"), increment=1)
        Engine(vectors, krt(), make("backbone", "mlp", hidden=[4]), make("memory", "faiss"))
    with pytest.raises(ConfigError, match=r"set scenario.online=false"):
        scenes(krt(), online=True)
    with pytest.raises(ConfigError, match="cardinality is 11 labels per sample, and the stream has 10 classes"):
        scenes(krt(cardinality=11.0))
    with pytest.raises(ConfigError, match="this one is fixed: leave it out"):
        krt(cardinality=2.0, threshold=0.8)
    with pytest.raises(ConfigError, match="must be a multiple"):
        krt(dim=10, heads=4)
    with pytest.raises(ConfigError, match="set replay_labels only"):
        krt(replay=8)
