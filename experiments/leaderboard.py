"""All methods on several encoders and data sets, ranked with intervals: `python -m experiments.leaderboard`.

Settings: configs/leaderboard.yaml.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments.command import command
from experiments.lock import Locked, lock_folder, unlock_folder
from experiments.reports.leaderboard import rank_table, write
from experiments.reports.results import Board
from experiments.settings import (
    SettingError,
    check_confidence,
    check_count,
    check_name,
    check_seeds,
    check_writable,
    pick_device,
)
from experiments.statistics.ranks import Column, Ranks, columns_of, pairs, rank, wins
from experiments.sweeps.board import board
from experiments.tracking.provenance import Origin, machine
from experiments.tracking.store import track

log = logging.getLogger(__name__)


@dataclass
class Leaderboard:
    """What was measured, how it ranks, and the files written."""

    board: Board
    columns: list[Column]
    ranks: list[tuple[Ranks, pd.DataFrame]]
    """Of each group of encoders, with the wins of its methods."""
    files: list[Path]


@command
def main(config: DictConfig) -> int | None:
    """The command `leaderboard`; returns 1 when a method failed."""
    found = leaderboard(config)
    if found is None:
        log.info("another process leads this board and writes its report")
        return 0
    console = Console()
    for ranks, beaten in found.ranks:
        table = rank_table(ranks, beaten, found.board)
        console.print(table.rich(["method", "rank", "first", "wins", "losses", "ms"]))
    for file in found.files:
        console.print(os.path.relpath(file), markup=False, highlight=False, soft_wrap=True)
    failed = {key: reason for key, reason in found.board.absent.items() if reason.startswith("failed")}
    for (encoder, method), reason in failed.items():
        log.error("method %s on %s %s", method, encoder, reason)
    return int(bool(failed))


def leaderboard(config: DictConfig) -> Leaderboard | None:
    """Does the missing work and writes the board; None: another process leads.

    Raises:
        SettingError, DataError, TrackingUnavailable: raised before anything is computed.
        SweepError, ScoreError: the baseline failed, or results contradict each other.
    """
    check_name(config.name)
    check_seeds(config.seeds)
    check_confidence(config.confidence)
    check_count("num_resamples", config.num_resamples, 100)
    if not config.aspects:
        raise SettingError("aspects is empty: give what counts, such as aspects={detail: ['fidelity/*/detail']}")
    folder = Path(config.out_dir).expanduser()
    check_writable(folder)
    device = pick_device(config.device)
    try:
        lock = lock_folder(folder / "lead")
    except Locked:
        board(config, leads=False)
        return None
    try:
        return _led(config, folder, device)
    finally:
        unlock_folder(folder / "lead", lock)


def _led(config: DictConfig, folder: Path, device: torch.device) -> Leaderboard:
    found = board(config)
    methods = [name for name, kind in found.kinds.items() if kind != "ceiling"]
    columns = columns_of(found.scores, OmegaConf.to_container(config.aspects, resolve=True), list(found.kinds))
    if not columns:
        raise SettingError("aspects: no measure of the tasks fits any pattern")
    judged = pairs(columns, methods)
    ranked = list(_ranked(config, found, columns, methods, judged))
    with track(config, device) as run:
        origin = Origin.of_this_process(
            "experiments.leaderboard",
            "experiments.leaderboard.leaderboard(config), from Python",
            machine(device, torch.get_num_threads(), "float32"),
            notes=found.notes,
        )
        files = write(folder, config.name, origin, found, ranked, columns, judged)
        for file in files:
            run.file(file, f"leaderboard/{file.name}")
        for ranks, _ in ranked:
            run.metrics({f"rank/{ranks.group}/{name}": one.value for name, one in ranks.overall.items()})
    return Leaderboard(found, columns, ranked, files)


def _ranked(
    config: DictConfig, found: Board, columns: list[Column], methods: list[str], judged: pd.DataFrame
) -> Iterator[tuple[Ranks, pd.DataFrame]]:
    """The groups: encoders that methods were trained on, unseen ones, and where a group has several, each alone."""
    groups: dict[str, list[str]] = {}
    trains = "trained" in found.kinds.values()
    for title, unseen in (("Encoders trained on" if trains else "Encoders", False), ("Unseen encoders", True)):
        mine = [name for name, is_unseen in found.encoders.items() if is_unseen == unseen]
        if mine:
            groups[f"{title}: {', '.join(mine)}"] = mine
            groups |= {f"{name} alone": [name] for name in mine if len(mine) > 1}
    for title, encoders in groups.items():
        of_group = [column for column in columns if column.backbone in encoders]
        ranks = rank(title, of_group, methods, config.confidence, config.num_resamples)
        if ranks is not None:
            rows = judged[judged["backbone"].isin(encoders)]
            yield ranks, wins(rows, ranks.methods, config.confidence)
        else:
            log.warning("%s: fewer than two methods have all measures, so nothing is ranked", title)


if __name__ == "__main__":
    main()
