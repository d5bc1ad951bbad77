"""How exact the model is on a device: every way to run it, in every dtype, against the dense algorithm in float64.

The inputs are a photograph and its encoder's features, the weights trained ones: rounding that does not show on random
numbers shows there. What counts as exact enough follows from the same arithmetic: the released algorithm, run in the
same dtype on the same device, has an error too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core.backbones import backbone_from_config
from core.reference import ReferenceAnyUp, reference_of
from core.training import cosine_mse
from experiments.cost.benchmark_arms import gradient_of
from experiments.data.image_files import bundled, centre_square, read
from experiments.settings import DTYPES

WORSE = 2.0
"""An arm with so many times the error of the one it is judged by is called less accurate."""
_LOSS_SCALE = 2.0**10
"""Of losses before gradients are computed: they would be too small for float16; a power of two rounds nothing."""
_QUERIES_AT_ONCE = 4096
"""Of the dense algorithm, so that float64 fits."""


@dataclass(frozen=True)
class Inputs:
    """What the model is run on."""

    device: str
    weights: str
    """A checkpoint, ours or published."""
    backbone: Mapping[str, Any]
    """{name, weights, model} of the encoder whose features are upsampled."""
    photograph: str
    """A file, or the name of a bundled one."""
    image: int
    """Side in pixels of the square cut from the photograph; gradients are computed at half of it."""
    output: int
    """Side of the output."""


@dataclass(frozen=True)
class Check:
    """One line of the results."""

    check: str
    weights: str
    dtype: str
    arm: str
    l2: float | None = None
    """Norm of the error as a share of the result's norm."""
    largest: float | None = None
    """Largest error as a share of the largest result."""
    status: str = "ok"
    """ok, or what is wrong: `less accurate...`, `not deterministic...`, `failed...`."""


class Example:
    """Model, image and features of `inputs`, with the truth that float64 gives."""

    def __init__(self, inputs: Inputs, side: int, output: int):
        self.inputs, self.size = inputs, (output, output)
        device = torch.device(inputs.device)
        photograph = Path(inputs.photograph)
        pixels = read(photograph if photograph.suffix else bundled(inputs.photograph))  # (1,3,H,W)
        image = centre_square(pixels, side).to(device)  # (1,3,S,S)
        with torch.no_grad():
            self.features = backbone_from_config(dict(inputs.backbone)).to(device)(image).float()  # (1,C,h,w)
        self.image = core.imagenet_normalize(image)
        self.model = core.load(Path(inputs.weights).expanduser()).to(device)

    def run(self, network: nn.Module, dtype: torch.dtype) -> Tensor:
        """The output of a network with its weights and inputs in `dtype`, (1,C,Q,Q)."""
        network = network.to(dtype).eval()
        chunk = (_QUERIES_AT_ONCE,) if isinstance(network, ReferenceAnyUp) else ()
        with torch.inference_mode():
            return network(self.image.to(dtype), self.features.to(dtype), self.size, *chunk)

    def fresh(self) -> core.AnyUp:
        """Another model with the same weights: dtypes are changed in place."""
        return core.load(Path(self.inputs.weights).expanduser()).to(self.image.device)

    def truth(self) -> Tensor:
        """The output of the dense algorithm in float64, (1,C,Q,Q)."""
        return self.run(reference_of(self.model).double(), torch.float64)

    def gradient(self, network: nn.Module, dtype: torch.dtype) -> Tensor:
        """Of the training loss, by all weights, (N,): float32 weights under autocast, or float64."""
        network = network.to(torch.float64 if dtype == torch.float64 else torch.float32).train()
        precise = next(network.parameters()).dtype
        image, features = self.image.to(precise), self.features.to(precise)
        target = F.interpolate(features, self.size, mode="bilinear")
        network.zero_grad()
        with torch.autocast(image.device.type, dtype, enabled=dtype not in (torch.float32, torch.float64)):
            loss = cosine_mse(network(image, features, self.size), target)
        (loss * _LOSS_SCALE).backward()
        return gradient_of(network) / _LOSS_SCALE


def outputs(inputs: Inputs, dtype: str) -> list[Check]:
    """Forwards: the released algorithm and ours, in `dtype`, against float64."""
    example = Example(inputs, inputs.image, inputs.output)
    arms = {"released": lambda: reference_of(example.fresh()), "ours": example.fresh}
    results = {arm: partial(_run, example, make, dtype) for arm, make in arms.items()}
    return list(_judged("output", inputs, dtype, example.truth(), results))


def gradients(inputs: Inputs, dtype: str) -> list[Check]:
    """Gradients of all weights, of the released algorithm and of ours, under autocast to `dtype`, against float64."""
    example = Example(inputs, inputs.image // 2, inputs.output // 2)
    arms = {"released": reference_of(example.model), "ours": example.fresh()}
    truth = example.gradient(reference_of(example.model), torch.float64)
    results = {arm: partial(example.gradient, network, DTYPES[dtype]) for arm, network in arms.items()}
    return list(_judged("gradient", inputs, dtype, truth, results))


def determinism(inputs: Inputs, dtype: str) -> list[Check]:
    """The same forward, and the same gradients, twice: to the bit."""
    example, found = Example(inputs, inputs.image // 2, inputs.output // 2), []
    model = example.fresh()
    for check, call in (
        ("same gradient twice", partial(example.gradient, model, DTYPES[dtype])),
        ("same output twice", partial(example.run, model, DTYPES[dtype])),
    ):
        first, second = call().clone(), call()
        l2, largest = errors(second, first)
        status = "ok" if torch.equal(first, second) else "not deterministic"
        found.append(Check(check, Path(inputs.weights).stem, dtype, "ours", l2, largest, status))
    return found


def compiled(inputs: Inputs, dtype: str) -> list[Check]:
    """With compiled encoders, against float64; judged by ours."""
    return _other_way(inputs, dtype, "compiled", lambda model, *_: model.compile_encoders())


def exported(inputs: Inputs, dtype: str) -> list[Check]:
    """As a program of torch.export, against float64; judged by ours."""

    def program(model: core.AnyUp, *shown: object) -> nn.Module:
        with torch.no_grad():
            return torch.export.export(model, shown).module()

    return _other_way(inputs, dtype, "exported", program)


CHECKS: dict[str, Callable[[Inputs, str], list[Check]]] = {
    "outputs": outputs,
    "gradients": gradients,
    "determinism": determinism,
    "exported": exported,
    "compiled": compiled,
}
"""By name; each is done for one file of weights and one dtype."""


def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
    """(norm of the difference as a share of the norm of `truth`, its largest value as a share of the largest)."""
    away, truth = (result.double() - truth.double()).abs(), truth.double()
    return float(away.norm() / truth.norm()), float(away.max() / truth.abs().max())


def _run(example: Example, make: Callable[[], nn.Module], dtype: str) -> Tensor:
    return example.run(make(), DTYPES[dtype])


def _other_way(inputs: Inputs, dtype: str, arm: str, change: Callable[..., nn.Module]) -> list[Check]:
    """`change(model, image, features, size)` makes of the model what is called in its place."""
    example = Example(inputs, inputs.image, inputs.output)

    def changed() -> Tensor:
        given = (example.image.to(DTYPES[dtype]), example.features.to(DTYPES[dtype]), example.size)
        network = change(example.fresh().to(DTYPES[dtype]).eval(), *given)
        with torch.inference_mode():
            return network(*given)

    results = {"ours": partial(_run, example, example.fresh, dtype), arm: changed}
    return [found for found in _judged(arm, inputs, dtype, example.truth(), results) if found.arm == arm]


def _judged(
    check: str, inputs: Inputs, dtype: str, truth: Tensor, results: Mapping[str, Callable[[], Tensor]]
) -> Iterator[Check]:
    """The errors of each arm; the first is what the others are judged by."""
    yardstick: tuple[str, float] | None = None
    for arm, result in results.items():
        l2, largest = errors(result(), truth)
        status = "ok"
        if yardstick is None:
            yardstick = arm, l2
        elif not l2 <= WORSE * yardstick[1]:  # NaN too
            status = f"less accurate: {l2 / max(yardstick[1], 1e-300):.1f} times the error of {yardstick[0]}"
        yield Check(check, Path(inputs.weights).stem, dtype, arm, l2, largest, status)
