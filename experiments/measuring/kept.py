"""What an evaluation has measured so far, on disk: the same command, run again, goes on where it was stopped."""

import hashlib
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from core.hooks import Filler
from core.weight_files import content_digest
from experiments.data import data_sets
from experiments.data.code_version import code_of_user, evaluation_version
from experiments.data.identity import digest_of, files_of
from experiments.measuring.bench import Ceiling
from experiments.measuring.tasks import tasks
from experiments.peers import Peer
from experiments.statistics.score_files import read_scores, write_scores
from experiments.statistics.scores import ScoreError

log = logging.getLogger(__name__)


@dataclass
class Kept:
    """What was measured of one arm with one seed."""

    scores: pd.DataFrame
    pictures: dict[Path, str] = field(default_factory=dict)
    """Of its worst images: file -> name as an artifact."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the scores must know."""


class KeptScores:
    """A folder of `Kept`, one file each. What scores depend on is in the file's name: a stale one is never found.

    Args:
        folder: made when there is something to keep.
        config: of the evaluation. fingerprint: `Evaluation.fingerprint`.
    """

    def __init__(self, folder: Path, config: DictConfig, fingerprint: str):
        self.folder, self._used = folder, []
        classes = [tasks()[config.task.name], *(data_sets()[config[role].name] for role in ("data", "val_data"))]
        self._known = [fingerprint, evaluation_version(), *map(code_of_user, classes)]

    def place(self, model: nn.Module | Ceiling, arm: str, seed: int) -> Path:
        """The file for a model, as the arm of that name."""
        known = {"known": self._known, "model": _identity(model), "arm": arm, "seed": seed}
        self._used.append(self.folder / f"{digest_of(known)[:32]}.parquet")
        return self._used[-1]

    def read(self, place: Path) -> Kept | None:
        """What was kept; None: nothing, or it is damaged, or its pictures are no longer those that were drawn."""
        if not place.exists():
            return None
        try:
            scores, made = read_scores(place)
        except ScoreError as error:
            log.warning("%s; they are measured again", error)
            return None
        pictures = {Path(path): name for path, name, _ in made["pictures"]}
        drawn = [digest for *_, digest in made["pictures"]]
        if not all(path.exists() for path in pictures) or drawn != [content_digest(path) for path in pictures]:
            return None
        return Kept(scores, pictures, made["notes"])

    def write(self, place: Path, kept: Kept) -> None:
        """Raises CannotWrite: the disk is full, say."""
        pictures = [[str(path), name, content_digest(path)] for path, name in kept.pictures.items()]
        write_scores(place, kept.scores, {"pictures": pictures, "notes": kept.notes})

    def clear(self) -> None:
        """Removes what this evaluation kept, when it is finished; another of the same name may have more there."""
        for place in self._used:
            place.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or not empty
            self.folder.rmdir()


def _identity(model: nn.Module | Ceiling) -> str:
    """Digest of a model: its structure, settings with the files that they name, weights, and code from elsewhere."""
    if isinstance(model, Ceiling):
        return model.name
    digest = hashlib.sha256(repr(model).encode())
    for name, module in model.named_modules():
        known = [name, type(module).__qualname__]
        if isinstance(module, Peer):
            settings = {key: str(value) for key, value in (module.settings or {}).items()}
            known += [settings, files_of(settings)]
        else:
            known.append(getattr(module, "config", None))
        if isinstance(module, Peer | Filler):
            known.append(code_of_user(type(module)))
        digest.update(repr(known).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
