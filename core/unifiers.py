"""Baseline fillers of `unifier`: AnyUp's feature-agnostic layer, and the ablation without a feature path."""

from collections.abc import Iterator
from enum import Enum
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from core.encoder import Encoder, Stem
from core.fast import launches
from core.fast.encoder import refuse_second_derivatives
from core.fast.norm_act_conv import add_product, without_autocast
from core.hooks import Unifier
from core.registry import register

MAX_RESPONSES = {"cpu": 2**18, "cuda": 2**24, "meta": 2**60}  # held at once; on CPU this many stay in cache
LARGE_BLOCKS = 8  # where launches dominate, no more blocks than this are made of large grids


class Ordering(Enum):
    """Order in which AnyUp's feature-agnostic layer reads its responses: see `BasisConvolution`."""

    paper = "paper"
    released = "released"


class BasisConvolution(nn.Module):
    """(B,C,h,w) -> (B,num_basis,h,w): every channel is convolved with the same learned filters.

    The responses are divided by the number of filter taps inside the feature grid. Then follow a softmax over the
    filters and a mean over the channels. With ordering `paper` (AnyUp, eq. 1) the order of channels does not matter.
    With `released`, the responses, laid out (channel, filter), are read as (filter, channel). The released code does
    this, and its checkpoints were trained that way.
    """

    def __init__(self, num_basis: int, kernel_size: int, ordering: Ordering):
        super().__init__()
        self.ordering = ordering
        self.basis = nn.Parameter(torch.randn(num_basis, 1, kernel_size, kernel_size))
        self.twice_differentiable = False

    def forward(self, features: Tensor, basis: Tensor | None = None) -> Tensor:
        """(B,C,h,w) -> (B,M,h,w). `basis`: (M,1,k,k) filters for this call, instead of the learned ones."""
        basis = self.basis if basis is None else basis
        kernel_size, (height, width) = basis.shape[-1], features.shape[-2:]
        padding = kernel_size // 2
        taps = features.new_ones(1, 1, kernel_size, kernel_size)
        inside = F.conv2d(features.new_ones(1, 1, height, width), taps, padding=padding)  # (1,1,h,w)
        padded = F.pad(features, (padding,) * 4)
        if self.twice_differentiable or torch.compiler.is_compiling():
            return self.plain(padded, inside, basis)
        return _Unify.apply(padded.to(basis.dtype), inside, basis, self.ordering)

    def plain(self, padded: Tensor, inside: Tensor, basis: Tensor) -> Tensor:
        """The definition: (B,C,h+k-1,w+k-1), (1,1,h,w), (M,1,k,k) -> (B,M,h,w)."""
        bands = [
            torch.cat([_responses(patches, basis, self.ordering).softmax(1).mean(2) for patches in blocks])
            for _, blocks in _bands(padded, inside, basis)
        ]
        return _as_grid(bands, padded, inside)


class _Unify(torch.autograd.Function):
    """`BasisConvolution.plain` with autocast off; keeps no responses, and recomputes them in `backward`."""

    @staticmethod
    def forward(ctx, padded, inside, basis, ordering):
        ctx.save_for_backward(padded, inside, basis)
        ctx.ordering = ordering
        bands = []
        with torch.autocast(padded.device.type, enabled=False):
            for _, blocks in _bands(padded, inside, basis):
                # not a matrix product, which would sum the channels one after another and lose a digit
                means = (_softmax(_responses(patches, basis, ordering)).mean(2) for patches in blocks)
                bands.append(torch.cat(list(means)))
        return _as_grid(bands, padded, inside)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        padded, inside, basis = ctx.saved_tensors
        channels = padded.shape[1]
        grad_basis = torch.zeros_like(basis.flatten(1), dtype=torch.promote_types(basis.dtype, torch.float32))
        grad_padded = torch.zeros_like(padded) if ctx.needs_input_grad[0] else None
        with torch.autocast(padded.device.type, enabled=False):
            for rows, blocks in _bands(padded, inside, basis):
                given = grad[:, :, rows].permute(0, 2, 3, 1).flatten(0, 2).split(len(blocks[0]))  # (cells,M) each
                grads = [
                    _responses_gradient(*block, basis, ctx.ordering) for block in zip(blocks, given, strict=True)
                ]  # (cells·C,M) each
                for patches, grad_responses in zip(blocks, grads, strict=True):
                    add_product(grad_basis, grad_responses, patches.flatten(0, 1))
                if grad_padded is not None:
                    of_patches = (torch.cat(grads) @ basis.flatten(1)).div_(channels)
                    _add_patches(of_patches, inside, rows, grad_padded)
        return grad_padded, None, grad_basis.div_(channels).to(basis.dtype).view_as(basis), None


def _bands(padded: Tensor, inside: Tensor, basis: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Yields rows of cells, and the patches around the cells, (cells,C,k²), in blocks whose responses stay in cache."""
    (batch, channels), (num_basis, _, size, _), (height, width) = padded.shape[:2], basis.shape, inside.shape[-2:]
    budget = MAX_RESPONSES.get(padded.device.type, 2**18)
    of_row = batch * width * channels * num_basis
    if launches.dominate(padded):
        budget = max(budget, -(-height // LARGE_BLOCKS) * of_row)
    step = max(1, budget // of_row)
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        band = padded[:, :, top : rows.stop + size - 1].unfold(2, size, 1).unfold(3, size, 1)  # (B,C,rows,w,k,k)
        band = band.permute(0, 2, 3, 1, 4, 5).reshape(batch, -1, channels, size**2)  # (B,rows·w,C,k²)
        band = (band / inside[:, 0, rows].flatten(1)[..., None, None]).flatten(0, 1)
        yield rows, band.split(max(1, budget // (channels * num_basis)))


def _responses(patches: Tensor, basis: Tensor, ordering: Ordering) -> Tensor:
    """(cells,C,k²), (M,1,k,k) -> (cells,M,C)."""
    (cells, channels, _), num_basis = patches.shape, len(basis)
    responses = patches.flatten(0, 1) @ basis.flatten(1).t()  # (cells·C,M)
    if ordering is Ordering.released:
        return responses.view(cells, num_basis, channels)
    return responses.view(cells, channels, num_basis).transpose(1, 2)


def _softmax(responses: Tensor) -> Tensor:
    """Softmax over the filters of (cells,M,C), on CPU in place.

    On CPU it is never slower than PyTorch's softmax, and several times faster on machines where that is slow (see
    `core/fast/silu.py`).
    """
    if launches.dominate(responses):  # the softmax of PyTorch needs two passes over memory there, this needs eight
        if responses.is_contiguous():
            return responses.softmax(1)
        return responses.transpose(1, 2).softmax(2).transpose(1, 2)
    exps = responses.sub_(responses.amax(1, keepdim=True)).exp_()
    return exps.mul_(exps.sum(1, keepdim=True).reciprocal_())


def _responses_gradient(patches: Tensor, grad: Tensor, basis: Tensor, ordering: Ordering) -> Tensor:
    """Gradient of the responses, (cells·C,M), still to be divided by C.

    From (cells,C,k²) patches and the (cells,M) gradient of the mean over channels.
    """
    shares = _softmax(_responses(patches, basis, ordering))  # (cells,M,C)
    along = grad[:, None] @ shares  # (cells,1,C): mean of grad under each softmax
    slope = torch.sub(grad[..., None], along, out=torch.empty_like(shares))  # (cells,M,C)
    grad = shares.mul_(slope)
    return (grad if ordering is Ordering.released else grad.transpose(1, 2)).reshape(-1, len(basis))


def _add_patches(grad: Tensor, inside: Tensor, rows: slice, grad_padded: Tensor) -> None:
    """Adds the gradient of the patches around some rows of cells, (cells·C,k²), to that of the padded features."""
    (batch, channels), width = grad_padded.shape[:2], inside.shape[-1]
    size = grad_padded.shape[-1] - width + 1
    grad = grad.view(batch, -1, width, channels, size, size).permute(4, 5, 0, 3, 1, 2)  # (k,k,B,C,rows,w)
    for down, across in product(range(size), repeat=2):
        target = grad_padded[:, :, rows.start + down : rows.stop + down, across : across + width]
        target += grad[down, across] / inside[:, :, rows]


def _as_grid(bands: list[Tensor], padded: Tensor, inside: Tensor) -> Tensor:
    """Joins bands of cells, (cells,M) each -> (B,M,h,w)."""
    num_basis, width = bands[0].shape[1], inside.shape[-1]
    return torch.cat([band.view(len(padded), -1, width, num_basis) for band in bands], 1).permute(0, 3, 1, 2)


@register("learned_basis")
class LearnedBasis(Unifier):
    """AnyUp's feature path: L2 normalisation over channels, the feature-agnostic layer, two residual blocks.

    Args:
        num_basis: number M of filters; a multiple of 8.
        kernel_size: side of the filters in cells of the feature grid; odd.
        ordering: `paper` (eq. 1, independent of the order of channels) or `released` (for published weights).
    """

    def __init__(self, embed_dim: int, num_basis: int = 128, kernel_size: int = 5, ordering: Ordering = Ordering.paper):
        super().__init__()
        if num_basis < 8 or num_basis % 8:
            raise ValueError(
                f"num_basis must be a positive multiple of 8 (unifier=none has no filters), got {num_basis}"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
        self.encoder = Encoder(BasisConvolution(num_basis, kernel_size, Ordering(ordering)), num_basis, embed_dim)

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        return self._encoded(features, self.encoder[0]).to(guidance.dtype)

    def _encoded(self, features: Tensor, stem: Stem) -> Tensor:
        """Encodes (B,C,h,w) -> (B,D,h,w), with features and weights in at least single precision, also for `stem`.

        The responses, means of softmaxes, are all about 1/M. Half precision cannot represent their differences, which
        carry the information. With published weights, most of the bfloat16 error arises here (docs/performance.md).
        """
        wide = torch.promote_types(self.encoder[0].basis.dtype, torch.float32)
        with without_autocast(features):
            unit = F.normalize(features.to(wide), dim=1)
            if self.encoder[0].basis.dtype == wide:
                return self.encoder(unit, stem=stem)
            weights = {name: weight.to(wide) for name, weight in self.encoder.named_parameters()}
            return functional_call(self.encoder, weights, unit, {"stem": stem})


@register("none")
class NoUnifier(Unifier):
    """The paper's ablation without a feature path: keys come from the image alone."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, features: Tensor, guidance: Tensor) -> Tensor:
        batch, _, height, width = features.shape
        return guidance.new_zeros(batch, self.embed_dim, height, width)
