"""What tools/bench/online.py counts: the passes of methods whose number is known from their algorithm."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_tent import batch, convolutions, started

from streamcl.strategy import make_optimizer


def _bench() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "tools" / "bench" / "online_passes.py"
    spec = importlib.util.spec_from_file_location("bench_online_passes", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = _bench()

KNOWN: list[tuple[str, dict[str, Any], dict[str, int]]] = [
    ("source", {}, {"without": 12, "with": 0, "backward": 0, "part": 0, "steps": 0}),
    ("bn_adapt", {}, {"without": 12, "with": 0, "backward": 0, "part": 0, "steps": 0}),
    ("tent", {}, {"without": 0, "with": 12, "backward": 12, "part": 0, "steps": 1}),
    ("tent", {"answer": "after"}, {"without": 12, "with": 12, "backward": 12, "part": 0, "steps": 1}),
    ("sar", {"e0": 100.0}, {"without": 0, "with": 24, "backward": 24, "part": 0, "steps": 1}),
    ("eata", {"e0": 1e-9}, {"without": 0, "with": 12, "backward": 0, "part": 0, "steps": 0}),
]


@pytest.mark.parametrize(("name", "options", "known"), KNOWN, ids=[f"{name} {options}" for name, options, _ in KNOWN])
def test_passes_are_counted_in_samples(name: str, options: dict[str, Any], known: dict[str, int]) -> None:
    strategy = started(name, convolutions(), **options)
    with bench.recorded(strategy) as trace:
        strategy.adapt(batch())
    assert trace.samples() == known
    strategy.adapt(batch())
    assert trace.samples() == known, "nothing is recorded after the context"


def test_a_pass_says_by_which_statistics_it_was_normalised() -> None:
    for name, by_batch in (("source", False), ("tent", True), ("bn_adapt", True)):
        strategy = started(name, convolutions())
        with bench.recorded(strategy) as trace:
            strategy.adapt(batch())
        assert [one.by_batch for one in trace.passes] == [by_batch], name


def test_a_recorded_tent_step_made_by_hand_moves_the_weights_to_the_same_place() -> None:
    strategy = started("tent", convolutions())
    by_hand = copy.deepcopy(strategy.model)
    chosen = dict(by_hand.named_parameters())
    optimizer = make_optimizer([chosen[name] for name in strategy.adapted], strategy.optimizer_settings)
    with bench.recorded(strategy) as trace:
        strategy.adapt(batch())
    bench.repeated(trace, by_hand, optimizer)
    for name, value in strategy.adapted.items():
        torch.testing.assert_close(value, chosen[name])
        assert not torch.equal(value, strategy.source[name])


def test_the_time_of_operations_of_its_own_is_added_up() -> None:
    strategy = started("sar", convolutions(), e0=100.0)
    with bench.recorded(strategy, own=("climb", "back")) as trace:
        strategy.adapt(batch())
    assert trace.own > 0
    assert "climb" not in vars(strategy)
