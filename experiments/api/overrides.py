"""From Python values to the overrides of a command line, with every name checked first.

    {"decoder": "inr", "decoder.width": 32}                      decoder=inr decoder.width=32
    {"decoder": {"name": "inr", "width": 32}}                    the same
    {"decoder": partial(ImplicitDecoder, width=32)}              the same; the class may be defined in a cell
    {"task": "fidelity", "val_data": {"name": "scenes", "num": 12}, "backbones": ["vit_tiny16"]}

A list of strings is taken as it is: `["decoder=inr", "decoder.width=32"]`.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from os import PathLike
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

from core.hooks import HOOK_POINTS
from core.registry import choices, describe, discover
from experiments.api.names import check_known, unknown
from experiments.sweeps.arms import CONFIGS, composed

Filler = str | type | partial | Mapping[str, Any]
"""One filler: its name, its registered class, a `functools.partial` of that with settings, or {"name": ..., ...}."""
Overrides = Mapping[str, Any] | Sequence[str]
"""Settings of a command, by dotted or nested names; or overrides as on its command line."""
Paths = str | PathLike | Sequence[str | PathLike]
"""Images: a folder, a file, a pattern, the name of a bundled photograph, or several of these."""

_GROUPS = {hook: hook for hook in HOOK_POINTS}
_GROUPS |= {"task": "task", "backbone": "backbone", "peer": "peer", "data": "data", "val_data": "data"}
"""Setting -> the group that it is a choice of."""


def overrides_of(command: str, values: Overrides, where: str, before: Sequence[str] = ()) -> list[str]:
    """The overrides that give `values` to the command `command` (configs/COMMAND.yaml).

    Args:
        values: see above. where: what an error calls them.
        before: further overrides, which may add settings, such as a recipe; not among those that are returned.

    Raises:
        SettingError: an unknown setting or choice (with the nearest valid one), or a value that no setting can have.
        TypeError: `values` is neither a mapping nor a list of strings, or a class is no registered filler.
    """
    if not isinstance(values, Mapping):
        if isinstance(values, str) or not all(isinstance(value, str) for value in values):
            raise TypeError(f"{where} must be a mapping, or a list of overrides such as ['steps=10'], got {values!r}")
        if values:
            _check_strings(command, values, where, before)
        return list(values)
    if not values:
        return []
    settings = {key: described(key, value) for key, value in values.items()}
    for encoder in settings.get("backbones", ()):
        check_known(f"{where}: backbone", filler_name(encoder), choices_of("backbone"))
    chosen = list(_choices(settings, where))
    defaults = composed(command, [*before, *chosen])
    return chosen + [f"{key}={text(value)}" for key, value in _plain(settings, defaults, "", where)]


def choices_of(group: str) -> list[str]:
    """All names of a group of configurations, such as `backbone`; of `experiment`, with those in folders."""
    discover()
    if GlobalHydra.instance().is_initialized():
        return _listed(group)
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return _listed(group)


def paths(images: Paths) -> list[str]:
    """The value of `data.path`."""
    return [str(images)] if isinstance(images, str | PathLike) else [str(path) for path in images]


def text(value: object) -> str:
    """A value as an override has it.

    Raises:
        TypeError: it is no number, text, path, list or mapping.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | PathLike):
        return _quoted(str(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence):
        return f"[{','.join(map(text, value))}]"
    if hasattr(value, "item"):  # a number of NumPy or PyTorch
        return text(value.item())
    raise TypeError(f"a setting cannot be {value!r}, a {type(value).__name__}: give a number, text, list or mapping")


def described(key: str, value: object) -> object:
    """A filler that is given as a class, with or without settings, as a mapping; encoders given by name likewise.

    Raises:
        TypeError: the class is no registered filler, or fills another hook point.
    """
    if key == "backbones":
        return [
            {"name": one} if isinstance(one, str) else one for one in ([value] if isinstance(value, str) else value)
        ]
    if not (inspect.isclass(value) or isinstance(value, partial)):
        return value
    settings = {name: setting for name, setting in describe(value).items() if setting != MISSING}
    cls = value.func if isinstance(value, partial) else value
    if choices(cls.hook)[settings["name"]] is not cls:
        raise TypeError(f"{cls!r} was defined again, or by another cell: give the class that is now {cls.choice}")
    if cls.hook != key:
        raise TypeError(f"{cls.__qualname__} fills {cls.hook}, not {key}: write {{{cls.hook!r}: {cls.__qualname__}}}")
    return settings


def filler_name(filler: Filler) -> object:
    """The name that a filler is registered under, however it is given."""
    known = filler.func if isinstance(filler, partial) else filler
    return known.get("name") if isinstance(known, Mapping) else getattr(known, "choice", known)


def _check_strings(command: str, overrides: Sequence[str], where: str, before: Sequence[str]) -> None:
    """Checks the names in overrides of a command line. What Hydra adds or removes is left to Hydra."""
    settings = dict(override.partition("=")[::2] for override in overrides if override[:1] not in ("+", "~"))
    settings = {key.rpartition("@")[2]: value.strip("'\"") for key, value in settings.items()}
    chosen = list(_choices({key: value for key, value in settings.items() if value != "null"}, where))
    defaults = composed(command, [*before, *chosen])
    for key in settings:
        _default(defaults, key, where)


def _choices(values: Mapping[str, object], where: str) -> Iterator[str]:
    """GROUP=NAME of all settings that are a choice of a group."""
    for key, value in values.items():
        name = filler_name(value) if key in _GROUPS else None
        if name is not None:
            check_known(f"{where}: {key}", name, choices_of(_GROUPS[key]))
            yield f"data@{key}={name}" if key == "val_data" else f"{key}={name}"


def _plain(values: Mapping[str, object], defaults: DictConfig, prefix: str, where: str) -> Iterator[tuple[str, object]]:
    """All other settings: (dotted name, value)."""
    for key, value in values.items():
        of_group = not prefix and key in _GROUPS
        if (of_group and not isinstance(value, Mapping)) or (prefix.rstrip(".") in _GROUPS and key == "name"):
            continue
        default = _default(defaults, f"{prefix}{key}", where)
        if isinstance(value, Mapping) and isinstance(default, DictConfig) and len(default):
            yield from _plain(value, defaults, f"{prefix}{key}.", where)
        else:
            yield f"{prefix}{key}", value


def _default(defaults: DictConfig, key: str, where: str) -> object:
    node: object = defaults
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node.keys():  # noqa: SIM118  `in` is false for None
            beside = [name for name in _all(defaults) if name.startswith(key.rpartition(".")[0])]
            listed = dict.fromkeys(name if "." in key else name.partition(".")[0] for name in beside)
            raise unknown(f"{where}: the setting", key, listed or defaults, _all(defaults))
        node = None if OmegaConf.is_missing(node, part) or OmegaConf.is_interpolation(node, part) else node[part]
    return node


def _all(node: object, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings."""
    if not isinstance(node, DictConfig) or not len(node):
        yield prefix.rstrip(".")
        return
    for key in node.keys():  # noqa: SIM118
        known = not (OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key))
        yield from _all(node[key] if known else None, f"{prefix}{key}.")


def _listed(group: str) -> list[str]:
    loader = GlobalHydra.instance().config_loader()
    own = loader.get_group_options(group)
    return own + [
        f"{inner}/{name}"
        for inner in loader.list_groups(group)
        for name in loader.get_group_options(f"{group}/{inner}")
    ]


def _quoted(value: str) -> str:
    """In double quotes. Backslashes count there only before a quote, or at the end."""
    escaped = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value)
    return f'"{escaped}"'
