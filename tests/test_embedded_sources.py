"""Sources that are made on the spot: what a target says is what an independent look at the sample finds, and no split sees the other's."""

import io
import math
import os
import re
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull
from sklearn.datasets import load_digits
from streamcl.scenarios.sources._drawn import Draws
from streamcl.scenarios.sources._sound import FLOOR, LogMel, resample
from streamcl.scenarios.sources.audio import Audio
from streamcl.scenarios.sources.digit_scenes import DigitScenes
from streamcl.scenarios.sources.digits import Digits
from streamcl.scenarios.sources.digits_av import DigitsAv
from streamcl.scenarios.sources.shapes import MOODS, SHAPES, Shapes

from streamcl.data import whole
from streamcl.errors import ConfigError, DataError
from streamcl.plugins import plugins

DATA = os.environ.get("STREAMCL_DATA")
real_data = pytest.mark.skipif(not DATA or not (Path(DATA) / "fsdd-test.parquet").exists(), reason="STREAMCL_DATA is not there")

RGB = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (70, 110, 255),
    "yellow": (240, 220, 40),
    "purple": (190, 70, 220),
    "orange": (255, 140, 20),
}


def within(count, trials, chance):
    """Whether a count lies within five deviations of what is expected."""
    return abs(count - trials * chance) <= 5 * math.sqrt(trials * chance * (1 - chance)) + 1e-9


def same(one, other):
    return one.inputs.keys() == other.inputs.keys() and all(
        torch.equal(value, other.inputs[name]) if isinstance(value, torch.Tensor) else value == other.inputs[name]
        for name, value in one.inputs.items()
    )


# Randomness by sample -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 2**62))
def test_a_samples_numbers_do_not_depend_on_its_company(rows, count, seed):
    draws, rows = Draws(seed, "x"), np.array(rows)
    together = draws.uniform(rows, "a", count)
    assert ((together >= 0) & (together < 1)).all()
    for place, row in enumerate(rows[:5]):
        assert (draws.uniform(rows[place : place + 1], "a", count) == together[place]).all()
        assert (draws.noise(np.array([row]), "a", count) == draws.noise(rows, "a", count)[place]).all()
    assert (draws.uniform(rows, "b", count) != together).any()


def test_drawn_numbers_are_spread_evenly_and_unrelated():
    draws = Draws(3, "x")
    values = draws.uniform(np.arange(20000), "a", 4)
    for column in values.T:
        assert all(within(count, 20000, 1 / 16) for count in np.bincount((column * 16).astype(int), minlength=16))
    related = np.corrcoef(np.concatenate([values[:-1], values[1:]], axis=1).T) - np.eye(8)
    assert np.abs(related).max() < 5 / math.sqrt(20000)
    noise = draws.noise(np.arange(500), "n", 400).astype(np.float64)
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * math.sqrt((3 - 0.3 - 1) / noise.size)  # a sum of four uniform numbers has a kurtosis of 3 - 1.2 / 4


# What holds for all of them -------------------------------------------------------------------------------------------------------

MADE = {
    "labels": lambda **o: DigitScenes(scenes=o.pop("n", 40), test_scenes=20, domains=["plain", "coloured", "noisy", "striped"], **o),
    "captions": lambda **o: DigitScenes(as_="captions", scenes=o.pop("n", 40), test_scenes=20, **o),
    "dialogues": lambda **o: DigitScenes(as_="dialogues", scenes=o.pop("n", 40), test_scenes=20, **o),
    "masks": lambda **o: DigitScenes(as_="masks", overlap=True, scenes=o.pop("n", 40), test_scenes=20, **o),
    "shapes": lambda **o: Shapes(samples=o.pop("n", 40), test_samples=20, noise={"image": 0.3, "audio": 0.5}, **o),
    "spectra": lambda **o: Shapes(samples=o.pop("n", 40), test_samples=20, audio_as="log_mel", **o),
    "tones": lambda **o: DigitsAv(samples=o.pop("n", 40), test_samples=20, audio_as="log_mel", seconds=0.4, **o),
}


@pytest.mark.parametrize("make", MADE.values(), ids=list(MADE))
def test_the_same_seed_gives_the_same_bytes_however_and_however_many_are_read(make):
    data, lazy, longer, other = make().load(), make(draw="lazy").load(), make(n=700).load(), make(seed=1).load()
    everything = whole(data.train)
    assert same(everything, whole(make().load().train)) and not same(everything, whole(other.train))
    assert torch.equal(data.train.targets, lazy.train.targets) and torch.equal(data.train.targets, longer.train.targets[:40])
    assert same(everything, longer.train[torch.arange(40)])
    some = torch.tensor([31, 2, 2, 17])
    assert same(everything[some], lazy.train[some])
    for row in some.tolist():
        assert same(everything[[row]], lazy.train[torch.tensor([row])])
    assert not same(whole(data.test), everything[list(range(20))])
    assert data.test.ids.tolist() == list(range(40, 60)) and data.train.ids.tolist() == list(range(40))
    for name, modality in data.modalities.items():
        column = everything.inputs[name]
        assert modality.kind == "text" or tuple(column.shape[1:]) == modality.shape
    for grouping in data.groupings.values():
        assert len(grouping.train) == 40 and len(grouping.test) == 20 and int(grouping.train.max()) < len(grouping.names)


# Scenes of digits -----------------------------------------------------------------------------------------------------------------


def raw_digits():
    """Every digit of scikit-learn as the bytes it has on a canvas at scale 1: its row and its class."""
    pixels, classes = load_digits(return_X_y=True)
    drawn = np.rint(pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    known = {image.tobytes(): (row, int(digit)) for row, (image, digit) in enumerate(zip(drawn, classes, strict=True))}
    assert len(known) == len(classes)  # no two are the same, so a picture tells which one it is
    return known


def test_labels_are_what_the_pixels_show_and_no_split_shows_the_others_digits():
    known, digits = raw_digits(), Digits().load()
    data = DigitScenes(scenes=300, test_scenes=300, scale=1).load()
    for part, allowed in ((data.train, digits.train), (data.test, digits.test)):
        allowed, batch, seen = set(allowed.ids.tolist()), whole(part), set()
        for image, label, boxes in zip(batch.inputs["image"][:, 0].numpy(), batch.target, batch.extra["boxes"].tolist(), strict=True):
            rest, found = image.copy(), set()
            for left, top, right, bottom in boxes:
                if left >= 0:
                    row, digit = known[image[top:bottom, left:right].tobytes()]
                    seen.add(row)
                    found.add(digit)
                    rest[top:bottom, left:right] = 0
            assert rest.max() == 0 and found == set(label.nonzero().squeeze(1).tolist())
        assert seen <= allowed and len(seen) > 200


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 4), st.integers(0, 20), st.booleans(), st.integers(0, 99))
def test_scenes_hold_as_many_digits_as_asked_inside_the_canvas_and_apart(scale, least, more, room, overlap, seed):
    most = least + more
    size = 8 * scale * math.ceil(math.sqrt(most)) + room
    scenes = DigitScenes(scenes=30, test_scenes=1, size=size, digits=(least, most), scale=scale, overlap=overlap, seed=seed, as_="value")
    data = scenes.load()
    boxes, labels = data.train.extra["boxes"].numpy(), data.train.extra["box_labels"].numpy()
    assert boxes.shape == (30, most, 4)
    for own, classes in zip(boxes, labels, strict=True):
        own = own[classes >= 0]
        assert least <= len(own) <= most and own.min() >= 0 and own.max() <= size
        sides = own[:, 2:] - own[:, :2]
        assert (sides[:, 0] == sides[:, 1]).all() and set(sides[:, 0].tolist()) <= {8 * factor for factor in range(1, scale + 1)}
        covered = np.zeros((size, size), int)
        for left, top, right, bottom in own:
            covered[top:bottom, left:right] += 1
        assert overlap or covered.max() <= 1


def test_every_digit_is_equally_likely_and_so_is_every_count():
    data = DigitScenes(scenes=3000, as_="value", value="count").load()
    labels = data.train.extra["box_labels"]
    assert all(within(count, int((labels >= 0).sum()), 0.1) for count in torch.bincount(labels[labels >= 0], minlength=10).tolist())
    assert all(within(count, 3000, 0.25) for count in torch.bincount(data.train.targets.long(), minlength=5).tolist()[1:])


@pytest.mark.parametrize(("value", "of"), [("sum", sum), ("mean", np.mean), ("largest", max), ("count", len)])
def test_a_value_is_that_of_the_digits_there_are(value, of):
    data = DigitScenes(scenes=50, as_="value", value=value).load()
    wanted = [of([digit for digit in row if digit >= 0]) for row in data.train.extra["box_labels"].tolist()]
    assert data.target == "value" and torch.allclose(data.train.targets, torch.tensor(wanted, dtype=torch.float32))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_mask_says_whose_ink_a_pixel_has(overlap):
    data = DigitScenes(scenes=200, as_="masks", overlap=overlap).load()
    batch = whole(data.train)
    image, mask = batch.inputs["image"][:, 0], batch.target
    assert data.class_names[10] == "background" and torch.equal(mask != 10, image >= 64)
    for row, (boxes, classes) in enumerate(zip(batch.extra["boxes"].tolist(), batch.extra["box_labels"].tolist(), strict=True)):
        allowed = torch.zeros(11, 32, 32, dtype=torch.bool)
        allowed[10] = True
        for (left, top, right, bottom), digit in zip(boxes, classes, strict=True):
            if digit >= 0:
                allowed[digit, top:bottom, left:right] = True
                assert overlap or (mask[row, top:bottom, left:right] == digit).sum() >= 8
        assert bool(allowed.gather(0, mask[row].long()[None]).all())


def test_where_digits_meet_a_pixel_is_of_the_one_with_more_ink():
    digits = Digits().load().train
    ink = (digits.inputs["image"][:, 0].float() * 255 / 16).round().to(torch.uint8)
    data = DigitScenes(scenes=40, as_="masks", overlap=True, scale=1, size=13, digits=(2, 2)).load()
    batch, met = whole(data.train), 0
    for image, mask, boxes, classes in zip(
        batch.inputs["image"][:, 0], batch.target, batch.extra["boxes"].tolist(), batch.extra["box_labels"].tolist(), strict=True
    ):
        layers = []
        for (left, top, right, bottom), digit in zip(boxes, classes, strict=True):
            fits = ink[(digits.targets == digit) & (ink <= image[top:bottom, left:right]).all(dim=(1, 2))]
            layers.append(torch.zeros(len(fits), 13, 13, dtype=torch.uint8))
            layers[-1][:, top:bottom, left:right] = fits
        first, second = layers[0][:, None], layers[1][None]
        drawn = (torch.maximum(first, second) == image).all(dim=(2, 3)).nonzero().tolist()
        assert len(drawn) == 1  # the only two digits of which this scene can be made
        one, other = layers[0][drawn[0][0]], layers[1][drawn[0][1]]
        whose = torch.where(one > other, classes[0], classes[1])
        sure = (image >= 64) & (one != other)
        met += int((torch.minimum(one, other)[sure] > 0).sum())
        assert torch.equal(mask[sure].long(), whose[sure])
    assert met > 100


def test_an_inverted_scene_is_the_plain_one_inverted_and_stripes_leave_its_digits():
    looks = {look: whole(DigitScenes(scenes=30, domains=[look]).load().train).inputs["image"] for look in ("plain", "inverted", "striped")}
    assert torch.equal(looks["inverted"], 255 - looks["plain"])
    assert set(looks["striped"][looks["plain"] == 0].tolist()) == {20, 90} and (looks["striped"][looks["plain"] == 255] == 255).all()


def where_is(box, size):
    """The words for a box's place, by thirds."""
    left, top, right, bottom = box
    row, column = (("top", "", "bottom")[int((a + b) / 2 / (size / 3))] for a, b in ((top, bottom), (left, right)))
    column = {"top": "left", "bottom": "right"}.get(column, "")
    return f"{row} {column}".strip() or "centre"


def test_captions_are_true_and_pairs_are_equal_captions():
    data = DigitScenes(as_="captions", scenes=400, digits=(1, 4)).load()
    batch = whole(data.train)
    phrase = re.compile(r"(?:a|an) (small|large) (?:(red|green|blue|yellow|purple|orange) )?(\d) (?:at|in) the ([a-z ]+?)(?:,| and|\.)")
    for row, text in enumerate(batch.inputs["text"]):
        said = phrase.findall(text[0].lower() + text[1:])
        there = []
        for box, digit in zip(batch.extra["boxes"][row].tolist(), batch.extra["box_labels"][row].tolist(), strict=True):
            if digit < 0:
                continue
            colour = ""
            if data.class_names[batch.target[row]] == "coloured":
                left, top, right, bottom = box
                patch = batch.inputs["image"][row, :, top:bottom, left:right].flatten(1).float()
                ink = patch[:, patch.sum(0).argmax()]
                colour = min(RGB, key=lambda name: (ink - torch.tensor(RGB[name])).square().sum())
            there.append(("small" if box[2] - box[0] == 8 else "large", colour, str(digit), where_is(box, 32)))
        assert Counter(said) == Counter(there), text
    pairs = Counter(zip(batch.inputs["text"], batch.extra["pair"].tolist(), strict=True))
    assert len(pairs) == len(set(batch.inputs["text"])) == len(set(batch.extra["pair"].tolist()))
    times = Counter(zip(batch.inputs["text"], batch.target.tolist(), strict=True))
    assert data.about["coinciding_captions"]["train"] == sum(count for count in times.values() if count > 1) > 0
    assert batch.extra["answer"] == batch.extra["caption"] == batch.inputs["text"]


def test_answers_follow_from_the_boxes_and_their_verifiers_say_so():
    data = DigitScenes(as_="dialogues", scenes=1000).load()
    batch, verifiers = whole(data.train), plugins("verifier")
    judges = {name: verifiers[name].load()() for name in set(batch.extra["verifier"])}
    assert torch.bincount(batch.target).tolist() == [200] * 5
    yes = 0
    for row, (question, answer) in enumerate(zip(batch.inputs["text"], batch.extra["answer"], strict=True)):
        there = [
            (digit, box)
            for digit, box in zip(batch.extra["box_labels"][row].tolist(), batch.extra["boxes"][row].tolist(), strict=True)
            if digit >= 0
        ]
        digits, kind = [digit for digit, _ in there], batch.extra["skill"][row]
        asked = int(found[0]) if (found := re.search(r"\d", question)) else None
        if kind == "position":
            (box,) = [box for digit, box in there if digit == asked]
            wanted = where_is(box, 32)
        elif kind == "present":
            wanted = "yes" if asked in digits else "no"
            yes += wanted == "yes"
        else:
            wanted = str({"count": len, "sum": sum, "largest": max}[kind](digits))
        assert answer == wanted and kind == data.class_names[batch.target[row]]
        assert batch.extra["difficulty"][row] == (2 * len(digits) - 1 if kind == "sum" else len(digits))
        choices = batch.extra["choices"][row]
        assert (answer in choices.split("\n")) if choices else kind in ("count", "sum", "largest")
    for name, judge in judges.items():
        mine = [row for row, its in enumerate(batch.extra["verifier"]) if its == name]
        rows = {key: [batch.extra[key][row] for row in mine] for key in ("answer", "choices")}
        assert judge(rows["answer"], rows).tolist() == [1.0] * len(mine)
        assert judge(["never"] * len(mine), rows).tolist() == [0.0] * len(mine)
    assert within(yes, 200, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 20}, "4 digits of scale 2 find no room apart"),
        ({"digits": (3, 1)}, "the fewest come first"),
        ({"size": 8, "overlap": True}, "a digit of scale 2 takes 16 pixels"),
        ({"value": "sum"}, "value belongs to `as: value`"),
        ({"as_": "dialogues", "overlap": True}, "no certain answer"),
        ({"as_": "dialogues", "digits": (1, 11), "size": 64}, "at most 10"),
        ({"test_fraction": 0.0}, "test scenes need digits of their own"),
        ({"domains": ["plain", "plain"]}, "lists one twice"),
    ],
)
def test_scenes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        DigitScenes(**options)


# Shapes ---------------------------------------------------------------------------------------------------------------------------

CLEAN = {"domains": ["dark"], "grain": {"image": 0, "audio": 0}}


def seen_shape(cover):
    """Which shape a set of pixels is, by geometry alone: how much of its hull and of its surrounding circle it fills."""
    points = np.argwhere(cover)
    corners = np.concatenate([points + step for step in ((0, 0), (0, 1), (1, 0), (1, 1))])
    hull = ConvexHull(corners)
    centre = points.mean(axis=0) + 0.5
    solid, round_ = len(points) / hull.volume, len(points) / (math.pi * (np.hypot(*(corners - centre).T).max() - 0.5) ** 2)
    if not cover[tuple(centre.astype(int))]:
        return "ring"
    if solid > 0.85:  # of a circle 1, of a square 2 / pi, of a triangle 0.41 of the surrounding circle is filled
        return "circle" if round_ > 0.82 else "square" if round_ > 0.52 else "triangle"
    return "cross" if solid > 0.595 else "star"  # of the hull of the cross 0.67 is filled, of the star's 0.52


def seen_colour(image, cover):
    ink = image[:, cover].float().median(dim=1).values
    return min(RGB, key=lambda name: (ink - torch.tensor(RGB[name])).square().sum())


def heard_shape(wave):
    """The lowest strong frequency, as the nearest of the shapes' pitches."""
    strength = np.abs(np.fft.rfft(wave))
    lowest = np.flatnonzero(strength > 0.3 * strength.max())[0] * 8000 / len(wave)
    return SHAPES[int(np.clip(round(2 * math.log2(lowest / 150)), 0, 5))]


def test_image_sentence_tone_and_mask_show_the_class():
    options = {"classes": "shape_colour", "samples": 150, "size": 96, **CLEAN}
    data, masks = Shapes(**options).load(), Shapes(target="mask", **options).load()
    batch, mask = whole(data.train), masks.train.targets
    assert masks.class_names[36] == "background"
    for row, target in enumerate(batch.target.tolist()):
        colour, shape = data.class_names[target].split()
        cover = (mask[row] != 36).numpy()
        assert set(mask[row].unique().tolist()) == {target, 36}
        coloured = (batch.inputs["image"][row].float().std(dim=0) > 18).numpy()  # the background is grey
        assert np.logical_xor(cover, coloured).sum() < 0.15 * cover.sum()  # they differ on the edge alone
        assert (seen_shape(cover), seen_colour(batch.inputs["image"][row], torch.from_numpy(cover))) == (shape, colour)
        assert f" {colour} {shape}." in batch.inputs["text"][row]
        assert heard_shape(batch.inputs["audio"][row].numpy()) == shape


def test_classes_are_balanced_and_a_noisy_modality_errs_at_its_rate():
    data = Shapes(samples=3000, size=16, seconds=0.01, noise={"text": 0.3}).load()
    assert all(within(count, 3000, 1 / 6) for count in torch.bincount(data.train.targets, minlength=6).tolist())
    named = [f"{data.class_names[target]}." for target in data.train.targets.tolist()]
    wrong = sum(name not in text for name, text in zip(named, data.train.inputs["text"], strict=True))
    assert within(wrong, 3000, 0.3 * 5 / 6)
    clean = Shapes(samples=3000, size=16, seconds=0.01).load()
    assert torch.equal(clean.train.targets, data.train.targets) and torch.equal(clean.train.inputs["audio"], data.train.inputs["audio"])
    assert all(name in text for name, text in zip(named, clean.train.inputs["text"], strict=True))
    value = Shapes(target="value", weights={"text": 1}, samples=3000, size=16, seconds=0.01, noise={"text": 0.4}).load()
    steps = [round(step + 3) for step in value.train.targets.tolist()]
    right = sum(f"{MOODS[step]} " in text for step, text in zip(steps, value.train.inputs["text"], strict=True))
    assert within(right, 3000, 0.6 + 0.4 / 7)


def test_modalities_that_tell_different_things_tell_the_class_together_only():
    tells = {"image": ["colour"], "text": ["shape"], "audio": []}
    data = Shapes(classes="shape_colour", samples=400, size=64, tells=tells, **CLEAN).load()
    seen_right = heard_right = 0
    for target, image, text, sound in zip(data.train.targets.tolist(), *data.train.inputs.values(), strict=True):
        colour, shape = data.class_names[target].split()
        cover = image.float().std(dim=0) > 18
        assert seen_colour(image, cover) == colour
        assert f" {shape}." in text and not any(name in text for name in RGB)
        seen_right += seen_shape(cover.numpy()) == shape
        heard_right += heard_shape(sound.numpy()) == shape
    assert within(seen_right, 400, 1 / 6) and within(heard_right, 400, 1 / 6)


def test_the_value_is_composed_of_what_the_modalities_show():
    def values(weights):
        return Shapes(target="value", samples=100, size=64, weights=weights, **CLEAN).load().train

    size, mood, glide, all_ = (values(weights) for weights in ({"image": 1}, {"text": 2}, {"audio": 0.5}, None))
    assert torch.allclose(all_.targets, (size.targets + mood.targets + glide.targets) / 3, atol=1e-5)
    double = values({"image": 2, "text": 1})
    assert torch.allclose(double.targets, (2 * size.targets + mood.targets) / 3, atol=1e-5)
    for row, text in enumerate(mood.inputs["text"]):
        (step,) = [place for place, words in enumerate(MOODS) if f"{words} " in text]
        assert mood.targets[row] == pytest.approx(step - 3, abs=1e-6)
        cover = (size.inputs["image"][row].float().std(dim=0) > 18).numpy()
        if seen_shape(cover) == "circle":
            assert size.targets[row] == pytest.approx(3 * (math.sqrt(cover.sum() / math.pi) / 64 - 0.26) / 0.09, abs=0.25)
        wave = glide.inputs["audio"][row].numpy()
        middle = np.flatnonzero(np.abs(wave) > 0.5 * np.abs(wave).max())
        if abs(glide.targets[row]) > 1.5:
            first, last = np.array_split(wave[middle[0] : middle[-1]], 2)
            rises = crossings(last) > crossings(first)
            assert rises == (glide.targets[row] > 0)


def crossings(wave):
    """The mean frequency of the strongest partials, by the centre of the spectrum's power."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
    return (np.fft.rfftfreq(len(wave)) * power).sum() / power.sum()


def test_backgrounds_are_dealt_out_in_turn():
    data = Shapes(samples=40, grain={"image": 0}).load()
    batch, domain = whole(data.train), data.groupings["domain"]
    assert domain.names == ["dark", "light", "stripes", "checks"] and domain.train.tolist() == [0, 1, 2, 3] * 10
    corners = batch.inputs["image"][:, 0, ::31, ::31].flatten(1).float()
    assert (corners[domain.train == 0].median(dim=1).values < 45).all() and (corners[domain.train == 1].median(dim=1).values > 180).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 8}, "below 16 pixels"),
        ({"weights": {"image": 1}}, "weights compose the value"),
        ({"target": "value", "weights": {"image": 0}}, "all of them are 0"),
        ({"hop": 300}, "hop may be at most n_fft"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Shapes(**options)


# Sounds ---------------------------------------------------------------------------------------------------------------------------


def wav(samples, rate=8000):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.asarray(samples, dtype="<i2").tobytes())
    return stream.getvalue()


def plain_log_mel(samples, rate, n_fft, hop, mels, fmin, fmax):
    """The transform as its definition reads, a frame and a band at a time, in double precision."""
    padded = np.pad(np.asarray(samples, dtype=np.float64), n_fft // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    low, high = (1127.010480 * math.log(1 + f / 700) for f in (fmin, fmax))
    edges = [700 * (math.exp((low + (high - low) * step / (mels + 1)) / 1127.010480) - 1) for step in range(mels + 2)]
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft
    frames = []
    for start in range(0, len(samples) + 1, hop):
        power = np.abs(np.fft.rfft(padded[start : start + n_fft] * window)) ** 2
        frames.append([math.log(max(FLOOR, power @ np.interp(frequencies, edges[m : m + 3], [0, 1, 0]))) for m in range(mels)])
    return np.array(frames).T


@pytest.mark.parametrize(("n_fft", "hop", "mels", "fmin", "fmax"), [(256, 128, 32, 0, 4000), (200, 80, 20, 50, 3000)])
def test_log_mel_is_its_definition(n_fft, hop, mels, fmin, fmax):
    random = np.random.default_rng(0)
    waves = random.normal(size=(19, 1000)).astype(np.float32) * random.uniform(0.001, 0.5, size=(19, 1)).astype(np.float32)
    waves[3] = 0
    spectra = LogMel(8000, n_fft=n_fft, hop=hop, mels=mels, fmin=fmin, fmax=fmax)(torch.from_numpy(waves)).numpy()
    for wave_, spectrum in zip(waves, spectra, strict=True):
        assert np.abs(spectrum - plain_log_mel(wave_, 8000, n_fft, hop, mels, fmin, fmax)).max() < 1e-3
    assert spectra[3] == pytest.approx(math.log(FLOOR))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fmax": 5000.0}, "the bands lie between 0 and 4000 Hz"), ({"fmin": 4000.0}, "fmin first"), ({"mels": 100}, "give fewer mels")],
)
def test_bands_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        LogMel(8000, **{"n_fft": 256, "hop": 128, "mels": 32, "fmin": 0.0, "fmax": None, **options})


def test_a_resampled_tone_keeps_its_pitch():
    time = np.arange(8000) / 8000
    tone = torch.from_numpy(np.sin(2 * np.pi * 440 * time).astype(np.float32))[None]
    wanted = np.sin(2 * np.pi * 440 * np.arange(6000) / 6000)
    assert np.abs(resample(tone, 8000, 6000)[0].numpy() - wanted)[200:-200].max() < 0.01


def spoken(folder, rate=8000):
    """WAV files of digits: 3 takes of each of 2 speakers; every sample of a file is 100 times its digit, plus its number of 6."""
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
        for number, (speaker, take) in enumerate((s, t) for s in ("ann", "bob") for t in range(3)):
            (folder / str(digit) / f"{digit}_{speaker}_{take}.wav").write_bytes(wav([100 * digit + number] * 8, rate))
    return str(folder)


def told(audio):
    """The digit and the number of each constant sound."""
    values = (audio[:, 0] * 32768).round().long()
    return values // 100, values % 100


@pytest.mark.parametrize("decode", ["eager", "lazy"])
def test_a_folder_of_sounds_knows_its_speakers(tmp_path, decode):
    data = Audio(path=spoken(tmp_path / "a"), speaker="_(.+)_", test_fraction=0.34, decode=decode, workers=0).load()
    assert data.groupings["speaker"].names == ["ann", "bob"] and (len(data.train), len(data.test)) == (40, 20)
    for part, speakers in ((data.train, data.groupings["speaker"].train), (data.test, data.groupings["speaker"].test)):
        batch = whole(part)
        digit, number = told(batch.inputs["audio"])
        assert set(batch.inputs) == {"audio"} and torch.equal(digit, batch.target) and torch.equal(number // 3, speakers)
    assert data.modalities["audio"].shape == (8,) and data.about["audio"] == {"rate": 8000, "as": "waveform"}


def test_sounds_that_are_left_out_take_their_speaker_with_them(tmp_path):
    folder = Path(spoken(tmp_path / "a"))
    (folder / "0" / "0_ann_1.wav").write_bytes(b"no sound")
    data = Audio(path=str(folder), speaker="_(.+)_", on_error="skip").load()
    assert data.problems == {"audio that does not decode": 1} and len(data.train) == 59
    assert torch.equal(told(whole(data.train).inputs["audio"])[1] // 3, data.groupings["speaker"].train)


def test_parquet_names_speakers_by_a_column_or_by_its_files_names(tmp_path):
    sounds = [{"bytes": wav([n] * 4), "path": f"dir/{n}_{who}_x.wav"} for n, who in enumerate("bab")]
    pq.write_table(pa.table({"audio": sounds, "label": [0, 1, 1], "who": ["b", "a", "c"]}), tmp_path / "a.parquet")
    by_column = Audio(path=str(tmp_path / "a.parquet"), speaker="who").load().groupings["speaker"]
    assert (by_column.names, by_column.train.tolist(), by_column.test) == (["a", "b", "c"], [1, 0, 2], None)
    by_name = Audio(path=str(tmp_path / "a.parquet"), speaker="^._(.)_").load().groupings["speaker"]
    assert (by_name.names, by_name.train.tolist()) == (["a", "b"], [1, 0, 1])
    with pytest.raises(DataError, match=r"a\.parquet: there is no column 'whom' \(speaker\): there are audio, label, who"):
        Audio(path=str(tmp_path / "a.parquet"), speaker="whom").load()
    with pytest.raises(
        DataError,
        match=r"a\.parquet, row 0: speaker: #\(\.\) finds nobody in 0_b_x\.wav: .* \(and 2 more such\)",
    ):
        Audio(path=str(tmp_path / "a.parquet"), speaker="#(.)").load()


def test_sounds_are_turned_alike_at_once_and_when_they_are_read(tmp_path):
    random = np.random.default_rng(0)
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for number in range(9):
            (tmp_path / name / f"{number}.wav").write_bytes(wav(random.integers(-9000, 9000, 300), 8000))
    options = {"path": str(tmp_path), "rate": 4000, "audio_as": "log_mel", "n_fft": 64, "hop": 32, "mels": 8}
    eager, lazy = Audio(decode="eager", **options).load(), Audio(decode="lazy", **options).load()
    assert eager.modalities == lazy.modalities and eager.modalities["audio"].shape == (8, 5)
    assert eager.about["audio"]["rate"] == 4000 and eager.about["audio"]["fmax"] == 2000
    some = torch.tensor([4, 17, 4, 0])
    assert torch.equal(eager.train[some].inputs["audio"], lazy.train[some].inputs["audio"])
    (batch,) = Audio(path=str(tmp_path)).load().train.batches(18)
    expected = plain_log_mel(resample(batch.inputs["audio"], 8000, 4000)[4].numpy(), 4000, 64, 32, 8, 0, 2000)
    assert np.abs(eager.train[some].inputs["audio"][0].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speaker": "_(.+"}, "no regular expression"),
        ({"speaker": "_.+_"}, "with one group"),
        ({"size": 3}, "size belongs to images"),
    ],
)
def test_sounds_that_cannot_be_read_so_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Audio(path="x", **options)


# Seen and heard -------------------------------------------------------------------------------------------------------------------


def test_a_synthesised_tone_is_as_high_as_its_digit_and_the_images_are_those_of_the_digits():
    digits, data = Digits().load(), DigitsAv(noise=0.0).load()
    for part, images in ((data.train, digits.train), (data.test, digits.test)):
        assert torch.equal(part.targets, images.targets) and torch.equal(part.inputs["image"], images.inputs["image"])
    strength = np.abs(np.fft.rfft(data.test.inputs["audio"].numpy()))
    lowest = (strength > 0.3 * strength.max(axis=1, keepdims=True)).argmax(axis=1)  # in Hz: the sounds last a second
    assert np.array_equal(np.rint(4 * np.log2(lowest / 200)), data.test.targets.numpy())
    assert data.about["audio"]["synthesised"] is True
    voices = data.groupings["speaker"]
    assert all(within(count, 1258, 1 / 6) for count in torch.bincount(voices.train, minlength=len(voices.names)).tolist())
    assert whole(DigitsAv(samples=3000, seconds=0.01).load().train).inputs["image"].shape == (3000, 1, 8, 8)


@pytest.mark.parametrize("own_test", [True, False])
def test_recordings_have_the_class_of_their_image_and_keep_to_their_split(tmp_path, own_test):
    train, test = spoken(tmp_path / "a"), spoken(tmp_path / "b") if own_test else None
    data = DigitsAv(audio=train, audio_test=test, seconds=0.001, samples=2000, test_samples=1000).load()
    heard = []
    for part, speakers in ((data.train, data.groupings["speaker"].train), (data.test, data.groupings["speaker"].test)):
        batch = whole(part)
        digit, number = told(batch.inputs["audio"])
        assert torch.equal(digit, batch.target) and torch.equal(number // 3, speakers)
        heard.append(set(zip(digit.tolist(), number.tolist(), strict=True)))
    assert len(heard[0] | heard[1]) == 60  # every recording is heard
    assert own_test or not heard[0] & heard[1]
    assert data.about["audio"]["synthesised"] is False and data.modalities["audio"].shape == (8,)


def test_recordings_that_lack_a_digit_are_told(tmp_path):
    folder = Path(spoken(tmp_path / "a"))
    test = Path(spoken(tmp_path / "b"))
    for file in (test / "7").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"b \(test\): there is no recording of 7"):
        DigitsAv(audio=str(folder), audio_test=str(test), seconds=0.001).load()
    for file in (folder / "7").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="recordings of the classes 0 to 9 are needed, and there are 0, 1, 2, 3, 4, 5, 6, 8, 9"):
        DigitsAv(audio=str(folder), audio_test=str(test), seconds=0.001).load()
    with pytest.raises(ConfigError, match="audio_test is given and audio is not"):
        DigitsAv(audio_test="x")


@real_data
def test_real_spoken_digits_join_their_images():
    data = DigitsAv(audio="fsdd-train.parquet", audio_test="fsdd-test.parquet", audio_as="log_mel").load()
    assert data.groupings["speaker"].names == ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]
    assert (len(data.train), len(data.test)) == (1258, 539) and data.modalities["audio"].shape == (32, 63)
    sounds = Audio(path="fsdd-train.parquet", test="fsdd-test.parquet", seconds=1.0, audio_as="log_mel").load()
    for part, source in ((data.train, sounds.train), (data.test, sounds.test)):
        digit_of = {sound.numpy().tobytes(): int(digit) for sound, digit in zip(source.inputs["audio"], source.targets, strict=True)}
        for sound, digit in zip(part.inputs["audio"], part.targets, strict=True):
            assert digit_of[sound.numpy().tobytes()] == digit
