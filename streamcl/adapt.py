"""`streamcl adapt`: the online loop over a test-time configuration, or around a run's model over data that it meets."""

from __future__ import annotations

import csv
import io
import json
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamcl import config as configuration
from streamcl import running
from streamcl.config import RunConfig
from streamcl.deploying import online
from streamcl.errors import ConfigError, DataError, PluginError, StreamclError
from streamcl.feeding import source_mapping
from streamcl.learned import Learned
from streamcl.online_loop import OnlineLoop
from streamcl.stream import Batch
from streamcl.writing import write_atomically

TARGETS = ("y", "target", "targets", "label", "labels")


def adapt(
    what: str,
    data: str | None = None,
    *,
    strategy: str | None = None,
    overrides: Sequence[str] = (),
    batch: int = 64,
    out: Path | None = None,
) -> str:
    """Serve and adapt, and say what came of it.

    `what` is a test-time configuration, whose stream is served, or a run with `data`. Unless it says otherwise the guard is on and the
    deployed model is scored beside. Data without labels is answered into OUT/answers.csv.
    """
    if (Path(what) / "status.json").is_file():
        if data is None:
            raise ConfigError(f"{what} is a run: name the data that its model is to meet (streamcl adapt RUN DATA)")
        found = _unlabelled(data)
        if found is not None:
            return _answered(what, found, strategy or "tent", overrides, batch, out)
        settings = _composed(Path(what), data, strategy or "tent", overrides, batch)
    else:
        if data is not None and (Path(what).exists() or "/" in what):
            there = "holds no run (an exported model can be served, not adapted)" if Path(what).is_dir() else "is not there"
            raise ConfigError(f"{what} {there}: name the folder of a run")
        if data is not None:
            raise ConfigError(f"{what} is no run, and a configuration names its data itself: leave out {data}, or name a run's folder")
        chosen = [f"strategy={strategy}"] if strategy else []
        settings = running.as_config(what, [*_on(overrides, configuration.load(what)), *chosen, *overrides])
        if settings.scenario.name != "test_time":
            raise ConfigError(f"{what} is a stream that is learned ({settings.scenario.name}): streamcl adapt serves test-time streams")
    scores = running.run(settings, out=out)
    return _told(scores)


def _on(overrides: Sequence[str], settings: RunConfig) -> list[str]:
    """The loop's settings for a deployed model, where nobody has said something else."""
    said = {override.partition("=")[0] for override in overrides}
    wanted = {"online.guard": "true", "online.frozen": "true", "online.window": "32"}
    if settings.online != configuration.OnlineConfig() or any(name == "online" or name.startswith("online.guard.") for name in said):
        wanted.pop("online.guard")
    return [f"{name}={value}" for name, value in wanted.items() if name not in said]


def _composed(run: Path, data: str, strategy: str, overrides: Sequence[str], batch: int) -> RunConfig:
    """A test-time run of what another has learned, over data as it is."""
    learned = running.load(run)
    source = source_mapping(data)
    loaded = configuration.plugin_spec("source", source).build().load()
    unknown = [name for name in loaded.class_names if name not in learned.classes]
    if loaded.target != learned.info.target:
        raise DataError(f"{data}: the target of this data is {loaded.target}, and the model answers with {learned.info.target}")
    if loaded.target == "class" and (unknown or len(loaded.class_names) != len(learned.classes)):
        what = f"{unknown[0]!r}, which the model does not know" if unknown else f"{len(loaded.class_names)} classes"
        raise DataError(
            f"{data}: it has {what}; the model's classes are {', '.join(learned.classes)}: all of them are needed, by these names"
        )
    whole = loaded.test is None or not len(loaded.test)
    scenario: dict[str, Any] = {"name": "test_time", "data": source, "corruptions": "none", "batch": batch}
    scenario |= {"part": "train" if whole else "test"}
    if loaded.target == "class":
        scenario["order"] = list(learned.classes)
    mapping = {"name": f"{run.name}-adapted", "scenario": scenario, "strategy": strategy, "model": {"run": str(run)}}
    plain = configuration.from_mapping(mapping, folder=Path.cwd())
    return configuration.from_mapping(mapping, folder=Path.cwd(), overrides=[*_on(overrides, plain), *overrides])


def _told(scores: dict[str, Any]) -> str:
    final, frozen = scores["final"], scores.get("heads", {}).get("frozen", {}).get("final")
    if final is None:
        return "nothing was scored"
    beside = "" if frozen is None else f", {frozen:.4f} by the model as it was deployed"
    return f"{scores['metric']} {final:.4f}{beside}"


# -- data without labels -------------------------------------------------------------------------------------------------------------


def _unlabelled(data: str) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz file or the one of a .npy file, if there are no labels with them."""
    path = Path(data)
    if path.suffix not in (".npz", ".npy") or not path.is_file():
        return None
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            beside = [path.with_name(path.name.replace(x, "y", 1)) for x in ("x", "inputs", "images", "data", "features") if x in path.name]
            return None if any(one.is_file() and one != path for one in beside) else {"": loaded}
        arrays = {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError) as error:
        raise DataError(f"{data}: this cannot be read as NumPy arrays: {' '.join(str(error).split())}") from None
    return None if any(name.split("_")[0] in TARGETS for name in arrays) else arrays


def _answered(run: str, arrays: dict[str, np.ndarray], strategy: str, overrides: Sequence[str], size: int, out: Path | None) -> str:
    if overrides:
        raise ConfigError(f"{overrides[0]}: data without labels is answered by the loop itself, which takes --strategy and --batch alone")
    learned = running.load(run)
    loop = online(learned, strategy)
    raw = learned.batch(arrays.get("", arrays))
    if not len(raw):
        raise DataError("the file holds no sample")
    folder = out or Path("runs") / f"{Path(run).name}-answers"
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something already: name another folder with --out")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["row", "answer", "confidence", "version", "made"])
    try:
        rows.writerows(_rows(learned, loop, raw, size))
    except StreamclError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(f"{where.filename}:{where.lineno}: {type(error).__name__}: {error} (strategy {strategy})") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "answers.csv", text.getvalue())
    write_atomically(folder / "online.json", json.dumps(loop.status(), indent=1))
    told = "".join(f"\n  after {event['samples']} samples: {event['reason']}" for event in loop.status()["events"][:10])
    return f"{len(raw)} answers in {folder / 'answers.csv'}, what the loop did in {folder / 'online.json'}; version {loop.version}{told}"


def _rows(learned: Learned, loop: OnlineLoop, raw: Batch, size: int) -> Iterator[list[Any]]:
    classes = learned.classes if learned.info.target == "class" else None
    for start in range(0, len(raw), size):
        prediction = loop(raw[start : start + size])
        assert prediction.scores is not None
        if classes is None:
            for place, values in enumerate(prediction.scores.tolist()):
                yield [start + place, " ".join(f"{value:g}" for value in values), "", prediction.version, prediction.made]
            continue
        sure, which = torch.max(prediction.scores.softmax(dim=1), dim=1)
        for place, (label, confidence) in enumerate(zip(which.tolist(), sure.tolist(), strict=True)):
            yield [start + place, classes[label], f"{confidence:.4f}", prediction.version, prediction.made]
