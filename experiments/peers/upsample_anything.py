"""`upsample_anything`: Gaussian kernels fitted to each image, without any training, for any encoder."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.peers.base import Peer, register_peer
from experiments.peers.guidance import rgb_of, sized

_AT_ONCE = 2**20
"""How many weights, of neighbours and output pixels, are held at once."""
_LR = 0.1
_DECAY = 1e-8 ** (1 / 5100)  # of the learning rate, per step
_SIGMA, _SIGMA_COLOUR = 16.0, 0.12  # at the start: in output pixels, and in RGB of [0,1]


@register_peer("upsample_anything")
class UpsampleAnything(Peer):
    """Upsample Anything (Seo, Mark & Kim, arXiv 2511.16301, CVPR 2026).

    Every feature cell has an anisotropic Gaussian of distance and a Gaussian of colour. These are fitted to each image:
    they shall make the image out of its own pixels averaged to the feature grid. Then the same weights are applied to
    the features. So each output is a mean of features, with weights that depend on the image alone.

    Written from the paper's equations. Chosen here, where these are silent: the image is made smaller bicubically with
    antialiasing; everything is in single precision at least; the ratio may differ between rows and columns and need
    not be whole; an output of another size than the image's is fitted to the image of that size. Weights are normalised
    as a softmax, so the paper's fallback for a vanishing sum never applies. The cost grows with outputs x steps, not
    with channels; the memory is bounded, because rows of the output are taken in bands.

    Args:
        num_steps: of Adam; 0: the initial kernels.
        radius: cells, the largest distance of a neighbour.

    Raises:
        ValueError: negative steps, or a radius below 1.
    """

    linear_in_values = True
    optimises = True

    def __init__(self, num_steps: int = 51, radius: int = 8):
        super().__init__()
        if num_steps < 0 or radius < 1:
            raise ValueError(
                f"upsample_anything needs steps from 0 and a radius from 1, got num_steps={num_steps}, radius={radius}"
            )
        self.num_steps, self.radius = num_steps, radius

    def forward(self, image: Tensor, features: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Contract: `Peer.forward`."""
        size = tuple(image.shape[-2:]) if output_size is None else tuple(output_size)
        rgb = rgb_of(image.to(torch.promote_types(image.dtype, torch.float32)))
        outputs = []
        for fine, values in zip(sized(rgb, size), features, strict=True):
            scene = Scene(fine, tuple(values.shape[-2:]), self.radius)
            kernels = fitted(scene, self.num_steps)
            outputs.append(filtered(scene, kernels, values.to(fine.dtype)))
        return torch.stack(outputs).to(features.dtype)  # (B,C,Qh,Qw)


def initial_kernels(scene: "Scene") -> Tensor:
    """(h·w,4): log sigma of columns and of rows in output pixels, angle before tanh, log sigma of colours."""
    start = [math.log(_SIGMA), math.log(_SIGMA), 0.0, math.log(_SIGMA_COLOUR)]
    return scene.coarse.new_tensor(start).repeat(len(scene.coarse), 1)


def fitted(scene: "Scene", num_steps: int) -> Tensor:
    """(h·w,4) kernels after `num_steps` of Adam on the mean absolute error of the image made out of its small one."""
    kernels = initial_kernels(scene).requires_grad_()
    optimizer = torch.optim.Adam([kernels], lr=_LR)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, _DECAY)
    for _ in range(num_steps):
        optimizer.zero_grad()
        for cells in scene.bands():  # the error is a sum over pixels, so its gradient is one over bands
            with torch.enable_grad():
                made = scene.weights(kernels, cells) @ scene.small[scene.near[cells]]  # (G,S,3)
                error = ((made - scene.fine[cells]).abs() * scene.there[cells, :, None]).sum()
                (error / (3 * math.prod(scene.size))).backward()
        optimizer.step()
        schedule.step()
    return kernels.detach()


def filtered(scene: "Scene", kernels: Tensor, values: Tensor) -> Tensor:
    """(C,h,w) values -> (C,Qh,Qw)."""
    flat = values.flatten(1).T  # (h·w,C)
    output = values.new_empty(math.prod(scene.size), len(values))  # (Qh·Qw,C)
    for cells in scene.bands():
        there = scene.there[cells]
        output[scene.pixels[cells][there]] = (scene.weights(kernels, cells) @ flat[scene.near[cells]])[there]
    return output.T.unflatten(1, scene.size)


class Scene:
    """One image at the output's and at the features' resolution. Output pixels are sorted by the cell they lie in.

    G = h·w cells, S pixels in the largest, N neighbours of each cell: a disc, in which cells outside the grid are
    replaced by the outermost ones.

    Args:
        fine: (3,Qh,Qw) RGB in [0,1].
        grid: (h,w) of the features.
        radius: of the disc, in cells.
    """

    def __init__(self, fine: Tensor, grid: tuple[int, int], radius: int):
        self.size, self.grid, self.radius = tuple(fine.shape[-2:]), grid, radius
        rows, columns = (_sorted(n, q, fine) for n, q in zip(grid, self.size, strict=True))
        self.pixels = _pairs(rows.pixels * self.size[1], columns.pixels)  # (G,S) into Qh·Qw
        self.there = _pairs(rows.there.long(), columns.there.long()) == 2  # (G,S), False: a slot without a pixel
        down, right = _pairs(rows.distance, 0 * columns.distance), _pairs(0 * rows.distance, columns.distance)
        self.fine = fine.flatten(1).T[self.pixels]  # (G,S,3)
        self.coarse, self.small = (  # (G,3): colours that weights compare; the image to make the fine one of
            F.interpolate(fine[None], grid, mode=mode, antialias=True)[0].flatten(1).T
            for mode in ("bilinear", "bicubic")
        )
        colours = self.fine - self.coarse[:, None]
        self.terms = torch.stack(  # (G,S,10): what the exponents are linear in
            [right**2, right * down, down**2, colours.square().sum(-1), right, down, *colours.unbind(-1), right**0],
            dim=-1,
        )
        reach = torch.arange(-radius, radius + 1, device=fine.device)
        offsets = torch.cartesian_prod(reach, reach)
        offsets = offsets[offsets.square().sum(1) <= radius**2]  # (N,2)
        self.square = offsets.square().sum(1)  # (N,)
        (row, oy), (column, ox) = (
            _moved(n, q, offsets[:, i], fine) for i, (n, q) in enumerate(zip(grid, self.size, strict=True))
        )
        self.near = (row[:, None] * grid[1] + column[None]).flatten(0, 1)  # (G,N) cells
        self.ox = ox[None].expand(grid[0], -1, -1).flatten(0, 1)  # (G,N) pixels
        self.oy = oy[:, None].expand(-1, grid[1], -1).flatten(0, 1)

    def bands(self) -> Iterator[slice]:
        """Consecutive cells, as many as `_AT_ONCE` allows."""
        count = max(1, _AT_ONCE // (self.pixels.shape[1] * len(self.square)))
        return (slice(i, i + count) for i in range(0, len(self.pixels), count))

    def weights(self, kernels: Tensor, cells: slice) -> Tensor:
        """(h·w,4) kernels -> (G,S,N) weights of the neighbours of each pixel in a slice of cells; their sum is 1."""
        near, ox, oy = self.near[cells], self.ox[cells], self.oy[cells]  # (G,N)
        a, b, c, d = coefficients(kernels)[near].unbind(-1)  # (G,N)
        colours = self.coarse[near] - self.coarse[cells, None]  # (G,N,3)
        constant = a * ox**2 + b * ox * oy + c * oy**2 + d * colours.square().sum(-1)
        linear = [-2 * a * ox - b * oy, -2 * c * oy - b * ox, *(-2 * d[..., None] * colours).unbind(-1)]
        factors = torch.stack([a, b, c, d, *linear, constant], dim=-1)  # (G,N,10)
        logits = -(self.terms[cells] @ factors.mT)  # (G,S,N)
        outside = self.square > self._reach(kernels)[self.pixels[cells]].square()[..., None]
        return logits.masked_fill(outside, -math.inf).softmax(-1)

    def _reach(self, kernels: Tensor) -> Tensor:
        """(Qh·Qw,) how far the neighbours of each output pixel reach, in cells."""
        width = kernels.detach()[:, :2].exp().amax(1).view(1, 1, *self.grid)
        wide = F.interpolate(width, self.size, mode="bilinear").flatten()
        return (2 * wide).ceil().clamp(1, self.radius)


def coefficients(kernels: Tensor) -> Tensor:
    """(h·w,4) kernels -> (h·w,4) factors of columns², columns x rows, rows² and colours² in the negative exponent."""
    wide, high, turn, colour = kernels.unbind(-1)
    angle = math.pi * turn.tanh()
    cosine, sine = angle.cos(), angle.sin()
    a, b, c = (0.5 * (-2 * log).exp() for log in (wide, high, colour))
    return torch.stack(
        [a * cosine**2 + b * sine**2, 2 * (a - b) * cosine * sine, a * sine**2 + b * cosine**2, c], dim=-1
    )


class _Axis(NamedTuple):
    pixels: Tensor
    """(cells,slots) int64 output pixels along one axis that lie in each cell."""
    there: Tensor
    """(cells,slots) bool, False where a cell has fewer pixels."""
    distance: Tensor
    """(cells,slots) from the cell's centre, in pixels."""


def _sorted(cells: int, pixels: int, like: Tensor) -> _Axis:
    scale = pixels / cells
    place = torch.arange(pixels, device=like.device)
    own = ((place + 0.5) / scale - 0.5).round().long().clamp(0, cells - 1)  # (pixels,), never falling
    first = torch.searchsorted(own, torch.arange(cells + 1, device=like.device))
    slots = first[:-1, None] + torch.arange(int(first.diff().max()), device=like.device)  # (cells,slots)
    there, slots = slots < first[1:, None], slots.clamp(max=pixels - 1)
    centre = (torch.arange(cells, device=like.device).to(like.dtype) + 0.5) * scale - 0.5
    return _Axis(slots, there, slots - centre[:, None])


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    """(h,Sy), (w,Sx) -> (h·w,Sy·Sx), their sums."""
    return (rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _moved(cells: int, pixels: int, offset: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) offsets -> (cells,N) neighbours along an axis, and the distance of their centres in pixels."""
    own = torch.arange(cells, device=like.device)[:, None]
    moved = (own + offset).clamp(0, cells - 1)
    return moved, (moved - own).to(like.dtype) * (pixels / cells)
