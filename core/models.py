"""Models from a configuration, from Hydra overrides, or from a checkpoint: `build`, `from_config`, `load`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn

from core import checkpoint
from core.anyup import AnyUp
from core.compose import arguments, build_filler, compose
from core.delta import difference
from core.hooks import MODEL_HOOKS, Learner
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
            `module.` and `_orig_mod.` are removed. A delta that `save_delta` wrote is read together with its base.
        changes: new values for settings that may change after training (`Filler.changeable`), such as
            `{"attention.window_ratio": 0.2}`; or a filler for a hook point after attention that is `none` in the
            checkpoint, such as `{"temporal": "temporal_consistency"}`, with settings `{"name": NAME, SETTING: VALUE}`;
            or one whose class extends that of the checkpoint's, such as `{"attention": "bilateral_prior"}`. Where it
            has further weights, they are untrained, and a warning names them. `{"delta": FILE}` puts a delta on the
            checkpoint, for one that does not find its base by itself.

    Raises:
        FileNotFoundError: no such file. OSError: published weights cannot be downloaded.
        WeightsError: the file is truncated, of another architecture, a pickle that would run code, or a delta of
            another base.
        ValueError: `changes` names a setting that may not change, or a filler that cannot be added; the message says
            what may.
    """
    changes = dict(changes or {})
    if "delta" in changes:
        source, base = changes.pop("delta"), source
    else:
        base = None
    state, config = checkpoint.read(source, base)
    if not changes:
        return checkpoint.rebuild(AnyUp, state, config, source)
    wanted = checkpoint.changed(config, changes)
    if all(wanted[hook]["name"] == config[hook]["name"] for hook in MODEL_HOOKS):
        return checkpoint.rebuild(AnyUp, state, wanted, source)
    model = AnyUp(**arguments(wanted))
    if new := checkpoint.warm_start(model, source, base):
        log.warning("%s: UNTRAINED, as %s has no such weights", ", ".join(new), source)
    return model.eval()


def save_delta(model: nn.Module, path: str | Path, base: str | Path) -> list[str]:
    """Writes the weights in which an adapted model differs from its base; `load(path)` gives the model, bit for bit.

    The file names the base and the hash of its content, and is refused with any other base.

    Args:
        path: ends in .safetensors. base: where the model's weights came from, a source as for `load`.

    Returns:
        Names of the weights that differ.

    Raises:
        TypeError: `model` is no AnyUp. ValueError: it is no adaptation of the base, or `path` has another ending.
        FileNotFoundError, OSError, WeightsError: as `load`. CannotWrite: the file cannot be written.
    """
    model = checkpoint.unwrapped(model)
    changed, metadata = difference(model.state_dict(), model.config, *checkpoint.read(base), base)
    checkpoint.write(changed, path, metadata)
    return sorted(changed)


def load_learner(source: str | Path, model: nn.Module) -> Learner | None:
    """The learner that a checkpoint was trained by, with its learnt rates, for `core.adapt`; None: it has none.

    Args:
        source: as for `load`. model: the checkpoint's model, for which the rates are.

    Raises:
        FileNotFoundError, OSError, WeightsError: as `load`. ValueError: its settings are not valid here.
    """
    found = checkpoint.read_learner(source)
    if found is None:
        return None
    learner = build_filler("learner", found[1])
    learner.prepare(model)
    learner.load_state_dict(found[0])
    return learner


def from_published(state: dict[str, Tensor]) -> AnyUp:
    """Builds the model of a published AnyUp state dict, in eval mode, with `ordering: released`.

    Raises:
        WeightsError: it is not a published state dict of AnyUp.
    """
    return checkpoint.rebuild(AnyUp, *rename_published(state), "the state dict")
