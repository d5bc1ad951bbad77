"""A model that is called image by image, and what a temporal filler carries from one to the next."""

import logging

from torch import Tensor

import core
from core.passthrough import NoTemporal
from core.video_state import VideoState

log = logging.getLogger(__name__)


class Video:
    """A model that is called image by image. With a temporal filler the images are frames of one video, in order.

    A frame of another size than the one before begins a new video.
    """

    def __init__(self, model: core.AnyUp):
        self.model, self.carries = model, not isinstance(model.temporal, NoTemporal)
        self.state: object | None = None
        self.size: tuple[int, ...] | None = None
        self.gap = 1.0
        """Time from the previous image to the coming one, in frames."""

    def __call__(self, image: Tensor, features: Tensor, size: tuple[int, int]) -> Tensor:
        """(1,3,H,W), (1,C,h,w) -> (1,C,Qh,Qw)."""
        if not self.carries:
            return self.model(image, features, size)
        shape = (*image.shape, *features.shape, *size)
        if self.size not in (None, shape):
            log.info("the frames have another size from here on: a new video begins")
            self.state = None
        if isinstance(self.state, VideoState):
            self.state = self.state.before_next(self.gap)
        began = self.state is None
        output, self.state = self.model(image, features, size, state=self.state, return_state=True)
        if isinstance(self.state, VideoState) and self.state.message and not began:
            log.info("%s", self.state.message)
        self.size = shape
        return output
