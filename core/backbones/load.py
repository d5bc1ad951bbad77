"""Builds a backbone by its name, with weights: `load_backbone("dinov2_vits14")`."""

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

    A MobileNetV2 file with 1001 classes is TensorFlow's. It is built as `mobilenetv2_tf`, with other padding and
    normalisation (the hub has no weights for it). A file with 1000 classes is built as `mobilenetv2`. The number of
    classes decides, not `name`. A file without a classifier is built as `name`.

    Args:
        name: the backbone's name in the table, `core.backbones.CHOICES`.
        weights: None: the pretrained weights, of this package or downloaded. A path: a local file (.safetensors, or
            .pth/.pt/.bin without code in it) with timm's or torchvision's parameter names, with or without the
            classifier. "random": a fixed random initialisation, for tests, demonstrations, and self-supervised
            pretraining. Classical descriptors have no weights.
        model: timm's model id, only for `name="timm"`.

    Raises:
        ValueError: unknown name or timm model; `model` missing, or given with another name; weights for a classical
            descriptor.
        WeightsError: the file is damaged, unsafe, or of another model. FileNotFoundError: it does not exist.
        WeightsUnavailable: the weights cannot be downloaded; the message names two ways out.
    """
    if name not in CHOICES:
        raise ValueError(f"no backbone is called {name!r}; there are: {', '.join(CHOICES)}")
    if (model is not None) != (name == "timm"):
        raise ValueError(
            f"backbone {name}: `model` is for backbone=timm only, which needs one (a timm id such as "
            f"vit_base_patch16_224.augreg_in21k); got {model!r}"
        )
    with named_stream(0, f"backbone/{name}"):  # building draws random weights, even if they are overwritten
        return _build(name, CHOICES[name], weights, model).freeze()


def backbone_from_config(node: DictConfig | Mapping[str, Any]) -> Backbone:
    """Calls `load_backbone` with a node `{name, weights, model}` of the Hydra group `backbone`.

    Raises:
        ValueError: an unknown key, or no `name`. Otherwise as `load_backbone`.
    """
    values = dict(OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node)
    unknown = sorted(set(values) - {"name", "weights", "model"})
    if unknown or "name" not in values:
        raise ValueError(f"a backbone's configuration can have the keys name, weights, model; got {', '.join(values)}")
    model = values.get("model")
    return load_backbone(values["name"], values.get("weights"), None if model == MISSING else model)


def _build(name: str, choice: Choice, weights: str | Path | None, model: str | None) -> Backbone:
    # Imported here: each needs a package that the others do not.
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
