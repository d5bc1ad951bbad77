"""`anyup`, and gains on it that need no training: `anyup_bilateral`, `anyup_guided` and `anyup_regression`."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import core
from core.backbones import IMAGENET_STD
from core.fast.norm_act_conv import Buffers
from core.hooks import AFTER_ATTENTION
from experiments.peers.base import Peer, register_peer
from experiments.peers.guided_filter import GuidedFilter
from experiments.peers.joint_bilateral import JointBilateral


@register_peer("anyup")
class OfAnyUp(Peer):
    """AnyUp itself (Wimmer et al., arXiv 2510.12764), published or trained here.

    Args:
        checkpoint: as `core.load` takes it: a file, `bundled`, `anyup_paper`, `anyup_multi_backbone`.
    """

    checkpoints = ("checkpoint",)

    def __init__(self, checkpoint: str):
        super().__init__()
        self.model = core.load(checkpoint).requires_grad_(False)

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        return self.model(image, features, output_size)


@register_peer("anyup_bilateral")
class AnyUpBilateral(OfAnyUp):
    """The mean of AnyUp and the joint bilateral filter: a plain prior of space and colour beside learned attention.

    Args:
        checkpoint: as for `anyup`.
        share: of the filter in the mean.

    Raises:
        ValueError: a share outside 0 to 1.
    """

    filter: ClassVar[type[Peer]] = JointBilateral
    """The other part of the mean, at its default settings."""

    def __init__(self, checkpoint: str, share: float = 0.5):
        super().__init__(checkpoint)
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie between 0 and 1, got {share}")
        self.share, self.prior = share, self.filter()

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        filtered = self.prior(image, features, output_size)
        return torch.lerp(super().forward(image, features, output_size), filtered, self.share)


@register_peer("anyup_guided")
class AnyUpGuided(AnyUpBilateral):
    """The mean of AnyUp and the guided filter, whose outputs are no means: it may go beyond the features of the cells.

    Args:
        checkpoint, share: as for `anyup_bilateral`.

    Raises:
        ValueError: a share outside 0 to 1.
    """

    filter = GuidedFilter


@register_peer("anyup_regression")
class AnyUpRegression(OfAnyUp):
    """Local linear regression of features on colour, with AnyUp's attention as the weights of the cells.

    For each output position the features F of the cells are fitted by a + B (colour - its colour), weighted by the
    attention, with a ridge on B; a is the output. With a steep ridge it is AnyUp's weighted mean. The moments
    (of colour, of its products, of colour times features) are attended like features, as extra values: 4 C + 12
    channels instead of C, band by band.

    Args:
        checkpoint: as for `anyup`; a model without decoder, refiner and temporal filler.
        ridge: penalty on B, a variance of RGB in [0,1].

    Raises:
        ValueError: a ridge that is not positive, or a model with a filler after attention.
    """

    def __init__(self, checkpoint: str, ridge: float = 0.03):
        super().__init__(checkpoint)
        if not ridge > 0:
            raise ValueError(f"ridge must be positive, got {ridge}")
        if used := [hook for hook in AFTER_ATTENTION if self.model.config[hook]["name"] != "none"]:
            raise ValueError(f"anyup_regression is defined on attention: the checkpoint has a filler for {used[0]}")
        self.ridge = ridge

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        rgb = image * image.new_tensor(IMAGENET_STD).view(3, 1, 1)  # (B,3,H,W); the mean drops out
        fine, coarse = (F.interpolate(rgb, n, mode="area") for n in (size, features.shape[-2:]))
        products = (coarse[:, :, None] * coarse[:, None]).flatten(1, 2)  # (B,9,h,w)
        with_features = (coarse[:, :, None] * features[:, None]).flatten(1, 2)  # (B,3C,h,w)
        values = torch.cat([features, coarse, products, with_features], 1)  # (B,4C+12,h,w)
        _, query, key = self.model._guide(image, features, size, Buffers())
        output = features.new_empty(*features.shape[:2], *size)
        for rows, band in self.model.attention.bands(query, key, values):
            output[:, :, rows] = self._fitted(band, fine[:, :, rows])
        return output

    def _fitted(self, moments: Tensor, colour: Tensor) -> Tensor:
        """(B,4C+12,n,Qw) weighted means, (B,3,n,Qw) colours of the output -> (B,C,n,Qw)."""
        channels = moments.shape[1] // 4 - 3
        mean, of_colour, products, with_features = moments.split((channels, 3, 9, 3 * channels), 1)
        wide = torch.promote_types(moments.dtype, torch.float32)
        spread = products.unflatten(1, (3, 3)).to(wide) - (of_colour[:, :, None] * of_colour[:, None]).to(wide)
        spread = spread.permute(0, 3, 4, 1, 2) + self.ridge * torch.eye(3, dtype=wide, device=moments.device)
        away = (colour - of_colour).to(wide).permute(0, 2, 3, 1)[..., None]  # (B,n,Qw,3,1)
        weights = torch.linalg.solve(spread, away)[..., 0].permute(3, 0, 1, 2).to(moments.dtype)  # (3,B,n,Qw)
        fitted = mean
        for i, with_one in enumerate(with_features.chunk(3, 1)):  # weight times covariance of colour and features
            fitted = fitted + weights[i][:, None] * (with_one - of_colour[:, i, None] * mean)
        return fitted
