"""The fast path of `core/encoder.py`: a whole encoder in steps of `core/fast/norm_act_conv.py`, and its gradient.

Without gradients it works in two image-sized buffers. With gradients it keeps the input of each step. `backward` goes
through the steps image by image, and recomputes the rest block by block. It cannot be differentiated again;
`Encoder.plain` can.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core.fast.norm_act_conv import (
    Buffers,
    InputGradient,
    Moments,
    Rows,
    Step,
    add_product,
    blocks,
    linear,
    moments_of,
    norm_act_conv,
    norm_act_conv_gradient,
)


class Weights(NamedTuple):
    """Weights of an encoder, or their gradients: 1x1 convolutions are (out,in) matrices in the dtype of the pixels.

    `stem` None: the pixels are the stem's output already. `shortcut` None: the identity.
    """

    stem: Tensor | None
    shortcut: Tensor | None
    steps: tuple[Step, Step, Step, Step]

    def flat(self) -> list[Tensor | None]:
        """All weights in a fixed order."""
        return [self.stem, self.shortcut, *(weight for step in self.steps for weight in step[:3])]

    def filled(self, flat: list[Tensor | None]) -> "Weights":
        """The same structure with other values in that order."""
        steps = (Step(*flat[2 + 3 * i : 5 + 3 * i], step.eps) for i, step in enumerate(self.steps))
        return Weights(flat[0], flat[1], tuple(steps))


class Trace(NamedTuple):
    """The inputs of the four steps, (B,H,W,D) each, and their moments; the pooled activations (B,D,h,w), if pooled."""

    read: tuple[Tensor, ...]
    moments: tuple[Moments, ...]
    pooled: Tensor | None


def encode(pixels: Tensor, weights: Weights, output_size: tuple[int, int] | None, buffers: Buffers) -> Tensor:
    """(B,H,W,in) -> (B,D,H,W), or its average over the cells of `output_size`, (B,D,h,w); differentiable once."""
    if torch.is_grad_enabled():
        return _Encode.apply(pixels, weights, output_size, *weights.flat())
    return _forward(pixels, weights, output_size, buffers)[0]


def _forward(pixels, weights: Weights, output_size, buffers: Buffers) -> tuple[Tensor, Trace]:
    first, second, third, fourth = weights.steps
    if weights.stem is None:
        x, x_moments = pixels, moments_of(pixels)
    else:
        x = buffers.take(pixels, len(weights.stem))
        x_moments = linear(pixels, weights.stem, x)
    hidden = buffers.take(x, len(first.weight))
    hidden_moments = norm_act_conv(x, x_moments, first, hidden)
    if weights.shortcut is None:
        shortcut, middle = x, buffers.over(x)
    else:
        shortcut = middle = buffers.take(x, len(weights.shortcut))
        linear(x, weights.shortcut, shortcut)
    middle_moments = norm_act_conv(hidden, hidden_moments, second, middle, residual=shortcut)
    buffers.give_back(hidden)
    last = buffers.take(middle, len(third.weight))
    last_moments = norm_act_conv(middle, middle_moments, third, last)
    trace = (x, hidden, middle, last), (x_moments, hidden_moments, middle_moments, last_moments)
    if output_size is None or output_size == tuple(middle.shape[1:3]):
        out = buffers.over(middle)
        norm_act_conv(last, last_moments, fourth, out, residual=middle, want_moments=False)
        buffers.give_back(last)
        return out.permute(0, 3, 1, 2), Trace(*trace, None)  # (B,D,H,W)
    # The last 1x1 convolution commutes with the average: apply it to the few pooled pixels.
    pooled = []
    for image in range(len(last)):
        one, moments = last[image : image + 1], Moments(*(values[image : image + 1] for values in last_moments))
        active = buffers.over(one)
        norm_act_conv(one, moments, fourth._replace(weight=None), active, want_moments=False)
        pooled.append(_pool(active, output_size))
    pooled = torch.cat(pooled)  # (B,D,h,w)
    out = _pool(middle, output_size) + F.conv2d(pooled, fourth.weight[..., None, None])
    buffers.give_back(middle)
    buffers.give_back(last)
    return out, Trace(*trace, pooled)  # (B,D,h,w)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pixels, weights: Weights, output_size, *flat):
        out, trace = _forward(pixels, weights, output_size, Buffers(reuse=False))
        ctx.save_for_backward(pixels, trace.pooled, *trace.read, *(t for pair in trace.moments for t in pair), *flat)
        ctx.weights = weights.filled([None] * len(flat))
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        pixels, pooled, *saved = ctx.saved_tensors
        moments = tuple(Moments(*saved[i : i + 2]) for i in range(4, 12, 2))
        flat = saved[12:]
        weights, trace = ctx.weights.filled(flat), Trace(tuple(saved[:4]), moments, pooled)
        sums = [weight if weight is None else torch.zeros_like(weight, dtype=_wide(weight)) for weight in flat]
        grad_pixels = torch.empty_like(pixels) if ctx.needs_input_grad[0] else None
        buffers = Buffers()
        for image in range(len(pixels)):
            _backward(pixels, weights, trace, image, grad, ctx.weights.filled(sums), grad_pixels, buffers)
        sums = [total if total is None else total.to(weight.dtype) for total, weight in zip(sums, flat, strict=True)]
        grads = [grad_pixels, None, None, *sums]
        return tuple(value if needed else None for value, needed in zip(grads, ctx.needs_input_grad, strict=True))


def _backward(pixels, weights: Weights, trace: Trace, image, grad, sums: Weights, grad_pixels, buffers: Buffers):
    """For one image: adds the weights' gradients to `sums`, writes the pixels' gradient into `grad_pixels`."""

    def through(number: int, step: Step, given: Rows) -> InputGradient:
        x = trace.read[number][image].flatten(0, 1)  # (n,D)
        out = buffers.take(x, x.shape[1])
        return norm_act_conv_gradient(x, trace.moments[number], image, step, given, out, sums.steps[number])

    first, second, third, fourth = weights.steps
    grad = grad[image].permute(1, 2, 0)  # (H,W,D) or (h,w,D)
    if trace.pooled is None:
        given = residual = grad.flatten(0, 1).__getitem__
    else:
        size = trace.read[3].shape[1:3]
        active = trace.pooled[image].permute(1, 2, 0)  # (h,w,in)
        add_product(sums.steps[3].weight, grad.flatten(0, 1), active.flatten(0, 1))
        given, residual, fourth = _unpool(grad @ fourth.weight, size), _unpool(grad, size), fourth._replace(weight=None)
    last = through(3, fourth, given)
    middle = through(2, third, last)
    buffers.give_back(last.grad)
    hidden = through(1, second, lambda block: middle(block).add_(residual(block)))
    x = through(0, first, hidden)
    for block in blocks(middle.grad):
        grad_x, grad_middle = x(block), middle.grad[block]
        if weights.shortcut is None:
            grad_x += grad_middle
        else:
            add_product(sums.shortcut, grad_middle, trace.read[0][image].flatten(0, 1)[block])
            grad_x.addmm_(grad_middle, weights.shortcut)
        if weights.stem is not None:
            add_product(sums.stem, grad_x, pixels[image].flatten(0, 1)[block])
            grad_x = grad_x @ weights.stem if grad_pixels is not None else None
        if grad_pixels is not None:
            grad_pixels[image].flatten(0, 1)[block] = grad_x
    for gradient in (middle, hidden, x):
        buffers.give_back(gradient.grad)


def _wide(weight: Tensor) -> torch.dtype:
    """The dtype in which the gradients of all blocks and images are summed."""
    return torch.promote_types(weight.dtype, torch.float32)


def _pool(pixels: Tensor, output_size: tuple[int, int]) -> Tensor:
    return F.adaptive_avg_pool2d(pixels.permute(0, 3, 1, 2), output_size)  # (B,D,h,w)


def _unpool(grad: Tensor, size: tuple[int, int]) -> Rows:
    """Gradient (h,w,D) of a pooled image -> gradient of the image's pixels."""
    (by_row, by_column) = (
        F.adaptive_avg_pool1d(torch.eye(n, dtype=grad.dtype, device=grad.device), cells)  # (n,cells)
        for n, cells in zip(size, grad.shape, strict=False)
    )
    wide = by_column @ grad  # (h,W,D)
    return (by_row @ wide.flatten(1)).view(-1, grad.shape[2]).__getitem__  # (H·W,D)


def refuse_transforms() -> None:
    """Raises RuntimeError under `torch.func` (grad, vmap, jvp), which cannot follow the fast path."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "torch.func (grad, vmap, ...) cannot follow AnyUp's fast path: call model.twice_differentiable() first"
        )


def refuse_second_derivatives() -> None:
    """Raises RuntimeError if a `backward` that cannot be differentiated again runs with create_graph=True."""
    if torch.is_grad_enabled():  # in a backward, only with create_graph=True
        raise RuntimeError(
            "AnyUp's fast path has no second derivatives (create_graph=True): call model.twice_differentiable() first"
        )
