"""The table of backbones: one row per name, offered to Hydra as `backbone=NAME`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from core.registry import add_choice


@dataclass(frozen=True)
class Choice:
    """One row of the table of backbones."""

    kind: str
    """What builds it: timm, torchvision, hog or daisy."""
    model: str = ""
    """timm's id with the tag of the pretrained weights; the input normalisation is read from timm's model."""
    build: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `timm.create_model`."""
    default_layer: int = -1
    patch_size: int = 0
    """Cell size in pixels of a classical descriptor; networks declare their own stride."""
    aligned: bool | None = True
    """As `Backbone.aligned`."""
    file: str = ""
    """File in `core/weights/` with pretrained weights of this package; empty: the weights are downloaded."""
    twins: Mapping[int, str] = field(default_factory=dict)
    """Number of classes in a local file's classifier -> the choice, with the same parameter names, for that file."""


def _timm(model: str, aligned: bool | None = True) -> Choice:
    return Choice("timm", model, aligned=aligned)


# Backbones with aligned=False: where the receptive field of feature i is centred, instead of at (i + 0.5) / h.
# - ResNet-50 and MobileNetV2 pad strided convolutions on both sides: at pixel stride·i, which is (stride - 1) / 2 up
#   and left of the cell's centre.
# - TensorFlow's "same" padding, and SqueezeNet without padding: at pixel stride·(i + 1) - 1, as far down and right.
#   SqueezeNet also has one row and one column less than the image has cells.
# Trained weights undo part of this: TensorFlow's MobileNetV2 agrees best with its mirror image at 3 pixels, not 7.5.
_TENSORFLOW = {
    "pad_type": "same",
    "pretrained_cfg_overlay": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "num_classes": 1001, "hf_hub_id": None},
}
CHOICES: dict[str, Choice] = {
    # four blocks of vit_tiny16, distilled from the whole model (experiments/distill.py, docs/weights.md)
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
    # OpenAI trained with an approximate GELU; timm's names for it contain "quickgelu"
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

for _name in CHOICES:
    add_choice(
        "backbone", _name, {"weights": (str | None, None)} | ({"model": (str, MISSING)} if _name == "timm" else {})
    )
