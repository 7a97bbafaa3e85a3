"""What each modality has learned: a linear probe on its features alone, after the last task of a configuration, beside the joint score.

    python tools/tables/modality_probe.py CONFIG [CONFIG ...] [--set KEY=VALUE ...] [--seeds 5]

The run's encoders are frozen, and on the features of each modality, standardised, a linear model is fitted to the training samples of all
tasks: a logistic regression for classes and for the pixels of masks (20,000 of them), a ridge regression for values. It is scored on all
test samples, as the run itself is: accuracy, mean intersection over union, or mean absolute error (less is better). `head` is the same by
the run's own head, from the modality's columns and its share of the bias, as OGM-GE scores it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from streamcl import running
from streamcl.comparing import Estimate
from streamcl.data import Joined
from streamcl.engine import Engine

PIXELS = 20_000
UNITS = {"class": ("accuracy, %", 100.0, 1), "mask": ("mIoU, %", 100.0, 1), "value": ("mean absolute error", 1.0, 3)}


def collected(run: Engine, part: str) -> tuple[Tensor, Tensor]:
    """Features and targets of all training or test samples of the tasks."""
    sets = [task.train if part == "train" else run.scenario.test(task, run.tasks[-1]) for task in run.tasks]
    data: Any = Joined([one for one in sets if one is not None])
    return run.context.features(data), data.targets.to(run.context.device)


def rows(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """One row per sample, or per annotated pixel."""
    if features.dim() == 2:
        return features, target
    known = target != 255
    return features.movedim(1, -1)[known], target[known].long()


def fitted(features: Tensor, target: Tensor, classes: int) -> Tensor:
    """The weights of a linear model with a bias, on what was standardised before  # (outputs, features + 1)"""
    x = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    if target.is_floating_point():
        y = target.reshape(len(target), -1)
        return torch.linalg.solve(x.T @ x + torch.eye(x.shape[1], device=x.device), x.T @ y).T
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T, target) + 1e-4 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def scored(answers: Tensor, target: Tensor, kind: str) -> float:
    if kind == "value":
        return float((answers - target.reshape(len(target), -1)).abs().mean())
    given, classes = answers.argmax(dim=1), answers.shape[1]
    if kind == "class":
        return float((given == target).float().mean())
    pairs = torch.bincount(target * classes + given, minlength=classes * classes).reshape(classes, classes)
    union = pairs.sum(0) + pairs.sum(1) - pairs.diagonal()
    return float((pairs.diagonal()[union > 0] / union[union > 0]).mean())


@torch.enable_grad()
def probed(run: Engine) -> dict[str, float]:
    """The scores of each modality alone."""
    kind, head = run.info.target, run.model.head
    train, test = (rows(*collected(run, part)) for part in ("train", "test"))
    if kind == "mask":
        chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(0))[:PIXELS].to(train[0].device)
        train = (train[0][chosen], train[1][chosen])
    parts, found = run.model.backbone.fused(), {}
    for name, part in parts.items():
        own, seen = train[0][:, part.columns], test[0][:, part.columns]
        middle, spread = own.mean(0), own.std(0).clamp(min=1e-6)
        weight = fitted((own - middle) / spread, train[1], head.classes)
        found[f"probe {name}"] = scored(linear((seen - middle) / spread, weight[:, :-1], weight[:, -1]), test[1], kind)
        bias = None if head.bias is None else head.bias.detach() / len(parts)
        found[f"head {name}"] = scored(linear(seen, head.weight.detach()[:, part.columns], bias), test[1], kind)
    probes = [value for name, value in found.items() if name.startswith("probe")]
    return {"weakest": max(probes) if kind == "value" else min(probes), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    header: list[str] = []
    for config in options.configs:
        figures: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            run = running.build(running.as_config(config, (f"seed={seed}", "log=[]", *options.changes)), None)
            scores = run.run()
            one = {"joint": scores["final"], "forgetting": scores["forgetting"], "seconds": scores["seconds"]["total"], **probed(run)}
            for name, value in one.items():
                if value is not None:
                    figures.setdefault(name, []).append(value)
        unit, factor, digits = UNITS[run.info.target]
        if not header:
            header = list(figures)
            print(f"| {unit} | {' | '.join(header)} |\n| --- |{' ---: |' * len(header)}")
        cells = []
        for name in header:
            estimate = Estimate.of([value * (1 if name == "seconds" else factor) for value in figures[name]])
            assert estimate is not None
            spread = "" if estimate.deviation is None else f" ± {estimate.deviation:.{digits}f}"
            cells.append(f"{estimate.mean:.{digits}f}{spread}")
        print(f"| {config} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
