"""`objective=self_supervised`: three tasks that need no target, so that any folder of images will do.

- Feature inpainting (masked image modelling, BEiT, arXiv 2106.08254; MAE, 2111.06377): some cells of the features are
  hidden, the model upsamples what is left, and its output, pooled to the grid, must show the hidden cells. A hidden
  cell gets the mean of the image's visible cells, which any number of channels has.
- Multi-scale consistency (after FeatUp, 2403.10516, and stop-gradients of SimSiam, 2011.10566): the frozen encoder sees
  the image at several sizes. Features of each size, upsampled to one grid, must agree.
- Cross-modal alignment (InfoNCE, 1807.03748; both directions, as in CLIP, 2103.00020): the query of a cell, which comes
  from the image, must be most similar to the key of the same cell, which comes from the features. The negatives are the
  other cells of the image. So that features have to be read, this key sees the mean of the image branch, not the image.

A task with weight 0 is not computed. `reconstruction` adds the baseline's loss to a target, for a combination with
supervised training; then targets are made. With `reconstruction=1` and all others 0 it is `cosine_mse` without its
consistency terms, exactly.

Errors are squared, in units of the features' variance over the image: inpainting's mean vector has an error of 1.

Stop-gradients do not prevent blur: two smooth outputs agree better than two sharp ones. `diagnostics` measures it.

Status: measured (docs/self_supervised.md).
"""

from enum import Enum
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.batch import Batch, crops_of
from core.collapse import detail_variance, effective_rank, spatial_variance
from core.fast.norm_act_conv import without_autocast
from core.hooks import Objective
from core.registry import register
from core.training import cosine_mse, widened
from core.unifiers import NoUnifier


class Teachers(Enum):
    """Which outputs, their gradient stopped, teach which others in multi-scale consistency."""

    all = "all"
    finer = "finer"


@register("self_supervised")
class SelfSupervised(Objective):
    """Inpainting, multi-scale consistency and alignment, each with its weight; see the module's docstring.

    Args:
        inpainting, consistency, alignment: weights of the three tasks; 0: the task is not computed.
        reconstruction: weight of the baseline's loss to the target; 0: no target is made.
        mask_share: share of the cells that inpainting hides.
        mask_blocks: side in cells of the blocks that are hidden together; each image draws one. 1: single cells.
        scales: of the images that the encoder sees for consistency, relative to `views.view`; each at most
            `views.scale`.
        scales_per_step: how many of them a step draws; 0: all.
        teachers: `all`: each output is pulled to all others; `finer`: only to those of larger scales.
        temperature: of the similarities in alignment.
        key_sees_image: keys of alignment are those of the model, which see the image. The task can then be solved
            without the features.

    Alone, alignment trains neither attention nor what follows it. Several processes need a gradient for every weight:
    for this task alone, name those parts in `freeze`.

    Raises:
        ValueError: a setting is out of range, or no weight is positive.
    """

    def __init__(
        self,
        inpainting: float = 1.0,
        consistency: float = 1.0,
        alignment: float = 0.1,
        reconstruction: float = 0.0,
        mask_share: float = 0.3,
        mask_blocks: tuple[int, ...] = (1, 3),
        scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.5, 2.0),
        scales_per_step: int = 0,
        teachers: Teachers = Teachers.all,
        temperature: float = 0.1,
        key_sees_image: bool = False,
    ):
        super().__init__()
        weights = {"inpainting": inpainting, "consistency": consistency, "alignment": alignment}
        weights |= {"reconstruction": reconstruction}
        _check_settings(weights, mask_share, mask_blocks, scales, scales_per_step, temperature)
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.mask_share, self.mask_blocks = mask_share, tuple(mask_blocks)
        self.scales, self.scales_per_step = tuple(sorted(scales)), scales_per_step or len(scales)
        self.teachers, self.temperature, self.key_sees_image = Teachers(teachers), temperature, key_sees_image
        self.needs_output = self.needs_target = "reconstruction" in self.weights
        self.batch_parts = frozenset({"encoder", "high_resolution"} if "consistency" in self.weights else ())
        self._shown: dict[str, Tensor] = {}

    def forward(self, model: nn.Module, batch: Batch, output: Tensor | None) -> dict[str, Tensor]:
        random = batch.generator or torch.Generator().manual_seed(0)
        self._shown, losses = {}, {}
        for name, weight in self.weights.items():
            if name == "inpainting":
                loss = self._inpainting(model, batch, random)
            elif name == "consistency":
                loss = self._consistency(model, batch, random)
            elif name == "alignment":
                loss = self._alignment(model, batch)
            else:
                loss = cosine_mse(crops_of(output, batch), batch.target)
            losses[f"{name}_loss"] = weight * loss
        return losses

    @torch.no_grad()
    def diagnostics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Signs of collapse (`core.collapse`): `query_rank`, `key_rank`, `output_rank`; `query_variance`,
        `key_variance` of the embeddings as unit vectors; `output_variance`, in units of the features' variance; and
        `output_detail`, which blur lowers. Means over the images of the batch."""
        query, key = (widened(x) for x in _embeddings(model, batch, self.key_sees_image))  # (B,D,h,w)
        output = widened(model(batch.image, batch.features, batch.output_size))
        spread = spatial_variance(output)
        found = {
            "query_rank": effective_rank(query),
            "key_rank": effective_rank(key),
            "output_rank": effective_rank(output),
            "query_variance": spatial_variance(F.normalize(query, dim=1)),
            "key_variance": spatial_variance(F.normalize(key, dim=1)),
            "output_variance": spread / spatial_variance(widened(batch.features)),
            "output_detail": detail_variance(output, tuple(batch.features.shape[-2:])) / spread,
        }
        return {name: value.mean().item() for name, value in found.items()}

    def pictures(self) -> dict[str, Tensor]:
        """Of the first image of the latest step: which cells were hidden (black); the features and what was inpainted,
        in common colours; the probability that alignment gives to the right cell (white: 1), and the similarity of all
        queries (rows) to all keys."""
        shown = {}
        if "hidden" in self._shown:
            features, inpainted = _painted(self._shown["features"], self._shown["inpainted"])
            seen = (~self._shown["hidden"]).float().expand(3, -1, -1)
            shown |= {"visible cells": seen, "features": features, "inpainted": inpainted}
        if "similarity" in self._shown:
            similarity, grid = self._shown["similarity"], tuple(self._shown["grid"].tolist())
            right = (similarity / self.temperature).softmax(1).diagonal().unflatten(0, grid)
            for title, grey in (("probability of the right cell", right), ("similarity", (similarity + 1) / 2)):
                shown[title] = grey.clamp(0, 1).expand(3, -1, -1)
        return shown

    def _inpainting(self, model: nn.Module, batch: Batch, random: torch.Generator) -> Tensor:
        features = widened(batch.features)
        size, grid = len(features), tuple(features.shape[-2:])
        blocks = torch.tensor(self.mask_blocks)[torch.randint(len(self.mask_blocks), (size,), generator=random)]
        hidden = torch.stack([hidden_cells(grid, self.mask_share, block, random) for block in blocks.tolist()])
        hidden = hidden[:, None].to(features.device)  # (B,1,h,w)
        given = without_hidden(features, hidden).to(batch.features.dtype)
        output = widened(model(batch.image, given, batch.output_size, generator=random))
        pooled = F.interpolate(output, grid, mode="area")  # (B,C,h,w)
        kept = {"features": features[0], "inpainted": torch.where(hidden, pooled, features)[0], "hidden": hidden[0]}
        self._shown |= {name: tensor.detach() for name, tensor in kept.items()}
        return relative_error(pooled, features, features, hidden)

    def _consistency(self, model: nn.Module, batch: Batch, random: torch.Generator) -> Tensor:
        chosen = torch.randperm(len(self.scales), generator=random)[: self.scales_per_step].sort().values
        outputs = []
        for scale in (self.scales[i] for i in chosen.tolist()):
            features = at_scale(batch, scale, self)
            outputs.append(widened(model(batch.image, features, batch.output_size, generator=random)))
        return consistency(outputs, widened(batch.features), self.teachers)

    def _alignment(self, model: nn.Module, batch: Batch) -> Tensor:
        if isinstance(model.unifier, NoUnifier) and not self.key_sees_image:
            raise ValueError("unifier=none has no feature branch to align with the image: set objective.alignment=0")
        query, key = _embeddings(model, batch, self.key_sees_image)
        with without_autocast(query):
            similarity = similarities(widened(query), widened(key))
            self._shown |= {
                "similarity": similarity[0].detach(),
                "grid": torch.tensor(batch.features.shape[-2:]),
            }
            return info_nce(similarity, self.temperature)


def hidden_cells(grid: tuple[int, int], share: float, block: int, random: torch.Generator) -> Tensor:
    """(h,w) bool: `share` of the cells, to the nearest whole number and at least one, in blocks of `block` x `block`.

    Blocks lie on a grid with a random offset. They are hidden in random order, the last one perhaps in part.

    Raises:
        ValueError: no cell would be left.
    """
    height, width = grid
    count = max(1, int(share * height * width + 0.5))
    if count >= height * width:
        raise ValueError(
            f"objective.mask_share={share} hides all {height * width} cells of {height}x{width} features: lower it, or "
            "give the encoder larger images"
        )
    top, left = torch.randint(block, (2,), generator=random).tolist()
    order = torch.rand(-(-height // block) + 1, -(-width // block) + 1, generator=random)
    order = order.repeat_interleave(block, 0).repeat_interleave(block, 1)[top : top + height, left : left + width]
    cells = torch.randperm(height * width, generator=random)  # decides within a block
    cells = cells[order.flatten()[cells].argsort(stable=True)][:count]
    return torch.zeros(height * width, dtype=torch.bool).index_fill(0, cells, True).view(height, width)


def without_hidden(features: Tensor, hidden: Tensor) -> Tensor:
    """(B,C,h,w) features, (B,1,h,w) bool -> the same with each hidden cell replaced by the mean of the visible ones."""
    visible = (~hidden).to(features.dtype)
    mean = (features * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)  # (B,C,1,1)
    return torch.where(hidden, mean, features)


def relative_error(prediction: Tensor, target: Tensor, features: Tensor, where: Tensor | None = None) -> Tensor:
    """Squared error in units of the features' variance over their image; (B,C,H,W) -> scalar, mean over images.

    The variance counts as at least 1e-6 of the features' mean square, so an image of one colour gives a finite error.

    Args:
        prediction, target: (B,C,H,W). features: (B,C,h,w).
        where: (B,1,H,W) bool, the cells whose error counts, at least one for each image; None: all.
    """
    error = (prediction - target).square().sum(1, keepdim=True)  # (B,1,H,W)
    where = torch.ones_like(error) if where is None else where.to(error.dtype)
    floor = 1e-6 * features.square().sum(1).mean((1, 2)) + torch.finfo(features.dtype).tiny
    unit = torch.maximum(spatial_variance(features), floor)  # (B,)
    return ((error * where).sum((1, 2, 3)) / where.sum((1, 2, 3)) / unit).mean()


def consistency(outputs: list[Tensor], features: Tensor, teachers: Teachers) -> Tensor:
    """Mean error of all pairs of (B,C,Qh,Qw) outputs, coarse to fine; no gradient flows into the one that teaches."""
    pairs = permutations(range(len(outputs)), 2)
    chosen = [(taught, teaches) for taught, teaches in pairs if teachers == Teachers.all or taught < teaches]
    return torch.stack([relative_error(outputs[i], outputs[j].detach(), features) for i, j in chosen]).mean()


def at_scale(batch: Batch, scale: float, who: Objective) -> Tensor:
    """Features of the batch's images at another size -> (B,C,h·scale,w·scale), each side to the nearest whole number.

    Raises:
        ValueError: the batch lacks a part; fewer than 2x2 cells would be left, or the images have too few pixels.
    """
    if scale == 1:
        return batch.features
    images = batch.part("high_resolution", who)
    cells = [int(side * scale + 0.5) for side in batch.features.shape[-2:]]
    if min(cells) < 2:
        raise ValueError(
            f"objective.scales has {scale:g}, which leaves {cells[0]}x{cells[1]} cells of "
            f"{batch.features.shape[-2]}x{batch.features.shape[-1]}: a model needs 2x2; leave it out, or raise "
            "views.view"
        )
    if any(count > most for count, most in zip(cells, batch.output_size, strict=True)):
        raise ValueError(
            f"objective.scales has {scale:g}, but targets are only {batch.output_size[0] / batch.features.shape[-2]:g} "
            "times as fine as the features: leave it out, or raise views.scale"
        )
    sides = zip(cells, images.shape[-2:], batch.output_size, strict=True)
    pixels = [round(count * side / most) for count, side, most in sides]
    resized = F.interpolate(images, pixels, mode="bilinear", antialias=True).clamp(0, 1)
    return batch.part("encoder", who)(resized).to(batch.features.dtype)


def similarities(query: Tensor, key: Tensor) -> Tensor:
    """Cosine between all queries and all keys of an image: both (B,D,h,w) -> (B,h·w,h·w)."""
    query, key = (F.normalize(x.flatten(2), dim=1) for x in (query, key))
    return query.mT @ key


def info_nce(similarity: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding the partner among all cells of the image, mean of both directions (arXiv 1807.03748).

    (B,N,N) -> scalar; log N where nothing is known.
    """
    logits = similarity / temperature
    right = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.mT, right)) / 2


def _embeddings(model: nn.Module, batch: Batch, key_sees_image: bool) -> tuple[Tensor, Tensor]:
    """Query and key of each cell of the features, (B,D,h,w) each, from the parts of the model's forward."""
    grid = tuple(batch.features.shape[-2:])
    guidance = model.rotary(model.image_encoder(batch.image))  # (B,D,H,W)
    seen = model.key_encoder(guidance, grid)  # (B,D,h,w)
    if not key_sees_image:
        seen = seen.mean((2, 3), keepdim=True).expand_as(seen)
    key = model.aggregation(torch.cat([seen, model.unifier(batch.features, guidance)], 1))
    return model.query_encoder(guidance, grid), key


def _painted(*maps: Tensor) -> list[Tensor]:
    """(C,h,w) maps -> (3,h,w) RGB in [0,1]: the first three principal directions of the first map."""
    first = maps[0].float().flatten(1)  # (C,h·w)
    mean = first.mean(1, keepdim=True)
    directions = torch.linalg.svd(first - mean, full_matrices=False).U[:, :3]  # (C,3)
    low, high = (directions.mT @ (first - mean)).aminmax(dim=1, keepdim=True)
    painted = []
    for one in maps:
        values = (directions.mT @ (one.float().flatten(1) - mean) - low) / (high - low).clamp(min=1e-12)
        values = F.pad(values.clamp(0, 1), (0, 0, 0, 3 - len(values)), value=0.5)  # where C is below 3
        painted.append(values.unflatten(1, one.shape[1:]))
    return painted


def _check_settings(
    weights: dict[str, float],
    mask_share: float,
    mask_blocks: tuple[int, ...],
    scales: tuple[float, ...],
    scales_per_step: int,
    temperature: float,
) -> None:
    negative = ", ".join(f"{name}={weight:g}" for name, weight in weights.items() if not weight >= 0)
    for wrong, message in (
        (negative, f"weights must not be negative, got {negative}; 0: the task is not computed"),
        (not any(weights.values()), f"all weights are 0, so nothing is trained: give one of {', '.join(weights)}"),
        (
            not 0 < mask_share < 1,
            f"mask_share must lie between 0 and 1, got {mask_share}: 0 hides nothing (that is inpainting=0), 1 hides "
            "everything",
        ),
        (
            not mask_blocks or min(mask_blocks) < 1,
            f"mask_blocks must be sides of blocks in cells, from 1, got {list(mask_blocks)}",
        ),
        (
            len(set(scales)) < max(2, len(scales)) or not min(scales) > 0,
            f"scales must be at least two different positive numbers, got {list(scales)}",
        ),
        (
            scales_per_step and not 2 <= scales_per_step <= len(scales),
            f"scales_per_step must be from 2 to the number of scales, {len(scales)}, or 0 for all, got "
            f"{scales_per_step}",
        ),
        (not temperature > 0, f"temperature must be positive, got {temperature}"),
    ):
        if wrong:
            raise ValueError(f"objective=self_supervised: {message}")
