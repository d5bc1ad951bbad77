"""Tables and pictures of a sweep, made again from MLflow alone: `python -m experiments.report run=ID`.

The run of a sweep holds its plan: arms, seeds, tasks, and what they depend on. The runs below it hold the scores per
image.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig
from PIL import Image

from experiments.command import command
from experiments.measuring.tasks import tasks
from experiments.reports.results import Plan, Results
from experiments.reports.tables import Report, show, write_report
from experiments.settings import SettingError, check_writable
from experiments.sweeps.results import SweepError, Unit, gather
from experiments.tracking.provenance import Origin
from experiments.tracking.store import Found, MlflowStore, open_store

log = logging.getLogger(__name__)


def report(config: DictConfig) -> Report:
    """Reads a sweep from the tracking store, and writes its report.

    Raises:
        SettingError: no such run, or the run is not a sweep. TrackingUnavailable, StoreAway: the store does not answer.
        SweepError, ScoreError: as `experiments.sweeps.results.gather`.
    """
    check_writable(Path(config.out_dir))
    return write_report(fetch(config.run, config.experiment), Path(config.out_dir))


def fetch(run_id: str | None = None, experiment: str = "ablate") -> Results:
    """A sweep's results from the tracking store; by default of the latest sweep.

    Raises:
        as `report`.
    """
    tasks()  # registers the measures
    store = open_store()
    found = store.latest(experiment, "sweep") if run_id is None else store.found(run_id)
    if found is None:
        where = f"of experiment {experiment}" if run_id is None else run_id
        raise SettingError(f"there is no sweep {where} in {store.uri}: run one with `python -m experiments.ablate`")
    if "sweep" not in found.tags:
        raise SettingError(f"run {run_id} is not a sweep: give the run that `python -m experiments.ablate` made")
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan.from_json(store.artifact(found.run_id, "plan.json", Path(folder)).read_text(encoding="utf-8"))
        members = [child for child in store.children(found.run_id) if "arm" in child.tags]
        units = [unit for child in members for unit in _units(store, child, plan)]
        results = gather(plan, units, _reasons(members))
        results.run_id = found.run_id
        if "origin.json" in store.sizes(found.run_id, ""):
            path = store.artifact(found.run_id, "origin.json", Path(folder))
            results.origin = Origin.from_json(path.read_text(encoding="utf-8"))
        if store.sizes(found.run_id, "report").get("report/costs.csv"):
            results.costs = pd.read_csv(store.artifact(found.run_id, "report/costs.csv", Path(folder)))
    return results


def pictures(results: Results, arm: str) -> dict[str, Image.Image]:
    """The pictures in an arm's run, TASK/IMAGE -> picture: images that the arm did badly on, with one seed.

    Args:
        results: from `fetch`.

    Raises:
        SettingError: the sweep has no such arm. TrackingUnavailable, StoreAway: the store does not answer.
    """
    store, found = open_store(), {}
    runs = [child for child in store.children(results.run_id) if child.tags.get("arm") == arm]
    if not runs:
        raise SettingError(f"sweep {results.plan.name} has no run of arm {arm}; it has {', '.join(results.plan.kinds)}")
    with tempfile.TemporaryDirectory() as folder:
        for task in store.sizes(runs[0].run_id, "pictures"):
            for name in store.sizes(runs[0].run_id, task):
                with Image.open(store.artifact(runs[0].run_id, name, Path(folder))) as image:
                    found[name.removeprefix("pictures/").removesuffix(".png")] = image.convert("RGB")
    return found


def _units(store: MlflowStore, child: Found, plan: Plan) -> Iterator[Unit]:
    """The scores of a run below a sweep's run."""
    arm, seed = child.tags["arm"], int(child.tags["arm.seed"])
    keys = [member.key for member in plan.members if (member.arm, member.seed) == (arm, seed)]
    if child.tags["arm.key"] not in keys:
        raise SweepError(
            f"run {child.run_id} of arm {arm}, seed {seed} does not belong to the plan of sweep {plan.name}"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in store.sizes(child.run_id, "scores"):
            path = store.artifact(child.run_id, name, Path(folder))
            yield Unit.read(path, arm, seed, Path(name).stem)


def _reasons(members: list[Found]) -> dict[str, str]:
    """Arm -> why it failed, where the last run of one of its seeds did."""
    last = {(member.tags["arm"], int(member.tags["arm.seed"])): member for member in members}  # oldest first
    reasons: dict[str, str] = {}
    for (arm, seed), member in last.items():
        if member.status == "FAILED":
            reasons.setdefault(arm, f"seed {seed}: {member.tags.get('failure', 'its run does not say why')}")
    return reasons


@command
def main(config: DictConfig) -> int | None:
    """The command line of `report`."""
    made = report(config)
    show(made)
    for arm, reason in made.results.failures.items():
        log.error("arm %s failed: %s", arm, reason)


if __name__ == "__main__":
    main()
