"""What the peers without training of their own compute, against slow float64 definitions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import core
from core.backbones import IMAGENET_STD
from experiments.peers import make_peer, peer_from_config, peer_identity
from experiments.peers.guided_filter import GuidedFilter
from experiments.settings import SettingError


def colours(image, size, grid):
    rgb = image * image.new_tensor(IMAGENET_STD).view(3, 1, 1)
    return F.interpolate(rgb, size, mode="area")[0], F.interpolate(rgb, grid, mode="area")[0]


@pytest.mark.parametrize(("grid", "size"), [((5, 7), (13, 17)), ((1, 4), (3, 8)), ((9, 2), (18, 5))])
def test_lanczos_enlarges_as_pillow_does(grid, size):
    features = torch.randn(1, 1, *grid)
    ours = make_peer("lanczos")(torch.zeros(1, 3, 4, 4), features, size)
    theirs = Image.fromarray(features[0, 0].numpy()).resize(size[::-1], Image.Resampling.LANCZOS)
    torch.testing.assert_close(ours[0, 0], torch.from_numpy(np.array(theirs)), atol=1e-5, rtol=0)


def test_area_bilinear_has_no_detail_of_the_coarser_grid():
    fine = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(3, 2)[None, None]  # (1,1,6,4): mean 0 in each 2 x 2
    peer = make_peer("area_bilinear")
    assert not peer(torch.zeros(1, 3, 8, 8), fine, (12, 8)).any()
    smooth = torch.randn(1, 2, 3, 2)
    enlarged = smooth.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.interpolate(smooth, (9, 11), mode="bilinear")
    torch.testing.assert_close(peer(torch.zeros(1, 3, 8, 8), enlarged, (9, 11)), expected)
    with pytest.raises(SettingError, match="needs shrink of at least 1, got 0"):
        peer_from_config({"peer": "area_bilinear", "shrink": 0})


def slow_guided(image, features, size, radius, ridge):
    """Window by window: ridge regression on the cells of each, then means of its coefficients."""
    (channels, h, w), grid = features.shape[1:], features.shape[-2:]
    fine, coarse = colours(image, size, grid)

    def window(i, j):
        rows, columns = (range(max(0, n - radius), min(m, n + radius + 1)) for n, m in ((i, h), (j, w)))
        return [(y, x) for y in rows for x in columns]

    fitted = torch.empty(channels, 4, h, w, dtype=features.dtype)  # slopes and offset
    for i in range(h):
        for j in range(w):
            cells = window(i, j)
            x = torch.stack([coarse[:, a, b] for a, b in cells])
            y = torch.stack([features[0, :, a, b] for a, b in cells])
            centred, n = x - x.mean(0), len(cells)
            penalty = ridge * n * torch.eye(3, dtype=x.dtype)
            slope = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean(0)))  # (3,C)
            fitted[:, :3, i, j], fitted[:, 3, i, j] = slope.T, y.mean(0) - x.mean(0) @ slope
    smooth = torch.empty_like(fitted)
    for i in range(h):
        for j in range(w):
            smooth[:, :, i, j] = torch.stack([fitted[:, :, a, b] for a, b in window(i, j)]).mean(0)
    enlarged = F.interpolate(smooth.flatten(0, 1)[None], size, mode="bilinear")[0].unflatten(0, (channels, 4))
    return ((enlarged[:, :3] * fine).sum(1) + enlarged[:, 3])[None]


@pytest.mark.parametrize(("radius", "ridge"), [(1, 0.01), (2, 0.1)])
def test_guided_filter_is_its_definition(radius, ridge):
    image, features = 0.5 * torch.randn(1, 3, 18, 24).double(), torch.randn(1, 4, 3, 4).double()
    ours = GuidedFilter(radius, ridge)(image, features, (7, 9))
    torch.testing.assert_close(ours, slow_guided(image, features, (7, 9), radius, ridge), atol=1e-11, rtol=0)


def test_guided_filter_follows_an_edge_of_the_image():
    """Features that are a function of colour keep it at the output's resolution, where windows see both sides."""
    image = torch.zeros(1, 3, 24, 24).double()
    image[..., 9:] = 1.0  # not at the border of a cell
    features = F.interpolate(image[:, :1], (6, 6), mode="area")
    sharp = GuidedFilter(1, 1e-9)(image, features, (24, 24))
    error = (sharp - image[:, :1]).abs()[0, 0, 12]
    assert error.max() < 0.1  # next to it, functions of windows of one colour take part
    blurred = GuidedFilter(1, 1e9)(image, features, (24, 24))
    assert (blurred - image[:, :1]).abs().max() > 0.3


# Over AnyUp's attention


def attention_weights(model, image, features, size):
    """(h·w,Qh,Qw): what each cell contributes, read off by a linear head for each cell of a one-hot value."""
    seen = {}

    def keep(_, inputs):
        seen["query"], seen["key"] = inputs[:2]

    handle = model.attention.register_forward_pre_hook(keep)
    model(image, features, size)
    handle.remove()
    h, w = features.shape[-2:]
    alone = torch.eye(h * w).double().view(1, h * w, h, w)
    return model.attention(seen["query"], seen["key"], alone)[0]


@pytest.fixture
def anyup(perturbed, tmp_path):
    model = perturbed(core.build(["embed_dim=16", "attention.num_heads=2", "unifier.num_basis=8"]))
    core.save(model, tmp_path / "anyup.safetensors")
    return str(tmp_path / "anyup.safetensors")


@pytest.mark.parametrize("ridge", [0.03, 0.5])
def test_anyup_regression_is_weighted_least_squares(anyup, ridge):
    peer = peer_from_config({"peer": "anyup_regression", "checkpoint": anyup, "ridge": ridge}).double()
    image, features = torch.randn(1, 3, 16, 20).double(), torch.randn(1, 3, 4, 5).double()
    with torch.no_grad():
        ours = peer(image, features, (6, 7))
        weights = attention_weights(peer.model, image, features, (6, 7))
    fine, coarse = colours(image, (6, 7), (4, 5))
    cells, values = coarse.flatten(1).T, features[0].flatten(1).T  # (20,3), (20,C)
    for y in range(6):
        for x in range(7):
            alpha = weights[:, y, x]
            design = torch.cat([torch.ones(20, 1).double(), cells - fine[:, y, x]], 1)  # intercept: at the own colour
            penalty = torch.diag(torch.tensor([0.0, ridge, ridge, ridge], dtype=torch.float64))
            both = design.T @ (alpha[:, None] * design) + penalty
            fitted = torch.linalg.solve(both, design.T @ (alpha[:, None] * values))[0]
            torch.testing.assert_close(ours[0, :, y, x], fitted, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("mean", "prior"), [("anyup_bilateral", "joint_bilateral"), ("anyup_guided", "guided_filter")])
def test_anyup_and_its_mean_with_a_filter(anyup, mean, prior):
    model, image, features = core.load(anyup), torch.randn(1, 3, 16, 20), torch.randn(2, 7, 4, 5)
    image = image.expand(2, -1, -1, -1)
    with torch.no_grad():
        alone = peer_from_config({"peer": "anyup", "checkpoint": anyup})(image, features, (6, 7))
        torch.testing.assert_close(alone, model(image, features, (6, 7)))
        mixed = peer_from_config({"peer": mean, "checkpoint": anyup, "share": 0.25})(image, features, (6, 7))
        filtered = make_peer(prior)(image, features, (6, 7))
        torch.testing.assert_close(mixed, 0.75 * alone + 0.25 * filtered)


def test_a_checkpoint_counts_by_its_content(anyup, tmp_path):
    again = tmp_path / "elsewhere.safetensors"
    again.write_bytes((tmp_path / "anyup.safetensors").read_bytes())
    first, second = (peer_identity({"peer": "anyup", "checkpoint": str(path)}) for path in (anyup, again))
    assert first == second
    assert peer_identity({"peer": "anyup", "checkpoint": "bundled"}) != first
    with pytest.raises(SettingError, match=r"peer=anyup: checkpoint gone.safetensors: there is no such file"):
        peer_identity({"peer": "anyup", "checkpoint": "gone.safetensors"})


def test_regression_needs_plain_attention(tmp_path):
    core.save(core.build(["embed_dim=16", "decoder=inr"]), tmp_path / "inr.safetensors")
    with pytest.raises(SettingError, match=r"anyup_regression is defined on attention: .* a filler for decoder"):
        peer_from_config({"peer": "anyup_regression", "checkpoint": str(tmp_path / "inr.safetensors")})
    wrong = [
        ({"peer": "guided_filter", "ridge": 0}, "radius >= 1 and a positive ridge, got 1 and 0"),
        ({"peer": "guided_filter", "radius": 0}, "radius >= 1 and a positive ridge, got 0"),
        ({"peer": "anyup_bilateral", "checkpoint": "bundled", "share": 2}, "between 0 and 1, got 2"),
        ({"peer": "anyup_regression", "checkpoint": "bundled", "ridge": 0}, "ridge must be positive, got 0"),
    ]
    for node, reason in wrong:
        with pytest.raises(SettingError, match=reason):
            peer_from_config(node)
