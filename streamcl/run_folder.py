"""A run's folder: its durable state and its public record. One process at a time may write in it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from streamcl import __version__
from streamcl.errors import RunError
from streamcl.writing import FORMAT, sha256, write_atomically

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "safetensors",
    "faiss-gpu",
    "faiss-cpu",
    "scikit-learn",
    "torchmetrics",
    "transformers",
    "accelerate",
    "peft",
    "timm",
    "open_clip_torch",
    "datasets",
)


class RunFolder:
    """Where a run lives. `create` makes a new one, `open` takes one that exists; both hold its lock until `close`.

    Of several processes that train one model only the first writes: for the others everything that writes does nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.made: list[Path] = []  # the folders that `create` had to make, innermost first
        self.writes = int(os.environ.get("RANK", "0")) == 0
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        if not cls(path).writes:
            return cls(path)
        begun = {
            ".lock",
            "status.json",
            ".status.json.writing",
        }  # all that a run has that was killed in its first moment: nothing is lost by beginning again
        if path.exists() and (not path.is_dir() or any(entry.name not in begun for entry in path.iterdir())):
            held = "holds a run already: `streamcl resume` goes on with it" if (path / "status.json").exists() else "is not empty"
            raise RunError(f"{path} {held}; name another folder with --out")
        folder = cls(path)
        folder.made = [p for p in (folder.path, *folder.path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path} cannot be made ({error.strerror}); name another folder with --out") from error
        folder.lock()
        return folder

    def discard(self) -> None:
        """Undo `create`, where no run was made in the folder after all."""
        self.close()
        if not self.writes:
            return
        for name in ("config.yaml", "status.json", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        for made in self.made:
            if any(made.iterdir()):
                if (stream := made / "stream").is_dir():
                    print(f"what the live stream took in is kept in {stream}: name it as scenario.spool to learn it", file=sys.stderr)
                break
            made.rmdir()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        folder = cls(path)
        folder.check()
        folder.lock()
        return folder

    def check(self) -> None:
        """Raise unless this is a run that this streamcl can read."""
        if not (self.path / "status.json").is_file() or not (self.path / "config.yaml").is_file():
            raise RunError(
                f"{self.path} is no run: it holds no {'status.json' if not (self.path / 'status.json').is_file() else 'config.yaml'}"
                f"{runs_inside(self.path)}"
            )
        made = self.status().get("format", 1)
        if made > FORMAT:
            raise RunError(f"{self.path} was made by a newer streamcl (format {made}, this one reads {FORMAT}): upgrade streamcl")

    def lock(self) -> None:
        """Keep every other process out until `close`."""
        if not self.writes:
            return
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise RunError(f"{self.path} is in use by {owner}; wait for it, or stop it first") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(f"{self.path / 'status.json'} cannot be read: {error}") from error

    def set_status(self, status: str, **cursor: Any) -> None:
        if not self.writes:
            return
        write_atomically(
            self.path / "status.json",
            json.dumps({"status": status, "format": FORMAT, "process": os.getpid(), "time": time.time(), **cursor}, indent=1),
        )

    def write(self, name: str, content: str | dict[str, Any]) -> None:
        if not self.writes:
            return
        write_atomically(self.path / name, content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False))

    def files(self) -> dict[str, dict[str, Any]]:
        """What files.json says of the files that the run was made with, by their paths; nothing where it was killed before it had one."""
        return self.read("files.json") if (self.path / "files.json").is_file() else {}

    def read(self, name: str) -> Any:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def fingerprints(files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By absolute path, what is needed to notice that a file has changed; of a folder, the names and sizes of what is in it."""
    found = {}
    for path in (Path(name).absolute() for name in files):
        if path.is_file():
            found[str(path)] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        elif path.is_dir():
            sizes = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
            listing = hashlib.sha256("".join(f"{size}  {name}\n" for name, size in sizes.items()).encode()).hexdigest()
            found[str(path)] = {"files": len(sizes), "bytes": sum(sizes.values()), "sha256": listing}
    return found


def changed_plugins(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """What files.json is to say of the plug-ins of a person's own that are not what it says of them.

    Data and code are not treated alike. A run on other data is another run, and is refused. But a plug-in that failed is mended, and
    the run goes on: so changed code is allowed and told, and stays on record under `before`, by which scores.json promises no more that
    the run could be repeated. Of installed plug-ins, environment.json holds the versions.
    """
    changed = {}
    for name, before in folder.files().items():
        now = fingerprints([name]).get(name, {"bytes": 0, "sha256": None})
        if before.get("plugin") and now["sha256"] != before["sha256"]:
            changed[name] = {**now, "plugin": True, "before": [*before.get("before", ()), before["sha256"]]}
    return changed


def runs_inside(path: Path) -> str:
    """The end of a message about a folder that is no run, where runs lie in it; else nothing."""
    try:
        runs = sorted((entry for entry in path.iterdir() if (entry / "config.yaml").is_file()), key=lambda entry: entry.name)
    except OSError:
        return ""
    named = ", ".join(map(str, runs[:5])) + (f", ... ({len(runs)} runs)" if len(runs) > 5 else "")
    return f"; the runs in it are {named}" if runs else ""


def environment(seed: int, device: str) -> dict[str, Any]:
    """What a run depended on: versions, hardware, the source's revision."""
    import torch

    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "format": FORMAT,
        "streamcl": __version__,
        "source_revision": _revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "seed": seed,
        "packages": packages,
    }


def _revision() -> str | None:
    """The commit of the source tree that runs, where it is one, with a + when it was changed since."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
