"""CASP: its contrast against a double loop, the choice of stable samples, and what two stages on a window change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from streamcl.strategies.test_time.casp import Casp, dropping, nt_xent, selected, without
from test_joint_transformer import NAMES, around, assert_exact, changed, deployed, served, weights
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from toy_shadow import shadow, statistics_of_one_pass

from streamcl.errors import ConfigError

SHORT: dict[str, Any] = {"window": 24, "batch": 6, "contrast_epochs": 4, "snapshots": 2, "label_epochs": 2}


def casp(dropout: float = 0.1, **options: Any) -> Any:
    names = options.pop("modalities", None)
    return deployed(Casp(**{**SHORT, **options}), target="value", modalities=names, dropout=dropout)


def predicted(strategy: Any, batch: Any) -> Tensor:
    return strategy.predict(batch).scores


def test_nt_xent_is_the_double_loop_over_the_views() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(5, 7, generator=draw), torch.randn(5, 7, generator=draw)
    views, total = torch.cat([one, other]), 0.0
    for i in range(10):
        j = (i + 5) % 10
        over = sum(math.exp(float(cosine_similarity(views[i], views[k], dim=0)) / 0.5) for k in range(10) if k != i)
        total -= math.log(math.exp(float(cosine_similarity(views[i], views[j], dim=0)) / 0.5) / over)
    assert float(nt_xent(one, other, 0.5)) == pytest.approx(total / 10, abs=1e-5)


def test_nt_xent_of_views_that_have_nothing_to_do_with_each_other_is_about_log_2b_minus_1() -> None:
    draw = torch.Generator().manual_seed(0)
    value = nt_xent(torch.randn(24, 4096, generator=draw), torch.randn(24, 4096, generator=draw), 0.5)
    assert float(value) == pytest.approx(math.log(47), abs=0.02)


def test_stable_are_those_whose_predictions_hardly_move() -> None:
    told = torch.zeros(4, 20, 1)
    assert selected(told, "stable", 0.95).all(), "nothing moves"
    told[1, 3], told[2, 7] = 9.0, -5.0  # two that jump there and back
    told[:, 5, 0] = torch.tensor([0.0, 0.1, 0.2, 0.3])
    assert set((~selected(told, "stable", 0.90)).nonzero().flatten().tolist()) == {3, 7}
    assert selected(told, "unstable", 0.90).nonzero().flatten().tolist() == [3, 7], "as released"
    assert selected(told, "all", 0.0).all() and selected(told[:1], "stable", 0.0).all()


def test_a_modality_is_taken_from_all_that_have_another() -> None:
    given = served(present={"image": [1, 0, 1, 1, 1, 1], "sound": [1, 1, 0, 1, 1, 1], "text": [1, 1, 0, 1, 1, 1]})
    left = without(given, "image")
    assert left.present["image"].tolist() == [False, False, True, False, False, False]
    assert left.inputs["image"][2].equal(given.inputs["image"][2]) and not left.inputs["image"][[0, 1, 3, 4, 5]].any()
    assert left.inputs["sound"] is given.inputs["sound"] and given.present["image"].tolist() == [True, False, True, True, True, True]  # type: ignore[index]
    assert without(served(), "text").inputs["text"] == [""] * 6
    assert not torch.isnan(left.inputs["image"]).any()


def test_dropout_is_on_in_the_contrast_alone_and_uses_up_no_other_random_number() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(50)).eval(), torch.ones(4, 50)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with dropping(model, 1, torch.device("cpu")):
        one = model(x)
        assert not model[1].training and float((one == 0).double().mean()) == pytest.approx(0.5, abs=0.2)
    with dropping(model, 1, torch.device("cpu")):
        assert torch.equal(model(x), one)
    assert torch.equal(torch.rand(1), expected) and not model[0].training and torch.equal(model(x), model(x))


def test_only_norms_inside_of_layers_change() -> None:
    strategy = casp()
    before = weights(strategy)
    strategy.adapt(served(size=24))
    touched = changed(strategy, before)
    assert touched and all(".first." in name or ".second." in name for name in touched) and "backbone.norm.weight" not in strategy.adapted
    assert "backbone.norm.weight" in casp(norms="all").adapted


def test_a_window_is_answered_as_before_it_and_serves_afterwards() -> None:
    strategy, window = casp(), served(size=24)
    assert strategy.window == 24
    before = predicted(strategy, window)
    told = strategy.adapt(window)
    assert torch.equal(told.scores, before) and told.made == "before" and told.scores.shape == (24, 1)
    after = predicted(strategy, window)
    assert not torch.equal(after, before)
    assert torch.equal(casp(answer="after").adapt(window).scores, after)


def test_the_contrast_brings_the_views_together() -> None:
    strategy, window = casp(dropout=0.0, label_epochs=0, contrast_epochs=12, optimizer={"name": "adam", "lr": 1e-2}), served(size=24)

    def apart() -> float:
        with torch.no_grad():
            whole = strategy.model.both(window)[1]
            return sum(float(nt_xent(whole, strategy.model.both(without(window, name))[1], 0.5)) for name in NAMES) / 3

    begun = apart()
    strategy.adapt(window)
    assert apart() < begun - 0.02


def test_the_labels_are_the_means_of_the_snapshots_of_what_is_kept() -> None:
    """With no contrast there is one snapshot: the labels are the predictions, and there is nothing to learn."""
    still = casp(contrast_epochs=0, clip=None)
    before = predicted(still, served(size=24))
    still.adapt(served(size=24))
    torch.testing.assert_close(predicted(still, served(size=24)), before, atol=2e-2, rtol=0)

    seen: dict[str, Any] = {"told": []}

    class Watched(Casp):
        def _predicted(self, batch: Any) -> Tensor:
            seen["told"].append(super()._predicted(batch))
            return seen["told"][-1]

        def _error(self, batch: Any) -> Tensor:
            seen.setdefault("labels", {}).update(zip(batch.ids.tolist(), batch.extra["label"].flatten().tolist(), strict=True))
            return super()._error(batch)

    strategy = deployed(Watched(**{**SHORT, "quantile": 0.5}), target="value", dropout=0.1)
    strategy.adapt(served(size=24))
    told = torch.stack(seen["told"])  # before, and after epochs 2 and 4
    assert told.shape == (3, 24, 1) and torch.equal(told[0], before)
    moved = told.diff(dim=0).abs().mean(dim=(0, 2))
    kept = (moved <= moved.median()).nonzero().flatten().tolist()
    assert strategy.counts["kept"] == len(seen["labels"]) == 12 and set(seen["labels"]) <= set(kept) | {int(moved.argsort()[12])}
    mean = told.mean(dim=0).flatten()
    assert all(label == pytest.approx(float(mean[number])) for number, label in seen["labels"].items())


def test_the_second_stage_moves_the_predictions_towards_the_labels() -> None:
    strategy = casp(label_epochs=8, contrast_epochs=0)
    window = served(size=24)
    window.extra["label"] = predicted(strategy, window) + 0.3
    strategy._begin_stage()

    def error() -> float:
        with torch.no_grad():
            return float(strategy._error(window))

    assert error() == pytest.approx(0.3, abs=1e-5)
    with torch.enable_grad():
        for _ in range(15):
            strategy._epoch(window, strategy._error)
    assert error() < 0.15


def test_gradients_are_clipped() -> None:
    moves = {}
    for clip in (None, 1e-3):
        strategy = casp(clip=clip, optimizer={"name": "sgd", "lr": 1.0}, contrast_epochs=1, label_epochs=0, batch=24)
        strategy.adapt(served(size=24))
        moves[clip] = float(sum((value.data - strategy.source[name]).square().sum() for name, value in strategy.adapted.items()) ** 0.5)
    assert moves[1e-3] == pytest.approx(1e-3, rel=1e-2) and moves[None] > 1e-2


def test_a_window_that_cannot_be_finished_leaves_the_weights_as_they_were() -> None:
    strategy = casp()
    strategy.adapt(served(1, size=24))
    before = weights(strategy)

    def fails(batch: Any) -> Tensor:
        raise KeyboardInterrupt

    strategy._error = fails
    with pytest.raises(KeyboardInterrupt):
        strategy.adapt(served(size=24))
    assert not changed(strategy, before)
    del strategy._error
    assert strategy.adapt(served(size=24)).scores.isfinite().all()


def test_numbers_that_are_none_are_not_learned_from() -> None:
    strategy, window = casp(), served(size=24)
    window.inputs["image"][:] = math.nan  # type: ignore[call-overload]
    before = weights(strategy)
    strategy.adapt(window)
    assert not changed(strategy, before) and strategy.counts.get("updates", 0) == 0 and strategy.counts["not_finite"] > 0


def test_each_window_adapts_on_or_begins_at_the_source() -> None:
    on, anew = casp(), casp(begin="source")
    for seed in (1, 2):
        on.adapt(served(seed, size=24)), anew.adapt(served(seed, size=24))
    fresh = casp(begin="source")
    fresh.context.generator.set_state(anew._random)
    fresh.adapt(served(1, size=24)), fresh.reset()
    assert not torch.equal(predicted(on, served()), predicted(anew, served()))
    served_by = predicted(anew, served(3, size=24))
    assert torch.equal(anew.adapt(served(3, size=24)).scores, served_by), "it answers by what the window before it has left"


def test_windows_of_any_size_and_incomplete_samples() -> None:
    strategy = casp()
    for size in (1, 2, 7, 25):
        assert strategy.adapt(served(size=size)).scores.shape == (size, 1)
    assert strategy.counts["skipped"] == 1
    holed = served(present={"image": [1, 0, 1, 0, 1, 0], "sound": [1, 1, 0, 0, 1, 1], "text": [1, 1, 1, 1, 0, 0]})
    assert strategy.adapt(holed).scores.isfinite().all()
    assert all(value.isfinite().all() for value in strategy.adapted.values())


def test_going_back_is_exact() -> None:
    assert_exact(lambda: casp(), [served(seed, size=24) for seed in range(2)])


@pytest.mark.parametrize(("answer", "begin"), [("before", "last"), ("after", "source")])
def test_statistics_are_gathered_of_the_window_as_it_is_and_of_nothing_else(answer: Any, begin: Any) -> None:
    strategy, given = shadow(Casp(**SHORT, answer=answer, begin=begin), "value")
    expected = statistics_of_one_pass(strategy, given)
    strategy.adapt(given)
    assert strategy.counts["updates"] > 0
    for name, value in strategy.gathered.values.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_it_stands_around_any_network_whose_features_depend_on_what_is_adapted() -> None:
    strategy, given = around(Casp(**SHORT, norms="all"), "value")
    assert strategy.adapt(given).scores.shape == (24, 1) and strategy.counts["updates"] > 0
    strategy, given = around(Casp(**SHORT), "value")
    with pytest.raises(ConfigError, match=r"do not depend on what is adapted, module\.layers\.0\.norm1\.weight"):
        strategy.adapt(given)


def test_one_modality_and_a_model_without_norms_are_refused() -> None:
    with pytest.raises(ConfigError, match="casp compares modalities: it needs two or more, and a batch has image"):
        casp(modalities=["image"]).adapt(served(size=24, modalities=["image"]))
    strategy = Casp()
    strategy.model = nn.LayerNorm(4)
    assert not strategy.parameters() and "`norms: all` takes those outside of them as well" in strategy.nothing_to_adapt()
