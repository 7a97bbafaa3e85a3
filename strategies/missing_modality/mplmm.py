"""MPLMM: prompt learning with missing modalities (Guo, Jin and Zhao: Multimodal Prompt Learning with Missing Modalities, ACL 2024).

Three kinds of prompts around a frozen transformer, for tokens x_m of each modality m and a sample that has some of them:

    generative       where m is missing: x_m = GELU(W_(m, pattern) [G_m ; GELU(f_jm x_j) for the j that are there])     along the tokens
    missing signal   x_m <- x_m + S_m[missing or present]
    missing type     R = sum_m S_m[state of m]' W_m,  and T_1 R ... T_M R join the sequence half way up

The paper's network is MulT: cross-modal attention between pairs of modalities, then self-attention of each, before which the missing-type
prompts join, and whose last position, a prompt, is read. Our transformer has one sequence, and reads its class token; the prompts join
before the layer in the middle, and R is width x width. Parts can be switched off (`generate`, `signal`, `missing_type`): a modality that
is not generated has the dummy's tokens; without `signal` S is only there for R.

Two faults of the released code are not repeated: T and W are both zero there, which is a saddle that they never leave (here both are
random, and S is zero, so that at first nothing is added), and its last scores are those of the validation part. As there f_jm is one linear
layer, a generator has weights of its own for each pattern, and prompts, generators, input projections (`projections`), a residual MLP and
the head learn. Defaults are the released ones: 16 tokens, Adam at 1e-3, batches of 64, 40 epochs, gradients clipped at 0.8, dropout 0.1
in the residual MLP.

Evidence: small real data
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from streamcl.nn.prompts import Embedded, Insertion, Promptable, Prompts, code, patterns
from streamcl.options import Fraction, Optimizer, PositiveFloat, PositiveInt

from ._prompted import Prompted


class MPLMM(Prompted):
    def __init__(
        self,
        *,
        length: PositiveInt = 16,
        generate: bool = True,
        signal: bool = True,
        missing_type: bool = True,
        projections: bool = True,
        dropout: Fraction = 0.1,
        epochs: PositiveInt = 40,
        batch: PositiveInt = 64,
        optimizer: Optimizer = Optimizer(name="adam", lr=1e-3),  # noqa: B008
        clip: PositiveFloat | None = 0.8,
        **options: Any,
    ) -> None:
        super().__init__(epochs=epochs, batch=batch, optimizer=optimizer, clip=clip, **options)
        self.length, self.generate, self.signal, self.missing_type = length, generate, signal, missing_type
        self.projections, self.dropout = projections, dropout

    def prompts_for(self, transformer: Promptable) -> Prompts:
        return _ThreePrompts(transformer, self.length, self.dropout, self.generate, self.signal, self.missing_type)

    def opened(self, transformer: Promptable) -> list[nn.Parameter]:
        return transformer.projections() if self.projections else []


class _ThreePrompts(Prompts):
    def __init__(self, transformer: Promptable, length: int, dropout: float, generate: bool, signal: bool, missing_type: bool) -> None:
        super().__init__()
        self.generate, self.signal, self.missing_type = generate, signal, missing_type
        width, reads = transformer.width, transformer.reads
        self.reads, self.middle, cases = reads, transformer.depth // 2, 2 ** len(reads) - 1
        lengths = {name: transformer.lengths[name] for name in reads}
        self.states = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, lengths[name], width)) for name in reads})  # missing, present
        self.start = nn.ParameterDict({name: nn.Parameter(torch.zeros(length, width)) for name in reads})
        self.bridges = nn.ModuleDict({f"{j}_{m}": nn.Linear(width, width) for m in reads for j in reads if j != m})
        self.mixers, self.offsets = nn.ParameterDict(), nn.ParameterDict()
        for name in reads:
            inside = length + sum(lengths.values()) - lengths[name]
            self.mixers[name] = nn.Parameter(torch.empty(cases, lengths[name], inside).uniform_(-1, 1) / math.sqrt(inside))
            self.offsets[name] = nn.Parameter(torch.zeros(cases, lengths[name], 1))
        self.types = nn.Parameter(torch.randn(len(reads), length, width) / math.sqrt(width))
        self.maps = nn.ParameterDict({name: nn.Parameter(torch.randn(lengths[name], width) / math.sqrt(lengths[name])) for name in reads})
        self.residual = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        generation = (self.start, self.bridges, self.mixers, self.offsets)
        for used, parts in ((generate, generation), (signal or missing_type, (self.states,)), (missing_type, (self.maps,))):
            for part in parts:
                part.requires_grad_(used)
        self.types.requires_grad_(missing_type)

    def embed(self, made: Embedded, here: Tensor) -> Embedded:
        case = code(here).clamp(max=2 ** len(self.reads) - 2)
        tokens, masks = dict(made.tokens), dict(made.masks)
        for place, name in enumerate(self.reads):
            there = here[:, place]
            if self.generate:
                tokens[name] = torch.where(there[:, None, None], made.tokens[name], self.generated(name, made.tokens, here, case))
                masks[name] = made.masks[name] | ~there[:, None]
            if self.signal:
                tokens[name] = tokens[name] + self.states[name].index_select(0, there.long())
        return replace(made, tokens=tokens, masks=masks)

    def generated(self, name: str, tokens: dict[str, Tensor], here: Tensor, case: Tensor) -> Tensor:
        """Tokens of a modality from those of the others; of one that is missing itself nothing is taken  # (batch, length, width)"""
        parts = [self.start[name].expand(len(here), -1, -1)]
        for place, other in enumerate(self.reads):
            if other != name:
                parts.append(gelu(self.bridges[f"{other}_{name}"](tokens[other])) * here[:, place, None, None])
        mixer, offset = (table[name].index_select(0, case) for table in (self.mixers, self.offsets))
        return gelu(mixer @ torch.cat(parts, dim=1) + offset)

    def relations(self) -> Tensor:
        """R of every pattern  # (patterns, width, width)"""
        each = torch.stack([self.states[name].transpose(1, 2) @ self.maps[name] for name in self.reads])  # (modalities, 2, width, width)
        states = patterns(len(self.reads), each.device).long()
        return torch.stack([each[place].index_select(0, states[:, place]) for place in range(len(self.reads))]).sum(dim=0)

    def before(self, layer: int, here: Tensor) -> Insertion | None:
        if not self.missing_type or layer != self.middle:
            return None
        kinds = self.types.flatten(0, 1) @ self.relations()  # (patterns, modalities x length, width)
        return Insertion(kinds.index_select(0, code(here).clamp(max=len(kinds) - 1)))

    def after(self, features: Tensor) -> Tensor:
        return features + self.residual(features)
