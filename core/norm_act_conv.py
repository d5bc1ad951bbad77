"""GroupNorm, SiLU and a 1x1 convolution as one step over blocks of pixels, exact to rounding.

Images are pixel-major, (B,H,W,D) contiguous, so that a 1x1 convolution is one matrix product. A step reads each
pixel once, normalises it with moments that the step before collected while it wrote, and collects the moments of
what it writes. Without gradients it works in buffers it is given. With gradients it keeps only its input and
recomputes the rest in `backward`, which is therefore not differentiable itself; `Encoder.plain` is.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_GROUPS = 8
WELL_CONDITIONED = 16  # squared mean over variance, up to which one-pass moments are exact to 1e-6
PIXELS_PER_BLOCK = 4096  # 2 MB at D = 128 in float32: stays in cache between the operations of one step


class Moments(NamedTuple):
    """Mean and (biased) variance per image and group, both (B,G) in float32."""

    mean: Tensor
    var: Tensor


class Buffers:
    """Image-sized buffers that the encoders of one forward hand on: fresh memory costs more than a pass over it.

    The last one given back is the first one taken.

    Args:
        room: contiguous memory that is not needed yet; up to two buffers lie in it. So whoever holds two at a time,
            and keeps one of them, finds the third outside.
    """

    def __init__(self, room: Tensor | None = None):
        self.free: list[Tensor] = []
        self.room = None if room is None else room.flatten()
        self.uses_of_room = 2

    def take(self, like: Tensor, width: int) -> Tensor | None:
        """An uninitialised (B,H,W,width) buffer; None with gradients, which need every result kept."""
        if torch.is_grad_enabled():
            return None
        shape = (*like.shape[:-1], width)
        for i, buffer in reversed(list(enumerate(self.free))):
            if buffer.shape == shape and buffer.dtype == like.dtype:
                return self.free.pop(i)
        return self._in_room(shape) if self._fits(shape, like.dtype) else like.new_empty(shape)

    def _fits(self, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        room = self.room
        return room is not None and room.dtype == dtype and self.uses_of_room > 0 and math.prod(shape) <= len(room)

    def _in_room(self, shape: tuple[int, ...]) -> Tensor:
        self.uses_of_room -= 1
        buffer, self.room = self.room.tensor_split([math.prod(shape)])
        return buffer.view(shape)

    def give_back(self, buffer: Tensor) -> None:
        """Says that nothing reads `buffer` any more."""
        if not torch.is_grad_enabled():
            self.free.append(buffer)


def stem(layer: Callable[[Tensor], Tensor], x: Tensor, buffers: Buffers) -> tuple[Tensor, Moments]:
    """(B,in,H,W) -> pixel-major (B,H,W,D) of an encoder's first layer, with its moments."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return linear(x.permute(0, 2, 3, 1).contiguous(), layer, buffers)
    pixels = layer(x).permute(0, 2, 3, 1).contiguous()  # (B,H,W,D)
    pixels = under_autocast(pixels)
    return pixels, moments_of(pixels.detach())


def linear(pixels: Tensor, conv: nn.Conv2d, buffers: Buffers) -> tuple[Tensor, Moments]:
    """A 1x1 convolution of (B,H,W,in) -> (B,H,W,out), with the moments of the result."""
    weight = under_autocast(conv.weight.flatten(1))  # (out,in)
    pixels = under_autocast(pixels)
    if torch.is_grad_enabled():
        out = F.linear(pixels, weight)  # (B,H,W,out)
        return out, moments_of(out.detach())
    out = buffers.take(pixels, len(weight))
    collect = _Collector()
    for image, block in _blocks(pixels):
        target = _rows(out, image, block)
        _multiply(_rows(pixels, image, block), weight, target)
        collect(image, target)
    return out, collect.moments()


def norm_act_conv(
    x: Tensor,
    moments: Moments,
    norm: nn.GroupNorm,
    conv: nn.Conv2d | None,
    out: Tensor | None,
    residual: Tensor | None = None,
    want_moments: bool = True,
) -> tuple[Tensor, Moments | None]:
    """residual + conv(silu(norm(x))), all (B,H,W,D), with the moments of the result.

    Args:
        moments: of x.
        conv: a 1x1 convolution without bias; None: no convolution.
        out: where to write, if no gradient is wanted; may be `residual`, or x itself if there is no convolution.
        want_moments: False where no normalisation follows.
    """
    weight = None if conv is None else under_autocast(conv.weight.flatten(1))  # (out,in)
    mean, rstd = moments.mean, torch.rsqrt(moments.var + norm.eps)
    if torch.is_grad_enabled():
        y, new_mean, new_var = _NormActConv.apply(x, mean, rstd, norm.weight, norm.bias, weight, residual, want_moments)
        return y, Moments(new_mean, new_var) if want_moments else None
    return out, _forward(x, mean, rstd, norm.weight, norm.bias, weight, residual, out, want_moments)


def pool(pixels: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Adaptive average pooling of (B,H,W,D) -> (B,D,h,w), which unlike PyTorch's does not keep its input."""
    return _Pool.apply(pixels, output_size)


def moments_of(pixels: Tensor) -> Moments:
    """Moments per image and group of (B,H,W,D)."""
    collect = _Collector()
    for image, block in _blocks(pixels):
        collect(image, _rows(pixels, image, block))
    return collect.moments()


def _forward(x, mean, rstd, gamma, beta, weight, residual, out, want_moments):
    collect = _Collector()
    scratch = None if weight is None else x.new_empty(min(_block_size(x), x[0, ..., 0].numel()), x.shape[-1])
    for image, block in _blocks(x):
        pixels, target = _rows(x, image, block), _rows(out, image, block)
        scale, shift = _affine(mean[image], rstd[image], gamma, beta, x.dtype)
        active = target if weight is None else scratch[: len(pixels)]
        F.silu(torch.addcmul(shift, pixels, scale, out=active), inplace=True)
        if weight is not None:
            if residual is None:
                _multiply(active, weight, target)
            elif residual is out:
                target.addmm_(active, weight.t())
            else:
                torch.addmm(_rows(residual, image, block), active, weight.t(), out=target)
        if want_moments:
            collect(image, target)
    return collect.moments() if want_moments else None


class _NormActConv(torch.autograd.Function):
    """`norm_act_conv` with gradients: keeps x, recomputes the normalised and activated pixels block by block."""

    @staticmethod
    def forward(ctx, x, mean, rstd, gamma, beta, weight, residual, want_moments):
        ctx.save_for_backward(x, mean, rstd, gamma, beta, weight)
        out = x.new_empty(*x.shape[:-1], x.shape[-1] if weight is None else len(weight))
        moments = _forward(x, mean, rstd, gamma, beta, weight, residual, out, want_moments)
        new_mean, new_var = moments or (mean.new_empty(0), mean.new_empty(0))
        ctx.mark_non_differentiable(new_mean, new_var)
        return out, new_mean, new_var

    @staticmethod
    def backward(ctx, grad, _grad_mean, _grad_var):
        _refuse_second_derivatives()
        x, mean, rstd, gamma, beta, weight = ctx.saved_tensors
        grad = grad.contiguous()
        sums = torch.zeros(2, *x.shape[::3], dtype=mean.dtype, device=x.device)  # of ga and ga·x: (2,B,D)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        grad_x = torch.empty_like(x)
        for image, block in _blocks(x):
            pixels, given, target = _rows(x, image, block), _rows(grad, image, block), _rows(grad_x, image, block)
            scale, shift = _affine(mean[image], rstd[image], gamma, beta, x.dtype)
            affine = torch.addcmul(shift, pixels, scale)
            if weight is not None:
                grad_weight.addmm_(given.t(), F.silu(affine))
                given = given @ weight
            torch.ops.aten.silu_backward.grad_input(given, affine, grad_input=target)
            sums[0, image] += _column_sums(target)
            sums[1, image] += _column_sums(target * pixels)
        grad_gamma, grad_beta = _input_gradient(grad_x, x, mean, rstd, gamma, sums)
        grads = [grad_x, None, None, grad_gamma.to(gamma.dtype), grad_beta.to(beta.dtype), grad_weight, grad, None]
        return tuple(value if needed else None for value, needed in zip(grads, ctx.needs_input_grad, strict=True))


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():  # as it is in backward only with create_graph=True
        raise RuntimeError(
            "AnyUp's fast path has no second derivatives (create_graph=True): call model.twice_differentiable() first"
        )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, output_size):
        ctx.shape = pixels.shape
        return F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2), output_size)  # (B,D,h,w)

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivatives()
        shape = [ctx.shape[i] for i in (0, 3, 1, 2)]
        sized = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        grad = grad.contiguous(memory_format=torch.channels_last)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad, sized).permute(0, 2, 3, 1), None


def _input_gradient(grad_affine, x, mean, rstd, gamma, sums):
    """Turns the gradient of the affine output, in place, into that of x; returns those of gamma and beta."""
    group = lambda t: t.unflatten(-1, (mean.shape[1], -1))  # noqa: E731  (B,D) -> (B,G,D/G)
    count = x[0].numel() / mean.shape[1]
    total, weighted = sums
    per_gamma = group(weighted) - mean[..., None] * group(total)
    per_gamma = (per_gamma * rstd[..., None]).flatten(1)  # (B,D)
    slope = -(rstd**2) * group(per_gamma * gamma).sum(-1) / count  # (B,G)
    offset = -rstd * group(total * gamma).sum(-1) / count - slope * mean  # (B,G)
    spread = lambda t: t.repeat_interleave(x.shape[-1] // t.shape[1], 1).to(x.dtype)  # noqa: E731  (B,G) -> (B,D)
    scale, slope, offset = (spread(rstd) * gamma).to(x.dtype), spread(slope), spread(offset)
    for image, block in _blocks(x):
        target = _rows(grad_affine, image, block)
        along = torch.addcmul(offset[image], _rows(x, image, block), slope[image])
        torch.addcmul(along, target, scale[image], out=target)
    return per_gamma.sum(0), total.sum(0)


class _Collector:
    """Gathers the moments of blocks and combines them (Chan, Golub, LeVeque 1983) in float64."""

    def __init__(self):
        self.parts: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def __call__(self, image: int, rows: Tensor) -> None:
        self.parts.setdefault(image, []).append((len(rows), *_group_moments(rows)))

    def moments(self) -> Moments:
        combined = []
        for parts in self.parts.values():
            counts = torch.tensor([n for n, _, _ in parts], dtype=torch.float64, device=parts[0][1].device)[:, None]
            means = torch.stack([mean for _, mean, _ in parts]).double()  # (blocks,G)
            spreads = torch.stack([var for _, _, var in parts]).double()
            mean = (counts * means).sum(0) / counts.sum()
            var = (counts * (spreads + (means - mean) ** 2)).sum(0) / counts.sum()
            combined.append((mean, var))
        dtype = torch.float64 if parts[0][1].dtype == torch.float64 else torch.float32
        return Moments(*(torch.stack(values).to(dtype) for values in zip(*combined, strict=True)))


def _group_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (n,D) per group of channels."""
    rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    if rows.device.type != "cpu":
        var, mean = torch.var_mean(rows.unflatten(1, (NUM_GROUPS, -1)), (0, 2), correction=0)
        return mean, var
    mean, var = _one_pass_moments(rows)
    if not (mean**2 < WELL_CONDITIONED * var).all():
        shifted = rows.unflatten(1, (NUM_GROUPS, -1)) - mean[:, None]
        correction, var = _one_pass_moments(shifted.flatten(1))
        mean = mean + correction
    return mean, var


def _one_pass_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """By PyTorch's fast kernel, which subtracts the squared mean from the mean square."""
    n, width = rows.shape
    as_image = rows.view(1, n, 1, width).permute(0, 3, 1, 2)  # (1,D,n,1), channels last
    _, mean, rstd = torch.native_group_norm(as_image, None, None, 1, width, n, NUM_GROUPS, 1e-12)
    return mean[0], rstd[0] ** -2 - 1e-12


def _multiply(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = rows @ weight.t()."""
    if out.device.type == "cpu":
        out.zero_().addmm_(rows, weight.t())  # zeros bring cold lines into the cache: a tenth faster than torch.mm
    else:
        torch.mm(rows, weight.t(), out=out)


def _affine(mean, rstd, gamma, beta, dtype):
    """Scale and shift (D,) that GroupNorm applies to one image."""
    per_group = len(gamma) // len(mean)
    scale = rstd.repeat_interleave(per_group) * gamma
    shift = beta - mean.repeat_interleave(per_group) * scale
    return scale.to(dtype), shift.to(dtype)


def under_autocast(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype, where autocast is on: in-place and out= operations do not ask it."""
    dtype = autocast_dtype(tensor)
    return tensor if dtype is None else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None where it is off."""
    device = tensor.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # never so on the meta device
    return torch.get_autocast_dtype(device) if on else None


def _column_sums(rows: Tensor) -> Tensor:
    """(n,D) -> (D,): summed in wide rows first, which is several times faster on CPU."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    n, width = rows.shape
    if n % 32 == 0:
        rows = rows.view(n // 32, 32 * width).sum(0, dtype=dtype).view(32, width)
    return rows.sum(0, dtype=dtype)


def _block_size(pixels: Tensor) -> int:
    return PIXELS_PER_BLOCK if pixels.device.type == "cpu" else pixels[0, ..., 0].numel()


def _blocks(pixels: Tensor) -> Iterator[tuple[int, slice]]:
    """(image, slice of its flattened pixels), covering (B,H,W,D)."""
    total, size = pixels[0, ..., 0].numel(), _block_size(pixels)
    for image in range(len(pixels)):
        for start in range(0, total, size):
            yield image, slice(start, min(start + size, total))


def _rows(pixels: Tensor, image: int, block: slice) -> Tensor:
    return pixels[image].flatten(0, 1)[block]  # (n,D)
