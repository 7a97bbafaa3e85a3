"""Finds plug-ins: a name becomes a class, from a file in a room, another distribution's entry point, or `my_file.py:MyClass`.

Everything up to `Plugin.load` is read from source text: nothing is imported, so that listing needs no torch and checking a
configuration runs no code of a plug-in.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, NoReturn

from streamcl.errors import ConfigError, PluginError, StreamclError

PLUGIN_VERSION = 1  # the plug-in contract that this engine speaks; a plug-in may state the one it was written for
EVIDENCE = ("published protocol", "small real data", "reconstruction")
ENGINE = Path(__file__).resolve().parent


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED: Final = _Required()


@dataclass(frozen=True)
class Kind:
    """One kind of plug-in: where its files lie, what its classes derive from, and the key that names it in the YAML."""

    name: str
    plural: str
    rooms: tuple[str | Path, ...]  # packages, or plain folders
    contract: str
    key: str
    excluded: tuple[str, ...] = ()  # folders inside the rooms that belong to other kinds


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("scenario", "scenarios", ("streamcl.scenarios",), "Scenario", "scenario", ("sources",)),
        Kind("source", "sources", ("streamcl.scenarios.sources",), "Source", "scenario.data"),
        Kind("strategy", "strategies", ("streamcl.strategies",), "Strategy", "strategy", ("terms", "sessions/learners", "experts")),
        Kind("term", "terms", ("streamcl.strategies.terms",), "Term", "strategy.with"),
        Kind("learner", "learners", ("streamcl.strategies.sessions.learners",), "Learner", "strategy.learner"),
        Kind("verifier", "verifiers", ("streamcl.verifiers",), "Verifier", "strategy.learner.rewards"),
        Kind("adapter", "adapters", ("streamcl.strategies.experts",), "Adapter", "model.adapter"),
        Kind("backbone", "backbones", ("streamcl.nn.backbones",), "Backbone", "model.backbone"),
        Kind("memory", "memories", ("streamcl.memory",), "Memory", "memory", ("policies",)),
        Kind("policy", "policies", ("streamcl.memory.policies",), "SelectionPolicy", "memory.select"),
        Kind("sink", "sinks", ("streamcl.sinks",), "Sink", "log"),
        Kind("transform", "transforms", ("streamcl.transforms",), "Transform", "scenario.transforms"),
    )
}


# Types of options ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Type:
    """The type of an option, read from its annotation.

    `form` is any, none, bool, int, float, str, path, literal (its `values`), list, sequence (`tuple[X, ...]`), tuple, dict, union,
    plugin (`name` is the kind), or settings (`name` is a type of streamcl.options). `parts` are the types inside.
    """

    form: str
    parts: tuple[Type, ...] = ()
    name: str = ""
    values: tuple[Any, ...] = ()


_PLAIN = {"Any": "any", "None": "none", "bool": "bool", "int": "int", "float": "float", "str": "str", "Path": "path"}


def read_type(annotation: str | ast.expr, settings: Iterable[str] = ()) -> Type:
    """The type that an annotation means; ValueError where it is outside of what options may be."""
    node = ast.parse(annotation, mode="eval").body if isinstance(annotation, str) else annotation
    match node:
        case ast.Constant(value=None):
            return Type("none")
        case ast.Constant(value=str(text)):
            return read_type(text, settings)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            if name in _PLAIN:
                return Type(_PLAIN[name])
            if name in {"list", "dict", "tuple", "Sequence"}:
                name = "list" if name == "Sequence" else name
                parts = {"list": 1, "tuple": 1, "dict": 2}[name]
                return Type("sequence" if name == "tuple" else name, (Type("any"),) * parts)
            kind = next((kind.name for kind in KINDS.values() if kind.contract == name), None)
            if kind is not None:
                return Type("plugin", name=kind)
            if name in settings:
                return Type("settings", name=name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            sides = [read_type(side, settings) for side in (left, right)]
            return Type("union", tuple(part for side in sides for part in (side.parts if side.form == "union" else (side,))))
        case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inside):
            if name == "Annotated":  # the engine's own sections say so which kind a PluginSpec is
                return read_type(inside.elts[1], settings) if isinstance(inside, ast.Tuple) else Type("any")
            items = list(inside.elts) if isinstance(inside, ast.Tuple) else [inside]
            if name == "Literal":
                return Type("literal", values=tuple(ast.literal_eval(item) for item in items))
            repeated = len(items) == 2 and isinstance(items[1], ast.Constant) and items[1].value is ...
            if name == "tuple" and repeated:
                return Type("sequence", (read_type(items[0], settings),))
            if (name, len(items)) in {("list", 1), ("Sequence", 1), ("dict", 2)} or name == "tuple":
                return Type("list" if name == "Sequence" else name, tuple(read_type(item, settings) for item in items))
    raise ValueError(f"the annotation {ast.unparse(node)!r} is not a type that an option can have")


@dataclass(frozen=True)
class Option:
    """One keyword argument of a plug-in's constructor. `default` is a plain value as YAML would hold it, or REQUIRED."""

    name: str  # in the YAML
    parameter: str  # in the constructor: `with_` is the option `with`
    annotation: str
    default: Any
    owner: str  # the class that declares it
    path: Path
    line: int

    @property
    def where(self) -> str:
        return f"{shown(self.path)}:{self.line}: option {self.name!r} of {self.owner}"

    @cached_property
    def type(self) -> Type:
        try:
            return read_type(self.annotation, settings_names())
        except (ValueError, SyntaxError) as error:
            raise PluginError(
                f"{self.where}: {error}; use int, float, bool, str, Any, None, Path, Literal, list, dict, tuple, unions with |, "
                f"the types of streamcl.options, or a kind of plug-in ({', '.join(kind.contract for kind in KINDS.values())})"
            ) from None


# Source files -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _SourceFile:
    """What a Python file says at its top level."""

    path: Path
    doc: str
    classes: dict[str, ast.ClassDef]
    imports: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]]  # local name -> dots, module, and the name inside it
    values: dict[str, ast.expr]  # module-level assignments


_parsed: dict[Path, tuple[tuple[int, int], _SourceFile]] = {}


def _read(path: Path) -> _SourceFile:
    """Parse a file, once for each of its versions. ConfigError with file:line where it is no Python."""
    try:
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)
        if path not in _parsed or _parsed[path][0] != version:
            _parsed[path] = version, _summarise(path, ast.parse(path.read_bytes()))
        return _parsed[path][1]
    except SyntaxError as error:
        raise ConfigError(f"{shown(path)}:{error.lineno or 1}: this is not Python: {error.msg}") from None
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{shown(path)}: cannot be read as Python: {error}") from None


def _summarise(path: Path, tree: ast.Module) -> _SourceFile:
    file = _SourceFile(path, ast.get_docstring(tree) or "", {}, {}, {})

    def visit(statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.ClassDef():
                    file.classes[statement.name] = statement
                case ast.Import():
                    for alias in statement.names:
                        whole = tuple(alias.name.split("."))
                        file.imports[alias.asname or whole[0]] = (0, whole if alias.asname else whole[:1], ())
                case ast.ImportFrom():
                    for alias in statement.names:
                        module = tuple(statement.module.split(".")) if statement.module else ()
                        file.imports[alias.asname or alias.name] = (statement.level, module, (alias.name,))
                case ast.If() | ast.Try():
                    visit(statement.body + statement.orelse)
                case _:
                    file.values.update(_assigned(statement))

    visit(tree.body)
    return file


def _assigned(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value


def _literal(node: ast.expr | None, otherwise: Any = None) -> Any:
    try:
        return otherwise if node is None else ast.literal_eval(node)
    except ValueError:
        return otherwise


@cache
def settings_names() -> frozenset[str]:
    """The types that streamcl.options offers, without importing it (pydantic takes a tenth of a second)."""
    return frozenset(_literal(_read(ENGINE / "options.py").values.get("__all__"), ()))


@cache
def package_folder(package: str) -> Path:
    """The folder of a package inside streamcl: the rooms lie at the checkout's top level in an editable installation."""
    first, *rest = package.split(".")[1:]
    folder = ENGINE / first
    if not folder.is_dir():
        spec = importlib.util.find_spec(f"streamcl.{first}")
        if spec and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations)))
    return folder.joinpath(*rest)


def _module_file(dots: int, module: tuple[str, ...], importer: Path) -> Path | None:
    """The source file behind an import statement; None where it lies outside of streamcl and of the importer's own package."""
    if dots:
        folder: Path | None = importer.parents[dots - 1] if dots <= len(importer.parents) else None
    elif module[:1] == ("streamcl",):
        file = _python_file(ENGINE.joinpath(*module[1:]))
        return file or (_python_file(package_folder(".".join(module))) if len(module) > 1 else None)
    else:
        beside = _python_file(importer.parent.joinpath(*module)) if importer.parent != ENGINE else None
        if beside:
            return beside
        folder = next(
            (parent.parent for parent in importer.parents if parent.name == module[0] and (parent / "__init__.py").is_file()), None
        )
    return _python_file(folder.joinpath(*module)) if folder else None


def _python_file(path: Path) -> Path | None:
    return next((file for file in (path.with_name(f"{path.name}.py"), path / "__init__.py") if file.is_file()), None)


def _definition(file: _SourceFile, name: tuple[str, ...], depth: int = 0) -> tuple[_SourceFile, str] | None:
    """The file that defines the class that `name` means in `file`, and what it is called there."""
    head, *rest = name
    if not rest and head in file.classes:
        return file, head
    if depth > 20:
        return None
    if head in file.imports:
        dots, module, inside = file.imports[head]
    else:
        lazy = _literal(file.values.get("_LAZY"), {})  # streamcl/__init__.py imports its names when they are first used
        if head not in lazy:
            return None
        dots, module, inside = 0, tuple(lazy[head].split(".")), (head,)
    parts = (*inside, *rest)
    for cut in reversed(range(len(parts))):
        path = _module_file(dots, module + parts[:cut], file.path) if dots or module or cut else None
        if path:
            found = _definition(_read(path), parts[cut:], depth + 1)
            if found:
                return found
    return None


def _dotted(node: ast.expr) -> tuple[str, ...]:
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=name):
            inner = _dotted(value)
            return (*inner, name) if inner else ()
        case ast.Subscript(value=value):
            return _dotted(value)
    return ()


Lineage = list[tuple[_SourceFile, ast.ClassDef]]


def _lineage(file: _SourceFile, name: str, contract: str) -> tuple[Lineage, bool]:
    """A class and its bases as far as their source is ours to read, in the order of method resolution; and whether it fulfils
    the contract."""
    lineage: Lineage = []
    fulfils = False

    def visit(file: _SourceFile, name: str, depth: int) -> None:
        nonlocal fulfils
        lineage.append((file, file.classes[name]))
        for base in file.classes[name].bases if depth < 50 else ():
            dotted = _dotted(base)
            if not dotted:
                continue
            dots, module, inside = file.imports.get(dotted[0], (0, (), ()))
            fulfils |= (*inside, *dotted[1:])[-1:] == (contract,) and dots == 0 and module[:1] == ("streamcl",)
            found = _definition(file, dotted)
            if found and found != (file, name):
                fulfils |= found[1] == contract and ENGINE in found[0].path.parents
                visit(*found, depth + 1)

    visit(file, name, 0)
    last = {(f.path, c.name): position for position, (f, c) in enumerate(lineage)}
    return [entry for position, entry in enumerate(lineage) if last[entry[0].path, entry[1].name] == position], fulfils


def _class_value(entry: tuple[_SourceFile, ast.ClassDef], name: str) -> ast.expr | None:
    return next((value for statement in entry[1].body for key, value in _assigned(statement) if key == name), None)


def _default(node: ast.expr) -> Any:
    """A default as plain values: a literal, or a call of a type of streamcl.options with literal arguments as their mapping."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[], keywords=keywords) if name in settings_names():
            return {keyword.arg: _default(keyword.value) for keyword in keywords if keyword.arg}
    return ast.literal_eval(node)


def _constructor(file: _SourceFile, definition: ast.ClassDef) -> tuple[list[Option], bool] | None:
    """The options that a class's own constructor declares, and whether it passes others on; None without a constructor."""
    init = next((item for item in definition.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init is None:
        return None
    arguments, options = init.args, []

    def wrong(line: int, what: str) -> NoReturn:
        raise PluginError(f"{shown(file.path)}:{line}: {definition.name}.__init__: {what}")

    if len(arguments.posonlyargs) > 1:
        wrong(init.lineno, f"{arguments.posonlyargs[1].arg!r} is positional only, and options are keyword arguments")
    named = (arguments.posonlyargs + arguments.args)[1:]
    defaults: list[ast.expr | None] = [None] * len(named)
    defaults[len(named) - len(arguments.defaults) :] = arguments.defaults
    for argument, default in zip([*named, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True):
        name = argument.arg.removesuffix("_")
        if argument.annotation is None:
            wrong(argument.lineno, f"the option {name!r} has no type")
        if name == "name":
            wrong(argument.lineno, "an option cannot be called 'name': in the YAML this names the plug-in")
        try:
            value = REQUIRED if default is None else _default(default)
        except ValueError:
            assert default is not None
            wrong(default.lineno, f"the default {ast.unparse(default)!r} of {name!r} is no literal (nor a type of streamcl.options)")
        options.append(Option(name, argument.arg, ast.unparse(argument.annotation), value, definition.name, file.path, argument.lineno))
    return options, arguments.kwarg is not None


def _options(lineage: Lineage) -> dict[str, Option]:
    """The options of a class, read along its bases as `super().__init__(**options)` would pass them on."""
    options: dict[str, Option] = {}
    for file, definition in lineage:
        own, passes_on = _constructor(file, definition) or ([], True)
        for option in own:
            options.setdefault(option.name, option)
        if not passes_on:
            break
    return options


# Plug-ins -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plugin:
    """A plug-in as its source describes it."""

    kind: str
    name: str  # the file's; for a user's own file its absolute path and class
    family: str  # the folder inside the room, or the distribution that brings it
    path: Path
    class_name: str
    module: str | None  # None for a file outside of any package
    doc: str
    version: int
    licence: str | None

    @property
    def summary(self) -> str:
        return self.doc.partition("\n")[0]

    @property
    def evidence(self) -> str | None:
        """How far the evidence goes: one of EVIDENCE, with what the docstring adds."""
        found = re.search(r"^Evidence:\s*(.+?)(?:\n\s*\n|\Z)", self.doc, re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else None

    @cached_property
    def options(self) -> dict[str, Option]:
        return _options(_lineage(_read(self.path), self.class_name, KINDS[self.kind].contract)[0])

    def stated(self, name: str) -> Any:
        """The value of a class attribute that is a literal, read along the class's bases; None where there is none."""
        lineage, _ = _lineage(_read(self.path), self.class_name, KINDS[self.kind].contract)
        return next((value for entry in lineage if (value := _literal(_class_value(entry, name))) is not None), None)

    def misnamed(self) -> list[str]:
        """Warnings: public methods that override nothing and that nothing calls, whose names are nearly those of methods to override.

        A hook that is spelt wrong would never run, and a `loss` would silently be the default one.
        """
        lineage, _ = _lineage(_read(self.path), self.class_name, KINDS[self.kind].contract)
        own = [(file, definition) for file, definition in lineage if ENGINE not in file.path.parents]
        mine = {method.name for _, definition in own for method in _methods(definition)}
        hooks = {method.name for entry in lineage if entry not in own for method in _methods(entry[1])}
        trees = [ast.parse(path.read_bytes()) for path in {file.path for file, _ in own}]
        called = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        return [
            f"{shown(file.path)}:{method.lineno}: {definition.name}.{method.name} overrides nothing, and nothing calls it{meant}"
            for file, definition in own
            for method in _methods(definition)
            if method.name not in called | hooks and (meant := _meant(method.name, hooks - mine))
        ]

    def own_files(self) -> list[Path]:
        """Of a person's own file: itself, and what it and these import from beside them. What is installed has a version instead."""
        found = [self.path] if self.module is None else []
        for path in found:  # it grows on the way
            for dots, module, inside in _read(path).imports.values():
                if dots or module[:1] != ("streamcl",):
                    files = (_module_file(dots, parts, path) for parts in (module, module + inside) if dots or parts)
                    found += [file for file in files if file and file not in found and _beside(file, self.path.parent)]
        return found

    def load(self) -> type:
        """Import the class. What its file raises becomes one PluginError that shows the file's own lines."""
        try:
            module = importlib.import_module(self.module) if self.module else _import_file(self.path)
            return getattr(module, self.class_name)
        except StreamclError:
            raise
        except (Exception, SystemExit) as error:
            raised = PluginError(f"{self.kind} {self.name} cannot be imported: {_own_lines(error, self.path)}")
            raised.exit_code = ConfigError.exit_code  # the person named this file, so the mistake is in what they gave
            raise raised from error


def _methods(definition: ast.ClassDef) -> list[ast.FunctionDef]:
    """The public methods that a class defines itself, without properties and their like."""
    plain = [item for item in definition.body if isinstance(item, ast.FunctionDef) and not item.name.startswith("_")]
    return [method for method in plain if not any(isinstance(decorator, ast.Name) for decorator in method.decorator_list)]


def _meant(name: str, hooks: Iterable[str]) -> str:
    """The end of a message about a method that hardly differs from one of the hooks, or whose name holds one: compute_loss."""
    hooks = sorted(hooks)
    held = [hook for hook in hooks if f"_{hook}_" in f"_{name}_" and (hook == "loss" or "_" in hook)]
    near = difflib.get_close_matches(name, hooks, 1, cutoff=0.8) or held
    return f": did you mean {near[0]!r}?" if near else ""


def _import_file(path: Path) -> Any:
    status = path.stat()
    version = f"{path}:{status.st_mtime_ns}:{status.st_size}"
    name = f"streamcl_user_{path.stem}_{hashlib.sha256(version.encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def _own_lines(error: BaseException, path: Path) -> str:
    """An error as its author needs it: the line of their own file, and the message."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{shown(Path(error.filename))}:{error.lineno}: {message}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path or _beside(Path(frame.filename), path.parent)
    ]
    return f"{shown(Path(frames[-1].filename))}:{frames[-1].lineno}: {message}" if frames else f"{shown(path)}: {message}"


def _beside(file: Path, folder: Path) -> bool:
    """Whether a file is of the same hand: below the folder, but neither the engine's nor installed there."""
    return folder in file.parents and ENGINE not in file.parents and "site-packages" not in file.parts


@dataclass
class PluginSpec:
    """A plug-in that was named, with its checked options: what `build` needs. Options that were not given have their defaults."""

    kind: str
    name: str = field(compare=False)  # as written
    plugin: Plugin
    options: dict[str, Any]  # plain values, settings of streamcl.options, PluginSpecs, or lists and dicts of these
    where: str = field(default="", compare=False)  # file:line:column, where it was written in a file
    positions: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # the same for each option given

    def build(self) -> Any:
        """Import the class and construct it, nested plug-ins first."""
        parameters = {option.parameter: _built(self.options[name]) for name, option in self.plugin.options.items()}
        loaded = self.plugin.load()
        what = f"{self.where}: {self.kind} {self.name}" if self.where else f"{self.kind} {self.name}"
        lacking = sorted(getattr(loaded, "__abstractmethods__", ()))
        if lacking:
            raise ConfigError(f"{what}: the class {loaded.__name__} lacks {', '.join(lacking)}, which every {self.kind} defines")
        try:
            return loaded(**parameters)
        except (ValueError, ConfigError) as error:
            message = str(error).removeprefix(f"{self.name}: ")
            place = self._typed(message) or self._position(message)
            raise ConfigError(f"{place}: {self.kind} {self.name}: {message}" if place else f"{what}: {message}") from error
        except StreamclError:
            raise
        except Exception as error:
            raise PluginError(f"{what} cannot be made: {_own_lines(error, self.plugin.path)}") from error

    def _typed(self, message: str) -> str:
        """The change on the command line that a message is about: the first option that it names of those that were set there."""
        typed = {option: place for option, place in self.positions.items() if place.startswith("command line: ")}
        named = [(found.start(), option) for option in typed if (found := re.search(rf"\b{re.escape(option)}\b", message))]
        return typed[min(named)[1]] if named else ""

    def _position(self, message: str) -> str:
        """Where the first option that a message begins with was given: with `extends` that may be another file than the plug-in's name."""
        first = re.match(r"\w+", message)
        return self.positions.get(first[0], "") if first else ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values as YAML holds them, with every option."""
        return {"name": self.plugin.name, **{name: plain(value) for name, value in self.options.items()}}


def _built(value: Any) -> Any:
    match value:
        case PluginSpec():
            return value.build()
        case list() | tuple():
            return type(value)(_built(item) for item in value)
        case dict():
            return {key: _built(item) for key, item in value.items()}
    return value


def plain(value: Any) -> Any:
    """A checked value as YAML holds it."""
    match value:
        case PluginSpec():
            return value.to_dict()
        case Mapping():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case Path():
            return str(value)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


# Discovery ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    """A file that may hold a plug-in; only reading it tells."""

    path: Path
    family: str
    module: str | None
    class_name: str | None = None


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    installed = entry_points()  # once: it reads the metadata of every distribution
    return tuple(point for kind in KINDS for point in installed.select(group=f"streamcl.{kind}"))


def _distribution_file(module: str) -> Path:
    """Where an installed module's source lies; looking for its top-level package imports nothing."""
    top, *inside = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec and spec.submodule_search_locations:
        return _python_file(Path(next(iter(spec.submodule_search_locations))).joinpath(*inside)) or Path(*module.split("."))
    return Path(spec.origin if spec and spec.origin and not inside else module)


def _candidates(kind: Kind) -> dict[str, list[_Candidate]]:
    """Every file that its name makes a plug-in of this kind, by that name."""
    found: dict[str, list[_Candidate]] = {}
    for room in kind.rooms:
        folder = room if isinstance(room, Path) else package_folder(room)
        for here, folders, files in os.walk(folder):
            family = Path(here).relative_to(folder)
            folders[:] = sorted(f for f in folders if not f.startswith(("_", ".")) and (family / f).as_posix() not in kind.excluded)
            for file in sorted(files):
                if file.endswith(".py") and not file.startswith(("_", ".")):
                    stem = file.removesuffix(".py")
                    module = None if isinstance(room, Path) else ".".join((room, *family.parts, stem))
                    family_name = "" if family == Path() else family.as_posix()
                    found.setdefault(stem, []).append(_Candidate(Path(here) / file, family_name, module))
    for point in _entry_points():
        if point.group == f"streamcl.{kind.name}":
            path = _distribution_file(point.module)
            family_name = point.dist.name if point.dist else ""
            found.setdefault(point.name, []).append(_Candidate(path, family_name, point.module, point.attr))
    return found


def _contract_classes(kind: Kind, file: _SourceFile) -> list[str]:
    return [name for name in file.classes if not name.startswith("_") and _lineage(file, name, kind.contract)[1]]


def _open(kind: Kind, name: str, candidate: _Candidate) -> Plugin | None:
    """Read a candidate; None where the file holds no class of this kind."""
    file, class_name = _read(candidate.path), candidate.class_name
    if class_name is None:
        classes = _contract_classes(kind, file)
        if len(classes) > 1:
            places = " and ".join(f"{c} (line {file.classes[c].lineno})" for c in classes)
            raise ConfigError(
                f"{shown(file.path)}: a plug-in file has one public class, and this one has {places}: begin the others with _"
            )
        if not classes:
            return None
        class_name = classes[0]
    elif class_name not in file.classes:
        raise ConfigError(f"{shown(file.path)}: the entry point {name!r} names a class {class_name!r} that is not there")
    lineage, _ = _lineage(file, class_name, kind.contract)
    version = _literal(file.values.get("plugin_version") or _class_value(lineage[0], "plugin_version"), PLUGIN_VERSION)
    if not isinstance(version, int) or version > PLUGIN_VERSION:
        raise ConfigError(
            f"{shown(file.path)}: {kind.name} {name} was written for version {version} of the plug-in contract, and this streamcl "
            f"knows version {PLUGIN_VERSION}: install a newer streamcl, or an older version of the plug-in"
        )
    licence = next((value for entry in lineage if isinstance(value := _literal(_class_value(entry, "licence")), str)), None)
    doc = file.doc or ast.get_docstring(file.classes[class_name]) or ""
    return Plugin(kind.name, name, candidate.family, file.path, class_name, candidate.module, doc, version, licence)


_USER_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<class>\w+))?", re.DOTALL)


def _user_file(kind: Kind, path: Path, class_name: str | None) -> Plugin:
    """A person's own file: every way in which it does not hold what was asked for is told with what there is."""
    if not path.is_file():
        near = near_name(path.name, sorted(p.name for p in path.parent.glob("*.py"))) if path.parent.is_dir() else ""
        raise ConfigError(f"there is no file {shown(path)}{near}")
    file = _read(path)
    classes = _contract_classes(kind, file)
    there = ", ".join(f"{name} (line {definition.lineno})" for name, definition in file.classes.items()) or "none"
    if class_name is None:
        if len(classes) != 1:
            reason = "which of its classes is meant?" if classes else f"no class in it derives from streamcl's {kind.contract}."
            raise ConfigError(f"{shown(path)}: {reason} Write {path.name}:CLASS; classes there: {there}")
        class_name = classes[0]
    if class_name not in file.classes:
        raise ConfigError(
            f"{shown(path)}:1: there is no class {class_name!r}{near_name(class_name, list(file.classes))}; classes there: {there}"
        )
    if not _lineage(file, class_name, kind.contract)[1]:
        where = f"{shown(path)}:{file.classes[class_name].lineno}: {class_name}"
        raise ConfigError(f"{where} is no {kind.name}: it does not derive from streamcl's {kind.contract}. Classes there: {there}")
    plugin = _open(kind, f"{path}:{class_name}", _Candidate(path, "", None, class_name))
    assert plugin is not None
    return plugin


def plugins(kind: str, problems: list[str] | None = None) -> dict[str, Plugin]:
    """All plug-ins of a kind by name. What is wrong with single files is appended to `problems`, or raised where that is None."""
    found: dict[str, Plugin] = {}
    wrong: list[str] = []
    for name in sorted(candidates := _candidates(KINDS[kind])):
        try:
            plugin = _unique(KINDS[kind], name, candidates[name])
            if plugin:
                found[name] = plugin
        except StreamclError as error:
            wrong.append(str(error))
    if wrong and problems is None:
        raise ConfigError(wrong)
    if problems is not None:
        problems += wrong
    return found


def _unique(kind: Kind, name: str, candidates: list[_Candidate]) -> Plugin | None:
    opened = [plugin for candidate in candidates if (plugin := _open(kind, name, candidate))]
    if len(opened) > 1:
        raise ConfigError(f"two plug-ins are called {kind.name} {name!r}: {' and '.join(shown(p.path) for p in opened)}; rename one")
    return opened[0] if opened else None


def resolve(kind: str, name: str, folder: Path | None = None) -> tuple[Plugin, dict[str, str]]:
    """The plug-in that a name means, and the option that the name itself sets: `timm:resnet18` is `timm` with its first option."""
    table = KINDS[kind]
    user = _USER_FILE.fullmatch(name)
    if user:
        return _user_file(table, ((folder or Path()) / Path(user["path"]).expanduser()).resolve(), user["class"]), {}
    candidates = _candidates(table)
    prefix, colon, rest = name.partition(":")
    for wanted in (name, prefix):
        plugin = _unique(table, wanted, candidates.get(wanted, []))
        if plugin and wanted == name:
            return plugin, {}
        if plugin and colon:
            if not plugin.options or not rest:
                raise ConfigError(f"{name!r}: {kind} {prefix} takes {'something' if plugin.options else 'nothing'} after the colon")
            return plugin, {next(iter(plugin.options)): rest}
    # a term can stand where a strategy does, so it is a name to suggest there
    names = [n for k in ((kind, "term") if kind == "strategy" else (kind,)) for n in plugins(k, [])]
    there = f"; there {'are ' + ', '.join(sorted(names)) if names else 'are none yet'} (or name a file: my_file.py:MyClass)"
    raise ConfigError(f"unknown {kind} {prefix!r}{near_name(prefix, names) or there}")


def find(kind: str, name: str, folder: Path | None = None) -> Plugin:
    """The plug-in of this name: in a room, of another distribution, or a file relative to `folder`."""
    return resolve(kind, name, folder)[0]


def near_name(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: what was probably meant, or nothing."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f": did you mean {near[0]!r}?" if near else ""


def shown(path: Path) -> str:
    """A path as a person would write it: from the current folder where it lies there."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)
