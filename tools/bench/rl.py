"""What a step of reinforcement learning costs: the learner `apo` against TRL's plain GRPOTrainer, on the same model and prompts.

On a CPU: the tiny model on the built-in puzzles, one thread. The two take turns within one process; both answer the same prompts by the
same sampler and compute the same number of forward passes (policy, reference, gradient), and the plain trainer is handed its rows ready
made. A figure is the ratio of the median processor times of a step, and of these the median over turns (goal: at most 1.03).

With --gpu: Qwen2.5-VL with the sizes of its 3B (random weights: nothing is fetched) and a low-rank adapter learns ten steps of `grpo` in
bfloat16; time, tokens per second and the peak of memory. --small takes a few thousand weights, on whatever device there is.

    python tools/bench/rl.py [--turns 5] [--steps 12] [--group 8] [--prompts 8] [--longest 32]
    python tools/bench/rl.py --gpu [--group 8] [--prompts 4] [--longest 256] [--at-once 8]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from streamcl.context import Context
from streamcl.events import Events
from streamcl.nn.model import Model
from streamcl.options import Optimizer
from streamcl.plugins import find
from streamcl.preparing import Preparation
from streamcl.stream import StreamInfo

OPTIMIZER = Optimizer(name="adamw", lr=1e-4, weight_decay=0.0)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def puzzles(size: int) -> tuple[StreamInfo, Any]:
    stream = find("scenario", "reasoning").load()(data=find("source", "puzzles").load()(count=200, test=4, size=size), order="given")
    info = stream.open(0)
    return info, stream.task(0)


def prepared(backbone: Any, info: StreamInfo, device: str = "cpu", precision: str = "float32") -> Context:
    torch.manual_seed(0)
    backbone.build(info)
    model = Model(backbone).to(device)
    return Context(model, None, Events([]), Preparation(info, {}), device=device, precision=precision)  # type: ignore[arg-type]


def learned(learner: Any, context: Context, task: Any) -> list[float]:
    """Processor seconds of each step."""
    moments: list[float] = []
    context.tick = lambda: moments.append(time.process_time())
    context.begin(task, {})
    learner.fit(context.model, task, context)
    return [after - before for before, after in pairwise(moments)]


def by_apo(arguments: argparse.Namespace, info: StreamInfo, task: Any) -> list[float]:
    learner = find("learner", "apo").load()(
        steps=arguments.steps, prompts=arguments.prompts, group=arguments.group, updates=1, optimizer=OPTIMIZER
    )
    context = prepared(find("backbone", "tiny_vlm").load()(longest=arguments.longest), info)
    learner.start(info, context)
    return learned(learner, context, task)


def by_trainer(arguments: argparse.Namespace, info: StreamInfo, task: Any) -> list[float]:
    """The plain trainer with the options that `apo` has of its own: a mean over tokens, and beta on k3."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    kind = find("learner", "apo").load()
    learner = kind(steps=arguments.steps, prompts=arguments.prompts, group=arguments.group, updates=1, optimizer=OPTIMIZER)
    context = prepared(find("backbone", "tiny_vlm").load()(longest=arguments.longest), info)
    learner.start(info, context)
    trainers = __import__(kind.__module__.rpartition(".")[0] + "._trainer", fromlist=["Prompts"])
    language: Any = context.model.backbone
    network = language.network
    prompts = trainers.Prompts(learner, language, task, context, 1, 0)
    moments: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.process_time())

    class Plain(GRPOTrainer):
        def get_train_dataloader(self) -> Any:
            return prompts

        def _calculate_rewards(self, inputs: Any, *rest: Any) -> Any:
            self.columns = trainers._repeated(inputs.batch, learner.group)
            return super()._calculate_rewards(inputs, *rest)

    def reward(verifier: Any) -> Any:
        def judge(completions: Any, **_: Any) -> list[float | None]:
            return verifier([said[0]["content"] for said in completions], trainer.columns).tolist()

        judge.__name__ = type(verifier).__name__
        return judge

    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        network.config._name_or_path = folder
        options = trainers.settings(learner, context, folder, 0, arguments.longest, arguments.prompts * arguments.group, 1).to_dict()
        fields = {name: options[name] for name in options if name in GRPOConfig.__dataclass_fields__ and name != "generation_batch_size"}
        trainer: Any = Plain(
            model=network,
            reward_funcs=[reward(verifier) for verifier in learner.rewards],
            args=GRPOConfig(**{**fields, "beta": learner.beta, "loss_type": "bnpo", "gradient_checkpointing": False}),
            train_dataset=Dataset.from_dict({"row": [0]}),
            processing_class=language.processor,
            optimizers=(torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True), None),
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [after - before for before, after in pairwise(moments)]


def compare(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    info, task = puzzles(28)
    ratios, mine, plain = [], [], []
    for turn in range(arguments.turns + 1):
        first, second = (by_apo, by_trainer) if turn % 2 else (by_trainer, by_apo)
        seconds = {run.__name__: statistics.median(run(arguments, info, task)) for run in (first, second)}
        if turn:  # the first one warms everything up
            mine.append(seconds["by_apo"])
            plain.append(seconds["by_trainer"])
            ratios.append(mine[-1] / plain[-1])
    tokens = arguments.prompts * arguments.group * arguments.longest
    print(f"{arguments.prompts} prompts x {arguments.group} answers of up to {arguments.longest} tokens, {arguments.steps} steps a turn")
    for name, values in (("GRPOTrainer", plain), ("apo", mine)):
        median = statistics.median(values)
        print(f"  {name:<12} {1000 * median:7.1f} ms of processor time a step, {tokens / median:7.0f} tokens/s at most")
    spread = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"  apo / GRPOTrainer: {statistics.median(ratios):.3f} (turns: {spread})")


# -- a large model, on a GPU ------------------------------------------------------------------------------------------------------------


def random_qwen(small: bool, longest: int) -> Any:
    """The backbone of any language model, with Qwen2.5-VL's architecture and no file behind it."""
    base = find("backbone", "language_model").load()

    class RandomQwen(base):  # type: ignore[misc, valid-type]
        def folder(self, info: StreamInfo) -> Path:
            return Path()

        def load(self, folder: Path) -> None:
            from tokenizers import Tokenizer
            from tokenizers.models import WordLevel
            from tokenizers.pre_tokenizers import Whitespace
            from transformers import (
                PreTrainedTokenizerFast,
                Qwen2_5_VLConfig,
                Qwen2_5_VLForConditionalGeneration,
                Qwen2_5_VLProcessor,
                Qwen2VLImageProcessor,
                Qwen2VLVideoProcessor,
            )

            signs = ["<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
            words = Tokenizer(WordLevel({word: number for number, word in enumerate([*signs, "user", "assistant"])}, unk_token="<unk>"))
            words.pre_tokenizer = Whitespace()
            words.add_special_tokens(signs)
            self.tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=words,
                pad_token="<pad>",
                unk_token="<unk>",
                eos_token="<|im_end|>",
                padding_side="left",
                chat_template=CHAT,
            )
            self.processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), self.tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)
            text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
            vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
            sections = [16, 24, 24]
            if small:
                text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
                vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
                sections = [2, 3, 3]
            config = Qwen2_5_VLConfig(
                text_config={
                    **text,
                    "num_key_value_heads": 2,
                    "vocab_size": 64 if small else 151936,
                    "max_position_embeddings": 32768,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
                    "bos_token_id": None,
                    "eos_token_id": 2,
                    "pad_token_id": 0,
                },
                vision_config={**vision, "fullatt_block_indexes": [7, 15, 23, 31]},
                vision_start_token_id=4,
                vision_end_token_id=5,
                image_token_id=6,
                video_token_id=7,
                tie_word_embeddings=True,
            )
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.device(device):
                self.network = Qwen2_5_VLForConditionalGeneration(config)
            network: Any = self.network
            network.to(torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_(False)
            self.network.generation_config.eos_token_id, self.network.generation_config.pad_token_id = 2, 0
            self.sees, self.origin = True, None

    return RandomQwen(model="random Qwen2.5-VL", longest=longest)


def on_gpu(arguments: argparse.Namespace) -> None:
    from peft import LoraConfig, get_peft_model

    device, precision = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    if device == "cpu" and not arguments.small:
        raise SystemExit("there is no GPU here: the 3B needs one (--small tries the same on a CPU)")
    info, task = puzzles(28 if arguments.small else 224)
    backbone = random_qwen(arguments.small, arguments.longest)
    context = prepared(backbone, info, device, precision)
    backbone.network = get_peft_model(
        backbone.network, LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)")
    )
    learner = find("learner", "grpo").load()(
        steps=10, prompts=arguments.prompts, group=arguments.group, at_once=arguments.at_once, optimizer=OPTIMIZER
    )
    learner.start(info, context)
    moments: list[float] = []
    context.tick = lambda: moments.append(time.perf_counter())
    context.begin(task, {})
    report = learner.fit(context.model, task, context)
    seconds = statistics.median(after - before for before, after in pairwise(moments))
    parameters = sum(value.numel() for value in context.model.parameters())
    print(f"{parameters / 1e9:.2f}e9 parameters, {device}, {precision}: {arguments.prompts} prompts x {arguments.group} answers")
    print(f"  {seconds:.2f} s a step, {report.figures['tokens'] / learner.steps / seconds:.0f} tokens/s learned from")
    if device == "cuda":
        print(f"  at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--longest", type=int, default=32)
    parser.add_argument("--at-once", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    (on_gpu if arguments.gpu or arguments.small else compare)(arguments)


if __name__ == "__main__":
    main()
