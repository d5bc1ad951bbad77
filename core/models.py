"""Models from a configuration, from Hydra overrides, or from a checkpoint: `build`, `from_config`, `load`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from core import checkpoint
from core.anyup import AnyUp
from core.compose import arguments, compose
from core.hooks import MODEL_HOOKS
from core.published import rename_published

log = logging.getLogger(__name__)


def build(overrides: list[str] | None = None) -> AnyUp:
    """Builds a model from Hydra overrides, as an experiment's command line would.

    `build()` is the baseline; `build(["attention=global", "unifier.ordering=released", "seed=3"])` changes it.

    Raises:
        TypeError, ValueError: as `compose` and `from_config`.
    """
    return from_config(compose(overrides))


def from_config(config: DictConfig | dict[str, Any]) -> AnyUp:
    """Builds the model of a configuration; keys that belong to experiments are ignored.

    Raises:
        ValueError: a hook point is missing, or a name, setting or value is not valid; the message says which, and
            lists what there is.
    """
    return AnyUp(**arguments(config))


def load(source: str | Path, changes: Mapping[str, Any] | None = None) -> AnyUp:
    """Rebuilds the model of a checkpoint, in eval mode on the CPU.

    Args:
        source: a file that `save` wrote, a folder that `save_pretrained` wrote, a name (`core.checkpoint.find` lists
            them), or a published AnyUp checkpoint. The last may be `.pth` (no code in it is run) or `.safetensors`, a
            bare state dict or nested as in the released training script; it gets `ordering: released`. The prefixes
            `module.` and `_orig_mod.` are removed.
        changes: new values for settings that may change after training (`Filler.changeable`), such as
            `{"attention.window_ratio": 0.2}`; or a filler for a hook point after attention that is `none` in the
            checkpoint, such as `{"temporal": "temporal_consistency"}`, with settings `{"name": NAME, SETTING: VALUE}`;
            or one whose class extends that of the checkpoint's, such as `{"attention": "bilateral_prior"}`. Where it
            has further weights, they are untrained, and a warning names them.

    Raises:
        FileNotFoundError: no such file. OSError: published weights cannot be downloaded.
        WeightsError: the file is truncated, of another architecture, or a pickle that would run code.
        ValueError: `changes` names a setting that may not change, or a filler that cannot be added; the message says
            what may.
    """
    state, config = checkpoint.read(source)
    if not changes:
        return checkpoint.rebuild(AnyUp, state, config, source)
    wanted = checkpoint.changed(config, changes)
    if all(wanted[hook]["name"] == config[hook]["name"] for hook in MODEL_HOOKS):
        return checkpoint.rebuild(AnyUp, state, wanted, source)
    model = AnyUp(**arguments(wanted))
    if new := checkpoint.warm_start(model, source):
        log.warning("%s are UNTRAINED: %s has none", ", ".join(new), source)
    return model.eval()


def from_published(state: dict[str, Tensor]) -> AnyUp:
    """Builds the model of a published AnyUp state dict, in eval mode, with `ordering: released`.

    Raises:
        WeightsError: it is not a published state dict of AnyUp.
    """
    return checkpoint.rebuild(AnyUp, *rename_published(state), "the state dict")
