"""timm's encoders as backbones, and strict loading of their weights.

timm: Ross Wightman, PyTorch Image Models (Apache-2.0).
"""

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.backbones.base import Backbone, WeightsUnavailable
from core.backbones.table import CHOICES, Choice
from core.hub import hub_file
from core.weight_files import WeightsError, outer_names, read_weights

RANDOM = "random"
WEIGHTS = Path(__file__).parent.parent / "weights"
"""Folder of the weights that come with the package."""
SHOWN_KEYS = 4


class TimmBackbone(Backbone):
    """A timm model without its head. Its layers are blocks (ViT) or stages (CNN), as in timm's `feature_info`.

    Channels, strides, mean and std are read from the model. Prefix tokens (class, registers) are dropped. Position
    embeddings are resampled to the image's grid. A ViT's final norm is applied to its last layer only.
    """

    def __init__(
        self, name: str, model: str, build: Mapping[str, Any], default_layer: int = -1, aligned: bool | None = None
    ):
        import timm

        trunk = _create(model, build)
        info = list(trunk.feature_info)
        config = timm.data.resolve_model_data_config(trunk)
        super().__init__(
            name=name,
            layer_channels=tuple(stage["num_chs"] for stage in info),
            layer_strides=tuple(stage["reduction"] for stage in info),
            mean=config["mean"],
            std=config["std"],
            default_layer=default_layer,
            aligned=aligned,
        )
        self.trunk = trunk
        fixed = trunk.pretrained_cfg.get("fixed_input_size", False) and not _takes_any_size(type(trunk))
        self.input_size: tuple[int, int] | None = tuple(config["input_size"][-2:]) if fixed else None
        """(height, width) in pixels, if the model takes only this size; None: any size."""

    def fit(self, rgb: Tensor, stride: int) -> Tensor:
        """As `Backbone.fit`.

        Raises:
            ValueError: the model takes only one size, and the image has another.
        """
        if self.input_size is None:
            return super().fit(rgb, stride)
        if tuple(rgb.shape[-2:]) != self.input_size:
            raise ValueError(
                f"backbone {self.name}: {type(self.trunk).__name__} takes images of "
                f"{self.input_size[0]}x{self.input_size[1]} pixels only, got {rgb.shape[-2]}x{rgb.shape[-1]}"
            )
        return rgb

    def features(self, image: Tensor, layer: int) -> Tensor:
        """As `Backbone.features`, computed in the dtype of the weights."""
        return self.trunk.forward_intermediates(
            image.to(next(self.trunk.parameters()).dtype),
            indices=[layer],
            norm=layer == self.num_layers - 1,  # the norm was trained on the last layer only
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )[0]  # (B, C, h, w)


def load_timm(name: str, choice: Choice, weights: str | Path | None) -> Backbone:
    """Builds a timm backbone with pretrained weights (None), those of a file, or "random". Raises: `load_backbone`."""
    state = None if weights in (None, RANDOM) else read_weights(weights)[0]
    if state is not None and choice.twins:
        name = choice.twins.get(_num_classes(choice, state), name)
        choice = CHOICES[name]
    backbone = TimmBackbone(name, choice.model, choice.build, choice.default_layer, choice.aligned)
    config = backbone.trunk.pretrained_cfg
    if weights == RANDOM:
        return backbone
    if state is None:
        weights = WEIGHTS / choice.file if choice.file else _download(name, config)
        state, _ = read_weights(weights)
    heads = config.get("classifier") or ()
    load_strict(backbone.trunk, state, (heads,) if isinstance(heads, str) else heads, f"backbone {name}: {weights}")
    return backbone


def load_strict(module: nn.Module, state: Mapping[str, Tensor], heads: tuple[str, ...], source: str) -> None:
    """Loads every tensor of `module`, cast to its dtype; tensors of the classifiers named `heads` are ignored.

    Raises:
        WeightsError: a tensor is missing, unknown or of another shape; names `source`, the model and the first keys.
    """
    own = module.state_dict()
    trunk = {
        key: value for key, value in state.items() if key in own or not key.startswith(tuple(f"{h}." for h in heads))
    }
    shapes = [
        f"{key} {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in trunk.items()
        if key in own and value.shape != own[key].shape
    ]
    faults = {"of another shape": shapes}
    if not shapes:
        result = module.load_state_dict(trunk, strict=False)
        faults |= {"missing": result.missing_keys, "unknown": result.unexpected_keys}
    found = [f"{len(keys)} {fault}: {_first(keys)}" for fault, keys in faults.items() if keys]
    if found:
        raise WeightsError(
            f"{source} is not of this model ({type(module).__name__}), or does not have timm's or torchvision's "
            f"parameter names: {'; '.join(found)}{outer_names(state, own)}"
        )


def unavailable(name: str, what: str, way_out: str, reason: str) -> WeightsUnavailable:
    """The error for weights that cannot be downloaded: which, why, and two ways out."""
    return WeightsUnavailable(
        f"backbone {name}: no pretrained weights of {what} ({reason}). Two ways out: (1) {way_out}; "
        "(2) give a local file: load_backbone(..., weights=PATH) in Python, backbone.weights=PATH on the command line"
    )


def _create(model: str, build: Mapping[str, Any]) -> nn.Module:
    import timm

    known = set(timm.list_models()) | set(timm.list_pretrained())
    if model not in known:
        close = get_close_matches(model, sorted(known), n=3)
        raise ValueError(f"timm {timm.__version__} has no model {model!r}; close: {', '.join(close) or 'none'}")
    with torch.device("meta"):  # only to find its class: timm's factories do not show which arguments it takes
        kind = type(timm.create_model(model, num_classes=0, **build))
    if not hasattr(kind, "forward_intermediates"):
        raise ValueError(
            f"timm's {model} ({kind.__name__}) gives no feature maps: it has no forward_intermediates; choose another"
        )
    return timm.create_model(
        model, num_classes=0, **build, **({"dynamic_img_size": True} if _takes_any_size(kind) else {})
    )


def _takes_any_size(kind: type[nn.Module]) -> bool:
    return "dynamic_img_size" in inspect.signature(kind.__init__).parameters


def _num_classes(choice: Choice, state: Mapping[str, Tensor]) -> int | None:
    import timm

    weight = state.get(f"{timm.get_pretrained_cfg(choice.model).classifier}.weight")
    return None if weight is None else weight.shape[0]


def _download(name: str, config: Mapping[str, Any]) -> str:
    from huggingface_hub.errors import HTTPError

    repo, file = config.get("hf_hub_id"), config.get("hf_hub_filename") or "model.safetensors"
    if not repo:
        raise unavailable(name, config["architecture"], "choose another backbone", "the hub has none")
    try:
        return hub_file(repo, file)
    except (OSError, HTTPError) as error:
        way_out = f"go online, or set HF_HUB_CACHE to a hub cache that contains {file} of {repo}"
        raise unavailable(name, repo, way_out, f"the hub cannot be reached: {type(error).__name__}") from error


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN_KEYS]) + (", ..." if len(keys) > SHOWN_KEYS else "")
