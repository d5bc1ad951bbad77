"""Checks of the model's arguments, made before anything is computed, and of what fillers return."""

from numbers import Integral

import torch
from torch import Tensor, nn


def check_inputs(
    model: nn.Module, image: Tensor, features: Tensor, output_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Checks the inputs of a model call -> the output size.

    Raises:
        TypeError, ValueError: an input cannot be upsampled; the message names it and says what is expected.
        RuntimeError: under `torch.jit.trace`.
    """
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot follow AnyUp: use torch.export.export(model, (image, features))")
    for name, tensor in (("image", image), ("features", features)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, channels, height, width), got {_shape(tensor)}")
        if 0 in tensor.shape:
            raise ValueError(f"{name} is empty: {_shape(tensor)}")
    if image.shape[1] != 3:
        raise ValueError(f"image must have 3 channels (RGB, ImageNet-normalised), got {_shape(image)}")
    if len(image) != len(features):
        raise ValueError(f"image and features must be the same batch, got {_shape(image)} and {_shape(features)}")
    if min(features.shape[-2:]) < 2:
        raise ValueError(
            f"features must be at least 2x2 cells (keys are aggregated with reflect padding), got {_shape(features)}; "
            "run the backbone on a larger image or with a smaller stride"
        )
    _check_dtypes(model, image, features)
    if model.check_finite:
        for name, tensor in (("image", image), ("features", features)):
            if not torch.isfinite(tensor).all():
                bad = (~torch.isfinite(tensor)).sum().item()
                raise ValueError(f"{name} has {bad} NaN or infinite values of {tensor.numel()}")
    return check_size(tuple(image.shape[-2:]) if output_size is None else output_size)


def check_size(output_size: tuple[int, int]) -> tuple[int, int]:
    """Checks an output size -> (height, width) as plain positive integers.

    NumPy integers and 0-dimensional integer tensors are accepted.

    Raises:
        ValueError: anything else, including 40.0.
    """
    try:
        height, width = (side.item() if isinstance(side, Tensor) else side for side in output_size)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"output_size must be (height, width), got {output_size!r}") from None
    if not all(isinstance(side, Integral) and not isinstance(side, bool) and side >= 1 for side in (height, width)):
        raise ValueError(f"output_size must be two positive integers, got {output_size!r}")
    return int(height), int(width)


def check_coords(coords: Tensor, features: Tensor) -> Tensor:
    """Checks points of the image, (N,2), or (B,N,2) for the features' batch -> the same, at least in float32.

    Raises:
        TypeError, ValueError: they are no such points; the message says what is wrong.
    """
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords must be a torch tensor, got {type(coords).__name__}")
    if coords.dim() not in (2, 3) or coords.shape[-1] != 2:
        raise ValueError(f"coords must be (points, 2) or (batch, points, 2) of (row, column), got {_shape(coords)}")
    if coords.dim() == 3 and len(coords) != len(features):
        raise ValueError(
            f"coords must be the same batch as features, got {_shape(coords)} for features of {len(features)} images"
        )
    if 0 in coords.shape:
        raise ValueError(f"coords is empty: {_shape(coords)}")
    if coords.device != features.device:
        raise ValueError(f"coords is on {coords.device} but features is on {features.device}; move one of them")
    if not coords.is_floating_point():
        raise ValueError(
            f"coords must be floating point in the unit square, got {coords.dtype}; "
            "the centre of pixel (i, j) is ((i + 0.5) / height, (j + 0.5) / width)"
        )
    outside = ~((coords >= 0) & (coords <= 1)).all(-1)
    if outside.any():
        first = [round(value, 4) for value in coords[outside][0].tolist()]
        raise ValueError(
            f"coords must lie in the image, from 0 to 1 along each axis: {int(outside.sum())} of {outside.numel()} "
            f"points do not, the first is (row, column) = {tuple(first)}; divide pixel positions by height and width"
        )
    return coords.to(torch.promote_types(coords.dtype, torch.float32))


def check_no_whole_output(model: nn.Module, way: str) -> None:
    """Refuses fillers that need the whole output, if it is made in parts.

    `way` completes the message: what is not possible, and the way out.
    """
    for hook in ("refiner", "temporal"):
        if getattr(model, hook).needs_whole_output:
            name = type(getattr(model, hook)).__name__
            raise ValueError(f"{hook}={name} needs the whole output, so it cannot {way}, or use {hook}=none")


def check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses an `out` that the output cannot be written into (TypeError, ValueError)."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch tensor (torch.from_numpy of a memory map), got {type(out).__name__}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {_shape(out)}")
    if not out.is_floating_point():
        raise ValueError(f"out must be floating point, got {out.dtype}")
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError("out requires a gradient; pass a plain buffer, or no out")


def check_no_state(state: object | None, return_state: bool) -> None:
    """Refuses the state of a video if the output is written in bands (ValueError)."""
    if state is not None or return_state:
        raise ValueError(
            "state= and return_state= do not work with out=, which is written in bands: call the model without out="
        )


def check_head(head: object, features: Tensor) -> tuple[Tensor, Tensor | None]:
    """Checks a linear head on C channels -> its weight (K,C), and its bias (K,) or None.

    Raises:
        TypeError, ValueError: it is no such head; the message says what it may be.
    """
    if isinstance(head, (nn.Linear, nn.Conv2d)):
        weight, bias = head.weight, head.bias
        if isinstance(head, nn.Conv2d) and not _is_pointwise(head):
            raise ValueError(f"head must be linear in each pixel, got {head}; call it on the model's output")
        weight = weight.flatten(1)
    elif isinstance(head, tuple) and len(head) == 2 and isinstance(head[0], Tensor):
        weight, bias = head
    else:
        raise TypeError(f"head must be nn.Linear, nn.Conv2d of 1x1, or (weight, bias), got {type(head).__name__}")
    if weight.dim() != 2 or weight.shape[1] != features.shape[1]:
        raise ValueError(f"head has weight {_shape(weight)}, but features have {features.shape[1]} channels")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"head has bias {_shape(bias)} for {len(weight)} outputs")
    return weight, bias


def _is_pointwise(head: nn.Conv2d) -> bool:
    moved = head.stride != (1, 1) or head.padding not in ((0, 0), "valid", "same")
    return head.kernel_size == (1, 1) and head.groups == 1 and not moved


def check_linear(model: nn.Module) -> None:
    """Refuses fillers whose output is not linear in the features, with the same map in all channels (ValueError)."""
    if not model.attention.linear_in_values:
        raise ValueError(
            f"attention={type(model.attention).__name__} does not give a cell one weight in all channels, so the head "
            "cannot be applied first: call the head on the model's output"
        )
    for hook in ("decoder", "refiner", "temporal"):
        filler = getattr(model, hook)
        if not filler.linear_in_values:
            raise ValueError(
                f"{hook}={type(filler).__name__} is not linear in the features, so the head cannot be applied first: "
                f"call the head on the model's output, or use {hook}=none"
            )


def check_filled(model: nn.Module, hook: str, result: object, shape: tuple[int, ...]) -> Tensor:
    """Returns a filler's result; refuses one without the shape that its hook point promises (TypeError, ValueError)."""
    name = type(getattr(model, hook)).__name__
    if not isinstance(result, Tensor):
        raise TypeError(f"{hook} {name} must return a tensor of shape {shape}, got {type(result).__name__}")
    if tuple(result.shape) != shape:
        raise ValueError(f"{hook} {name} must return shape {shape}, got {_shape(result)}")
    return result


def check_pair(temporal: nn.Module, answer: object) -> tuple[Tensor, object]:
    """Returns a temporal filler's answer; refuses one that is not (output, state) (TypeError)."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise TypeError(f"temporal {type(temporal).__name__} must return (output, state), got {type(answer).__name__}")
    return answer


def check_losses(owner: nn.Module, losses: object) -> dict[str, Tensor]:
    """Returns the losses of a filler; refuses what is not a dict of scalars (TypeError, ValueError)."""
    name = f"{getattr(owner, 'hook', '')} {type(owner).__name__}".strip()
    if not isinstance(losses, dict):
        raise TypeError(f"{name} must return a dict of scalar losses, got {type(losses).__name__}")
    for key, loss in losses.items():
        if not isinstance(loss, Tensor) or loss.dim():
            raise ValueError(
                f"{name}: {key} must be a scalar tensor, got {getattr(loss, 'shape', type(loss).__name__)}"
            )
    return losses


def _check_dtypes(model: nn.Module, image: Tensor, features: Tensor) -> None:
    weight = next(model.parameters())
    for name, tensor in (("image", image), ("features", features)):
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} but the model is on {weight.device}; move one of them")
        if not tensor.is_floating_point():
            advice = "; divide by 255 and call core.imagenet_normalize" if name == "image" else ""
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}{advice}")
        if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
            raise ValueError(
                f"{name} is {tensor.dtype} but the model is {weight.dtype}; convert one of them "
                f"({name}.to({weight.dtype})), or use torch.autocast"
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
