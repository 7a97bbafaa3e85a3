"""The server as a process: killed in the middle of traffic it comes back where it was, stopped it ends in order, and its page shows it."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from served_runs import ALTER, ASK, CHANGE, PREDICT, as_json, copied, digits, digits_run

import streamcl
from streamcl.checkpoint import Checkpoints, flatten
from streamcl.deploying import online
from streamcl.serving.journal import Journal
from streamcl.stream import Batch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# The journal keeps everything, so that it can be compared with what was learned; and states are saved often.
SERVER = """
import sys
from pathlib import Path
from streamcl.serving import Settings, serve
from streamcl.serving.journal import Journal
Journal.forget = lambda self, upto: None
serve(Path(sys.argv[1]), port=0, settings=Settings(threads=1, inputs=4, limits={"save": 0.4, "update": 24, "idle": 0.05}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return digits_run(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return copied(trained, tmp_path / "run")


class Process:
    """A server of its own process, and where it listens."""

    patience = 20  # seconds until an answer

    def __init__(self, run: Path, *command: str) -> None:
        self.log = run / "log"
        environment = {**os.environ, "STREAMCL_PREDICT_TOKEN": PREDICT, "STREAMCL_CHANGE_TOKEN": CHANGE, "OMP_NUM_THREADS": "1"}
        started = [sys.executable, *(command or ("-c", SERVER, str(run)))]
        self.process = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=self.log.open("a"), text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("serving"), line + self.log.read_text()
        self.port = int(line.rpartition(":")[2])
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                self.ask("GET", "/health")
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("it does not answer")

    def ask(self, method, path, body=None, headers=ASK):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {**headers, "Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        return self.process.wait(30)


def test_after_kills_every_acknowledged_batch_was_learned_once(run):
    images, chance = digits(1700), random.Random(0)
    acknowledged: dict[int, int] = {}  # id -> which image
    stopping, guard = threading.Event(), threading.Lock()
    at: dict[str, int] = {}

    def client(number):
        """Sends batch after batch, each under a key until it is acknowledged."""
        mine = random.Random(number)
        while not stopping.is_set():
            first, count, key = mine.randrange(1600), mine.randrange(1, 9), uuid.uuid4().hex
            while not stopping.is_set():
                try:
                    status, answer = server.ask("POST", "/adapt", as_json(images[first : first + count]), {**ALTER, "Idempotency-Key": key})
                except (OSError, http.client.HTTPException, ValueError):
                    time.sleep(0.05)
                    continue
                if status == 200:
                    with guard:
                        for place, own in enumerate(answer["ids"]):
                            assert own not in acknowledged, "an id was given twice"
                            acknowledged[own] = first + place
                        at[key] = answer["version"]
                    break
                assert status in (409, 429, 503), answer

    server = Process(run)
    clients = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(4)]
    for one in clients:
        one.start()
    try:
        for _ in range(2):
            time.sleep(chance.uniform(1.0, 2.0))
            assert server.stop(signal.SIGKILL) == -signal.SIGKILL
            server = Process(run)
        time.sleep(1.0)
    finally:
        stopping.set()
    for one in clients:
        one.join(30)
    status = server.ask("GET", "/status")[1]
    assert status["server"]["replayed"] > 0 and status["server"]["failed"] == 0
    assert server.stop() == 0

    journal = Journal(run / "served" / "journal.db")
    entries = journal.after(0)
    assert [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    kept = Batch.cat([entry.batch() for entry in entries])
    assert len(kept.ids.unique()) == len(kept.ids) and set(acknowledged) <= set(kept.ids.tolist())
    place = {own: row for row, own in enumerate(kept.ids.tolist())}
    rows = torch.tensor([place[own] for own in acknowledged])
    assert torch.equal(kept.inputs["image"][rows], images[list(acknowledged.values())])
    assert (
        len(acknowledged) > 100 and len(kept) - len(acknowledged) < 4 * 9 * 3
    )  # what a kill left without an answer, and was not sent again

    state = Checkpoints(run / "served" / "states").load(print)
    assert state is not None
    learned = streamcl.load(run)
    alone = online(learned, "tent", mode="shadow")
    waiting: list[Batch] = []
    updates = 0
    for entry in entries:
        if entry.number > state["cursor"]:
            break
        waiting.append(entry.batch())
        if entry.number in journal.cuts:
            alone.learn(Batch.cat(waiting))
            waiting, updates = [], updates + 1
    assert not waiting and updates > 3
    for part in ("strategy", "weights", "versions", "recent", "guard"):
        (tree, tensors), (expected_tree, expected) = flatten(state["loop"][part]), flatten(alone.state()[part])
        assert tree == expected_tree, part
        assert all(torch.equal(value, expected[name]) for name, value in tensors.items()), part
    assert state["loop"]["version"] == alone.version
    assert state["loop"]["counts"]["loop"]["adapted"] == alone.counts["adapted"]
    journal.close()


def test_sigterm_finishes_what_was_begun_and_ends_in_order(run):
    server = Process(run, "-m", "streamcl.cli", "serve", str(run), "--port", "0", "--threads", "1")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(server.ask("POST", "/adapt", as_json(digits(8)), ALTER))) for _ in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    code = server.stop()
    for thread in threads:
        thread.join()
    assert code == 0 and all(status == 200 for status, _ in answers)
    journal = Journal(run / "served" / "journal.db")
    assert journal.samples == 8 * len(answers)
    journal.close()
    assert not (run / "served" / "journal.db-wal").exists()


def test_clients_that_hang_up_cost_nothing(run):
    server = Process(run)
    body = json.dumps(as_json(digits(3))).encode()
    headers = {"Host": "x", **ALTER, "Content-Type": "application/json", "Content-Length": len(body)}
    head = "POST /adapt HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    for cut in (0, 1, len(body) // 2, len(body) - 1):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body[:cut])
    for part in (b"", b"GET", b"POST /adapt HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"\x16\x03\x01\x02\x00"):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(part)
    time.sleep(0.3)
    status = server.ask("GET", "/status")[1]
    assert status["server"]["acknowledged"] == 0 and status["batches"] == 0
    assert server.ask("POST", "/adapt", as_json(digits(3)), ALTER)[0] == 200
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_page_shows_what_the_loop_does(run, tmp_path):
    server = Process(run)
    try:
        for k in range(6):
            assert server.ask("POST", "/adapt", as_json(digits(64, 64 * k)), ALTER)[0] == 200
        version = server.ask("POST", "/promote", {}, ALTER)[1]["version"]
        time.sleep(0.5)

        def page(path):
            command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
            command += ["--virtual-time-budget=6000", "--dump-dom", f"http://127.0.0.1:{server.port}{path}"]
            return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

        shown = page(f"/#token={PREDICT}")
        assert f"<b>{version}</b><span>version</span>" in shown and "<span>entropy</span>" in shown
        assert "promoted" in shown and "asked for" in shown and "<polyline" in shown
        assert "<img" not in shown and "<figure" not in shown, "inputs are shown only when they are asked for"
        assert PREDICT not in shown
        wrong = page("/#token=wrong")
        assert "the bearer token is missing or wrong" in wrong and "<polyline" not in wrong
    finally:
        server.stop()
