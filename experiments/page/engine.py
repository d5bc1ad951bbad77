"""From an image, an encoder and models to pictures: pure functions, which know nothing of the page.

Pictures are (h,w,3) float RGB in [0,1]. A point is (row, column) in the unit square of the image. All maps of one
number per pixel have one colour map, whose brightness rises evenly; so they can be read without seeing colours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import core
from core.backbones import Backbone
from core.uncertainty import Uncertainty
from experiments.data.image_files import shrink
from experiments.reports.overlays import similarity
from experiments.reports.pictures import fit_colours
from experiments.reports.style import heat
from experiments.settings import SettingError, output_grid
from experiments.upsampling.image import encode

MEASURES = ("rarity", "variance", "entropy")
MAX_VALUES = 2**27
"""Numbers in one upsampled output, 512 MB: larger outputs are refused."""

_DARKENED = 0.6  # so that bright cells are seen on a bright image too

Pictures = dict[str, np.ndarray]
Point = tuple[float, float]


@dataclass(frozen=True)
class Encoded:
    """An image and its features."""

    rgb: Tensor
    """(1,3,H,W) in [0,1]."""
    features: Tensor
    """(1,C,h,w)."""

    @property
    def image(self) -> Tensor:
        """(1,3,H,W), as AnyUp takes it."""
        return core.imagenet_normalize(self.rgb)


@dataclass(frozen=True)
class Upsampled:
    """What one model made of an image."""

    model: core.AnyUp
    encoded: Encoded
    output: Tensor
    """(1,C,Qh,Qw)."""
    uncertainty: Uncertainty | None
    """None: attention has none; `remark` says why."""
    remark: str = ""


@torch.inference_mode()
def encoded(image: Tensor, backbone: Backbone, side: int, name: str = "the image") -> Encoded:
    """(1,3,H,W) RGB in [0,1] -> the image, shrunk to a longer side of `side` pixels, and its features.

    Raises:
        UnreadableImage: of a size that the backbone refuses; the message calls it `name`.
    """
    rgb = shrink(image, side)
    return Encoded(rgb, encode(rgb, backbone, name).float())


@torch.inference_mode()
def upsampled(of: Encoded, model: core.AnyUp, side: int | None) -> Upsampled:
    """Upsamples to an output with this longer side; None: that of the image.

    Raises:
        SettingError: the size is not positive, or the output would not fit into memory. ValueError, RuntimeError: the
            model refuses the features.
    """
    size = checked_size(of, side)
    try:
        output, uncertainty = model.with_uncertainty(of.image, of.features, size)
    except ValueError as error:  # weights that are negative, or do not sum to 1
        return Upsampled(model, of, model(of.image, of.features, size), None, str(error))
    return Upsampled(model, of, output, uncertainty)


def checked_size(of: Encoded, side: int | None) -> tuple[int, int]:
    """(Qh,Qw) of an output. Raises SettingError as `upsampled`, and names the largest side that is taken."""
    size = output_grid(side, tuple(of.rgb.shape[-2:]), "the output size")
    channels = of.features.shape[1]
    if size[0] * size[1] * channels > MAX_VALUES:
        most = int((MAX_VALUES / channels / size[0] / size[1]) ** 0.5 * max(size))
        raise SettingError(
            f"an output of {size[0]} x {size[1]} with {channels} channels is too large for this page: choose an "
            f"output size of at most {most}, or use `model.stream` from Python"
        )
    return size


def feature_pictures(of: Encoded, outputs: Mapping[str, Upsampled]) -> Pictures:
    """Image, low-resolution features, bilinear ones, and each output by its name, in common colours."""
    colours = fit_colours([of.features, *(one.output for one in outputs.values())])
    size = tuple(next(iter(outputs.values())).output.shape[-2:])
    return {
        "image": _pixels(of.rgb),
        "low-res features": colours.paint(of.features),
        "bilinear": colours.paint(of.features, size),
        **{name: colours.paint(one.output) for name, one in outputs.items()},
    }


def similarity_pictures(
    of: Encoded, outputs: Mapping[str, Upsampled], point: Point
) -> tuple[Pictures, tuple[float, float]]:
    """Cosine similarity to the features at a point, before and after upsampling -> pictures, and their common range.

    The mean of the low-resolution features, which all pixels share, is taken off all.
    """
    mean = of.features.mean((2, 3), keepdim=True)
    before = {f"before: {of.features.shape[2]} x {of.features.shape[3]}": of.features}
    maps = {
        name: similarity(features, point, mean).cpu().numpy()
        for name, features in (before | {name: one.output for name, one in outputs.items()}).items()
    }
    low = min(float(np.percentile(values, 1)) for values in maps.values())
    return {name: heat(values, limits=(low, 1.0)) for name, values in maps.items()}, (low, 1.0)


def attention_maps(outputs: Mapping[str, Upsampled], point: Point) -> dict[str, np.ndarray]:
    """The weight of every cell at a point, (h,w), of each model whose attention weighs all channels alike."""
    maps = {}
    for name, one in outputs.items():
        if one.model.attention.linear_in_values:
            of, size = one.encoded, tuple(one.output.shape[-2:])
            weights = one.model.attention_weights(of.image, of.features, torch.tensor([point]), size)  # (1,1,h,w)
            maps[name] = weights[0, 0].cpu().numpy()
    return maps


def attention_pictures(of: Encoded, maps: Mapping[str, np.ndarray], opacity: float = 0.7) -> Pictures:
    """`attention_maps` over the image: bright cells have weight, and the frame is the window.

    Each has its own range, from 0 to its largest weight, which its title says.
    """
    return {f"{name} (up to {one.max():.2f})": _framed(of.rgb, one, opacity) for name, one in maps.items()}


def uncertainty_pictures(
    outputs: Mapping[str, Upsampled], measure: str, opacity: float = 0.7
) -> tuple[Pictures, tuple[float, float] | None]:
    """One of `MEASURES` over the image -> pictures of the models that have it, and their common range, if any."""
    maps = {
        name: getattr(one.uncertainty, measure)[0, 0].cpu().numpy()
        for name, one in outputs.items()
        if one.uncertainty is not None
    }
    if not maps:
        return {}, None
    values = np.concatenate([one.ravel() for one in maps.values()])
    limits = tuple(float(bound) for bound in np.percentile(values, (1, 99)))
    overlays = {
        name: _overlay(outputs[name].encoded.rgb, heat(one, limits=limits), opacity) for name, one in maps.items()
    }
    return overlays, limits


def to_image(picture: np.ndarray) -> Image.Image:
    """(h,w,3) in [0,1] -> an image."""
    return Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))


def _framed(rgb: Tensor, weights: np.ndarray, opacity: float) -> np.ndarray:
    """(h,w) weights over the darkened image, with a frame around those above 0."""
    share = weights / weights.max()
    picture = _overlay(rgb * _DARKENED, heat(share, limits=(0.0, 1.0)), opacity * np.sqrt(share))
    rows, columns = (np.flatnonzero((weights > 0).any(axis)) for axis in (1, 0))
    down, across = np.divide(picture.shape[:2], weights.shape)  # pixels in a cell
    sheet = to_image(picture)
    box = (columns[0] * across, rows[0] * down, (columns[-1] + 1) * across - 1, (rows[-1] + 1) * down - 1)
    ImageDraw.Draw(sheet).rectangle(box, outline="white", width=max(2, sheet.width // 150))
    return np.asarray(sheet, dtype=np.float32) / 255


def _overlay(rgb: Tensor, map_: np.ndarray, opacity: float | np.ndarray) -> np.ndarray:
    """A map (h,w,3) over the image in grey, with one opacity, or one for each cell, (h,w)."""
    image = _pixels(rgb)
    grey = image.mean(2, keepdims=True)  # (H,W,1)
    if isinstance(opacity, np.ndarray):
        opacity = _enlarged(np.repeat(opacity[..., None], 3, 2), image.shape[1::-1])
    return (1 - opacity) * grey + opacity * _enlarged(map_, image.shape[1::-1])


def _enlarged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h,w,3) -> the same with this width and height, without smoothing."""
    return np.asarray(to_image(picture).resize(size, Image.Resampling.NEAREST), dtype=np.float32) / 255


def _pixels(rgb: Tensor) -> np.ndarray:
    return rgb[0].permute(1, 2, 0).cpu().float().numpy()  # (H,W,3)
