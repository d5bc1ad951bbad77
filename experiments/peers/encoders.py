"""Peers that run the encoder themselves, on other views of the image or to look at its inner layers."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from core.backbones import Backbone, load_backbone
from experiments.peers.base import CannotUpsample, Peer
from experiments.peers.guidance import rgb_of, sized

_ALIKE = 0.5


class EncoderPeer(Peer):
    """A peer with the frozen encoder of its features.

    The encoder moves with the peer, but is no part of its parameters and state dict: it is not trained or saved.

    Args:
        encoder: name of the backbone that the features are of, at its default layer.
        encoder_weights: as `core.backbones.load_backbone`; None: its pretrained weights.

    Raises:
        As `load_backbone`.
    """

    def __init__(self, encoder: str, encoder_weights: str | Path | None):
        super().__init__()
        self._held = (load_backbone(encoder, encoder_weights),)  # a tuple hides it from parameters and state dict
        self.channels = self.encoder.channels

    @property
    def encoder(self) -> Backbone:
        """The frozen encoder."""
        return self._held[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EncoderPeer":
        self.encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def seen(self, image: Tensor, features: Tensor) -> Tensor:
        """(B,3,H,W) normalised guidance -> (B,3,h·p,w·p) RGB in [0,1], of which the encoder makes a (h,w) grid."""
        h, w = features.shape[-2:]
        patch = self.encoder.patch_size
        rgb = rgb_of(image.to(torch.promote_types(image.dtype, torch.float32)))
        return sized(rgb, (patch * h, patch * w))

    def check_own(self, own: Tensor, features: Tensor) -> None:
        """Refuses features that the encoder does not give for the image.

        Args:
            own: what it gives, to compare (B,C,h,w) features with.

        Raises:
            CannotUpsample: another grid, or a mean cosine below 0.5.
        """
        name = self.encoder.name
        if own.shape != features.shape:
            raise CannotUpsample(
                f"peer {self.choice}: encoder {name} gives {own.shape[2]}x{own.shape[3]} features for an image whose "
                f"features are {features.shape[2]}x{features.shape[3]}: choose the encoder that these features are of"
            )
        alike = F.cosine_similarity(own, features.to(own.dtype), dim=1).mean().item()
        if not alike >= _ALIKE:
            raise CannotUpsample(
                f"peer {self.choice}: these are not the features of encoder {name} (mean cosine {alike:.2f}): set "
                "encoder and encoder_weights to what made them"
            )


def encoded(encoder: Backbone, views: Tensor, at_once: int) -> Tensor:
    """(N,3,H,W) RGB in [0,1] -> (N,C,h,w), without gradients, `at_once` views together."""
    with torch.no_grad():
        return torch.cat([encoder(some) for some in views.split(at_once)])
