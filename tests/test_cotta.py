"""CoTTA: its identities, one update by hand, its random views against a reference, and that it goes back exactly."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from streamcl.strategies.test_time import _augmenting
from streamcl.strategies.test_time._augmenting import Pixels, strong
from streamcl.strategies.test_time.cotta import Cotta, scattered
from test_lame import CLASSES, INFO, answers, deployed, goes_back_exactly, learns_nothing_from_predicting, same, served, small_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.errors import ConfigError
from streamcl.options import Optimizer
from streamcl.preparing import Preparation
from streamcl.stream import Batch, Modality, StreamInfo
from streamcl.transforms.normalize import Normalize

SGD = Optimizer(name="sgd", lr=0.1)


def test_with_every_weight_restored_the_student_stays_the_source_and_the_teacher_too() -> None:
    cotta = deployed(Cotta(views=2, r=1.0, m=0.5))
    answers(cotta, [served(8, seed=s) for s in range(3)])
    assert all(torch.equal(value, cotta.source[name]) for name, value in cotta.adapted.items())
    assert any(not torch.equal(value, cotta.source[name]) for name, value in cotta.weights().items()), "it took in the step before"


def test_a_teacher_that_keeps_everything_is_the_source_for_ever() -> None:
    cotta = deployed(Cotta(views=2, r=0.0, m=1.0))
    batches = [served(8, seed=s) for s in range(3)]
    answers(cotta, batches)
    assert all(torch.equal(value, cotta.source[name]) for name, value in cotta.weights().items())
    assert any(not torch.equal(value, cotta.source[name]) for name, value in cotta.adapted.items())
    assert torch.equal(cotta.predict(batches[0]).scores, cotta.reference(batches[0]))


def test_one_view_that_changes_nothing_is_no_averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cotta, "view", lambda self, values, generator: values)
    one, none = deployed(Cotta(views=1, p_th=1.0, r=0.0)), deployed(Cotta(views=0, r=0.0))
    batches = [served(8, seed=s) for s in range(4)]
    for mine, theirs in zip(answers(one, batches), answers(none, batches), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert one.counts["averaged"] == 4 and "averaged" not in none.counts


@pytest.mark.parametrize("symmetric", [False, True])
def test_one_update_is_the_papers_by_hand(symmetric: bool) -> None:
    m, r = 0.9, 0.3
    cotta = deployed(Cotta(views=0, m=m, r=r, symmetric=symmetric, optimizer=SGD))
    batch = served(8)
    drawn = torch.Generator()
    drawn.set_state(cotta.context.generator.get_state())
    answered = answers(cotta, [batch])[0]
    model = small_model()
    with cotta.statistics():
        pass
    for layer in model.modules():  # the statistics of the batch
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    z = model(batch)
    assert torch.allclose(answered, z, atol=1e-5), "before anything was learned all three are one"
    q, p = z.detach().softmax(1), z.softmax(1)
    loss = -(q * p.log()).sum(1).mean()
    if symmetric:
        loss = loss / 2 - (p * q.log()).sum(1).mean() / 2
    names, values = zip(*model.named_parameters(), strict=True)
    chosen, passed = scattered(sum(value.numel() for value in values), r, drawn), 0
    for name, value, gradient in zip(names, values, torch.autograd.grad(loss, values), strict=True):
        stepped = value.detach() - 0.1 * gradient
        assert torch.allclose(cotta.weights()[name], m * value.detach() + (1 - m) * stepped, atol=1e-5), name
        home = torch.isin(torch.arange(value.numel()) + passed, chosen).view(value.shape)
        passed += value.numel()
        assert torch.allclose(cotta.adapted[name], torch.where(home, value.detach(), stepped), atol=1e-5), name


def test_views_are_averaged_only_where_the_source_is_unsure() -> None:
    batch = served(16)
    sure = float(deployed(Cotta(views=2)).reference(batch).softmax(1).amax(1).mean())
    for p_th, averaged in ((sure - 0.01, 0), (sure + 0.01, 1)):
        cotta = deployed(Cotta(views=2, p_th=p_th))
        answers(cotta, [batch])
        assert cotta.counts.get("averaged", 0) == averaged


def test_the_answer_is_the_mean_of_the_logits_of_views() -> None:
    cotta = deployed(Cotta(views=3, p_th=1.0))
    batch, generator = served(4), cotta.context.generator
    state = generator.get_state()
    answered = answers(cotta, [batch])[0]
    generator.set_state(state)
    source = deployed(Cotta(views=3))
    views = [batch.replace(inputs={"image": strong(cast(Tensor, batch.inputs["image"]), generator)}) for _ in range(3)]
    assert torch.allclose(answered, torch.stack([source.reference(view) for view in views]).mean(0), atol=1e-5)


def test_a_share_of_the_weights_goes_home() -> None:
    cotta = deployed(Cotta(views=0, r=0.25))
    cotta.teacher = {name: torch.randn_like(value) for name, value in cotta.source.items()}  # something to learn from
    batches = [served(8, seed=s) for s in range(2)]
    answers(cotta, batches[:1])
    home = sum(int((value == cotta.source[name]).sum()) for name, value in cotta.adapted.items())
    assert 0.2 < home / sum(value.numel() for value in cotta.adapted.values()) < 0.35


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.01, 0.3, 0.97, 1.0])
def test_those_that_are_scattered_are_each_chosen_with_their_share(share: float) -> None:
    drawn, count, times = torch.Generator().manual_seed(0), 50, 4000
    rounds = [scattered(count, share, drawn) for _ in range(times)]
    assert all((one.diff() > 0).all() for one in rounds), "none twice, in their order"
    chosen = torch.zeros(times, count).index_put_(
        (torch.arange(times).repeat_interleave(torch.tensor([len(one) for one in rounds])), torch.cat(rounds)), torch.ones(())
    )
    close = 5 * (share * (1 - share) / times) ** 0.5  # standard deviations of a mean
    assert float((chosen.mean(0) - share).abs().max()) <= close, "everywhere equally often, at both ends too"
    pairs = (chosen[:, 1:] * chosen[:, :-1]).mean()
    assert abs(float(pairs) - share**2) <= 5 * (share**2 / (times * count)) ** 0.5, "whatever its neighbour is"
    assert len(scattered(0, share, drawn)) == 0


def test_weights_that_lie_channels_last_go_home_as_well() -> None:
    cotta = deployed(Cotta(views=0, r=1.0), model=small_model().to(memory_format=torch.channels_last))
    with torch.no_grad():
        for value in cotta.adapted.values():
            value.add_(1.0)
    cotta.restore_some()
    assert any(not value.is_contiguous() for value in cotta.adapted.values())
    assert all(torch.equal(value, cotta.source[name]) for name, value in cotta.adapted.items())


def test_a_step_that_is_not_finite_moves_neither_of_them() -> None:
    cotta = deployed(Cotta(views=0))
    batch = served(4)
    cast(Tensor, batch.inputs["image"])[0] = torch.nan
    answers(cotta, [batch])
    assert cotta.counts == {"not_finite": 1} and not cotta.own_state()["teacher"]
    assert all(torch.equal(value, cotta.source[name]) for name, value in cotta.adapted.items())


@pytest.mark.parametrize("learned", [False, True])
def test_labels_that_come_late_reach_the_teacher_who_answers(learned: bool) -> None:
    cotta = deployed(Cotta(views=0, m=0.9, optimizer=Optimizer(name="sgd", lr=0.01)))
    if learned:
        answers(cotta, [served(8, seed=s) for s in range(2)])
    before = cotta.snapshot()
    batch = served(8, seed=5)
    labelled = batch.replace(target=torch.arange(8) % CLASSES)

    def loss() -> float:
        return float(cross_entropy(cotta.predict(batch).scores, cast(Tensor, labelled.target)))

    begun, teacher = loss(), {name: value.clone() for name, value in cotta.weights().items()}
    student = {name: value.data.clone() for name, value in cotta.adapted.items()}
    cotta.correct(labelled)
    assert loss() < begun - 1e-3
    for name, value in cotta.adapted.items():
        torch.testing.assert_close(value.data - student[name], cotta.weights()[name] - teacher[name], atol=1e-5, rtol=1e-3)
    cotta.rewind(before)
    assert loss() == begun
    with pytest.raises(ConfigError, match="labels that come late"):
        cotta.correct(batch)


def test_it_goes_back_exactly() -> None:
    goes_back_exactly(lambda: Cotta(views=2, p_th=1.0, m=0.9), [served(8, seed=s) for s in range(4)])
    learns_nothing_from_predicting(deployed(Cotta(views=2, p_th=1.0)), [served(8)])


def test_answers_after_are_the_teachers_after() -> None:
    cotta = deployed(Cotta(views=0, m=0.5, answer="after", optimizer=SGD))
    cotta.teacher = {name: value + 0.1 for name, value in cotta.source.items()}
    batch = served(8)
    assert torch.equal(answers(cotta, [batch])[0], cotta.predict(batch).scores)


def test_under_autocast_each_of_the_three_answers_by_its_own_weights() -> None:
    """Autocast keeps a cast of each weight: exchanged content must not be answered by what was cast before."""
    cotta = deployed(Cotta(views=1, p_th=1.0, r=0.0, optimizer=SGD), model=small_model(norm="group"))
    cotta.teacher = {name: value + torch.randn_like(value) for name, value in cotta.source.items()}
    batch, apart = served(8), []
    for answer in (lambda: cotta.predict(batch).scores, lambda: cotta.reference(batch)):
        with torch.autocast("cpu", torch.bfloat16):
            apart.append(answer())
    with torch.autocast("cpu", torch.bfloat16):
        assert same([cotta.predict(batch).scores, cotta.reference(batch), cotta.predict(batch).scores], [*apart, apart[0]])
        cotta.adapt(batch)
        moved = [name for name, value in cotta.adapted.items() if not torch.equal(value, cotta.source[name])]
        after = cotta.predict(batch).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(after, cotta.predict(batch).scores)
    assert set(moved) == set(cotta.source), "every parameter had a gradient"


# -- random views -------------------------------------------------------------------------------------------------------------------


def test_colours_and_blur_are_those_of_torchvision() -> None:
    reference = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for mine, theirs, value in (
        (_augmenting._brightness, reference.adjust_brightness, 1.3),
        (_augmenting._contrast, reference.adjust_contrast, 1.2),
        (_augmenting._saturation, reference.adjust_saturation, 0.6),
        (_augmenting._hue, reference.adjust_hue, -0.05),
        (_augmenting._gamma, reference.adjust_gamma, 0.8),
    ):
        assert torch.allclose(mine(images, torch.full((4, 1, 1, 1), value)), theirs(images, value), atol=1e-5), theirs.__name__
    padded = torch.nn.functional.pad(images, [2] * 4, mode="reflect")
    blurred = _augmenting._blurred(padded, torch.full((4, 1, 1, 1), 0.4))
    assert torch.allclose(blurred, reference.gaussian_blur(images, [5, 5], [0.4, 0.4]), atol=1e-5)


def test_where_nothing_is_moved_the_image_stays_and_a_shift_continues_the_edge() -> None:
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    still = torch.full((2, 4), 0.5)
    assert torch.allclose(_augmenting._moved(images, still)[:, :, 2:-2, 2:-2], images, atol=1e-5)
    shifted = still.clone()
    shifted[:, 1] = 1.0  # an eighth of the image: two pixels
    moved = _augmenting._moved(images, shifted)[:, :, 2:-2, 2:-2]
    assert torch.allclose(moved[..., :14], images[..., 2:], atol=1e-5)
    assert torch.allclose(moved[..., 14:], images[..., -1:].expand(-1, -1, -1, 2), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_image_gets_a_view_of_its_own_with_pixels_from_0_to_1(channels: int) -> None:
    image = torch.rand(1, channels, 12, 10, generator=torch.Generator().manual_seed(0)).expand(5, -1, -1, -1)
    views = strong(image, torch.Generator().manual_seed(1))
    assert views.shape == image.shape and float(views.min()) >= 0 and float(views.max()) <= 1
    assert all(not torch.allclose(views[i], views[j], atol=1e-2) for i in range(5) for j in range(i))
    assert torch.equal(views, strong(image, torch.Generator().manual_seed(1)))


class _Around:
    """A context that says nothing but how images were prepared."""

    def __init__(self, *transforms: Any) -> None:
        self.preparation = Preparation(INFO, {"test": list(transforms)})


def test_normalised_images_are_augmented_as_pixels() -> None:
    pixels = cast(Tensor, served(4).inputs["image"])
    normalize = Normalize(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    normalised = Batch({"image": normalize(pixels, INFO.modalities["image"], torch.Generator())}, None, torch.arange(4))
    by_hand = normalize(strong(pixels, torch.Generator().manual_seed(3)), INFO.modalities["image"], torch.Generator())
    given = Pixels("cotta", INFO, cast(Any, _Around()), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    for known in (Pixels("cotta", INFO, cast(Any, _Around(normalize))), given):
        views = known.augmented(normalised, strong, torch.Generator().manual_seed(3))
        assert torch.allclose(cast(Tensor, views.inputs["image"]), by_hand, atol=1e-4)
    with pytest.raises(ConfigError, match=r"run from 0 to 1, and those of image run from -\d.* say mean and std"):
        Pixels("cotta", INFO, cast(Any, _Around())).augmented(normalised, strong, torch.Generator())
    with pytest.raises(ConfigError, match="mean and std have 2 values and image has 3 channels"):
        Pixels("cotta", INFO, cast(Any, _Around()), [0.5, 0.5], [0.2, 0.2]).augmented(normalised, strong, torch.Generator())
    with pytest.raises(ConfigError, match="mean has 1 values and std has 0"):
        Pixels("cotta", INFO, cast(Any, _Around()), [0.5], [])


def test_images_are_found_by_their_shape_where_the_stream_does_not_name_its_modalities() -> None:
    unnamed = StreamInfo({}, classes=CLASSES, test_time=True)
    finder = Pixels("cotta", unnamed, cast(Any, None))
    assert finder.names(served(2)) == ["image"]
    with pytest.raises(ConfigError, match="looked for a modality of kind image, and this stream has sensor"):
        finder.names(Batch({"sensor": torch.rand(2, 5)}, None, torch.arange(2)))


def test_a_stream_without_images_is_refused_unless_nothing_is_averaged() -> None:
    from streamcl.nn.backbones.mlp import Mlp

    info = StreamInfo({"sensor": Modality("vector", (12,))}, classes=CLASSES, test_time=True)
    with pytest.raises(ConfigError, match=r"cotta \(views: 0 goes without\) .* this stream has sensor \(vector\)"):
        deployed(Cotta(), model=small_model(info, Mlp(hidden=[8])), info=info)
    cotta = deployed(Cotta(views=0), model=small_model(info, Mlp(hidden=[8])), info=info)
    assert answers(cotta, [served(8, info=info)])[0].shape == (8, CLASSES)
