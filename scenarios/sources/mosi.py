"""CMU-MOSI in the official form of CMU's multimodal SDK: opinions heard, seen and read, with their sentiment from -3 to 3.

Origin: A. Zadeh et al., "MOSI: Multimodal Corpus of Sentiment Intensity" (2016); github.com/CMU-MultiComp-Lab/CMU-MultimodalSDK.
Licence: research use; the videos belong to their owners.

`path` is the folder with the computational sequences (.csd, which are HDF5): the words, their vectors, the acoustic and visual features
and the opinion labels. Pickled releases (aligned_50.pkl, mosi_data.pkl) are refused: reading a pickle runs whatever code it holds, and
they cannot say how they were made. Needs h5py: pip install 'streamcl[media]'.

A sample is an opinion segment, with three modalities. A step is a word that begins in the segment, and as in the SDK's word alignment the
acoustic and visual frames whose time overlaps the word's are averaged. Pauses (sp) are left out; of more words than `length` the first
are kept, and shorter segments are padded with zeros at the end. Where no frame at all falls into a segment's words the modality is
absent: NaN and masked. Averages that are not finite, since some frames of COVAREP are not, are set to 0 and counted. The three folds are
the SDK's, by video; `valid` says what becomes of the second one. The grouping `video` is the review, each by another speaker, numbered
over all folds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.stream import SourceData

from ._listed import Listed, ListedSource, Refused, numbered

_VALID = "WKA5OygbEKI c5xsKMxpXnc atnd_PF-Lbs bvLlb-M3UXU bOL9jKpeJRs _dI--eQ6qVU ZAIRrfG22O0 X3j2zQgwYgE aiEXnCPZubE ZUXBRvtny7o"
_TEST = (
    "tmZoasNr4rU zhpQhgha_KU lXPQBPVc5Cw iiK8YX8oH1E tStelxIAHjw nzpVDcQ0ywM etzxEpPuc6I cW1FSBF59ik d6hH302o4v8 k5Y_838nuGo pLTX3ipuDJI "
    "jUzDDGyPkXU f_pcplsH_V0 yvsjCA6Y5Fc nbWiPyCm4g0 rnaNMUZpvvg wMbj6ajWbic cM3Yna7AavY yDtzw_Y-7RU vyB00TXsimI dq3Nf_lMPnE phBUpBr1hSo "
    "d3_k5Xpfmik v0zCBqDeKcE tIrG4oNLFzE fvVhgmXxadc ob23OKe5a9Q cXypl4FnoZo vvZ4IcEtiZc f9O3YtZ2VfI c7UH_rxdZv4"
)
_TRAIN = (
    "2iD-tVS8NPw 8d-gEyoeBzc Qr1Ca94K55A Ci-AH39fi3Y 8qrpnFRGt2A Bfr499ggo-0 QN9ZIUWUXsY 9T9Hf74oK10 7JsX8y1ysxY 1iG0909rllw Oz06ZWiO20M "
    "BioHAh1qJAQ 9c67fiY0wGQ Iu2PFX3z_1s Nzq88NnDkEk Clx4VXItLTE 9J25DZhivz8 Af8D0E4ZXaw TvyZBvOMOTc W8NXH0Djyww 8OtFthrtaJM 0h-zjBukYpk "
    "Vj1wYRQjB-o GWuJjcEuzt8 BI97DNYfe5I PZ-lDQFboO8 1DmNV9C1hbY OQvJTdtJ2H4 I5y0__X72p0 9qR7uwkblbs G6GlGvlkxAQ 6_0THN4chvY Njd1F0vZSm4 "
    "BvYR0L6f2Ig 03bSnISJMiM Dg_0XKD0Mf4 5W7Z1C_fDaE VbQk4H8hgr0 G-xst2euQUc MLal-t_vJPM BXuRRbG0Ugk LSi-o-IrDMs Jkswaaud0hk 2WGyTLYerpo "
    "6Egk_28TtTM Sqr0AcuoNnk POKffnXeBds 73jzhE8R1TQ OtBXNcAL_lE HEsqda8_d0Q VCslbP0mgZI IumbAb8q2dM"
)
TRAIN, VALID, TEST = (fold.split() for fold in (_TRAIN, _VALID, _TEST))
PAUSE = "sp"


class Mosi(ListedSource):
    """`audio`, `video`, `words`, `vectors` and `labels` are the names of the .csd files in `path`.

    `text` is a sequence of word vectors, or the words themselves. A segment that is wrong is an error, or left out and counted
    (`on_error: skip`).
    """

    licence = "research use; the videos belong to their owners"

    def __init__(
        self,
        *,
        path: Path,
        text: Literal["vectors", "words"] = "vectors",
        length: PositiveInt = 50,
        valid: Literal["train", "leave"] = "leave",
        words: str = "CMU_MOSI_TimestampedWords.csd",
        vectors: str = "CMU_MOSI_TimestampedWordVectors.csd",
        audio: str = "CMU_MOSI_COVAREP.csd",
        video: str = "CMU_MOSI_Visual_Facet_42.csd",
        labels: str = "CMU_MOSI_Opinion_Labels.csd",
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        super().__init__(on_error=on_error)
        if Path(path).suffix.lower() in (".pkl", ".pickle", ".p"):
            raise ConfigError(
                f"mosi: {path} is a pickled release, and reading a pickle runs the code in it: give the folder with the SDK's .csd files"
            )
        self.path, self.text, self.length, self.valid = path, text, length, valid
        self.names = {"words": words, "vectors": vectors, "audio": audio, "video": video, "labels": labels}

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        try:
            import h5py
        except ImportError:
            raise ConfigError("mosi reads HDF5 files and needs h5py: pip install 'streamcl[media]'") from None
        folder, refused = locate(self.path), Refused(self.on_error)
        wanted = ["labels", "words", "audio", "video"] + (["vectors"] if self.text == "vectors" else [])
        opened = {kind: _Sequence(h5py, folder, self.names[kind]) for kind in wanted}
        try:
            folds = {"train": TRAIN + (VALID if self.valid == "train" else []), "test": TEST}
            named = [video for video in [*TRAIN, *VALID, *TEST] if video in opened["labels"]]
            parts = [
                self._fold([video for video in videos if video in opened["labels"]], opened, named, refused) for videos in folds.values()
            ]
        finally:
            for sequence in opened.values():
                sequence.close()
        return self.assemble(parts[0], parts[1], [], refused, target="value", group_names={"video": named})

    def _fold(self, videos: list[str], opened: dict[str, _Sequence], named: list[str], refused: Refused) -> Listed:
        columns: dict[str, list[Any]] = {"text": [], "audio": [], "video": []}
        values: list[float] = []
        groups: list[int] = []
        readers = {kind: opened[kind].read for kind in opened if kind != "labels"}
        for video in videos:
            segments, scores = opened["labels"].read(video)
            lacking = [kind for kind in ("words", *(["vectors"] if self.text == "vectors" else [])) if video not in opened[kind]]
            if lacking:
                refused.add("video without its words", f"{opened[lacking[0]].file}: there is no {video}, which has opinion labels")
                continue
            streams = {
                kind: read(video) if video in opened[kind] else (np.zeros((0, 2)), np.zeros((0, 0))) for kind, read in readers.items()
            }
            for number, ((begin, end), score) in enumerate(zip(segments, scores, strict=True)):
                value = float(np.ravel(score)[0])
                steps = self._steps(streams["words"], begin, end)
                if not np.isfinite(value) or not len(steps):
                    what = "has no word" if np.isfinite(value) else f"has the label {value}"
                    refused.add("segment without a word or a label", f"{opened['labels'].file}: {video}, segment {number} {what}")
                    continue
                times = streams["words"][0][steps]
                if self.text == "words":
                    columns["text"].append(" ".join(_word(streams["words"][1][step]) for step in steps))
                else:
                    columns["text"].append(_averaged(streams["vectors"], times))
                for kind in ("audio", "video"):
                    columns[kind].append(_averaged(streams[kind], times))
                values.append(value)
                groups.append(named.index(video))
        listed = Listed({}, torch.tensor(values, dtype=torch.float32), {"video": numbered(groups)})
        for kind, column in columns.items():
            if kind == "text" and self.text == "words":
                listed.columns[kind] = column
                continue
            listed.columns[kind], there = self._padded(column, kind, opened["vectors" if kind == "text" else kind], refused)
            if not bool(there.all()):
                listed.present[kind] = there
        return listed

    def _steps(self, words: tuple[np.ndarray, np.ndarray], begin: float, end: float) -> np.ndarray:
        """The words that begin in a segment, pauses left out."""
        times, said = words
        inside = np.flatnonzero((times[:, 0] >= begin) & (times[:, 0] < end))
        return np.array([step for step in inside if _word(said[step]) != PAUSE], dtype=np.int64)[: self.length]

    def _padded(self, column: list[np.ndarray | None], kind: str, sequence: _Sequence, refused: Refused) -> tuple[Tensor, Tensor]:
        """All segments of one modality, and which of them have it  # (segments, length, features)"""
        values = np.full((len(column), self.length, sequence.width), np.nan, dtype=np.float32)
        for row, steps in enumerate(column):
            if steps is not None:
                values[row] = 0
                values[row, : len(steps)] = steps
        there = torch.tensor([steps is not None for steps in column], dtype=torch.bool)
        odd = ~np.isfinite(values) & there.numpy()[:, None, None]
        if odd.any():
            problem = f"value of {kind} that is not finite, set to 0"
            refused.problems[problem] = refused.problems.get(problem, 0) + int(odd.sum())
            values[odd] = 0
        return torch.from_numpy(values), there


class _Sequence:
    """One computational sequence: for each video its intervals (n, 2) and features (n, width)."""

    def __init__(self, h5py: Any, folder: Path, name: str) -> None:
        self.file = folder / name
        if not self.file.exists():
            others = sorted(file.name for file in folder.glob("*.csd"))
            pickled = sorted(file.name for file in folder.glob("*.pkl"))
            hint = f"; there is {', '.join(others)}" if others else "; the pickled releases are not read" if pickled else ""
            raise DataError(f"{folder}: there is no {name}, which CMU's SDK downloads{hint}")
        try:
            self.handle = h5py.File(self.file, "r")
        except OSError as error:
            raise DataError(f"{self.file}: this is no HDF5 file that can be read: {' '.join(str(error).split())}") from None
        root = next(iter(self.handle.values()), None)
        if root is None or not hasattr(root, "keys") or "data" not in root:
            raise DataError(f"{self.file}: this is no computational sequence: ROOT/data/VIDEO with features and intervals is expected")
        self.data = root["data"]
        entry: Any = next(iter(self.data.values()), None)
        features = entry["features"] if hasattr(entry, "keys") and "features" in entry else None
        self.width = int(features.shape[1]) if features is not None and features.ndim == 2 else 0

    def __contains__(self, video: str) -> bool:
        return video in self.data

    def read(self, video: str) -> tuple[np.ndarray, np.ndarray]:
        entry = self.data[video]
        keys = entry.keys() if hasattr(entry, "keys") else ()
        times, features = (np.asarray(entry[key]) if key in keys else np.zeros(0) for key in ("intervals", "features"))
        if not self.width or times.shape != (len(features), 2) or features.shape != (len(times), self.width):
            raise DataError(f"{self.file}: {video} needs features (rows, {self.width or 'width'}) and as many intervals (rows, 2)")
        return times.astype(np.float64), features

    def close(self) -> None:
        self.handle.close()


def _averaged(stream: tuple[np.ndarray, np.ndarray], times: np.ndarray) -> np.ndarray | None:
    """For each word the mean of the frames that overlap it, zeros where there are none; None where no word has any  # (words, features)"""
    intervals, features = stream
    near = (intervals[:, 0] < times[:, 1].max()) & (intervals[:, 1] > times[:, 0].min())
    begin, end, values = intervals[near, 0], intervals[near, 1], features[near].astype(np.float64)
    overlap = (begin < times[:, 1, None]) & (end > times[:, 0, None])  # (words, frames)
    if not overlap.any():
        return None
    with np.errstate(invalid="ignore"):  # infinite values of both signs; the mean is NaN and is counted
        return np.stack([values[frames].mean(axis=0) if frames.any() else np.zeros(values.shape[1]) for frames in overlap])


def _word(value: Any) -> str:
    first = value[0] if isinstance(value, np.ndarray) else value
    return first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
