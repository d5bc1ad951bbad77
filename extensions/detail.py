"""`objective=detail`: trains for what shows in fine features beyond the coarse ones they were made from.

Cosine and squared error reward blur, because targets are noisy (docs/evidence.md). Their detail does not:
`d(x) = x - bilinear(area_down(x))` (`core.detail.detail`). The loss is `1 - correlation` of the output's and the
target's detail, over positions and channels of each target. How strong the detail is plays no part, so a cosine loss
beside it ties the output to the target's direction. It is the measure that evaluations put first
(experiments/measuring/detail.py).

Status: measured (helps): 300 steps from published weights gain .005 to .010 more detail than with the released
objective, on four encoders, two of them never seen; three seeds (docs/detail.md).
"""

import math

import torch
from torch import Tensor, nn

from core.batch import Batch, crops_of
from core.detail import detail, octaves
from core.registry import register
from core.training import CosineMSE, cosine_loss, squared_loss, widened

FLOOR = 1e-5
"""Detail weaker than this share of the features is rounding: it correlates with nothing, and has no large gradient."""
LEAST_CELLS = 2
"""Along each axis of a target's coarse grid."""
PICTURE_SIDE = 224


@register("detail")
class Detail(CosineMSE):
    """Loss of detail, cosine loss and squared error, beside both consistency losses of `cosine_mse`.

    With weights (0, 1, 1) it is `cosine_mse`.

    Args:
        self_consistency, input_consistency, self_consistency_size: as for `cosine_mse`.
        weight_detail: of 1 - correlation of the detail, averaged over the targets: images, or crops of them.
        weight_cosine: of 1 - cosine. weight_squared: of the squared error in units of each target vector's range.
        per_octave: correlate the detail octave by octave, and average over the octaves, so that each counts as much.
            False: all at once; the octave with the most energy decides. At a scale of 2 there is one octave.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    def __init__(
        self,
        self_consistency: float = 0.1,
        input_consistency: float = 0.1,
        self_consistency_size: int = 224,
        weight_detail: float = 1.0,
        weight_cosine: float = 0.5,
        weight_squared: float = 0.0,
        per_octave: bool = False,
    ):
        super().__init__(self_consistency, input_consistency, self_consistency_size)
        weights = {"weight_detail": weight_detail, "weight_cosine": weight_cosine, "weight_squared": weight_squared}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"objective=detail: {name} must be 0 or more, got {weight}")
        if not any(weights.values()):
            raise ValueError("objective=detail: all weights are 0, so there is nothing to learn: set one of them")
        self.weight_detail, self.weight_cosine, self.weight_squared = weights.values()
        self.per_octave = per_octave
        self._shown: tuple[Tensor, Tensor] | None = None
        """Detail of output and target, (C,th,tw) each, of the first target of the latest forward."""

    def reconstruction(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Losses against the target; raises as `coarse_grid`."""
        found, target = crops_of(output, batch), widened(batch.target)
        losses = {}
        if self.weight_detail:
            grid = coarse_grid(tuple(batch.features.shape[-2:]), batch.output_size, tuple(target.shape[-2:]))
            loss, self._shown = self._detail(found, target, grid)
            losses["detail_loss"] = self.weight_detail * loss
        if self.weight_cosine:
            losses["cosine_loss"] = self.weight_cosine * cosine_loss(found, target)
        if self.weight_squared:
            losses["squared_loss"] = self.weight_squared * squared_loss(found, target)
        return losses

    def _detail(
        self, output: Tensor, target: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The loss, and the detail of the first output and target for pictures."""
        whole = detail(output, grid), detail(target, grid)
        bands = [whole]
        if self.per_octave:
            bands = list(zip(octaves(output, grid).values(), octaves(target, grid).values(), strict=True))
        found = [correlation(ours, theirs, output, target) for ours, theirs in bands]  # (N,) each
        shown = None if torch.compiler.is_compiling() else tuple(x[0].detach() for x in whole)
        return 1 - torch.stack(found).mean(), shown

    @torch.no_grad()
    def pictures(self) -> dict[str, Tensor]:
        """Detail of output and target side by side, in the colours of the target's three main directions."""
        if self._shown is None:
            return {}
        output, target = (x.float().cpu() for x in self._shown)  # (C,th,tw)
        directions = _main_directions(target)  # (C,3)
        colours = [torch.einsum("chw,cd->dhw", x, directions) for x in (output, target)]
        colours = [0.5 + x / (6 * x.square().mean((1, 2), keepdim=True).sqrt() + 1e-12) for x in colours]
        both = torch.cat([nn.functional.pad(colours[0], (0, 1), value=1.0), colours[1]], 2).clamp(0, 1)
        factor = max(1, PICTURE_SIDE // both.shape[1])
        return {"detail of the output | of the target": both.repeat_interleave(factor, 1).repeat_interleave(factor, 2)}


def correlation(ours: Tensor, target: Tensor, of_ours: Tensor, of_target: Tensor) -> Tensor:
    """Correlation of detail about 0, over channels and positions: (N,C,h,w) each -> (N,).

    It is 0 where one of the two is weaker than `FLOOR` of the features that it was taken from, `of_...`.
    """
    product = (ours * target).sum((1, 2, 3))
    return product / (_norm(ours, of_ours) * _norm(target, of_target))


def coarse_grid(grid: tuple[int, int], size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The coarse grid of a target, with cells as large as those of the features.

    Args:
        grid: (h,w) of the features. size: (Qh,Qw) of the whole output. target: (th,tw), of a crop of it.

    Raises:
        ValueError: the target is not finer than the features, or shows less than `LEAST_CELLS` of their cells.
    """
    found = tuple(round(cells * part / whole) for cells, part, whole in zip(grid, target, size, strict=True))
    if any(cells >= side for cells, side in zip(found, target, strict=True)):
        raise ValueError(
            f"objective=detail needs targets finer than the features, got {size[0]}x{size[1]} for {grid[0]}x{grid[1]}: "
            "raise views.scale, or set objective.weight_detail=0"
        )
    if min(found) < LEAST_CELLS:
        raise ValueError(
            f"objective=detail: a target of {target[0]}x{target[1]} shows {found[0]}x{found[1]} cells of the features, "
            f"and detail needs {LEAST_CELLS}x{LEAST_CELLS}: take larger crops, or whole images with views.crops=0"
        )
    return found


def _norm(x: Tensor, whole: Tensor) -> Tensor:
    """(N,): root of the energy of detail, and of the floor; its slope is finite everywhere."""
    energy, floor = (y.square().sum((1, 2, 3)) for y in (x, FLOOR * whole.detach()))
    return (energy + floor + torch.finfo(x.dtype).tiny).sqrt()


def _main_directions(x: Tensor) -> Tensor:
    """(C,h,w) -> (C,3): directions in which it varies most; zero where it has fewer than three channels."""
    _, vectors = torch.linalg.eigh(torch.einsum("chw,dhw->cd", x, x))  # in rising order
    chosen = vectors[:, -3:].flip(1)
    return nn.functional.pad(chosen, (0, 3 - chosen.shape[1]))
