"""Fine-tuning on sets of labels with the loss over what is annotated only: the honest baseline of multi-label streams.

A label that is -1 has no part in the loss, so nothing tells the network that old classes are absent; nothing keeps them alive either. The
loss is the binary cross-entropy over the annotated labels, or that of a term (`with: [asl]`). Settings as in `krt`.

Evidence: small real data
"""

from __future__ import annotations

from ._label_sets import LabelSets


class MLMasked(LabelSets):
    """What any gradient strategy does with sets of labels, under its own name and with the settings of its family."""
