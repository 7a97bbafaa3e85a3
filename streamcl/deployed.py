"""Any torch.nn.Module as the strategies see a model: a batch goes in, logits and features come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamcl.errors import ConfigError, DataError
from streamcl.nn.model import Model
from streamcl.stream import Batch

Forward = Callable[[Any, Any], Any]  # (module, inputs as they were given) -> logits, (logits, features), or (logits, {modality: features})
ONE = "input"  # the name of the modality where there is one tensor


class _Form:
    """How inputs are given: tensor, sequence, mapping or batch; and of what shape and type they were when the module took them. The copy
    that adapts in shadow mode shares it."""

    def __init__(self) -> None:
        self.said: str | None = None
        self.asked: str | None = None
        self.taken: dict[str, Any] = {}

    def __deepcopy__(self, memo: Any) -> _Form:
        return self


class Deployed(nn.Module):
    """A module around which the online loop stands. Its parameters keep their names, behind `module.`.

    Inputs reach the module as they were given: a tensor, a tuple, or a mapping of keyword arguments. Logits are what it returns, or the
    `logits` of that. Features, for methods that need them, are what goes into its last linear layer. Where that is not so, `forward` does
    it: it takes the module and the inputs, and returns logits, or logits and features (a tensor, or one for each modality).
    """

    def __init__(self, module: nn.Module, forward: Forward | None = None) -> None:
        super().__init__()
        self.module, self.own_forward = module, forward
        self.form = _Form()
        linear = [(name, one) for name, one in module.named_modules() if isinstance(one, nn.Linear)]
        self.last: tuple[str, nn.Linear] | None = linear[-1] if linear else None

    def batch(self, inputs: Any, ids: Callable[[int], int] = lambda count: 0) -> Batch:
        """What a person hands over, as a batch; `ids` says from where so many samples are numbered. DataError says what is wrong."""
        columns: dict[str, Any]
        if isinstance(inputs, Batch):
            form, columns = "batch", inputs.inputs
        elif isinstance(inputs, Tensor):
            form, columns = "tensor", {ONE: inputs}
        elif isinstance(inputs, Mapping):
            form, columns = "mapping", {str(name): value for name, value in inputs.items()}
        elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
            form, columns = "sequence", {str(place): value for place, value in enumerate(inputs)}
        elif isinstance(inputs, np.ndarray):
            raise DataError("a batch is a tensor, and this is a NumPy array: give torch.from_numpy(batch)")
        else:
            raise DataError(
                f"a batch is a tensor, a sequence or a mapping of tensors, or a streamcl Batch, and this is a {type(inputs).__name__}"
            )
        counts = {}
        for name, value in columns.items():
            if isinstance(value, Tensor) and value.dim() == 0:
                raise DataError(f"{name} is a single number: the first dimension of every input is the batch (pass constants in `forward`)")
            if isinstance(value, np.ndarray):
                raise DataError(f"{name} is a NumPy array: give torch.from_numpy of it")
            if not isinstance(value, Tensor | list):
                raise DataError(f"{name} is a {type(value).__name__}: tensors are needed, or lists (pass constants in `forward`)")
            counts[name] = len(value)
        if not counts:
            raise DataError("the batch holds no input")
        if len(set(counts.values())) > 1:
            raise DataError(f"the inputs are of different lengths: {', '.join(f'{name} {count}' for name, count in counts.items())}")
        if self.form.said not in (None, form):
            raise DataError(f"the batches before were given as a {self.form.said}, and this one as a {form}: give all in one form")
        self.form.asked = form
        if isinstance(inputs, Batch):
            return inputs
        length = next(iter(counts.values()))
        first = ids(length)
        return Batch(columns, None, torch.arange(first, first + length))

    def forward(self, batch: Batch) -> Tensor:
        return self._split(self._run(batch))[0]

    def both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits, and the features that they were made from, of one forward pass."""
        if self.own_forward is not None or self.last is None:
            logits, features = self._split(self._run(batch))
            if features is None:
                raise ConfigError(self._no_features())
            return logits, torch.cat([value.flatten(1) for value in features.values()], dim=1) if isinstance(features, dict) else features
        seen: list[Tensor] = []
        hook = self.last[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            logits, _ = self._split(self._run(batch))
        finally:
            hook.remove()
        if not seen or seen[-1].shape[0] != logits.shape[0] or seen[-1].dim() != 2 or self.last[1].out_features != logits.shape[1]:
            raise ConfigError(self._no_features())
        return logits, seen[-1]

    def features(self, batch: Batch) -> Tensor:
        return self.both(batch)[1]

    def by_modality(self, batch: Batch) -> dict[str, Tensor]:
        """The features of each modality, which only a `forward` of one's own can tell."""
        _, features = self._split(self._run(batch))
        if not isinstance(features, dict):
            raise ConfigError(
                "this method needs the features of each modality: give `forward`, which takes the module and the inputs and returns logits "
                "and a mapping of modality to features"
            )
        return features

    def _run(self, batch: Batch) -> Any:
        shapes = {name: (tuple(v.shape[1:]), v.dtype) if isinstance(v, Tensor) else None for name, v in batch.inputs.items()}
        try:
            given = self._called(batch)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            unusual = shapes != self.form.taken and "more than 1 value per channel" not in str(error)
            if not unusual or isinstance(error, torch.OutOfMemoryError | ConfigError):
                raise  # a fault of the module's, or of ours, is not the batch's
            told = ", ".join(
                f"{name} {' x '.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
                if isinstance(value, Tensor)
                else f"{name} {len(value)} values"
                for name, value in batch.inputs.items()
            )
            raise DataError(f"the module cannot take this batch ({told}): {' '.join(str(error).split())}") from error
        self.form.said, self.form.taken = self.form.said or self.form.asked, shapes
        return given

    def _called(self, batch: Batch) -> Any:
        inputs: Any = batch
        form = self.form.said or self.form.asked
        if form == "tensor":
            inputs = batch.inputs[ONE]
        elif form == "mapping":
            inputs = dict(batch.inputs)
        elif form == "sequence":
            inputs = tuple(batch.inputs.values())
        if self.own_forward is not None:
            return self.own_forward(self.module, inputs)
        if form == "tensor":
            return self.module(inputs)
        if form == "sequence":
            return self.module(*inputs)
        return self.module(**(inputs if form == "mapping" else batch.inputs))

    def _split(self, given: Any) -> tuple[Tensor, Tensor | dict[str, Tensor] | None]:
        features: Any = None
        if isinstance(given, tuple) and len(given) == 2 and self.own_forward is not None:
            given, features = given
        elif isinstance(given, Mapping) and "logits" in given:
            given = given["logits"]
        elif not isinstance(given, Tensor) and isinstance(getattr(given, "logits", None), Tensor):
            given = given.logits
        if not isinstance(given, Tensor) or given.dim() != 2:
            what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            raise ConfigError(
                f"the module returned {what}, and one row of scores for each sample is needed: give `forward`, which takes the module "
                "and the inputs and returns logits (batch, classes), or logits and features"
            )
        return given, features

    def _no_features(self) -> str:
        return (
            "this method needs the features from which the logits are made, and they do not go into the module's last linear layer: give "
            "`forward`, which takes the module and the inputs and returns logits and features"
        )


def wrapped(module: nn.Module, forward: Forward | None) -> Model | Deployed:
    """What the loop stands around: streamcl's own model as it is, anything else as `Deployed`."""
    if isinstance(module, Model | Deployed):
        if forward is not None:
            raise ConfigError("a model of streamcl says itself where its logits and features come out: leave out `forward`")
        return module
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"the online loop stands around a torch.nn.Module, a model that streamcl.load gave, and this is a {type(module).__name__}"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ConfigError("a scripted module hides its layers, and none of them can be adapted: give the module that was scripted")
    return Deployed(module, forward)
