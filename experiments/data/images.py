"""`data=images`: any photographs without labels, from folders, files, patterns, or the bundled ones."""

import hashlib
import logging
from functools import lru_cache
from pathlib import Path

from experiments.data.base import DataError, DataSet, Sample, register_data
from experiments.data.image_files import UnreadableImage, collect, read

log = logging.getLogger(__name__)


@register_data("images")
class ImageFolder(DataSet):
    """Photographs of any size, in folders of any depth.

    Args:
        path: a folder (with all folders inside), a file, a pattern such as `photos/*.jpg`, `bundled`, or several of
            these.
        skip_damaged: leave out files that cannot be decoded, with a warning for each, instead of refusing the folder.
        min_size: leave out images with a side below this many pixels, with a warning.
        first, last: keep only the images with first <= number < last. Numbers count the sorted images of one path
            after the other; None: to the end.

    Raises:
        NoImages: the path leads to no image. DataError: damaged files, or no image is left.
    """

    def __init__(
        self,
        path: list[str] = ["bundled"],  # noqa: B006  read only; Hydra wants a list
        skip_damaged: bool = False,
        min_size: int = 1,
        first: int = 0,
        last: int | None = None,
    ):
        self.files = collect(path)[first:last]
        if not self.files:
            raise DataError(f"data=images: {path} has no image between data.first={first} and data.last={last}")
        digest = hashlib.sha256()
        kept, sides, damaged, small = [], [], [], []
        for file in self.files:
            try:
                side, content = _examined(file.path, *_stamp(file.path))
            except UnreadableImage as error:
                damaged.append(str(error))
                continue
            if side < min_size:
                small.append(f"{file.path} (shorter side {side})")
                continue
            digest.update(file.name.encode() + b"\0" + content)
            kept.append(file)
            sides.append(side)
        if damaged and not skip_damaged:
            raise DataError(
                f"{len(damaged)} of {len(self.files)} images cannot be read: {'; '.join(damaged[:3])}"
                f"{'; ...' if len(damaged) > 3 else ''}. Repair or remove them, or set data.skip_damaged=true"
            )
        for line in damaged:
            log.warning("left out: %s", line)
        if not kept:
            raise DataError(
                f"none of {len(self.files)} images in {path} has both sides of at least {min_size} pixels: "
                f"{'; '.join(small[:3]) or 'all are damaged'}"
            )
        if small:
            log.warning(
                "left out %d images with a side below %d pixels: %s", len(small), min_size, "; ".join(small[:3])
            )
        self.files, self.shorter_sides = kept, sides
        self.names = [file.name for file in kept]
        self.fingerprint = digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        try:
            return Sample(self.names[index], read(self.files[index].path)[0])
        except UnreadableImage as error:
            raise DataError(str(error)) from error


def _stamp(path: Path) -> tuple[int, int]:
    """Time and size of a file, to see whether it changed."""
    if not path.exists():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(1 << 20)
def _examined(path: Path, *_stamp: int) -> tuple[int, bytes]:
    """(shorter side in pixels, digest) of an image that can be decoded; computed once per process and file version."""
    return min(read(path).shape[-2:]), hashlib.sha256(path.read_bytes()).digest()
