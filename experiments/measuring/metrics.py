"""Feature fidelity, a measure of quality without labels: upsampled features against those of high-resolution crops.

The setting at scale s and view v: the image is s·v pixels square. The encoder sees it shrunk to v x v, which gives the
low-resolution features (h,w), and sees crops of v x v pixels at full resolution. The features of overlapping crops are
averaged cell by cell (`experiments.measuring.targets`): that is the target (s·h,s·w). The upsampler gets the former and
has to give the latter::

    case = fidelity_case(image, backbone, scale=2)
    fidelity(model(case.guidance, case.features, case.output_size), case)

What counts first is detail (`experiments.measuring.detail`), for blur raises cosine and lowers the error. Ceilings
(`experiments.measuring.ceilings`) tell how far one can get. No grid is assumed: the features of a backbone tile what it
sees, whatever h and w are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from core.backbones import Backbone, imagenet_normalize
from experiments.data.feature_cache import CachedBackbone
from experiments.data.image_files import centre_square, resized
from experiments.errors import Told
from experiments.measuring.detail import agreement, detail, detail_measures
from experiments.measuring.targets import AVERAGED, CropSettings, crop_counts, half_targets, mean_of_halves

EDGE_WITHIN = 1.0
"""Distance in cells of the target grid up to which a cell counts as near an edge."""
_EDGE_QUANTILES = (0.8, 0.9)
"""Canny's thresholds: an edge starts where the gradient is among the steepest 10 %, and goes on within 20 %."""


class FidelityError(Told, ValueError):
    """An image, an encoder or an upsampler for which fidelity is not defined; says which values are wrong."""


@dataclass(frozen=True)
class FidelityCase:
    """One image, ready for any number of upsamplers."""

    image: Tensor
    """(1,3,s·v,s·v) RGB in [0,1]: what the crops are taken from."""
    guidance: Tensor
    """(1,3,G,G), ImageNet-normalised: what the upsampler sees of the image."""
    features: Tensor
    """(1,C,h,w) features of the image shrunk to v x v."""
    target: Tensor
    """(1,C,s·h,s·w) features of the crops, averaged where these overlap."""
    edges: Tensor
    """(s·h,s·w) bool, on the CPU: target cells near an edge of the image."""
    halves: tuple[Tensor, Tensor] | None = None
    """(1,C,s·h,s·w) means over either half of the crops, the target where a half shows nothing; None where crops do not
    overlap."""
    seen_twice: Tensor | None = None
    """(s·h,s·w) bool, on the CPU: target cells that crops of both halves show."""
    counted: Tensor | None = None
    """(s·h,s·w) bool, on the CPU: target cells that measures look at; None: all."""
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    """Name -> (s·h,s·w) bool, on the CPU: target cells that are also measured by themselves."""

    @property
    def output_size(self) -> tuple[int, int]:
        """(rows, columns) of the target grid."""
        return self.target.shape[-2], self.target.shape[-1]


@torch.no_grad()
def fidelity_case(
    image: Tensor,
    backbone: Backbone | CachedBackbone,
    scale: int = 2,
    view: int = 224,
    guidance: int | None = None,
    crops: CropSettings = AVERAGED,
) -> FidelityCase:
    """Encodes an image at low resolution, and crop by crop at high resolution.

    Args:
        image: (1,3,H,W) or (3,H,W) RGB in [0,1], of any size, on the backbone's device; its central square is resized
            to s·v pixels (and enlarged where it is smaller: its crops then show no more detail).
        scale: s, of the target grid to the grid of the low-resolution features; at least 2.
        view: v, side in pixels of what the encoder sees at once.
        guidance: G, side in pixels of the guidance, at most s·v; None: v.
        crops: which crops the target is the mean of.

    Raises:
        ValueError: a size that does not fit; or as the backbone refuses an image of v pixels.
        FidelityError: the encoder's features are not finite, or are the same everywhere.
    """
    guidance = view if guidance is None else guidance
    if scale < 2 or view < 1 or not 1 <= guidance <= scale * view:
        raise ValueError(
            f"fidelity needs scale >= 2, view >= 1 and 1 <= guidance <= scale·view, got scale={scale}, view={view}, "
            f"guidance={guidance}"
        )
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[:2] != (1, 3):
        raise ValueError(f"fidelity needs one image, (3,H,W) or (1,3,H,W), got {tuple(image.shape)}")
    image = centre_square(image, scale * view)  # (1,3,s·v,s·v)
    features = backbone(resized(image, (view, view)))  # (1,C,h,w)
    halves = _halves(image, backbone, tuple(features.shape[-2:]), scale, view, crops)
    counts = crop_counts(tuple(features.shape[-2:]), scale, crops)  # (2,s·h,s·w)
    target = mean_of_halves(halves, counts)  # (1,C,s·h,s·w)
    for what, values in (("the image", features), ("crops", target)):
        if not torch.isfinite(values).all():
            raise FidelityError(f"backbone {backbone.name}: the features of {what} are not finite")
    if same_everywhere(target):
        raise FidelityError(
            f"backbone {backbone.name}: the features of all crops are the same everywhere (is the image blank?), so "
            "the error has no unit"
        )
    edges = image_edges(image, tuple(target.shape[-2:]))  # (s·h,s·w)
    seen_twice = (counts > 0).all(0)  # (s·h,s·w): by crops of both halves
    filled = tuple(torch.where(seen_twice.to(half.device), half, target) for half in halves)
    return FidelityCase(
        image,
        imagenet_normalize(resized(image, (guidance, guidance))),
        features,
        target,
        edges,
        filled if seen_twice.any() else None,
        seen_twice,
    )


def fidelity(upsampled: Tensor, case: FidelityCase) -> dict[str, float]:
    """Compares (1,C,s·h,s·w) upsampled features with the target, in float64.

    Returns:
        What `detail_measures` says but the amplitude, which has no better or worse, REGION_detail for each region, and
        then what `closeness` says.

    Raises:
        ValueError, FidelityError: as `closeness`; a target without detail.
    """
    smooth = closeness(upsampled, case)
    grid = tuple(case.features.shape[-2:])
    found = detail_measures(upsampled, case.target, grid, case.edges, case.counted)
    if "detail" not in found:
        raise FidelityError("the target has no detail beyond the low-resolution grid, so nothing can agree with it")
    fine, wanted = (detail(values.detach().double(), grid) for values in (upsampled, case.target))
    for name, where in case.regions.items():
        if near := agreement(fine, wanted, _both(where, case.counted)):
            found[f"{name}_detail"] = near["correlation"]
    return {name: value for name, value in found.items() if name != "detail_amplitude"} | smooth


def correlation(upsampled: Tensor, case: FidelityCase) -> float:
    """The detail correlation alone: `fidelity(...)["detail"]`, and 0 for a target without detail."""
    grid = tuple(case.features.shape[-2:])
    fine, wanted = (detail(values.detach().double(), grid) for values in (upsampled, case.target))
    return agreement(fine, wanted, case.counted).get("correlation", 0.0)


def closeness(upsampled: Tensor, case: FidelityCase) -> dict[str, float]:
    """How close (1,C,s·h,s·w) upsampled features are to the target, in float64. Blur raises all of these.

    Returns:
        cosine: mean over positions of the cosine between upsampled and target vector (0 where the upsampled vector
            is zero; positions with a zero target vector are left out, having no direction).
        error: squared error divided by the variance of the target over the positions of this image, both summed over
            channels: 0 is perfect, 1 is what the image's mean feature vector reaches.
        edge_cosine, edge_error: the same over `case.edges` only, the error in the same unit. An image without edges
            has neither.
        REGION_error: the same for each of `case.regions`.

    Raises:
        ValueError: the shape is not the target's. FidelityError: values that are not finite.
    """
    if upsampled.shape != case.target.shape:
        raise ValueError(f"upsampled features are {tuple(upsampled.shape)}, the target is {tuple(case.target.shape)}")
    ours, target = (values.detach()[0].cpu().double() for values in (upsampled, case.target))  # (C,s·h,s·w)
    if not torch.isfinite(ours).all():
        bad = (~torch.isfinite(ours)).sum().item()
        raise FidelityError(f"{bad} of {ours.numel()} values of the upsampled features are not finite")
    counted = torch.ones(ours.shape[-2:], dtype=torch.bool) if case.counted is None else case.counted
    cosine = F.cosine_similarity(ours, target, dim=0)  # (s·h,s·w)
    directed = (target.abs().amax(0) > 0) & counted
    error = (ours - target).square().sum(0) / _variance(target[None])  # (s·h,s·w)
    measured = {"cosine": cosine[directed].mean().item(), "error": error[counted].mean().item()}
    if (case.edges & directed).any():
        measured["edge_cosine"] = cosine[case.edges & directed].mean().item()
        measured["edge_error"] = error[case.edges & counted].mean().item()
    for name, where in case.regions.items():
        if (where & counted).any():
            measured[f"{name}_error"] = error[where & counted].mean().item()
    return measured


def image_edges(image: Tensor, size: tuple[int, int], within: float = EDGE_WITHIN) -> Tensor:
    """(1,3,H,W) RGB -> (rows,columns) bool: cells of a grid over the image near an edge of the image.

    Edges are Canny's (IEEE PAMI 1986; scikit-image) in the grey image averaged over the cells, with a Gaussian of one
    cell and the image's own 80 % and 90 % quantiles of the gradient as thresholds: outlines at the resolution of the
    grid, not texture below it. A cell is near where an edge cell is at most `within` cells away.
    """
    from scipy.ndimage import distance_transform_edt
    from skimage.color import rgb2gray
    from skimage.feature import canny

    cells = F.interpolate(image.detach().cpu().double(), size, mode="area")[0]  # (3,rows,columns)
    grey = rgb2gray(cells.permute(1, 2, 0).numpy())  # (rows,columns)
    low, high = _EDGE_QUANTILES
    found = canny(grey, sigma=1, low_threshold=low, high_threshold=high, use_quantiles=True, mode="nearest")
    if not found.any():
        return torch.zeros(size, dtype=torch.bool)
    return torch.from_numpy(distance_transform_edt(~found) <= within)


def _halves(
    image: Tensor,
    backbone: Backbone | CachedBackbone,
    grid: tuple[int, int],
    scale: int,
    view: int,
    crops: CropSettings,
) -> list[Tensor]:
    """(1,3,s·v,s·v) -> (1,C,s·h,s·w) means over those halves of the crops that have any."""
    if isinstance(backbone, CachedBackbone):
        return [backbone.instead(half)(image) for half in half_targets(backbone.backbone, grid, scale, view, crops)]
    return [half(image) for half in half_targets(backbone, grid, scale, view, crops)]


def _both(where: Tensor, counted: Tensor | None) -> Tensor:
    return where if counted is None else where & counted


def same_everywhere(features: Tensor) -> bool:
    """Whether (1,C,rows,columns) features differ from their mean by no more than rounding, in half precision."""
    exact = features.double()
    return bool(_variance(exact) <= torch.finfo(torch.float16).eps ** 2 * exact.square().sum(1).mean())


def _variance(target: Tensor) -> Tensor:
    """(1,C,rows,columns) -> scalar: mean over positions of the squared distance from the mean vector."""
    return (target - target.mean((2, 3), keepdim=True)).square().sum(1).mean()
