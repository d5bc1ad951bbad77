"""From Hydra overrides to a configuration, and from a configuration to fillers: `compose(["attention=global"])`."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from core import registry
from core.hooks import HOOK_POINTS, MODEL_HOOKS, Filler
from core.nearest import in_one_line
from core.registry import describe

BASELINE = {
    "unifier": "learned_basis",
    "attention": "window",
    "decoder": "none",
    "refiner": "none",
    "temporal": "none",
    "objective": "cosine_mse",
    "learner": "sgd",
}
MODEL_KEYS = {"embed_dim": 128, "seed": 0, "compile": False, "check_finite": False}
registry.add_root("anyup", MODEL_KEYS, BASELINE)


def compose(overrides: list[str] | None = None) -> DictConfig:
    """The configuration of a model and its training fillers, from Hydra overrides such as "seed=3".

    Raises:
        ValueError: an override has an unknown choice or key, or a value of the wrong type; the message lists what
            there is.
        TypeError: `overrides` is one string.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(overrides, str):
        raise TypeError(f"overrides must be a list of strings, such as [{overrides!r}], not one string")
    registry.discover()
    overrides = list(overrides or [])
    try:
        if GlobalHydra.instance().is_initialized():
            return hydra_compose("anyup", overrides)
        with initialize(version_base=None, config_path=None):
            return hydra_compose("anyup", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _refused(in_one_line(error)) from error


def arguments(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the class AnyUp, from a configuration; keys that belong to experiments are ignored.

    Raises:
        ValueError: a hook point is missing, or a name, setting or value is not valid; the message says which, and
            lists what there is.
    """
    if not isinstance(config, (DictConfig, Mapping)):
        raise _refused(f"a model's configuration must be a mapping with a key for each hook point, got {config!r}")
    missing = [hook for hook in MODEL_HOOKS if hook not in config]
    if missing:
        raise _refused(
            f"the configuration has no {', '.join(missing)}: core.compose([OVERRIDE, ...]) makes a complete one; the "
            "value of each hook point is {name: NAME, SETTING: VALUE}"
        )
    fillers = {hook: _factory(hook, config[hook]) for hook in MODEL_HOOKS}
    return fillers | {key: _typed(key, config.get(key, default)) for key, default in MODEL_KEYS.items()}


def build_filler(hook: str, config: DictConfig | Mapping[str, Any]) -> Filler:
    """Builds a filler that takes no sizes from the core: an `objective` or a `learner`.

    Raises:
        ValueError: a name, setting or value is not valid; the message says which, and lists what there is.
    """
    make = _factory(hook, config)
    filler = make()
    filler.config = describe(make)
    return filler


def available() -> str:
    """A text that lists all hook points with their choices and settings, one choice per line."""
    lines = ["  " + ", ".join(MODEL_KEYS)]
    for hook in HOOK_POINTS:
        for name, cls in sorted(registry.choices(hook).items()):
            settings = ", ".join(registry.signature_fields(cls))
            lines.append(f"  {hook}={name}" + (f"  (settings: {settings})" if settings else ""))
    return "\n".join(lines)


def _factory(hook: str, node: DictConfig | Mapping[str, Any]) -> Callable[..., Filler]:
    if not isinstance(node, (DictConfig, Mapping)) or "name" not in node:
        raise _refused(f"{hook} must be {{name: NAME, SETTING: VALUE}}, got {node!r}")
    try:
        values = OmegaConf.to_container(OmegaConf.create(node), resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise _refused(f"{hook}={node['name']}: {_first_line(error)}; set {hook}.SETTING=...") from error
    return registry.factory(hook, values.pop("name"), values)


def _typed(key: str, value: Any) -> Any:
    wanted = type(MODEL_KEYS[key])
    if type(value) is not wanted:
        raise _refused(f"{key} must be {wanted.__name__}, got {value!r}")
    return value


def _refused(reason: str) -> ValueError:
    return ValueError(f"{reason}\nThere is:\n{available()}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
