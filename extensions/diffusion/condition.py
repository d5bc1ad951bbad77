"""What the denoiser knows of an image, and the noise that it is given, both in whitened coordinates."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from core.batch import Batch, Context, crops_of


@dataclass
class Condition:
    """What the denoiser knows of N images (or crops), on the refinement grid (gh,gw)."""

    fixed: Tensor
    """(N,S,gh,gw): the network's inputs that do not depend on the noisy residual."""
    differences: Tensor
    """(N,K·M,gh,gw): coordinates of the M cells around each point, minus those of the initial output there."""
    initial: Tensor
    """(N,K,gh,gw): coordinates of the initial output."""
    cells: Tensor
    """(N,h·w,K): coordinates of the cells; identity covariance in used directions."""
    variance: Tensor
    """(N,K): share of each direction in the variance; sums to 1."""

    @property
    def rank(self) -> Tensor:
        """(N,1,1,1): number of used directions, at least 1."""
        return (self.variance > 0).sum(1).clamp(min=1)[:, None, None, None]

    def part(self, index: slice) -> "Condition":
        return Condition(*(getattr(self, one.name)[index] for one in fields(self)))

    def repeated(self, times: int) -> "Condition":
        parts = (getattr(self, one.name) for one in fields(self))
        return Condition(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in parts))


def noise(condition: Condition, context: Context) -> Tensor:
    """Standard normal noise in whitened coordinates, (N,K,gh,gw), zero along unused directions.

    It is drawn relative to the cells: random combinations of them give orthonormal rows (a polar factor), along which
    the noise lies. So another basis of the same space gives the same noise, in its coordinates.
    """
    cells = condition.cells.double()  # (N,n,K)
    num, _, few = cells.shape
    random = context.noise_like(cells.new_empty(num, cells.shape[1], 2 * few))
    drawn = context.noise_like(condition.initial.new_empty(num, 2 * few, condition.initial[0, 0].numel()))
    with torch.autocast(drawn.device.type, enabled=False):
        left, _, right = torch.linalg.svd(cells.mT @ random, full_matrices=False)
        rows = (left @ right) * (condition.variance > 0)[..., None]  # (N,K,2·K), orthonormal
        return (rows.to(drawn.dtype) @ drawn).unflatten(2, condition.initial.shape[-2:])


def cropped(condition: Condition, batch: Batch) -> Condition:
    """The condition of each of the batch's crops."""
    crops = len(batch.target) // len(condition.initial)
    repeated = {name: getattr(condition, name).repeat_interleave(crops, 0) for name in ("cells", "variance")}
    cut = {}
    for name in ("fixed", "differences", "initial"):
        whole = getattr(condition, name)
        size = batch.target[:, :1].expand(-1, whole.shape[1], -1, -1)
        cut[name] = crops_of(whole, replace(batch, target=size))
    return Condition(**cut, **repeated)
