"""`streamcl show CONFIG --picture`: a contact sheet of a stream, some samples of each task, before anything is trained on it.

Only the scenario and the seed of the configuration are read, so that a stream can be looked at before there is a strategy for it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamcl import config as configuration
from streamcl.contact_sheet import DPI, ENDINGS, FAINT, MOST, Group, Line, Row, Sheet, colour_of, evenly, plain_line, write
from streamcl.data import place_in_class
from streamcl.engine import _from_plugin
from streamcl.errors import ConfigError, DataError, StreamclError
from streamcl.plugins import KINDS, PluginSpec, plugins
from streamcl.seeding import generator, seed_everything
from streamcl.stream import Batch, Scenario, StreamInfo, Task
from streamcl.wording import shortened
from streamcl.yaml_nodes import extended, locate, raise_problems, read_file, shipped

TASKS = 12  # on a sheet, where nobody says how many
SAMPLES, FEWEST = 24, 3  # at least, where there are so many: on a sheet, and of a task
GROUND = "background"  # a class of this name is left as it is in a picture: what stands before it could not be seen
NUMBERED = ("class", "labels", "mask")  # targets that are made of classes
NAMED = 16  # classes of which each is named
LONGEST = 90  # characters of a fact
FIRST_FACTS = ("domain", "missing", "shots", "concept", "difficulty")


def picture(name: str, path: Path, tasks: int | None = None) -> str:
    """Draw the stream of a configuration into a PNG, SVG or PDF; `tasks` are at most so many, evenly chosen where there are more."""
    _check_output(path)
    spec, seed = stream_of(name)
    try:
        facts, rows, count = _looked_through(spec, seed, TASKS if tasks is None else tasks)
    except StreamclError:
        raise
    except Exception as error:
        raise _from_plugin(error, f"while the tasks of {spec.name} were looked at") from error
    common = [fact for fact in rows[0].facts[1:] if len(rows) > 1 and all(fact in row.facts for row in rows)]
    common = [fact for fact in common if not fact.startswith((*FIRST_FACTS, "new:", "again:"))]
    for row in rows:
        row.facts = [fact for fact in row.facts if fact not in common]
    facts += [f"each task: {', '.join(common)}"] if common else []
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", message="Glyph")
        sheet = Sheet(f"{name}: {spec.name}", facts)
        for row in rows:
            sheet.add(row)
        write(sheet.figure(), path, DPI)
    lacking = {str(warning.message) for warning in told if str(warning.message).startswith("Glyph")}
    lines = [f"picture: {path} ({len(rows)} of {count} tasks)"]
    if lacking:
        lines.append(f"note: the font lacks {len(lacking)} of the characters, which are drawn as boxes")
    return "\n".join(lines)


def _looked_through(spec: PluginSpec, seed: int, most: int) -> tuple[list[str], list[Row], int]:
    """What is said of the stream, a row for each of some of its tasks, and how many tasks it has."""
    seed_everything(seed)
    scenario: Scenario = spec.build()
    if type(scenario).__iter__ is not Scenario.__iter__ or type(scenario).__len__ is Scenario.__len__:
        raise ConfigError(f"{spec.name} is a live stream: nothing is known of it before it comes, so there is nothing to draw yet")
    info = scenario.open(seed)
    count = len(scenario)
    if not count:
        raise DataError(f"{spec.name}: the stream has no task: there is nothing to draw")
    chosen = evenly(count, most)
    facts = [f"seed {seed}", f"{count} task{'s' * (count != 1)}" + (f", {len(chosen)} of them shown" if len(chosen) < count else "")]
    facts += [f"{info.classes} classes"] if info.classes and info.target in NUMBERED else []
    facts += [f"target: {info.target}", f"modalities: {', '.join(info.modalities)}", f"licence: {info.licence}"]
    least = max(FEWEST, min(MOST, SAMPLES // len(chosen)))
    return facts, [_row(scenario, info, scenario.task(index), least, seed) for index in chosen], count


def _check_output(path: Path) -> None:
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"--picture: {path} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}: the ending says what is drawn")
    if not path.parent.is_dir():
        raise ConfigError(f"--picture: there is no folder {path.parent}: make it first, or name one that is there")
    if path.is_dir():
        raise ConfigError(f"--picture: {path} is a folder: name a file")


def stream_of(name: str) -> tuple[PluginSpec, int]:
    """The scenario and the seed of a configuration, checked. What else the file holds is not looked at."""
    _refuse_others(name)
    path = locate(name, Path(), "")
    root = extended(read_file(path), (path.resolve(),), {})
    checker = configuration._Checker()
    types = configuration.section_types("RunConfig")
    seed, (seed_type, default) = root.value.get("seed"), types["seed"]
    seed_value = default if seed is None or seed.value is None else checker.value(seed_type, seed, "seed")
    scenario = root.value.get("scenario")
    if scenario is None or scenario.value is None:
        checker.wrong(root.place, "scenario", f"is missing: it must be {configuration.describe(types['scenario'][0])}")
        raise_problems(checker.problems)
    spec = checker.value(types["scenario"][0], scenario, "scenario")
    raise_problems(checker.problems)
    return spec, seed_value


def _refuse_others(name: str) -> None:
    """A run's folder or a plug-in, which `streamcl show` takes as well, has no stream of its own."""
    if (Path(name) / "status.json").is_file():
        raise ConfigError(
            f"{name} is a run, and --picture draws the stream of a configuration: name the run's, {Path(name) / 'config.yaml'}"
        )
    bare = name.partition(":")[0]
    if bare.endswith(".py"):
        raise ConfigError(f"{name} is a plug-in, and --picture draws the stream of a configuration: name a YAML file that uses it")
    if name in shipped() or Path(name).is_file():
        return
    for kind in KINDS:
        if bare in plugins(kind, []):
            using = [config for config in shipped() if bare in config.split("/")]
            such = f"such as {using[0]}" if using else "or write one"
            raise ConfigError(f"{name} is a {kind}, and --picture draws the stream of a configuration: name one that uses it, {such}")


# What is to be seen of a task ---------------------------------------------------------------------------------------------------


def _row(scenario: Scenario, info: StreamInfo, task: Task, least: int, seed: int) -> Row:
    count, name = len(task.train), plain_line(task.name)
    title = name if re.match(rf"task {task.index + 1}\b", name) else f"task {task.index + 1}: {name}"
    title, said = title[:1].upper() + title[1:], f"{count:,} sample{'s' * (count != 1)}".replace(",", " ")
    row = Row(title, [said, *_facts(info, task, name)], Group(info.modalities))
    if not count:
        return row
    order = _drawn(task, generator(seed, "picture", task.index))
    batch = task.train[order]
    row.group = Group(info.modalities, least, _lacking(info, batch))
    row.batch = batch = batch[_side_by_side(task, order[: row.group.samples])]
    target = batch.target if batch.target is not None else _served(scenario, task, batch.ids)
    if info.target == "mask" and target is not None:
        ground = [label for label in range(255) if _name(info, task, label).lower() == GROUND]
        row.masks = target.masked_fill(torch.isin(target, target.new_tensor(ground)), 255)
    captions = [_caption(info, task, batch, target, sample) for sample in range(len(batch))]
    common = [line for line in captions[0] if line.colour == FAINT and len(batch) > 1 and all(line in caption for caption in captions)]
    row.captions = [[line for line in caption if line not in common] for caption in captions]
    row.facts += [line.text for line in common]
    return row


def _lacking(info: StreamInfo, batch: Batch) -> list[str]:
    """The modalities that none of these samples has."""
    present = batch.present or {}
    return [name for name in info.modalities if name not in batch.inputs or (name in present and not present[name].any())]


def _drawn(task: Task, random: torch.Generator) -> Tensor:
    """As many samples as can be shown, drawn at random, where there are classes one of each in turn."""
    order = torch.randperm(len(task.train), generator=random)
    classes = _classes(task)
    return (order if classes is None else order[place_in_class(classes[order]).argsort(stable=True)])[:MOST]


def _side_by_side(task: Task, samples: Tensor) -> Tensor:
    """The places of these samples in the order in which they are shown: class by class, and else in the order of the task."""
    order, classes = samples.argsort(), _classes(task)
    return order if classes is None else order[classes[samples[order]].argsort(stable=True)]


def _classes(task: Task) -> Tensor | None:
    targets: Tensor | None = getattr(task.train, "targets", None)
    return None if targets is None or targets.dim() > 1 or targets.is_floating_point() else targets


def _served(scenario: Scenario, task: Task, ids: Tensor) -> Tensor | None:
    """The targets of samples that come without any, as a stream at test time does, where the scenario's test set has these samples."""
    test = scenario.test(task, task)
    if test is None or not len(test):
        return None
    known, order = test.ids.sort()
    rows = order[torch.searchsorted(known, ids).clamp(max=len(known) - 1)]
    return test.targets[rows] if torch.equal(test.ids[rows], ids) else None


def _caption(info: StreamInfo, task: Task, batch: Batch, target: Tensor | None, sample: int) -> list[Line]:
    """What a sample is, or what is to be answered to it."""

    def extra(name: str) -> str:
        column = batch.extra.get(name)
        return "" if column is None else plain_line(column[sample]) if isinstance(column, list) else f"{float(column[sample]):.3g}"

    texts = {str(column[sample]) for column in batch.inputs.values() if isinstance(column, list)}
    if extra("answer"):
        if batch.extra["answer"][sample] in texts:  # a caption to be found again
            return []
        choices = " / ".join(plain_line(choice) for choice in str(batch.extra["choices"][sample]).split("\n")) if extra("choices") else ""
        asked = [f"{name} {extra(name)}" for name in ("skill", "difficulty", "verifier") if extra(name) not in ("", task.name)]
        lines = [Line(f"choices: {choices}", FAINT)] if choices else []
        return [*lines, Line(f"→ {extra('answer')}", bold=True), Line("  ·  ".join(asked), FAINT)]
    if extra("caption"):
        return [Line(extra("caption"))]
    if target is None:
        return [Line("unlabelled", FAINT)]
    own = target[sample]
    match info.target:
        case "class" | "text":
            return [Line(_name(info, task, int(own)), bold=True)]
        case "labels":
            there, unknown = ((own == value).nonzero().flatten().tolist() for value in (1, -1))
            lines = [Line(_listed([_name(info, task, label) for label in there], NAMED) or "none of them", bold=bool(there))]
            return [*lines, Line(f"{len(unknown)} of {len(own)} classes not annotated", FAINT)] if unknown else lines
        case "value":
            return [Line(", ".join(f"{value:.3g}" for value in own.flatten().tolist()), bold=True)]
        case "mask":
            there = [label for label in own.unique().tolist() if label != 255]
            labels = [label for label in there if _name(info, task, label).lower() != GROUND]
            shown = [Line(_name(info, task, label), mark=colour_of(label)) for label in labels[:6]]
            shown += [Line(f"and {len(labels) - 6} more", FAINT)] if len(labels) > 6 else []
            shown += [Line(f"uncoloured: {GROUND}", FAINT)] if len(labels) < len(there) else []
            share = float((own == 255).double().mean())
            return [*shown, Line(f"{100 * share:.0f} % not annotated", FAINT)] if share else shown
    return []


def _name(info: StreamInfo, task: Task, label: int) -> str:
    names = info.class_names
    return plain_line(task.names.get(label) or (names[label] if 0 <= label < len(names) else label))


def _facts(info: StreamInfo, task: Task, title: str) -> list[str]:
    """What the scenario adds to a task, in short, without what is said already; and its classes."""
    facts: dict[str, str] = {}
    for key in dict.fromkeys((*FIRST_FACTS, *task.about)):
        value, words = task.about.get(key), key.replace("_", " ")
        if key == "parents" and isinstance(value, Mapping):
            value = {_name(info, task, label): _name(info, task, value[label]) for label in task.classes if label in value}
        if key == "concepts" and isinstance(value, list) and all(isinstance(concept, Mapping) for concept in value):
            value = [concept.get("phrase", concept.get("name")) for concept in value]
        if isinstance(value, list) and sorted(map(str, value)) == sorted(info.modalities):  # it stands above all tasks
            continue
        said = shortened(_short(value), LONGEST)
        if value is True:
            facts[words] = words
        elif said and value is not False and said not in facts and f"{words} {said}" not in title:
            facts[said if re.search("[a-z]", said) else words] = f"{words}: {said}"
    lines = list(facts.values())
    for word, classes in (("new", task.classes), ("again", sorted(set(task.labels) - set(task.classes)))):
        names = [_name(info, task, label) for label in classes] if info.target in NUMBERED else []
        told = [re.search(rf"(?<!\w){re.escape(name)}(?!\w)", title) is not None for name in names]
        if len(names) > NAMED and told[0]:
            lines.append(f"{len(names)} classes {word}" if word == "again" else f"{len(names)} new classes")
        elif not all(told):
            lines.append(f"{word}: {_listed(names, NAMED)}")
    return lines


def _short(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}"
        case Mapping():
            return ", ".join(f"{plain_line(key)} {_short(item)}" for key, item in value.items())
        case list() | tuple() if len(value) <= 8:
            return ", ".join(map(_short, value))
        case list() | tuple():
            return f"{', '.join(map(_short, value[:6]))}, ... ({len(value)})"
        case str() | int():
            return plain_line(value)
        case Tensor() | np.ndarray():
            return f"{' x '.join(map(str, value.shape))} values"
    return f"a {type(value).__name__}"


def _listed(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)})" if len(names) > most else "")
