"""What there is, in text: plug-ins with their options, runs, configurations. The list of plug-ins imports neither torch nor pydantic."""

from __future__ import annotations

import ast
import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamcl.errors import ConfigError, DataError, PluginError, StreamclError
from streamcl.plugins import (
    EVIDENCE,
    KINDS,
    REQUIRED,
    Option,
    Plugin,
    PluginSpec,
    Type,
    near_name,
    plain,
    plugins,
    read_type,
    resolve,
    settings_names,
    shown,
)
from streamcl.wording import NOTHING, duration, size

if TYPE_CHECKING:
    from streamcl.config import RunConfig

OWN = "that of the data itself"  # a source of a person's own files knows no other
WIDEST = 40  # of a column of `show`; what is longer sticks out
KEPT_THERE = {"cache", "root"}  # options whose folder is made where there is none; every other path is read
# What `check` may open and build: sources that come with streamcl or are drawn on the spot, and backbones that somebody else trained.
EMBEDDED = {"digits", "digits_av", "digit_scenes", "problems", "puzzles", "shapes", "sklearn"}
FETCHED = {"hf", "minilm", "open_clip", "timm"}
FIRST = 4  # samples that it serves


# Plug-ins -----------------------------------------------------------------------------------------------------------------------


def listing(kind: str | None = None) -> str:
    """Every plug-in of a kind (of every kind that has any, without one): its name, how far its evidence goes or what licence its
    data or weights are under, and what it is."""
    chosen = [_kind_named(kind)] if kind else list(KINDS)
    problems: list[str] = []
    parts = []
    for name in chosen:
        found = plugins(name, problems)
        if found or kind:
            parts.append("\n".join([f"{KINDS[name].plural}  ({KINDS[name].key} in the YAML)", *(_families(found) or ["  none"])]))
    if problems:
        parts.append("\n".join(["left out, because they cannot be read:", *(f"  {problem}" for problem in problems)]))
    return "\n\n".join(parts)


def _families(found: dict[str, Plugin]) -> list[str]:
    """A line for each plug-in, under the name of its family where there are several or it has one."""
    plain = sorted(found.values(), key=lambda plugin: (plugin.family, plugin.name))
    named, noted = (max((len(text(plugin)) for plugin in plain), default=0) for text in (lambda plugin: plugin.name, _note))
    lines, family = [], ""
    for plugin in plain:
        if plugin.family != family:
            family = plugin.family
            lines.append(f"  {family.replace('_', ' ').replace('/', ', ')}")
        start = ("    " if family else "  ") + f"{plugin.name:{named}}  " + (f"{_note(plugin):{noted}}  " if noted else "")
        lines += _wrapped(plugin.summary, start)
    return lines


def _wrapped(text: str, start: str) -> list[str]:
    """The text after `start`, with further lines below its beginning on a terminal that is too narrow for it."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if width < len(start) + 30:
        return [(start + text).rstrip()]
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start)) or [start.rstrip()]


def _note(plugin: Plugin) -> str:
    """How far the evidence of a method goes; the licence of data and weights."""
    if plugin.evidence:
        return next((level for level in EVIDENCE if plugin.evidence.startswith(level)), plugin.evidence)
    return _licence(plugin, NOTHING) if plugin.kind in ("source", "backbone") else ""


def _licence(plugin: Plugin, unknown: str) -> str:
    return unknown if plugin.licence in (None, "unknown") else str(plugin.licence)


def _kind_named(word: str) -> str:
    for kind in KINDS.values():
        if word in (kind.name, kind.plural):
            return kind.name
    names = [kind.plural for kind in KINDS.values()]
    hint = near_name(word, names) or "; there are " + ", ".join(kind.plural for kind in KINDS.values() if plugins(kind.name, []))
    raise ConfigError(f"there is no kind of plug-in {word!r}{hint}")


def show_plugin(plugin: Plugin) -> str:
    """What its author says about a plug-in, and its options with types, defaults, and the class that each belongs to."""
    name = Path(plugin.path).name if plugin.module is None else plugin.name
    facts = [f"{plugin.kind} {name}", f"class {plugin.class_name}", shown(plugin.path)]
    if plugin.kind in ("source", "backbone"):
        facts.insert(1, f"licence: {_licence(plugin, OWN)}")
    about = _class_doc(plugin)
    return "\n".join([" · ".join(facts), "", plugin.doc.strip(), *(["", about] if about else []), "", *_options(plugin)])


def _class_doc(plugin: Plugin) -> str:
    """What the class says beside the file: mostly, what its options mean."""
    classes = (node for node in ast.parse(plugin.path.read_bytes()).body if isinstance(node, ast.ClassDef))
    doc = next((ast.get_docstring(node) or "" for node in classes if node.name == plugin.class_name), "")
    return "" if doc == plugin.doc else doc


def _options(plugin: Plugin) -> list[str]:
    if not plugin.options:
        return ["it has no options"]
    rows = {option.name: list(_rows(option.name, *_type(option), option.default)) for option in plugin.options.values()}
    widths = [max(len(row[column]) for own in rows.values() for row in own if len(row[column]) <= WIDEST) for column in (0, 1)]
    lines, owner = ["options"], plugin.class_name
    for option in plugin.options.values():
        if option.owner != owner:
            owner = option.owner
            lines.append(f"options of every {owner}" if owner != plugin.class_name else "further options")
        lines += [f"  {name:{widths[0]}}  {words:{widths[1]}}  {default}".rstrip() for name, words, default in rows[option.name]]
    return lines[1:] if lines[1].startswith("options of") else lines


def _rows(name: str, words: str, type: Type, default: Any) -> Iterator[tuple[str, str, str]]:
    """An option and, below a mapping of settings, each of its keys, with what it is where nothing is given."""
    from streamcl import options
    from streamcl.config import describe

    settings: Any = getattr(options, type.name, None) if type.form == "settings" else None
    if not hasattr(settings, "model_fields"):
        yield name, words, "required" if default is REQUIRED else f"= {as_yaml(plain(default))}"
        return
    yield name, words, "" if default is not REQUIRED else "required"
    filled = settings.model_validate({} if default is REQUIRED else default)
    for key, annotation in settings.__annotations__.items():
        if key in settings.model_fields:
            inside = read_type(annotation, settings_names())
            indent = " " * (len(name) - len(name.lstrip()) + 2)
            yield from _rows(f"{indent}{key}", describe(inside), inside, getattr(filled, key))


def _type(option: Option) -> tuple[str, Type]:
    """What an option takes, in words and as a type."""
    from streamcl.config import describe

    try:
        inside = option.type.parts[0] if option.type.form in ("list", "sequence") else None
        return (f"a list of {KINDS[inside.name].plural}" if inside and inside.form == "plugin" else describe(option.type)), option.type
    except PluginError:  # an annotation that no option may have: `check` and `run` say so
        return option.annotation, Type("any")


def as_yaml(value: Any) -> str:
    """A default as one would write it in the YAML."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip().removesuffix("...").strip()


# Anything that has a name -------------------------------------------------------------------------------------------------------


def show(name: str, kind: str | None = None) -> str:
    """A run's folder, a plug-in, or a configuration: whatever has this name."""
    from streamcl.yaml_nodes import shipped

    kinds = [_kind_named(kind)] if kind else list(KINDS)
    if not kind and (Path(name) / "status.json").is_file():
        return show_run(Path(name))
    if name.partition(":")[0].endswith(".py"):
        return _show_file(name, kinds)
    bare = name.partition(":")[0]  # timm:resnet18 is timm
    found = [plugin for one in kinds if (plugin := plugins(one, []).get(bare)) is not None]
    if found:
        return "\n\n\n".join(map(show_plugin, found))
    configurations = shipped()
    if not kind and (name in configurations or name.endswith((".yaml", ".yml"))):
        return show_config(name)
    if Path(name).is_dir():
        from streamcl.run_folder import runs_inside

        raise ConfigError(f"{name} is a folder and no run: it holds no status.json{runs_inside(Path(name))}")
    near = near_name(name, sorted({plugin for one in kinds for plugin in plugins(one, [])} | (set() if kind else configurations.keys())))
    what = f"no {kinds[0]}" if kind else "neither a plug-in nor a run's folder nor a configuration"
    raise ConfigError(f"{what} is called {name!r}{near or ' (streamcl list says what there is)'}")


def _show_file(name: str, kinds: Sequence[str]) -> str:
    problems = []
    for kind in kinds:
        try:
            return show_plugin(resolve(kind, name, Path.cwd())[0])
        except ConfigError as error:
            problems.append(str(error))
    if not Path(name.partition(":")[0]).is_file() or len(kinds) == 1:
        raise ConfigError(problems[0])
    contracts = ", ".join(KINDS[kind].contract for kind in kinds if kind == "term" or plugins(kind, []))
    raise ConfigError(f"{name} holds no plug-in: no class in it derives from one of streamcl's ({contracts})")


def show_run(path: Path) -> str:
    """How a run stands, what it has reached so far, and what it cost."""
    from streamcl.comparing import Run, matrix_text
    from streamcl.run_folder import RunFolder

    folder = RunFolder(path)
    folder.check()
    run, status = Run.read(path), folder.status()
    rows = [["status", status["status"]], ["strategy", run.strategy], ["scenario", run.scenario], ["seed", str(run.seed)]]
    rows.append(["tasks learned", str(status.get("cursor", {}).get("tasks_done", 0))])
    if status.get("error"):
        rows.append(["it stopped with", status["error"]])
    if status["status"] != "done":
        rows.append(["go on with", f"streamcl resume {path}"])
    lines = [str(folder.path), *_facts(rows)]
    if scores := run.scores:
        lines += ["", matrix_text(scores), ""]
        seconds = scores.get("seconds") or {}
        cost = [["memory", size(scores.get("memory_bytes"))], ["time", duration(seconds.get("total"))]]
        parts = [f"{duration(seconds[part])} to {part}" for part in ("learn", "evaluate", "checkpoint") if part in seconds]
        cost[1][1] += f" ({', '.join(parts)})" if parts else ""
        if "parameters" in scores:
            cost.append(["parameters", f"{scores['parameters']:,} ({scores['trainable_parameters']:,} trained)".replace(",", " ")])
            cost.append(["resume", f"{scores['resume']['kind']} ({scores['resume']['why']})"])
        lines += _facts(cost)
    return "\n".join(lines)


def _facts(rows: Sequence[Sequence[str]]) -> list[str]:
    width = max(len(row[0]) for row in rows)
    return [f"  {name:{width}}  {text}" for name, text in rows]


def show_config(name: str) -> str:
    """A configuration with every default filled in, as YAML, under the licences of its data and weights."""
    from streamcl import config

    settings = config.load(name)
    return "\n".join([*(f"# {line}" for line in licences(settings)), settings.dump().rstrip()])


# Checking -----------------------------------------------------------------------------------------------------------------------


def check(config_name: str, overrides: Sequence[str] = ()) -> str:
    """What a configuration names and under which licences, once everything that can be known without running it is right."""
    from streamcl import config

    settings = config.load(config_name, overrides)
    raise_together(problems(settings))
    raise_together(contradictions(settings))
    counted: dict[str, list[str]] = {}
    for spec in plugin_specs(settings):
        names = counted.setdefault(spec.kind, [])
        names += [] if spec.name in names else [spec.name]
    tried = _tried(settings)
    unread = "whether its form fits the model" if _classes(settings) else "how many classes it has, and whether its form fits the model"
    return "\n".join(
        [
            f"{config_name} is in order",
            *_facts([[kind, ", ".join(names)] for kind, names in counted.items()]),
            *licences(settings),
            *(f"warning: {warning}" for warning in misnamed(settings)),
            "the stream was opened and the model built, and the strategy takes both; nothing was trained"
            if tried
            else f"not checked, because the data was not read: {unread}",
        ]
    )


def problems(settings: RunConfig) -> list[StreamclError]:
    """What is wrong with a configuration beyond its text: plug-ins of a person's own that do not import, files and devices that are not
    there, more tasks than classes."""
    from streamcl.data_files import locate_all

    found: list[StreamclError] = []
    for spec in plugin_specs(settings):
        where = f"{spec.where}: " if spec.where else ""
        if spec.plugin.module is None:
            try:
                spec.plugin.load()
            except StreamclError as error:
                found.append(ConfigError(f"{where}{error}"))
        for option, value in spec.options.items():
            if isinstance(value, Path) and option not in KEPT_THERE:
                try:
                    locate_all(str(value))
                except DataError as error:
                    place = spec.positions.get(option, spec.where)
                    found.append(DataError(f"{f'{place}: ' if place else ''}{option}: {error}"))
    run = settings.model.run
    if run is not None and not (Path(run) / "status.json").is_file():
        found.append(ConfigError(f"model.run: {run} is no run: it holds no status.json"))
    return [*found, *_too_many(settings), *_no_device(settings.engine.device)]


def contradictions(settings: RunConfig) -> list[StreamclError]:
    """What the plug-ins themselves refuse when they are made: options that cannot be together. Nothing is read."""
    found: list[StreamclError] = []
    for spec in (settings.scenario, settings.strategy, settings.memory, settings.model.backbone):
        try:
            if spec is not None:
                spec.build()
        except StreamclError as error:
            found.append(error)
    return found


def _tried(settings: RunConfig) -> bool:
    """Whether the run could be set up but for training, and its first samples be served where it serves; raises what the engine, the
    model or the strategy refuses. Only where that neither reads a person's data nor fetches anything."""
    from streamcl import running

    backbone = running.backbone_of(settings)
    sources = [spec for spec in plugin_specs(settings.scenario) if spec.kind == "source"]
    given = [
        spec for spec in sources if spec.name.partition(":")[0] not in EMBEDDED or any(isinstance(o, Path) for o in spec.options.values())
    ]
    if given or not sources or backbone.plugin.module is None or backbone.plugin.name in FETCHED:
        return False
    from streamcl.engine import _from_plugin

    try:
        _set_up(settings, backbone)
    except StreamclError:
        raise
    except Exception as error:
        raise _from_plugin(error, "while the stream was opened, the model built and its first samples served") from error
    return True


def _set_up(settings: RunConfig, backbone: PluginSpec) -> None:
    """The engine of a run whose model was never trained, on a CPU. What serves answers a few samples: some methods see what a model lacks
    only when they ask it."""
    import torch

    from streamcl.engine import Engine
    from streamcl.nn.model import GrowingHead
    from streamcl.stream import asked

    scenario, network = settings.scenario.build(), backbone.build()

    def head() -> tuple[dict[str, Any], Sequence[str]]:
        """In the place of the one that would have been trained."""
        names = scenario.info.class_names
        return dict(GrowingHead(network.dim, len(names)).state_dict()), names

    engine = Engine(
        scenario,
        settings.strategy.build(),
        network,
        settings.memory.build(),
        seed=settings.seed,
        engine=dataclasses.replace(settings.engine, device="cpu", precision="auto", compile=False),
        evaluate=settings.evaluate,
        online=dataclasses.replace(settings.online, calibrate=0),
        trained=head,
    )
    if engine.info.test_time:
        samples = next(iter(scenario)).train
        for batch in samples.read(torch.arange(min(len(samples), FIRST)), FIRST):
            engine.strategy.adapt(engine.context.prepare(asked(batch, engine.info), train=False))


def misnamed(settings: RunConfig) -> list[str]:
    """Methods of the plug-ins that were probably meant to override another one."""
    return list(dict.fromkeys(warning for spec in plugin_specs(settings) for warning in spec.plugin.misnamed()))


def _classes(settings: RunConfig) -> int | None:
    """How many classes the data has, as far as its source says so without reading it."""
    source = settings.scenario.options.get("data")
    if not isinstance(source, PluginSpec):
        return None
    count = source.plugin.stated("class_count")
    return count.get(source.options[next(iter(source.plugin.options))]) if isinstance(count, dict) else count


def _too_many(settings: RunConfig) -> Iterator[ConfigError]:
    scenario, classes = settings.scenario, _classes(settings)
    for option in scenario.plugin.stated("bounded_by_classes") or ():
        wanted = scenario.options.get(option)
        if classes is not None and isinstance(wanted, int) and wanted > classes:
            place = scenario.positions.get(option, scenario.where)
            data = scenario.options["data"].name
            yield ConfigError(f"{f'{place}: ' if place else ''}scenario.{option}: is {wanted}, and {data} has only {classes} classes")


def _no_device(asked: str) -> Iterator[ConfigError]:
    kind, _, number = asked.partition(":")
    if kind == "mps" and sys.platform != "darwin":
        yield ConfigError("engine.device: is mps, which only a Mac has: use auto or cpu")
    if kind == "cuda" and (count := cuda_devices()) is not None and count <= int(number or 0):
        there = f"only {count} CUDA device{'s' * (count > 1)} (from 0)" if count else "no CUDA device"
        yield ConfigError(f"engine.device: is {asked}, and this machine has {there}: use auto or cpu")


def cuda_devices() -> int | None:
    """How many CUDA devices there are, from the driver: torch would ask it too, and takes seconds to import. None where it cannot tell."""
    import ctypes
    import importlib.metadata

    if "rocm" in importlib.metadata.version("torch"):  # there, cuda means AMD's
        return None
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
    except (OSError, AttributeError):
        return 0


def raise_together(found: Sequence[StreamclError]) -> None:
    """One error with all messages; it is about the data where every one of them is."""
    if found:
        messages = list(dict.fromkeys(map(str, found)))
        raise DataError("\n".join(messages)) if all(isinstance(error, DataError) for error in found) else ConfigError(messages)


def licences(settings: RunConfig) -> list[str]:
    """A line for each source and backbone that a configuration names."""
    lines = [
        f"licence of {spec.kind} {spec.name}: {_licence(spec.plugin, OWN)}"
        for spec in plugin_specs(settings)
        if spec.kind in ("source", "backbone")
    ]
    return list(dict.fromkeys(lines))


def plugin_specs(value: Any) -> Iterator[PluginSpec]:
    """Every plug-in that a configuration names, nested ones after the one that holds them."""
    match value:
        case PluginSpec():
            yield value
            yield from plugin_specs(value.options)
        case dict():
            yield from plugin_specs(list(value.values()))
        case list() | tuple():
            for item in value:
                yield from plugin_specs(item)
        case _ if dataclasses.is_dataclass(value):
            yield from plugin_specs([getattr(value, field.name) for field in dataclasses.fields(value)])
