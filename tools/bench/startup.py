"""How soon the command line answers: wall time of `streamcl list`, `check quickstart` and `show icarl`, each in a fresh process.

Medians over runs in which the commands take turns, after one that fills the disk cache; beside it what of that time the interpreter
alone takes, and the imports that cost most (their own time, without what they import in turn; by `python -X importtime`, in one run,
which itself makes them slower).

    python tools/bench/startup.py [--repeats 10]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

COMMANDS = {"list": 0.4, "check quickstart": 3.0, "show icarl": None}  # and the bars, in seconds
START = [sys.executable, str(Path(sys.executable).with_name("streamcl"))]


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def imports(command: list[str]) -> tuple[int, Counter[str]]:
    """How many modules were imported, and the milliseconds that each package's own modules took."""
    errors = subprocess.run([command[0], "-X", "importtime", *command[1:]], check=True, capture_output=True, text=True).stderr
    rows = [line.removeprefix("import time:").split("|") for line in errors.splitlines() if line.startswith("import time:")][1:]
    packages: Counter[str] = Counter()
    for own, _, name in rows:
        packages[name.strip().split(".")[0]] += int(own)
    return len(rows), packages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    repeats = parser.parse_args().repeats
    commands = {name: [*START, *name.split()] for name in COMMANDS}
    commands["(python alone)"] = [sys.executable, "-c", "pass"]
    found: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(repeats + 1):
        for name, command in commands.items():
            took = seconds(command)
            if repeat:
                found[name].append(took)
    print(f"{'seconds':20} {'median':>7} {'lowest':>7} {'highest':>8} {'bar':>5} {'modules':>8}   imports that cost most, ms")
    for name, each in found.items():
        count, packages = imports(commands[name])
        most = ", ".join(f"{package} {own / 1e3:.0f}" for package, own in packages.most_common(6))
        bar = COMMANDS.get(name) or ""
        print(f"{name:20} {statistics.median(each):7.3f} {min(each):7.3f} {max(each):8.3f} {bar!s:>5} {count:8}   {most}")


if __name__ == "__main__":
    main()
