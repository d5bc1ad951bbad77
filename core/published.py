"""AnyUp's published weights: their URLs and hashes, and the mapping of their parameter names to ours.

Wimmer et al., AnyUp: Universal Feature Upsampling, arXiv 2510.12764. The weights are theirs, under CC-BY-4.0.
"""

import hashlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.weight_files import WeightsError, outer_names


@dataclass(frozen=True)
class Published:
    """Weights that AnyUp's authors published (CC-BY-4.0): credit them where you use or pass them on."""

    url: str
    sha256: str
    trained_on: str


_RELEASES = "https://github.com/wimmerth/anyup/releases/download"
PUBLISHED = {
    "anyup_paper": Published(
        f"{_RELEASES}/checkpoint/anyup_paper.pth",
        "9d035c0f27114a6f32bdd3d8ed93b6cd39dad4b8f8bf94e69fddbfbf022901b2",
        "DINOv2 ViT-S/14",
    ),
    "anyup_multi_backbone": Published(
        f"{_RELEASES}/checkpoint_v2/anyup_multi_backbone.pth",
        "b6cc407da8986c7e5c9098e61f7531767a9aca8fff20a1bc6c99d488e61aac59",
        "five backbones",
    ),
}
"""Name -> weights; each file has 3.5 MB."""

# Published parameter name -> ours. The value and output projections and the key bias of the published attention do
# not change its result, and have no counterpart here.
_RENAMES = {
    "rope.": "rotary.",
    "key_features_encoder.": "unifier.encoder.",
    "cross_decode.conv2d.": "attention.conv.",
    "cross_decode.cross_attn.norm_q.": "attention.norm_query.",
    "cross_decode.cross_attn.norm_k.": "attention.norm_key.",
}
_IN_PROJECTION = "cross_decode.cross_attn.attention.in_proj_"
_OUT_PROJECTION = "cross_decode.cross_attn.attention.out_proj."


def fetch(name: str) -> Path:
    """Path of the published weights `name` in torch.hub's cache; downloads them from the authors' release once.

    Raises:
        OSError: they are not in the cache and cannot be downloaded; the message says how to use your own file.
        WeightsError: the downloaded or cached file is not the published one. A wrong download is deleted.
    """
    known = PUBLISHED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", Path(known.url).name)
    if not path.is_file():
        _download(name, known, path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != known.sha256:
        raise WeightsError(
            f"{path} is not the published {name} (sha256 {found[:12]}..., not {known.sha256[:12]}...): delete it, then "
            "it will be downloaded again"
        )
    return path


def _download(name: str, known: Published, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(known.url, str(path), hash_prefix=known.sha256, progress=False)
    except (OSError, HTTPException) as error:
        raise OSError(
            f"{name}: {known.url} cannot be downloaded ({type(error).__name__}): go online, put the file at {path}, or "
            "give its path instead of the name"
        ) from error
    except RuntimeError as error:  # torch found a wrong hash, and has deleted what it downloaded
        raise WeightsError(
            f"{name}: the file from {known.url} is not the published one (its sha256 must begin with "
            f"{known.sha256[:12]}), and was deleted. Try again, or give the path of a file that you have"
        ) from error


def is_published(state: dict[str, Tensor]) -> bool:
    """Whether a state dict has the published parameter names."""
    return _IN_PROJECTION + "weight" in state and "key_features_encoder.0.basis" in state


def rename_published(
    state: dict[str, Tensor], path: str | Path = "the state dict"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Converts a published state dict -> state dict with this project's parameter names, configuration.

    Window ratio and number of heads cannot be read from the weights; the published values (0.1, 4) are assumed.

    Raises:
        WeightsError: it is not a published state dict; the message names `path`.
    """
    if not is_published(state):
        found = ", ".join(list(state)[:3])
        raise WeightsError(
            f"{path} is not an AnyUp checkpoint: it has {len(state)} tensors such as {found}"
            + outer_names(state, [_IN_PROJECTION + "weight"])
            + outer_names(state, ["rotary.freqs"])
        )
    try:
        return _renamed(state), _config(state)
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


def _config(state: dict[str, Tensor]) -> dict[str, Any]:
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
    """Converts our baseline state dict to the published names; weights without a counterpart here become zeros."""
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
