"""Textual Inversion (Gal et al., ICLR 2023): a concept is one new word, and nothing but its vector is learned.

    min over the vector of <new1>  of  E ||epsilon - epsilon_theta(z_t, t, "a photo of <new1> digit")||^2

The vector begins as the class word's. UNet, autoencoder and text encoder stay as they are, and so do the words of earlier concepts: what an
old prompt paints is the same, bit for bit, after any number of sessions. Forgetting is exactly 0, and so is what can be learned of a
shape that the generator never saw. Defaults are those of diffusers' example (AdamW, 1e-4, batch 16, 5,000 steps); its weight decay,
which would shrink the new vector, is left out with that of all words. One vector for each concept.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any

from streamcl.options import PositiveFloat, PositiveInt

from ._painting import ConceptLearner


class TextualInversion(ConceptLearner):
    def __init__(self, *, token_lr: PositiveFloat = 1e-4, epochs: PositiveInt = 5000, batch: PositiveInt = 16, **options: Any) -> None:
        super().__init__(token_lr=token_lr, epochs=epochs, batch=batch, **options)
