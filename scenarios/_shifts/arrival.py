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


def in_blocks(here: Tensor, count: int, ratio: float, seed: int, purpose: Purpose) -> Tensor:
    """The class at each place of SAR's streams with shifting labels, of those that occur `here`  # (count,)

    The stream is cut into as many blocks as classes occur. In each another class is dominant, `ratio` times as probable as any other one.
    """
    draw = generator(seed, *purpose, "blocks")
    occurring = len(here)
    major = torch.randperm(occurring, generator=draw)[torch.arange(count) * occurring // count]
    dominant = torch.rand(count, generator=draw, dtype=torch.float64) < ratio / (ratio + occurring - 1)
    step = torch.randint(1, max(occurring, 2), (count,), generator=draw)  # any other class, all alike
    return here[torch.where(dominant, major, (major + step) % occurring)]


def one_of_each(wanted: Tensor, counts: Tensor, seed: int, purpose: Purpose) -> Tensor:
    """For each wanted class the place of one of its samples among them, at random  # (wanted,)

    All samples of a class (there are `counts`) come before one comes again. The work is that of what is wanted, not of what there is.
    """
    draw = generator(seed, *purpose, "samples")
    asked = torch.bincount(wanted, minlength=len(counts))
    order = wanted.argsort(stable=True)
    class_, turn = wanted[order], torch.arange(len(wanted)) - (asked.cumsum(0) - asked).repeat_interleave(asked)
    place = torch.empty_like(wanted)
    many = 2 * asked > counts  # of these classes all samples are shuffled
    sizes = torch.where(many, counts, 0)
    starts = sizes.cumsum(0) - sizes
    owner = torch.arange(len(counts)).repeat_interleave(sizes)
    shuffled = torch.randperm(len(owner), generator=draw)
    shuffled = shuffled[owner[shuffled].argsort(stable=True)] - starts[owner]  # class after class, each in random order
    full = many[class_]
    place[order[full]] = shuffled[starts[class_[full]] + turn[full] % counts[class_[full]]]
    # Of the others a few are drawn: whoever draws what somebody before has drawn draws again, at most half of them each time.
    few = (~full).nonzero().squeeze(1)
    size, before = counts[class_[few]], (counts.cumsum(0) - counts)[class_[few]]
    drawn, open_ = torch.zeros_like(size), torch.arange(len(few))
    while len(open_):
        random = torch.rand(len(open_), generator=draw, dtype=torch.float64)
        drawn[open_] = (random * size[open_]).long().minimum(size[open_] - 1)
        settled = torch.ones(len(few), dtype=torch.bool)
        settled[open_] = False
        by_value = torch.cat([settled.nonzero().squeeze(1), open_])  # who was there before goes first among equals
        values = (before + drawn)[by_value]
        arranged = values.argsort(stable=True)
        again = torch.cat([torch.zeros(1, dtype=torch.bool), values[arranged].diff() == 0])
        open_ = by_value[arranged[again]].sort().values
    place[order[few]] = drawn
    return place
