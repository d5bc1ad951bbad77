"""A whole video: its frames, upsampled in order, and a video of their pictures.

Frames are read, upsampled and written one by one, so that memory does not grow with their number. A video that was
stopped goes on where it was: with the same settings, all frames come out as if it had not been stopped.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from core.backbones import Backbone
from experiments.atomic import CannotWrite
from experiments.data.image_files import UnreadableImage, shrink
from experiments.data.video_files import UnreadableVideo, VideoSource, write_video
from experiments.progress import Progress
from experiments.reports.pictures import Colours, fit_colours
from experiments.tracking.run import Run
from experiments.upsampling.bookmark import Bookmark, made_with
from experiments.upsampling.image import Done, encode, place_of, upsample_one
from experiments.upsampling.video import Video

log = logging.getLogger(__name__)

COLOUR_FRAMES = 8
"""Frames, spread over the video, that the colours are fitted to."""
RATE = 25.0
"""Frames per second of a video whose own rate is unknown."""
_MADE = re.compile(r"\d{6}\.(png|npy|safetensors|uncertainty\.safetensors)")


def upsample_frames(
    source: VideoSource, video: Video, backbone: Backbone, config: DictConfig, run: Run, skipped: dict[str, str]
) -> Iterator[Done]:
    """Upsamples all frames that are not done yet, and yields what was made of each; then writes `NAME.mp4`.

    Args:
        skipped: gets the reason for each frame that is left out, and for frames that are missing.

    Raises:
        CannotWrite: the disk is full, say; the frames before are complete.
    """
    folder = Path(config.out_dir, source.name)
    bookmark = Bookmark(folder / "bookmark.safetensors", made_with(config, video.model, backbone, source.fingerprint))
    start = bookmark.read(video) if _resumable(video) else 0
    if start:
        log.info("%s goes on with frame %d", source.name, start)
    else:
        _clear(folder)
    colours, missed, index = _colours(source, backbone, config, video), 0.0, start - 1
    for frame in Progress(source.frames(start), source.name, "frame", source.count, start):
        index, video.gap = frame.index, frame.gap + missed
        name = f"{source.name}/{index:06d}"
        try:
            done = upsample_one(frame.image, name, f"frame {index} of {source.name}", video, backbone, config, colours)
        except UnreadableImage as error:
            log.warning("skipped %s", error)
            skipped[name] = str(error)
            missed += frame.gap
            continue
        except CannotWrite as error:
            raise CannotWrite(f"{error}. {index} frames before it are complete: run the same command again") from error
        missed = 0.0
        yield done
        if (index + 1) % config.save_every == 0 and _resumable(video):
            bookmark.write(index + 1, video)
    if _resumable(video):
        bookmark.write(index + 1, video)
    for number, remark in enumerate(source.remarks):
        log.warning("%s", remark)
        skipped[f"{source.name}, remark {number + 1}"] = remark
    pictures = sorted(one for one in folder.glob("*.png") if _MADE.fullmatch(one.name))
    if pictures:
        film = folder.with_name(f"{folder.name}.mp4")
        write_video(film, map(_opened, pictures), config.fps or source.rate or RATE)
        run.file(film, f"videos/{film.name}")


def _resumable(video: Video) -> bool:
    """Whether what is carried from frame to frame can be saved."""
    return not video.carries or video.model.temporal.state_type is not None


def _clear(folder: Path) -> None:
    """Removes frames of an earlier run, which would get into the new video."""
    for one in folder.glob("*") if folder.is_dir() else ():
        if _MADE.fullmatch(one.name):
            one.unlink()


def _colours(source: VideoSource, backbone: Backbone, config: DictConfig, video: Video) -> Colours:
    """One PCA for the whole video, so that a colour means the same in all frames: of low-resolution features."""
    count = source.count or 1
    wanted = {int(i) for i in np.linspace(0, count - 1, min(COLOUR_FRAMES, count)).round()}
    device, _ = place_of(video.model)
    columns, refused = [], "their features are not finite"
    for frame in source.frames():
        if frame.index in wanted or not columns:
            rgb = shrink(frame.image, config.max_size).to(device)
            try:
                features = encode(rgb, backbone, f"frame {frame.index} of {source.name}")
            except UnreadableImage as error:
                refused = str(error)
                continue
            if features.isfinite().all():
                columns.append(features)
        if frame.index >= max(wanted) and columns:
            break
    if not columns:
        raise UnreadableVideo(f"backbone {backbone.name} refuses all frames of {source.name}: {refused}")
    return fit_colours(columns)


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
