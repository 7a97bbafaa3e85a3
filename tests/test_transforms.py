"""Transforms: each against a loop over samples, torchvision, or an identity; randomness only from the generator."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from streamcl.errors import ConfigError
from streamcl.plugins import plugins
from streamcl.stream import Modality, Transform
from streamcl.transforms._draw import draw
from streamcl.transforms.center_crop import CenterCrop
from streamcl.transforms.crop import Crop
from streamcl.transforms.cutout import Cutout
from streamcl.transforms.flip import Flip
from streamcl.transforms.jitter import Jitter
from streamcl.transforms.normalize import Normalize
from streamcl.transforms.random_resized_crop import RandomResizedCrop
from streamcl.transforms.resize import Resize
from streamcl.transforms.rotate import Rotate
from streamcl.transforms.standardize import Standardize
from streamcl.transforms.to_rgb import ToRgb

IMAGE = Modality("image", (3, 12, 16), 255)
RANDOM: dict[str, Callable[[], Transform]] = {
    "crop": lambda: Crop(padding=3),
    "flip": Flip,
    "random_resized_crop": lambda: RandomResizedCrop(size=(9, 7)),
    "jitter": lambda: Jitter(brightness=0.4, contrast=0.4, saturation=0.4),
    "rotate": Rotate,
    "cutout": lambda: Cutout(size=5),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int = 40, channels: int = 3, height: int = 12, width: int = 16) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=seeded(1))


def uniform(batch: int, columns: int) -> Tensor:
    return draw(batch, columns, seeded())


def test_every_transform_is_found_by_the_name_of_its_file() -> None:
    assert {*RANDOM, "normalize", "resize", "center_crop", "to_rgb", "standardize"} <= set(plugins("transform"))


@pytest.mark.parametrize("name", RANDOM)
def test_random_transforms_depend_on_the_generator_alone_and_not_on_how_a_batch_is_split(name: str) -> None:
    transform, values = RANDOM[name](), images()
    generator = seeded()
    whole = transform(values, IMAGE, generator)
    torch.manual_seed(99)  # the global state must not matter
    parts = seeded()
    again = torch.cat([transform(part, IMAGE, parts) for part in values.split([1, 17, 22])])
    # Where it is a product of matrices, its last bit may depend on how many there are; the draws may not.
    torch.testing.assert_close(again, whole, rtol=0, atol=1e-6 if name == "random_resized_crop" else 0)
    assert torch.equal(generator.get_state(), parts.get_state())
    assert not torch.equal(transform(values, IMAGE, seeded(5)), whole)
    assert torch.equal(values, images()), "inputs are not changed in place"


def test_normalize_matches_torchvision() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert torch.equal(Normalize(mean=mean, std=std)(images(), IMAGE, seeded()), reference.normalize(images(), mean, std))


def test_normalize_refuses_another_number_of_channels() -> None:
    with pytest.raises(ConfigError, match="mean and std have 2 values and the images have 3 channels"):
        Normalize(mean=[0, 0], std=[1, 1])(images(), IMAGE, seeded())
    with pytest.raises(ConfigError, match="mean has 1 values and std has 2"):
        Normalize(mean=[0], std=[1, 1])


def test_standardize_gives_mean_0_and_deviation_1() -> None:
    values = torch.randn(500, 3, generator=seeded()) * torch.tensor([1.0, 5.0, 9.0]) + 4
    given = Standardize(mean=values.mean(0).tolist(), std=values.std(0).tolist())(values, Modality("vector", (3,)), seeded())
    torch.testing.assert_close(given.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(given.std(0), torch.ones(3), atol=1e-5, rtol=0)
    assert Standardize.kinds == ("vector",)
    with pytest.raises(ConfigError, match="2 values and the vectors have 3 features"):
        Standardize(mean=[0, 0], std=[1, 1])(values, Modality("vector", (3,)), seeded())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 24, (5, 20)])
def test_resize_matches_torchvision(size: int | tuple[int, int], interpolation: str) -> None:
    mode = InterpolationMode.NEAREST_EXACT if interpolation == "nearest" else InterpolationMode(interpolation)
    given = Resize(size=size, interpolation=interpolation)(images(), IMAGE, seeded())  # type: ignore[arg-type]
    torch.testing.assert_close(given, reference.resize(images(), size, mode, antialias=True))  # type: ignore[arg-type]


def test_resize_to_the_same_size_is_the_identity() -> None:
    assert torch.equal(Resize(size=12, interpolation="bicubic")(images(), IMAGE, seeded()), images())


@pytest.mark.parametrize("size", [5, 12, (3, 16)])
def test_center_crop_matches_torchvision(size: int | tuple[int, int]) -> None:
    assert torch.equal(CenterCrop(size=size)(images(), IMAGE, seeded()), reference.center_crop(images(), size))  # type: ignore[arg-type]


def test_center_crop_refuses_smaller_images() -> None:
    with pytest.raises(ConfigError, match="13x13 does not fit into images of 12x16; put a resize before it"):
        CenterCrop(size=13)(images(), IMAGE, seeded())


def test_crop_without_padding_is_the_identity() -> None:
    assert torch.equal(Crop(padding=0)(images(), IMAGE, seeded()), images())


@pytest.mark.parametrize(("size", "padding", "border"), [(None, 4, "zero"), (None, 3, "reflect"), (10, 0, "zero"), (14, 2, "reflect")])
def test_crop_cuts_each_sample_at_its_own_offset(size: int | None, padding: int, border: str) -> None:
    values = images()
    given = Crop(size=size, padding=padding, border=border)(values, IMAGE, seeded())  # type: ignore[arg-type]
    rows, columns = (size, size) if size else (12, 16)
    padded = pad(values, [padding] * 4, "constant" if border == "zero" else border)
    offsets = uniform(len(values), 2).double()
    for sample, (down, right) in enumerate(offsets.tolist()):
        top, left = int(down * (12 + 2 * padding - rows + 1)), int(right * (16 + 2 * padding - columns + 1))
        assert torch.equal(given[sample], padded[sample, :, top : top + rows, left : left + columns])


def test_crop_reaches_every_offset() -> None:
    place = torch.arange(9.0).view(1, 1, 3, 3).expand(400, 1, 3, 3)
    corners = Crop(size=1, padding=0)(place, IMAGE, seeded()).flatten()
    assert sorted(corners.unique().tolist()) == list(range(9))


def test_crop_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="a window of 20x20 does not fit into images of 12x16 with padding 2"):
        Crop(size=20, padding=2)(images(), IMAGE, seeded())
    with pytest.raises(ConfigError, match="reflected border of 12 needs images that are larger"):
        Crop(padding=12, border="reflect")(images(), IMAGE, seeded())


def test_flip_mirrors_all_none_or_about_the_asked_fraction() -> None:
    always, never = Flip(probability=1.0), Flip(probability=0.0)
    assert torch.equal(always(images(), IMAGE, seeded()), images().flip(-1))
    assert torch.equal(always(always(images(), IMAGE, seeded()), IMAGE, seeded()), images())
    assert torch.equal(never(images(), IMAGE, seeded()), images())
    many = images(2000, 1, 1, 2)
    flipped = (Flip(probability=0.3)(many, IMAGE, seeded()) != many).flatten(1).any(1)
    assert 0.25 < flipped.double().mean() < 0.35


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("out", [6, 12, 30])
def test_random_resized_crop_of_the_whole_image_is_a_resize(out: int, interpolation: str) -> None:
    square = images(height=12, width=12)
    given = RandomResizedCrop(size=out, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation=interpolation)(square, IMAGE, seeded())  # type: ignore[arg-type]
    torch.testing.assert_close(given, interpolate(square, (out, out), mode=interpolation, antialias=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_resized_crop_resizes_each_samples_own_box(interpolation: str) -> None:
    values, transform = images(height=20, width=30), RandomResizedCrop(size=(8, 11), interpolation=interpolation)  # type: ignore[arg-type]
    given = transform(values, IMAGE, seeded())
    boxes = transform.boxes(uniform(len(values), 22), 20, 30).T.int().tolist()
    assert len({tuple(box) for box in boxes}) > 35
    for sample, (top, left, rows, columns) in enumerate(boxes):
        assert 0 <= top <= 20 - rows and 0 <= left <= 30 - columns
        assert 0.07 < rows * columns / 600 <= 1 and 0.65 < columns / rows < 1.55
        box = values[sample : sample + 1, :, top : top + rows, left : left + columns]
        torch.testing.assert_close(
            given[sample : sample + 1], interpolate(box, (8, 11), mode=interpolation, antialias=True), atol=1e-5, rtol=0
        )


def test_random_resized_crop_takes_the_middle_where_no_box_fits() -> None:
    wide = images(4, height=4, width=40)
    transform = RandomResizedCrop(size=4, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    torch.testing.assert_close(transform(wide, IMAGE, seeded()), wide[..., 18:22])


def test_random_resized_crop_refuses_ranges_the_wrong_way_round() -> None:
    with pytest.raises(ConfigError, match="must each run from a smaller number above 0 to a larger one"):
        RandomResizedCrop(size=4, scale=(1.0, 0.5))


def test_jitter_matches_torchvision_sample_by_sample() -> None:
    values, strengths = images(), (0.8, 0.6, 1.5)
    given = Jitter(brightness=0.8, contrast=0.6, saturation=1.5)(values, IMAGE, seeded())
    for sample, row in enumerate(uniform(len(values), 3).tolist()):
        low = [max(0.0, 1 - s) for s in strengths]
        factor = [a + u * (1 + s - a) for a, u, s in zip(low, row, strengths, strict=True)]
        expected = reference.adjust_contrast(reference.adjust_brightness(values[sample], factor[0]), factor[1])
        torch.testing.assert_close(given[sample], reference.adjust_saturation(expected, factor[2]), atol=1e-5, rtol=1e-5)


def test_jitter_of_no_strength_and_saturation_of_grey_change_nothing() -> None:
    assert torch.equal(Jitter()(images(), IMAGE, seeded()), images())
    grey = images(channels=1)
    torch.testing.assert_close(Jitter(saturation=0.9)(grey, IMAGE, seeded()), grey)


def test_rotate_matches_torchvision_sample_by_sample() -> None:
    values = images()
    given = Rotate(degrees=70)(values, IMAGE, seeded())
    for sample, (u,) in enumerate(uniform(len(values), 1).tolist()):
        expected = reference.rotate(values[sample], u * 140 - 70, InterpolationMode.BILINEAR)
        torch.testing.assert_close(given[sample], expected, atol=1e-4, rtol=0)


def test_rotate_by_no_degrees_is_the_identity() -> None:
    torch.testing.assert_close(Rotate(degrees=0)(images(), IMAGE, seeded()), images(), atol=1e-5, rtol=0)


def test_cutout_clears_one_square_around_each_samples_own_point() -> None:
    values = images() + 1
    given = Cutout(size=5)(values, IMAGE, seeded())
    for sample, (down, right) in enumerate(uniform(len(values), 2).tolist()):
        top, left = int(down * 12) - 2, int(right * 16) - 2
        expected = values[sample].clone()
        expected[:, max(top, 0) : top + 5, max(left, 0) : left + 5] = 0
        assert torch.equal(given[sample], expected)


def test_to_rgb_repeats_grey_and_keeps_colour() -> None:
    grey = images(channels=1)
    assert torch.equal(ToRgb()(grey, IMAGE, seeded()), torch.cat([grey, grey, grey], dim=1))
    assert torch.equal(ToRgb()(images(), IMAGE, seeded()), images())
    with pytest.raises(ConfigError, match="1 or 3 channels are expected, and these have 2"):
        ToRgb()(images(channels=2), IMAGE, seeded())
