"""A peer trained in AnyUp's place: `peer=NAME` in a training's configuration, `peer.SETTING=...` for its settings.

Data, objective, learner and optimiser stay; the model's settings (unifier, attention, ...) belong to AnyUp and are
refused. What is written loads again as the peer `{peer: NAME, weights: FILE}`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

import core
from core.backbones import Backbone
from core.hooks import MODEL_HOOKS
from core.registry import signature_fields
from experiments.peers import Peer, peer_from_config, peer_identity, peers
from experiments.settings import SettingError
from experiments.training.views import ViewSettings

OF_ANYUP = (*MODEL_HOOKS, "embed_dim", "compile", "check_finite", "init_from")
"""Settings of a training that describe AnyUp."""


def peer_node(config: DictConfig | None) -> dict[str, Any] | None:
    """The peer that a training trains, `{peer: NAME, SETTING: VALUE, ...}`; None: AnyUp, or nothing.

    Settings at their default are left out, so that with `weights` they are as in the training that wrote these.
    """
    if config is None or config.get("peer") is None:
        return None
    values = OmegaConf.to_container(config.peer, resolve=True, enum_to_str=True)
    if not isinstance(values, dict) or values.get("name") not in peers():
        return {"peer": values.get("name") if isinstance(values, dict) else values}  # refused where it is made
    name = values.pop("name")
    defaults = {key: default for key, (_, default) in signature_fields(peers()[name]).items()}
    kept = {key: value for key, value in values.items() if value != defaults.get(key, value)}
    return {"peer": name, **kept}


def without_anyup(settings: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training that count when it trains a peer, which counts by its settings and its file's content.

    Raises:
        SettingError: as `peer_identity`.
    """
    kept = {key: value for key, value in settings.items() if key not in OF_ANYUP}
    return kept | {"peer": peer_identity(node)}


def not_of_anyup(overrides: Sequence[str]) -> list[str]:
    """Overrides of a training without those of AnyUp's settings."""
    return [one for one in overrides if one.lstrip("+").partition("=")[0].partition(".")[0] not in OF_ANYUP]


def new_peer(node: dict[str, Any], config: DictConfig) -> Peer:
    """The peer to train, with new weights, or to go on from those of its file.

    Raises:
        SettingError: there is nothing to train, a setting of AnyUp is changed, or as `peer_from_config`.
    """
    name, usual = node["peer"], core.compose()
    changed = [key for key in OF_ANYUP if config.get(key) != usual.get(key)]
    if changed:
        instead = "; peer.weights=FILE starts from its weights" if "init_from" in changed else ""
        raise SettingError(f"peer={name} is trained in the place of AnyUp: leave out {', '.join(changed)}{instead}")
    peer = peer_from_config(node, config.seed)
    if not any(weight.requires_grad for weight in peer.parameters()):
        raise SettingError(f"peer={name} has no weights to train")
    return peer


def check_fits(model: nn.Module, backbones: Sequence[Backbone], views: ViewSettings) -> None:
    """Refuses a peer that cannot take the features of a training, or cannot give outputs of the targets' size.

    Raises:
        SettingError: names the setting.
    """
    if not isinstance(model, Peer):
        return
    for backbone in backbones:
        if model.channels not in (None, backbone.channels):
            raise SettingError(
                f"peer={model.choice} takes features of {model.channels} channels, and backbone {backbone.name} has "
                f"{backbone.channels}: set peer.channels={backbone.channels}, or choose the backbone it was made for"
            )
    other = [grid.scale for grid in views.grids if model.factor not in (None, grid.scale)]
    if other and not model.any_size:
        raise SettingError(
            f"peer={model.choice} enlarges {model.factor} times, and the targets are {other[0]} times finer: set "
            f"views.scale={model.factor}, or peer.any_size=true if it has that setting"
        )


def save_model(model: nn.Module, path: Path, learner: core.Learner) -> None:
    """Writes a checkpoint, of AnyUp with its learner or of a peer, atomically; raises as `core.save`."""
    model.save(path) if isinstance(model, Peer) else core.save(model, path, learner=learner)


def trained_peer(node: dict[str, Any], path: Path) -> Peer:
    """The peer that a training wrote to `path`.

    Raises:
        SettingError: as `peer_from_config`.
    """
    return peer_from_config({"peer": node["peer"], "weights": str(path)})
