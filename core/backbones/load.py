"""Builds a backbone of the table, with its weights: `load_backbone("dinov2_vits14")`."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from core.backbones.base import Backbone
from core.backbones.table import CHOICES, Choice
from core.streams import named_stream


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
        from core.backbones.timm import load_timm

        return load_timm(name, choice if model is None else replace(choice, model=model), weights)
    if choice.kind == "torchvision":
        from core.backbones.torchvision import load_squeezenet

        return load_squeezenet(name, weights)
    if weights is not None:
        raise ValueError(f"backbone {name} is a classical descriptor and has no weights; got weights={str(weights)!r}")
    from core.backbones.classical import DaisyBackbone, HogBackbone

    return (HogBackbone if choice.kind == "hog" else DaisyBackbone)(name, choice.patch_size)
