"""Checkpoints: safetensors with the configuration that rebuilds the model. Published files are read as well."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from core.atomic import replacing
from core.compose import arguments
from core.hooks import MODEL_HOOKS
from core.published import PUBLISHED, fetch, is_published, rename_published
from core.registry import changeable
from core.weight_files import WeightsError, read_weights

WEIGHTS_NAME = "model.safetensors"
BUNDLED = {name: Path(__file__).parent / "weights" / f"{name}.safetensors" for name in ("bundled", "bundled_released")}
"""The trained baselines that come with the package: `ordering` paper, and released (docs/weights.md)."""
FORMAT = "anyup_lab/1"
_Model = TypeVar("_Model", bound=nn.Module)


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes weights and configuration to `path` (.safetensors), atomically; weights in `dtype` if one is given.

    Of a model that is wrapped (`torch.compile`, DataParallel, DistributedDataParallel, AveragedModel), the AnyUp
    inside is written.

    Raises:
        ValueError: `path` does not end in .safetensors.
        TypeError: no AnyUp; or a filler is not registered, so that no configuration could rebuild the model.
        CannotWrite: the file cannot be written; an earlier file at `path` is untouched.
    """
    model = unwrapped(model)
    metadata = {"format": FORMAT, "config": json.dumps(model.config)}
    state = {
        name.replace("_orig_mod.", ""): tensor.detach().to("cpu", dtype).contiguous()  # of a part that was compiled
        for name, tensor in model.state_dict().items()
    }
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: checkpoints are written as .safetensors")
    with replacing(Path(path)) as part:
        save_file(state, part, metadata)


def unwrapped(model: nn.Module) -> nn.Module:
    """The AnyUp inside `torch.compile`, DataParallel, DistributedDataParallel or AveragedModel.

    Raises:
        TypeError: there is none.
    """
    inner = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            inner = inner.module
        elif "_orig_mod" in getattr(inner, "_modules", {}):  # torch's class of compiled modules is private
            inner = inner._orig_mod
        else:
            break
    if not hasattr(inner, "factories"):
        raise TypeError(f"{type(model).__name__} is no AnyUp, nor a known wrapper of one")
    return inner


def find(source: str | Path) -> Path:
    """The file of a checkpoint: given by its path, by the folder that `save_pretrained` made, or by a name.

    Names are `bundled` and `bundled_released` (trained here, docs/weights.md), and those of the weights that AnyUp's
    authors published, `anyup_paper` and `anyup_multi_backbone` (CC-BY-4.0), which are downloaded once. A folder of
    such a name is "./bundled".

    Raises:
        FileNotFoundError: no such file or name, or a folder without a checkpoint. OSError, WeightsError: as
            `core.published.fetch`.
    """
    if str(source) in BUNDLED:
        return BUNDLED[str(source)]
    if str(source) in PUBLISHED:
        return fetch(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{path} is a folder without {WEIGHTS_NAME}, which save_pretrained writes: give a checkpoint's file"
            )
        return path / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path}: there is no such file; by name there are {', '.join([*BUNDLED, *PUBLISHED])}"
        )
    return path


def bundled_like(model: nn.Module) -> str:
    """Name of the trained baseline that comes with the package for the feature ordering of `model`."""
    return "bundled_released" if model.config["unifier"].get("ordering") == "released" else "bundled"


def rebuild(
    make: Callable[..., _Model], state: dict[str, Tensor], config: dict[str, Any], source: str | Path
) -> _Model:
    """The model of a state dict and its configuration, in eval mode on the CPU; `make` is the class AnyUp.

    Raises:
        WeightsError: the configuration makes no model, or the weights are of another one; names `source`.
    """
    try:
        model = make(**arguments(config))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: no model can be built from its configuration ({error})") from error
    _load_strictly(model, state, source)
    return model.eval()


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with other values for settings that may change after training.

    Raises:
        ValueError: a setting that may not; lists those that may.
    """
    free = [key for hook in MODEL_HOOKS for key in changeable(hook, config[hook]["name"])]
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for key, value in changes.items():
        if key not in free:
            raise ValueError(f"{key} cannot be changed after training; there are: {', '.join(free) or 'none'}")
        hook, _, setting = key.partition(".")
        config[hook][setting] = value
    return config


def _fixed(hook: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a filler that the weights belong to."""
    free = changeable(hook, settings["name"])
    return {key: value for key, value in settings.items() if f"{hook}.{key}" not in free}


def warm_start(model: nn.Module, source: str | Path) -> list[str]:
    """Copies a checkpoint's weights into a model whose fillers may differ; returns the weights left as they were.

    Only hook points whose filler or settings differ from the checkpoint's may miss weights or ignore some.
    `source` is a path or a name, as for `core.load`.

    Raises:
        FileNotFoundError, WeightsError: as `core.load`; or another weight is missing, left over or of another shape.
    """
    model = unwrapped(model)
    state, config = read(source)
    mine = json.loads(json.dumps(model.config))  # as it would come back from a file: lists for tuples
    differs = [hook for hook in model.factories if _fixed(hook, mine[hook]) != _fixed(hook, mine[hook] | config[hook])]
    switched = tuple(f"{hook}." for hook in differs)
    own = model.state_dict()
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(switched) or (name in own and own[name].shape == tensor.shape)
    }
    untouched = [name for name in own if name.startswith(switched) and name not in kept]
    _load_strictly(model, kept | {name: own[name] for name in untouched}, source)
    return untouched


def read(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict of a checkpoint, in this project's names, and its configuration.

    Raises:
        FileNotFoundError, OSError, WeightsError: as `core.load`.
    """
    path = find(source)
    trusted = () if path.suffix == ".safetensors" else _omegaconf_classes()
    state, metadata = read_weights(path, ("anyup", "state_dict", "model"), trusted)
    if metadata.get("format", "").startswith("anyup_lab/"):
        if metadata["format"] != FORMAT:
            raise WeightsError(f"{path} has format {metadata['format']}; this version reads {FORMAT}")
        try:
            return state, json.loads(metadata["config"])
        except (KeyError, ValueError) as error:
            raise WeightsError(f"{path} is damaged: it has no configuration that could be read") from error
    if not is_published(state) and {"rotary.freqs", "image_encoder.0.weight"} <= state.keys():
        reader = "safetensors.torch.load_file(FILE)" if path.suffix == ".safetensors" else "torch.load(FILE)"
        raise WeightsError(
            f"{path} is a bare state dict of this project's AnyUp: it does not say of which variant. Build that one, "
            f"model = core.build([OVERRIDE, ...]), and model.load_state_dict({reader}); core.save(model, "
            '"NAME.safetensors") then writes a file that core.load takes'
        )
    return rename_published(state, path)


def _omegaconf_classes() -> list:
    """What the released training script's checkpoints hold beside tensors: its configuration."""
    import collections
    import typing

    from omegaconf import DictConfig, ListConfig, base, nodes

    metadata = [base.ContainerMetadata, base.Metadata]
    values = [nodes.AnyNode, nodes.IntegerNode, nodes.FloatNode, nodes.BooleanNode, nodes.StringNode]
    return [
        DictConfig,
        ListConfig,
        *metadata,
        *values,
        typing.Any,
        dict,
        list,
        int,
        float,
        str,
        collections.defaultdict,
    ]


def _load_strictly(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(reshaped)))
        if names
    ]
    if problems:
        raise WeightsError(f"{path} is of another architecture than the model: weights " + "; ".join(problems))
    model.load_state_dict(state)
