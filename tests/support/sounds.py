# SPDX-License-Identifier: Apache-2.0
"""Sounds as people have them, and what spoils them. (channels, samples) float32 at ``RATE``."""

from __future__ import annotations

import numpy as np

RATE, SECONDS = 24000, 4
_TIME = np.arange(SECONDS * RATE) / RATE


def speech(seed: int = 0) -> np.ndarray:
    """Voiced and hissing syllables with pauses, up to 12 kHz."""
    rng = np.random.default_rng(seed)
    wave = np.zeros_like(_TIME)
    start = 0.05
    while start < SECONDS - 0.3:
        length, pitch = rng.uniform(0.08, 0.25), rng.uniform(90, 180)
        inside = (start <= _TIME) & (start + length > _TIME)
        local = _TIME[inside] - start
        envelope = np.sin(np.pi * local / length) ** 0.5
        voice = sum(np.sin(2 * np.pi * pitch * k * local) / k for k in range(1, 40))
        hiss = rng.normal(0, 0.25, local.size) * (rng.random() > 0.5)
        wave[inside] += 0.15 * envelope * (voice + hiss)
        start += length + rng.uniform(0.02, 0.25)
    return wave[None].astype(np.float32)


def music(seed: int = 0) -> np.ndarray:
    """Plucked chords over cymbals."""
    rng = np.random.default_rng(seed)
    wave = np.zeros_like(_TIME)
    for beat in np.arange(0, SECONDS, 0.25):
        local = np.clip(_TIME - beat, 0, None)
        on = local > 0
        for note in rng.choice([220, 262, 330, 392, 440, 523], 3, replace=False):
            wave += on * 0.05 * np.exp(-4 * local) * sum(np.sin(2 * np.pi * note * k * local) / k for k in (1, 2, 3, 5))
        wave += on * 0.03 * np.exp(-20 * local) * rng.normal(0, 1, wave.size)
    return wave[None].astype(np.float32)


def wind(seed: int = 0) -> np.ndarray:
    """Noise whose power falls with frequency, without any event."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).normal(0, 1, _TIME.size))
    wave = np.fft.irfft(spectrum / np.sqrt(1 + np.fft.rfftfreq(_TIME.size, 1 / RATE) / 100), _TIME.size)
    return (0.1 * wave / wave.std())[None].astype(np.float32)


SOUNDS = {"speech": speech, "music": music, "wind": wind}


def stereo(sound: np.ndarray, width: float = 0.5) -> np.ndarray:
    """One channel -> two, each with an echo of its own."""
    left, right = (np.roll(sound[0], lag) * width for lag in (137, 331))
    return np.stack([sound[0] + left, sound[0] + right]).astype(np.float32)


def band(sound: np.ndarray, low: float, high: float) -> np.ndarray:
    """Only what lies between two frequencies, in hertz."""
    hertz = np.fft.rfftfreq(sound.shape[1], 1 / RATE)
    spectrum = np.fft.rfft(sound) * ((hertz >= low) & (hertz <= high))
    return np.fft.irfft(spectrum, sound.shape[1]).astype(np.float32)


def stretched(sound: np.ndarray, factor: float) -> np.ndarray:
    """Played ``factor`` times as long, the end cut off or silent."""
    at = np.arange(sound.shape[1]) / factor
    return np.stack([np.interp(at, np.arange(sound.shape[1]), row, right=0.0) for row in sound]).astype(np.float32)


def tilted(sound: np.ndarray, decibels: float) -> np.ndarray:
    """An equaliser: treble raised or lowered by up to so much."""
    hertz = np.fft.rfftfreq(sound.shape[1], 1 / RATE)
    gain = 10 ** (decibels / 20 * hertz / hertz[-1])
    return np.fft.irfft(np.fft.rfft(sound) * gain, sound.shape[1]).astype(np.float32)
