"""Checkpoints: safetensors files with the configuration that rebuilds the model. Reads AnyUp's published files too."""

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
from core.delta import DELTA_FORMAT, base_of, patched
from core.hooks import AFTER_ATTENTION, MODEL_HOOKS, Learner
from core.published import PUBLISHED, fetch, is_published, rename_published
from core.registry import changeable, choices, describe, factory, signature_fields
from core.weight_files import WeightsError, read_weights

WEIGHTS_NAME = "model.safetensors"
BUNDLED = {name: Path(__file__).parent / "weights" / f"{name}.safetensors" for name in ("bundled", "bundled_released")}
"""Trained baselines that come with the package: with `ordering=paper`, and with `ordering=released`
(docs/weights.md)."""
FORMAT = "anyup_lab/1"
_LEARNER = "learner."  # begins the names of a learner's weights
_Model = TypeVar("_Model", bound=nn.Module)


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None, learner: Learner | None = None) -> None:
    """Writes weights and configuration to `path` (.safetensors), atomically; casts the weights to `dtype` if given.

    For a wrapped model (`torch.compile`, DataParallel, DistributedDataParallel, AveragedModel), writes the AnyUp
    inside. Of a `learner` that can adapt models and was built from a configuration, writes that and its weights too
    (`core.load_learner`); of others, nothing.

    Raises:
        ValueError: `path` does not end in .safetensors.
        TypeError: `model` is no AnyUp; or a filler is not registered, so no configuration could rebuild the model.
        CannotWrite: the file cannot be written; an earlier file at `path` is untouched.
    """
    model = unwrapped(model)
    metadata = {"format": FORMAT, "config": json.dumps(model.config)}
    state = {
        name.replace("_orig_mod.", ""): tensor.detach().to("cpu", dtype).contiguous()  # the prefix of compiled modules
        for name, tensor in model.state_dict().items()
    }
    if learner is not None and learner.config and type(learner).adapt is not Learner.adapt:
        metadata["learner"] = json.dumps(learner.config)
        state |= {f"{_LEARNER}{name}": tensor.detach().cpu() for name, tensor in learner.state_dict().items()}
    write(state, path, metadata)


def write(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Writes tensors to a safetensors file, atomically. Raises as `save`."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a checkpoint must end in .safetensors")
    with replacing(Path(path)) as part:
        save_file(state, part, metadata)


def unwrapped(model: nn.Module) -> nn.Module:
    """The AnyUp inside `torch.compile`, DataParallel, DistributedDataParallel or AveragedModel.

    Raises:
        TypeError: `model` is neither an AnyUp nor one of these wrappers.
    """
    inner = model
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            inner = inner.module
        elif "_orig_mod" in getattr(inner, "_modules", {}):  # the class of compiled modules is private in torch
            inner = inner._orig_mod
        else:
            break
    if not hasattr(inner, "factories"):
        raise TypeError(f"{type(model).__name__} is no AnyUp, nor a known wrapper of one")
    return inner


def find(source: str | Path) -> Path:
    """Finds a checkpoint file by its path, by a folder that `save_pretrained` wrote, or by a name.

    `bundled` and `bundled_released` were trained here (docs/weights.md). `anyup_paper` and `anyup_multi_backbone` are
    the weights that AnyUp's authors published (CC-BY-4.0); they are downloaded once. For a folder with one of these
    names, write "./bundled".

    Raises:
        FileNotFoundError: no such file or name, or a folder without a checkpoint.
        OSError, WeightsError: as `core.published.fetch`.
    """
    if str(source) in BUNDLED:
        return BUNDLED[str(source)]
    if str(source) in PUBLISHED:
        return fetch(str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{path} is a folder without {WEIGHTS_NAME} (save_pretrained writes one): give the path of a checkpoint"
            )
        return path / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path}: there is no such file; known names are {', '.join([*BUNDLED, *PUBLISHED])}"
        )
    return path


def bundled_like(model: nn.Module) -> str:
    """Name of the bundled baseline that has the same feature ordering as `model`."""
    return "bundled_released" if model.config["unifier"].get("ordering") == "released" else "bundled"


def rebuild(
    make: Callable[..., _Model], state: dict[str, Tensor], config: dict[str, Any], source: str | Path
) -> _Model:
    """Builds a model from a state dict and its configuration, in eval mode on the CPU; `make` is the class AnyUp.

    Raises:
        WeightsError: the configuration is not valid, or the weights do not fit it; the message names `source`.
    """
    try:
        model = make(**arguments(config))
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{source}: no model can be built from its configuration ({error})") from error
    _load_strictly(model, state, source)
    return model.eval()


def changed(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a checkpoint's configuration, with new values for settings that may change after training.

    `changes` has keys "hook.setting"; or a hook point, with the filler to use there instead (`replaceable`): its name,
    or {"name": NAME, SETTING: VALUE, ...}.

    Raises:
        ValueError: a setting that may not change (the message lists those that may), or a filler that cannot be added.
    """
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for hook in MODEL_HOOKS:
        if hook in changes:
            config[hook] = _replaced(hook, config[hook], changes[hook])
    free = [key for hook in MODEL_HOOKS for key in changeable(hook, config[hook]["name"])]
    for key, value in changes.items():
        if key in MODEL_HOOKS:
            continue
        if key not in free:
            fillable = [hook for hook in MODEL_HOOKS if _others(hook, config[hook]["name"])]
            raise ValueError(
                f"{key} cannot be changed after training; these can: {', '.join([*free, *fillable]) or 'none'}"
            )
        hook, _, setting = key.partition(".")
        config[hook][setting] = value
    return config


def _others(hook: str, before: str) -> list[str]:
    return [name for name in choices(hook) if replaceable(hook, before, name)]


def replaceable(hook: str, before: str, name: str) -> bool:
    """Whether a checkpoint with `hook=before` may be used with `hook=name`.

    It may where `before` is `none`, after attention. And where the class `name` extends the class `before`, as
    `bilateral_prior` extends `window`: it has all its weights, and their names.
    """
    if hook in AFTER_ATTENTION and before == "none":
        return name != before
    known = choices(hook)
    return name != before and name in known and before in known and issubclass(known[name], known[before])


def _replaced(hook: str, before: dict[str, Any], node: str | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a filler in place of a checkpoint's; those that both have are the checkpoint's."""
    name, settings = (node, {}) if isinstance(node, str) else (node.get("name"), {**node})
    settings.pop("name", None)
    if before["name"] == name:
        raise ValueError(f"{hook}={name} is in the checkpoint already: change single settings, {hook}.SETTING")
    given = factory(hook, name, settings)  # refuses unknown names and settings
    if not replaceable(hook, before["name"], name):
        raise ValueError(
            f"{hook}={name} cannot be added: the checkpoint was trained with {hook}={before['name']}, which may be "
            f"replaced by {', '.join(_others(hook, before['name'])) or 'nothing'}"
        )
    fields = signature_fields(given.func)
    common = {key: value for key, value in before.items() if key in fields}
    for key, value in _fixed(hook, before).items():
        if key in common and settings.get(key, value) != value:
            raise ValueError(f"{hook}.{key} cannot be changed after training: the checkpoint has {value}")
    return describe(factory(hook, name, common | settings))


def _fixed(hook: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a filler that must stay as in training."""
    free = changeable(hook, settings["name"])
    return {key: value for key, value in settings.items() if f"{hook}.{key}" not in free}


def warm_start(model: nn.Module, source: str | Path, base: str | Path | None = None) -> list[str]:
    """Copies a checkpoint's weights into a model whose fillers may differ.

    Weights may be missing or unused only in hook points whose filler or settings differ from the checkpoint's.
    `source` is a path or a name, and `base` that of a delta, as for `core.load`.

    Returns:
        Names of the weights that the checkpoint does not have; they keep their values.

    Raises:
        TypeError: as `unwrapped`. FileNotFoundError, OSError: as `core.load`.
        WeightsError: as `core.load`; or another weight is missing, unexpected or of another shape.
    """
    model = unwrapped(model)
    state, config = read(source, base)
    mine = json.loads(json.dumps(model.config))  # as read from a file: tuples become lists
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


def read(source: str | Path, base: str | Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a checkpoint, or a delta and its base -> state dict with this project's parameter names, configuration.

    Args:
        base: of a delta, if it is not where it was; a source as well.

    Raises:
        FileNotFoundError, OSError, WeightsError: as `core.load`.
    """
    path = find(source)
    state, metadata = _tensors(path)
    if metadata.get("format") == DELTA_FORMAT:
        base = base_of(metadata, path, BUNDLED | PUBLISHED) if base is None else base
        return patched(state, metadata, *read(base), path, base)
    if base is not None:
        raise WeightsError(f"{path} is no delta, so it has no base: load it without base={base}")
    if metadata.get("format", "").startswith("anyup_lab/"):
        _check_format(path, metadata)
        try:
            config = json.loads(metadata["config"])
        except (KeyError, ValueError) as error:
            raise WeightsError(
                f"{path} is damaged: its configuration cannot be read; copy or download the file again"
            ) from error
        return {name: tensor for name, tensor in state.items() if not name.startswith(_LEARNER)}, config
    if not is_published(state) and {"rotary.freqs", "image_encoder.0.weight"} <= state.keys():
        reader = "safetensors.torch.load_file(FILE)" if path.suffix == ".safetensors" else "torch.load(FILE)"
        raise WeightsError(
            f"{path} is a bare state dict of this project's AnyUp, without its configuration. Build that variant, "
            f"model = core.build([OVERRIDE, ...]), and call model.load_state_dict({reader}). Then core.save(model, "
            '"NAME.safetensors") writes a file that core.load can read'
        )
    return rename_published(state, path)


def read_learner(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Reads the learner that a checkpoint was trained by -> its state dict and configuration; None: there is none.

    Raises:
        FileNotFoundError, OSError, WeightsError: as `core.load`.
    """
    state, metadata = _tensors(find(source))
    if "learner" not in metadata:
        return None
    own = {name.removeprefix(_LEARNER): tensor for name, tensor in state.items() if name.startswith(_LEARNER)}
    return own, json.loads(metadata["learner"])


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    trusted = () if path.suffix == ".safetensors" else _omegaconf_classes()
    return read_weights(path, ("anyup", "state_dict", "model"), trusted)


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata["format"] != FORMAT:
        raise WeightsError(f"{path} has format {metadata['format']}; this version reads {FORMAT}")


def _omegaconf_classes() -> list:
    """Classes in the configuration that checkpoints of the released training script contain beside tensors."""
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
