"""Trains AnyUp, or a peer in its place, on photographs by the released procedure: `python -m experiments.train`.

A training is a function of its configuration. What step n sees and draws depends on (seed, n) alone
(`experiments/training/views.py`), and everything else it depends on lies in one state file, written atomically every
`checkpoint_every` steps; so a training that was killed goes on where it was, and on one machine ends with the same
weights, bit for bit, as if it had not been.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

import core
from core.batch import Batch
from core.registry import discover
from core.streams import generator
from experiments.atomic import CannotWrite
from experiments.data import open_data
from experiments.data.cell_digest import cell_digest, is_of_a_cell
from experiments.data.feature_cache import FeatureCache, NotFinite
from experiments.errors import Interrupted
from experiments.progress import Progress
from experiments.reports.pictures import panel
from experiments.settings import SettingError, check_writable
from experiments.tracking.store import Run, track
from experiments.training.batches import Batches
from experiments.training.curves import CURVES_NAME, Curves, plot
from experiments.training.optimiser import Optimiser, OptimiserSettings
from experiments.training.peers import check_fits, save_model
from experiments.training.setup import (
    alone_in,
    check_clips,
    check_held_out,
    check_images,
    check_settings,
    deciding_settings,
    make_accelerator,
    make_trainable,
    open_encoders,
    remove_former,
    untracked,
    warn_of_small_images,
)
from experiments.training.state import STATE_NAME, State, load_state, save_batch, save_state
from experiments.training.validation import PRIMARY, Validation
from experiments.training.views import StepViews, Views, ViewSettings

log = logging.getLogger(__name__)

RESULTS = (STATE_NAME, "best.safetensors", "last.safetensors", CURVES_NAME)
"""What a training leaves in its folder; the state first, which is what another start would go on from."""


class NonFiniteLoss(NotFinite):
    """A loss became NaN or infinite; the message says where the batch was saved."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    checkpoint: Path
    """Of the last step: the moving average of the weights where there is one."""
    best: Path | None
    """Of the best validation; None without validation."""
    curves: Path
    """Every logged value: columns step, name, value (`experiments.training.curves.read_table`)."""
    state: State
    """Steps, time, losses of the last step, and `state.validation`: what the last validation measured."""
    run_id: str


def train(config: DictConfig, parent: Run | str | None = None) -> Trained:
    """Runs the training of `config` (configs/train.yaml) to its last step, from where it was left.

    May be called any number of times in a process; trainings after the first find encoders loaded and files checked.

    Args:
        parent: a tracked run, or its identifier, below which the training's is listed.

    Raises:
        SettingError: settings that cannot work, a folder that cannot be written, a resumed training with other
            settings. DataError, NoImages, WeightsError, OSError, TrackingUnavailable: what they name cannot be used.
        NonFiniteLoss, NotFinite: a loss or a feature is NaN or infinite.
        CannotWrite: the disk is full, say; the training goes on from its last checkpoint once there is room.
    """
    training = Training(config)
    recorded = config if training.leads else untracked(config)
    with alone_in(training.out_dir) if training.leads else nullcontext():
        training.resume()
        with track(recorded, training.device, training.state.run_id or None, parent) as run:
            training.state.run_id = run.run_id
            trained = training.run(run)
    if training.shard[1] > 1:
        training.accelerator.end_training()  # or the other processes' threads abort at exit
    return trained


class Training:
    """One training: everything opened and checked, ready to run.

    Args:
        config: see configs/train.yaml.
        replaced_by: makes of the model another one to be trained in its place, such as the dense reference.
    """

    def __init__(self, config: DictConfig, replaced_by: Callable[[core.AnyUp], nn.Module] = lambda model: model):
        self.config = config
        self.out_dir = Path(config.out_dir).expanduser()
        check_settings(config)
        self.views_settings = ViewSettings(**OmegaConf.to_container(config.views))
        settings = OptimiserSettings(**OmegaConf.to_container(config.optimiser))
        self.accelerator = make_accelerator(config)
        self.device, self.leads = self.accelerator.device, self.accelerator.is_main_process
        if self.leads:
            check_writable(self.out_dir)
        self.data = open_data(config.data)
        check_images(self.data, self.views_settings)
        self.backbones = open_encoders(config, [grid.view for grid in self.views_settings.grids], self.device)
        self.cache = FeatureCache(config.cache.folder, config.cache.max_gb)
        self.inner = make_trainable(config, replaced_by).to(self.device).train()
        """The bare model, objective and learner."""
        check_fits(self.inner.model, self.backbones, self.views_settings)
        check_clips(self.inner.batch_parts, self.views_settings, self.data)
        self.trainable = self.accelerator.prepare_model(self.inner)
        self.optimiser = Optimiser(self.trainable, settings, config.steps, self.accelerator)
        self.shard = (self.accelerator.process_index, self.accelerator.num_processes)
        patch_sizes = [backbone.patch_size for backbone in self.backbones]
        how = (config.seed, config.batch_size, config.steps, self.shard)
        self.views = Views(self.data, self.views_settings, patch_sizes, *how, self.inner.batch_parts)
        asked = (self.inner.batch_parts, self.inner.needs_target)
        where = (self.cache, self.device, *asked, config.seed, self.shard[0])
        self.batch = Batches(self.backbones, *where)
        """The views of a step -> `core.Batch`."""
        self.state, self.curves = State(), Curves(self.out_dir / CURVES_NAME)
        self.tasks: list[Batch] = []
        """Of the latest step."""

    def run(self, run: Run) -> Trained:
        """Goes on to the last step (or `stop_after`).

        Raises:
            Interrupted: Ctrl-C; says at which step, and how to go on.
        """
        try:
            return self._run(run)
        except KeyboardInterrupt as stopped:
            path = self.out_dir / STATE_NAME
            kept = f"goes on from the state in {path}" if path.exists() else "begins anew: no state had been saved"
            raise Interrupted(
                f"stopped by Ctrl-C after step {self.state.step} of {self.config.steps}; the same command {kept}"
            ) from stopped

    def _run(self, run: Run) -> Trained:
        config, state = self.config, self.state
        run.tag("data.fingerprint", self.data.fingerprint)
        last = min(config.steps, config.stop_after or config.steps)
        if self.leads and state.step < last:
            log.info("%d images; steps %d to %d of %d", len(self.data), state.step + 1, last, config.steps)
            warn_of_small_images(self.data, self.views_settings)
        validation = None
        if self.leads and config.validate_every and state.step < last:
            validation = Validation(config, self.backbones, self.views_settings, self.cache)
            check_held_out(self.data, validation.data, config.val_images)
        loader = DataLoader(
            self.views, None, sampler=range(state.step, last), num_workers=config.num_workers, persistent_workers=False
        )
        if self.leads and state.step == 0:
            remove_former(self.out_dir, RESULTS)
        if validation and state.step == 0:
            self._validate(validation, run)
        progress = Progress(None, "training", "step", config.steps, state.step, self.leads)
        for views in loader:
            started = time.perf_counter()
            losses = self.step(views)
            state.seconds += time.perf_counter() - started
            state.step, state.losses = views.step + 1, losses
            progress.note = f"loss {sum(losses.values()):.4f}"
            progress.update()
            ends = state.step == last
            if state.step % config.log_every == 0 or ends:
                self._log(losses, run, views)
            if validation and (state.step % config.validate_every == 0 or state.step == config.steps):
                self._validate(validation, run)
            if state.step % config.checkpoint_every == 0 or ends:
                self._save()
        progress.close()
        return self._finish(run)

    def step(self, views: StepViews) -> dict[str, float]:
        """Encodes the views and updates the weights, with all backbones of the step -> mean losses of all processes.

        Raises:
            NonFiniteLoss, NotFinite: the batch of a loss that is NaN or infinite is saved first.
        """
        torch.manual_seed(generator(self.config.seed, "step", views.step, self.shard[0]).initial_seed())
        several = self.of_each_backbone(views)
        self.tasks = tasks = [self.batch(one) for one in several]
        sums: dict[str, float] = {}
        for one, batch, losses in zip(
            several, tasks, self.inner.learner.step(self.trainable, tasks, self.optimiser), strict=True
        ):
            means = {key: float(self.accelerator.reduce(loss.detach().float(), "mean")) for key, loss in losses.items()}
            if not math.isfinite(sum(means.values())):
                raise NonFiniteLoss(self._report_non_finite(one, batch, means))
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + mean / len(tasks)
        return sums

    def of_each_backbone(self, views: StepViews) -> list[StepViews]:
        """The views of a step for each backbone that it trains with."""
        count = self.config.backbones_per_step
        if count == 1:
            return [views]
        order = torch.randperm(len(self.backbones), generator=generator(self.config.seed, "backbones", views.step))
        return [self.views.of_backbone(views.step, index) for index in order[:count].tolist()]

    def resume(self) -> None:
        """Takes back what an earlier start left in `out_dir`, as the setting `resume` says.

        Raises:
            SettingError: `must`, but there is nothing; other settings (but for more steps, with `extend`), or a damaged
                table of curves. WeightsError: a damaged state.
        """
        path = self.out_dir / STATE_NAME
        if self.config.resume == "never" or not path.exists():
            if self.config.resume == "must":
                raise SettingError(f"resume=must, but {path} does not exist")
            return
        self.state, tensors = load_state(path, self._identity(), self.config.extend)
        self.curves = Curves(self.out_dir / CURVES_NAME, until=self.state.step)
        weights = {name.removeprefix("weights/"): tensors[name] for name in tensors if name.startswith("weights/")}
        self.inner.load_state_dict(weights)
        self.optimiser.restore(tensors, self.state.step)
        if self.accelerator.scaler is not None and self.state.scaler:
            self.accelerator.scaler.load_state_dict(self.state.scaler)
        log.info("going on from step %d of %s", self.state.step, path)

    def _save(self) -> None:
        """The curves and the weights alone, then the state to go on from: killed between, it does so again."""
        of_optimiser = self.optimiser.tensors()  # of all processes
        if not self.leads:
            return
        path = self.out_dir / STATE_NAME
        tensors = {f"weights/{name}": tensor for name, tensor in self.inner.state_dict().items()}
        scaler = self.accelerator.scaler
        self.state.scaler = {} if scaler is None else scaler.state_dict()
        with self._told_how_to_go_on():
            self.curves.save()
            with self.optimiser.averaged():
                save_model(self.inner.model, self.out_dir / "last.safetensors", self.inner.learner)
            save_state(path, self.state, tensors | of_optimiser, self._identity())

    @contextmanager
    def _told_how_to_go_on(self) -> Iterator[None]:
        try:
            yield
        except CannotWrite as error:
            state = self.out_dir / STATE_NAME
            done = f"from its last checkpoint, {state}" if state.exists() else "from its beginning"
            raise CannotWrite(f"{error}. Once there is room, the same command goes on {done}") from error

    def _identity(self) -> dict[str, Any]:
        """The settings on which the result depends, the data, and the code of what was defined in a notebook."""
        more = {"data_fingerprint": self.data.fingerprint, "processes": self.accelerator.num_processes}
        model = self.inner.model
        parts = (model, *model.children(), self.inner.objective, self.inner.learner)
        cells = {type(part).__qualname__: cell_digest(type(part)) for part in parts if is_of_a_cell(type(part))}
        return deciding_settings(self.config) | more | ({"class": cells} if cells else {})

    def _log(self, losses: dict[str, float], run: Run, views: StepViews) -> None:
        values = dict(losses) | {"loss": sum(losses.values()), "grad_norm": self.optimiser.grad_norm}
        mixed = len(self.backbones) > 1 and self.config.backbones_per_step == 1
        if mixed:  # losses of different encoders make no one curve
            values[f"loss/{self.backbones[views.backbone].name}"] = values["loss"]
        values["lr"] = self.optimiser.lr
        with torch.no_grad():
            found = self.inner.objective.diagnostics(self.inner.model, self.tasks[0]) if self.leads else {}
        values |= {f"diagnostics/{key}": value for key, value in found.items()}
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        self.curves.add(self.state.step, values)
        run.metrics(values | {"steps_per_s": self.state.step / max(self.state.seconds, 1e-9)}, self.state.step)
        log.debug("step %d: %s", self.state.step, values)

    def _validate(self, validation: Validation, run: Run) -> None:
        state = self.state
        with self.optimiser.averaged():
            self.inner.eval()
            state.validation = validation.measure(self.inner.model, run, state.step)
            self.inner.train()
            self.curves.add(state.step, state.validation)
            run.metrics(state.validation, state.step)
            if run.run_id and (shown := self.inner.objective.pictures()):
                run.picture(panel(shown), f"validation/{state.step:06d}_objective.png")
            log.info("step %d: %s", state.step, ", ".join(f"{k} {v:.4f}" for k, v in sorted(state.validation.items())))
            result = state.validation[f"val/{PRIMARY}"]
            if state.best is None or result > state.best:
                state.best = result
                with self._told_how_to_go_on():
                    save_model(self.inner.model, self.out_dir / "best.safetensors", self.inner.learner)

    def _report_non_finite(self, views: StepViews, batch: Batch, losses: dict[str, float]) -> str:
        path = self.out_dir / f"non_finite_step_{views.step}.safetensors"
        try:
            save_batch(path, batch, views.names, losses)
            kept = f"The batch is in {path}"
        except CannotWrite as error:
            kept = f"The batch could not be kept ({error})"
        return (
            f"step {views.step}: the loss is not finite ({losses}) for {', '.join(views.names)}. {kept}, the training "
            f"up to its last checkpoint in {self.out_dir / STATE_NAME}. A lower optimiser.lr, optimiser.clip=1 or "
            "mixed_precision=no may help"
        )

    def _finish(self, run: Run) -> Trained:
        checkpoint, best = self.out_dir / "last.safetensors", self.out_dir / "best.safetensors"
        if self.leads and run.run_id and checkpoint.exists():
            for file in (checkpoint, best, self.curves.path):
                if file.exists():
                    run.file(file)
            run.figure(plot({"training": self.curves.points}), "plots/curves.png")
        return Trained(checkpoint, best if best.exists() else None, self.curves.path, self.state, run.run_id)


discover()
