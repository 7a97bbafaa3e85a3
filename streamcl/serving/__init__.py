"""`streamcl serve`: a run's model over HTTP, which adapts to what it is asked, under guard, and comes back where it was."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamcl.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from torch import Tensor

    from streamcl.learned import Learned
    from streamcl.plugins import PluginSpec
    from streamcl.serving.service import Service
    from streamcl.stream import Batch

FOLDER = "served"  # in the run's folder
SWITCH = 0.0005  # seconds after which the writer's thread lets an answer pass


@dataclass
class Settings:
    """How a run is served. `strategy` is the run's own by default, where that adapts, else Tent; `mode` is shadow where it can be.

    `follow` names the folder that another server of the same run publishes into (`publish`): then this one adapts nothing by itself.
    `remember` of the newest samples are kept in memory, so that labels that come late are compared with the deployed model's answers too.
    `inputs` of the newest requests are kept in memory for the page; by default none.
    """

    strategy: str | dict[str, Any] | None = None
    mode: str | None = None
    guard: bool | dict[str, Any] = True
    canary: str | None = None
    calibrate: str | None = None
    every: int = 1
    window: int = 32
    budget: float | None = None
    keep: int = 5
    promote: int = 8
    remember: int = 256
    publish: Path | None = None
    follow: Path | None = None
    tokens: Path | None = None
    inputs: int = 0
    device: str | None = None
    threads: int | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = field(default=lambda message: print(message, file=sys.stderr, flush=True))


def serve(run: Path, host: str = "127.0.0.1", port: int = 8000, settings: Settings | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was taken in, save, and return."""
    settings = settings or Settings()
    app, drawn = application(run, settings)
    show(drawn)
    import uvicorn

    limits = app.state.server.service.limits
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except (OSError, OverflowError) as error:
        app.state.server.service.release()
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror if isinstance(error, OSError) else error}") from None
    announce(run, host, listening.getsockname()[1])
    sys.setswitchinterval(SWITCH)
    gc.collect()
    gc.freeze()  # what is there by now stays: to look through all of it again and again would hold up requests for a good while
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when it has stopped, which is the end asked for
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=int(limits.timeout) + 1, timeout_keep_alive=60
    )
    uvicorn.Server(config).run(sockets=[listening])


def show(drawn: dict[str, str]) -> None:
    """The tokens that nobody will be shown again."""
    for role, token in drawn.items():
        print(f"token for {'asking' if role == 'predict' else 'changing the model'}, shown this once: {token}", flush=True)


def announce(run: Path, host: str, port: int) -> None:
    print(f"serving {run} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)


def application(run: Path, settings: Settings) -> tuple[FastAPI, dict[str, str]]:
    """The ASGI application of a run, and the tokens that were drawn for it just now."""
    from streamcl import exporting
    from streamcl.serving import app as http  # first: it says what is not installed
    from streamcl.serving.deliveries import Deliveries
    from streamcl.serving.tokens import tokens

    folder = run / FOLDER
    service = made(run, settings)
    try:
        folder.mkdir(exist_ok=True)
        known, drawn = tokens(folder, settings.tokens)
    except BaseException:
        service.release()
        raise
    feeds = settings.follow is None and not exporting.is_export(run) and not service.learned.info.test_time
    return http.make_app(service, known, Deliveries(run, folder / "deliveries", service.learned) if feeds else None), drawn


def made(run: Path, settings: Settings) -> Service:
    """The service of a run, as it was when it was last stopped or killed."""
    import torch

    from streamcl.deploying import online
    from streamcl.running import load
    from streamcl.serving.deltas import Follower, Publisher
    from streamcl.serving.service import Limits, Service

    if settings.follow is not None and settings.publish is not None:
        raise ConfigError("a replica that follows publishes nothing: give --follow or --publish, not both")
    torch.set_num_threads(settings.threads or max(1, (os.cpu_count() or 2) // 2))
    learned = load(run, settings.device)
    if learned.info.target not in ("class", "labels", "value"):
        raise ConfigError(f"{run} learned {learned.info.target}: classes, labels and values are served")
    strategy = strategy_of(run, settings)
    kind: Any = strategy.plugin.load()
    if settings.mode not in (None, "shadow", "inline"):
        raise ConfigError(f"--mode is {settings.mode!r}: shadow or inline")
    mode: Any = settings.mode or ("shadow" if getattr(kind, "changes_weights", False) else "inline")
    if mode == "inline" and (settings.publish is not None or settings.follow is not None):
        raise ConfigError(
            f"replicas follow the versions that shadow mode promotes, and {strategy.name} is served inline: one server is all"
        )
    loop = online(
        learned,
        strategy=strategy,
        mode=mode,
        guard=settings.guard if settings.follow is None else False,
        canary=None if settings.canary is None or settings.follow is not None else labelled(learned, settings.canary),
        calibrate=None if settings.calibrate is None else (inputs for inputs, _ in labelled(learned, settings.calibrate)),
        every=settings.every,
        window=settings.window,
        budget=settings.budget,
        keep=settings.keep,
        promote=settings.promote,
        remember=settings.remember,
    )
    model = fingerprint(run, strategy)
    return Service(
        learned,
        loop,
        run / FOLDER,
        model=model,
        limits=Limits(**settings.limits),
        publisher=None if settings.publish is None else Publisher(settings.publish, model),
        follower=None if settings.follow is None else Follower(settings.follow, model),
        shown=settings.inputs,
        tell=settings.tell,
    )


def strategy_of(run: Path, settings: Settings) -> PluginSpec:
    """What adapts: as asked, the run's own, or Tent."""
    from streamcl import config, exporting
    from streamcl.adapting import AdaptingStrategy
    from streamcl.config import plugin_spec

    if settings.strategy is not None:
        return plugin_spec("strategy", settings.strategy, Path.cwd())
    if not exporting.is_export(run):
        own = config.load(run / "config.yaml").strategy
        if issubclass(own.plugin.load(), AdaptingStrategy):
            return own
    return plugin_spec("strategy", "tent")


def labelled(learned: Learned, data: str) -> Iterator[tuple[Batch, Tensor]]:
    """Data in the forms that `streamcl feed` takes, as batches and their classes by the model's numbers."""
    import torch

    from streamcl.config import plugin_spec
    from streamcl.feeding import check_fit, check_whole, source_mapping
    from streamcl.stream import Source

    source: Source = plugin_spec("source", source_mapping(data)).build()
    found = source.load()
    check_fit(found, learned.info, data)
    check_whole(found.train, learned.info, data)
    number = {name: label for label, name in enumerate(learned.classes)}
    if found.target == "class":
        occurring = found.train.targets.unique().tolist()
        unknown = [name for label in occurring if (name := found.class_names[label]) not in number]
        if unknown:
            raise DataError(f"{data} has the class {unknown[0]!r}, and this model was trained on {', '.join(learned.classes)}")
    numbers = torch.tensor([number.get(name, -1) for name in found.class_names] or [0])
    for batch in found.train.batches(256):
        assert batch.target is not None
        yield batch, numbers[batch.target] if found.target == "class" else batch.target


def fingerprint(run: Path, strategy: PluginSpec) -> str:
    """Which model the versions are of: the run's newest checkpoint (or the exported weights), and what adapts it."""
    from streamcl import exporting
    from streamcl.checkpoint import Checkpoints
    from streamcl.writing import sha256

    if exporting.is_export(run):
        parts = [sha256(file) for file in sorted(run.glob("*.safetensors"))]
    else:
        checkpoints = Checkpoints(run / "checkpoints")
        parts = [sha256(checkpoints.path(checkpoints.numbers()[-1]) / "manifest.json")]
    return hashlib.sha256(json.dumps([parts, strategy.to_dict()], sort_keys=True).encode()).hexdigest()[:12]
