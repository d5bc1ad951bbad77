"""Feature fidelity of upsamplers on a set of images, without labels: `python -m experiments.fidelity`.

Settings: configs/fidelity.yaml. An arm is a training-free peer, a checkpoint or a ceiling; all of them get the same
low-resolution features and targets of an image, which are computed once. Exit code: 0, or 2 when nothing was measured;
a value that is not finite stops the run and names image and arm.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig, ListConfig
from rich.console import Console
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from core.backbones import Backbone, backbone_from_config
from experiments.atomic import replacing
from experiments.command import command
from experiments.data import Sample, open_data
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.metrics import FidelityCase, FidelityError, fidelity, fidelity_case
from experiments.measuring.upsamplers import upsamplers
from experiments.progress import Progress
from experiments.reports.fidelity import Result, header, metrics, rich_table, summarise, write
from experiments.reports.fidelity_pictures import WorstImages
from experiments.settings import SettingError, check_writable, pick_device
from experiments.tracking.store import Run, track

log = logging.getLogger(__name__)

Arm = Callable[[FidelityCase], Tensor]


@dataclass
class Report:
    """What a run measured."""

    images: pd.DataFrame
    """One row per image, scale and arm: image, scale, arm, enlarged, and what `fidelity` gives."""
    results: list[Result]
    """One per scale, arm and measure."""
    files: list[Path]


def measure_fidelity(config: DictConfig) -> Report:
    """Measures all arms on all images, and writes table, plot and the values per image.

    Raises:
        NoImages, DataError, SettingError, TrackingUnavailable: found before anything is computed.
        FidelityError: a value that is not finite, or an image for which fidelity is not defined; names it.
        DataError: an image that can no longer be read. CannotWrite: the disk is full, say.
    """
    check_settings(config)
    device = pick_device(config.device)
    models = {name: model.to(device).eval() for name, model in upsamplers(config).items()}
    try:
        backbone = backbone_from_config(config.backbone).to(device)
    except (ValueError, OSError) as error:  # what the core refuses: a weight file, a value
        raise SettingError(str(error)) from error
    arms = {name: _arm(model) for name, model in models.items()}
    arms |= {name: _ceiling(name, backbone) for name in config.ceilings}
    data = open_data(config.data)
    with track(config, device) as run, logging_redirect_tqdm():
        run.data("images", data.fingerprint)
        rows, worst = [], WorstImages()
        for index in Progress(range(len(data)), "fidelity", "image"):
            rows += rows_of(data[index], arms, backbone, config, device, worst)
        images = pd.DataFrame(rows)
        results = summarise(images, config.confidence, config.num_resamples, config.seed)
        files = write(results, images, Path(config.out_dir), config.name, header(config, data, images, device))
        files.append(_write_worst(worst, Path(config.out_dir) / f"{config.name}_worst.png"))
        _record(run, results, files)
    return Report(images, results, files)


@torch.no_grad()
def rows_of(
    sample: Sample,
    arms: Mapping[str, Arm],
    backbone: Backbone,
    config: DictConfig,
    device: torch.device,
    worst: WorstImages | None = None,
) -> list[dict[str, object]]:
    """One row per scale and arm of an image; `worst` keeps pictures of all arms but the ceilings.

    Raises:
        FidelityError: names image, scale and arm. SettingError: the backbone refuses views of this size.
    """
    rows = []
    for scale in config.scales:
        where = f"image {sample.name} at {scale}x"
        try:
            case = fidelity_case(sample.image.to(device), backbone, scale, config.view, config.guidance)
        except FidelityError as error:
            raise FidelityError(f"{where}: {error}") from error
        except ValueError as error:
            raise SettingError(f"view={config.view} cannot be used: {error}") from error
        enlarged = min(sample.image.shape[-2:]) < scale * config.view
        for name, arm in arms.items():
            try:
                upsampled = arm(case)  # (1,C,s·h,s·w)
                measured = fidelity(upsampled, case)
            except FidelityError as error:
                raise FidelityError(f"{where}, arm {name}: {error}") from error
            if worst is not None and name not in CEILINGS:
                worst.offer(scale, name, sample.name, measured, case, upsampled)
            rows.append({"image": sample.name, "scale": scale, "arm": name, "enlarged": enlarged} | measured)
    return rows


def check_settings(config: DictConfig) -> None:
    """Refuses what could only fail later.

    Raises:
        SettingError: names the setting and what it may be.
    """
    scales = config.scales
    if not isinstance(scales, ListConfig) or not scales or not all(type(s) is int and s >= 2 for s in scales):
        raise SettingError(f"scales must be a list of whole numbers from 2, got {scales}")
    if len(set(scales)) < len(scales):
        raise SettingError(f"scales={scales} names one twice")
    if type(config.view) is not int or config.view < 1:
        raise SettingError(f"view must be a positive number of pixels, got {config.view}")
    limit = min(scales) * config.view
    if config.guidance is not None and (type(config.guidance) is not int or not 1 <= config.guidance <= limit):
        raise SettingError(f"guidance must be null or a number of pixels up to {limit}, got {config.guidance}")
    unknown = [name for name in config.ceilings if name not in CEILINGS]
    if unknown or len(set(config.ceilings)) < len(config.ceilings):
        raise SettingError(f"ceilings may be {', '.join(CEILINGS)}, each once, got {config.ceilings}")
    if not 0 < config.confidence < 1:
        raise SettingError(f"confidence must lie between 0 and 1, got {config.confidence}")
    if type(config.num_resamples) is not int or config.num_resamples < 100:
        raise SettingError(f"num_resamples must be a whole number from 100, got {config.num_resamples}")
    if not config.name or Path(config.name).name != config.name:
        raise SettingError(f"name must be that of a file, without folders, got {config.name!r}")
    check_writable(Path(config.out_dir))


def _arm(model: nn.Module) -> Arm:
    return lambda case: model(case.guidance, case.features, case.output_size)


def _ceiling(name: str, backbone: Backbone) -> Arm:
    return lambda case: CEILINGS[name](case, backbone)


def _write_worst(worst: WorstImages, path: Path) -> Path:
    with replacing(path) as part:
        worst.sheet().quantize(256).save(part, format="png", optimize=True)  # a third of the size
    return path


def _record(run: Run, results: list[Result], files: list[Path]) -> None:
    run.metrics(metrics(results))
    for file in files:
        run.file(file, f"{'pictures' if file.suffix == '.png' else 'tables'}/{file.name}")


@command
def main(config: DictConfig) -> int | None:
    """The command line of `measure_fidelity`."""
    report = measure_fidelity(config)
    console = Console()
    for table in rich_table(report.results):
        console.print(table)
    for file in report.files:
        console.print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
