"""The denoiser's UNet, of diffusers' blocks, and how it runs on tiles."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extensions.diffusion.schedule import TRAIN_STEPS


def in_tiles(unet: nn.Module, inputs: Tensor, angle: Tensor, tile: int) -> Tensor:
    """The UNet on tiles that overlap: (N,inputs,gh,gw) at (N,) noise levels -> (N,outputs,gh,gw).

    Tiles are blended by weights that fall to their borders, as MultiDiffusion does in each step (Bar-Tal et al.,
    arXiv 2302.08113); here it is the mixing weights that are blended.
    """
    height, width = inputs.shape[-2:]
    rows, columns = tiles(height, tile), tiles(width, tile)
    if len(rows) == len(columns) == 1:
        return on_tile(unet, inputs, angle)
    total: Tensor | float = 0.0
    for row, row_weight in rows:
        for column, column_weight in columns:
            written = on_tile(unet, inputs[..., row, column], angle)
            weight = (row_weight[:, None] * column_weight).to(written)
            around_it = (column.start, width - column.stop, row.start, height - row.stop)
            total = total + F.pad(written * weight, around_it)
    return total


def tiles(length: int, tile: int) -> list[tuple[slice, Tensor]]:
    """Tiles of one axis with an overlap of at least a quarter, and their blending weights, which sum to 1."""
    if length <= tile:
        return [(slice(0, length), torch.ones(length))]
    overlap = tile // 4
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    inner = torch.arange(tile, dtype=torch.float32) + 0.5
    ramp = (torch.minimum(inner, tile - inner) / overlap).clamp(max=1)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + tile] += ramp
    return [(slice(start, start + tile), ramp / total[start : start + tile]) for start in starts]


def make_unet(inputs: int, outputs: int, width: int) -> nn.Module:
    """Writes `outputs` channels from `inputs`; `width` channels at its grid, twice as many at half of it."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        in_channels=inputs,
        out_channels=outputs,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )


def on_tile(unet: nn.Module, inputs: Tensor, angle: Tensor) -> Tensor:
    """The UNet on one tile of any size: (N,inputs,rows,columns) -> (N,outputs,rows,columns)."""
    height, width = inputs.shape[-2:]
    inputs = F.pad(inputs, (0, width % 2, 0, height % 2), mode="replicate")  # the UNet halves its grid once
    level = angle.float() * (2 / math.pi * TRAIN_STEPS)
    return unet(inputs.to(unet.dtype), level).sample[..., :height, :width]
