"""Videos from files and folders: every frame once, in time, and everything that can be wrong with one."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.video_files import Frame, UnreadableVideo, open_video, write_video

SIZE = (48, 64)


def pictures(count=6, size=SIZE):
    """Smooth, and all different."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    for i in range(count):
        waves = [np.sin(x / 9 + i), np.cos(y / 7 + i), np.sin((x + y) / 11 - i)]
        yield Image.fromarray(np.round(127 + 100 * np.stack(waves, -1)).astype(np.uint8))


def coded(path: Path, codec="mpeg4", stamps=range(6), rotation=None) -> Path:
    """A video whose frame i is shown at `stamps[i]` tenths of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = SIZE[::-1]
        for stamp, picture in zip(stamps, pictures(len(stamps)), strict=True):
            frame = av.VideoFrame.from_image(picture)
            frame.pts = stamp
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def pixels(frame: Frame) -> np.ndarray:
    return (255 * frame.image[0].permute(1, 2, 0)).numpy()


def said(path) -> str:
    with pytest.raises(UnreadableVideo) as caught:
        list(open_video(path).frames())
    return str(caught.value)


def test_what_is_written_can_be_read(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, pictures(), 12.5)
    video = open_video(path)
    assert (video.name, video.count, video.rate) == ("clip", 6, 12.5)
    frames = list(video.frames())
    assert [frame.index for frame in frames] == [*range(6)]
    assert {frame.gap for frame in frames} == {1.0}
    for frame, picture in zip(frames, pictures(), strict=True):
        assert frame.image.shape == (1, 3, *SIZE)
        assert abs(pixels(frame) - np.asarray(picture)).mean() < 15  # lossy; another frame differs by 50
    assert video.remarks == []
    later = list(video.frames(4))
    assert [frame.index for frame in later] == [4, 5]
    assert all(torch.equal(a.image, b.image) for a, b in zip(later, frames[4:], strict=True))


def test_odd_and_unequal_pictures_are_written(tmp_path):
    odd = [*pictures(1, (31, 45)), *pictures(1, (60, 80)), *pictures(1, (10, 12))]
    write_video(tmp_path / "odd.mp4", odd, 25)
    assert [frame.image.shape[-2:] for frame in open_video(tmp_path / "odd.mp4").frames()] == [(32, 46)] * 3
    with pytest.raises(ValueError, match="at least one picture"):
        write_video(tmp_path / "none.mp4", [], 25)
    assert not (tmp_path / "none.mp4").exists()


def test_an_interrupted_video_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("earlier")

    def broken():
        yield from pictures(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, broken(), 10)
    assert path.read_text() == "earlier"
    assert [one.name for one in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_rate_that_varies_and_frames_that_are_missing(tmp_path):
    video = open_video(coded(tmp_path / "varying.mp4", stamps=[0, 1, 2, 5, 6, 7, 8, 9]))
    gaps = [frame.gap for frame in video.frames()]
    rate = video.rate / 10  # the average: below the usual rate
    assert gaps[0] == 1
    assert gaps[3] == pytest.approx(max(3 * rate, 1), abs=0.11)
    assert gaps[3] > 2 * gaps[1]
    assert next(frame.gap for frame in video.frames(3)) == gaps[3]


def test_a_video_lying_on_its_side_is_turned(tmp_path):
    path = coded(tmp_path / "phone.mp4")
    turned = bytearray(path.read_bytes())
    matrix = turned.index(b"tkhd") + 4 + 40  # version and flags, times, id, ...: the display matrix
    one, zero = (1 << 16).to_bytes(4, "big", signed=True), bytes(4)
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    assert turned[matrix : matrix + 4] == one
    turned[matrix : matrix + 20] = zero + one + zero + minus + zero  # a quarter turn clockwise
    (tmp_path / "turned.mp4").write_bytes(bytes(turned))
    plain, upright = (next(open_video(tmp_path / name).frames()) for name in ("phone.mp4", "turned.mp4"))
    assert upright.image.shape[-2:] == SIZE[::-1]
    np.testing.assert_array_equal(pixels(upright), np.rot90(pixels(plain), -1))


def test_files_that_end_early(tmp_path):
    path = coded(tmp_path / "whole.avi", stamps=range(40))
    cut = tmp_path / "cut.avi"
    cut.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    video = open_video(cut)
    frames = list(video.frames())
    assert 0 < len(frames) < 40
    assert video.remarks == [f"{cut} ends after {len(frames)} of 40 frames: it is not complete"]
    mp4 = coded(tmp_path / "whole.mp4")
    mp4.write_bytes(mp4.read_bytes()[:200])
    assert re.search(r"whole.mp4 cannot be read as a video: .*Copy it again, or convert it: ffmpeg -i", said(mp4))


def test_a_codec_that_is_missing(tmp_path):
    path = coded(tmp_path / "clip.avi")
    known = path.read_bytes()
    assert b"FMP4" in known
    path.write_bytes(known.replace(b"FMP4", b"ZZZZ"))
    assert "is coded with a codec that is missing here: convert it" in said(path)


def test_no_video(tmp_path):
    assert "there is no video" in said(tmp_path / "absent.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    assert "cannot be read as a video" in said(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    assert "has no video in it" in said(tmp_path / "sound.wav")
    (tmp_path / "empty").mkdir()
    assert "has no frames" in said(tmp_path / "empty")
    with av.open(str(tmp_path / "header.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = SIZE[::-1]
        container.start_encoding()
    assert "header.avi has no frames that can be decoded" in said(tmp_path / "header.avi")


def frames_of(folder: Path, numbers) -> Path:
    folder.mkdir()
    for number, picture in zip(numbers, pictures(len(numbers)), strict=True):
        picture.save(folder / f"frame{number}.png")
    return folder


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    video = open_video(frames_of(tmp_path / "clip", (8, 9, 10)))
    frames = list(video.frames())
    assert (video.name, video.count, video.rate) == ("clip", 3, None)
    for frame, picture in zip(frames, pictures(3), strict=True):
        np.testing.assert_allclose(pixels(frame), np.asarray(picture), atol=1e-4)
    assert [frame.gap for frame in frames] == [1, 1, 1]
    assert [frame.index for frame in video.frames(2)] == [2]
    assert video.remarks == []


def test_missing_frames_of_a_folder(tmp_path):
    every_tenth = open_video(frames_of(tmp_path / "tenth", (0, 10, 20)))
    assert [frame.gap for frame in every_tenth.frames()] == [1, 1, 1]
    assert every_tenth.remarks == []
    holes = open_video(frames_of(tmp_path / "holes", (0, 1, 4, 5)))
    assert [frame.gap for frame in holes.frames()] == [1, 1, 3, 1]
    assert holes.remarks == ["2 frames are missing between the 4 of holes"]
    stamped = open_video(frames_of(tmp_path / "stamped", ("7.1000", "7.1099", "7.1301", "7.1401")))
    assert [frame.gap for frame in stamped.frames()] == [1, 1, 2, 1]
    named = tmp_path / "named"
    named.mkdir()
    for name, picture in zip(("cat", "dog5"), pictures(2), strict=True):
        picture.save(named / f"{name}.png")
    assert [frame.gap for frame in open_video(named).frames()] == [1, 1]


def test_damaged_frames_of_a_folder(tmp_path):
    folder = frames_of(tmp_path / "clip", (1, 2, 3, 4))
    (folder / "frame2.png").write_text("no picture")
    video = open_video(folder)
    assert [(frame.index, frame.gap) for frame in video.frames()] == [(0, 1), (2, 2), (3, 1)]
    assert len(video.remarks) == 1
    assert video.remarks[0].startswith("frame 1 is left out: ")
    for file in folder.iterdir():
        file.write_text("no picture")
    assert "none of the 4 frames of clip can be read: frame 0 is left out" in said(folder)


def test_the_fingerprint_follows_the_files(tmp_path):
    folder = frames_of(tmp_path / "clip", (1, 2))
    before = open_video(folder).fingerprint
    assert open_video(folder).fingerprint == before
    next(pictures(1, (20, 20))).save(folder / "frame2.png")
    assert open_video(folder).fingerprint != before
