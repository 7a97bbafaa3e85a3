"""Latency of `streamcl serve` under 500 clients that ask once a second each, beside the bare model behind the same HTTP stack.

    bare       a FastAPI application as one would write it: JSON to tensor, the model on one thread, the class and its confidence back
    in loop    the same without the thread: the model in the event loop, where nobody else is heard while it computes
    /predict   the server, answering only
    /adapt     the server in shadow mode with Tent and the guard: every request is in the journal before it is answered, and is learned

Each serves the same small convnet (8 x 8 digits, one image in a request) in a process of its own, under uvicorn as `uvicorn[standard]`
installs it; they take turns, with the clients in this process. The bare one checks nothing: no token, no schema (pydantic would cost it
more), no limits, no figures. It has the model on a thread because one in the event loop holds up everybody for as long as it computes;
with a model as small as this that is quicker still, so it stands beside it. No micro-batches: few requests meet at this rate. Times are
medians over the turns, and ratios are medians of the ratios to the bare model's turn beside it, so that what else this machine does meets
all alike; the processor's time is that of a server's whole process, for a request. An adaptation is lost or doubled where what was
acknowledged, what the journal holds and what the loop has learned differ.

    python tools/bench/serving.py [--clients 500] [--seconds 60] [--parts 6] [--write docs/results/serving.md]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ASKING, CHANGING = "a-token-for-asking", "a-token-for-changing"
TARGETS = {"median": 1.3, "99th percentile": 2.0}
WARM = 1.0  # seconds before which nothing is measured


@dataclass
class Outcome:
    """What the clients of one server met with."""

    milliseconds: list[float] = field(default_factory=list)
    errors: int = 0
    ids: list[int] = field(default_factory=list)
    late: int = 0  # requests that were sent more than 50 ms after their time: then the clients are too slow, and not the server
    asked: int = 0
    seconds: float = 0.0  # of the processor, that the server's process took for all of them

    @property
    def figures(self) -> dict[str, float]:
        ordered = sorted(self.milliseconds)
        return {
            "median": statistics.median(ordered),
            "99th percentile": ordered[int(0.99 * len(ordered))],
            "processor": 1000 * self.seconds / self.asked,
        }


def bare(run: str, in_loop: bool) -> None:
    """The baseline, in a process of its own."""
    import socket
    from concurrent.futures import ThreadPoolExecutor

    import torch
    import uvicorn
    from fastapi import FastAPI, Request, Response

    import streamcl
    from streamcl.stream import Batch

    torch.set_num_threads(1)
    learned = streamcl.load(run)
    model, classes = learned.model, learned.classes
    app, pool = FastAPI(), ThreadPoolExecutor(1)

    def answer(inputs: Any) -> tuple[int, float]:
        with torch.no_grad():
            batch = Batch({"image": torch.tensor(inputs, dtype=torch.uint8)}, None, torch.zeros(len(inputs), dtype=torch.int64))
            sure, label = model(learned.context.prepare(batch, train=False)).softmax(dim=1).max(dim=1)
            return int(label), float(sure)

    async def predict(request: Request) -> Response:
        body = json.loads(await request.body())
        inputs = body["inputs"]
        label, sure = answer(inputs) if in_loop else await asyncio.get_running_loop().run_in_executor(pool, answer, inputs)
        return Response(json.dumps({"predictions": [classes[label]], "confidences": [sure]}), media_type="application/json")

    predict.__annotations__ = {"request": Request}
    app.add_api_route("/predict", predict, methods=["POST"])
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(f"serving at http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listening])


def started(command: list[str], log: Path) -> tuple[subprocess.Popen[str], int]:
    environment = {**os.environ, "STREAMCL_PREDICT_TOKEN": ASKING, "STREAMCL_CHANGE_TOKEN": CHANGING, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log.open("a"), text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("serving"):
        raise RuntimeError(f"{shown(command)} did not start: {log.read_text()}")
    return process, int(line.rpartition(":")[2])


def shown(command: list[str]) -> str:
    return " ".join(command[1:])


async def clients(port: int, path: str, token: str, count: int, seconds: float, bodies: list[bytes]) -> Outcome:
    """So many clients, each with a connection of its own, each asking once a second at a moment of its own."""
    outcome, begin = Outcome(), time.perf_counter() + 1.0
    chance = random.Random(0)

    async def client(phase: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for turn in range(int(WARM + seconds)):
                at = begin + turn + phase
                await asyncio.sleep(max(0.0, at - time.perf_counter()))
                body = chance.choice(bodies)
                sent = time.perf_counter()
                outcome.asked += 1
                outcome.late += sent - at > 0.05
                writer.write(
                    f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                content = await reader.readexactly(length)
                taken = 1000 * (time.perf_counter() - sent)
                if head.split(b" ", 2)[1] != b"200":
                    outcome.errors += 1
                    continue
                outcome.ids += json.loads(content).get("ids", [])
                if turn >= WARM:
                    outcome.milliseconds.append(taken)
        except (OSError, asyncio.IncompleteReadError):
            outcome.errors += 1
        finally:
            writer.close()

    await asyncio.gather(*(client(chance.random()) for _ in range(count)))
    return outcome


def processor(process: subprocess.Popen[str]) -> float:
    """Seconds of the processor that a process has had."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status(port: int) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/status", headers={"Authorization": f"Bearer {ASKING}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found


def trained(folder: Path) -> Path:
    """The small model."""
    from streamcl import running

    model = {"backbone": {"name": "convnet", "width": 8, "blocks": 2}}
    scenario = {"name": "class_incremental", "data": "digits", "tasks": 1}
    engine = {"device": "cpu", "threads": 1}
    running.run(
        {"scenario": scenario, "strategy": {"name": "finetune", "epochs": 2}, "model": model, "engine": engine, "log": []}, out=folder
    )
    return folder


def requests() -> list[bytes]:
    from sklearn.datasets import load_digits

    faint = load_digits().images.astype(int) // 3 + 6  # the world has become foggy: there is something to adapt to
    return [json.dumps({"inputs": [[image.tolist()]]}).encode() for image in faint]


def adaptations(port: int, ids: list[int]) -> tuple[str, bool]:
    """What was acknowledged, kept and learned, once the writer has come to its end."""
    until = time.monotonic() + 60
    while (found := status(port))["server"]["unlearned"] and time.monotonic() < until:
        time.sleep(0.2)
    server, acknowledged = found["server"], len(ids)
    kept, learned, taken = server["acknowledged"], server["learned"], found["counts"].get("adapted", 0)
    right = len(set(ids)) == acknowledged == kept == learned and not server["failed"]
    text = f"{acknowledged} acknowledged, {kept} in the journal, {learned} learned, in {server['updates']} batches"
    return f"{text}; the guard let {taken} into {found['counts'].get('updates', 0)} updates, version {found['version']}", right


def measured(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, list[Outcome]], str, bool]:
    found: dict[str, list[Outcome]] = {"bare": [], "in loop": [], "/predict": [], "/adapt": []}
    bodies = requests()
    with tempfile.TemporaryDirectory(prefix="serving-") as place:
        run = trained(Path(place) / "run")
        processes: dict[str, tuple[subprocess.Popen[str], int]] = {}
        try:
            for name in found:
                mine = shutil.copytree(run, Path(place) / name.strip("/"))
                served = [sys.executable, "-m", "streamcl.cli", "serve", str(mine), "--port", "0", "--threads", "1"]
                if not name.startswith("/"):
                    served = [sys.executable, __file__, "--bare", str(run), *(("--in-loop",) if name == "in loop" else ())]
                processes[name] = started(served, Path(place) / "log")
            for part in range(options.parts):
                for name, turns in found.items():
                    path, token = (name if name.startswith("/") else "/predict"), CHANGING if name == "/adapt" else ASKING
                    process, port = processes[name]
                    before = processor(process)
                    turn = asyncio.run(clients(port, path, token, options.clients, options.seconds // options.parts, bodies))
                    turn.seconds = processor(process) - before
                    figures = ", ".join(f"{what} {value:.2f} ms" for what, value in turn.figures.items())
                    say(f"part {part + 1}, {name}: {turn.asked} requests, {turn.errors} errors, {turn.late} sent late, {figures}")
                    turns.append(turn)
            note, right = adaptations(processes["/adapt"][1], [one for turn in found["/adapt"] for one in turn.ids])
        finally:
            for process, _ in processes.values():
                process.terminate()
                process.wait(60)
    return found, note, right and not any(turn.errors for turns in found.values() for turn in turns)


def table(found: dict[str, list[Outcome]]) -> list[str]:
    names = {"median": "median, ms", "99th percentile": "99th percentile, ms", "processor": "processor, ms"}
    lines = [f"| served | requests | errors | {' | ratio | '.join(names.values())} | ratio |", f"| --- |{' ---: |' * (2 + 2 * len(names))}"]
    for name, turns in found.items():
        cells = [name, str(sum(len(turn.milliseconds) for turn in turns)), str(sum(turn.errors for turn in turns))]
        for what in names:
            pairs = [(turn.figures[what], base.figures[what]) for turn, base in zip(turns, found["bare"], strict=True)]
            cells += [
                f"{statistics.median(mine for mine, _ in pairs):.2f}",
                f"{statistics.median(mine / base for mine, base in pairs):.2f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--parts", type=int, default=6, help="the four take turns in so many parts, so that noise meets all alike")
    parser.add_argument("--write", type=Path, help="write the table into this file")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--in-loop", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(options.bare, options.in_loop)
        return
    found, note, right = measured(options, lambda text: print(text, flush=True))
    lines = table(found)
    verdict = "no error, nothing lost or doubled" if right else "NOT RIGHT: there were errors, or adaptations were lost or doubled"
    print("\n".join(["", *lines, "", f"adaptations: {note}", verdict]))
    if options.write is not None:
        told = (__doc__ or "").split("\n\n")
        doing = (
            f"{options.clients} clients, each one request a second for {options.seconds} s in {options.parts} parts; {os.cpu_count()} cores"
        )
        aims = " and ".join(f"{ratio} times the bare model's {what}" for what, ratio in TARGETS.items())
        page = [
            "# The server under load",
            "",
            f"`python tools/bench/serving.py`: {doing}, which servers and clients share.",
            "",
            *lines,
            "",
        ]
        page += [f"Adaptations of `/adapt`: {note}. {verdict[0].upper()}{verdict[1:]}. The aim for `/adapt` is {aims}.", ""]
        page += ["```text", told[1], "```", "", told[2], ""]
        options.write.write_text("\n".join(page), encoding="utf-8")
    sys.exit(0 if right else 1)


if __name__ == "__main__":
    main()
