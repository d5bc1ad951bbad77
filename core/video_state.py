"""What a temporal filler keeps of a video between two frames."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class VideoState:
    """Base of a temporal filler's state: plain tensors and numbers, as large after a thousand frames as after one.

    A subclass is a frozen dataclass, too, and names its tensors that live on from frame to frame in `kept`. Each must
    be (B,C,...) if it belongs to the features; the first in `kept` does.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    message: str = ""
    """What was special about the latest frame: why the video began again there, a scene cut, or a gap; else empty."""
    gap: float = 1.0
    """Time to the coming frame, as `before_next` got it."""

    def before_next(self, gap: float = 1.0) -> Self:
        """The state with what you know about the coming frame; pass it to the model's next call.

        Args:
            gap: time since the previous frame, in frames at the usual rate. 3: two frames are missing; 0.5: the rate
                has doubled. A strength s of the past then is s^gap.

        Raises:
            ValueError: the gap is not positive and finite.
        """
        if not 0 < gap < float("inf"):
            raise ValueError(f"gap must be positive and finite, in frames since the previous one, got {gap}")
        return replace(self, gap=gap)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save (`safetensors.torch.save_file`), so that a stopped video goes on with the same frames."""
        return {name: getattr(self, name).detach().contiguous() for name in self.kept}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The state whose `tensors()` were saved.

        Raises:
            ValueError: they are others.
        """
        if set(tensors) != set(cls.kept):
            named = ", ".join(sorted(tensors)) or "none"
            raise ValueError(f"a saved {cls.__name__} has the tensors {', '.join(cls.kept)}, got {named}")
        return cls(**tensors)

    @classmethod
    def begins(cls, state: object | None, output: Tensor, strength: float, max_gap: float) -> str:
        """Why the video begins (again) at the frame with this (B,C,Qh,Qw) output; empty if it goes on.

        Raises:
            TypeError, ValueError: the state cannot belong to this video; the message says why.
        """
        if state is None:
            return "first frame"
        if not isinstance(state, cls):
            raise TypeError(
                f"state must be what the call for the previous frame returned ({cls.__name__}), got "
                f"{type(state).__name__}"
            )
        known = getattr(state, cls.kept[0])
        if known.shape[:2] != output.shape[:2]:
            (images, channels), (now, wide) = known.shape[:2], output.shape[:2]
            raise ValueError(
                f"the state is of {images} videos with {channels} feature channels, but this frame has {now} and "
                f"{wide}: pass state=None to begin a new video"
            )
        if known.device != output.device:
            raise ValueError(f"the state is on {known.device} but the frame is on {output.device}: move its tensors()")
        if not strength:
            return "strength is 0: frame by frame"
        if state.gap > max_gap:
            return f"a gap of {state.gap:g} frames, more than max_gap={max_gap:g}: the video begins again"
        return ""

    def gap_message(self, strength: float) -> str:
        """What the gap does to the strength of the past; empty for a gap of 1."""
        if self.gap == 1:
            return ""
        return f"a gap of {self.gap:g} frames: the strength is {strength**self.gap:.3g}, not {strength:g}"


def check_range(owner: str, strength: float, max_gap: float) -> None:
    """Refuses a strength or a longest gap that make no sense (ValueError); `owner` names the filler in the message."""
    if not 0 <= strength < 1:
        raise ValueError(f"{owner}: strength must be from 0 (frame by frame) to below 1 (frozen), got {strength}")
    if max_gap < 1:
        raise ValueError(f"{owner}: max_gap must be at least 1 frame, got {max_gap}")
