"""CGGM: the coefficients by hand, both gradients against autograd, what is left alone, and runs that stop in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import comparable, small_run
from streamcl.strategies.terms._modalities import overlaps_of_labels, overlaps_of_masks, ratio, right_sides
from streamcl.strategies.terms.cggm import balance, direction
from test_resume import stopped_and_resumed
from test_strategies import CPU, begun, learn, make, prepared
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from streamcl import running
from streamcl.data import whole
from streamcl.engine import Engine
from streamcl.errors import ConfigError

PLAIN: dict[str, Any] = {"epochs": 1, "batch": 64, "optimizer": {"lr": 0.05}, "schedule": "constant"}


def carried(*terms: Any, tasks: int = 2, backbone: Any = None, strategy: str = "finetune", scenario: Any = None, **options: Any) -> Engine:
    """Fine-tuning with the terms, on digits that are seen and heard."""
    data = make("source", "digits_av", samples=120, test_samples=20, seconds=0.05)
    stream = make("scenario", "class_incremental", data=data, tasks=tasks) if scenario is None else scenario
    learner = make("strategy", strategy, with_=terms, **{**PLAIN, **options})
    return Engine(stream, learner, backbone or make("backbone", "fusion", width=8), make("memory", "faiss", exemplars=40), engine=CPU)


def shapes(target: str, missing: Any = None, **options: Any) -> Any:
    data = make("source", "shapes", target=target, samples=80, test_samples=20, size=16, seconds=0.05, **options)
    if missing is not None:
        return make("scenario", "missing_modality", data=data, missing=missing)
    return make("scenario", "domain_incremental", data=data, by="domain")


def entered(**cggm: Any) -> tuple[Engine, Any, Any]:
    """A run at the beginning of its first task, the term, and a batch."""
    run = carried(make("term", "cggm", **cggm))
    task = begun(run)
    run.strategy.terms[0].before_task(task)
    run.strategy.epoch = 0
    run.strategy.training_data(task)
    return run, run.strategy.terms[0], prepared(run, whole(task.train))[:40]


def gradients(run: Engine) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


def learned(*terms: Any, tasks: int = 2, **options: Any) -> list[Tensor]:
    """The weights after the first tasks, of several batches each."""
    run = carried(*terms, batch=16, **options)
    learn(run, tasks)
    return [p.detach() for p in run.model.parameters()]


def test_the_coefficients_by_hand() -> None:
    published = balance(torch.tensor([0.3, 0.1], dtype=torch.float64), None)
    assert published.tolist() == pytest.approx([0.25, 0.75], abs=1e-6)
    wild = balance(torch.tensor([0.05, -0.049], dtype=torch.float64), None)
    assert wild.tolist() == pytest.approx([-49, 50], rel=1e-4)
    assert balance(torch.zeros(2), None).tolist() == [1.0, 1.0]  # of the released code, which has no rise to divide
    held = balance(torch.tensor([0.3, 0.1], dtype=torch.float64), 0.1)
    assert held.tolist() == pytest.approx([1 - 0.4 / 0.6, 1 - 0.2 / 0.6])
    assert balance(torch.tensor([0.05, -0.049], dtype=torch.float64), 1e-3).tolist() == pytest.approx([1 / 52, 51 / 52])


@pytest.mark.parametrize("floor", [None, 1e-3])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_coefficients_add_up_to_one_less_than_the_modalities(count: int, floor: float | None) -> None:
    draw = torch.Generator().manual_seed(count)
    for _ in range(20):
        rise = torch.rand(count, generator=draw, dtype=torch.float64) - (0.3 if floor else 0.0)
        found = balance(rise, floor)
        assert float(found.sum()) == pytest.approx(count - 1, abs=1e-6 if floor is None else 1e-9)
        assert floor is None or bool(((found >= 0) & (found <= 1)).all())
    assert balance(torch.full((count,), 0.2, dtype=torch.float64), floor).tolist() == pytest.approx([(count - 1) / count] * count)


def test_with_neither_part_the_run_is_plain_fine_tuning_bit_for_bit() -> None:
    plain, watched = learned(), learned(make("term", "cggm", rho=None, lambda_=0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, learned(make("term", "cggm", rho=None)), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_classifiers_leave_the_encoders_gradients_as_they_are(accumulate: int) -> None:
    run, term, batch = entered(lambda_=0.0)
    run.context.group = accumulate
    (run.strategy.total_loss(batch) / accumulate).backward()
    with_term = gradients(run)
    run.model.zero_grad()
    (run.strategy.loss(batch) / accumulate).backward()
    assert all(torch.equal(with_term[name], gradient) for name, gradient in gradients(run).items())
    features = run.model.features(batch).detach()
    for name, part in run.model.backbone.fused().items():
        classifier = term.classifiers[name]
        expected = torch.autograd.grad(cross_entropy(classifier(features[:, part.columns]), batch.target), list(classifier.parameters()))
        for parameter, gradient in zip(classifier.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient / accumulate)


def test_each_encoder_s_gradients_are_multiplied_by_its_own_coefficient_and_the_head_s_are_not() -> None:
    run, term, batch = entered(lambda_=0.0, rho=1.3, smooth=0.0)
    term.metric = torch.tensor([0.05, 0.0])
    run.strategy.total_loss(batch).backward()
    before = gradients(run)
    features = run.model.features(batch).detach()
    accuracy = []
    for name, part in run.model.backbone.fused().items():
        accuracy.append(float((term.classifiers[name](features[:, part.columns]).argmax(1) == batch.target).float().mean()))
    rise = [max(now - old, 0.0) + 1e-3 for now, old in zip(accuracy, [0.05, 0.0], strict=True)]
    term.after_backward(batch)
    after, norms = gradients(run), {}
    for place, (name, part) in enumerate(run.model.backbone.fused().items()):
        factor = 1.3 * (sum(rise) - rise[place]) / sum(rise)
        assert float(term.balance[place]) == pytest.approx(factor / 1.3, rel=1e-4)
        for key, gradient in before.items():
            if f".{name}" in key:
                torch.testing.assert_close(after[key], factor * gradient, rtol=1e-4, atol=1e-9)
                norms[key] = (gradient.norm(), after[key].norm(), factor)
        assert any(f"encoders.{name}" in key for key in norms) and part.parameters
    assert torch.equal(before["head.weight"], after["head.weight"]) and torch.equal(before["head.bias"], after["head.bias"])
    first, second = (norms[f"backbone.encoders.{name}"] for name in ("audio.out.0.weight", "image.out.weight"))
    assert float((first[1] / second[1]) / (first[0] / second[0])) == pytest.approx(first[2] / second[2], rel=1e-4)


def test_the_direction_s_gradient_is_that_of_the_formula_by_finite_differences() -> None:
    run, term, batch = entered(lambda_=0.7)
    run.model.double()
    for classifier in term.classifiers.values():
        classifier.double()
    term.balance = torch.tensor([0.2, 0.8], dtype=torch.float64)
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head = run.model.head
    run.strategy.features, run.strategy.logits = features, head(features)
    guides = term.guide(features, batch)

    def own_loss() -> Tensor:
        return torch.nn.functional.cross_entropy(head(features), batch.target)

    run.strategy.own_loss = own_loss()
    (gradient,) = torch.autograd.grad(term.loss(batch), head.weight)

    def formula(weight: Tensor) -> float:
        """|b| - b cos, with the gradient of the cross-entropy of a linear layer written out."""
        logits = features @ weight.T + head.bias.detach()
        error = logits.softmax(1) - torch.nn.functional.one_hot(batch.target, logits.shape[1])
        own = error.T @ features / len(features)
        return (
            0.7
            / 2
            * sum(
                float(abs(b) - b * cosine_similarity(g.flatten(), own.flatten(), dim=0))
                for b, g in zip((0.2, 0.8), guides.values(), strict=True)
            )
        )

    weight = head.weight.detach()
    run.strategy.own_loss = own_loss()
    assert float(term.loss(batch).detach()) == pytest.approx(formula(weight), rel=1e-9)
    for place in [(0, 0), (1, 5), (3, 15)]:
        step = torch.zeros_like(weight)
        step[place] = 1e-5
        assert float(gradient[place]) == pytest.approx((formula(weight + step) - formula(weight - step)) / 2e-5, rel=1e-4, abs=1e-9)


def test_the_direction_of_the_weights_pulls_on_the_head_alone() -> None:
    run, term, batch = entered(directions="weights", lambda_=0.5)
    term.balance = torch.tensor([0.4, 0.6])
    run.strategy.own_loss = run.strategy.loss(batch)
    loss = term.loss(batch)
    found = torch.autograd.grad(loss, list(run.model.parameters()), allow_unused=True)
    touched = [name for (name, _), gradient in zip(run.model.named_parameters(), found, strict=True) if gradient is not None]
    assert touched == ["head.weight"]
    head = run.model.head.weight.detach().flatten()
    cosines = [float(cosine_similarity(c.out.weight.detach().flatten(), head, dim=0)) for c in term.classifiers.values()]
    assert loss.item() == pytest.approx(0.5 / 2 * (1.0 - 0.4 * cosines[0] - 0.6 * cosines[1]), rel=1e-5)


def test_the_direction_follows_whatever_loss_the_strategy_has() -> None:
    """Of a strategy with a loss of its own: the gradient that guides is that loss's, not the usual criterion's."""
    run, term, batch = entered(lambda_=1.0)
    term.balance = torch.tensor([0.4, 0.6])
    run.strategy.loss = lambda given: (run.strategy.forward(given) ** 2).mean()  # type: ignore[method-assign]
    total = run.strategy.total_loss(batch)
    own = run.strategy.own_loss
    (gradient,) = torch.autograd.grad(own, run.model.head.weight, retain_graph=True)
    guides = [g.detach() for g in term.guide(run.strategy.features.detach(), batch).values()]
    torch.testing.assert_close(total - own, direction(term.balance, guides, gradient))


def test_where_all_directions_agree_the_term_is_nothing() -> None:
    one = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert float(direction(torch.tensor([0.3, 0.7]), [one, 2 * one], 5 * one)) == pytest.approx(0, abs=1e-6)
    assert float(direction(torch.tensor([0.5, 0.5]), [-one, -one], one)) == pytest.approx(1, rel=1e-6)
    assert float(direction(torch.tensor([-1.0, 2.0]), [-one, one], one)) == pytest.approx(0, abs=1e-6)


def test_the_metrics_by_hand() -> None:
    assert right_sides(torch.tensor([[0.2], [-1.0], [3.0]]), torch.tensor([1.0, 1.0, 2.0]), 0.0).tolist() == [2, 3]
    assert right_sides(torch.tensor([[0.2], [-1.0], [3.0]]), torch.tensor([1.0, 1.0, 2.0]), 1.5).tolist() == [3, 3]
    target = torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8)
    scores = torch.zeros(1, 3, 2, 2)
    scores[0, 0, 0, :] = 1  # the upper row is class 0, the lower one class 1
    scores[0, 1, 1, :] = 1
    assert float(ratio([overlaps_of_masks(scores, target)])) == pytest.approx((2 / 3 + 2 / 3) / 2)
    labels = torch.tensor([[1, 0, -1], [1, 1, 0]])
    given = torch.tensor([[1.0, 1.0, 1.0, 9.0], [-1.0, 1.0, -1.0, 9.0]])
    assert float(ratio([overlaps_of_labels(given, labels)])) == pytest.approx(2 * 2 / (3 + 3))


@pytest.mark.parametrize("target", ["class", "value", "mask"])
def test_it_learns_classes_values_and_masks_of_three_modalities(target: str) -> None:
    run = carried(make("term", "cggm"), scenario=shapes(target), clip=1.0)
    scores = run.run()
    assert run.model.head.classes == {"class": 6, "value": 1, "mask": 7}[target]
    assert scores["final"] is not None and len(scores["matrix"]) == 4
    assert scores["memory_bytes"] == 0, "nothing is kept between tasks"


@pytest.mark.parametrize("target", ["class", "mask"])
def test_samples_that_lack_a_modality_are_not_counted_for_it(target: str) -> None:
    missing = [{"image": 0.5}] if target == "class" else [{"text": 1.0}]
    run = carried(make("term", "cggm"), scenario=shapes(target, missing))
    task = begun(run)
    term = run.strategy.terms[0]
    term.before_task(task)
    batch = prepared(run, whole(task.train))[:30]
    run.strategy.training_data(task)
    run.strategy.total_loss(batch).backward()
    if target == "class":
        assert float(term.counts["image"][0][1]) == float(batch.present["image"].sum()) < 30 and float(term.counts["text"][0][1]) == 30
    else:
        assert "text" not in term.counts
        assert all(p.grad is None for p in term.classifiers["text"].parameters())
    term.after_backward(batch)
    assert term.balance.isfinite().all() and float(term.balance.sum()) == pytest.approx(2, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"directions": "weights"}, {"smooth": 0.0, "floor": None}])
def test_a_run_that_stops_within_a_task_goes_on_bit_for_bit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = {"name": "finetune", "epochs": 2, "batch": 16, "clip": 0.8, "accumulate": 2, "with": [{"name": "cggm", **options}]}
    data = {"name": "digits_av", "samples": 160, "test_samples": 20, "seconds": 0.05}
    config = small_run("cggm", strategy=strategy, scenario={"data": data, "tasks": 2})
    whole_run = running.run(config, out=tmp_path / "whole")
    assert comparable(stopped_and_resumed(config, tmp_path / "stopped", monkeypatch, 14)) == comparable(whole_run)


def test_other_strategies_carry_it_with_their_exemplars() -> None:
    for name, options in {"er": {}, "icarl": {}}.items():
        run = carried(make("term", "cggm"), strategy=name, **options)
        learn(run, 2)
        assert all(p.isfinite().all() for p in run.model.parameters())


def test_what_cannot_be_weighed_is_refused() -> None:
    with pytest.raises(ConfigError, match="cggm weighs modalities against each other, and the model reads audio alone"):
        carried(make("term", "cggm"), backbone=make("backbone", "fusion", modalities=["audio"]))
    with pytest.raises(ConfigError, match="the backbone mlp does not keep an encoder for each modality: take fusion"):
        carried(make("term", "cggm"), backbone=make("backbone", "mlp", modality="image"))
