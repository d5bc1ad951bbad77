"""`refiner=diffusion`: adds a sampled residual to the initial upsampling, in few denoising steps.

Attention gives close to the mean of what the features may be, so detail is missing. Here a diffusion model samples what
is missing: the residual (target - initial output), as CorrDiff does (Mardani et al., arXiv 2309.15214).

- Any C: the residual lives in K whitened coordinates: the leading principal directions of the image's own
  low-resolution features, each divided by its standard deviation. The complement passes unchanged.
- The denoiser is a field of mixing weights. A light UNet of diffusers' blocks sees only inner products of vectors of
  coordinates, and the guidance. It writes, for each point, weights of differences to the cells around it and of the
  noisy neighbours; the same weights serve all K coordinates. So signs and order of the directions, and rotations of
  directions with equal variance, change nothing (of the image or its samples: the noise is drawn relative to the
  features). One run serves all coordinates. Not invariant: where equal variances straddle the K-th direction, the
  subspace itself is arbitrary.
- Conditioning: initial output and cells (their distances in feature space at each point), encoded guidance and image
  (their values, and their distances to the cells, as in a joint bilateral filter).
- Start: at `strength` s the residual 0, noised to the share s of the noise schedule: the partly noised initial output.
  The result is the denoiser's last estimate of the clean residual, which is what the last step of each sampler
  returns.
- The network is conditioned on the noise level alone (angle: tan = noise / signal). So one training serves all
  samplers, variance-preserving, variance-exploding or flow matching: they differ in scale only.
- Neutral start: the estimate is multiplied by a gate that starts at zero, so the correction is zero, exactly. The gate
  opens by the auxiliary loss. It needs no sampling: the target's residual at random noise levels, noise or
  v-prediction, min-SNR weights (Hang et al., arXiv 2303.09556), the error measured in feature space.

In training mode the refiner returns its input. The objective then trains the initial output (or freeze the core), and
the auxiliary loss trains the refiner; gradients reach the core through the conditioning only.

A single sample has a larger squared error than the mean of samples, and that is close to one step from pure noise
(`num_inference_steps=1`, `strength=1`: the mean predictor). To judge a refinement, compare it with those.

Refinement is made on a grid of at most `refine_scale` times the feature grid; coordinates of the residual are then
interpolated bilinearly. The correction of a larger output is thus smooth below that grid.

Status: measured after a few hundred steps (configs/experiment/diffusion.yaml): samples hurt detail and error. The mean
predictor lowers the error, beyond what blur gives, and is not shown to change detail.
"""

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batch import Batch, Context, crops_of
from core.hooks import GATE_LR_SCALE, Refiner
from core.registry import register
from core.streams import generator
from core.uncertainty import rarity

MAX_STEPS = 50
TRAIN_STEPS = 1000
"""Noise levels of the schedule in training (squared cosine, Nichol and Dhariwal, arXiv 2102.09672)."""
RANK_TOLERANCE = 1e-5
"""Directions with less variance than this share of the largest are rounding errors: they are left alone."""
NOISY_NEIGHBOURS = 3
"""Side of the window of noisy vectors that are mixed."""
GUIDANCE_CHANNELS = 8
PICTURE_SIDE = 256


class Prediction(Enum):
    """What the network's mixture stands for."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"
    sample = "sample"


class Basis(NamedTuple):
    """Whitened coordinates of an image's features."""

    mean: Tensor
    """(B,C,1)."""
    directions: Tensor
    """(B,C,K): orthonormal, leading first."""
    deviation: Tensor
    """(B,K): standard deviation of the cells along each direction; zero: the direction is not used."""


@dataclass
class Condition:
    """What the denoiser knows of N images (or crops), on the refinement grid (gh,gw)."""

    fixed: Tensor
    """(N,S,gh,gw): the network's inputs that do not depend on the noisy residual."""
    differences: Tensor
    """(N,K·M,gh,gw): coordinates of the M cells around each point, minus those of the initial output there."""
    initial: Tensor
    """(N,K,gh,gw): coordinates of the initial output."""
    cells: Tensor
    """(N,h·w,K): coordinates of the cells; identity covariance in used directions."""
    variance: Tensor
    """(N,K): share of each direction in the variance; sums to 1."""

    @property
    def rank(self) -> Tensor:
        """(N,1,1,1): number of used directions, at least 1."""
        return (self.variance > 0).sum(1).clamp(min=1)[:, None, None, None]

    def part(self, index: slice) -> "Condition":
        return Condition(*(getattr(self, one.name)[index] for one in fields(self)))

    def repeated(self, times: int) -> "Condition":
        parts = (getattr(self, one.name) for one in fields(self))
        return Condition(*(part.repeat(times, *[1] * (part.dim() - 1)) for part in parts))


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
    changeable = ("num_inference_steps", "strength", "scheduler", "num_samples", "uncertain_share", "tile")
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
        self.unet = _unet(4 * window**2 + GUIDANCE_CHANNELS + 1, window**2 + NOISY_NEIGHBOURS**2, hidden_dim)
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
        return _added(output, residual * basis.deviation[..., None, None], basis.directions)

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
            condition = _cropped(condition, batch)
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
        """The leading three coordinates as RGB: initial output, each step's estimate; and the spread of samples."""
        if not self._steps:
            return {}
        steps = torch.stack(self._steps)  # (steps+1,3,gh,gw)
        low, high = steps[0].amin((1, 2)), steps[0].amax((1, 2))
        size = [min(side, PICTURE_SIDE) for side in steps.shape[-2:]]
        shown = (steps - low[:, None, None]) / (high - low).clamp(min=torch.finfo(low.dtype).tiny)[:, None, None]
        strip = F.adaptive_avg_pool2d(shown.clamp(0, 1), size).permute(1, 2, 0, 3).flatten(2)  # side by side
        pictures = {f"initial output and estimates of {len(steps) - 1} steps": strip}
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
        written = self._tiled(torch.cat([condition.fixed, products, energy], 1), angle).to(noisy.dtype)
        of_cells, of_noisy = written.split([self.window**2, NOISY_NEIGHBOURS**2], 1)
        near = around(noisy, NOISY_NEIGHBOURS, tuple(noisy.shape[-2:]))  # (N,K,9,gh,gw)
        mixed = (differences * of_cells[:, None]).sum(2) + (near * of_noisy[:, None]).sum(2)
        signal, share = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        if self.prediction is Prediction.epsilon:
            mixed = (noisy - share * mixed) / signal
        elif self.prediction is Prediction.v_prediction:
            mixed = signal * noisy - share * mixed
        return self.gate.to(noisy.dtype) * mixed

    def _tiled(self, inputs: Tensor, angle: Tensor) -> Tensor:
        """The UNet on tiles that overlap, blended by weights that fall to their borders (as MultiDiffusion, Bar-Tal et
        al., arXiv 2302.08113, in each step; here it is the mixing weights that are blended)."""
        height, width = inputs.shape[-2:]
        rows, columns = tiles(height, self.tile), tiles(width, self.tile)
        if len(rows) == len(columns) == 1:
            return self._run(inputs, angle)
        total: Tensor | float = 0.0
        for row, row_weight in rows:
            for column, column_weight in columns:
                written = self._run(inputs[..., row, column], angle)
                weight = (row_weight[:, None] * column_weight).to(written)
                around_it = (column.start, width - column.stop, row.start, height - row.stop)
                total = total + F.pad(written * weight, around_it)
        return total

    def _run(self, inputs: Tensor, angle: Tensor) -> Tensor:
        height, width = inputs.shape[-2:]
        inputs = F.pad(inputs, (0, width % 2, 0, height % 2), mode="replicate")  # the UNet halves its grid once
        level = angle.float() * (2 / math.pi * TRAIN_STEPS)
        return self.unet(inputs.to(self.project.weight.dtype), level).sample[..., :height, :width]

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
                with _numpy_of_tensors():
                    x = scheduler.step(away, timestep, x, **more).prev_sample.to(start.dtype)
        return estimates


@torch.no_grad()
def most_uncertain(features: Tensor, grid: tuple[int, int], share: float) -> Tensor:
    """(B,C,h,w) -> (B,1,*grid): 1 at the least certain `share` of each image's points (at least one), else 0."""
    rare = F.interpolate(rarity(features), grid, mode="bilinear")  # (B,1,gh,gw)
    count = max(1, round(share * grid[0] * grid[1]))
    chosen = rare.flatten(1).topk(count, 1).indices  # (B,count)
    return torch.zeros_like(rare).flatten(1).scatter_(1, chosen, 1.0).view_as(rare)


# Coordinates


@torch.no_grad()
def basis_of(features: Tensor, num_directions: int) -> Basis:
    """The leading principal directions of each image's (B,C,h,w) features, in double precision."""
    with torch.autocast(features.device.type, enabled=False):
        vectors = features.flatten(2).double()  # (B,C,n)
        mean = vectors.mean(2, keepdim=True)
        centred = vectors - mean
        channels, cells = centred.shape[1:]
        few = min(num_directions, channels, cells - 1)
        wide = channels > cells
        gram = (centred.mT @ centred if wide else centred @ centred.mT) / cells  # of the smaller side
        variance, vectors = torch.linalg.eigh(gram)  # ascending
        variance, vectors = variance[:, -few:].flip(1), vectors[..., -few:].flip(2)
        used = variance > (RANK_TOLERANCE * variance[:, :1]).clamp(min=torch.finfo(torch.float32).tiny)
        deviation = torch.where(used, variance, 0).sqrt()
        if wide:
            inverse = torch.where(used, 1 / deviation, 0)
            vectors = centred @ vectors * (inverse / math.sqrt(cells))[:, None]
        dtype = torch.promote_types(features.dtype, torch.float32)
        return Basis(mean.to(dtype), (vectors * used[:, None]).to(dtype), deviation.to(dtype))


def coordinates(x: Tensor, basis: Basis) -> Tensor:
    """Whitened coordinates of (B,C,gh,gw) vectors -> (B,K,gh,gw); zero along unused directions."""
    with torch.autocast(x.device.type, enabled=False):
        inverse = torch.where(basis.deviation > 0, 1 / basis.deviation, 0)
        found = basis.directions.mT @ (x.flatten(2).to(basis.mean.dtype) - basis.mean)  # (B,K,gh·gw)
        return (found * inverse[..., None]).unflatten(2, x.shape[-2:])


def _added(output: Tensor, along: Tensor, directions: Tensor) -> Tensor:
    """(B,C,Qh,Qw) output + (B,K,gh,gw) along (B,C,K) directions."""
    size = tuple(output.shape[-2:])
    if tuple(along.shape[-2:]) != size:
        along = F.interpolate(along, size, mode="bilinear", align_corners=False)
    pixels = output.permute(0, 2, 3, 1).flatten(1, 2)  # (B,Q,C), a view if the channels are last
    along, directions = along.flatten(2).mT.to(output.dtype), directions.mT.to(output.dtype)
    with torch.autocast(output.device.type, enabled=False):
        return torch.baddbmm(pixels, along, directions).unflatten(1, size).permute(0, 3, 1, 2)


def around(cells: Tensor, side: int, grid: tuple[int, int]) -> Tensor:
    """The side x side cells around the cell of each grid point: (B,K,h,w) -> (B,K,side²,gh,gw). Borders repeat."""
    size = cells.shape[-2:]
    padded = F.pad(cells, [side // 2] * 4, mode="replicate")
    found = padded.unfold(2, side, 1).unfold(3, side, 1).flatten(4).movedim(4, 2)  # (B,K,M,h,w)
    if tuple(size) == grid:
        return found
    rows, columns = (
        ((torch.arange(n, device=cells.device) + 0.5) * side_of / n).long()
        for n, side_of in zip(grid, size, strict=True)
    )
    return found.index_select(3, rows).index_select(4, columns)


def noise(condition: Condition, context: Context) -> Tensor:
    """Standard normal noise in whitened coordinates, (N,K,gh,gw), zero along unused directions.

    It is drawn relative to the cells: random combinations of them give orthonormal rows (a polar factor), along which
    the noise lies. So another basis of the same space gives the same noise, in its coordinates.
    """
    cells = condition.cells.double()  # (N,n,K)
    num, _, few = cells.shape
    random = context.noise_like(cells.new_empty(num, cells.shape[1], 2 * few))
    drawn = context.noise_like(condition.initial.new_empty(num, 2 * few, condition.initial[0, 0].numel()))
    with torch.autocast(drawn.device.type, enabled=False):
        left, _, right = torch.linalg.svd(cells.mT @ random, full_matrices=False)
        rows = (left @ right) * (condition.variance > 0)[..., None]  # (N,K,2·K), orthonormal
        return (rows.to(drawn.dtype) @ drawn).unflatten(2, condition.initial.shape[-2:])


def _cropped(condition: Condition, batch: Batch) -> Condition:
    """The condition of each of the batch's crops."""
    crops = len(batch.target) // len(condition.initial)
    repeated = {name: getattr(condition, name).repeat_interleave(crops, 0) for name in ("cells", "variance")}
    cut = {}
    for name in ("fixed", "differences", "initial"):
        whole = getattr(condition, name)
        size = batch.target[:, :1].expand(-1, whole.shape[1], -1, -1)
        cut[name] = crops_of(whole, replace(batch, target=size))
    return Condition(**cut, **repeated)


# Schedule, tiles, network


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


UNSUITABLE = {
    "EDMEulerScheduler": "it has a noise schedule of its own",
    "DPMSolverSDEScheduler": "it draws random numbers of its own",
    "PNDMScheduler": "its first steps repeat, so that they cannot start from a partly noised output",
}
FLOW = "FlowMatchEulerDiscreteScheduler"


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
    with _numpy_of_tensors():
        scheduler = cls.from_config(plain.config, lower_order_final=True)
        scheduler.set_timesteps(steps, device=device)
    return scheduler, False


@contextmanager
def _numpy_of_tensors() -> Iterator[None]:
    """Several schedulers hand tensors to NumPy, which version 2 complains of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)
        yield


def tiles(length: int, tile: int) -> list[tuple[slice, Tensor]]:
    """Tiles of one axis with an overlap of at least a quarter, and their blending weights, which sum to 1."""
    if length <= tile:
        return [(slice(0, length), torch.ones(length))]
    overlap = tile // 4
    count = math.ceil((length - overlap) / (tile - overlap))
    starts = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    inner = torch.arange(tile, dtype=torch.float32) + 0.5
    ramp = (torch.minimum(inner, tile - inner) / overlap).clamp(max=1)
    total = torch.zeros(length)
    for start in starts:
        total[start : start + tile] += ramp
    return [(slice(start, start + tile), ramp / total[start : start + tile]) for start in starts]


def _unet(inputs: int, outputs: int, width: int) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        in_channels=inputs,
        out_channels=outputs,
        block_out_channels=(width, 2 * width),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
    )


def _check(*settings: tuple[str, object, bool, str]) -> None:
    for name, value, right, expected in settings:
        if not right:
            raise ValueError(f"refiner=diffusion: {name} must be {expected}, got {value}")
