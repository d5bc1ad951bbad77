"""Ceilings of feature fidelity: how close to the features of the crops one can come, and by which means.

`split_half`: the mean over one half of the crops, measured against the mean over the other half: how well the targets
agree with themselves, which nothing can be expected to pass. `encoder`: the encoder run on the whole image at the
higher resolution, which costs what upsampling is to save. `encoder_equal_cost`: the same on the largest image, up to
that resolution, on which the encoder costs no more than encoding the small one and upsampling with AnyUp
(`experiments.measuring.equal_cost`); it is the one to beat. `oracle_cosine`, `oracle_error`: the best convex
combination of the 5 x 5 low-resolution cells around each position, found with the target known. No upsampler that only
mixes these cells (bilinear, joint bilateral, attention in such a window) can have a higher cosine than the first, or a
lower error than the second.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from core.backbones import Backbone
from experiments.measuring.equal_cost import enlarged_image
from experiments.measuring.metrics import FidelityCase, FidelityError
from experiments.peers.windows import nearby

_POSITIONS_AT_ONCE = 4096
_GOALS = ("cosine", "error")


@torch.no_grad()
def whole_image(backbone: Backbone, rgb: Tensor, output_size: tuple[int, int]) -> Tensor:
    """(B,3,H,W) RGB in [0,1] -> (B,C,Qh,Qw): features of the whole image as it is.

    Where the encoder's own grid is another one (it may have a row less), they are resampled bilinearly.
    """
    features = backbone(rgb)  # (B,C,h,w)
    if tuple(features.shape[-2:]) == tuple(output_size):
        return features
    return F.interpolate(features, output_size, mode="bilinear")  # (B,C,Qh,Qw)


@torch.no_grad()
def oracle(features: Tensor, target: Tensor, goal: str = "cosine", window: int = 5, num_steps: int = 200) -> Tensor:
    """The convex combination of nearby low-resolution features that is closest to a known target, position by position.

    With F the (C,n) nearby vectors and t the target, `goal="error"` minimises |Fw - t|^2 over w >= 0 with sum 1.
    `goal="cosine"` minimises it over w >= 0 only: the nearest point of a cone has the smallest angle to t, and w
    divided by its sum keeps that angle; where the nearest point is 0, no angle is acute, and the single vector with the
    highest cosine is the best. Both are solved by projected gradient steps with Nesterov's momentum (FISTA; Beck &
    Teboulle, SIAM J. Imaging Sci. 2009), in float64, after which the cosine is within about 1e-4 of its optimum.

    Args:
        features: (1,C,h,w). target: (1,C,Qh,Qw) on the same part of the image.
        goal: cosine or error.
        window: rows and columns of low-resolution cells that may be combined; odd.
        num_steps: gradient steps.

    Returns:
        (1,C,Qh,Qw), in the dtype of the target.

    Raises:
        ValueError: another goal, a window that is not odd, or shapes that do not fit.
    """
    if goal not in _GOALS:
        raise ValueError(f"the oracle's goal must be one of {', '.join(_GOALS)}, got {goal!r}")
    if features.dim() != 4 or target.dim() != 4 or features.shape[:2] != target.shape[:2] or len(features) != 1:
        raise ValueError(
            f"the oracle needs (1,C,h,w) and (1,C,Qh,Qw), got {tuple(features.shape)}, {tuple(target.shape)}"
        )
    grid, size = features.shape[-2:], target.shape[-2:]
    (rows, _, _), (columns, _, _) = (nearby(n, q, window, features.device) for n, q in zip(grid, size, strict=True))
    cells = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]  # (Qh,Qw,window,window)
    cells = cells.flatten(2).flatten(0, 1)  # (Qh·Qw,n); a cell beyond the border is that at the border once more
    sources, wanted = features[0].flatten(1).T.double(), target[0].flatten(1).T.double()  # (h·w,C), (Qh·Qw,C)
    parts = [
        _combined(sources[some], goal_vectors, goal, num_steps)
        for some, goal_vectors in zip(cells.split(_POSITIONS_AT_ONCE), wanted.split(_POSITIONS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts).T.unflatten(1, size)[None].to(target.dtype)  # (1,C,Qh,Qw)


def _at_equal_cost(case: FidelityCase, backbone: Callable[[Tensor], Tensor]) -> Tensor:
    """`whole_image` of an image that costs as much as upsampling; `backbone` may keep what it has encoded."""
    bare = getattr(backbone, "views", [backbone])[0]
    image = enlarged_image(bare, case.image, case.features, case.guidance, case.output_size)
    return whole_image(backbone, image, case.output_size)


def _split_half(case: FidelityCase) -> tuple[Tensor, FidelityCase]:
    if case.halves is None:
        raise FidelityError(
            "the ceiling split_half needs crops that overlap: set a smaller task.crop_step or a larger task.num_crops"
        )
    return case.halves[0], replace(case, target=case.halves[1], counted=case.seen_twice)


CEILINGS: Mapping[str, Callable[[FidelityCase, Backbone], tuple[Tensor, FidelityCase]]] = {
    "split_half": lambda case, _: _split_half(case),
    "encoder": lambda case, backbone: (whole_image(backbone, case.image, case.output_size), case),
    "encoder_equal_cost": lambda case, backbone: (_at_equal_cost(case, backbone), case),
    "oracle_cosine": lambda case, _: (oracle(case.features, case.target, "cosine"), case),
    "oracle_error": lambda case, _: (oracle(case.features, case.target, "error"), case),
}
"""Name -> (case, its backbone) -> (1,C,s·h,s·w) features, and the case to measure them with."""


def _combined(near: Tensor, target: Tensor, goal: str, num_steps: int) -> Tensor:
    """(P,n,C) nearby vectors, (P,C) target -> (P,C)."""
    gram = near @ near.mT  # (P,n,n)
    along = (near @ target[..., None])[..., 0]  # (P,n)
    project = _onto_simplex if goal == "error" else partial(torch.clamp, min=0)
    weights = _minimised(gram, along, project, num_steps)  # (P,n)
    if goal == "cosine":
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt().clamp(min=torch.finfo(gram.dtype).tiny)  # (P,n)
        best = F.one_hot((along / lengths).argmax(1), near.shape[1]).to(weights.dtype)  # (P,n)
        weights = torch.where((along > 0).any(1, keepdim=True), weights, best)
        weights = weights / weights.sum(1, keepdim=True)
    return (weights[:, None] @ near)[:, 0]  # (P,C)


def _minimised(gram: Tensor, along: Tensor, project: Callable[[Tensor], Tensor], num_steps: int) -> Tensor:
    """(P,n,n) G, (P,n) b -> (P,n): w in the set that `project` projects onto with least w·Gw / 2 - b·w."""
    # The largest row sum bounds the largest eigenvalue; a window of zeros may take any step.
    step = 1 / gram.abs().sum(2).amax(1, keepdim=True).clamp(min=torch.finfo(gram.dtype).tiny)  # (P,1)
    weights = ahead = torch.full_like(along, 1 / along.shape[1])  # (P,n)
    momentum = 1.0
    for _ in range(num_steps):
        new = project(ahead - step * ((gram @ ahead[..., None])[..., 0] - along))
        new_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / new_momentum * (new - weights)
        weights, momentum = new, new_momentum
    return weights


def _onto_simplex(values: Tensor) -> Tensor:
    """(P,n) -> nearest point with entries >= 0 and sum 1 (Duchi et al., ICML 2008, figure 1)."""
    descending = values.sort(1, descending=True).values
    excess = descending.cumsum(1) - 1  # (P,n)
    count = torch.arange(1, values.shape[1] + 1, device=values.device)
    last = (descending * count > excess).sum(1, keepdim=True)  # (P,1) entries that stay positive
    return (values - excess.gather(1, last - 1) / last).clamp(min=0)
