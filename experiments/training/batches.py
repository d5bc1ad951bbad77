"""Views as an encoder sees them: what the objective gets, with the optional parts that some filler looks at."""

from functools import partial

import torch
from torch import Tensor

from core.backbones import Backbone, imagenet_normalize
from core.batch import Batch, Clip
from core.channel_mixing import dropping, mixing, with_features
from core.streams import generator
from experiments.data.feature_cache import FeatureCache
from experiments.measuring.targets import CropSettings, crop_counts, half_targets, mean_of_halves
from experiments.training.views import ClipViews, StepViews, ViewSettings


class Batches:
    """The views of a step, for one backbone -> a batch, encoded on the device.

    Args:
        backbones: those of the training, in the views' order.
        cache: where features are looked for, and kept.
        parts: the optional parts of a batch that some filler looks at; nothing is made for others.
        needs_target: False: targets are not made, and are empty.
        seed: of the training. rank: of this process.
    """

    def __init__(
        self,
        backbones: list[Backbone],
        cache: FeatureCache,
        device: torch.device,
        parts: frozenset[str],
        needs_target: bool,
        seed: int,
        rank: int,
    ):
        self.backbones, self.cache, self.device, self.parts = backbones, cache, device, parts
        self.needs_target, self.seed, self.rank = needs_target, seed, rank

    def __call__(self, views: StepViews) -> Batch:
        """Raises NotFinite: as `FeatureCache.encode`."""
        backbone, s = self.backbones[views.backbone], views.settings
        whole, crops = views.whole.to(self.device), views.crops.to(self.device)
        features = self.cache.encode(backbone, whole, views.names)  # (B,C,h,w)
        target, corners = features[:0], torch.zeros(0, 2, dtype=torch.long, device=self.device)  # none
        if self.needs_target:
            target = self._target(s, backbone, crops, views.names, tuple(features.shape[-2:]))
            corners = None if views.corners is None else views.corners.to(self.device)
        augmented, encoder = views.augmented, partial(self._encoded, backbone, views.names)
        batch = Batch(
            image=imagenet_normalize(views.guidance.to(self.device)),
            features=features,
            target=target,
            output_size=(features.shape[-2] * s.scale, features.shape[-1] * s.scale),
            corners=corners,
            backbone=backbone.name,
            generator=generator(self.seed, "noise", views.step, views.backbone, self.rank),
            augmented_image=None if augmented is None else imagenet_normalize(augmented.to(self.device)),
            whole=whole if "whole" in self.parts else None,
            crops=crops if "crops" in self.parts else None,
            high_resolution=None if views.high_resolution is None else views.high_resolution.to(self.device),
            encoder=encoder if "encoder" in self.parts else None,
            clip=None if views.clip is None else self._clip(views.clip, backbone, views.names),
        )
        return self._other_channels(batch, views)

    def _other_channels(self, batch: Batch, views: StepViews) -> Batch:
        """The batch with channels dropped and mixed, as the settings say: the same for all images of the step."""
        s, source = views.settings, generator(self.seed, "channels", views.step, views.backbone)
        mixes = torch.rand((), generator=source).item() < s.mix_channels
        if s.drop_channels:
            batch = with_features(batch, dropping(batch.features.shape[1], s.drop_channels, source))
        if mixes:
            batch = with_features(batch, mixing(batch.features.shape[1], source))
        return batch

    def _target(
        self, s: ViewSettings, backbone: Backbone, crops: Tensor, names: list[str], grid: tuple[int, int]
    ) -> Tensor:
        """(B·n,3,view,view) crops -> (B·n,C,h,w); whole images (B,3,s·view,s·view) -> (B,C,s·h,s·w)."""
        called = [f"a crop of {name}" for name in names for _ in range(max(1, s.crops))]
        if not s.average:
            return self.cache.encode(backbone, crops, called)
        averaged = CropSettings(s.average, s.crop_pool or None)
        halves = [
            self.cache.encode(half, crops, called) for half in half_targets(backbone, grid, s.scale, s.view, averaged)
        ]
        return mean_of_halves(halves, crop_counts(grid, s.scale, averaged))

    def _encoded(self, backbone: Backbone, names: list[str], images: Tensor) -> Tensor:
        called = [f"a view of {', '.join(names)}"] * len(images)
        return self.cache.encode(backbone, images.to(self.device), called)

    def _clip(self, clip: ClipViews, backbone: Backbone, names: list[str]) -> Clip:
        size = clip.whole.shape[:2]  # (B,T)
        called = [f"a frame after {name}" for name in names for _ in range(size[1])]
        features = self.cache.encode(backbone, clip.whole.flatten(0, 1).to(self.device), called)
        guidance = imagenet_normalize(clip.guidance.flatten(0, 1).to(self.device))
        flow = None if clip.flow is None else clip.flow.to(self.device)
        return Clip(guidance.unflatten(0, size), features.unflatten(0, size), flow)
