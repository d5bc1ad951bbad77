"""`objective=self_supervised`: each task against a slow loop from its definition, and trainings without targets."""

import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

import core
from core import Batch, build, build_filler, registry
from core.adaptation import recovery
from core.batch import crops_of, images_of
from core.collapse import detail_variance, effective_rank, spatial_variance
from core.hooks import MODEL_HOOKS
from core.training import PlainStep, Trainable
from experiments.data.feature_cache import FeatureCache
from experiments.training.curves import read_table
from experiments.training.loop import Training, train
from experiments.training.state import STATE_NAME
from extensions.self_supervised import (
    SelfSupervised,
    Teachers,
    at_scale,
    consistency,
    hidden_cells,
    info_nce,
    relative_error,
    similarities,
    without_hidden,
)

ROOT = Path(__file__).resolve().parent.parent
OFF = {"inpainting": 0, "consistency": 0, "alignment": 0}
SMALL = {"scales": [0.75, 1, 2]}
TINY = [
    "embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8", "backbones=[{name: hog8}]", "views.view=32",
    "batch_size=2", "views.crops=2", "steps=4", "checkpoint_every=2", "validate_every=0", "log_every=2",
    "tracking.enabled=false", "device=cpu", "data.path=[bundled]", "optimiser.lr=1e-3",
]  # fmt: skip
OWN = ["objective=self_supervised", "objective.scales=[0.5,1,2]"]


def objective(**settings) -> SelfSupervised:
    return build_filler("objective", {"name": "self_supervised", **SMALL, **settings})


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def encoder(rgb: Tensor) -> Tensor:
    """Five channels, one cell for each 4x4 pixels."""
    return F.avg_pool2d(torch.cat([rgb, rgb[:, :2].square()], 1), 4)


def batch(channels: int = 5, grid: tuple[int, int] = (3, 4), seed: int = 6) -> Batch:
    random = drawn(seed)
    height, width = grid
    return Batch(
        image=torch.randn(2, 3, 4 * height, 4 * width, generator=random),
        features=torch.randn(2, channels, height, width, generator=random),
        target=torch.zeros(0, channels, height, width),
        output_size=(2 * height, 2 * width),
        corners=torch.zeros(0, 2, dtype=torch.long),
        generator=drawn(seed),
        high_resolution=torch.rand(2, 3, 8 * height, 8 * width, generator=random),
        encoder=encoder,
    )


def tiny_model(*overrides: str) -> core.AnyUp:
    return build(["embed_dim=16", "unifier.num_basis=8", "attention.num_heads=2", *overrides])


# --- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 3, 9])
@pytest.mark.parametrize(("grid", "share"), [((14, 14), 0.3), ((5, 3), 0.5), ((2, 2), 0.01), ((7, 1), 0.8)])
def test_masks_hide_the_share_that_is_asked_for(grid, share, block):
    expected = max(1, round(share * grid[0] * grid[1]))
    for seed in range(5):
        hidden = hidden_cells(grid, share, block, drawn(seed))
        assert hidden.shape == grid
        assert hidden.dtype == torch.bool
        assert hidden.sum() == expected


@pytest.mark.parametrize("block", [1, 3])
def test_every_cell_is_hidden_equally_often(block):
    """Also at the border and in corners; 4 standard errors of a share of 2000 draws."""
    random, draws = drawn(), 2000
    often = torch.stack([hidden_cells((5, 7), 0.4, block, random) for _ in range(draws)]).float().mean(0)
    assert (often - 0.4).abs().max() < 4 * math.sqrt(0.4 * 0.6 / draws)


def test_blocks_are_hidden_whole_but_for_the_last():
    for seed in range(10):
        hidden = hidden_cells((12, 12), 0.4, 3, drawn(seed))
        cut = [partial(hidden, 3, top, left) for top in range(3) for left in range(3)]
        assert min(cut) <= 1
        assert partial(hidden_cells((12, 12), 0.4, 1, drawn(seed)), 3, 0, 0) > 3, "single cells look like blocks"


def partial(hidden: Tensor, block: int, top: int, left: int) -> int:
    """How many blocks of the grid with this offset are hidden in part."""
    padded = F.pad(hidden.float(), (left, block, top, block), value=math.nan)
    padded = padded[: len(padded) // block * block, : padded.shape[1] // block * block]
    cells = padded.unfold(0, block, block).unfold(1, block, block).flatten(2)
    return int(((cells == 0).any(2) & (cells == 1).any(2)).sum())


def test_masks_are_drawn_from_the_generator_alone():
    first, again, other = (hidden_cells((14, 14), 0.3, 3, drawn(seed)) for seed in (0, 0, 1))
    torch.manual_seed(5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_mask_that_hides_everything_is_refused():
    with pytest.raises(
        ValueError, match=r"mask_share=0\.9 hides all 4 cells of 2x2 features: lower it, or give the en"
    ):
        hidden_cells((2, 2), 0.9, 1, drawn())
    whole = objective(**OFF | {"inpainting": 1}, mask_share=0.9)
    with pytest.raises(ValueError, match=r"hides all 4 cells"):
        whole(tiny_model(), batch(grid=(2, 2)), None)


class Recorder(nn.Module):
    """A model that keeps what it is given, and enlarges the features bilinearly with a gain."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.given: list[Tensor] = []

    def forward(self, image, features, output_size, generator=None):
        self.given.append(features)
        return self.gain * F.interpolate(features, output_size, mode="bilinear")


@pytest.mark.parametrize("channels", [1, 7, 384])
def test_inpainting_against_a_loop(channels):
    """The mean of the visible cells is filled in; what counts are the hidden cells of the pooled output."""
    one, model, inpainting = batch(channels), Recorder(), objective(**OFF | {"inpainting": 0.5})
    one.features = one.features.double()
    loss = inpainting(model, one, None)["inpainting_loss"]
    [given] = model.given
    changed = (given != one.features).any(1)  # (B,h,w)
    assert changed.sum((1, 2)).tolist() == [round(0.3 * 12)] * 2
    total = 0.0
    for features, filled, hidden in zip(one.features, given, changed, strict=True):
        visible = [features[:, i, j] for i in range(3) for j in range(4) if not hidden[i, j]]
        mean = sum(visible) / len(visible)
        output = 0.8 * F.interpolate(filled[None], (6, 8), mode="bilinear")[0]
        overall = features.flatten(1).mean(1)
        variance = sum((features[:, i, j] - overall).square().sum() for i in range(3) for j in range(4)) / 12
        errors = []
        for i, j in hidden.nonzero().tolist():
            torch.testing.assert_close(filled[:, i, j], mean, rtol=1e-12, atol=1e-12)
            pooled = output[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
            errors.append((pooled - features[:, i, j]).square().sum() / variance)
        total += sum(errors) / len(errors)
    torch.testing.assert_close(loss.detach(), 0.5 * total / 2, rtol=1e-12, atol=0)


def test_what_is_hidden_cannot_be_seen():
    features, hidden = torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    hidden[..., 1, 2] = True
    other = features.clone()
    other[..., 1, 2] = 100
    assert torch.equal(without_hidden(features, hidden), without_hidden(other, hidden))


def test_an_image_of_one_colour_gives_a_finite_error():
    flat, zero = torch.full((1, 3, 4, 4), 2.0), torch.zeros(1, 3, 4, 4)
    assert relative_error(flat, flat, flat) == 0
    assert relative_error(flat + 1e-3, flat, flat).item() == pytest.approx(1e-6 / 4e-6, rel=1e-3)
    assert relative_error(zero, zero, zero) == 0


# --- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teachers", list(Teachers), ids=lambda one: one.name)
def test_consistency_against_a_loop_over_all_pairs(teachers):
    outputs = [torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=drawn(i)).requires_grad_() for i in range(4)]
    features = torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=drawn(9))
    loss = consistency(outputs, features, teachers)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j and (teachers == Teachers.all or i < j)]
    expected, gradients = 0.0, [torch.zeros_like(x) for x in outputs]
    for n in range(2):
        mean = features[n].flatten(1).mean(1)[:, None, None]
        unit = (features[n] - mean).square().sum() / 6
        for i, j in pairs:
            difference = (outputs[i][n] - outputs[j][n]).detach()
            expected += difference.square().sum() / 20 / unit / 2 / len(pairs)
            gradients[i][n] += 2 * difference / 20 / unit / 2 / len(pairs)  # none into the teacher
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-12, atol=0)
    loss.backward()
    for output, gradient in zip(outputs, gradients, strict=True):
        found = torch.zeros_like(output) if output.grad is None else output.grad
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-14)


def test_the_encoder_sees_the_image_at_each_scale():
    one, seen = batch(grid=(4, 6)), []
    one.encoder = lambda rgb: seen.append(tuple(rgb.shape)) or encoder(rgb)
    found = [tuple(at_scale(one, scale, objective()).shape[-2:]) for scale in (0.5, 0.75, 1, 1.5, 2)]
    assert found == [(2, 3), (3, 5), (4, 6), (6, 9), (8, 12)]
    assert seen == [(2, 3, 8, 12), (2, 3, 12, 20), (2, 3, 24, 36), (2, 3, 32, 48)], "scale 1 is there already"
    torch.testing.assert_close(at_scale(one, 2, objective()), encoder(one.high_resolution))
    torch.testing.assert_close(at_scale(one, 0.5, objective()), at_scale(one, 2, objective()).unflatten(2, (2, 4))
                               .unflatten(4, (3, 4)).mean((3, 5)), rtol=0, atol=0.15)  # fmt: skip


def test_scales_that_cannot_be_are_refused():
    with pytest.raises(
        ValueError, match=r"objective.scales has 0\.5, which leaves 2x1 cells of 3x2: a model needs 2x2; l"
    ):
        at_scale(batch(grid=(3, 2)), 0.5, objective())
    with pytest.raises(ValueError, match=r"objective.scales has 3, but targets are only 2 times as fine .*views.scale"):
        at_scale(batch(), 3, objective())
    for part in ("encoder", "high_resolution"):
        one = batch()
        setattr(one, part, None)
        with pytest.raises(
            ValueError, match=rf"SelfSupervised needs batch.{part}: name it in SelfSupervised.batch_par"
        ):
            at_scale(one, 2, objective())


def test_parts_of_a_batch_without_targets_keep_their_pixels():
    one = batch()
    part = images_of(one, [1])
    assert torch.equal(part.high_resolution, one.high_resolution[1:])
    assert part.target.shape == one.target.shape
    assert torch.equal(at_scale(part, 2, objective()), at_scale(one, 2, objective())[1:])


def test_scales_of_features_to_be_recovered_are_relative_to_the_coarse_ones():
    one = recovery(batch(grid=(4, 6)), 2)
    assert at_scale(one, 2, objective()).shape == one.target.shape == (2, 5, 4, 6)
    assert at_scale(one, 1, objective()).shape == (2, 5, 2, 3)


def test_a_step_draws_some_of_the_scales():
    one, seen = batch(grid=(4, 4)), []
    one.encoder = lambda rgb: seen.append(rgb.shape[-1] // 4) or encoder(rgb)
    two = objective(**OFF | {"consistency": 1}, scales=[0.5, 1.5, 2], scales_per_step=2)
    for _ in range(20):
        two(Recorder(), one, None)
    pairs = {tuple(seen[i : i + 2]) for i in range(0, 40, 2)}
    assert len(seen) == 40
    assert pairs == {(2, 6), (2, 8), (6, 8)}, "each pair comes, coarse first"


# --- alignment -------------------------------------------------------------------------------------------------------


def test_info_nce_against_its_definition():
    query, key = (torch.randn(2, 6, 3, 2, dtype=torch.float64, generator=drawn(seed)) for seed in (0, 1))
    found = info_nce(similarities(query, key), 0.2)
    total = 0.0
    for q, k in zip(query.flatten(2).mT.numpy(), key.flatten(2).mT.numpy(), strict=True):
        cosine = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in k] for a in q]
        for table in (cosine, list(zip(*cosine, strict=True))):
            for i, row in enumerate(table):
                total -= row[i] / 0.2 - math.log(sum(math.exp(value / 0.2) for value in row))
    assert found.item() == pytest.approx(total / (2 * 2 * 6), rel=1e-12)


def test_info_nce_is_log_n_without_knowledge_and_zero_with_all():
    assert info_nce(torch.zeros(3, 12, 12), 0.1).item() == pytest.approx(math.log(12))
    assert info_nce(torch.eye(12).expand(2, -1, -1), 0.01).item() < 1e-6


@pytest.mark.parametrize("sees", [False, True])
def test_keys_see_the_features_and_only_the_mean_of_the_image_branch(sees, monkeypatch):
    model, one, aligned = tiny_model(), batch(), objective(**OFF | {"alignment": 1}, key_sees_image=sees)
    one.features.requires_grad_()
    aligned(model, one, None)["alignment_loss"].backward()
    assert (one.features.grad.abs().sum(1) > 0).all(), "some cell is not read"
    branch, tables = torch.randn(2, 16, 3, 4, generator=drawn()), []
    for shown in (branch, branch.flip(3), branch + 1):
        monkeypatch.setattr(model.key_encoder, "forward", lambda guidance, size, shown=shown: shown)
        aligned(model, one, None)
        tables.append(aligned._shown["similarity"])
    assert torch.allclose(tables[0], tables[1], atol=1e-5) != sees
    assert not torch.allclose(tables[0], tables[2], atol=1e-3)


def test_without_a_feature_branch_there_is_nothing_to_align():
    with pytest.raises(ValueError, match=r"unifier=none has no feature branch .*set objective.alignment=0"):
        objective()(tiny_model_without_features(), batch(), None)
    others = objective(alignment=0)
    assert others(tiny_model_without_features(), batch(), None).keys() == {"inpainting_loss", "consistency_loss"}
    assert others.diagnostics(tiny_model_without_features(), batch())["key_rank"] == 0


def tiny_model_without_features() -> core.AnyUp:
    return build(["embed_dim=16", "attention.num_heads=2", "unifier=none"])


# --- the objective ---------------------------------------------------------------------------------------------------


def test_a_task_with_weight_zero_is_not_computed_and_weights_are_factors():
    for name in OFF:
        alone, twice = objective(**OFF | {name: 1}), objective(**OFF | {name: 2})
        model = tiny_model()
        first, second = alone(model, batch(), None), twice(model, batch(), None)
        assert list(first) == [f"{name}_loss"]
        torch.testing.assert_close(second[f"{name}_loss"], 2 * first[f"{name}_loss"])
        assert alone.batch_parts == (frozenset({"encoder", "high_resolution"}) if name == "consistency" else set())
        assert not alone.needs_output
        assert not alone.needs_target


def test_reconstruction_alone_is_the_baseline_exactly():
    one, model = batch(), tiny_model()
    one.target, one.corners = torch.randn(4, 5, 3, 4, generator=drawn()), torch.tensor([[0, 0], [3, 4], [1, 2], [2, 0]])
    output = model(one.image, one.features, one.output_size)
    ours = objective(**OFF, reconstruction=1)
    baseline = build_filler("objective", {"name": "cosine_mse", "self_consistency": 0, "input_consistency": 0})
    assert ours.needs_output and ours.needs_target and not ours.batch_parts  # noqa: PT018
    found, expected = ours(model, one, output), baseline(model, one, output)
    assert found.keys() == expected.keys()
    assert torch.equal(found["reconstruction_loss"], expected["reconstruction_loss"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inpainting": -1}, r"weights must not be negative, got inpainting=-1; 0: the task is not computed"),
        (OFF, r"all weights are 0, so nothing is trained: give one of inpainting, consistency, alignment, reconstr"),
        ({"mask_share": 0}, r"mask_share must lie between 0 and 1, got 0.*: 0 hides nothing \(that is inpainting=0\)"),
        ({"mask_share": 1}, r"mask_share must lie between 0 and 1, got 1.* 1 hides everything"),
        ({"mask_blocks": [0]}, r"mask_blocks must be sides of blocks in cells, from 1, got \[0\]"),
        ({"mask_blocks": []}, r"mask_blocks must be sides"),
        ({"scales": [1]}, r"scales must be at least two different positive numbers, got \[1"),
        ({"scales": [1, 1]}, r"scales must be at least two different"),
        ({"scales": [0, 1]}, r"scales must be at least two different positive"),
        ({"scales_per_step": 1}, r"scales_per_step must be from 2 to the number of scales, 3, or 0 for all, got 1"),
        ({"scales_per_step": 4}, r"scales_per_step must be from 2"),
        ({"temperature": 0}, r"temperature must be positive, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match="objective=self_supervised: " + message):
        objective(**settings)


@pytest.mark.parametrize(
    ("hook", "name"), [(hook, name) for hook in MODEL_HOOKS for name in registry.choices(hook)], ids=str
)
def test_every_filler_of_the_model_can_be_pretrained(hook, name):
    """With targets where a filler's own loss needs them; a step lowers the losses on its batch."""
    kinds = {
        "temporal_consistency": ["temporal.flow=still"],
        "diffusion": ["refiner.hidden_dim=8", "refiner.num_inference_steps=2"],
    }
    model = build(["embed_dim=16", f"{hook}={name}", *kinds.get(name, [])])
    trainable = Trainable(model, objective(alignment=0 if (hook, name) == ("unifier", "none") else 1), PlainStep())
    assert trainable.needs_target == (type(getattr(model, hook)).auxiliary_loss is not core.hooks.Filler.auxiliary_loss)
    one = batch()
    if trainable.needs_target:
        one.target, one.corners = torch.randn(2, 5, 6, 8, generator=drawn()), None
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(3):
        one.generator = drawn()
        [losses] = PlainStep().step(trainable, [one], optimizer)
        history.append(sum(losses.values()).item())
    assert all(map(math.isfinite, history))
    assert history[-1] < history[0]


def test_half_precision_gives_nearly_the_same_losses():
    model = tiny_model()
    expected = objective()(model, batch(), None)
    with torch.autocast("cpu", torch.bfloat16):
        found = objective()(model, batch(), None)
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0)


def test_it_can_be_differentiated_twice():
    """As second-order meta-learning needs it: the gradient's gradient agrees with a finite difference.

    Not of consistency: a finite difference moves its teachers too.
    """
    model = tiny_model().double().twice_differentiable()
    one = batch()
    one.image, one.features = one.image.double(), one.features.double()
    weight = model.aggregation[0].weight
    direction = torch.randn(weight.shape, generator=drawn(), dtype=torch.float64)

    def slope() -> Tensor:
        one.generator = drawn()
        total = sum(objective(consistency=0)(model, one, None).values())
        return (torch.autograd.grad(total, weight, create_graph=True)[0] * direction).sum()

    [second] = torch.autograd.grad(slope(), weight)
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * step)
        ends.append(slope().item())
        with torch.no_grad():
            weight.sub_(direction, alpha=sign * step)
    assert (second * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)


# --- diagnostics and pictures ----------------------------------------------------------------------------------------


def test_effective_rank_against_its_definition():
    vectors = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=drawn())
    for one, found in zip(vectors, effective_rank(vectors).tolist(), strict=True):
        rows = one.flatten(1).T.numpy()
        values = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
        shares = values / values.sum()
        assert found == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-10)
    assert effective_rank(1e4 * vectors).tolist() == pytest.approx(effective_rank(vectors).tolist())


def test_effective_rank_of_collapsed_vectors():
    along = torch.linspace(-1, 1, 12).view(1, 1, 3, 4) * torch.randn(1, 6, 1, 1, generator=drawn())
    assert effective_rank(along).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((1, 6, 3, 4), 0.7)).item() == 0
    corners = torch.eye(4).view(1, 4, 2, 2)
    assert effective_rank(corners).item() == pytest.approx(3, abs=1e-3), "four corners span three directions"


def test_blur_lowers_detail_and_variance():
    sharp = torch.randn(1, 4, 8, 8, generator=drawn())
    blurred = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, 1)
    shares = [(detail_variance(x, (4, 4)) / spatial_variance(x)).item() for x in (sharp, blurred)]
    assert shares[1] < 0.7 * shares[0]
    coarse = F.interpolate(torch.randn(1, 4, 2, 2, generator=drawn()), (8, 8), mode="bilinear")
    assert detail_variance(torch.ones(1, 4, 8, 8), (4, 4)) == 0
    assert detail_variance(coarse, (4, 4)) < 0.05 * spatial_variance(coarse)


def test_diagnostics_see_collapse():
    """A query encoder that gives one vector has no rank, and its uniform attention no detail."""
    model, one, objective_ = tiny_model("attention=global"), batch(grid=(6, 6)), objective()
    healthy = objective_.diagnostics(model, one)
    assert healthy.keys() == {"query_rank", "key_rank", "output_rank", "query_variance", "key_variance",
                              "output_variance", "output_detail"}  # fmt: skip
    with torch.no_grad():
        for weight in model.query_encoder.parameters():
            weight.zero_()
    collapsed = objective_.diagnostics(model, one)
    assert collapsed["query_rank"] == 0 < 1 < healthy["query_rank"]
    assert collapsed["query_variance"] == 0 < healthy["query_variance"]
    assert collapsed["output_variance"] < 0.1 * healthy["output_variance"]
    assert collapsed["key_rank"] == pytest.approx(healthy["key_rank"])


def test_pictures():
    one, shows = batch(grid=(4, 5)), objective(alignment=1)
    assert shows.pictures() == {}
    shows(tiny_model(), one, None)
    found = shows.pictures()
    sizes = {title: tuple(picture.shape) for title, picture in found.items()}
    assert sizes == {"visible cells": (3, 4, 5), "features": (3, 4, 5), "inpainted": (3, 4, 5),
                     "probability of the right cell": (3, 4, 5), "similarity": (3, 20, 20)}  # fmt: skip
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in found.values())
    hidden = found["visible cells"][0] == 0
    assert hidden.sum() == round(0.3 * 20)
    differs = ((found["features"] - found["inpainted"]).abs() > 1e-4).any(0)  # matrix products may round differently
    assert differs.any()
    assert not (differs & ~hidden).any(), "visible cells are shown as they are"


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Overrides -> the configuration of a tiny training in tmp_path."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "configs"), version_base=None):
            return compose("train", [*TINY, f"out_dir={tmp_path / 'out'}", *overrides])

    return make


def encoded(monkeypatch) -> list[str]:
    """Of what a training encodes, from now on, the names."""
    names, encode = [], FeatureCache.encode
    monkeypatch.setattr(FeatureCache, "encode", lambda self, *given: names.extend(given[2]) or encode(self, *given))
    return names


@pytest.mark.parametrize("crops", [0, 2])
def test_no_target_is_encoded(config, monkeypatch, crops):
    training = Training(config(*OWN, "objective.consistency=0", f"views.crops={crops}"))
    names = encoded(monkeypatch)
    one = training.batch(training.views[0])
    assert names == training.views[0].names, "only the features of the whole images"
    assert one.target.shape == (0, *one.features.shape[1:])
    with pytest.raises(ValueError, match=r"the batch has no target: set needs_target = True in the objective"):
        crops_of(torch.zeros(2, one.features.shape[1], 8, 8), one)


@pytest.mark.parametrize("more", [["objective.reconstruction=1"], ["refiner=diffusion", "refiner.window=1"]], ids=str)
def test_a_target_is_made_where_something_needs_it(config, more):
    training = Training(config(*OWN, "objective.consistency=0", *more))
    assert len(training.batch(training.views[0]).target) == 4
    losses = training.step(training.views[0])
    assert losses.keys() > {"inpainting_loss", "alignment_loss"}


def test_high_resolution_pixels_are_those_of_the_targets(config):
    training = Training(config(*OWN, "objective.reconstruction=1", "views.crops=0"))
    one = training.batch(training.views[0])
    assert torch.equal(one.encoder(one.high_resolution), one.target)
    assert torch.equal(at_scale(one, 2, training.inner.objective), one.target)


def test_pretraining_resumes_bit_for_bit_and_logs_diagnostics_on_a_pool_without_pretrained_encoders(config, tmp_path):
    pool = [*OWN, "backbones=[{name: hog16},{name: vit_tiny16,weights: random}]", "objective.scales=[0.75,1,2]"]
    pool += ["views.view=48"]
    parts = (("whole", []), ("parts", ["stop_after=2"]), ("parts", ["resume=must"]))
    for name, last in parts:
        train(config(*pool, f"out_dir={tmp_path / name}", *last))
    whole, resumed = (load_file(tmp_path / name / STATE_NAME) for name in ("whole", "parts"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    curves = [read_table(tmp_path / name / "curves.csv") for name in ("whole", "parts")]
    logged = {name for _, name, _ in curves[0]}
    assert logged > {"inpainting_loss", "consistency_loss", "alignment_loss", "diagnostics/query_rank",
                     "diagnostics/output_detail"}  # fmt: skip
    assert curves[0] == curves[1]


def test_finetuning_starts_from_what_was_pretrained(config, tmp_path):
    pretrained = train(config(*OWN, f"out_dir={tmp_path / 'pre'}")).checkpoint
    supervised = ["objective.self_consistency=0", f"init_from={pretrained}", "backbones=[{name: daisy8}]"]
    training = Training(config(*supervised))
    started, kept = training.inner.model.state_dict(), load_file(pretrained)
    assert all(torch.equal(started[name], kept[name]) for name in started)
    train(config(*supervised, "steps=1"))


def test_validation_keeps_the_pictures(config, monkeypatch):
    kept = {}

    class Kept:
        run_id = "1"
        metrics = picture = None

    run = Kept()
    run.metrics = lambda values, step: None
    run.picture = lambda image, path: kept.__setitem__(path, image)
    training = Training(config(*OWN))
    training.step(training.views[0])

    class Measured:
        def measure(self, model, run, step):
            return {"val/detail": 0.0}

    training.state.best = 1.0
    training._validate(Measured(), run)
    assert list(kept) == ["validation/000000_objective.png"]
    assert np.asarray(kept["validation/000000_objective.png"]).std() > 10


@pytest.mark.slow
def test_two_processes_train_every_weight(config, tmp_path):
    made = config(*OWN, "steps=2")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(made, resolve=True))
    script = [
        "import sys", "from omegaconf import OmegaConf", "from experiments.training.loop import train",
        'if __name__ == "__main__":', "    train(OmegaConf.load(sys.argv[1]))",
    ]  # fmt: skip
    (tmp_path / "script.py").write_text("\n".join(script))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    done = subprocess.run(
        [*launch, f"--main_process_port={port}", str(tmp_path / "script.py"), str(tmp_path / "config.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    state = load_file(tmp_path / "out" / STATE_NAME)
    weights = [name.removeprefix("weights/") for name in state if name.startswith("weights/model.")]
    moments = [state[f"adam/exp_avg/{name}"] for name in weights if f"adam/exp_avg/{name}" in state]
    assert len(moments) == len(list(Training(made).inner.parameters()))
    assert all(moment.abs().max() > 0 for moment in moments)
