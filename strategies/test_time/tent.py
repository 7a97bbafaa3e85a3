"""Tent: one step on the mean entropy of each batch's answers, over weight and bias of the normalisation layers alone.

Wang et al., ICLR 2021, arXiv 2006.10726. For a batch with logits z and probabilities p = softmax(z)

    L = 1/B * sum_i H(z_i),    H(z) = -sum_c p_c log p_c

is minimised by one step; the answer is that of the forward pass before the step, as in the paper, whose authors found that a second one
changes little (`answer: after` makes it). Batch normalisation uses the batch at hand. The released code puts the whole model in training
mode; here it is in evaluation mode, so that dropout stays off.

There is no protection in it: at a learning rate that is too high, or on long streams, it ends up predicting one class. Leave the guard on.

Defaults: Adam at 1e-3, as for CIFAR-C with batches of 200 (ImageNet-C with ResNet-50: SGD at 2.5e-4, momentum 0.9, batches of 64).

Evidence: small real data
"""

from __future__ import annotations

from torch import Tensor

from streamcl.adapting import AdaptingStrategy, entropy
from streamcl.stream import Batch


class Tent(AdaptingStrategy):
    """`optimizer` of the normalisation layers; `answer`: with the weights before or after the update."""

    def loss(self, batch: Batch, logits: Tensor) -> Tensor:
        return entropy(logits).mean()
