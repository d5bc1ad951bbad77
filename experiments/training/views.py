"""What each training step looks at: a pure function of (seed, step), so that nothing has to be remembered.

An image is brought to `scale * view` pixels square. The whole of it, shrunk to `view`, is what the encoder and the
upsampler see; crops of `view` pixels are cut where the encoder's cells of the whole would lie at that resolution, and
their features are what must be reached (the released procedure has 448, 224 and 4 crops; AnyUp, section 3.4). Or what
must be reached is one target of the whole image, averaged over overlapping crops, which is less noisy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from core.streams import generator
from experiments.data import DataSet
from experiments.data.image_files import centre_square, resized, square_flow
from experiments.settings import SettingError


@dataclass(frozen=True)
class ViewSettings:
    """How views are cut; the defaults stand in configs/train.yaml.

    Args:
        view: side in pixels of what the encoder sees, of the whole image and of each crop.
        guidance: side in pixels of the image that guides; null in the configuration: `view`.
        scale: how many times finer the targets are than the input features; a whole number.
        crops: crops an image and step; 0: none, there is one target of the whole image.
        average: of crops=0: cells of the fine grid between the crops whose features are averaged to the target; 0: the
            target is the encoder's at `scale` times the resolution.
        crop_pool: crops are drawn from this many fixed ones for each image, so that their features can be cached;
            with `average` the target is the mean over this many. 0: from all.
        augment: strength of the photometric augmentation of the guidance, 0 to 1.
        clip: frames of the videos that some fillers look at; 0: none do.
        flip: probability that an image is shown mirrored, before anything else is made of it.
        mix_channels: probability that a step's features and targets are turned by a random rotation of their channels.
        drop_channels: largest share of the channels that a step leaves out; each step draws its own, from 0.
        others: further grids of the same training: each entry changes some of view, guidance, scale, crops, average and
            crop_pool, and each step draws one of these settings, or the ones above.
    """

    view: int
    guidance: int | None
    scale: int
    crops: int
    average: int
    crop_pool: int
    augment: float
    clip: int
    flip: float
    mix_channels: float
    drop_channels: float
    others: Sequence[Mapping[str, Any]] = ()
    grids: tuple["ViewSettings", ...] = field(init=False, compare=False, repr=False)
    """These settings, and those that `others` makes of them: what a step draws from."""

    def __post_init__(self):
        for name, least in (("view", 16), ("scale", 2), ("crops", 0), ("average", 0), ("crop_pool", 0), ("clip", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"views.{name} must be at least {least}, got {getattr(self, name)}")
        if self.guidance is not None and self.guidance < 8:
            raise SettingError(f"views.guidance must be at least 8 pixels, got {self.guidance}")
        for name in ("augment", "flip", "mix_channels"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"views.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.drop_channels < 1:
            raise SettingError(f"views.drop_channels must be at least 0 and below 1, got {self.drop_channels}")
        if self.average and self.crops:
            raise SettingError(
                f"views.average={self.average} makes one target of the whole image, views.crops={self.crops} several: "
                "set views.crops=0, or views.average=0"
            )
        if 0 < self.crop_pool < self.crops:
            raise SettingError(f"views.crop_pool={self.crop_pool} has fewer than views.crops={self.crops} crops")
        object.__setattr__(self, "grids", (self, *(self._other(changes) for changes in self.others)))

    def _other(self, changes: Mapping[str, Any]) -> "ViewSettings":
        if not isinstance(changes, Mapping) or not changes or set(changes) - set(_OF_A_GRID):
            raise SettingError(
                f"views.others has {changes!r}: each entry gives one or more of {', '.join(_OF_A_GRID)}, such as "
                "views.others=[{view: 112}, {view: 112, scale: 4}]"
            )
        return replace(self, others=(), **changes)


_OF_A_GRID = ("view", "guidance", "scale", "crops", "average", "crop_pool")
"""Settings in which the grids of one training may differ."""


@dataclass(frozen=True)
class ClipViews:
    """The videos that the images of a step begin, before any encoder has seen them."""

    guidance: Tensor
    """(B,T,3,g,g) RGB in [0,1]."""
    whole: Tensor
    """(B,T,3,view,view): the encoder's input."""
    flow: Tensor | None
    """(B,T-1,2,g,g) to the next frame, in pixels of the guidance; None where the data do not know it."""


@dataclass(frozen=True)
class StepViews:
    """The images of one step, before any encoder has seen them."""

    step: int
    backbone: int
    """Which of the backbones the step is for."""
    settings: ViewSettings
    """How the views were cut: one of the training's grids."""
    names: list[str]
    """Of the images."""
    guidance: Tensor
    """(B,3,g,g) RGB in [0,1]."""
    augmented: Tensor | None
    """(B,3,g,g), photometrically augmented; None where nobody looks at it."""
    whole: Tensor
    """(B,3,view,view): the encoder's input."""
    crops: Tensor
    """(B·n,3,view,view): n consecutive crops for each image; (B,3,scale·view,scale·view) without crops."""
    corners: Tensor | None
    """(B·n,2) rows and columns of the crops, in cells of the fine grid; None without crops."""
    clip: ClipViews | None = None
    """None where nobody looks at it."""
    high_resolution: Tensor | None = None
    """(B,3,scale·view,scale·view): the whole images; None where nobody looks at them."""


class Views(Dataset):
    """Step -> `StepViews`, the same from any process and in any order.

    Args:
        data: the images.
        settings: how to cut them.
        patch_sizes: strides in pixels of the backbones, between which each step chooses.
        seed: of all draws.
        batch_size: images a step, of all processes together.
        num_steps: how many steps there are.
        shard: (rank, processes): the part of each batch that this process sees.
        parts: the optional parts of a `core.Batch` that some filler looks at.

    Raises:
        SettingError: sizes that do not divide.
    """

    def __init__(
        self,
        data: DataSet,
        settings: ViewSettings,
        patch_sizes: list[int],
        seed: int,
        batch_size: int,
        num_steps: int,
        shard: tuple[int, int] = (0, 1),
        parts: frozenset[str] = frozenset({"augmented_image"}),
    ):
        for grid, patch in product(settings.grids, patch_sizes):
            if grid.view % patch:
                raise SettingError(f"views.view={grid.view} is no multiple of the backbone's stride {patch}")
        if batch_size % shard[1]:
            raise SettingError(f"batch_size={batch_size} cannot be shared by {shard[1]} processes")
        self.data, self.settings, self.patch_sizes, self.seed = data, settings, patch_sizes, seed
        self.batch_size, self.num_steps, self.shard, self.parts = batch_size, num_steps, shard, parts
        jitter = settings.augment
        self.photometric = v2.Compose(
            [v2.ColorJitter(jitter, jitter, jitter, jitter / 4), v2.RandomGrayscale(jitter / 4)]
        )

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> StepViews:
        backbone = int(torch.randint(len(self.patch_sizes), (), generator=generator(self.seed, "backbone", step)))
        return self.of_backbone(step, backbone)

    def of_backbone(self, step: int, backbone: int) -> StepViews:
        """The views of a step for one backbone; the images are the same for all."""
        rank, processes = self.shard
        share = self.batch_size // processes
        positions = range(step * self.batch_size + rank * share, step * self.batch_size + (rank + 1) * share)
        chosen = [self._image(position) for position in positions]
        if "clip" in self.parts:
            chosen = [self._frames(index)[0] for index in chosen]
        s, squares = self.grid(step), []
        mirrored = [self._mirrored(position) for position in positions]
        for index, flips in zip(chosen, mirrored, strict=True):
            image = centre_square(self.data[index].image[None], s.scale * s.view)
            squares.append(image.flip(-1) if flips else image)
        square = torch.cat(squares)  # (B,3,scale·view,scale·view)
        whole, guidance = shrunk(square, s)
        names = [self.data.names[index] for index in chosen]
        crops, corners = square, None
        if s.crops:
            corners = torch.cat([self._corners(s, step, at, names[at], backbone) for at in range(share)])
            crops = cut(square, corners, self.patch_sizes[backbone], s.view)
        return StepViews(
            step=step,
            backbone=backbone,
            settings=s,
            names=names,
            guidance=guidance,
            augmented=self._augment(guidance, positions) if "augmented_image" in self.parts else None,
            whole=whole,
            crops=crops,
            corners=corners,
            clip=self._clip(s, chosen, mirrored) if "clip" in self.parts else None,
            high_resolution=square if "high_resolution" in self.parts else None,
        )

    def grid(self, step: int) -> ViewSettings:
        """The settings of a step: these, or one of their `others`; the same for all backbones and processes."""
        grids = self.settings.grids
        return grids[int(torch.randint(len(grids), (), generator=generator(self.seed, "grid", step)))]

    def _frames(self, index: int) -> Sequence[int]:
        """The frames of the clip that begins at a sample, or earlier where its video ends too soon."""
        frames = next(frames for frames in self.data.videos.values() if index in frames)
        first = min(list(frames).index(index), len(frames) - self.settings.clip)
        return frames[first : first + self.settings.clip]

    def _mirrored(self, position: int) -> bool:
        """Whether the image at a position of the endless sequence is shown mirrored."""
        return bool(torch.rand((), generator=generator(self.seed, "flip", position)) < self.settings.flip)

    def _clip(self, s: ViewSettings, chosen: list[int], mirrored: list[bool]) -> ClipViews:
        whole, guidance, flows = [], [], []
        for index, flips in zip(chosen, mirrored, strict=True):
            samples = [self.data[i] for i in self._frames(index)]
            square = torch.cat([centre_square(sample.image[None], s.scale * s.view) for sample in samples])
            seen, guides = shrunk(square.flip(-1) if flips else square, s)
            whole.append(seen)
            guidance.append(guides)
            flows.append([sample.flow for sample in samples[:-1]])
        known = all(flow is not None for own in flows for flow in own)
        side = guidance[0].shape[-1]
        flow = torch.stack([square_flow(torch.stack(own), side) for own in flows]) if known else None
        if known:
            mirror = flow.new_tensor([[-1.0 if flips else 1.0, 1.0] for flips in mirrored])  # (B,2): x is turned round
            turned = [own.flip(-1) if flips else own for own, flips in zip(flow, mirrored, strict=True)]
            flow = torch.stack(turned) * mirror[:, None, :, None, None]
        return ClipViews(torch.stack(guidance), torch.stack(whole), flow)

    def _image(self, position: int) -> int:
        """The image at a position of the endless sequence in which each pass is another permutation."""
        epoch, within = divmod(position, len(self.data))
        if getattr(self, "_epoch", None) != epoch:  # kept: the next position asks for the same
            order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
            self._epoch, self._order = epoch, order.tolist()
        return self._order[within]

    def _corners(self, s: ViewSettings, step: int, at: int, name: str, backbone: int) -> Tensor:
        """(n,2) corners in cells of the fine grid."""
        cells = s.view // self.patch_sizes[backbone]
        first = at + self.shard[0] * (self.batch_size // self.shard[1])  # position in the whole batch
        drawn = generator(self.seed, "corners", step, first)
        if not s.crop_pool:
            return torch.randint(cells * (s.scale - 1) + 1, (s.crops, 2), generator=drawn)
        pool = torch.randint(cells * (s.scale - 1) + 1, (s.crop_pool, 2), generator=generator("crop pool", name))
        return pool[torch.randperm(s.crop_pool, generator=drawn)[: s.crops]]

    def _augment(self, guidance: Tensor, positions: range) -> Tensor:
        if not self.settings.augment:
            return guidance
        augmented = []
        for image, position in zip(guidance, positions, strict=True):
            with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
                torch.manual_seed(generator(self.seed, "augmentation", position).initial_seed())
                augmented.append(self.photometric(image).clamp(0, 1))
        return torch.stack(augmented)


def shrunk(square: Tensor, s: ViewSettings) -> tuple[Tensor, Tensor]:
    """(B,3,S,S) -> what the encoder sees, (B,3,view,view), and what guides, (B,3,g,g)."""
    whole = resized(square, (s.view, s.view))
    return whole, whole if s.guidance in (None, s.view) else resized(square, (s.guidance, s.guidance))


def cut(square: Tensor, corners: Tensor, patch: int, view: int) -> Tensor:
    """(B,3,S,S), (B·n,2) corners in cells of `patch` pixels -> (B·n,3,view,view)."""
    per_image = len(corners) // len(square)
    return torch.stack(
        [
            square[i // per_image, :, row * patch : row * patch + view, column * patch : column * patch + view]
            for i, (row, column) in enumerate(corners.tolist())
        ]
    )
