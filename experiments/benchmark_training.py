"""Whole training steps against the released loop's algorithm: `python -m experiments.benchmark_training`.

A step is what `experiments.training.loop` does in one: views cut from photographs, the encoder on whole images and
crops, the forwards and all losses, backward, update. The arms have the same weights and see the same images: `dense`
trains the dense reference in the model's place, `ours` the model, and `shared` is what both contain, views and encoder.
Steps are timed in turn, peaks measured apart (on CPU in a fresh process). Exit code: 0; 1 when losses differ; 2 when
nothing was measured. Settings: configs/benchmark_training.yaml.
"""

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.reports.training_steps import step_table
from experiments.training.benchmark import benchmark_training


@command
def main(config: DictConfig) -> int | None:
    """The command line of `benchmark_training`."""
    rows = benchmark_training(config)
    Console().print(step_table(rows).rich())
    return int(any(row.status.startswith("wrong") for row in rows))


if __name__ == "__main__":
    main()
