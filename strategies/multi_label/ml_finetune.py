"""Fine-tuning on sets of labels in which what is not annotated counts as absent: the naive baseline of multi-label streams.

A task annotates its own classes only. Here the label of every other class seen so far, old ones above all, is taken for 0, although the
sample may well carry it; so each task teaches the network that the classes before it have vanished. The loss is the binary cross-entropy
over all classes seen, or that of a term (`with: [asl]`, as the tables have it). Settings as in `krt`.

The lower bound of Dong et al., Knowledge Restore and Transfer for Multi-Label Class-Incremental Learning, ICCV 2023.

Evidence: small real data
"""

from __future__ import annotations

from torch import Tensor

from streamcl.stream import Batch

from ._label_sets import LabelSets, widened


class MLFinetune(LabelSets):
    def loss(self, batch: Batch) -> Tensor:
        logits = self.forward(batch)
        assert batch.target is not None
        return self.criterion(logits, widened(batch.target, logits.shape[1]).clamp(min=0))
