"""Heads of probes: what is trained on features. `linear`, or `dpt` as Probe3D has it (El Banani et al., CVPR 2024)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DPT_LAYERS = 4


class Head(nn.Module, ABC):
    """What is trained on features. `register_head` offers a class as `task.head=NAME`, from any file of a task."""

    pointwise: ClassVar[bool] = False
    """True: no output depends on neighbours, so it can be trained on drawn pixels."""
    linear: ClassVar[bool] = False
    """True: it commutes with bilinear interpolation, so that its outputs may be enlarged in place of its inputs."""

    @classmethod
    @abstractmethod
    def make(cls, channels: Sequence[int], outputs: int, hidden: int) -> "Head":
        """For features of `channels` in each of its layers; `hidden` is the setting `task.hidden`."""

    @classmethod
    def layers(cls, num_layers: int) -> list[int] | None:
        """The layers of an encoder of `num_layers` that it looks at, in order; None: the default one."""
        return None

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[(B,C,h,w)] of its layers -> (B,outputs,h,w)."""

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Weight (outputs,C) and bias (outputs,) of a head that is nothing else; None: it is more than that."""
        return None


HEADS: dict[str, type[Head]] = {}
_T = TypeVar("_T", bound=type[Head])


def register_head(name: str) -> Callable[[_T], _T]:
    """Offers a head as `task.head=name`; running the same definition again replaces the earlier one.

    Raises:
        ValueError: another head has that name.
    """

    def add(cls: _T) -> _T:
        known = HEADS.get(name, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"task.head={name} is already registered by {known.__module__}.{known.__qualname__}")
        HEADS[name] = cls
        return cls

    return add


@register_head("linear")
class LinearHead(Head):
    """A 1x1 convolution with bias on one layer.

    It commutes with bilinear interpolation, whose weights sum to 1: enlarging its output is enlarging its input.
    """

    pointwise = linear = True

    @classmethod
    def make(cls, channels: Sequence[int], outputs: int, hidden: int) -> "LinearHead":
        """Contract: `Head.make`."""
        return cls(channels, outputs)

    def __init__(self, channels: Sequence[int], outputs: int):
        super().__init__()
        (width,) = channels
        self.conv = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[(B,C,h,w)] -> (B,outputs,h,w)."""
        return self.conv(features[0])

    def affine(self) -> tuple[Tensor, Tensor]:
        """Contract: `Head.affine`."""
        return self.conv.weight.flatten(1), self.conv.bias


@register_head("dpt")
class DPTHead(Head):
    """The dense prediction head of Probe3D (after DPT, Ranftl et al., ICCV 2021), on four layers.

    Probe3D enlarges the features of the encoder inside of the head, 2 and 4 times by nearest neighbours and 2 times
    at the end. Here features come upsampled to the resolution that is asked for, so the head leaves the grid alone.
    """

    @classmethod
    def make(cls, channels: Sequence[int], outputs: int, hidden: int) -> "DPTHead":
        """Contract: `Head.make`."""
        return cls(channels, outputs, hidden)

    @classmethod
    def layers(cls, num_layers: int) -> list[int]:
        """The last layer of each quarter of the encoder, as Probe3D takes them: 2, 5, 8, 11 of 12."""
        return [round((i + 1) * num_layers / DPT_LAYERS) - 1 for i in range(DPT_LAYERS)]

    def __init__(self, channels: Sequence[int], outputs: int, hidden: int = 512, kernel_size: int = 3):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(width, hidden, 1) for width in channels)
        self.skip = nn.ModuleList(_Residual(hidden, kernel_size) for _ in channels[:-1])
        self.fuse = nn.ModuleList(_Residual(hidden, kernel_size) for _ in channels)
        self.out = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(True), nn.Conv2d(hidden, outputs, 3, padding=1)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """[(B,C,h,w)] of layers, first to last -> (B,outputs,h,w)."""
        layers = [project(each) for project, each in zip(self.project, features, strict=True)]  # (B,hidden,h,w) each
        fused = self.fuse[-1](layers[-1])
        for i in reversed(range(len(layers) - 1)):
            fused = self.fuse[i](self.skip[i](layers[i]) + fused)
        return self.out(fused)  # (B,outputs,h,w)


class _Residual(nn.Module):
    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Sequential(
            *(
                layer
                for _ in range(2)
                for layer in (nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2), nn.ReLU())
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


def enlarged(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,K,h,w) -> (B,K,*size), bilinear; the same tensor where it is that already."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values, size, mode="bilinear")


def at_positions(values: Tensor, positions: Tensor, size: tuple[int, int]) -> Tensor:
    """What `enlarged(values, size)` is at some of its positions, without computing the others.

    Args:
        values: (1,K,h,w). positions: (P,2) integer (row, column) on the grid of `size`.

    Returns:
        (K,P).
    """
    if tuple(values.shape[-2:]) == tuple(size):
        return values[0, :, positions[:, 0], positions[:, 1]]
    rows, columns = ((positions[:, i] + 0.5) * 2 / size[i] - 1 for i in range(2))  # -1 to 1 over the whole grid
    grid = torch.stack([columns, rows], -1).to(values.dtype)[None, None]  # (1,1,P,2)
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]  # (K,P)
