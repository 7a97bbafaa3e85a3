"""What the methods share that learn from reliable samples alone: which samples these are, how they are weighed, which layers are left out.

A sample is reliable whose answer has an entropy below a share of ln C, the largest that C classes allow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.errors import ConfigError
from streamcl.nn.norms import affine, norms


def margin(absolute: float | None, share: float, logits: Tensor) -> float:
    """The entropy from which an answer is unreliable: a number that was given, or a share of ln C."""
    return share * math.log(logits.shape[1]) if absolute is None else absolute


class Shallow(AdaptingStrategy):
    """Adapts the normalisation layers without those of the last blocks, whose changes upset a network most (SAR).

    `skip` lists parts of the names of layers that are left out. Where it is not given, they are the last quarter of each row of numbered
    blocks and what follows the last such row, as the authors' lists are: `layer4` of a ResNet, blocks 9 to 11 and the final norm of
    a ViT-B. A model with no row of four or more does without the last quarter of its layers.
    """

    def __init__(self, *, skip: list[str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.skip = skip

    def parameters(self) -> dict[str, nn.Parameter]:
        names = list(norms(self.model))
        if self.skip is None:
            out = last_blocks(names)
        else:
            unknown = [part for part in self.skip if not any(part in name for name in names)]
            if unknown and names:
                shown = ", ".join([*names[:3], *(["..."] if len(names) > 4 else []), *names[3:][-1:]])
                raise ConfigError(f"skip: no normalisation layer of this model has {unknown[0]!r} in its name; they are called {shown}")
            out = {name for name in names if any(part in name for part in self.skip)}
        return {name: value for name, value in affine(self.model).items() if name.rpartition(".")[0] not in out}

    def nothing_to_adapt(self) -> str:
        names = list(norms(self.model))
        if not names:
            return super().nothing_to_adapt()
        return f"skip leaves out every normalisation layer of this model ({len(names)} of them): name fewer"


def last_blocks(names: Sequence[str]) -> set[str]:
    """Those of these layers, in the model's order, that lie in its last blocks: see `Shallow`."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        for before, number in _numbered(name):
            numbers.setdefault(before, set()).add(int(number))
    out: set[str] = set()
    last: int | None = None
    for place, name in enumerate(names):
        row = next(((before, int(number)) for before, number in _numbered(name) if len(numbers[before]) > 1), None)
        if row is None or len(numbers[row[0]]) < 4:
            continue
        last, members = place, sorted(numbers[row[0]])
        if row[1] in members[-(len(members) // 4) :]:
            out.add(name)
    if last is None:
        return set(names[len(names) - len(names) // 4 :])
    return out | set(names[last + 1 :])


def _numbered(name: str) -> list[tuple[str, str]]:
    """What stands before each number of a name, and the number: layer4.0.bn1 has layer 4, layer4. 0 and layer4.0.bn 1."""
    return [(name[: found.start()], found.group()) for found in re.finditer(r"\d+", name)]
