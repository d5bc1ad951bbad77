"""The diffusion refiner: coordinates, denoiser, samplers, loss, tiles; and that it predicts, not only sharpens."""

import copy
import math
import time
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import AnyUp, Batch, Context, build
from core.hooks import GATE_LR_SCALE
from core.points import pixel_centres
from core.training import PlainStep, Trainable, lr_scale
from core.uncertainty import rarity
from extensions.diffusion import DiffusionRefiner, Prediction, unet
from extensions.diffusion import refiner as in_refiner
from extensions.diffusion.condition import Condition, noise
from extensions.diffusion.coordinates import Basis, around, basis_of, coordinates
from extensions.diffusion.schedule import FLOW, angle_at, angles, scheduler_classes
from extensions.diffusion.unet import tiles

WIDTH = 16
SMALL = {"hidden_dim": 8, "window": 3, "num_inference_steps": 3}
SCHEDULERS = sorted(scheduler_classes("DDIMScheduler"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(perturbed=None, **settings) -> DiffusionRefiner:
    """In float64 and evaluation mode; with `perturbed`, with an open gate and every weight off its initial value."""
    torch.manual_seed(0)
    refiner = DiffusionRefiner(WIDTH, **(SMALL | settings)).double().eval()
    return refiner if perturbed is None else perturbed(refiner)


def given(channels: int = 6, grid=(4, 5), size=(8, 10), batch: int = 2, seed: int = 0) -> tuple[Tensor, Context]:
    features, image = draw(batch, channels, *grid, seed=seed), draw(batch, 3, 20, 26, seed=seed)
    context = Context(image, features, pixel_centres(size, like=image), draw(batch, WIDTH, 20, 26, seed=seed))
    return draw(batch, channels, *size, seed=seed + 1), context


def refine(refiner: DiffusionRefiner, output: Tensor, context: Context, seed: int = 5) -> Tensor:
    context.generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return refiner(output, context)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max().item() / expected.abs().max().clamp(min=1e-3).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
    return True


# --- it starts as the baseline ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@torch.no_grad()
def test_as_built_it_is_the_baseline_bit_by_bit(scheduler):
    baseline = AnyUp(embed_dim=WIDTH).eval()
    model = AnyUp(refiner=partial(DiffusionRefiner, **SMALL, scheduler=scheduler), embed_dim=WIDTH).eval()
    image, features = draw(2, 3, 20, 26).float(), draw(2, 7, 4, 5).float()
    for size in (None, (8, 10)):
        assert torch.equal(model(image, features, size), baseline(image, features, size))


@torch.no_grad()
def test_under_autocast_the_output_is_not_rounded():
    """As built it is the baseline there too; and what it adds is right to half precision's rounding."""
    output, context = given()
    for part in ("image", "features", "guidance"):
        setattr(context, part, getattr(context, part).float())
    refiner = make().float()
    for gate in (0.0, 0.3):
        refiner.gate.fill_(gate)
        expected = refine(refiner, output.float(), context)
        with torch.autocast("cpu", torch.bfloat16):
            found = refine(refiner, output.float(), context)
        assert found.dtype == torch.float32
        assert torch.equal(found, output.float()) if gate == 0 else close(found, expected, 0.05)


@pytest.mark.parametrize("settings", [{"strength": 0.0}, {"num_inference_steps": 0}], ids=str)
def test_without_strength_or_steps_the_very_output_comes_back(settings, perturbed):
    output, context = given()
    assert make(perturbed, **settings)(output, context) is output


def test_in_training_the_output_comes_back_and_the_loss_is_its_own(perturbed):
    refiner, (output, context) = make(perturbed).train(), given()
    assert refiner(output, context) is output
    batch = Batch(context.image, context.features, output + 1, (8, 10))
    assert set(refiner.auxiliary_loss(output, batch)) == {"denoising_loss"}
    assert refiner.auxiliary_loss(output, batch) == {}, "no forward since"


def test_strength_and_steps_change_the_output(perturbed):
    refiner, (output, context) = make(perturbed), given()
    found = []
    for strength, steps in ((0.1, 3), (0.5, 3), (0.5, 5), (1.0, 1)):
        refiner.strength, refiner.num_inference_steps = strength, steps
        found.append(refine(refiner, output, context))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


# --- coordinates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 6, 20, 50])
def test_coordinates_are_whitened_and_leading(channels):
    """For fewer channels than cells, and for more: against a singular value decomposition."""
    features = draw(2, channels, 4, 5)
    basis = basis_of(features, 4)
    few = min(4, channels)
    found = coordinates(features, basis).flatten(2)
    assert found.shape == (2, few, 20)
    assert close(found @ found.mT / 20, torch.eye(few, dtype=torch.float64).expand(2, -1, -1))
    assert close(basis.directions.mT @ basis.directions, torch.eye(few, dtype=torch.float64).expand(2, -1, -1))
    centred = features.flatten(2) - features.flatten(2).mean(2, keepdim=True)
    assert close(basis.deviation, torch.linalg.svdvals(centred)[:, :few] / math.sqrt(20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_without_variance_are_left_alone(dtype):
    features = draw(1, 2, 4, 5)
    features = torch.cat([features, features.sum(1, keepdim=True)], 1).to(dtype)  # rank 2
    basis = basis_of(features, 8)
    assert (basis.deviation > 0).tolist() == [[True, True, False]]
    assert not coordinates(draw(1, 3, 6, 6).to(dtype), basis)[:, 2].any()
    assert not basis_of(torch.full((1, 3, 4, 5), 0.7, dtype=dtype), 8).deviation.any()


def test_the_complement_passes_unchanged(perturbed):
    refiner, (output, context) = make(perturbed, num_directions=2), given()
    change = (refine(refiner, output, context) - output).flatten(2)
    directions = basis_of(context.features, 2).directions
    assert change.abs().max() > 1e-2
    assert close(directions @ (directions.mT @ change), change)


def orthogonal(size: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed)).Q


def turn(basis: Basis, rotation: Tensor) -> Basis:
    return basis._replace(directions=basis.directions @ rotation)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", FLOW])
@pytest.mark.parametrize("rotation", ["signs", "a rotation of equal variances"])
def test_the_choice_of_the_basis_changes_nothing(rotation, scheduler, perturbed, monkeypatch):
    refiner, (output, context) = make(perturbed, num_directions=4, scheduler=scheduler), given()
    turned = torch.diag(torch.tensor([-1.0, 1, -1, 1], dtype=torch.float64))
    if rotation != "signs":  # features whose directions 1 to 3 have the same variance
        basis = basis_of(context.features, 6)
        deviation = torch.tensor([3.0, 2, 2, 2, 0.5, 0.1], dtype=torch.float64)[:, None, None]
        context.features = (
            torch.einsum("bck,bkhw->bchw", basis.directions, coordinates(context.features, basis) * deviation)
            + basis.mean[..., None]
        )
        turned = torch.block_diag(torch.eye(1, dtype=torch.float64), orthogonal(3))
    expected = refine(refiner, output, context)
    assert (expected - output).abs().max() > 1e-2
    plain = in_refiner.basis_of
    monkeypatch.setattr(in_refiner, "basis_of", lambda *args: turn(plain(*args), turned))
    assert not torch.equal(in_refiner.basis_of(context.features, 4).directions, plain(context.features, 4).directions)
    # diffusers' flow matching steps in float32, which the rounding of a rotation reaches
    assert close(refine(refiner, output, context), expected, 1e-4 if scheduler == FLOW else 1e-8)


def test_a_rotation_of_unequal_variances_would_be_seen(perturbed, monkeypatch):
    """Guards the test above: it is the equal variances that make the choice free."""
    refiner, (output, context) = make(perturbed, num_directions=4), given()
    expected, plain = refine(refiner, output, context), in_refiner.basis_of
    monkeypatch.setattr(in_refiner, "basis_of", lambda *args: turn(plain(*args), orthogonal(4)))
    assert (refine(refiner, output, context) - expected).abs().max() > 1e-2


def test_scaled_shifted_and_rotated_features_give_outputs_alike(perturbed):
    refiner, (output, context) = make(perturbed), given()
    expected, rotation = refine(refiner, output, context), orthogonal(6)
    change = lambda x: 3 * torch.einsum("dc,bchw->bdhw", rotation, x) + 2  # noqa: E731
    context.features = change(context.features)
    assert close(refine(refiner, change(output), context), change(expected), 1e-8)


def test_noise_is_standard_normal_and_does_not_depend_on_the_basis():
    features = draw(1, 5, 4, 5)
    basis, cells = basis_of(features, 5), {}
    rotation = orthogonal(5)
    for name, turned in (("plain", torch.eye(5, dtype=torch.float64)), ("turned", rotation)):
        whitened = turned.mT @ coordinates(features, basis).flatten(2)
        grid = torch.zeros(1, 5, 120, 130, dtype=torch.float64)
        condition = Condition(grid, grid, grid, whitened.mT, torch.full((1, 5), 0.2))
        cells[name] = noise(condition, Context(grid, features, grid, generator=torch.Generator().manual_seed(3)))
    plain = cells["plain"].flatten(2)[0]
    assert close(cells["turned"].flatten(2)[0], rotation.mT @ plain, 1e-9)
    num = plain.shape[1]
    assert (plain.mean(1).abs() < 5 / math.sqrt(num)).all()
    assert (plain @ plain.mT / num - torch.eye(5)).abs().max() < 5 * math.sqrt(2 / num)
    assert ((plain**4).mean() - 3).abs() < 5 * math.sqrt(96 / plain.numel()), "not normal"


def test_the_cells_around_a_point_by_hand():
    cells = torch.arange(6.0).view(1, 1, 2, 3)
    assert around(cells, 3, (2, 3))[0, 0, :, 0, 0].tolist() == [0, 0, 1, 0, 0, 1, 3, 3, 4]
    assert around(cells, 1, (4, 3))[0, 0, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


# --- the denoiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", list(Prediction), ids=lambda one: one.name)
def test_the_estimate_is_its_definition(prediction, perturbed, monkeypatch):
    """Point by point and coordinate by coordinate, with the weights that the network wrote."""
    refiner, (output, context) = make(perturbed, prediction=prediction), given()
    basis = basis_of(context.features, 32)
    condition, seen = refiner._known(output, context, basis), {}
    run = unet.on_tile

    def keep(network: torch.nn.Module, inputs: Tensor, angle: Tensor) -> Tensor:
        seen["inputs"], seen["weights"] = inputs, run(network, inputs, angle)
        return seen["weights"]

    monkeypatch.setattr(unet, "on_tile", keep)
    noisy, angle = draw(2, 6, 8, 10), torch.tensor([0.4, 1.2], dtype=torch.float64)
    with torch.no_grad():
        found = refiner.estimate(condition, noisy, angle)
    cells = F.pad(coordinates(context.features, basis), [1] * 4, mode="replicate")
    initial, neighbours = coordinates(output, basis), F.pad(noisy, [1] * 4, mode="replicate")
    for image, row, column in ((0, 0, 0), (0, 7, 9), (1, 3, 4), (1, 5, 0)):
        signal, share = angle[image].cos(), angle[image].sin()
        window = [(i, j) for i in range(3) for j in range(3)]
        vectors = [cells[image, :, row // 2 + i, column // 2 + j] - initial[image, :, row, column] for i, j in window]
        own = noisy[image, :, row, column]
        products = torch.stack([(vector * own).sum() / math.sqrt(6) for vector in vectors])
        assert close(seen["inputs"][image, -10:-1, row, column], products)
        vectors += [neighbours[image, :, row + i, column + j] for i, j in window]
        weights = seen["weights"][image, :, row, column]
        mixed = sum(weight * vector for weight, vector in zip(weights, vectors, strict=True))
        expected = {
            Prediction.sample: mixed,
            Prediction.epsilon: (own - share * mixed) / signal,
            Prediction.v_prediction: signal * own - share * mixed,
        }[prediction]
        assert close(found[image, :, row, column], refiner.gate * expected)


def test_what_the_network_sees_of_the_conditioning(perturbed):
    """Initial output, image, guidance and features each change the estimate, and nothing depends on C."""
    refiner = make(perturbed)
    expected = refine(refiner, *given())
    for part in ("image", "guidance", "features"):
        output, context = given()
        setattr(context, part, getattr(context, part) + 0.3 * draw(*getattr(context, part).shape, seed=9))
        assert (refine(refiner, output, context) - expected).abs().max() > 1e-3, part
    output, context = given()
    moved = refine(refiner, output + 0.1 * draw(*output.shape, seed=8), context) - 0.1 * draw(*output.shape, seed=8)
    assert (moved - expected).abs().max() > 1e-3


# --- samplers --------------------------------------------------------------------------------------------------------


class Gaussian(DiffusionRefiner):
    """With the exact denoiser of residuals that are normal, with mean 1 and deviation 0.5."""

    def estimate(self, condition: Condition | None, noisy: Tensor, angle: Tensor) -> Tensor:
        signal, share = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        return 1 + 0.25 * signal / (0.25 * signal**2 + share**2) * (noisy - signal)


def denoised(start: Tensor, **settings) -> list[Tensor]:
    context = Context(start, start, start, generator=torch.Generator().manual_seed(0))
    return Gaussian(WIDTH, **(SMALL | settings))._denoised(None, start, context)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_ddim_is_its_definition(strength):
    """Song et al., arXiv 2010.02502, equation 12 with sigma = 0, in float64; 10 of 10 or of 20 steps."""
    start = draw(2, 3, 4, 5)
    found = denoised(start, strength=strength, num_inference_steps=10)
    stride = round(1000 * strength / 10)
    bar = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]  # 2102.09672, equation 17
    alpha = torch.ones(1001, dtype=torch.float64)
    for t in range(1000):
        alpha[t + 1] = alpha[t] * (1 - min(1 - bar[t + 1] / bar[t], 0.999))
    times = range(10 * stride, 0, -stride)
    x = (1 - alpha[times[0]]).sqrt() * start
    for i, t in enumerate(times):
        signal, share = alpha[t].sqrt(), (1 - alpha[t]).sqrt()
        clean = 1 + 0.25 * signal / (0.25 * signal**2 + share**2) * (x - signal)
        assert close(found[i], clean, 1e-4)  # diffusers' schedule is a product of 1000 factors in float32
        epsilon = (x - signal * clean) / share
        x = alpha[t - stride].sqrt() * clean + (1 - alpha[t - stride]).sqrt() * epsilon
    assert close(found[-1], x, 1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_samples_the_distribution(scheduler):
    """From pure noise: mean 1 and deviation 0.5, up to the error of 40 steps; one step gives the mean, exactly."""
    start = draw(1, 3, 60, 60).float()
    sample = denoised(start, strength=1.0, num_inference_steps=40, scheduler=scheduler)[-1]
    if scheduler not in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"):  # second order: poor from infinite noise
        assert sample.mean().item() == pytest.approx(1, abs=0.03)
        assert sample.std().item() == pytest.approx(0.5, abs=0.05)
    (mean,) = denoised(start, strength=1.0, num_inference_steps=1, scheduler=scheduler)
    assert (mean - 1).abs().max() < 1e-3


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, 10), (0.2, 1), (0.02, 50)])
def test_every_scheduler_starts_from_the_partly_noised_output(scheduler, strength, steps, monkeypatch):
    """At the noise level of the strength; and it makes the steps that are asked for (second order: twice, less one)."""
    seen = []

    def estimate(self, condition, noisy, angle):
        seen.append((angle.item(), noisy.std().item()))
        return torch.zeros_like(noisy)

    monkeypatch.setattr(Gaussian, "estimate", estimate)
    start = draw(1, 3, 30, 30).float()
    denoised(start, strength=strength, num_inference_steps=steps, scheduler=scheduler)
    expected = min(steps, round(1000 * strength))
    assert len(seen) in (expected, 2 * expected - 1)
    angle, deviation = seen[0]
    aim = math.atan2(strength, 1 - strength) if scheduler == FLOW else angles()[round(1000 * strength) - 1].item()
    assert angle == pytest.approx(aim, rel=0.05)
    assert deviation == pytest.approx(math.sin(angle) * start.std().item(), rel=1e-3), "the residual 0, noised"
    assert all(a >= b for (a, _), (b, _) in zip(seen[::2], seen[2::2], strict=False)), "noise falls"


def test_strength_is_rounded_so_that_the_steps_divide_the_schedule(monkeypatch):
    seen = []
    monkeypatch.setattr(Gaussian, "estimate", lambda self, condition, noisy, angle: seen.append(angle.item()) or noisy)
    denoised(draw(1, 3, 4, 4), strength=0.3, num_inference_steps=1)
    assert seen == [angles()[332].item()], "1 of 3 steps"


def test_noise_levels_between_steps():
    assert angle_at(torch.tensor(499)).item() == angles()[499].item()
    assert angles()[499] < angle_at(torch.tensor(499.5)).item() < angles()[500]


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_samples_are_the_generators(scheduler, perturbed):
    refiner, (output, context) = make(perturbed, scheduler=scheduler), given()
    first = refine(refiner, output, context, seed=1)
    torch.manual_seed(77)
    assert torch.equal(refine(refiner, output, context, seed=1), first)
    assert (refine(refiner, output, context, seed=2) - first).abs().max() > 1e-3


def test_num_samples_gives_mean_and_spread(perturbed):
    """One image, so that the samples are those of single calls with the same generator, one after the other."""
    output, context = given(batch=1)
    refiner, single = make(perturbed, num_samples=3), make(perturbed)
    mean = refine(refiner, output, context)
    context.generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        samples = torch.stack([single(output, context) for _ in range(3)])
    assert close(mean, samples.mean(0))
    assert refiner.spread.shape == (1, 8, 10)
    assert close(refiner.spread, samples.var(0).sum(1).sqrt())
    assert single.spread is None


def test_only_the_least_certain_points_are_refined(perturbed):
    output, context = given()
    everywhere = refine(make(perturbed), output, context)
    for share in (0.25, 0.001):
        found = refine(make(perturbed, uncertain_share=share), output, context)
        for i in range(len(output)):
            rare = F.interpolate(rarity(context.features), (8, 10), mode="bilinear")[i, 0]
            count = max(1, round(share * 80))
            chosen = rare >= rare.flatten().sort(descending=True).values[count - 1]
            assert chosen.sum() == count
            assert torch.equal(found[i, :, ~chosen], output[i, :, ~chosen])
            assert close(found[i, :, chosen], everywhere[i, :, chosen])
            assert not torch.equal(found[i, :, chosen], output[i, :, chosen])


def test_a_larger_output_gets_the_interpolated_correction(perturbed):
    refiner, (output, context) = make(perturbed), given(size=(24, 31))
    change = refine(refiner, output, context) - output
    coarse = F.adaptive_avg_pool2d(output, (8, 10))
    expected = F.interpolate(refine(refiner, coarse, context) - coarse, (24, 31), mode="bilinear")
    assert close(change, expected)


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "tile"), [(5, 8), (8, 8), (9, 8), (64, 8), (65, 16), (130, 64)])
def test_tiles_cover_everything_and_their_weights_sum_to_one(length, tile):
    total, ends = torch.zeros(length), []
    for where, weight in tiles(length, tile):
        assert where.stop - where.start == len(weight) == min(length, tile)
        assert (weight > 0).all()
        total[where] += weight
        ends.append((where.start, where.stop))
    assert torch.allclose(total, torch.ones(length))
    assert all(later[0] <= earlier[1] - tile // 4 for earlier, later in pairwise(ends))


def test_tiles_leave_no_seams(perturbed):
    """Steps across the borders of tiles are no larger than elsewhere; tiles that are put side by side show them."""
    output, context = given(grid=(12, 12), size=(48, 48), batch=1)
    context.image, context.guidance = (  # smooth, so that a step would be seen
        F.interpolate(F.avg_pool2d(x, 5), (48, 48), mode="bicubic") for x in (context.image, context.guidance)
    )
    context.features = F.avg_pool2d(F.pad(context.features, [2] * 4, mode="replicate"), 5, 1)
    output = F.interpolate(context.features, (48, 48), mode="bicubic")
    refiner = make(perturbed, refine_scale=4, tile=16)
    condition = refiner._known(output, context, basis_of(context.features, 32))
    smooth = F.interpolate(draw(1, 6, 6, 6), (48, 48), mode="bicubic")
    angle = torch.full((1,), 0.5, dtype=torch.float64)
    inputs = torch.cat([condition.fixed, smooth.repeat(1, 2, 1, 1)[:, :10]], 1)
    with torch.no_grad():
        whole = unet.on_tile(refiner.unet, inputs, angle)
        tiled = unet.in_tiles(refiner.unet, inputs, angle, refiner.tile)
        parts = [[unet.on_tile(refiner.unet, part, angle) for part in row.split(16, 3)] for row in inputs.split(16, 2)]
        hard = torch.cat([torch.cat(row, 3) for row in parts], 2)

    def seam(x: Tensor, places: list[int]) -> float:
        """Mean step there, relative to the mean step elsewhere, beyond what the whole has."""
        steps = (x - whole).diff(dim=3).abs().mean((0, 1, 2))
        there = torch.zeros(47, dtype=torch.bool)
        there[places] = True
        return (steps[there].mean() / whole.diff(dim=3).abs().mean()).item()

    borders = sorted({end - 1 for where, _ in tiles(48, 16) for end in (where.start, where.stop) if 0 < end < 48})
    assert seam(hard, [15, 31]) > 0.5
    assert seam(tiled, borders) < 0.4 * seam(hard, [15, 31])
    assert seam(tiled, borders) < 1.5 * seam(tiled, [i for i in range(47) if i not in borders])


def test_the_network_never_sees_more_than_a_tile(perturbed, monkeypatch):
    output, context = given(grid=(12, 20), size=(24, 40), batch=1)
    refiner, sizes, run = make(perturbed, tile=16), [], unet.on_tile
    monkeypatch.setattr(unet, "on_tile", lambda net, x, angle: sizes.append(x.shape[-2:]) or run(net, x, angle))
    refine(refiner, output, context)
    assert {tuple(size) for size in sizes} == {(16, 16)}


# --- the loss --------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_min_snr():
    """Of the residual's error. Hang et al.: min(SNR, gamma) for the residual; divided by SNR for noise's own error."""
    angle = torch.tensor([0.2, 0.8, 1.5], dtype=torch.float64)
    snr = (angle.cos() / angle.sin()) ** 2
    for prediction, of_its_own, plus in (("epsilon", 1 / snr, 0), ("v_prediction", 1 / (snr + 1), 1), ("sample", 1, 0)):
        limited = make(prediction=Prediction[prediction]).loss_weight(angle)
        plain = make(prediction=Prediction[prediction], min_snr_gamma=None).loss_weight(angle)
        assert torch.allclose(plain * of_its_own, torch.ones(3, dtype=torch.float64)), "the plain loss"
        assert torch.allclose(limited, torch.minimum(snr + plus, torch.tensor(5.0)))


def lost(refiner: DiffusionRefiner, output: Tensor, context: Context, batch: Batch) -> Tensor:
    batch.generator = torch.Generator().manual_seed(2)
    refiner.train()(output, context)
    return refiner.auxiliary_loss(output, batch)["denoising_loss"]


def test_the_loss_is_the_weighted_error_in_feature_space(monkeypatch):
    """A denoiser that always says nothing is off by the target's distance, within the K directions."""
    refiner, (output, context) = make(num_directions=32), given()
    target = output + draw(*output.shape, seed=4)
    monkeypatch.setattr(DiffusionRefiner, "loss_weight", lambda self, angle: torch.full_like(angle, 2.0))
    basis = basis_of(context.features, 32)
    variance = basis.deviation.square().sum(1)
    expected = 2 * ((target - output).square().sum(1).mean((1, 2)) / variance).mean()  # 6 channels, 6 directions
    assert close(
        lost(refiner, output, context, Batch(context.image, context.features, target, (8, 10))), expected, 1e-9
    )


def test_the_right_residual_costs_nothing(monkeypatch):
    refiner, (output, context) = make(), given()
    target = output + draw(*output.shape, seed=4)
    clean = coordinates(target, basis_of(context.features, 32)) - coordinates(output, basis_of(context.features, 32))
    monkeypatch.setattr(DiffusionRefiner, "estimate", lambda self, condition, noisy, angle: clean.repeat(4, 1, 1, 1))
    assert lost(refiner, output, context, Batch(context.image, context.features, target, (8, 10))) < 1e-20


@pytest.mark.parametrize("levels", [1, 3])
def test_noise_levels_of_a_step_are_spread_over_the_schedule(levels, monkeypatch):
    """And each is that of its noisy residual: the target's share falls as the noise's grows."""
    refiner, (output, context), seen = make(num_levels=levels), given(size=(8, 10)), {}

    def estimate(self, condition, noisy, angle):
        seen["angle"], seen["noisy"], seen["initial"] = angle, noisy, condition.initial
        return noisy

    monkeypatch.setattr(DiffusionRefiner, "estimate", estimate)
    lost(refiner, output, context, Batch(context.image, context.features, output + 1e3, (8, 10)))
    number = 2 * levels
    level = torch.searchsorted(angles(), seen["angle"])
    assert sorted((level * number // 1000).tolist()) == list(range(number)), "one in each part of the schedule"
    basis = basis_of(context.features, 32)
    clean = (coordinates(output + 1e3, basis) - coordinates(output, basis)).repeat(levels, 1, 1, 1)
    assert close(seen["initial"], coordinates(output, basis).repeat(levels, 1, 1, 1))
    drawn = (seen["noisy"] - seen["angle"].cos()[:, None, None, None] * clean).flatten(1)
    assert torch.allclose(drawn.std(1), seen["angle"].sin(), rtol=0.2)


def test_crops_are_parts_of_the_whole(monkeypatch):
    """The four quarters as crops have the loss of the whole, where noise and level play no part."""
    refiner, (output, context) = make(), given()
    target = output + draw(*output.shape, seed=4)
    monkeypatch.setattr(DiffusionRefiner, "loss_weight", lambda self, angle: torch.ones_like(angle))
    whole = lost(refiner, output, context, Batch(context.image, context.features, target, (8, 10)))
    corners = torch.tensor([[0, 0], [0, 5], [4, 0], [4, 5]]).repeat(2, 1)
    quarters = torch.stack([target[i, :, r : r + 4, c : c + 5] for i in range(2) for r in (0, 4) for c in (0, 5)])
    batch = Batch(context.image, context.features, quarters, (8, 10), corners=corners)
    assert close(lost(refiner, output, context, batch), whole, 1e-9)


def test_crops_finer_than_the_refinement_are_refused():
    refiner, (output, context) = make(refine_scale=1), given()
    batch = Batch(context.image, context.features, output[:, :, :2, :2], (8, 10), corners=torch.zeros(2, 2).long())
    with pytest.raises(ValueError, match=r"grid of \(4, 5\).*\(8, 10\): set refiner.refine_scale to views.scale"):
        lost(refiner, output, context, batch)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_core_is_trained_with_it_or_frozen(frozen):
    """After a step the gate opens, ten times as fast; a frozen core stays; copies carry no graph."""
    model = AnyUp(refiner=partial(DiffusionRefiner, **SMALL), embed_dim=WIDTH).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("refiner.") or not frozen)
    before = copy.deepcopy(model.state_dict())
    trainable = Trainable(model, build_objective(), PlainStep())
    image, features = draw(2, 3, 12, 16).float(), draw(2, 5, 3, 4).float()
    batch = Batch(image, features, draw(2, 5, 6, 8).float(), (6, 8))
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    [losses] = PlainStep().step(trainable, [batch], torch.optim.AdamW(learnt, lr=1e-3))
    assert {"denoising_loss", "reconstruction_loss"} == set(losses)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "refiner.gate" in moved
    assert frozen == all(name.startswith("refiner.") for name in moved)
    assert lr_scale(model, "refiner.gate") == GATE_LR_SCALE
    model(image, features, (6, 8))
    assert copy.deepcopy(model).refiner._condition is None


def build_objective():
    from core import build_filler

    return build_filler("objective", {"name": "cosine_mse", "self_consistency": 0, "input_consistency": 0})


def test_gradients_reach_the_core_through_the_conditioning(perturbed):
    refiner, (output, context) = make(perturbed), given()
    output.requires_grad_()
    context.guidance.requires_grad_()
    lost(refiner, output, context, Batch(context.image, context.features, output.detach() + 1, (8, 10))).backward()
    assert output.grad.abs().max() > 0
    assert context.guidance.grad.abs().max() > 0


# --- does it predict? ------------------------------------------------------------------------------------------------


def scene(seed: int, known: bool = True) -> tuple[Tensor, Context, Tensor]:
    """Two regions with straight borders: features of coarse cells, the initial (bilinear) output, and the target.

    Where not `known`, the target has a residual besides, +v or -v at each point at random, which nothing foretells.
    """
    random = torch.Generator().manual_seed(seed)
    normal, offset = torch.randn(4, 2, generator=random), 0.3 * torch.randn(4, generator=random)
    place = pixel_centres((24, 24), like=normal) - 0.5
    region = (torch.einsum("hwc,bc->bhw", place, normal) > offset[:, None, None]).float()[:, None]  # (4,1,24,24)
    colours, vectors = torch.randn(2, 4, 3, 1, 1, generator=random), torch.randn(2, 4, 5, 1, 1, generator=random)
    image = region * colours[0] + (1 - region) * colours[1]
    target = region * vectors[0] + (1 - region) * vectors[1]
    target = target + 0.3 * torch.randn(4, 5, 6, 6, generator=random).repeat_interleave(4, 2).repeat_interleave(4, 3)
    features = F.adaptive_avg_pool2d(target, (6, 6))
    target = F.adaptive_avg_pool2d(target, (12, 12))
    output = F.interpolate(features, (12, 12), mode="bilinear")
    if not known:
        sign = torch.randint(0, 2, (4, 1, 12, 12), generator=random) * 2.0 - 1
        target = output + sign * (vectors[0] - vectors[1]) / 2
    guidance = image.repeat(1, 6, 1, 1)[:, :WIDTH]
    return output, Context(image, features, pixel_centres((12, 12), like=image), guidance), target


def learned(known: bool, steps: int) -> DiffusionRefiner:
    torch.manual_seed(0)
    refiner = DiffusionRefiner(WIDTH, hidden_dim=16, window=3, strength=1.0).train()
    groups = [
        {"params": [p for n, p in refiner.named_parameters() if n != "gate"]},
        {"params": [refiner.gate], "lr": 2e-2},
    ]
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    for step in range(steps):
        output, context, target = scene(step, known)
        batch = Batch(context.image, context.features, target, (12, 12))
        batch.generator = torch.Generator().manual_seed(step)
        refiner(output, context)
        optimizer.zero_grad()
        refiner.auxiliary_loss(output, batch)["denoising_loss"].backward()
        optimizer.step()
    return refiner.eval()


def errors(refiner: DiffusionRefiner, known: bool) -> dict[str, float]:
    """Squared error on new scenes, relative to that of the initial output."""
    found: dict[str, float] = {}
    for seed in range(1000, 1008):
        output, context, target = scene(seed, known)
        arms = {"initial": output, "blurred": F.avg_pool2d(output, 3, 1, 1, count_include_pad=False)}
        arms["sharpened"] = 2 * output - arms["blurred"]
        for name, steps, samples in (("mean predictor", 1, 1), ("sample", 10, 1), ("mean of 8 samples", 10, 8)):
            refiner.num_inference_steps, refiner.num_samples = steps, samples
            arms[name] = refine(refiner, output, context)
        for name, output in arms.items():
            found[name] = found.get(name, 0) + (output - target).square().mean().item()
    return {name: error / found["initial"] for name, error in found.items()}


def test_what_the_image_foretells_is_recovered():
    """Borders that the guidance shows: samples are closer to the target than the initial output, a sharper and a
    smoother one. A single sample is not closer than the mean of samples."""
    found = errors(learned(True, 100), True)
    assert found["mean predictor"] < 0.8
    assert found["mean of 8 samples"] < 0.8 * min(1, found["sharpened"], found["blurred"])
    assert found["sample"] < 1
    assert found["mean of 8 samples"] < found["sample"]


def test_what_nothing_foretells_is_not_made_up_by_the_mean():
    """A residual of random sign: a sample has a larger error than the initial output (twice, if it were exact); the
    mean predictor and the mean of samples stay near it."""
    found = errors(learned(False, 100), False)
    assert found["mean predictor"] < 1.15
    assert found["sample"] > 1.3
    assert found["mean of 8 samples"] < 1.25


# --- refusals and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("strength=1.5", r"strength must be 0 to 1 \(0: the initial output as it is, 1: from noise\), got 1.5"),
        ("strength=-0.1", "strength must be 0 to 1"),
        ("num_inference_steps=51", "num_inference_steps must be 0 to 50, got 51"),
        ("num_inference_steps=-1", "num_inference_steps must be 0 to 50"),
        ("scheduler=DDIM", "scheduler 'DDIM' .*there are: DDIMScheduler, .*FlowMatchEulerDiscreteScheduler"),
        ("scheduler=PNDMScheduler", r"scheduler 'PNDMScheduler' is not to be had \(its first steps repeat"),
        ("num_samples=0", "num_samples must be at least 1"),
        ("tile=10", "tile must be a multiple of 4, at least 8, got 10"),
        ("hidden_dim=12", "hidden_dim must be a multiple of 8, got 12"),
        ("num_directions=0", "num_directions must be at least 1"),
        ("refine_scale=0", "refine_scale must be at least 1"),
        ("num_levels=0", "num_levels must be at least 1"),
        ("uncertain_share=0", r"uncertain_share must be above 0, to 1 \(all points\), got 0"),
        ("window=4", "window must be odd, at least 1, got 4"),
        ("min_snr_gamma=0", "min_snr_gamma must be above 0, or null"),
        ("prediction=x0", r"refiner.prediction=x0: .*expected one of \[epsilon, v_prediction, sample\]"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build(["refiner=diffusion", f"refiner.{setting}"])


def test_what_may_change_after_training():
    of_sampling = {"num_inference_steps", "strength", "scheduler", "num_samples", "uncertain_share", "tile"}
    assert set(DiffusionRefiner.changeable) == of_sampling | {"num_directions"}


def test_pictures_show_the_steps_and_the_spread(perturbed):
    refiner, (output, context) = make(perturbed, num_samples=2, num_inference_steps=3), given()
    assert refiner.pictures() == {}
    refine(refiner, output, context)
    *titles, spread = pictures = refiner.pictures()
    assert titles == ["initial output", "step 1 of 3", "step 2 of 3", "step 3 of 3"]
    assert spread.startswith("spread of samples / ")
    assert all(picture.shape == (3, 8, 10) for picture in pictures.values())
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures.values())
    assert pictures[spread].max() == 1
    parts = [pictures[title] for title in titles]
    basis = basis_of(context.features, 32)
    plain = coordinates(output, basis)[0, :3]
    low, high = plain.amin((1, 2), keepdim=True), plain.amax((1, 2), keepdim=True)
    assert close(parts[0], (plain - low) / (high - low)), "the initial output"
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(parts))


def test_pictures_of_one_channel(perturbed):
    refiner = make(perturbed)
    refine(refiner, *given(channels=1))
    pictures = refiner.pictures()
    assert all(picture.shape == (3, 8, 10) for picture in pictures.values())
    assert not any(picture[1:].any() for picture in pictures.values())


def test_pictures_of_many_steps_are_few(perturbed):
    refiner = make(perturbed, num_inference_steps=10, strength=1.0)
    refine(refiner, *given())
    steps = [f"step {i} of 10" for i in (2, 5, 8, 10)]
    assert list(refiner.pictures()) == ["initial output", *steps]


def test_drawing_under_a_compiler_says_so(perturbed):
    output, context = given()
    context.generator = None
    with pytest.raises(RuntimeError, match="random numbers cannot be drawn under"), torch.no_grad():
        make(perturbed)(output, context)


@pytest.mark.slow
@torch.no_grad()
def test_ten_steps_take_at_most_three_times_the_cores_time():
    """At 448², on CPU. Slow: a time says something only on a quiet machine."""
    models = [build([]).eval(), build(["refiner=diffusion", "refiner.num_inference_steps=10"]).eval()]
    image, features = draw(1, 3, 448, 448).float(), draw(1, 384, 28, 28).float()
    times: list[list[float]] = [[], []]
    for _ in range(3):
        for model, spent in zip(models, times, strict=True):
            start = time.perf_counter()
            model(image, features)
            spent.append(time.perf_counter() - start)
    assert min(times[1]) <= 3 * min(times[0])
