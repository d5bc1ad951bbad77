"""Data sets that are files on disk: finds the files that belong together, reads them, and reports what does not fit.

`FileSet` is the base of every published layout. A subclass lists `Record`s; the base checks, fingerprints and reads
them. Two rules hold for all: a file without its partner is an error, and pixels are read as stored (an EXIF rotation
would turn the image but not its labels).
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from experiments.data.base import DataError, DataSet, Sample
from experiments.data.image_files import UnreadableImage, read
from experiments.data.labels import classes_of, read_ids, why

IMAGES = frozenset((".jpg", ".jpeg", ".png"))
"""Suffixes of images in published layouts."""
PNG = frozenset((".png",))

WHOLE = 1 << 30
"""Data sets up to this many bytes are read in full for the fingerprint."""
STRIDE, BLOCK = 1 << 20, 1 << 14
"""For larger ones it takes of each file the size, `BLOCK` bytes of every `STRIDE`, and the last `BLOCK` bytes."""

Reader = Callable[[Path], Tensor]


@dataclass(frozen=True)
class Record:
    """The files of one sample."""

    name: str
    image: Path
    labels: Path | None = None
    depth: Path | None = None
    normals: Path | None = None
    pose: Path | None = None
    flow: Path | None = None


class FileSet(DataSet):
    """Samples that are read from files. Subclasses call `_keep` with what they found."""

    layout: ClassVar[str]
    """What the folder `path` must contain, as error messages say it."""
    label_classes: np.ndarray
    """(ids,) class of each id in the label files, `IGNORE`, or -1 for ids that must not occur."""
    as_stored: ClassVar[bool] = True
    """False: images are turned upright by their EXIF rotation."""

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        try:
            image = read(record.image, upright=not self.as_stored)[0]  # (3,H,W)
        except UnreadableImage as error:
            raise DataError(f"{error}. Copy the file again") from error
        labels = self._same_size(record, record.labels, image, self._read_labels)
        depth = self._same_size(record, record.depth, image, self._read_depth)
        normals = self._same_size(record, record.normals, image, self._read_normals)
        return Sample(record.name, image, labels, depth, normals)

    def _same_size(self, record: Record, path: Path | None, image: Tensor, reader: Reader) -> Tensor | None:
        if path is None:
            return None
        values = reader(path)
        if values.shape[-2:] != image.shape[-2:]:
            raise DataError(
                f"{path} has {_size(values)} pixels, but its image {record.image} has {_size(image)}: one of the two "
                f"was resized or belongs to another image"
            )
        return values

    def _read_labels(self, path: Path) -> Tensor:
        return classes_of(read_ids(path), self.label_classes, f"{path}: data={self.choice}")

    def _read_depth(self, path: Path) -> Tensor:
        raise NotImplementedError

    def _read_normals(self, path: Path) -> Tensor:
        raise NotImplementedError

    def _folder(self, root: Path, inside: str) -> Path:
        if not root.is_dir():
            raise DataError(
                f"data={self.choice}: {root} is not a folder; data.path must name a folder with {self.layout}"
            )
        if not (found := root / inside).is_dir():
            raise DataError(
                f"data={self.choice}: there is no folder {inside} in {root}; data.path must name a folder with "
                f"{self.layout}"
            )
        return found

    def _choose(self, key: str, value: str, known: Iterable[str]) -> None:
        if value not in known:
            raise DataError(f"data={self.choice} has no {key} {value!r}; there are: {', '.join(known)}")

    def _find(self, folder: Path, suffixes: Iterable[str], ending: str = "", nested: bool = False) -> dict[str, Path]:
        """Files below a folder: path without suffix and `ending`, relative to the folder -> file, in natural order."""
        found: dict[str, Path] = {}
        for path in _walk(folder, nested):
            if path.suffix.lower() not in suffixes or not path.stem.endswith(ending):
                continue
            name = path.relative_to(folder).with_name(path.stem.removesuffix(ending)).as_posix()
            if name in found:
                raise DataError(f"data={self.choice}: {found[name]} and {path} share the name {name}: keep one of them")
            found[name] = path
        if not found:
            wanted = " ".join(f"*{ending}{suffix}" for suffix in sorted(suffixes))
            raise DataError(f"data={self.choice}: {folder} has no file {wanted}; expected: {self.layout}")
        return dict(sorted(found.items(), key=lambda item: natural(item[0])))

    def _match(self, images: Mapping[str, Path], parts: Mapping[str, Mapping[str, Path]]) -> list[Record]:
        """Records of images and their `parts` (field of `Record` -> files); one without its partner is refused."""
        for part, files in parts.items():
            if missing := [str(images[name]) for name in images if name not in files]:
                raise DataError(f"data={self.choice}: {_some(missing, 'images')} without {part}: {_WAY_OUT}")
            if lonely := [str(files[name]) for name in files if name not in images]:
                raise DataError(f"data={self.choice}: {_some(lonely, f'files of {part}')} without image: {_WAY_OUT}")
        return [
            Record(name, path, **{part: files[name] for part, files in parts.items()}) for name, path in images.items()
        ]

    def _listed(self, file: Path) -> list[str]:
        """The names in a list of one name per line."""
        try:
            names = file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data={self.choice}: the list of images {file} cannot be read: {why(error)}") from error
        if not names:
            raise DataError(f"data={self.choice}: {file} lists no image: copy it again or choose another split")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(f"data={self.choice}: {file} repeats {_some(twice, 'names')}: list each once")
        return names

    def _only(self, names: Iterable[str], files: Mapping[str, Path], file: Path, what: str) -> dict[str, Path]:
        """The `files` that `file` lists; all of them must exist."""
        names = list(names)
        if missing := [name for name in names if name not in files]:
            raise DataError(f"data={self.choice}: {_some(missing, 'names')} in {file} without {what}: {_WAY_OUT}")
        return {name: files[name] for name in names}

    def _keep(self, records: Iterable[Record], settings: Mapping[str, object]) -> None:
        """Makes `records` the samples. `settings` are all other values that change a sample."""
        self.records = list(records)
        self.names = [record.name for record in self.records]
        self.fingerprint = fingerprint(self.choice, settings, self.records)


_WAY_OUT = "complete the copy, or remove what has no partner"


def fingerprint(choice: str, settings: Mapping[str, object], records: Iterable[Record]) -> str:
    """Hexadecimal digest of names, contents and settings. Location and times of the files do not count.

    Data sets of up to 1 GiB are read in full. For larger ones, each file counts with its size and with 16 KiB at its
    beginning, at each MiB and at its end. A PNG ends with a checksum, so changed pixels are found; a change of a JPEG
    that keeps its size may be missed.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256(repr((choice, sorted(settings.items()))).encode())
    records = list(records)
    parts = [(r.name, field.name, getattr(r, field.name)) for r in records for field in fields(Record)[1:]]
    parts = [(name, part, path) for name, part, path in parts if path is not None]
    try:
        sizes = [path.stat().st_size for _, _, path in parts]
    except OSError as error:
        raise DataError(f"{error.filename}: {why(error)}") from error
    whole = sum(sizes) <= WHOLE
    for (name, part, path), size in zip(parts, sizes, strict=True):
        digest.update(f"\0{name}\0{part}\0{size}\0".encode())
        digest.update(_content(path, size, whole))
    return digest.hexdigest()


def _content(path: Path, size: int, whole: bool) -> bytes:
    """Digest of a file, or of a sample of its blocks."""
    try:
        with path.open("rb") as file:
            if whole:
                return hashlib.file_digest(file, "sha256").digest()
            digest = hashlib.sha256()
            for start in [*range(0, size, STRIDE), max(0, size - BLOCK)]:
                file.seek(start)
                digest.update(file.read(BLOCK))
            return digest.digest()
    except OSError as error:
        raise DataError(f"{path}: {why(error)}") from error


def natural(name: str) -> list[tuple[str, int]]:
    """Sort key by which frame2 comes before frame10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _walk(folder: Path, nested: bool) -> Iterable[Path]:
    """Files that are not hidden, sorted."""

    def stop(error: OSError) -> None:
        raise DataError(f"{error.filename}: {why(error)}") from error

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if nested and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _some(things: list[str], what: str) -> str:
    return f"{len(things)} {what} ({', '.join(things[:3])}{', ...' if len(things) > 3 else ''})"


def _size(values: Tensor) -> str:
    return f"{values.shape[-1]}×{values.shape[-2]}"
