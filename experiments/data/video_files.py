"""Reads a video, a file or a folder of frames, frame by frame; and writes one from pictures."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.atomic import replacing
from experiments.data.files import natural
from experiments.data.image_files import SUFFIXES, UnreadableImage, read
from experiments.errors import Told

USUAL = 0.1
"""Gaps this close to a whole number of frames are that number: time stamps are rounded."""


class UnreadableVideo(Told, ValueError):
    """No video, none that can be decoded, or one without frames."""


@dataclass(frozen=True)
class Frame:
    """One frame of a video."""

    index: int
    """Its place in the video, from 0."""
    image: Tensor
    """(1,3,H,W) float32 RGB in [0,1], upright."""
    gap: float = 1.0
    """Time since the frame before, in frames at the usual rate; 1 for the first frame."""


class VideoSource(ABC):
    """A video that can be read any number of times, one frame in memory at a time."""

    name: str
    count: int | None
    """Frames that there should be; None: the file does not say."""
    rate: float | None
    """Frames per second; None: unknown."""
    fingerprint: str
    """Digest of the file's or files' names, sizes and times of change."""
    remarks: list[str]
    """What was wrong with the frames that were read last, and what was done about it."""

    @abstractmethod
    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Yields the frames from `start` on, in order.

        Raises:
            UnreadableVideo: there is no frame at all.
        """


def open_video(path: str | Path) -> VideoSource:
    """Opens a video file, or a folder of frames in the order of their numbers.

    Raises:
        UnreadableVideo: there is none, it has no frames, or its codec is missing; the message says what to do.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return FolderOfFrames(path)
    if not path.exists():
        raise UnreadableVideo(f"there is no video {path}: give a file, or a folder of frames")
    return VideoFile(path)


class FolderOfFrames(VideoSource):
    """Images of a folder; frame10 comes after frame9. Numbers that are left out count as missing frames."""

    def __init__(self, path: Path):
        files = [one for one in path.iterdir() if one.suffix.lower() in SUFFIXES and not one.name.startswith(".")]
        if not files:
            raise UnreadableVideo(f"{path} has no frames: a video is a file, or a folder of images")
        self.files = sorted(files, key=lambda one: natural(one.name))
        self.name, self.count, self.rate = path.resolve().name, len(self.files), None
        self.fingerprint, self.remarks = _fingerprint(self.files), []

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Contract: `VideoSource.frames`; an image that cannot be read counts as missing."""
        self.remarks, seen, missed = [], 0, 0.0
        gaps = self._gaps()
        for i, (file, gap) in enumerate(zip(self.files, gaps, strict=True)):
            if i < start:
                seen += 1
                continue
            try:
                image = read(file)
            except UnreadableImage as error:
                self.remarks.append(f"frame {i} is left out: {error}")
                missed += gap
                continue
            yield Frame(i, image, gap + missed)
            seen, missed = seen + 1, 0.0
        if not seen:
            raise UnreadableVideo(f"none of the {len(self.files)} frames of {self.name} can be read: {self.remarks[0]}")

    def _gaps(self) -> list[float]:
        """Of each frame: steps of the numbers in the names, 1 where names have none."""
        numbers = [re.findall(r"\d+", file.stem) for file in self.files]
        if len({re.sub(r"\d+$", "", file.stem) for file in self.files}) > 1 or not all(numbers):
            return [1.0] * len(numbers)
        steps = [int(after[-1]) - int(before[-1]) for before, after in pairwise(numbers)]
        usual = min(steps, default=1) or 1
        if missing := sum(round(step / usual) - 1 for step in steps):
            self.remarks.append(f"{missing} frames are missing between the {len(self.files)} of {self.name}")
        return [1.0, *(_gap(step / usual) for step in steps)]


class VideoFile(VideoSource):
    """A file that PyAV (FFmpeg) decodes."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        with self._opened() as (_, stream):
            self.count = stream.frames or None
            self.rate = float(stream.average_rate) if stream.average_rate else None
            self.size: tuple[int, int] = (stream.codec_context.height, stream.codec_context.width)
            """Rows and columns of the frames as they are stored."""
        self.fingerprint, self.remarks = _fingerprint([path]), []

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """Contract: `VideoSource.frames`; a file that ends early, or is damaged from somewhere on, ends there."""
        from av.error import FFmpegError

        self.remarks, before, index = [], None, 0
        with self._opened() as (container, stream):
            try:
                for decoded in container.decode(stream):
                    time = None if decoded.pts is None else float(decoded.pts * decoded.time_base)
                    if index >= start:
                        yield Frame(index, _tensor(decoded), self._gap(before, time))
                    before, index = time, index + 1
            except FFmpegError as error:
                self.remarks.append(f"{self.path} is damaged after frame {index}: {_reason(error)}")
        if not index:
            raise UnreadableVideo(
                f"{self.path} has no frames that can be decoded" + "".join(f": {remark}" for remark in self.remarks)
            )
        if self.count is not None and index < self.count and not self.remarks:
            self.remarks.append(f"{self.path} ends after {index} of {self.count} frames: it is not complete")

    def _gap(self, before: float | None, time: float | None) -> float:
        if before is None or time is None or self.rate is None:
            return 1.0
        return _gap((time - before) * self.rate)

    @contextmanager
    def _opened(self):
        """The container and its first video stream."""
        import av  # takes a while to import
        from av.error import FFmpegError

        try:
            container = av.open(str(self.path))
        except (FFmpegError, OSError) as error:
            raise UnreadableVideo(
                f"{self.path} cannot be read as a video: {_reason(error)}. Copy it again, or convert it: "
                f"ffmpeg -i {self.path.name} new.mp4"
            ) from error
        with container:
            if not container.streams.video:
                raise UnreadableVideo(f"{self.path} has no video in it: choose another file")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UnreadableVideo(
                    f"{self.path} is coded with a codec that is missing here: convert it where it can be played, "
                    f"ffmpeg -i {self.path.name} -c:v libx264 new.mp4"
                )
            stream.thread_type = "AUTO"
            yield container, stream


def write_video(path: Path, pictures: Iterable[Image.Image], rate: float) -> None:
    """Writes pictures as an H.264 video, whole or not at all. All get the size of the first one.

    Args:
        pictures: RGB. rate: pictures per second.

    Raises:
        ValueError: there are no pictures. CannotWrite: the disk is full, say.
    """
    import av

    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        raise ValueError("a video needs at least one picture")
    width, height = (side + side % 2 for side in first.size)  # H.264 stores colours for two by two pixels
    with replacing(path) as part, av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in chain([first], pictures):
            sheet = Image.new("RGB", (width, height), "white")
            sheet.paste(picture.crop((0, 0, width, height)) if picture.size > first.size else picture)
            container.mux(stream.encode(av.VideoFrame.from_image(sheet)))
        container.mux(stream.encode())


def _gap(gap: float) -> float:
    """Frames, where they are nearly whole; 1 for time that stands still or runs back."""
    whole = max(1, round(gap))
    return float(whole) if gap <= 0 or abs(gap - whole) <= USUAL else gap


def _tensor(decoded: object) -> Tensor:
    """A decoded frame as (1,3,H,W) RGB in [0,1], turned upright as the file says."""
    pixels = decoded.to_ndarray(format="rgb24")  # (H,W,3)
    turns = round(decoded.rotation / 90) % 4  # counterclockwise
    upright = np.ascontiguousarray(np.rot90(pixels, turns))
    return torch.from_numpy(upright).permute(2, 0, 1)[None].float() / 255


def _fingerprint(files: Iterable[Path]) -> str:
    parts = ((file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files)
    return hashlib.sha256(repr([*parts]).encode()).hexdigest()


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
