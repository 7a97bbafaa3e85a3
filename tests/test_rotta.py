"""RoTTA: what its memory holds, its robust statistics, the weight of age, one step by hand, and that it goes back exactly."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from streamcl.strategies.test_time._robust import robust, statistics_of
from streamcl.strategies.test_time.rotta import Rotta
from test_lame import CLASSES, INFO, answers, deployed, goes_back_exactly, learns_nothing_from_predicting, same, served, small_model
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy, relu

from streamcl.errors import ConfigError
from streamcl.nn.norms import batch_norms
from streamcl.options import Optimizer
from streamcl.stream import Batch, Modality, StreamInfo


def offered(rotta: Rotta, labels: list[int], uncertainties: list[float] | None = None, classes: int = 4) -> None:
    batch = served(len(labels), seed=len(rotta.held.ages))
    rotta.remember(batch, [float(x) for x in labels], uncertainties or [0.1] * len(labels), classes)


def test_a_stream_of_one_class_fills_no_more_than_its_share() -> None:
    rotta = deployed(Rotta(capacity=10))
    for _ in range(5):
        offered(rotta, [2] * 20)
    assert len(rotta.held.labels) == math.ceil(10 / 4) and len(rotta.samples) == 3


def test_the_memory_is_never_above_its_capacity_nor_a_class_above_its_share() -> None:
    rotta, drawn = deployed(Rotta(capacity=9)), torch.Generator().manual_seed(0)
    for _ in range(30):
        labels = torch.randint(4, (7,), generator=drawn).tolist()
        offered(rotta, labels, torch.rand(7, generator=drawn).tolist())
        assert len(rotta.held.ages) == len(rotta.samples) <= 9
        assert max(rotta.held.labels.count(label) for label in range(4)) <= math.ceil(9 / 4)
    assert {rotta.held.labels.count(label) for label in range(4)} <= {2, 3}


def test_more_classes_than_places_leave_one_place_to_a_class() -> None:
    rotta = deployed(Rotta(capacity=3))
    offered(rotta, [0, 0, 1, 1, 2, 2], classes=10)
    assert sorted(rotta.held.labels) == [0, 1, 2]


def test_what_is_held_are_the_samples_that_were_taken_in() -> None:
    rotta = deployed(Rotta(capacity=4))
    batch = served(6)
    rotta.remember(batch, [0.0, 1.0, 2.0, 3.0, 1.0, 1.0], [0.1, 0.9, 0.1, 0.1, 0.2, 0.9], 4)
    assert rotta.held.labels == [0, 2, 3, 1] and rotta.held.ages == [6, 4, 3, 2], "the fifth took the second's place, the sixth is worse"
    assert same([rotta.samples.inputs["image"]], [cast(Tensor, batch[[0, 2, 3, 4]].inputs["image"])])


def test_a_newcomer_of_a_new_class_takes_the_worst_place_of_the_largest() -> None:
    rotta = deployed(Rotta(capacity=4))
    offered(rotta, [0, 0, 1, 2], [0.1, 1.2, 5.0, 0.1], classes=3)
    offered(rotta, [2], [0.3], classes=3)
    assert rotta.held.labels == [0, 1, 2, 2] and rotta.held.uncertainties == [0.1, 5.0, 0.1, 0.3]
    offered(rotta, [1], [4.0], classes=3)
    assert rotta.held.labels == [0, 1, 2, 2], "too uncertain for a place"
    offered(rotta, [1], [0.05], classes=3)
    assert rotta.held.labels == [0, 1, 2, 1] and rotta.held.uncertainties == [0.1, 5.0, 0.1, 0.05]


def test_the_badness_is_the_papers() -> None:
    rotta = Rotta(capacity=64, lambda_t=2.0, lambda_u=3.0)
    assert rotta.badness(32, 1.1, 10) == pytest.approx(2 / (1 + math.exp(-0.5)) + 3 * 1.1 / math.log(10))


def test_a_sample_that_is_not_finite_is_not_held() -> None:
    rotta = deployed(Rotta(capacity=4))
    offered(rotta, [0, 1], [math.nan, 0.1])
    assert rotta.held.labels == [1]


def test_robust_statistics_are_the_mixture_and_carry_its_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.rand(3) + 0.5), layer.bias.copy_(torch.rand(3))
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(torch.rand(3)), layer.running_var.copy_(torch.rand(3) + 0.5)
    layers = {"norm": layer}
    values = {name: value.clone() for name, value in statistics_of(layers).items()}
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    mean = 0.9 * layer.running_mean + 0.1 * x.mean(dim=(0, 2, 3))
    variance = 0.9 * layer.running_var + 0.1 * x.var(dim=(0, 2, 3), unbiased=False)
    by_hand = (x - mean[:, None, None]) / (variance[:, None, None] + layer.eps).sqrt()
    by_hand = by_hand * layer.weight[:, None, None] + layer.bias[:, None, None]
    pull = torch.randn_like(by_hand)
    with robust(layers, values, 0.1):
        y = layer(x)
    assert torch.allclose(y, by_hand, atol=1e-6)
    assert torch.allclose(values["norm.running_mean"], mean) and torch.allclose(values["norm.running_var"], variance)
    for tensor in (x, layer.weight, layer.bias):
        (mine,), (theirs,) = (torch.autograd.grad((out * pull).sum(), tensor, retain_graph=True) for out in (y, by_hand))
        assert torch.allclose(mine, theirs, atol=1e-5)
    assert torch.equal(layer(x), nn.BatchNorm2d.forward(layer, x)) and "forward" not in layer.__dict__
    sources = layer(x)
    with robust(layers, statistics_of(layers), 0.0):
        assert torch.allclose(layer(x), sources, atol=1e-6)
    with robust(layers, statistics_of(layers), 1.0):
        assert torch.allclose(layer(x), batch_norm(x, None, None, layer.weight, layer.bias, True), atol=1e-5)


def plainly(x: Tensor, layer: Any, mean: Tensor, variance: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """The formula as the paper has it, and the statistics that are kept; autograd does the rest."""
    form = [1, -1] + [1] * (x.dim() - 2)
    spread, middle = torch.var_mean(x.to(mean), dim=[0, *range(2, x.dim())], correction=0)
    spread, middle = (1 - share) * variance + share * spread, (1 - share) * mean + share * middle
    y = (x - middle.view(form)) * (spread + layer.eps).rsqrt().view(form)
    return (y if layer.weight is None else y * layer.weight.view(form) + layer.bias.view(form)), middle.detach(), spread.detach()


FORMS = [(7, 3), (5, 3, 1, 1), (5, 3, 2, 2), (5, 3, 4, 4), (5, 3, 5, 7), (1, 3, 6, 6), (1, 3, 2, 2), (4, 3, 9), (2, 3, 2, 3, 4)]


def normalising(form: tuple[int, ...], affine: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(form)]
    layer = kind(form[1], affine=affine, dtype=dtype).eval()
    for value in [*layer.parameters(), layer.running_mean, layer.running_var]:
        value.data.copy_(torch.rand(form[1]) + 0.2)
    return layer


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("lies", ["as it does", "channels last", "across"])
@pytest.mark.parametrize("form", FORMS)
def test_answers_and_every_gradient_are_those_of_the_plain_formula(form: tuple[int, ...], lies: str, affine: bool) -> None:
    layer, share = normalising(form, affine), 0.3
    x = 2 * torch.randn(form, dtype=torch.float64) + 1
    pull = torch.randn(form, dtype=torch.float64)
    if lies == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif lies == "across":
        x, pull = x.transpose(0, -1).contiguous().transpose(0, -1), pull.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    values = {name: value.clone() for name, value in statistics_of({"norm": layer}).items()}
    with robust({"norm": layer}, values, share):
        mine = layer(x)
    theirs, *kept = plainly(x, layer, layer.running_mean, layer.running_var, share)
    several = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((y * pull).sum(), several) for y in (mine, theirs)]
    for one, other in zip([mine, *values.values(), *gradients[0]], [theirs, *kept, *gradients[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", [(4, 2), (3, 2, 2, 2), (1, 2, 5, 5)])
def test_its_gradient_is_that_of_finite_differences(form: tuple[int, ...]) -> None:
    layer = normalising(form)

    def answered(x: Tensor, *_: Tensor) -> Tensor:
        values = {name: value.clone() for name, value in statistics_of({"norm": layer}).items()}
        with robust({"norm": layer}, values, 0.4):
            told: Tensor = layer(x)
        return told

    assert torch.autograd.gradcheck(answered, (torch.randn(form, dtype=torch.float64, requires_grad=True), layer.weight, layer.bias))


@pytest.mark.parametrize("form", [(16, 3), (16, 3, 2, 2), (16, 3, 6, 6)])
def test_in_half_precision_its_gradient_is_as_near_as_that_allows(form: tuple[int, ...]) -> None:
    layer, share = normalising(form, dtype=torch.float32), 0.9
    x = (2 * torch.randn(form) + 1).bfloat16().requires_grad_()
    pull = torch.randn(form).bfloat16().float()
    values = {name: value.clone() for name, value in statistics_of({"norm": layer}).items()}
    with torch.autocast("cpu", torch.bfloat16), robust({"norm": layer}, values, share):
        mine = layer(x)
    exact = x.detach().float().requires_grad_()
    theirs, *kept = plainly(exact, layer, layer.running_mean, layer.running_var, share)
    (mine.float() * pull).sum().backward()
    (theirs * pull).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(list(values.values()), kept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(x.grad.float(), cast(Tensor, exact.grad), rtol=2e-2, atol=2e-2)


class Rectified(nn.BatchNorm2d):
    """A layer as libraries have it, with an activation of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(super().forward(input))


def timms(channels: int) -> nn.Module:
    made: nn.Module = pytest.importorskip("timm.layers").BatchNormAct2d(channels)
    return made


@pytest.mark.parametrize("make", [Rectified, timms])
def test_what_a_layer_does_beside_normalising_it_does_still(make: Any) -> None:
    torch.manual_seed(0)
    layer, plain = make(3).eval(), nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        for value in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            value.copy_(torch.rand(3) + 0.2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    told, kept, pull = [], [], torch.randn(5, 3, 4, 4)
    for one, after in ((layer, lambda y: y), (plain, relu)):
        values = {name: value.clone() for name, value in statistics_of({"norm": one}).items()}
        with robust({"norm": one}, values, 0.3):
            y = after(one(x))
        told.append([y, *torch.autograd.grad((y * pull).sum(), (x, one.weight, one.bias))])
        kept.append(list(values.values()))
    for mine, theirs in zip([*told[0], *kept[0]], [*told[1], *kept[1]], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert float(told[0][0].detach().min()) == 0.0
    torch.testing.assert_close(layer(x), relu(plain(x)))
    assert all(torch.equal(layer._buffers[name], value) for name, value in plain.named_buffers()) and not layer._forward_pre_hooks


def test_an_error_leaves_the_layers_as_they_were() -> None:
    layer = nn.BatchNorm2d(3).eval()
    before = dict(layer._buffers)
    with pytest.raises(KeyboardInterrupt), robust({"norm": layer}, statistics_of({"norm": layer}), 0.5):
        raise KeyboardInterrupt
    assert all(layer._buffers[name] is value for name, value in before.items()) and not layer._forward_pre_hooks


@pytest.mark.parametrize("learned", [False, True])
def test_labels_that_come_late_reach_the_teacher_who_answers(learned: bool) -> None:
    rotta = deployed(Rotta(every=8, capacity=8, nu=0.1, augment=False, optimizer=Optimizer(name="sgd", lr=0.01)))
    if learned:
        answers(rotta, [served(8, seed=s) for s in range(2)])
    before = rotta.snapshot()
    batch = served(8, seed=5)
    labelled = batch.replace(target=torch.arange(8) % CLASSES)

    def loss() -> float:
        return float(cross_entropy(rotta.predict(batch).scores, cast(Tensor, labelled.target)))

    begun, teacher = loss(), {name: value.clone() for name, value in rotta.weights().items()}
    student = {name: value.data.clone() for name, value in rotta.adapted.items()}
    rotta.correct(labelled)
    assert loss() < begun - 1e-3
    for name, value in rotta.adapted.items():
        change = rotta.weights()[name] - teacher[name]
        assert change.any()
        torch.testing.assert_close(value.data, student[name] + change)
    assert all(torch.equal(rotta.weights()[name], teacher[name]) for name in statistics_of(rotta.layers)), "statistics have no labels"
    rotta.rewind(before)
    assert loss() == begun
    with pytest.raises(ConfigError, match="labels that come late"):
        rotta.correct(batch)


def test_before_it_learned_the_source_answers_and_predicting_learns_nothing() -> None:
    rotta = deployed(Rotta(every=1000))
    batch = served(8)
    assert torch.equal(answers(rotta, [batch])[0], small_model()(batch))
    learns_nothing_from_predicting(rotta, [batch])


def test_one_update_is_the_papers_by_hand() -> None:
    """Without augmentation, one class per sample, SGD: the loss, the step and the teacher, from a model that is driven by hand."""
    lr, nu, alpha = 0.1, 0.25, 0.3
    rotta = deployed(
        Rotta(capacity=16, every=4, nu=nu, alpha=alpha, augment=False, optimizer=Optimizer(name="sgd", lr=lr)), model=small_model()
    )
    batch = served(4)
    answered = answers(rotta, [batch])[0]

    model = small_model()
    layers = batch_norms(model)
    assert torch.equal(answered, model(batch))
    statistics = {name: value.clone() for name, value in statistics_of(layers).items()}
    with torch.no_grad(), robust(layers, statistics, alpha):
        taught = model(rotta.samples).softmax(1)
    with robust(layers, statistics_of(layers), alpha):
        log_p = model(rotta.samples).log_softmax(1)
    a = torch.tensor(rotta.held.ages) / 16
    loss = (-(taught * log_p).sum(1) * (-a).exp() / (1 + (-a).exp())).mean()
    source = rotta.source
    gradients = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in source])
    for (name, value), gradient in zip(source.items(), gradients, strict=True):
        stepped = value - lr * gradient
        assert torch.allclose(rotta.adapted[name], stepped, atol=1e-6), name
        assert torch.allclose(rotta.weights()[name], (1 - nu) * value + nu * stepped, atol=1e-6), name
    for name, value in statistics.items():
        assert torch.allclose(rotta.weights()[name], value), name
    assert math.isclose(1 / (1 + math.exp(0)), 0.5) and rotta.counts == {"kept": 4, "updates": 1}


def test_it_learns_after_every_so_many_samples_whatever_the_batches() -> None:
    one, other = deployed(Rotta(every=8, capacity=8)), deployed(Rotta(every=8, capacity=8))
    stream = Batch.cat([served(8, seed=s) for s in range(4)])
    answers(one, [stream[:8], stream[8:16], stream[16:24], stream[24:]])
    answers(other, [stream[:4], stream[4:16], stream[16:17], stream[17:]])
    assert one.counts["updates"] == other.counts["updates"] == 4


def test_it_goes_back_exactly() -> None:
    goes_back_exactly(lambda: Rotta(every=8, capacity=8, nu=0.1), [served(8, seed=s) for s in range(6)])


def test_answers_after_are_the_teachers_after() -> None:
    rotta = deployed(Rotta(every=8, capacity=8, nu=0.5, answer="after"))
    batch = served(8)
    assert torch.equal(answers(rotta, [batch])[0], rotta.predict(batch).scores)


def test_a_model_without_batch_statistics_and_a_missing_modality_are_taken() -> None:
    info = StreamInfo({"image": Modality("image", (3, 16, 16), 255)}, classes=CLASSES, test_time=True)
    rotta = deployed(Rotta(every=8, capacity=8, nu=0.1), model=small_model(norm="group"), info=info)
    there = torch.arange(8) % 2 == 0
    batches = [served(8, seed=1), served(8, seed=2, present={"image": there})]
    assert all(scores.isfinite().all() for scores in answers(rotta, batches))
    assert rotta.samples.present is not None


@pytest.mark.parametrize("kind", ["vector", "audio"])
def test_a_stream_without_images_is_refused_with_augmentation_alone(kind: str) -> None:
    from streamcl.nn.backbones.mlp import Mlp

    info = StreamInfo({"sensor": Modality(kind, (12,))}, classes=CLASSES, test_time=True)

    class Normed(Mlp):
        def build(self, info: StreamInfo) -> None:
            super().build(info)
            self.norm = nn.BatchNorm1d(self.dim)

        def forward(self, batch: Batch) -> Tensor:
            return self.norm(super().forward(batch))

    def make() -> Any:
        return small_model(info, Normed(hidden=[8]))

    with pytest.raises(ConfigError, match=rf"looked for a modality of kind image, and this stream has sensor \({kind}\)"):
        deployed(Rotta(), model=make(), info=info)
    rotta = deployed(Rotta(augment=False, every=8), model=make(), info=info)
    assert not same(answers(rotta, [served(8, info=info)]), answers(rotta, [served(8, info=info)]))
    assert INFO.modalities
