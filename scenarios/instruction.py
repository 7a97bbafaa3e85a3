"""Continual instruction tuning: sets of questions about pictures, each answered in words, arrive one after another.

The setting of CoIN (Chen et al., NeurIPS 2024 Datasets and Benchmarks), and of continual instruction tuning of language models at
large: every task is an instruction set, in the common form of dialogues (source `conversations`), scored again after every later one.
The sets are the groups of one source, or a list of sources with one task each.

A row's `inputs` hold the prompt (`text`) and, where there is one, the picture (`image`, masked in `present` where there is none); `extra`
holds the answer, and the verifier that judges it by the metric `verified`. Published tables score free answers by other measures as well
(CIDEr, a judge model); this one counts only what a rule can check, and leaves out rows whose right answer no rule can read.
"""

from __future__ import annotations

from streamcl.errors import ConfigError
from streamcl.stream import Batch, SourceData

from ._group_tasks import GroupTasks


class Instruction(GroupTasks):
    kind, metrics, fact = "instruction", ("verified",), "set"

    def check(self, loaded: SourceData, first: Batch, where: str) -> None:
        lacking = [name for name in ("answer", "verifier") if not isinstance(first.extra.get(name), list)]
        if loaded.target != "text" or "text" not in loaded.modalities or lacking:
            what = f"rows without {' and '.join(lacking)}" if loaded.target == "text" and lacking else f"{loaded.target!r} targets"
            raise ConfigError(
                f"{where}: questions with an answer in words and its verifier are needed, and this source has {what}: "
                "conversations, problems, and digit_scenes with `as: dialogues` have them"
            )
