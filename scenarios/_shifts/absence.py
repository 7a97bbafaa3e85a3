"""Which samples of a segment lack which modality: exact shares at random places, or a burst that takes away one stretch of the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streamcl.errors import ConfigError
from streamcl.plugins import near_name

Pattern = Mapping[str, float | Mapping[str, float]]  # modality -> a share, or {"burst": a share}


def check(pattern: Pattern, where: str) -> None:
    for modality, value in pattern.items():
        if isinstance(value, Mapping) and list(value) != ["burst"]:
            raise ConfigError(f"{where}: {modality} says {dict(value)}: a share from 0 to 1 is needed, or {{burst: share}}")
        share = value["burst"] if isinstance(value, Mapping) else value
        if not 0 <= share <= 1:
            raise ConfigError(f"{where}: {modality} is {share:g}: a share from 0 to 1 is needed")


def check_modalities(pattern: Pattern, modalities: Sequence[str], where: str) -> None:
    """Refuse modalities that the source lacks, and shares under which a sample would have no modality left."""
    for modality in pattern:
        if modality not in modalities:
            hint = near_name(modality, modalities) or f": there are {', '.join(modalities)}"
            raise ConfigError(f"{where} names an unknown modality {modality!r}{hint}")
    rates, bursts = _shares(pattern)
    if len(modalities) < 2 and any([*rates.values(), *bursts.values()]):
        raise ConfigError(f"{where}: {modalities[0]} is the only modality of this source, and a sample needs one")
    burst = sum(bursts.values())
    if burst > 1:
        raise ConfigError(f"{where}: the bursts take {burst:g} of the segment: they follow one another, so they must add up to at most 1")
    if sum(rates.values()) > (len(modalities) - 1) * (1 - burst) + 1e-9:
        raise ConfigError(
            f"{where}: the shares add up to {sum(rates.values()):g}, and beside bursts of {burst:g} samples would have no modality left: "
            f"at most {(len(modalities) - 1) * (1 - burst):g} with {len(modalities)} modalities"
        )


def presence(pattern: Pattern, modalities: int, count: int, draw: torch.Generator) -> dict[str, Tensor]:
    """For each modality that the pattern names which positions have it; every position keeps one of the source's `modalities` or more.

    A share is exactly `round(share * count)` positions (one less where rounding up would leave a sample with nothing). Modalities are
    taken from different samples as far as these suffice.
    """
    rates, bursts = _shares(pattern)
    masks = {modality: torch.ones(count, dtype=torch.bool) for modality in pattern}
    lengths = {modality: round(share * count) for modality, share in bursts.items()}
    start = int(torch.randint(count - min(count, sum(lengths.values())) + 1, (1,), generator=draw))
    free = torch.ones(count, dtype=torch.bool)
    for modality, length in lengths.items():
        masks[modality][start : start + length] = False
        free[start : start + length] = False
        start += length
    places = free.nonzero().squeeze(1)
    places = places[torch.randperm(len(places), generator=draw)]
    begin, room = 0, (modalities - 1) * len(places)
    for modality, rate in rates.items():
        # Laid one after another around a circle, so that nobody loses a second modality before everyone has lost one.
        lost = min(round(rate * count), len(places), room - begin)
        masks[modality][places[(begin + torch.arange(lost)) % max(len(places), 1)]] = False
        begin += lost
    return masks


def _shares(pattern: Pattern) -> tuple[dict[str, float], dict[str, float]]:
    rates = {modality: value for modality, value in pattern.items() if not isinstance(value, Mapping)}
    return rates, {modality: value["burst"] for modality, value in pattern.items() if isinstance(value, Mapping)}
