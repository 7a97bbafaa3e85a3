"""Runs a learner on a language model: one session is one training by TRL's GRPOTrainer, with the learner's seams in it.

TRL saves nothing and loads nothing here. After each batch of rollouts the run may be saved or stopped: what a session then needs to go on
is its optimiser, how far it got and where the generators stand, and it goes on with the same result.
"""

from __future__ import annotations

import base64
import copy
import gc
import io
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from streamcl.context import Context
from streamcl.data import ArrayDataset, FileDataset, Joined, Masked, SinglePass, Subset, Told, View
from streamcl.errors import ConfigError, DataError, TrainingError
from streamcl.learner import Report
from streamcl.nn.language import LanguageModel, language_model
from streamcl.nn.model import Model
from streamcl.seeding import derived, random_state, restore_random
from streamcl.strategy import learning_rate_factor, make_optimizer
from streamcl.stream import Batch, Column, Dataset, StreamInfo, Task

from ._judging import judged, names_of, repeated
from ._loop import SILENT
from ._rollouts import Rollouts

if TYPE_CHECKING:
    from ._policy import PolicyLearner
    from ._trainer import Prompted, SessionTrainer

PASS = "session"
FLAT = 5  # batches of rollouts without any variance, one after another, before a person is told
SAMPLES = 10  # answers of a session that are shown
SIDE = 96  # pixels of a picture that is shown beside an answer, at most
LARGE, AT_ONCE = 100_000_000, 8  # of a model with more weights so few rows go through forward and backward together
SHOWN = ("image", "video")  # kinds of modalities that are pictures to a language model
TRIED = 4  # rows that the rewards are tried on before anything is learned
LOOKED_AT = 256  # rows at once, where their prompts are measured before that


class LanguageSession:
    def __init__(self, learner: PolicyLearner) -> None:
        self.learner = learner
        self.updates = 0  # of all sessions so far
        self.saved: dict[str, Any] = {}  # of a session that was interrupted
        self.running: SessionTrainer | None = None

    # -- before anything is learned -----------------------------------------------------------------------------------------------

    def start(self, info: StreamInfo, context: Context) -> None:
        from ._trainer import check_library

        check_library()
        learner, language = self.learner, language_model(context.model)
        assert language is not None
        self.info, self.language = info, language
        if getattr(language, "processor", None) is None:
            raise ConfigError(
                "the language model has no processor to make its inputs of words and pictures: take one that is saved with one"
            )
        rows, world = learner.prompts * learner.group, context.world
        if learner.prompts % world:
            raise ConfigError(f"learner.prompts is {learner.prompts}, which {world} processes cannot share: take a multiple of {world}")
        if rows % (learner.updates * world):
            raise ConfigError(
                f"learner: {learner.prompts} prompts of {learner.group} answers are {rows} rows, which cannot be learned from in "
                f"{learner.updates} updates of equal size{f' on {world} processes' if world > 1 else ''}"
            )
        mine = rows // learner.updates // world
        self.rows = learner.at_once or self._usual(mine)
        if mine % self.rows:
            raise ConfigError(f"learner.at_once is {self.rows}, and an update has {mine} rows: take a number that divides them")
        self.parts = mine // self.rows
        if learner.shuffles and learner.group % 2:
            raise ConfigError(f"learner.group is {learner.group}, and half as many answers see shuffled frames: take an even number")
        if learner.shuffles and not any(modality.kind == "video" and modality.shape[:1] > (1,) for modality in info.modalities.values()):
            raise ConfigError(
                f"learner: {type(learner).__name__} also answers with frames in random order, and this stream has no modality of kind "
                "video with several frames: take another learner, such as grpo"
            )
        if learner.vllm:
            _check_vllm(context)

    def _usual(self, mine: int) -> int:
        """How many of an update's rows go through the model together where nobody says."""
        if sum(value.numel() for value in self.language.network.parameters()) <= LARGE:
            return mine
        return max(rows for rows in range(1, min(mine, AT_ONCE) + 1) if mine % rows == 0)

    def check(self, task: Task) -> None:
        """What can be known of a task before it is learned: that it can be read again, put to the model, and rewarded."""
        if not hasattr(task.train, "read"):
            raise ConfigError(f"{task.name} is a live source, and a session goes through its prompts by their index: record it first")
        first = task.train[torch.arange(min(TRIED, len(task.train)))]
        batch = self.learner.context.preparation(first, False, torch.Generator())
        processor, sign = self.language.processor, getattr(self.language.processor, "image_token", None)
        for row, shown in zip(self.language.conversations(batch), self.language.pictures(batch), strict=True):
            prompt = processor.apply_chat_template(row, tokenize=False, add_generation_prompt=True)
            if sign is not None and prompt.count(sign) != len(shown):
                raise ConfigError(
                    f"{task.name}: the model's chat template makes {prompt.count(sign)} places in a prompt for its {len(shown)} pictures: "
                    "take a processor whose template has a place for each"
                )
        answers, rows = [""] * len(batch), repeated(batch, 1)
        rows["length"] = torch.zeros(len(batch), dtype=torch.int64)
        for verifier, name in zip(self.learner.rewards, names_of(self.learner.rewards), strict=True):
            judged(verifier, name, answers, rows)
        self.learner.judge(answers, rows)
        unseen = _without_inputs(task.train)
        if unseen is not None and len(unseen):
            self._check_all(task, unseen[torch.arange(len(unseen))])
        for raw in task.train.batches(LOOKED_AT):
            self.language.check_rows(self.learner.context.preparation(raw, False, torch.Generator()))

    def _check_all(self, task: Task, rows: Batch) -> None:
        """What is told of all rows without their pictures."""
        answers = rows.extra.get("answer")
        empty = [place for place, answer in enumerate(answers) if not str(answer).strip()] if isinstance(answers, list) else []
        if empty:
            first = ", ".join([str(int(rows.ids[place])) for place in empty[:SAMPLES]] + ["..."] * (len(empty) > SAMPLES))
            raise DataError(f"{task.name}: {len(empty)} of {len(rows)} rows have no right answer (rows {first}): take them out")
        present, kinds = rows.present or {}, {name: modality.kind for name, modality in self.info.modalities.items()}
        masks = {name: present.get(name, torch.ones(len(rows), dtype=torch.bool)) for name, kind in kinds.items() if kind in SHOWN}
        if not masks:
            return
        without = int((~torch.stack(list(masks.values())).any(dim=0)).sum())
        if without:
            self.learner.context.events.warn(
                f"{task.name}: {without} of {len(rows)} rows show no picture, and are put to the model without one"
            )
        if self.learner.shuffles and not any(bool(mask.any()) for name, mask in masks.items() if kinds[name] == "video"):
            self.learner.context.events.warn(
                f"{task.name}: no row has frames, so that nothing is shuffled, and {type(self.learner).__name__} rewards no order here"
            )

    # -- a session ----------------------------------------------------------------------------------------------------------------

    def fit(self, model: Model, task: Task, context: Context) -> Report:
        learner, saved = self.learner, self.saved
        self.task, self.context, self.seen = task, context, int(saved.get("step", 0))
        self.history: dict[str, list[float]] = {name: list(values) for name, values in saved.get("history", {}).items()}
        self.flat = int(saved.get("flat", 0))
        context.passes[PASS] = [0, self.seen]
        context.position = {"pass": PASS, "epochs": 1, "epoch": 0, "steps": learner.steps}
        if self.seen < learner.steps:
            self._train()
        self.updates, self.saved = self.updates + learner.steps, {}
        context.passes[PASS] = [1, 0]
        return Report(self._figures())

    def _train(self) -> None:
        from ._trainer import AtBoundaries, Prompts, SessionTrainer, settings

        learner, language, context, task = self.learner, self.language, self.context, self.task
        weights = language.trainable()
        optimizer = make_optimizer(weights, learner.optimizer_settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(learner.schedule, min(step, learner.steps - 1), learner.steps)
        )
        seed = derived(context.seed, "session", task.index) % 2**32
        self.silent = False
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _as_it_was(language):
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, on names that TRL still has for options and attributes
            trainer = self.running = SessionTrainer(
                learner,
                language,
                Prompts(learner, language, task, context, self.parts, self.seen),
                self._told,
                self.updates,
                args=settings(learner, context, folder, seed, language.longest, self.rows, self.parts),
                optimizers=(optimizer, schedule),
                callbacks=[AtBoundaries(self._begin, self._boundary, learner)],
            )
            try:
                trainer.train()
            finally:
                self.running = None
                _shut_down(trainer)
                optimizer.zero_grad(set_to_none=True)
                optimizer.state.clear()  # the trainer is in cycles, and would hold it until garbage is next collected

    def _begin(self) -> None:
        """The trainer is made, which has drawn from every generator: a session that was stopped is put back here."""
        trainer, saved = self.running, self.saved
        assert trainer is not None
        if saved:
            trainer.state.global_step = saved["step"]
            assert trainer.optimizer is not None and trainer.lr_scheduler is not None
            trainer.optimizer.load_state_dict(saved["optimizer"])
            trainer.lr_scheduler.load_state_dict(saved["schedule"])
            restore_random(saved["random"])

    def _told(self, rollouts: Rollouts, earned: Tensor, inputs: Prompted, answers: Sequence[str]) -> None:
        """A batch of rollouts was made, and is to be learned from."""
        groups = rollouts.grouped(earned)
        spread = groups.nan_to_num(-math.inf).amax(dim=1) > groups.nan_to_num(math.inf).amin(dim=1)
        figures = {
            "reward": earned.nanmean(),
            **{f"reward/{name}": column.nanmean() for name, column in zip(rollouts.columns, rollouts.rewards.T, strict=True)},
            "length": rollouts.lengths.float().mean(),
            "flat": 1 - spread.float().mean(),
        }
        if rollouts.drift is not None:
            u = rollouts.drift
            figures["kl"] = ((u.expm1() - u) * rollouts.mask).sum() / rollouts.mask.sum().clamp(min=1)
        self.figures = {name: float(value) for name, value in figures.items()} | self.learner.figures(rollouts)
        self.tokens = float(rollouts.lengths.sum())
        silent = bool(earned.isnan().all())
        if silent and not self.silent:
            self.context.events.warn(SILENT)
        self.silent = silent
        self.flat = 0 if bool(spread.any()) else self.flat + 1
        if self.flat == FLAT and not silent:
            self.context.events.warn(
                f"no group has variance: in {FLAT} batches of rollouts, one after another, all answers to a prompt earned the same "
                f"({self.figures['reward']:.3g} on average), so that nothing is learned from rewards: take easier or harder prompts, more "
                "answers to each (learner.group), a reward with degrees, or warm the model up (a session of sft)"
            )
        batches = -(-self.learner.steps // self.learner.updates)
        if rollouts.step // self.learner.updates % max(1, batches // SAMPLES) == 0:
            self._show(rollouts, earned, inputs, answers)

    def _show(self, rollouts: Rollouts, earned: Tensor, inputs: Prompted, answers: Sequence[str]) -> None:
        row = inputs[0]
        words = [part["text"] for message in row["prompt"] if message["role"] == "user" for part in _parts(message) if "text" in part]
        rewards = {name: _number(value) for name, value in zip(rollouts.columns, rollouts.rewards[0], strict=True)}
        picture = _picture(row.get("images", ()))
        self.context.events.emit(
            "sample",
            task=self.task.index,
            step=rollouts.step,
            global_step=self.context.steps,
            question="\n".join(words),
            answer=answers[0],
            reward=_number(earned[0]),
            rewards=rewards,
            length=int(rollouts.lengths[0]),
            **({} if picture is None else {"picture": picture}),
        )

    def _boundary(self) -> None:
        """A batch of rollouts is learned: the state is consistent until the next one is made."""
        trainer, context = self.running, self.context
        assert trainer is not None and trainer.lr_scheduler is not None
        means = {name: float(torch.stack(values).mean()) for name, values in trainer.watched.items()}
        trainer.watched.clear()
        trainer._metrics["train"].clear()
        figures = {**self.figures, **means}
        for name, value in {**figures, "tokens": self.tokens}.items():
            self.history.setdefault(name, []).append(value)
        step = trainer.state.global_step
        if trainer._most(int(not math.isfinite(means["loss"]))):  # on any process
            raise TrainingError(f"the loss is {means['loss']} at update {step} of the session")
        context.steps += step - self.seen
        context.samples += self.learner.prompts
        context.passes[PASS], self.seen = [0, step], step
        context.log(lr=trainer.lr_scheduler.get_last_lr()[0], **{name: value for name, value in figures.items() if not math.isnan(value)})
        context.save_point()

    def _figures(self) -> dict[str, float]:
        """Of the last quarter of a session; tokens and flat groups of the whole."""
        figures: dict[str, float] = {}
        for name, values in self.history.items():
            known = [value for value in values if not math.isnan(value)]
            if name == "tokens":
                figures["tokens"] = sum(known)
            elif known:
                last = known if name == "flat" else known[-max(1, len(known) // 4) :]
                figures[name] = sum(last) / len(last)
        return figures

    # -- state --------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        inside, trainer = self.saved, self.running
        if trainer is not None:
            assert trainer.optimizer is not None and trainer.lr_scheduler is not None
            inside = {
                "step": trainer.state.global_step,
                "optimizer": trainer.optimizer.state_dict(),
                "schedule": trainer.lr_scheduler.state_dict(),
                "random": random_state(),
                "history": self.history,
                "flat": self.flat,
            }
        return {"updates": self.updates, "inside": inside}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.updates, self.saved = int(state["updates"]), dict(state["inside"])


def _check_vllm(context: Context) -> None:
    from trl.import_utils import is_vllm_available

    if context.device.type != "cuda":
        raise ConfigError("learner.vllm samples on a GPU, and the device is a CPU: leave vllm out, or set engine.device=cuda")
    if not is_vllm_available():
        raise ConfigError("learner.vllm is set and vLLM is not installed, or in a version that TRL does not take: pip install 'trl[vllm]'")


def _without_inputs(dataset: Dataset) -> Any:
    """The same rows with their columns and nothing in `inputs`, so that no picture is read; None for kinds of data that we do not know."""
    if type(dataset) is SinglePass:  # a look at the columns is no reading
        return _without_inputs(dataset.dataset)
    made: Any = copy.copy(dataset)
    if type(dataset) is ArrayDataset:
        made.inputs = {}
    elif type(dataset) is FileDataset:
        made.decode, made.workers = _nothing, 0
    elif type(dataset) is Joined:
        made.datasets = [_without_inputs(part) for part in dataset.datasets]
        return None if any(part is None for part in made.datasets) else made
    elif type(dataset) in (Subset, View, Told, Masked):
        made.dataset = _without_inputs(made.dataset)
        return None if made.dataset is None else made
    else:
        return None
    return made


def _nothing(rows: list[int]) -> dict[str, Column]:
    return {}


def _shut_down(trainer: SessionTrainer) -> None:
    """Each session makes an engine of vLLM's, and two do not fit: the old one gives its memory back. Read in its source and not run."""
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        return
    core = getattr(getattr(generation.llm, "llm_engine", None), "engine_core", None)
    if hasattr(core, "shutdown"):
        core.shutdown()
    del trainer.vllm_generation, generation.llm
    gc.collect()
    torch.cuda.empty_cache()


def _droppers(network: nn.Module) -> list[tuple[Any, str, float]]:
    """Where a network keeps its rates of dropout: layers for it, numbers of other layers, and configurations that these look at."""
    configs = [vars(module)["config"] for module in network.modules() if hasattr(vars(module).get("config"), "__dict__")]
    found: dict[tuple[int, str], tuple[Any, str, float]] = {}
    for holder in (*network.modules(), *configs):
        own = isinstance(holder, nn.modules.dropout._DropoutNd)
        for name, value in vars(holder).items():
            if isinstance(value, float) and value > 0 and ("drop" in name or (own and name == "p")):
                found[id(holder), name] = (holder, name, value)
    return list(found.values())


@contextmanager
def _as_it_was(language: LanguageModel) -> Iterator[None]:
    """TRL and accelerate wrap the network's forward anew in every session, and set how it computes: afterwards that is undone.

    Dropout is off meanwhile: what sampled, what is learned, and the reference must each be one policy. Its rates are set to 0, since in
    evaluation mode activations would not be computed again on the way back.
    """
    network = language.network
    modules: list[nn.Module] = list({id(m): m for m in (network, getattr(network, "get_base_model", lambda: network)())}.values())
    wrapped: list[dict[str, Any]] = [
        {name: vars(module)[name] for name in ("forward", "_original_forward") if name in vars(module)} for module in modules
    ]
    configs = [module.config for module in modules]
    caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    hooks = [(module, set(module._forward_hooks)) for module in network.modules()]
    droppers = _droppers(network)
    for holder, name, _ in droppers:
        setattr(holder, name, 0.0)
    try:
        yield
    finally:
        for holder, name, rate in droppers:
            setattr(holder, name, rate)
        for module, before in zip(modules, wrapped, strict=True):
            for name in ("forward", "_original_forward"):
                vars(module).pop(name, None)
            vars(module).update(before)
        for config, cache in caches:
            config.use_cache = cache
        if getattr(network, "is_gradient_checkpointing", False):
            network.gradient_checkpointing_disable()
        for module, known in hooks:  # one more came with every batch of rollouts, where activations are computed again
            for number in set(module._forward_hooks) - known:
                if "make_inputs_require_grads" in getattr(module._forward_hooks[number], "__qualname__", ""):
                    del module._forward_hooks[number]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def _picture(images: Sequence[Any]) -> str | None:
    """A row's pictures side by side as a small PNG, in base64."""
    from PIL import Image

    shown = [image.copy() for image in images if isinstance(image, Image.Image)]
    if not shown:
        return None
    for image in shown:
        image.thumbnail((SIDE, SIDE))
    canvas = Image.new("RGB", (sum(image.width for image in shown), max(image.height for image in shown)))
    left = 0
    for image in shown:
        canvas.paste(image, (left, 0))
        left += image.width
    written = io.BytesIO()
    canvas.save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()
