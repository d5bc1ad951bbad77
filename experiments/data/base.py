"""What a data set is, and how one is registered and opened."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from omegaconf import DictConfig
from torch import Tensor

from core.registry import Choices
from experiments.errors import Told

IGNORE = 255
"""The label of pixels that belong to no class, in every data set."""


class DataError(Told, ValueError):
    """A data set that cannot be used: empty, incomplete, damaged, or not of the layout it was opened as."""


@dataclass(frozen=True)
class Sample:
    """One image and its annotations, all on the same pixel grid."""

    name: str
    """Unique in its data set, usable as a relative path."""
    image: Tensor
    """(3,H,W) float32 RGB in [0,1]."""
    labels: Tensor | None = None
    """(H,W) int64 class per pixel, `IGNORE` where there is none."""
    depth: Tensor | None = None
    """(H,W) float32 metres along the optical axis, 0 where unknown."""
    normals: Tensor | None = None
    """(3,H,W) float32 unit vectors in the camera's frame (x right, y down, z forward), 0 where unknown."""
    flow: Tensor | None = None
    """(2,H,W) float32 displacement in pixels (x, y) to the video's next frame; NaN where the point is hidden there."""


class DataSet(ABC):
    """An ordered, immutable list of samples."""

    choice: ClassVar[str]
    classes: tuple[str, ...] = ()
    """Names of the classes 0, 1, ... of `Sample.labels`; empty: no labels."""
    videos: Mapping[str, Sequence[int]] | None = None
    """Name of each video -> its samples in order; None: single images."""

    shorter_sides: Sequence[int] | None = None
    """Of all images, in pixels; None: not known without reading the images."""

    names: Sequence[str]
    """The names of all samples, in order."""
    fingerprint: str
    """Hexadecimal digest of the samples: equal only if all samples are equal."""

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Reads sample `index`; the result is the same every time.

        Raises:
            DataError: a file is damaged, or does not fit the layout (sizes, class ids). The message names the file.
        """


_choices = Choices("data", DataSet, __package__, DataError)
register_data = _choices.register
"""`@register_data("name")` offers a data set class as `data=name`: `core.registry.Choices.register`."""
data_sets = _choices.all
"""All registered data sets by name."""


def open_data(config: DictConfig | Mapping[str, Any]) -> DataSet:
    """Opens the data set of a configuration node `{name, ...settings}`, as the Hydra group `data` gives it.

    Raises:
        DataError: an unknown name, an unknown, missing or wrong setting, or what the data set's `__init__` raises.
    """
    return _choices.make(config)
