"""Trains an upsampler on photographs by the released procedure: `python -m experiments.train`, or `train(config)`.

A training is a function of its configuration. What step n sees and draws depends on (seed, n) alone
(`experiments/views.py`), and everything else it depends on lies in one state file, written atomically every
`checkpoint_every` steps; so a training that was killed goes on where it was, and on one machine ends with the same
weights, bit for bit, as if it had not been.
"""

import copy
import logging
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

import core
from core.backbones import Backbone, backbone_from_config
from core.hooks import Batch
from core.registry import discover
from experiments.atomic import replacing
from experiments.data import DataError, open_data
from experiments.feature_cache import FeatureCache, NotFinite
from experiments.images import NoImages
from experiments.optimisation import Optimiser, OptimiserSettings
from experiments.settings import SettingError, check_writable, pick_device
from experiments.tracking import Run, TrackingUnavailable, track
from experiments.training_state import STATE_NAME, State, load_state, save_state
from experiments.validation import Validation
from experiments.views import StepViews, Views, ViewSettings, stream

log = logging.getLogger(__name__)

EXPECTED_ERRORS = (SettingError, DataError, NoImages, NotFinite, TrackingUnavailable, core.WeightsError, OSError)
RESUME = ("auto", "never", "must")
_FREE_KEYS = (
    "tracking",
    "out_dir",
    "resume",
    "device",
    "num_workers",
    "checkpoint_every",
    "log_every",
    "stop_after",
    "cache",
)
"""Settings that a resumed training may change: they do not change its result."""


class NonFiniteLoss(NotFinite):
    """A loss became NaN or infinite; the message says where the batch was saved."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    checkpoint: Path
    """Of the last step: the moving average of the weights where there is one."""
    best: Path | None
    """Of the best validation; None without validation."""
    state: State
    run_id: str


def train(config: DictConfig) -> Trained:
    """Runs the training of `config` (configs/train.yaml) to its last step, from where it was left.

    Raises:
        SettingError: settings that cannot work, a folder that cannot be written, a resumed training with other
            settings. DataError, NoImages, WeightsError, OSError, TrackingUnavailable: what they name cannot be used.
        NonFiniteLoss, NotFinite: a loss or a feature is NaN or infinite.
    """
    training = Training(config)
    run_id = training.state.run_id or None
    with track(config, training.device, run_id=run_id) if training.leads else track(_untracked(config)) as run:
        training.state.run_id = run.run_id
        trained = training.run(run)
    if training.shard[1] > 1:
        training.accelerator.end_training()  # or the other processes' threads abort at exit
    return trained


class Training:
    """One training: everything opened and checked, ready to run."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.out_dir = Path(config.out_dir).expanduser()
        self.accelerator = _accelerator(config)
        self.device, self.leads = self.accelerator.device, self.accelerator.is_main_process
        self.views_settings = ViewSettings(**OmegaConf.to_container(config.views))
        settings = OptimiserSettings(**OmegaConf.to_container(config.optimiser))
        _check_counts(config)
        if self.leads:
            check_writable(self.out_dir)
        self.data = open_data(config.data)
        self.backbones = _backbones(config, self.views_settings.view, self.device)
        self.cache = FeatureCache(config.cache.folder, config.cache.max_gb)
        model = _model(config).to(self.device).train()
        self.model = self.accelerator.prepare_model(model)
        self.micro_steps = config.backbones_per_step
        settings = replace(
            settings, accumulate=settings.accumulate * self.micro_steps, warmup=settings.warmup * self.micro_steps
        )
        self.optimiser = Optimiser(self.model, settings, config.steps * self.micro_steps, self.accelerator)
        self.objective = core.build_filler("objective", config.objective)
        self.learner = core.build_filler("learner", config.learner)
        self.shard = (self.accelerator.process_index, self.accelerator.num_processes)
        self.views = Views(
            self.data,
            self.views_settings,
            [backbone.patch_size for backbone in self.backbones],
            config.seed,
            config.batch_size,
            config.steps,
            self.shard,
        )
        self.state = self._resume()

    def run(self, run: Run) -> Trained:
        """Goes on to the last step (or `stop_after`)."""
        config, state = self.config, self.state
        run.tag("data.fingerprint", self.data.fingerprint)
        validation = (
            Validation(config, self.backbones, self.views_settings) if self.leads and config.validate_every else None
        )
        last = min(config.steps, config.stop_after or config.steps)
        loader = DataLoader(
            self.views, None, sampler=range(state.step, last), num_workers=config.num_workers, persistent_workers=False
        )
        if validation and state.step == 0:
            self._validate(validation, run)
        progress = tqdm(total=config.steps, initial=state.step, desc="training", disable=None if self.leads else True)
        for views in loader:
            started = time.perf_counter()
            losses = self._step(views)
            state.seconds += time.perf_counter() - started
            state.step, state.losses = views.step + 1, losses
            progress.set_postfix(loss=f"{sum(losses.values()):.4f}", refresh=False)
            progress.update()
            ends = state.step == last
            if state.step % config.log_every == 0 or ends:
                self._log(losses, run)
            if validation and (state.step % config.validate_every == 0 or state.step == config.steps):
                self._validate(validation, run)
            if state.step % config.checkpoint_every == 0 or ends:
                self._save()
        progress.close()
        return self._finish(run)

    def _step(self, views: StepViews) -> dict[str, float]:
        """All micro-steps of one step -> their mean losses, of all processes."""
        torch.manual_seed(stream(self.config.seed, "step", views.step, self.shard[0]).initial_seed())
        sums: dict[str, float] = {}
        for one in self._of_each_backbone(views):
            batch = self.batch(one)
            losses = self.learner.step(self.model, self.objective, batch, self.optimiser)
            for name, loss in losses.items():
                mean = float(self.accelerator.reduce(loss.detach().float(), "mean"))
                sums[name] = sums.get(name, 0.0) + mean / self.micro_steps
        if not math.isfinite(sum(sums.values())):
            raise NonFiniteLoss(self._report_non_finite(one, batch, sums))
        return sums

    def _of_each_backbone(self, views: StepViews) -> list[StepViews]:
        if self.micro_steps == 1:
            return [views]
        order = torch.randperm(len(self.backbones), generator=stream(self.config.seed, "backbones", views.step))
        return [self.views.of_backbone(views.step, index) for index in order[: self.micro_steps].tolist()]

    def batch(self, views: StepViews) -> Batch:
        """The views as the backbone of the step encodes them."""
        backbone, s = self.backbones[views.backbone], self.views_settings
        features = self.cache.encode(backbone, views.whole.to(self.device), views.names)  # (B,C,h,w)
        names = [f"a crop of {name}" for name in views.names for _ in range(max(1, s.crops))]
        target = self.cache.encode(backbone, views.crops.to(self.device), names)  # (B·n,C,h,w)
        normalised = core.imagenet_normalize
        return Batch(
            image=normalised(views.guidance.to(self.device)),
            features=features,
            target=target,
            output_size=(features.shape[-2] * s.scale, features.shape[-1] * s.scale),
            corners=None if views.corners is None else views.corners.to(self.device),
            augmented_image=normalised(views.augmented.to(self.device)),
        )

    def _resume(self) -> State:
        path = self.out_dir / STATE_NAME
        if self.config.resume == "never" or not path.exists():
            if self.config.resume == "must":
                raise SettingError(f"resume=must, but {path} does not exist")
            return State()
        state, tensors = load_state(path, self._identity())
        inner = self.accelerator.unwrap_model(self.model)
        inner.load_state_dict({name.removeprefix("model/"): tensors[name] for name in tensors if name[:6] == "model/"})
        self.optimiser.restore(tensors, state.step * self.micro_steps)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        log.info("going on from step %d of %s", state.step, path)
        return state

    def _save(self) -> None:
        if not self.leads:
            return
        inner = self.accelerator.unwrap_model(self.model)
        tensors = {f"model/{name}": tensor for name, tensor in inner.state_dict().items()}
        scaler = self.accelerator.scaler
        self.state.scaler = {} if scaler is None else scaler.state_dict()
        save_state(self.out_dir / STATE_NAME, self.state, tensors | self.optimiser.tensors(), self._identity())
        with self.optimiser.averaged():
            core.save(inner, self.out_dir / "last.safetensors")

    def _identity(self) -> dict[str, Any]:
        """The settings on which the result depends, and the data."""
        settings = OmegaConf.to_container(self.config, resolve=True, enum_to_str=True)
        settings = {key: value for key, value in settings.items() if key not in _FREE_KEYS}
        return settings | {"data_fingerprint": self.data.fingerprint, "processes": self.accelerator.num_processes}

    def _log(self, losses: dict[str, float], run: Run) -> None:
        values = dict(losses) | {"loss": sum(losses.values()), "grad_norm": self.optimiser.grad_norm}
        values["lr"] = self.optimiser.adam.param_groups[0]["lr"]
        values["steps_per_s"] = self.state.step / max(self.state.seconds, 1e-9)
        run.metrics({key: value for key, value in values.items() if math.isfinite(value)}, self.state.step)
        log.debug("step %d: %s", self.state.step, values)

    def _validate(self, validation: Validation, run: Run) -> None:
        inner = self.accelerator.unwrap_model(self.model)
        with self.optimiser.averaged():
            inner.eval()
            measured = validation.measure(inner)
            validation.pictures(inner, run, self.state.step)
            inner.train()
            run.metrics(measured, self.state.step)
            log.info("step %d: %s", self.state.step, ", ".join(f"{k} {v:.4f}" for k, v in sorted(measured.items())))
            result = measured["val/cosine"]
            if self.state.best is None or result > self.state.best:
                self.state.best = result
                core.save(inner, self.out_dir / "best.safetensors")

    def _report_non_finite(self, views: StepViews, batch: Batch, losses: dict[str, float]) -> str:
        path = self.out_dir / f"non_finite_step_{views.step}.safetensors"
        tensors = {
            "image": batch.image,
            "augmented_image": batch.augmented_image,
            "features": batch.features,
            "target": batch.target,
            "corners": batch.corners,
        }
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        with replacing(path) as part:
            save_file(kept, part, {"names": "\n".join(views.names), "losses": str(losses)})
        return (
            f"step {views.step}: the loss is not finite ({losses}) for {', '.join(views.names)}. The batch is in "
            f"{path}, the training up to its last checkpoint in {self.out_dir / STATE_NAME}. A lower optimiser.lr, "
            "optimiser.clip=1 or mixed_precision=no may help"
        )

    def _finish(self, run: Run) -> Trained:
        checkpoint, best = self.out_dir / "last.safetensors", self.out_dir / "best.safetensors"
        if self.leads and checkpoint.exists():
            run.file(checkpoint)
            if best.exists():
                run.file(best)
        return Trained(checkpoint, best if best.exists() else None, self.state, run.run_id)


def _accelerator(config: DictConfig) -> Accelerator:
    device = pick_device(config.device)
    if config.mixed_precision not in ("no", "bf16", "fp16"):
        raise SettingError(f"mixed_precision must be no, bf16 or fp16, got {config.mixed_precision}")
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise SettingError("mixed_precision=fp16 needs a GPU: take bf16 or no")
    AcceleratorState._reset_state()  # it allows one precision a process; a sweep or a notebook trains with several
    return Accelerator(cpu=device.type == "cpu", mixed_precision=config.mixed_precision)


def _check_counts(config: DictConfig) -> None:
    for key in ("steps", "batch_size", "backbones_per_step", "checkpoint_every", "log_every"):
        if config[key] < 1:
            raise SettingError(f"{key} must be at least 1, got {config[key]}")
    if config.resume not in RESUME:
        raise SettingError(f"resume must be one of {', '.join(RESUME)}, got {config.resume}")


def _backbones(config: DictConfig, view: int, device: torch.device) -> list[Backbone]:
    """The encoders, each checked to give the grid that its stride promises: crops are cut on it."""
    nodes = OmegaConf.to_container(config.backbones, resolve=True)
    if not nodes:
        raise SettingError("backbones is empty: give at least one, such as backbones=[{name: embedded}]")
    found = [backbone_from_config(node).to(device) for node in nodes]
    for backbone in found:
        with torch.no_grad():
            grid = tuple(backbone(torch.full((1, 3, view, view), 0.5, device=device)).shape[-2:])
        if grid != (view // backbone.patch_size,) * 2:
            raise SettingError(
                f"backbone {backbone.name} gives {grid[0]}x{grid[1]} features for views.view={view}, not one for each "
                f"{backbone.patch_size} pixels: crops cannot be cut on its grid; choose another view or backbone"
            )
    strides = {backbone.name: backbone.patch_size for backbone in found}
    if config.backbones_per_step > len(found):
        raise SettingError(f"backbones_per_step={config.backbones_per_step}, but there are {len(found)} backbones")
    if config.backbones_per_step > 1 and len(set(strides.values())) > 1:
        named = ", ".join(f"{name} {stride}" for name, stride in strides.items())
        raise SettingError(f"backbones of one step must have one stride (their crops are the same), got {named}")
    return found


def _model(config: DictConfig) -> core.AnyUp:
    """New, or warm-started from `init_from`; without gradients for what `freeze` names."""
    model = core.from_config({**config, "compile": False})
    if config.init_from:
        new = core.warm_start(model, Path(config.init_from).expanduser())
        log.info("weights of %s; new: %s", config.init_from, ", ".join(new) or "none")
    parts = dict(model.named_children())
    for name in config.freeze:
        if name not in parts:
            raise SettingError(f"freeze={name}: the model has no such part; there are: {', '.join(parts)}")
        parts[name].requires_grad_(False)
    if config.compile:
        model.compile_encoders()
    return model


def _untracked(config: DictConfig) -> DictConfig:
    quiet = copy.deepcopy(config)
    quiet.tracking.enabled = False
    return quiet


discover()


@hydra.main(version_base=None, config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """The command line of `train`."""
    try:
        trained = train(config)
    except EXPECTED_ERRORS as error:
        log.error("%s", error)
        sys.exit(2)
    log.info("%d steps; weights: %s; best: %s", trained.state.step, trained.checkpoint, trained.best or "none")


if __name__ == "__main__":
    main()
