"""Types for the options of plug-ins: numbers with a range, and how to optimise. They are checked before anything runs; no torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Optimizer(_Settings):
    """An optimiser of torch.optim by its lower-case name, with its own arguments: `{name: sgd, lr: 0.1, momentum: 0.9}`."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: Literal["sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adadelta", "adamax"] = "sgd"
    lr: PositiveFloat = 0.05
    momentum: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known_arguments(self) -> Optimizer:
        known = {
            "sgd": {"momentum", "weight_decay", "nesterov", "dampening"},
            "adam": {"betas", "eps", "weight_decay", "amsgrad"},
            "adamw": {"betas", "eps", "weight_decay", "amsgrad"},
            "nadam": {"betas", "eps", "weight_decay", "momentum_decay"},
            "radam": {"betas", "eps", "weight_decay"},
            "rmsprop": {"alpha", "eps", "weight_decay", "momentum", "centered"},
            "adagrad": {"lr_decay", "weight_decay", "eps"},
            "adadelta": {"rho", "eps", "weight_decay"},
            "adamax": {"betas", "eps", "weight_decay"},
        }[self.name]
        unknown = set(self.arguments()) - known
        if unknown:
            raise ValueError(f"{self.name} takes no {', '.join(sorted(unknown))}; it takes lr, {', '.join(sorted(known))}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def arguments(self) -> dict[str, Any]:
        """What is passed on beside the learning rate."""
        return {k: v for k, v in self.model_dump().items() if k not in {"name", "lr"} and v is not None}


class Schedule(_Settings):
    """How the learning rate moves over the epochs of a task: constant, steps, cosine, or linear down to `end`; `warmup` epochs first."""

    name: Literal["constant", "steps", "cosine", "linear"] = "constant"
    milestones: tuple[PositiveFloat, ...] = ()  # epochs, or fractions of all epochs where they are below 1
    gamma: PositiveFloat = 0.1
    end: NonNegativeFloat = 0.0  # the last factor of cosine and linear
    warmup: NonNegativeFloat = 0.0

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _milestones(self) -> Schedule:
        if (self.name == "steps") != bool(self.milestones):
            raise ValueError("milestones belong to the schedule steps, and steps needs them")
        return self


class Stage(_Settings):
    """What is different in the first task, or in the later ones."""

    epochs: PositiveInt | None = None
    batch: PositiveInt | None = None
    optimizer: Optimizer | None = None
    schedule: Schedule | None = None


class Stages(_Settings):
    """The literature trains the first task differently: `{first: {epochs: 200}, later: {epochs: 170}}`."""

    first: Stage = Stage()
    later: Stage = Stage()


class Lora(_Settings):
    """A low-rank adapter of PEFT: its rank, `alpha` over the rank is what it counts, and the layers by name ("all-linear" for all)."""

    rank: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.0
    layers: str | list[str] = "all-linear"


def _as_float(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_as_float)]

__all__ = [
    "Fraction",
    "Lora",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Number",
    "Optimizer",
    "PositiveFloat",
    "PositiveInt",
    "Schedule",
    "Stage",
    "Stages",
]
