"""`evaluate`: `python -m experiments.evaluate` with Python values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from experiments.api.display import Shown, Verdict, first_measures, frame_html, frame_text, lines_html, table_of
from experiments.api.names import check_known
from experiments.api.overrides import Overrides, Paths, overrides_of, paths
from experiments.measuring import evaluation
from experiments.peers import peers as all_peers
from experiments.reports.figures import forest
from experiments.statistics.verdicts import Comparison
from experiments.sweeps.arms import composed


class Evaluation:
    """What was measured. In a notebook it shows verdict, figure and table.

    Attributes:
        comparisons: one for each task, measure and arm. scores: every score of every image.
        costs: time and memory of one forward of each arm; None: not measured.
        notes: what a reader must know of how it was measured. files: what was written.
    """

    def __init__(self, found: evaluation.Evaluated, baseline: str, confidence: float):
        self.comparisons: list[Comparison] = found.results
        self.scores, self.costs, self.notes, self.files = found.scores, found.costs, found.notes, found.files
        self.baseline, self._confidence, self._pictures = baseline, confidence, found.pictures

    @property
    def table(self) -> pd.DataFrame:
        """One row for each task, measure and arm: mean, difference to the baseline with its interval, verdict."""
        return table_of(self.comparisons)

    @property
    def verdict(self) -> Verdict:
        """Which checkpoints are better or worse than the baseline, in words."""
        return Verdict(self.comparisons, self.baseline)

    @property
    def figure(self) -> Shown:
        """Differences to the baseline with their intervals, of the first measure of each task."""
        return Shown(forest(self.comparisons, self._confidence))

    @property
    def pictures(self) -> dict[str, Image.Image]:
        """ARM_IMAGE -> a picture of an image on which that arm did badly; some tasks draw none."""
        found = {}
        for path in self._pictures:
            with Image.open(path) as image:
                found[path.stem] = image.convert("RGB")
        return found

    def __repr__(self) -> str:
        return "\n".join([*self.notes, repr(self.verdict), frame_text(first_measures(self.comparisons))])

    def _repr_html_(self) -> str:
        shown = [lines_html(self.notes), self.verdict._repr_html_(), self.figure.html()]
        return "".join([*shown, frame_html(first_measures(self.comparisons))])


def evaluate(
    checkpoints: str | Path | Sequence[str | Path] | Mapping[str, Any] = (),
    *,
    task: str | Mapping[str, Any] = "segmentation",
    backbone: str | Mapping[str, Any] = "embedded",
    images: Paths | None = None,
    peers: Sequence[str] | Mapping[str, Any] | None = None,
    ceilings: Sequence[str] = ("encoder",),
    baseline: str = "bilinear",
    seeds: Sequence[int] = (0,),
    image_size: int | tuple[int, int] = (224, 224),
    output_size: int | tuple[int, int] | None = None,
    max_images: int | None = None,
    confidence: float = 0.95,
    out_dir: str | Path = "outputs/evaluate",
    tracking: bool = True,
    device: str = "auto",
    overrides: Overrides = (),
) -> Evaluation:
    """Measures upsamplers on one task with one encoder: `python -m experiments.evaluate` with Python values.

    Args:
        checkpoints: one or several files or names ("bundled", "anyup_paper", ...), or `{ARM: FILE}`, or with changes,
            `{ARM: {"checkpoint": FILE, "temporal": FILLER, "temporal.strength": 0.5}}`.
        task: what to measure: its name, or with settings, `{"name": "fidelity", "scales": [2, 4]}`.
        backbone: the encoder: its name, or `{"name": NAME, "weights": FILE}`.
        images: photographs to measure on, for tasks without labels: a folder, a file, a pattern, or several. None: the
            procedural scenes, or what `overrides` says, such as `{"val_data": {"name": "camvid", "path": FOLDER}}`.
        peers: other methods: names, or `{ARM: {"peer": NAME, SETTING: VALUE}}`; None: all that need neither weights nor
            settings. `bilinear` must be among them.
        ceilings: references that no method is expected to beat.
        baseline: the arm that all others are compared with.
        seeds: of probes; tasks that train none take the first.
        image_size, output_size: in pixels: the longer side, or (rows, columns); None: as the image.
        max_images: measure at most that many; None: all.
        confidence: of the intervals.
        out_dir: of tables and scores. tracking: False: nothing is recorded in MLflow.
        device: "auto" (the GPU where there is one), "cpu", "cuda", ...
        overrides: further settings of configs/evaluate.yaml, or as on its command line; they win over the arguments.

    Raises:
        SettingError, NoImages, DataError, TrackingUnavailable: before anything is computed; an unknown name comes with
            the nearest valid one.
        EvaluationError, ScoreError: something cannot be measured, or is not finite; names arm and image.
    """
    for peer in peers or () if not isinstance(peers, Mapping) else ():
        check_known("peers:", peer, all_peers())
    settings = {"task": task, "backbone": backbone, "ceilings": list(ceilings), "baseline": baseline}
    settings |= {"seeds": list(seeds), "image_size": image_size, "output_size": output_size, "device": device}
    settings |= {"max_val_images": max_images, "confidence": confidence, "out_dir": out_dir}
    settings |= {} if images is None else {"val_data": {"name": "images", "path": paths(images)}}
    settings |= {} if tracking else {"tracking.enabled": False}
    settings |= {} if peers is None else {"peers": peers}
    if checkpoints:
        named = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
        settings["checkpoints"] = named
    asked = [*overrides_of("evaluate", settings, "evaluate"), *overrides_of("evaluate", overrides, "overrides")]
    config = composed("evaluate", asked)
    return Evaluation(evaluation.evaluate(config), config.baseline, config.confidence)
