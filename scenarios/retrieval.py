"""Continual image-text retrieval: domains of captioned pictures arrive one after another, and each is searched both ways.

The setting of continual cross-modal retrieval and of CLIP's continual pre-training (Ni et al., "Continual Vision-Language Representation
Learning with Off-Diagonal Information", ICML 2023): a task brings the captioned pictures of one domain, and afterwards every domain so far
is scored by recall at 1, 5 and 10, the mean of finding the text to a picture and the picture to a text, among the test samples of that
domain. The domains are the groups of one source (any grouping: `by`), or a list of sources with one task each.

A row is a caption (`inputs["text"]`) with its picture. A picture with several captions has a row for each, and `extra["pair"]` tells with
the same number that they belong together; without it every row is a pair of its own. Validation holds back whole pictures. Any one
modality beside the text may take the place of the picture. A strategy answers with `Prediction.embeddings` of both.
"""

from __future__ import annotations

from streamcl.errors import ConfigError, DataError
from streamcl.stream import Batch, SourceData

from ._group_tasks import GroupTasks


class Retrieval(GroupTasks):
    kind, metrics, fact = "retrieval", ("recall_1", "recall_5", "recall_10"), "domain"

    def check(self, loaded: SourceData, first: Batch, where: str) -> None:
        others = [name for name in loaded.modalities if name != "text"]
        if "text" not in loaded.modalities or len(others) != 1:
            there = ", ".join(loaded.modalities)
            raise ConfigError(
                f"{where}: text and one other modality are needed, and this source has {there}: name a source of captioned pictures"
            )
        for part, dataset in (("training", loaded.train), ("test", loaded.test)):
            for name, mask in (getattr(dataset, "present", None) or {}).items():
                absent = int((~mask).sum())
                if absent:
                    raise DataError(
                        f"{where}: {absent} {part} rows have no {name}, and what is to be found must be there: leave these rows out"
                    )
