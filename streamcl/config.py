"""YAML becomes a typed, checked RunConfig; every error says file:line:column, the key, what is wrong and what would be right."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from streamcl.data_files import reader_of
from streamcl.errors import ConfigError, PluginError
from streamcl.options import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from streamcl.plugins import (
    REQUIRED,
    Option,
    PluginSpec,
    Type,
    near_name,
    plain,
    read_type,
    resolve,
    settings_names,
)
from streamcl.yaml_nodes import (
    Node,
    Place,
    Problems,
    extended,
    from_plain,
    is_yaml,
    locate,
    named,
    override,
    place_of,
    plain_word,
    raise_problems,
    read_file,
    short,
    to_plain,
)

# What a configuration holds -----------------------------------------------------------------------------------------------------


class _Invalid(ValueError):
    """A value that breaks a rule between keys, or one that its type cannot say; `key` is where to point."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key, self.message = key, message


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What the starting model is trained on before the stream begins."""

    scenario: Annotated[PluginSpec, "Scenario"]
    strategy: Annotated[PluginSpec, "Strategy"]
    seed: int | None = None  # where all seeds of a sweep are to start from one model; else the run's own


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The starting model: a backbone, or another run's model."""

    backbone: Annotated[PluginSpec | None, "Backbone | None"] = None
    adapter: Annotated[PluginSpec | None, "Adapter | None"] = None
    pretrain: PretrainConfig | None = None
    run: str | None = None  # a run's name or folder

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.run is None):
            raise _Invalid("run" if self.run else "", "give either backbone (a new model) or run (the model that another run has learned)")
        if self.run is not None and self.pretrain is not None:
            raise _Invalid("pretrain", "belongs to a new model, and with run the model was trained before")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run's state is written to disk, and how many of these checkpoints are kept."""

    every: Literal["task"] | dict[Literal["steps", "seconds"], PositiveFloat] = field(default_factory=lambda: {"seconds": 60.0})
    keep: PositiveInt = 2

    def __post_init__(self) -> None:
        if isinstance(self.every, dict):
            if len(self.every) != 1:
                raise _Invalid("every", "must be task, {steps: N} or {seconds: N}")
            if not self.every.get("steps", 1.0).is_integer():
                raise _Invalid("every", "steps must be a positive integer")
            if "steps" in self.every:
                object.__setattr__(self, "every", {"steps": int(self.every["steps"])})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """On what, and how exactly, the run computes."""

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: PositiveInt | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: Literal["auto", "none", "ddp"] = "auto"
    deterministic: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise _Invalid("device", f"must be auto, cpu, cuda, cuda:N or mps, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is scored, and when."""

    protocols: list[Literal["class_incremental", "task_incremental"]] = field(default_factory=lambda: ["class_incremental"])
    every: Literal["task"] | dict[Literal["samples"], PositiveInt] = "task"
    future: bool = False
    batch: PositiveInt = 512

    def __post_init__(self) -> None:
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise _Invalid("protocols", "must name at least one of class_incremental, task_incremental, each once")
        if self.every == {}:
            raise _Invalid("every", "must be task or {samples: N}")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The limits of the guard: see streamcl/guard.py."""

    compare: PositiveInt = 4
    memory: PositiveInt = 256
    z: PositiveFloat = 2.0
    gain: NonNegativeFloat = 0.2
    correlation: NonNegativeFloat = 0.05
    disagreement: NonNegativeFloat = 0.01
    slack: NonNegativeFloat = 1.0
    shift: PositiveFloat = 0.5
    diversity: NonNegativeFloat = 0.7
    share: PositiveFloat = 0.3
    drift: PositiveFloat = 1.0
    drop: NonNegativeFloat = 0.02
    canary_every: PositiveInt = 16
    strikes: PositiveInt = 2
    cooldown: NonNegativeInt = 8
    retry: PositiveInt | None = 200


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """How a test-time stream is served: the loop around the method (streamcl/online_loop.py)."""

    guard: bool | GuardConfig = False
    every: PositiveInt = 1
    window: PositiveInt | None = None
    budget: PositiveFloat | None = None
    calibrate: NonNegativeInt = 512  # unlabelled samples of the data before any shift, for methods and the guard
    canary: NonNegativeInt = 0  # labelled ones, for the guard
    feedback: Fraction = 0.0  # the share of the samples served whose labels come back one batch later, for the guard
    frozen: bool = False  # score the model as it was deployed beside, on the same stream

    def __post_init__(self) -> None:
        for key in ("canary", "feedback"):
            if getattr(self, key) and not self.guard:
                raise _Invalid(key, "is what the guard goes by, and there is none: set online.guard=true")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A set of runs: every combination of the values in `over`, or the ones that `runs` lists."""

    over: dict[str, list[Any]] | None = None
    runs: list[dict[str, Any]] | None = None
    rank: str = "average_incremental"

    def __post_init__(self) -> None:
        if (self.over is None) == (self.runs is None):
            raise _Invalid("runs" if self.runs is not None else "", "give either over ({key: [values]}) or runs ([{key: value}])")
        if not (self.over or self.runs) or not all((self.over or {"": [0]}).values()):
            raise _Invalid("over" if self.over is not None else "runs", "there is nothing to sweep: a list of values is empty")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, with every option filled in."""

    name: str | None = None
    seed: NonNegativeInt = 0
    scenario: Annotated[PluginSpec, "Scenario"]
    strategy: Annotated[PluginSpec, "Strategy"]
    model: ModelConfig
    memory: Annotated[PluginSpec, "Memory"] = field(metadata={"default": {"name": "faiss"}})
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    online: OnlineConfig = OnlineConfig()
    log: Annotated[list[PluginSpec], "list[Sink]"] = field(metadata={"default": ["progress", "jsonl", "tensorboard", "report"]})
    sweep: SweepConfig | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"\w[\w .=,+-]{0,99}", self.name):
            raise _Invalid("name", "must be letters, digits and - _ . = , + (it names the run's folder), and begin with a letter or digit")
        if self.seed >= 2**32:
            raise _Invalid("seed", "must be below 2**32, which is what NumPy's generators take")

    def to_dict(self) -> dict[str, Any]:
        """Plain values as YAML holds them."""
        return _plain_section(self)

    def dump(self) -> str:
        """YAML that `load` reads back to an equal configuration."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)

    def digest(self) -> str:
        """The same for the same settings, on any machine."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


SECTIONS: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        RunConfig,
        ModelConfig,
        PretrainConfig,
        EngineConfig,
        CheckpointConfig,
        EvaluateConfig,
        SweepConfig,
        OnlineConfig,
        GuardConfig,
    )
}


def _plain_section(value: Any) -> Any:
    if type(value).__name__ in SECTIONS:
        return {f.name: _plain_section(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return plain(value)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@cache
def section_types(section: str) -> dict[str, tuple[Type, Any]]:
    """The keys of a section: the type of each, and its default as YAML (REQUIRED where there is none)."""
    settings, found = settings_names() | SECTIONS.keys(), {}
    for key in dataclasses.fields(SECTIONS[section]):
        default = key.default_factory() if key.default_factory is not MISSING else key.default
        if default is MISSING:
            default = key.metadata.get("default", REQUIRED)
        found[key.name] = read_type(str(key.type), settings), _plain_section(default)
    return found


# Checking -----------------------------------------------------------------------------------------------------------------------

_WORDS = {
    "none": "null",
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "path": "a path",
    "list": "a list",
    "sequence": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "any": "what YAML can hold",
}
_NUMBERS = {
    "PositiveInt": "a positive integer",
    "NonNegativeInt": "an integer from 0 up",
    "PositiveFloat": "a positive number",
    "NonNegativeFloat": "a number from 0 up",
    "Fraction": "a number from 0 to 1",
    "Number": "a number",
}
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-3 as text


def describe(type: Type) -> str:
    """A type in words: what would be right."""
    match type.form:
        case "literal":
            return f"{'one of ' if len(type.values) > 1 else ''}{', '.join(str(plain_word(value)) for value in type.values)}"
        case "union":
            return " or ".join(describe(part) for part in type.parts)
        case "plugin":
            return f"{'an' if type.name[0] in 'aeiou' else 'a'} {type.name} (a name, or a mapping with a name)"
        case "settings":
            return _NUMBERS.get(type.name) or f"a mapping of {type.name.removesuffix('Config').lower()} settings"
    return _WORDS[type.form]


@cache
def _adapter(name: str) -> Any:
    from pydantic import TypeAdapter

    from streamcl import options

    return TypeAdapter(getattr(options, name))


class _Checker:
    """Turns nodes into checked values, and collects what is wrong with them. What it returns counts only without problems."""

    def __init__(self) -> None:
        self.problems: Problems = []

    def wrong(self, place: Place, path: str, message: str) -> Any:
        self.problems.append((place, f"{path}: {message}" if path else message))

    def unfit(self, node: Node, path: str, expected: str) -> Any:
        message = f"must be {expected}, got {short(node.value)}"
        return self.wrong(place_of(node, message), path, message)

    def value(self, type: Type, node: Node, path: str) -> Any:
        raw = node.value
        match type.form:
            case "any" if is_yaml(node):
                return to_plain(node)
            case "none" if raw is None:
                return None
            case "bool" if isinstance(raw, bool):
                return raw
            case "int" if isinstance(raw, int) and not isinstance(raw, bool):
                return raw
            case "float" if (number := _number(raw)) is not None:
                return number
            case "str" if isinstance(raw, str):
                return raw
            case "str" if isinstance(raw, (bool, int, float)):
                return self.wrong(node.place, path, f"must be text, got {short(raw)}: put it in quotes")
            case "path" if isinstance(raw, str) and raw:
                return self.path(node, path)
            case "literal" if any(raw == value and isinstance(raw, bool) == isinstance(value, bool) for value in type.values):
                return raw
            case "literal" if isinstance(raw, str):
                near = near_name(raw, [value for value in type.values if isinstance(value, str)])
                return self.wrong(node.place, path, f"must be {describe(type)}, got {short(raw)}{near}")
            case "list" | "sequence" if isinstance(raw, list):
                items = [self.value(type.parts[0], item, f"{path}.{index}") for index, item in enumerate(raw)]
                return items if type.form == "list" else tuple(items)
            case "tuple" if isinstance(raw, list):
                if len(raw) != len(type.parts):
                    return self.wrong(node.place, path, f"must have {len(type.parts)} entries, got {len(raw)}")
                return tuple(self.value(part, item, f"{path}.{i}") for i, (part, item) in enumerate(zip(type.parts, raw, strict=True)))
            case "dict" if isinstance(raw, dict):
                key_type, value_type = type.parts
                for key in raw:
                    self.value(key_type, Node(key, node.keys.get(key, node.place)), path)
                return {key: self.value(value_type, item, f"{path}.{key}") for key, item in raw.items()}
            case "union":
                return self.union(type, node, path)
            case "plugin":
                return self.plugin(type.name, node, path)
            case "settings":
                return self.section(type.name, node, path) if type.name in SECTIONS else self.settings(type.name, node, path)
        return self.unfit(node, path, describe(type))

    def union(self, type: Type, node: Node, path: str) -> Any:
        """The first member that fits; where none does, the problems of the one that was meant."""
        if node.value is None and Type("none") in type.parts:
            return None
        members = sorted((part for part in type.parts if part.form != "none"), key=lambda part: part.form == "float")
        meant: list[_Checker] = []
        for member in members:
            trial = _Checker()
            value = trial.value(member, node, path)
            if not trial.problems:
                return value
            if len(members) == 1 or _has_shape(member, node.value):
                meant.append(trial)
        if len(meant) == 1:
            self.problems += meant[0].problems
        else:
            self.unfit(node, path, describe(Type("union", tuple(members))))

    def path(self, node: Node, path: str) -> Path | None:
        """An absolute path: from the folder of the file that names it, or below STREAMCL_DATA where only that has it."""
        try:
            written = Path(node.value).expanduser()
            found = node.place.folder(node.value) / written
            data = os.environ.get("STREAMCL_DATA")
            if data and not found.exists() and (Path(data) / written).exists():
                found = Path(data) / written
            return found.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            return self.wrong(node.place, path, f"{short(node.value)} is no path: {error}")

    def settings(self, name: str, node: Node, path: str) -> Any:
        """One of the types of streamcl.options. Validation is strict, so that true is no number and '5' neither."""
        from pydantic import ValidationError

        if not is_yaml(node):
            return self.unfit(node, path, describe(Type("settings", name=name)))
        raw, adapter = _numbers(to_plain(node)), _adapter(name)
        while True:
            try:
                return adapter.validate_python(raw, strict=True)
            except ValidationError as error:
                errors = error.errors(include_url=False)
                raw, changed = _with_tuples(raw, [tuple(e["loc"]) for e in errors if e["type"] == "tuple_type"])
                if changed:
                    continue
            for problem in errors:
                here, place, where = node, node.place, [path]
                for step in problem["loc"]:
                    if isinstance(here.value, dict) and step in here.value:
                        place = here.keys.get(str(step), here.place) if problem["type"] == "extra_forbidden" else here.value[step].place
                        here = here.value[step]
                        where.append(str(step))
                    elif isinstance(here.value, list) and isinstance(step, int) and step < len(here.value):
                        here, place = here.value[step], here.value[step].place
                        where.append(str(step))
                expected = _NUMBERS.get(name, "") if not problem["loc"] else ""
                sentence = f"must be {expected}" if expected else _sentence(problem)
                got = "" if problem["type"] in {"value_error", "missing", "extra_forbidden"} else f", got {short(here.value)}"
                place = place_of(here, sentence) if place is here.place else place
                self.wrong(place, ".".join(filter(None, where)), f"{sentence}{got}")
            return None

    def section(self, name: str, node: Node, path: str) -> Any:
        """A mapping with the fields of one of the SECTIONS."""
        types, values, bad = section_types(name), {}, set()
        if not isinstance(node.value, dict):
            return self.unfit(node, path, f"a mapping with the keys {', '.join(types)}")
        below = f"{path}." if path else ""
        self.unknown(node, below, types, "key")
        for key, (type, default) in types.items():
            given = node.value.get(key)
            before = len(self.problems)
            if given is None or (given.value is None and default not in (REQUIRED, None)):
                if default is REQUIRED:
                    self.wrong(node.place, f"{below}{key}", f"is missing: it must be {describe(type)}")
                else:
                    given = from_plain(default, node.place)
            if given is not None:
                values[key] = self.value(type, given, f"{below}{key}")
            if len(self.problems) > before:
                bad.add(key)
                values[key] = None if default is REQUIRED else default  # so that the rules between the other keys are still checked
        try:
            return SECTIONS[name](**values)
        except _Invalid as error:
            if not bad or error.key not in {"", *bad}:
                at = place_of(node.value.get(error.key, node), f"{error.key} {error.message}")
                self.wrong(at, f"{below}{error.key}".rstrip("."), error.message)

    def unknown(self, node: Node, below: str, known: Iterable[str], what: str) -> None:
        for key in node.value:
            if key not in known:
                near = near_name(key, known) or f"; there {'are ' + ', '.join(known) if known else 'are none'}"
                self.wrong(node.keys.get(key, node.place), f"{below}{key}", f"unknown {what}{near}")

    def plugin(self, kind: str, node: Node, path: str) -> PluginSpec | None:
        """A plug-in by its name, with its options; a term where a strategy is expected runs on plain fine-tuning."""
        if isinstance(node.value, str):
            node = named(node)
        if not isinstance(node.value, dict):
            return self.unfit(node, path, describe(Type("plugin", name=kind)))
        name = node.value.get("name") or (Node("faiss", node.place) if kind == "memory" else None)
        if name is None or not isinstance(name.value, str):
            got = f"got {short(name.value)}" if name else f"got {', '.join(node.value) or 'an empty mapping'} and no name"
            return self.wrong((name or node).place, path, f"must name {describe(Type('plugin', name=kind)).partition(' (')[0]}, {got}")
        try:
            plugin, implied = self.resolve(kind, name)
            options, types = plugin.options, {key: option.type for key, option in plugin.options.items()}
        except (ConfigError, PluginError) as error:
            meant = self.carried(node, name) if kind == "strategy" else self.from_file(node, name) if kind == "source" else None
            return self.plugin(kind, meant, path) if meant else self.wrong(name.place, path, str(error))
        self.unknown(
            Node({k: v for k, v in node.value.items() if k != "name"}, node.place, node.keys),
            f"{path}.",
            options,
            f"option of {plugin.name}",
        )
        spec = PluginSpec(kind, name.value, plugin, {}, str(name.place))
        for key, option in options.items():
            given = node.value.get(key)
            if key in implied:
                if given:
                    self.wrong(node.keys.get(key, given.place), f"{path}.{key}", f"the name {name.value!r} says this already")
                given = Node(implied[key], name.place)
            if given:
                whole = _filled(given, option.default, name.place)
                spec.options[key], spec.positions[key] = self.value(types[key], whole, f"{path}.{key}"), str(place_of(given, ""))
            elif option.default is REQUIRED:
                self.wrong(name.place, f"{path}.{key}", f"is missing: {plugin.name} needs {describe(types[key])} here")
            else:
                spec.options[key] = self.default(option, name.place, f"{path}.{key}")
        return spec

    def resolve(self, kind: str, name: Node) -> Any:
        try:
            return resolve(kind, name.value, name.place.folder(name.value.rpartition(":")[0] or name.value))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{short(name.value)} is no {kind}: {error}") from None

    def carried(self, node: Node, name: Node) -> Node | None:
        """`finetune` that carries the term which stands in a strategy's place, with the term's own defaults for it (`Term.alone`); None
        where it is no term."""
        try:
            term, _ = self.resolve("term", name)
            own = term.options.keys() | {"name"}
        except (ConfigError, PluginError):
            return None
        carried = Node({key: value for key, value in node.value.items() if key in own}, node.place, node.keys)
        rest = {key: value for key, value in node.value.items() if key not in own}
        more = rest.get("with", Node([], node.place))
        if isinstance(more.value, list):
            rest["with"] = Node([carried, *more.value], more.place)
        alone = {key: from_plain(value, name.place) for key, value in (term.stated("alone") or {}).items()}
        return Node({"name": Node("finetune", name.place), **alone, **rest}, node.place, node.keys)

    def from_file(self, node: Node, name: Node) -> Node | None:
        """The source that reads the file or folder which stands in its place, as `streamcl feed` takes it; None where it is neither."""
        trial = _Checker()
        place = trial.path(name, "")
        source = None if place is None or "path" in node.value else reader_of(place)
        return Node({**node.value, "name": Node(source, name.place), "path": name}, node.place, node.keys) if source else None

    def default(self, option: Option, place: Place, path: str) -> Any:
        """A default, checked like a value that was given; where it does not fit, the plug-in's author is told."""
        trial = _Checker()
        value = trial.value(option.type, from_plain(option.default, Place(folders=(option.path.parent,))), "the default")
        for _, message in trial.problems:
            self.wrong(place, path, f"{option.where}: {message}")
        return value


def _filled(given: Node, default: Any, place: Place) -> Node:
    """What is given of settings that have a name (an optimiser), with the rest of the option's own default where the name is the same."""
    if not isinstance(default, dict) or "name" not in default or not isinstance(given.value, dict):
        return given
    if "name" in given.value and given.value["name"].value != default["name"]:
        return given
    own = {key: from_plain(value, place) for key, value in default.items() if key not in given.value}
    return Node({**own, **given.value}, given.place, given.keys)


def _number(value: Any) -> float | None:
    """A number; NaN is none."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _numbers(value: Any) -> Any:
    match value:
        case dict():
            return {key: _numbers(item) for key, item in value.items()}
        case list():
            return [_numbers(item) for item in value]
        case str() if _EXPONENT.fullmatch(value):
            return float(value)
    return value


def _with_tuples(value: Any, places: Sequence[tuple[Any, ...]]) -> tuple[Any, bool]:
    """The value with the lists at these places as tuples: strict validation wants them, and YAML has none."""
    if any(not place for place in places) and isinstance(value, list):
        return tuple(value), True
    changed = False
    if isinstance(value, dict):
        for key in value:
            value[key], inside = _with_tuples(value[key], [place[1:] for place in places if place[:1] == (key,)])
            changed |= inside
    return value, changed


def _has_shape(type: Type, value: Any) -> bool:
    match value:
        case dict():
            return type.form in {"dict", "plugin", "settings"} and type.name not in _NUMBERS
        case list():
            return type.form in {"list", "tuple", "sequence"}
        case str():
            return type.form == "plugin"
    return False


def _sentence(error: Mapping[str, Any]) -> str:
    """What pydantic found, as a person would say it."""
    context = error.get("ctx", {})
    kind = error["type"]
    fixed = {
        "missing": "is missing",
        "extra_forbidden": "is no setting here",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "finite_number": "must be finite",
        "none_required": "must be null",
    }
    if kind in fixed:
        return fixed[kind]
    match kind.partition("_")[0]:
        case "value":
            return str(error["msg"]).removeprefix("Value error, ")
        case "int":
            return "must be an integer"
        case "float":
            return "must be a number"
        case "model" | "dict" | "dataclass":
            return "must be a mapping"
        case "tuple" | "list" | "set":
            return "must be a list"
        case "literal":
            return f"must be one of {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
        case "greater" | "less":
            words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
            return " and ".join(f"must be {words[bound]} {limit:g}" for bound, limit in context.items())
        case "too":
            few = "min_length" in context
            return f"must have at {'least' if few else 'most'} {context['min_length' if few else 'max_length']} entries"
    message = str(error["msg"])
    return f"{message[:1].lower()}{message[1:]}"


# The ways in --------------------------------------------------------------------------------------------------------------------


def _checked(root: Node, overrides: Sequence[str], folder: Path) -> RunConfig:
    checker = _Checker()
    for text in overrides:
        try:
            root = override(root, text, folder)
        except ConfigError as error:
            checker.problems += [(Place(), problem) for problem in error.problems]
    config = checker.section("RunConfig", root, "")
    raise_problems(checker.problems)
    return config


def load(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a file, or the shipped one of that name, with `key=value` overrides. Runs no code of a plug-in."""
    path = locate(str(path_or_name), Path(), "")
    return _checked(extended(read_file(path), (path.resolve(),), {}), overrides, path.resolve().parent)


def from_mapping(mapping: Mapping[str, Any], folder: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a Python mapping; relative paths begin at `folder`, or where Python runs."""
    start = Path(folder or "").resolve()
    return _checked(extended(from_plain(mapping, Place(folders=(start,))), (), {}), overrides, start)


def plugin_spec(kind: str, value: str | Mapping[str, Any], folder: str | Path | None = None) -> PluginSpec:
    """One plug-in as YAML would name it, checked."""
    checker = _Checker()
    spec = checker.plugin(kind, from_plain(value, Place(folders=(Path(folder or "").resolve(),))), kind)
    raise_problems(checker.problems)
    assert spec is not None
    return spec
