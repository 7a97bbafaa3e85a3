"""The house rules that a machine can check: who imports whom, what a plug-in's file holds, and what no file may hold."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from streamcl import __version__, config
from streamcl.plugins import EVIDENCE, KINDS, package_folder, plugins

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = ("scenarios", "strategies", "memory")
PARTS = ("streamcl", *ROOMS, "configs", "tests", "tools", "docs")
# What memory/ holds beside its plug-ins: the parts that a memory is made of, each in a file of its own.
NO_PLUGINS = {"memory"}


def python_files(*parts: str) -> list[Path]:
    return sorted(file for part in parts for file in (CHECKOUT / part).rglob("*.py"))


def all_texts() -> list[Path]:
    """Every file of the project that a person wrote."""
    inside = (file for part in PARTS for file in (CHECKOUT / part).rglob("*") if file.suffix in {".py", ".yaml", ".md", ".svg", ".html"})
    beside = (file for file in (*CHECKOUT.glob("*"), CHECKOUT / ".ci" / "run") if file.is_file() and file.name != "LICENSE")
    return sorted((*inside, *beside))


def where(file: Path, line: int = 0) -> str:
    return f"{file.relative_to(CHECKOUT)}{f':{line}' if line else ''}"


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """The line and the absolute name of every module that a file imports, wherever in the file it does."""
    package = (
        ("streamcl", *file.relative_to(CHECKOUT).parts[:-1])
        if file.relative_to(CHECKOUT).parts[0] in ROOMS
        else file.relative_to(CHECKOUT).parts[:-1]
    )
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (start, node.module)))
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def in_package(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_engine_and_itself_and_no_other_room(room):
    others = [*ROOMS, "configs", *(f"streamcl.{other}" for other in (*ROOMS, "configs") if other != room)]
    found = [
        f"{where(file, line)}: {name}"
        for file in python_files(room)
        for line, name in imports(file)
        if any(in_package(name, other) for other in others)
    ]
    assert not found


def test_the_engine_imports_no_room():
    rooms = [*ROOMS, *(f"streamcl.{room}" for room in ROOMS)]
    found = [
        f"{where(file, line)}: {name}"
        for file in python_files("streamcl")
        for line, name in imports(file)
        if any(in_package(name, room) for room in rooms)
    ]
    assert not found


def test_what_is_imported_is_a_declared_dependency_and_an_extra_only_where_it_is_used():
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def named(requirements):
        return {re.match(r"[\w.-]+", requirement)[0].replace("-", "_").lower() for requirement in requirements}

    declared = named(project["dependencies"])
    extras = {name for extra, needed in project["optional-dependencies"].items() if extra != "test" for name in named(needed)}
    distributions = packages_distributions()
    found = set()
    for file in python_files("streamcl", *ROOMS):
        lines = file.read_text(encoding="utf-8").splitlines()
        for line, name in imports(file):
            top = name.partition(".")[0]
            if top != "streamcl" and top not in sys.stdlib_module_names:
                names = {name.replace("-", "_").lower() for name in distributions.get(top, [top])}
                inside = lines[line - 1].startswith(" ")  # a function, or `if TYPE_CHECKING`
                if not names & (declared | extras if inside else declared):
                    found.add(f"{where(file, line)}: {top} ({', '.join(sorted(names))})")
    assert not found


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_every_file_of_a_plugin_room_is_a_plugin_with_one_public_class(kind):
    found = {plugin.path: plugin for plugin in plugins(kind.name).values() if plugin.path.is_relative_to(CHECKOUT)}
    for room in map(package_folder, kind.rooms):
        for file in room.rglob("*.py"):
            relative = file.relative_to(room)
            elsewhere = any(relative.is_relative_to(folder) for folder in kind.excluded)
            if not elsewhere and not any(part.startswith("_") for part in relative.parts) and kind.name not in NO_PLUGINS:
                assert file in found, f"{where(file)} holds no {kind.contract}: begin its name with _ if it is no plug-in"
    for path, plugin in found.items():
        public = [
            node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef) and node.name[0] != "_"
        ]
        assert public == [plugin.class_name], f"{where(path)}: {public}"
        assert all(option.type for option in plugin.options.values())  # each has a type that the YAML can say; else this raises


def test_every_strategy_says_how_far_its_evidence_goes():
    for plugin in [*plugins("strategy").values(), *plugins("term").values()]:
        assert plugin.evidence and plugin.evidence.startswith(EVIDENCE), (
            f"{where(plugin.path)}: the docstring needs a line `Evidence: {' | '.join(EVIDENCE)}`"
        )


def test_the_first_line_of_every_module_says_what_it_is_for():
    for file in python_files("streamcl", *ROOMS, "tests", "tools"):
        first, _, rest = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")
        assert len(first) >= 20, f"{where(file)} has no docstring that says what it is for"
        assert first.endswith((".", ":", "?")), f"{where(file)}: the first line of the docstring is no sentence: {first!r}"
        assert not rest or rest.startswith("\n"), f"{where(file)}: the docstring's first line runs on into the second"


def test_no_file_has_a_name_that_says_nothing():
    assert not [
        where(file)
        for file in python_files(*PARTS)
        if file.stem.strip("_") in {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    ]


def forbidden(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Ways to run what is only data."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names) if {alias.name.partition(".")[0] for alias in names} & UNSAFE_MODULES:
                yield node.lineno, "imports a pickle module"
            case ast.ImportFrom(module=str(module), level=0) if module.partition(".")[0] in UNSAFE_MODULES:
                yield node.lineno, "imports a pickle module"
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield node.lineno, name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="yaml"), attr="load" | "load_all" | "unsafe_load" | "full_load" as name)):
                yield node.lineno, f"yaml.{name}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=keywords) if not _sets(
                keywords, "weights_only"
            ):
                yield node.lineno, "torch.load without weights_only=True"
            case ast.Call(keywords=keywords) if _sets(keywords, "allow_pickle"):
                yield node.lineno, "allow_pickle=True"


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def _sets(keywords: list[ast.keyword], name: str) -> bool:
    return any(keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value is True for keyword in keywords)


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval('1')",
        "exec(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_for_unsafe_code_finds_it(line):
    assert list(forbidden(ast.parse(line)))


def test_no_code_runs_what_is_only_data():
    assert not list(
        forbidden(ast.parse("model.eval(); torch.load(path, weights_only=True); yaml.safe_load(text); np.load(path, allow_pickle=False)"))
    )
    files = python_files("streamcl", *ROOMS, "tests", "tools")
    assert not [f"{where(file, line)}: {what}" for file in files for line, what in forbidden(ast.parse(file.read_text(encoding="utf-8")))]


# Spelled so that this file does not find itself.
MACHINES = re.compile(r"(?<![\w.~/:}])/(?:hom[e]|roo[t]|wor[k]|User[s]|mn[t]|scratc[h])/")
INDEXES = re.compile(r"pyp[i]\.org|pythonhoste[d]|download\.pytorc[h]|index[-_]ur[l]|find[-_]link[s]|anaconda\.or[g]", re.IGNORECASE)


@pytest.mark.parametrize("pattern", [MACHINES, INDEXES], ids=["machines", "indexes"])
def test_no_file_names_a_machines_folders_or_where_packages_come_from(pattern):
    lines = [
        (file, number, line)
        for file in all_texts()
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
    ]
    assert not [f"{where(file, number)}: {line.strip()}" for file, number, line in lines if pattern.search(line)]


def test_every_shipped_configuration_is_in_order():
    """A file without a strategy is a part, and some whole configuration beside it extends it."""
    contents = {file: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (CHECKOUT / "configs").rglob("*.yaml")}
    extended = {(file.parent / name).resolve() for file, content in contents.items() for name in _several(content.get("extends", []))}
    for file, content in contents.items():
        if "strategy" in content or "extends" in content:
            name = file.relative_to(CHECKOUT / "configs").with_suffix("").as_posix()
            assert config.load(name) == config.load(file)
        else:
            assert file in extended, f"{where(file)} is no whole configuration, and none extends it"


def _several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_the_changelog_tells_of_this_version():
    assert f"\n## [{__version__}]" in (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
