"""Time of the memory's statistics against the plainest code for the same: ratios in one run, on the threads that OMP_NUM_THREADS gives.

    python tools/bench/memory_statistics.py [--quick]

The analytic accumulator against the normal equations in one piece (the faster of SciPy's LAPACK, whose X'X does half the work, and
torch's), the recursive form against solving anew after each batch, the nearest of 10,000 class means against the faster of torch.cdist
and a matrix product and against FAISS, and the updates of prototypes against float32 sums that forget about rounding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import torch
from scipy.linalg import cho_factor, cho_solve
from streamcl.memory.analytic import Analytic
from streamcl.memory.prototypes import Prototypes
from torch import Tensor

Row = tuple[str, str, float, str]  # what, baseline, ratio, bar
CPU = torch.device("cpu")


def rows(quick: bool = False) -> list[Row]:
    faiss.omp_set_num_threads(torch.get_num_threads())
    return [*accumulator(quick), *recursion(quick), *nearest(quick), *updates(quick)]


def seconds(contenders: dict[str, Callable[[], Any]], repeats: int, warm: int = 0) -> dict[str, float]:
    """The median of each; they take turns, so that the noise of the machine meets all alike, and each first calls `warm` times unseen,
    so that none finds what the one before it left in the caches. The first round warms up.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + (repeats > 1)):
        for name, contender in contenders.items():
            for _ in range(warm):
                contender()
            started = time.perf_counter()
            contender()
            if repeat or repeats == 1:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def accumulator(quick: bool) -> list[Row]:
    samples, dim, classes, ridge = (20_000, 1024, 100, 10.0) if quick else (100_000, 2048, 100, 10.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, dim, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (samples,), generator=generator)
    solved: dict[str, Tensor] = {}

    def cross() -> Tensor:
        return torch.zeros(classes, dim, dtype=torch.float64).index_add_(0, labels, x).T

    def scipy() -> None:
        squares = x.numpy().T @ x.numpy()
        squares.flat[:: dim + 1] += ridge
        solved["scipy"] = torch.from_numpy(cho_solve(cho_factor(squares, overwrite_a=True, check_finite=False), cross().numpy()))

    def plain_torch() -> None:
        squares = x.T @ x
        squares.diagonal().add_(ridge)
        solved["torch"] = torch.cholesky_solve(cross(), torch.linalg.cholesky(squares))

    def accumulated() -> None:
        analytic = Analytic(CPU)
        analytic.configure(dim, ridge)
        for part, own in zip(x.split(256), labels.split(256), strict=True):
            analytic.update(part, own, classes)
        solved["accumulated"] = analytic.weights()

    times = seconds({"scipy": scipy, "torch": plain_torch, "accumulated": accumulated}, 3 if quick else 1)
    error = float((solved["accumulated"] - solved["scipy"]).norm() / solved["scipy"].norm())
    bar = "" if quick else "at most 1.15"
    what = f"accumulator, {samples} x {dim} float64 in batches of 256, with its solve"
    return [
        (what, "one piece, SciPy's syrk and Cholesky", times["accumulated"] / times["scipy"], bar),
        (what, "one piece, torch's gemm and Cholesky", times["accumulated"] / times["torch"], bar),
        (f"{what}: relative difference", "one piece, SciPy", error, "at most 1e-8"),
    ]


def recursion(quick: bool) -> list[Row]:
    dim, classes = (512, 100) if quick else (2048, 100)
    generator = torch.Generator().manual_seed(1)
    out: list[Row] = []
    for batch in (1, 8, 64, 512):
        x = torch.rand(batch, dim, generator=generator, dtype=torch.float64)
        labels = torch.randint(classes, (batch,), generator=generator)
        forms: dict[str, Callable[[], Any]] = {}
        for form in ("accumulated", "recursive"):
            analytic = Analytic(CPU)
            analytic.configure(dim, 10.0, form=form)

            def learn(analytic: Analytic = analytic, x: Tensor = x, labels: Tensor = labels) -> None:
                analytic.update(x, labels, classes)
                analytic.weights()

            forms[form] = learn
        times = seconds(forms, 5)
        took = f"{1000 * times['recursive']:.1f} ms"
        out.append(
            (
                f"recursive, a batch of {batch} x {dim} and its weights ({took})",
                "accumulated and solved anew",
                times["recursive"] / times["accumulated"],
                "",
            )
        )
    return out


def nearest(quick: bool) -> list[Row]:
    classes, dim = (2_000 if quick else 10_000), 512
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(classes, dim, generator=generator)
    prototypes = Prototypes(CPU)
    prototypes.update(means, torch.arange(classes))
    halves, table = means.square().sum(dim=1) / 2, means.numpy()
    index = faiss.IndexFlatL2(dim)
    index.add(table)

    def contenders(x: Tensor) -> dict[str, Callable[[], Any]]:
        return {
            "torch.cdist": lambda: torch.cdist(x, means).min(dim=1),
            "matmul": lambda: torch.addmm(halves, x, means.T, alpha=-1).min(dim=1),
            "FAISS flat": lambda: index.search(x.numpy(), 1),
            "nearest": lambda: prototypes.nearest(x),
        }

    out: list[Row] = []
    for count in (1, 16, 128, 256, 2048):
        x = torch.randn(count, dim, generator=generator)
        times = seconds(contenders(x), 21 if count < 200 else 7, warm=2 if count < 200 else 0)
        plain = min(("torch.cdist", "matmul"), key=times.__getitem__)
        for baseline, bar in ((plain, "" if quick else "at most 1.1"), ("FAISS flat", "")):
            what = f"nearest of {classes} means x {dim}, {count} queries ({1000 * times['nearest']:.2f} ms)"
            out.append((what, baseline, times["nearest"] / times[baseline], bar))
    return out


def updates(quick: bool) -> list[Row]:
    samples, dim, classes = (20_000 if quick else 100_000), 512, 100
    generator = torch.Generator().manual_seed(3)
    x, labels = torch.randn(samples, dim, generator=generator), torch.randint(classes, (samples,), generator=generator)
    out: list[Row] = []
    for kind in ("none", "diagonal", "shared", "full"):
        count = samples // 10 if kind == "full" else samples
        parts = list(zip(x[:count].split(256), labels[:count].split(256), strict=True))

        def ours(kind: Any = kind, parts: list[tuple[Tensor, Tensor]] = parts) -> None:
            prototypes = Prototypes(CPU)
            prototypes.configure(kind)
            for part, own in parts:
                prototypes.update(part, own)

        def plain(kind: str = kind, parts: list[tuple[Tensor, Tensor]] = parts) -> None:
            counts, sums = torch.zeros(classes, dtype=torch.int64), torch.zeros(classes, dim)
            squares = torch.zeros({"none": (0,), "diagonal": (classes, dim), "shared": (dim, dim), "full": (classes, dim, dim)}[kind])
            for part, own in parts:
                counts += own.bincount(minlength=classes)
                sums.index_add_(0, own, part)
                if kind == "diagonal":
                    squares.index_add_(0, own, part.square())
                elif kind == "shared":
                    squares.addmm_(part.T, part)
                elif kind == "full":
                    for label in own.unique().tolist():
                        mine = part[own == label]
                        squares[label].addmm_(mine.T, mine)

        times = seconds({"ours": ours, "plain": plain}, 3)
        what = f"prototypes, covariance {kind}: {count} x {dim} in batches of 256 ({1e6 * times['ours'] / count:.2f} us a sample)"
        out.append((what, "plain sums in float32", times["ours"] / times["plain"], ""))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for which there are no bars")
    for what, baseline, ratio, bar in rows(parser.parse_args().quick):
        print(f"{what:100} {baseline:38} {ratio:10.3g}  {bar}")


if __name__ == "__main__":
    main()
