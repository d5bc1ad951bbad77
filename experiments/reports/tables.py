"""The report of a sweep: Markdown, CSV, figures, tables for the terminal, and what goes to MLflow."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import rich.table
from rich.console import Console

from experiments.atomic import replacing
from experiments.reports.costs import cost_section, cost_table
from experiments.reports.figures import cost_quality, forest, panels, title_of
from experiments.reports.markdown import Table, signed
from experiments.reports.results import Results
from experiments.statistics.score_files import write_scores
from experiments.statistics.scores import is_control
from experiments.statistics.verdicts import Comparison, compare, table
from experiments.tracking.provenance import Origin
from experiments.tracking.run import Run

COLUMNS = ("arm", "mean", "difference", "p", "verdict", "gap closed")
BLUR_COLUMNS = ("blurred", "beyond blur")
"""Further columns for measures that blur improves."""
STYLES = {"helps": "green", "hurts": "red", "reference": "dim", "baseline": "bold"}
NOTES = """\
- Difference: the arm minus the baseline, on the same images with the same seeds, mean over seeds. The interval holds
  for other seeds and other images (docs/statistics.md), unless the verdict says otherwise. The .csv also has the
  percentile bootstrap over both, which is too narrow with few seeds.
- Verdict: helps or hurts if the difference is shown after Holm's correction for the number of arms compared, within
  this measure on this task. p is the corrected value. "Not shown" does not mean that arms are equal.
- Blurred: the arm's features, blurred by the width that is best on the other images. Beyond blur: the difference to the
  best blurred baseline (the baseline's or bilinear features, blurred). Blur alone improves these measures, so an arm
  helps only if it is better than both.
- Gap closed: (arm - bilinear) / (encoder - bilinear); left out where the encoder is not clearly better than bilinear.
- Peers are not trained and get no verdict. The ceiling is the encoder itself at a higher resolution. An arm that is the
  same for all seeds was measured once; for a checkpoint, the spread over trainings is not known.
- Scores per image: NAME_scores.parquet, which the command writes and the run keeps."""

GUIDE = (
    "Verdicts are corrected for the number of arms: an interval without 0 can still be 'not shown'.",
    "All measures, p-values and what each column means are in the first of these files:",
)
"""What a reader of the tables on a terminal is told."""


@dataclass
class Report:
    """The report of a sweep: results, comparisons, and the files written."""

    results: Results
    comparisons: list[Comparison]
    files: list[Path]


def write_report(results: Results, folder: Path) -> Report:
    """Compares the arms and writes the files, each whole or not at all.

    They are NAME.md, NAME.csv, NAME_forest.png, NAME_scores.parquet, and with costs NAME_costs.csv and
    NAME_cost_quality.png.

    Raises:
        ScoreError: as `verdicts.compare`. CannotWrite: for example, the disk is full.
    """
    plan = results.plan
    comparisons = compare(results.scores, plan.baseline, plan.competing, plan.confidence)
    figures = {"forest": forest(comparisons, plan.confidence)}
    files = [folder / f"{plan.name}.md", folder / f"{plan.name}.csv", folder / f"{plan.name}_scores.parquet"]
    with replacing(files[0]) as part:
        part.write_text(markdown(results, comparisons), encoding="utf-8")
    with replacing(files[1]) as part:
        table(comparisons).to_csv(part, index=False)
    made = provenance(results)
    write_scores(files[2], results.scores, asdict(made) if made else {})
    if results.costs is not None:
        files.append(folder / f"{plan.name}_costs.csv")
        with replacing(files[-1]) as part:
            results.costs.to_csv(part, index=False)
        figures["cost_quality"] = cost_quality(comparisons, results.costs)
    for name, figure in figures.items():
        files.append(folder / f"{plan.name}_{name}.png")
        with replacing(files[-1]) as part:
            figure.savefig(part, format="png")
    return Report(results, comparisons, files)


def record_report(report: Report, run: Run) -> None:
    """Records tables, figures and differences in the sweep's run."""
    for file in report.files:
        run.file(file, f"report/{file.name.removeprefix(report.results.plan.name).lstrip('._') or 'report'}")
    values = {}
    for one in report.comparisons:
        if one.difference is not None:
            key = "/".join((*one.family, one.measure, one.arm))
            known = {"difference": one.difference.value, "low": one.difference.low, "high": one.difference.high}
            values |= {f"{key}/{end}": value for end, value in known.items() if value is not None}
    run.metrics(values)
    if report.results.costs is None:
        run.text("", "report/costs.csv")  # replaces one of an earlier start
    run.tag("failed", "; ".join(f"{arm}: {reason}" for arm, reason in report.results.failures.items()))


def markdown(results: Results, comparisons: Sequence[Comparison]) -> str:
    """The whole report."""
    parts = [_header(results), *_failures(results)]
    for family in panels(comparisons):
        parts.append(f"## {' / '.join(family)}")
        mine = [one for one in comparisons if one.family == family]
        for measure in dict.fromkeys(one.measure for one in mine if not is_control(one.measure)):
            parts.append(f"### {title_of(measure)}, {mine[0].num_images} images")
            parts.append(_table([one for one in mine if one.measure == measure]).markdown())
    if results.costs is not None:
        parts.append(cost_section(results.costs))
    return "\n\n".join([*parts, NOTES]) + "\n"


def rich_tables(report: Report) -> list[rich.table.Table]:
    """For the terminal: the first measure of each task, and the costs."""
    tables = []
    for family, rows in panels(report.comparisons).items():
        title = f"{' / '.join(family)}: {title_of(rows[0].measure)}, {rows[0].num_images} images"
        shown = _table(rows, title)
        tables.append(shown.rich([name for name in shown.columns if name != "p"]))
    if report.results.costs is not None:
        tables.append(cost_table(report.results.costs).rich())
    return tables


def show(report: Report) -> None:
    """Prints the report at the end of a command: tables, remarks, and paths of the files."""
    console = Console()
    for shown in rich_tables(report):
        console.print(shown)
    for line in (*report.results.notes, "", *GUIDE, *map(os.path.relpath, report.files)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def provenance(results: Results) -> Origin | None:
    """The origin of the results, with data fingerprints and remarks; None: not known."""
    if results.origin is None:
        return None
    return replace(results.origin, data=dict(results.data), notes=tuple(results.notes))


def _header(results: Results) -> str:
    plan, made = results.plan, provenance(results)
    asked = (
        f"seeds {', '.join(map(str, results.seeds))}; baseline {plan.baseline}; {len(plan.competing)} arms; intervals "
        f"of {plan.confidence:.0%}"
    )
    if made is not None:
        return made.header(plan.name, [asked])
    told = "\n".join(f"- {line}" for line in (asked, *results.notes))
    return f"# {plan.name}\n\nThe sweep's run does not say how it was made.\n\n{told}"


def _failures(results: Results) -> list[str]:
    lines = [f"- FAILED: {arm}: {reason}" for arm, reason in results.failures.items()]
    return ["\n".join(lines)] if lines else []


def _cells(one: Comparison) -> list[str]:
    verdict = f"{one.verdict} ({one.basis})" if one.basis else one.verdict
    p = "" if one.p_value is None else "<0.001" if one.p_value < 0.001 else f"{one.p_value:.3f}"
    return [one.arm, f"{one.mean:.4f}", signed(one.difference), p, verdict, signed(one.gap_closed, 2)]


def _table(comparisons: Sequence[Comparison], title: str = "") -> Table:
    styles = [STYLES.get(one.verdict, "") for one in comparisons]
    rows, columns = [_cells(one) for one in comparisons], list(COLUMNS)
    if any(one.blurred is not None for one in comparisons):
        columns += BLUR_COLUMNS
        for row, one in zip(rows, comparisons, strict=True):
            row += ["" if one.blurred is None else f"{one.blurred:.4f}", signed(one.beyond_blur)]
    return Table(columns, rows, title, styles=styles)
