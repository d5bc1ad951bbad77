"""One image: read, encoded and upsampled; its picture and, when asked for, its features are written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import core
from core.backbones import Backbone
from core.uncertainty import Uncertainty, of_attention
from experiments.atomic import allocate_array, replacing
from experiments.data.image_files import ImageFile, UnreadableImage, read, shrink
from experiments.reports.pictures import Colours, fit_colours, panel
from experiments.reports.style import heat
from experiments.settings import output_grid
from experiments.upsampling.video import Video

FEATURE_FILES = ("none", "npy", "safetensors")
"""Kinds of files that the features are written to."""


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


def upsample_image(file: ImageFile, video: Video, backbone: Backbone, config: DictConfig) -> Done:
    """Reads one image and writes its picture and, when asked for, its features.

    Raises:
        UnreadableImage: damaged; or as `upsample_one`. CannotWrite: as `upsample_one`.
    """
    return upsample_one(read(file.path), file.name, str(file.path), video, backbone, config)


def upsample_one(
    image: Tensor,
    name: str,
    source: str,
    video: Video,
    backbone: Backbone,
    config: DictConfig,
    colours: Colours | None = None,
) -> Done:
    """Writes the picture of one image and, when asked for, its features.

    Args:
        image: (1,3,H,W) RGB in [0,1].
        name: of its files in `config.out_dir`. source: says in errors which image it is.
        colours: of its features; None: fitted to them.

    Raises:
        UnreadableImage: of a size that the backbone refuses, or with features that are not finite.
        CannotWrite: the picture or the features cannot be written.
    """
    device, dtype = place_of(video.model)
    rgb = shrink(image, config.max_size).to(device)  # (1,3,H,W)
    features, backbone_ms = _timed(lambda: encode(rgb, backbone, source).to(dtype), device)  # (1,C,h,w)
    if not features.isfinite().all():
        raise UnreadableImage(f"{source}: features of backbone {backbone.name} in {config.dtype} are not finite")
    image = core.imagenet_normalize(rgb).to(dtype)
    size = output_grid(config.output_size, tuple(rgb.shape[-2:]))
    target = Path(config.out_dir, name)
    output, upsampler_ms = _write_features(config.features, target, video, image, features, size)  # (1,C,Qh,Qw)
    picture = target.with_name(f"{target.name}.png")
    columns = comparison_columns(rgb, features, output, config.checkpoint is not None, colours)
    if config.uncertainty:
        columns |= _write_uncertainty(target, of_attention(video.model, image, features, size))
    with replacing(picture) as part:
        panel(columns).save(part, "png")
    return Done(name, picture, tuple(features.shape[-2:]), size, backbone_ms, upsampler_ms)


def place_of(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's weights."""
    weight = next(model.parameters())
    return weight.device, weight.dtype


def encode(rgb: Tensor, backbone: Backbone, source: str) -> Tensor:
    """(1,3,H,W) RGB in [0,1] -> (1,C,h,w).

    Raises:
        UnreadableImage: of a size that the backbone refuses.
    """
    needed = max(2 * backbone.patch_size, backbone.min_size)
    if min(rgb.shape[-2:]) < needed:
        raise UnreadableImage(
            f"{source}: {rgb.shape[-2]} x {rgb.shape[-1]} pixels are too few, "
            f"backbone {backbone.name} needs {needed} on each side"
        )
    try:
        return backbone(rgb)
    except ValueError as error:  # a size that the encoder refuses
        raise UnreadableImage(f"{source}: backbone {backbone.name} refuses it: {error}") from error


def comparison(rgb: Tensor, features: Tensor, output: Tensor, trained: bool = True) -> Image.Image:
    """(1,3,H,W) RGB in [0,1], (1,C,h,w), (1,C,Qh,Qw) -> image | low-res | bilinear | AnyUp in common colours."""
    return panel(comparison_columns(rgb, features, output, trained))


def comparison_columns(
    rgb: Tensor, features: Tensor, output: Tensor, trained: bool = True, colours: Colours | None = None
) -> dict[str, Tensor | np.ndarray]:
    """The columns of `comparison`: title -> picture. Colours are fitted to the features unless they are given."""
    size = tuple(output.shape[-2:])
    # The bilinear column needs no sample of its own: its vectors are means of those of the low-res one.
    colours = colours or fit_colours([features, output])
    rows, columns = features.shape[-2:]
    return {
        "image": rgb,
        f"low-res, {rows} x {columns}": colours.paint(features),
        f"bilinear, {size[0]} x {size[1]}": colours.paint(features, size),
        f"AnyUp{'' if trained else ' (untrained)'}, {size[0]} x {size[1]}": colours.paint(output),
    }


def _write_uncertainty(target: Path, found: Uncertainty) -> dict[str, np.ndarray]:
    """Writes the (Qh,Qw) measures to `target`.uncertainty.safetensors -> the columns that show them."""
    measures = {name: getattr(found, name)[0, 0].contiguous() for name in ("rarity", "variance", "entropy")}
    with replacing(target.with_name(f"{target.name}.uncertainty.safetensors")) as part:
        save_file(measures, part)
    return {f"uncertainty: {name}": heat(measures[name].cpu().numpy()) for name in ("rarity", "variance")}


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
