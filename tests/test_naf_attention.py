"""`attention=naf`: each switch against its definition, and what it makes impossible is refused."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import core
from core.attention import WindowAttention
from core.points import pixel_centres
from extensions.naf_attention import NAFAttention

SIZE = (7, 9)


@pytest.fixture
def given():
    query, key, value = torch.randn(2, 16, *SIZE), torch.randn(2, 16, 4, 5), torch.randn(2, 7, 4, 5)
    return query.double(), key.double(), value.double()


def made(perturbed, **switches):
    filler = perturbed(NAFAttention(16, 4, 0.3, **switches)).double().eval()
    baseline = WindowAttention(16, 4, 0.3).double().eval()
    baseline.load_state_dict(filler.state_dict(), strict=False)
    return filler, baseline


def test_each_head_filters_channels_of_its_own(given, perturbed):
    """Head by head from the definition, over all cells."""
    query, key, value = given
    filler, _ = made(perturbed, value_groups=True)
    filler.window_ratio = 0
    q = filler.project_query(F.rms_norm(filler.conv(query).permute(0, 2, 3, 1), (16,), filler.norm_query.weight))
    k = filler.project_key(F.rms_norm(key.permute(0, 2, 3, 1), (16,), filler.norm_key.weight)).flatten(1, 2)
    parts = []
    for head, channels in enumerate((slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7))):
        own = slice(4 * head, 4 * head + 4)
        weights = (torch.einsum("bijd,bkd->bijk", q[..., own], k[..., own]) / 2).softmax(-1)
        parts.append(torch.einsum("bijk,bck->bcij", weights, value[:, channels].flatten(2)))
    torch.testing.assert_close(filler(*given), torch.cat(parts, 1), atol=1e-12, rtol=0)


def test_pooled_queries_are_the_keys(given, perturbed):
    query, key, value = given
    filler, baseline = made(perturbed, pooled_keys=True)
    expected = baseline(query, F.adaptive_avg_pool2d(query, (4, 5)), value)
    torch.testing.assert_close(filler(*given), expected, atol=1e-12, rtol=0)
    assert torch.equal(filler(query, torch.zeros_like(key), value), filler(*given))


def test_without_the_convolution_queries_stay_as_they_are(given, perturbed):
    filler, baseline = made(perturbed, convolve=False)
    assert not any(name.startswith("conv") for name, _ in filler.named_parameters())
    nn.init.dirac_(baseline.conv.weight)
    torch.testing.assert_close(filler(*given), baseline(*given), atol=1e-12, rtol=0)


SWITCHES = {"value_groups": True, "pooled_keys": True, "convolve": False}


@pytest.mark.parametrize("switches", [{key: value} for key, value in SWITCHES.items()] + [SWITCHES], ids=str)
def test_points_at_pixel_centres_are_the_forward(switches, given, perturbed):
    """Pixel centres are float32: a query is interpolated up to 9 * 6e-8 of the way to its neighbour."""
    filler, _ = made(perturbed, **switches)
    points = pixel_centres(SIZE, like=given[0]).flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(filler.at(*given, points).unflatten(2, SIZE), filler(*given), atol=3e-6, rtol=0)
        few = points[[3, 17]]
        torch.testing.assert_close(filler.at(*given, few), filler.at(*given, points)[..., [3, 17]], atol=3e-6, rtol=0)


def test_a_linear_head_cannot_come_before_heads_with_channels_of_their_own():
    model = core.AnyUp(attention=partial(NAFAttention, value_groups=True), embed_dim=16).eval()
    image, features = torch.randn(1, 3, 16, 16), torch.randn(1, 8, 4, 4)
    assert not model.linear_in_values
    with pytest.raises(ValueError, match="attention=NAFAttention does not give a cell one weight in all channels"):
        model.readout(image, features, nn.Linear(8, 2))
    with pytest.raises(ValueError, match="no entropy in common"):
        model.with_uncertainty(image, features)
    plain = core.AnyUp(attention=partial(NAFAttention, pooled_keys=True), embed_dim=16).eval()
    assert plain.linear_in_values
    head = nn.Linear(8, 2)
    expected = head(plain(image, features).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(plain.readout(image, features, head), expected, atol=1e-5, rtol=0)


def test_the_claims_compose_with_a_model_that_ignores_features():
    """NAF's four claims at once: no gradient reaches the features' side, and the output is a mean of features."""
    claims = ["unifier=none", "attention=naf", "attention.value_groups=true", "attention.pooled_keys=true",
              "attention.convolve=false", "embed_dim=16"]  # fmt: skip
    model = core.build(claims)
    image, features = torch.randn(1, 3, 16, 16), torch.randn(1, 8, 4, 4)
    model(image, features, (8, 8)).square().sum().backward()
    idle = {
        name.partition(".")[0]
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    }
    assert idle == {"key_encoder", "aggregation"}
    assert torch.equal(model(image, features), model(image, features))
