"""The loss of each kind of target, worked out by hand: what is not annotated does not count."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from streamcl.nn.losses import CRITERIA, annotated_binary_cross_entropy, pixel_cross_entropy, squared_error

LN3 = math.log(3.0)


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


def test_labels_by_hand() -> None:
    logits = torch.tensor([[LN3, -LN3, 5.0], [0.0, LN3, -9.0]])
    target = torch.tensor([[1, 0, -1], [-1, 0, -1]], dtype=torch.int8)
    # Probabilities 3/4 of a 1, 1/4 of a 0 and 3/4 of a 0: ln(4/3), ln(4/3) and ln(4), over three annotations.
    assert math.isclose(float(annotated_binary_cross_entropy(logits, target)), (2 * math.log(4 / 3) + math.log(4)) / 3, rel_tol=1e-6)


def test_labels_that_are_all_annotated_give_the_plain_mean() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    target = (torch.arange(20).view(5, 4) % 3 == 0).to(torch.int8)
    assert torch.allclose(annotated_binary_cross_entropy(logits, target), binary_cross_entropy_with_logits(logits, target.float()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 999))
def test_a_label_that_is_not_annotated_has_no_gradient(rows: int, classes: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes + 2, generator=draw).requires_grad_()
    target = torch.randint(-1, 2, (rows, classes), generator=draw).to(torch.int8)
    annotated_binary_cross_entropy(logits, target).backward()
    assert logits.grad is not None
    known = target >= 0
    expected = (logits.detach()[:, :classes].sigmoid() - target.float()) * known / max(int(known.sum()), 1)
    assert torch.allclose(logits.grad[:, :classes], expected, atol=1e-6)
    assert not logits.grad[:, classes:].any(), "classes that came after the samples were labelled"


def test_a_batch_without_an_annotation_costs_nothing_and_breaks_nothing() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = annotated_binary_cross_entropy(logits, torch.full((3, 4), -1, dtype=torch.int8))
    loss.backward()
    assert float(loss.detach()) == 0 and logits.grad is not None and not logits.grad.any()
    pixels = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(pixels, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert float(loss.detach()) == 0 and pixels.grad is not None and not pixels.grad.any()


def test_values_by_hand_with_one_or_several_per_sample() -> None:
    assert float(squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.0]))) == 2.0
    assert float(squared_error(torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [2.0]]))) == 2.0
    assert float(squared_error(torch.tensor([[1.0, 0.0], [2.0, 4.0]]), torch.tensor([[1.0, 2.0], [2.0, 0.0]]))) == 5.0
    values, target = torch.randn(6, 1), torch.randn(6)
    assert torch.allclose(squared_error(values, target), mse_loss(values[:, 0], target)), "never all against all"
    assert squared_error(torch.zeros(2, 1), torch.ones(2, dtype=torch.float64)).dtype == torch.float32


def test_masks_by_hand_count_annotated_pixels_alone() -> None:
    logits = torch.zeros(1, 2, 1, 3)
    logits[0, 1] = torch.tensor([[LN3, LN3, 40.0]])
    target = torch.tensor([[[1, 0, 255]]], dtype=torch.uint8)
    assert math.isclose(float(pixel_cross_entropy(logits, target)), (math.log(4 / 3) + math.log(4)) / 2, rel_tol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_masks_are_the_cross_entropy_of_their_annotated_pixels(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 3, generator=draw).requires_grad_()
    target = torch.randint(0, 4, (2, 3, 3), generator=draw)
    target[torch.rand(2, 3, 3, generator=draw) < 0.4] = 255
    target[0, 0, 0] = 2
    known = target != 255
    loss = pixel_cross_entropy(logits, target.to(torch.uint8))
    pixels: Tensor = logits.permute(0, 2, 3, 1)[known]
    assert torch.allclose(loss, cross_entropy(pixels, target[known]), atol=1e-6)
    loss.backward()
    assert logits.grad is not None and not logits.grad.permute(0, 2, 3, 1)[~known].any()


def test_each_kind_of_target_that_is_learned_by_a_loss_has_one() -> None:
    assert set(CRITERIA) == {"class", "labels", "value", "mask", "image"}
    assert math.isclose(float(CRITERIA["class"](torch.tensor([[LN3, 0.0]]), torch.tensor([0]))), math.log(4 / 3), rel_tol=1e-6)
    assert math.isclose(float(CRITERIA["labels"](torch.tensor([[2.0]]), torch.tensor([[0]]))), softplus(2.0), rel_tol=1e-6)
