"""YAML whose every key and value knows its place: read safely, built from files that extend each other, and overridden."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from streamcl.errors import ConfigError
from streamcl.plugins import near_name, package_folder, plain, shown

LARGEST_FILE = 1_000_000  # bytes
MOST_NODES = 100_000  # of a file, once its anchors are written out
DEEPEST = 40  # levels of nesting


@dataclass(frozen=True)
class Place:
    """Where something was written, and the folders that relative paths there begin from."""

    label: str = ""
    line: int = 0
    column: int = 0
    folders: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.label}:{self.line}:{self.column}" if self.line else self.label

    @property
    def typed(self) -> bool:
        """On the command line: in a file there are lines."""
        return bool(self.label) and not self.line

    def folder(self, relative: str) -> Path:
        """The first folder that has this file, or the first."""
        for folder in self.folders:
            with suppress(OSError, ValueError):  # what is no file name is told where the file is opened
                if (folder / relative).exists():
                    return folder
        return (*self.folders, Path())[0]


@dataclass(frozen=True)
class Node:
    """A value of YAML that knows its place: a plain scalar, a list of nodes, or a mapping of nodes with the places of its keys."""

    value: Any
    place: Place
    keys: Mapping[str, Place] = field(default_factory=dict)


def place_of(node: Node, message: str) -> Place:
    """Where what is wrong with a value was written: a mapping of a file may be wrong by what the command line put into it.

    Of several such changes, the one that the message names first.
    """

    def typed(node: Node) -> Iterator[tuple[str, Place]]:
        inside = node.value.items() if isinstance(node.value, dict) else enumerate(node.value) if isinstance(node.value, list) else ()
        for key, child in inside:
            if child.place.typed:
                yield str(key), child.place
            yield from typed(child)

    changes = [] if node.place.typed else list(typed(node))
    named = [(found.start(), place) for key, place in changes if (found := re.search(rf"\b{re.escape(key)}\b", message))]
    return min(named, key=lambda one: one[0])[1] if named else changes[-1][1] if changes else node.place


Problems = list[tuple[Place, str]]


def raise_problems(problems: Problems) -> None:
    """All problems at once, in the order in which they stand in the files."""
    if problems:
        ordered = sorted(dict.fromkeys(problems), key=lambda p: (p[0].line == 0, p[0].label, p[0].line, p[0].column))
        raise ConfigError([f"{place}: {message}" if str(place) else message for place, message in ordered])


class _Composer(yaml.SafeLoader):
    """PyYAML's composer, which stops at a depth that would exhaust Python's stack."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"is nested deeper than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str, label: str, folders: tuple[Path, ...], one_line: bool = False) -> Node:
    """The YAML of a file or of a command line's value, as nodes."""

    def place(mark: Any) -> Place:
        return Place(label, 0, 0, folders) if one_line or mark is None else Place(label, mark.line + 1, mark.column + 1, folders)

    unprintable = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if unprintable:
        before = text[: unprintable.start()]
        row, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        where = Place(label, 0 if one_line else row, column)
        raise ConfigError(f"{where}: the control character {unprintable.group()!r} cannot stand in YAML")
    loader = _Composer(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        if error.context == "expected a single document in the stream":
            problem = "a second document begins here: one file is one run"
        line = "" if one_line or mark is None else "".join(text.splitlines()[mark.line : mark.line + 1]).strip()
        raise ConfigError(f"{place(mark)}: not YAML: {problem}{f': {short(line)}' if line else ''}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, LookupError) as error:
        raise ConfigError(f"{label}: not YAML: {error}") from None
    finally:
        loader.dispose()
    if root is None:
        return Node(None, Place(label, 0 if one_line else 1, 1, folders))
    _refuse_explosion(root, place)
    problems: Problems = []
    node = _convert(root, place, problems)
    raise_problems(problems)
    return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    match node:
        case yaml.MappingNode():
            return [child for pair in node.value for child in pair]
        case yaml.SequenceNode():
            return node.value
    return []


def _refuse_explosion(root: yaml.Node, place: Any) -> None:
    """Count what the anchors would become without writing them out: each node is visited once."""
    sizes: dict[int, tuple[int, int] | None] = {}  # nodes and depth below; None while a node is being counted

    def count(node: yaml.Node) -> tuple[int, int]:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ConfigError(f"{place(node.start_mark)}: an anchor that contains itself has no end")
            return known
        sizes[id(node)] = None
        counted = [count(child) for child in _children(node)]
        total = 1 + sum(size for size, _ in counted), 1 + max((depth for _, depth in counted), default=0)
        sizes[id(node)] = total
        return total

    size, depth = count(root)
    limits = [(size > MOST_NODES, f"holds more than {MOST_NODES} values"), (depth > DEEPEST, f"is nested deeper than {DEEPEST} levels")]
    for exceeded, what in limits:
        if exceeded:
            raise ConfigError(f"{place(root.start_mark)}: with its anchors written out this {what}")


_SCALARS = yaml.constructor.SafeConstructor()


def _convert(node: yaml.Node, place: Any, problems: Problems) -> Node:
    here = place(node.start_mark)
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.MappingNode) and tag == "map":
        values: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        for key_node, value_node in node.value:
            where, key = place(key_node.start_mark), key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge":
                problems.append((where, "merge keys (<<) are not read: use `extends`, or write the keys out"))
            elif not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                text = f"the key {key} is read as {key_node.tag.rpartition(':')[2]}" if isinstance(key, str) else "this key is a collection"
                problems.append((where, f"{text}, and keys are text: put it in quotes"))
            elif key in keys:
                first = f"{keys[key].line}:{keys[key].column}" if keys[key].line else "before"
                problems.append((where, f"the key {key!r} stands twice: first at {first}"))
            else:
                keys[key], values[key] = where, _convert(value_node, place, problems)
        return Node(values, here, keys)
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return Node([_convert(item, place, problems) for item in node.value], here)
    if isinstance(node, yaml.ScalarNode):
        try:
            match tag:
                case "str" | "timestamp" | "value":  # a date is text here: no option takes another kind
                    if re.search("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", node.value):
                        problems.append((here, "a text holds a control character or half of a surrogate pair"))
                    return Node(node.value, here)
                case "null":
                    return Node(None, here)
                case "bool":
                    return Node(_SCALARS.construct_yaml_bool(node), here)
                case "int":
                    return Node(_SCALARS.construct_yaml_int(node), here)
                case "float":
                    return Node(_SCALARS.construct_yaml_float(node), here)
        except (ValueError, LookupError, OverflowError):
            problems.append((here, f"{short(node.value)} is no {tag}"))
            return Node(None, here)
    problems.append((here, f"the tag {short(node.tag)} is not read here: write plain text, numbers, lists and mappings"))
    return Node(None, here)


def from_plain(value: Any, place: Place) -> Node:
    """A node of Python values; what YAML could not hold stays as it is, and is refused by its type."""
    match value := plain(value):
        case dict():
            return Node({str(key): from_plain(item, place) for key, item in value.items()}, place)
        case list():
            return Node([from_plain(item, place) for item in value], place)
    return Node(value, place)


def to_plain(node: Node) -> Any:
    match node.value:
        case dict():
            return {key: to_plain(item) for key, item in node.value.items()}
        case list():
            return [to_plain(item) for item in node.value]
    return node.value


def is_yaml(node: Node) -> bool:
    """Whether YAML could hold this: a mapping of Python can contain anything."""
    match node.value:
        case dict():
            return all(map(is_yaml, node.value.values()))
        case list():
            return all(map(is_yaml, node.value))
    return node.value is None or isinstance(node.value, (bool, int, float, str))


def plain_word(value: Any) -> Any:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else value


def short(value: Any) -> str:
    """A value as an error quotes it."""
    match value:
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case None:
            return "nothing"
        case str():
            return repr(value if len(value) <= 60 else f"{value[:57]}...")
        case bool() | int() | float():
            large = isinstance(value, int) and value.bit_length() > 200
            return "a very large integer" if large else str(plain_word(value))
    return f"a {type(value).__name__}"


# Files that build on each other, and overrides ----------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """The configurations that travel with the package, by name: `quickstart`, `class_incremental/er`."""
    folder = package_folder("streamcl.configs")
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def locate(name: str, folder: Path, asked: str) -> Path:
    """The file that a name means: a path from `folder`, or a shipped configuration."""
    try:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path
        packaged = shipped()
        wanted = name.removesuffix(".yaml")
        if wanted in packaged:
            return packaged[wanted]
        if path.is_dir():
            raise ConfigError(f"{asked}{name!r} is a folder: name a YAML file in it")
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{asked}{short(name)} is no file name: {error}") from None
    names = {(Path(name).parent / file).as_posix() for file in beside} | packaged.keys()
    near = near_name(name, names) or near_name(Path(wanted).name, packaged)
    raise ConfigError(f"{asked}there is no file {name!r}{near or '; shipped with streamcl: ' + (', '.join(packaged) or 'none')}")


def read_file(path: Path) -> Node:
    label = shown(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{label}: has {path.stat().st_size} bytes; a configuration has at most {LARGEST_FILE}")
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        raise ConfigError(f"{label}:{before.count(10) + 1}:{error.start - before.rfind(10)}: is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror}") from None
    return _compose(text, label, (path.resolve().parent,))


def extended(node: Node, chain: tuple[Path, ...], known: dict[Path, Node]) -> Node:
    """A mapping with the files that it extends merged under it."""
    if node.value is None:
        raise ConfigError(f"{node.place}: is empty: at least scenario, strategy and model are needed")
    if not isinstance(node.value, dict):
        raise ConfigError(f"{node.place}: must be a mapping with at least scenario, strategy and model, got {short(node.value)}")
    if "extends" not in node.value:
        return node
    extends = node.value["extends"]
    own = Node({key: value for key, value in node.value.items() if key != "extends"}, node.place, node.keys)
    names = extends.value if isinstance(extends.value, list) else [extends]
    merged: Node | None = None
    for name in names:
        if not isinstance(name.value, str) or not name.value:
            raise_problems([(name.place, f"extends: must be a file or a list of files, got {short(name.value)}")])
        path = locate(name.value, name.place.folder(name.value), f"{name.place}: extends: " if str(name.place) else "extends: ").resolve()
        if path in chain:
            cycle = " -> ".join(shown(link) for link in (*chain[chain.index(path) :], path))
            raise_problems([(name.place, f"extends: the files extend each other in a circle: {cycle}")])
        if len(chain) > DEEPEST:
            raise_problems([(name.place, f"extends: more than {DEEPEST} files extend one another")])
        if path not in known:
            known[path] = extended(read_file(path), (*chain, path), known)
        merged = known[path] if merged is None else _merge(merged, known[path], root=True)
    return own if merged is None else _merge(merged, own, root=True)


def _merge(old: Node, new: Node, root: bool = False) -> Node:
    """Mappings are merged key by key, anything else replaces; a plug-in of another name replaces the whole plug-in."""
    if isinstance(new.value, str) and isinstance(old.value, dict) and "name" in old.value and old.value["name"].value == new.value:
        return old
    if not isinstance(new.value, dict):
        return new
    if isinstance(old.value, str):
        old = named(old)
    if not isinstance(old.value, dict):
        return new
    if not root and {"name"} <= old.value.keys() & new.value.keys() and old.value["name"].value != new.value["name"].value:
        return new
    values = {**old.value, **{key: _merge(old.value[key], item) if key in old.value else item for key, item in new.value.items()}}
    return Node(values, new.place, {**old.keys, **new.keys})


def named(node: Node) -> Node:
    """The mapping that a bare name stands for."""
    return Node({"name": node}, node.place, {"name": node.place})


def override(root: Node, text: str, folder: Path) -> Node:
    """The tree with one `key=value` of the command line set in it."""
    place = Place(f"command line: {text!r}", folders=(Path.cwd(), folder))
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST:
        raise ConfigError(f"{place}: must be KEY=VALUE, such as seed=1 or strategy.epochs=5")
    new = _compose(value, place.label, place.folders, one_line=True)

    def put(node: Node, depth: int) -> Node:
        if depth == len(keys):
            return _merge(node, new, root=depth == 0)
        if isinstance(node.value, str):
            node = named(node)
        step, path = keys[depth], ".".join(keys[:depth])
        if node.value is None:
            node = Node({}, place)
        if isinstance(node.value, list):
            if not step.isdecimal() or int(step) >= len(node.value):
                counted = f"0 to {len(node.value) - 1}" if node.value else "none"
                raise ConfigError(f"{place}: {path} is a list, and {step!r} is none of its entries ({counted})")
            return Node([put(item, depth + 1) if index == int(step) else item for index, item in enumerate(node.value)], node.place)
        if not isinstance(node.value, dict):
            raise ConfigError(f"{place}: {path} is {short(node.value)}, and has no {step!r} in it")
        child = put(node.value.get(step, Node(None, place)), depth + 1)
        key_place = place if depth + 1 == len(keys) else node.keys.get(step, place)
        return Node({**node.value, step: child}, node.place, {**node.keys, step: key_place})

    return put(root, 0)
