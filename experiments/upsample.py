"""Images -> backbone -> upsampled features and one picture per image: `python -m experiments.upsample`.

Settings: configs/upsample.yaml. Exit code: 0 all images done, 1 some were skipped, 2 nothing was done or the run
had to stop; a file that exists under its final name is complete.
"""

import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

import core
from core.backbones import Backbone, backbone_from_config
from core.passthrough import NoTemporal
from experiments.atomic import CannotWrite, allocate_array, replacing
from experiments.command import command
from experiments.data.image_files import ImageFile, UnreadableImage, collect, read, shrink
from experiments.measuring.checkpoints import load_model
from experiments.progress import Progress
from experiments.reports.markdown import Table
from experiments.reports.pictures import fit_colours, panel
from experiments.settings import DTYPES, SettingError, check_choice, check_writable, output_grid, pick_device
from experiments.tracking.store import Run, store_uri, track

log = logging.getLogger(__name__)

FEATURE_FILES = ("none", "npy", "safetensors")


@dataclass
class Done:
    """What was made of one image."""

    name: str
    picture: Path
    grid: tuple[int, int]
    """(h,w) of the backbone's features."""
    output_size: tuple[int, int]
    backbone_ms: float
    upsampler_ms: float


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
    """Upsamples the features of all `config.images`; see configs/upsample.yaml for the settings.

    Raises:
        NoImages, SettingError, TrackingUnavailable: found before anything is computed.
        CannotWrite: the disk is full, say; the images before are complete, and the message counts them.
    """
    files = collect(config.images)
    check_settings(config)
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
        for step, file in enumerate(Progress(files, "upsample", "image")):
            try:
                done = upsample_image(file, video, backbone, config)
            except UnreadableImage as error:
                log.warning("skipped %s", error)
                summary.skipped[str(file.path)] = str(error)
                continue
            except CannotWrite as error:
                raise CannotWrite(f"{error}. {len(summary.done)} images before it are complete") from error
            summary.done.append(done)
            run.metrics({"backbone_ms": done.backbone_ms, "upsampler_ms": done.upsampler_ms}, step)
            run.file(done.picture, f"pictures/{done.name}.png")
        _log_summary(run, summary)
    return summary


class Video:
    """A model that is called image by image. With a temporal filler the images are frames of one video, in order.

    A frame of another size than the one before begins a new video.
    """

    def __init__(self, model: core.AnyUp):
        self.model, self.carries = model, not isinstance(model.temporal, NoTemporal)
        self.state: object | None = None
        self.size: tuple[int, ...] | None = None

    def __call__(self, image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(1,3,H,W), (1,C,h,w) -> (1,C,Qh,Qw)."""
        if not self.carries:
            return self.model(image, features, size)
        shape = (*image.shape, *features.shape, *size)
        if self.size not in (None, shape):
            log.info("the frames have another size from here on: a new video begins")
            self.state = None
        output, self.state = self.model(image, features, size, state=self.state, return_state=True)
        self.size = shape
        return output


def upsample_image(file: ImageFile, video: Video, backbone: Backbone, config: DictConfig) -> Done:
    """Reads one image and writes its picture and, when asked for, its features.

    Raises:
        UnreadableImage: damaged, of a size that the backbone refuses, or with features that are not finite.
        CannotWrite: the picture or the features cannot be written.
    """
    device, dtype = (getattr(next(video.model.parameters()), name) for name in ("device", "dtype"))
    rgb = shrink(read(file.path), config.max_size).to(device)  # (1,3,H,W)
    needed = max(2 * backbone.patch_size, backbone.min_size)
    if min(rgb.shape[-2:]) < needed:
        raise UnreadableImage(
            f"{file.path}: {rgb.shape[-2]} x {rgb.shape[-1]} pixels are too few, "
            f"backbone {backbone.name} needs {needed} on each side"
        )
    try:
        features, backbone_ms = _timed(lambda: backbone(rgb).to(dtype), device)  # (1,C,h,w)
    except ValueError as error:  # a size that the encoder refuses
        raise UnreadableImage(f"{file.path}: backbone {backbone.name} refuses it: {error}") from error
    if not features.isfinite().all():
        raise UnreadableImage(f"{file.path}: features of backbone {backbone.name} in {config.dtype} are not finite")
    image = core.imagenet_normalize(rgb).to(dtype)
    size = output_grid(config.output_size, tuple(rgb.shape[-2:]))
    target = Path(config.out_dir, file.name)
    output, upsampler_ms = _write_features(config.features, target, video, image, features, size)  # (1,C,Qh,Qw)
    picture = target.with_name(f"{target.name}.png")
    with replacing(picture) as part:
        comparison(rgb, features, output, trained=config.checkpoint is not None).save(part, "png")
    return Done(file.name, picture, tuple(features.shape[-2:]), size, backbone_ms, upsampler_ms)


def comparison(rgb: Tensor, features: Tensor, output: Tensor, trained: bool = True) -> Image.Image:
    """(1,3,H,W) RGB in [0,1], (1,C,h,w), (1,C,Qh,Qw) -> image | low-res | bilinear | AnyUp in common colours."""
    size = tuple(output.shape[-2:])
    # The bilinear column needs no sample of its own: its vectors are means of those of the low-res one.
    colours = fit_colours([features, output])
    rows, columns = features.shape[-2:]
    return panel(
        {
            "image": rgb,
            f"low-res, {rows} x {columns}": colours.paint(features),
            f"bilinear, {size[0]} x {size[1]}": colours.paint(features, size),
            f"AnyUp{'' if trained else ' (untrained)'}, {size[0]} x {size[1]}": colours.paint(output),
        }
    )


def check_settings(config: DictConfig) -> None:
    """Refuses what could only fail later.

    Raises:
        SettingError: names the setting and what it may be.
    """
    if config.max_size is not None and (not isinstance(config.max_size, int) or config.max_size < 1):
        raise SettingError(f"max_size must be a positive number of pixels or null, got {config.max_size}")
    output_grid(config.output_size, (1, 1))
    check_choice("features", config.features, FEATURE_FILES)
    check_choice("dtype", config.dtype, tuple(DTYPES))
    if config.features == "npy" and config.dtype == "bfloat16":
        raise SettingError("a .npy file cannot hold bfloat16: choose features=safetensors, or another dtype")
    check_writable(Path(config.out_dir))


def _write_features(
    kind: str, target: Path, video: Video, image: Tensor, features: Tensor, size: tuple[int, int]
) -> tuple[Tensor, float]:
    """Upsamples, and writes (C,Qh,Qw) to `target`.npy or .safetensors -> the output (1,C,Qh,Qw), milliseconds."""
    if kind == "npy":
        with replacing(target.with_name(f"{target.name}.npy")) as part:
            shape = (features.shape[1], *size)
            array = allocate_array(part, shape, torch.empty(0, dtype=features.dtype).numpy().dtype)
            out = torch.from_numpy(array)[None]  # (1,C,Qh,Qw)
            if video.carries or video.model.refiner.needs_whole_output:
                _, ms = _timed(lambda: out.copy_(video(image, features, size)), features.device)
            else:  # band by band: the output may be larger than memory
                _, ms = _timed(lambda: video.model(image, features, size, out=out), features.device)
            array.flush()
        return out, ms
    output, ms = _timed(lambda: video(image, features, size), features.device)  # (1,C,Qh,Qw)
    if kind == "safetensors":
        with replacing(target.with_name(f"{target.name}.safetensors")) as part:
            save_file({"features": output[0].contiguous(), "low_res": features[0].contiguous()}, part)
    return output, ms


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result and the milliseconds it took, a GPU's queue included."""
    started = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, 1000 * (time.perf_counter() - started)


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


def _report(summary: Summary, console: Console) -> None:
    """Says what was made, what was left out, and what to try next."""
    rows = []
    for done in summary.done:
        sizes = ["×".join(map(str, size)) for size in (done.grid, done.output_size)]
        rows.append([done.name, *sizes, f"{done.backbone_ms:.0f} ms", f"{done.upsampler_ms:.0f} ms"])
    columns = ["image", "features", "output", "backbone", "AnyUp"]
    console.print(Table(columns, rows, f"{len(rows)} images upsampled").rich())
    for reason in summary.skipped.values():
        console.print(f"skipped: {reason}", style="red", markup=False, soft_wrap=True)
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else "python"
    command = f"{python} -m experiments.upsample"
    lines = [
        f"Pictures (image | low-res | bilinear | AnyUp): {summary.out_dir}/",
        f"Run: {summary.run_id or 'not tracked'}",
        "",
        "Try next:",
        f"  {command} images=PATH/TO/YOUR/PHOTOS",
        f"  {command} attention.window_ratio=0.03 out_dir=outputs/narrow      # change one hook point",
        f"  {command} images=coffee backbone=dinov2_vits14 out_dir=outputs/dinov2      # downloads weights",
        f"  {python} -m mlflow ui --backend-store-uri {store_uri()}      # compare the runs",
        "  notebooks/01_first_look.ipynb      # the same by hand, and an idea of your own in one cell",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `upsample`."""
    summary = upsample(config)
    _report(summary, Console())
    return summary.exit_code


if __name__ == "__main__":
    main()
