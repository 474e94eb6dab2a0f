# SPDX-License-Identifier: Apache-2.0
"""The guard's rules on the size, the length and the timing of a clip.

LTX latents: one holds 32 x 32 pixels and eight frames, the first one a single frame; 25 audio latents last a second.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Iterator
from functools import cached_property

from ...measure.ltx import AUDIO_LATENTS_PER_SECOND
from . import kinds
from .fixes import fixes_of
from .links import Node
from .names import shown
from .vaes import UPSCALERS, upscaler_of
from .view import WARNING, Finding, View

_MOST_GROUPS, _MOST_NAMED, _MOST_NODES = 8, 8, 64
_SCALE = re.compile(r"[-_]x(1\.5|2|4)[-_.]")
_LONGEST_NAME = 300


def frames(view: View) -> Iterator[Finding]:
    """A number of frames that the host rounds down in silence."""
    sounds: dict[float | None, list[str]] | None = None
    for node, _ in view.sized:
        _, _, length = view.asked(node)
        if length is None or length < 1 or (length - 1) % 8 == 0:
            continue
        lower = snapped(length)
        if sounds is None:
            sounds = _sounds_by_length(view)
        same = sounds.get(length, ())
        wanted = [(node.id, kinds.SIZED[node.kind], _nearest(length))]
        wanted += [(sound, "frames_number", _nearest(length)) for sound in same]
        yield Finding(
            "frames",
            WARNING,
            f"{length:g} frames are not 8k + 1; ComfyUI makes {lower} of them.",
            "One latent frame holds eight frames of the clip, and the first one holds one.",
            f"Set `{kinds.SIZED[node.kind]}` to {lower} or {lower + 8}, and the same in {shown(kinds.EMPTY_AUDIO)}.",
            (node.id,),
            fixes_of(view.graph, wanted),
        )


def _sounds_by_length(view: View) -> dict[float | None, list[str]]:
    """Number of frames -> the empty latents of sound that are asked for so many."""
    found: dict[float | None, list[str]] = {}
    for sound in view.graph.of_kind(kinds.EMPTY_AUDIO):
        found.setdefault(view.graph.number(sound.id, "frames_number"), []).append(sound.id)
    return found


def size(view: View) -> Iterator[Finding]:
    """A width or height that the host rounds down in silence."""
    upsamplers = view.graph.of_kind(*UPSCALERS)
    upscaled = view.graph.upstream(node.id for node in upsamplers) if upsamplers else set()
    factors = {_factor(upscaler_of(view, node)[1]) for node in upsamplers[:_MOST_NAMED]}
    for node, sampler in view.sized:
        width, height, _ = view.asked(node)
        wrong = [value for value in (width, height) if value is not None and value >= 32 and value % 32]
        if not wrong:
            continue
        factor = next(iter(factors)) if sampler.node.id in upscaled and len(factors) == 1 else 1
        made = " x ".join("?" if value is None else str(_lower(value)) for value in (width, height))
        given = " x ".join("?" if value is None else f"{value:g}" for value in (width, height))
        why = "One latent pixel covers 32 x 32 pixels of the clip."
        near = ", ".join(f"{value:g} -> {_lower(value)} or {_lower(value) + 32}" for value in wrong)
        if factor > 1:
            final = " x ".join("?" if value is None else f"{_lower(value) * factor:g}" for value in (width, height))
            why += f" The spatial upscaler makes {final} of that: the final size is a multiple of {32 * factor:g}"
            half = next((value for value in wrong if value % 16 == 0), None)
            why += f", not of {16 * factor:g} as {half * factor:g} is." if half is not None else "."
            ends = (f"{_lower(value) * factor:g} or {(_lower(value) + 32) * factor:g}" for value in wrong)
            near += f", for {', '.join(ends)} in the end"
        title = f"{given} is not a multiple of 32; ComfyUI makes {made} of it."
        sides = [("width", width), ("height", height)]
        wanted = [(node.id, name, max(32, (int(side) + 16) // 32 * 32)) for name, side in sides if side in wrong]
        yield Finding("size", WARNING, title, why, f"Set {near}.", (node.id,), fixes_of(view.graph, wanted))


def _lower(value: float) -> int:
    return int(value) // 32 * 32


def _factor(name: str | None) -> float:
    """By how much a latent upscaler enlarges the picture, by its file name; 2 where that does not say."""
    if name is None or len(name) > _LONGEST_NAME:
        return 2.0
    if "temporal" in name.lower():
        return 1.0
    found = _SCALE.search(name)
    return float(found.group(1)) if found else 2.0


def snapped(length: float) -> int:
    """The number of frames the host makes of ``length``."""
    return (int(length) - 1) // 8 * 8 + 1


def _nearest(length: float) -> int:
    """The 8k + 1 that is nearest, the lower one of two."""
    return snapped(length + 3)


class _Needs:
    """Which of the ``rates`` a node needs, whether sound, whether a sampler.

    Looked up node by node, since a few are enough in nearly every prompt, until that was as much work as it is to
    find it for all nodes at once.
    """

    def __init__(self, view: View, rates: dict[str, float], sounds: set[str]):
        self._graph, self._rates, self._sounds = view.graph, rates, sounds
        self._samplers = {sampler.node.id for sampler in view.samplers}
        self._asked: dict[str, set[str]] = {}
        self._silent: set[str] = set()
        self._left = len(view.graph.nodes)
        self._others: list[set[str]] = []

    def rates(self, node: str) -> Collection[float]:
        """All of them, or at least two where there are more."""
        needed = self._needed(node)
        if needed is None:
            return self._two.get(node, ())
        return set(self.rated(node).values())

    def rated(self, node: str) -> dict[str, float]:
        """The nodes with a rate that it needs, and their rates."""
        needed = self._needed(node) or self._graph.upstream([node])
        return {rated: self._rates[rated] for rated in needed & self._rates.keys()}

    def is_heard(self, node: Node) -> bool:
        """Whether it needs an empty latent of sound with a rate, or is given sound to put into a film."""
        if node.kind in kinds.FILMS and "audio" in node.inputs:
            return True
        silent, parents = self._silent, self._graph.parents
        if node.id in silent:
            return False
        if self._left <= 0:
            return node.id in self._heard
        waiting = [node.id]
        silent.add(node.id)  # until the opposite is known
        for name in waiting:  # which grows meanwhile
            if name in self._sounds:
                silent.difference_update(waiting)
                self._left -= len(waiting)
                return True
            for parent in parents[name]:
                if parent not in silent:
                    silent.add(parent)
                    waiting.append(parent)
        return False

    def sampler(self, node: str) -> bool:
        """Whether it needs a sampler, or is one."""
        needed = self._needed(node)
        return node in self._sampled if needed is None else not self._samplers.isdisjoint(needed)

    def only(self, node: str, groups: list[set[str]]) -> bool:
        """Whether all the nodes with rates that it needs are in one of these groups, which grow."""
        if self._needed(node) is not None:
            rated = self.rated(node).keys()
            return any(rated <= group for group in groups)
        self._others += (self._graph.downstream(self._rates.keys() - group) for group in groups[len(self._others) :])
        return any(node not in others for others in self._others)

    def _needed(self, node: str) -> set[str] | None:
        if node not in self._asked and self._left > 0:
            self._asked[node] = self._graph.upstream([node])
            self._left -= len(self._asked[node])
        return self._asked.get(node)

    @cached_property
    def _two(self) -> dict[str, set]:
        return self._graph.two_values_of(self._rates)

    @cached_property
    def _heard(self) -> set[str]:
        return self._graph.downstream(self._sounds)

    @cached_property
    def _sampled(self) -> set[str]:
        return self._graph.downstream(self._samplers)


def frame_rates(view: View) -> Iterator[Finding]:
    """Different frame rates where the model, the sound and the video are told theirs."""
    graph = view.graph
    rated = graph.of_kind(kinds.CONDITIONING, kinds.EMPTY_AUDIO)
    rates = {node.id: rate for node in rated if (rate := graph.number(node.id, "frame_rate")) is not None}
    told = set(rates.values())
    films = graph.of_kind(*kinds.FILMS)
    if not rates or not view.samplers:
        return
    if len(told) == 1 and all(_shown_at(view, film) in (None, *told) for film in films):
        return
    sounds = {node.id for node in graph.of_kind(kinds.EMPTY_AUDIO) if node.id in rates}
    if not sounds and not any("audio" in film.inputs for film in films):
        return
    needs = _Needs(view, rates, sounds)
    named: list[set[str]] = []  # for each finding the rated nodes that it is about
    for end in _ends(view, films, needs, len(told) > 1):
        fps, known = _shown_at(view, end) if end.kind in kinds.FILMS else None, needs.rates(end.id)
        if len(known) < 2 and (fps is None or fps in known or not known):
            continue
        if fps is None and needs.only(end.id, named):
            continue  # all that it needs was named
        group = needs.rated(end.id)
        named.append(set(group))
        if fps is not None:
            group[end.id] = fps
        yield _differing(view, group)
        if len(named) == _MOST_GROUPS:
            return


def _shown_at(view: View, film: Node) -> float | None:
    """How many pictures a second a film shows, where they are those of a decode."""
    return view.graph.number(film.id, kinds.FILMS[film.kind]) if view.keeps_time(film) else None


def _ends(view: View, films: list[Node], needs: _Needs, all_: bool) -> Iterator[Node]:
    """The nodes that make a film of what was sampled and, with ``all_``, the samplers behind which there is neither.

    Only those with sound: a silent clip is faster or slower, which may be meant.
    """
    for film in films:
        if needs.is_heard(film) and needs.sampler(film.id):
            yield film
    if not all_:
        return
    samplers = [sampler.node for sampler in view.samplers]
    heard = list(filter(needs.is_heard, samplers))
    if not any(sampler.kind in kinds.FILMS for sampler in heard):  # else one may have its sound from elsewhere
        # What needs something with sound has sound itself.
        samplers, films = heard, list(filter(needs.is_heard, films)) if heard else []
    ends = [film.id for film in films if needs.sampler(film.id)]
    inner = view.graph.upstream(view.graph.before([*ends, *(sampler.id for sampler in samplers)]))
    yield from (sampler for sampler in heard if sampler.id not in inner)


def _differing(view: View, group: dict[str, float]) -> Finding:
    """Of nodes that belong together and their frame rates."""
    graph = view.graph
    nodes = sorted(group, key=graph.order.__getitem__)
    rate = statistics.mode(group[node] for node in nodes)  # of as many the first
    inputs = {node: kinds.FILMS.get(graph.nodes[node].kind, "frame_rate") for node in nodes}
    named = [f"{group[node]:g} in {graph.nodes[node].kind}" for node in nodes[:_MOST_NAMED]]
    return Finding(
        "fps",
        WARNING,
        f"The frame rates differ: {', '.join(named)}{', ...' if len(nodes) > len(named) else ''}.",
        f"LTXVConditioning spaces the frames for the model, {shown(kinds.EMPTY_AUDIO)} sets how long the sound is, "
        "the node that makes the film how fast the frames are shown; where they differ, sound and picture drift "
        "apart.",
        "Set the same frame rate everywhere.",
        tuple(nodes[:_MOST_NODES]),
        fixes_of(graph, [(node, inputs[node], rate) for node in nodes[:_MOST_NODES]]),
    )


def audio_length(view: View) -> Iterator[Finding]:
    """An audio latent that lasts longer or shorter than the video latent it is joined with."""
    graph = view.graph
    for sampler in view.joint:
        concat = sampler.latent.root
        video = view.latent(concat, "video_latent").root
        audio = view.latent(concat, "audio_latent").root
        if video is None or video.kind not in kinds.SIZED or audio is None or audio.kind != kinds.EMPTY_AUDIO:
            continue
        _, _, length = view.asked(video)
        count = graph.number(audio.id, "frames_number")
        rate = graph.number(audio.id, "frame_rate")
        if not (length and count and rate) or length < 1 or rate <= 0:
            continue
        wanted = round(snapped(length) / rate * AUDIO_LATENTS_PER_SECOND)
        got = round(count / rate * AUDIO_LATENTS_PER_SECOND)
        if wanted == got:
            continue
        why = f"{count:g} frames at {rate:g} fps are {got} audio latents; {snapped(length)} of picture need {wanted}."
        if count == 4 * length - 3:
            why += " frames*4 - 3 is the number of mel frames of that many latents at 25 fps, not a number of latents."
        yield Finding(
            "audio_length",
            WARNING,
            f"The sound lasts {got / AUDIO_LATENTS_PER_SECOND:.2f} s, the picture {snapped(length) / rate:.2f} s.",
            why,
            f"Set `frames_number` in {shown(kinds.EMPTY_AUDIO)} to {snapped(length)}.",
            (audio.id, video.id),
            # Where both have the same wrong number, the rule on frames mends both.
            fixes_of(graph, [(audio.id, "frames_number", _nearest(length))]) if count != length else (),
        )
