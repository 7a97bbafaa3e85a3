"""Sounds from a folder of WAV files with a sub-folder for each class, or from Parquet, as waveforms or as log-mel spectrograms.

The folder is read as by the source `folder`, Parquet files as by `parquet`; sounds are 16-bit PCM. They need one length: `seconds` cuts
them and pads them with zeros. `rate` resamples them (scipy's polyphase filter); a set with several rates is refused.

The spectrogram is the usual one: power of a short-time Fourier transform with a Hann window, triangular bands on HTK's mel scale,
natural logarithm. Where toolboxes differ we chose zeros beyond the ends, bands of equal height (torchaudio's default, not librosa's),
and a floor of 1e-6 for silence.

`speaker` says who is heard, for the grouping of that name: a column of the Parquet files, or a regular expression whose first group
is the speaker in the file's name (`_(.+)_` for 3_george_7.wav).

The data and its licence are whatever the files hold. Errors name the file, and the row where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamcl.data import ArrayDataset, FileDataset
from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.options import PositiveInt
from streamcl.stream import Column, Dataset, Grouping, SourceData

from ._media import ArrowBytes, Encoded, FileBytes
from ._records import Records, RecordSource, refuse_rows
from ._sound import Hearing, SoundOptions, resample
from .folder import Folder
from .parquet import Parquet

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 512  # sounds that are transformed together


class Audio(SoundOptions, RecordSource):
    """`path` is a folder, a Parquet file or a pattern; `test` another one. `input` and `label` name columns of Parquet files."""

    def __init__(
        self,
        *,
        path: Path,
        test: Path | None = None,
        input: str | None = None,
        label: str | None = None,
        speaker: str | None = None,
        rate: PositiveInt | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.size is not None:
            raise ConfigError("audio: size belongs to images; sounds are cut to `seconds`")
        self.path, self.test, self.input, self.label, self.speaker, self.rate = path, test, input, label, speaker, rate
        self._named: Callable[[str], str | None] | None = None
        if speaker is not None and not re.fullmatch(r"\w+", speaker):
            try:
                pattern = re.compile(speaker)
            except re.error as error:
                raise ConfigError(f"audio: speaker is {speaker!r}, which is no regular expression: {error}") from None
            if pattern.groups != 1:
                raise ConfigError(
                    f"audio: speaker is {speaker!r}: a regular expression with one group is needed, as in _(.+)_, or a column"
                )
            self._named = lambda name: found[1] if (found := pattern.search(name)) else None

    def files(self) -> list[str]:
        return self._reader().files()

    def load(self) -> SourceData:
        reader = self._reader()
        data = reader.load()
        if set(data.modalities) != {"audio"}:
            raise DataError(f"{self.path}: sounds are needed, and this holds {', '.join(data.modalities)}: name the column by `input`")
        rate = self.rate or reader.rate
        heard = _Hearer(reader.rate, rate, self.hearing(rate, -(-data.modalities["audio"].shape[0] * rate // reader.rate)))
        return SourceData(
            heard.dataset(data.train),
            None if data.test is None else heard.dataset(data.test),
            data.class_names,
            {"audio": heard.hearing.modality()},
            licence=data.licence,
            problems=data.problems,
            groupings=reader.grouping(data),
            about={"audio": heard.hearing.about},
        )

    def _reader(self) -> _Folder | _Parquet:
        same = {
            "test_fraction": self.test_fraction,
            "split_seed": self.split_seed,
            "seconds": self.seconds,
            "decode": self.decode,
            "on_error": self.on_error,
            "workers": self.workers,
        }
        reader: _Folder | _Parquet
        if (
            not any(sign in str(self.path) for sign in "*?[")
            and (place := locate(self.path)).is_dir()
            and not any(place.rglob("*.parquet"))
        ):
            if self.input is not None or self.label is not None:
                raise ConfigError(
                    f"audio: input and label name columns of Parquet files, and {place} is a folder of sounds: leave them out"
                )
            if self.speaker is not None and self._named is None:
                raise ConfigError(f"audio: speaker is {self.speaker!r}: a folder has no columns; give a regular expression, as in _(.+)_")
            reader = _Folder(path=self.path, test=self.test, **same)
        else:
            reader = _Parquet(path=self.path, test=self.test, input=self.input, label=self.label, **same)
        reader.speaker, reader.named = self.speaker, self._named
        return reader


class _Speakers(RecordSource):
    """Takes down what the plain sources pass over: the sampling rate, and who speaks.

    The number of the speaker travels as one more column, so that it stays with its sound where records are split or left out.
    """

    speaker: str | None = None
    named: Callable[[str], str | None] | None = None
    rate = 0

    def assemble(
        self, train: Records, test: Records | None, names: Sequence[str] | None = None, licence: str | None = None, target: str = "class"
    ) -> SourceData:
        parts = [part for part in (train, test) if part is not None]
        if self.speaker is None or set(train.columns) != {"audio"}:
            return super().assemble(train, test, names, licence, target)
        spoken = [self._spoken(number, part) for number, part in enumerate(parts)]
        self.speakers = sorted(set().union(*spoken))
        number = {name: place for place, name in enumerate(self.speakers)}
        for part, said in zip(parts, spoken, strict=True):
            part.columns["speaker"] = torch.tensor([number[name] for name in said], dtype=torch.int64)
        data = super().assemble(train, test, names, licence, target)
        self.by_part = [_taken(part) for part in (data.train, data.test) if part is not None]
        del data.modalities["speaker"]
        return data

    def grouping(self, data: SourceData) -> dict[str, Grouping]:
        if self.speaker is None:
            return {}
        return {"speaker": Grouping(self.speakers, self.by_part[0], self.by_part[1] if data.test is not None else None)}

    def _dataset(self, records: Records, targets: Tensor, first_id: int, problems: dict[str, int]) -> Dataset:
        data = super()._dataset(records, targets, first_id, problems)
        column = records.columns.get("audio")
        self.rate = column.rate if isinstance(column, Encoded) else self.rate
        return data

    def _spoken(self, part: int, records: Records) -> list[str]:
        """Who speaks in each record."""
        assert self.named is not None
        files = _file_names(records)
        said = [self.named(file) for file in files]
        wrong = np.flatnonzero([not name for name in said])
        if len(wrong):
            name = files[wrong[0]] or "a sound without a file name"
            refuse_rows(wrong, records.where, f"speaker: {self.speaker} finds nobody in {name}: give another expression, or null")
        return [str(name) for name in said]


class _Folder(_Speakers, Folder):
    pass


class _Parquet(_Speakers, Parquet):
    def _spoken(self, part: int, records: Records) -> list[str]:
        if self.named is not None:
            return super()._spoken(part, records)
        import pyarrow.parquet as pq

        said: list[Any] = []
        for file in self._parts()[part]:
            have = pq.read_schema(file).names
            if self.speaker not in have:
                raise DataError(f"{file}: there is no column {self.speaker!r} (speaker): there are {', '.join(have)}")
            said += pq.read_table(file, columns=[self.speaker], partitioning=None)[0].to_pylist()
        refuse_rows(np.flatnonzero([name in (None, "") for name in said]), records.where, f"{self.speaker!r} (speaker) is empty")
        return [str(name) for name in said]


def _file_names(records: Records) -> list[str]:
    column = records.columns["audio"]
    assert isinstance(column, Encoded)
    if isinstance(column.fetch, FileBytes):
        return [Path(file).name for file in column.fetch.paths[column.rows].tolist()]
    assert isinstance(column.fetch, ArrowBytes)
    return [Path(path or "").name for path in _paths(column.fetch.column).take(column.rows).to_pylist()]


def _paths(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where the sounds of a column came from: the paths beside their bytes, or instead of them."""
    import pyarrow as pa
    import pyarrow.compute as compute

    if pa.types.is_struct(column.type):
        return compute.struct_field(column, "path")
    return column if pa.types.is_string(column.type) else pa.chunked_array([pa.nulls(len(column), pa.string())])


def _taken(data: Dataset) -> Tensor:
    """The column of speakers, taken out of a data set's inputs."""
    columns = data.inputs if isinstance(data, ArrayDataset) else data.decode.columns  # type: ignore[attr-defined]
    speakers = columns.pop("speaker")
    assert isinstance(speakers, Tensor)
    return speakers


class _Hearer:
    """Turns data sets of waveforms into what is asked for: those in memory at once, those on disk when they are read."""

    def __init__(self, rate: int, wanted: int, hearing: Hearing) -> None:
        self.rate, self.wanted, self.hearing = rate, wanted, hearing

    def __call__(self, waveforms: Tensor) -> Tensor:
        return self.hearing(resample(waveforms, self.rate, self.wanted))

    def dataset(self, data: Dataset) -> Dataset:
        if isinstance(data, ArrayDataset):
            sounds = data.inputs["audio"]
            assert isinstance(sounds, Tensor)
            data.inputs["audio"] = torch.cat([self(part) for part in sounds.split(CHUNK)]) if len(sounds) else self(sounds)
            return data
        assert isinstance(data, FileDataset)
        return FileDataset(_Decoded(data.decode, self), data.targets, data.ids, data.workers)


class _Decoded:
    """The sounds of some rows, decoded and turned; it travels to worker processes."""

    def __init__(self, decode: Callable[[list[int]], dict[str, Column]], hearer: _Hearer) -> None:
        self.decode, self.hearer = decode, hearer

    def __call__(self, rows: list[int]) -> dict[str, Column]:
        columns = self.decode(rows)
        assert isinstance(columns["audio"], Tensor)
        return {"audio": self.hearer(columns["audio"])}
