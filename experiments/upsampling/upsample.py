"""All images of a configuration, or all frames of a video: what was made of them, and what was skipped."""

import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from core.backbones import Backbone, backbone_from_config
from experiments.atomic import CannotWrite
from experiments.data.image_files import ImageFile, UnreadableImage, collect
from experiments.data.video_files import open_video
from experiments.measuring.checkpoints import load_model
from experiments.progress import Progress
from experiments.settings import (
    DTYPES,
    SettingError,
    check_choice,
    check_count,
    check_writable,
    output_grid,
    pick_device,
)
from experiments.tracking.store import Run, track
from experiments.upsampling.frames import upsample_frames
from experiments.upsampling.image import FEATURE_FILES, Done, upsample_image
from experiments.upsampling.video import Video

log = logging.getLogger(__name__)


@dataclass
class Summary:
    """What a run made, and what it left out."""

    out_dir: Path
    run_id: str = ""
    done: list[Done] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Image -> reason."""

    @property
    def exit_code(self) -> int:
        """0 all done, 1 some skipped, 2 nothing done."""
        return (1 if self.done else 2) if self.skipped else 0


def upsample(config: DictConfig) -> Summary:
    """Upsamples the features of all `config.images`, or of `config.video`; settings: configs/upsample.yaml.

    Raises:
        NoImages, UnreadableVideo, SettingError, TrackingUnavailable: found before anything is computed.
        CannotWrite: the disk is full, say; the images before are complete, and the message counts them.
    """
    check_settings(config)
    source = None if config.video is None else open_video(config.video)
    files = collect(config.images) if source is None else []
    device = pick_device(config.device)
    try:
        model, config = load_model(config)
        backbone = backbone_from_config(config.backbone).to(device)
    except (ValueError, OSError) as error:  # what the core refuses: a weight file, a value
        raise SettingError(str(error)) from error
    model = model.to(device, DTYPES[config.dtype]).eval()
    summary = Summary(Path(config.out_dir))
    with track(config, device) as run, torch.inference_mode(), logging_redirect_tqdm():
        summary.run_id = run.run_id
        video = Video(model)
        if source is None:
            made = _images(files, video, backbone, config, summary)
        else:
            made = upsample_frames(source, video, backbone, config, run, summary.skipped)
        for step, done in enumerate(made):
            summary.done.append(done)
            run.metrics({"backbone_ms": done.backbone_ms, "upsampler_ms": done.upsampler_ms}, step)
            if source is None:
                run.file(done.picture, f"pictures/{done.name}.png")
        _log_summary(run, summary)
    return summary


def _images(
    files: list[ImageFile], video: Video, backbone: Backbone, config: DictConfig, summary: Summary
) -> Iterator[Done]:
    """What was made of each image; those that cannot be read are skipped."""
    for file in Progress(files, "upsample", "image"):
        try:
            yield upsample_image(file, video, backbone, config)
        except UnreadableImage as error:
            log.warning("skipped %s", error)
            summary.skipped[str(file.path)] = str(error)
        except CannotWrite as error:
            raise CannotWrite(f"{error}. {len(summary.done)} images before it are complete") from error


def check_settings(config: DictConfig) -> None:
    """Refuses what could only fail later.

    Raises:
        SettingError: names the setting and what it may be.
    """
    if config.max_size is not None and (not isinstance(config.max_size, int) or config.max_size < 1):
        raise SettingError(f"max_size must be a positive number of pixels or null, got {config.max_size}")
    output_grid(config.output_size, (1, 1))
    check_choice("features", config.features, FEATURE_FILES)
    if type(config.uncertainty) is not bool:
        raise SettingError(f"uncertainty must be true or false, got {config.uncertainty}")
    if config.video is not None and config.images != "bundled":
        raise SettingError(f"images={config.images} and video={config.video} are both given: leave out one")
    if config.fps is not None and not (isinstance(config.fps, int | float) and 0 < config.fps <= 1000):
        raise SettingError(f"fps must be null or a number of frames per second up to 1000, got {config.fps}")
    check_count("save_every", config.save_every)
    check_choice("dtype", config.dtype, tuple(DTYPES))
    if config.features == "npy" and config.dtype == "bfloat16":
        raise SettingError("a .npy file cannot hold bfloat16: choose features=safetensors, or another dtype")
    check_writable(Path(config.out_dir))


def _log_summary(run: Run, summary: Summary) -> None:
    run.metrics({"images_done": len(summary.done), "images_skipped": len(summary.skipped)})
    if summary.done:
        run.metrics(
            {
                f"median_{key}": statistics.median(getattr(done, key) for done in summary.done)
                for key in ("backbone_ms", "upsampler_ms")
            }
        )
    if summary.skipped:
        run.text("\n".join(summary.skipped.values()), "skipped.txt")
