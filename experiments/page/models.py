"""What the page offers, and the models that are chosen; read from the registry, so new fillers are offered too."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

import core
from core import checkpoint
from core.backbones import CHOICES, Backbone, backbone_from_config
from core.compose import arguments
from core.hooks import MODEL_HOOKS
from core.registry import choices, signature_fields
from experiments.settings import SettingError

Setting = bool | int | float | str
"""Of a filler; text is the name of an Enum's member."""


@dataclass(frozen=True)
class Variant:
    """A model: a checkpoint, with other fillers in it."""

    checkpoint: str
    """A source as for `core.load`."""
    fillers: tuple[tuple[str, str, tuple[tuple[str, Setting], ...]], ...] = ()
    """(hook point, name, settings); others are those of the checkpoint."""


def label(variant: Variant) -> str:
    """What is not as in the checkpoint, such as `attention=global, temperature=2.0`; else the checkpoint."""
    config, parts = described(variant.checkpoint), []
    for hook, name, settings in variant.fillers:
        known = config[hook] if config[hook]["name"] == name else {}
        if not known:
            parts.append(f"{hook}={name}")
            known = {key: default for key, (_, default) in settings_of(hook, name).items()}
        parts += [f"{key}={value}" for key, value in settings if value != known[key]]
    return ", ".join(parts) or Path(variant.checkpoint).name


@lru_cache(6)
def build(variant: Variant) -> tuple[core.AnyUp, tuple[str, ...]]:
    """The model on the CPU in eval mode, and the names of its weights that the checkpoint does not have.

    Raises:
        WeightsError, OSError: the checkpoint cannot be used. ValueError, ModuleNotFoundError: a filler refuses its
            settings, or a package is missing.
    """
    config = described(variant.checkpoint)
    for hook, name, settings in variant.fillers:
        known = config[hook] if config[hook]["name"] == name else {"name": name}
        config[hook] = known | dict(settings)
    model = core.AnyUp(**arguments(config))
    return model.eval(), tuple(core.warm_start(model, variant.checkpoint))


def described(source: str) -> dict[str, Any]:
    """The configuration of a checkpoint, as a new dict. Raises: as `build`."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in _read(source).items()}


@lru_cache(8)
def _read(source: str) -> dict[str, Any]:
    return checkpoint.read(source)[1]


def offered(hook: str) -> list[str]:
    """The fillers of a hook point by name; `none` and the baseline first."""
    return list(choices(hook))


def purpose(hook: str, name: str) -> str:
    """The first line of a filler's docstring, without the reference to what cannot be seen on the page."""
    return (choices(hook)[name].__doc__ or "").strip().partition("\n")[0].partition("; see the module")[0]


def settings_of(hook: str, name: str) -> dict[str, tuple[type, Setting]]:
    """The settings of a filler that the page offers: setting -> (type, default).

    These are amounts, switches and choices. Whole numbers are offered only if they may change after training: the
    others are sizes of weights. Text is not offered: it could be the path of a file.
    """
    cls, found = choices(hook)[name], {}
    for key, (kind, default) in signature_fields(cls).items():
        is_choice = isinstance(kind, type) and issubclass(kind, Enum)
        if default != MISSING and (kind in (bool, float) or is_choice or (kind is int and key in cls.changeable)):
            found[key] = (kind, default.name if is_choice else default)
    return found


def bound(default: Setting) -> float:
    """The largest value that the page takes for a number: enough to see what it does, too little to fill the memory."""
    return 4 * max(1, abs(default))


class Encoders:
    """The encoders of the page by the name that is shown.

    Args:
        nodes: `{name, weights, model}` of each, as in the group `backbone`; None: all that need no download.

    Raises:
        SettingError: none, or one that has no name or is there twice.
    """

    def __init__(self, nodes: list[Mapping[str, Any]] | None):
        if nodes is None:
            nodes = [{"name": name} for name, choice in CHOICES.items() if choice.file or choice.kind in _CLASSICAL]
        self.nodes: dict[str, Mapping[str, Any]] = {}
        for node in nodes:
            if not isinstance(node, dict | DictConfig) or "name" not in node:
                raise SettingError(f"backbones has {node!r}: each is {{name: NAME}}, or {{name: NAME, weights: FILE}}")
            shown = str(node.get("model") or node["name"])
            if shown in self.nodes:
                raise SettingError(f"backbones names {shown} twice: leave out one")
            self.nodes[shown] = OmegaConf.to_container(node) if isinstance(node, DictConfig) else node
        if not self.nodes:
            raise SettingError("backbones is empty: give at least one, such as backbones=[{name: embedded}]")
        self._kept: dict[str, Backbone] = {}

    @property
    def names(self) -> list[str]:
        """In the order in which they are offered."""
        return list(self.nodes)

    def get(self, name: str) -> Backbone:
        """The encoder, built when it is first asked for. Raises: as `core.load_backbone`."""
        if name not in self._kept:
            self._kept[name] = backbone_from_config(self.nodes[name])
        return self._kept[name]


_CLASSICAL = ("hog", "daisy")


def untrained(names: tuple[str, ...]) -> str:
    """What to say of weights that a checkpoint does not have; empty: it has all."""
    if not names:
        return ""
    hooks = sorted({name.partition(".")[0] for name in names}, key=MODEL_HOOKS.index)
    return f"The weights of {', '.join(hooks)} are not trained: {len(names)} tensors are not in the checkpoint."
