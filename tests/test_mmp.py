"""MMP: a set of prompts for each case of what is missing, around a frozen transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_strategies import engine, learn, make, prepared
from toy_modalities import batch, every_pattern, held, run_of, transformer

from streamcl.data import whole
from streamcl.errors import ConfigError, DataError
from streamcl.nn.model import Model
from streamcl.nn.prompts import encode
from streamcl.stream import Batch

MISSING = [{"image": 0.35, "audio": 0.35}]


def mmp(**options: Any) -> Any:
    return make("strategy", "mmp", **{"length": 4, "layers": 3, "epochs": 2, "batch": 32, **options})


def prompts_of(**options: Any) -> tuple[Any, Any]:
    backbone = transformer()
    torch.manual_seed(0)
    return backbone, mmp(**options).prompts_for(backbone).eval()


@pytest.mark.parametrize("form", ["input", "attention"])
def test_prompts_of_length_0_are_the_frozen_model_with_the_classifier(form: str) -> None:
    backbone, prompts = prompts_of(length=0, form=form)
    complete, holed = batch(), batch(every_pattern())
    for given in (complete, holed):
        assert torch.equal(encode(backbone, given, prompts), prompts.classifier(backbone(given)))


@pytest.mark.parametrize("form", ["input", "attention"])
def test_the_prompts_of_a_case_change_the_samples_of_that_case_only(form: str) -> None:
    backbone, prompts = prompts_of(form=form)
    holed = batch(every_pattern())
    before = encode(backbone, holed, prompts)
    for case in range(6):
        kept = prompts.cases.detach().clone()
        prompts.cases.data[case] += torch.randn(3, 4, 8)
        changed = ~torch.isclose(encode(backbone, holed, prompts), before).all(dim=1)
        assert changed.nonzero().flatten().tolist() == [case], "the samples are in the order of the cases"
        prompts.cases.data.copy_(kept)


def test_which_prompts_a_sample_has_depends_on_its_pattern_alone() -> None:
    _, prompts = prompts_of()
    prompts.cases.data.normal_()
    here = torch.tensor([[True, True, True], [False, True, True], [True, True, True], [True, True, False]])
    added = prompts.before(1, here)
    assert added is not None and added.values is None
    assert torch.equal(added.tokens, prompts.cases[:, 1][[0, 1, 0, 4]])
    assert prompts.before(3, here) is None


def test_attention_takes_half_of_a_prompt_as_keys_and_half_as_values() -> None:
    _, prompts = prompts_of(form="attention")
    prompts.cases.data.normal_()
    added = prompts.before(0, torch.ones(2, 3, dtype=torch.bool))
    assert added is not None and added.values is not None
    assert torch.equal(added.tokens[1], prompts.cases[0, 0, :2]) and torch.equal(added.values[1], prompts.cases[0, 0, 2:])


def test_they_begin_as_zeros_but_one_row_of_ones_for_each_case() -> None:
    _, prompts = prompts_of()
    assert prompts.cases.shape == (7, 3, 4, 8)
    for case in range(7):
        for layer in range(3):
            assert prompts.cases[case, layer].sum(dim=1).tolist() == [8.0 if row == case % 4 else 0.0 for row in range(4)]
    _, prompts = prompts_of(form="attention")
    assert prompts.cases[1, 0].sum(dim=1).tolist() == [0, 8, 0, 8]


@pytest.mark.parametrize("form", ["input", "attention"])
def test_what_is_frozen_is_bit_equal_after_training_and_the_rest_has_moved(form: str) -> None:
    run = run_of(mmp(form=form, optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0.5}), MISSING)
    before = held(run.model.backbone)
    task = run._next_task()
    assert task is not None
    run._learn(task)
    moved = {name for name, value in run.model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"pool.weight", "pool.bias"}
    prompts: Any = run.model.prompts
    assert prompts.cases.shape[0] == 3
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == {"backbone.pool.weight", "backbone.pool.bias", "prompts.cases", "head.weight", "head.bias"} | {
        f"prompts.classifier.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias")
    }
    count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert count == (64 + 8) + 3 * 3 * 4 * 8 + (8 * 16 + 16) + 2 * 16 + (16 * 10 + 10)


def test_dropout_of_the_frozen_transformer_is_off_while_prompts_learn() -> None:
    run = run_of(mmp(), MISSING, backbone=make("backbone", "multimodal_transformer", width=8, depth=3, heads=2, dropout=0.5))
    run.strategy.training_mode()
    assert not any(module.training for module in run.model.backbone.modules()) and run.model.prompts.training


def test_a_case_that_never_occurs_keeps_its_prompts() -> None:
    run = run_of(mmp(optimizer={"name": "sgd", "lr": 0.1}), [{"audio": 0.5}])
    prompts: Any = run.model.prompts
    before = prompts.cases.detach().clone()
    learn(run, 1)
    moved = (prompts.cases != before).flatten(1).any(dim=1).tolist()
    assert moved == [True, True, False]  # complete, without audio, without image


def test_it_learns_classes_and_predicts_through_its_prompts() -> None:
    run = run_of(mmp(), MISSING)
    (task,) = learn(run, 1)
    given = prepared(run, whole(task.train)[torch.arange(8)])
    run.model.eval()
    with torch.no_grad():
        scores = run.strategy.predict(given).scores
        expected = run.model.head(encode(run.model.backbone, given, run.model.prompts))  # type: ignore[arg-type]
        assert torch.equal(scores, expected) and scores.shape == (8, 10)
        assert torch.equal(run.model.copy()(given), expected), "a copy has its own prompts"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": 4}, r"layers is 4, and the transformer has 3"), ({"form": "attention", "length": 3}, "make it even")],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(mmp(**options), MISSING)


@pytest.mark.parametrize("name", ["mmp", "mplmm", "cmmm"])
def test_a_model_or_a_stream_of_one_modality_is_refused(name: str) -> None:
    options = {"layers": 3} if name == "mmp" else {}
    with pytest.raises(ConfigError, match="the backbone mlp takes no prompts: take multimodal_transformer"):
        engine(make("strategy", name, **options))
    with pytest.raises(ConfigError, match=f"{name} learns what to do where a modality is missing, and the model reads image alone"):
        engine(make("strategy", name, **options), backbone=make("backbone", "multimodal_transformer", width=8, depth=3, heads=2))


@pytest.mark.parametrize("name", ["mmp", "mplmm", "cmmm"])
def test_a_sample_that_has_nothing_of_what_is_read_is_refused_in_training(name: str) -> None:
    run = run_of(make("strategy", name, **({"layers": 3} if name == "mmp" else {})), MISSING)
    raw = Batch({}, None, torch.arange(5, 8), {"image": torch.tensor([True, False, False]), "audio": torch.tensor([True, False, True])})
    with pytest.raises(DataError, match=rf"1 of 3 samples \(id 6 first\) have none of audio, image, and {name} needs one of them"):
        run.strategy.compose(raw)


def test_the_model_s_prompts_are_part_of_its_state() -> None:
    backbone, prompts = prompts_of()
    model, twin = Model(backbone), Model(transformer())
    model.prompts, twin.prompts = prompts, mmp().prompts_for(twin.backbone)
    prompts.cases.data.normal_()
    twin.restore(model.state())
    assert torch.equal(twin.prompts.cases, prompts.cases) and torch.equal(twin.features(batch()), model.features(batch()))


def test_prompts_and_classifier_count_as_memory_from_the_first_task_on_and_an_untrained_transformer_is_told() -> None:
    run = run_of(mmp(epochs=1), missing=MISSING)
    told: list[str] = []
    run.events.warn = told.append  # type: ignore[method-assign]
    learn(run, 1)
    added = sum(value.numel() * value.element_size() for value in run.model.prompts.state_dict().values())
    assert run.memory_per_task[0] >= added > 0
    assert len(told) == 1 and "nothing has trained this one" in told[0]
