"""Registration: classes are chosen by name, and their `__init__` signature is their typed configuration.

`Choices` is one group of such classes: here the fillers of one hook point; in `experiments/` data sets, tasks or peers.
This is the only file of the core that imports Hydra at import time.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from core.hooks import HOOK_POINTS, Filler
from core.nearest import nearest

ENTRY_POINT_GROUP = "anyup_lab.fillers"
_groups: list["Choices[Any]"] = []
"""All groups of this process, for `discover`."""
_C = TypeVar("_C")
_T = TypeVar("_T", bound=type)


class Choices(Generic[_C]):
    """A group of named classes, which Hydra offers as `GROUP=NAME`.

    Args:
        group: name of the Hydra group.
        base: the class that each of them must subclass.
        package: full name of the package whose modules register the classes. All its modules are imported before a
            look-up, so a new file needs no further change. Empty: the modules are imported elsewhere.
        error: the exception that `bind`, `settings` and `make` raise.
    """

    def __init__(self, group: str, base: type[_C], package: str = "", error: type[ValueError] = ValueError):
        self.group, self.base, self.package, self.error = group, base, package, error
        self.known: dict[str, type[_C]] = {}
        _groups.append(self)

    def register(self, name: str) -> Callable[[_T], _T]:
        """Offers a class under `name`; running the same definition again (a notebook cell) replaces the earlier one.

        Raises:
            TypeError: the class does not subclass `base`, or its `__init__` is not typed (`signature_fields`).
            ValueError: another class has that name.
        """

        def add(cls: _T) -> _T:
            if not (inspect.isclass(cls) and issubclass(cls, self.base)):
                raise TypeError(f"{self.group}={name} must be a subclass of {self.base.__name__}, got {cls!r}")
            known = self.known.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{self.group}={name} is already registered by {known.__module__}.{known.__qualname__}; "
                    f"{cls.__module__}.{cls.__qualname__} needs another name (taken: {', '.join(sorted(self.known))})"
                )
            add_choice(self.group, name, signature_fields(cls))
            cls.choice = name
            self.known[name] = cls
            return cls

        return add

    def load(self) -> None:
        """Imports all modules of the package, so that new ones are found; those already imported cost nothing."""
        if self.package:
            for found in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{found.name}")

    def all(self) -> dict[str, type[_C]]:
        """All classes by name, sorted by the names of their modules; within a module, in the order of registration."""
        self.load()
        return dict(sorted(self.known.items(), key=lambda item: item[1].__module__))

    def bind(self, name: object, settings: Mapping[str, Any]) -> "partial[_C]":
        """A `partial` of the class `name` with its settings.

        Raises:
            error: an unknown name, an unknown setting, or a setting without a value or of another type; the message
                lists what there is.
        """
        known, owner = self.all(), f"{self.group}={name}"
        if name not in known:
            raise self.error(f"{owner} is not registered; there are: {', '.join(sorted(known))}{nearest(name, known)}")
        fields = signature_fields(known[name])
        if unknown := sorted(map(str, set(settings) - set(fields))):
            raise self.error(
                f"{owner} has no setting {', '.join(unknown)}; it has: {', '.join(fields) or 'no settings'}"
                f"{nearest(unknown[0], fields)}"
            )
        values = {key: default for key, (_, default) in fields.items()} | dict(settings)
        if unset := [key for key, value in values.items() if isinstance(value, str) and value == MISSING]:
            raise self.error(f"{owner} needs a value for {', '.join(unset)}: set {self.group}.{unset[0]}=...")
        try:
            typed = {key: _as_declared(owner, key, fields[key][0], settings[key]) for key in settings}
        except ValueError as error:
            raise self.error(str(error)) from error
        return partial(known[name], **typed)

    def settings(self, node: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
        """Checks a configuration `{name, ...settings}` -> the same with declared types, and defaults filled in.

        Raises:
            error: as `bind`, or a setting refers to one without a value.
        """
        bound = self._bound(node)
        defaults = {key: default for key, (_, default) in signature_fields(bound.func).items()}
        return {"name": bound.func.choice, **defaults, **bound.keywords}

    def make(self, node: DictConfig | Mapping[str, Any]) -> _C:
        """Builds the object of a configuration `{name, ...settings}`.

        Raises:
            error: as `settings`. The class may raise its own errors.
        """
        return self._bound(node)()

    def _bound(self, node: DictConfig | Mapping[str, Any]) -> "partial[_C]":
        try:
            values = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
        except OmegaConfBaseException as error:
            raise self.error(f"{self.group}: {str(error).splitlines()[0]}; give it a value") from error
        return self.bind(values.pop("name", None), values)


_fillers: dict[str, Choices[Filler]] = {hook: Choices(hook, base) for hook, base in HOOK_POINTS.items()}


def register(name: str) -> Callable[[_T], _T]:
    """Offers a filler under `name` as a choice of its hook point, with its signature as typed configuration.

    Running the same definition again (a notebook cell) replaces the earlier one.

    Raises:
        TypeError: the class fills no hook point, its `__init__` is not typed (`signature_fields`), or `changeable`
            names something that is no argument.
        ValueError: the hook point already has another filler with that name.
    """

    def add(cls: _T) -> _T:
        hook = _hook_of(cls)
        if wrong := sorted(set(cls.changeable) - set(signature_fields(cls))):
            raise TypeError(f"{cls.__qualname__}.changeable names {', '.join(wrong)}: no setting of its __init__")
        return _fillers[hook].register(name)(cls)

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
    """Offers a primary configuration to Hydra: top-level `keys` with defaults, and a default choice for each group."""
    defaults = [{group: choice} for group, choice in choices.items()]
    ConfigStore.instance().store(name=name, node={"defaults": [*defaults, "_self_"], **keys})


def choices(hook: str) -> dict[str, type[Filler]]:
    """All registered fillers of a hook point by name, including those of installed extensions."""
    return _group(hook).all()


def class_of(group: str, name: str) -> type:
    """The class that is offered as `group=name`, of any group of this process.

    Raises:
        ValueError: there is none.
    """
    found = [choice.all()[name] for choice in _groups if choice.group == group and name in choice.all()]
    if not found:
        raise ValueError(f"{group}={name} is not registered")
    return found[-1]


def factory(hook: str, name: str, settings: dict[str, Any]) -> Callable[..., Filler]:
    """A `partial` of the filler `hook=name` with its settings; the core calls it with its own sizes.

    Raises:
        ValueError: unknown hook point or name, or a setting that the filler does not have; the message lists what
            there is.
    """
    return _group(hook).bind(name, settings)


def describe(filler: Callable[..., Filler]) -> dict[str, Any]:
    """The configuration of a factory (a registered class, or a `partial` of one): its name and every setting.

    Raises:
        TypeError: `filler` is neither, so no checkpoint could rebuild its model.
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
    """The settings of `hook=name` that may change after training, as "hook.setting"; none for an unknown filler."""
    cls = choices(hook).get(name)
    return () if cls is None else tuple(f"{hook}.{setting}" for setting in cls.changeable)


def signature_fields(cls: type) -> dict[str, tuple[type, Any]]:
    """The settings of a class: argument of `__init__` -> (type, default), without those that the core supplies.

    Raises:
        TypeError: an argument has no type annotation, is called `name`, or is *args or **kwargs.
    """
    hints = get_type_hints(cls.__init__)
    fields = {}
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if cls.__init__ in (nn.Module.__init__, object.__init__):
                continue  # the class defines no __init__: nothing to configure
            raise TypeError(f"{cls.__qualname__}.__init__ takes *{parameter.name}: name every setting")
        if parameter.name in getattr(cls, "supplied", ()):
            continue
        if parameter.name == "name":
            raise TypeError(
                f"{cls.__qualname__}.__init__: argument `name` is reserved for the name of the choice: rename it"
            )
        if parameter.name not in hints:
            raise TypeError(f"{cls.__qualname__}.__init__: argument {parameter.name} needs a type annotation")
        default = MISSING if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], default)
    return fields


def _as_declared(owner: str, key: str, kind: type, value: Any) -> Any:
    """Converts a setting's value to its declared type, as Hydra does: Enum members by name, lists for tuples.

    Raises:
        ValueError: it cannot be converted; the message names the filler, the setting, the value and what it may be.
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
    """Imports every module that registers choices, so that Hydra knows them before it composes.

    These are the installed packages with an entry point in the group `anyup_lab.fillers`, and the packages of all
    `Choices` of this process. The data sets, for example, are among them once `experiments.data` is imported.
    """
    _load_extensions()
    for group in _groups:
        group.load()


def _load_extensions() -> None:
    package = __name__.removesuffix("core.registry")  # "anyup_lab." where the folders have that name in front
    for found in entry_points(group=ENTRY_POINT_GROUP):
        if package and found.value == "extensions":
            importlib.import_module(f"{package}extensions")
        else:
            found.load()


def _group(hook: str) -> Choices[Filler]:
    _load_extensions()
    if hook not in _fillers:
        raise ValueError(f"no hook point is called {hook!r}; there are: {', '.join(_fillers)}")
    return _fillers[hook]


def _hook_of(cls: type) -> str:
    hook = getattr(cls, "hook", "")
    if not (inspect.isclass(cls) and issubclass(cls, Filler) and hook in HOOK_POINTS):
        raise TypeError(
            f"{cls!r} fills no hook point: subclass one of {', '.join(b.__name__ for b in HOOK_POINTS.values())}"
        )
    return hook
