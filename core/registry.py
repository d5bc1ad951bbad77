"""Registration: base class = hook point, decorator name = Hydra choice, `__init__` signature = configuration.

The only file of the core that touches Hydra at import time.
"""

import dataclasses
import inspect
from collections.abc import Callable
from enum import Enum
from functools import partial
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.hooks import HOOK_POINTS, Filler

ENTRY_POINT_GROUP = "anyup_lab.fillers"
_fillers: dict[str, dict[str, type[Filler]]] = {hook: {} for hook in HOOK_POINTS}
_T = TypeVar("_T", bound=type[Filler])


def register(name: str) -> Callable[[_T], _T]:
    """Offers a filler under `name` as a choice of its hook point, with its signature as typed configuration.

    Running the same definition again (a notebook cell) replaces the earlier one.

    Raises:
        TypeError: the class fills no hook point, an argument of its `__init__` has no type, or `changeable` names
            what is no argument.
        ValueError: the hook point already has another filler of that name.
    """

    def add(cls: _T) -> _T:
        hook = _hook_of(cls)
        known = _fillers[hook].get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{hook}={name} is already registered by {known.__module__}.{known.__qualname__}; "
                f"{cls.__module__}.{cls.__qualname__} needs another name (taken: {', '.join(sorted(_fillers[hook]))})"
            )
        fields = signature_fields(cls)
        if wrong := sorted(set(cls.changeable) - set(fields)):
            raise TypeError(f"{cls.__qualname__}.changeable names {', '.join(wrong)}, which its __init__ has not")
        add_choice(hook, name, fields)
        cls.choice = name
        _fillers[hook][name] = cls
        return cls

    return add


def add_choice(group: str, name: str, fields: dict[str, tuple[type, Any]]) -> None:
    """Offers `group=name` to Hydra, with `fields` (name -> type, default) as its typed keys."""
    typed = [("name", str, dataclasses.field(default=name))]
    for key, (kind, default) in fields.items():
        mutable = isinstance(default, (list, dict))
        typed.append(
            (key, kind, dataclasses.field(default_factory=partial(type(default), default)))
            if mutable
            else (key, kind, dataclasses.field(default=default))
        )
    ConfigStore.instance().store(group=group, name=name, node=dataclasses.make_dataclass(f"{group}_{name}", typed))


def add_root(name: str, keys: dict[str, Any], choices: dict[str, str]) -> None:
    """Offers a primary config: top-level `keys` with their defaults, and a default choice for each group."""
    defaults = [{group: choice} for group, choice in choices.items()]
    ConfigStore.instance().store(name=name, node={"defaults": [*defaults, "_self_"], **keys})


def choices(hook: str) -> dict[str, type[Filler]]:
    """All registered fillers of a hook point by name, those of installed extensions included."""
    discover()
    if hook not in _fillers:
        raise ValueError(f"no hook point is called {hook!r}; there are: {', '.join(_fillers)}")
    return dict(_fillers[hook])


def factory(hook: str, name: str, settings: dict[str, Any]) -> Callable[..., Filler]:
    """The filler `hook=name` with its settings bound, still to be called with the sizes the core supplies.

    Raises:
        ValueError: unknown hook point or name, or a setting the filler does not have; lists what there is.
    """
    known = choices(hook)
    if name not in known:
        raise ValueError(f"{hook}={name} is not registered; there are: {', '.join(sorted(known))}")
    fields = signature_fields(known[name])
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise ValueError(
            f"{hook}={name} has no setting {', '.join(unknown)}; it has: {', '.join(fields) or 'no settings'}"
        )
    unset = [key for key, (_, default) in fields.items() if default is MISSING and key not in settings]
    if unset:
        raise ValueError(f"{hook}={name} needs a value for {', '.join(unset)}: set {hook}.{unset[0]}=...")
    owner = f"{hook}={name}"
    return partial(known[name], **{key: _as_declared(owner, key, fields[key][0], settings[key]) for key in settings})


def describe(filler: Callable[..., Filler]) -> dict[str, Any]:
    """The configuration of a factory (a registered class, or a `partial` of one): its name and every setting.

    Raises:
        TypeError: `filler` is neither; such a model cannot be written to a checkpoint that rebuilds it.
    """
    cls, bound = (filler.func, filler.keywords) if isinstance(filler, partial) else (filler, {})
    if not inspect.isclass(cls) or "choice" not in vars(cls) or (isinstance(filler, partial) and filler.args):
        raise TypeError(
            f"{filler!r} is not a registered filler with keyword settings: decorate its class with "
            '@register("name") and pass the class, or functools.partial(TheClass, setting=...)'
        )
    settings = {key: default for key, (_, default) in signature_fields(cls).items()} | bound
    plain = {key: value.name if isinstance(value, Enum) else value for key, value in settings.items()}
    return {"name": cls.choice, **plain}


def changeable(hook: str, name: str) -> tuple[str, ...]:
    """The settings of `hook=name` that may be others after training than in it, as "hook.setting"."""
    return tuple(f"{hook}.{setting}" for setting in choices(hook)[name].changeable)


def signature_fields(cls: type) -> dict[str, tuple[type, Any]]:
    """The settings of a class: argument of `__init__` -> (type, default), without those the core supplies."""
    hints = get_type_hints(cls.__init__)
    fields = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if cls.__init__ is Filler.__init__:
                continue  # the filler defines no __init__: nothing to configure
            raise TypeError(f"{cls.__qualname__}.__init__ takes *{parameter.name}: name every setting")
        if parameter.name in getattr(cls, "supplied", ()):
            continue
        if parameter.name == "name":
            raise TypeError(
                f"{cls.__qualname__}.__init__: argument name stands for the choice's name: call it otherwise"
            )
        if parameter.name not in hints:
            raise TypeError(f"{cls.__qualname__}.__init__: argument {parameter.name} needs a type annotation")
        default = MISSING if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    return fields


def _as_declared(owner: str, key: str, kind: type, value: Any) -> Any:
    """The value of a setting in its declared type, as Hydra takes it: members of an Enum by name, tuples as lists.

    Raises:
        ValueError: it cannot be; names the filler, the setting, the value and what it may be.
    """
    try:
        node = OmegaConf.structured(dataclasses.make_dataclass("Settings", [(key, kind)]))
        node[key] = value
        plain = OmegaConf.to_container(node, resolve=True)[key]
    except OmegaConfBaseException as error:
        raise ValueError(f"{owner}: {key} must be {_described(kind)}, got {value!r}") from error
    return tuple(plain) if get_origin(kind) is tuple and plain is not None else plain


def _described(kind: type) -> str:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return kind.__name__ if inspect.isclass(kind) and get_origin(kind) is None else str(kind)


def discover() -> None:
    """Imports every installed package that offers fillers through the entry point group `anyup_lab.fillers`."""
    for found in entry_points(group=ENTRY_POINT_GROUP):
        found.load()


def _hook_of(cls: type) -> str:
    hook = getattr(cls, "hook", "")
    if not (inspect.isclass(cls) and issubclass(cls, Filler) and hook in HOOK_POINTS):
        raise TypeError(
            f"{cls!r} fills no hook point: subclass one of {', '.join(b.__name__ for b in HOOK_POINTS.values())}"
        )
    return hook
