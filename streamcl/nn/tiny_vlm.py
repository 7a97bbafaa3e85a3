"""A tiny vision-language model of a real architecture (Llava: CLIP's vision transformer, and a Llama that reads its patches as tokens).

Everything about it is as with a large one: a folder with weights in safetensors, a tokenizer, an image processor and a chat template, read
by the same classes of transformers. The tokenizer knows whole words, those of the built-in puzzles and `words` beside; the tags that
methods ask answers to be in are one token each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from streamcl.data_files import cache_folder
from streamcl.errors import ConfigError

WORDS = (
    "a above all an and answer appear appears are as at bar bars because below between black blue both but by can cell cells chart "
    "circle colour colours comparing count counted counting cross crosses crossing difference direction do does down equal equally "
    "fewer find first four fourth frame frames from green grey high higher highest how i image in is it last left less line lines look "
    "lowest made make makes many maze more most move moves much name next no none not number of on one or order other path picture "
    "purple reach red right ring rings second see seen shape shapes shortest show shows side so spatial square squares steps sum "
    "tallest than the then they there therefore thing things think third three to together triangle triangles two up value wait walk wall "
    "walls way what where which with without yellow yes you"
)
NUMBERS = 100  # whole numbers below this are words
SPREAD = 0.08  # deviation of the weights of a network that was not trained yet
SIGNS = ". , ? ! : ; - + = ( ) / ' \" % \\ { }"
TAGS = ("think", "answer", "observe")
PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
ROLES = ("<system>", "<user>", "<assistant>")
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(words: str = "") -> Any:
    """Whole words in lower case, a word with the space before it: what is decoded reads as it was written."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [f"▁{word.lower()}" for word in f"{WORDS} {words}".split()] + [f"▁{number}" for number in range(NUMBERS)]
    special = [PAD, BEGIN, END, UNKNOWN, IMAGE, *ROLES]
    listed = list(dict.fromkeys([*special, *(form for sign in SIGNS.split() for form in (sign, f"▁{sign}")), *known, "▁"]))
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(listed)}, unk_token=UNKNOWN))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    made.add_special_tokens([AddedToken(sign, special=True, normalized=False, lstrip=True, rstrip=True) for sign in special])
    made.add_tokens([AddedToken(tag, special=False, normalized=False, lstrip=True, rstrip=True) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def folder(*, edge: int, patch: int, hidden: int, layers: int, heads: int, vision_layers: int, places: int, words: str) -> Path:
    """The folder of a model of this shape, untrained, under the cache and named by all that it follows from: made where it is not there."""
    import transformers

    shape = {
        "edge": edge,
        "patch": patch,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "vision_layers": vision_layers,
        "places": places,
    }
    known = tokenizer(words)
    follows = {
        **shape,
        "words": known.backend_tokenizer.to_str(),
        "template": TEMPLATE,
        "by": [transformers.__version__, torch.__version__],
    }
    name = hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:16]
    place = cache_folder("tiny_vlm") / name
    if not (place / "model.safetensors").is_file():
        aside = place.with_name(f".{name}.{os.getpid()}")
        with quietly():
            processor(known, edge, patch).save_pretrained(aside)
            network(known, **shape).save_pretrained(aside)
        try:
            aside.replace(place)
        except OSError:  # another process was faster
            shutil.rmtree(aside)
            if not (place / "model.safetensors").is_file():
                raise ConfigError(f"{place} is there and holds no model: remove it") from None
    return place


def processor(known: Any, edge: int, patch: int) -> Any:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    pictures = CLIPImageProcessorPil(
        size={"height": edge, "width": edge}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        pictures,
        known,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which is not read
        image_token=IMAGE,
        chat_template=TEMPLATE,
    )


def network(known: Any, *, edge: int, patch: int, hidden: int, layers: int, heads: int, vision_layers: int, places: int) -> Any:
    """Drawn from a seed of its own; at this width weights of transformers' usual size would say all words alike for a long time."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    size: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "initializer_range": SPREAD,
    }
    vision = CLIPVisionConfig(**size, num_hidden_layers=vision_layers, image_size=edge, patch_size=patch, initializer_factor=2.0)
    pad, begin, end, image = known.convert_tokens_to_ids([PAD, BEGIN, END, IMAGE])
    signs: dict[str, Any] = {"pad_token_id": pad, "bos_token_id": begin, "eos_token_id": end}
    text = LlamaConfig(**size, **signs, num_hidden_layers=layers, vocab_size=len(known), max_position_embeddings=places)
    how: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default", "initializer_range": SPREAD}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image, **how)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = LlavaForConditionalGeneration(config)
    made.generation_config.update(**signs)
    return made


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars that transformers draws for models of any size."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
