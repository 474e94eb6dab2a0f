# SPDX-License-Identifier: Apache-2.0
"""Nodes that make and change pictures: how wide, how high and how many, a line a node.

A side is known where the node decides it, whatever the picture was: a crop to 1280 x 720 has that size although the
photograph before it is in a file. ``PICTURES`` names the code that each line follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .evaluate import Given, Row, Unknown

_IMAGES, _POST, _NODES = "comfy_extras/nodes_images.py", "comfy_extras/nodes_post_processing.py", "nodes.py"
_KJ, _PREPROCESSORS = "ComfyUI-KJNodes nodes/image_nodes.py", "comfyui_controlnet_aux"
MEGA = 1024 * 1024


class Picture(NamedTuple):
    """Pixels and number of pictures of an IMAGE, or a MASK; each None if it is unknown."""

    width: int | None
    height: int | None
    count: int | None

    def sized(self, width: int | None, height: int | None) -> Picture:
        """As many pictures of another size."""
        return Picture(width, height, self.count)


class Film(NamedTuple):
    """A VIDEO: its pictures, and how many of them a second; None if that is unknown."""

    pictures: Picture
    rate: float | None


_UNSEEN = Picture(None, None, None)


def _given(given: Given, name: str) -> Picture:
    """The picture at an input, of which nothing may be known."""
    found = given.maybe(name)
    return found if isinstance(found, Picture) else _UNSEEN


def _known(picture: Picture) -> tuple[int, int]:
    if picture.width is None or picture.height is None:
        raise Unknown
    return picture.width, picture.height


def _same(name: str) -> Callable[[Given], Iterable[Any]]:
    return lambda given: (_given(given, name),)


def _empty(given: Given) -> Iterable[Any]:
    count = given.integer("batch_size") if given.has("batch_size") else 1
    return (Picture(given.integer("width"), given.integer("height"), count),)


def _to(picture: Picture, width: int, height: int) -> Picture:
    """To these sides, where 0 stands for the one that keeps the proportions, and two of them for nothing to do."""
    if width == height == 0:
        return picture
    if width == 0:
        wide, high = _known(picture)
        width = max(1, round(wide * height / high))
    elif height == 0:
        wide, high = _known(picture)
        height = max(1, round(high * width / wide))
    return picture.sized(width, height)


def _scaled(picture: Picture, factor: float) -> Picture:
    width, height = (None if side is None else round(side * factor) for side in picture[:2])
    return picture.sized(width, height)


def _longer_side(picture: Picture, size: int) -> Picture:
    width, height = _known(picture)
    if height > width:
        return picture.sized(round(width / height * size), size)
    return picture.sized(size, round(height / width * size) if width > height else size)


def _shorter_side(picture: Picture, size: int) -> Picture:
    width, height = _known(picture)
    if height < width:
        return picture.sized(round(width / height * size), size)
    return picture.sized(size, round(height / width * size) if width < height else size)


def _total(picture: Picture, pixels: float, step: int = 1) -> Picture:
    width, height = _known(picture)
    factor = math.sqrt(pixels / (width * height))
    return picture.sized(round(width * factor / step) * step, round(height * factor / step) * step)


def _multiple(picture: Picture, multiple: int) -> Picture:
    if multiple <= 1:
        return picture
    width, height = (None if side is None else side // multiple * multiple for side in picture[:2])
    return picture if width == 0 or height == 0 else picture.sized(width, height)


def _matched(picture: Picture, other: Picture) -> Picture:
    return picture.sized(other.width, other.height)


def _resized(given: Given) -> Iterable[Any]:
    picture, kind = _given(given, "input"), given.value("resize_type")

    def option(name: str) -> int | float:
        return given.number(f"resize_type.{name}")

    match kind:
        case "scale dimensions":
            found = _to(picture, int(option("width")), int(option("height")))
        case "scale width":
            found = _to(picture, int(option("width")), 0)
        case "scale height":
            found = _to(picture, 0, int(option("height")))
        case "scale by multiplier":
            found = _scaled(picture, option("multiplier"))
        case "scale longer dimension":
            found = _longer_side(picture, int(option("longer_size")))
        case "scale shorter dimension":
            found = _shorter_side(picture, int(option("shorter_size")))
        case "scale total pixels":
            found = _total(picture, int(option("megapixels") * MEGA))
        case "match size":
            found = _matched(picture, _given(given, "resize_type.match"))
        case "scale to multiple":
            found = _multiple(picture, int(option("multiple")))
        case _:
            raise Unknown
    return (found,)


def _edge(name: str, longer: bool) -> Callable[[Given], Iterable[Any]]:
    """The old nodes by one edge, which cut the other off where the newer ones round."""

    def outputs(given: Given) -> Iterable[Any]:
        picture, size = _given(given, "images"), given.integer(name)
        width, height = _known(picture)
        if (width > height) if longer else (width < height):
            return (picture.sized(size, int(height * (size / width))),)
        return (picture.sized(int(width * (size / height)), size),)

    return outputs


def _cropped(given: Given) -> Iterable[Any]:
    picture = _given(given, "image")
    width, height = _known(picture)
    x, y = min(given.integer("x"), width - 1), min(given.integer("y"), height - 1)
    return (picture.sized(min(given.integer("width"), width - x), min(given.integer("height"), height - y)),)


def _one_of_batch(given: Given) -> Iterable[Any]:
    picture, index, length = _given(given, "image"), given.integer("batch_index"), given.integer("length")
    if picture.count is None:
        return (Picture(picture.width, picture.height, 1 if length == 1 else None),)
    index = max(0, min(picture.count - 1, index + picture.count if index < 0 else index))
    return (Picture(picture.width, picture.height, min(picture.count - index, length)),)


def _repeated(given: Given) -> Iterable[Any]:
    picture = _given(given, "image")
    count = None if picture.count is None else picture.count * given.integer("amount")
    return (Picture(picture.width, picture.height, count),)


def _rotated(given: Given) -> Iterable[Any]:
    picture = _given(given, "image")
    turned = given.a(str, "rotation").startswith(("90", "270"))
    return (picture.sized(picture.height, picture.width) if turned else picture,)


def _even(given: Given) -> Iterable[Any]:
    """LTXVPreprocess cuts to even sides where it compresses at all."""
    picture = _given(given, "image")
    return (picture if given.number("img_compression") == 0 else _multiple(picture, 2),)


def _resized_kj(given: Given) -> Iterable[Any]:
    """Outputs: picture, width, height, mask; what it pads is left unknown."""
    picture, width, height = _given(given, "image"), given.integer("width"), given.integer("height")
    how, step = given.a(str, "keep_proportion"), max(given.integer("divisible_by"), 1)
    if how == "resize":
        if width and height:
            wide, high = _known(picture)
            factor = min(width / wide, height / high)
            width, height = round(wide * factor), round(high * factor)
        elif width:
            wide, high = _known(picture)
            height = round(high * (width / wide))
        elif height:
            wide, high = _known(picture)
            width = round(wide * (height / high))
        else:
            width, height = _known(picture)
    elif how == "total_pixels":
        wide, high = _known(picture)
        width, height = int(math.sqrt(width * height * (wide / high))), int(math.sqrt(width * height / (wide / high)))
    elif how in ("stretch", "crop"):
        wide, high = (width and height and (width, height)) or _known(picture)
        width, height = width or wide, height or high
    else:
        raise Unknown
    width, height = width - width % step, height - height % step
    if given.maybe("upscale_method") == "nvidia_rtx_vsr":
        width, height = (max(8, round(side / 8) * 8) for side in (width, height))
    return picture.sized(width, height), width, height, picture.sized(width, height)


def _blended(given: Given) -> Iterable[Any]:
    """Two of one size; of one length too, unless the longer one is cut."""
    first, second = _given(given, "image_a"), _given(given, "image_b")
    counts, trimmed = (first.count, second.count), given.maybe("trim_to_shortest")
    if trimmed is False or first.count == second.count:
        count = first.count or second.count
    else:
        count = min(counts) if trimmed and None not in counts else None
    return (Picture(first.width or second.width, first.height or second.height, count),)


def _canny(given: Given) -> Iterable[Any]:
    """Its shorter side becomes `resolution`, 512 where that is below 64."""
    picture, resolution = _given(given, "image"), given.integer("resolution")
    width, height = _known(picture)
    factor = (resolution if resolution >= 64 else 512) / min(width, height)
    return (picture.sized(round(width * factor), round(height * factor)),)


def _padded(given: Given) -> Iterable[Any]:
    """Scaled down until it fits, and padded to the target."""
    width, height = given.integer("target_width"), given.integer("target_height")
    if min(width, height) < 1:
        raise Unknown
    return (_given(given, "image").sized(width, height),) * 2


def _joined(given: Given) -> Iterable[Any]:
    first, second = _given(given, "image1"), _given(given, "image2")
    count = None if first.count is None or second.count is None else first.count + second.count
    return (Picture(first.width, first.height, count),)


def _components(given: Given) -> Iterable[Any]:
    film = given.a(Film, "video")
    return film.pictures, None, film.rate


PICTURES = {
    "LoadImage": Row(lambda given: (given.file("picture", "image"),), _NODES),
    "LoadVideo": Row(lambda given: (given.file("film", "file"),), "comfy_extras/nodes_video.py"),
    "CreateVideo": Row(lambda g: (Film(_given(g, "images"), float(g.number("fps"))),), "comfy_extras/nodes_video.py"),
    "LTXVInpaintPreprocess": Row(_same("images"), "ComfyUI-LTXVideo vanish_nodes.py"),
    "GetVideoComponents": Row(_components, "comfy_extras/nodes_video.py"),
    "EmptyImage": Row(_empty, _NODES),
    "SolidMask": Row(_empty, "comfy_extras/nodes_mask.py"),
    "ImageScale": Row(lambda g: (_to(_given(g, "image"), g.integer("width"), g.integer("height")),), _NODES),
    "ImageScaleBy": Row(lambda g: (_scaled(_given(g, "image"), g.number("scale_by")),), _NODES),
    "ImageInvert": Row(_same("image"), _NODES),
    "ImageBatch": Row(_joined, _NODES),
    "ResizeImageMaskNode": Row(_resized, _POST),
    "ImageScaleToTotalPixels": Row(
        lambda g: (_total(_given(g, "image"), g.number("megapixels") * MEGA, _steps(g)),), _POST
    ),
    "ImageBlur": Row(_same("image"), _POST),
    "ImageSharpen": Row(_same("image"), _POST),
    "ImageScaleToMaxDimension": Row(lambda g: (_longer_side(_given(g, "image"), g.integer("largest_size")),), _IMAGES),
    "ResizeAndPadImage": Row(
        lambda g: (_given(g, "image").sized(g.integer("target_width"), g.integer("target_height")),), _IMAGES
    ),
    "ImageCrop": Row(_cropped, _IMAGES),
    "ImageFromBatch": Row(_one_of_batch, _IMAGES),
    "RepeatImageBatch": Row(_repeated, _IMAGES),
    "ImageRotate": Row(_rotated, _IMAGES),
    "ImageFlip": Row(_same("image"), _IMAGES),
    "ResizeImagesByLongerEdge": Row(_edge("longer_edge", True), "comfy_extras/nodes_dataset.py"),
    "ResizeImagesByShorterEdge": Row(_edge("shorter_edge", False), "comfy_extras/nodes_dataset.py"),
    "CenterCropImages": Row(
        lambda g: (_given(g, "images").sized(*(_cut(g, side) for side in ("width", "height"))),),
        "comfy_extras/nodes_dataset.py",
    ),
    "Canny": Row(_same("image"), "comfy_extras/nodes_canny.py"),
    "LTXVPreprocess": Row(_even, "comfy_extras/nodes_lt.py"),
    "ImageToMask": Row(_same("image"), "comfy_extras/nodes_mask.py"),
    "MaskToImage": Row(_same("mask"), "comfy_extras/nodes_mask.py"),
    "InvertMask": Row(_same("mask"), "comfy_extras/nodes_mask.py"),
    "LTXVLaplacianPyramidBlend": Row(_blended, "ComfyUI-LTXVideo pyramid_blending.py"),
    "CannyEdgePreprocessor": Row(_canny, f"{_PREPROCESSORS} utils.py, canny/__init__.py"),
    "ImagePadForOutpaintTargetSize": Row(_padded, _KJ),
    "ImageResizeKJv2": Row(_resized_kj, _KJ),
}


def _steps(given: Given) -> int:
    return given.integer("resolution_steps") if given.has("resolution_steps") else 1


def _cut(given: Given, side: str) -> int:
    picture = _given(given, "images")
    before = getattr(picture, side)
    if before is None:
        raise Unknown
    return min(before, given.integer(side))
