"""A visitor's files: into a temporary folder and decoded, or refused with the reason. Nothing else is written.

A file's content decides what it is, never its name. Images are decoded by Pillow in the formats of
`experiments.data.image_files`, none of which runs a program. Videos are decoded by FFmpeg; only containers that cannot
refer to other files are let in (no playlists).
"""

import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.streams import generator
from experiments.data.image_files import UnreadableImage, bundled, read, resized, shrink
from experiments.data.video_files import Frame, UnreadableVideo, VideoFile
from experiments.errors import Told

MAX_BYTES = 20 * 2**20
"""Of an uploaded file."""
MAX_PIXELS = 40_000_000
"""Of an image, or of one frame of a video."""
_SHOWN = 60  # characters of a file's name in messages


class Refused(Told, ValueError):
    """A file that is not taken; the message says why and what to do."""


class Uploads:
    """The folder of one visitor, inside `parent`. `close` removes it, and with it all that was uploaded."""

    def __init__(self, parent: Path):
        self.folder = Path(tempfile.mkdtemp(dir=parent))

    def image(self, name: str, data: bytes) -> Tensor:
        """A file's content -> (1,3,H,W) RGB in [0,1].

        Raises:
            Refused: too large, not an image, or damaged; the message calls the file `name`.
        """
        path = self._kept("image", name, data)
        try:
            return read(path, max_pixels=MAX_PIXELS)
        except UnreadableImage as error:
            raise Refused(_named(error, path, name)) from error

    def video(self, name: str, data: bytes, most: int, side: int) -> tuple[list[Frame], str]:
        """A file's content -> its first frames, at most `most`, shrunk to `side` pixels; and what is left out.

        Raises:
            Refused: too large, not a video that is taken, or without frames; the message calls the file `name`.
        """
        if not is_video(data):
            raise Refused(f"{name[:_SHOWN]} is no MP4, WebM, Matroska or AVI video: convert it to one of these")
        path = self._kept("video", name, data)
        try:
            source = VideoFile(path)
            if source.size[0] * source.size[1] > MAX_PIXELS:
                raise Refused(f"{name[:_SHOWN]}: frames of {source.size[0]} x {source.size[1]} pixels are too large")
            frames = list(islice(_shrunk(source.frames(), side), most + 1))
        except UnreadableVideo as error:
            raise Refused(_named(error, path, name)) from error
        left_out = f"Only the first {most} frames of {name[:_SHOWN]} are shown." if len(frames) > most else ""
        return frames[:most], left_out or " ".join(_named(remark, path, name) for remark in source.remarks)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kept(self, kind: str, name: str, data: bytes) -> Path:
        if len(data) > MAX_BYTES:
            raise Refused(f"{name[:_SHOWN]} has {len(data) / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB are taken")
        path = self.folder / kind
        path.write_bytes(data)
        return path


def is_video(data: bytes) -> bool:
    """Whether the first bytes are those of an MP4, WebM, Matroska or AVI file."""
    return data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3" or (data[:4] == b"RIFF" and data[8:11] == b"AVI")


def example(name: str) -> Tensor:
    """A bundled photograph, (1,3,H,W) RGB in [0,1]. Raises NoImages as `bundled`."""
    return read(bundled(name))


def pan(name: str, count: int, side: int) -> list[Frame]:
    """A video without a file: a camera that moves over a bundled photograph and shakes a little.

    Args:
        count: frames. side: of the square frames in pixels.
    """
    image = example(name)
    scale = 1.6 * side / min(image.shape[-2:])
    image = resized(image, tuple(max(side, round(length * scale)) for length in image.shape[-2:]))  # (1,3,H,W)
    room = np.subtract(image.shape[-2:], side)
    shake = torch.rand(count, 2, generator=generator("pan", name)).numpy() * 4 - 2  # pixels
    frames = []
    for i in range(count):
        along = 0.1 + 0.6 * i / max(1, count - 1)
        top, left = (int(at) for at in np.clip(along * room + shake[i], 0, room))
        frames.append(Frame(i, image[..., top : top + side, left : left + side].contiguous()))
    return frames


def _shrunk(frames: Iterator[Frame], side: int) -> Iterator[Frame]:
    for frame in frames:
        yield Frame(frame.index, shrink(frame.image, side), frame.gap)


def _named(error: Exception | str, path: Path, name: str) -> str:
    """A message with the file's own name in place of that of its copy."""
    return str(error).replace(str(path), name[:_SHOWN]).replace(path.name + " ", name[:_SHOWN] + " ")
