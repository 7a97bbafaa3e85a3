"""Files that hold all of what was written or what they held before, and what to say when the disk refuses. No torch here."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from streamcl.errors import DiskError

FORMAT = 1  # of checkpoints and run folders; raised when an older streamcl could not read a newer one


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the whole content or what it held before, also after a power cut."""
    aside = path.with_name(f".{path.name}.writing")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise disk_error(error, path) from error


DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def disk_error(error: OSError, path: Path) -> DiskError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskError(f"the disk is full: {path} could not be written. What was saved before is whole: make room, then go on")
    return DiskError(f"{path} could not be written ({error.strerror or error}). What was saved before is whole")
