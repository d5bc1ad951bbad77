"""What a training is built of, each part checked before anything is computed: accelerator, encoders, model.

Encoders are frozen, so trainings of one process share them: a sweep loads each once.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from torch import nn

import core
from core.backbones import Backbone, backbone_from_config
from core.streams import named_stream
from core.training import Trainable
from experiments.data import DataSet
from experiments.lock import Locked, lock_folder, unlock_folder
from experiments.peers import Peer
from experiments.settings import SettingError, check_choice, pick_device
from experiments.training.peers import new_peer, peer_node, without_anyup
from experiments.training.views import ViewSettings

log = logging.getLogger(__name__)

RESUME = ("auto", "never", "must")
PRECISIONS = ("no", "bf16", "fp16")
_FREE_KEYS = (
    "tracking",
    "out_dir",
    "resume",
    "device",
    "num_workers",
    "checkpoint_every",
    "log_every",
    "stop_after",
    "extend",
    "cache",
)
"""Settings that a resumed training may change: they do not change its result."""
_COUNTS = {"steps": 1, "batch_size": 1, "backbones_per_step": 1, "checkpoint_every": 1, "log_every": 1}
_COUNTS |= {"validate_every": 0, "num_workers": 0}
"""Settings that count something, and the least that each may be."""
_KEPT_ENCODERS = 8


def check_settings(config: DictConfig) -> None:
    """Refuses counts and choices that cannot be.

    Raises:
        SettingError: names the setting and what it may be.
    """
    for key, least in _COUNTS.items():
        if type(config[key]) is not int or config[key] < least:
            raise SettingError(f"{key} must be at least {least}, a whole number, got {config[key]}")
    if config.stop_after is not None and (type(config.stop_after) is not int or config.stop_after < 1):
        raise SettingError(
            f"stop_after must be null (none) or at least 1, the step after which to stop, got {config.stop_after}"
        )
    if type(config.extend) is not bool:
        raise SettingError(f"extend must be true or false, got {config.extend}")
    check_choice("resume", config.resume, RESUME)
    check_choice("mixed_precision", config.mixed_precision, PRECISIONS)


@contextmanager
def alone_in(out_dir: Path) -> Iterator[None]:
    """Keeps other trainings out of a folder for the block, after removing what a killed one left half-written.

    Raises:
        SettingError: another training is at work in it.
    """
    try:
        lock = lock_folder(out_dir)
    except Locked as error:
        raise SettingError(f"another training is running in out_dir={out_dir}: wait, or choose another") from error
    try:
        for part in out_dir.glob(".*.part"):
            part.unlink(missing_ok=True)
        yield
    finally:
        unlock_folder(out_dir, lock)


def remove_former(out_dir: Path, names: Iterable[str]) -> None:
    """Removes what an earlier training left in the folder of a new one, which would look like the new one's."""
    found = [name for name in names if (out_dir / name).exists()]
    for name in found:
        (out_dir / name).unlink()
    if found:
        log.info("removed what an earlier training left in %s: %s", out_dir, ", ".join(found))


def make_accelerator(config: DictConfig) -> Accelerator:
    """Device, precision and the other processes, as `device` and `mixed_precision` say.

    Raises:
        SettingError: a device that is not there, or fp16 without a GPU.
    """
    device = pick_device(config.device)
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise SettingError("mixed_precision=fp16 needs a GPU: take bf16 or no")
    AcceleratorState._reset_state()  # it allows one precision a process; a sweep or a notebook trains with several
    return Accelerator(cpu=device.type == "cpu", mixed_precision=config.mixed_precision)


def open_encoders(config: DictConfig, views: Iterable[int], device: torch.device) -> list[Backbone]:
    """The encoders of `config.backbones`, each checked to give the grid that its stride promises: crops are cut on it.

    Raises:
        SettingError: none, unknown ones, or such as cannot be used together. WeightsError, OSError: as
            `load_backbone`.
    """
    nodes = OmegaConf.to_container(config.backbones, resolve=True)
    if not nodes:
        raise SettingError("backbones is empty: give at least one, such as backbones=[{name: embedded}]")
    found = [_encoder(node, device) for node in nodes]
    for encoder, view in product(found, views):
        grid = _grid(encoder, view, device)
        if grid != (view // encoder.patch_size,) * 2:
            raise SettingError(
                f"backbone {encoder.name} gives {grid[0]}x{grid[1]} features for views.view={view}, not one for each "
                f"{encoder.patch_size} pixels: crops cannot be cut on its grid; choose another view or backbone"
            )
    strides = {encoder.name: encoder.patch_size for encoder in found}
    if config.backbones_per_step > len(found):
        raise SettingError(f"backbones_per_step={config.backbones_per_step}, but there are {len(found)} backbones")
    if config.backbones_per_step > 1 and len(set(strides.values())) > 1:
        named = ", ".join(f"{name} {stride}" for name, stride in strides.items())
        raise SettingError(f"backbones of one step must have one stride (their crops are the same), got {named}")
    return found


def check_images(data: DataSet, views: ViewSettings) -> None:
    """Refuses photographs that are all too small for views to show anything.

    Raises:
        SettingError: no image has the size of a view.
    """
    sides, view = data.shorter_sides, max(grid.view for grid in views.grids)
    if sides and max(sides) < view:
        raise SettingError(
            f"all {len(sides)} images of data are smaller than views.view={view} (the largest has a shorter side "
            f"of {max(sides)} pixels): give larger ones, or a smaller view"
        )


def warn_of_small_images(data: DataSet, views: ViewSettings) -> None:
    """Counts those that will be enlarged."""
    sides, wanted = data.shorter_sides or (), max(grid.scale * grid.view for grid in views.grids)
    if small := sum(side < wanted for side in sides):
        log.warning(
            "%d of %d images are smaller than %d pixels (views.scale x views.view) and are enlarged: what is to be "
            "reached then has less detail than it could; a smaller views.view, or data.min_size=%d, avoids it",
            *(small, len(sides), wanted, wanted),
        )


def warn_of_bundled_images(data: DictConfig) -> None:
    """Says that the photographs of this package make a demonstration and no training."""
    if data.name == "images" and list(data.path) == ["bundled"]:
        log.warning(
            "the data are the few photographs that come with this package: a demonstration, and nothing that will work "
            "on other images. For a training give data.path=[FOLDER, ...], thousands of photographs; for a shorter "
            "demonstration steps=50"
        )


def check_held_out(data: DataSet, val_data: DataSet, count: int) -> None:
    """Warns when images to validate on, the first `count`, are trained on."""
    both = data.fingerprint == val_data.fingerprint or set(data.names) & set(val_data.names[:count])
    if both:
        log.warning(
            "val_data has images that are trained on: its numbers, and the choice of best.safetensors, say nothing of "
            "others. Divide a folder with data.last=N val_data.first=N, or give another val_data.path"
        )


def make_model(config: DictConfig) -> core.AnyUp | Peer:
    """New, or warm-started from `init_from` (as for `core.load`); without gradients for what `freeze` names.

    With `peer`, that peer.

    Raises:
        SettingError: a value that a part refuses; `freeze` names no part; as `new_peer`. WeightsError, OSError: as
            `warm_start`.
    """
    node = peer_node(config)
    with _refusals_named():
        model = new_peer(node, config) if node else core.from_config({**config, "compile": False})
    if config.init_from:
        new = core.warm_start(model, config.init_from)
        log.info("weights of %s; new: %s", config.init_from, ", ".join(new) or "none")
    parts = dict(model.named_children())
    for name in config.freeze:
        if name not in parts:
            raise SettingError(f"freeze={name}: the model has no such part; there are: {', '.join(parts)}")
        parts[name].requires_grad_(False)
    if config.compile:
        model.compile_encoders()
    return model


def make_trainable(
    config: DictConfig, replaced_by: Callable[[core.AnyUp], nn.Module] = lambda model: model
) -> Trainable:
    """Model, objective and learner; each draws its weights from a stream of its own.

    `replaced_by` makes of the model another one to be trained in its place. Raises as `make_model`.
    """
    model, fillers = make_model(config), []
    for hook in ("objective", "learner"):
        with _refusals_named(), named_stream(config.seed, hook):
            fillers.append(core.build_filler(hook, config[hook]))
    with _refusals_named():
        return Trainable(replaced_by(model), *fillers)


def check_clips(asked: frozenset[str], views: ViewSettings, data: DataSet) -> None:
    """Refuses what fillers look at and the settings or the data do not give; and clips that nobody looks at.

    Raises:
        SettingError: names the setting.
    """
    if "clip" not in asked:
        if views.clip:
            raise SettingError(f"views.clip={views.clip}, but no filler looks at clips: set it to 0")
        return
    if views.clip < 2:
        raise SettingError("a filler looks at clips of a video: set views.clip to their number of frames, from 2")
    longest = max(map(len, data.videos.values()), default=0) if data.videos else 0
    if longest < views.clip or any(len(frames) < views.clip for frames in data.videos.values()):
        raise SettingError(
            f"views.clip={views.clip} needs videos with as many frames, and data={data.choice} has "
            + ("single images" if not data.videos else f"one of {min(map(len, data.videos.values()))}")
            + ": use data=frames or data=scenes with data.frames=N"
        )


def deciding_settings(config: DictConfig) -> dict[str, Any]:
    """The settings on which the result of a training depends; those of AnyUp do not count where a peer is trained."""
    settings = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    settings = {key: value for key, value in settings.items() if key not in _FREE_KEYS}
    node = peer_node(config)
    return without_anyup(settings, node) if node else settings


def untracked(config: DictConfig) -> DictConfig:
    """The same without tracking: for all processes but the first."""
    quiet = copy.deepcopy(config)
    quiet.tracking.enabled = False
    return quiet


def _encoder(node: Any, device: torch.device) -> Backbone:
    if not isinstance(node, dict):
        raise SettingError(f"backbones has {node!r}: each is {{name: NAME}}, or {{name: NAME, weights: FILE}}")
    file = Path(str(node.get("weights")))
    with _refusals_named():
        if set(node) - {"name", "weights", "model"} or not all(isinstance(x, str | None) for x in node.values()):
            return backbone_from_config(node)  # which says what is wrong
        stamp = (file.stat().st_mtime_ns, file.stat().st_size) if file.is_file() else None
        return _loaded(tuple(sorted(node.items())), stamp, device)


@contextmanager
def _refusals_named() -> Iterator[None]:
    """A value that the core refuses is a setting that cannot be used."""
    try:
        yield
    except core.WeightsError:
        raise
    except ValueError as error:
        raise SettingError(str(error)) from error


@lru_cache(_KEPT_ENCODERS)
def _loaded(node: tuple[tuple[str, str | None], ...], stamp: tuple[int, int] | None, device: torch.device) -> Backbone:
    """`stamp`, of the weights' file, makes a file that was replaced another encoder."""
    return backbone_from_config(dict(node)).to(device)


@lru_cache(4 * _KEPT_ENCODERS)
def _grid(encoder: Backbone, view: int, device: torch.device) -> tuple[int, int]:
    with torch.no_grad():
        height, width = encoder(torch.full((1, 3, view, view), 0.5, device=device)).shape[-2:]
    return height, width
