"""What an evaluation has measured so far, on disk: the same command, run again, goes on where it was stopped."""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from core.hooks import Filler
from experiments.data import data_sets
from experiments.data.code_version import code_of_user, evaluation_version
from experiments.data.identity import digest_of
from experiments.measuring.bench import Ceiling
from experiments.measuring.tasks import tasks
from experiments.peers import Peer
from experiments.statistics.score_files import read_scores, write_scores
from experiments.statistics.scores import ScoreError

log = logging.getLogger(__name__)


class KeptScores:
    """Scores of arms with a seed, one file each. What they depend on is in the file's name: a stale one is never found.

    Args:
        folder: made when there is something to keep.
        config: of the evaluation. fingerprint: `Evaluation.fingerprint`.
    """

    def __init__(self, folder: Path, config: DictConfig, fingerprint: str):
        self.folder = folder
        classes = [tasks()[config.task.name], *(data_sets()[config[role].name] for role in ("data", "val_data"))]
        self._known = [fingerprint, evaluation_version(), *map(code_of_user, classes)]

    def place(self, model: nn.Module | Ceiling, arm: str, seed: int) -> Path:
        """The file of a model's scores, as the arm of that name."""
        known = {"known": self._known, "model": _identity(model), "arm": arm, "seed": seed}
        return self.folder / f"{digest_of(known)[:32]}.parquet"

    def read(self, place: Path) -> tuple[pd.DataFrame, dict[str, str]] | None:
        """The scores, and the pictures that `write` was given; None: they were not kept, or the file is damaged."""
        if not place.exists():
            return None
        try:
            scores, made = read_scores(place)
        except ScoreError as error:
            log.warning("%s; they are measured again", error)
            return None
        return scores, made["pictures"]

    def write(self, place: Path, scores: pd.DataFrame, pictures: Mapping[str, str]) -> None:
        """Keeps scores, and names of pictures; raises CannotWrite."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_scores(place, scores, {"pictures": dict(pictures)})

    def clear(self) -> None:
        """Removes all, when the evaluation is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _identity(model: nn.Module | Ceiling) -> str:
    """Digest of a model: its structure, settings, weights, and code that is not this project's own."""
    if isinstance(model, Ceiling):
        return model.name
    digest = hashlib.sha256(repr(model).encode())
    for name, module in model.named_modules():
        settings = getattr(module, "settings", None) if isinstance(module, Peer) else getattr(module, "config", None)
        code = code_of_user(type(module)) if isinstance(module, Peer | Filler) else ""
        digest.update(repr((name, type(module).__qualname__, settings, code)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
