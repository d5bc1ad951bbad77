"""Backbones: frozen encoders whose features are upsampled. `load_backbone("dinov2_vits14")` builds one.

`base` defines a backbone, `table` lists them by name, and `load` builds one. The encoders themselves are in `timm`,
`torchvision` and `classical` (scikit-image).
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
