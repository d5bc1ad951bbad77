"""One arm with one seed: its folder, the work done there (train, evaluate on each task), and what is finished.

`MEMBERS_DIR/ARM-SEED-KEY/`, KEY a digest of configuration, code and training data (`Arm.key`):

    last.safetensors, state.safetensors   weights and state of the training, from which it resumes
    trained.json                          exists when the training is finished
    TASK-KEY.parquet                      scores, KEY a digest of the task's settings, code and data; whole or absent
    TASK-KEY/                             pictures of the images with the worst scores
    runs.json                             sweep's run -> this member's run, and whether all is recorded there
    failed.json                           why it failed the last time, and an identifier of that failure
    lock                                  held by the process that works here
"""

import json
import logging
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.atomic import replacing
from experiments.data.code_version import code_of_user, evaluation_version
from experiments.data.identity import digest_of, files_of, fingerprint_of, names_of
from experiments.measuring.evaluation import Evaluation
from experiments.measuring.tasks import Ceiling, tasks
from experiments.reports.pictures import panel
from experiments.reports.results import Planned
from experiments.settings import SettingError, pick_device
from experiments.statistics.scores import check
from experiments.sweeps.arms import (
    Arm,
    check_names,
    composed,
    standalone,
    strings,
)
from experiments.sweeps.results import Unit, means
from experiments.tracking.run import clean_name
from experiments.tracking.store import Run, track
from experiments.training.loop import Training

log = logging.getLogger(__name__)

_FREE_KEYS = ("tracking", "out_dir", "device", "cache", "name", "confidence")
_UNUSED_KEYS = ("checkpoints", "peers", "means", "blurs", "ceilings", "seeds", "cost")
"""Settings of an evaluation that do not change its scores, and settings that only `experiments.evaluate` reads."""


@dataclass
class SweepTask:
    """An evaluation of all arms. It is opened when an arm first needs it, and shared by all."""

    name: str
    config: DictConfig
    renames: bool = False
    """Whether its scores get its own name instead of that of the kind of task, which another task has as well."""
    _told: set[str] = field(default_factory=set)
    """Arms that it has warned about."""

    @property
    def trains(self) -> bool:
        """Whether it trains probes with the seed. Then even arms that are the same for all seeds differ."""
        return tasks()[self.config.task.name].trains

    @property
    def ceilings(self) -> tuple[str, ...]:
        """The ceilings that it can measure."""
        return tasks()[self.config.task.name].ceilings

    @property
    def of(self) -> tuple[str, str, str]:
        """Kind of task, data and backbone, as in the scores."""
        return self.config.task.name, self.config.val_data.name, self.config.backbone.name

    @cached_property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.config)

    def open(self) -> None:
        """Opens it, if it is not open.

        Raises:
            SettingError: it refuses its settings. DataError: its data cannot be opened.
        """
        try:
            self.evaluation  # noqa: B018  a property, computed once
        except SettingError as error:
            raise SettingError(f"task {self.name}: {error}") from error

    @property
    def key(self) -> str:
        """Digest of what its scores depend on, and of its name if the scores have it. Raises as `measured`."""
        return digest_of({"measured": self.measured, "called": self.name}) if self.renames else self.measured

    @cached_property
    def measured(self) -> str:
        """Digest of settings, code and data; does not open it.

        Raises:
            DataError: its data cannot be opened.
        """
        settings = OmegaConf.to_container(self.config, resolve=True, enum_to_str=True)
        settings = {key: value for key, value in settings.items() if key not in (*_FREE_KEYS, *_UNUSED_KEYS)}
        used = ("data", "val_data") if self.trains else ("val_data",)
        data = {key: fingerprint_of(self.config[key]) for key in used}
        known = {"settings": settings, "data": data, "files": files_of(settings), "code": evaluation_version()}
        if own := code_of_user(tasks()[self.config.task.name]):
            known["task"] = own
        return digest_of(known)

    def unit(self, arm: Arm, seed: int, model: nn.Module | Ceiling, member: str) -> Unit:
        """Measures an arm -> its scores, with the remarks for the tables; `member` is the arm's key.

        Raises:
            as `Evaluation.scores`, and ScoreError as `check`.
        """
        scores = self.evaluation.scores(model, arm=arm.name, seed=seed)
        if self.renames:
            scores["task"] = [f"{self.name}/{called.partition('/')[2]}".rstrip("/") for called in scores["task"]]
        notes = [f"{self.name}: {note}" for note in self.evaluation.notes]
        if seen := self._seen_by(arm):
            notes.append(f"{self.name}: {seen} of the {len(self.evaluation.image_names)} images were trained on")
            if arm.name not in self._told:
                log.warning("arm %s, %s; to split a folder, set data.last=N and val_data.first=N", arm.name, notes[-1])
                self._told.add(arm.name)
        return Unit(arm.name, seed, self.name, member, self.evaluation.fingerprint, check(scores), notes)

    def _seen_by(self, arm: Arm) -> int:
        """How many of its images the arm was trained on. Images of one name in one kind of data count as the same."""
        if arm.training is None or arm.training.data.name != self.config.val_data.name:
            return 0
        return len(names_of(arm.training.data) & set(self.evaluation.image_names))


def read_tasks(config: DictConfig) -> list[SweepTask]:
    """The tasks of a sweep, composed.

    Raises:
        SettingError: there are no tasks, two have one name or are the same evaluation, or an override is unknown.
    """
    if not config.tasks:
        raise SettingError("there are no tasks: add '+tasks={NAME: [OVERRIDES of experiments.evaluate], ...}'")
    check_names("tasks")
    found: list[SweepTask] = []
    for name in config.tasks:
        try:
            overrides = [*strings(config, "evaluate"), *strings(config, "tasks", name), f"device={config.device}"]
            task = SweepTask(name, composed("evaluate", overrides))
        except SettingError as error:
            raise SettingError(f"task {name}: {error}") from error
        task.config.tracking = standalone(config.tracking)
        for other in found:
            if other.measured == task.measured:
                raise SettingError(f"tasks {other.name} and {name} are the same evaluation: leave one out")
        found.append(task)
    alike = Counter(task.of for task in found)
    for task in found:
        task.renames = alike[task.of] > 1
    return found


class Member:
    """An arm with a seed, and the tasks that it is measured on."""

    def __init__(self, arm: Arm, seed: int, tasks: list[SweepTask], folder: Path):
        self.arm, self.seed, self.tasks, self.key = arm, seed, tasks, arm.key(seed)
        self.folder = folder / f"{arm.name}-{seed}-{self.key[:12]}"
        self._former = self._noted()  # an earlier failure; not told by its time, as a shared disk has another clock

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def planned(self) -> Planned:
        return Planned(self.arm.name, self.arm.kind, self.seed, self.key, [task.name for task in self.tasks])

    def units(self) -> list[Unit]:
        """The scores measured so far."""
        files = {task.name: self.scores_file(task) for task in self.tasks}
        return [Unit.read(path, self.arm.name, self.seed, task) for task, path in files.items() if path.exists()]

    def scores_file(self, task: SweepTask) -> Path:
        return self.folder / f"{task.name}-{task.key[:12]}.parquet"

    @property
    def is_trained(self) -> bool:
        """Whether there is nothing left to train."""
        return self.arm.training is None or (self.folder / "trained.json").exists()

    def prepare(self, sweep: DictConfig) -> None:
        """Opens all that its training needs, to find errors before anything is computed.

        Raises:
            SettingError: names the arm.
        """
        if not self.is_trained:
            try:
                Training(self._config(sweep))
            except (ValueError, OSError) as error:
                raise SettingError(f"arm {self.arm.name}: {str(error).splitlines()[0]}") from error

    def is_done(self, parent: str) -> bool:
        """Whether everything is computed, and recorded below the sweep's run."""
        done = all(self.scores_file(task).exists() for task in self.tasks)
        return done and (not parent or self._runs().get(parent, {}).get("complete", False))

    @property
    def failure(self) -> str:
        """Why it failed during this sweep, in this or another process, else empty. Earlier failures are tried again."""
        noted = self._noted()
        return noted["reason"] if noted and noted != self._former else ""

    def fail(self, reason: str) -> None:
        """Stores that it failed, and why."""
        _write(self.folder / "failed.json", {"reason": reason, "id": uuid.uuid4().hex})

    def _noted(self) -> dict:
        return _read(self.folder / "failed.json")

    def complete(self, sweep: DictConfig, parent: str) -> None:
        """Does the work that is missing, and records it as a run below `parent`. The folder must be locked.

        Raises:
            Whatever training or evaluating this arm raises. Its run is then FAILED, with the reason as a tag.
        """
        (self.folder / "failed.json").unlink(missing_ok=True)
        config = self._config(sweep)
        known = self._runs().get(parent, {}).get("run")
        with track(config, pick_device(sweep.device), run_id=known or None, parent=parent or None) as run:
            self._note_run(parent, run, complete=False)
            for key, value in self._tags().items():
                run.tag(key, value)
            try:
                checkpoint = self._train(config, run)
                for task in self.tasks:
                    self._evaluate(task, checkpoint, run)
            except Exception as error:  # whatever it is, the run records it
                run.tag("failure", reason_of(error))
                raise
        self._note_run(parent, run, complete=True)

    def _train(self, config: DictConfig, run: Run) -> Path | None:
        """Trains the arm if it needs training, and resumes if it was begun -> its weights."""
        if self.arm.training is None:
            return self.arm.checkpoint
        checkpoint = self.folder / "last.safetensors"
        if not self.is_trained:
            training = Training(config)
            training.resume()
            training.state.run_id = run.run_id
            trained = training.run(run)
            _write(self.folder / "trained.json", {"steps": trained.state.step, "seconds": trained.state.seconds})
        else:
            run.file(checkpoint)
        run.data("train", fingerprint_of(config.data))
        run.metrics({f"training/{key}": value for key, value in _read(self.folder / "trained.json").items()})
        return checkpoint

    def _evaluate(self, task: SweepTask, checkpoint: Path | None, run: Run) -> None:
        path = self.scores_file(task)
        pictures = path.with_suffix("")
        if not path.exists():
            model = self.arm.model(checkpoint)
            if isinstance(model, nn.Module):
                model = model.to(pick_device(task.config.device)).eval()
            unit = task.unit(self.arm, self.seed, model, self.key)
            for picture in task.evaluation.pictures:
                with replacing(pictures / f"{clean_name(picture.name).replace('/', '_')}.png") as part:
                    panel(picture.columns).save(part, format="png")
            unit.write(path)
        unit = Unit.read(path, self.arm.name, self.seed, task.name)
        for picture in sorted(pictures.glob("*.png")):
            run.file(picture, f"pictures/{task.name}/{picture.name}")
        run.data(task.name, unit.fingerprint)
        run.file(path, f"scores/{task.name}.parquet")
        run.metrics(means(unit.scores))

    def _config(self, sweep: DictConfig) -> DictConfig:
        """The configuration to record: that of the training, or the checkpoint or peer of another arm."""
        if self.arm.training is not None:
            config = self.arm.training.copy()
            config.seed, config.out_dir, config.resume = self.seed, str(self.folder), "auto"
        else:
            made_of = {"checkpoint": str(self.arm.checkpoint or ""), "peer": self.arm.peer} | dict(self.arm.changes)
            config = OmegaConf.create({**made_of, "blur": self.arm.blur, "seed": self.seed})
        OmegaConf.set_struct(config, False)
        config.tracking = standalone(sweep.tracking)
        config.tracking.run_name = f"{sweep.name}/{self.arm.name}/{self.seed}"
        return config

    def _tags(self) -> Mapping[str, str]:
        return {"arm": self.arm.name, "arm.kind": self.arm.kind, "arm.seed": str(self.seed), "arm.key": self.key}

    def _runs(self) -> dict[str, dict[str, object]]:
        return _read(self.folder / "runs.json")

    def _note_run(self, parent: str, run: Run, complete: bool) -> None:
        _write(self.folder / "runs.json", self._runs() | {parent: {"run": run.run_id, "complete": complete}})


def reason_of(error: Exception) -> str:
    """An error in one line: its type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:500]


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def _write(path: Path, values: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(values), encoding="utf-8")
