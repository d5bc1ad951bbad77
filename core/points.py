"""Arbitrary points of the image: sampling a grid there, and attention with one window around each point.

Coordinates are (row, column) in the unit square of the image: the centre of pixel i of n is at (i + 0.5)/n.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from core.prior import Prior

MAX_GATHERED = {"cpu": 2**20, "cuda": 2**26}  # values of gathered keys and features held at once


def pixel_centres(size: tuple[int, int], like: Tensor) -> Tensor:
    """Centres of a grid's pixels: (Qh,Qw,2) of (row, column), on the device of `like`, at least in float32."""
    axes = [(torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).to(torch.promote_types(like.dtype, torch.float32))


def nearest_cells(coords: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The four cells of an (h,w) grid whose centres surround each point, in order (0,0), (0,1), (1,0), (1,1).

    Beyond the outermost centres, cells at the border replace the missing ones.

    Args:
        coords: (N,2).
        size: (h,w).

    Returns:
        (N,4): numbers of the cells, row by row.
        (N,4): area weights, which sum to 1 (LIIF, section 3). Each is the area of the rectangle between the point and
        the diagonally opposite centre.
        (N,4,2): offset from each centre to the point, in cells.
    """
    extent = coords.new_tensor(size)
    position = coords * extent - 0.5  # (N,2)
    first = position.floor()
    corners = coords.new_tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    weights = (1 - corners - (position - first)[:, None]).abs().prod(-1)  # (N,4)
    centres = (first[:, None] + corners).clamp(min=0).minimum(extent - 1)  # (N,4,2)
    rows, columns = centres.long().unbind(-1)
    return rows * size[1] + columns, weights, position[:, None] - centres


def sample(grid: Tensor, coords: Tensor) -> Tensor:
    """Bilinear interpolation: (B,D,h,w) grid, (N,2) coords -> (B,N,D); constant beyond the outermost cell centres."""
    cells, weights, _ = nearest_cells(coords, tuple(grid.shape[-2:]))
    return _weighted(grid, cells, weights)


def sample_rows(band: Tensor, rows: slice, height: int, coords: Tensor) -> Tensor:
    """The part of `sample` that a band of rows contributes; the parts of all bands sum to the whole.

    Args:
        band: (B,D,rows,w): these rows of a grid with `height` rows.
        coords: (N,2).
    """
    width = band.shape[-1]
    cells, weights, _ = nearest_cells(coords, (height, width))
    within = (cells >= rows.start * width) & (cells < rows.stop * width)
    return _weighted(band, (cells - rows.start * width).clamp(0, band.shape[-2] * width - 1), weights * within)


def sample_convolved(grid: Tensor, weight: Tensor, coords: Tensor) -> Tensor:
    """`sample` of the zero-padded 3x3 convolution of a grid, which is computed only where the points look.

    Convolution and interpolation are both linear, so that the grid is interpolated first, once for each tap.

    Args:
        grid: (B,D,h,w). weight: (out,D,3,3). coords: (N,2).

    Returns:
        (B,N,out).
    """
    size = tuple(grid.shape[-2:])
    cells, weights, _ = nearest_cells(coords, size)  # (N,4)
    rows, columns = cells // size[1], cells % size[1]
    taps = []
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            row, column = rows + down, columns + right
            inside = (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
            shifted = row.clamp(0, size[0] - 1) * size[1] + column.clamp(0, size[1] - 1)
            taps.append(_weighted(grid, shifted, weights * inside))  # (B,N,D)
    return torch.cat(taps, -1) @ weight.permute(2, 3, 1, 0).flatten(0, 2)  # (B,N,out)


def _weighted(grid: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    pixels = grid.permute(0, 2, 3, 1).flatten(1, 2)  # (B,h·w,D)
    total = 0
    for some, weight in zip(cells.unbind(1), weights.unbind(1), strict=True):
        total = total + pixels.index_select(1, some) * weight[:, None]  # (B,N,D)
    return total.to(grid.dtype)


def visible_keys(centre: Tensor, num_keys: int, window_ratio: float) -> tuple[Tensor, Tensor]:
    """The keys around each of N points along one axis: (N,K) keys; (N,K) bool: whether the point sees them.

    The window is that of a pixel with its centre there (`core.fast.windows.window_bounds`). K is the number of keys in
    the widest window.

    Raises:
        ValueError: the window is so narrow that a point sees nothing.
    """
    if window_ratio <= 0:
        keys = torch.arange(num_keys, device=centre.device).expand(len(centre), -1)
        return keys, torch.ones_like(keys, dtype=torch.bool)
    centre, ratio, scale = centre.float(), torch.tensor(window_ratio), float(num_keys)
    ratio = ratio.to(centre)
    first = ((centre - ratio).clamp(0, 1) * scale).floor().long()
    last = ((centre + ratio).clamp(0, 1) * scale).ceil().long()
    if (last <= first).any():
        raise ValueError(
            f"window_ratio={window_ratio} leaves a point without a key; use a wider one, or 0 for no window"
        )
    width = int((last - first).max())
    keys = first.clamp(max=num_keys - width)[:, None] + torch.arange(width, device=centre.device)  # (N,K)
    return keys, (keys >= first[:, None]) & (keys < last[:, None])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coords: Tensor,
    window_ratio: float,
    num_heads: int,
    prior: Prior | None = None,
) -> Tensor:
    """(B,N,D) projected queries, (B,h,w,D) projected and scaled keys, (B,h,w,C) values, (N,2) coords -> (B,C,N).

    `prior`: what is added to the logits. Works on blocks of points. The keys and values of each window are
    gathered, unless every point sees all of them.
    """
    rows, rows_visible = visible_keys(coords[:, 0], key.shape[1], window_ratio)
    columns, columns_visible = visible_keys(coords[:, 1], key.shape[2], window_ratio)
    width = key.shape[2]
    cells = (rows[:, :, None] * width + columns[:, None]).flatten(1)  # (N,K)
    visible = (rows_visible[:, :, None] & columns_visible[:, None]).flatten(1)  # (N,K)
    key, value = key.flatten(1, 2), value.flatten(1, 2)  # (B,h·w,·)
    whole = cells.shape[1] == key.shape[1]
    held = len(key) * cells.shape[1] * (num_heads if whole else key.shape[-1] + value.shape[-1])
    at_once = max(1, MAX_GATHERED.get(query.device.type, 2**20) // held)
    block = partial(_attend, num_heads=num_heads, whole=whole, prior=prior)
    if torch.is_grad_enabled() and at_once < len(coords):
        block = partial(checkpoint, block, use_reentrant=False)
    split = query.split(at_once, 1), coords.split(at_once), cells.split(at_once), visible.split(at_once)
    parts = [block(some, key, value, *where) for some, *where in zip(*split, strict=True)]
    return torch.cat(parts, 1).transpose(1, 2)  # (B,C,N)


def _attend(query, key, value, coords, cells, visible, num_heads: int, whole: bool, prior: Prior | None):
    """(B,n,D), (B,h·w,D), (B,h·w,C), (n,2), (n,K), (n,K) -> (B,n,C)."""
    query = query.unflatten(-1, (num_heads, -1))  # (B,n,heads,D/heads)
    if whole:
        logits = torch.einsum("bnhd,bkhd->bnhk", query, key.unflatten(-1, (num_heads, -1)))
    else:
        key, value = (grid.index_select(1, cells.flatten()).unflatten(1, cells.shape) for grid in (key, value))
        logits = torch.einsum("bnhd,bnkhd->bnhk", query, key.unflatten(-1, (num_heads, -1)))  # (B,n,heads,K)
    if prior is not None:
        terms = prior.at(coords, cells).to(logits.dtype)  # (B,n,heads+1,K)
        alone = terms[:, :, -1].masked_fill(~visible, -torch.inf).softmax(-1)  # (B,n,K)
        logits = logits + terms[:, :, :-1]
    logits = logits.masked_fill(~visible[:, None], -torch.inf)
    weights = logits.softmax(-1).mean(2)  # (B,n,K)
    if prior is not None:
        weights = weights + prior.share.to(weights.dtype) * (alone - weights)
    weights = weights.to(value.dtype)
    return torch.einsum("bnk,bkc->bnc" if whole else "bnk,bnkc->bnc", weights, value)
