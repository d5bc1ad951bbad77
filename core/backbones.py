"""Backbones: frozen encoders that give the features to upsample, `load_backbone("dinov2_vits14")`.

Geometry, the same for all: the image is first resized to the nearest multiple of the stride (bilinear, antialiased;
never padded), so that the h x w features tile the whole image and feature i of h stands for its part [i/h, (i+1)/h).
`Backbone.aligned` says whether the receptive field of feature i is centred there too, at (i + 0.5) / h.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import MISSING, DictConfig, OmegaConf
from torch import Tensor, nn

from core.registry import add_choice
from core.streams import named_stream

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANGE_TOLERANCE = 0.1
"""How far values may leave [0, 1]: bicubic resizing overshoots that much, a normalised image far more."""


class WeightsUnavailable(OSError):
    """Pretrained weights that could not be fetched from the hub; the message names both ways out."""


class Backbone(nn.Module, ABC):
    """A frozen encoder, always in eval mode: RGB in [0, 1] -> features (B,C,h,w). It normalises for itself.

    Layers are counted from the input: 0 is the first, -1 the last. `layer_channels[i]` and `layer_strides[i]` declare
    what layer i gives; `channels` and `patch_size` (the stride in pixels) are those of the default layer.
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
        """Smallest height and width in pixels, where that is more than the stride."""

    def forward(self, rgb: Tensor, layer: int | None = None) -> Tensor:
        """(B,3,H,W) RGB in [0,1], any float dtype and any size -> (B,C,h,w), h = H / stride to the nearest integer.

        `layer=None` is the default layer; where that is the last, the backbone's final norm is applied, as it is for
        `layer=-1`. Other layers come as they are inside the network.

        Raises:
            TypeError: integer image. ValueError: wrong rank or channels, values outside [0, 1], too small.
            IndexError: there is no such layer; says how many there are.
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
                f"backbone {self.name}: layer {index} gave {tuple(features.shape)}, declared are "
                f"(B, {self.layer_channels[index]}, h, w)"
            )
        return features

    def fit(self, rgb: Tensor, stride: int) -> Tensor:
        """(B,3,H,W) -> resized to the nearest multiples of `stride`; the same tensor where they are that already."""
        size = tuple(int(side / stride + 0.5) * stride for side in rgb.shape[-2:])
        if size == tuple(rgb.shape[-2:]):
            return rgb
        return F.interpolate(rgb, size=size, mode="bilinear", antialias=True)  # (B, 3, h·stride, w·stride)

    @abstractmethod
    def features(self, image: Tensor, layer: int) -> Tensor:
        """(B,3,H,W) normalised, H and W multiples of the layer's stride; 0 <= layer < num_layers -> (B,C,h,w)."""

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode, so that `model.train()` around it changes no batch statistics and drops nothing out."""
        return super().train(False)

    def freeze(self) -> "Backbone":
        """Eval mode, no gradients for its weights (the image may still have them)."""
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
    """Refuses what is no (B,3,H,W) float image in [0,1]; `who` opens the message.

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
            f"{who}: RGB values must lie in [0, 1], got {low:.3g} to {high:.3g}: pass the image neither normalised "
            "nor in 0..255"
        )


def normalize(rgb: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(B,3,H,W) -> (rgb - mean) / std for each channel, same shape and dtype."""
    shift, scale = (rgb.new_tensor(values).view(3, 1, 1) for values in (mean, std))  # (3, 1, 1)
    return (rgb - shift) / scale


def imagenet_normalize(rgb: Tensor) -> Tensor:
    """The image as AnyUp takes it: (B,3,H,W) RGB in [0,1] -> normalised by ImageNet mean and standard deviation.

    Raises:
        TypeError, ValueError: as `check_rgb`.
    """
    check_rgb(rgb, "imagenet_normalize")
    return normalize(rgb, IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True)
class Choice:
    """One row of the table of backbones."""

    kind: str
    """Who builds it: timm, torchvision, hog or daisy."""
    model: str = ""
    """timm's id with the tag of the pretrained weights; the input normalisation is read from timm's model."""
    build: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`."""
    default_layer: int = -1
    patch_size: int = 0
    """Of the classical descriptors; networks declare their own."""
    aligned: bool | None = True
    file: str = ""
    """Name in `core/weights/` of pretrained weights that come with this package; empty: they are on the hub."""
    twins: Mapping[int, str] = field(default_factory=dict)
    """Number of classes in the head of a local file -> the choice with the same weights' names that it belongs to."""


def _timm(model: str, aligned: bool | None = True) -> Choice:
    return Choice("timm", model, aligned=aligned)


# Where the receptive field of feature i is centred when not at (i + 0.5) / h: ResNet-50 and MobileNetV2 pad strided
# convolutions on both sides: pixel stride·i, (stride - 1) / 2 up and left of the cell's centre. TensorFlow's "same"
# padding and SqueezeNet, which pads nothing: pixel stride·(i + 1) - 1, as far down and right; and SqueezeNet has one
# row and one column less than the image has cells. Trained weights lean back: TensorFlow's MobileNetV2 agrees best
# with its mirror image at 3 pixels, not 7.5.
_TENSORFLOW = {
    "pad_type": "same",
    "pretrained_cfg_overlay": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 1001, "hf_hub_id": None},
}
CHOICES: dict[str, Choice] = {
    # four blocks of vit_tiny16, distilled from all of it (experiments/distill.py, docs/weights.md)
    "embedded": Choice(
        "timm",
        "vit_tiny_patch16_224",
        {"depth": 4, "pretrained_cfg_overlay": {"mean": (0.5,) * 3, "std": (0.5,) * 3}},
        file="embedded.safetensors",
    ),
    "dinov2_vits14": _timm("vit_small_patch14_dinov2.lvd142m"),
    "dinov2_vitb14": _timm("vit_base_patch14_dinov2.lvd142m"),
    "dinov2_vitl14": _timm("vit_large_patch14_dinov2.lvd142m"),
    "dinov2_vits14_reg": _timm("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dino_vits16": _timm("vit_small_patch16_224.dino"),
    "dino_vitb16": _timm("vit_base_patch16_224.dino"),
    # OpenAI trained with the approximated GELU that timm has under these names
    "clip_vitb16": _timm("vit_base_patch16_clip_quickgelu_224.openai"),
    "clip_vitb32": _timm("vit_base_patch32_clip_quickgelu_224.openai"),
    "siglip2_vitb16": _timm("vit_base_patch16_siglip_512.v2_webli"),
    "dinov3_vits16": _timm("vit_small_patch16_dinov3.lvd1689m"),
    "dinov3_vits16plus": _timm("vit_small_plus_patch16_dinov3.lvd1689m"),
    "dinov3_vitb16": _timm("vit_base_patch16_dinov3.lvd1689m"),
    "mae_vitb16": _timm("vit_base_patch16_224.mae"),
    "vit_tiny16": _timm("vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "vit_small16": _timm("vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "vit_base16": _timm("vit_base_patch16_224.augreg_in21k_ft_in1k"),
    "deit_tiny16": _timm("deit_tiny_patch16_224.fb_in1k"),
    "resnet50": _timm("resnet50.a1_in1k", aligned=False),
    "convnext_tiny": _timm("convnext_tiny.fb_in1k"),
    "mobilenetv2": Choice(
        "timm", "mobilenetv2_100.ra_in1k", default_layer=3, aligned=False, twins={1001: "mobilenetv2_tf"}
    ),
    "mobilenetv2_tf": Choice(
        "timm", "mobilenetv2_100", _TENSORFLOW, default_layer=3, aligned=False, twins={1000: "mobilenetv2"}
    ),
    "squeezenet": Choice("torchvision", aligned=False),
    "hog8": Choice("hog", patch_size=8),
    "hog16": Choice("hog", patch_size=16),
    "daisy8": Choice("daisy", patch_size=8),
    "daisy16": Choice("daisy", patch_size=16),
    "timm": _timm("", aligned=None),
}


def load_backbone(name: str, weights: str | Path | None = None, model: str | None = None) -> Backbone:
    """Builds backbone `name` of the table, in eval mode and frozen.

    `weights`: None fetches the pretrained weights from the hub; a path loads a local file (.safetensors, or
    .pth/.pt/.bin without any code in it) with timm's parameter names, with or without the classifier; "random" is a
    fixed random initialisation, for tests and demonstrations only. The classical descriptors have none.
    `model`: timm's id, for `name="timm"` only. A MobileNetV2 file with 1001 classes is TensorFlow's and is built as
    `mobilenetv2_tf` (other padding and normalisation, no weights on the hub), one with 1000 as `mobilenetv2`,
    whichever of the two was asked for; without a classifier it is taken as the one asked for.

    Raises:
        ValueError: unknown name; `model` given or missing in the wrong place; weights for a classical descriptor.
        WeightsError: the file is damaged, unsafe, or of another model. FileNotFoundError: it does not exist.
        WeightsUnavailable: the hub cannot be reached; the message names both ways out.
    """
    if name not in CHOICES:
        raise ValueError(f"no backbone is called {name!r}; there are: {', '.join(CHOICES)}")
    if (model is not None) != (name == "timm"):
        raise ValueError(
            f"backbone {name}: `model` (a timm id such as vit_base_patch16_224.augreg_in21k) is what backbone=timm "
            f"needs and no other takes; got {model!r}"
        )
    with named_stream(0, f"backbone/{name}"):  # building draws random weights, if only to overwrite them
        return _build(name, CHOICES[name], weights, model).freeze()


def backbone_from_config(node: DictConfig | Mapping[str, Any]) -> Backbone:
    """`load_backbone` of a configuration node `{name, weights, model}`, as the Hydra group `backbone` gives it.

    Raises:
        ValueError: a key the node must not have; otherwise as `load_backbone`.
    """
    values = dict(OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node)
    unknown = sorted(set(values) - {"name", "weights", "model"})
    if unknown or "name" not in values:
        raise ValueError(f"a backbone's configuration has the keys name, weights, model; got {', '.join(values)}")
    model = values.get("model")
    return load_backbone(values["name"], values.get("weights"), None if model == MISSING else model)


def _build(name: str, choice: Choice, weights: str | Path | None, model: str | None) -> Backbone:
    # Imported here: each brings a package that a session with another backbone does not need.
    if choice.kind == "timm":
        from core.timm_backbone import load_timm

        return load_timm(name, choice if model is None else replace(choice, model=model), weights)
    if choice.kind == "torchvision":
        from core.torchvision_backbone import load_squeezenet

        return load_squeezenet(name, weights)
    if weights is not None:
        raise ValueError(f"backbone {name} is a classical descriptor and has no weights; got weights={str(weights)!r}")
    from core.classical import DaisyBackbone, HogBackbone

    return (HogBackbone if choice.kind == "hog" else DaisyBackbone)(name, choice.patch_size)


for _name in CHOICES:
    add_choice(
        "backbone", _name, {"weights": (str | None, None)} | ({"model": (str, MISSING)} if _name == "timm" else {})
    )
