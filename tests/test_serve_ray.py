"""Replicas with Ray Serve: one adapts and the others follow, what dies comes back, and nothing is left at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from served_runs import ALTER, ASK, as_json, copied, digits, digits_run
from test_serve_processes import Process

from streamcl.checkpoint import Checkpoints
from streamcl.errors import ConfigError, RunError
from streamcl.serving import Settings, made, on_ray
from streamcl.serving.journal import Journal

REPLICAS = 3
LOCAL = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return digits_run(tmp_path_factory.mktemp("trained") / "run")


# -- without Ray -------------------------------------------------------------------------------------------------------------------


def test_one_replica_publishes_what_the_others_follow(tmp_path):
    given = Settings(strategy="tent", canary="digits", limits={"most": 7})
    adapting, following = on_ray.parts(tmp_path / "run", 4, given)
    assert adapting.publish == following.follow == tmp_path / "run" / "served" / "deltas"
    assert adapting.follow is None and following.publish is None
    assert adapting.strategy == following.strategy == "tent" and adapting.limits == following.limits == {"most": 7}
    assert adapting.threads == following.threads == max(1, (os.cpu_count() or 2) // 4)
    assert given.publish is None and given.threads is None, "what was given is another's"
    adapting, following = on_ray.parts(tmp_path / "run", 2, Settings(publish=tmp_path / "shared", threads=3))
    assert adapting.publish == following.follow == tmp_path / "shared" and adapting.threads == following.threads == 3


def test_what_replicas_cannot_be_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="2 or more"):
        on_ray.parts(trained, 1, Settings())
    with pytest.raises(ConfigError, match="leave out --follow"):
        on_ray.parts(trained, 2, Settings(follow=tmp_path))
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="served inline"):  # before Ray is started
        on_ray.serve(copied(trained, tmp_path / "run"), "127.0.0.1", 0, 2, Settings(strategy="source"))


def test_a_port_that_is_taken_is_told():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"):
            on_ray.free("127.0.0.1", port)
    assert on_ray.free("127.0.0.1", port) == port and on_ray.free("127.0.0.1", 0) > 0


def test_without_ray_the_extra_is_named(trained, monkeypatch):
    for name in (*on_ray.ENVIRONMENT, "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs ray, which is not installed: pip install 'streamcl\[ray\]'"):
        on_ray.serve(trained, "127.0.0.1", 0, 2, Settings())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0", "said before Ray is imported"


# -- with it -----------------------------------------------------------------------------------------------------------------------


class Replicas(Process):
    """`streamcl serve --replicas` and the processes that are its children."""

    patience = 100  # until a replica that was killed is there again, on a machine that has much else to do

    def __init__(self, run: Path) -> None:
        options = ("--replicas", str(REPLICAS), "--port", "0", "--threads", "1", "--body", "100000", "--timeout", "30")
        super().__init__(run, "-m", "streamcl.cli", "serve", str(run), *options)
        self.run, self.all = run, psutil.Process(self.process.pid)

    def of(self, role: str) -> set[int]:
        """The replicas that adapt, or follow, by their process."""
        found = set()
        for child in self.all.children(recursive=True):
            try:
                if child.cmdline() and child.cmdline()[0].startswith(f"ray::ServeReplica:{role}"):
                    found.add(child.pid)
            except psutil.Error:
                continue
        return found

    def change(self, path: str, body: object = None) -> dict:
        status, answer = self.ask("POST", path, body or {}, ALTER)
        assert status == 200, answer
        return answer

    def answer(self) -> dict:
        status, answer = self.ask("POST", "/predict?scores=1", as_json(digits(20)))
        assert status == 200, answer
        return answer

    def until(self, happens, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def replicas(trained, tmp_path_factory):
    pytest.importorskip("ray")
    started = Replicas(copied(trained, tmp_path_factory.mktemp("replicas") / "run"))
    yield started
    if started.process.poll() is None:
        started.stop()


def test_equal_requests_get_equal_answers_at_equal_versions(replicas):
    answers: dict[int, set[str]] = {}
    for k in range(3):
        # The one that adapts answers as well: with the version that it serves, before it has learned this batch.
        told = replicas.change("/adapt?scores=1", as_json(digits(20)))
        answers.setdefault(told["version"], set()).add(json.dumps([told["predictions"], told["scores"], told["model"]]))
        replicas.change("/adapt", as_json(digits(64, 64 * k)))
        version = replicas.change("/promote")["version"]
        seen = []
        while seen.count(version) < 12:
            told = replicas.answer()
            answers.setdefault(told["version"], set()).add(json.dumps([told["predictions"], told["scores"], told["model"]]))
            seen.append(told["version"])
            assert len(seen) < 2000
    assert sorted(answers) == [0, 1, 2, 3]
    assert all(len(equal) == 1 for equal in answers.values())
    assert len(set.union(*answers.values())) == 4, "each version answers otherwise"


def test_what_changes_the_model_goes_to_the_one_that_adapts(replicas):
    before = replicas.ask("GET", "/status")[1]
    assert before["follows"] is None and before["mode"] == "shadow"
    for _ in range(8):
        replicas.answer()
        replicas.change("/adapt", as_json(digits(5)))
    after = replicas.ask("GET", "/status")[1]
    assert after["server"]["acknowledged"] - before["server"]["acknowledged"] == 40 == after["samples"] - before["samples"]
    assert replicas.change("/feedback", {"ids": [0], "labels": ["0"]})
    assert replicas.change("/feed", as_json(digits(2), labels=["0", "1"]))
    assert replicas.ask("POST", "/adapt", as_json(digits(1)), ASK)[0] == 403
    assert replicas.ask("POST", "/predict", as_json(digits(1)), {"Authorization": "Bearer another"})[0] == 401
    assert replicas.ask("POST", "/predict", as_json(digits(600)))[0] == 413
    assert replicas.ask("POST", "/predict", {"inputs": [1]})[0] == 422
    assert replicas.ask("GET", "/predict/more")[0] == 404


def test_a_killed_follower_comes_back_and_catches_up(replicas):
    before = replicas.of("follows")
    os.kill(min(before), signal.SIGKILL)
    assert replicas.answer()["version"] == replicas.ask("GET", "/health")[1]["version"], "the other answers meanwhile"
    version = replicas.change("/promote")["version"]
    replicas.until(lambda: replicas.answer()["version"] == version)
    replicas.until(lambda: replicas.answer()["version"] != version or len(replicas.of("follows") - before) == 1)
    asked = time.monotonic()
    while time.monotonic() < asked + 3:  # one that has come back never answers with an older version
        assert replicas.answer()["version"] == version
    os.kill((replicas.of("follows") & before).pop(), signal.SIGKILL)
    assert replicas.answer()["version"] == version, "now it answers alone"


def test_when_the_one_that_adapts_is_killed_it_comes_back_where_it_was(replicas):
    before = replicas.ask("GET", "/status")[1]
    (killed,) = replicas.of("adapts")
    os.kill(killed, signal.SIGKILL)
    assert replicas.answer()["version"] == before["version"], "followers answer meanwhile"
    after = replicas.ask("GET", "/status")[1]
    assert all(after[name] == before[name] for name in ("version", "samples", "model"))
    assert after["server"]["acknowledged"] == before["server"]["acknowledged"]
    assert replicas.change("/promote")["version"] == before["version"] + 1
    assert len(replicas.of("adapts") - {killed}) == 1
    with pytest.raises(RunError, match="in use by another server"):
        made(replicas.run, Settings(threads=1))


def test_nothing_is_heard_or_said_beyond_this_machine(replicas):
    everyone = [replicas.all, *replicas.all.children(recursive=True)]
    ports = [place for one in everyone for place in one.net_connections("inet")]
    assert replicas.port in {place.laddr.port for place in ports if place.status == psutil.CONN_LISTEN}
    assert {place.laddr.ip for place in ports} | {place.raddr.ip for place in ports if place.raddr} <= LOCAL
    environment = replicas.all.children()[0].environ()
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0" and environment["RAY_AUTH_MODE"] == "token" and environment["RAY_AUTH_TOKEN"]


def test_at_the_end_the_state_is_saved_and_no_process_is_left(replicas):
    replicas.change("/adapt", as_json(digits(3)))
    children = replicas.all.children(recursive=True)
    kept = [Path(word.partition("=")[2]) for child in children for word in child.cmdline() if word.startswith("--temp_dir=")]
    assert replicas.stop() == 0
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert kept and not any(folder.exists() for folder in kept)
    state = Checkpoints(replicas.run / "served" / "states").load(print)
    journal = Journal(replicas.run / "served" / "journal.db")
    assert state["samples"] == journal.samples
    journal.close()
