"""Images, or a video -> backbone -> upsampled features and one picture per image: `python -m experiments.upsample`.

Settings: configs/upsample.yaml. Exit code: 0 all images done, 1 some were skipped, 2 nothing was done or the run
had to stop; a file that exists under its final name is complete.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.reports.markdown import Table
from experiments.tracking.store import store_uri
from experiments.upsampling.upsample import Summary, upsample

MAX_ROWS = 20


def _report(summary: Summary, console: Console) -> None:
    """Says what was made, what was left out, and what to try next."""
    rows = []
    for done in summary.done[:MAX_ROWS]:
        sizes = ["×".join(map(str, size)) for size in (done.grid, done.output_size)]
        rows.append([done.name, *sizes, f"{done.backbone_ms:.0f} ms", f"{done.upsampler_ms:.0f} ms"])
    columns = ["image", "features", "output", "backbone", "AnyUp"]
    rest = f", the first {MAX_ROWS}:" if len(summary.done) > MAX_ROWS else ""
    number = f"{len(summary.done)} image{'s' * (len(summary.done) != 1)}"
    console.print(Table(columns, rows, f"{number} upsampled{rest}").rich())
    reasons = list(summary.skipped.values())
    for reason in reasons[:MAX_ROWS]:
        console.print(f"skipped: {reason}", style="red", markup=False, soft_wrap=True)
    if len(reasons) > MAX_ROWS:
        console.print(f"skipped: {len(reasons) - MAX_ROWS} more, see the log", style="red")
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    python = os.path.relpath(sys.executable) if inside else "python"
    command = f"{python} -m experiments.upsample"
    lines = [
        f"Pictures (image | low-res | bilinear | AnyUp): {summary.out_dir}/",
        f"Run: {summary.run_id or 'not tracked'}",
        "",
        "Try next:",
        f"  {command} images=PATH/TO/YOUR/PHOTOS",
        f"  {command} video=PATH/TO/YOUR/VIDEO temporal=temporal_consistency",
        f"  {command} attention.window_ratio=0.03 out_dir=outputs/narrow      # change one hook point",
        f"  {command} images=coffee backbone=dinov2_vits14 out_dir=outputs/dinov2      # downloads weights",
        f"  {python} -m mlflow ui --backend-store-uri {store_uri()}      # compare the runs",
        "  notebooks/01_first_look.ipynb      # the same by hand, and an idea of your own in one cell",
    ]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `upsample`."""
    summary = upsample(config)
    _report(summary, Console())
    return summary.exit_code


if __name__ == "__main__":
    main()
