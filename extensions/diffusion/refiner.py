"""The hook point's filler: sampling, its loss in training, and its pictures. The idea: the package's docstring."""

import inspect
import math
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batch import Batch, Context
from core.hooks import GATE_LR_SCALE, Refiner
from core.registry import register
from core.streams import generator
from core.uncertainty import rarity
from extensions.diffusion.condition import Condition, cropped, noise
from extensions.diffusion.coordinates import Basis, added, around, basis_of, coordinates
from extensions.diffusion.schedule import (
    TRAIN_STEPS,
    angle_at,
    angles,
    numpy_of_tensors,
    scheduler_classes,
    scheduler_of,
)
from extensions.diffusion.unet import in_tiles, make_unet

MAX_STEPS = 50
NOISY_NEIGHBOURS = 3
"""Side of the window of noisy vectors that are mixed."""
GUIDANCE_CHANNELS = 8
PICTURE_SIDE = 256
MAX_PICTURES = 4  # of steps


class Prediction(Enum):
    """What the network's mixture stands for."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


@register("diffusion")
class DiffusionRefiner(Refiner):
    """Adds a residual, sampled by conditional diffusion; see the module's docstring.

    Args:
        hidden_dim: width of the UNet at the refinement grid, twice that at half of it; a multiple of 8.
        num_directions: K, coordinates that are refined; fewer where the features have fewer.
        refine_scale: side of the refinement grid, relative to the feature grid; at most the output's.
        window: side of the square of cells around each point that are mixed; odd.
        prediction: what the network's mixture stands for: noise, v (Salimans and Ho, 2202.00512), or the residual.
            Noise says little near strength 1, where nothing is left of the signal.
        min_snr_gamma: limit of the loss weight; None: the plain loss of the prediction.
        num_levels: noise levels of each target in a training step; the UNet is cheap beside the core.
        num_inference_steps: denoising steps, 1 to 50; 0 gives the baseline.
        strength: share of the noise schedule that is added to the initial output, 0 to 1; 0 gives the baseline. It is
            rounded to n of m equal steps, with n = num_inference_steps; n is at most 1000 · strength.
        scheduler: class of diffusers that makes the steps, such as DDIMScheduler, DPMSolverMultistepScheduler, or
            FlowMatchEulerDiscreteScheduler (flow matching).
        num_samples: samples that are averaged; `spread` then has their standard deviation.
        uncertain_share: share of the points that are refined: those where the output is least certain
            (`core.uncertainty.rarity` of the cells, enlarged); 1: all.
        tile: side of the tiles that the UNet sees, in points of the refinement grid; larger grids are cut into tiles
            with an overlap of a quarter, blended in each step.

    Raises:
        ValueError: a setting is out of range, or there is no such scheduler; the message lists those that there are.
    """

    needs_guidance = True
    changeable = (
        "num_directions",
        "num_inference_steps",
        "strength",
        "scheduler",
        "num_samples",
        "uncertain_share",
        "tile",
    )
    lr_scales = {"gate": GATE_LR_SCALE}  # noqa: RUF012

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int = 32,
        num_directions: int = 32,
        refine_scale: int = 2,
        window: int = 5,
        prediction: Prediction = Prediction.v_prediction,
        min_snr_gamma: float | None = 5.0,
        num_levels: int = 4,
        num_inference_steps: int = 10,
        strength: float = 0.5,
        scheduler: str = "DDIMScheduler",
        num_samples: int = 1,
        uncertain_share: float = 1.0,
        tile: int = 64,
    ):
        super().__init__()
        _check(
            ("num_inference_steps", num_inference_steps, 0 <= num_inference_steps <= MAX_STEPS, f"0 to {MAX_STEPS}"),
            ("strength", strength, 0 <= strength <= 1, "0 to 1 (0: the initial output as it is, 1: from noise)"),
            ("num_samples", num_samples, num_samples >= 1, "at least 1"),
            ("uncertain_share", uncertain_share, 0 < uncertain_share <= 1, "above 0, to 1 (all points)"),
            ("tile", tile, tile >= 8 and tile % 4 == 0, "a multiple of 4, at least 8"),
            ("hidden_dim", hidden_dim, hidden_dim >= 8 and hidden_dim % 8 == 0, "a multiple of 8"),
            ("num_directions", num_directions, num_directions >= 1, "at least 1"),
            ("refine_scale", refine_scale, refine_scale >= 1, "at least 1"),
            ("window", window, window >= 1 and window % 2 == 1, "odd, at least 1"),
            ("num_levels", num_levels, num_levels >= 1, "at least 1"),
            ("min_snr_gamma", min_snr_gamma, min_snr_gamma is None or min_snr_gamma > 0, "above 0, or null"),
        )
        self.num_directions, self.refine_scale, self.window = num_directions, refine_scale, window
        self.prediction, self.min_snr_gamma, self.num_levels = prediction, min_snr_gamma, num_levels
        self.num_inference_steps, self.strength, self.scheduler = num_inference_steps, strength, scheduler
        self.num_samples, self.uncertain_share, self.tile = num_samples, uncertain_share, tile
        scheduler_classes(scheduler)
        self.project = nn.Conv2d(embed_dim, GUIDANCE_CHANNELS, 1, bias=False)
        self.unet = make_unet(4 * window**2 + GUIDANCE_CHANNELS + 1, window**2 + NOISY_NEIGHBOURS**2, hidden_dim)
        self.gate = nn.Parameter(torch.zeros(()))
        self.spread: Tensor | None = None
        """(B,gh,gw): standard deviation of the samples of the latest forward without gradients, as a length in feature
        space; None for one sample."""
        self._steps: list[Tensor] = []
        self._condition: Condition | None = None

    def __getstate__(self):
        return self.__dict__ | {"_condition": None}  # copies of the module must not copy a graph

    def forward(self, output: Tensor, context: Context) -> Tensor:
        if self.training:
            if torch.is_grad_enabled():
                self._condition = self._known(output, context, basis_of(context.features, self.num_directions))
            return output
        if self.strength == 0 or self.num_inference_steps == 0:
            self.spread, self._steps = None, []
            return output
        basis = basis_of(context.features, self.num_directions)
        condition = self._known(output, context, basis)
        residual = self._samples(condition, basis, context)
        if self.uncertain_share < 1:
            residual = residual * most_uncertain(context.features, tuple(residual.shape[-2:]), self.uncertain_share)
        return added(output, residual * basis.deviation[..., None, None], basis.directions)

    def auxiliary_loss(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Weighted squared error of the estimated residual, relative to the features' variance: `denoising_loss`."""
        condition, self._condition = self._condition, None
        if condition is None:
            return {}
        random = Context(batch.image, batch.features, output, generator=batch.generator or generator("denoising_loss"))
        basis = basis_of(batch.features, self.num_directions)
        grid, crops = tuple(condition.initial.shape[-2:]), 1
        target = batch.target.to(output.dtype)
        if batch.corners is not None:
            if grid != tuple(batch.output_size):
                raise ValueError(
                    f"refiner=diffusion refines on a grid of {grid}, but crops lie in an output of "
                    f"{tuple(batch.output_size)}: set refiner.refine_scale to views.scale or more, or views.crops=0"
                )
            crops = len(target) // len(output)
            condition = cropped(condition, batch)
            basis = Basis(*(part.repeat_interleave(crops, 0) for part in basis))
        clean = coordinates(F.adaptive_avg_pool2d(target, condition.initial.shape[-2:]), basis)
        clean = (clean - condition.initial).detach()  # (N,K,gh,gw)
        if self.num_levels > 1:
            clean = clean.repeat(self.num_levels, 1, 1, 1)  # (L·N,K,gh,gw); from here on N is L·N
            condition = condition.repeated(self.num_levels)
        order = torch.randperm(len(clean), generator=random.generator)  # levels are spread evenly over the schedule
        level = ((order + torch.rand(len(clean), generator=random.generator)) * (TRAIN_STEPS / len(clean))).long()
        angle = angles().to(clean)[level.to(clean.device)]  # (N,)
        signal, noise_share = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        noisy = signal * clean + noise_share * noise(condition, random)
        error = (self.estimate(condition, noisy, angle) - clean).square().mean((2, 3))  # (N,K)
        return {"denoising_loss": (self.loss_weight(angle) * (error * condition.variance).sum(1)).mean()}

    def loss_weight(self, angle: Tensor) -> Tensor:
        """Weight of the residual's squared error at each noise level.

        A squared error of the noise is SNR times that of the residual, one of v is SNR + 1 times. Min-SNR limits this
        factor to gamma.
        """
        snr = angle.tan().square().reciprocal()
        factor = {Prediction.epsilon: snr, Prediction.v_prediction: snr + 1, Prediction.sample: torch.ones_like(snr)}
        if self.min_snr_gamma is None:
            return factor[self.prediction]
        return (snr + 1 if self.prediction is Prediction.v_prediction else snr).clamp(max=self.min_snr_gamma)

    def pictures(self) -> dict[str, Tensor]:
        """The leading three coordinates as RGB: initial output, up to four steps' estimates; spread of samples."""
        if not self._steps:
            return {}
        steps = torch.stack(self._steps)  # (steps+1,3,gh,gw)
        low, high = steps[0].amin((1, 2)), steps[0].amax((1, 2))
        size = [min(side, PICTURE_SIDE) for side in steps.shape[-2:]]
        shown = (steps - low[:, None, None]) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)[:, None, None]
        shown = F.adaptive_avg_pool2d(shown.clamp(0, 1), size)
        count = len(steps) - 1
        drawn = sorted({round(i * count / min(count, MAX_PICTURES)) for i in range(1, min(count, MAX_PICTURES) + 1)})
        pictures = {"initial output": shown[0]} | {f"step {i} of {count}": shown[i] for i in drawn}
        if self.spread is not None:
            spread = F.adaptive_avg_pool2d(self.spread[:1].float(), size)
            largest = spread.max().item()
            pictures[f"spread of samples / {largest:.2g}"] = (
                spread / max(largest, torch.finfo(spread.dtype).tiny)
            ).expand(3, -1, -1)
        return pictures

    # What the denoiser knows

    def _known(self, output: Tensor, context: Context, basis: Basis) -> Condition:
        features, sides = context.features, context.features.shape[-2:]
        grid = tuple(min(out, self.refine_scale * side) for out, side in zip(output.shape[-2:], sides, strict=True))
        cells = coordinates(features, basis)  # (B,K,h,w)
        initial = coordinates(F.adaptive_avg_pool2d(output, grid), basis)  # (B,K,gh,gw)
        differences = around(cells, self.window, grid) - initial[:, :, None]  # (B,K,M,gh,gw)
        variance = basis.deviation.square()
        variance = variance / variance.sum(1, keepdim=True).clamp(min=torch.finfo(variance.dtype).tiny)
        inputs = [(differences.square() * variance[..., None, None, None]).sum(1).log1p()]
        for one, seen in ((context.image, nn.Identity()), (context.guidance, self._projected)):
            fine = seen(F.adaptive_avg_pool2d(one, grid))
            coarse = around(seen(F.adaptive_avg_pool2d(one, sides)), self.window, grid)
            inputs.append((coarse - fine[:, :, None]).square().mean(1).log1p())  # (B,M,gh,gw)
        inputs.append(fine)
        fixed = torch.cat([one.to(initial.dtype) for one in inputs], 1)
        return Condition(fixed, differences.flatten(1, 2), initial, cells.flatten(2).mT, variance)

    def _projected(self, guidance: Tensor) -> Tensor:
        """(B,D,gh,gw) -> (B,8,gh,gw), of guidance scaled to root mean square 1 at each point."""
        return self.project(F.rms_norm(guidance.movedim(1, -1), guidance.shape[1:2]).movedim(-1, 1))

    # The denoiser

    def estimate(self, condition: Condition, noisy: Tensor, angle: Tensor) -> Tensor:
        """The clean residual, from (N,K,gh,gw) signal·residual + noise, and (N,) noise levels -> (N,K,gh,gw)."""
        differences = condition.differences.unflatten(1, (noisy.shape[1], -1))  # (N,K,M,gh,gw)
        scale = condition.rank.to(noisy.dtype)
        products = (differences * noisy[:, :, None]).sum(1) / scale.sqrt()  # (N,M,gh,gw)
        energy = noisy.square().sum(1, keepdim=True) / scale
        written = in_tiles(self.unet, torch.cat([condition.fixed, products, energy], 1), angle, self.tile).to(
            noisy.dtype
        )
        of_cells, of_noisy = written.split([self.window**2, NOISY_NEIGHBOURS**2], 1)
        near = around(noisy, NOISY_NEIGHBOURS, tuple(noisy.shape[-2:]))  # (N,K,9,gh,gw)
        mixed = (differences * of_cells[:, None]).sum(2) + (near * of_noisy[:, None]).sum(2)
        signal, share = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        if self.prediction is Prediction.epsilon:
            mixed = (noisy - share * mixed) / signal
        elif self.prediction is Prediction.v_prediction:
            mixed = signal * noisy - share * mixed
        return self.gate.to(noisy.dtype) * mixed

    # Sampling

    def _samples(self, condition: Condition, basis: Basis, context: Context) -> Tensor:
        """The mean of the samples, (B,K,gh,gw); keeps their spread and the first one's steps."""
        draws = torch.stack(  # image by image, so that an image's noise does not depend on those after it
            [
                torch.cat([noise(condition.part(slice(i, i + 1)), context) for _ in range(self.num_samples)])
                for i in range(len(condition.initial))
            ],
            1,
        )
        keeps = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        samples = []
        for i, start in enumerate(draws):
            estimates = self._denoised(condition, start, context)
            samples.append(estimates[-1])
            if keeps and i == 0:
                scale = basis.deviation[0, :3, None, None]
                shown = [condition.initial[0, :3] * scale, *((condition.initial + e)[0, :3] * scale for e in estimates)]
                self._steps = [F.pad(one, (0, 0, 0, 0, 0, 3 - len(one))) for one in shown]
        samples = torch.stack(samples)  # (S,B,K,gh,gw)
        if keeps:
            variance = samples.var(0) if len(samples) > 1 else None
            weight = basis.deviation.square()[..., None, None]
            self.spread = None if variance is None else (variance * weight).sum(1).sqrt()
        return samples.mean(0)

    def _denoised(self, condition: Condition, start: Tensor, context: Context) -> list[Tensor]:
        """The estimates of all steps from (B,K,gh,gw) noise; the last one is the sample."""
        steps = min(self.num_inference_steps, math.ceil(self.strength * TRAIN_STEPS))
        whole = max(steps, min(round(steps / self.strength), TRAIN_STEPS))  # steps from pure noise, of which ...
        scheduler, flows = scheduler_of(self.scheduler, whole, start.device)
        first = (whole - steps) * scheduler.order  # ... these are left out
        timesteps = scheduler.timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        nothing = torch.zeros_like(start)
        if flows:
            x = scheduler.scale_noise(nothing, timesteps[:1], start)
        else:
            x = scheduler.add_noise(nothing, start, timesteps[:1])
        more = {"generator": context.generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        estimates = []
        for i, timestep in enumerate(timesteps):
            if flows:
                share = scheduler.sigmas[first + i].to(x)
                angle = torch.atan2(share, 1 - share)
                noisy = x / torch.hypot(share, 1 - share)
            else:
                angle = angle_at(timestep).to(x)
                noisy = scheduler.scale_model_input(x, timestep)
            clean = self.estimate(condition, noisy, angle.expand(len(x)))
            estimates.append(clean)
            if i + 1 < len(timesteps):
                away = (x - clean) / share if flows else (noisy - angle.cos() * clean) / angle.sin()
                with numpy_of_tensors():
                    x = scheduler.step(away, timestep, x, **more).prev_sample.to(start.dtype)
        return estimates


@torch.no_grad()
def most_uncertain(features: Tensor, grid: tuple[int, int], share: float) -> Tensor:
    """(B,C,h,w) -> (B,1,*grid): 1 at the least certain `share` of each image's points (at least one), else 0."""
    rare = F.interpolate(rarity(features), grid, mode="bilinear")  # (B,1,gh,gw)
    count = max(1, round(share * grid[0] * grid[1]))
    chosen = rare.flatten(1).topk(count, 1).indices  # (B,count)
    return torch.zeros_like(rare).flatten(1).scatter_(1, chosen, 1.0).view_as(rare)


def _check(*settings: tuple[str, object, bool, str]) -> None:
    for name, value, right, expected in settings:
        if not right:
            raise ValueError(f"refiner=diffusion: {name} must be {expected}, got {value}")
