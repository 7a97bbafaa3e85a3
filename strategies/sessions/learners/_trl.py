"""Runs a learner on a language model: one session is one training by TRL's GRPOTrainer, with the learner's seams in it.

TRL saves nothing and loads nothing here. After each batch of rollouts the run may be saved or stopped: what a session then needs to go on
is its optimiser, how far it got and where the generators stand, and it goes on with the same result.
"""

from __future__ import annotations

import base64
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
from streamcl.errors import ConfigError, TrainingError
from streamcl.learner import Report
from streamcl.nn.language import LanguageModel, language_model
from streamcl.nn.model import Model
from streamcl.seeding import derived, random_state, restore_random
from streamcl.strategy import learning_rate_factor, make_optimizer
from streamcl.stream import StreamInfo, Task

from ._rollouts import Rollouts

if TYPE_CHECKING:
    from ._policy import PolicyLearner
    from ._trainer import Prompted, SessionTrainer

PASS = "session"
FLAT = 5  # batches of rollouts without any variance, one after another, before a person is told
SAMPLES = 10  # answers of a session that are shown
SIDE = 96  # pixels of a picture that is shown beside an answer, at most
TRIED = 4  # rows that the rewards are tried on before anything is learned


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
        self.rows = learner.at_once or mine
        if mine % self.rows:
            raise ConfigError(f"learner.at_once is {self.rows}, and an update has {mine} rows: take a number that divides them")
        self.parts = mine // self.rows
        if learner.shuffles and learner.group % 2:
            raise ConfigError(f"learner.group is {learner.group}, and half as many answers see shuffled frames: take an even number")
        if learner.vllm:
            _check_vllm(context)

    def check(self, task: Task) -> None:
        """What can be known of a task before it is learned: that it can be read again, put to the model, and rewarded."""
        from ._trainer import _names, _repeated, judged

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
        answers, rows = [""] * len(batch), _repeated(batch, 1)
        rows["length"] = torch.zeros(len(batch), dtype=torch.int64)
        for verifier, name in zip(self.learner.rewards, _names(self.learner.rewards), strict=True):
            judged(verifier, name, answers, rows)

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
        weights = [value for value in language.network.parameters() if value.requires_grad]
        if not weights:
            raise ConfigError("nothing of the language model can be trained: every weight is frozen")
        optimizer = make_optimizer(weights, learner.optimizer_settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(learner.schedule, min(step, learner.steps - 1), learner.steps)
        )
        seed = derived(context.seed, "session", task.index) % 2**32
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
        self.flat = 0 if bool(spread.any()) else self.flat + 1
        if self.flat == FLAT:
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
        if not math.isfinite(means["loss"]):
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


@contextmanager
def _as_it_was(language: LanguageModel) -> Iterator[None]:
    """TRL and accelerate wrap the network's forward anew in every session, and set how it computes: afterwards that is undone."""
    network = language.network
    modules: list[nn.Module] = list({id(m): m for m in (network, getattr(network, "get_base_model", lambda: network)())}.values())
    wrapped: list[dict[str, Any]] = [
        {name: vars(module)[name] for name in ("forward", "_original_forward") if name in vars(module)} for module in modules
    ]
    configs = [module.config for module in modules]
    caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    hooks = [(module, set(module._forward_hooks)) for module in network.modules()]
    try:
        yield
    finally:
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
