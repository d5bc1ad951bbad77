"""The upsamplers that an evaluation compares: peers, checkpoints, their means and their blurs, by names of arms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor, nn

import core
from experiments.measuring.blur import blurred
from experiments.measuring.ceilings import CEILINGS
from experiments.peers import named_peers, peer_from_config
from experiments.settings import SettingError
from experiments.statistics.verdicts import FLOOR


@dataclass(frozen=True)
class OfSeeds:
    """One arm whose training was repeated: the upsampler of each seed."""

    models: Sequence[nn.Module]


def of_seed(model: "nn.Module | OfSeeds", position: int) -> nn.Module:
    """The upsampler of an arm for the seed at a position of `config.seeds`."""
    return model.models[position] if isinstance(model, OfSeeds) else model


def upsamplers(config: DictConfig) -> dict[str, nn.Module | OfSeeds]:
    """The arms that upsample, by name: `config.peers`, then `config.checkpoints`, `config.means`, `config.blurs`.

    Raises:
        SettingError: a peer that is unknown or cannot be made, a checkpoint that cannot be loaded, a mean or a blur of
            arms that there are not, or two arms of one name.
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
        models |= {name: _loaded_of_seeds(name, node, config.seeds) for name, node in files.items()}
    except (core.WeightsError, OSError) as error:
        raise SettingError(f"checkpoints: {error}") from error
    except ValueError as error:
        raise SettingError(str(error)) from error
    for made, make in ((config.means, _mean), (config.blurs, _blur)):
        models |= {name: make(name, arms, models) for name, arms in (made or {}).items()}
    return models


def _loaded_of_seeds(name: str, node: str | DictConfig | ListConfig, seeds: Sequence[int]) -> core.AnyUp | OfSeeds:
    """As `_loaded`; of a list, the models of one training with several seeds."""
    if not isinstance(node, ListConfig):
        return _loaded(node)
    if len(node) != len(seeds):
        raise SettingError(
            f"checkpoints.{name} has {len(node)} trainings, and there are {len(seeds)} seeds: give one for each of "
            f"seeds={list(seeds)}, in that order"
        )
    return OfSeeds([_loaded(one) for one in node])


def _loaded(node: str | DictConfig) -> core.AnyUp:
    """The model of a file or a name; or of {checkpoint: FILE, delta: FILE, HOOK: FILLER, HOOK.SETTING: VALUE}."""
    if isinstance(node, str):
        return core.load(node)
    source, changes = checkpoint_and_changes(node)
    return core.load(source, changes)


def checkpoint_and_changes(node: DictConfig) -> tuple[str, dict[str, object]]:
    """{checkpoint: FILE, ...} -> the file, and what `core.load` is to change.

    Raises:
        SettingError: there is no checkpoint in it.
    """
    values = OmegaConf.to_container(node, resolve=True)
    if not isinstance(values, dict) or not isinstance(values.get("checkpoint"), str):
        raise SettingError(
            "a checkpoint must be FILE, or {checkpoint: FILE, delta: FILE, temporal: NAME, HOOK.SETTING: VALUE}, got "
            f"{values}"
        )
    return values.pop("checkpoint"), values


class MeanOf(nn.Module):
    """The mean of what several upsamplers give."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """(B,3,H,W), (B,C,h,w) -> (B,C,Qh,Qw)."""
        return sum(model(image, features, output_size) for model in self.models) / len(self.models)


class Blurred(nn.Module):
    """What an upsampler gives, blurred by a Gaussian of `width` cells of the low-resolution features."""

    def __init__(self, model: nn.Module, width: float):
        super().__init__()
        self.model, self.width = model, width

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """(B,3,H,W), (B,C,h,w) -> (B,C,Qh,Qw)."""
        return blurred(self.model(image, features, output_size), tuple(features.shape[-2:]), self.width)

    def extra_repr(self) -> str:
        return f"width={self.width}"


def _blur(name: str, arm: DictConfig, models: dict[str, nn.Module | OfSeeds]) -> Blurred:
    if name in (*models, *CEILINGS):
        raise _named_twice(name)
    pairs = list(arm.items()) if isinstance(arm, DictConfig) else []
    if len(pairs) != 1 or pairs[0][0] not in models:
        raise SettingError(f"blurs.{name}={arm}: give {{ARM: WIDTH}} with one of the arms {', '.join(models)}")
    ((of, width),) = pairs
    _check_one(name, [of], models)
    if not (isinstance(width, int | float) and 0 < width < math.inf):
        raise SettingError(f"blurs.{name}: the width must be a number of cells above 0, got {width}")
    return Blurred(models[of], float(width))


def _mean(name: str, arms: ListConfig, models: dict[str, nn.Module | OfSeeds]) -> MeanOf:
    if name in (*models, *CEILINGS):
        raise _named_twice(name)
    arms = list(arms)
    if len(set(arms)) < 2 or not set(arms) <= models.keys():
        raise SettingError(f"means.{name}={arms}: it takes at least two of the arms {', '.join(models)}")
    _check_one(name, arms, models)
    return MeanOf([models[arm] for arm in arms])


def _check_one(name: str, arms: Sequence[str], models: dict[str, nn.Module | OfSeeds]) -> None:
    for arm in arms:
        if isinstance(models[arm], OfSeeds):
            raise SettingError(f"{name}: arm {arm} has a training for each seed; name the file of one as another arm")


def _named(checkpoints: DictConfig | ListConfig | None) -> dict[str, str | DictConfig | ListConfig]:
    """Name of each checkpoint's arm -> its file, or {checkpoint: FILE, ...}."""
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
