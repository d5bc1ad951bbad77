"""Models from a configuration, from Hydra overrides, or from a checkpoint: `build`, `from_config`, `load`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from core import checkpoint
from core.anyup import AnyUp
from core.compose import arguments, compose
from core.published import rename_published


def build(overrides: list[str] | None = None) -> AnyUp:
    """Builds a model from Hydra overrides, as an experiment's command line would.

    `build()` is the baseline; `build(["attention=global", "unifier.ordering=released", "seed=3"])` changes it.

    Raises:
        ValueError: as `compose`.
    """
    return from_config(compose(overrides))


def from_config(config: DictConfig | dict[str, Any]) -> AnyUp:
    """Builds the model of a configuration; keys that belong to experiments are left alone.

    Raises:
        ValueError: a hook point is missing, or a name, setting or value cannot be; says which, and what there is.
    """
    return AnyUp(**arguments(config))


def load(source: str | Path, changes: Mapping[str, Any] | None = None) -> AnyUp:
    """Rebuilds the model of a checkpoint, in eval mode on the CPU.

    Takes files of `save`, folders of `save_pretrained`, the names that `core.checkpoint.find` lists, and published
    AnyUp checkpoints (`.pth`, read without unpickling objects, or `.safetensors`; bare, or as the released training
    script nests them), which get `ordering: released`. The prefixes `module.` and `_orig_mod.` are taken off.

    `changes`: settings that may be others after training (`Filler.changeable`), such as
    `{"attention.window_ratio": 0.2}`.

    Raises:
        FileNotFoundError: no such file. OSError: published weights that cannot be downloaded.
        WeightsError: truncated, of another architecture, or a pickle that would run code.
        ValueError: `changes` names a setting that may not be changed; lists those that may.
    """
    state, config = checkpoint.read(source)
    return checkpoint.rebuild(AnyUp, state, checkpoint.changed(config, changes) if changes else config, source)


def from_published(state: dict[str, Tensor]) -> AnyUp:
    """The model of a published AnyUp state dict, in eval mode; its feature layer has `ordering: released`.

    Raises:
        WeightsError: not a state dict of AnyUp.
    """
    return checkpoint.rebuild(AnyUp, *rename_published(state), "the state dict")
