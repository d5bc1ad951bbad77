"""Feature fidelity: geometry, measures against slow loops, ceilings and intervals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, nnls

import core
from core.backbones import IMAGENET_MEAN, IMAGENET_STD, Backbone
from experiments.measuring.ceilings import CEILINGS, oracle, whole_image
from experiments.measuring.metrics import (
    FidelityCase,
    FidelityError,
    closeness,
    fidelity,
    fidelity_case,
    image_edges,
)
from experiments.measuring.targets import CropSettings
from experiments.peers import make_peer

SIDE_BY_SIDE = CropSettings(None)


class Painter(Backbone):
    """Features are the mean colour of each of h x w equal parts of the image, h = cells or H / stride."""

    def __init__(self, stride=4, fewer=0):
        super().__init__("painter", (3,), (stride,), (0.0,) * 3, (1.0,) * 3)
        self.fewer = fewer

    def features(self, image, layer):
        size = [side // self.patch_size - self.fewer for side in image.shape[-2:]]
        return F.interpolate(image, size, mode="area")


def ramp(side):
    """(1,3,side,side): column, row and their mean, each from 0 to 1 across the image."""
    axis = (torch.arange(side) + 0.5) / side
    x, y = axis.expand(side, side), axis[:, None].expand(side, side)
    return torch.stack([x, y, (x + y) / 2])[None]


def case_of(target, edges=None, features=None):
    edges = torch.zeros(target.shape[-2:], dtype=torch.bool) if edges is None else edges
    nothing = torch.empty(0)
    return FidelityCase(nothing, nothing, nothing if features is None else features, target, edges)


@pytest.mark.parametrize(
    ("scale", "view", "stride", "fewer"), [(2, 16, 4, 0), (4, 16, 4, 0), (3, 18, 4, 0), (2, 16, 4, 1)]
)
def test_crops_lie_where_the_grid_says(scale, view, stride, fewer):
    """Colours of a ramp are coordinates: each target cell must hold those of its centre in the unit square."""
    case = fidelity_case(ramp(scale * view), Painter(stride, fewer), scale, view)
    cells = int(view / stride + 0.5) - fewer
    assert tuple(case.features.shape) == (1, 3, cells, cells)
    assert case.output_size == (scale * cells,) * 2 == tuple(case.edges.shape)
    # resizing to a multiple of the stride and shrinking to the view disturb the borders of a ramp a little
    exact = 0.2 if view % stride or fewer else 1e-5
    for grid, cells_off in ((case.features, 0.2), (case.target, exact)):
        torch.testing.assert_close(grid, ramp(grid.shape[-1]), atol=cells_off / grid.shape[-1], rtol=0)


def test_each_crop_is_encoded_by_itself_and_put_in_its_place():
    image = torch.rand(1, 3, 24, 24)
    seen = []

    class Watching(Painter):
        def features(self, image, layer):
            seen.append(image.shape)
            return super().features(image, layer) + image.mean((2, 3), keepdim=True)  # what else the crop holds

    case = fidelity_case(image, Watching(4), scale=3, view=8, crops=SIDE_BY_SIDE)
    assert seen == [(1, 3, 8, 8), (5, 3, 8, 8), (4, 3, 8, 8)]  # the image; the fields of a chessboard
    for i in range(3):
        for j in range(3):
            crop = image[..., 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            expected = F.avg_pool2d(crop, 4) + crop.mean((2, 3), keepdim=True)
            torch.testing.assert_close(case.target[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2], expected)
    torch.testing.assert_close(case.image, image)


def test_many_crops_are_those_of_few():
    image = torch.rand(1, 3, 40, 40)
    # 81 crops of which 25 lie side by side, more than are encoded at once
    case = fidelity_case(image, Painter(4), scale=5, view=8, crops=CropSettings(1))
    torch.testing.assert_close(case.target, F.avg_pool2d(image, 4))


def test_guidance_is_the_normalised_image_of_the_size_asked_for():
    image = torch.rand(1, 3, 32, 48)
    for guidance, side in ((None, 16), (32, 32), (8, 8)):
        case = fidelity_case(image, Painter(4), 2, 16, guidance)
        rgb = image[..., 8:40]
        if side != 32:
            rgb = F.interpolate(rgb, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        torch.testing.assert_close(case.guidance, (rgb - mean) / std)
    torch.testing.assert_close(fidelity_case(image[0], Painter(4), 2, 16, 8).guidance, case.guidance)


def test_squeezenet_with_fewer_rows_and_a_network_that_shifts():
    for name in ("squeezenet", "mobilenetv2_tf"):
        backbone = core.load_backbone(name, "random")
        case = fidelity_case(torch.rand(3, 128, 130), backbone, 2, 64)
        cells = 3 if name == "squeezenet" else 4
        assert case.features.shape[-2:] == (cells, cells)
        assert case.output_size == (2 * cells, 2 * cells)
        ceiling, _ = CEILINGS["encoder"](case, backbone)
        assert ceiling.shape == case.target.shape
        own = backbone(case.image)
        assert own.shape[-1] == (7 if name == "squeezenet" else 8)
        if name != "squeezenet":
            torch.testing.assert_close(ceiling, own)


def test_whole_images_are_resampled_onto_the_grid_without_a_shift():
    resampled = whole_image(Painter(4), ramp(60), (10, 10))  # from 15 x 15
    torch.testing.assert_close(resampled[..., 1:-1, 1:-1], ramp(10)[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 7])
def test_measures_are_those_of_a_slow_loop(channels):
    target, ours = torch.randn(1, channels, 5, 6) + 1, torch.randn(1, channels, 5, 6)
    edges = torch.rand(5, 6) < 0.4
    t, u = target[0].double().numpy(), ours[0].double().numpy()
    mean = [t[c].mean() for c in range(channels)]
    variance = sum((t[c, i, j] - mean[c]) ** 2 for c in range(channels) for i in range(5) for j in range(6)) / 30
    cosines, errors = np.zeros((5, 6)), np.zeros((5, 6))
    for i in range(5):
        for j in range(6):
            dot = sum(t[c, i, j] * u[c, i, j] for c in range(channels))
            lengths = math.sqrt(sum(t[:, i, j] ** 2)) * math.sqrt(sum(u[:, i, j] ** 2))
            cosines[i, j] = dot / lengths
            errors[i, j] = sum((t[c, i, j] - u[c, i, j]) ** 2 for c in range(channels)) / variance
    near = edges.numpy()
    assert closeness(ours, case_of(target, edges)) == pytest.approx(
        {
            "cosine": cosines.mean(),
            "error": errors.mean(),
            "edge_cosine": cosines[near].mean(),
            "edge_error": errors[near].mean(),
        },
        rel=1e-12,
    )


def test_the_target_itself_is_perfect_and_its_mean_has_error_one():
    target = torch.randn(1, 9, 6, 6)
    edges = torch.eye(6, dtype=torch.bool)
    perfect = closeness(target.clone(), case_of(target, edges))
    assert perfect == pytest.approx({"cosine": 1, "error": 0, "edge_cosine": 1, "edge_error": 0}, abs=1e-12)
    mean = target.mean((2, 3), keepdim=True).expand_as(target)
    assert closeness(mean, case_of(target))["error"] == pytest.approx(1, rel=1e-5)
    halved = closeness(target / 2, case_of(target))
    assert halved["cosine"] == pytest.approx(1)
    assert halved["error"] > 0.1


def test_vectors_without_direction():
    target = torch.ones(1, 2, 2, 2)
    target[..., 0, 0] = 0  # no direction to agree with
    ours = target.clone()
    assert closeness(ours, case_of(target))["cosine"] == pytest.approx(1)
    ours[..., 1, 1] = 0
    assert closeness(ours, case_of(target))["cosine"] == pytest.approx(2 / 3)


def test_only_images_with_edges_have_edge_measures():
    target = torch.randn(1, 4, 3, 3)
    assert set(closeness(target, case_of(target))) == {"cosine", "error"}
    assert not image_edges(torch.full((1, 3, 64, 64), 0.5), (8, 8)).any()


def test_edges_are_found_where_the_image_changes():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 24:] = 1  # between cells 5 and 6 of 16
    edges = image_edges(image, (16, 16))
    columns = edges.float().mean(0)
    assert (columns[4:8].sum() >= 2) & (columns[5:7] == 1).any()
    assert not edges[:, :3].any()
    assert not edges[:, 9:].any()
    wider = image_edges(image, (16, 16), within=3)
    assert (wider | edges).equal(wider)
    assert wider.sum() >= edges.sum() + 4 * 14
    colour = torch.rand(1, 3, 64, 64) * 0.02
    colour[:, 0, 32:] += 0.6  # a horizontal edge
    rows = image_edges(colour, (8, 16)).float().mean(1)  # of a grid that is not square
    assert rows[3:5].max() > 0.9
    assert rows[[0, 7]].max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    target = torch.randn(1, 4, 3, 3)
    ours = target.clone()
    ours[0, 1, 2, 0] = value
    with pytest.raises(FidelityError, match="1 of 36 values of the upsampled features are not finite"):
        closeness(ours, case_of(target))

    class Broken(Painter):
        def features(self, image, layer):
            return super().features(image, layer) * value

    with pytest.raises(FidelityError, match="backbone painter: the features of the image are not finite"):
        fidelity_case(torch.rand(1, 3, 16, 16), Broken(), 2, 8)


def test_sizes_that_do_not_fit_are_refused():
    image = torch.rand(1, 3, 16, 16)
    for wrong in ({"scale": 1}, {"view": 0}, {"guidance": 17}, {"guidance": 0}):
        with pytest.raises(ValueError, match="fidelity needs scale >= 2"):
            fidelity_case(image, Painter(), **{"scale": 2, "view": 8} | wrong)
    with pytest.raises(ValueError, match="one image"):
        fidelity_case(image.expand(2, -1, -1, -1), Painter(), 2, 8)
    with pytest.raises(FidelityError, match="is the image blank"):
        fidelity_case(torch.full((1, 3, 16, 16), 0.5), Painter(), 2, 8)
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 5\), the target is \(1, 3, 4, 4\)"):
        closeness(torch.rand(1, 3, 4, 5), case_of(torch.rand(1, 3, 4, 4)))


def test_no_gradient_is_kept():
    class Learned(Painter):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(()))

        def features(self, image, layer):
            return super().features(image, layer) * self.gain

    case = fidelity_case(torch.rand(1, 3, 16, 16), Learned(), 2, 8)
    assert not case.target.requires_grad
    assert not case.target.is_inference()  # training may go on with it


def neighbours(features, size, i, j, window=5):
    """(n,C) vectors around output (i,j), each once."""
    h, w = features.shape[-2:]
    y, x = (2 * i + 1) * h // (2 * size[0]), (2 * j + 1) * w // (2 * size[1])
    rows = range(max(0, y - window // 2), min(h, y + window // 2 + 1))
    columns = range(max(0, x - window // 2), min(w, x + window // 2 + 1))
    return np.array([features[0, :, m, n].double().numpy() for m in rows for n in columns])


def test_the_oracles_reach_the_optimum_that_scipy_finds():
    features, target = torch.randn(1, 6, 4, 3) + 0.4, torch.randn(1, 6, 6, 5)
    target[0, :, 0, 0] = -features.mean((0, 2, 3))  # away from all of them
    closest, nearest = oracle(features, target, "cosine"), oracle(features, target, "error")
    for i in range(6):
        for j in range(5):
            near, t = neighbours(features, (6, 5), i, j), target[0, :, i, j].double().numpy()
            weights, _ = nnls(near.T, t)
            cosine = lambda v, t=t: v @ t / np.linalg.norm(v) / np.linalg.norm(t)  # noqa: E731
            best = cosine(weights @ near) if weights.sum() > 1e-9 else max(map(cosine, near))
            assert cosine(closest[0, :, i, j].double().numpy()) == pytest.approx(best, abs=2e-4)
            start = np.full(len(near), 1 / len(near))
            solved = minimize(
                lambda w, near=near, t=t: ((w @ near - t) ** 2).sum(),
                start,
                jac=lambda w, near=near, t=t: 2 * near @ (w @ near - t),
                bounds=[(0, 1)] * len(near),
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-12},
            )
            error = ((nearest[0, :, i, j].double().numpy() - t) ** 2).sum()
            assert error == pytest.approx(solved.fun, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "joint_bilateral"])
def test_no_convex_peer_passes_the_oracles(name):
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9), (64, 64), mode="bicubic").clamp(0, 1)
    case = fidelity_case(image, core.load_backbone("hog8"), 2, 32)
    peer = fidelity(make_peer(name)(case.guidance, case.features, case.output_size), case)
    assert fidelity(*CEILINGS["oracle_cosine"](case, None))["cosine"] > peer["cosine"] + 1e-3
    assert fidelity(*CEILINGS["oracle_error"](case, None))["error"] < peer["error"] - 1e-3


def test_oracles_are_convex_combinations_and_find_the_target_among_them():
    features = torch.rand(1, 8, 6, 6)
    shifted = features.roll((1, -2), (2, 3))[..., 2:-2, 2:-2]  # within the window of the cells in the middle
    target = torch.zeros(1, 8, 6, 6) + features.mean((2, 3), keepdim=True)
    target[..., 2:-2, 2:-2] = shifted
    for goal in ("cosine", "error"):
        found = oracle(features, target, goal, num_steps=2000)
        torch.testing.assert_close(found[..., 2:-2, 2:-2], shifted, atol=2e-2, rtol=0)
        ones = oracle(torch.cat([features, torch.ones(1, 1, 6, 6)], 1), torch.cat([target, target[:, :1]], 1), goal)
        torch.testing.assert_close(ones[:, -1], torch.ones(1, 6, 6))
        assert (ones[:, :-1] >= 0).all()


def test_oracles_refuse():
    features = torch.rand(1, 3, 4, 4)
    with pytest.raises(ValueError, match="one of cosine, error, got 'best'"):
        oracle(features, features, "best")
    with pytest.raises(ValueError, match=r"\(1,C,h,w\) and \(1,C,Qh,Qw\)"):
        oracle(features, torch.rand(1, 4, 4, 4))
    with pytest.raises(ValueError, match="odd"):
        oracle(features, features, window=4)
