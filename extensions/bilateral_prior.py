"""`attention=bilateral_prior`: the window's attention with a plain prior: near cells of like colour count more.

The mean of AnyUp and a joint bilateral filter shows more detail than AnyUp, without any training (docs/detail.md). So
attention lacks what that filter has: logits that are nothing but distance and difference in colour (Kopf et al.,
SIGGRAPH 2007, equation 3). Here they enter in two ways:

- added to the logits of each head, times a gate of its own: the prior and the head must agree (a product of weights);
- as one more head that sees nothing else, with a share of the weights: either of them may speak (a mixture of weights).
  A share of .5 is the mean of AnyUp and the filter.

And trained attention is sharper than is good for detail: `temperature` divides the logits of query and key.

Status: measured without training, one seed (docs/detail.md): share and temperature help detail and hurt a probe's
boundaries, gates hurt detail.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.attention import WindowAttention
from core.backbones import IMAGENET_STD
from core.hooks import GATE_LR_SCALE
from core.points import sample
from core.prior import Prior
from core.registry import register


@register("bilateral_prior")
class BilateralPriorAttention(WindowAttention):
    """The window's attention with a prior by distance and colour.

    The prior of a query at position x with colour c, for a cell at y with colour d, in head i, is
    `p_i = -|x - y|²/(2σ_i²) - |c - d|²/(2τ_i²)`. The heads' logits are `q·k/(temperature·√d) + gate_i·p_i`. A further
    head has the logits p_H. Its weights and the mean of the others are mixed as `share : 1 - share`. Positions are in
    cells of the feature grid. Colours are RGB of [0,1], averaged over the pixels of the output and over the cells of
    the grid.

    At the start all gates and the share are 0. Then the filler equals `window`, with the same weights under the same
    names, and without gradients the prior costs nothing. With the settings `*_at_start`, weights of `window` can be
    used with the prior and without training.

    Args:
        num_heads, window_ratio: as for `window`.
        sigma_space: σ at the start, in cells. sigma_colour: τ at the start, in RGB of [0,1]. Each head learns its own.
        gate_at_start: of all heads.
        share_at_start: of the further head; at least 0 and below 1.
        temperature: of the heads' softmax; not learned.

    Raises:
        ValueError: a setting is out of its range; the message names it.
    """

    changeable = (*WindowAttention.changeable, "temperature")
    lr_scales: ClassVar[Mapping[str, float]] = {"gates": GATE_LR_SCALE, "odds": GATE_LR_SCALE}
    needs_image = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 4,
        window_ratio: float = 0.1,
        sigma_space: float = 0.7,
        sigma_colour: float = 0.2,
        gate_at_start: float = 0.0,
        share_at_start: float = 0.0,
        temperature: float = 1.0,
    ):
        super().__init__(embed_dim, num_heads, window_ratio)  # draws the shared weights as the baseline does
        for name, value in (
            ("sigma_space", sigma_space),
            ("sigma_colour", sigma_colour),
            ("temperature", temperature),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0 <= share_at_start < 1:
            raise ValueError(f"share_at_start must be at least 0 and below 1, got {share_at_start}")
        if not math.isfinite(gate_at_start):
            raise ValueError(f"gate_at_start must be a number, got {gate_at_start}; 0 closes the gates")
        self.temperature = temperature
        self.gates = nn.Parameter(torch.full((num_heads,), gate_at_start))
        self.odds = nn.Parameter(torch.tensor(share_at_start / (1 - share_at_start)))
        self.log_sigmas = nn.Parameter(torch.tensor([sigma_space, sigma_colour]).log().repeat(num_heads + 1, 1))

    @property
    def share(self) -> Tensor:
        """(): of the further head, from 0 to 1."""
        odds = torch.where(self.odds >= 0, self.odds, -self.odds)  # not abs(): the slope at 0 is 1, so it can open
        return odds / (1 + odds)

    def prior(self, size: tuple[int, int], grid: tuple[int, int], image: Tensor | None) -> Prior | None:
        """None while gates and share are closed; with gradients or under a compiler always one: they may open."""
        if image is None:
            raise TypeError("attention=bilateral_prior looks at colours: call it with image=(B,3,H,W)")
        may_open = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not may_open and not self.gates.any() and not self.odds:
            return None
        return BilateralPrior(self, size, grid, image)

    def _keys(self, key: Tensor) -> Tensor:
        return super()._keys(key) if self.temperature == 1 else super()._keys(key) / self.temperature

    def filters(self) -> list[tuple[float, float, float]]:
        """What each head has learnt, the further head last: (gate or share, σ in cells, τ in RGB)."""
        weights = [*self.gates.tolist(), self.share.item()]
        return [(weight, *sigmas) for weight, sigmas in zip(weights, self.log_sigmas.exp().tolist(), strict=True)]


class BilateralPrior(Prior):
    """The prior of one call: contract `Prior`. All is computed at least in single precision.

    Args:
        attention: whose gates and widths. size: (Qh,Qw). grid: (h,w). image: (B,3,H,W), ImageNet-normalised.
    """

    def __init__(self, attention: BilateralPriorAttention, size: tuple[int, int], grid: tuple[int, int], image: Tensor):
        wide = torch.promote_types(image.dtype, torch.float32)
        self.size, self.grid, self.share = size, grid, attention.share
        rgb = image.to(wide) * torch.tensor(IMAGENET_STD, dtype=wide, device=image.device).view(3, 1, 1)
        self.fine, self.coarse = (F.interpolate(rgb, n, mode="area") for n in (size, grid))  # differences are in [0,1]
        factors = F.pad(attention.gates.to(wide), (0, 1), value=1.0)[:, None]  # (H+1,1)
        self.slopes = -factors / (2 * attention.log_sigmas.to(wide).exp().square())  # (H+1,2): of distance and colour

    def of_tiles(self, rows: slice, columns: slice, keys: tuple[Tensor, Tensor]) -> Iterator[Tensor]:
        tiles = [len(runs) for runs in keys]  # m, n
        squares = [
            self._squares(some, runs, axis) for axis, (some, runs) in enumerate(zip((rows, columns), keys, strict=True))
        ]  # (m,R,Kh), (n,T,Kw)
        distance = squares[0][:, None, :, None, None] + squares[1][None, :, None, :, :, None]  # (m,n,R,T,Kw,Kh)
        distance = distance.flatten(4).flatten(2, 3).flatten(0, 1)  # (m·n,M,K)
        fine = self.fine[:, :, rows, columns].unflatten(3, (tiles[1], -1)).unflatten(2, (tiles[0], -1))
        fine = fine.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)  # (B,3,m,R,n,T) -> (P,M,3)
        down, across = (runs.to(self.coarse.device) for runs in keys)
        coarse = self.coarse[:, :, down[:, None, None, :], across[None, :, :, None]]  # (B,3,m,n,Kw,Kh)
        coarse = coarse.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(0, 2)  # (P,K,3)
        colour = _colour_distance(fine, coarse)
        distance = distance.repeat(len(self.fine), 1, 1)
        for near, like in self.slopes:
            yield near * distance + like * colour  # (P,M,K)

    def at(self, coords: Tensor, cells: Tensor) -> Tensor:
        width = self.grid[1]
        places = torch.stack([cells // width, cells % width], -1)  # (n,K,2)
        extent = coords.new_tensor(self.grid)
        distance = ((coords * extent - 0.5)[:, None] - places).square().sum(-1).to(self.fine.dtype)  # (n,K)
        fine = sample(self.fine, coords)  # (B,n,3)
        coarse = self.coarse.flatten(2)[:, :, cells].permute(0, 2, 3, 1)  # (B,n,K,3)
        colour = (fine[:, :, None] - coarse).square().sum(-1)  # (B,n,K)
        near, like = self.slopes.unbind(1)
        return near[:, None] * distance[:, None] + like[:, None] * colour[:, :, None]  # (B,n,H+1,K)

    def _squares(self, some: slice, runs: Tensor, axis: int) -> Tensor:
        """Squared offsets along one axis, in cells: tiles of queries `some`, (tiles,K) keys -> (tiles,queries,K)."""
        numbers = torch.arange(some.start, some.stop, dtype=self.fine.dtype, device=self.fine.device)
        position = (numbers + 0.5) / self.size[axis] * self.grid[axis] - 0.5
        return (position.view(len(runs), -1, 1) - runs.to(position.device)[:, None]).square()


def _colour_distance(fine: Tensor, coarse: Tensor) -> Tensor:
    """(P,M,3), (P,K,3) -> (P,M,K): squared Euclidean distance of the colours."""
    return sum((a[..., None] - b[:, None]).square() for a, b in zip(fine.unbind(2), coarse.unbind(2), strict=True))
