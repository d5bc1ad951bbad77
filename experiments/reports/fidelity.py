"""Fidelity per image -> what is said about each arm: differences with intervals, tables, a plot, metrics of a run."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments.atomic import replacing
from experiments.data import DataSet
from experiments.measuring.ceilings import CEILINGS
from experiments.measuring.metrics import FidelityError
from experiments.statistics.intervals import Interval, paired_difference, share_of_gap
from experiments.tracking.provenance import Origin

BASELINE = "bilinear"
CEILING = "encoder"
MEASURES = ("cosine", "error", "edge_cosine", "edge_error")
_COLUMNS = {"cosine": "cosine", "error": "error", "edge_cosine": "cosine at edges", "edge_error": "error at edges"}
NOTES = """\
- cosine: of upsampled and target vector, mean over positions, then over images. error: squared error divided by the
  variance of the target in the image; less is better, 1 is what the image's mean vector reaches. At edges: within one
  cell of the target grid from an edge of the image (Canny in the image averaged over cells).
- Behind each value the mean paired difference to bilinear, with the bootstrap interval over images (BCa).
- gap closed: (arm - bilinear) / (encoder - bilinear) in cosine, with its interval; left out where the whole-image
  encoder is not clearly above bilinear.
- Ceilings: encoder, run on the whole image at the higher resolution; oracle_cosine and oracle_error, the best convex
  combination of the 5 x 5 cells around each position, target known (for one measure each).
- Values per image: the .parquet file of the same name; each arm's image of lowest cosine: the _worst.png file."""


@dataclass(frozen=True)
class Result:
    """One measure of one arm at one scale, over all images."""

    scale: int
    arm: str
    measure: str
    num_images: int
    """Of edges: those that have some."""
    mean: float
    difference: Interval | None
    """To bilinear; None for bilinear itself."""
    gap_closed: Interval | None
    """None where there is no clear gap."""


def summarise(images: pd.DataFrame, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0) -> list[Result]:
    """Rows of image, scale, arm and measures -> one result per scale, arm and measure, arms in the order of the rows.

    Raises:
        FidelityError: a value is missing or not finite; names image and arm. Edges may be missing from an image in
            all arms.
        ValueError: bilinear is missing, or two rows are about the same image, scale and arm.
    """
    results = []
    how = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    for scale, rows in images.groupby("scale", sort=False):
        arms = list(dict.fromkeys(rows["arm"]))
        if BASELINE not in arms:
            raise ValueError(f"there are no rows of {BASELINE}, which all arms are compared with; arms: {arms}")
        for measure in (name for name in MEASURES if name in rows):
            values = _checked(rows.pivot(index="image", columns="arm", values=measure), measure)
            if values.empty:
                continue
            gap = paired_difference(values[CEILING], values[BASELINE], **how) if CEILING in arms else None
            sign = 1 if "cosine" in measure else -1
            clear = gap is not None and gap.low is not None and min(sign * gap.low, sign * gap.high) > 0
            for arm in arms:
                ours, known = values[arm], arm in (BASELINE, CEILING)
                difference = None if arm == BASELINE else paired_difference(ours, values[BASELINE], **how)
                share = None
                if clear and not known:
                    share = share_of_gap(ours, values[BASELINE], values[CEILING], **how)
                results.append(Result(int(scale), arm, measure, len(ours), ours.mean(), difference, share))
    return results


def header(config: DictConfig, data: DataSet, images: pd.DataFrame, device: torch.device) -> str:
    """Markdown: the command, and with what it ran."""
    made = Origin.of_this_process("experiments.fidelity", "experiments.fidelity.measure_fidelity(config), from Python")
    enlarged = images.drop_duplicates(["image", "scale"]).groupby("scale")["enlarged"].sum()
    enlarged = ", ".join(f"{count} at {scale}x" for scale, count in enlarged.items() if count) or "none"
    guidance = config.view if config.guidance is None else config.guidance
    return "\n".join(
        [
            f"# Feature fidelity: {config.backbone.name}",
            "",
            f"    {made.command}",
            "",
            f"- {made}",
            f"- {len(data)} images, data={config.data.name}, fingerprint {data.fingerprint[:12]}; smaller than "
            f"scale·view, so that their crops show no more detail: {enlarged}",
            f"- view {config.view}, guidance {guidance} pixels; {config.num_resamples} resamples, intervals of "
            f"{config.confidence:.0%}, seed {config.seed}",
            f"- {device.type}, {made.packages}",
        ]
    )


def write(results: Sequence[Result], images: pd.DataFrame, out_dir: Path, name: str, top: str) -> list[Path]:
    """Writes NAME.md, NAME.csv, NAME.png and NAME_images.parquet, each whole or not at all -> their paths."""
    paths = [out_dir / f"{name}{suffix}" for suffix in (".md", ".csv", ".png", "_images.parquet")]
    parts = [top]
    for scale in _scales(results):
        lines = [["arm", *_COLUMNS.values(), "gap closed", "gap closed at edges"]]
        lines += [["---", *["---:"] * (len(lines[0]) - 1)], *cells(results, scale)]
        known = images[images.scale == scale].drop_duplicates("image")
        enlarged = int(known["enlarged"].sum())
        note = f", {enlarged} of {len(known)} images enlarged to {scale} views: no more detail" if enlarged else ""
        parts += [f"## {scale}x{note}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    with replacing(paths[0]) as part:
        part.write_text("\n\n".join([*parts, NOTES]) + "\n", encoding="utf-8")
    with replacing(paths[1]) as part:
        pd.DataFrame(map(_flat, results)).to_csv(part, index=False)
    with replacing(paths[2]) as part:
        plot(results).savefig(part, format="png", dpi=120)
    with replacing(paths[3]) as part:
        images.to_parquet(part, index=False)
    return paths


def rich_table(results: Sequence[Result]) -> list[Table]:
    """What matters most of it, for the terminal: a table for each scale."""
    tables = []
    for scale in _scales(results):
        count = max(result.num_images for result in results if result.scale == scale)
        table = Table(title=f"feature fidelity at {scale}x, {count} images", box=SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(("arm", "cosine", f"to {BASELINE}", "at edges", "gap closed")):
            table.add_column(column, justify="right" if i else "left", overflow="fold")
        for arm in _arms(results):
            mine = _of_arm(results, scale, arm)
            edges = f"{mine['edge_cosine'].mean:.4f}" if "edge_cosine" in mine else ""
            gap = mine["cosine"].gap_closed
            line = (f"{mine['cosine'].mean:.4f}", _signed(mine["cosine"].difference, 4), edges)
            share = "" if gap is None else f"{gap.value:+.2f}"
            table.add_row(arm, *line, share, style="dim" if arm in CEILINGS else "")
        tables.append(table)
    return tables


def cells(results: Sequence[Result], scale: int) -> list[list[str]]:
    """One line per arm: its name, each measure with the difference to bilinear, and the shares of the gap."""
    lines = []
    for arm in _arms(results):
        mine = _of_arm(results, scale, arm)
        shares = [mine[name].gap_closed if name in mine else None for name in ("cosine", "edge_cosine")]
        lines.append([arm, *(_value(mine.get(name)) for name in MEASURES), *(_signed(share, 2) for share in shares)])
    return lines


def metrics(results: Sequence[Result]) -> dict[str, float]:
    """The numbers of all results under SCALEx/ARM/MEASURE."""
    values = {}
    for result in results:
        key = f"{result.scale}x/{result.arm}/{result.measure}"
        values[key] = result.mean
        for name, interval in (("difference", result.difference), ("gap_closed", result.gap_closed)):
            if interval is not None:
                known = {"": interval.value, "_low": interval.low, "_high": interval.high}
                values |= {f"{key}_{name}{end}": value for end, value in known.items() if value is not None}
    return values


def plot(results: Sequence[Result]) -> Figure:
    """Differences to bilinear with their intervals, by scale; dashed: the whole-image encoder, where in reach."""
    scales, measures = _scales(results), ("cosine", "edge_cosine")
    arms = [arm for arm in _arms(results) if arm not in (BASELINE, *CEILINGS)]
    figure = Figure(figsize=(10, 1 + len(scales) * (1 + 0.3 * len(arms))), layout="constrained")
    for row, scale in zip(figure.subplots(len(scales), 2, squeeze=False), scales, strict=True):
        for axes, measure in zip(row, measures, strict=True):
            found = {r.arm: r.difference for r in results if (r.scale, r.measure) == (scale, measure) and r.difference}
            for place, arm in enumerate(arms):
                if arm in found:
                    axes.plot(found[arm].value, place, "o", color="tab:blue")
                    if found[arm].low is not None:
                        axes.plot([found[arm].low, found[arm].high], [place, place], color="tab:blue")
            axes.axvline(0, color="grey", linewidth=1)
            title = f"{scale}x, {_COLUMNS[measure]}"
            if CEILING in found:
                limits = axes.get_xlim()
                axes.axvline(found[CEILING].value, color="tab:orange", linestyle="--")
                axes.set_xlim(limits[0], max(limits[1], min(1.1 * found[CEILING].value, 3 * limits[1])))
                title += f" (encoder {found[CEILING].value:+.3f})"
            axes.set(title=title, xlabel=f"difference to {BASELINE}", ylim=(len(arms) - 0.5, -0.5))
            axes.set_yticks(range(len(arms)), arms)
            axes.grid(alpha=0.3)
    return figure


def _checked(values: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Image x arm without the images that have no edges; refuses all other gaps."""
    if measure.startswith("edge"):
        values = values.dropna(how="all")
    wrong = ~values.map(lambda value: abs(value) < float("inf"))  # NaN fails too
    if wrong.any(axis=None):
        image, arm = next((image, arm) for image in values.index for arm in values if wrong.loc[image, arm])
        raise FidelityError(
            f"image {image}, arm {arm}: {measure} is {values.loc[image, arm]} ({wrong.to_numpy().sum()} such values); "
            "no means are taken over the others"
        )
    return values


def _scales(results: Sequence[Result]) -> list[int]:
    return list(dict.fromkeys(result.scale for result in results))


def _arms(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.arm for result in results))


def _of_arm(results: Sequence[Result], scale: int, arm: str) -> dict[str, Result]:
    """Measure -> result."""
    return {result.measure: result for result in results if (result.scale, result.arm) == (scale, arm)}


def _flat(result: Result) -> dict[str, object]:
    flat = {name: value for name, value in asdict(result).items() if name not in ("difference", "gap_closed")}
    for name, interval in (("difference", result.difference), ("gap_closed", result.gap_closed)):
        ends = (interval.value, interval.low, interval.high) if interval else (None, None, None)
        flat |= {name: ends[0], f"{name}_low": ends[1], f"{name}_high": ends[2]}
    return flat


def _value(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.mean:.4f} {_signed(result.difference, 4)}".strip()


def _signed(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    ends = "" if interval.low is None else f" [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    return f"{interval.value:+.{digits}f}{ends}"
