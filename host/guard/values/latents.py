# SPDX-License-Identifier: Apache-2.0
"""Nodes that make and change LTX latents and conditionings: size, length, sound, guides, frame rate; a line a node.

Sizes are in pixels and frames of the clip, as the latent can hold them: 32 x 32 pixels a latent, eight frames a latent
after the first one. ``LATENTS`` names the code that each line follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ....measure.ltx import SPATIAL, TEMPORAL, audio_latents
from .evaluate import Given, Row, Unknown
from .pictures import Picture

_LT, _AUDIO = "comfy_extras/nodes_lt.py", "comfy_extras/nodes_lt_audio.py"
_SAMPLER, _NODES = "comfy_extras/nodes_custom_sampler.py", "nodes.py"
_MOST_GUIDES = 64  # of one latent
_LIGHTRICKS, _KJ = "ComfyUI-LTXVideo", "ComfyUI-KJNodes nodes/ltxv_nodes.py"
_DIRECTOR = "WhatDreamsCost-ComfyUI"


class Guide(NamedTuple):
    """Latent frames that ``node`` has put behind a clip, and that have to be cropped before the decode."""

    node: str
    frames: int | None


Guides = tuple[Guide, ...]


class Video(NamedTuple):
    """An LTX video latent; what is None is unknown.

    ``width``, ``height``: pixels. ``length``: frames of the clip, without ``guides``.
    """

    width: int | None
    height: int | None
    length: int | None
    batch: int | None
    guides: Guides | None = ()

    @property
    def frames(self) -> int | None:
        """Latent frames, the guides' too."""
        extra = frames_of(self.guides)
        return None if self.length is None or extra is None else _latents(self.length) + extra

    @property
    def tokens(self) -> int | None:
        """Latents in it, the guides' too."""
        if self.width is None or self.height is None or self.frames is None:
            return None
        return self.width // SPATIAL * (self.height // SPATIAL) * self.frames


class Sound(NamedTuple):
    """An LTX audio latent: ``latents``, 25 a second; ``frames`` and ``rate`` that an empty one was told."""

    latents: int | None
    batch: int | None
    frames: int | None = None
    rate: float | None = None


class Joint(NamedTuple):
    """A joint latent; a part of which nothing is known is None."""

    video: Video | None
    sound: Sound | None


class Conditioning(NamedTuple):
    """``rate``: frames a second that LTXVConditioning has told. ``guides``: those that LTXVCropGuides will crop."""

    rate: float | None
    guides: Guides | None = ()


def frames_of(guides: Guides | None) -> int | None:
    """Latent frames of guides."""
    counts = [None] if guides is None else [guide.frames for guide in guides]
    return None if None in counts else sum(counts)


def _latents(length: int) -> int:
    return (length - 1) // TEMPORAL + 1


def _whole(given: Given, name: str) -> int | None:
    """A whole number, or None where it is not known."""
    try:
        return given.integer(name)
    except Unknown:
        return None


def _asked(given: Given, length: str = "length") -> Video | None:
    """The empty latent of these inputs, as far as they are known."""
    batch = _whole(given, "batch_size") if given.has("batch_size") else 1
    return video_of(*(_whole(given, name) for name in ("width", "height", length)), batch)


def video_of(width: float | None, height: float | None, length: float | None, batch: int | None = 1) -> Video | None:
    """The latent that holds these pixels and frames, rounded down as the host does; None for what it refuses."""
    if any(value is not None and value < 1 for value in (width, height, length, batch)):
        return None
    sides = [None if side is None else int(side) // SPATIAL * SPATIAL for side in (width, height)]
    return Video(*sides, None if length is None else (_latents(int(length)) - 1) * TEMPORAL + 1, batch)


def _video(given: Given, name: str) -> Video | None:
    """The video latent at an input, that of a joint one too."""
    found = given.maybe(name)
    found = found.video if isinstance(found, Joint) else found
    return found if isinstance(found, Video) else None


def _latent(given: Given, name: str) -> Any:
    found = given.maybe(name)
    return found if isinstance(found, (Video, Sound, Joint)) else None


def _same(name: str, *, outputs: int = 1) -> Callable[[Given], Iterable[Any]]:
    return lambda given: (_latent(given, name),) * outputs


def _guided(new: Callable[[Given], int | None]) -> Callable[[Given], Iterable[Any]]:
    """positive, negative, latent with guides behind it; ``new``: how many latent frames of them."""

    def outputs(given: Given) -> Iterable[Any]:
        guide, video = Guide(given.node.id, new(given)), _video(given, "latent")
        sides = (_conditioning(given, side) for side in ("positive", "negative"))
        return tuple(
            found._replace(guides=_with(found.guides, guide)) if found is not None else None
            for found in (*sides, video)
        )

    return outputs


def _with(guides: Guides | None, guide: Guide) -> Guides | None:
    return None if guides is None or len(guides) >= _MOST_GUIDES else (*guides, guide)


def _conditioning(given: Given, side: str) -> Conditioning | None:
    found = given.maybe(side)
    return found if isinstance(found, Conditioning) else None


def _of_picture(given: Given) -> int | None:
    """LTXVAddGuide encodes its pictures, cut to 8k + 1; amid a clip the first latent, of one frame, is not kept."""
    picture = given.maybe("image")
    count, place = picture.count if isinstance(picture, Picture) else None, given.integer("frame_idx")
    if count is None or count < 1 or (count > TEMPORAL and place < 0):
        return None
    return count // TEMPORAL if count > TEMPORAL and place > 0 else _latents(count)


def _of_latent(given: Given) -> int | None:
    video = _video(given, "guiding_latent")
    return None if video is None else video.frames


def _cropped(given: Given) -> Iterable[Any]:
    """LTXVCropGuides cuts off as many latent frames as the positive conditioning has of guides."""
    video, told = _video(given, "latent"), _conditioning(given, "positive")
    if video is not None:
        video = _without(video, told.guides if told is not None else None)
    sides = (told, _conditioning(given, "negative"))
    return (*(found._replace(guides=()) if found is not None else None for found in sides), video)


def _without(video: Video, cropped: Guides | None) -> Video:
    if video.guides is None or cropped is None:
        return video._replace(guides=None)
    left = tuple(guide for guide in video.guides if guide not in cropped)
    over = frames_of(tuple(guide for guide in cropped if guide not in video.guides))
    if over == 0:
        return video._replace(guides=left)
    if over is None or left or video.length is None:
        return video._replace(length=None, guides=left)
    return video._replace(guides=(), length=video.length - over * TEMPORAL)  # it cuts into the clip


def _directed(given: Given) -> Iterable[Any]:
    """LTXDirectorGuide; its versions put guides into the clip or behind it, and differ in what they do to scale."""
    video = _video(given, "latent")
    sides = (_conditioning(given, side) for side in ("positive", "negative"))
    told = tuple(found._replace(guides=None) if found is not None else None for found in sides)
    if video is None:
        return (*told, None)
    # With an IC-LoRA it snaps the size to that LoRA's grid, unless it is told not to.
    snaps = given.has("model") and given.maybe("auto_snap_ic_grid") is not False
    if given.maybe("scale_by") != 1 or (snaps and given.maybe("ic_lora_name") != "None"):
        video = video._replace(width=None, height=None)
    return (*told, video._replace(guides=None))


def _masked(given: Given) -> Iterable[Any]:
    """LTXVAudioVideoMask makes a latent longer only where it is told to pad."""
    video, sound = _latent(given, "video_latent"), _latent(given, "audio_latent")
    if given.has("max_length") and given.value("max_length") != "truncate":
        video = video._replace(length=None) if isinstance(video, Video) else None
        sound = sound._replace(latents=None) if isinstance(sound, Sound) else None
    return video, sound


def _joined(given: Given) -> Iterable[Any]:
    """LTXVConcatAVLatent takes the video of a joint latent and swaps its sound."""
    sound = given.maybe("audio_latent")
    return (Joint(_video(given, "video_latent"), sound if isinstance(sound, Sound) else None),)


def _separated(given: Given) -> Iterable[Any]:
    return given.a(Joint, "av_latent")


def _empty_sound(given: Given) -> Iterable[Any]:
    frames, rate = given.integer("frames_number"), given.number("frame_rate")
    batch = given.integer("batch_size") if given.has("batch_size") else 1
    if frames < 1 or rate <= 0:
        raise Unknown
    return (Sound(audio_latents(frames, rate), batch, frames, rate),)


def _upscaled_by(given: Given) -> Iterable[Any]:
    video, factor = given.a(Video, "samples"), given.number("scale_by")
    return (_resized(video, lambda side: round(side * factor)),)


def _resized(video: Video, of: Callable[[int], int]) -> Video:
    sides = [None if side is None else of(side // SPATIAL) * SPATIAL for side in (video.width, video.height)]
    return video._replace(width=sides[0], height=sides[1])


def _decoded(given: Given, name: str = "samples") -> Iterable[Any]:
    video = _video(given, name)
    if video is None:
        raise Unknown
    count = None
    if video.frames is not None and video.batch is not None:
        count = ((video.frames - 1) * TEMPORAL + 1) * video.batch
    return (Picture(video.width, video.height, count),)


def _conditioned(given: Given) -> Iterable[Any]:
    try:
        rate = float(given.number("frame_rate"))
    except Unknown:
        rate = None
    return tuple(
        found._replace(rate=rate) if isinstance(found := given.maybe(side), Conditioning) else Conditioning(rate, None)
        for side in ("positive", "negative")
    )


def _same_sides(given: Given) -> Iterable[Any]:
    return tuple(given.maybe(side) for side in ("positive", "negative"))


def _text(_: Given) -> Iterable[Any]:
    return (Conditioning(None),)


LATENTS = {
    "EmptyLTXVLatentVideo": Row(lambda given: (_asked(given),), _LT),
    "LTXVImgToVideo": Row(lambda given: (*_same_sides(given), _asked(given)), _LT),
    "LTXVImgToVideoInplace": Row(_same("latent"), _LT),
    "LTXVAddGuide": Row(_guided(_of_picture), _LT),
    "LTXVAddLatentGuide": Row(_guided(_of_latent), _LT),
    "LTXVCropGuides": Row(_cropped, _LT),
    "LTXVConditioning": Row(_conditioned, _LT),
    "LTXVConcatAVLatent": Row(_joined, _LT),
    "LTXVSeparateAVLatent": Row(_separated, _LT),
    "LTXVEmptyLatentAudio": Row(_empty_sound, _AUDIO),
    "LTXVAudioVAEEncode": Row(lambda _: (Sound(None, None),), _AUDIO),
    "LatentUpscaleBy": Row(_upscaled_by, _NODES),
    "SetLatentNoiseMask": Row(_same("samples"), _NODES),
    "KSampler": Row(_same("latent_image"), _NODES),
    "KSamplerAdvanced": Row(_same("latent_image"), _NODES),
    "SamplerCustom": Row(_same("latent_image", outputs=2), _SAMPLER),
    "SamplerCustomAdvanced": Row(_same("latent_image", outputs=2), _SAMPLER),
    "VAEDecode": Row(_decoded, _NODES),
    "VAEDecodeTiled": Row(_decoded, _NODES),
    "CLIPTextEncode": Row(_text, _NODES),
    "ConditioningZeroOut": Row(lambda given: (given.maybe("conditioning"),), _NODES),
    "LTXVImgToVideoConditionOnly": Row(_same("latent"), f"{_LIGHTRICKS} latents.py"),
    "LTXVSetAudioVideoMaskByTime": Row(
        lambda given: (*_same_sides(given), _latent(given, "av_latent")), f"{_LIGHTRICKS} masks.py"
    ),
    "LTXVSetAudioRefTokens": Row(
        lambda given: (*_same_sides(given), _latent(given, "audio_latent")), f"{_LIGHTRICKS} iclora.py"
    ),
    "LTXVNormalizingSampler": Row(_same("latent_image"), f"{_LIGHTRICKS} easy_samplers.py"),
    "LTXAddVideoICLoRAGuide": Row(_guided(lambda _: None), f"{_LIGHTRICKS} iclora.py"),
    "LTXAddVideoICLoRAGuideAdvanced": Row(_guided(lambda _: None), f"{_LIGHTRICKS} iclora.py"),
    "LTXVTiledVAEDecode": Row(lambda given: _decoded(given, "latents"), f"{_LIGHTRICKS} tiled_vae_decode.py"),
    "LTXVSpatioTemporalTiledVAEDecode": Row(
        lambda given: _decoded(given, "latents"), f"{_LIGHTRICKS} tiled_vae_decode.py"
    ),
    "LTXVImgToVideoInplaceKJ": Row(_same("latent"), _KJ),
    "LTXVAddGuideMulti": Row(_guided(lambda _: None), _KJ),
    "LTXDirectorGuide": Row(_directed, f"{_DIRECTOR} ltx_director_guide.py"),
    "LTXVAudioVideoMask": Row(_masked, _KJ),
}
# Those that make latents of a `batch_size`, of 1 where they do not say; others hand on one that they are given.
BATCHED = ("EmptyLTXVLatentVideo", "LTXVImgToVideo", "LTXVEmptyLatentAudio")
# Those that put guides behind a clip.
GUIDING = (
    "LTXVAddGuide", "LTXVAddLatentGuide", "LTXAddVideoICLoRAGuide", "LTXAddVideoICLoRAGuideAdvanced",
    "LTXVAddGuideMulti",
)  # fmt: skip
