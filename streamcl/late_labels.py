"""Labels that come late: what was answered is kept by the samples' ids until somebody says what it was."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamcl.errors import DataError
from streamcl.stream import Batch

REMEMBERED = 1024  # batches whose answers wait for their labels
FEEDBACK = 256  # the labelled answers that are compared with the deployed model's: the newest


class LateLabels:
    """The answers that wait for labels, up to `remember` of their samples, and what the labels that came have shown.

    Any thread may note what it has answered while another one brings labels.
    """

    def __init__(self, remember: int) -> None:
        self.remember = remember
        self.answers: deque[tuple[Tensor, Tensor, Tensor, Tensor]] = deque(maxlen=REMEMBERED)  # ids, and the decisions as `note` has them
        self.waiting: deque[Batch] = deque()
        self.waits = 0  # how many samples these are
        self.compared: deque[tuple[bool, bool]] = deque(maxlen=FEEDBACK)  # whether the adapting model was right, and the deployed one
        self.known = {"labelled": 0, "right": 0, "unknown": 0}
        self.classes: int | None = None  # how many there are, from the first answer on
        self._lock = threading.RLock()

    def note(self, batch: Batch, scores: Tensor, frozen: Tensor | None, adapting: Tensor | None) -> None:
        """What was answered to a batch, the deployed model's scores, and what the model that adapts decided, where these are known."""
        self.classes = scores.shape[1]
        if batch.ids.device.type == "cpu" and not bool((batch.ids >= 0).any()):
            return  # a sample without an id gets no label, and is not to push out one that may
        decided = scores.argmax(dim=1)
        unknown = torch.full_like(decided, -1)
        theirs = unknown if frozen is None else frozen.argmax(dim=1)
        with self._lock:
            self.answers.append((batch.ids, decided, theirs, unknown if adapting is None else adapting))
            if self.remember:
                self.waiting.append(batch)
                self.waits += len(batch)
                while self.waits - len(self.waiting[0]) >= self.remember:
                    self.waits -= len(self.waiting.popleft())

    def checked(self, ids: Tensor | Sequence[int], targets: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """One id and one class for each sample, as tensors; DataError says what is wrong with them."""
        try:
            ids, targets = torch.as_tensor(ids).cpu(), torch.as_tensor(targets).cpu()
        except (TypeError, ValueError, RuntimeError):
            raise DataError("feedback is one id and one class (a whole number) for each sample") from None
        if not len(ids):
            targets = targets.long()
        if ids.dim() != 1 or targets.shape != ids.shape or targets.is_floating_point():
            raise DataError("feedback is one id and one class (a whole number) for each sample")
        if len(ids) != len(ids.unique()):
            raise DataError("feedback names an id twice: give each sample one label")
        wrong = (targets < 0) | (targets >= self.classes) if self.classes is not None else targets < 0
        if bool(wrong.any()):
            raise DataError(f"feedback holds class {int(targets[wrong][0])}, and the model has classes 0 to {(self.classes or 1) - 1}")
        return ids, targets

    def take(self, ids: Tensor, targets: Tensor, deployed: Callable[[Batch], Tensor]) -> int:
        """Score what was answered to these samples; how many are known. `deployed` gives the deployed model's scores, which are asked for
        where the samples are still there and were not compared."""
        found, left = 0, torch.ones(len(ids), dtype=torch.bool)
        with self._lock:
            answers = list(self.answers)
        for known, decided, frozen, adapting in reversed(answers):  # an id that comes again is the newest one's
            at, which = _matches(known.cpu(), ids)
            open_ = left[which] & (decided.cpu()[at] >= 0)
            at, which = at[open_], which[open_]
            if not len(at):
                continue
            left[which], found = False, found + len(at)
            said, theirs, ours, told = decided.cpu()[at], frozen.cpu()[at], adapting.cpu()[at], targets[which]
            decided[at.to(decided.device)] = -2  # a label counts once
            self.known["labelled"] += len(at)
            self.known["right"] += int((said == told).sum())
            if bool((theirs < 0).any()):
                later = self._decided_on(known.cpu()[at][theirs < 0], deployed)
                theirs = theirs if later is None else theirs.masked_scatter(theirs < 0, later)
            both, ours = theirs >= 0, torch.where(ours < 0, said, ours)
            self.compared.extend(zip((ours == told)[both].tolist(), (theirs == told)[both].tolist(), strict=True))
        self.known["unknown"] += len(ids) - found
        return found

    def labelled(self, ids: Tensor, targets: Tensor) -> Batch | None:
        """Those of the samples that are still there, with their labels."""
        held = self._held(ids)
        if held is None:
            return None
        return held.replace(target=targets[_places(ids, held.ids)].to(held.ids.device))

    def figures(self) -> dict[str, Any]:
        labelled, compared = self.known["labelled"], len(self.compared)
        return {
            **self.known,
            "accuracy": self.known["right"] / labelled if labelled else None,
            "compared": compared,
            "recent_accuracy": sum(one[0] for one in self.compared) / compared if compared else None,
            "recent_accuracy_frozen": sum(one[1] for one in self.compared) / compared if compared else None,
        }

    def state(self) -> dict[str, Any]:
        """All but the samples, which would be most of it, and are somebody's data."""
        with self._lock:
            held = list(self.answers)
        return {
            "answers": [torch.cat([one[place].cpu() for one in held]) for place in range(4)] if held else None,
            "sizes": [len(one[0]) for one in held],
            "compared": [list(one) for one in self.compared],
            "known": dict(self.known),
            "classes": self.classes,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            self.answers.clear()
            self.waiting.clear()  # ids of before are other samples'
            self.waits, self.classes, self.known = 0, state["classes"], dict(state["known"])
            if state["answers"] is not None:
                ids, said, theirs, ours = (one.split(list(state["sizes"])) for one in state["answers"])
                self.answers.extend(zip(ids, said, theirs, ours, strict=True))
            self.compared.clear()
            self.compared.extend((bool(ours), bool(theirs)) for ours, theirs in state["compared"])

    def _decided_on(self, ids: Tensor, deployed: Callable[[Batch], Tensor]) -> Tensor | None:
        """What the deployed model decides for these samples, if all of them are still there."""
        held = self._held(ids)
        if held is None or len(held) < len(ids):
            return None
        return deployed(held).argmax(dim=1).cpu()[_places(held.ids, ids)]

    def _held(self, ids: Tensor) -> Batch | None:
        with self._lock:
            waiting = list(self.waiting)
        parts = [one[torch.isin(one.ids, ids.to(one.ids.device)).nonzero().squeeze(1)] for one in waiting]
        parts = [one for one in parts if len(one)]
        return Batch.cat(parts) if parts else None


def _places(among: Tensor, wanted: Tensor) -> Tensor:
    """Where each of the wanted ids stands among others; the last one, where it is there twice."""
    order = {one: place for place, one in enumerate(among.tolist())}
    return torch.tensor([order[one] for one in wanted.tolist()])


def _matches(known: Tensor, asked_for: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the known ids are asked for, and where each stands among those."""
    if not len(asked_for):
        return asked_for, asked_for
    order = asked_for.argsort()
    place = torch.searchsorted(asked_for[order], known).clamp(max=len(asked_for) - 1)
    at = (asked_for[order][place] == known).nonzero().squeeze(1)
    return at, order[place[at]]
