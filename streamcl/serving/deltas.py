"""Several servers of one model: one adapts and publishes each version as a numbered delta in a folder, the others follow.

A delta holds the adapted tensors of one version, whole, in safetensors; `current.json` names the one that is served, with its SHA-256.
Both are written aside and renamed, the delta first, so a follower sees the old version or the new one and never a part. A micro-batch is
answered by one version; so equal requests get equal answers at equal versions, whichever server answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save
from torch import Tensor

from streamcl.errors import RunError
from streamcl.writing import write_atomically

if TYPE_CHECKING:
    from streamcl.online_loop import OnlineLoop

FORMAT = 1
CURRENT = "current.json"


@dataclass(frozen=True)
class Delta:
    """A version as it was published."""

    version: int
    weights: dict[str, Tensor]


class Publisher:
    """Writes the deltas of one model into `folder`, and keeps the newest `keep`."""

    def __init__(self, folder: Path, model: str, keep: int = 8) -> None:
        self.folder, self.model, self.keep = folder, model, keep
        self.published: int | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def publish(self, loop: OnlineLoop) -> None:
        """Publish the version that is served, where it is another than the last time."""
        if loop.version == self.published:
            return
        import hashlib

        version, weights = loop.version, served(loop)
        content = save({name: value.detach().cpu().contiguous() for name, value in weights.items()}, {"version": str(version)})
        digest = hashlib.sha256(content).hexdigest()
        file = f"{version:08d}-{digest[:12]}.safetensors"
        write_atomically(self.folder / file, content)
        current = {"format": FORMAT, "model": self.model, "version": version, "file": file, "sha256": digest}
        write_atomically(self.folder / CURRENT, json.dumps(current))
        self.published = version
        for old in sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)[: -self.keep]:
            if old.name != file:
                old.unlink(missing_ok=True)


class Follower:
    """Finds what a publisher of the same model has written, looking `every` so many seconds."""

    def __init__(self, folder: Path, model: str, every: float = 0.2) -> None:
        self.folder, self.model, self.every = folder, model, every
        self.deployed: dict[str, Any] | None = None  # the loop as it was before the first delta
        self.taken: str | None = None  # the SHA-256 of the delta that is served

    def look(self) -> tuple[str, Delta] | None:
        """What is published now, checked; None where it is served already, or nothing is there yet."""
        import hashlib

        current = self._current()
        if current is None or current["sha256"] == self.taken:
            return None
        if current["model"] != self.model:
            raise RunError(
                f"{self.folder} has deltas of the model {current['model']}, and this replica serves {self.model}: start it on the same run"
            )
        try:
            content = (self.folder / current["file"]).read_bytes()
        except OSError:  # a newer one has been published, and this one removed
            return None
        if hashlib.sha256(content).hexdigest() != current["sha256"]:
            raise RunError(f"{self.folder / current['file']} does not have its checksum: it is not served")
        return current["sha256"], Delta(int(current["version"]), load(content))

    def take(self, loop: OnlineLoop, found: tuple[str, Delta]) -> None:
        """Serve a delta. Only the thread that answers calls this."""
        digest, delta = found
        if self.deployed is None:
            self.deployed = loop.snapshot()
        loop.restore({**self.deployed, "version": delta.version, "weights": delta.weights})
        self.taken = digest

    def _current(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.folder / CURRENT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / CURRENT} cannot be read: {error}") from error
        if found.get("format", FORMAT) > FORMAT:
            raise RunError(f"{self.folder} was written by a newer streamcl: upgrade streamcl")
        return found


def served(loop: OnlineLoop) -> Mapping[str, Tensor]:
    """The tensors in which the served version differs from the deployed model; none where it is that."""
    weights: Mapping[str, Tensor] = loop.snapshot()["weights"]
    return weights
