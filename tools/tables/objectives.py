"""What the objectives of learning by reinforcement do, on a policy that is small enough to measure it: an MLP that answers with a digit.

    python tools/tables/objectives.py [--seeds 3] > docs/results/objectives.md

Three questions: where APO's weights let the policy go from its reference, what a reward model that is against one does to Trust-GRPO,
and whether what forgets least is what stays closest to where it began (RL's Razor). A few minutes on one core.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from streamcl.context import Context
from streamcl.data import ArrayDataset, whole
from streamcl.events import Events
from streamcl.nn.model import Model
from streamcl.options import Optimizer
from streamcl.plugins import find
from streamcl.preparing import Preparation
from streamcl.seeding import generator
from streamcl.stream import Batch, Column, Modality, StreamInfo, Task
from streamcl.verifier import Verifier

CLASSES = tuple(range(10))
NAMES = {label: str(label) for label in CLASSES}


def make(kind: str, name: str, **options: Any) -> Any:
    return find(kind, name).load()(**options)


def digits() -> tuple[Tensor, Tensor]:
    """All of scikit-learn's digits  # (1797, 64) from 0 to 1, (1797,)"""
    data: Any = make("source", "digits").load()
    every: Any = Batch.cat([whole(part) for part in (data.train, data.test)])
    values: Tensor = every.inputs["image"].float().flatten(1)
    return values / values.max(), every.target


class Bench:
    """A policy over ten digits, and samples to ask it about."""

    def __init__(self, inputs: int, hidden: list[int], seed: int) -> None:
        torch.manual_seed(seed)
        self.info = StreamInfo({"vector": Modality("vector", (inputs,))}, classes=10, tasks=1)
        backbone = make("backbone", "mlp", hidden=hidden)
        backbone.build(self.info)
        self.model, self.seed = Model(backbone), seed
        self.model.grow(10)

    def copy(self) -> Bench:
        return copy.deepcopy(self)

    def scores(self, values: Tensor) -> Tensor:
        """ln p of each digit  # (samples, 10)"""
        with torch.no_grad():
            return self.model(Batch({"vector": values}, None, torch.arange(len(values)))).log_softmax(dim=1)

    def supervised(self, rate: float) -> Callable[[Tensor, Tensor], None]:
        """A step of Adam on samples and their labels; the optimiser stays from step to step."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)

        def step(values: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad()
            cross_entropy(self.model(Batch({"vector": values}, None, torch.arange(len(values)))), labels).backward()
            optimizer.step()

        return step

    def reinforce(self, learner: Any, values: Tensor, labels: Tensor, tick: Callable[[], None] | None = None) -> None:
        memory: Any = None
        context = Context(self.model, memory, Events(), Preparation(self.info, {}), seed=self.seed)
        if tick is not None:
            context.tick, context.step_limit = tick, 0
        rows = ArrayDataset({"vector": values}, labels, torch.arange(len(values)))
        task = Task(0, "digits", rows, CLASSES, CLASSES, CLASSES, names=NAMES)
        learner.start(self.info, context)
        learner.check(task)
        context.begin(task, {})
        learner.fit(self.model, task, context)


def adam(rate: float) -> Optimizer:
    return Optimizer(name="adam", lr=rate)


def kl(of: Tensor, to: Tensor) -> Tensor:
    """KL(of || to) of each sample  # (samples,)"""
    return (of.exp() * (of - to)).sum(dim=1)


def told(values: Sequence[float], digits: int = 2) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def warmed_up(seed: int) -> tuple[Bench, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A policy that has seen 60 labels for 60 steps, 1140 other samples to practise on, and the rest."""
    values, labels = digits()
    order = torch.randperm(len(labels), generator=generator(seed, "digits"))
    values, labels = values[order], labels[order]
    bench = Bench(64, [64], seed)
    step = bench.supervised(1e-3)
    for _ in range(60):
        step(values[:60], labels[:60])
    return bench, (values[60:1200], labels[60:1200]), (values[1200:], labels[1200:])


CONTROLS = {"dads": "DADS", "1.0": "1", "0.9": "0.9", "0.7": "0.7", "0.5": "0.5"}

# APO -------------------------------------------------------------------------------------------------------------------------------------


def constant(weight: float, **options: Any) -> Any:
    """APO with the same weight of the divergence everywhere."""

    class Constant(find("learner", "apo").load()):  # type: ignore[misc]
        def kl_weights(self, rollouts: Any, advantages: Tensor) -> Tensor:
            return torch.full_like(advantages, weight)

    return Constant(**options)


def where_the_policy_went(beta: float, weights: str, seed: int) -> tuple[float, float, float]:
    """The mean KL(policy || reference) of hard test samples over that of easy ones, that of all, and the accuracy."""
    bench, practice, (values, labels) = warmed_up(seed)
    before = bench.scores(values)
    options: dict[str, Any] = {"beta": beta, "steps": 600, "prompts": 32, "updates": 1, "optimizer": adam(1e-3)}
    learner = make("learner", "apo", **options) if weights == "dads" else constant(float(weights), **options)
    bench.reinforce(learner, *practice)
    after = bench.scores(values)
    went, hard = kl(after, before), before.gather(1, labels[:, None])[:, 0].exp() < 0.35
    right = float((after.argmax(dim=1) == labels).float().mean())
    return float(went[hard].mean() / went[~hard].mean()), float(went.mean()), 100 * right


def apo(seeds: range) -> None:
    print(
        "## APO: where the reference lets go\n\n"
        "An MLP 64-64-10 that has seen 60 labels for 60 steps practises on 1140 other digits: 8 answers to each of 32 prompts, 600 "
        "updates, Adam at 1e-3, weights W of the divergence as in DADS, or the same everywhere. KL is the mean KL(policy ‖ reference) of "
        "test samples at the end; hard / easy is that of those to which it gave the right digit less than 0.35 at first, over that of "
        "the others.\n\n"
        "| beta | W | hard / easy | KL | accuracy |\n| ---: | --- | --- | --- | --- |"
    )
    found: dict[tuple[float, str], list[tuple[float, float, float]]] = {}
    for beta in (2.0, 0.5):
        for weights in CONTROLS:
            each = found[beta, weights] = [where_the_policy_went(beta, weights, seed) for seed in seeds]
            ratio, went, right = zip(*each, strict=True)
            print(f"| {beta:g} | {CONTROLS[weights]} | {told(ratio)} | {told(went)} | {told(right, 1)} |")
    print()
    for beta in (2.0, 0.5):
        for other in list(CONTROLS)[1:]:
            higher = sum(a > b for (a, *_), (b, *_) in zip(found[beta, "dads"], found[beta, other], strict=True))
            print(f"- At beta {beta:g} hard / easy is higher with DADS than with W = {other} in {higher} of {len(seeds)} seeds.")
    alike = [min(list(CONTROLS)[1:], key=lambda w: abs(found[2.0, w][seed][1] - found[2.0, "dads"][seed][1])) for seed in range(len(seeds))]
    higher = sum(found[2.0, "dads"][seed][0] > found[2.0, alike[seed]][seed][0] for seed in range(len(seeds)))
    print(
        f"- A smaller W alone lets the policy go further. Beside the W that ends nearest in KL (W = {', '.join(alike)}), hard / easy is "
        f"higher with DADS in {higher} of {len(seeds)} seeds at beta 2."
    )


# Trust-GRPO ------------------------------------------------------------------------------------------------------------------------------


def accuracy_against(seed: int, alpha: float, trust: bool, hostile: bool) -> float:
    """Test accuracy after training with a reward model that rates the thinking of wrong answers at 0.6 to 1, of right ones at 0 to 0.4."""
    draw = generator(seed, "reward model")

    class Against(find("learner", "trust_grpo").load()):  # type: ignore[misc]
        def judge(self, answers: Sequence[str], rows: Mapping[str, Column]) -> dict[str, Tensor]:
            wrong = torch.tensor([answer != right for answer, right in zip(answers, rows["answer"], strict=True)])
            return {"thinking": 0.4 * torch.rand(len(answers), generator=draw) + 0.6 * (wrong if hostile else ~wrong)}

    bench, practice, (values, labels) = warmed_up(seed)
    options: dict[str, Any] = {"steps": 300, "prompts": 32, "optimizer": adam(1e-3), "anneal_scope": "none"}
    bench.reinforce(Against(alpha=alpha, trust=trust, **options), *practice)
    return 100 * float((bench.scores(values).argmax(dim=1) == labels).float().mean())


def trust(seeds: range) -> None:
    print(
        "\n## Trust-GRPO: a reward model that is against one\n\n"
        "The same policy, 300 updates, without annealing. The reward model rates the thinking of wrong answers at 0.6 to 1 and that of "
        "right ones at 0 to 0.4 (drawn for each answer), or the other way round. Test accuracy in % of each seed.\n\n"
        "| reward model | alpha | trust weight | accuracy | mean |\n| --- | ---: | --- | --- | ---: |"
    )
    means: dict[tuple[bool, float, bool], float] = {}
    for hostile in (True, False):
        for alpha in (0.3, 1.2, 2.0):
            for weighed in (True, False):
                each = [accuracy_against(seed, alpha, weighed, hostile) for seed in seeds]
                means[hostile, alpha, weighed] = statistics.mean(each)
                names = ("against" if hostile else "for", "on" if weighed else "off")
                print(f"| {names[0]} | {alpha:g} | {names[1]} | {told(each, 1)} | {means[hostile, alpha, weighed]:.1f} |")
    print()
    for alpha in (0.3, 1.2, 2.0):
        gain = means[True, alpha, True] - means[True, alpha, False]
        print(f"- Against one, at alpha {alpha:g}, the trust weight is worth {gain:+.1f} points.")


# RL's Razor ------------------------------------------------------------------------------------------------------------------------------


class Parity(Verifier):
    """1 for any digit that is even where the right one is."""

    def __call__(self, answers: Sequence[str], rows: Mapping[str, Column]) -> Tensor:
        return torch.tensor([float(int(a) % 2 == int(b) % 2) for a, b in zip(answers, rows["answer"], strict=True)])


class Reached(Exception):
    pass


EVEN = (torch.arange(10) % 2 == 0).float()
ENOUGH = 0.93  # accuracy of the new task
BEGINS_WITH = (500, 150, 60)  # samples of the new task


class Razor:
    """Parity of digits is the new task, which digit it is of digits with their pixels in another order the old one; both were learned a
    little, together, and one more input tells which of them is asked."""

    def __init__(self, seed: int, few: int) -> None:
        values, labels = digits()
        draw = generator(seed, "razor")
        order, pixels = torch.randperm(len(labels), generator=draw), torch.randperm(64, generator=draw)
        values, labels, ones = values[order], labels[order], torch.ones(len(labels), 1)
        new, old = torch.cat([values, ones], dim=1), torch.cat([values[:, pixels], 0 * ones], dim=1)
        self.train, self.labels, self.test, self.right = new[:1200], labels[:1200], new[1200:], labels[1200:]
        self.old, self.old_right = old[1200:], labels[1200:]
        self.draw, self.seed = generator(seed, "razor labels"), seed
        self.start = Bench(65, [256, 256], seed)
        step, both = self.start.supervised(1e-3), torch.cat([new[:few], old[:500]])
        for _ in range(150):
            valid = self.valid(labels[:few]).multinomial(1, generator=self.draw)[:, 0]
            rows = torch.randint(len(both), (64,), generator=self.draw)
            step(both[rows], torch.cat([valid, labels[:500]])[rows])
        self.before = self.start.scores(self.test)

    def valid(self, labels: Tensor) -> Tensor:
        """1 for each digit of the same parity  # (samples, 10)"""
        return torch.where(labels[:, None] % 2 == 0, EVEN, 1 - EVEN)

    def scored(self, bench: Bench) -> tuple[float, float, float]:
        """Accuracy of the new task, the forward KL from the start on its inputs, and accuracy of the old task."""
        after = bench.scores(self.test)
        new = (after.argmax(dim=1) % 2 == self.right % 2).float().mean()
        old = (bench.scores(self.old).argmax(dim=1) == self.old_right).float().mean()
        return float(new), float(kl(self.before, after).mean()), float(old)

    def taught(self, how: str, rate: float) -> tuple[float, float] | None:
        """How far a policy went and what it forgot when it was first good enough at the new task; None where it never was."""
        bench = self.start.copy()
        steps = 0

        def look() -> None:
            nonlocal steps
            steps += 1
            if steps % 10 == 0 and self.scored(bench)[0] >= ENOUGH:
                raise Reached

        try:
            if how == "RL":
                options: dict[str, Any] = {"group": 8, "prompts": 64, "beta": 0.0, "scale": "none", "clip": None, "steps": 1500}
                learner = make("learner", "grpo", rewards=(Parity(),), optimizer=adam(rate), **options)
                bench.reinforce(learner, self.train, self.labels, look)
            else:
                self.supervised(bench, how, rate, look)
        except Reached:
            _, far, old = self.scored(bench)
            return far, self.scored(self.start)[2] - old
        return None

    def supervised(self, bench: Bench, how: str, rate: float, look: Callable[[], None]) -> None:
        odd = self.labels % 2
        step = bench.supervised(rate)
        ours = self.start.scores(self.train).exp() * self.valid(self.labels)
        for _ in range(1500):
            rows = torch.randint(len(odd), (64,), generator=self.draw)
            target = odd[rows]
            if how == "SFT-2":
                target = target + 4 * torch.randint(2, (64,), generator=self.draw)
            elif how == "oracle SFT":
                target = ours[rows].multinomial(1, generator=self.draw)[:, 0]
            step(self.train[rows], target)
            look()


def razor(seeds: range) -> None:
    print(
        "\n## RL's Razor: what stays close forgets little\n\n"
        "An MLP 65-256-256-10 has learned something of both, together: digits with their pixels in another order (old, 500 samples), and "
        "whether a digit is even (new, as many as stand in the row; any digit of the right parity is right), by 150 steps of Adam at 1e-3. "
        f"Then it is taught the new task until its accuracy there is {ENOUGH}: with the labels 0 and 1 (SFT-1), with {{0, 4}} and {{1, 5}} "
        "at random (SFT-2), by reinforcement (GRPO without a deviation or a divergence), or with labels drawn from what it said itself, "
        "the wrong ones left out (oracle SFT). Of each seed, at the learning rate of 1e-4, 3e-4 and 1e-3 at which it forgets least: F = "
        "KL(before ‖ after) on inputs of the new task, and by how much the accuracy of the old one fell.\n\n"
        "| new samples | | drop of the old accuracy | F |\n| ---: | --- | --- | --- |"
    )
    hows, said = ("SFT-1", "SFT-2", "RL", "oracle SFT"), []
    for few in BEGINS_WITH:
        found: dict[str, list[tuple[float, float]]] = {how: [] for how in hows}
        starts = []
        for seed in seeds:
            bench = Razor(seed, few)
            starts.append(bench.scored(bench.start))
            for how in hows:
                reached = [ends for rate in (1e-4, 3e-4, 1e-3) if (ends := bench.taught(how, rate)) is not None]
                found[how].append(min(reached, key=lambda ends: ends[1], default=(math.nan, math.nan)))
        for how in hows:
            far, drops = zip(*found[how], strict=True)
            print(f"| {few} | {how} | {told(drops)} | {told(far, 1)} |")
        less = [
            f"{first} < {second} in {sum(a[1] < b[1] for a, b in zip(found[first], found[second], strict=True))}"
            for first, second in (("oracle SFT", "RL"), ("RL", "SFT-2"), ("RL", "SFT-1"), ("SFT-2", "SFT-1"))
        ]
        orders = [[sorted(hows, key=lambda how: found[how][seed][by]) for seed in range(len(seeds))] for by in (0, 1)]
        alike = sum(a == b for a, b in zip(*orders, strict=True))
        begun = f"begins at {told([new for new, _, _ in starts])} (new) and {told([old for _, _, old in starts])} (old)"
        said.append(
            f"- With {few} samples it {begun}. Forgetting, of {len(seeds)} seeds: {', '.join(less)}; F has the same order in {alike}."
        )
    print("\n" + "\n".join(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print(
        "# Objectives: what they do to a small policy\n\n"
        f"Seeds 0 to {seeds[-1]}, in this order in each cell. The small loop runs the learners of `strategies/sessions/learners`.\n\n"
        "Made by `python tools/tables/objectives.py > docs/results/objectives.md`.\n"
    )
    apo(seeds)
    trust(seeds)
    razor(seeds)


if __name__ == "__main__":
    main()
