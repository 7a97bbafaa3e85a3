"""TRL's GRPOTrainer with a learner's seams in it: what is rewarded, how advantages follow, and the loss are the learner's.

TRL's part is to make prompts of conversations and pictures, to sample, and to tell ln p of what was sampled; the rest of a step is here.
Its internals move from version to version: TESTED are those that this file was run on, and HOOKS what it takes for granted of them.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from streamcl.context import Context
from streamcl.errors import ConfigError, DataError, StreamclError, TrainingError
from streamcl.nn.language import LanguageModel
from streamcl.seeding import generator
from streamcl.stream import Batch, Task

from ._judging import judged, names_of, repeated
from ._loop import disordered
from ._policy import PolicyLearner, divergence
from ._rollouts import Rollouts

try:
    import trl
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    raise ConfigError(
        f"learners by reinforcement of language models need {error.name}, which is not installed: pip install 'streamcl[rl]'"
    ) from None

VLLM_SHARE = 0.3  # of the GPU's memory, for vLLM's weights and what it caches
TESTED = ((1, 16), (1, 17))  # from the first to before the second
HOOKS: dict[str, tuple[str, ...]] = {
    "get_train_dataloader": (),
    "_tokenize_prompts": ("prompts",),
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": (
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ),
    "_compute_loss": ("model", "inputs"),
    "_send_telemetry": (),
}


def check_library() -> None:
    """Refuse a TRL whose inner functions are not those that are overridden here."""
    first, last = TESTED
    told = f"TRL {trl.__version__} is installed"
    if not first <= tuple(map(int, re.findall(r"\d+", trl.__version__)[:2])) < last:
        first_told, last_told = (".".join(map(str, version)) for version in TESTED)
        raise ConfigError(f"{told}, and learners were tested on {first_told} up to, and without, {last_told}: pip install 'streamcl[rl]'")
    for name, wanted in HOOKS.items():
        function = getattr(GRPOTrainer, name, None)
        taken = () if function is None else tuple(inspect.signature(function).parameters)[1:]
        if function is None or taken[: len(wanted)] != wanted:
            raise ConfigError(
                f"{told}, and its GRPOTrainer.{name} takes ({', '.join(taken)}) where ({', '.join(wanted)}) was tested: "
                "pip install --force-reinstall 'streamcl[rl]'"
            )


class Prompted(list):
    """The rows of one batch of rollouts in the form that TRL takes, and the batch of prompts that they were made of."""

    batch: Batch


class Prompts:
    """The batches of prompts that are left of a session, each one `group` times; empty where TRL goes on with what it has.

    Their order depends on the seed and the task alone: that of the task where it is ordered, else shuffled anew each time through. The
    data is gone through as often as `steps` ask for, and a batch may hold a prompt twice where the task has fewer.
    """

    def __init__(self, learner: PolicyLearner, language: LanguageModel, task: Task, context: Context, parts: int, done: int) -> None:
        self.learner, self.language, self.task, self.context = learner, language, task, context
        self.parts, self.left, self.begun = parts, learner.steps - done, done // learner.updates

    def __len__(self) -> int:
        return self.left * self.parts

    def order(self) -> Tensor:
        """The rows of the batches that are left, on this process  # (batches x prompts,)"""
        count, prompts = len(self.task.train), self.learner.prompts
        whole = -(-self.learner.steps // self.learner.updates) * prompts
        passes = range(-(-whole // count))
        if self.task.about.get("ordered"):
            order = torch.arange(count).repeat(len(passes))
        else:
            seed, index = self.context.seed, self.task.index
            order = torch.cat([torch.randperm(count, generator=generator(seed, "session", index, turn)) for turn in passes])
        mine = order[self.begun * prompts : whole].view(-1, self.context.world, prompts // self.context.world)
        return mine[:, self.context.rank].flatten()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        each = self.learner.updates * self.parts  # micro-batches of one batch of rollouts
        waiting = len(self)
        reader = self.task.train.read(self.order(), self.learner.prompts // self.context.world)
        for number, raw in enumerate(reader, self.begun):
            yield self.rows(raw, number)
            for _ in range(min(each, waiting) - 1):
                yield Prompted()
            waiting -= each

    def rows(self, raw: Batch, number: int) -> Prompted:
        drawn = generator(self.context.seed, "session's transforms", self.task.index, number)
        batch = self.context.preparation(raw, True, drawn)
        messages, pictures = self.language.conversations(batch), self.language.pictures(batch)
        shown = any(pictures)
        rows = Prompted()
        rows.batch = batch
        for prompt, images in zip(messages, pictures, strict=True):
            rows += [{"prompt": prompt, **({"images": images} if shown else {})}] * self.learner.group
        return rows


class SessionTrainer(GRPOTrainer):
    """GRPOTrainer for one session of a learner; `told` hears of each batch of rollouts, and `before` are the updates of earlier sessions.

    TRL's own beta is 0: where the learner has one, ln p of the reference comes from the policy that the language model keeps under that
    name, and never from files that a name in the configuration leads to.
    """

    def __init__(
        self, learner: PolicyLearner, language: LanguageModel, prompts: Prompts, told: Callable[..., None], before: int, **options: Any
    ) -> None:
        from datasets import Dataset

        self.learner, self.language, self.prompts, self.told = learner, language, prompts, told
        self.updates_before = before  # in all sessions before this one
        self.names = names_of(learner.rewards)
        self.watched: dict[str, list[Tensor]] = defaultdict(list)  # since the last batch of rollouts
        rewards: list[Any] = list(learner.rewards)
        super().__init__(
            model=language.network,
            reward_funcs=rewards,
            train_dataset=Dataset.from_dict({"row": [0]}),  # TRL wants one; what is read comes from `prompts`
            processing_class=language.processor,
            **options,
        )
        self.remove_callback(PrinterCallback)
        taken = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[1:]
        self.fields = taken[len(HOOKS["_get_per_token_logps_and_entropies"]) :]  # what a network takes of pictures

    def _send_telemetry(self) -> None:
        pass

    def get_train_dataloader(self) -> Any:
        return self.prompts

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], Any, Any]:
        ids, images, fields = super()._tokenize_prompts(prompts)
        longest = max(map(len, ids))
        room = getattr(self.language.network.config.get_text_config(), "max_position_embeddings", None)
        with self._agreed():
            if room is not None and longest + self.max_completion_length > room:
                raise DataError(
                    f"a prompt has {longest} tokens and its answer may have {self.max_completion_length}, and the model reads {room} in "
                    "all: leave such rows out, take smaller pictures, or fewer tokens for an answer (longest)"
                )
        return ids, images and [shown or [] for shown in images], fields  # processors take no None for a row without pictures

    # -- rollouts ---------------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: Prompted) -> dict[str, Any]:  # type: ignore[override]  # what `prompts` gives
        learner, accelerator = self.learner, self.accelerator
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        extra = dict(self.judged)
        if learner.shuffles:
            extra["shuffled"] = self._shuffled(inputs)
        drift = None
        if learner.beta > 0:
            reference = self._logps(output, learner.reference)
            if learner.estimator is not None:
                output["ref_per_token_logps"] = reference
            else:
                policy = output.get("old_per_token_logps")
                drift = reference - (self._logps(output) if policy is None else policy)
        step = self.state.global_step
        rollouts = Rollouts(
            rewards=self.scored,
            weights=self.reward_weights.to(self.scored.device),
            columns=tuple(self.names),
            mask=self._gathered(mask),
            group=learner.group,
            drift=None if drift is None else self._gathered(drift),
            step=step,
            steps=learner.steps,
            stream_step=self.updates_before + step,
            stream_steps=learner.steps * max(learner.info.tasks or 1, self.prompts.task.index + 1),
            extra={name: accelerator.gather(values.to(mask.device)) for name, values in extra.items()},
        )
        earned = learner.shaped(rollouts)
        advantages = learner.advantages(rollouts, earned)
        weights = learner.kl_weights(rollouts, advantages)
        mine = slice(accelerator.process_index * len(mask), (accelerator.process_index + 1) * len(mask))
        output["advantages"] = advantages[mine] if advantages.dim() == 1 else advantages[mine, : mask.shape[1]]
        if weights is not None:
            output["kl_weights"] = weights[mine]
        self.told(rollouts, earned, inputs, self.answers)
        return output

    def _calculate_rewards(self, inputs: Prompted, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        self.answers = self._texts(completion_ids_list)
        rows = repeated(inputs.batch, self.learner.group)
        rows["length"] = torch.tensor([len(ids) for ids in completion_ids_list])
        with self._agreed():
            columns = [judged(verifier, name, self.answers, rows) for verifier, name in zip(self.learner.rewards, self.names, strict=True)]
            self.judged = self.learner.judge(self.answers, rows)
        self.scored: Tensor = self.accelerator.gather(torch.stack(columns, dim=1).to(self.accelerator.device))
        return self.scored

    @torch.no_grad()
    def _logps(self, output: Mapping[str, Any], policy: str | None = None) -> Tensor:
        """ln p of the tokens that were sampled, by a policy that the language model keeps, or by the one at hand  # (N, T)"""
        if policy is not None:
            with self.language.policy(policy):
                return self._logps(output)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        seen = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        fields = {name: output[name] for name in self.fields if name in output}
        return self._get_per_token_logps_and_entropies(
            self.model, ids, seen, output["completion_ids"].shape[1], batch_size=self.args.per_device_train_batch_size, **fields
        )[0]

    def _shuffled(self, inputs: Prompted) -> Tensor:
        """The mean outcome of half as many answers to each prompt with its frames in another order, NaN without frames  # (N,)"""
        from trl.data_utils import prepare_multimodal_messages

        group, half, batch = self.learner.group, self.learner.group // 2, inputs.batch
        outcome = torch.full((len(batch),), torch.nan)
        frames = moving_rows(batch, self.learner.info.modalities)
        moving = [row for row in range(len(batch)) if frames[row] and len(inputs[row * group].get("images", ())) > 1]
        prompts = []
        for row in moving:
            images = inputs[row * group]["images"]
            shown = [images[place] for place in disordered(1, len(images), torch.default_generator)[0].tolist()]
            prompts += [prepare_multimodal_messages(inputs[row * group]["prompt"], images=shown)] * half
        # Processes sample together and equally much: one with fewer videos fills up with its first row, whose answers are dropped.
        lacking = self._most(len(moving)) - len(moving)
        if lacking:
            first = inputs[0]["prompt"]
            prompts += [prepare_multimodal_messages(first, images=inputs[0]["images"]) if "images" in inputs[0] else first] * half * lacking
        if prompts:
            metrics, self._metrics = self._metrics, {"train": defaultdict(list), "eval": defaultdict(list)}
            self.num_generations = half
            try:
                answered = self._generate(prompts)[1]
            finally:
                self._metrics, self.num_generations = metrics, group
            answered = answered[: half * len(moving)]
            with self._agreed():
                if moving:
                    rows = repeated(batch[moving], half)
                    rows["length"] = torch.tensor([len(ids) for ids in answered])
                    scored = judged(self.learner.rewards[0], self.names[0], self._texts(answered), rows)
                    outcome[moving] = scored.view(-1, half).nanmean(dim=1).cpu()
        return outcome.repeat_interleave(group).to(self.accelerator.device)

    def _texts(self, ids: list) -> list[str]:
        return self.language.processor.batch_decode(ids, skip_special_tokens=True)

    def _most(self, count: int) -> int:
        """The largest count of all processes."""
        return count if self.accelerator.num_processes == 1 else int(self.accelerator.gather(self._told_of(count)).max())

    def _told_of(self, count: int) -> Tensor:
        return torch.tensor([count], device=self.accelerator.device)

    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """What fails on one process stops all of them; alone the others would wait for it. Nothing inside may speak to another process."""
        failed: StreamclError | None = None
        try:
            yield
        except StreamclError as error:
            failed = error
        elsewhere = self._most(int(failed is not None))
        if failed is not None:
            raise failed
        if elsewhere:
            raise TrainingError("another process stopped at an error, which it names")

    def _gathered(self, values: Tensor) -> Tensor:
        """(N, T) of all processes, the shorter ones filled up with 0."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=1))

    # -- loss -------------------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        learner = self.learner
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        policy, entropies, balance = self._get_per_token_logps_and_entropies(
            model,
            ids,
            seen,
            mask.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in self.fields if name in inputs},
        )
        old = inputs.get("old_per_token_logps")
        old = policy.detach() if old is None else old
        reference, advantages = inputs.get("ref_per_token_logps"), inputs["advantages"]
        if "importance_sampling_ratio" in inputs:  # of the library that sampled: it multiplies a token's loss, and is never negative
            advantages = (advantages[:, None] if advantages.dim() == 1 else advantages) * inputs["importance_sampling_ratio"]
        tokens = self._tokens()
        loss = learner.loss(policy, old, advantages, mask, self.max_completion_length, reference, inputs.get("kl_weights"), tokens)
        if balance is not None:
            loss = loss + self.router_aux_loss_coef * balance
        own = getattr(self.language, "auxiliary_loss", None)  # of experts in the backbone
        if own is not None:
            loss = loss + own()
        tokens, policy = mask.sum().clamp(min=1), policy.detach()
        self.watched["loss"].append(loss.detach())
        self.watched["entropy"].append((entropies.detach() * mask).sum() / tokens)
        moved = (policy - old).expm1()
        self.watched["clipped"].append((((moved > learner.clip_high) | (moved < -learner.clip_low)) & (mask > 0)).sum() / tokens)
        if reference is not None:
            self.watched["kl"].append((divergence(policy, reference, "k3") * mask).sum() / tokens)
        return loss / self.current_gradient_accumulation_steps

    def _tokens(self) -> Tensor | None:
        """Tokens of a part of the update at hand, on average over its parts and processes: each part's mean over tokens is then its share
        of the whole's. None where the part is the whole."""
        args: Any = self.args
        parts, world = self.prompts.parts, self.accelerator.num_processes
        if parts * world == 1:
            return None
        place = self._step % parts
        if place == 0:
            start = self._step % args.steps_per_generation
            held: Any = self._buffered_inputs
            count = sum((part["completion_mask"] * part.get("tool_mask", 1)).sum() for part in held[start : start + parts])
            self.tokens = self.accelerator.gather(count.reshape(1)).sum() / (parts * world)
        return self.tokens


class AtBoundaries(TrainerCallback):
    """Puts a session back where it was stopped, and says when a batch of rollouts is over."""

    def __init__(self, begin: Callable[[], None], boundary: Callable[[], None], learner: PolicyLearner) -> None:
        self.begin, self.boundary, self.learner = begin, boundary, learner

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.learner.updates == 0 or state.global_step >= self.learner.steps:
            self.boundary()


def settings(learner: PolicyLearner, context: Context, folder: str, seed: int, longest: int, rows: int, parts: int) -> GRPOConfig:
    """TRL's options: every one whose default has moved between its versions, or would do something that is done here, is said."""
    on_cpu = context.device.type == "cpu"
    config = GRPOConfig(
        output_dir=folder,
        seed=seed,
        use_cpu=on_cpu,
        bf16=context.precision == "bfloat16",
        fp16=context.precision == "float16",
        gradient_checkpointing=not on_cpu,
        gradient_checkpointing_kwargs=None if on_cpu else {"use_reentrant": False},
        max_steps=learner.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=parts,
        steps_per_generation=learner.updates * parts,
        num_iterations=1,
        max_grad_norm=learner.clip or 0.0,
        remove_unused_columns=False,
        shuffle_dataset=False,
        num_generations=learner.group,
        max_completion_length=longest,
        temperature=learner.temperature,
        top_p=learner.top_p,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        reward_weights=[float(verifier.weight) for verifier in learner.rewards],
        # The loss is the learner's: these are what it would be by default.
        beta=0.0,
        loss_type="grpo",
        scale_rewards="group",
        multi_objective_aggregation="sum_then_normalize",
        importance_sampling_level="token",
        epsilon=learner.clip_low,
        epsilon_high=learner.clip_high,
        delta=None,
        use_bias_correction_kl=False,
        top_entropy_quantile=1.0,
        entropy_coef=0.0,
        router_aux_loss_coef=None,
        disable_dropout=False,  # for good, it would be: `_trl` sets it aside for the session
        sync_ref_model=False,
        # Read in TRL's source and not run: there was no vLLM to run them with. The model's own ln p of what was sampled differ a little
        # from the sampler's; answers for which they differ by more than a factor of 3 are left out of the loss.
        use_vllm=learner.vllm,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=VLLM_SHARE,
        vllm_max_model_length=None,
        vllm_tensor_parallel_size=1,
        vllm_enable_sleep_mode=False,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="sequence_mask",
        vllm_importance_sampling_clip_max=3.0,
        vllm_importance_sampling_clip_min=None,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_completions=False,
        dataloader_pin_memory=False,
    )
    config.device  # noqa: B018  # looks for devices, and would spread the batch over all that there are
    config._n_gpu = min(config._n_gpu, 1)
    return config


def moving_rows(batch: Batch, modalities: Mapping[str, Any]) -> list[bool]:
    """Which rows show a video and nothing else, so that all their pictures are its frames."""
    present = batch.present or {}
    shows = {True: torch.zeros(len(batch), dtype=torch.bool), False: torch.zeros(len(batch), dtype=torch.bool)}
    for name in batch.inputs:
        if modalities[name].kind in ("video", "image"):
            there = present.get(name, torch.ones(len(batch), dtype=torch.bool)).cpu()
            shows[modalities[name].kind == "video"] |= there
    return (shows[True] & ~shows[False]).tolist()
