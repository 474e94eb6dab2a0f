# SPDX-License-Identifier: Apache-2.0
"""Two sounds of the same seed, in numbers: level, spectral distance, sync offset. A is the one to trust, B under test.

* level   RMS of all channels in dBFS (a full-scale sine reads -3.01); below ``SILENCE_DBFS`` it is silent: None.
* spectral distance   both mixed to mono and aligned by the sync offset; power spectrogram (Hann window of about 40 ms,
          hop a quarter), 64 triangular HTK mel bands from 0 Hz to half the rate, dB with a floor 80 dB under the louder
          clip's peak; root mean square over the bands of the difference, mean over time. 0 is the same sound; a plain
          gain of x dB counts as x dB.
* sync    lag of the highest normalised cross-correlation within one second, in ms, positive where B is late. Of the
          peaks within 2 % of the highest the one nearest to zero counts, because tones repeat. First the waveforms;
          where they do not match (below 0.3: a vocoder need not keep the phase) the loudness envelopes in steps of
          1 ms; below 0.5 there the offset is undefined: None.

NumPy alone; sounds are (channels, samples) float32 with their rate, as ``media.to_sound`` gives them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .media import MediaError, to_sound

if TYPE_CHECKING:
    Sound = tuple[np.ndarray, int] | dict[str, Any]

SILENCE_DBFS = -100.0
MAX_OFFSET_SECONDS = 1.0
# Codecs pad to whole packets; tracks that differ by less than this are compared over their common part.
LENGTH_TOLERANCE_SECONDS = 0.1
_MEL_BANDS = 64
_FLOOR_DB = 80.0
_WAVEFORM_MATCH, _ENVELOPE_MATCH = 0.3, 0.5


@dataclass(frozen=True)
class AudioComparison:
    """Sound of two clips; None where a number does not exist (silence, no common signal). ``note`` says why."""

    sample_rate: int
    seconds: float
    level_a_dbfs: float | None
    level_b_dbfs: float | None
    spectral_distance_db: float | None
    sync_offset_ms: float | None
    sync_correlation: float | None
    sync_method: str | None
    note: str = ""

    @property
    def level_difference_db(self) -> float | None:
        """B - A; None if either is silent."""
        if self.level_a_dbfs is None or self.level_b_dbfs is None:
            return None
        return self.level_b_dbfs - self.level_a_dbfs

    @property
    def silent(self) -> tuple[bool, bool]:
        """Whether A and B are silent."""
        return self.level_a_dbfs is None, self.level_b_dbfs is None

    @property
    def sync_text(self) -> str:
        """The offset for people, or why there is none."""
        if self.sync_offset_ms is None:
            return self.note
        return f"{self.sync_offset_ms:+.1f} ms  ({self.sync_method}, r = {self.sync_correlation:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready record without NaN or infinity."""
        return {
            **asdict(self),
            "level_difference_db": self.level_difference_db,
            "silent_a": self.silent[0],
            "silent_b": self.silent[1],
        }


def compare_audio(
    a: Sound, b: Sound, names: tuple[str, str] = ("A", "B"), common_prefix: bool = False
) -> AudioComparison:
    """Two sounds as ``media.to_sound`` takes them -> AudioComparison. MediaError where rates or lengths differ."""
    (a, rate), (b, rate_b) = to_sound(a), to_sound(b)
    if rate != rate_b:
        raise MediaError(
            f"found sound of {rate} Hz in {names[0]} and {rate_b} Hz in {names[1]}; expected one rate. "
            "Resample one of them."
        )
    count = min(a.shape[1], b.shape[1])
    if max(a.shape[1], b.shape[1]) - count > LENGTH_TOLERANCE_SECONDS * rate and not common_prefix:
        raise MediaError(
            f"found {a.shape[1] / rate:.2f} s of sound in {names[0]} and {b.shape[1] / rate:.2f} s in {names[1]}; "
            f"expected the same length. Turn common_prefix on to compare the first {count / rate:.2f} s."
        )
    a, b = a[:, :count], b[:, :count]
    levels = (level_dbfs(a), level_dbfs(b))
    if None in levels:
        silent = "both are silent" if levels == (None, None) else f"{'A' if levels[0] is None else 'B'} is silent"
        return AudioComparison(rate, count / rate, *levels, None, None, None, None, silent)
    a, b = a.mean(axis=0, dtype=np.float64), b.mean(axis=0, dtype=np.float64)
    offset, correlation, method = sync_offset(a, b, rate)
    lag = round((offset or 0.0) * rate / 1000.0)
    distance = spectral_distance(a[max(-lag, 0) : count - max(lag, 0)], b[max(lag, 0) : count - max(-lag, 0)], rate)
    note = "" if method else "undefined: no common signal"
    return AudioComparison(rate, count / rate, *levels, distance, offset, correlation, method, note)


def level_dbfs(sound: np.ndarray) -> float | None:
    """(channels, samples) -> RMS in dBFS, or None for silence."""
    rms = math.sqrt(np.mean(np.square(sound, dtype=np.float64)))
    level = 20.0 * math.log10(rms) if rms > 0 else -math.inf
    return None if level < SILENCE_DBFS else level


def spectral_distance(a: np.ndarray, b: np.ndarray, rate: int) -> float:
    """Two mono (samples,) signals of one length -> log-mel distance in dB; definition in the module docstring."""
    window = 2 ** round(math.log2(max(rate * 0.04, 16)))
    powers = [_mel_power(x, rate, window) for x in (a, b)]
    floor = max(float(max(p.max() for p in powers)) * 10 ** (-_FLOOR_DB / 10), 1e-30)
    left, right = (10.0 * np.log10(np.maximum(p, floor)) for p in powers)
    return float(np.sqrt(np.square(left - right).mean(axis=1)).mean())


def _mel_power(signal: np.ndarray, rate: int, window: int) -> np.ndarray:
    """(samples,) -> (times, 64) power in triangular mel bands."""
    padded = np.pad(signal, (window // 2, window))
    blocks = np.lib.stride_tricks.sliding_window_view(padded, window)[:: window // 4]
    power = np.square(np.abs(np.fft.rfft(blocks * np.hanning(window + 1)[:-1], axis=1)))
    top = math.log10(1.0 + rate / 2 / 700.0)
    edges = 700.0 * (10.0 ** np.linspace(0.0, top, _MEL_BANDS + 2) - 1.0)
    hertz = np.fft.rfftfreq(window, 1.0 / rate)[:, None]
    rise, fall = (hertz - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - hertz) / np.diff(edges)[1:]
    return power @ np.clip(np.minimum(rise, fall), 0.0, None)


def sync_offset(a: np.ndarray, b: np.ndarray, rate: int) -> tuple[float | None, float | None, str | None]:
    """Two mono signals -> (ms by which B is late, correlation, "waveform" | "envelope"); three None without a match."""
    lag, correlation = _best_lag(a, b, int(MAX_OFFSET_SECONDS * rate))
    if correlation >= _WAVEFORM_MATCH:
        return 1000.0 * lag / rate, correlation, "waveform"
    step = max(rate // 1000, 1)
    lag, correlation = _best_lag(*(_envelope(x, step) for x in (a, b)), int(MAX_OFFSET_SECONDS * rate / step))
    if correlation >= _ENVELOPE_MATCH:
        return 1000.0 * lag * step / rate, correlation, "envelope"
    return None, None, None


def _envelope(signal: np.ndarray, step: int) -> np.ndarray:
    """(samples,) -> RMS loudness in windows of 10 steps, one value a step."""
    energy = np.square(signal[: len(signal) // step * step]).reshape(-1, step).mean(axis=1)
    return np.sqrt(np.convolve(energy, np.full(10, 0.1), mode="same").clip(0.0))


def _best_lag(a: np.ndarray, b: np.ndarray, reach: int) -> tuple[int, float]:
    """Lag of the highest peak of sum a[t] b[t + lag] / (|a| |b|), means removed; nearest of the near-equal."""
    reach = min(reach, len(a) - 1)
    if reach < 1:
        return 0, 0.0
    a, b = a - a.mean(), b - b.mean()
    energy = math.sqrt(float(a @ a) * float(b @ b))
    if energy == 0.0:
        return 0, 0.0
    size = 1 << (2 * len(a) - 1).bit_length()
    product = np.fft.irfft(np.conj(np.fft.rfft(a, size)) * np.fft.rfft(b, size), size) / energy
    around = np.concatenate((product[-reach:], product[: reach + 1]))
    walls = np.concatenate(([-np.inf], around, [-np.inf]))
    peaks = np.flatnonzero((around >= walls[:-2]) & (around >= walls[2:]) & (around >= 0.98 * around.max())) - reach
    lag = int(min(peaks, key=abs, default=0))
    return lag, float(around[lag + reach])
