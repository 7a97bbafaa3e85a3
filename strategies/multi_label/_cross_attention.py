"""KRT's incremental cross-attention: one block that all sessions share, and for each session a token and a head of its own.

With the features of the places of a picture projected to P  # (places, dim), a position embedding added, the transfer token k that all
sessions share and the retention token r_i of session i,

    S_i = [k; r_i; P],   a = softmax((LN(k) W_q) (LN(S_i) W_k)' / sqrt(dim / heads)) LN(S_i) W_v W_o
    u = k + a,   e_i = u + MLP(LN(u)),   z_i = Linear_i(LN_i(e_i))

Only k asks: r_i is one more key and value. What k and P give as keys and values is computed once for all sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from streamcl.context import Context
from streamcl.nn.backbone import Backbone
from streamcl.stream import Batch, StreamInfo

MLP_RATIO = 4
SPREAD = 0.02  # the standard deviation that tokens and positions begin with


class Spread(Backbone):
    """A backbone whose features are those of all places, one place after another, in place of their average."""

    def __init__(self, backbone: Backbone, info: StreamInfo, context: Context) -> None:
        super().__init__()
        self.inner, self.licence, self.origin = backbone, backbone.licence, backbone.origin
        with torch.no_grad(), context.model.evaluating():
            self.places, self.width = backbone.patches(context.prepare(blank(info), train=False)).shape[1:]
        self.dim = self.places * self.width
        self.train(backbone.training)

    def build(self, info: StreamInfo) -> None:
        """Its layers are there already."""

    def forward(self, batch: Batch) -> Tensor:
        return self.inner.patches(batch).flatten(1)  # (batch, places x width)


def blank(info: StreamInfo) -> Batch:
    """One sample in which there is nothing, on which a backbone shows the shape of what it gives."""
    inputs = {name: [""] if m.kind == "text" else torch.zeros(1, *m.shape) for name, m in info.modalities.items()}
    return Batch(inputs, None, torch.zeros(1, dtype=torch.int64))


class CrossAttention(nn.Module):
    """The head of a model: its features are those of all places side by side, and each growth is a session.

    The tokens and heads of all sessions but the newest are frozen and stay in evaluation mode.
    """

    def __init__(self, places: int, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.places, self.dim, self.heads = places, dim, heads
        self.project = nn.Linear(width, dim)  # the convolution with a kernel of 1
        self.position, self.transfer = nn.Parameter(torch.empty(places, dim)), nn.Parameter(torch.empty(1, dim))
        for values in (self.position, self.transfer):
            nn.init.trunc_normal_(values, std=SPREAD)
        self.norm, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))
        self.retention = nn.ParameterList()  # r_i  # (1, dim) each
        self.sessions = nn.ModuleList()  # h_i

    @property
    def sizes(self) -> list[int]:
        """The classes of each session."""
        return [session[1].out_features for session in self.sessions]  # type: ignore[index]

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    def resize(self, classes: int) -> None:
        """A session for the classes that are more than there were, or the newest sessions go."""
        while self.classes > classes:
            self.sessions, self.retention = self.sessions[:-1], self.retention[:-1]
        more = classes - self.classes
        if not more:
            return
        for part in (self.retention, self.sessions):
            part.requires_grad_(False)
        token = torch.empty(1, self.dim, device=self.transfer.device)
        self.retention.append(nn.Parameter(nn.init.trunc_normal_(token, std=SPREAD)))
        self.sessions.append(nn.Sequential(nn.LayerNorm(self.dim), nn.Linear(self.dim, more)).to(self.transfer.device))
        self.train(self.training)

    def hold(self, all_sessions: bool) -> None:
        """Freeze the newest session as well, for a task that brings no class, or let it learn."""
        for part in (*self.retention[-1:], *self.sessions[-1:]):
            part.requires_grad_(not all_sessions)

    def divide(self, sizes: Sequence[int]) -> None:
        """Take this shape: a session of each of these sizes."""
        if self.sizes != list(sizes):
            self.resize(0)
            for end in torch.tensor(sizes).cumsum(0).tolist():
                self.resize(end)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for session in self.sessions[:-1]:
            session.eval()
        return self

    def embed(self, features: Tensor) -> Tensor:
        """e_i of every session  # (batch, sessions, dim)"""
        count = len(features)
        patches = self.project(features.unflatten(1, (self.places, -1))) + self.position
        transfer = self.transfer.expand(count, 1, -1)
        shared = self.norm(torch.cat([transfer, patches], dim=1))  # (batch, 1 + places, dim)
        keys, values = self._in_heads(self.key(shared)), self._in_heads(self.value(shared))
        query = self._in_heads(self.query(self.norm(transfer)))
        found = []
        for token in self.retention:
            own = self.norm(token).expand(count, 1, -1)
            all_keys = torch.cat([self._in_heads(self.key(own)), keys], dim=2)
            all_values = torch.cat([self._in_heads(self.value(own)), values], dim=2)
            asked = scaled_dot_product_attention(query, all_keys, all_values).transpose(1, 2).flatten(2)  # (batch, 1, dim)
            u = transfer + self.out(asked)
            found.append(u + self.mlp(self.norm_mlp(u)))
        return torch.cat(found, dim=1) if found else features.new_empty(count, 0, self.dim)

    def _in_heads(self, values: Tensor) -> Tensor:
        return values.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (batch, heads, places, dim / heads)

    def classify(self, embeddings: Tensor) -> Tensor:
        """(batch, classes)"""
        scores = [session(embeddings[:, number]) for number, session in enumerate(self.sessions)]
        return torch.cat(scores, dim=1) if scores else embeddings.new_empty(len(embeddings), 0)

    def forward(self, features: Tensor) -> Tensor:
        return self.classify(self.embed(features))
