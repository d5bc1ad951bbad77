"""A leaderboard: one sweep per encoder, all with the same methods, and the methods that are trained here trained alike.

`configs/leaderboard.yaml` names encoders and methods. A method for any encoder is trained once, on all `encoders`. A
method for one encoder (`channels` or `encoder` among its settings) is trained once for each of them, with the same
budget. Neither is trained on the `unseen` ones, where a method for one encoder therefore cannot enter. All sweeps share
one folder of members, so nothing is trained or measured twice, and a killed board goes on when it is run again.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from omegaconf import DictConfig, ListConfig, OmegaConf

from core.backbones import Backbone, backbone_from_config
from core.registry import signature_fields
from experiments.peers import Peer, named_peers, peer_from_config, peers
from experiments.reports.results import Board, Results
from experiments.settings import SettingError, check_once
from experiments.sweeps.arms import composed, read_arm, standalone, strings
from experiments.sweeps.sweep import Sweep, ablate, check_resolves

log = logging.getLogger(__name__)

NEEDS_TRAINING = "needs training"
_POLL_S = 1.0


@dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder of the board."""

    node: Mapping[str, str | None]
    """{name, weights, model}, as in `backbones` of a training."""
    unseen: bool
    """Whether no method is trained on it here."""

    @property
    def name(self) -> str:
        return str(self.node["name"])

    @cached_property
    def backbone(self) -> Backbone:
        """Raises SettingError: it is unknown, or its weights cannot be used."""
        try:
            return backbone_from_config(self.node)
        except (ValueError, OSError) as error:
            raise SettingError(f"encoder {self.name}: {str(error).splitlines()[0]}") from error

    @property
    def overrides(self) -> list[str]:
        """For `experiments.evaluate`."""
        chosen = {"" if key == "name" else f".{key}": value for key, value in self.node.items()}
        return [f"backbone{key}={_text(value)}" for key, value in chosen.items()]


def board(config: DictConfig, leads: bool = True) -> Board | None:
    """Does the missing work of all sweeps, together with other processes that do the same.

    Args:
        leads: waits until all is measured; else it only helps, and gives None.

    Raises:
        SettingError, DataError, TrackingUnavailable: raised before anything is computed.
        SweepError, ScoreError: the baseline failed, or results contradict each other.
    """
    if OmegaConf.is_missing(config, "baseline"):
        raise SettingError("baseline has no value: give one of arms, such as baseline=bundled")
    check_resolves(config)
    config = standalone(config)
    found, absent, sweeps = encoders_of(config), {}, []
    for encoder in found:
        one, missing = sweep_of(config, encoder, found)
        sweeps.append((encoder, one))
        absent |= {(encoder.name, method): reason for method, reason in missing.items()}
    for _, one in sweeps:
        Sweep(one)  # to find errors before anything is computed
    results: dict[str, Results] = {}
    for encoder, one in sweeps:
        log.info("encoder %s", encoder.name)
        while (report := ablate(one)) is None and leads:
            time.sleep(_POLL_S)  # a process that helps writes the report of this sweep
        if report is not None:
            results[encoder.name] = report.results
            absent |= {(encoder.name, arm): f"failed: {reason}" for arm, reason in report.results.failures.items()}
    return _joined(config, found, results, absent) if leads else None


def encoders_of(config: DictConfig) -> list[Encoder]:
    """The encoders of a board, those that methods are trained on first.

    Raises:
        SettingError: none, a node that is none, or one name twice.
    """
    found = []
    for key in ("encoders", "unseen"):
        nodes = OmegaConf.to_container(config[key], resolve=True)
        if not isinstance(nodes, list) or not all(isinstance(node, dict) and "name" in node for node in nodes):
            raise SettingError(f"{key} must be a list such as [{{name: vit_tiny16, weights: FILE}}], got {nodes}")
        found += [Encoder(node, key == "unseen") for node in nodes]
    if all(encoder.unseen for encoder in found):
        raise SettingError("encoders is empty: give at least one, such as encoders=[{name: embedded}]")
    check_once("encoders and unseen", [encoder.name for encoder in found])
    return found


def sweep_of(config: DictConfig, encoder: Encoder, found: list[Encoder]) -> tuple[DictConfig, dict[str, str]]:
    """The sweep of one encoder (configs/ablate.yaml), and the methods that it leaves out, with the reason.

    Raises:
        SettingError: an unknown method, a list that is none, or a setting without a value.
    """
    made = composed("ablate", [])
    OmegaConf.set_struct(made, False)
    arms, absent = {}, {}
    for name in config.arms or {}:
        node = config.arms[name]
        reason = _other_encoder(node, encoder) if isinstance(node, DictConfig) else ""
        if reason:
            absent[name] = reason
        else:
            arms[name] = node if isinstance(node, DictConfig) else [*strings(config, "arms", name), _on(found)]
    made.name, made.device, made.start = f"{config.name}_{encoder.name}", config.device, config.start
    made.out_dir, made.members_dir = f"{config.out_dir}/{encoder.name}", f"{config.out_dir}/members"
    made.train, made.seeds, made.confidence = strings(config, "train"), list(config.seeds), config.confidence
    made.baseline, made.ceilings, made.worker = config.baseline, list(config.ceilings), config.worker
    made.evaluate = strings(config, "evaluate")
    for name, overrides in _trained(config, encoder, found):
        if isinstance(overrides, str):
            absent[name] = overrides
        elif reason := _refused(name, overrides, made) if config.trained is None else "":
            absent[name] = reason
        else:
            arms[name] = overrides
    made.arms = arms
    made.peers = {name: node for name, node in named_peers(config.peers).items() if not _other_encoder(node, encoder)}
    absent |= {name: _other_encoder(node, encoder) for name, node in named_peers(config.peers).items()
               if name not in made.peers}  # fmt: skip
    made.tasks = {name: [*overrides, *encoder.overrides] for name, overrides in tasks_of(config)[0].items()}
    cost = {"channels": encoder.backbone.channels, "patch": encoder.backbone.patch_size}
    made.cost = None if config.cost is None else {**config.cost, **cost}
    made.tracking = config.tracking
    return made, absent


def tasks_of(config: DictConfig) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Task -> overrides of experiments.evaluate, and tasks that are left out -> the setting that they lack.

    A task that is null is one that a recipe takes out of another one.

    Raises:
        SettingError: as `strings`; a setting of `tasks_with` that there is not, or one task twice.
    """
    named = [name for name, overrides in (config.tasks or {}).items() if overrides is not None]
    found, left_out = {name: strings(config, "tasks", name) for name in named}, {}
    for setting, of_setting in (config.get("tasks_with") or {}).items():
        if setting not in config:
            raise SettingError(f"tasks_with.{setting}: there is no setting {setting}: add +{setting}=PATH")
        for name in of_setting:
            if name in found or name in left_out:
                raise SettingError(f"two tasks are called {name}: give each a name of its own")
            if config[setting] is None:
                left_out[name] = setting
            else:
                found[name] = strings(config, "tasks_with", setting, name)
    return found, left_out


def _trained(config: DictConfig, encoder: Encoder, found: list[Encoder]) -> Iterator[tuple[str, list[str] | str]]:
    """Each peer that is trained here -> its overrides of experiments.train, or why it cannot enter."""
    known = {name: cls for name, cls in peers().items() if _is_trainable(cls)}
    asked = known if config.trained is None else config.trained
    if not isinstance(asked, dict | ListConfig):
        raise SettingError(f"trained must be null, or a list of peers such as [naf, jafar], got {asked}")
    for name in asked:
        if name not in known:
            raise SettingError(f"trained={name} is no peer that can be trained; there are: {', '.join(known)}")
    for name in config.settings or {}:
        if name not in known:
            raise SettingError(f"settings.{name} is no peer that can be trained; there are: {', '.join(known)}")
    for name in asked:
        fields = signature_fields(known[name])
        of_one = "channels" in fields or "encoder" in fields
        if of_one and encoder.unseen:
            yield name, NEEDS_TRAINING
            continue
        own = {"channels": encoder.backbone.channels, "patch": encoder.backbone.patch_size, "any_size": "true"}
        own |= {"encoder": encoder.name, "encoder_weights": encoder.node.get("weights")}
        overrides = [f"peer={name}", *(f"peer.{key}={_text(value)}" for key, value in own.items() if key in fields)]
        further = strings(config, "settings", name) if name in (config.settings or {}) else []
        yield name, [*overrides, *further, _on([encoder] if of_one else found)]


def _is_trainable(cls: type[Peer]) -> bool:
    return "weights" in signature_fields(cls) and not cls.optimises


def _refused(name: str, overrides: list[str], sweep: DictConfig) -> str:
    """Why a peer that nobody named cannot be trained on an encoder; empty: it can."""
    try:
        read_arm(name, overrides, sweep)
    except SettingError as error:
        log.warning("%s", error)
        return f"refused: {error}"
    return ""


def _other_encoder(node: object, encoder: Encoder) -> str:
    """Why a peer with weights cannot enter; empty: it can, or what is wrong with it is found where it is read."""
    if isinstance(node, str) or "peer" not in node:
        return ""
    channels = peer_from_config({key: value for key, value in node.items() if key != "blur"}).channels
    if channels in (None, encoder.backbone.channels):
        return ""
    return f"{NEEDS_TRAINING}: its weights take {channels} channels, {encoder.name} has {encoder.backbone.channels}"


def _on(found: list[Encoder]) -> str:
    """The override of a training's encoders."""
    nodes = (", ".join(f"{key}: {_text(value)}" for key, value in one.node.items()) for one in found if not one.unseen)
    return f"backbones=[{', '.join(f'{{{node}}}' for node in nodes)}]"


def _text(value: object) -> str:
    """A value as Hydra reads it in an override."""
    if value is None:
        return "null"
    text = str(value)
    return text if text.replace("_", "").isalnum() else '"' + text.replace('"', '\\"') + '"'


def _joined(
    config: DictConfig, found: list[Encoder], results: Mapping[str, Results], absent: dict[tuple[str, str], str]
) -> Board:
    kinds: dict[str, str] = {}
    for one in results.values():
        kinds = one.plan.kinds | kinds
    trainable = [name for name, cls in peers().items() if _is_trainable(cls)]
    trained = trainable if config.trained is None else config.trained
    kinds |= {name: "trained" for name in trained if name not in kinds}
    kinds |= {name: "peer" for _, name in absent if name not in kinds}
    costs = [one.costs.assign(encoder=name) for name, one in results.items() if one.costs is not None]
    return Board(
        pd.concat([one.scores for one in results.values()], ignore_index=True),
        kinds,
        {encoder.name: encoder.unseen for encoder in found},
        absent,
        tasks_of(config)[1],
        pd.concat(costs, ignore_index=True) if costs else None,
        list(dict.fromkeys(f"{name}: {note}" for name, one in results.items() for note in one.notes)),
    )
