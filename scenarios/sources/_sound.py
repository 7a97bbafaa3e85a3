"""Sounds as sources hand them out: as waveforms, or as log-mel spectrograms whose parameters stand in the YAML."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from streamcl.errors import ConfigError, DataError
from streamcl.options import NonNegativeFloat, PositiveFloat, PositiveInt
from streamcl.stream import Modality, Source

from ._drawn import Draws

TOGETHER = 16  # sounds in one transform: always this many, so that a sound comes out the same, to the bit, in a batch of any size
FLOOR = 1e-6  # of the power in a band: silence is the logarithm of this, -13.8
VOICES = np.array(  # six mixtures of overtones: the strength of the first four partials
    [[1, 0, 0, 0], [1, 0.8, 0, 0], [1, 0, 0.8, 0], [1, 0.5, 0.5, 0], [1, 0, 0, 0.8], [0.6, 1, 0.6, 0.3]], dtype=np.float32
)


class LogMel:
    """Natural logarithms of the power in `mels` bands: waveforms (batch, samples) in, (batch, mels, frames) out.

    A Hann window (periodic) of `n_fft` samples moves by `hop`; the first frame is centred on the first sample, with zeros beyond the ends.
    Bands are triangles of height 1 on the mel scale of HTK, 2595 log10(1 + f / 700), from `fmin` to `fmax`.
    """

    def __init__(self, rate: int, *, n_fft: int, hop: int, mels: int, fmin: float, fmax: float | None) -> None:
        highest = rate / 2
        top = highest if fmax is None else fmax
        if not fmin < top <= highest:
            raise ConfigError(
                f"fmin is {fmin:g} and fmax {top:g}: at {rate} samples per second the bands lie between 0 and {highest:g} Hz, fmin first"
            )
        self.n_fft, self.hop, self.mels = n_fft, hop, mels
        edges = 700 * (10 ** (np.linspace(_mel(fmin), _mel(top), mels + 2) / 2595) - 1)
        bins = np.arange(n_fft // 2 + 1) * rate / n_fft
        rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
        bank = np.minimum(rising, falling).clip(min=0)  # (bins, mels)
        empty = np.flatnonzero(bank.sum(axis=0) == 0)
        if len(empty):
            raise ConfigError(
                f"mels is {mels}, and {len(empty)} of the bands (the first around {edges[empty[0] + 1]:.0f} Hz) lie between the "
                f"frequencies that n_fft: {n_fft} tells apart: give fewer mels or a larger n_fft"
            )
        self.bank = torch.from_numpy(bank).float()
        self.window = torch.hann_window(n_fft)

    def frames(self, samples: int) -> int:
        return samples // self.hop + 1

    def __call__(self, waveforms: Tensor) -> Tensor:
        count, samples = waveforms.shape
        result = waveforms.new_empty(count, self.mels, self.frames(samples))
        for start in range(0, count, TOGETHER):
            part = waveforms[start : start + TOGETHER]
            full = torch.nn.functional.pad(part, (0, 0, 0, TOGETHER - len(part)))
            spectrum = torch.stft(
                full, self.n_fft, self.hop, window=self.window, center=True, pad_mode="constant", return_complex=True
            )  # (TOGETHER, bins, frames)
            power = spectrum.real.square() + spectrum.imag.square()
            bands = power.transpose(1, 2) @ self.bank
            result[start : start + TOGETHER] = bands.clamp(min=FLOOR).log().transpose(1, 2)[: len(part)]
        return result


def _mel(frequency: float) -> float:
    return float(2595 * np.log10(1 + frequency / 700))


class SoundOptions(Source):
    """How a source hands its sounds out.

    `audio_as: log_mel` makes spectrograms of `mels` bands between `fmin` and `fmax` Hz (half the rate where it is not given), from windows
    of `n_fft` samples that move by `hop`; `waveform` leaves the samples as they are, from -1 to 1.
    """

    def __init__(
        self,
        *,
        audio_as: Literal["waveform", "log_mel"] = "waveform",
        n_fft: PositiveInt = 256,
        hop: PositiveInt = 128,
        mels: PositiveInt = 32,
        fmin: NonNegativeFloat = 0.0,
        fmax: PositiveFloat | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if hop > n_fft:
            raise ConfigError(f"hop is {hop} and n_fft {n_fft}: samples between the windows would be lost; hop may be at most n_fft")
        self.audio_as, self.n_fft, self.hop, self.mels, self.fmin, self.fmax = audio_as, n_fft, hop, mels, fmin, fmax

    def hearing(self, rate: int, samples: int) -> Hearing:
        """What is made of waveforms of this rate and length."""
        if self.audio_as == "waveform":
            return Hearing(None, rate, samples, {"rate": rate, "as": "waveform"})
        transform = LogMel(rate, n_fft=self.n_fft, hop=self.hop, mels=self.mels, fmin=self.fmin, fmax=self.fmax)
        about = {"rate": rate, "as": "log_mel", "n_fft": self.n_fft, "hop": self.hop, "mels": self.mels, "fmin": self.fmin}
        return Hearing(transform, rate, samples, {**about, "fmax": rate / 2 if self.fmax is None else self.fmax})


class Hearing:
    """Makes of waveforms what a source hands out; `about` says so as JSON values."""

    def __init__(self, transform: LogMel | None, rate: int, samples: int, about: dict[str, Any]) -> None:
        self.transform, self.rate, self.samples, self.about = transform, rate, samples, about

    def __call__(self, waveforms: Tensor) -> Tensor:
        return waveforms if self.transform is None else self.transform(waveforms)

    def modality(self) -> Modality:
        """A waveform has one dimension, a spectrogram two: bands, then frames."""
        if self.transform is None:
            return Modality("audio", (self.samples,))
        return Modality("audio", (self.transform.mels, self.transform.frames(self.samples)))


def tones(
    draws: Draws,
    rows: np.ndarray,
    pitch: np.ndarray,
    voice: np.ndarray,
    noise: float,
    rate: int,
    samples: int,
    glide: np.ndarray | None = None,
) -> Tensor:
    """A tone for each row, of this pitch in Hz and this mixture of overtones  # float32 (rows, samples)

    Each has its own loudness, length, beginning, phases, detuning (up to 1 %) and noise. `glide` is by how much of the pitch it rises
    from the first sample to the last.
    """
    unit = draws.uniform(rows, "tone", 4).astype(np.float32)
    loud, detune = 0.4 + 0.6 * unit[:, 0], 1 + 0.01 * (2 * unit[:, 1] - 1)
    duration = 0.5 + 0.4 * unit[:, 2:3]  # of the whole length
    begin = (1 - duration) * unit[:, 3:4]
    phase = draws.uniform(rows, "phase", VOICES.shape[1]).astype(np.float32)
    share = VOICES[voice]
    share = share / share.sum(axis=1, keepdims=True) * loud[:, None]
    time = np.linspace(0, 1, samples, endpoint=False, dtype=np.float32)
    cycles = (pitch * detune * samples / rate).astype(np.float32)[:, None]  # of the lowest partial over all samples
    rise = np.zeros(len(rows), np.float32) if glide is None else glide.astype(np.float32)
    waves = np.zeros((len(rows), samples), np.float32)
    for start in range(0, len(rows), 16):  # few enough to stay in the processor's cache
        part = slice(start, start + 16)
        angle = np.float32(2 * np.pi) * cycles[part] * (time + rise[part, None] / 2 * (time * time - time))
        wave = waves[part]
        for partial in range(VOICES.shape[1]):
            mine = np.flatnonzero(share[part, partial])
            if len(mine):
                turned = angle[mine] * np.float32(partial + 1) + np.float32(2 * np.pi) * phase[part][mine, partial : partial + 1]
                wave[mine] += share[part][mine, partial : partial + 1] * np.sin(turned)
        place = (time - begin[part]) / duration[part]  # 0 where the tone begins and 1 where it ends
        wave *= (np.minimum(place, 1 - place) * 10).clip(0, 1)  # it swells and fades
        if noise:
            wave += np.float32(noise) * draws.noise(rows[part], "noise", samples)
        np.clip(wave, -1, 1, out=wave)
    return torch.from_numpy(waves)


def resample(waveforms: Tensor, rate: int, wanted: int) -> Tensor:
    """Waveforms (batch, samples) at another rate, by scipy's polyphase filter."""
    if rate == wanted:
        return waveforms
    from scipy.signal import resample_poly

    if not rate:
        raise DataError("a sound without a sampling rate cannot be resampled")
    common = int(np.gcd(rate, wanted))
    changed = resample_poly(waveforms.numpy(), wanted // common, rate // common, axis=1)
    return torch.from_numpy(np.ascontiguousarray(changed, dtype=np.float32))
