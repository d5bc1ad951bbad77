"""What is to be measured on a GPU, in one go: `python -m experiments.gpu`. Settings: configs/gpu.yaml.

First how exact the model is there (experiments/cost/correctness.py), then time and memory beside the dense released
algorithm. Each piece of work has its own time in a process beside this one, so that none takes the others' place, and
the tables are rewritten, whole, after each. Running out of memory or time is a result. Exit code: 0; 1 when something
failed, is wrong or less accurate than the released algorithm; 2 when nothing was measured.
"""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.cost.gpu import Measured, pieces
from experiments.reports import benchmark, correctness
from experiments.settings import pick_device
from experiments.tracking.provenance import Origin, machine


def measure(config: DictConfig) -> Measured:
    """Does all that `config` (configs/gpu.yaml) names, in order, and writes the tables after each piece.

    Raises:
        SettingError: found before anything is measured. CannotWrite: the disk is full, say.
    """
    origin, out_dir, name = _origin(config), Path(config.out_dir), str(config.name)
    for known in pieces(config):
        correctness.write(known.checks, out_dir, name, origin.header("Correctness on a device"), known.unfinished)
        if known.rows:
            benchmark.write(known.rows, out_dir, name, origin.header("Cost"), known.unfinished)
    return known


def _origin(config: DictConfig) -> Origin:
    rounds = (
        f"{config.seconds} s for everything; rounds of cost: {config.num_warmup} to warm up, up to "
        f"{config.num_runs} timed, {config.max_seconds} s of them; all arms of a line in turn in one process"
    )
    return Origin.of_this_process(
        "experiments.gpu",
        "experiments.gpu.measure(config), from Python",
        machine(pick_device(config.device), config.num_threads, ", ".join(map(str, config.dtypes)), config.tf32),
        notes=[rounds],
    )


@command
def main(config: DictConfig) -> int | None:
    """The command line of `measure`."""
    known = measure(config)
    if known.rows:
        Console().print(benchmark.rich_table(known.rows))
    return int(known.defective)


if __name__ == "__main__":
    main()
