"""The upsamplers that an evaluation compares: peers and checkpoints, by the names of their arms."""

from pathlib import Path

from omegaconf import DictConfig, ListConfig
from torch import nn

import core
from experiments.measuring.ceilings import CEILINGS
from experiments.peers import named_peers, peer_from_config
from experiments.settings import SettingError
from experiments.statistics.verdicts import FLOOR


def upsamplers(config: DictConfig) -> dict[str, nn.Module]:
    """The arms that upsample, by name: `config.peers`, then `config.checkpoints`.

    Raises:
        SettingError: a peer that is unknown or cannot be made, a checkpoint that cannot be loaded, or two arms of one
            name.
    """
    names = named_peers(config.peers)
    if FLOOR not in names:
        raise SettingError(f"peers={list(names)} lacks {FLOOR}, which all others are compared with")
    files = _named(config.checkpoints)
    for name in (*names, *files):
        if [*names, *files, *CEILINGS].count(name) > 1:
            raise _named_twice(name)
    try:
        models = {name: peer_from_config(node) for name, node in names.items()}
        return models | {name: core.load(path) for name, path in files.items()}
    except (core.WeightsError, OSError) as error:
        raise SettingError(f"checkpoints: {error}") from error
    except ValueError as error:
        raise SettingError(str(error)) from error


def _named(checkpoints: DictConfig | ListConfig | None) -> dict[str, str]:
    """Name of each checkpoint's arm -> its file."""
    if checkpoints is None:
        return {}
    if isinstance(checkpoints, DictConfig):
        return dict(checkpoints)
    if not isinstance(checkpoints, ListConfig):
        raise SettingError(f"checkpoints must be null, [FILE, ...] or {{NAME: FILE, ...}}, got {checkpoints}")
    named = {Path(path).stem: path for path in checkpoints}
    if len(named) < len(checkpoints):
        stems = [Path(path).stem for path in checkpoints]
        raise _named_twice(next(stem for stem in stems if stems.count(stem) > 1))
    return named


def _named_twice(name: str) -> SettingError:
    return SettingError(f"two arms are called {name}: give them names, checkpoints={{NAME: FILE, ...}}")
