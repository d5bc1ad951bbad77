"""3x3 convolution by Winograd's minimal filtering F(2x2, 3x3): 16 products for 4 outputs instead of 36.

Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, arXiv 1509.09308, section 4.1. In float32 its
rounding error is of the size of the direct convolution's. Only additions and one batched matrix product are needed,
on blocks of rows that stay in cache: on CPU it takes two thirds of the time of the direct convolution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 2  # output rows per block
WIDEST = 512  # pixels: the blocks of wider images leave the cache, and the direct convolution wins


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
        self.across_rows = images.new_empty(4, down, pairs + 1, 2, in_channels)
        self.inputs = images.new_empty(4, 4, down, pairs, in_channels)
        self.products = images.new_empty(4, 4, down, pairs, len(weight))
        self.outputs = images.new_empty(down, 2, pairs, 2, len(weight))

    def rows(self, rows: slice) -> Tensor:
        """Those rows of the convolved images: (B,rows,W,out)."""
        batch, _, width, _ = self.images.shape
        result = self.images.new_empty(batch, rows.stop - rows.start, width, self.filters.shape[2])
        for image, target in zip(self.images, result, strict=True):
            for start in range(rows.start, rows.stop, ROWS):
                stop = min(start + ROWS, rows.stop)
                self._load(image, start)
                target[start - rows.start : stop - rows.start] = (
                    self._block().flatten(2, 3).flatten(0, 1)[: stop - start, :width]
                )
        return result

    def _load(self, image: Tensor, start: int) -> None:
        """Rows start - 1 ... start + ROWS into the padded block; zeros outside the image."""
        first, last = max(start - 1, 0), min(start + ROWS + 1, len(image))
        inside = slice(first - start + 1, last - start + 1)
        self.padded[: inside.start] = 0
        self.padded[inside.stop :] = 0
        self.padded[inside, 1 : image.shape[1] + 1] = image[first:last]

    def _block(self) -> Tensor:
        """The padded block's convolution: (down,2,pairs,2,out)."""
        down, columns = self.inputs.shape[2:4]
        pairs = self.padded.view(down + 1, 2, columns + 1, 2, -1)
        _spread(pairs[:, 0], pairs[:, 1], 0, self.across_rows)
        for rows, target in zip(self.across_rows, self.inputs, strict=True):
            _spread(rows[:, :, 0], rows[:, :, 1], 1, target)
        flat_inputs, flat_products = self.inputs.flatten(2, 3).flatten(0, 1), self.products.flatten(2, 3).flatten(0, 1)
        torch.bmm(flat_inputs, self.filters, out=flat_products)  # (16,down·pairs,out)
        above, below = _collect(*self.products)  # (4,down,pairs,out) each
        for row, products in enumerate((above, below)):
            _collect(*products, out=(self.outputs[:, row, :, 0], self.outputs[:, row, :, 1]))
        return self.outputs


def _spread(even: Tensor, odd: Tensor, dim: int, out: Tensor) -> None:
    """Input transform along one axis: n + 1 pairs of values -> 4 x n."""
    n = even.shape[dim] - 1
    torch.sub(even.narrow(dim, 0, n), even.narrow(dim, 1, n), out=out[0])
    torch.add(odd.narrow(dim, 0, n), even.narrow(dim, 1, n), out=out[1])
    torch.sub(even.narrow(dim, 1, n), odd.narrow(dim, 0, n), out=out[2])
    torch.sub(odd.narrow(dim, 0, n), odd.narrow(dim, 1, n), out=out[3])


def _collect(a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple:
    """Output transform along one axis: a + b + c and b - c - d."""
    first, second = (torch.empty_like(a), torch.empty_like(a)) if out is None else out
    torch.add(torch.add(b, c), a, out=first)
    torch.sub(torch.sub(b, c), d, out=second)
    return first, second


def usable(images: Tensor) -> bool:
    """Whether `Winograd` applies to (B,D,H,W) images in channels-last memory, and pays."""
    return (
        images.device.type == "cpu"
        and images.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and 64 <= images.shape[-1] <= WIDEST
    )


def direct_rows(weight: Tensor, images: Tensor, rows: slice) -> Tensor:
    """Rows of the zero-padded 3x3 convolution of (B,D,H,W), directly -> (B,rows,W,out)."""
    height = images.shape[2]
    halo = images[:, :, max(rows.start - 1, 0) : rows.stop + 1]
    if rows.start == 0 or rows.stop == height:
        halo = F.pad(halo, (0, 0, int(rows.start == 0), int(rows.stop == height)))
    return F.conv2d(halo, weight, padding=(0, 1)).permute(0, 2, 3, 1)  # (B,rows,W,out)
