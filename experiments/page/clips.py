"""From a short video to pictures of its features, frame by frame and with a temporal filler: pure functions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import core
from core.backbones import Backbone
from experiments.data.video_files import Frame
from experiments.page.engine import Pictures, checked_size, encoded
from experiments.reports.pictures import fit_colours
from experiments.upsampling.video import Video

MAX_FRAMES = 16
SIDE = 176
"""Longer side of the frames in pixels."""
ALONE, TOGETHER = "frame by frame", "with the temporal filler"


@torch.inference_mode()
def clip_pictures(
    frames: Sequence[Frame], backbone: Backbone, model: core.AnyUp, done: Callable[[int], None] = lambda count: None
) -> tuple[list[Pictures], dict[str, float]]:
    """Upsamples all frames. The temporal filler comes last, so what it gets is the output frame by frame.

    Args:
        done: is told after each frame how many are finished.

    Returns:
        Of each frame: image, output frame by frame, and with the temporal filler. And how much each of both changes
        from frame to frame: the mean squared difference at the same pixel, in units of the output's variance. Motion
        is a part of it, the same for both.

    Raises:
        UnreadableImage, SettingError: a frame is too small or too large. ValueError: the model refuses the features.
    """
    shown = [encoded(frame.image, backbone, SIDE, f"frame {frame.index}") for frame in frames]
    colours = fit_colours([one.features for one in shown])
    video, watched = Video(model), _Watched(model.temporal)
    before: dict[str, Tensor] = {}
    changes: dict[str, list[float]] = {ALONE: [], TOGETHER: []}
    pictures = []
    try:
        for count, (frame, one) in enumerate(zip(frames, shown, strict=True), 1):
            video.gap = frame.gap
            output = video(one.image, one.features, checked_size(one, None))  # (1,C,Qh,Qw)
            outputs = {ALONE: output if watched.got is None else watched.got, TOGETHER: output}
            for name, now in outputs.items():
                if name in before and before[name].shape == now.shape:
                    changes[name].append(((now - before[name]).square().mean() / now.var()).item())
            before = outputs
            image = one.rgb[0].permute(1, 2, 0).numpy()
            pictures.append({"image": image} | {name: colours.paint(now) for name, now in outputs.items()})
            done(count)
    finally:
        watched.end()
    return pictures, {name: sum(found) / max(1, len(found)) for name, found in changes.items()}


class _Watched:
    """Keeps what a module was last called with."""

    def __init__(self, module: nn.Module):
        self.got: Tensor | None = None
        self.end = module.register_forward_pre_hook(self._keep).remove

    def _keep(self, module: nn.Module, arguments: tuple) -> None:
        self.got = arguments[0].clone()
