"""The bench that tasks measure on: images cut to one size, their features encoded once, and how models are called.

Everything is kept in half precision (images, features), so that it makes no difference whether it was computed just
now, was still in memory, or came from the cache on disk.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.backbones import Backbone, imagenet_normalize
from experiments.data import DataSet, Sample
from experiments.data.feature_cache import FeatureCache, NotFinite
from experiments.data.image_files import resized
from experiments.errors import Told
from experiments.peers.interpolation import Bilinear
from experiments.settings import SettingError

_T = TypeVar("_T")


class EvaluationError(Told, ValueError):
    """What cannot be measured: features or a measure that are not finite, nothing to learn from; names the image."""


@dataclass(frozen=True)
class Ceiling:
    """In the place of a model: what no upsampler can be expected to pass, as the encoder at a higher resolution."""

    name: str


Size = tuple[int, int]
"""(rows, columns)."""


@dataclass(frozen=True)
class Sizes:
    """(rows, columns) of what is seen by whom; see configs/evaluate.yaml."""

    image: Size
    """Of labels and predictions."""
    encoder: Size
    guidance: Size
    output: Size
    """Grid of the upsampled features."""


@dataclass(frozen=True)
class EncodedImage:
    """One image, cut and encoded."""

    name: str
    rgb: Tensor
    """(1,3,H,W) float16 RGB in [0,1]."""
    features: tuple[Tensor, ...]
    """(1,C,h,w) float16 of each layer; of a ceiling: at its higher resolution. Empty where a task asks for none."""
    labels: Tensor | None = None
    """(1,1,H,W) uint8."""
    depth: Tensor | None = None
    """(1,1,H,W) float32."""
    normals: Tensor | None = None
    """(1,3,H,W) float16."""
    flow: Tensor | None = None
    """(1,2,H,W) float32, in pixels of this size."""


class Encoder:
    """A backbone, or some of its layers, with a cache: RGB -> features, rounded to half precision.

    Raises:
        SettingError: a layer that the backbone lacks.
    """

    def __init__(self, backbone: Backbone, cache: FeatureCache, layers: Sequence[int] | None = None):
        self.backbone, self.cache, self.name = backbone, cache, backbone.name
        self.views = [backbone] if layers is None else [at_layer(backbone, layer) for layer in layers]

    def __call__(self, rgb: Tensor, name: str = "an image") -> Tensor:
        """(B,3,H,W) RGB in [0,1] -> (B,C,h,w) float32 of the default layer, or of the first one asked for."""
        return self._encode(self.views[0], rgb, name).float()

    @property
    def least(self) -> int:
        """Pixels of the smallest images that can be upsampled: with two rows and two columns of features."""
        return max(max(2 * view.patch_size, view.min_size) for view in self.views)

    def layers(self, rgb: Tensor, name: str) -> tuple[Tensor, ...]:
        """(1,3,H,W) RGB in [0,1] -> float16 features of every layer asked for.

        Raises:
            SettingError: the backbone refuses the size. EvaluationError: values that are not finite; names the image.
        """
        return tuple(self._encode(view, rgb, name) for view in self.views)

    def _encode(self, backbone: Backbone, rgb: Tensor, name: str) -> Tensor:
        with self.refusals_told(name):
            return self.cache.encode(backbone, rgb, [name] * len(rgb)).half()

    @contextmanager
    def refusals_told(self, name: str) -> Iterator[None]:
        """What the backbone refuses, or gives that is not finite, becomes an error that names the image."""
        try:
            yield
        except NotFinite as error:
            raise EvaluationError(str(error)) from error
        except Told:  # of the image itself
            raise
        except ValueError as error:  # sizes, mostly
            raise SettingError(f"backbone={self.name} cannot encode {name}: {error}") from error


class Memory:
    """Keeps what was computed as long as there is room, and computes the rest again."""

    def __init__(self, max_gb: float):
        self.left, self._kept = int(max_gb * 1e9), {}

    def get(self, key: tuple[object, ...], compute: Callable[[], _T], size: Callable[[_T], int]) -> _T:
        """What is kept under `key`, or `compute()`, which is kept if its `size` in bytes fits."""
        if key in self._kept:
            return self._kept[key]
        value = compute()
        if (needed := size(value)) <= self.left:
            self.left -= needed
            self._kept[key] = value
        return value


class EncodedImages:
    """The images of a data set, or some of them, on the device. Each is encoded when it is asked for."""

    def __init__(self, data: DataSet, limit: int | None, encoder: Encoder, sizes: Sizes, memory: Memory, device: str):
        count = len(data) if limit is None else min(limit, len(data))
        # Spread over all of them: neighbours are often alike.
        self.indices = [int(i) for i in np.linspace(0, len(data) - 1, count).round()] if count < len(data) else [
            *range(len(data))
        ]  # fmt: skip
        self.data, self.encoder, self.sizes, self.memory, self.device = data, encoder, sizes, memory, device
        self.names = [data.names[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def shorter_sides(self) -> list[int]:
        """In pixels, of all images; none where the data set does not know them without reading."""
        sides = self.data.shorter_sides
        return [] if sides is None else [sides[i] for i in self.indices]

    def sample(self, i: int) -> Sample:
        """Image i as the data set gives it."""
        return self.data[self.indices[i]]

    def cut(self, i: int) -> EncodedImage:
        """Image i without features."""
        return self.memory.get((self, "cut", i), lambda: cut(self.sample(i), self.sizes.image), _size)

    def get(self, i: int, flipped: bool = False, scale: int = 1) -> EncodedImage:
        """Image i with its features, on the device.

        Args:
            flipped: mirror it, left to right, before it is encoded.
            scale: of the encoder's input; more than 1 for the ceiling.
        """
        case = self.cut(i)
        case = flip(case) if flipped else case
        size = tuple(scale * side for side in self.sizes.encoder)
        features = self.memory.get(
            (self, "features", i, flipped, scale),
            lambda: self.encoder.layers(resized(case.rgb.float().to(self.device), size), case.name),
            lambda tensors: sum(t.nbytes for t in tensors),
        )
        moved = {key: v.to(self.device) for key, v in vars(case).items() if isinstance(v, Tensor)}
        return replace(case, features=features, **moved)


@dataclass(frozen=True)
class Bench:
    """What tasks measure on."""

    train: EncodedImages | None
    """None for tasks that train nothing."""
    val: EncodedImages
    encoder: Encoder
    sizes: Sizes
    memory: Memory
    ceiling_scale: int
    device: torch.device

    def arm(self, model: nn.Module | Ceiling) -> tuple[nn.Module, int]:
        """(what upsamples, scale of the encoder's input): the ceiling `encoder` is bilinear on finer features."""
        return (Bilinear(), self.ceiling_scale) if isinstance(model, Ceiling) else (model, 1)

    def guidance(self, case: EncodedImage) -> Tensor:
        """(1,3,G,G) ImageNet-normalised: what an upsampler sees of an image."""
        return imagenet_normalize(resized(case.rgb.float(), self.sizes.guidance))

    def upsample(self, model: nn.Module, cases: Sequence[EncodedImage]) -> list[Tensor]:
        """Features of every layer, each (B,C,Qh,Qw) float32. Without gradients, but ready to train a probe on.

        Raises:
            EvaluationError: another shape, or values that are not finite; names the images.
        """
        guidance = torch.cat([self.guidance(case) for case in cases])  # (B,3,G,G)
        outputs = []
        for layers in zip(*(case.features for case in cases), strict=True):
            features = torch.cat(layers).float()  # (B,C,h,w)
            with torch.no_grad():  # not inference mode: a peer may take gradients of its own
                output = model(guidance, features, self.sizes.output)
            outputs.append(checked(output.detach(), features, self.sizes.output, cases))
        return outputs


def checked(output: Tensor, features: Tensor, size: Size, cases: Sequence[EncodedImage]) -> Tensor:
    """Passes on (B,C,*size) finite features. Raises EvaluationError: they are not; names the images."""
    names = ", ".join(case.name for case in cases)
    if tuple(output.shape) != (*features.shape[:2], *size):
        raise EvaluationError(f"image {names}: upsampled features are {tuple(output.shape)}, asked for were {size}")
    if not torch.isfinite(output).all():
        count = (~torch.isfinite(output)).sum().item()
        raise EvaluationError(f"image {names}: {count} of {output.numel()} upsampled values are not finite")
    return output


def cut(sample: Sample, size: Size) -> EncodedImage:
    """Resizes a sample so that it covers `size`, and crops it at its centre; labels are those of the nearest pixel."""
    rows, columns = sample.image.shape[-2:]
    scale = max(size[0] / rows, size[1] / columns)
    full = max(size[0], round(rows * scale)), max(size[1], round(columns * scale))
    top, left = (full[0] - size[0]) // 2, (full[1] - size[1]) // 2

    def crop(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if values is None:
            return None
        values = values.reshape(1, -1, rows, columns)
        if full != (rows, columns):
            values = F.interpolate(values.to(torch.float32), full, mode="nearest-exact")
        return values[..., top : top + size[0], left : left + size[1]].to(dtype).contiguous()  # (1,K,*size)

    flow = crop(sample.flow, torch.float32)
    if flow is not None:
        flow = flow * flow.new_tensor([full[1] / columns, full[0] / rows]).view(2, 1, 1)
    rgb = resized(sample.image[None], full)[..., top : top + size[0], left : left + size[1]]
    return EncodedImage(
        sample.name,
        rgb.half().contiguous(),
        (),
        crop(sample.labels, torch.uint8),
        crop(sample.depth, torch.float32),
        crop(sample.normals, torch.float16),
        flow,
    )


def flip(case: EncodedImage) -> EncodedImage:
    """The image without features, mirrored left to right."""
    values = {key: v.flip(-1) for key, v in vars(case).items() if isinstance(v, Tensor)}
    for key in ("normals", "flow"):
        if key in values:
            values[key][:, 0].neg_()
    return replace(case, **values)


def at_layer(backbone: Backbone, layer: int) -> Backbone:
    """The same backbone, weights shared, with another default layer.

    Raises:
        SettingError: it has no such layer.
    """
    if not -backbone.num_layers <= layer < backbone.num_layers:
        raise SettingError(f"backbone={backbone.name} has {backbone.num_layers} layers, none is number {layer}")
    view = copy.copy(backbone)
    view.__dict__.pop("_fingerprint", None)  # which is that of the other layer
    view.default_layer = layer % backbone.num_layers
    view.channels, view.patch_size = backbone.layer_channels[view.default_layer], backbone.layer_strides[layer]
    return view


def _size(case: EncodedImage) -> int:
    return sum(values.nbytes for values in vars(case).values() if isinstance(values, Tensor))
