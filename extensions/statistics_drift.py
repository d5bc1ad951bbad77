"""`temporal=statistics_drift`: keeps each channel's mean and deviation from drifting between frames.

For monocular geometry, flicker was found to be mostly a drift of the features' mean and variance (DyFN, arXiv
2605.25308). This filler asks whether that holds for upsampled features. It moves no pixel and needs no flow. Each
channel is shifted and scaled to running statistics, an exponential average over the frames so far.

    running = (1 - strength^gap) · this frame's statistics + strength^gap · running
    output  = (output - mean) · running deviation / deviation + running mean

Mean and deviation are those of a channel over the frame, so any C works. It is causal, and its state has two numbers
for each channel, whatever the resolution. `strength=0` is the baseline, frame by frame, exactly. It has no weights.

A camera that turns to other things changes the statistics rightly, and this filler then lags behind. Where they jump,
at a scene cut, it begins again.

Status: measured on 3 videos (docs/temporal.md): lowers the warping error a little; flicker is not mostly drift there.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from core.batch import Context
from core.hooks import Temporal
from core.registry import register
from core.video_state import VideoState, check_range

MAX_GAIN = 4.0
"""Of a channel's deviation: a channel that is nearly constant in this frame must not become noise."""


@dataclass(frozen=True, kw_only=True)
class DriftState(VideoState):
    """Running statistics of each channel, at least in single precision."""

    kept: ClassVar[tuple[str, ...]] = ("mean", "deviation")

    mean: Tensor
    """(B,C,1,1)."""
    deviation: Tensor
    """(B,C,1,1)."""


@register("statistics_drift")
class StatisticsDrift(Temporal):
    """Shifts and scales each channel to its running mean and deviation; see the module's docstring.

    The first frame passes unchanged. A change of the image's or output's size does not matter. After a gap above
    `max_gap`, and in each image of the batch that has a scene cut, the video begins again; the state's message says so.

    Args:
        strength: weight of the past in the running statistics, from 0 (frame by frame) to below 1.
        cut_distance: a frame is a scene cut if its mean vector is further from the running one than this, in units of
            the running deviation over all channels; 0: none is. Between frames of a video it was at most 0.2, between
            frames of two videos at least 0.47 (ViT-Ti on four DAVIS videos).
        max_gap: the video begins again after a longer gap.

    Raises:
        ValueError: a setting is out of range.
    """

    state_type = DriftState
    changeable = ("strength", "cut_distance", "max_gap")

    def __init__(self, embed_dim: int, strength: float = 0.9, cut_distance: float = 0.35, max_gap: float = 30.0):
        super().__init__()
        check_range("temporal=statistics_drift", strength, max_gap)
        if cut_distance < 0:
            raise ValueError(
                f"temporal=statistics_drift: cut_distance must not be negative, got {cut_distance}; 0: no frame is a "
                "scene cut"
            )
        self.strength, self.cut_distance, self.max_gap = strength, cut_distance, max_gap
        self.shown: dict[str, Tensor] = {}

    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, DriftState]:
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)  # (B,C,1,1) each
        deviation = _root(variance)
        reason = DriftState.begins(state, output, self.strength, self.max_gap)
        if reason:
            self.shown = {}
            return output, DriftState(mean=mean, deviation=deviation, message=reason)
        distance = self._distance(mean, state)  # (B,)
        cuts = ~distance.isfinite()  # else one NaN would stay in the video for good
        if self.cut_distance:
            cuts = cuts | (distance > self.cut_distance)
        keep, again = self.strength**state.gap, cuts.view(-1, 1, 1, 1)
        running_mean = torch.where(again, mean, torch.lerp(mean, state.mean, keep))  # (B,C,1,1)
        running = torch.where(again, deviation, torch.lerp(deviation, state.deviation, keep))
        gain = (running / deviation.clamp(min=torch.finfo(deviation.dtype).tiny)).clamp(max=MAX_GAIN)
        result = torch.where(again, wide, (wide - mean) * gain + running_mean).to(output.dtype)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.shown = self._bars(mean - running_mean, running)
        told = self._message(cuts, distance, state)
        return result, DriftState(mean=running_mean, deviation=running, message=told)

    def pictures(self) -> dict[str, Tensor]:
        """Drift of the channels' means that was taken out, largest first, in deviations: red up, blue down; white: 0,
        full colour: 0.5 or more. Empty at the first frame of a video."""
        return dict(self.shown)

    def _distance(self, mean: Tensor, state: DriftState) -> Tensor:
        """(B,): distance between the mean vectors, in units of the running deviation over all channels."""
        moved = (mean - state.mean).square().sum((1, 2, 3))
        spread = state.deviation.square().sum((1, 2, 3))
        return (moved / spread.clamp(min=torch.finfo(spread.dtype).tiny)).sqrt()

    def _bars(self, drift: Tensor, deviation: Tensor) -> dict[str, Tensor]:
        """One column for each channel of the first image."""
        share = (drift / deviation.clamp(min=torch.finfo(deviation.dtype).tiny))[0].flatten().float()  # (C,)
        share = (share[share.abs().argsort(descending=True)] / 0.5).nan_to_num().clamp(-1, 1)
        colours = torch.stack([1 + share.clamp(max=0), 1 - share.abs(), 1 - share.clamp(min=0)])  # (3,C)
        return {"drift of the channels' means": colours[:, None].expand(-1, 16, -1)}

    def _message(self, cuts: Tensor, distance: Tensor, state: DriftState) -> str:
        told = [
            f"scene cut in image {i} of the batch: its mean moved by {far:.2f} deviations, more than "
            f"cut_distance={self.cut_distance:g}, the video begins again"
            for i, (cut, far) in enumerate(zip(cuts.tolist(), distance.tolist(), strict=True))
            if cut
        ]
        return "; ".join(filter(None, [*told, state.gap_message(self.strength)]))


def _root(variance: Tensor) -> Tensor:
    """Square root, with gradient 0 where the variance is 0."""
    return torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
