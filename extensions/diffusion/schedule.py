"""Noise levels of the training, and the schedulers of diffusers that sample along them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

TRAIN_STEPS = 1000
"""Noise levels of the schedule in training (squared cosine, Nichol and Dhariwal, arXiv 2102.09672)."""
UNSUITABLE = {
    "EDMEulerScheduler": "it has a noise schedule of its own",
    "DPMSolverSDEScheduler": "it draws random numbers of its own",
    "PNDMScheduler": "its first steps repeat, so that they cannot start from a partly noised output",
}
FLOW = "FlowMatchEulerDiscreteScheduler"


@cache
def angles() -> Tensor:
    """(1000,) float64: noise levels of the training schedule; tan = noise / signal."""
    scheduler, _ = scheduler_of("DDIMScheduler")
    signal = scheduler.alphas_cumprod.double()
    return torch.atan2((1 - signal).sqrt(), signal.sqrt())


def angle_at(timestep: Tensor) -> Tensor:
    """The noise level at a step of a sampler; between two of the training's, noise / signal is interpolated."""
    ratio, position = angles().tan(), timestep.double().cpu().clamp(0, TRAIN_STEPS - 1)
    below = position.floor().long()
    above = (below + 1).clamp(max=TRAIN_STEPS - 1)
    return torch.atan(torch.lerp(ratio[below], ratio[above], position - below))


def scheduler_classes(name: str) -> dict[str, type]:
    """Schedulers by name, `name` among them: those that diffusers calls compatible with DDIM, and flow matching.

    Raises:
        ValueError: `name` is none of them.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    found = {cls.__name__: cls for cls in (*DDIMScheduler().compatibles, FlowMatchEulerDiscreteScheduler)}
    suitable = {key: cls for key, cls in found.items() if key not in UNSUITABLE}
    if name not in suitable:
        reason = f" ({UNSUITABLE[name]})" if name in UNSUITABLE else ""
        raise ValueError(
            f"refiner=diffusion: scheduler {name!r} is not to be had{reason}; there are: {', '.join(sorted(suitable))}"
        )
    return suitable


def scheduler_of(name: str, steps: int = TRAIN_STEPS, device: torch.device | str = "cpu") -> tuple[Any, bool]:
    """A new scheduler of diffusers, set to that many steps from pure noise; and whether it is one of flow matching."""
    from diffusers import DDIMScheduler

    cls = scheduler_classes(name)[name]
    if name == FLOW:
        flow = cls(num_train_timesteps=TRAIN_STEPS)
        flow.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], device=device)
        return flow, True
    plain = DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        prediction_type="epsilon",
        timestep_spacing="trailing",  # the first step is from pure noise, whatever their number
    )
    with numpy_of_tensors():
        scheduler = cls.from_config(plain.config, lower_order_final=True)
        scheduler.set_timesteps(steps, device=device)
    return scheduler, False


@contextmanager
def numpy_of_tensors() -> Iterator[None]:
    """Several schedulers hand tensors to NumPy, which version 2 complains of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        yield
