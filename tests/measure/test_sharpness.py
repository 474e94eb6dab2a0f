# SPDX-License-Identifier: Apache-2.0
"""Sharpness: OpenCV's own value, the verdicts on scikit-image's photographs, and reading what people have on disk."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2")
data = pytest.importorskip("skimage.data")

from nvfp4_video.measure import media  # noqa: E402
from nvfp4_video.measure.sharpness import DETAIL_RATIO, laplacian_variance, measure_sharpness  # noqa: E402
from nvfp4_video.tests.support.clips import enlarged  # noqa: E402

# All sharp photographs that ship inside scikit-image's wheel. Left out: drawings and charts, and what is soft to begin
# with (retina, cell, clock_motion, microaneurysms).
NAMES = (
    "astronaut brick camera chelsea coffee coins grass gravel hubble_deep_field immunohistochemistry moon page rocket "
    "text motorcycle_left motorcycle_right"
).split()


@pytest.fixture(scope="module")
def photographs() -> dict[str, np.ndarray]:
    left, right, _ = data.stereo_motorcycle()
    pair = {"motorcycle_left": left, "motorcycle_right": right}
    return {name: pair[name] if name in pair else getattr(data, name)() for name in NAMES}


def verdicts(images: dict[str, np.ndarray]) -> dict[str, str]:
    return {name: measure_sharpness([image]).verdict for name, image in images.items()}


def test_values_equal_opencv_on_every_photograph(photographs):
    for image in photographs.values():
        gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        expected = cv2.Laplacian(gray, cv2.CV_64F).var()
        as_comfy = torch.from_numpy(np.atleast_3d(image)).float().div(255)[None]
        assert measure_sharpness(as_comfy).values == (expected,)
        assert laplacian_variance(image) == expected


def test_sharp_photographs_are_called_sharp_but_for_the_soft_brick(photographs):
    found = verdicts(photographs)
    assert {name for name, verdict in found.items() if verdict != "sharp"} == {"brick"}


def test_photographs_reduced_to_half_are_all_sharp(photographs):
    halves = {n: cv2.resize(i, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for n, i in photographs.items()}
    assert set(verdicts(halves).values()) == {"sharp"}


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_enlarged_photographs_are_all_called_preview_like(photographs, factor):
    found = verdicts({name: enlarged(image, factor) for name, image in photographs.items()})
    assert set(found.values()) == {"preview-like"}


def test_blurred_photographs_are_all_called_blurred(photographs):
    found = verdicts({name: cv2.GaussianBlur(image, (0, 0), 4) for name, image in photographs.items()})
    assert set(found.values()) == {"blurred"}


def test_softness_of_the_published_preview_decoder_is_caught_on_14_of_16(photographs):
    soft = {name: enlarged(image, 1.5, blur=0) for name, image in photographs.items()}
    ratios = [laplacian_variance(soft[name]) / laplacian_variance(photographs[name]) for name in NAMES]
    assert np.median(ratios) == pytest.approx(45 / 205, abs=0.02)
    assert sorted(name for name, verdict in verdicts(soft).items() if verdict == "sharp") == ["page", "rocket"]


def test_the_documented_ratios_of_sharp_and_enlarged_photographs_hold(photographs):
    sharp = [measure_sharpness([image]).detail[0] for image in photographs.values()]
    soft = [measure_sharpness([enlarged(i, f)]).detail[0] for i in photographs.values() for f in (2, 3, 4)]
    assert (min(sharp), max(sharp)) == (pytest.approx(0.24, abs=0.01), pytest.approx(1.16, abs=0.01))
    assert max(soft) == pytest.approx(0.17, abs=0.01)
    assert max(soft) < DETAIL_RATIO


def test_a_jpeg_copy_keeps_the_verdicts(photographs):
    def jpeg(image):
        return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_UNCHANGED)

    assert verdicts({n: jpeg(i) for n, i in photographs.items() if n != "brick"}) == dict.fromkeys(
        (n for n in NAMES if n != "brick"), "sharp"
    )
    assert set(verdicts({n: jpeg(enlarged(i, 2)) for n, i in photographs.items()}).values()) == {"preview-like"}


def test_the_reference_decides_before_the_content():
    coffee = data.coffee()
    value = laplacian_variance(coffee)
    assert measure_sharpness([coffee], reference=value * 1.9).verdict == "sharp"
    assert measure_sharpness([coffee], reference=value * 2.1).verdict == "preview-like"
    brick = measure_sharpness([data.brick()], reference=180.0)
    assert (brick.verdict, brick.soft) == ("sharp", False)
    assert measure_sharpness([cv2.GaussianBlur(coffee, (0, 0), 4)], reference=value).verdict == "blurred"


@pytest.mark.parametrize("reference", [0.0, -1.0, float("nan"), float("inf")])
def test_a_reference_that_is_no_positive_number_is_refused(reference):
    with pytest.raises(media.MediaError, match="above 0"):
        measure_sharpness([data.camera()], reference=reference)


def test_median_min_max_and_size_are_those_of_the_frames():
    camera = data.camera()
    clip = np.stack([camera, enlarged(camera, 2), enlarged(camera, 4)])[..., None]
    result = measure_sharpness(clip)
    values = [laplacian_variance(frame[..., 0]) for frame in clip]
    assert (result.max, result.median, result.min) == tuple(values)
    assert (result.width, result.height, result.verdict) == (512, 512, "preview-like")


def test_flat_and_tiny_frames_are_undecided_not_preview_like():
    assert measure_sharpness(np.full((2, 64, 64, 3), 90, np.uint8)).verdict == "undecided"
    tiny = measure_sharpness(np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3), np.uint8))
    assert (tiny.verdict, tiny.detail) == ("undecided", (None, None, None))
    assert "Give a reference" in tiny.text


def test_text_states_numbers_threshold_and_remedy_and_the_record_is_json():
    result = measure_sharpness([enlarged(data.coffee(), 2)])
    for part in (f"{result.median:.1f}", "600x400", "preview-like", "0.25", "full VAE", "reference"):
        assert part in result.text
    record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert record["values"] == list(result.values)
    assert record["detail_scale"] == 2


def test_single_channel_alpha_and_half_precision_are_measured_like_rgb():
    camera = torch.from_numpy(data.camera()).float()[None, :, :, None] / 255
    expected = measure_sharpness(camera.expand(-1, -1, -1, 3)).values
    assert measure_sharpness(camera).values == expected
    assert measure_sharpness(torch.cat([camera.expand(-1, -1, -1, 3), torch.ones_like(camera)], -1)).values == expected
    assert measure_sharpness(camera.half()).median == pytest.approx(expected[0], rel=0.01)


def test_colours_hidden_under_transparent_pixels_do_not_count():
    noise = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 4), np.uint8)
    noise[..., 3] = 0
    assert measure_sharpness(noise).values == (0.0,)


def test_values_outside_the_range_are_clipped_and_nan_is_an_error():
    frames = torch.tensor([-0.5, 0.5, 1.5]).repeat(20, 20)[None, :, :, None]
    assert np.unique(media.to_frames(frames)).tolist() == [0, 128, 255]
    frames[0, 3, 3] = torch.nan
    with pytest.raises(media.MediaError, match="frame 0.*bfloat16"):
        measure_sharpness(frames)


@pytest.mark.parametrize("shape", [(1, 128, 5, 4, 4), (1, 16, 16, 2), (0, 16, 16, 3), (7,)])
def test_what_is_no_image_is_refused_with_its_shape(shape):
    with pytest.raises(media.MediaError, match=str(shape[-1])):
        measure_sharpness(torch.zeros(shape))


def test_images_folders_and_videos_give_back_their_frames(tmp_path):
    clip = np.stack([np.roll(data.astronaut()[:96, :128], 4 * i, axis=1) for i in range(11)])
    (tmp_path / "folder ä").mkdir()
    for index, frame in enumerate(clip):
        (tmp_path / "folder ä" / f"frame_{index}.png").write_bytes(media.encode_png(frame))
    frames, fps = media.read_frames(tmp_path / "folder ä")
    assert np.array_equal(frames, clip)  # frame_10 after frame_9
    assert fps is None
    assert np.array_equal(media.read_frames(tmp_path / "folder ä" / "frame_3.png")[0], clip[3:4])
    write_video(tmp_path / "clip.mkv", clip, 24)
    frames, fps = media.read_frames(tmp_path / "clip.mkv")
    assert np.array_equal(frames, clip)
    assert fps == 24.0
    assert len(media.read_frames(tmp_path / "clip.mkv", max_frames=3)[0]) == 3
    assert media.read_audio(tmp_path / "clip.mkv") is None
    assert measure_sharpness(media.iter_frames(tmp_path / "clip.mkv")) == measure_sharpness(clip)


def test_grey_sixteen_bit_and_transparent_png_files_are_read(tmp_path):
    grey = data.camera()[:40, :50]
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    for name in ("grey", "deep", "alpha"):
        assert np.array_equal(media.read_frames(tmp_path / f"{name}.png")[0][0], np.dstack([grey] * 3)), name


def test_unreadable_inputs_name_the_file_and_the_remedy(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    (tmp_path / "zero.png").touch()
    for name in ("empty", "broken.png", "broken.mp4", "zero.png", "missing.mp4"):
        with pytest.raises(media.MediaError, match=name.replace(".", r"\.")):
            media.read_frames(tmp_path / name)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.png").write_bytes(media.encode_png(np.zeros((8, 8, 3), np.uint8)))
    (tmp_path / "mixed" / "b.png").write_bytes(media.encode_png(np.zeros((8, 9, 3), np.uint8)))
    with pytest.raises(media.MediaError, match="9x8 after frames of 8x8"):
        media.read_frames(tmp_path / "mixed")


def write_video(path, clip: np.ndarray, fps: int) -> None:
    """Lossless RGB video."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
