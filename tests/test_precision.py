"""Every dtype against float64: values of all fillers at every width, and gradients summed over many blocks."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import core
from core import encoder, registry, rotary, unifiers
from core.fast import norm_act_conv

WIDTH = 16
CHANNELS = [1, 384, 768, 1024, 4096]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def bound(dtype: torch.dtype, factor: float = 64.0) -> float:
    """Of errors relative to the largest value: some tens of roundings follow one another in a filler."""
    return factor * torch.finfo(dtype).eps


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


FILLERS = {
    "learned_basis": ("unifier", {"num_basis": 16}),
    "learned_basis released": ("unifier", {"num_basis": 16, "ordering": "released"}),
    "dynamic_basis": ("unifier", {"num_basis": 16, "hidden_dim": 8, "open_at_start": 0.3}),
    "window": ("attention", {"num_heads": 2}),
    "global": ("attention", {"num_heads": 2}),
    "pyramid_window": ("attention", {"num_heads": 2, "scales": [2.0, 5.0]}),
    "inr": ("decoder", {"hidden_dim": 8, "num_frequencies": 2}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", FILLERS)
def test_fillers_in_every_dtype_at_every_width(name, channels, dtype):
    """At unchanged weights and inputs, rounded beforehand: only the arithmetic differs. Sums over 4096 channels too."""
    hook, settings = FILLERS[name]
    torch.manual_seed(0)
    filler = registry.factory(hook, name.split()[0], settings)(embed_dim=WIDTH).to(dtype).eval()
    features, guidance = noise(1, channels, 3, 4).to(dtype), noise(1, WIDTH, 12, 16, seed=1).to(dtype)
    query, key = noise(1, WIDTH, 7, 9, seed=2).to(dtype), noise(1, WIDTH, 3, 4, seed=3).to(dtype)
    given = {
        "unifier": (features, guidance),
        "attention": (query, key, features),
        "decoder": (
            noise(1, channels, 7, 9, seed=4).to(dtype),
            core.Context(guidance[:, :3], features, core.anyup.pixel_centres((7, 9), like=query), guidance),
        ),
    }[hook]
    with torch.no_grad():
        found = filler(*given)
        wide = [x.double() if isinstance(x, Tensor) else doubled(x) for x in given]
        expected = copy.deepcopy(filler).double()(*wide)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    allowed = bound(dtype)
    if hook == "unifier" and dtype == torch.float32:  # its definition loses more there: it is ill-conditioned
        filler.encoder.twice_differentiable = filler.encoder[0].twice_differentiable = True
        with torch.no_grad():
            allowed = max(allowed, 2 * error(filler(*given), expected))
    assert error(found, expected) < allowed


def doubled(context: core.Context) -> core.Context:
    return core.Context(*(x.double() for x in (context.image, context.features, context.coords, context.guidance)))


@pytest.mark.parametrize("ordering", ["paper", "released"])
@pytest.mark.parametrize("channels", [768, 4096])
def test_the_gradient_of_the_feature_path_in_half_precision(ordering, channels):
    """It was lost where num_basis · C exceeds what half precision holds."""
    torch.manual_seed(0)
    layer = unifiers.BasisConvolution(128, 3, unifiers.Ordering(ordering))
    features = torch.nn.functional.normalize(noise(1, channels, 3, 4), dim=1)
    grads = {}
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        own, given = copy.deepcopy(layer).to(dtype), features.detach().clone().to(dtype).requires_grad_()
        weight = torch.linspace(-1, 1, 128 * 12, dtype=torch.float64).view(1, 128, 3, 4)
        (1000 * own(given) * weight.to(dtype)).sum().backward()
        grads[dtype] = given.grad, own.basis.grad
    for dtype in (torch.float16, torch.bfloat16):
        for found, expected in zip(grads[dtype], grads[torch.float64], strict=True):
            assert error(found, expected) < bound(dtype), dtype


def test_a_half_precision_model_on_wide_features_is_the_float32_one():
    """ViT-B has 768 channels: the worst cosine was .77."""
    model = core.AnyUp.from_pretrained()
    image, features = noise(1, 3, 32, 32).float(), noise(1, 768, 4, 4).float()
    with torch.no_grad():
        expected = model(image, features, (16, 16))
        for dtype, least in ((torch.float16, 0.9995), (torch.bfloat16, 0.99)):
            half = copy.deepcopy(model).to(dtype)(image.to(dtype), features.to(dtype), (16, 16)).float()
            assert torch.cosine_similarity(half, expected, dim=1).min() > least, dtype


# --- gradients of weights, summed over many blocks and images ---------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """As many blocks as large images have, of few pixels each."""
    monkeypatch.setattr(norm_act_conv, "PIXELS_PER_BLOCK", 16)
    monkeypatch.setattr(rotary, "PIXELS_PER_BLOCK", 16)


@pytest.mark.parametrize("pooled", [None, (3, 3)], ids=["whole", "pooled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_signed_gradients_add_up_over_blocks(small_blocks, dtype, pooled):
    """In bfloat16 a sum stops growing at 256 times a term: 4 images of 448² came out at .52 of their gradient."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 1, bias=False)
    wide = encoder.Encoder(stem, 16, 16).double()
    narrow = copy.deepcopy(wide).to(dtype)
    with torch.no_grad():  # the same weights in both, after rounding
        for ours, theirs in zip(wide.parameters(), narrow.parameters(), strict=True):
            ours.copy_(theirs)
    x = (1 + 0.1 * noise(2, 3, 96, 96)).to(dtype)
    wide.plain(x.double(), pooled).sum().backward()
    narrow(x, pooled).sum().backward()
    for (name, ours), theirs in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        largest = theirs.grad.abs().max()
        if largest > 1e-6 * 2 * 96 * 96:  # else the sum is zero but for rounding
            ratio = (ours.grad.double() * theirs.grad).sum() / theirs.grad.square().sum()
            assert abs(ratio - 1) < bound(dtype, 8), name


def test_one_signed_gradients_of_the_rotary_frequencies(small_blocks):
    layer = rotary.Rotary(16)
    grads = {}
    for dtype in (torch.float64, torch.bfloat16):
        own = copy.deepcopy(layer).to(dtype)
        with torch.no_grad():
            own.freqs.copy_(layer.freqs.to(torch.bfloat16))
        own((1 + 0.1 * noise(2, 16, 40, 40)).to(torch.bfloat16).to(dtype)).sum().backward()
        grads[dtype] = own.freqs.grad
    assert error(grads[torch.bfloat16], grads[torch.float64]) < bound(torch.bfloat16)


def test_positions_are_not_rounded_to_half_precision():
    """At 448 pixels bfloat16 would move a pixel by up to one in 256."""
    layer = rotary.Rotary(16).bfloat16()
    for position in rotary._positions(torch.zeros(1, 16, 448, 448), layer.freqs):
        assert position.dtype == torch.float32
    x = noise(1, 16, 1, 448).to(torch.bfloat16)
    with torch.no_grad():
        found = layer(x.clone())
        wide = copy.deepcopy(layer).double()
        expected = wide.plain(x.double(), wide.freqs)
    assert error(found, expected) < bound(torch.bfloat16, 8)


def test_means_over_many_channels_keep_their_digits():
    """The mean of softmaxes is about 1/M for every filter: what counts is the difference, so no digit may go."""
    torch.manual_seed(0)
    layer = unifiers.BasisConvolution(128, 5, unifiers.Ordering.paper)
    features = torch.nn.functional.normalize(noise(1, 2048, 3, 4), dim=1)
    with torch.no_grad():
        found = layer(features.float())
        wide = copy.deepcopy(layer).double()
        wide.twice_differentiable = True
        expected = wide(features)
    worst = (found.double() - expected).abs().max() * 128
    assert worst < 8 * torch.finfo(torch.float32).eps + 4 * math.sqrt(2048) * torch.finfo(torch.float32).eps / 64
