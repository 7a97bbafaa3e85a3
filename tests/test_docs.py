"""What the documentation shows: its files and commands are taken out and run, and what it names is there."""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from streamcl import cli, config

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = sorted([*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")])
README, CONTRIBUTING, ARCHITECTURE = CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "docs" / "architecture.md"


@dataclass
class Block:
    """A fenced block: the language and, where there is one, the file that it is."""

    language: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


def follow(page: Path, folder: Path) -> list[list[str]]:
    """Write the page's files into the folder, and return its commands. Those of a `console` block are to be run; those of an `sh` block
    install, or take long."""
    commands = []
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            commands += [shlex.split(line.removeprefix("$ ")) for line in block.text.splitlines()]
    return commands


def named(pattern: str, page: Path) -> list[str]:
    """What a pattern finds outside of the page's fenced blocks."""
    return re.findall(pattern, re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE))


def test_the_readme_can_be_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = follow(README, tmp_path)
    assert {"run", "check", "sweep", "feed", "eval", "export"} <= {command[1] for command in commands}
    for program, *arguments in commands:
        if arguments[0] == "sweep":  # ten runs
            continue
        if program == "python":
            runpy.run_path(arguments[0], run_name="__main__")
            continue
        assert program == "streamcl"
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, f"{shlex.join([program, *arguments])}\n{capsys.readouterr().err}"
    runpy.run_path("objects.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("accuracy in % after each task") == 3  # two runs, and one of them fed
    assert (tmp_path / "digits-model" / "model.safetensors").is_file()
    assert float(printed.splitlines()[-1]) > 0.7


def test_the_page_about_scenarios_can_be_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = follow(CHECKOUT / "docs" / "scenarios.md", tmp_path)
    assert [command[1] for command in commands] == ["show", "run"]
    for command in commands:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0, capsys.readouterr().err
    assert (tmp_path / "scenes.png").is_file() and "4 tasks" in capsys.readouterr().out


FOLLOWED = """
import shlex, sys
import pytest
from streamcl import cli
for line in sys.argv[1:]:
    program, *arguments = sys.argv = shlex.split(line)
    try:
        code = pytest.main(arguments[2:]) if program == "python" else cli.main()
    except SystemExit as left:
        code = left.code
    if code:
        sys.exit(f"{line}: exit code {int(code)}")
"""


def test_the_method_that_contributing_adds_is_found_runs_and_passes_its_test(tmp_path):
    for part in ("streamcl", "scenarios", "strategies", "memory", "configs"):
        shutil.copytree(CHECKOUT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
        if part != "streamcl":
            (tmp_path / "streamcl" / part).symlink_to(tmp_path / part)
    shutil.copy(CHECKOUT / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(CHECKOUT / "tests" / "small_runs.py", tmp_path / "tests")
    commands = [shlex.join(command) for command in follow(CONTRIBUTING, tmp_path)]
    assert [command.split()[0] for command in commands] == ["streamcl", "streamcl", "python"]
    commands.append("streamcl check class_incremental/nearest_mean")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FOLLOWED, *commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout and "class_incremental/nearest_mean is in order" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_configuration_in_the_documentation_is_in_order(page, tmp_path):
    follow(page, tmp_path)
    for block in blocks(page):
        if block.language == "yaml" and {"scenario", "strategy", "model"} <= yaml.safe_load(block.text).keys():
            config.from_mapping(yaml.safe_load(block.text), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_documentation_links_to_and_names_is_there(page):
    links = [link for link in named(r"\]\(([^)#]+)", page) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]
    written = {block.file for block in blocks(page)}
    paths = [
        path
        for path in named(r"`((?:streamcl|scenarios|strategies|memory|configs|tests|tools|docs)/[\w./-]*)`", page)
        if path not in written
    ]
    assert not [path for path in paths if not (CHECKOUT / path).exists() and not re.search(r"\b[A-Z]{4,}\b", path)]


def test_the_table_of_commands_is_the_command_line():
    documented = re.findall(r"^\| `streamcl (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    commands = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert sorted(documented) == sorted(commands)


def test_the_contracts_of_the_architecture_are_in_the_modules_that_it_names():
    rows = re.findall(r"^\| (`[A-Z].*?) \| `streamcl/([\w/]+)\.py` \|", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 10
    for names, module in rows:
        found = importlib.import_module(f"streamcl.{module.replace('/', '.')}")
        assert not [name for name in re.findall(r"`(\w+)`", names) if not hasattr(found, name)], module
