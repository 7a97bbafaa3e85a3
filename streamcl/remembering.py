"""`streamcl memory`: what a run remembers and what that costs, in words and, on request, in pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamcl import config as configuration
from streamcl.checkpoint import Checkpoints
from streamcl.contact_sheet import pixels, write
from streamcl.errors import RunError
from streamcl.run_folder import RunFolder
from streamcl.wording import size
from streamcl.writing import disk_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHEET = (20, 12)  # at most so many classes, and samples of each, on the contact sheet
MOST = 30  # rows of a table; the rest is summed up


def remembered(run: Path, pictures: bool = False) -> str:
    """The memory of a run at its newest checkpoint; with `pictures`, also RUN/memory/exemplars.png and prototypes.png."""
    folder = RunFolder(Path(run))
    folder.check()
    settings = configuration.load(folder.path / "config.yaml")
    warnings: list[str] = []
    state = Checkpoints(folder.checkpoints).load(warnings.append)
    if state is None:
        raise RunError(f"{folder.path} has no checkpoint yet: there is nothing that it remembers")
    memory, strategy = settings.memory.build(), settings.strategy.build()
    memory.open(settings.seed, strategy.selection, torch.device("cpu"), folder=folder.checkpoints)
    memory.restore(state["memory"])
    about, names = memory.about(), state["classes"]
    lines = [*(f"warning: {warning}" for warning in warnings), str(folder.path), f"  {size(memory.nbytes())} in all"]
    if "exemplars" in about:
        lines += _exemplars(about["exemplars"], names, memory.exemplars)
    for name in ("prototypes", "analytic"):
        if about.get(name):
            lines += ["", f"{name}: {_facts(about[name])}"]
    for name, index in about.get("indexes", {}).items():
        lines += ["", f"index {name}: {_facts(index)}"]
    if pictures:
        lines += ["", *_pictures(folder.path / "memory", memory, names)]
    return "\n".join(lines)


def _exemplars(about: Mapping[str, Any], names: Sequence[str], exemplars: Any) -> list[str]:
    unit = {"samples": "samples", "per_class": "samples of each class", "bytes": "bytes"}[about["unit"]]
    kept = {"raw": "raw", "features": "as features", "both": "raw and as features", "none": "nothing may be kept"}[about["store"]]
    lines = [
        "",
        f"exemplars: {about['samples']} samples ({kept}), {size(about['bytes'])}, by {about['policy']}; "
        f"the budget is {about['budget']} {unit}",
    ]
    if about["bytes_on_disk"]:
        lines.append(f"  {size(about['bytes_on_disk'])} of it in files on disk, each in two places")
    if not about["samples"]:
        return lines
    each = exemplars.bytes_of()
    target, arrived = exemplars.held.target, exemplars.aside["arrived"]
    if target.dim() == 1:
        lines += ["", *_table("class", [(_name(names, label), target == label) for label in about["classes"]], each)]
    else:
        lines += ["", *_table("class", [(_name(names, label), target[:, label] == 1) for label in about["classes"]], each)]
    lines += ["", *_table("task", [(str(task + 1), arrived == task) for task in about["tasks"]], each)]
    return lines


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def _table(head: str, rows: Sequence[tuple[str, Tensor]], each: Tensor) -> list[str]:
    texts = [[head, "samples", "bytes"], *([name, str(int(mine.sum())), size(int(each[mine].sum()))] for name, mine in rows[:MOST])]
    if len(rows) > MOST:
        others = torch.stack([mine for _, mine in rows[MOST:]]).any(dim=0)
        texts.append([f"and {len(rows) - MOST} others", str(int(others.sum())), size(int(each[others].sum()))])
    widths = [max(len(row[i]) for row in texts) for i in range(3)]
    return [f"  {row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in texts]


def _facts(about: Mapping[str, Any]) -> str:
    def said(key: str, value: Any) -> str:
        if key == "bytes":
            return size(value)
        return f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"

    return ", ".join(said(key, value) for key, value in about.items() if value is not None)


# Pictures -----------------------------------------------------------------------------------------------------------------------


def _pictures(folder: Path, memory: Any, names: Sequence[str]) -> list[str]:
    lines = []
    for name, figure, without in (
        ("exemplars.png", _sheet(memory.exemplars, names), "no exemplar is an image"),
        ("prototypes.png", _projection(memory.prototypes, names), "there are fewer than three prototypes"),
    ):
        if figure is None:
            lines.append(f"{name} was not drawn: {without}")
            continue
        path = folder / name
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error
        write(figure, path, 120, bbox_inches="tight", facecolor="white")
        lines.append(f"drawn: {path}")
    return lines


def _sheet(exemplars: Any, names: Sequence[str]) -> Figure | None:
    """Some exemplars of each class, a class in a row, in the order of the policy's preference where it has one."""
    from matplotlib.figure import Figure

    classes = list(exemplars.classes())[: SHEET[0]]
    if not classes:
        return None
    rows = []
    for label in classes:
        batch = exemplars.of(label, SHEET[1])
        image = next((column for column in batch.inputs.values() if isinstance(column, Tensor) and column.dim() == 4), None)
        if image is None:
            return None
        rows.append(image)
    figure = Figure(figsize=(0.62 * SHEET[1] + 1.2, 0.62 * len(rows)))
    grid = figure.subplots(len(rows), SHEET[1], squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
    for line, label, images in zip(grid, classes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, images, strict=False):
            shown = pixels(image, float(image.min()), float(image.max()))
            axis.imshow(shown, cmap="gray" if shown.ndim == 2 else None, interpolation="nearest")
        line[0].text(-0.25, 0.5, _name(names, label)[:20], ha="right", va="center", transform=line[0].transAxes, fontsize=9)
    return figure


def _projection(prototypes: Any, names: Sequence[str]) -> Figure | None:
    """The prototypes on the two directions in which they differ most."""
    from matplotlib.figure import Figure

    labels = prototypes.labels()
    if len(labels) < 3:
        return None
    means = prototypes.means().double().cpu()
    centred = means - means.mean(dim=0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    places = (centred @ directions[:2].T).numpy()
    share = (spread[:2] ** 2).sum() / (spread**2).sum().clamp_min(1e-30)
    figure = Figure(figsize=(6.5, 5.2))
    axis = figure.subplots()
    axis.scatter(places[:, 0], places[:, 1], s=40, c=labels.cpu().numpy(), cmap="viridis", zorder=3)
    for (x, y), label in zip(places, labels.tolist(), strict=True):
        axis.annotate(_name(names, label)[:20], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axis.grid(alpha=0.25)
    axis.set_title(f"{len(places)} prototypes; these two directions hold {100 * float(share):.0f} % of how they differ", fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure
