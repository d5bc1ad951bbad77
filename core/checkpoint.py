"""Checkpoints: safetensors with the configuration that rebuilds the model, and the published ones."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.atomic import replacing
from core.weight_files import WeightsError, read_weights

if TYPE_CHECKING:
    from core.anyup import AnyUp

WEIGHTS_NAME = "model.safetensors"
PRETRAINED = {
    f"anyup_{ordering}": Path(__file__).parent / "weights" / f"anyup_{ordering}.safetensors"
    for ordering in ("paper", "released")
}
"""The trained baselines that come with the package, one for each `ordering` of the feature path (docs/weights.md)."""
FORMAT = "anyup_lab/1"

# Published name -> ours. The value and output projections and the key bias of the published attention do not
# change its result, and have no counterpart here.
_RENAMES = {
    "rope.": "rotary.",
    "key_features_encoder.": "unifier.encoder.",
    "cross_decode.conv2d.": "attention.conv.",
    "cross_decode.cross_attn.norm_q.": "attention.norm_query.",
    "cross_decode.cross_attn.norm_k.": "attention.norm_key.",
}
_IN_PROJECTION = "cross_decode.cross_attn.attention.in_proj_"
_OUT_PROJECTION = "cross_decode.cross_attn.attention.out_proj."


def save(model: "AnyUp", path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes weights and configuration to `path` (.safetensors), atomically; weights in `dtype` if one is given.

    Raises:
        ValueError: `path` does not end in .safetensors.
        TypeError: a filler is not registered, so that no configuration could rebuild the model.
        CannotWrite: the file cannot be written; an earlier file at `path` is untouched.
    """
    metadata = {"format": FORMAT, "config": json.dumps(model.config)}
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path}: checkpoints are written as .safetensors")
    with replacing(Path(path)) as part:
        save_file(state, part, metadata)


def load(path: str | Path) -> "AnyUp":
    """Rebuilds the model of a checkpoint, in eval mode on the CPU.

    Takes files of `save` and published AnyUp checkpoints (`.pth`, read without unpickling objects, or
    `.safetensors`; bare, or as the released training script nests them), which get `ordering: released`.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: truncated, of another architecture, or a pickle that would run code.
    """
    return _rebuild(*read(path), path)


def warm_start(model: "AnyUp", path: str | Path) -> list[str]:
    """Copies a checkpoint's weights into a model whose fillers may differ; returns the weights left as they were.

    Only hook points whose filler or settings differ from the checkpoint's may miss weights or ignore some.

    Raises:
        FileNotFoundError, WeightsError: as `load`; or another weight is missing, left over or of another shape.
    """
    state, config = read(path)
    mine = json.loads(json.dumps(model.config))  # as it would come back from a file: lists for tuples
    switched = tuple(f"{hook}." for hook in model.factories if mine[hook] != {**mine[hook], **config[hook]})
    own = model.state_dict()
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(switched) or (name in own and own[name].shape == tensor.shape)
    }
    untouched = [name for name in own if name.startswith(switched) and name not in kept]
    _load_strictly(model, kept | {name: own[name] for name in untouched}, path)
    return untouched


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict of a checkpoint, in this project's names, and its configuration. Raises as `load`."""
    trusted = () if Path(path).suffix == ".safetensors" else _omegaconf_classes()
    state, metadata = read_weights(path, ("anyup", "state_dict", "model"), trusted)
    if metadata.get("format", "").startswith("anyup_lab/"):
        if metadata["format"] != FORMAT:
            raise WeightsError(f"{path} has format {metadata['format']}; this version reads {FORMAT}")
        try:
            return state, json.loads(metadata["config"])
        except (KeyError, ValueError) as error:
            raise WeightsError(f"{path} is damaged: it has no configuration that could be read") from error
    return rename_published(state, path)


def from_published(state: dict[str, Tensor]) -> "AnyUp":
    """The model of a published AnyUp state dict, in eval mode; its feature layer has `ordering: released`.

    Raises:
        WeightsError: not a state dict of AnyUp.
    """
    return _rebuild(*rename_published(state), "the state dict")


def rename_published(state: dict[str, Tensor], path: str | Path = "the state dict") -> tuple[dict[str, Tensor], dict]:
    """A published state dict in this project's names, and the configuration it belongs to.

    Window ratio and number of heads are not in the weights; the published values (0.1, 4) are assumed.
    """
    if _IN_PROJECTION + "weight" not in state or "key_features_encoder.0.basis" not in state:
        found = ", ".join(list(state)[:3])
        raise WeightsError(f"{path} is not an AnyUp checkpoint: it has {len(state)} tensors such as {found}")
    try:
        return _renamed(state), _published_config(state)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is no AnyUp checkpoint: {type(error).__name__}: {error}") from error


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        if name == _IN_PROJECTION + "weight":
            renamed["attention.project_query.weight"], renamed["attention.project_key.weight"], _ = tensor.chunk(3)
        elif name == _IN_PROJECTION + "bias":
            renamed["attention.project_query.bias"] = tensor.chunk(3)[0]
        elif not name.startswith(_OUT_PROJECTION):
            prefix = next((old for old in _RENAMES if name.startswith(old)), "")
            renamed[_RENAMES.get(prefix, "") + name[len(prefix) :]] = tensor
    return renamed


def _published_config(state: dict[str, Tensor]) -> dict:
    num_basis, _, kernel_size, _ = state["key_features_encoder.0.basis"].shape
    return {
        "embed_dim": len(state["image_encoder.0.weight"]),
        "seed": 0,
        "unifier": {
            "name": "learned_basis",
            "num_basis": num_basis,
            "kernel_size": kernel_size,
            "ordering": "released",
        },
        "attention": {"name": "window", "num_heads": 4, "window_ratio": 0.1},
    } | {hook: {"name": "none"} for hook in ("decoder", "refiner", "temporal")}


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our baseline state dict under the published names; what has no counterpart here becomes zeros."""
    published = {}
    for name, tensor in state.items():
        prefix = next((new for new in _RENAMES.values() if name.startswith(new)), "")
        old = next((old for old, new in _RENAMES.items() if new == prefix), "")
        if not name.startswith("attention.project_"):
            published[old + name[len(prefix) :]] = tensor
    query, key = state["attention.project_query.weight"], state["attention.project_key.weight"]
    bias = state["attention.project_query.bias"]
    zeros = torch.zeros_like(bias)
    published[_IN_PROJECTION + "weight"] = torch.cat([query, key, torch.zeros_like(key)])
    published[_IN_PROJECTION + "bias"] = torch.cat([bias, zeros, zeros])
    published[_OUT_PROJECTION + "weight"], published[_OUT_PROJECTION + "bias"] = torch.zeros_like(key), zeros
    return published


def _rebuild(state: dict[str, Tensor], config: dict, path: str | Path) -> "AnyUp":
    from core.compose import from_config

    try:
        model = from_config(config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{path}: no model can be built from its configuration ({error})") from error
    _load_strictly(model, state, path)
    return model.eval()


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


def _load_strictly(model: "AnyUp", state: dict[str, Tensor], path: str | Path) -> None:
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
