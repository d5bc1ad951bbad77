"""The base class `Backbone`, image normalisation, and the error for weights that cannot be fetched.

All backbones share one geometry. The image is first resized to the nearest multiple of the stride (bilinear,
antialiased, never padded). So the h x w features tile the whole image, and feature i of h covers [i/h, (i+1)/h).
`Backbone.aligned` says whether the receptive field of feature i is centred there too, at (i + 0.5) / h.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANGE_TOLERANCE = 0.1
"""How far RGB values may lie outside [0, 1]. Bicubic resizing overshoots this much; a normalised image, far more."""


class WeightsUnavailable(OSError):
    """Pretrained weights could not be downloaded; the message names two ways out."""


class Backbone(nn.Module, ABC):
    """A frozen encoder, always in eval mode: RGB in [0, 1] -> features (B,C,h,w). It normalises the image itself.

    Layers are counted from the input: 0 is the first, -1 the last. `layer_channels[i]` and `layer_strides[i]` describe
    layer i. `channels` and `patch_size` (the stride in pixels) are those of the default layer.
    """

    def __init__(
        self,
        name: str,
        layer_channels: tuple[int, ...],
        layer_strides: tuple[int, ...],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        default_layer: int = -1,
        aligned: bool | None = True,
        min_size: int = 1,
    ):
        super().__init__()
        self.name = name
        self.layer_channels, self.layer_strides = tuple(layer_channels), tuple(layer_strides)
        self.num_layers = len(self.layer_channels)
        self.default_layer = default_layer % self.num_layers
        self.channels = self.layer_channels[self.default_layer]
        self.patch_size = self.layer_strides[self.default_layer]
        self.mean, self.std = tuple(mean), tuple(std)
        self.aligned = aligned
        """True: feature i of h is centred at (i + 0.5) / h of the image; False: up to half a cell off; None: unknown"""
        self.min_size = min_size
        """Smallest height and width in pixels, if larger than the stride."""

    def forward(self, rgb: Tensor, layer: int | None = None) -> Tensor:
        """(B,3,H,W) RGB in [0,1], any float dtype and size -> (B,C,h,w) with h = H / stride, rounded.

        `layer=None` means the default layer. The last layer is returned after the backbone's final norm; other layers
        are returned as they are inside the network.

        Raises:
            TypeError: integer image. ValueError: wrong rank or channels, values outside [0, 1], or too small.
            IndexError: no such layer; the message says how many there are.
        """
        index = self._layer_index(layer)
        check_rgb(rgb, f"backbone {self.name}")
        stride = self.layer_strides[index]
        smallest = max(stride, self.min_size)
        if min(rgb.shape[-2:]) < smallest:
            raise ValueError(
                f"backbone {self.name}: the image is {rgb.shape[-2]}x{rgb.shape[-1]} pixels, at least "
                f"{smallest}x{smallest} are needed (stride {stride})"
            )
        # antialiased resizing has no half precision on CPU
        rgb = rgb if rgb.dtype == torch.float64 else rgb.float()
        image = normalize(self.fit(rgb, stride), self.mean, self.std)  # (B, 3, h·stride, w·stride)
        features = self.features(image, index)  # (B, C, h, w)
        if features.ndim != 4 or features.shape[1] != self.layer_channels[index]:
            raise RuntimeError(
                f"backbone {self.name}: layer {index} must give (B, {self.layer_channels[index]}, h, w) as declared, "
                f"got {tuple(features.shape)}"
            )
        return features

    def fit(self, rgb: Tensor, stride: int) -> Tensor:
        """Resizes (B,3,H,W) to the nearest multiples of `stride`; returns the same tensor if nothing changes."""
        size = tuple(int(side / stride + 0.5) * stride for side in rgb.shape[-2:])
        if size == tuple(rgb.shape[-2:]):
            return rgb
        return F.interpolate(rgb, size=size, mode="bilinear", antialias=True)  # (B, 3, h·stride, w·stride)

    @abstractmethod
    def features(self, image: Tensor, layer: int) -> Tensor:
        """(B,3,H,W) normalised, H and W multiples of the layer's stride; 0 <= layer < num_layers -> (B,C,h,w)."""

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: `train()` of a model around it changes no batch statistics and enables no dropout."""
        return super().train(False)

    def freeze(self) -> "Backbone":
        """Eval mode, without gradients for the weights; the image can still have gradients."""
        return self.requires_grad_(False).eval()

    def _layer_index(self, layer: int | None) -> int:
        if layer is None:
            return self.default_layer
        if not -self.num_layers <= layer < self.num_layers:
            raise IndexError(
                f"backbone {self.name} has no layer {layer}: it has {self.num_layers}, 0 to {self.num_layers - 1} "
                f"or -{self.num_layers} to -1"
            )
        return layer % self.num_layers


def check_rgb(rgb: Tensor, who: str) -> None:
    """Refuses anything but a (B,3,H,W) float image in [0,1]; messages begin with `who`.

    Raises:
        TypeError: integer dtype. ValueError: wrong rank, channels or range, or empty.
    """
    if rgb.ndim != 4 or rgb.shape[1] != 3 or rgb.numel() == 0:
        raise ValueError(f"{who}: the image must be (B, 3, H, W), got {tuple(rgb.shape)}")
    if not rgb.is_floating_point():
        raise TypeError(f"{who}: the image must be floating point in [0, 1], got {rgb.dtype}: divide by 255")
    low, high = (value.item() for value in torch.aminmax(rgb.detach()))
    if not (low >= -RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE):  # NaN fails both
        raise ValueError(
            f"{who}: RGB values must lie in [0, 1], got {low:.3g} to {high:.3g}: pass an image that is neither "
            "normalised nor in 0..255"
        )


def normalize(rgb: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(B,3,H,W) -> (rgb - mean) / std for each channel, same shape and dtype."""
    shift, scale = (rgb.new_tensor(values).view(3, 1, 1) for values in (mean, std))  # (3, 1, 1)
    return (rgb - shift) / scale


def imagenet_normalize(rgb: Tensor) -> Tensor:
    """Prepares an image for AnyUp: (B,3,H,W) RGB in [0,1] -> normalised by ImageNet mean and standard deviation.

    Raises:
        TypeError, ValueError: as `check_rgb`.
    """
    check_rgb(rgb, "imagenet_normalize")
    return normalize(rgb, IMAGENET_MEAN, IMAGENET_STD)
