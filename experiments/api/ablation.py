"""`ablate` and `read_ablation`: `python -m experiments.ablate` with Python values, and what a sweep found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from core.hooks import HOOK_POINTS
from core.registry import choices
from experiments.api.display import Shown, Verdict, first_measures, frame_html, frame_text, lines_html, table_of
from experiments.api.names import check_known, unknown
from experiments.api.overrides import Overrides, choices_of, described, filler_name, overrides_of
from experiments.peers import peers as all_peers
from experiments.reports.figures import cost_quality, forest
from experiments.reports.results import Results
from experiments.settings import SettingError
from experiments.statistics.scores import MEASURES, sums, value
from experiments.statistics.verdicts import Comparison
from experiments.statistics.verdicts import compare as compared
from experiments.sweeps import sweep
from experiments.sweeps.arms import ceilings as all_ceilings
from experiments.sweeps.arms import composed
from experiments.sweeps.stored import fetch, pictures


class Ablation:
    """What a sweep found. In a notebook it shows verdict, figure and table.

    Attributes:
        results: the sweep as the reports take it.
        comparisons: one for each task, measure and arm.
        files: what was written; empty of a sweep that was read from the tracking store.
    """

    def __init__(self, results: Results, comparisons: Sequence[Comparison], files: Sequence[Path] = ()):
        self.results, self.comparisons, self.files = results, list(comparisons), list(files)

    @property
    def name(self) -> str:
        return self.results.plan.name

    @property
    def baseline(self) -> str:
        """The arm that all others are compared with."""
        return self.results.plan.baseline

    @property
    def table(self) -> pd.DataFrame:
        """One row for each task, measure and arm: mean, difference to the baseline with its interval, verdict."""
        return table_of(self.comparisons)

    @property
    def verdict(self) -> Verdict:
        """What helps and what hurts, in words: `print(found.verdict)`, `found.verdict["my_arm"]`."""
        return Verdict(self.comparisons, self.baseline)

    @property
    def figure(self) -> Shown:
        """Differences to the baseline with their intervals, of the first measure of each task."""
        return Shown(forest(self.comparisons, self.results.plan.confidence))

    @property
    def cost_figure(self) -> Shown:
        """Quality against time, with the arms that no cheaper one equals.

        Raises:
            SettingError: the cost was not measured.
        """
        if self.costs is None:
            raise SettingError("the cost was not measured: leave out overrides={'cost': None}")
        return Shown(cost_quality(self.comparisons, self.costs))

    @property
    def costs(self) -> pd.DataFrame | None:
        """Time and memory of one forward of each arm; None: not measured."""
        return self.results.costs

    @property
    def scores(self) -> pd.DataFrame:
        """Every score of every image: a numerator and a denominator (`experiments.statistics.scores`)."""
        return self.results.scores

    @property
    def failures(self) -> dict[str, str]:
        """Arm -> why it is in no table."""
        return dict(self.results.failures)

    @property
    def notes(self) -> list[str]:
        """What a reader must know of how it was measured."""
        return list(self.results.notes)

    def gains(self, arm: str, task: str | None = None, measure: str | None = None) -> pd.Series:
        """How much better an arm is than the baseline on each image, mean over seeds, worst first.

        Args:
            task, measure: as in `table`; None: the first.

        Raises:
            SettingError: no such arm, task or measure.
        """
        scores = self.scores
        task = scores["task"].iloc[0] if task is None else task
        check_known("the task", task, scores["task"].unique())
        scores = scores[scores["task"] == task]
        measure = scores["measure"].iloc[0] if measure is None else measure
        check_known("the measure", measure, scores["measure"].unique())
        scores = scores[scores["measure"] == measure]
        check_known("the arm", arm, scores["arm"].unique())
        of_arm, of_baseline = (_of_each_image(scores[scores["arm"] == name]) for name in (arm, self.baseline))
        return (MEASURES[measure].better * (of_arm - of_baseline)).sort_values().rename(f"{arm}: {measure}, {task}")

    def pictures(self, arm: str) -> dict[str, Image.Image]:
        """TASK/IMAGE -> a picture of an image that an arm did badly on, with its first seed; tasks may draw none.

        Raises:
            SettingError: no such arm. TrackingUnavailable: the sweep was read from a store, which does not answer.
        """
        check_known("the arm", arm, self.results.plan.kinds)
        if self.results.run_id:
            return pictures(self.results, arm)
        found = {}
        member = next(one for one in self.results.plan.members if one.arm == arm)
        folder = self.files[0].parent / "members" / f"{arm}-{member.seed}-{member.key[:12]}"
        for path in sorted(folder.glob("*/*.png")):
            with Image.open(path) as image:
                found[f"{path.parent.name.rpartition('-')[0]}/{path.stem}"] = image.convert("RGB")
        return found

    def _told(self) -> list[str]:
        return [*(f"FAILED: {arm}: {reason}" for arm, reason in self.failures.items()), *self.notes]

    def __repr__(self) -> str:
        parts = [f"sweep {self.name}", *self._told(), repr(self.verdict), frame_text(first_measures(self.comparisons))]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        html = [lines_html(self._told()), self.verdict._repr_html_(), self.figure.html()]
        return "".join([*html, frame_html(first_measures(self.comparisons))])


def ablate(
    arms: Mapping[str, Overrides] | None = None,
    tasks: Mapping[str, Overrides] | Sequence[str] | None = None,
    *,
    recipe: str | None = None,
    name: str | None = None,
    baseline: str | None = None,
    start: str | Path | None = None,
    train: Overrides = (),
    evaluate: Overrides = (),
    seeds: Sequence[int] | None = None,
    peers: Sequence[str] | Mapping[str, Any] | None = None,
    ceilings: Sequence[str] | None = None,
    confidence: float | None = None,
    out_dir: str | Path | None = None,
    tracking: bool = True,
    device: str | None = None,
    overrides: Overrides = (),
) -> Ablation:
    """Trains arms with several seeds, measures all on the same images, and compares them with a baseline.

    `python -m experiments.ablate` with Python values: what either has finished, the other does not repeat. Where an
    argument is None, the recipe's value counts, or that of configs/ablate.yaml, given in brackets.

    Args:
        arms: name -> settings of its training (configs/train.yaml), such as `{}`, `{"decoder": "inr"}`,
            `{"decoder": MyClass}`, `{"attention": {"name": "window", "window_ratio": 0.2}, "optimiser.lr": 1e-3}`; or
            `{"checkpoint": FILE}`, measured as it is; or `{"peer": "joint_bilateral", "window": 7}`, another method.
            Added to the recipe's; an arm of the same name replaces it.
        tasks: name -> settings of its evaluation (configs/evaluate.yaml), such as `{"task": "fidelity", "val_data":
            {"name": "images", "path": ["photos"]}}`; or names of tasks with their default settings. Added likewise.
        recipe: of configs/experiment/, such as "quickstart".
        name: of the sweep and its files ["ablation"].
        baseline: the arm that the others are compared with ["baseline"].
        start: weights that trained arms start from: "scratch", "bundled", "published", or a file ["scratch"].
        train, evaluate: settings of all arms, and of all tasks; those of an arm or a task win. Added to the recipe's.
        seeds: of trainings and probes [0, 1, 2].
        peers: other methods in all tables [nearest, bilinear, bicubic, joint_bilateral].
        ceilings: references that no method is expected to beat ["encoder"].
        confidence: of the intervals [0.95].
        out_dir: of files, and of what is trained ["outputs/ablate/NAME"].
        tracking: False: nothing is recorded in MLflow.
        device: "auto", "cpu", "cuda", ... ["auto"].
        overrides: further settings of configs/ablate.yaml, such as `{"cost": None}`.

    Raises:
        SettingError, DataError, TrackingUnavailable: before anything is computed; an unknown name comes with the
            nearest valid one. SettingError: another process leads this sweep.
        SweepError: the baseline failed. An arm that fails alone is in `failures`.
    """
    if recipe is not None:
        check_known("recipe", recipe, choices_of("experiment"))
    chosen = [f"experiment={recipe}"] if recipe is not None else []
    config = composed("ablate", [*chosen, *overrides_of("ablate", overrides, "overrides", chosen)])
    OmegaConf.set_struct(config, False)
    if OmegaConf.is_missing(config, "name") or name is not None:
        config.name = name or "ablation"
    given = {"baseline": baseline, "start": start, "seeds": seeds, "confidence": confidence, "device": device}
    given |= {"out_dir": out_dir, "peers": peers, "ceilings": ceilings}
    for key, setting in given.items():
        if setting is not None:
            config[key] = _plain(setting)
    config.tracking.enabled = config.tracking.enabled and tracking
    _check_references(config)
    for command, more in (("train", train), ("evaluate", evaluate)):
        config[command] = OmegaConf.to_container(config[command]) + overrides_of(command, more, command)
    for arm, values in (arms or {}).items():
        config.arms[arm] = _arm(arm, values)
    named = tasks if isinstance(tasks, Mapping) else {task: {"task": task} for task in tasks or ()}
    for task, values in named.items():
        config.tasks[task] = overrides_of("evaluate", values, f"task {task}")
    if config.baseline not in config.arms and not config.product:
        raise unknown("the baseline", config.baseline, config.arms)
    report = sweep.ablate(config)
    if report is None:
        raise SettingError(f"another process leads the sweep {config.name}: wait for it, then call this again")
    return Ablation(report.results, report.comparisons, report.files)


def read_ablation(run_id: str | None = None, experiment: str = "ablate") -> Ablation:
    """Reads a finished sweep from the tracking store, without computing anything but the comparison.

    Args:
        run_id: of the sweep's run; None: the latest sweep. experiment: under which runs are listed.

    Raises:
        SettingError: there is none, or the run is no sweep. TrackingUnavailable: the store does not answer.
    """
    results = fetch(run_id, experiment)
    plan = results.plan
    return Ablation(results, compared(results.scores, plan.baseline, plan.competing, plan.confidence))


def _arm(name: str, values: Overrides) -> list[str] | dict[str, Any]:
    """An arm as configs/ablate.yaml has it."""
    if isinstance(values, Mapping) and ("checkpoint" in values or isinstance(values.get("peer"), str)):
        if "peer" in values:
            check_known(f"arm {name}: peer", values["peer"], all_peers())
        for hook in HOOK_POINTS.keys() & values.keys():
            check_known(f"arm {name}: {hook}", filler_name(values[hook]), choices(hook))
        return {key: _plain(described(key, value)) for key, value in values.items()}
    return overrides_of("train", values, f"arm {name}")


def _plain(value: Any) -> Any:
    """Paths and tuples as a configuration has them."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_references(config: DictConfig) -> None:
    for peer in config.peers or () if not isinstance(config.peers, DictConfig) else ():
        check_known("peers:", peer, all_peers())
    for ceiling in config.ceilings or ():
        check_known("ceilings:", ceiling, all_ceilings())


def _of_each_image(scores: pd.DataFrame) -> pd.Series:
    """The measure of each image that has something to measure, of one arm, mean over seeds."""
    numerator, denominator, _, images = sums(scores)
    known = (denominator > 0).any(2).all(0)
    return pd.Series(
        {image: value(numerator[:, [i]], denominator[:, [i]]).mean() for i, image in enumerate(images) if known[i]}
    )
