# SPDX-License-Identifier: Apache-2.0
"""The guard's rules on decodes in tiles: what tiles change, and which node decodes LTX as it should be.

ComfyUI 0.33 and newer decode LTX-2.0 and 2.3 in chunks of time, exactly, and go on in tiles by themselves if memory
runs out (VAE.decode in comfy/sd.py, causal_video_autoencoder.py); measure/fit.py has the memory that takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ...checkpoint.identify.vae_signatures import LTX
from ...measure.fit import decode_bytes
from ...measure.ltx import SPATIAL, TEMPORAL
from ...measure.roofline import Clip
from ...measure.text import gib
from .fixes import Fix, fixes_of
from .vaes import DECODE, OWN_TILES, PICTURES, TILED, Use, is_ltx
from .values.latents import Video
from .view import INFO, WARNING, Finding, View, ids_of

_DEFAULTS = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
_WHOLE = "2.5"  # the version whose decoder has no chunks, so that tiles are what a small card needs
_SMALLER = (512, 384, 256, 192, 128)  # tile sizes to offer, in pixels
_LEAST_FRAMES = 2  # latent frames of a tile, as the host has it
_PLAIN = (
    "Use VAE Decode: it decodes LTX in chunks of time, exactly, and goes on in tiles by itself if memory runs out "
    "(ComfyUI 0.33 and newer)."
)


class Tile(NamedTuple):
    """Of a tile in latents: None where a side is not cut, or where it is not known."""

    width: int | None
    height: int | None
    frames: int | None


def tiles(view: View) -> Iterator[Finding]:
    """A saved clip that is decoded in tiles of time, in tiles that need too much memory, or in tiles for nothing."""
    for use in view.vaes:
        vae = use.file.vae if use.file is not None and use.kind == PICTURES else None
        if use.node.kind not in (TILED, *OWN_TILES) or vae is None or vae.family != LTX:
            continue  # which one it is decides what there is to say
        if use.task != DECODE or not is_ltx(view, use) or use.node.id not in view.saved:
            continue
        name = "latents" if use.node.kind in OWN_TILES else "samples"
        video = view.video(view.graph.source(use.node.id, name))
        if video is None:
            continue
        tile = _tile(view, use, video)
        chunked = not vae.version.startswith(_WHOLE)
        if chunked and tile.frames is not None:
            yield _temporal(view, use, tile, video)
        elif chunked and (tile.width or tile.height):
            yield Finding(
                "tiled_decode",
                INFO,
                f"{use.node.kind} cuts the picture into tiles, which VAE Decode does not need.",
                "The decoder sees less around the edge of a tile than in the middle of the picture, so that seams "
                "can show.",
                _PLAIN,
                ids_of(use.node),
            )
        if (found := _too_large(view, use, tile, video, "" if chunked else _WHOLE)) is not None:
            yield found


def _temporal(view: View, use: Use, tile: Tile, video: Video) -> Finding:
    return Finding(
        "temporal_tiles",
        WARNING,
        f"{use.node.kind} decodes {video.frames} latent frames {tile.frames} at a time, and mixes the pictures around "
        "the seams.",
        "A tile does not know what comes before and after it, so that the same frame looks different in two tiles: "
        "ghosts and jumps at the seams.",
        f"{_PLAIN} In tiles, set {_widget(use)} beyond the length of the clip.",
        ids_of(use.node),
        _fix(view, use, "temporal_size", video.frames * TEMPORAL),
    )


def _widget(use: Use) -> str:
    return "`temporal_size`" if use.node.kind == TILED else "`temporal_tile_length`"


def _too_large(view: View, use: Use, tile: Tile, video: Video, version: str) -> Finding | None:
    """Where a tile alone needs more than the card has; the node has nothing to fall back upon."""
    memory = view.fact("gpu_memory")
    sides = (tile.width or _latents(video.width), tile.height or _latents(video.height), tile.frames or video.frames)
    if not isinstance(memory, (int, float)) or memory <= 0 or None in sides:
        return None
    width, height, frames = sides
    clip = Clip(width * SPATIAL, height * SPATIAL, (frames - 1) * TEMPORAL + 1)
    needs = decode_bytes(clip, memory, version)
    if needs <= memory:
        return None
    sizes = (size for size in _SMALLER if size < max(clip.width, clip.height))
    smaller = (Clip(min(size, clip.width), min(size, clip.height), clip.frames) for size in sizes)
    fits = next((tile for tile in smaller if decode_bytes(tile, memory, version) <= memory), None)
    return Finding(
        "large_tiles",
        WARNING,
        f"A tile of {clip.width} x {clip.height} pixels and {clip.frames} frames takes about {gib(needs)} to decode; "
        f"this GPU has {gib(memory)}.",
        f"{use.node.kind} stops when memory runs out.",
        "Use VAE Decode, which goes on in tiles that fit by itself, or smaller tiles.",
        ids_of(use.node),
        _fix(view, use, "tile_size", max(fits.width, fits.height)) if fits is not None else (),
    )


def _fix(view: View, use: Use, name: str, value: int) -> tuple[Fix, ...]:
    """A value for ComfyUI's own node; the tiles of the others are counted, not measured."""
    return fixes_of(view.graph, [(use.node.id, name, value)]) if use.node.kind == TILED else ()


def _latents(side: int | None) -> int | None:
    return None if side is None else side // SPATIAL


def _tile(view: View, use: Use, video: Video) -> Tile:
    """The tiles that are smaller than the clip."""
    numbers = {name: view.graph.number(use.node.id, name) for name in use.node.inputs}
    width, height = _latents(video.width), _latents(video.height)
    if use.node.kind == TILED:
        size = _asked(numbers, "tile_size")
        side = None if size is None else int(size) // SPATIAL
        temporal = _asked(numbers, "temporal_size")
        long = None if temporal is None else max(_LEAST_FRAMES, int(temporal) // TEMPORAL)
        return Tile(_cut(width, side), _cut(height, side), _cut(video.frames, long))
    if use.node.kind == OWN_TILES[0]:
        across, down, overlap, long = numbers.get("horizontal_tiles"), numbers.get("vertical_tiles"), "overlap", None
    else:
        across = down = numbers.get("spatial_tiles")
        overlap, long = "spatial_overlap", numbers.get("temporal_tile_length")
    more = numbers.get(overlap)
    long = None if long is None else int(long)
    return Tile(_shared(width, across, more), _shared(height, down, more), _cut(video.frames, long))


def _asked(numbers: dict[str, float | None], name: str) -> float | None:
    """An input, by its default where it is absent; None where it is linked and unknown."""
    return numbers[name] if name in numbers else _DEFAULTS[name]


def _cut(whole: int | None, part: int | None) -> int | None:
    return part if whole is not None and part is not None and 0 < part < whole else None


def _shared(whole: int | None, count: float | None, overlap: float | None) -> int | None:
    """A side that is shared among so many tiles; ComfyUI-LTXVideo tiled_vae_decode.py."""
    if whole is None or count is None or count <= 1:
        return None
    return (whole + (int(count) - 1) * int(overlap or 0)) // int(count)
