"""Small files with the weights that an adaptation changed; each names its base by the hash of the base's content.

A delta holds the new values of the tensors that differ, so that base and delta give the adapted model bit for bit.
`core.save_delta` writes one, and `core.load` reads it like a checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.hooks import MODEL_HOOKS
from core.registry import changeable, choices, describe
from core.weight_files import WeightsError

DELTA_FORMAT = "anyup_lab_delta/1"


def content_hash(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's weights and of the settings they depend on, whatever the kind and dtype of the file."""
    digest = hashlib.sha256(json.dumps(_fixed(config), sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def difference(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    base_state: Mapping[str, Tensor],
    base_config: Mapping[str, Any],
    base: str | Path,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model and its base -> the changed tensors, and the metadata of the delta's file.

    Raises:
        ValueError: the model has other fillers, settings or weights than the base; names what to do instead.
    """
    same = {name: t.shape for name, t in state.items()} == {name: t.shape for name, t in base_state.items()}
    if not same or _fixed(config) != _fixed(base_config):
        raise ValueError(
            f"a delta keeps changed weights only, and this model has other fillers, settings or weights than {base}: "
            "save it whole, core.save(model, FILE), or name the base that it was adapted from"
        )
    changed = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if not torch.equal(tensor.detach().cpu(), base_state[name].to(tensor.dtype))
    }
    path = Path(base).expanduser()
    named = str(path.resolve()) if path.exists() else str(base)
    hashed = content_hash(base_state, base_config)
    return changed, {
        "format": DELTA_FORMAT,
        "base": named,
        "base_sha256": hashed,
        "config": json.dumps(dict(config)),
    }


def patched(
    changed: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    base_state: Mapping[str, Tensor],
    base_config: Mapping[str, Any],
    path: Path,
    base: str | Path,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Base and delta -> state dict and configuration of the adapted model; `path` and `base` are for errors.

    Raises:
        WeightsError: the base is another one than the delta was made from, or the delta is damaged.
    """
    found, wanted = content_hash(base_state, base_config), metadata.get("base_sha256", "")
    if found != wanted:
        raise WeightsError(
            f"{path} was made from {metadata.get('base')} (content {wanted[:12]}...), and {base} is another model "
            f"(content {found[:12]}...): give the base that it was made from, core.load(BASE, {{'delta': FILE}})"
        )
    if unknown := sorted(changed.keys() - base_state.keys()):
        raise WeightsError(f"{path} is damaged: its base has no weight {unknown[0]}; save the delta again")
    try:
        return {**base_state, **changed}, json.loads(metadata["config"])
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: its configuration cannot be read; save the delta again") from error


def base_of(metadata: Mapping[str, str], path: Path, names: Mapping[str, object]) -> str | Path:
    """Where the base of a delta is: a known name, its file where it was, or a file of that name beside the delta.

    Raises:
        FileNotFoundError: in none of these places.
    """
    base = metadata.get("base", "")
    beside = path.with_name(Path(base).name)
    for place in (base, beside):
        if str(place) in names or Path(place).exists():
            return place
    raise FileNotFoundError(
        f"{path} changes weights of {base} (content {metadata.get('base_sha256', '')[:12]}...), which is not there: "
        f"put {beside.name} beside it, or give the base: core.load(BASE, {{'delta': FILE}}), or in a "
        "configuration {checkpoint: BASE, delta: FILE}"
    )


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that weights depend on and that are not defaults, so that a setting added later changes nothing."""
    kept: dict[str, Any] = {"embed_dim": config["embed_dim"]}
    for hook in MODEL_HOOKS:
        node = json.loads(json.dumps(config[hook]))
        cls = choices(hook).get(node["name"])
        defaults = {} if cls is None else json.loads(json.dumps(describe(cls), default=str))
        free = changeable(hook, node["name"])
        kept[hook] = {"name": node["name"]} | {
            key: value for key, value in node.items() if value != defaults.get(key) and f"{hook}.{key}" not in free
        }
    return kept
