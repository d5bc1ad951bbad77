"""Backbones: frozen encoders that give the features to upsample, `load_backbone("dinov2_vits14")`.

`base` says what a backbone is, `table` lists them by name, `load` builds one; one file each for what timm, torchvision
and scikit-image bring.
"""

from core.backbones.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RANGE_TOLERANCE,
    Backbone,
    WeightsUnavailable,
    check_rgb,
    imagenet_normalize,
    normalize,
)
from core.backbones.load import backbone_from_config, load_backbone
from core.backbones.table import CHOICES, Choice

__all__ = [
    "CHOICES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "RANGE_TOLERANCE",
    "Backbone",
    "Choice",
    "WeightsUnavailable",
    "backbone_from_config",
    "check_rgb",
    "imagenet_normalize",
    "load_backbone",
    "normalize",
]
