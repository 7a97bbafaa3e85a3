"""Labelled samples for the run's next task: each request is one part, a file of its own that never changes.

`streamcl feed RUN '{name: served, path: ..., first: 3, last: 17}'` learns parts 3 to 17. So what is learned is settled when the command is
given, whatever arrives meanwhile; and a run's own record of what it was fed says which parts still wait.
"""

from __future__ import annotations

import io
import json
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl.feeding import read_feeds
from streamcl.learned import Learned, plain_info
from streamcl.serving.inputs import Refused
from streamcl.stream import Batch
from streamcl.writing import write_atomically

TARGETS = ("class", "labels", "value")


class Deliveries:
    """The parts in `folder`, which `streamcl feed` takes for the run at `run`."""

    def __init__(self, run: Path, folder: Path, learned: Learned) -> None:
        self.run, self.folder, self.learned = run, folder, learned
        self._lock = threading.Lock()
        self._samples: dict[int, int] = {}

    def parts(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def waiting(self) -> tuple[list[int], int]:
        """The parts that the run has not been fed, and how many samples they hold."""
        fed = {Path(file) for feed in read_feeds(self.run) for files in feed.files.values() for file in files}
        waiting = [part for part in self.parts() if self.path(part) not in fed]
        return waiting, sum(self._size(part) for part in waiting)

    def path(self, part: int) -> Path:
        return self.folder.resolve() / f"{part:08d}.npz"

    def command(self, parts: Sequence[int]) -> str:
        source = f"{{name: served, path: {json.dumps(str(self.folder.resolve()))}, first: {parts[0]}, last: {parts[-1]}}}"
        return f"streamcl feed {shlex.quote(str(self.run))} {shlex.quote(source)}"

    def add(self, batch: Batch, labels: Sequence[Any]) -> dict[str, Any]:
        """Keep labelled samples; when this returns they are on disk."""
        target = self.learned.info.target
        if target not in TARGETS:
            raise Refused(422, f"this model learned {target}, and only {', '.join(TARGETS)} can be fed here: use streamcl feed")
        if batch.present is not None:
            raise Refused(422, "samples to learn from must be whole: leave out present")
        if len(labels) != len(batch):
            raise Refused(422, f"there are {len(batch)} samples and {len(labels)} labels")
        arrays: dict[str, Any] = {f"inputs.{name}": plain(values) for name, values in batch.inputs.items()}
        arrays |= self._targets(labels, target)
        about = {"format": 1, "stream": plain_info(self.learned.info)}
        arrays["about"] = np.array(json.dumps(about))
        content = io.BytesIO()
        np.savez(content, **arrays)
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = (self.parts() or [0])[-1] + 1
            write_atomically(self.path(part), content.getvalue())
            self._samples[part] = len(batch)
            parts, samples = self.waiting()
        return {"kept": len(batch), "waiting": samples, "parts": len(parts), "command": self.command(parts)}

    def _targets(self, labels: Sequence[Any], target: str) -> dict[str, np.ndarray]:
        if target == "class":
            if not all(isinstance(label, (str, int)) and not isinstance(label, bool) and str(label).strip() for label in labels):
                raise Refused(422, "labels must be the names of classes, one for each sample")
            return {"target": np.array([str(label) for label in labels])}
        if target == "labels":
            if not all(isinstance(names, list) and all(isinstance(name, str) and name for name in names) for names in labels):
                raise Refused(422, "labels must be a list of names for each sample")
            names = list(dict.fromkeys([*self.learned.classes, *(name for several in labels for name in several)]))
            return {
                "target": np.array([[name in several for name in names] for several in labels], dtype=np.int8),
                "classes": np.array(names),
            }
        try:
            values = np.array(labels, dtype=np.float32)
        except (TypeError, ValueError, OverflowError):
            raise Refused(422, "labels must be numbers, as many for each sample") from None
        if values.ndim not in (1, 2) or not np.isfinite(values).all():
            raise Refused(422, "labels must be finite numbers, as many for each sample")
        return {"target": values}

    def _size(self, part: int) -> int:
        if part not in self._samples:
            with np.load(self.path(part), allow_pickle=False) as arrays:
                self._samples[part] = len(arrays["target"])
        return self._samples[part]


def plain(values: Tensor | list[Any]) -> np.ndarray:
    return values.numpy() if isinstance(values, torch.Tensor) else np.array(values)
