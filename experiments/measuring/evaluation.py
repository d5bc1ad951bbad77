"""What upsampled features are good for: probes, fidelity, consistency in time: `python -m experiments.evaluate`.

Settings: configs/evaluate.yaml. `Evaluation` measures one arm at a time and is what sweeps use as well: low-resolution
features, low-resolution probes and everything else that arms have in common are computed once, and upsampled features
are never stored. Exit code: 0, or 2 when nothing was measured; a value that is not finite stops the run and names it.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from tqdm.contrib.logging import logging_redirect_tqdm

import core
from core.backbones import Backbone, backbone_from_config
from experiments.atomic import replacing
from experiments.cost.arm_cost import check_cost, measure_costs
from experiments.data import DataSet, open_data
from experiments.data.feature_cache import FeatureCache, fingerprint
from experiments.measuring.bench import Bench, Ceiling, EncodedImages, Encoder, EvaluationError, Memory, Sizes
from experiments.measuring.heads import HEADS
from experiments.measuring.kept import Kept, KeptScores
from experiments.measuring.support import Images, check_adaptation
from experiments.measuring.task import Picture, make_task
from experiments.measuring.upsamplers import OfSeeds, of_seed, upsamplers
from experiments.peers import CannotUpsample, Peer, named_peers, peer_identity
from experiments.progress import Progress
from experiments.reports.evaluation import metrics, write
from experiments.reports.pictures import panel
from experiments.settings import (
    SettingError,
    check_choice,
    check_confidence,
    check_count,
    check_name,
    check_once,
    check_seeds,
    check_writable,
    one_number,
    output_grid,
    pick_device,
)
from experiments.statistics.scores import frame
from experiments.statistics.verdicts import FLOOR, Comparison, compare
from experiments.tracking.provenance import Origin, machine
from experiments.tracking.run import clean_name
from experiments.tracking.store import track

log = logging.getLogger(__name__)

_FORMAT = 3
"""To be raised with every change of what an evaluation measures."""


class Evaluation:
    """A task on a data set with a backbone, ready to measure any number of arms.

    Args:
        config: configs/evaluate.yaml; of its arms (checkpoints, peers, ceilings, seeds) it uses none.

    Attributes:
        fingerprint: hexadecimal digest of all that scores depend on besides model, arm and seed.
        names: of the validation data and the backbone, as scores have them.
        pictures: of the images that the arm measured last did worst on.

    Raises:
        SettingError, DataError: what could only fail later; names the setting.
    """

    def __init__(self, config: DictConfig):
        self.task = make_task(config.task)
        self.device = pick_device(config.device)
        sizes = _sizes(config)
        backbone = _backbone(config).to(self.device)
        cache = FeatureCache(config.cache.folder, config.cache.max_gb)
        head = HEADS.get(config.task.get("head"))
        layers = None if head is None else head.layers(backbone.num_layers)
        encoder, memory = Encoder(backbone, cache, layers), Memory(config.cache.memory_gb)
        _check_encoder(encoder, sizes)
        data = {"val_data": open_data(config.val_data)}
        if self.task.trains or config.adapt.images:
            data["data"] = open_data(config.data)
            if data["data"].fingerprint == data["val_data"].fingerprint:
                log.warning("data and val_data are the same images: what was learned from them is measured on them")
        self.data_fingerprints = {role: opened.fingerprint for role, opened in data.items()}

        def cases(role: str, limit: int | None) -> EncodedImages:
            return EncodedImages(data[role], limit, encoder, sizes, memory, self.device)

        train = cases("data", config.max_train_images) if self.task.trains else None
        val = cases("val_data", config.max_val_images)
        self.bench = Bench(train, val, encoder, sizes, memory, config.ceiling_scale, self.device)
        self.task.check(self.bench)
        self.support = _support(config, data, backbone, cache)
        self.names = (config.val_data.name, config.backbone.name)
        self.fingerprint = _fingerprint(config, sizes, self.data_fingerprints, backbone)

    def scores(self, model: nn.Module | Ceiling, arm: str, seed: int) -> pd.DataFrame:
        """Measures one arm on every validation image.

        Args:
            model: `(image, features, output_size) -> features`: AnyUp or a peer; or a `Ceiling`.
            arm: its name in the scores. seed: of the probes, and for the column of that name.

        Returns:
            `experiments.statistics.scores.frame`; the column task is like "depth/upsampled", "fidelity/2x".

        Raises:
            EvaluationError: something cannot be measured, or is not finite; names arm, seed and image. A peer cannot
                take these features; names the arm.
            ScoreError: a measure that is not finite; names arm, seed and image.
        """
        if isinstance(model, Ceiling) and model.name not in self.task.ceilings:
            raise SettingError(
                f"task={self.task.choice} has the ceilings {', '.join(self.task.ceilings)}, not {model.name}"
            )
        was_training = isinstance(model, nn.Module) and model.training
        if isinstance(model, nn.Module):
            model.to(self.device).eval()
        if self.support is not None and isinstance(model, core.AnyUp):
            model = self.support.adapt(model)
        try:
            rows = list(self.task.rows(model, seed, self.bench))
        except (EvaluationError, CannotUpsample) as error:
            raise EvaluationError(f"arm {arm}, seed {seed}: {error}") from error
        finally:
            if was_training:
                model.train()
        if not rows:
            raise EvaluationError(f"arm {arm}, seed {seed}: no validation image has anything to measure")
        data, backbone = self.names
        return frame(rows, {"data": data, "backbone": backbone, "arm": arm, "seed": seed})

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores must know of the images."""
        return self.task.notes

    @property
    def image_names(self) -> list[str]:
        """Of all images that are measured."""
        return self.bench.val.names

    @property
    def pictures(self) -> list[Picture]:
        """Of the images that the arm measured last did worst on, worst first; none of some tasks."""
        return self.task.worst


@dataclass
class Evaluated:
    """What a run measured."""

    scores: pd.DataFrame
    """Per image: `experiments.statistics.scores`."""
    results: list[Comparison]
    """One per task, measure and arm, compared with bilinear."""
    costs: pd.DataFrame | None
    """Of `experiments.cost.arm_cost`; None: not measured."""
    notes: list[str]
    """What a reader must know of how they were measured."""
    files: list[Path]
    """Tables and scores."""
    pictures: list[Path]
    """Of the images on which each arm did worst, in the folder NAME_worst; none of some tasks."""


def evaluate(config: DictConfig) -> Evaluated:
    """Measures all arms with all seeds, and writes tables and the scores per image.

    Raises:
        NoImages, DataError, SettingError, TrackingUnavailable: found before anything is computed.
        EvaluationError, ScoreError: something cannot be measured, or is not finite; names arm and image.
        DataError: an image that can no longer be read. CannotWrite: the disk is full, say.
    """
    _check(config)
    models = dict(upsamplers(config))
    evaluation = Evaluation(config)
    models |= {name: Ceiling(name) for name in config.ceilings}
    if unknown := [name for name in config.ceilings if name not in evaluation.task.ceilings]:
        raise SettingError(
            f"ceilings of task={evaluation.task.choice} may be {', '.join(evaluation.task.ceilings)}, got {unknown[0]}"
        )
    repeated = [name for name, model in models.items() if isinstance(model, OfSeeds)]
    seeds = list(config.seeds) if evaluation.task.trains or repeated else list(config.seeds)[:1]
    check_cost(config.cost)
    check_choice("baseline", config.baseline, tuple(models))
    with track(config, evaluation.device) as run, logging_redirect_tqdm():
        for role, digest in evaluation.data_fingerprints.items():
            run.data(role, digest)
        for name, node in named_peers(config.peers).items():
            run.tag(f"peer.{name}", json.dumps(peer_identity(node)))
        tables, shown = {}, []
        out_dir = Path(config.out_dir)
        kept = KeptScores(out_dir / f"{config.name}_unfinished", config, evaluation.fingerprint)
        pairs = [(name, seed) for seed in seeds for name in models]
        for name, seed in Progress(pairs, evaluation.task.choice, "arm"):
            if seed != seeds[0] and not evaluation.task.trains and name not in repeated:
                tables[name, seed] = tables[name, seeds[0]].assign(seed=seed)  # nothing in it depends on the seed
                continue
            model = of_seed(models[name], seeds.index(seed))
            drawn = out_dir / f"{config.name}_worst" if seed == seeds[0] else None
            found = _measured(evaluation, kept, model, name, seed, drawn)
            tables[name, seed] = found.scores
            for path, artifact in found.pictures.items():
                run.file(path, artifact)
                shown.append(path)
        scores = pd.concat(tables.values(), ignore_index=True)
        trained = [name for name, model in models.items() if not isinstance(model, Peer | Ceiling)]
        results = compare(scores, config.baseline, trained, config.confidence, num_resamples=0)
        networks = {name: of_seed(model, 0) for name, model in models.items() if not isinstance(model, Ceiling)}
        costs = measure_costs(networks, FLOOR, config.cost, evaluation.device)
        origin = Origin.of_this_process(
            "experiments.evaluate",
            "experiments.evaluate.evaluate(config), from Python",
            machine(evaluation.device, torch.get_num_threads(), "float32"),
            {f"{role}={config[role].name}": digest for role, digest in evaluation.data_fingerprints.items()},
            evaluation.notes,
        )
        files = write(results, scores, costs, config, origin)
        run.metrics(metrics(results))
        for file in files:
            run.file(file, f"tables/{file.name}")
        kept.clear()
    return Evaluated(scores, results, costs, evaluation.notes, files, shown)


def _measured(
    evaluation: Evaluation, kept: KeptScores, model: nn.Module | Ceiling, arm: str, seed: int, drawn: Path | None
) -> Kept:
    """What a stopped run has kept of an arm; or else measures it, draws its pictures into `drawn`, and keeps it."""
    place = kept.place(model, arm, seed)
    if (found := kept.read(place)) is not None:
        log.info("arm %s, seed %s: measured by a run that was stopped", arm, seed)
        for note in found.notes:
            evaluation.task.note(note)
        return found
    found = Kept(evaluation.scores(model, arm, seed), notes=evaluation.notes)
    for picture in evaluation.pictures if drawn is not None else ():
        found.pictures[_draw(picture, arm, drawn)] = f"pictures/{arm}/{picture.name}.png"
    kept.write(place, found)
    return found


def _draw(picture: Picture, arm: str, folder: Path) -> Path:
    """Draws an image on which an arm did badly."""
    path = folder / f"{arm}_{clean_name(picture.name).replace('/', '_')}.png"
    with replacing(path) as part:
        panel(picture.columns).save(part, format="png")
    return path


def _check(config: DictConfig) -> None:
    """Refuses arms and outputs that cannot work. Raises SettingError."""
    check_seeds(config.seeds)
    check_once("ceilings", config.ceilings)
    check_confidence(config.confidence)
    check_name(config.name)
    check_writable(Path(config.out_dir))


def _support(config: DictConfig, data: dict[str, DataSet], backbone: Backbone, cache: FeatureCache) -> Images | None:
    """The images that checkpoints are adapted to; None: they are measured as they are."""
    check_count("adapt.images", config.adapt.images, 0)
    if not config.adapt.images:
        return None
    check_adaptation(config.adapt)
    if config.adapt.images > len(data["data"]):
        raise SettingError(f"adapt.images={config.adapt.images}, but data has {len(data['data'])} images")
    finer = config.adapt.targets == "encoder"
    return Images(
        data["data"], range(config.adapt.images), backbone, config.adapt, cache, finer, "encoding the support"
    )


def _sizes(config: DictConfig) -> Sizes:
    """Raises SettingError: sizes, limits or scale that make no sense."""
    if not isinstance(config.image_size, (int, ListConfig)):
        raise SettingError(f"image_size must be a number or [rows, columns], got {config.image_size}")
    side = config.image_size
    image = output_grid([side, side] if isinstance(side, int) else list(side), (1, 1), "image_size")
    others = [output_grid(_plain(config[f"{name}_size"]), image, f"{name}_size") for name in _SEEN]
    for name in ("max_train_images", "max_val_images"):
        if config[name] is not None and (type(config[name]) is not int or config[name] < 1):
            raise SettingError(f"{name} must be null or at least 1, got {config[name]}")
    if type(config.ceiling_scale) is not int or config.ceiling_scale < 2:
        raise SettingError(f"ceiling_scale must be a whole number from 2, got {config.ceiling_scale}")
    if not config.cache.memory_gb >= 0:
        raise SettingError(f"cache.memory_gb must not be negative, got {config.cache.memory_gb}")
    return Sizes(image, *others)


_SEEN = ("encoder", "guidance", "output")


def _plain(size: int | ListConfig | None) -> int | list[int] | None:
    return list(size) if isinstance(size, ListConfig) else size


def _backbone(config: DictConfig) -> Backbone:
    try:
        return backbone_from_config(config.backbone)
    except (ValueError, OSError) as error:  # what the core refuses: a weight file, a value
        raise SettingError(str(error)) from error


def _check_encoder(encoder: Encoder, sizes: Sizes) -> None:
    if min(sizes.encoder) < encoder.least:
        raise SettingError(
            f"encoder_size={list(sizes.encoder)} is too small: backbone={encoder.name} needs {encoder.least} pixels"
        )


def _fingerprint(config: DictConfig, sizes: Sizes, data: dict[str, str], backbone: Backbone) -> str:
    task = OmegaConf.to_container(config.task, resolve=True)
    limits = config.max_train_images, config.max_val_images, config.ceiling_scale
    adapt = (
        sorted(one_number(OmegaConf.to_container(config.adapt, resolve=True)).items()) if config.adapt.images else []
    )
    known = [_FORMAT, *adapt, sorted(task.items()), sizes, limits, sorted(data.items()), fingerprint(backbone)]
    return hashlib.sha256(repr(known).encode()).hexdigest()
