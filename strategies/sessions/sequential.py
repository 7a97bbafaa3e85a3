"""Sequential sessions: the learner is run on one task after another, and the model goes on from where the last session left it.

The plain way to train a language model on a stream, and the one that all others are compared with. `replay` mixes earlier prompts among
the new ones; `reference` says which policy a learner's penalty holds on to, `base` (as the stream began) or `previous` (as the session
began); `adapter` trains one low-rank adapter of PEFT through all sessions instead of the whole model. The optimiser is fresh in each.

Evidence: small real data
"""

from __future__ import annotations

from ._sessions import Sessions


class Sequential(Sessions):
    pass
