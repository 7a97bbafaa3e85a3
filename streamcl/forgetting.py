"""`streamcl forget`: samples erased from a finished run's memory, from every checkpoint kept, and from the pictures, with a receipt."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamcl.checkpoint import Checkpoints, tree_bytes
from streamcl.config import RunConfig
from streamcl.errors import DataError, RunError, StreamclError
from streamcl.learned import Learned
from streamcl.run_folder import RunFolder
from streamcl.running import restored, stream_of
from streamcl.stream import Batch

RECEIPTS = "forgotten.json"
CHUNK = 512  # samples that are read again at a time


def forget(run: str | Path, ids: str | Path | Sequence[int]) -> dict[str, Any]:
    """Erase samples from a run; what was done, as its newest receipt in RUN/forgotten.json says it.

    The memory lets go of them; a strategy that can takes them out of what it computed from them (`Strategy.erase`), for which they are
    read again, from the memory or from the run's data. The newest checkpoint is written anew without them, twice, and all older ones
    are removed; if this is killed on the way, the same call finishes it. Checkpoints remember the ids, so that no later task of the run
    learns from these samples again, and nothing is taken back twice. The weights of a trained network are left as they are, and the
    receipt says so.
    """
    wanted = read_ids(Path(ids)) if isinstance(ids, str | Path) else torch.tensor(sorted(set(ids)), dtype=torch.int64)
    folder = RunFolder.open(Path(run))
    try:
        if folder.status()["status"] != "done":
            raise RunError(
                f"{folder.path} is not finished, and going on with it would read these samples again: finish it first, with "
                f"`streamcl resume {run}`, or delete the folder"
            )
        return _forget(folder, wanted)
    finally:
        folder.close()


def _forget(folder: RunFolder, wanted: Tensor) -> dict[str, Any]:
    warnings: list[str] = []
    learned, settings, state = restored(folder.path, warn=warnings.append)
    memory, strategy = learned.context.memory, learned.strategy
    before_now = state.get("forgotten", wanted[:0])
    fresh = wanted[~torch.isin(wanted, before_now)]  # what was taken back once must not be taken back again
    known, chosen, samples, unread = _samples(folder, settings, state, learned, fresh)
    found = {part: count for part, count in memory.remove(wanted).items() if count}
    exact = [] if samples is None else sorted(strategy.erase(samples))
    state["memory"], state["strategy"] = memory.state(), strategy.state()
    state["forgotten"] = torch.cat([before_now, fresh]).sort().values
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    before = checkpoints.numbers()
    for _ in range(2):
        checkpoints.save(state)  # keeping two, the second leaves nothing that is older than the first
    pictures = folder.path / "memory"
    had_pictures = pictures.is_dir()
    shutil.rmtree(pictures, ignore_errors=True)
    receipt = {
        "time": time.time(),
        "ids": len(wanted),
        "ids_sha256": hashlib.sha256(",".join(map(str, wanted.tolist())).encode()).hexdigest(),
        "erased_before": len(wanted) - len(fresh),
        "learned_from": known,
        "validated_with": chosen,
        "removed": found,
        "recomputed": exact,
        "checkpoints": {"removed": before, "written": checkpoints.numbers()},
        "pictures_removed": had_pictures,
        "not_covered": _not_covered(folder, learned, exact, known, chosen, 0 if samples is None else len(samples), unread),
    }
    earlier = json.loads((folder.path / RECEIPTS).read_text(encoding="utf-8")) if (folder.path / RECEIPTS).is_file() else []
    folder.write(RECEIPTS, json.dumps([*earlier, receipt], indent=1))
    return receipt


def _samples(
    folder: RunFolder, settings: RunConfig, state: dict[str, Any], learned: Learned, wanted: Tensor
) -> tuple[int | None, int | None, Batch | None, str]:
    """How many of these samples the run learned from, and how many it validated with (None where its data cannot be read); those that it
    learned from; and why some cannot be read.
    """
    try:
        stream = stream_of(settings, folder)
        stream.open(settings.seed)
        stream.restore(state["scenario"])
        pieces, seen, chosen = [], [], 0
        for task in stream.past():
            rows = torch.isin(task.train.ids, wanted).nonzero().squeeze(1)
            pieces += [task.train[part] for part in rows.split(CHUNK) if len(part)]
            seen.append(task.train.ids[rows])
            chosen += 0 if task.validation is None else int(torch.isin(task.validation.ids, wanted).sum())
        return len(torch.cat(seen).unique()) if seen else 0, chosen, Batch.cat(pieces) if pieces else None, ""
    except (StreamclError, OSError) as error:
        exemplars = learned.context.memory.exemplars
        if len(exemplars) == 0 or exemplars.store not in ("raw", "both"):
            return None, None, None, str(error)
        held = exemplars.dataset()
        rows = torch.isin(held.ids, wanted).nonzero().squeeze(1)
        return None, None, held[rows] if len(rows) else None, str(error)


def _not_covered(
    folder: RunFolder, learned: Learned, exact: list[str], known: int | None, chosen: int | None, read: int, unread: str
) -> list[str]:
    """What may still hold something of these samples, in a sentence each."""
    left = []
    if chosen:
        left.append(f"choices that were made on validation samples, {chosen} of these among them (early stopping, the ranking of a sweep)")
    if known == 0:
        return left or ["nothing: the run did not learn from any of these samples, or they were erased before"]
    memory = learned.context.memory
    if unread:
        left.append(f"the run's data could not be read ({unread}), so only the {read} of these samples that were held could be taken back")
    statistics = {"prototypes": _has(memory.prototypes), "analytic": _has(memory.analytic)}
    for name in (name for name, there in statistics.items() if there and (name not in exact or unread)):
        left.append(f"{name}: statistics that these samples went into, which {type(learned.strategy).__name__} cannot take them out of")
    kept = [name for name, value in learned.strategy.state().items() if tree_bytes(value) and name not in exact]
    if kept:
        left.append(f"what the strategy keeps beside the memory, if it was computed from them: {', '.join(kept)}")
    if any(parameter.requires_grad for parameter in learned.model.parameters()):
        left.append("the weights of the network, which have learned from these samples")
    if (folder.path / "stream").is_dir():
        left.append(f"what the live stream took in and keeps in {folder.path / 'stream'}: remove it where no task is to be read again")
    left.append(
        "the data itself, caches of features or weights that were made from it, copies of this folder, exported models, and the disk's "
        "free blocks, where erased files were"
    )
    return left


def _has(part: Any) -> bool:
    return bool(part.nbytes()) if hasattr(part, "nbytes") else True


def read_ids(path: Path) -> Tensor:
    """Sample ids from a file: one in a line (empty lines and those that begin with # do not count), or a JSON list."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from error
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path} begins as a JSON list and is none: {error}") from error
        bad = [value for value in values if isinstance(value, bool) or not isinstance(value, int)]
        if bad:
            raise DataError(f"{path} holds {bad[0]!r}: sample ids are whole numbers")
    else:
        values = []
        for number, line in enumerate(text.splitlines(), start=1):
            word = line.strip().rstrip(",")
            if word and not word.startswith("#"):
                try:
                    values.append(int(word))
                except ValueError:
                    raise DataError(f"{path}:{number}: {word[:40]!r} is no sample id: one whole number in a line") from None
    if not values:
        raise DataError(f"{path} names no sample")
    if any(not -(2**63) <= value < 2**63 for value in values):
        raise DataError(f"{path} holds a number beyond 64 bits: no sample has that id")
    return torch.tensor(sorted(set(values)), dtype=torch.int64)


def shown(receipt: dict[str, Any]) -> str:
    """A receipt for people."""
    learned = (
        "it is not known how many of them the run learned from"
        if receipt["learned_from"] is None
        else (f"{receipt['learned_from']} of them among what the run learned from")
    )
    removed = ", ".join(f"{count} from {part}" for part, count in receipt["removed"].items()) or "none was held"
    lines = [
        f"{receipt['ids']} sample{'s' * (receipt['ids'] != 1)}: {learned}"
        + (f", {receipt['erased_before']} erased before" if receipt["erased_before"] else ""),
        f"  removed     {removed}",
        f"  recomputed  {', '.join(receipt['recomputed']) or 'nothing'}",
        f"  checkpoints {len(receipt['checkpoints']['removed'])} removed, {len(receipt['checkpoints']['written'])} written without them",
        "  not covered",
        *(f"    - {line}" for line in receipt["not_covered"]),
    ]
    return "\n".join(lines)
