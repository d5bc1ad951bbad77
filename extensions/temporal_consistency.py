"""`temporal=temporal_consistency`: mixes each frame's output with the previous one, moved along optical flow.

Frame by frame, the features of a surface that stays the same flicker: the encoder's grid falls on other parts of it.
This filler averages them along the motion, where the flow can be trusted. It is causal and keeps one frame.

    output = (1 - share) · this frame's output + share · previous output, warped

- Flow from this frame to the previous one: estimated between reduced frames (core/optical_flow.py), or given by you.
- Visibility: a pixel whose flow leaves the frame, or fails the forward-backward check of Sundaram, Brox and Keutzer
  (ECCV 2010, equation 5), is occluded. Its share is zero.
- Confidence of the others: exp(-50 |I - warped I'|²) of the RGB images I (Lai et al., arXiv 1808.00449, equation 2),
  times the cosine between the output and the warped one, each minus the frame's mean vector. Both are between 0 and 1.
- `fusion=analytic`: share = strength^gap · visible · confidence. The gap is the time since the previous frame.
- `fusion=learned`: a small network sees the three measures of a pixel. It is the same for all channels, so any C works.
  share = strength^gap · visible · tanh(network), which is zero at the start. A share below zero exaggerates change.
- A scene cut is found by the mean of visibility times photometric agreement. The video begins again after it.

`strength=0` is the baseline, frame by frame, exactly. So is `fusion=learned` before training.

Training the gate: no frame knows its true features, but the next frame is a second measurement of the same surfaces
with its own noise (Lehtinen et al., arXiv 1803.04189; for video, Ehret et al., arXiv 1811.12766). The loss mixes the
encoder's features along a clip and compares each mixture with those of the following frame, moved along the flow.
Keeping what has changed is punished, keeping what only flickered is rewarded.

Status: measured on 3 videos (docs/temporal.md): lowers the warping error, and the error to the encoder at 2x.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.backbones import IMAGENET_MEAN, IMAGENET_STD
from core.batch import Batch, Context
from core.hooks import GATE_LR_SCALE, Temporal
from core.optical_flow import NAMES, estimator
from core.registry import register
from core.video_state import VideoState, check_range
from core.warping import inside, resize_flow, round_trip, warp

FUSIONS = ("analytic", "learned")
GIVEN = "given"
PICTURE_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class FlowState(VideoState):
    """One output and one reduced frame, and the flow of the coming frame if you give it."""

    kept: ClassVar[tuple[str, ...]] = ("output", "frame")

    output: Tensor
    """(B,C,Qh,Qw), the latest output."""
    frame: Tensor
    """(B,3,h,w) RGB in [0,1], the latest image, reduced."""
    flow: Tensor | None = None
    forward_flow: Tensor | None = None

    def before_next(
        self, gap: float = 1.0, flow: Tensor | None = None, forward_flow: Tensor | None = None
    ) -> "FlowState":
        """The state with what you know about the coming frame; pass it to the model's next call.

        Args:
            gap: as in `VideoState.before_next`.
            flow: (B,2,H,W) displacement (x, y) of each pixel of the coming image to its place in the previous image,
                in pixels; NaN where the point is hidden there. None: it is estimated.
            forward_flow: (B,2,H,W) the same from the previous image to the coming one, for the occlusion check. None:
                only NaN and the border of the image tell what is hidden.

        Raises:
            ValueError: the gap is not positive and finite, or there is a forward flow alone.
        """
        if flow is None and forward_flow is not None:
            raise ValueError("forward_flow alone is not enough: give flow, from the coming frame to the previous one")
        return replace(super().before_next(gap), flow=flow, forward_flow=forward_flow)


class Evidence(NamedTuple):
    """How far each pixel's previous value can be trusted."""

    visible: Tensor
    """(B,1,Qh,Qw): 0 or 1."""
    returns: Tensor
    """(B,1,Qh,Qw) in [0,1]: how well the flows of both directions agree; 1 if there is only one."""
    photometric: Tensor
    """(B,1,Qh,Qw) in [0,1]: how well the images agree."""
    similarity: Tensor
    """(B,1,Qh,Qw) in [-1,1]: cosine between the features."""
    agreeing: Tensor
    """(B,): mean of visibility times photometric agreement, over the reduced frame."""


class Shown(NamedTuple):
    """What pictures are made of: the first image of the latest forward without gradients."""

    flow: Tensor
    """(1,2,h,w)."""
    share: Tensor
    """(1,1,Qh,Qw)."""
    flicker: Tensor
    """(1,1,Qh,Qw)."""


@register("temporal_consistency")
class TemporalConsistency(Temporal):
    """Warps the previous output and mixes it in; see the module's docstring.

    The first frame passes unchanged. So does a frame with another output size or another size of the reduced image, or
    after a gap above `max_gap`: the video begins again there, and the state's message says so. It also begins again in
    each image of the batch that has a scene cut. Under gradients the state keeps the graph of all earlier frames.

    Args:
        strength: largest share of the previous output, from 0 (frame by frame) to below 1.
        fusion: `analytic` or `learned`.
        flow: `dis`, `tvl1`, `raft_small`, `raft_large`, `still` (core/optical_flow.py), or `given`: never estimated.
        flow_weights: file with torchvision's weights of RAFT.
        flow_size: longer side of the frames that flow is estimated between, and that are kept; smaller is faster.
        photometric_weight: the 50 in the confidence; 0 ignores the images.
        cut_share: a frame with less agreement than this is a scene cut; 0: none is. On four DAVIS videos consecutive
            frames agreed by at least 0.89, frames of two videos by at most 0.01.
        max_gap: the video begins again after a longer gap.
        hidden_dim: width of the learned gate's network.

    Raises:
        ValueError: a setting is out of range; `flow` or `fusion` is unknown. ModuleNotFoundError, WeightsError,
            FileNotFoundError: as `core.optical_flow.estimator`.
    """

    state_type = FlowState
    changeable = (
        "strength", "flow", "flow_weights", "flow_size", "photometric_weight", "cut_share", "max_gap",
    )  # fmt: skip
    lr_scales: ClassVar[dict[str, float]] = {"gate": GATE_LR_SCALE}

    def __init__(
        self,
        embed_dim: int,
        strength: float = 0.7,
        fusion: str = "analytic",
        flow: str = "dis",
        flow_weights: str | None = None,
        flow_size: int = 224,
        photometric_weight: float = 50.0,
        cut_share: float = 0.2,
        max_gap: float = 8.0,
        hidden_dim: int = 16,
    ):
        super().__init__()
        check_range("temporal=temporal_consistency", strength, max_gap)
        _check_settings(fusion, flow, flow_size, photometric_weight, cut_share, hidden_dim)
        self.strength, self.flow_size, self.photometric_weight = strength, flow_size, photometric_weight
        self.cut_share, self.max_gap = cut_share, max_gap
        self.estimate = None if flow == GIVEN else estimator(flow, flow_weights)
        self.hidden = self.gate = None
        if fusion == "learned":
            self.hidden = nn.Linear(3, hidden_dim)
            self.gate = nn.Parameter(torch.zeros(hidden_dim))
            self.batch_parts = frozenset({"clip"})
        self.shown: Shown | None = None

    def forward(self, output: Tensor, context: Context, state: object | None) -> tuple[Tensor, FlowState]:
        frame = reduced(context.image, self.flow_size)
        reason = self._begins(output, frame, state)
        if reason:
            self.shown = None
            return output, FlowState(output=output.clone(), frame=frame, message=reason)
        flow, back = self._flows(frame, context.image, state)
        warped, evidence = self._evidence(output, frame, state.output, state.frame, flow, back)
        cuts = evidence.agreeing < self.cut_share  # (B,)
        share = self._share(evidence, state.gap) * ~cuts.view(-1, 1, 1, 1)
        fused = torch.lerp(output, warped, share.to(output.dtype))
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self.shown = Shown(flow[:1], share[:1], _flicker(output[0], warped[0]))
        told = self._message(cuts, evidence.agreeing, state)
        return fused, FlowState(output=fused.clone(), frame=frame, message=told)

    def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Of the learned gate, if the batch has clips: `fusion_loss`, see the module's docstring.

        The mixture runs from the last frame to the first, because a clip's flow points to the next frame. The loss is a
        squared difference in units of the features' variance.

        Raises:
            ValueError: the clips have fewer than three frames.
        """
        clip = batch.clip
        if self.gate is None or clip is None:
            return {}
        length = clip.image.shape[1]
        if length < 3:
            raise ValueError(
                f"temporal=temporal_consistency with fusion=learned needs clips of at least 3 frames, got {length}: "
                "set views.clip=3, or use fusion=analytic"
            )
        features = clip.features.float()
        frames = [reduced(image, self.flow_size) for image in clip.image.unbind(1)]
        flows = [self._flow_of_clip(clip.flow, frames, i) for i in range(length - 1)]
        variance = features.var((1, 3, 4), correction=0).sum(1).view(-1, 1, 1, 1)  # (B,1,1,1)
        mixed, losses = features[:, -1], []
        for i in range(length - 2, 0, -1):
            warped, evidence = self._evidence(features[:, i], frames[i], mixed, frames[i + 1], flows[i], None)
            mixed = torch.lerp(features[:, i], warped, self._share(evidence, 1.0))
            flow = resize_flow(flows[i - 1], tuple(features.shape[-2:]))
            error = (warp(mixed, flow) - features[:, i - 1]).square().sum(1, keepdim=True)
            error = error / variance.clamp(min=torch.finfo(torch.float32).tiny)
            seen = inside(flow)
            losses.append((error * seen).sum() / seen.sum().clamp(min=1))
        return {"fusion_loss": torch.stack(losses).mean()}

    def pictures(self) -> dict[str, Tensor]:
        """Flow to the previous frame (colour wheel of Baker et al. 2011), share of the previous output (black 0,
        white 1), and flicker: difference to the previous output along the motion, in units of the features' deviation
        (white: 2 or more). Empty at the first frame of a video."""
        if self.shown is None:
            return {}
        from torchvision.utils import flow_to_image

        flow, share, flicker = self.shown
        size = tuple(min(side, PICTURE_SIDE) for side in share.shape[-2:])
        colours = flow_to_image(resize_flow(flow, size).nan_to_num()[0]) / 255
        share, flicker = (F.adaptive_avg_pool2d(x.float(), size)[0] for x in (share.abs(), flicker / 2))
        grey = {"share of the previous output": share, "flicker": flicker}
        return {"flow": colours} | {title: x.clamp(0, 1).expand(3, -1, -1) for title, x in grey.items()}

    def _begins(self, output: Tensor, frame: Tensor, state: object | None) -> str:
        """Why the video begins (again) at this frame; empty if it goes on.

        Raises:
            TypeError, ValueError: the state cannot belong to this video.
        """
        reason = FlowState.begins(state, output, self.strength, self.max_gap)
        if reason:
            return reason
        for what, before, now in (("output", state.output, output), ("image", state.frame, frame)):
            if before.shape[-2:] != now.shape[-2:]:
                sizes = "x".join(map(str, before.shape[-2:])), "x".join(map(str, now.shape[-2:]))
                where = "" if what == "output" else f", reduced to flow_size={self.flow_size}"
                return f"the {what} size changed from {sizes[0]} to {sizes[1]}{where}: the video begins again"
        return ""

    def _flows(self, frame: Tensor, image: Tensor, state: FlowState) -> tuple[Tensor, Tensor | None]:
        """(B,2,h,w) flow from this reduced frame to the previous one, and back (None if it is unknown)."""
        if state.flow is not None:
            given = (state.flow, state.forward_flow)
            return tuple(None if x is None else _checked(x, image, frame) for x in given)
        if self.estimate is None:
            raise ValueError(
                "temporal.flow=given, but the state has none: call the model with state=state.before_next(flow=...), "
                "or let it be estimated, temporal.flow=dis"
            )
        return self.estimate(frame, state.frame), self.estimate(state.frame, frame)

    def _flow_of_clip(self, flow: Tensor | None, frames: list[Tensor], i: int) -> Tensor:
        """(B,2,h,w) from frame i to the next; estimated if the data set knows none."""
        if flow is not None:
            return resize_flow(flow[:, i].float(), tuple(frames[i].shape[-2:]))
        if self.estimate is None:
            raise ValueError("temporal.flow=given, but the clips have no flow: use data that has, or temporal.flow=dis")
        there, back = self.estimate(frames[i], frames[i + 1]), self.estimate(frames[i + 1], frames[i])
        return torch.where(round_trip(there, back) <= 1, there, torch.nan)

    def _evidence(
        self, output: Tensor, frame: Tensor, previous: Tensor, previous_frame: Tensor, flow: Tensor, back: Tensor | None
    ) -> tuple[Tensor, Evidence]:
        """The previous output, warped to this frame's, and the evidence; flows are those of the reduced frames."""
        size = tuple(output.shape[-2:])
        seen = inside(flow)
        miss = torch.zeros_like(flow[:, :1]) if back is None else round_trip(flow, back).nan_to_num(torch.inf)
        seen = seen & (miss <= 1)
        difference = (frame - warp(previous_frame, flow)).square().sum(1, True)  # (B,1,h,w)
        photometric = torch.exp(-self.photometric_weight * difference).nan_to_num()
        measures = torch.cat([torch.exp(-miss), photometric], 1)  # (B,2,h,w)
        returns, agreement = F.interpolate(measures, size, mode="bilinear", antialias=True).split(1, 1)
        moved = resize_flow(flow, size)
        visible = inside(moved) & (F.interpolate(seen.float(), size, mode="nearest-exact") > 0)
        warped = warp(previous, moved).to(output.dtype)
        similarity = _similarity(output, warped)
        finite = similarity.isfinite()
        warped = torch.where(finite, warped, output)  # else one NaN would stay in the video for good
        agreeing = (seen * photometric).mean((1, 2, 3))
        return warped, Evidence(visible & finite, returns, agreement, similarity.nan_to_num(), agreeing)

    def _share(self, evidence: Evidence, gap: float) -> Tensor:
        """(B,1,Qh,Qw): the share of the previous output."""
        largest = self.strength**gap
        if self.gate is None:
            return largest * evidence.visible * evidence.photometric * evidence.similarity.clamp(min=0)
        seen = torch.cat(evidence[1:4], 1).movedim(1, -1).to(self.gate.dtype)  # (B,Qh,Qw,3)
        gate = (F.silu(self.hidden(seen)) @ self.gate).tanh()[:, None]
        return largest * evidence.visible * gate

    def _message(self, cuts: Tensor, agreeing: Tensor, state: FlowState) -> str:
        told = [
            f"scene cut in image {i} of the batch: agreement {share:.2f} is below cut_share={self.cut_share:g}, the "
            "video begins again"
            for i, (cut, share) in enumerate(zip(cuts.tolist(), agreeing.tolist(), strict=True))
            if cut
        ]
        return "; ".join(filter(None, [*told, state.gap_message(self.strength)]))


def reduced(image: Tensor, longest: int) -> Tensor:
    """ImageNet-normalised (B,3,H,W) -> RGB in [0,1], with the longer side at most `longest`, in single precision."""
    mean, deviation = (image.new_tensor(x, dtype=torch.float32).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    rgb = image.detach().float() * deviation + mean
    factor = min(1, longest / max(rgb.shape[-2:]))
    size = [max(2, round(side * factor)) for side in rgb.shape[-2:]]  # flow needs two pixels
    if size == list(rgb.shape[-2:]):
        return rgb
    return F.interpolate(rgb, size, mode="bilinear", antialias=True)


def _similarity(output: Tensor, warped: Tensor) -> Tensor:
    """(B,1,Qh,Qw): cosine between the features, each minus the frame's mean vector; 0 if one is zero."""
    wide = torch.promote_types(output.dtype, torch.float32)
    mean = output.to(wide).mean((2, 3), keepdim=True)
    return F.cosine_similarity(output.to(wide) - mean, warped.to(wide) - mean)[:, None]


def _flicker(output: Tensor, warped: Tensor) -> Tensor:
    """(1,1,Qh,Qw): distance between (C,Qh,Qw) features, in units of the output's deviation."""
    deviation = output.float().var((1, 2), correction=0).sum().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (output - warped).float().norm(dim=0)[None, None] / deviation


def _checked(flow: Tensor, image: Tensor, frame: Tensor) -> Tensor:
    """A given flow, as that of the reduced frame."""
    if not isinstance(flow, Tensor):
        raise TypeError(f"flow must be a torch tensor, got {type(flow).__name__}")
    expected = (len(image), 2, *image.shape[-2:])
    if tuple(flow.shape) != expected:
        raise ValueError(
            f"flow must be {expected}, one displacement (x, y) for each pixel of the image, got {tuple(flow.shape)}"
        )
    if flow.device != image.device:
        raise ValueError(f"flow is on {flow.device} but the image is on {image.device}: move it")
    return resize_flow(flow.float(), tuple(frame.shape[-2:]))


def _check_settings(fusion: str, flow: str, flow_size: int, weight: float, cut_share: float, hidden_dim: int) -> None:
    known = (*NAMES, GIVEN)
    for wrong, message in (
        (fusion not in FUSIONS, f"fusion={fusion} is unknown; there are: {', '.join(FUSIONS)}"),
        (flow not in known, f"flow={flow} is unknown; there are: {', '.join(known)}"),
        (flow_size < 16, f"flow_size must be at least 16 pixels, got {flow_size}"),
        (weight < 0, f"photometric_weight must not be negative, got {weight}; 0 ignores the images"),
        (not 0 <= cut_share < 1, f"cut_share must be from 0 (no cuts) to below 1, got {cut_share}"),
        (hidden_dim < 1, f"hidden_dim must be at least 1, got {hidden_dim}"),
    ):
        if wrong:
            raise ValueError(f"temporal=temporal_consistency: {message}")
