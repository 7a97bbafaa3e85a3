"""READ: adapt the attention between modalities, so that it weighs a corrupted one less.

Yang et al., Test-time Adaption against Multi-modal Reliability Bias, ICLR 2024. Adapted are the projections q, k and v of the attention
over the tokens of all modalities, and nothing else. For a batch with logits z, p = softmax(z), and the largest probability m_i of each
sample,

    L_ra  = 1/B * sum_i m_i (1 - log m_i + log gamma)            confidence, noisy predictions held back
    L_bal = - sum_c q_c log q_c,  q = softmax(sum_i p_i)         how evenly the classes are predicted
    L     = L_ra - L_bal

With gamma = 1/e L_ra is -m log m: minimising it raises a probability above 1/e and lowers one below. L_ra alone collapses; L_bal is what
keeps it from that, and since its softmax is of a sum over the batch, it says next to nothing with batches of one: from these nothing is
learned, nor from a batch in which some modality is absent for every sample. Both are counted as skipped.

One step of Adam, and the answer is that of a second forward pass. The released code splits the fused projection of the joint block at its
first forward pass, from weights that are random until then; here the fused parameter itself is adapted, whose gradient is that of the
three slices: Adam's steps are the same. Batch normalisation, if there is any, keeps the source's statistics: nothing of it is adapted.

Evidence: small real data
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from streamcl.adapting import AdaptingStrategy
from streamcl.errors import ConfigError
from streamcl.options import NonNegativeFloat, Optimizer, PositiveFloat
from streamcl.stream import Batch

from ._bimodal import balance, comparable

FUSED = ("qkv", "in_proj", "c_attn", "Wqkv", "query_key_value")
SPLIT = (("q", "k", "v"), ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("to_q", "to_k", "to_v"))


class Read(AdaptingStrategy):
    """`optimizer` of q, k and v; `gamma`, and the weight `balance` of the second term (0 leaves it out).

    `attention` names the attention modules that are adapted, as the network names its parts; `*` stands for anything. Without it, they
    are those that the network calls joint (the backbone joint_transformer does).
    """

    batch_statistics = False

    def __init__(
        self,
        *,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-4),  # noqa: B008
        answer: Literal["before", "after"] = "after",
        gamma: PositiveFloat = 0.36787944117144233,  # 1/e
        balance: NonNegativeFloat = 1.0,
        attention: list[str] | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, answer=answer)
        self.gamma, self.balance, self.attention = gamma, balance, attention

    def parameters(self) -> dict[str, nn.Parameter]:
        """Weight and bias of q, k and v in the attention between modalities."""
        found = list(self._attentions())
        if not found:
            raise ConfigError(
                "read adapts the attention between modalities: it looked for a network that says which that is (the backbone "
                "joint_transformer), and this one does not: name its attention modules in strategy.attention"
            )
        return {name: value for module_name, module in found for name, value in _projections(module_name, module)}

    def loss(self, batch: Batch, logits: Tensor) -> Tensor | None:
        if not comparable(batch, list(batch.inputs)):
            return None
        probabilities = logits.softmax(dim=1)
        most = logits.log_softmax(dim=1).amax(dim=1)  # (batch,), logarithms
        reliable = (most.exp() * (1 - most + math.log(self.gamma))).mean()
        return reliable - self.balance * balance(probabilities)

    def _attentions(self) -> Iterator[tuple[str, nn.Module]]:
        named = dict(self.model.named_modules())
        if self.attention is None:
            joint = [part for module in named.values() if callable(said := getattr(module, "joint", None)) for part in said()]
            yield from ((name, module) for name, module in named.items() if any(module is one for one in joint))
            return
        for wanted in self.attention:
            found = [name for name in named if fnmatchcase(name, wanted) or fnmatchcase(name.partition(".")[2], wanted)]
            if not found:
                there = [name for name, module in named.items() if _is_attention(module)]
                told = f"it has {', '.join(there[:6])}{' and more' if len(there) > 6 else ''}" if there else "it has no attention"
                raise ConfigError(f"read: strategy.attention names {wanted!r}, which is no part of this model: {told}")
            yield from ((name, named[name]) for name in found)


def _parts(module: nn.Module) -> list[str]:
    """The names of what makes q, k and v in this module, modules or parameters."""
    if isinstance(module, nn.MultiheadAttention):
        return [name for name, _ in module.named_parameters(recurse=False) if name.startswith(("in_proj", "q_proj", "k_proj", "v_proj"))]
    children = dict(module.named_children())
    for fused in FUSED:
        if fused in children:
            return [fused]
    return next((list(names) for names in SPLIT if all(name in children for name in names)), [])


def _is_attention(module: nn.Module) -> bool:
    return bool(_parts(module))


def _projections(name: str, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    parts = _parts(module)
    if not parts:
        looked = "nn.MultiheadAttention, one layer called " + ", ".join(FUSED) + ", or three called " + ", ".join(map("/".join, SPLIT))
        raise ConfigError(f"read: {name or 'the model'} is no attention that it knows: it looked for {looked}")
    return [
        (f"{name}.{inner}" if name else inner, value)
        for inner, value in module.named_parameters()
        if any(inner == part or inner.startswith(f"{part}.") for part in parts)
    ]
