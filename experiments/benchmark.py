"""Cost against the dense released algorithm, forward and training step: `python -m experiments.benchmark`.

Settings: configs/benchmark.yaml. Per size: peak memory of each arm (CPU: in a fresh process), then whether all arms
compute the same, then times, interleaved. Tables and plot are rewritten after every size. Exit code: 0; 1 when an
arm failed or computed something else; 2 when nothing was measured. What does not fit into memory is a result.
"""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from tqdm.contrib.logging import logging_redirect_tqdm

from experiments.command import command
from experiments.cost.benchmark import Row, check_arms, run_case
from experiments.cost.benchmark_cases import cases_of, resolved
from experiments.cost.measure import arithmetic
from experiments.progress import Progress
from experiments.reports.benchmark import header, metrics, rich_table, write
from experiments.settings import pick_device
from experiments.tracking.store import track


def benchmark(config: DictConfig) -> list[Row]:
    """Measures all sizes, writes the tables after each -> one row per size, dtype and arm.

    Raises:
        SettingError, TrackingUnavailable: found before anything is measured.
        CannotWrite: the disk is full, say.
    """
    config = resolved(config)
    device, cases, rows = pick_device(config.device), cases_of(config), []
    check_arms(config, device)
    top = header(config, device)
    with arithmetic(config.num_threads, config.tf32), track(config, device) as run, logging_redirect_tqdm():
        for number, case in enumerate(Progress(cases, "benchmark", "size"), 1):
            measured = run_case(case, config, device)
            rows += measured
            for row in measured:
                run.metrics(metrics(row))
            unfinished = f"UNFINISHED: {number} of {len(cases)} sizes." if number < len(cases) else ""
            for path in write(rows, Path(config.out_dir), config.name, top, unfinished):
                run.file(path)
    return rows


@command
def main(config: DictConfig) -> int | None:
    """The command line of `benchmark`."""
    rows = benchmark(config)
    Console().print(rich_table(rows))
    return int(any(row.defective for row in rows))


if __name__ == "__main__":
    main()
