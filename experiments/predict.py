"""Which measure predicts which: rank correlations over upsamplers, between measures without labels and probes.

Settings: configs/predict.yaml. Exit code: 0, or 2 when there is nothing to correlate.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.command import command
from experiments.reports.prediction import table_of, write
from experiments.settings import SettingError, check_confidence, check_name, check_writable
from experiments.statistics.prediction import Prediction, chosen, method_values, predict
from experiments.statistics.score_files import read_scores
from experiments.statistics.scores import check


@command
def main(config: DictConfig) -> int | None:
    """The command `predict`."""
    found = predict_from(config)
    files = write(config, found)
    Console().print(table_of(found).rich(["measure", "mean", "against the best"]))
    for file in files:
        Console().print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)


def predict_from(config: DictConfig) -> Prediction:
    """The rank correlations that the configuration asks for.

    Raises:
        ScoreError: a file cannot be read, or two files have the same scores. SettingError: a setting cannot be used.
    """
    from experiments.measuring.tasks import tasks  # imported above, Hydra would take task=... for a group of choices

    tasks()  # registers the measures
    check_confidence(config.confidence)
    check_name(config.name)
    check_writable(Path(config.out_dir))
    values = method_values(_read([Path(path) for path in config.scores], list(config.leave_out)))
    targets = chosen(values.columns, list(config.targets), "targets")
    asked = ["*"] if config.predictors is None else list(config.predictors)
    predictors = [name for name in chosen(values.columns, asked, "predictors") if name not in targets]
    if not predictors:
        raise SettingError("all measures of the scores are targets, so nothing is left to predict them with")
    families = {} if config.families is None else OmegaConf.to_container(config.families)
    return predict(values, predictors, targets, families, config.confidence)


def _read(paths: Sequence[Path], leave_out: Sequence[str]) -> pd.DataFrame:
    if not paths:
        raise SettingError("scores=[] names no file: give the .parquet files of evaluations or sweeps")
    scores = check(pd.concat([read_scores(path)[0] for path in paths], ignore_index=True))
    return scores[~scores["arm"].isin(leave_out)]


if __name__ == "__main__":
    main()
