"""Ablations: arms x seeds x tasks, trained, measured and compared with a baseline.

The unit of work is a member: an arm with a seed (experiments/sweeps/members.py). Any number of processes may run the
same command at the same time, on one machine or on several that share `out_dir` and its file locks. Each process takes
the next member that no other works on. One process leads: it keeps the sweep's MLflow run, waits for the others and
writes the report. If any process is killed, the others, or one that is started later, do its work.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.atomic import replacing
from experiments.cost.arm_cost import check_cost, measure_costs
from experiments.data.identity import digest_of, forget_data
from experiments.lock import Locked, lock_folder, unlock_folder
from experiments.progress import Progress
from experiments.reports.results import Plan, Results
from experiments.reports.tables import Report, provenance, record_report, write_report
from experiments.settings import (
    SettingError,
    check_confidence,
    check_count,
    check_name,
    check_seeds,
    check_writable,
    pick_device,
)
from experiments.sweeps.arms import read_arms
from experiments.sweeps.members import Member, read_tasks, reason_of
from experiments.sweeps.results import gather
from experiments.tracking.provenance import Origin, device_name
from experiments.tracking.store import Run, TrackingUnavailable, track

log = logging.getLogger(__name__)

_POLL_S = 0.5


def ablate(config: DictConfig) -> Report | None:
    """Does the missing work of a sweep and compares its arms; None: another process leads and writes the report.

    Raises:
        SettingError, DataError, TrackingUnavailable: raised before anything is computed.
        SweepError, ScoreError: the baseline failed, or results contradict each other.
    """
    sweep = Sweep(config)
    for _ in range(2):
        try:
            lock = lock_folder(sweep.folder / "lead")
        except Locked:
            sweep.follow()  # then try again to lead, in case the leader died
            continue
        try:
            return sweep.lead()
        finally:
            unlock_folder(sweep.folder / "lead", lock)
    return None


class Sweep:
    """A sweep with its settings read and checked, ready to run."""

    def __init__(self, config: DictConfig):
        check_settings(config)
        forget_data()
        self.config, self.folder = config, Path(config.out_dir).expanduser()
        arms, tasks = read_arms(config), read_tasks(config)
        check_resolves(config)
        check_writable(self.folder)
        members_dir = self.folder / "members" if config.members_dir is None else Path(config.members_dir).expanduser()
        self.members = []
        for seed in config.seeds:
            for arm in arms:
                same = arm.kind != "trained" and seed != config.seeds[0]
                mine = [task for task in tasks if arm.kind != "ceiling" or arm.name in task.ceilings]
                mine = [task for task in mine if task.trains or not same]
                if mine:
                    self.members.append(Member(arm, seed, mine, members_dir))
        for member in self.members:
            if member.seed == config.seeds[0]:
                member.prepare(config)
        for task in tasks:
            if not all(member.scores_file(task).exists() for member in self.members if task in member.tasks):
                task.open()  # to find errors before anything is trained
        planned = [member.planned for member in self.members]
        self.plan = Plan(config.name, config.baseline, config.confidence, planned)

    def lead(self) -> Report:
        """Works, waits for the helping processes, and writes the report, all within the sweep's run."""
        known = self._known_run()
        with track(self.config, pick_device(self.config.device), run_id=known or None) as run, logging_redirect_tqdm():
            self._note_run(run.run_id)
            run.tag("sweep", self.config.name)
            run.text(self.plan.to_json(), "plan.json")
            while self.work(run.run_id):
                time.sleep(_POLL_S)  # other processes are at work; if they die, their members are free again
            return self.report(run)

    def follow(self) -> None:
        """Helps the process that leads, and records below its run."""
        deadline = time.monotonic() + 60
        while self._known_run() is None:
            if time.monotonic() > deadline:
                raise SettingError(f"{self.folder} is in use by another sweep: give this sweep another name or out_dir")
            time.sleep(_POLL_S)
        with logging_redirect_tqdm():
            self.work(self._known_run() or "")

    def work(self, parent: str) -> bool:
        """Goes once through all members and completes those that are free -> whether other processes hold some."""
        busy = False
        progress = Progress(self._in_order(), f"sweep {self.config.name}", "arm with seed")
        for member in progress:
            progress.note = member.name
            if self._settled(member, parent):
                continue
            try:
                lock = lock_folder(member.folder)
            except Locked:
                busy = True
                continue
            try:
                if not self._settled(member, parent):
                    self._complete(member, parent)
            finally:
                unlock_folder(member.folder, lock)
        return busy

    def report(self, run: Run) -> Report:
        """Compares the results, and writes and records the report."""
        results = self.results()
        results.origin = Origin.of_this_process("experiments.ablate", "experiments.ablate.ablate(config), from Python")
        run.text(provenance(results).to_json(), "origin.json")
        results.costs = self._costs(results)
        report = write_report(results, self.folder)
        record_report(report, run)
        return report

    def results(self) -> Results:
        """The results of all members.

        Raises:
            SweepError, ScoreError: as `gather`.
        """
        reasons: dict[str, str] = {}
        for member in self.members:
            if reason := member.failure:
                reasons.setdefault(member.arm.name, f"seed {member.seed}: {reason}")
        return gather(self.plan, (unit for member in self.members for unit in member.units()), reasons)

    def _complete(self, member: Member, parent: str) -> None:
        try:
            member.complete(self.config, parent)
        except TrackingUnavailable:  # no failure of the arm
            raise
        except Exception as error:  # an arm may be new code: its errors must not stop the others
            log.error("arm %s failed: %s", member.name, reason_of(error))
            log.debug("arm %s", member.name, exc_info=error)
            member.fail(reason_of(error))

    def _settled(self, member: Member, parent: str) -> bool:
        return member.is_done(parent) or bool(member.failure)

    def _in_order(self) -> list[Member]:
        start = self.config.worker % len(self.members)
        return self.members[start:] + self.members[:start]

    def _models(self, results: Results) -> Iterator[tuple[str, torch.nn.Module]]:
        """One model of each arm in the tables, except ceilings."""
        for member in self.members:
            arm = member.arm
            if member.seed == self.config.seeds[0] and arm.kind != "ceiling" and arm.name not in results.failures:
                yield arm.name, arm.model(member.folder / "last.safetensors" if arm.training is not None else None)

    def _costs(self, results: Results) -> pd.DataFrame | None:
        """The cost of the arms in the tables, measured once for each plan."""
        if self.config.cost is None:
            return None
        device = pick_device(self.config.device)
        conditions = [dict(self.config.cost), device_name(device), torch.get_num_threads()]
        known = {"plan": self.plan.digest, "conditions": conditions, "failed": sorted(results.failures)}
        path = self.folder / f"costs-{digest_of(known)[:12]}.csv"
        if not path.exists():
            costs = measure_costs(dict(self._models(results)), self.plan.baseline, self.config.cost, device)
            with replacing(path) as part:
                costs.to_csv(part, index=False)
        return pd.read_csv(path, dtype={"remark": str}).fillna({"remark": ""})  # a number where all are empty

    def _known_run(self) -> str | None:
        """The run of exactly this sweep, if one was begun."""
        path = self.folder / "sweep.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return known["run"] if known.get("plan") == self.plan.digest else None

    def _note_run(self, run_id: str) -> None:
        with replacing(self.folder / "sweep.json") as part:
            part.write_text(json.dumps({"plan": self.plan.digest, "run": run_id}), encoding="utf-8")


def check_settings(config: DictConfig) -> None:
    """Checks the settings before anything is computed.

    Raises:
        SettingError: names the setting and its allowed values.
    """
    check_name(config.name)
    check_seeds(config.seeds)
    check_confidence(config.confidence)
    check_count("worker", config.worker, 0)
    check_cost(config.cost)


def check_resolves(config: DictConfig) -> None:
    """Refuses a setting that refers to a missing one, even in a task that is left out: it could not be recorded.

    Raises:
        SettingError: names it.
    """
    try:
        OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise SettingError(f"{str(error).splitlines()[0]}; give it a value") from error
