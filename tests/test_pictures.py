"""Painted pictures: how they are scored, by whom, and how they get into a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, normalize

from streamcl import judging
from streamcl.errors import PluginError
from streamcl.evaluation import Evaluation
from streamcl.judging import Judge, Own
from streamcl.metrics import METRICS, Answer, Room
from streamcl.pictures import Gallery, read_sheets, resized, side_by_side
from streamcl.stream import Batch, Modality, Prediction, StreamInfo, Task


class Corners:
    """An encoder that anyone can follow: a picture is the mean of each third of its columns, a text the names in it."""

    about = "columns"

    def pictures(self, pictures: Tensor) -> Tensor:
        return normalize(adaptive_avg_pool1d(pictures.mean(dim=(1, 2)), 3) + 1e-9, dim=1)

    def texts(self, texts: list[str]) -> Tensor:
        return normalize(torch.tensor([[float(name in text) for name in ("red", "green", "blue")] for text in texts]), dim=1)


def bars(*rows: tuple[float, ...]) -> Tensor:
    """Pictures of three columns, each of one brightness."""
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, :].expand(-1, 1, 3, 3).contiguous()


def prompts(*texts: str) -> Batch:
    names = ("red", "green")
    named = torch.tensor([[int(name in text) for name in names] for text in texts], dtype=torch.uint8)
    extra: dict[str, Any] = {"judged": list(texts), "named": named}
    return Batch({"text": list(texts)}, named.argmax(dim=1), torch.arange(len(texts)), extra=extra)


def judge() -> Judge:
    return Judge(Corners(), [bars((1, 0, 0), (3, 4, 0)), bars((0, 1, 0))], [bars((0, 0, 1))])


def value(name: str, batch: Batch, pictures: Tensor, learned: tuple[int, ...] = (0, 1)) -> Any:
    who = judge()
    metric = METRICS[name].load()(Room(2, {0: learned}, judge=who))
    metric.update(Answer(batch, embeddings=who.look(batch, pictures)))
    return metric.compute()


def test_the_scores_of_pictures_as_computed_by_hand() -> None:
    batch = prompts("a red one", "a green one", "red and green", "a red thing")
    shown = bars((1, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 0))
    # the references of red are (1, 0, 0) and (.6, .8, 0): with (1, 0, 0) the cosines are 1 and .6, with (0, 1, 0) they are 0 and .8
    alignment = value("image_alignment", batch, shown)
    assert alignment.value == pytest.approx((0.8 + 0.0 + 0.4) / 3) and alignment.per_class == pytest.approx([0.6, 0.0], abs=1e-6)
    text = value("text_alignment", batch, shown)
    assert text.value == pytest.approx(2.5 / 3, abs=1e-6) and text.per_class == pytest.approx([1.25, 0.0], abs=1e-6)
    together = judge().joint(0, 1)
    # red beside green has its light in the first and the last third, green beside red in the first two; halving blurs a little
    assert together.tolist() == pytest.approx([0.5**0.5, 0.5**1.5, 0.5**1.5], abs=0.12)
    expected = (Corners().pictures(bars((1, 1, 0)))[0] * together).sum()
    assert value("joint_image_alignment", batch, shown).value == pytest.approx(float(expected))
    assert value("joint_text_alignment", batch, shown).value == pytest.approx(2.5)
    assert value("recognised", batch, shown).value == pytest.approx(1 / 3), "the blue one is neither"
    shown[1] = bars((0.3, 0.1, 1))
    assert value("confusion", batch, shown).per_class == pytest.approx([0.5, 1.0]), "of the two, blue is taken for the first"
    assert value("confusion", batch[:1], shown[:1], learned=(1,)).value == 1.0, "the nearest of what was learned so far"
    assert value("joint_image_alignment", batch[:2], shown[:2]).value is None


def test_whatever_is_no_picture_is_refused() -> None:
    for images in (None, torch.zeros(2, 3, 3), torch.zeros(1, 1, 3, 3)):
        with pytest.raises(PluginError, match=r"answered in pictures, and the strategy's predict returned (no images|images of shape)"):
            judge().look(prompts("red", "green"), images)


def test_the_matrix_comes_of_pictures_as_of_any_answer() -> None:
    from streamcl.data import ArrayDataset

    info = StreamInfo(
        {"image": Modality("image", (1, 3, 3)), "text": Modality("text")},
        "image",
        ("image_alignment", "confusion"),
        classes=2,
        asks=("text",),
    )
    evaluation = Evaluation(info, judge=judge)
    sets = [prompts("a red one", "red"), prompts("a green one", "red and green")]
    columns = []
    for index, batch in enumerate(sets):
        data = ArrayDataset(batch.inputs, batch.target, torch.arange(2) + 10 * index, extra=batch.extra)  # type: ignore[arg-type]
        task = Task(index, str(index), data, (index,), tuple(range(index + 1)), names={0: "red", 1: "green"})
        columns.append((task, data))
    painted = {"a red one": (1.0, 0.0, 0.0), "red": (1.0, 0.0, 0.0), "a green one": (0.0, 1.0, 0.0), "red and green": (1.0, 1.0, 0.0)}
    evaluation.score(columns[0][0], columns[:1], lambda batch: Prediction(images=bars(*(painted[t] for t in batch.inputs["text"]))))
    painted["red"] = (0.0, 1.0, 0.0)  # forgotten
    evaluation.score(columns[1][0], columns, lambda batch: Prediction(images=bars(*(painted[t] for t in batch.inputs["text"]))))
    scores = evaluation.scores()
    assert scores["matrix"][0] == pytest.approx([0.8, None]) and scores["matrix"][1] == pytest.approx([0.6, 1.0])
    assert scores["forgetting"] == pytest.approx(0.2) and scores["metrics"]["confusion"]["forgetting"] == pytest.approx(0.5)
    assert scores["per_class"]["classes"] == ["red", "green"]


def test_two_pictures_stand_side_by_side_at_half_their_size() -> None:
    both = side_by_side(torch.ones(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.5), background=-1.0)
    assert both.shape == (2, 1, 8, 8) and bool((both[:, :, 2:6, :4] == 1).all()) and bool((both[:, :, 2:6, 4:] == 0.5).all())
    assert bool((both[:, :, :2] == -1).all()) and bool((both[:, :, 6:] == -1).all())


def test_an_own_judge_knows_real_pictures_alone_and_in_pairs_and_takes_noise_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMCL_CACHE", str(tmp_path))
    pixels, digits = load_digits(n_class=4, return_X_y=True)
    pictures, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.from_numpy(digits)
    names = ["nought", "one", "two", "three"]
    teach = Own.teach
    monkeypatch.setattr(Own, "teach", lambda self, x, y: teach(self, x, y, steps=120))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    own = judging.trained(names, pictures[:400], labels[:400])
    assert torch.equal(torch.get_rng_state(), before)
    real, right = resized(pictures[400:], 16), labels[400:]
    assert float(((own.pictures(real) @ own.texts(names).T).argmax(dim=1) == right).float().mean()) > 0.9
    texts = own.texts([f"a photo of {names[a]} next to {names[b]}" for a, b in zip(right.tolist(), right.flip(0).tolist(), strict=True)])
    aligned = (own.pictures(side_by_side(real, real.flip(0))) * texts).sum(dim=1)
    assert float(aligned.mean()) > 0.4 > 0.2 + float((own.pictures(real) * texts.roll(1, 0)).sum(dim=1).mean())
    noise = own.pictures(torch.rand(100, 1, 16, 16))
    assert float((noise @ own.texts(names).T).max(dim=1).values.mean()) < 0.5
    monkeypatch.setattr(Own, "teach", lambda *_: pytest.fail("it was trained before"))
    again = judging.trained(names, pictures[:400], labels[:400])
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_gallery_keeps_the_first_pictures_of_each_concept_and_the_report_reads_them(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path)
    gallery.open({0: "Rot & Grün", 1: "green"})
    batch = prompts(*["red"] * 10, "red and green", "green")
    gallery.add(batch, torch.linspace(0, 1, 12)[:, None, None, None].expand(-1, 3, 4, 4))
    gallery.close(1)
    (sheet,) = read_sheets(tmp_path)
    assert sheet.after == 2 and list(sheet.rows) == ["Rot & Grün", "green", "Rot & Grün + green"]
    assert [count for _, count in sheet.rows.values()] == [8, 1, 1], "the first ones, at most eight"
    gallery.open({})
    gallery.close(2)
    (tmp_path / "pictures" / "after-0003.png").write_bytes(b"torn")
    assert len(read_sheets(tmp_path)) == 1 and read_sheets(tmp_path / "nowhere") == []
