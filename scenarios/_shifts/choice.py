"""Which corruptions of which modalities a test-time stream has, and what of that the source cannot have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from streamcl.corruptions import AUDIO_CORRUPTIONS, IMAGE_CORRUPTIONS, SMALLEST
from streamcl.errors import ConfigError
from streamcl.plugins import near_name
from streamcl.stream import Modality, SourceData

Wanted = Literal["all", "none"] | list[str] | dict[str, Literal["all"] | list[str]]

CORRUPTIONS = {"image": IMAGE_CORRUPTIONS, "video": IMAGE_CORRUPTIONS, "audio": AUDIO_CORRUPTIONS}  # by kind of modality


def check_names(wanted: Wanted) -> None:
    """Refuse what no kind of modality has, as long as it is not known which ones there are."""
    if isinstance(wanted, str):
        return
    lists = [names for names in (wanted.values() if isinstance(wanted, dict) else [wanted]) if isinstance(names, list)]
    if not wanted or not all(lists):
        raise ConfigError("test_time: corruptions lists none: write corruptions: none where there are to be none")
    known = tuple(dict.fromkeys(IMAGE_CORRUPTIONS + AUDIO_CORRUPTIONS))
    for name in (name for names in lists for name in names):
        if name not in known:
            hint = near_name(name, known) or f": there are {', '.join(known)}"
            raise ConfigError(f"test_time: corruptions names an unknown {name!r}{hint}")


def chosen(wanted: Wanted, modalities: Mapping[str, Modality]) -> dict[str, tuple[str, ...]]:
    """The corruptions of each modality that is to be corrupted, in the order of the source's modalities."""
    asked = _by_modality(wanted, modalities)
    for name, names in asked.items():
        if name not in modalities:
            hint = near_name(name, modalities) or f": there are {', '.join(modalities)}"
            raise ConfigError(f"test_time: corruptions names a modality that the source lacks, {name!r}{hint}")
        _check_modality(name, modalities[name])
        there = CORRUPTIONS[modalities[name].kind]
        for given in names if isinstance(names, list) else ():
            if given not in there:
                hint = near_name(given, there) or f": there are {', '.join(there)}"
                raise ConfigError(f"test_time: corruptions: {given!r} is no corruption of {name} ({modalities[name].kind}){hint}")
    every = {name: CORRUPTIONS[modalities[name].kind] for name in modalities if name in asked}
    return {name: there if asked[name] == "all" else tuple(dict.fromkeys(asked[name])) for name, there in every.items()}


def _by_modality(wanted: Wanted, modalities: Mapping[str, Modality]) -> Mapping[str, Literal["all"] | list[str]]:
    if isinstance(wanted, dict):
        return wanted
    if wanted == "none":
        return {}
    able = [name for name, modality in modalities.items() if modality.kind in CORRUPTIONS]
    if not able:
        there = ", ".join(f"{name} ({modality.kind})" for name, modality in modalities.items())
        raise ConfigError(f"test_time: corruptions are of images, videos and sounds, and this source has {there}: set corruptions: none")
    if isinstance(wanted, str):
        return dict.fromkeys(able, "all")
    if len(able) > 1:
        raise ConfigError(f"test_time: this source has {' and '.join(able)}: say of which the corruptions are, {{{able[0]}: [...]}}")
    return {able[0]: wanted}


def _check_modality(name: str, modality: Modality) -> None:
    if modality.kind not in CORRUPTIONS:
        raise ConfigError(
            f"test_time: corruptions: {name} is of the kind {modality.kind}, and there are corruptions of images, videos and sounds only: "
            "leave it out"
        )
    if modality.kind == "audio" and len(modality.shape) != 1:
        raise ConfigError(
            f"test_time: corruptions: {name} comes as a log-mel spectrogram {modality.shape}, and the corruptions are of waveforms: "
            "set audio_as: waveform in the source, or name the other modalities alone"
        )
    if modality.kind != "audio" and min(modality.shape[-2:], default=SMALLEST) < SMALLEST:
        raise ConfigError(f"test_time: corruptions: {name} has the shape {modality.shape}: sides of at least {SMALLEST} pixels are needed")


def rate(loaded: SourceData, name: str) -> float:
    """How many samples a second this modality's waveforms have."""
    told = loaded.about.get(name, {}).get("rate")
    if told is None:
        raise ConfigError(
            f"test_time: corruptions: the source does not say how many samples a second {name} has (SourceData.about), "
            "and noises have a pitch: name the other modalities alone"
        )
    return float(told)
