"""R2-T2: its identities, that the routing stays on the simplex, that no weight changes, and what it refuses; and routing itself."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from streamcl.strategies.test_time.r2t2 import R2t2
from test_lame import INFO, answers, deployed, served, small_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.errors import ConfigError, DataError
from streamcl.nn.backbones.mixture import Mixture
from streamcl.nn.model import Model
from streamcl.nn.routing import given, joined, on_simplex, read, routings
from streamcl.stream import Batch, Modality, StreamInfo

EXPERTS = 3


def mixture(layers: int = 2) -> Model:
    """Two layers of three experts that differ, with a router that has opinions."""
    model = small_model(INFO, Mixture(experts=EXPERTS, layers=layers, hidden=16, width=12))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "router" in name:
                value.mul_(6)
    return model


def labelled(model: Model, size: int = 40, seed: int = 7) -> Batch:
    """Samples with the classes that the model gives them, every fourth one wrong."""
    batch = served(size, seed=seed)
    with torch.no_grad():
        target = model(batch).argmax(1)
    target[::4] = (target[::4] + 1) % 4
    return batch.replace(target=target)


def ready(model: Model | None = None, **options: Any) -> Any:
    model = mixture() if model is None else model
    strategy = deployed(R2t2(**options), model=model)
    strategy.refer([labelled(model)])
    return strategy


def router(model: Model, batch: Batch) -> Tensor:
    with read(model) as told, torch.no_grad():
        model(batch)
    return joined(told)


# -- routing ------------------------------------------------------------------------------------------------------------------------


def test_routing_is_read_and_given() -> None:
    model, batch = mixture(), served(5)
    routes = router(model, batch)
    assert routes.shape == (5, 2 * EXPERTS) and len(routings(model)) == 2
    assert torch.allclose(routes.view(5, 2, EXPERTS).sum(2), torch.ones(5, 2))
    with given(model, routes):
        assert torch.allclose(model(batch), mixture()(batch), atol=1e-6)
    with given(model, torch.eye(6)[[0]] + torch.eye(6)[[3]]), torch.no_grad():
        one = model(batch)
    alone = mixture()
    for layer in alone.backbone.layers:  # type: ignore[union-attr]
        cast(Any, layer).router.weight.data.zero_()
        cast(Any, layer).router.bias.data.copy_(torch.tensor([1e4, 0, 0]))
    assert torch.allclose(one, alone(batch), atol=1e-5), "the first experts alone"
    assert torch.equal(model(batch), mixture()(batch)), "and afterwards the router's again"
    assert all(layer.told is None and layer.instead is None for layer in routings(model))


def test_a_routing_of_places_is_read_as_its_mean_and_given_to_all() -> None:
    layer = routings(mixture())[0]
    scores = torch.randn(4, 7, EXPERTS, generator=torch.Generator().manual_seed(0))
    with read(layer) as told:
        layer(scores)
    assert torch.allclose(joined(told), scores.softmax(-1).mean(1))
    with given(layer, torch.eye(3)[[0, 1, 2, 0]]):
        assert torch.equal(layer(scores), torch.eye(3)[[0, 1, 2, 0]][:, None].expand(4, 7, 3))


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 7, generator=drawn)
    projected = on_simplex(rows, [3, 4])
    assert (projected >= 0).all()
    assert torch.allclose(torch.stack([projected[:, :3].sum(1), projected[:, 3:].sum(1)]), torch.ones(2, 50), atol=1e-6)
    assert torch.allclose(on_simplex(projected, [3, 4]), projected, atol=1e-6)
    for _ in range(200):
        other = torch.rand(50, 7, generator=drawn)
        other = torch.cat([other[:, :3] / other[:, :3].sum(1, keepdim=True), other[:, 3:] / other[:, 3:].sum(1, keepdim=True)], 1)
        assert ((rows - projected).norm(dim=1) <= (rows - other).norm(dim=1) + 1e-6).all()


def test_the_mixture_is_its_formula_and_the_composition_of_its_parts() -> None:
    model, batch = mixture(), served(5)
    x = cast(Tensor, batch.inputs["image"]).flatten(1)
    for layer in cast(Any, model.backbone).layers:
        x = layer.norm(x)
        w = layer.router(x).softmax(1)
        each = [second(first(x).clamp(min=0)) for first, second in zip(layer.first, layer.second, strict=True)]
        x = sum(w[:, [e]] * each[e] for e in range(EXPERTS)).clamp(min=0)
    assert torch.allclose(model.features(batch), x, atol=1e-5)
    shared, grown = model.backbone.split()
    assert torch.allclose(grown(shared(batch)), x, atol=1e-5)
    with pytest.raises(ConfigError, match="backbone mixture: it reads a modality of kind image or audio or vector"):
        Mixture().build(StreamInfo({"text": Modality("text")}, classes=4))


# -- the method ---------------------------------------------------------------------------------------------------------------------


def test_with_itself_for_a_reference_it_is_gradient_descent_on_its_own_loss() -> None:
    model = mixture()
    strategy = deployed(R2t2(k=1, steps=4, lr=0.5, last_lr=0.1), model=model)
    sample = served(1)
    target = model(sample).argmax(1)
    strategy.refer([sample.replace(target=target)])
    answered = answers(strategy, [sample])[0]
    r = router(model, sample)
    for rate in (0.5, 0.4, 0.2, 0.1):  # a cosine: 0.1 + 0.4 (1 + cos t) / 2 at t = 0, 60, 120 and 180 degrees
        r = r.requires_grad_(True)
        with given(model, r):
            loss = cross_entropy(model(sample), target)
        r = on_simplex((r - rate * torch.autograd.grad(loss, r)[0]).detach(), [EXPERTS, EXPERTS])
    with given(model, r), torch.no_grad():
        assert torch.allclose(answered, model(sample), atol=1e-5)
    assert cross_entropy(answered, target) < cross_entropy(model(sample), target)


def test_one_neighbour_and_nothing_of_the_old_gives_the_neighbours_routing() -> None:
    strategy = ready(how="regression", k=1, alpha=0.0)
    batch = served(6, seed=3)
    _, embeddings, routes = strategy.seen(batch)
    neighbours, weights = strategy.near(1 - embeddings @ strategy.embeddings.mT)
    assert torch.equal(strategy.regressed(routes, neighbours, weights), strategy.routes[neighbours[:, 0]])
    by_hand = torch.stack([(strategy.embeddings - row).norm(dim=1).argmin() for row in embeddings])
    assert torch.equal(neighbours[:, 0], by_hand)


@pytest.mark.parametrize("options", [{"how": "regression"}, {"how": "regression", "alpha": 0.3}, {"how": "mode"}, {"how": "mode", "k": 1}])
def test_where_all_routings_are_one_nothing_moves(options: dict[str, Any]) -> None:
    """By regression and mean shift. Gradient descent does not ask how the neighbours were routed: it moves unless its gradient is 0."""
    model = mixture()
    with torch.no_grad():
        for layer in model.backbone.layers:  # type: ignore[union-attr]
            cast(Any, layer).router.weight.zero_()
    strategy, batch = ready(model, **options), served(6, seed=3)
    with torch.no_grad():
        assert torch.allclose(answers(strategy, [batch])[0], model(batch), atol=1e-5)


@pytest.mark.parametrize("how", ["ngd", "regression", "mode"])
def test_no_weight_changes_and_each_sample_is_alone(how: str) -> None:
    strategy, batch = ready(how=how, lr=0.3), served(6, seed=3)
    before = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    together = answers(strategy, [batch])[0]
    apart = torch.cat(answers(strategy, [batch[i : i + 1] for i in range(6)]))
    assert torch.allclose(together, apart, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in strategy.model.state_dict().items())
    assert all(not value.requires_grad and value.grad is None for value in strategy.model.parameters())
    assert torch.equal(strategy.predict(batch).scores, strategy.model(batch)), "a prediction that learns nothing is the router's"
    assert not torch.allclose(together, strategy.model(batch), atol=1e-4)


def test_small_steps_lower_the_neighbours_loss_and_stay_on_the_simplex() -> None:
    model = mixture()
    strategy = ready(model, steps=1, lr=0.02)
    batch = served(8, seed=3)
    _, embeddings, routes = strategy.seen(batch)
    near = strategy.near(1 - embeddings @ strategy.embeddings.mT)
    costs = [strategy.cost(routes, *near).detach()]
    for _ in range(15):
        routes = strategy.descended(routes, *near)
        costs.append(strategy.cost(routes, *near).detach())
        assert (routes >= 0).all() and torch.allclose(routes.view(8, 2, EXPERTS).sum(2), torch.ones(8, 2), atol=1e-5)
    assert all((later <= earlier + 1e-6).all() for earlier, later in pairwise(costs)), "monotone"
    assert (costs[-1] < costs[0]).all()


def test_regression_takes_the_alpha_of_the_lowest_cost() -> None:
    strategy, batch = ready(how="regression"), served(6, seed=3)
    with torch.no_grad():
        _, embeddings, routes = strategy.seen(batch)
        near = strategy.near(1 - embeddings @ strategy.embeddings.mT)
        chosen = strategy.cost(strategy.regressed(routes, *near), *near)
        for alpha in (0.0, 0.5, 1.0):
            assert (chosen <= strategy.cost(alpha * routes + (1 - alpha) * strategy.mean(*near), *near) + 1e-6).all()


@pytest.mark.parametrize("kernel", ["gaussian", "cosine"])
def test_kernels_weigh_the_nearer_ones_more(kernel: str) -> None:
    strategy = ready(kernel=kernel, k=4)
    nearest, weights = strategy.near(torch.tensor([[0.5, 0.1, 0.9, 0.3, 0.2]]))
    assert nearest.tolist() == [[1, 4, 3, 0]] and weights.sum().item() == pytest.approx(1)
    raw = torch.tensor([0.9, 0.8, 0.7, 0.5]) if kernel == "cosine" else (-0.5 * torch.tensor([0.1, 0.2, 0.3, 0.5]) / 0.5).exp()
    assert torch.allclose(weights[0], raw / raw.sum())


def test_only_what_is_answered_rightly_is_referred_to_and_no_more_than_asked() -> None:
    model = mixture()
    strategy = ready(model)
    assert len(strategy.known) == 30 and torch.equal(model(strategy.known).argmax(1), strategy.known.target)
    strategy.references = 8
    strategy.refer([labelled(model), labelled(model, seed=8)])
    assert len(strategy.known) == len(strategy.routes) == len(strategy.embeddings) == 8
    assert torch.allclose(strategy.routes, router(model, strategy.known))
    inputs = ready(model, embedding="inputs")
    assert torch.allclose(inputs.embeddings, torch.nn.functional.normalize(cast(Tensor, inputs.known.inputs["image"]).flatten(1)))


def test_the_memory_is_in_its_state_and_in_no_snapshot() -> None:
    strategy, other, batch = ready(), deployed(R2t2(), model=mixture()), served(6, seed=3)
    other.restore(strategy.state())
    assert torch.equal(answers(strategy, [batch])[0], answers(other, [batch])[0])
    assert not strategy.snapshot()["own"]
    first = answers(strategy, [batch])[0]
    strategy.reset()
    assert torch.equal(first, answers(strategy, [batch])[0])


def test_what_it_cannot_do_without_is_said() -> None:
    with pytest.raises(ConfigError, match=r"looked for layers streamcl\.nn\.routing\.Routing"):
        deployed(R2t2())
    strategy = deployed(R2t2(), model=mixture())
    with pytest.raises(ConfigError, match="needs labelled samples for the neighbours"):
        strategy.adapt(served(2))
    with pytest.raises(DataError, match="these have no classes"):
        strategy.refer([served(4)])
    wrong = labelled(strategy.model)[torch.tensor([0, 4, 8])]
    with pytest.raises(DataError, match="it answers none"):
        strategy.refer([wrong])
