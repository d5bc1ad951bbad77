"""GroupNorm, SiLU and a 1x1 convolution as one step over blocks of pixels, exact to rounding, and its gradient.

Images are pixel-major, (B,H,W,D) contiguous, so that a 1x1 convolution is one matrix product. A step reads each pixel
once and normalises it. The moments for this were collected by the previous step, while it wrote its result; each step
collects the moments of its own result in the same way. All functions work in memory that the caller gives:
`core/fast/encoder.py`, which also defines the gradient for PyTorch.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.fast import launches
from core.fast.silu import normed_silu, normed_silu_with_slope

NUM_GROUPS = 8
WELL_CONDITIONED = 16  # up to this ratio of squared mean to variance, one-pass moments are exact to 1e-6
PIXELS_PER_BLOCK = 1024  # half a megabyte at D = 128 in float32: a handful of blocks fits into the second-level cache

Rows = Callable[[slice], Tensor]
"""A block of an image's flattened pixels -> (n,D)."""


class Moments(NamedTuple):
    """Mean and (biased) variance per image and group, both (B,G), at least in float32."""

    mean: Tensor
    var: Tensor


class Step(NamedTuple):
    """Weights of one GroupNorm (in,), SiLU and 1x1 convolution (out,in) without bias; `weight` None: no convolution.

    Also used for the gradients of these weights.
    """

    gamma: Tensor
    beta: Tensor
    weight: Tensor | None
    eps: float


class Buffers:
    """Image-sized buffers that the encoders of one forward share: fresh memory costs more than a pass over it.

    The buffer given back last is taken first.

    Args:
        room: contiguous memory that is not needed yet. At most two buffers lie in it. So a caller that holds two at a
            time and keeps one of them gets the third outside.
        reuse: False: every buffer is new and is never overwritten, for a backward pass.
    """

    def __init__(self, room: Tensor | None = None, reuse: bool = True):
        self.free: list[Tensor] = []
        self.room = None if room is None else room.flatten()
        self.uses_of_room = 2
        self.reuse = reuse

    def take(self, like: Tensor, width: int) -> Tensor:
        """An uninitialised (B,H,W,width) buffer."""
        shape = (*like.shape[:-1], width)
        for i, buffer in reversed(list(enumerate(self.free))):
            if buffer.shape == shape and buffer.dtype == like.dtype:
                return self.free.pop(i)
        return self._in_room(shape) if self._fits(shape, like.dtype) else like.new_empty(shape)

    def over(self, buffer: Tensor) -> Tensor:
        """Memory for a result that replaces `buffer`: the buffer itself, if it may be overwritten."""
        return buffer if self.reuse else torch.empty_like(buffer)

    def _fits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        room = self.room
        return room is not None and room.dtype == dtype and self.uses_of_room > 0 and math.prod(shape) <= len(room)

    def _in_room(self, shape: tuple[int, ...]) -> Tensor:
        self.uses_of_room -= 1
        buffer, self.room = self.room.tensor_split([math.prod(shape)])
        return buffer.view(shape)

    def give_back(self, buffer: Tensor) -> None:
        """Returns `buffer` for reuse: nothing reads it any more."""
        if self.reuse:
            self.free.append(buffer)


def linear(pixels: Tensor, weight: Tensor, out: Tensor) -> Moments:
    """1x1 convolution of (B,H,W,in) with weight (out,in), written into `out` (B,H,W,out) -> moments of the result."""
    if launches.dominate(pixels):
        torch.mm(pixels.flatten(0, 2), weight.t(), out=out.flatten(0, 2))
        return moments_of(out)
    collected = []
    for rows, targets in zip(pixels.flatten(1, 2), out.flatten(1, 2), strict=True):
        collect = _Collector(targets)
        for block in blocks(rows):
            torch.mm(rows[block], weight.t(), out=targets[block])
            collect(block)
        collected.append(collect.moments())
    return _stack(collected)


def norm_act_conv(
    x: Tensor, moments: Moments, step: Step, out: Tensor, residual: Tensor | None = None, want_moments: bool = True
) -> Moments | None:
    """residual + conv(silu(norm(x))), all (B,H,W,D), written into `out` -> moments of the result.

    Args:
        moments: moments of x.
        out: may be `residual`, or x itself if there is no convolution.
        want_moments: False if no normalisation follows; then None is returned.
    """
    if launches.dominate(x):
        _whole_norm_act_conv(x, moments, step, out, residual)
        return moments_of(out) if want_moments else None
    collected = []
    for image, (rows, targets) in enumerate(zip(x.flatten(1, 2), out.flatten(1, 2), strict=True)):
        scale, shift = _affine(moments, image, step, x.dtype)
        collect, scratch = _Collector(targets), _scratch(rows, 2)
        for block in blocks(rows):
            target = targets[block]
            active, spare = (target, scratch[0]) if step.weight is None else scratch
            active = normed_silu(rows[block], scale, shift, active[: len(target)], spare[: len(target)])
            if step.weight is not None:
                if residual is None:
                    torch.mm(active, step.weight.t(), out=target)
                elif residual is out:
                    target.addmm_(active, step.weight.t())
                else:
                    torch.addmm(residual[image].flatten(0, 1)[block], active, step.weight.t(), out=target)
            if want_moments:
                collect(block)
        collected.append(collect.moments() if want_moments else None)
    return _stack(collected) if want_moments else None


def _whole_norm_act_conv(x: Tensor, moments: Moments, step: Step, out: Tensor, residual: Tensor | None) -> None:
    """`norm_act_conv` of all images at once, without moments."""
    rstd = torch.rsqrt(moments.var + step.eps)[..., None]  # (B,G,1)
    scale = rstd * step.gamma.view(NUM_GROUPS, -1)  # (B,G,D/G)
    shift = torch.addcmul(step.beta.view(NUM_GROUPS, -1), moments.mean[..., None], scale, value=-1)
    scale, shift = (t.flatten(1)[:, None].to(x.dtype) for t in (scale, shift))  # (B,1,D)
    active = out.flatten(1, 2) if step.weight is None else torch.empty_like(x).flatten(1, 2)
    F.silu(torch.addcmul(shift, x.flatten(1, 2), scale, out=active), inplace=True)
    if step.weight is None:
        return
    active, target = active.flatten(0, 1), out.flatten(0, 2)
    if residual is None:
        torch.mm(active, step.weight.t(), out=target)
    elif residual is out:
        target.addmm_(active, step.weight.t())
    else:
        torch.addmm(residual.flatten(0, 2), active, step.weight.t(), out=target)


def norm_act_conv_gradient(
    x: Tensor, moments: Moments, image: int, step: Step, given: Rows, out: Tensor, sums: Step
) -> "InputGradient":
    """Gradient of a step's input, for one image; recomputes what the step did not keep.

    Args:
        x: (n,in), the step's input for this image.
        moments, step: as for the step itself.
        given: gradient of the convolution's result, or of the SiLU's if there is no convolution.
        out: (n,in), memory for the result.
        sums: the gradients of the weights are added to these.
    """
    scale, shift = _affine(moments, image, step, x.dtype)
    scratch = _scratch(x, 2)
    sums_of_blocks = []
    for block in blocks(x):
        grad, target = given(block), out[block]
        pixels = x[block]
        active, slope = scratch[:, : len(pixels)]
        normed_silu_with_slope(pixels, scale, shift, active, slope)
        if step.weight is not None:
            add_product(sums.weight, grad, active)
            grad = torch.mm(grad, step.weight, out=target)
        torch.mul(grad, slope, out=target)
        sums_of_blocks.append(_channel_sums(target, pixels))
    return InputGradient(x, moments, image, step, out, _sum_over_blocks(sums_of_blocks), sums)


class InputGradient:
    """Gradient of a GroupNorm's input in one image, as `Rows`, from the gradient of its affine output.

    It needs sums over the image, which are known only after the last block. So each block is completed in place when
    it is used next, which saves a pass over memory. Each block must be asked for exactly once.

    Args:
        x: (n,D), the input of the normalisation.
        moments, image, step: as for the step itself.
        grad: (n,D), gradient of the affine output.
        channel_sums: (2,D), sums of `grad` and of `grad` · x.
        sums: the gradients of gamma and beta are added to these.
    """

    def __init__(self, x, moments, image, step, grad, channel_sums, sums: Step):
        mean, rstd = moments.mean[image], torch.rsqrt(moments.var[image] + step.eps)  # (G,)
        spread = lambda t: t.repeat_interleave(x.shape[1] // len(t))  # noqa: E731  (G,) -> (D,)
        per_group = lambda t: t.unflatten(0, (len(mean), -1)).sum(1)  # noqa: E731  (D,) -> (G,)
        total, weighted = channel_sums
        grad_gamma = (weighted - spread(mean) * total) * spread(rstd)  # (D,)
        sums.gamma.add_(grad_gamma)
        sums.beta.add_(total)
        count = x.numel() / len(mean)
        slope = -(rstd**2) * per_group(grad_gamma * step.gamma) / count  # (G,)
        offset = -rstd * per_group(total * step.gamma) / count - slope * mean  # (G,)
        self.scale = (spread(rstd) * step.gamma).to(x.dtype)
        self.slope, self.offset = spread(slope).to(x.dtype), spread(offset).to(x.dtype)
        self.x, self.grad, self.along = x, grad, _scratch(x, 1)[0]

    def __call__(self, block: slice) -> Tensor:
        target, x = self.grad[block], self.x[block]
        along = torch.addcmul(self.offset, x, self.slope, out=self.along[: len(x)])
        return torch.addcmul(along, target, self.scale, out=target)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (p,q) += aᵀ b for a (n,p) and b (n,q); sums many blocks in the precision of `total`."""
    if total.dtype == a.dtype:
        total.addmm_(a.t(), b)
    else:
        total.add_(a.t() @ b)


def moments_of(pixels: Tensor) -> Moments:
    """Moments per image and group of (B,H,W,D)."""
    if launches.dominate(pixels):
        return _whole_moments(pixels.flatten(1, 2))
    collected = []
    for rows in pixels.flatten(1, 2):
        collect = _Collector(rows)
        for block in blocks(rows):
            collect(block)
        collected.append(collect.moments())
    return _stack(collected)


def _whole_moments(rows: Tensor) -> Moments:
    """Moments of (B,n,D) images, without waiting for the device to see whether they are well conditioned.

    In single precision each channel is measured by Welford's method, which always is. Numbers in half precision have
    lost what one pass in single precision would lose.
    """
    if rows.dtype in (torch.bfloat16, torch.float16):
        mean = rows.mean(1, dtype=torch.float32)
        square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square() / rows.shape[1]
        mean, square = (t.unflatten(1, (NUM_GROUPS, -1)).mean(2) for t in (mean, square))  # (B,G)
        return Moments(mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0))
    var, mean = (t.unflatten(1, (NUM_GROUPS, -1)) for t in torch.var_mean(rows, 1, correction=0))  # (B,G,D/G)
    return Moments(mean.mean(2), var.mean(2) + mean.var(2, correction=0))


class _Collector:
    """Gathers the moments of one image, (n,D), while it is written block by block."""

    def __init__(self, rows: Tensor):
        self.rows = rows
        self.sums: list[tuple[Tensor, Tensor]] = []

    def __call__(self, block: slice) -> None:
        rows = self.rows[block]
        self.sums.append(_channel_sums(rows, rows))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (G,) each. If a mean is large compared to the variance, a second pass subtracts it."""
        mean, var = self._one_pass()
        if not (mean**2 < WELL_CONDITIONED * var).all():
            per_channel = mean.to(self.rows.dtype).repeat_interleave(self.rows.shape[1] // NUM_GROUPS)
            shifted = (self.rows[block] - per_channel for block in blocks(self.rows))
            self.sums = [_channel_sums(rows, rows) for rows in shifted]
            correction, var = self._one_pass()
            mean = mean.to(self.rows.dtype) + correction
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        return mean.to(dtype), var.to(dtype)

    def _one_pass(self) -> tuple[Tensor, Tensor]:
        sums = _sum_over_blocks(self.sums).unflatten(1, (NUM_GROUPS, -1)).sum(2)  # (2,G)
        mean, square = sums * (NUM_GROUPS / self.rows.numel())
        return mean, (square - mean**2).clamp(min=0)


def _stack(moments: list[tuple[Tensor, Tensor]]) -> Moments:
    return Moments(*map(torch.stack, zip(*moments, strict=True)))


def _channel_sums(rows: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over n of `rows` and of `rows` · `factor`, both (n,D) -> two (D,)."""
    if rows.dtype in (torch.bfloat16, torch.float16):
        rows, factor = rows.float(), factor.float()
    if rows.device.type != "cpu":
        return rows.sum(0), (rows * factor).sum(0)
    # These sums are the gradients of a normalisation's bias and gain, which PyTorch computes in one fast pass.
    n, width = rows.shape
    rows, factor = (t.view(1, n, 1, width).permute(0, 3, 1, 2) for t in (rows, factor))  # (1,D,n,1), channels last
    mean, rstd = rows.new_zeros(1, 1), rows.new_ones(1, 1)
    _, weighted, total = torch.ops.aten.native_group_norm_backward(
        rows, factor, mean, rstd, None, 1, width, n, 1, [False, True, True]
    )
    return total, weighted


def _sum_over_blocks(sums: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The `_channel_sums` of all blocks -> (2,D) in float64."""
    return torch.stack([torch.stack(values).sum(0, dtype=torch.float64) for values in zip(*sums, strict=True)])


def _affine(moments: Moments, image: int, step: Step, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift (D,) that GroupNorm applies to one image."""
    mean, rstd = moments.mean[image], torch.rsqrt(moments.var[image] + step.eps)  # (G,)
    per_group = len(step.gamma) // len(mean)
    scale = rstd.repeat_interleave(per_group) * step.gamma
    shift = step.beta - mean.repeat_interleave(per_group) * scale
    return scale.to(dtype), shift.to(dtype)


def under_autocast(tensor: Tensor) -> Tensor:
    """Casts a tensor to autocast's dtype if autocast is on, because in-place and out= operations ignore autocast."""
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None if autocast is off."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # meta has no autocast
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the tensor's device; the meta device has no autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def blocks(rows: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of (n,D)."""
    size = _block_size(rows)
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


def _block_size(rows: Tensor) -> int:
    return min(len(rows), PIXELS_PER_BLOCK) if rows.device.type == "cpu" else len(rows)


def _scratch(rows: Tensor, count: int) -> Tensor:
    """(count, rows of a block, D), uninitialised."""
    return rows.new_empty(count, _block_size(rows), rows.shape[1])
