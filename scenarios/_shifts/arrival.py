"""In which order the samples of a segment arrive, by their labels: at random, sorted, correlated in time, or one class after another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from streamcl.seeding import derived, generator

Purpose = tuple[object, ...]  # what a draw is for: the parts of its seed


def independent(samples: int, count: int, seed: int, purpose: Purpose) -> Tensor:
    """`count` of the samples at random; once all have come they come again, in another order  # (count,)"""
    draw = generator(seed, *purpose, "samples")
    if 4 * count < samples:  # a few of many: those of a row of draws that had not come before, without a permutation of them all
        row = torch.randint(samples, (2 * count + 64,), generator=draw)
        values, which = row.unique(return_inverse=True)
        if len(values) >= count:
            first = torch.full_like(values, len(row)).scatter_reduce_(0, which, torch.arange(len(row)), "amin")
            return row[first.sort().values[:count]]
    passes = [torch.randperm(samples, generator=draw) for _ in range(-(-count // samples))]
    return torch.cat(passes)[:count] if passes else torch.empty(0, dtype=torch.int64)


def sorted_by_class(labels: Tensor) -> Tensor:
    """Places in the order of the classes' numbers; within a class as they were  # (count,)"""
    return labels.argsort(stable=True)


def correlated(labels: Tensor, classes: int, alpha: float, slots: int, seed: int, purpose: Purpose) -> Tensor:
    """Places in the order of RoTTA's practical streams  # (count,)

    The stream is cut into slots. Each class deals its samples out over the slots by proportions from a Dirichlet distribution, and within
    a slot the classes come one after another, in a random order.
    """
    random = np.random.RandomState(derived(seed, *purpose, "slots") % 2**32)
    # A Dirichlet draw by breaking a stick: with a small alpha every one of its Gamma variables can come out as 0.
    broken = random.beta(alpha, alpha * np.arange(slots - 1, 0, -1), size=(classes, slots - 1))
    taken = torch.from_numpy(np.concatenate([np.zeros((classes, 1)), 1 - np.cumprod(1 - broken, axis=1)], axis=1))  # before each slot
    counts = torch.bincount(labels, minlength=classes)
    starts = counts.cumsum(0) - counts
    bounds = (taken * counts[:, None]).floor().long() + starts[:, None]  # (classes, slots), rising
    by_class = labels.argsort(stable=True)
    cell = torch.searchsorted(bounds.flatten(), torch.arange(len(labels)), right=True) - 1
    # An empty class's bounds are those of the next one, and `right` takes the last of equals: no sample lands in an empty class.
    slot, class_ = cell % slots, cell // slots
    rank = torch.from_numpy(random.rand(slots, classes)).argsort(dim=1).argsort(dim=1)
    return by_class[(slot * classes + rank[slot, class_]).argsort(stable=True)]


def in_blocks(labels: Tensor, classes: int, count: int, ratio: float, seed: int, purpose: Purpose) -> Tensor:
    """Places in the order of SAR's streams with shifting labels  # (count,)

    The stream is cut into as many blocks as classes occur. In each another class is dominant, `ratio` times as probable as any other one.
    """
    draw = generator(seed, *purpose, "blocks")
    here = torch.bincount(labels, minlength=classes).nonzero().squeeze(1)
    occurring = len(here)
    major = torch.randperm(occurring, generator=draw)[torch.arange(count) * occurring // count]
    dominant = torch.rand(count, generator=draw, dtype=torch.float64) < ratio / (ratio + occurring - 1)
    step = torch.randint(1, max(occurring, 2), (count,), generator=draw)  # any other class, all alike
    drawn = torch.where(dominant, major, (major + step) % occurring)
    return _one_of_each(here[drawn], labels, classes)


def _one_of_each(wanted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """A place for each wanted class; a class's samples come in their order, and again from the first once all have come."""
    counts = torch.bincount(labels, minlength=classes)
    starts = counts.cumsum(0) - counts
    asked = torch.bincount(wanted, minlength=classes)
    turn = torch.arange(len(wanted)) - (asked.cumsum(0) - asked).repeat_interleave(asked)  # which one of its class, in order of class
    order = wanted.argsort(stable=True)
    class_ = wanted[order]
    places = torch.empty_like(wanted)
    places[order] = labels.argsort(stable=True)[starts[class_] + turn % counts[class_]]
    return places
