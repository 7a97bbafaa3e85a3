"""The model of a run for others: weights, class names, preprocessing, licences and a card, in a folder that needs no run and no data.

    config.json           under `streamcl`: all that makes the model again; beside it, a Hugging Face model's own settings
    model.safetensors     `backbone.*` and `head.*`; of a Hugging Face model, its own file, with `head.*` in head.safetensors
    strategy.safetensors  what the strategy predicts with beside: `prototypes.*` (class means), `analytic.*`, `strategy.*`
    README.md             the card

No sample leaves a run: the exemplars stay behind, and a strategy that cannot answer without them is refused. No code does either: of
a plug-in in a file of one's own only the name is written, and what lies in the folder is never run.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamcl import __version__
from streamcl.adapting import AdaptingStrategy
from streamcl.config import RunConfig, plugin_spec
from streamcl.contracts import Memory
from streamcl.errors import DataError, PluginError, RunError
from streamcl.evaluation import Evaluation
from streamcl.learned import Learned, described, info_from, plain_info, precision_on, undisturbed
from streamcl.nn.model import GrowingHead
from streamcl.nn.norms import with_values
from streamcl.plugins import PluginSpec
from streamcl.processes import Processes
from streamcl.run_folder import RunFolder
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, StreamInfo, Transform
from streamcl.wording import Scale
from streamcl.writing import disk_error

FORMAT = 1  # of exported folders; raised when an older streamcl could not read a newer one


def export(run: str | Path, directory: str | Path) -> Path:
    """Write the newest model of a run into `directory`, which appears whole or not at all."""
    from streamcl import running

    target = Path(directory).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{directory} {'is not empty' if target.is_dir() else 'is a file'}: name a folder that does not exist yet")
    learned, settings, state = running.restored(run, "cpu")
    aside = target.with_name(f".{target.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        made_of = {"strategy": settings.strategy.to_dict(), "backbone": RunFolder(Path(run)).read("info.json")["backbone"]}
        about, own_files = _write(learned, settings, made_of, aside)
        evaluation = Evaluation(learned.info, settings.evaluate.protocols)
        evaluation.restore(state["evaluation"])
        (aside / "README.md").write_text(
            _card(about, evaluation.scores(), _linear(learned), len(state["memory_per_task"]), aside, list(own_files)),
            encoding="utf-8",
        )
        _prove(learned, aside, own_files)
        readable = (aside / "README.md").stat().st_mode & 0o777  # what the umask allows; safetensors lets nobody but the owner read
        for file in aside.iterdir():
            file.chmod(readable)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        aside.rename(target)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _write(learned: Learned, settings: RunConfig, made_of: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors and config.json; returns what that says, and where the plug-ins lie that are files of the person's own."""
    backbone, strategy = learned.model.backbone, learned.strategy
    made_of["backbone"] |= backbone.save(folder)
    own_format = (folder / "config.json").is_file()
    answering = strategy.weights() if isinstance(strategy, AdaptingStrategy) else {}  # a teacher's, perhaps
    with with_values(learned.model, answering):
        tensors = {name: value.clone() for name, value in learned.model.state_dict().items()}
    if own_format:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("backbone.")}
    _save(tensors, folder / ("head.safetensors" if own_format else "model.safetensors"))
    beside = {f"strategy.{name}": getattr(strategy, name) for name in strategy.predicts_with} | _remembered(learned.context.memory)
    if beside:
        _save(beside, folder / "strategy.safetensors")
    about = {
        "format": FORMAT,
        "version": __version__,
        "classes": learned.classes,
        "head": learned.model.classes,
        "features": learned.model.backbone.dim,
        **made_of,
        "preprocessing": [_plain_transform(transform) for transform in learned.transforms.get("test", ())],
        "stream": {**plain_info(learned.info), "class_names": learned.classes, "classes": len(learned.classes)},
        "seed": settings.seed,
        "precision": settings.engine.precision,
        "licence": {"weights": backbone.licence, "data": learned.info.licence},
    }
    own_files = {name: Path(name).name for name in _names(about) if Path(name).is_absolute()}
    about = _renamed(about, own_files)
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8")) if own_format else {}
    (folder / "config.json").write_text(json.dumps({**theirs, "streamcl": about}, indent=1), encoding="utf-8")
    return about, {short: name for name, short in own_files.items()}


def _remembered(memory: Memory) -> dict[str, Tensor]:
    """What predicting may ask of a memory; never its exemplars."""
    found = {}
    if len(memory.prototypes.labels()):
        found = {"prototypes.labels": memory.prototypes.labels(), "prototypes.means": memory.prototypes.means()}
    try:
        return {**found, "analytic.weights": memory.analytic.weights()}
    except DataError:  # the strategy does not use them
        return found


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    whole = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    try:
        save_file(whole, file)
    except SafetensorError as error:  # its way of passing an OSError on
        raise OSError(str(error)) from error


def _plain_transform(transform: Transform) -> dict[str, Any]:
    """A transform as its name and the options that make it again."""
    kind, options = type(transform), {}
    for option in inspect.signature(kind).parameters:
        if not hasattr(transform, option):
            raise PluginError(f"the transform {kind.__name__} does not keep its option {option!r} under that name: it cannot be exported")
        value = getattr(transform, option)
        options[option] = value.flatten().tolist() if isinstance(value, Tensor) else value
    inside = kind.__module__.startswith("streamcl.")
    return {"name": kind.__module__.rpartition(".")[2] if inside else f"{inspect.getfile(kind)}:{kind.__name__}", **options}


def _names(tree: Any) -> list[str]:
    """The names of all plug-ins in a tree of options."""
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    own = [tree["name"]] if isinstance(tree, dict) and isinstance(tree.get("name"), str) else []
    return own + [name for item in inside for name in _names(item)]


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    """The tree with other names for its plug-ins."""
    if isinstance(tree, list | tuple):
        return [_renamed(item, names) for item in tree]
    if not isinstance(tree, dict):
        return tree
    changed = {key: _renamed(value, names) for key, value in tree.items()}
    return {**changed, "name": names.get(tree["name"], tree["name"])} if isinstance(tree.get("name"), str) else changed


def _prove(learned: Learned, folder: Path, own_files: Mapping[str, str]) -> None:
    """Read the export back and compare its answers with the run's, on made-up inputs."""
    batch = made_up(learned.info)
    strategy = type(learned.strategy).__name__
    try:
        mine, theirs = learned.answer(batch), read(folder, "cpu", own_files).answer(batch)
    except Exception as error:
        raise PluginError(f"{strategy} cannot predict from what is exported: {type(error).__name__}: {error}. {ADVICE}") from error
    pairs = [
        (mine.scores, theirs.scores),
        (mine.images, theirs.images),
        *((scores, theirs.heads.get(name)) for name, scores in mine.heads.items()),
    ]
    same = all(_alike(one, other) for one, other in pairs)
    if not same or mine.texts != theirs.texts:
        raise PluginError(f"{strategy} predicts something else from what is exported. {ADVICE}")


def _alike(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


ADVICE = (
    "What `predict` needs beside the model and the memory's class means and analytic weights, it must name in `predicts_with`; "
    "samples are never exported"
)


def made_up(info: StreamInfo, count: int = 4) -> Batch:
    """Inputs of the stream's form that mean nothing."""
    random = generator(0, "made up")
    inputs: dict[str, Column] = {}
    for name, modality in info.modalities.items():
        if modality.kind == "text":
            inputs[name] = [" ".join(["a", "word"] * (number + 1)) for number in range(count)]
        elif modality.high is None:
            inputs[name] = torch.randn(count, *modality.shape, generator=random)
        else:
            kind = torch.uint8 if modality.high <= 255 else torch.int32
            inputs[name] = torch.randint(int(modality.high) + 1, (count, *modality.shape), generator=random, dtype=kind)
    return Batch(inputs, None, torch.arange(count))


# -- reading -----------------------------------------------------------------------------------------------------------------------


def is_export(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "status.json").is_file()


def read(folder: str | Path, device: str = "auto", own_files: Mapping[str, str] | None = None) -> Learned:
    """The model in an exported folder.

    A plug-in in a file of the person's own is looked for where Python runs, or where `own_files` says (name: path). No code comes from
    the folder: where Python runs inside of it, or it names a file by a path, the plug-in is refused.
    """
    folder = Path(folder).resolve()
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["streamcl"]
        made = about["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is no model that streamcl exported: its config.json does not say so") from error
    if made > FORMAT:
        raise RunError(f"{folder} was exported by a newer streamcl (format {made}, this one reads {FORMAT}): upgrade streamcl")
    about = _renamed(about, own_files or {})
    where = Processes().device(device)
    own_format = (folder / "head.safetensors").is_file()
    tensors = _load(folder / ("head.safetensors" if own_format else "model.safetensors"), where)
    beside = _load(folder / "strategy.safetensors", where) if (folder / "strategy.safetensors").is_file() else {}
    options = {key: str(folder) if value == "." else value for key, value in about["backbone"].items()}
    made_of = plugin_spec("strategy", about["strategy"]), plugin_spec("backbone", options)
    steps = [plugin_spec("transform", one) for one in about["preprocessing"]]
    _refuse_code_of(folder, [*made_of, *steps], (own_files or {}).values())
    strategy = made_of[0].build()
    with undisturbed(about["seed"]):
        learned = Learned(
            info_from(about["stream"]),
            made_of[1].build(),
            strategy,
            _Recalled(beside),  # type: ignore[arg-type]
            about["classes"],
            transforms={"test": [step.build() for step in steps]},
            seed=about["seed"],
            device=where,
            precision=precision_on(where, about["precision"]),
        )
        for name in strategy.predicts_with:  # before the model takes its shape: they may tell what a head of the strategy's own is made of
            setattr(strategy, name, beside[f"strategy.{name}"])
        classes = about["head"] if "head" in about else len(tensors["head.weight"])
        learned.model.resize(classes, about.get("features", learned.model.backbone.dim))
    missing, unexpected = learned.model.load_state_dict(tensors, strict=False)
    lacking = [name for name in missing if not (own_format and name.startswith("backbone."))]
    if lacking or unexpected:
        raise RunError(f"{folder} does not hold the tensors of its model: missing {lacking[:3]}, unexpected {unexpected[:3]}")
    return learned


def _refuse_code_of(folder: Path, specs: Iterable[Any], trusted: Collection[str]) -> None:
    """Let no plug-in through whose file the folder itself could bring or choose; nothing was imported yet."""
    within = Path.cwd().resolve().is_relative_to(folder)
    for spec in _specs(specs):
        if spec.plugin.module is None and spec.name not in trusted and (within or Path(spec.name).name != spec.name):
            raise RunError(
                f"{folder} names the plug-in {spec.name}, and no code of an exported folder is run: put a file of yours with that name "
                "elsewhere, run Python there, and load the model by its path"
            )


def _specs(value: Any) -> Iterator[PluginSpec]:
    """All plug-ins in a tree of options."""
    if isinstance(value, PluginSpec):
        yield value
        value = value.options
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _specs(item)


def _load(file: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(file, device=str(device))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} cannot be read: {error}") from error


class _Recalled:
    """The memory of an exported model: class means and analytic weights, and no sample."""

    exemplars: tuple = ()

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.prototypes = _Means(tensors.get("prototypes.labels", torch.empty(0, dtype=torch.int64)), tensors.get("prototypes.means"))
        self.analytic = _Weights(tensors.get("analytic.weights"))


@dataclass(frozen=True)
class _Means:
    known: Tensor
    vectors: Tensor | None

    def configure(self, covariance: str = "none", per_class: int = 1, dtype: torch.dtype = torch.float32) -> None:
        """A strategy asks for this when it starts; what it would learn with is not here."""

    def labels(self) -> Tensor:
        return self.known

    def means(self) -> Tensor:
        if self.vectors is None:
            raise DataError("there is no class mean in this model")
        return self.vectors

    def nearest(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        means = self.means()
        distances, rows = torch.cdist(features.to(means), means).topk(min(k, len(means)), largest=False)
        return distances, self.known[rows]


@dataclass(frozen=True)
class _Weights:
    solution: Tensor | None

    def configure(self, dim: int, ridge: float, dtype: torch.dtype = torch.float64) -> None:
        """A strategy asks for this when it starts; what it would learn with is not here."""

    def weights(self) -> Tensor:
        if self.solution is None:
            raise DataError("there are no analytic weights in this model")
        return self.solution


# -- the card ----------------------------------------------------------------------------------------------------------------------


def _card(about: Mapping[str, Any], scores: Mapping[str, Any], head: int, tasks: int, folder: Path, own: list[str]) -> str:
    """README.md: what it is, what it reached, what it takes, and how it is loaded.

    `head` is how many classes the model's own has where it is linear, else 0; `own` are the plug-ins from files of the person's own.
    """
    strategy, backbone, licence = about["strategy"]["name"], about["backbone"]["name"], about["licence"]
    info = info_from(about["stream"])
    tags = {"license": licence["weights"], "library_name": "streamcl", "tags": ["continual-learning", strategy]}
    steps = [f"- {name}: whole numbers are divided by {m.high:g}" for name, m in info.modalities.items() if m.high is not None]
    steps += [f"- `{json.dumps(step)}`" for step in about["preprocessing"]]
    from_where = "from this folder"
    if own:
        from_where = f"from where you keep your own {' and '.join(own)} (it is not in this folder, and no code of this folder is run)"
    taught, learned, listed = "classes", "A classifier that learned its classes", "Classes"
    told = "gives the name of each sample's class, `model.scores(inputs)`\na score for every class"
    if info.target == "text":
        taught, learned, listed = "kinds of questions", "A language model that learned to answer them", "Kinds of questions"
        told = "gives\nwhat the model answers to each"
    return f"""---
{yaml.safe_dump(tags, sort_keys=False)}---
# {backbone}, taught {len(about["classes"])} {taught} by {strategy}

{learned} in {tasks} tasks, one after another, with streamcl {about["version"]}.
It takes {described(info.modalities)}.

## Scores

{_score_tables(scores)}

## {listed}

{", ".join(about["classes"])}

## Preprocessing

{chr(10).join(steps) or "None: the model takes the inputs as they are."}

## Licence

Weights: {licence["weights"]}. Data that it was trained on: {"none stated" if licence["data"] == "unknown" else licence["data"]}.

## How to load it

With streamcl, {from_where}; `model.predict(inputs)` takes raw inputs and {told}:

```python
import streamcl

model = streamcl.load("{"PATH/OF/THIS/FOLDER" if own else "."}")
print(model.classes)
```

{_without_streamcl(about, head, folder)}
"""


def _linear(learned: Learned) -> int:
    return learned.model.classes if isinstance(learned.model.head, GrowingHead) else 0


def _score_tables(scores: Mapping[str, Any]) -> str:
    matrix, names = scores["matrix"], [task["name"].replace("|", "/") for task in scores["tasks"]]
    scale = Scale([*(value for row in matrix for value in row), scores["final"], scores["average_incremental"]], metric=scores["metric"])
    width = max((len(row) for row in matrix), default=0)
    figures = {
        "final (all classes, after the last task)": scale.score(scores["final"]),
        "average incremental": scale.score(scores["average_incremental"]),
        "forgetting": scale.difference(scores["forgetting"]),
    }
    lines = [
        f"| {scores['metric']} | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in figures.items()),
        "",
        "Rows: after each task. Columns: on the test set of each task.",
        "",
        f"| after | {' | '.join(str(column + 1) for column in range(width))} |",
        f"| --- |{' ---: |' * width}",
        *(f"| {number + 1}: {names[number]} | {' | '.join(scale.number(value) for value in row)} |" for number, row in enumerate(matrix)),
    ]
    return "\n".join(lines)


def _without_streamcl(about: Mapping[str, Any], head: int, folder: Path) -> str:
    own_format, beside = (folder / "head.safetensors").is_file(), (folder / "strategy.safetensors").is_file()
    lines = ["import json", "", "import torch", "from safetensors.torch import load_file"]
    lines += ["from transformers import AutoModel", "", 'backbone = AutoModel.from_pretrained(".")'] if own_format else [""]
    lines += [
        'classes = json.load(open("config.json"))["streamcl"]["classes"]',
        f'tensors = load_file("{"head" if own_format else "model"}.safetensors")',
    ]
    pooled = f"its tokens, pooled: {about['backbone'].get('pooling', 'mean')}" if own_format else "`backbone.*`"
    words = f"Features are what the backbone gives ({pooled})"
    if head:
        lines += [
            'head = torch.nn.Linear(*reversed(tensors["head.weight"].shape))',
            'head.load_state_dict({name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")})',
        ]
        words += ", and `head(features)` has a score for each class"
    elif about["head"]:
        words += f", and `head.*` is a head of {about['strategy']['name']}'s own"
    if beside:
        lines += ['beside = load_file("strategy.safetensors")', "print({name: tuple(value.shape) for name, value in beside.items()})"]
        words += f". {about['strategy']['name']} decides by what lies in strategy.safetensors"
    code = "\n".join(lines)
    return f"With torch and safetensors alone:\n\n```python\n{code}\n```\n\n{words}."
