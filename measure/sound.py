# SPDX-License-Identifier: Apache-2.0
"""Two sounds of the same seed, in numbers: level, spectral distance, sync offset. A is the one to trust, B under test.

* level   RMS of all channels in dBFS (a full-scale sine reads -3.01); below ``SILENCE_DBFS`` it is silent: None.
* spectral distance   both aligned by the sync offset; power spectrogram (Hann window of about 40 ms, hop a quarter),
          mean over the channels, so that none cancels another; 64 triangular HTK mel bands from 0 Hz to half the rate,
          dB with a floor 80 dB under the louder clip's peak; root mean square over the bands of the difference, mean
          over time. 0 is the same sound; a plain gain of x dB counts as x dB.
* sync    lag of the highest normalised cross-correlation within one second, in ms, positive where B is late. Of the
          peaks within 2 % of the highest the one nearest to zero counts, because tones repeat. First the waveforms,
          of the mono mix or, where it cancels, of the loudest channel, and again with B inverted; where they do not
          match (below 0.3: a vocoder need not keep the phase) the loudness envelopes in steps of 1 ms; below 0.5 there
          the offset is undefined: None.
* findings   what sound_faults.py hears, and: silence, 10 dB in level, 45 ms out of step (what ITU-R BT.1359 has noticed
          beside the picture), 10 dB of spectral distance without a common signal.

NumPy alone; sounds are (channels, samples) float32 with their rate, as ``media.to_sound`` gives them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import sound_faults
from .media import MediaError, to_sound
from .signals import best_lag, envelope, mel_power, one_channel

if TYPE_CHECKING:
    Sound = tuple[np.ndarray, int] | dict[str, Any]

SILENCE_DBFS = -100.0
MAX_OFFSET_SECONDS = 1.0
# Codecs pad to whole packets; tracks that differ by less than this are compared over their common part.
LENGTH_TOLERANCE_SECONDS = 0.1
_FLOOR_DB = 80.0
_WAVEFORM_MATCH, _ENVELOPE_MATCH, _INVERTED_BEYOND = 0.3, 0.5, 0.1
WAVEFORM, INVERTED, ENVELOPE = "waveform", "waveform, inverted", "envelope"
OTHER_LEVEL_DB, OTHER_SOUND_DB, NOTICED_MS = 10.0, 10.0, 45.0


@dataclass(frozen=True)
class AudioComparison:
    """Sound of two clips; None where a number does not exist (silence, no common signal). ``note`` says why.

    ``drift_ms``: how much later B comes at its end than at its start, None if it keeps pace. ``findings``: sentences
    about what is wrong.
    """

    sample_rate: int
    seconds: float
    level_a_dbfs: float | None
    level_b_dbfs: float | None
    spectral_distance_db: float | None
    sync_offset_ms: float | None
    sync_correlation: float | None
    sync_method: str | None
    note: str = ""
    drift_ms: float | None = None
    findings: tuple[str, ...] = ()

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
            "findings": list(self.findings),
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
            "expected the same length; with as many frames, one was saved at another frame rate. Turn common_prefix "
            f"on to compare the first {count / rate:.2f} s."
        )
    lengths = [sound.shape[1] / rate for sound in (a, b)]
    findings = []
    if abs(lengths[0] - lengths[1]) > LENGTH_TOLERANCE_SECONDS:
        findings.append(f"A's sound lasts {lengths[0]:.2f} s, B's {lengths[1]:.2f} s.")
    a, b = a[:, :count], b[:, :count]
    levels = (level_dbfs(a), level_dbfs(b))
    if None in levels:
        silent = "both are silent" if levels == (None, None) else f"{'A' if levels[0] is None else 'B'} is silent"
        if levels != (None, None):
            findings.insert(0, f"{silent[0]} has a silent sound track, {'B' if levels[0] is None else 'A'} has sound.")
        return AudioComparison(rate, count / rate, *levels, None, None, None, None, silent, None, tuple(findings))
    return _heard(a, b, rate, levels, findings)


def _heard(
    a: np.ndarray, b: np.ndarray, rate: int, levels: tuple[float, float], findings: list[str]
) -> AudioComparison:
    """Two sounds (channels, samples) of one length, neither silent -> AudioComparison."""
    count = a.shape[1]
    findings += sound_faults.channel_faults(a, b, SILENCE_DBFS)
    difference = levels[1] - levels[0]
    if abs(difference) >= OTHER_LEVEL_DB:
        findings.append(f"B is {abs(difference):.0f} dB {'louder' if difference > 0 else 'quieter'} than A.")
    offset, correlation, method = sync_offset(*one_channel(a, b), rate)
    drift = sound_faults.drift_seconds(a, b, rate)
    if drift is not None:
        findings.append(f"B's sound drifts: at its end it is {abs(drift):.2f} s {'later' if drift > 0 else 'earlier'} "
                        "against A than at its start, as at another speed.")  # fmt: skip
        findings += sound_faults.bandwidth_faults(a, b, rate)
        return AudioComparison(
            rate, count / rate, *levels, None, None, None, None, f"undefined: it drifts by {1000 * drift:+.0f} ms",
            1000 * drift, tuple(findings),
        )  # fmt: skip
    lag = round((offset or 0.0) * rate / 1000.0)
    left, right = a[:, max(-lag, 0) : count - max(lag, 0)], b[:, max(lag, 0) : count - max(-lag, 0)]
    distance = spectral_distance(left, right, rate)
    findings += sound_faults.gaps(left, right, rate) if method else []
    findings += sound_faults.bandwidth_faults(left, right, rate)
    if offset is not None and abs(offset) >= NOTICED_MS:
        findings.append(f"B's sound is {abs(offset):.0f} ms {'late' if offset > 0 else 'early'} against A's.")
    if not method and distance >= OTHER_SOUND_DB:
        findings.append(f"The sounds are not the same: no common signal, spectral distance {distance:.0f} dB.")
    note = "" if method else "undefined: no common signal"
    return AudioComparison(
        rate, count / rate, *levels, distance, offset, correlation, method, note, None, tuple(findings)
    )


def level_dbfs(sound: np.ndarray) -> float | None:
    """(channels, samples) -> RMS in dBFS, or None for silence."""
    rms = math.sqrt(np.mean(np.square(sound, dtype=np.float64)))
    level = 20.0 * math.log10(rms) if rms > 0 else -math.inf
    return None if level < SILENCE_DBFS else level


def spectral_distance(a: np.ndarray, b: np.ndarray, rate: int) -> float:
    """Two signals (samples,) or (channels, samples) of one length -> log-mel distance in dB, see above."""
    powers = [mel_power(np.atleast_2d(x), rate) for x in (a, b)]
    floor = max(float(max(p.max() for p in powers)) * 10 ** (-_FLOOR_DB / 10), 1e-30)
    left, right = (10.0 * np.log10(np.maximum(p, floor)) for p in powers)
    return float(np.sqrt(np.square(left - right).mean(axis=1)).mean())


def sync_offset(a: np.ndarray, b: np.ndarray, rate: int) -> tuple[float | None, float | None, str | None]:
    """Two mono signals -> (ms by which B is late, correlation, WAVEFORM | INVERTED | ENVELOPE), or three None."""
    reach = int(MAX_OFFSET_SECONDS * rate)
    matches = [(*best_lag(a, other, reach), method) for method, other in ((WAVEFORM, b), (INVERTED, -b))]
    # A tone matches its inverse half a period later nearly as well.
    lag, correlation, method = matches[int(matches[1][1] > matches[0][1] + _INVERTED_BEYOND)]
    if correlation >= _WAVEFORM_MATCH:
        return 1000.0 * lag / rate, correlation, method
    step = max(rate // 1000, 1)
    lag, correlation = best_lag(*(envelope(x, step) for x in (a, b)), reach // step)
    if correlation >= _ENVELOPE_MATCH:
        return 1000.0 * lag * step / rate, correlation, ENVELOPE
    return None, None, None
