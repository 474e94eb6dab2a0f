# SPDX-License-Identifier: Apache-2.0
"""What an ear would say of a sound beside the one to trust, and a mean over everything would not.

All take (channels, samples) float, of one length and rate, A being the one to trust. Each returns sentences for people,
none where nothing is wrong:

* silent channel          below SILENCE_DBFS beside others that are not
* gap                     one below -60 dBFS and 40 dB under the other, where that has its usual loudness (12 dB below
                          its level and more), for 0.3 s or more in windows of 0.1 s
* antiphase               mixed to mono a sound loses 6 dB, and 3 dB more than the other: its channels cancel each
                          other. Uncorrelated channels lose 3 dB
* bandwidth               long-term spectra in 64 mel bands; bands count where the fuller sound is within 60 dB of its
                          peak, and are missing where the other is 20 dB lower than in the loud bands it has best. Said
                          if the other's range goes on for an octave, as a codec's 15 kHz of 24 do not, or if 200 Hz and
                          what is below are missing: a radio, a telephone
* drift                   the loudness envelopes match better after B was stretched, by up to a tenth
"""

from __future__ import annotations

import math

import numpy as np

from .signals import best_lag, envelope, mel_edges, mel_power, one_channel

_GAP_DBFS, _GAP_DEPTH_DB, _USUAL_DB, _GAP_SECONDS, _GAP_WINDOW = -60.0, 40.0, 12.0, 0.3, 0.1
_CANCELLED_DB, _BEYOND_DB = 6.0, 3.0
_AUDIBLE_DB, _LOUD_DB, _MISSING_DB, _LOW_HERTZ, _TOP_SHARE = 60.0, 40.0, 20.0, 200.0, 2.0
_MOST_STRETCH, _DRIFT_SECONDS, _DRIFT_POINTS = 0.1, 0.02, 4096
# Envelopes that match by less are other sounds. A stretch counts if it removes a third of what is missing to 1.
_DRIFT_MATCH, _DRIFT_SHARE, _KEEPS_PACE = 0.5, 2 / 3, 0.97


def channel_faults(a: np.ndarray, b: np.ndarray, silence_dbfs: float) -> list[str]:
    """Channels that are silent beside others of their sound, or cancel each other as the other sound's do not."""
    found = []
    for name, sound, other in (("B", b, a), ("A", a, b)):
        power = np.square(sound, dtype=np.float64).mean(axis=1)
        silent = [index + 1 for index, value in enumerate(power) if value < 10 ** (silence_dbfs / 10)]
        if silent:
            found.append(f"Channel {', '.join(map(str, silent))} of {len(power)} of {name} is silent.")
            continue
        loss = _lost_in_mono(sound)
        if loss >= max(_CANCELLED_DB, _lost_in_mono(other) + _BEYOND_DB):
            lost = f"it loses {loss:.0f} dB" if loss < 60 else "nothing is left of it"
            found.append(f"{name}'s channels are in antiphase and cancel each other: mixed to mono, {lost}.")
    return found


def _lost_in_mono(sound: np.ndarray) -> float:
    """(channels, samples) -> dB between the mean power of the channels and that of their mix."""
    power = np.square(sound, dtype=np.float64).mean()
    mixed = np.square(sound.mean(axis=0, dtype=np.float64)).mean()
    return 10.0 * math.log10(float(power) / max(float(mixed), 1e-12 * float(power)))


def gaps(a: np.ndarray, b: np.ndarray, rate: int) -> list[str]:
    """Where one of two aligned sounds is silent and the other is not."""
    size = max(round(rate * _GAP_WINDOW), 1)
    count = a.shape[1] // size
    if not count:
        return []
    levels = []
    for sound in (a, b):
        blocks = np.square(sound[:, : count * size], dtype=np.float64).reshape(len(sound), count, size)
        levels.append(10.0 * np.log10(np.maximum(blocks.mean(axis=(0, 2)), 1e-30)))
    found = []
    for name, one, other in (("B", levels[1], levels[0]), ("A", levels[0], levels[1])):
        usual = 10.0 * math.log10(float((10.0 ** (other / 10.0)).mean())) - _USUAL_DB
        silent = (one < _GAP_DBFS) & (one < other - _GAP_DEPTH_DB) & (other > usual)
        seconds = float(silent.sum()) * size / rate
        if seconds >= _GAP_SECONDS:
            start = float(np.flatnonzero(silent)[0]) * size / rate
            rest = "A" if name == "B" else "B"
            found.append(f"{name} is silent for {seconds:.1f} s where {rest} is not, first at {start:.1f} s.")
    return found


def bandwidth_faults(a: np.ndarray, b: np.ndarray, rate: int) -> list[str]:
    """The range of frequencies that one of two sounds lacks."""
    spectra = [10.0 * np.log10(np.maximum(mel_power(sound, rate).mean(axis=0), 1e-30)) for sound in (a, b)]
    edges = mel_edges(rate)
    found = []
    for name, full, other, poor in (("B", spectra[0], "A", spectra[1]), ("A", spectra[1], "B", spectra[0])):
        heard = np.flatnonzero(full > full.max() - _AUDIBLE_DB)
        change = (poor - full)[heard]
        there = change > np.quantile(change[full[heard] > full.max() - _LOUD_DB], 0.8) - _MISSING_DB
        first, last = heard[there][0], heard[there][-1]
        # A band reaches from the centre of its left neighbour to that of its right one.
        low, high, top = edges[first], edges[last + 2], edges[heard[-1] + 2]
        missing = []
        if low >= _LOW_HERTZ and first > heard[0]:
            missing.append(f"below {_hertz(low)}")
        if high * _TOP_SHARE <= top:
            missing.append(f"above {_hertz(high)}")
        if missing:
            span = f"{_hertz(max(edges[heard[0]], 0.0))} to {_hertz(top)}"
            found.append(f"{name} has no sound {' and '.join(missing)}, {other} from {span}.")
    return found


def _hertz(value: float) -> str:
    return f"{value / 1000:.1f} kHz" if value >= 1000 else f"{value:.0f} Hz"


def drift_seconds(a: np.ndarray, b: np.ndarray, rate: int) -> float | None:
    """By how much later B comes at its end than at its start; None where it keeps pace or nothing matches."""
    step = max(rate // 1000, a.shape[1] // _DRIFT_POINTS, 1)
    first, second = (envelope(sound, step) for sound in one_channel(a, b))
    count = len(first)
    if count < 100:
        return None
    reach = count // 4
    as_it_is = best_lag(first, second, reach)[1]
    if as_it_is > _KEEPS_PACE:
        return None
    points = np.arange(count, dtype=np.float64)

    def match(factor: float) -> float:
        # A(t) is heard at B(t * factor).
        inside = points[points * factor <= count - 1]
        return best_lag(first[: len(inside)], np.interp(inside * factor, points, second), reach)[1]

    grid = np.arange(-_MOST_STRETCH, _MOST_STRETCH + 1e-9, 5.0 / count)
    scores = [match(1.0 + change) for change in grid]
    best = int(np.argmax(scores))
    drift = float(grid[best]) * count * step / rate
    better = scores[best] >= _DRIFT_MATCH and 1.0 - scores[best] < _DRIFT_SHARE * (1.0 - as_it_is)
    return drift if better and abs(drift) >= _DRIFT_SECONDS else None
