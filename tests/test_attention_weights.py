"""Attention's weights at single points: with them the features give `query`'s answer; what is refused."""

import pytest
import torch

import core

SMALL = ["embed_dim=16", "unifier.num_basis=8"]
POINTS = torch.tensor([[0.5, 0.5], [0.02, 0.97], [0.31, 0.64]], dtype=torch.float64)


def inputs(grid=(17, 16)):
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(2, *shape, generator=generator).double()  # noqa: E731
    return draw(3, 34, 48), draw(7, *grid)


@pytest.mark.parametrize(
    "overrides",
    [[], ["attention=global"], ["attention=pyramid_window"], ["attention=bilateral_prior"]],
    ids=str,
)
def test_weighted_features_are_what_query_answers(perturbed, overrides):
    model = perturbed(core.build([*SMALL, *overrides])).double().eval()
    image, features = inputs()  # 272 cells, more than are looked at together
    weights = model.attention_weights(image, features, POINTS)
    assert weights.shape == (2, 3, 17, 16)
    assert not weights.requires_grad
    with torch.no_grad():
        expected = model.query(image, features, POINTS)
    torch.testing.assert_close(torch.einsum("bnhw,bchw->bcn", weights, features), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 3).double(), rtol=1e-9, atol=0)


def test_cells_outside_of_the_window_have_no_weight():
    model = core.build([*SMALL, "attention.window_ratio=0.2"]).double().eval()
    weights = model.attention_weights(*inputs((10, 10)), torch.tensor([[0.5, 0.05]], dtype=torch.float64))[0, 0]
    assert (weights[3:7, :3] > 0).all()
    weights[3:7, :3] = 0
    assert not weights.any()


def test_refuses_what_has_no_one_map():
    image, features = inputs((4, 5))
    with pytest.raises(ValueError, match="all images must have the same points"):
        core.build(SMALL).double().attention_weights(image, features, POINTS.expand(2, 3, 2))
    with pytest.raises(ValueError, match="NAFAttention weighs cells differently in each channel"):
        core.build([*SMALL, "attention=naf", "attention.value_groups=true"]).double().attention_weights(
            image, features, POINTS
        )
