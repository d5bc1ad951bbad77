"""3x3 convolution by Winograd's minimal filtering F(2x2, 3x3): 16 products for 4 outputs instead of 36.

Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, arXiv 1509.09308, section 4.1. In float32 its
rounding error is about that of the direct convolution. It needs only additions and one batched matrix product, on
blocks of rows that stay in cache. On CPU it takes two thirds of the time of the direct convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 2  # output rows per block
WIDEST = 512  # pixels: the blocks of wider images leave the cache, and the direct convolution is faster


class Winograd:
    """Convolves rows of pixel-major images with a 3x3 filter bank, zero-padded, without gradients, float32, CPU.

    Args:
        weight: (out,in,3,3).
        images: (B,H,W,in), contiguous.
    """

    def __init__(self, weight: Tensor, images: Tensor):
        transform = images.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
        self.filters = torch.einsum("ak,bl,oikl->abio", transform, transform, weight).flatten(0, 1)  # (16,in,out)
        self.images = images
        width, in_channels = images.shape[2:]
        pairs, down = -(-width // 2), ROWS // 2
        self.padded = images.new_zeros(ROWS + 2, 2 * pairs + 2, in_channels)
        across_rows = images.new_empty(4, down, pairs + 1, 2, in_channels)
        inputs = images.new_empty(4, 4, down, pairs, in_channels)
        products = images.new_empty(4, 4, down, pairs, len(weight))
        summed = images.new_empty(2, 4, down, pairs, len(weight))
        outputs = images.new_empty(down, 2, pairs, 2, len(weight))
        # The views are made once, because making them for each block would take noticeable time.
        blocks = self.padded.view(down + 1, 2, pairs + 1, 2, in_channels)
        self.spread_rows = _spread_views(blocks[:, 0], blocks[:, 1], 0, across_rows)
        self.spread_columns = _spread_views(across_rows[:, :, :, 0], across_rows[:, :, :, 1], 2, inputs.transpose(0, 1))
        self.product = inputs.flatten(2, 3).flatten(0, 1), products.flatten(2, 3).flatten(0, 1)  # (16,down·pairs,·)
        self.collect_rows = (*products, *summed)
        self.collect_columns = (*summed.transpose(0, 1), *outputs.permute(3, 1, 0, 2, 4))
        self.outputs = outputs.flatten(2, 3).flatten(0, 1)  # (ROWS,2·pairs,out)

    def rows(self, rows: slice) -> Tensor:
        """The convolved images at these rows: (B,rows,W,out)."""
        batch, _, width, _ = self.images.shape
        result = self.images.new_empty(batch, rows.stop - rows.start, width, self.filters.shape[2])
        for image, target in zip(self.images, result, strict=True):
            for start in range(rows.start, rows.stop, ROWS):
                stop = min(start + ROWS, rows.stop)
                self._load(image, start)
                self._convolve()
                target[start - rows.start : stop - rows.start] = self.outputs[: stop - start, :width]
        return result

    def _load(self, image: Tensor, start: int) -> None:
        """Copies rows start - 1 ... start + ROWS into the padded block, with zeros outside the image."""
        first, last = max(start - 1, 0), min(start + ROWS + 1, len(image))
        inside = slice(first - start + 1, last - start + 1)
        self.padded[: inside.start] = 0
        self.padded[inside.stop :] = 0
        self.padded[inside, 1 : image.shape[1] + 1] = image[first:last]

    def _convolve(self) -> None:
        """Convolves the padded block into `outputs`."""
        _spread(*self.spread_rows)
        _spread(*self.spread_columns)
        inputs, products = self.product
        torch.bmm(inputs, self.filters, out=products)
        _collect(*self.collect_rows)
        _collect(*self.collect_columns)


def _spread_views(even: Tensor, odd: Tensor, dim: int, out: Tensor) -> tuple[Tensor, ...]:
    """The arguments with which `_spread` turns n + 1 pairs of values along `dim` into 4 x n values."""
    n = even.shape[dim] - 1
    return *(values.narrow(dim, first, n) for values in (even, odd) for first in (0, 1)), *out


def _spread(even: Tensor, even_next: Tensor, odd: Tensor, odd_next: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor):
    """Input transform along one axis, written into the last four tensors."""
    torch.sub(even, even_next, out=a)
    torch.add(odd, even_next, out=b)
    torch.sub(even_next, odd, out=c)
    torch.sub(odd, odd_next, out=d)


def _collect(a: Tensor, b: Tensor, c: Tensor, d: Tensor, first: Tensor, second: Tensor) -> None:
    """Output transform along one axis: a + b + c and b - c - d, written into the last two tensors; overwrites b."""
    torch.add(a, b, out=first)
    first.add_(c)
    torch.sub(b.sub_(c), d, out=second)


def usable(images: Tensor) -> bool:
    """Whether `Winograd` can be used for (B,D,H,W) images, and is faster there."""
    return (
        images.device.type == "cpu"
        and images.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and 64 <= images.shape[-1] <= WIDEST
    )


def direct_rows(weight: Tensor, images: Tensor, rows: slice) -> Tensor:
    """Rows of the zero-padded 3x3 convolution of (B,D,H,W) images, computed directly -> (B,rows,W,out)."""
    height = images.shape[2]
    halo = images[:, :, max(rows.start - 1, 0) : rows.stop + 1]
    if rows.start == 0 or rows.stop == height:
        halo = F.pad(halo, (0, 0, int(rows.start == 0), int(rows.stop == height)))
    return F.conv2d(halo, weight, padding=(0, 1)).permute(0, 2, 3, 1)  # (B,rows,W,out)
