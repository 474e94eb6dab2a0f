# SPDX-License-Identifier: Apache-2.0
"""Parts of the comparison of sounds: mel spectra, loudness envelopes, lags. NumPy alone."""

from __future__ import annotations

import math

import numpy as np

MEL_BANDS = 64


def one_channel(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two sounds (channels, samples) -> (samples,) each: their mono mixes, or where one of these loses half of its
    loudness the channel that is loudest in B, of A too if it has as many.
    """
    mixed = [sound.mean(axis=0, dtype=np.float64) for sound in (a, b)]
    power = [np.square(sound, dtype=np.float64).mean(axis=1) for sound in (a, b)]
    if all(np.square(mix).mean() >= each.mean() / 4 for mix, each in zip(mixed, power, strict=True)):
        return mixed[0], mixed[1]
    loudest = [int(each.argmax()) for each in power]
    first = loudest[1] if len(a) == len(b) else loudest[0]
    return a[first].astype(np.float64), b[loudest[1]].astype(np.float64)


def mel_edges(rate: int) -> np.ndarray:
    """(66,) hertz: band k rises from edge k to k + 1 and falls to k + 2."""
    return 700.0 * (10.0 ** np.linspace(0.0, math.log10(1.0 + rate / 2 / 700.0), MEL_BANDS + 2) - 1.0)


def mel_power(sound: np.ndarray, rate: int) -> np.ndarray:
    """(channels, samples) -> (times, 64) power in triangular mel bands, mean over the channels."""
    window = 2 ** round(math.log2(max(rate * 0.04, 16)))
    edges, hertz = mel_edges(rate), np.fft.rfftfreq(window, 1.0 / rate)[:, None]
    rise, fall = (hertz - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - hertz) / np.diff(edges)[1:]
    bands = np.clip(np.minimum(rise, fall), 0.0, None)
    total = 0.0
    for channel in sound:
        padded = np.pad(channel, (window // 2, window))
        blocks = np.lib.stride_tricks.sliding_window_view(padded, window)[:: window // 4]
        total = total + np.square(np.abs(np.fft.rfft(blocks * np.hanning(window + 1)[:-1], axis=1))) @ bands
    return total / len(sound)


def envelope(signal: np.ndarray, step: int) -> np.ndarray:
    """(samples,) -> RMS loudness in windows of 10 steps, one value a step."""
    energy = np.square(signal[: len(signal) // step * step]).reshape(-1, step).mean(axis=1)
    return np.sqrt(np.convolve(energy, np.full(10, 0.1), mode="same").clip(0.0))


def best_lag(a: np.ndarray, b: np.ndarray, reach: int) -> tuple[int, float]:
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
