"""Adapts a checkpoint to a backbone, with photographs of a folder, and writes what changed as a small delta."""

import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

import core
from core.backbones import backbone_from_config
from experiments.adaptation.curve import Curve
from experiments.data import DataSet, open_data
from experiments.data.feature_cache import FeatureCache
from experiments.measuring.support import Images, check_adaptation
from experiments.progress import Progress
from experiments.settings import (
    SettingError,
    check_choice,
    check_confidence,
    check_count,
    check_name,
    check_writable,
    pick_device,
)
from experiments.tracking.store import Run, track

log = logging.getLogger(__name__)

WRITE = ("if_better", "always")


@dataclass(frozen=True)
class Adapted:
    """What an adaptation leaves behind."""

    curve: Curve
    """Of held-out images, by step."""
    deltas: list[Path]
    """Of `save_at`, and of the last step; the last one is left out if it made held-out images worse."""
    files: list[Path]
    """Table and picture of the curve."""
    run_id: str

    @property
    def helped(self) -> bool:
        """Whether the interval of the gain on held-out images is above zero."""
        gain = self.curve.gain(self.curve.primary, int(self.curve.table["step"].max()))
        return gain.low is not None and gain.low > 0


def adapt(config: DictConfig) -> Adapted:
    """Adapts `config.checkpoint` to `config.backbone`; settings: configs/adapt.yaml.

    Raises:
        SettingError, NoImages, DataError, TrackingUnavailable: found before anything is computed, if possible.
        WeightsError, OSError: checkpoint or backbone cannot be used. CannotWrite: the disk is full, say.
    """
    _check(config)
    device, data = pick_device(config.device), open_data(config.data)
    support, held_out = _divide(config, data)
    try:
        model = core.load(config.checkpoint).to(device)
        backbone = backbone_from_config(config.backbone).to(device)
        learner = core.load_learner(config.checkpoint, model) if config.by_learner else None
    except core.WeightsError:
        raise
    except ValueError as error:
        raise SettingError(str(error)) from error
    if config.by_learner and learner is None:
        raise SettingError(f"by_learner=true, but checkpoint={config.checkpoint} has none: it was not trained by one")
    with track(config, device) as run, logging_redirect_tqdm():
        run.tag("data.fingerprint", data.fingerprint)
        how = backbone, config, FeatureCache(config.cache.folder, config.cache.max_gb)
        finer = config.targets == "encoder"
        known = Images(data, support, *how, finer, "encoding the support")
        others = Images(data, held_out, *how, finer or config.measure_detail, "encoding held-out images")
        curve = Curve([example.name for example in others.examples], config.confidence)
        watch = _Watch(config, curve, others, run)
        adapted = known.adapt(model, None if learner is None else learner.to(device), watch)
        if learner is not None:
            watch.of_learner(model, adapted, learner)
        deltas = watch.deltas + _write(config, adapted, curve)
        files = curve.save(Path(config.out_dir) / config.name)
        for file in (*files, *deltas):
            run.file(file)
    return Adapted(curve, deltas, files, run.run_id)


class _Watch:
    """Measures after some steps, and writes the deltas of `save_at`."""

    def __init__(self, config: DictConfig, curve: Curve, held_out: Images, run: Run):
        self.config, self.curve, self.held_out, self.run = config, curve, held_out, run
        self.deltas: list[Path] = []
        self.progress = Progress(None, "adapting", "step", 0 if config.by_learner else config.steps)

    def __call__(self, step: int, model: nn.Module) -> None:
        c = self.config
        if step % c.measure_every == 0 or step in c.save_at or step == c.steps:
            self.measure(step, model)
        if step in c.save_at:
            self.deltas.append(_saved(c, model, f"{c.name}_step{step}"))
        if step:
            self.progress.update()
        if step == c.steps:
            self.progress.close()

    def measure(self, step: int, model: nn.Module) -> None:
        """Adds to the curve and to the run."""
        self.curve.add(step, self.held_out.measure(model))
        of_step = self.curve.table.query("step == @step").groupby("measure")["value"].mean()
        self.run.metrics({f"held_out/{name}": float(value) for name, value in of_step.items()}, step)
        self.progress.note = ", ".join(f"{name} {value:.4f}" for name, value in of_step.items())
        log.info("step %d: held-out %s", step, self.progress.note)

    def of_learner(self, before: nn.Module, after: nn.Module, learner: core.Learner) -> None:
        """A learner does all its steps by itself."""
        self.measure(0, before)
        if steps := getattr(learner, "inner_steps", 1):
            self.measure(steps, after)


def _write(config: DictConfig, adapted: nn.Module, curve: Curve) -> list[Path]:
    last = int(curve.table["step"].max())
    gain = curve.gain(curve.primary, last).value
    if gain <= 0 and config.write == "if_better":
        log.warning(
            "no delta is written, for held-out images are not better with it; write=always writes it all the same"
        )
        return []
    return [_saved(config, adapted, config.name)]


def _saved(config: DictConfig, model: nn.Module, name: str) -> Path:
    path = Path(config.out_dir) / f"{name}.safetensors"
    core.save_delta(model, path, config.checkpoint)
    return path


def _divide(config: DictConfig, data: DataSet) -> tuple[range, range]:
    """The first images are adapted to, the last ones are held out."""
    count, held_out = len(data), config.held_out
    left = count - held_out
    if left < 1:
        raise SettingError(
            f"data has {count} images, and held_out={held_out} of them are only measured on: none is left to adapt to; "
            "give more images, or a smaller held_out"
        )
    support = left if config.num_support is None else config.num_support
    if support > left:
        raise SettingError(
            f"num_support={support}, but of {count} images held_out={held_out} are only measured on: {left} are left"
        )
    return range(support), range(left, count)


def _check(config: DictConfig) -> None:
    """Raises SettingError: a value that cannot be."""
    check_adaptation(config)
    check_choice("write", config.write, WRITE)
    check_count("held_out", config.held_out)
    check_count("measure_every", config.measure_every)
    if config.num_support is not None:
        check_count("num_support", config.num_support)
    if wrong := [step for step in config.save_at if type(step) is not int or not 0 <= step <= config.steps]:
        raise SettingError(
            f"save_at={list(config.save_at)}: each must be a step from 0 to {config.steps}, not {wrong[0]}"
        )
    if not isinstance(config.checkpoint, str):
        raise SettingError(f"checkpoint must be a file or a name, to adapt it, got {config.checkpoint}")
    check_confidence(config.confidence)
    check_name(config.name)
    check_writable(Path(config.out_dir))
