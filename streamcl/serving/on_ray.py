"""`streamcl serve --replicas`: one replica that adapts and others that follow it, behind one address, kept alive by Ray Serve.

    client -> Ray's proxy -> /predict -> any of the followers
                         \\-> the rest  -> the one that adapts -> numbered deltas in a folder -> the followers

Two applications, each the ASGI application of the plain server, so that nothing stands between the proxy and a replica. Ray starts what
has died again: a follower begins with the version that is published, the one that adapts with its state and its journal, which the lock on
the run's folder keeps to one process at a time. What the replicas tell each other are the deltas, which are files; what Ray sends between
its processes (the function that makes a replica, requests, answers) it pickles, under a secret of this start.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamcl.errors import ConfigError, RunError, StreamclError
from streamcl.serving import FOLDER, SWITCH, Settings, announce, application, show

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from streamcl.serving.service import Limits

DELTAS = "deltas"  # in the folder of what is served, unless --publish names another
ASKED = "/predict"  # what followers answer; everything else is the other one's
PATIENCE = 60.0  # seconds that a new writer waits for the end of the one before
LOOK = 2.0  # seconds between two looks at whether Ray is still there
SMALLEST_STORE = 80 << 20  # bytes; Ray takes no smaller one
BODIES = 16  # of the largest size, which Ray may hold at once

# Before Ray is imported. Nothing is sent anywhere, nobody else on this machine gives it orders, and it does not build environments.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # whatever the system: then its own processes meet at 127.0.0.1 and nowhere else
}


def serve(run: Path, host: str, port: int, replicas: int, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then finish what was taken in, save, end every process, and return."""
    ray, ray_serve = imported()
    adapting, following = parts(run, replicas, settings)
    port = free(host, port)
    app, drawn = application(run, adapting)  # whatever is wrong with it is told here, in one sentence; the replicas make their own
    show(drawn)
    service = app.state.server.service
    limits = service.limits
    service.release()
    del app, service
    gc.collect()
    stop = threading.Event()
    with started(ray, ray_serve, host, port, replicas, limits, stop):
        try:
            ray_serve.run_many(
                [
                    ray_serve.RunTarget(deployment(ray_serve, run, adapting, 1, limits), name="adapts", route_prefix="/"),
                    ray_serve.RunTarget(deployment(ray_serve, run, following, replicas - 1, limits), name="follows", route_prefix=ASKED),
                ]
            )
        except Exception as error:
            raise RunError(f"Ray could not start the replicas: {told(error)}") from error
        announce(run, host, port)
        while not stop.wait(LOOK):
            if not all(node["Alive"] for node in ray.nodes()):
                raise Stopped("Ray has stopped, and with it what starts replicas again; what was acknowledged is safe: start it again")


class Stopped(RunError):
    """Ray itself has failed, and answers no more."""


def parts(run: Path, replicas: int, settings: Settings) -> tuple[Settings, Settings]:
    """How the one that adapts is served, and the others."""
    if replicas < 2:
        raise ConfigError(f"--replicas is {replicas}: one adapts and at least one follows it, so it is 2 or more")
    if settings.follow is not None:
        raise ConfigError("--replicas has a replica of its own that adapts: leave out --follow")
    folder = run.absolute() / FOLDER / DELTAS if settings.publish is None else settings.publish.absolute()
    shared = replace(settings, threads=settings.threads or max(1, (os.cpu_count() or 2) // replicas))
    return replace(shared, publish=folder), replace(shared, publish=None, follow=folder)


def imported() -> tuple[Any, Any]:
    """Ray, and Ray Serve."""
    os.environ.update(ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    try:
        import ray
        from ray import serve as ray_serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"streamcl serve --replicas needs {error.name}, which is not installed: pip install 'streamcl[ray]'") from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return ray, ray_serve


@contextmanager
def started(ray: Any, ray_serve: Any, host: str, port: int, replicas: int, limits: Limits, stop: threading.Event) -> Iterator[None]:
    """Ray, for this alone: on this machine, reached from it alone but for the one address, and gone at the end with all that it keeps.

    Signals set `stop`, for an exception in the middle of what Ray does would make it abort; so an end is asked for as soon as it has begun.
    """
    import psutil

    folder = tempfile.mkdtemp(prefix="streamcl-")  # a short path: sockets are made in it
    try:
        ray.init(
            address="local",
            num_cpus=replicas,
            object_store_memory=max(SMALLEST_STORE, BODIES * limits.body),
            include_dashboard=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own
            signal.signal(number, lambda *_: stop.set())
        ray_serve.start(
            proxy_location="HeadOnly",
            # Longer than a replica takes to answer or refuse: it ends what waits for one that does not come back.
            http_options={"host": host, "port": port, "request_timeout_s": 3 * limits.timeout, "keep_alive_timeout_s": 60},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # it is ending
            signal.signal(number, signal.SIG_IGN)
        children = psutil.Process().children(recursive=True)
        if ray.is_initialized() and not isinstance(sys.exception(), Stopped):  # it would start one to shut it down
            with suppress(Exception):  # whatever state it is in, the next lines end it
                ray_serve.shutdown()
        ray.shutdown()
        for child in psutil.wait_procs(children, timeout=5)[1]:  # agents overlook the end of a Ray that had not quite begun
            with suppress(psutil.Error):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)


def deployment(ray_serve: Any, run: Path, settings: Settings, replicas: int, limits: Limits) -> Any:
    """What Ray starts so many times, and again where it dies."""
    kind = ray_serve.deployment(
        name="adapting" if settings.follow is None else "following",
        num_replicas=replicas,
        max_ongoing_requests=limits.queue + 1,  # samples: that there are too many is the replica's to say
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=limits.timeout + 5,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return kind(ray_serve.ingress(maker(run.absolute(), settings, Path.cwd()))()).bind()


def maker(run: Path, settings: Settings, cwd: Path) -> Callable[[], ASGIApp]:
    def replica() -> ASGIApp:
        """The application of a replica, made in its process."""
        from ray.serve._private import replica as rays

        opened = rays.add_port_to_grpc_server  # the one port that Ray opens to everybody, and no setting says otherwise
        rays.add_port_to_grpc_server = lambda server, address: opened(server, address.replace("[::]", "127.0.0.1"))
        os.chdir(cwd)
        if settings.follow is None:
            wait_for(run / FOLDER / ".lock")
        app, _ = application(run, settings)
        service = app.state.server.service
        if service.follower is not None:
            with suppress(StreamclError):  # it is told as soon as it serves
                found = service.follower.look()
                if found is not None:
                    service.follower.take(service.loop, found)
        sys.setswitchinterval(SWITCH)
        gc.collect()
        gc.freeze()
        return rooted(app)

    return replica


def rooted(app: ASGIApp) -> ASGIApp:
    """The application as if it were at the root: the whole path is its own to look at."""

    async def asked(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "root_path": ""}, receive, send)

    return asked


def wait_for(lock: Path) -> None:
    """Wait until the one before has let go of its folder, as long as that may take; who takes the folder is settled when it is opened."""
    until = time.monotonic() + PATIENCE
    with lock.open("a+") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.05)


def free(host: str, port: int) -> int:
    """The port, or any free one for 0, where it can be listened at: asked here, for Ray would say it in its own way."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
            return int(listening.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen at {host}:{port}: {error.strerror if isinstance(error, OSError) else error}") from None


def told(error: Exception) -> str:
    """The last line of what Ray says, which is the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
