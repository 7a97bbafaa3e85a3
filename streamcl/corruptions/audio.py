"""Noises over waveforms: Gaussian as published, and traffic, crowd, rain, thunder and wind, which are synthesised on the spot.

The published benchmark overlays one recording of each kind, 1, 2, 4, 6 or 8 dB louder than it was recorded, so that how much noise a clip
gets depends on the clip. Those recordings cannot travel with this engine. Here each clip gets a noise of its own, made from random numbers
with the spectrum and the rhythm of the thing, and the severity is exact: the noise is 1, 2, 4, 6 or 8 dB louder than the clip, that is, the
signal-to-noise ratio over the whole clip is -1, -2, -4, -6 or -8 dB. A silent clip therefore stays silent, except under Gaussian noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.fft import next_fast_len
from torch import Tensor

DEVIATIONS = (0.08, 0.12, 0.18, 0.26, 0.38)
LOUDER = (1.0, 2.0, 4.0, 6.0, 8.0)  # decibel


@dataclass(frozen=True)
class Clips:
    """What a noise is made for: how many, how long, and where the numbers come from."""

    count: int
    samples: int
    rate: float
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(self.count, *shape, generator=self.generator, device=self.device).mul_(high - low).add_(low)

    def seconds(self) -> Tensor:
        return torch.arange(self.samples, device=self.device) / self.rate

    def noise(self, loudness: Callable[[Tensor], Tensor], *voices: int) -> Tensor:
        """Gaussian noise of unit power (over what is long enough) whose loudness at each frequency is given  # (count, *voices, samples)"""
        length = next_fast_len(max(self.samples, 2), real=True)
        hertz = torch.arange(length // 2 + 1, device=self.device) * (self.rate / length)
        heard = loudness(hertz)
        spectrum = torch.randn(self.count, *voices, len(hertz), 2, generator=self.generator, device=self.device)
        wave = torch.fft.irfft(torch.view_as_complex(spectrum) * heard, n=length)[..., : self.samples]
        return wave * (length / (2 * heard.square().sum(dim=-1, keepdim=True)).sqrt().clamp_min(1e-20))

    def swell(self, hertz: float, *voices: int) -> Tensor:
        """Loudness that comes and goes about so many times a second, never negative."""
        slow = self.noise(lambda at: torch.exp(-0.5 * (at / hertz) ** 2), *voices)
        return torch.exp(0.7 * slow)


def _band(hertz: Tensor, low: float, high: float, slope: float = 0.0) -> Tensor:
    """From low to high, with soft edges; falling by hertz to the power of `slope` inside."""
    rising = 1 / (1 + (low / hertz.clamp_min(1e-3)) ** 4)
    return rising / (1 + (hertz / high) ** 4) * (hertz.clamp_min(low) / low) ** -slope


def traffic(clips: Clips) -> Tensor:
    """The rumble of engines and the hiss of tyres, swelling as cars pass, and the hum of one engine."""
    rumble = clips.noise(lambda hertz: _band(hertz, 30, 400, 0.8)) * clips.swell(0.4)
    tyres = clips.noise(lambda hertz: _band(hertz, 500, 1500)) * clips.swell(0.4)
    turns = clips.uniform(45.0, 110.0, 1) * clips.seconds()
    start = clips.uniform(0.0, 1.0, 6)
    hum = sum(torch.sin(2 * math.pi * (k * turns + start[:, k - 1 : k])) / k for k in range(1, 7))
    return rumble + 0.35 * tyres + 0.4 * hum


def crowd(clips: Clips, voices: int = 8) -> Tensor:
    """Many voices at once, each with formants of its own and syllables a few times a second."""
    first, second = (clips.uniform(low, high, voices, 1) for low, high in ((300.0, 850.0), (1000.0, 2300.0)))

    def loudness(hertz: Tensor) -> Tensor:
        formants = 0.15 + torch.exp(-(((hertz - first) / 150) ** 2)) + 0.5 * torch.exp(-(((hertz - second) / 250) ** 2))
        return formants * _band(hertz, 120, 4000, 0.3)

    return (clips.noise(loudness, voices) * clips.swell(4.0, voices)).sum(dim=1)


def rain(clips: Clips, drops: float = 80.0) -> Tensor:
    """A bright steady hiss and single drops that ring for a few milliseconds, so many a second."""
    hiss = clips.noise(lambda hertz: _band(hertz, 1000, 8000))
    falls = clips.uniform(0.0, 1.0, clips.samples) < drops / clips.rate
    sizes = clips.uniform(0.2, 1.0, clips.samples) ** 3
    ring = min(clips.samples, max(2, int(0.01 * clips.rate)))
    since = torch.arange(ring, device=clips.device) / clips.rate
    click = torch.exp(-since / 0.0015) * torch.cos(2 * math.pi * min(2500.0, clips.rate / 4) * since)
    length = next_fast_len(clips.samples + ring, real=True)
    ringing = torch.fft.irfft(torch.fft.rfft(falls * sizes, n=length) * torch.fft.rfft(click, n=length), n=length)
    return hiss + 12 * ringing[:, : clips.samples]


def thunder(clips: Clips) -> Tensor:
    """A stroke somewhere in the first half of the clip, and its rolling echo; hardly anything before it."""
    roll = clips.noise(lambda hertz: _band(hertz, 25, 160, 1.0)) * clips.swell(3.0)
    crack = clips.noise(lambda hertz: _band(hertz, 150, 1500, 1.0))
    since = clips.seconds() - clips.uniform(0.0, 0.5, 1) * (clips.samples / clips.rate)
    lasting = clips.uniform(0.6, 1.6, 1)
    after = torch.sigmoid(since / 0.01)
    fading, sharp = (torch.exp(-since.clamp_min(0) / lasting) for lasting in (lasting, lasting / 8))
    return (roll * fading + 0.5 * crack * sharp) * after + 0.02 * roll


def wind(clips: Clips) -> Tensor:
    """Low noise in gusts, and a whistle that comes with the strongest of them."""
    gusts = clips.swell(0.7)
    low = clips.noise(lambda hertz: _band(hertz, 20, 500, 1.2))
    pitch = clips.uniform(350.0, 900.0, 1)
    whistle = clips.noise(lambda hertz: torch.exp(-(((hertz - pitch) / 60) ** 2)))
    return gusts * low + 0.1 * gusts**2 * whistle


NOISES: dict[str, Callable[[Clips], Tensor]] = {"traffic": traffic, "crowd": crowd, "rain": rain, "thunder": thunder, "wind": wind}


def noisy(name: str, waves: Tensor, severity: int, rate: float, generator: torch.Generator) -> Tensor:
    """Clips with noise over them, before they are held to [-1, 1]  # (batch, samples)"""
    if name == "gaussian_noise":
        drawn = torch.randn(waves.shape, generator=generator, device=generator.device)
        return torch.add(waves, drawn.to(waves.device), alpha=DEVIATIONS[severity - 1])
    noise = NOISES[name](Clips(waves.shape[0], waves.shape[1], rate, generator)).to(waves.device)
    clip, loud = (sound.square().mean(dim=1, keepdim=True).sqrt() for sound in (waves, noise))
    return waves + noise * (clip / loud.clamp_min(1e-12) * 10 ** (LOUDER[severity - 1] / 20))
