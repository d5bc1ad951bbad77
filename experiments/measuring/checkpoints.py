"""The model an experiment's configuration asks for: new, or from a checkpoint that must agree with what was asked."""

import logging
from enum import Enum
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import core
from core.checkpoint import bundled_like, replaceable
from core.compose import BASELINE, MODEL_KEYS
from core.hooks import MODEL_HOOKS
from core.registry import changeable, choices, signature_fields
from experiments.settings import SettingError

log = logging.getLogger(__name__)


def load_model(config: DictConfig) -> tuple[core.AnyUp, DictConfig]:
    """The model of `config`, on the CPU, and the configuration with the model it really is.

    With `config.checkpoint`, a file or a name that `core.load` takes, the checkpoint decides. A model choice beside it
    that says otherwise is an error, never ignored. Two kinds are taken: settings that may change after training
    (`Filler.changeable`), and fillers that may take the place of the checkpoint's (`core.checkpoint.replaceable`).
    `pretrained` is the baseline that comes with this package, with the `unifier.ordering` asked for: there the choices
    decide, and a warning names the weights that are new for them. With null the weights are random, and a warning says
    so.

    Raises:
        OSError, core.WeightsError: the checkpoint cannot be used.
        SettingError: names each choice that the checkpoint contradicts.
    """
    if config.checkpoint is None:
        log.warning(
            "no checkpoint=... given: this AnyUp is UNTRAINED (random weights from seed %s). Expect a blur: "
            "its outputs are weighted means of the features in a window, and the weights are yet to be learned",
            config.seed,
        )
        return core.from_config(config), config
    if config.checkpoint == "pretrained":
        model = core.from_config(config)
        new = core.warm_start(model, bundled_like(model))
        if new:
            log.warning(
                "%s: UNTRAINED, as the trained baseline that comes with this package has no such weights",
                ", ".join(new),
            )
        return model.eval(), config
    model = core.load(config.checkpoint)
    asked = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    wrong, changed = [], {}
    free = {key for hook in MODEL_HOOKS for key in changeable(hook, model.config[hook]["name"])}
    named = {hook: (model.config[hook]["name"], asked[hook]["name"]) for hook in MODEL_HOOKS}
    added = {hook for hook, (before, name) in named.items() if replaceable(hook, before, name)}
    for key in sorted(_chosen(config, asked)):
        hook, _, setting = key.partition(".")
        if hook in added:
            changed.setdefault(hook, {"name": asked[hook]["name"]})
            if setting:
                changed[hook][setting] = asked[hook][setting]
            continue
        ours, theirs = _at(asked, key), _at(model.config, key)
        if ours == theirs:
            continue
        if key in free:
            changed[key] = ours
        else:
            wrong.append(f"{key}={ours} (the checkpoint has {theirs})")
    if wrong:
        raise SettingError(
            f"checkpoint={config.checkpoint} contradicts {', '.join(wrong)}: leave out the one or the other"
        )
    if changed:
        try:
            model = core.load(config.checkpoint, changed)
        except core.WeightsError:
            raise
        except ValueError as error:  # a setting that must stay as in training
            raise SettingError(f"checkpoint={config.checkpoint}: {error}") from error
    model.check_finite = config.get("check_finite", False)
    if config.get("compile"):
        model.compile_encoders()
    return model, OmegaConf.create(asked | model.config)


def _chosen(config: DictConfig, values: dict[str, Any]) -> set[str]:
    """Dotted keys of the model that were chosen: written on the command line, or other than their defaults.

    `attention=window` is compared by that name alone, `unifier.ordering=paper` by that setting alone.
    """
    chosen = set()
    if HydraConfig.initialized():
        written = {override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task}
        chosen = {key for key in written if key.partition(".")[0] in (*MODEL_HOOKS, "embed_dim")}
    if values["embed_dim"] != MODEL_KEYS["embed_dim"]:
        chosen.add("embed_dim")
    for hook in MODEL_HOOKS:
        name = values[hook]["name"]
        if name != BASELINE[hook]:
            chosen.add(hook)
        for key, (_, default) in signature_fields(choices(hook)[name]).items():
            if values[hook][key] != (default.name if isinstance(default, Enum) else default):
                chosen.add(f"{hook}.{key}")
    return chosen


def _at(values: dict[str, Any], key: str) -> Any:
    """The value at a dotted key; a hook point's value is the name of its filler."""
    for part in key.split("."):
        values = values.get(part, "no such setting") if isinstance(values, dict) else "no such setting"
    return values["name"] if isinstance(values, dict) else values
