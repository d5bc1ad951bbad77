"""Reads the arms of a sweep (`configs/ablate.yaml`), and checks them before anything is computed."""

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

import core
from core import checkpoint
from core.hooks import HOOK_POINTS
from core.nearest import in_one_line
from core.registry import discover
from core.weight_files import content_digest
from experiments.data.code_version import code_version
from experiments.data.identity import digest_of, files_of, fingerprint_of
from experiments.measuring.tasks import Ceiling, tasks
from experiments.measuring.upsamplers import Blurred, checkpoint_and_changes
from experiments.peers import named_peers, peer_from_config, peer_identity, peers
from experiments.peers.base import PeerNode
from experiments.settings import SettingError, one_number
from experiments.training.peers import not_of_anyup, peer_node, trained_peer
from experiments.training.setup import deciding_settings, make_model

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"
STARTS = {"bundled": "bundled", "published": "anyup_multi_backbone"}
"""What `start=` calls some checkpoints; all other names are theirs."""
_NAME = re.compile(r"[A-Za-z0-9][\w.+=,\- ]*")


@dataclass(frozen=True)
class Arm:
    """One row of the tables."""

    name: str
    kind: str
    """trained, or checkpoint, peer, ceiling, which are the same for all seeds."""
    training: DictConfig | None = None
    """For a trained arm: its configuration of experiments.train; seed and out_dir do not matter."""
    checkpoint: Path | None = None
    changes: Mapping[str, object] = field(default_factory=dict)
    """Of a checkpoint's settings and fillers, as `core.load` takes them."""
    peer: PeerNode | None = None
    """For a peer: NAME, or with settings and weights `{peer: NAME, SETTING: VALUE, ...}`."""
    blur: float = 0.0
    """Width, in cells of the features, of a Gaussian over the output of a checkpoint or peer; 0: none."""

    @property
    def competes(self) -> bool:
        """Whether the arm gets a verdict; peers and ceilings are references."""
        return self.kind in ("trained", "checkpoint")

    def key(self, seed: int) -> str:
        """Digest of everything that the arm's results with this seed depend on, except the evaluation."""
        if self.training is not None:
            settings = deciding_settings(self.training) | {"seed": seed}
            known = {"settings": settings, "data": fingerprint_of(self.training.data), "files": files_of(settings)}
        elif self.peer is not None:
            known = {"peer": peer_identity(self.peer)}
        else:
            known = {"name": self.name, "file": content_digest(self.checkpoint) if self.checkpoint else ""}
            known |= {"changes": dict(self.changes)} if self.changes else {}
            if "delta" in self.changes:
                known["delta"] = content_digest(checkpoint.find(self.changes["delta"]))
        known |= {"blur": self.blur} if self.blur else {}
        return digest_of({"kind": self.kind, "code": self._code} | known)

    @cached_property
    def _code(self) -> str:
        if self.peer is not None:
            return code_version(classes=[peers()[peer_identity(self.peer)["name"]]])
        config = self.training
        if node := peer_node(config):
            used = [(hook, config[hook]["name"]) for hook in ("objective", "learner")]
            return code_version(used, [peers()[node["peer"]]])
        if self.checkpoint is not None:
            with suppress(core.WeightsError, OSError):  # the arm fails with this error when it is measured
                changes = {key: value for key, value in self.changes.items() if key != "delta"}
                config = checkpoint.changed(checkpoint.read(self.checkpoint)[1], changes)
        return code_version([(hook, config[hook]["name"]) for hook in HOOK_POINTS if hook in config] if config else [])

    def model(self, trained: Path | None = None) -> nn.Module | Ceiling:
        """The upsampler: from the checkpoint `trained` or the arm's own, or the peer or ceiling.

        Raises:
            WeightsError, OSError: the checkpoint cannot be used.
        """
        model = self._unblurred(trained)
        return Blurred(model, self.blur) if self.blur else model

    def _unblurred(self, trained: Path | None) -> nn.Module | Ceiling:
        if self.peer is not None:
            return peer_from_config(self.peer)
        if self.kind == "ceiling":
            return Ceiling(self.name)
        if node := peer_node(self.training):
            return trained_peer(node, trained)
        return core.load(trained or self.checkpoint, self.changes).eval()


def read_arms(config: DictConfig) -> list[Arm]:
    """All arms of a sweep: those of `arms` and `product`, then `peers`, then `ceilings`.

    Raises:
        SettingError: there are no arms, two arms have one name or the same training, the baseline is missing, an
            override is unknown, a peer is unknown or cannot be made, or a file is missing.
    """
    check_names("arms", "product", "peers")
    arms = [read_arm(name, value, config) for name, value in _named(config).items()]
    if not arms:
        raise SettingError(
            "there are no arms: add '+arms={NAME: [OVERRIDE, ...], ...}', or '+product={KEY: [VALUE, ...], ...}'"
        )
    arms += [_peer(name, node) for name, node in named_peers(config.peers).items()]
    for name in config.ceilings:
        if name not in ceilings():
            raise SettingError(f"ceilings={name} is not a ceiling; there are: {', '.join(ceilings())}")
        arms.append(Arm(name, "ceiling"))
    names = [arm.name for arm in arms]
    if twice := ", ".join(sorted({name for name in names if names.count(name) > 1})):
        raise SettingError(f"two arms are called {twice}: arms, product, peers and ceilings share their names")
    if config.baseline not in [arm.name for arm in arms if arm.competes]:
        raise SettingError(f"baseline={config.baseline} is not an arm; there are: {', '.join(names)}")
    _check_distinct(arms)
    return arms


def composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """Composes a configuration of `configs/` as a command line does. Of two overrides of one key the later wins.

    Raises:
        SettingError: with Hydra's message about an override.
    """
    last = {override.partition("=")[0].lstrip("+"): override for override in overrides}
    discover()  # Hydra needs all choices before it composes
    try:
        if GlobalHydra.instance().is_initialized():
            return compose(name, list(last.values()))
        with initialize_config_dir(str(CONFIGS), version_base=None):
            return compose(name, list(last.values()))
    except (HydraException, OmegaConfBaseException) as error:
        raise SettingError(in_one_line(error)) from error


def strings(config: DictConfig, *path: str) -> list[str]:
    """The overrides in a list of the configuration, which may refer to other lists and to settings.

    Raises:
        SettingError: it refers to a setting without a value, or is not a list of strings.
    """
    name, node = ".".join(path), config
    try:
        for key in path:
            node = node[key]
        values = [] if node is None else _flat(node)
    except OmegaConfBaseException as error:
        raise SettingError(f"{name}: {str(error).splitlines()[0]}; give it a value") from error
    if not all(isinstance(value, str) for value in values):
        raise SettingError(f"{name} must be a list of overrides, such as [attention=global], got {values}")
    return values


def _flat(node: object) -> list[object]:
    return [value for inner in node for value in _flat(inner)] if isinstance(node, ListConfig) else [node]


def check_names(*keys: str) -> None:
    """Refuses a name that occurs twice in a mapping on the command line, of which Hydra would silently use the last.

    Raises:
        SettingError: names it.
    """
    for override in HydraConfig.get().overrides.task if HydraConfig.initialized() else ():
        key, _, text = override.partition("=")
        names = _top_names(text) if key.lstrip("+") in keys else []
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise SettingError(f"{key.lstrip('+')} names {', '.join(twice)} twice: give each a name of its own")


def _top_names(text: str) -> list[str]:
    """The keys of a mapping as Hydra writes it, `{key: value, ...}`, without those of mappings inside it."""
    names, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        if depth == 1 and letter == ":" and start:
            names.append(text[start:position].strip(" '\""))
            start = 0
        depth += (letter in "[{") - (letter in "]}")
        if depth == 1 and letter in "{,":
            start = position + 1
    return names


def standalone(node: DictConfig) -> DictConfig:
    """A copy of a part of a configuration, with all references resolved."""
    return OmegaConf.create(OmegaConf.to_container(node, resolve=True))


def ceilings() -> list[str]:
    """All ceilings that some task can measure."""
    return sorted({name for task in tasks().values() for name in task.ceilings})


def _named(config: DictConfig) -> dict[str, object]:
    """Name -> overrides, {checkpoint: FILE or NAME, ...} or {peer: NAME, ...}. Overrides name the arms of `product`."""
    named: dict[str, object] = {name: config.arms[name] for name in config.arms or {}}
    values: dict[str, list[object]] = {}
    for key, node in dict(config.product or {}).items():
        if not isinstance(node, ListConfig) or not node:
            raise SettingError(f"product.{key} must be a list of at least one value, such as [1, 2], got {node!r}")
        values[key] = list(node)
    for choice in itertools.product(*values.values()) if values else ():
        overrides = [f"{key}={value}" for key, value in zip(values, choice, strict=True)]
        name = ",".join(overrides)
        if name in named:
            raise SettingError(f"two arms are called {name}: one of arms, one of product")
        named[name] = overrides
    return named


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SettingError(f"arm {name!r}: names may only have letters, digits and -_.+=, because they name files")


def _peer(name: str, node: PeerNode, blur: float = 0.0) -> Arm:
    _check_name(name)
    try:
        peer_from_config(node)  # to find errors before anything is computed
    except SettingError as error:
        raise SettingError(f"arm {name}: {error}") from error
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    return Arm(name, "peer", peer=plain, blur=blur)


def read_arm(name: str, value: object, config: DictConfig) -> Arm:
    """One arm, as configs/ablate.yaml describes them: a list of overrides, {checkpoint: FILE, ...}, {peer: NAME, ...}.

    Raises:
        SettingError: names the arm.
    """
    _check_name(name)
    if isinstance(value, DictConfig):
        value, blur = _without_blur(name, value)
        if "peer" in value:
            return _peer(name, value, blur)
        if "checkpoint" not in value:
            raise SettingError(
                f"arm {name} must be a list of overrides, or {{checkpoint: FILE}}, or {{peer: NAME, SETTING: VALUE}}, "
                f"got {value}"
            )
        source, changes = checkpoint_and_changes(value)
        try:
            path = checkpoint.find(source)
        except (core.WeightsError, OSError) as error:
            raise SettingError(f"arm {name}: its {error}") from error
        if changes:
            try:
                core.load(path, changes)
            except ValueError as error:
                raise SettingError(f"arm {name}: {error}") from error
        return Arm(name, "checkpoint", checkpoint=path, changes=changes, blur=blur)
    overrides = value if isinstance(value, list) else strings(config, "arms", name)
    if any(override.lstrip("+").partition("=")[0] == "seed" for override in [*strings(config, "train"), *overrides]):
        raise SettingError(f"arm {name} sets a seed: all arms have the same seeds; set them with seeds=[...]")
    try:
        common = not_of_anyup if _names(overrides, "peer") else list
        asked = [*common(strings(config, "train")), *overrides, f"device={config.device}"]
        training = composed("train", asked)
        if config.start != "scratch" and not _names(asked, "init_from"):
            training = composed("train", [*asked, *started(config.start, training, asked)])
        training.tracking = standalone(config.tracking)
        if training.stop_after is not None:
            raise SettingError("stop_after: a sweep trains to the last step; shorten it with steps=...")
        with torch.random.fork_rng():
            make_model(training)
    except (ValueError, OSError) as error:  # of Hydra, the fillers, or the checkpoint to start from
        raise SettingError(f"arm {name}: {str(error).splitlines()[0]}") from error
    return Arm(name, "trained", training)


def _without_blur(name: str, node: DictConfig) -> tuple[DictConfig, float]:
    """An arm's node without `blur`, and its width."""
    blur = node.get("blur", 0.0)
    if isinstance(blur, bool) or not isinstance(blur, int | float) or not 0 <= blur < float("inf"):
        raise SettingError(f"arm {name}: blur must be a number of cells from 0, got {blur}")
    return OmegaConf.create({key: value for key, value in node.items() if key != "blur"}), float(blur)


def started(start: str, training: DictConfig, asked: Sequence[str]) -> list[str]:
    """Overrides that start a training from trained weights, with the ordering of channels that these were trained with.

    Raises:
        WeightsError, OSError: the checkpoint cannot be read.
    """
    unifier = OmegaConf.to_container(training.unifier, enum_to_str=True)
    source, ordering = STARTS.get(start, start), unifier.get("ordering")
    if ordering is None or _names(asked, "unifier.ordering"):
        if start == "bundled" and ordering == "released":
            source = "bundled_released"
        return [f"init_from={source}"]
    of_weights = checkpoint.read(source)[1]["unifier"].get("ordering", ordering)
    return [f"init_from={source}", f"unifier.ordering={of_weights}"]


def _names(overrides: Sequence[str], key: str) -> bool:
    return any(override.lstrip("+").partition("=")[0] == key for override in overrides)


def _check_distinct(arms: Sequence[Arm]) -> None:
    seen: dict[str, str] = {}
    for arm in arms:
        if arm.training is None and arm.peer is None:
            continue
        known = peer_identity(arm.peer) if arm.peer is not None else deciding_settings(arm.training)
        settings = json.dumps(one_number([arm.kind, known, arm.blur]), sort_keys=True)
        if settings in seen:
            raise SettingError(
                f"arms {seen[settings]} and {arm.name} are the same {'training' if arm.training else 'peer'}, which "
                "would be measured twice: leave one out"
            )
        seen[settings] = arm.name
