"""MPLMM: generated tokens, missing-signal prompts and missing-type prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_strategies import learn, make
from torch.nn.functional import gelu
from toy_modalities import batch, every_pattern, held, run_of, transformer

from streamcl.nn.prompts import encode, presence

MISSING = [{"image": 0.35, "audio": 0.35}]


def mplmm(**options: Any) -> Any:
    return make("strategy", "mplmm", **{"length": 4, "epochs": 2, "batch": 32, **options})


def prompts_of(randomly: bool = True, **options: Any) -> tuple[Any, Any]:
    backbone = transformer()
    torch.manual_seed(1)
    prompts: Any = mplmm(**options).prompts_for(backbone).eval()
    for values in [*prompts.states.values(), *prompts.start.values()] if randomly else []:
        values.data.normal_()
    return backbone, prompts


def embedded(backbone: Any, prompts: Any) -> tuple[Any, Any, Any]:
    given = batch(every_pattern())
    here = presence(given, backbone.reads)
    made = backbone.embed(given, here)
    return here, made, prompts.embed(made, here)


def test_without_its_parts_it_is_the_frozen_model_with_the_residual() -> None:
    backbone, prompts = prompts_of(generate=False, signal=False, missing_type=False)
    features = backbone(batch(every_pattern()))
    assert torch.equal(encode(backbone, batch(every_pattern()), prompts), features + prompts.residual(features))


def test_the_relation_of_a_pattern_is_additive_in_what_is_missing() -> None:
    _, prompts = prompts_of()
    relations, states = prompts.relations(), prompts.states
    full, image, sound, both = relations[0], relations[1], relations[2], relations[3]
    difference = (states["sound"][0] - states["sound"][1]).T @ prompts.maps["sound"]
    torch.testing.assert_close(sound - full, difference)
    torch.testing.assert_close(both - image, difference)
    by_hand = sum(states[name][1].T @ prompts.maps[name] for name in ("image", "sound", "text"))
    torch.testing.assert_close(full, by_hand)


def test_missing_type_prompts_depend_on_the_pattern_alone_and_join_half_way_up() -> None:
    backbone, prompts = prompts_of()
    here = presence(batch(every_pattern()), backbone.reads)
    assert prompts.before(0, here) is None and prompts.before(2, here) is None
    added = prompts.before(1, here)
    assert added is not None and added.tokens.shape == (6, 3 * 4, 8)
    by_hand = torch.cat([prompts.types[m] @ prompts.relations()[4] for m in range(3)])
    torch.testing.assert_close(added.tokens[4], by_hand)
    assert torch.equal(prompts.before(1, here[[4, 4]]).tokens[0], prompts.before(1, here[[4, 0]]).tokens[0])


def test_a_missing_modality_is_generated_from_those_that_are_there() -> None:
    backbone, prompts = prompts_of(signal=False)
    here, made, found = embedded(backbone, prompts)
    assert here[3].tolist() == [False, False, True]  # text alone
    sources = torch.cat([prompts.start["image"], gelu(prompts.bridges["text_image"](made.tokens["text"][3]))])
    mixer = prompts.mixers["image"][3]  # its weights for this pattern; those of the sound's places are not used
    by_hand = gelu(torch.cat([mixer[:, :4], mixer[:, 4 + 8 :]], dim=1) @ sources + prompts.offsets["image"][3])
    torch.testing.assert_close(found.tokens["image"][3], by_hand)
    for place, name in enumerate(backbone.reads):
        assert torch.equal(found.tokens[name][here[:, place]], made.tokens[name][here[:, place]]), "what is there stays"
    assert found.masks["text"][4].all() and torch.equal(found.masks["text"][0], made.masks["text"][0])


def test_nothing_of_what_is_missing_is_read() -> None:
    backbone, prompts = prompts_of()
    before = encode(backbone, batch(every_pattern()), prompts)
    filled = batch(seed=3)
    holed = batch(every_pattern())
    for name in ("image", "sound"):
        there = holed.present[name]  # type: ignore[index]
        filled.inputs[name][there] = holed.inputs[name][there]  # type: ignore[index]
    filled.present = holed.present
    torch.testing.assert_close(encode(backbone, filled, prompts), before)


def test_missing_signals_are_added_by_the_state_of_each_modality() -> None:
    backbone, prompts = prompts_of(generate=False, missing_type=False)
    here, made, found = embedded(backbone, prompts)
    for place, name in enumerate(backbone.reads):
        for row in range(6):
            expected = made.tokens[name][row] + prompts.states[name][int(here[row, place])]
            assert torch.equal(found.tokens[name][row], expected)


def test_missing_type_prompts_train_where_the_release_stands_still() -> None:
    run = run_of(mplmm(optimizer={"name": "sgd", "lr": 0.1}), MISSING)
    before = held(run.model)
    learn(run, 1)
    after = run.model.state_dict()
    names = ("prompts.types", "prompts.maps.image", "prompts.states.audio", "prompts.start.image", "prompts.bridges.audio_image.weight")
    for name in (*names, "prompts.mixers.image", "prompts.residual.0.weight"):
        assert not torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("projections", [True, False])
def test_what_is_frozen_is_bit_equal_after_training(projections: bool) -> None:
    run = run_of(mplmm(projections=projections), MISSING)
    before = held(run.model.backbone)
    learn(run, 1)
    moved = {name.partition(".")[0] for name, value in run.model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == ({"encoders"} if projections else set())


def test_parts_that_are_off_do_not_learn() -> None:
    run = run_of(mplmm(generate=False, missing_type=False, signal=False, projections=False), MISSING)
    assert {n.rpartition(".")[0] for n, p in run.model.named_parameters() if p.requires_grad} == {
        "prompts.residual.0",
        "prompts.residual.3",
        "head",
    }


def test_parameters_are_counted_by_hand() -> None:
    _, prompts = prompts_of()
    lengths = {"image": 16, "sound": 8, "text": 5}
    states = sum(2 * n * 8 for n in lengths.values())
    generation = 3 * 4 * 8 + 6 * (64 + 8) + sum(7 * n * (4 + 29 - n) + 7 * n for n in lengths.values())
    kinds = 3 * 4 * 8 + sum(n * 8 for n in lengths.values())
    assert sum(p.numel() for p in prompts.parameters()) == states + generation + kinds + 2 * (64 + 8)
