"""DeYO: entropy minimisation on samples whose answer comes from the shape of what is seen: it falls when the shape is destroyed.

Lee et al., ICLR 2024, arXiv 2403.07366. Of a batch with probabilities p_i, decisions c_i and entropies H_i, and with p'_i for the same
samples once their shape is destroyed:

    1.  H_i < tau_e  keeps what is sure
    2.  PLPD_i = p_i[c_i] - p'_i[c_i] > tau_p  keeps what is sure because of the shape
    3.  one step on the mean over the kept of  (exp(E0 - H_i) + exp(PLPD_i)) H_i, with no gradient through the weights

`destroy: patch` cuts an image into `patches` x `patches` pieces and puts them together in another order, drawn for each sample (sizes that
do not divide are resized before and after); `pixel` does so with single pixels, in one order for the batch; `occlude` fills the middle,
half of each side, with the mean of the image. The paper is about images. Here it is done to all modalities that have places, at once, or
to those of `modalities`: the frames of a video are all cut in the same way, a spectrogram is cut as an image is, a wave along time into
`patches` x `patches` pieces. Vectors and texts stay as they are.

`tau_e` is 0.5 ln C and `e0` 0.4 ln C unless given; `tau_p` is 0.2 (0.3 in the mild setting of the paper, 0.5 on Waterbirds). The
normalisation layers of the last blocks are left out (`skip`). The released code destroys and answers the samples of rule 1 alone. So it is
here; but where batch normalisation goes by the batch the whole batch is answered, lest its statistics come from a few samples. The
optimiser's defaults are those of SAR.

Evidence: small real data
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from streamcl.adapting import entropy
from streamcl.context import Context
from streamcl.errors import ConfigError
from streamcl.options import Number, Optimizer, PositiveFloat, PositiveInt
from streamcl.stream import Batch, StreamInfo

from ._reliable import Shallow, margin

PLACES = ("image", "video", "audio")


class DeYO(Shallow):
    """`tau_e`, `tau_p`: the margins of the two rules (`tau_p: -2` keeps all). `e0` and `weighted`: of the weights, that may be those of
    entropy, of PLPD, both, or none. `destroy`, `patches`, `modalities`: what is done to the shape, and to what."""

    def __init__(
        self,
        *,
        tau_e: PositiveFloat | None = None,
        tau_p: Number = 0.2,
        e0: PositiveFloat | None = None,
        weighted: Literal["both", "entropy", "plpd", "none"] = "both",
        destroy: Literal["patch", "pixel", "occlude"] = "patch",
        patches: PositiveInt = 4,
        modalities: list[str] | None = None,
        optimizer: Optimizer = Optimizer(name="sgd", lr=2.5e-4, momentum=0.9),  # noqa: B008
        **options: Any,
    ) -> None:
        super().__init__(optimizer=optimizer, **options)
        self.tau_e, self.tau_p, self.e0, self.weighted = tau_e, tau_p, e0, weighted
        self.destroy, self.patches, self.modalities = destroy, patches, modalities

    def start(self, info: StreamInfo, context: Context) -> None:
        super().start(info, context)
        self.kinds = {name: modality.kind for name, modality in info.modalities.items()}
        if self.kinds:
            self._destroyed_modalities(self.kinds)

    def loss(self, batch: Batch, logits: Tensor) -> Tensor | None:
        found = entropy(logits)
        sure = (found.detach() < margin(self.tau_e, 0.5, logits)).nonzero().squeeze(1)
        self.count("sure", len(sure))
        if not len(sure):
            self.count("kept", 0)
            return None
        fall = self.fall(batch, logits.detach().softmax(dim=1), sure)
        keep = (fall > self.tau_p).nonzero().squeeze(1)
        self.count("kept", len(keep))
        if not len(keep):
            return None
        kept, fall = found[sure[keep]], fall[keep]
        if self.weighted == "none":
            return kept.mean()
        weights = torch.zeros_like(fall)
        if self.weighted != "plpd":
            weights += (margin(self.e0, 0.4, logits) - kept.detach()).exp()
        if self.weighted != "entropy":
            weights += fall.exp()
        return (weights * kept).mean()

    @torch.no_grad()
    def fall(self, batch: Batch, probabilities: Tensor, sure: Tensor) -> Tensor:
        """By how much the probability of the decision falls once the shape is destroyed: PLPD  # (sure,)"""
        whole = bool(self.layers) and self.batch_statistics
        with self.statistics(gather=False):
            after = self.model(self.destroyed(batch if whole else batch[sure])).softmax(dim=1)
        before = probabilities[sure]
        decisions = before.argmax(dim=1, keepdim=True)
        return (before.gather(1, decisions) - (after[sure] if whole else after).gather(1, decisions)).squeeze(1)

    def destroyed(self, batch: Batch) -> Batch:
        """The batch without its shapes."""
        kinds = {name: self.kinds.get(name) or self._kind(name, values) for name, values in batch.inputs.items()}
        chosen = self._destroyed_modalities(kinds)
        return batch.replace(inputs={n: self._without_shape(v) if n in chosen else v for n, v in batch.inputs.items()})

    def _kind(self, name: str, values: Any) -> str:
        """Of an input of which nobody has said what it is: pictures and videos by their shape, and what was named is taken for a sound."""
        dimensions = values.dim() if isinstance(values, Tensor) and values.is_floating_point() else 0
        if dimensions in (4, 5):
            return "image" if dimensions == 4 else "video"
        return "audio" if dimensions in (2, 3) and name in (self.modalities or []) else "vector"

    def _destroyed_modalities(self, kinds: dict[str, str]) -> list[str]:
        have = [name for name, kind in kinds.items() if kind in PLACES]
        wrong = [name for name in self.modalities or [] if name not in have]
        if wrong or not have or self.modalities == []:
            there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"
            told = f"modalities names {wrong[0]!r}, which is none of these: " if wrong else ""
            raise ConfigError(f"deyo destroys the shape of images, videos and sounds; {told}it looked for these and found {there}")
        return have if self.modalities is None else self.modalities

    def _without_shape(self, values: Any) -> Tensor:
        """An image or video (..., height, width), a wave (batch, time): without its shape."""
        if values.dim() == 2:
            return self._cut(values[:, None, None], 1, self.patches**2)[:, 0, 0]
        planes = values.flatten(1, -3) if values.dim() > 3 else values[:, None]  # (batch, channels of all frames, height, width)
        return self._cut(planes, self.patches, self.patches).view_as(values)

    def _cut(self, planes: Tensor, rows: int, columns: int) -> Tensor:
        height, width = planes.shape[-2:]
        if self.destroy == "occlude":
            top, left = (height - (height + 1) // 2) // 2 if height > 1 else 0, (width - (width + 1) // 2) // 2
            filled = planes.clone()
            filled[..., top : top + (height + 1) // 2, left : left + (width + 1) // 2] = planes.mean(dim=(-2, -1), keepdim=True)
            return filled
        if self.destroy == "pixel":
            order = torch.randperm(height * width, generator=self.context.generator).to(planes.device)
            return planes.flatten(2)[:, :, order].view_as(planes)
        rows, columns = min(rows, height), min(columns, width)
        size = (height // rows * rows, width // columns * columns)
        resized = planes if size == (height, width) else _resized(planes, size)
        order = torch.rand(len(planes), rows * columns, generator=self.context.generator).argsort(dim=1).to(planes.device)
        put = together(pieces(resized, rows, columns).take_along_dim(order[:, :, None, None, None], dim=1), rows, columns)
        return put if size == (height, width) else _resized(put, (height, width))


def pieces(planes: Tensor, rows: int, columns: int) -> Tensor:
    """Images cut into equal pieces  # (batch, rows * columns, channels, height / rows, width / columns)"""
    cut = planes.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # (batch, channels, rows, height, columns, width)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def together(parts: Tensor, rows: int, columns: int) -> Tensor:
    """The reverse of `pieces`."""
    return parts.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3).contiguous()


def _resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(planes, size=size, mode="bilinear", align_corners=False, antialias=True)
