"""The prior by distance and colour: closed it is the window; open it is what the loops below say."""

import itertools
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import core
from core import AnyUp, registry
from core.attention import WindowAttention
from core.backbones import IMAGENET_STD
from core.fast.windows import window_bounds
from core.points import pixel_centres
from extensions.bilateral_prior import BilateralPriorAttention

WIDTH = 16
OPEN = {"gate_at_start": 0.6, "share_at_start": 0.3, "temperature": 1.7, "sigma_space": 0.9, "sigma_colour": 0.3}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(seed: int = 0, **settings) -> BilateralPriorAttention:
    """Float64, every weight off its initial value, with gates of both signs."""
    torch.manual_seed(seed)
    factory = registry.factory("attention", "bilateral_prior", {"num_heads": 2} | OPEN | settings)
    filler = factory(embed_dim=WIDTH).double()
    with torch.no_grad():
        for parameter in filler.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        filler.gates[0] = -0.4
    return filler.eval()


def given(channels: int = 3, grid=(5, 6), size=(9, 13), image=(20, 18), batch: int = 2) -> dict[str, Tensor]:
    return {
        "query": noise(batch, WIDTH, *size),
        "key": noise(batch, WIDTH, *grid, seed=1),
        "value": noise(batch, channels, *grid, seed=2),
        "image": noise(batch, 3, *image, seed=3),
    }


def by_loops(filler: BilateralPriorAttention, query: Tensor, key: Tensor, value: Tensor, image: Tensor) -> Tensor:
    """From the definition, one query, head and key at a time: (B,C,Qh,Qw)."""
    (height, width), grid, heads = query.shape[-2:], key.shape[-2:], filler.num_heads
    rgb = image * torch.tensor(IMAGENET_STD, dtype=torch.float64).view(3, 1, 1)
    fine, coarse = (F.adaptive_avg_pool2d(rgb, n) for n in ((height, width), grid))
    convolved = F.conv2d(query, filler.conv.weight, padding=1)
    bounds = [window_bounds(n, cells, filler.window_ratio) for n, cells in zip((height, width), grid, strict=True)]
    gates, share, sigmas = filler.gates.tolist(), abs(filler.odds.item()), filler.log_sigmas.exp().tolist()
    share = share / (1 + share)
    output = torch.zeros(len(query), value.shape[1], height, width, dtype=torch.float64)
    for b, i, j in itertools.product(range(len(query)), range(height), range(width)):
        cells = list(itertools.product(*(range(first[n], last[n]) for n, (first, last) in zip((i, j), bounds))))  # noqa: B905
        q = filler.project_query(normed(filler.norm_query, convolved[b, :, i, j])).split(WIDTH // heads)
        rows = []
        for y, x in cells:
            k = filler.project_key(normed(filler.norm_key, key[b, :, y, x])).split(WIDTH // heads)
            down = (i + 0.5) / height * grid[0] - (y + 0.5)
            right = (j + 0.5) / width * grid[1] - (x + 0.5)
            colour = (fine[b, :, i, j] - coarse[b, :, y, x]).square().sum().item()
            priors = [-(down**2 + right**2) / (2 * s**2) - colour / (2 * t**2) for s, t in sigmas]
            similar = [(q[h] @ k[h]).item() / math.sqrt(WIDTH / heads) / filler.temperature for h in range(heads)]
            rows.append([similar[h] + gates[h] * priors[h] for h in range(heads)] + [priors[-1]])
        weights = torch.tensor(rows, dtype=torch.float64).softmax(0)  # (keys,H+1)
        weights = (1 - share) * weights[:, :-1].mean(1) + share * weights[:, -1]
        for weight, (y, x) in zip(weights, cells, strict=True):
            output[b, :, i, j] += weight * value[b, :, y, x]
    return output


def normed(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    return x / (x.square().mean() + (norm.eps or torch.finfo(x.dtype).eps)).sqrt() * norm.weight


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() / expected.abs().max().clamp(min=1e-3).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
    return True


CASES = {
    "usual": ({}, {}),
    "many tiles": ({"window_ratio": 0.15}, {"size": (25, 20)}),
    "no window": ({"window_ratio": 0.0}, {"batch": 1}),
    "wide, portrait": ({"window_ratio": 0.4}, {"grid": (7, 3), "size": (17, 4), "batch": 1}),
    "smaller than the features": ({}, {"grid": (6, 7), "size": (3, 2), "image": (24, 28)}),
    "larger than the image": ({"num_heads": 1}, {"grid": (2, 3), "size": (13, 10), "image": (6, 9)}),
}


@pytest.mark.parametrize("block", [2**20, 200])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_loops(case, block):
    settings, sizes = case
    filler, inputs = make(**settings), given(**sizes)
    with patch("core.attention.MAX_LOGITS", {"cpu": block}), torch.no_grad():
        expected = by_loops(filler, **inputs)
        assert close(filler(**inputs), expected)
        assert close(torch.cat([band for _, band in filler.bands(**inputs)], 2), expected)
        axes = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in expected.shape[-2:]]
        points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        assert close(filler.at(**inputs, coords=points), expected.flatten(2))


def test_gradients_are_those_of_the_loops():
    """Of the inputs and of every weight, by finite differences along a random direction."""
    filler = make()
    inputs = {name: tensor.requires_grad_() for name, tensor in given(batch=1, size=(4, 5)).items() if name != "image"}
    image = given(batch=1)["image"]
    probe = noise(1, 3, 4, 5, seed=9)
    tensors = [*inputs.values(), *filler.parameters()]
    with patch("core.attention.MAX_LOGITS", {"cpu": 64}):  # in blocks that are computed again
        gradients = torch.autograd.grad((filler(**inputs, image=image) * probe).sum(), tensors)
    for k, (tensor, gradient) in enumerate(zip(tensors, gradients, strict=True)):
        direction, values = noise(*tensor.shape, seed=k), []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                tensor.add_(step * direction)
                values.append((by_loops(filler, **inputs, image=image) * probe).sum())
                tensor.sub_(step * direction)
        expected = (values[0] - values[1]) / 2e-5
        assert gradient.abs().max() > 0
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-8)


def test_at_the_start_it_is_the_window_bit_for_bit(perturbed):
    """With and without gradients, in bands, at points; and the prior costs nothing until it may open."""
    window = perturbed(WindowAttention(WIDTH)).eval()
    filler = BilateralPriorAttention(WIDTH)
    missing = filler.load_state_dict(window.state_dict(), strict=False)
    assert missing.missing_keys == ["gates", "odds", "log_sigmas"]
    inputs = {name: tensor.float() for name, tensor in given().items()}
    plain = {name: tensor for name, tensor in inputs.items() if name != "image"}
    coords = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(filler(**inputs), window(**plain))
            assert torch.equal(filler.at(**inputs, coords=coords), window.at(**plain, coords=coords))
    with torch.no_grad():
        for ours, theirs in zip(filler.bands_with_entropy(**inputs), window.bands_with_entropy(**plain), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    with torch.no_grad(), patch("extensions.bilateral_prior.BilateralPrior", side_effect=AssertionError):
        filler(**inputs)


def test_gates_and_share_open_by_training():
    """From the closed start towards a target that an open filler gives."""
    target_filler, filler = make(num_heads=2), make(num_heads=2, seed=1)
    filler.load_state_dict(target_filler.state_dict())
    filler.temperature = target_filler.temperature
    with torch.no_grad():
        filler.gates.zero_()
        filler.odds.zero_()
    inputs = given()
    target = target_filler(**inputs).detach()
    optimizer = torch.optim.Adam([filler.gates, filler.odds], lr=0.02)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (filler(**inputs) - target).square().mean()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.05 * errors[0]
    assert torch.sign(filler.gates).tolist() == torch.sign(target_filler.gates).tolist()


def test_half_of_the_weights_is_the_mean_with_a_joint_bilateral_filter(perturbed):
    """Which is the training-free gain that the prior comes from (docs/evidence.md)."""
    from experiments.peers import peer_from_config

    small = ["embed_dim=16", "unifier.num_basis=8", "attention.window_ratio=0"]
    baseline = perturbed(core.build(small)).eval()
    model = core.build([*small, "attention=bilateral_prior", "attention.share_at_start=0.5"]).eval()
    model.load_state_dict(baseline.state_dict(), strict=False)
    image, features = torch.randn(1, 3, 24, 24), torch.randn(1, 5, 4, 4)
    bilateral = peer_from_config({"peer": "joint_bilateral", "window": 9})
    with torch.no_grad():
        expected = (baseline(image, features, (8, 8)) + bilateral(image, features, (8, 8))) / 2
        assert close(model(image, features, (8, 8)), expected, 1e-4)


def test_near_cells_of_like_colour_count_more():
    """Two halves of two colours: the output follows the colour's edge, and not the middle of the grid."""
    filler = BilateralPriorAttention(WIDTH, window_ratio=0, share_at_start=0.999, sigma_colour=0.05)
    image = torch.zeros(1, 3, 64, 64)
    image[..., 32:] = 2.0
    inputs = given(grid=(4, 4), size=(32, 32), batch=1, channels=1)
    values = (torch.arange(4) >= 2).float().expand(1, 1, 4, 4)
    with torch.no_grad():
        output = filler(inputs["query"].float(), inputs["key"].float(), values, image=image)
    assert output[..., :16].max() < 0.01
    assert output[..., 16:].min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_does_not_lose_positions(dtype):
    """On a grid whose cells bfloat16 cannot tell apart by number."""
    inputs = given(grid=(3, 300), size=(3, 600), image=(6, 600), batch=1)
    filler = make(window_ratio=0.02)
    with torch.no_grad():
        expected = filler(**inputs)
        found = filler.to(dtype)(**{name: tensor.to(dtype) for name, tensor in inputs.items()})
    assert close(found, expected, 40 * torch.finfo(dtype).eps)


def test_memory_is_bounded(largest_tensor):
    """The prior of a large output is made tile by tile, as the logits are."""
    filler = make().float()
    inputs = {name: tensor.float() for name, tensor in given(size=(96, 96), grid=(12, 12), batch=1).items()}
    with patch("core.attention.MAX_LOGITS", {"cpu": 2**12}), torch.no_grad(), largest_tensor() as largest:
        filler(**inputs)
    assert largest.values <= WIDTH * 100 * 100  # the padded query


def test_a_checkpoint_of_the_window_can_be_used_with_the_prior(tmp_path, perturbed):
    baseline = perturbed(core.build(["embed_dim=16", "attention.num_heads=2", "attention.window_ratio=0.3"])).eval()
    core.save(baseline, tmp_path / "window.safetensors")
    image, features = torch.randn(1, 3, 16, 16), torch.randn(1, 5, 4, 4)
    closed = core.load(tmp_path / "window.safetensors", {"attention": "bilateral_prior"})
    settings = {"name": "bilateral_prior", "share_at_start": 0.2, "window_ratio": 0.2}
    opened = core.load(tmp_path / "window.safetensors", {"attention": settings})
    with torch.no_grad():
        assert torch.equal(closed(image, features), baseline(image, features))
        assert not torch.equal(opened(image, features), baseline(image, features))
    assert closed.config["attention"]["num_heads"] == opened.config["attention"]["num_heads"] == 2
    assert (closed.attention.window_ratio, opened.attention.window_ratio) == (0.3, 0.2)
    assert torch.equal(opened.attention.conv.weight, baseline.attention.conv.weight)
    core.save(opened, tmp_path / "opened.safetensors")
    sharper = core.load(tmp_path / "opened.safetensors", {"attention.temperature": 3.0})
    assert sharper.attention.filters() == opened.attention.filters()
    assert sharper.attention.share.item() == pytest.approx(0.2)


def test_every_way_into_the_model_shows_it_the_image(perturbed):
    model = perturbed(AnyUp(attention=partial(BilateralPriorAttention, **OPEN), embed_dim=16)).eval()
    image, features = torch.randn(2, 3, 20, 18), torch.randn(2, 5, 5, 6)
    head = torch.nn.Linear(5, 3)
    with torch.no_grad():
        output = model(image, features, (9, 13))
        assert close(torch.cat([band for _, band in model.stream(image, features, (9, 13))], 2), output, 1e-5)
        assert close(model.with_uncertainty(image, features, (9, 13))[0], output, 1e-5)
        assert close(model.readout(image, features, head, (9, 13)), head(output.movedim(1, -1)).movedim(-1, 1), 1e-5)
        points = torch.stack([pixel_centres((9, 13), output).flatten(0, 1)] * 2)  # each image with its own
        assert close(model.query(image, features, points, (9, 13)), output.flatten(2), 1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_space": 0.0}, "sigma_space must be a positive number, got 0.0"),
        ({"sigma_colour": math.inf}, "sigma_colour must be a positive number, got inf"),
        ({"temperature": -1.0}, "temperature must be a positive number, got -1.0"),
        ({"share_at_start": 1.0}, "share_at_start must be at least 0 and below 1, got 1.0"),
        ({"gate_at_start": math.nan}, "gate_at_start must be a number, got nan; 0 closes the gates"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        BilateralPriorAttention(WIDTH, **settings)


def test_without_the_image_it_says_what_it_needs():
    inputs = given()
    del inputs["image"]
    with pytest.raises(TypeError, match=r"attention=bilateral_prior looks at colours: call it with image="):
        make()(**inputs)
