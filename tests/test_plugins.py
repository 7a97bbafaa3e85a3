"""Plug-ins are found by name, described from their source alone, and built with checked options."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest

from streamcl import plugins as module
from streamcl.config import plugin_spec
from streamcl.errors import ConfigError, PluginError
from streamcl.plugins import EVIDENCE, KINDS, REQUIRED, Type, find, plugins, read_type, resolve


@pytest.fixture
def room(tmp_path, monkeypatch):
    """`room(kind, **files)` points a kind at a folder with these files; `a__b` is the file b.py in the folder a."""

    def make(kind: str, **files: str) -> Path:
        folder = tmp_path / kind
        for name, text in files.items():
            path = folder / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text))
        monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], rooms=(folder,)))
        return folder

    return make


SINK = "from streamcl.events import Sink\nclass {}(Sink):\n    def write(self, event): ...\n"


def test_the_files_name_is_the_plugins_name_and_its_folder_the_family(room):
    room("sink", plain=SINK.format("Plain"), remote__http=SINK.format("Http"), _base=SINK.format("Base"), remote__table="class Table: ...")
    found = plugins("sink")
    assert {name: (p.class_name, p.family) for name, p in found.items()} == {"plain": ("Plain", ""), "http": ("Http", "remote")}


def test_folders_of_other_kinds_are_left_out(room):
    scenario = "from streamcl.stream import Scenario\nclass S(Scenario): ...\n"
    room("scenario", stream=scenario, sources__hidden=scenario, more__sources=scenario)
    assert list(plugins("scenario")) == ["sources", "stream"]


@pytest.mark.parametrize(
    "text",
    [
        "from streamcl.strategy import Strategy\nclass A(Strategy): ...",
        "from streamcl import Strategy as Base\nclass A(Base): ...",
        "import streamcl.strategy\nclass A(streamcl.strategy.Strategy): ...",
        "from streamcl import strategy\nclass A(strategy.GradientStrategy): ...",
        "from streamcl import GradientStrategy\nclass _B(GradientStrategy): ...\nclass A(_B): ...",
        "try:\n    from streamcl.strategy import Strategy\nexcept ImportError:\n    raise\nclass A(Strategy): ...",
        "from ._shared import Shared\nclass A(Shared): ...",
        "from . import _shared\nclass A(_shared.Shared): ...",
    ],
)
def test_a_plugin_is_known_by_its_bases_however_they_are_imported(room, text):
    room("strategy", a=text, _shared="from streamcl.strategy import GradientStrategy\nclass Shared(GradientStrategy): ...")
    assert find("strategy", "a").class_name == "A"


def test_a_class_that_only_shares_the_contracts_name_is_no_plugin(room):
    room("strategy", a="from other import Strategy\nclass A(Strategy): ...", b="class Strategy: ...\nclass B(Strategy): ...")
    assert plugins("strategy") == {}


def test_two_plugins_of_one_name_are_refused_with_both_files(room):
    room("sink", one__same=SINK.format("A"), two__same=SINK.format("B"), other=SINK.format("C"))
    with pytest.raises(ConfigError, match=r"two plug-ins are called sink 'same': .*one/same\.py and .*two/same\.py"):
        find("sink", "same")
    problems: list[str] = []
    assert list(plugins("sink", problems)) == ["other"]
    assert len(problems) == 1


def test_two_public_classes_in_one_file_are_refused_with_both_names(room):
    room("sink", two=SINK.format("First") + SINK.format("Second"))
    with pytest.raises(ConfigError, match=r"First \(line 2\) and Second \(line 5\)"):
        find("sink", "two")


def test_a_room_file_that_is_no_python_spoils_neither_the_listing_nor_other_plugins(room):
    room("sink", broken="class X(\n", good=SINK.format("Good"))
    problems: list[str] = []
    assert list(plugins("sink", problems)) == ["good"]
    assert "broken.py:1: this is not Python" in problems[0]
    assert find("sink", "good").class_name == "Good"
    with pytest.raises(ConfigError, match="not Python"):
        plugins("sink")


def test_options_are_read_along_the_bases(room):
    room(
        "strategy",
        base="""
            from streamcl.strategy import Strategy
            class Base(Strategy):
                def __init__(self, *, epochs: int = 1, lr: float = 0.1, with_: list[str] = ()): ...
        """,
        silent="from .base import Base\nclass Silent(Base): ...",
        open="""
            from .base import Base
            class Open(Base):
                def __init__(self, alpha: float, *rest, lr: float | None = None, epochs: int = 70, **options): ...
        """,
        closed="from .base import Base\nclass Closed(Base):\n    def __init__(self, *, beta: int): ...",
        further="from .open import Open\nclass Further(Open):\n    def __init__(self, *, alpha: float = 2.0, **options): ...\n",
    )

    def table(name):
        return {o.name: (o.parameter, o.annotation, o.default, o.owner) for o in find("strategy", name).options.values()}

    base = {
        "epochs": ("epochs", "int", 1, "Base"),
        "lr": ("lr", "float", 0.1, "Base"),
        "with": ("with_", "list[str]", (), "Base"),
    }
    opened = {
        "alpha": ("alpha", "float", REQUIRED, "Open"),
        "lr": ("lr", "float | None", None, "Open"),
        "epochs": ("epochs", "int", 70, "Open"),
        "with": ("with_", "list[str]", (), "Base"),
    }
    assert table("silent") == base
    assert table("open") == opened
    assert list(table("open")) == ["alpha", "lr", "epochs", "with"]
    assert table("closed") == {"beta": ("beta", "int", REQUIRED, "Closed")}
    assert table("further") == {**opened, "alpha": ("alpha", "float", 2.0, "Further")}


def test_a_mixin_passes_options_on_in_the_order_of_method_resolution(room):
    room(
        "sink",
        _mixin="class Mixin:\n    def __init__(self, *, colour: str = 'red', **options): ...",
        _base="from streamcl.events import Sink\nclass Base(Sink):\n    def __init__(self, *, size: int = 3): ...",
        mixed="from ._mixin import Mixin\nfrom ._base import Base\nclass Mixed(Mixin, Base): ...",
    )
    assert list(find("sink", "mixed").options) == ["colour", "size"]


def test_defaults_may_be_settings_types(room):
    body = "from streamcl.events import Sink\nclass A(Sink):\n    def __init__(self, *, optimizer: Optimizer = {}): ...\n"
    room("sink", good=body.format("Optimizer(lr=0.5, name='adam')"), bad=body.format("make(3)"))
    assert find("sink", "good").options["optimizer"].default == {"lr": 0.5, "name": "adam"}
    with pytest.raises(PluginError, match=r"bad\.py:3: A.__init__: the default 'make\(3\)' of 'optimizer' is no literal"):
        _ = find("sink", "bad").options


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def __init__(self, *, size): ...", r"a\.py:3: A.__init__: the option 'size' has no type"),
        ("def __init__(self, *, name: str): ...", "cannot be called 'name'"),
        ("def __init__(self, size: int, /): ...", "positional only"),
    ],
)
def test_an_authors_mistake_names_file_and_line(room, body, message):
    room("sink", a=f"from streamcl.events import Sink\nclass A(Sink):\n    {body}\n")
    with pytest.raises(PluginError, match=message):
        _ = find("sink", "a").options


def test_types_are_read_through_a_closed_grammar():
    assert read_type("int | None") == Type("union", (Type("int"), Type("none")))
    assert read_type("'float'") == Type("float")
    assert read_type("dict[str, list[Transform]]") == Type("dict", (Type("str"), Type("list", (Type("plugin", name="transform"),))))
    assert read_type("Sequence[Term]") == Type("list", (Type("plugin", name="term"),))
    assert read_type("tuple[int, ...]") == Type("sequence", (Type("int"),))
    assert read_type("tuple[int, str]") == Type("tuple", (Type("int"), Type("str")))
    assert read_type("Literal['a', 1, None]") == Type("literal", values=("a", 1, None))
    assert read_type("PositiveInt", {"PositiveInt"}) == Type("settings", name="PositiveInt")
    for outside in ("Tensor", "set[int]", "Callable[[int], int]", "__import__('os')", "int | Tensor", "1", "list[int, int]"):
        with pytest.raises(ValueError, match="is not a type that an option can have"):
            read_type(outside)


def test_an_unknown_annotation_is_told_when_the_option_is_checked(room):
    room("sink", a="from streamcl.events import Sink\nclass A(Sink):\n    def __init__(self, *, size: Tensor = 1): ...\n")
    with pytest.raises(ConfigError, match=r"a\.py:3: option 'size' of A: the annotation 'Tensor' is not a type"):
        plugin_spec("sink", "a")


def test_doc_evidence_licence_and_version_are_read_from_the_source(room):
    room(
        "source",
        a='''
            """Handwritten things.

            More about them.

            Evidence: small real data (numbers
            in the config).

            Further."""
            from streamcl.stream import Source
            plugin_version = 1
            class A(Source):
                licence = "CC BY 4.0"
        ''',
        b="from streamcl.stream import Source\nclass B(Source):\n    plugin_version = 99\n",
    )
    plugin = find("source", "a")
    assert (plugin.summary, plugin.evidence) == ("Handwritten things.", "small real data (numbers in the config).")
    assert (plugin.licence, plugin.version) == ("CC BY 4.0", 1)
    with pytest.raises(ConfigError, match="written for version 99 of the plug-in contract, and this streamcl knows version 1"):
        find("source", "b")


def test_an_unknown_name_suggests_the_nearest_or_lists_what_there_is(room):
    room("strategy", icarl="from streamcl.strategy import Strategy\nclass A(Strategy): ...")
    room("term", ewc="from streamcl.strategy import Term\nclass E(Term): ...")
    with pytest.raises(ConfigError, match=r"^unknown strategy 'icral': did you mean 'icarl'\?$"):
        find("strategy", "icral")
    with pytest.raises(ConfigError, match=r"unknown strategy 'ewcc': did you mean 'ewc'\?"):
        find("strategy", "ewcc")
    with pytest.raises(ConfigError, match=r"unknown strategy 'zzz'; there are ewc, icarl"):
        find("strategy", "zzz")


def test_what_follows_a_colon_is_the_first_option(room):
    room("source", torch="from streamcl.stream import Source\nclass T(Source):\n    def __init__(self, *, data: str, root: str = ''): ...")
    room("sink", bare=SINK.format("Bare"))
    plugin, implied = resolve("source", "torch:MNIST/x:y")
    assert (plugin.name, implied) == ("torch", {"data": "MNIST/x:y"})
    with pytest.raises(ConfigError, match="takes nothing after the colon"):
        resolve("sink", "bare:x")


def test_entry_points_of_other_distributions_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "otherdist"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "base.py").write_text("from streamcl.events import Sink\nclass Base(Sink):\n    def __init__(self, *, url: str): ...")
    (package / "sinks.py").write_text("from otherdist.base import Base\nclass A(Base): ...\nclass B(Base): ...")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("posted", "otherdist.sinks:B", "streamcl.sink")
    monkeypatch.setattr(module, "_entry_points", lambda: (point,))
    plugin = find("sink", "posted")
    assert (plugin.class_name, plugin.module, list(plugin.options)) == ("B", "otherdist.sinks", ["url"])
    assert "otherdist" not in sys.modules


USER = """
from streamcl.events import Sink
from beside import NAME

class Mine(Sink):
    def __init__(self, *, size: int = 3, inner: Sink | None = None, more: list[Sink] = ()):
        if size < 0:
            raise ValueError("size is below 0")
        self.size, self.inner, self.more, self.imported = size, inner, more, NAME
    def write(self, event): ...
"""


def test_a_users_file_is_found_beside_the_yaml_and_built_with_nested_plugins(tmp_path):
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    given = {"name": "mine.py:Mine", "size": 5, "inner": "mine.py", "more": [{"name": "mine.py:Mine", "size": 7}, "mine.py"]}
    spec = plugin_spec("sink", given, tmp_path)
    before = list(sys.path)
    built = spec.build()
    assert (built.size, built.inner.size, [m.size for m in built.more], built.imported) == (5, 3, [7, 3], "beside")
    assert type(built) is type(built.inner)
    assert sys.path == before
    assert spec.to_dict()["name"] == f"{tmp_path / 'mine.py'}:Mine"
    assert plugin_spec("sink", spec.to_dict()) == spec
    with pytest.raises(ConfigError, match=r"sink mine.py: size is below 0"):
        plugin_spec("sink", {"name": "mine.py", "size": -1}, tmp_path).build()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mime.py:Mine", r"there is no file .*mime\.py: did you mean 'mine\.py'\?"),
        ("mine.py:Mime", r"mine\.py:1: there is no class 'Mime': did you mean 'Mine'\?; classes there: Mine \(line 5\)"),
        ("torn.py:A", r"torn\.py:3: this is not Python"),
        ("plain.py:A", r"plain\.py:1: A is no sink: it does not derive from streamcl's Sink. Classes there: A \(line 1\)"),
        ("plain.py", r"no class in it derives from streamcl's Sink"),
        ("two.py", r"which of its classes is meant\? Write two\.py:CLASS"),
    ],
)
def test_a_users_file_without_what_was_asked_for_says_what_there_is(tmp_path, name, message):
    (tmp_path / "mine.py").write_text(USER)
    (tmp_path / "torn.py").write_text("a = 1\n\nclass A(:\n")
    (tmp_path / "plain.py").write_text("class A: ...")
    (tmp_path / "two.py").write_text(SINK.format("A") + SINK.format("B"))
    with pytest.raises(ConfigError, match=message):
        find("sink", name, tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import no_such_module_at_all", r"mine\.py:2: ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("import deeper", r"deeper\.py:3: ZeroDivisionError: division by zero"),
        ("import torn", r"torn\.py:1: SyntaxError"),
        ("raise SystemExit(7)", r"mine\.py:2: SystemExit: 7"),
    ],
)
def test_a_users_file_that_does_not_import_shows_its_own_lines(tmp_path, line, message):
    (tmp_path / "mine.py").write_text(f"from streamcl.events import Sink\n{line}\nclass Mine(Sink): ...\n")
    (tmp_path / "deeper.py").write_text("def f():\n    import json\n    return 1 / 0\nf()\n")
    (tmp_path / "torn.py").write_text("class\n")
    plugin = find("sink", "mine.py", tmp_path)
    for name in ("deeper", "torn"):
        sys.modules.pop(name, None)
    with pytest.raises(PluginError, match=message) as raised:
        plugin.load()
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_a_changed_file_is_read_anew(room):
    folder = room("sink", a=SINK.format("A"))
    assert find("sink", "a").class_name == "A"
    (folder / "a.py").write_text(SINK.format("Another"))
    assert find("sink", "a").class_name == "Another"


def test_listing_imports_neither_torch_nor_pydantic():
    code = (
        "import sys; from streamcl.plugins import KINDS, plugins\n"
        "for kind in KINDS:\n    for plugin in plugins(kind, []).values(): plugin.options, plugin.summary\n"
        "print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        ("def los(self, batch): ...", "'loss'"),
        ("def compute_loss(self, batch): ...", "'loss'"),
        ("def aftertask(self, task): ...", "'after_task'"),
        ("def on_before_task(self, task): ...", "'before_task'"),
        ("def loss(self, batch): ...\n    def old_loss(self, batch): ...", None),  # a helper of its own loss
        ("def learn(self, task): self.head_loss(task)\n    def head_loss(self, task): ...", None),
        ("@property\n    def loss_weight(self): ...", None),
        ("def similarity(self, batch): ...", None),
    ],
)
def test_a_method_that_is_nearly_a_hook_and_that_nothing_calls_is_told(tmp_path, body, meant):
    (tmp_path / "mine.py").write_text(f"from streamcl import GradientStrategy\nclass Mine(GradientStrategy):\n    {body}\n")
    found = find("strategy", "mine.py", tmp_path).misnamed()
    name = body.partition("def ")[2].partition("(")[0]
    told = f"{tmp_path}/mine.py:3: Mine.{name} overrides nothing, and nothing calls it: did you mean {meant}?"
    assert found == ([told] if meant else [])


def test_every_plugin_of_the_rooms_can_be_described():
    for kind in KINDS:
        for plugin in plugins(kind).values():
            assert not plugin.misnamed()
            assert plugin.summary, f"{plugin.path} has no docstring"
            assert plugin.evidence is None or plugin.evidence.startswith(EVIDENCE), f"{plugin.path}: {plugin.evidence}"
            for option in plugin.options.values():
                assert isinstance(option.type, Type)
