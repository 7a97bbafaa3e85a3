"""Running from Python: `run` a configuration, go on with a run, or `load` what a run has learned."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcl import config as configuration
from streamcl import exporting
from streamcl.checkpoint import Checkpoints
from streamcl.config import OnlineConfig, RunConfig, plugin_spec
from streamcl.engine import CHANGED, Engine
from streamcl.errors import ConfigError, DataError, RunError
from streamcl.events import Sink
from streamcl.feeding import Extended, Feed, advice_without, read_feeds
from streamcl.learned import Learned, info_from, plain_info, precision_on, undisturbed
from streamcl.listing import misnamed, plugin_specs
from streamcl.nn.backbone import Backbone
from streamcl.nn.expandable import Expandable
from streamcl.nn.model import Model
from streamcl.plugins import PluginSpec, shown
from streamcl.processes import Processes
from streamcl.run_folder import RunFolder, changed_plugins, fingerprints
from streamcl.stream import Scenario


def run(config: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = (), out: str | Path | None = None) -> dict[str, Any]:
    """Run a scenario (a YAML file, a shipped configuration's name, a mapping) and return what scores.json holds."""
    settings = as_config(config, overrides)
    folder = RunFolder.create(Path(out) if out else free_folder(settings))
    try:
        # From here on it is a run that can be resumed, also when it is killed while it loads its data or trains its first model.
        folder.set_status("running", cursor={"tasks_done": 0, "task": None, "step": 0})
        folder.write("config.yaml", settings.dump())
        try:
            engine = build(settings, folder)
        except BaseException:  # the settings or the data are wrong: a folder without a run in it goes again
            folder.discard()
            raise
        _record(folder, settings, engine)
        return engine.run()
    finally:
        folder.close()


def resume(run_folder: str | Path) -> dict[str, Any]:
    """Go on with a run that was interrupted or failed; a finished one just returns its scores."""
    folder = RunFolder.open(Path(run_folder))
    try:
        if folder.status()["status"] == "done" and (folder.path / "scores.json").is_file():
            return folder.read("scores.json")
        return continued(folder).run(resume=True)
    finally:
        folder.close()


def continued(folder: RunFolder, more: Sequence[Feed] = ()) -> Engine:
    """The engine of a run that exists, not yet restored, with the data that was fed to it."""
    settings = configuration.load(folder.path / "config.yaml")
    check_files(folder)
    engine = build(settings, folder, more=more)
    engine.changed = changed_plugins(folder)
    if not (folder.path / "info.json").is_file():  # it was killed before it had them
        _record(folder, settings, engine)
    return engine


def _record(folder: RunFolder, settings: RunConfig, engine: Engine) -> None:
    """What the run reads and what its model takes; files.json first, so that info.json says that both are there."""
    specs = [*plugin_specs(dataclasses.replace(settings, log=[])), *plugin_specs(backbone_of(settings))]  # a sink changes no result
    folder.write("files.json", {**fingerprints(engine.scenario.files()), **plugin_fingerprints(specs)})
    folder.write("info.json", {"backbone": backbone_of(settings).to_dict(), "stream": plain_info(engine.info)})


def as_config(config: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str] = ()) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return configuration.from_mapping(config, overrides=overrides)
    settings = configuration.load(config, overrides)
    return settings if settings.name else dataclasses.replace(settings, name=Path(config).stem)


def build(settings: RunConfig, folder: RunFolder | None, log: Sequence[Sink] | None = None, more: Sequence[Feed] = ()) -> Engine:
    """An engine from a configuration, with what was fed to its run, and `more` that is about to be."""
    backbone, weights = starting_model(settings)
    engine = Engine(
        stream_of(settings, folder, more),
        settings.strategy.build(),
        backbone,
        settings.memory.build(),
        seed=settings.seed,
        engine=settings.engine,
        evaluate=settings.evaluate,
        online=settings.online,
        log=[spec.build() for spec in settings.log] if log is None else log,
        weights=weights,
        trained=lambda: trained_head(settings),
        folder=folder,
        name=settings.name or (folder.path.name if folder else "run"),
    )
    engine.notes += misnamed(settings)
    return engine


def stream_of(settings: RunConfig, folder: RunFolder | None, more: Sequence[Feed] = ()) -> Scenario:
    """The scenario of a run, with what was fed to it."""
    scenario: Scenario = settings.scenario.build()
    scenario.workdir = folder.path / "stream" if folder else None
    feeds = [*(read_feeds(folder.path) if folder else []), *more]
    return Extended(scenario, feeds) if feeds else scenario


def backbone_of(settings: RunConfig) -> PluginSpec:
    """The backbone of a run, or that of the run whose model it started from."""
    model = settings.model
    if model.backbone is not None:
        return model.backbone
    return backbone_of(configuration.load(RunFolder(Path(str(model.run))).path / "config.yaml"))


def starting_model(settings: RunConfig) -> tuple[Backbone, Mapping[str, Tensor] | None]:
    """The backbone that a run starts from, and its weights where they are not its own: pretrained by the configuration itself, or
    another run's."""
    model = settings.model
    if model.run is not None:
        return backbone_of(settings).build(), whole_backbone(load(model.run).model, f"the model of {model.run}")
    if model.pretrain is None:
        return backbone_of(settings).build(), None
    tensors = load_file(pretrained_weights(settings)).items()
    return backbone_of(settings).build(), {name.removeprefix("backbone."): value for name, value in tensors if name.startswith("backbone.")}


def whole_backbone(model: Model, whose: str) -> dict[str, Tensor]:
    """The weights of a model's backbone, for a run that starts from them; a network that grew is no longer the backbone by its name."""
    if isinstance(model.backbone, Expandable):
        raise ConfigError(f"{whose} is made of blocks for the tasks that it grew with, and no other run can start from it: take another's")
    return model.backbone.state_dict()


def trained_head(settings: RunConfig) -> tuple[dict[str, Tensor], list[str]] | None:
    """The head that belongs to the starting model, and the classes of its rows, where it was trained with one: what a test-time stream
    is served by."""
    model = settings.model
    if model.run is not None:
        learned = load(model.run)
        return dict(learned.model.head.state_dict()), learned.classes
    if model.pretrain is None:
        return None
    with safe_open(pretrained_weights(settings), framework="pt") as file:
        classes = json.loads((file.metadata() or {})["classes"])
        return {name[len("head.") :]: file.get_tensor(name) for name in file.keys() if name.startswith("head.")}, classes  # noqa: SIM118


def pretrained_weights(settings: RunConfig) -> Path:
    """Train the starting model once, as `model.pretrain` says, and keep its weights under the hash of its settings."""
    before = settings.model.pretrain
    assert before is not None
    earlier = dataclasses.replace(
        settings,
        seed=settings.seed if before.seed is None else before.seed,
        scenario=before.scenario,
        strategy=before.strategy,
        model=dataclasses.replace(settings.model, pretrain=None),
        online=OnlineConfig(),
        log=[],
        sweep=None,
        name="pretraining",
    )
    folder = Path(os.environ.get("STREAMCL_CACHE", Path.home() / ".cache" / "streamcl")) / "pretrained"
    cache = folder / f"{earlier.digest()[:32]}-model.safetensors"
    if not cache.is_file():
        engine = build(earlier, None, log=[])
        made = f"{before.strategy.name} on {before.scenario.name}"
        print(f"training the starting model first ({made}), once: it is kept in {folder}", file=sys.stderr, flush=True)
        engine.run()
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_name(f".{cache.name}.{os.getpid()}")
        whole_backbone(engine.model, "the model that model.pretrain makes")
        tensors = {name: value.cpu().contiguous() for name, value in engine.model.state_dict().items()}
        save_file(tensors, aside, metadata={"classes": json.dumps(engine.state()["classes"])})
        aside.replace(cache)
    return cache


def load(path: str | Path, device: str | None = None) -> Learned:
    """The model in an exported folder, or that of a run at its newest checkpoint. The folder is only read; the data is not needed.

    `device` is the run's own by default, where this machine has it.
    """
    if exporting.is_export(Path(path)):
        return exporting.read(Path(path), device or "auto")
    return restored(path, device)[0]


def restored(
    path: str | Path, device: str | None = None, warn: Callable[[str], None] = warnings.warn
) -> tuple[Learned, RunConfig, dict[str, Any]]:
    """The model of a run, its settings, and the newest whole checkpoint, from which it was made. Nothing is written."""
    folder = RunFolder(Path(path))
    folder.check()
    settings = configuration.load(folder.path / "config.yaml")
    for name in changed_plugins(folder):
        warn(f"{shown(Path(name))} {CHANGED}")
    state = Checkpoints(folder.checkpoints).load(warn)
    if state is None or not state["memory_per_task"]:
        raise RunError(f"{folder.path} has not learned a task yet")
    asked = device or settings.engine.device
    if device is None and asked.startswith("cuda") and not torch.cuda.is_available():
        asked = "auto"
    where = Processes().device(asked)
    about, strategy, memory = folder.read("info.json"), settings.strategy.build(), settings.memory.build()
    memory.open(settings.seed, strategy.selection, where, folder=folder.checkpoints)
    with undisturbed(settings.seed):
        learned = Learned(
            info_from(about["stream"]),
            plugin_spec("backbone", about["backbone"]).build(),
            strategy,
            memory,
            state["classes"],
            transforms=settings.scenario.build().transforms,
            weights=None if state["model"]["origin"] is None else starting_model(settings)[1],
            seed=settings.seed,
            device=where,
            precision=precision_on(where, settings.engine.precision),
        )
        try:
            strategy.restore(state["strategy"])
            learned.model.restore(state["model"])
            learned.model.to(where)
            memory.restore(state["memory"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(f"the newest checkpoint of {folder.path} does not fit the code that is to load it: {error}") from error
    return learned, settings, state


def free_folder(settings: RunConfig) -> Path:
    """runs/NAME, or the first of NAME-2, NAME-3, ... that does not exist."""
    name = settings.name or "run"
    candidate, number = Path("runs") / name, 1
    while candidate.exists():
        number += 1
        candidate = Path("runs") / f"{name}-{number}"
    return candidate


def plugin_fingerprints(specs: Iterable[PluginSpec]) -> dict[str, dict[str, Any]]:
    """The same of a person's own plug-ins, and of what these import from beside them."""
    files = dict.fromkeys(str(file) for spec in specs for file in spec.plugin.own_files())
    return {name: {**found, "plugin": True} for name, found in fingerprints(list(files)).items()}


def check_files(folder: RunFolder) -> None:
    """Raise DataError where data that the run still needs is gone, or where some has changed."""
    learned = folder.status()["cursor"]["tasks_done"]
    for name, before in folder.files().items():
        if before.get("plugin"):
            continue
        mark = f"SHA-256 {before['sha256'][:12]}..."
        if not Path(name).exists():
            advice = advice_without(folder.path, name, learned)
            if advice is not None:
                raise DataError(f"{name} is gone; the run was made with it ({mark}): {advice}")
        elif fingerprints([name]).get(name) != before:
            raise DataError(f"{name} has changed since the run was made ({mark.replace('256', '256 was', 1)}): put the old one back")
