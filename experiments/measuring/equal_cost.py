"""How much larger an image the encoder could see for what upsampling costs: the rival that is no upsampler.

Cost is counted, not timed, so that a result is the same on every machine: floating-point operations of matrix products
and convolutions (`experiments.cost.measure.count_flops`). What an encoder computes otherwise (histograms of gradients)
counts as nothing.
"""

from bisect import bisect_right
from functools import lru_cache

import torch
from torch import Tensor

from core import AnyUp
from core.backbones import Backbone
from experiments.cost.measure import count_flops
from experiments.data.image_files import resized


def enlarged_image(
    backbone: Backbone, image: Tensor, features: Tensor, guidance: Tensor, size: tuple[int, int]
) -> Tensor:
    """The image in the largest size for which the encoder costs at most what encoding and upsampling cost together.

    Args:
        backbone: the encoder.
        image: (1,3,S,S) RGB in [0,1], the largest size that there is.
        features, guidance: (1,C,h,w), (1,3,G,G): what AnyUp would upsample, and be guided by.
        size: (Qh,Qw) of the output.

    Returns:
        (1,3,s,s): s lies between the side that `features` were computed from and S, in steps of the encoder's stride.
    """
    view = image.shape[-1] * features.shape[-1] // size[-1]
    sides = range(view, image.shape[-1] + 1, backbone.patch_size)
    upsampling = anyup_flops(features.shape[1], *(tuple(n) for n in (features.shape[-2:], guidance.shape[-2:], size)))
    allowed = encoder_flops(backbone, view) + upsampling
    fitting = bisect_right(sides, allowed, key=lambda side: encoder_flops(backbone, side))  # cost grows with the side
    side = sides[max(0, fitting - 1)]
    return resized(image, (side, side))


@lru_cache(256)
def encoder_flops(backbone: Backbone, side: int) -> int:
    """Of one forward for a square image."""
    device = next(backbone.parameters(), torch.empty(0)).device
    with torch.no_grad():
        return count_flops(lambda: backbone(torch.full((1, 3, side, side), 0.5, device=device)))


@lru_cache(64)
def anyup_flops(channels: int, grid: tuple[int, int], guidance: tuple[int, int], size: tuple[int, int]) -> int:
    """Of one forward of the published model, without computing it."""
    model = AnyUp().twice_differentiable().to("meta").eval()
    image, features = (torch.empty(1, c, *n, device="meta") for c, n in ((3, guidance), (channels, grid)))
    with torch.no_grad():
        return count_flops(lambda: model(image, features, size))
