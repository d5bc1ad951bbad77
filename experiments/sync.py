"""Uploads what runs have left in the spool: `python -m experiments.sync [spool_dir=...]`.

Settings: configs/sync.yaml. Exit code: 0: everything is uploaded, or there was nothing; 1: something stays in the
spool; 2: the store cannot be reached. A journal is compared with the store, and deleted only if nothing is missing
there. Killed at any moment, the command can be run again: nothing is uploaded twice.
"""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from experiments.command import command
from experiments.settings import SettingError
from experiments.tracking.store import store_uri
from experiments.tracking.sync import Outcome, sync

DEFAULT_SPOOL = "outputs/spool"
"""The default in configs/sync.yaml. It may be missing: no run has been tracked yet."""


def _report(outcomes: list[Outcome], console: Console) -> None:
    done = [outcome for outcome in outcomes if not outcome.left]
    for outcome in outcomes:
        name = f"{outcome.run_id} ({outcome.status or 'no end'}, {outcome.records} records)"
        console.print(f"{name}: {outcome.left or f'uploaded as {outcome.store_id}'}", soft_wrap=True, markup=False)
        if outcome.broken:
            console.print(
                "  the last line of its journal is incomplete, because it was killed, and is left out", soft_wrap=True
            )
    console.print(f"{len(done)} of {len(outcomes)} runs uploaded to {store_uri()}.", soft_wrap=True, markup=False)


@command
def main(config: DictConfig) -> int | None:
    """The command line of `sync`."""
    folder = Path(config.spool_dir).expanduser()
    if not folder.is_dir() and config.spool_dir != DEFAULT_SPOOL:
        raise SettingError(f"spool_dir={folder}: there is no such folder, so no run has left anything there")
    outcomes = sync(folder)
    if outcomes:
        _report(outcomes, Console())
    else:
        Console().print(f"Nothing to upload in {config.spool_dir}.", highlight=False)
    return int(any(outcome.left for outcome in outcomes))


if __name__ == "__main__":
    main()
