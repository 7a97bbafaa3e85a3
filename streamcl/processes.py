"""Several processes that train one model: who this one is, and the few things that they tell each other."""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from streamcl.errors import ConfigError

if TYPE_CHECKING:
    from streamcl.config import EngineConfig
    from streamcl.strategy import Strategy


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, settings: EngineConfig, strategy: Strategy) -> Processes:
        """Join the others when a launcher started several; refused for a strategy that has not shown that it can."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        if settings.parallel == "none":
            raise ConfigError(f"engine.parallel is none and {world} processes were started: start one, or set engine.parallel=ddp")
        if not strategy.processes:
            raise ConfigError(
                f"{type(strategy).__name__} has not shown that {world} processes give it the result of one: start it on one process"
            )
        from accelerate import PartialState

        state = PartialState(cpu=settings.device == "cpu" or not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """The process that writes."""
        return self.rank == 0

    def device(self, asked: str) -> torch.device:
        if asked == "auto":
            asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if asked.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"engine.device is {asked} and this machine has no CUDA device: use auto or cpu")
        if asked == "cuda":
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if self.world > 1 else 0)
        return torch.device(asked)

    def means(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """The mean of each figure over all samples, from every process's sum and count."""
        if self.world > 1:
            import torch.distributed as dist

            everyone: list[dict[str, list[float]]] = [{} for _ in range(self.world)]
            dist.all_gather_object(everyone, sums)
            names = sorted({name for one in everyone for name in one})
            sums = {name: [sum(one.get(name, [0.0, 0.0])[i] for one in everyone) for i in (0, 1)] for name in names}
        return {name: total / count for name, (total, count) in sums.items() if count}

    def any(self, flag: bool) -> bool:
        """Whether any process says yes; all of them wait here for the answer."""
        if self.world == 1:
            return flag
        import torch.distributed as dist

        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        voice = torch.tensor([int(flag)], device=device)
        dist.all_reduce(voice, op=dist.ReduceOp.MAX)
        return bool(voice.item())

    def agree(self, text: str) -> bool:
        """Whether all processes say the same; all of them wait here for the others' word."""
        import torch.distributed as dist

        everyone = [""] * self.world
        dist.all_gather_object(everyone, text)
        return len(set(everyone)) == 1


def leave(code: int) -> None:
    """End this process here where it is one of several: the destructors of torch.distributed's threads now and then abort one that has
    done all its work (`terminate called without an active exception`). A process alone returns, and ends as any program does.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        return
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
