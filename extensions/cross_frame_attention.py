"""`temporal=cross_frame_attention`: every output vector also attends to the encoder's features of the previous frame.

The encoder saw the previous frame, too, with its grid on other parts of the surfaces. Each output vector looks at the
previous features around its own place and takes over what resembles it. No flow is needed: attention finds what moved,
by up to `radius` cells of the feature grid.

    weight_j = softmax over j of scale · cosine(output, previous feature j), beside one more score, scale · threshold
    output   = output + strength^gap · tanh(gate) · sum over j of weight_j (previous feature j - output)

The additional score lets a vector attend to nothing, where nothing resembles it: it plays the part of an occlusion
check, and of a scene cut. Both sides of the cosine are minus the output's mean vector. The previous features are
interpolated bilinearly at the output's place, moved by whole cells. They are raw, so nothing older than one frame ever
comes in.

Scale, threshold and gate are one number each, the same for all channels, so any C works. The gate is zero at the start:
then it is the baseline, frame by frame, exactly.

Training: along a clip, the mixture at the feature grid is compared with the following frame's features, moved along the
clip's flow. That frame is a second measurement of the same surfaces (Lehtinen et al., arXiv 1803.04189).

Status: measured on 3 videos (docs/temporal.md): lowers the warping error, less than temporal_consistency.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batch import Batch, Context
from core.hooks import GATE_LR_SCALE, Temporal
from core.points import pixel_centres
from core.registry import register
from core.video_state import VideoState, check_range
from core.warping import inside, resize_flow, warp

PICTURE_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class FeatureState(VideoState):
    """The encoder's features of the latest frame."""

    kept: ClassVar[tuple[str, ...]] = ("features",)

    features: Tensor
    """(B,C,h,w)."""


@register("cross_frame_attention")
class CrossFrameAttention(Temporal):
    """Attends to the previous frame's features; see the module's docstring.

    The first frame passes unchanged. After a gap above `max_gap` the video begins again; the state's message says so. A
    change of resolution does not matter.

    Args:
        strength: largest share of the previous features, from 0 (frame by frame) to below 1.
        radius: cells of the feature grid that attention reaches in each direction; it takes (2·radius + 1)² looks.
        max_gap: the video begins again after a longer gap.

    Raises:
        ValueError: a setting is out of range.
    """

    batch_parts = frozenset({"clip"})
    state_type = FeatureState
    changeable = ("strength", "radius", "max_gap")
    lr_scales: ClassVar[dict[str, float]] = {"gate": GATE_LR_SCALE}

    def __init__(self, embed_dim: int, strength: float = 0.9, radius: int = 1, max_gap: float = 8.0):
        super().__init__()
        check_range("temporal=cross_frame_attention", strength, max_gap)
        if radius < 0:
            raise ValueError(f"temporal=cross_frame_attention: radius must not be negative, got {radius}")
        self.strength, self.radius, self.max_gap = strength, radius, max_gap
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.threshold = nn.Parameter(torch.tensor(0.5))
        self.gate = nn.Parameter(torch.zeros(()))
        self.share: Tensor | None = None
        """(B,1,Qh,Qw): share of the previous features in the latest forward without gradients."""

    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, FeatureState]:
        reason = FeatureState.begins(state, output, self.strength, self.max_gap)
        if reason:
            self.share = None
            return output, FeatureState(features=context.features.clone(), message=reason)
        mixed, share = self._attend(output, state.features, context.coords, state.gap)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.share = share
        told = state.gap_message(self.strength)
        return mixed, FeatureState(features=context.features.clone(), message=told)

    def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """`fusion_loss`, if the batch has clips: squared difference in units of the features' variance.

        Raises:
            ValueError: the clips have fewer than three frames, or no flow.
        """
        clip = batch.clip
        if clip is None:
            return {}
        name, length = "temporal=cross_frame_attention", clip.image.shape[1]
        if length < 3:
            raise ValueError(f"{name} needs clips of at least 3 frames, got {length}: set views.clip=3")
        if clip.flow is None:
            raise ValueError(f"{name} needs clips with flow, and the data set knows none: train on data=scenes")
        features = clip.features.float()
        coords = pixel_centres(tuple(features.shape[-2:]), like=features)
        variance = features.var((1, 3, 4), correction=0).sum(1).view(-1, 1, 1, 1)  # (B,1,1,1)
        losses = []
        for i in range(1, length - 1):
            mixed, _ = self._attend(features[:, i], features[:, i - 1], coords, 1.0)
            flow = resize_flow(clip.flow[:, i].float(), tuple(features.shape[-2:]))
            error = (mixed - warp(features[:, i + 1], flow)).square().sum(1, keepdim=True)
            error, seen = error / variance.clamp(min=torch.finfo(torch.float32).tiny), inside(flow)
            losses.append((error * seen).sum() / seen.sum().clamp(min=1))
        return {"fusion_loss": torch.stack(losses).mean()}

    def pictures(self) -> dict[str, Tensor]:
        """Share of the previous features, 0 (black) to 1 (white). Empty at the first frame of a video."""
        if self.share is None:
            return {}
        size = [min(side, PICTURE_SIDE) for side in self.share.shape[-2:]]
        shown = F.adaptive_avg_pool2d(self.share[:1].float().abs(), size)[0]
        return {"share of the previous features": shown.expand(3, -1, -1).clamp(0, 1)}

    def _attend(self, output: Tensor, previous: Tensor, coords: Tensor, gap: float) -> tuple[Tensor, Tensor]:
        """(B,C,Qh,Qw), (B,C,h,w), (Qh,Qw,2) -> the mixture, and (B,1,Qh,Qw) the share of the previous features.

        Two passes over the places, so that only one place's features exist at a time.
        """
        wide = torch.promote_types(output.dtype, torch.float32)
        ours = output.to(wide)
        mean = ours.mean((2, 3), keepdim=True)
        own = ours - mean
        looks = [F.cosine_similarity(own, seen - mean) for seen in self._places(previous.to(wide), coords)]
        scores = torch.stack([self.threshold.to(wide).expand_as(looks[0]), *looks], 1)  # (B,1+K,Qh,Qw)
        weights = (self.scale.to(wide) * scores).softmax(1)
        moved = sum(
            weight[:, None] * (seen - ours)
            for weight, seen in zip(weights.unbind(1)[1:], self._places(previous.to(wide), coords), strict=True)
        )
        largest = self.strength**gap * self.gate.to(wide).tanh()
        change = (largest * moved).nan_to_num()  # a bad previous frame must not come in
        return output + change.to(output.dtype), largest * (1 - weights[:, :1])

    def _places(self, previous: Tensor, coords: Tensor) -> Iterator[Tensor]:
        """(B,C,Qh,Qw) for each of the (2·radius + 1)² moves by whole cells."""
        reach = range(-self.radius, self.radius + 1)
        cells = coords.new_tensor(previous.shape[-2:])
        for move in product(reach, reach):
            place = 2 * (coords + coords.new_tensor(move) / cells) - 1  # (Qh,Qw,2), row and column
            grid = place.flip(-1).to(previous.dtype).expand(len(previous), -1, -1, -1)
            yield F.grid_sample(previous, grid, padding_mode="border", align_corners=False)
