"""The domains of a test-time stream and the segments in which they come: one corruption, several at once, or a modality taken away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from streamcl.seeding import generator

GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)
STRENGTHS = ("clean", "weak", "strong")  # nothing is wrong; one modality is corrupted; several are, or one is absent

Combine = Literal["each", "interleaved", "together", "weak_and_strong"]


@dataclass(frozen=True)
class Shift:
    """What is wrong with a sample: a corruption for each of some modalities, at one severity, and the modalities that are absent."""

    domain: str
    corruptions: Mapping[str, str] = field(default_factory=dict)  # modality -> corruption
    severity: int | None = None
    absent: tuple[str, ...] = ()


CLEAN = Shift("clean")


@dataclass(frozen=True)
class Segment:
    """One task of the stream: a single shift, or several whose samples are mixed."""

    name: str
    shifts: tuple[Shift, ...]
    place: int | None = None  # among the segments that have something wrong, counted from 0
    halved: bool = False  # half of the samples are to be weakly shifted, half strongly
    round: int = 0

    @property
    def domain(self) -> str:
        return self.shifts[0].domain if len(self.shifts) == 1 else "mixed"

    @property
    def severity(self) -> int | None:
        """The severity of the whole segment, where it has one."""
        found = {shift.severity for shift in self.shifts if shift.severity is not None}
        return found.pop() if len(found) == 1 else None


def domains(corruptions: Mapping[str, Sequence[str]], combine: Combine) -> list[Shift]:
    """What may be wrong, without severities: `corruptions` lists those of each modality; "clean" where there are none."""
    alone = len(corruptions) == 1
    each = [[Shift(name if alone else f"{modality} {name}", {modality: name}) for name in names] for modality, names in corruptions.items()]
    if not each:
        return [CLEAN]
    if combine == "interleaved":
        return [shift for turn in itertools.zip_longest(*each) for shift in turn if shift is not None]
    one = [shift for shifts in each for shift in shifts]
    if combine == "each":
        return one
    together = [
        Shift(" + ".join(shift.domain for shift in shifts), {m: n for shift in shifts for m, n in shift.corruptions.items()})
        for shifts in itertools.product(*each)
    ]
    if combine == "together":
        return together
    return [*one, *together, *(Shift(f"no {modality}", absent=(modality,)) for modality in corruptions)]


def at_severities(shift: Shift, severities: Sequence[int]) -> list[Shift]:
    """The shift once for each severity; once where nothing has one."""
    return [replace(shift, severity=severity) for severity in severities] if shift.corruptions else [shift]


def segments(
    shifts: Sequence[Shift], severities: Sequence[int], *, mixed: bool, halved: bool, rounds: int, shuffle: int | None
) -> list[Segment]:
    """The segments in the order of the stream; the domains of each round are shuffled by the seed `shuffle`, where one is given."""
    found: list[Segment] = []
    for turn in range(rounds):
        again = f", round {turn + 1}" if rounds > 1 else ""
        if mixed:
            every = tuple(itertools.chain.from_iterable(at_severities(shift, severities) for shift in shifts))
            found.append(Segment(f"mixed{again}", every, len(found), halved, turn))
            continue
        for shift in _arranged(shifts, turn, shuffle):
            for one in at_severities(shift, severities):
                strength = "" if one.severity is None else f", severity {one.severity}"
                found.append(Segment(f"{one.domain}{strength}{again}", (one,), len(found), False, turn))
    return found


def _arranged(shifts: Sequence[Shift], turn: int, shuffle: int | None) -> Iterator[Shift]:
    if shuffle is None:
        return iter(shifts)
    order = torch.randperm(len(shifts), generator=generator(shuffle, "domains", turn)).tolist()
    return (shifts[place] for place in order)


def dealt(segment: Segment, count: int, draw: torch.Generator) -> torch.Tensor | None:
    """Which of the segment's shifts each position has, all equally often (give or take one); None where there is only one.

    Of a halved segment half of the positions are weakly shifted, a quarter has several corruptions at once, and a quarter lacks a modality.
    """
    if len(segment.shifts) == 1:
        return None
    turns = torch.arange(count)
    if segment.halved:
        weak, several, lacking = (
            torch.tensor([place for place, shift in enumerate(segment.shifts) if kind(shift)])
            for kind in (lambda shift: len(shift.corruptions) == 1, lambda shift: len(shift.corruptions) > 1, lambda shift: shift.absent)
        )
        given = weak[turns // 2 % len(weak)]
        given[1::4] = several[turns[: len(given[1::4])] % len(several)]
        given[3::4] = lacking[turns[: len(given[3::4])] % len(lacking)]
    else:
        given = turns % len(segment.shifts)
    return given[torch.randperm(count, generator=draw)]
