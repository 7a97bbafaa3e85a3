"""A data set of the Hugging Face hub, or one on disk that the `datasets` library reads or once saved.

`path` is a name on the hub (`uoft-cs/cifar100`), a folder written by `save_to_disk`, or a folder of data files. `config` and
`revision` choose among what the hub holds; `train` and `test` are the names of the splits. Images are read from memory-mapped files,
so the set may be larger than memory. The hub is reached through the `datasets` library alone, which keeps what it downloads in its
own cache (HF_HOME); offline, that cache is used.

The licence is the one that the data set states, where it states one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamcl.data_files import locate
from streamcl.errors import ConfigError, DataError
from streamcl.stream import SourceData

from ._records import Place, Records, RecordSource

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


class HuggingFace(RecordSource):
    """`input` names one column or several (numeric ones together are one vector); `label` names the column of the classes."""

    def __init__(
        self,
        *,
        path: str,
        config: str | None = None,
        revision: str | None = None,
        train: str = "train",
        test: str | None = "test",
        input: str | list[str] | None = None,
        label: str | None = None,
        **records: Any,
    ) -> None:
        super().__init__(**records)
        self.path, self.config, self.revision, self.train, self.test = path, config, revision, train, test
        self.input, self.label = input, label

    def files(self) -> list[str]:
        folder = self._folder()
        return [str(folder)] if folder is not None else []

    def load(self) -> SourceData:
        from ._tables import Columns

        splits = self._splits()
        if self.train not in splits:
            raise ConfigError(f"huggingface: {self.path} has no split {self.train!r} (train): there are {', '.join(splits)}")
        train = splits[self.train]
        features = {name: feature for name, feature in train.features.to_dict().items() if isinstance(feature, dict)}
        columns = Columns(train.features.arrow_schema, features, self.input, self.label, self.path)
        test = splits.get(self.test) if self.test is not None else None
        if test is None and self.test not in (None, "test"):
            raise ConfigError(f"huggingface: {self.path} has no split {self.test!r} (test): there are {', '.join(splits)}")
        return self.assemble(
            self._records(train, self.train, columns),
            self._records(test, str(self.test), columns) if test is not None else None,
            columns.class_names,
            train.info.license or None,
        )

    def _folder(self) -> Path | None:
        """The local folder that `path` names, if it does: a name on the hub looks just like a relative path."""
        try:
            return locate(self.path)
        except DataError:
            if Path(self.path).is_absolute() or self.path.startswith((".", "~")):
                raise
            return None

    def _splits(self) -> DatasetDict | dict[str, Dataset]:
        import datasets

        folder = self._folder()
        datasets.disable_progress_bars()
        try:
            if folder is not None and any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
                saved = datasets.load_from_disk(str(folder))
                return {self.train: saved} if isinstance(saved, datasets.Dataset) else saved
            return datasets.load_dataset(str(folder or self.path), self.config, revision=self.revision)
        except Exception as error:  # the library and the network below it raise errors of every kind
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            kept = "" if folder is not None else " (neither on the hub, in the cache of `datasets`, nor as a local folder)"
            raise DataError(f"huggingface: {self.path} could not be loaded{kept}: {reason}") from None

    def _records(self, split: Dataset, name: str, columns: Any) -> Records:
        if not len(split):
            raise DataError(f"{self.path}, split {name!r}: there is not a single record in it")
        table = split.select_columns(columns.names).with_format("arrow")[:]
        return columns.records(table, Place([f"{self.path}, split {name!r}"], [len(table)]), self._folder() or Path())
