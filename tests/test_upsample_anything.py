"""Upsample Anything: weights by their definition in float64, and what the fit to an image does."""

import math

import pytest
import torch
from torch.nn import functional as F

from experiments.peers import peer_from_config, upsample_anything
from experiments.peers.upsample_anything import Scene, filtered, fitted, initial_kernels
from experiments.settings import SettingError


def slow_output(fine, grid, kernels, values, radius):
    """Each output pixel by the paper's equations. `kernels` (h,w,4): log sigmas of x and y, raw angle, log sigma_r."""
    (height, width), (h, w) = fine.shape[1:], grid
    coarse = F.interpolate(fine[None], grid, mode="bilinear", antialias=True)[0]
    widest = F.interpolate(kernels[..., :2].exp().amax(-1)[None, None], (height, width), mode="bilinear")[0, 0]
    output = torch.zeros(len(values), height, width, dtype=fine.dtype)
    for i in range(height):
        for j in range(width):
            reach = min(max(math.ceil(2 * widest[i, j]), 1), radius)
            row, column = (
                min(max(round((p + 0.5) * n / q - 0.5), 0), n - 1) for p, n, q in ((i, h, height), (j, w, width))
            )
            logits, cells = [], []
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if dy**2 + dx**2 > reach**2:
                        continue
                    m, n = min(max(row + dy, 0), h - 1), min(max(column + dx, 0), w - 1)
                    sx, sy, sr = (kernels[m, n, k].exp() for k in (0, 1, 3))
                    angle = math.pi * kernels[m, n, 2].tanh()
                    y, x = i - ((m + 0.5) * height / h - 0.5), j - ((n + 0.5) * width / w - 0.5)
                    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
                    colour = (fine[:, i, j] - coarse[:, m, n]).square().sum()
                    logits.append(-(along**2) / (2 * sx**2) - across**2 / (2 * sy**2) - colour / (2 * sr**2))
                    cells.append(values[:, m, n])
            output[:, i, j] = torch.stack(cells, 1) @ torch.stack(logits).softmax(0)
    return output


@pytest.mark.parametrize(
    ("size", "grid", "radius"), [((9, 14), (3, 4), 2), ((8, 12), (4, 3), 3), ((3, 5), (4, 4), 1)], ids=str
)
def test_outputs_are_their_definition(size, grid, radius):
    """Ratios that are not whole, different along the axes, and below 1; kernels that reach 1, 2 or 3 cells."""
    fine, values = torch.rand(3, *size).double(), torch.randn(5, *grid).double()
    kernels = torch.randn(*grid, 4).double() + torch.tensor([0.0, 0.3, 0.2, -1.5])
    scene = Scene(fine, grid, radius)
    ours = filtered(scene, kernels.flatten(0, 1), values)
    torch.testing.assert_close(ours, slow_output(fine, grid, kernels, values, radius), atol=1e-10, rtol=0)


def test_the_first_kernels_are_those_of_the_paper():
    scene = Scene(torch.rand(3, 8, 8), (2, 2), 8)
    torch.testing.assert_close(initial_kernels(scene)[3], torch.tensor([16.0, 16.0, 1.0, 0.12]).log())
    assert len(scene.square) == 197  # the disc of radius 8


def picture():
    """A slanted edge between two colours, with a little texture."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(30.0), indexing="ij")
    edge = (x + 0.4 * y > 17).float()
    return torch.stack([0.2 + 0.6 * edge, 0.7 - 0.3 * edge, 0.5 + 0.1 * (x / 3).sin()])


def made_of_small(scene, kernels):
    return filtered(scene, kernels, scene.small.T.unflatten(1, scene.grid))


def test_the_fit_makes_the_image_out_of_its_small_one():
    scene = Scene(picture(), (3, 5), 4)
    errors = [(made_of_small(scene, fitted(scene, n)) - picture()).abs().mean().item() for n in (0, 5, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.7 * errors[0]
    blurred = F.interpolate(scene.small.T.unflatten(1, scene.grid)[None], (24, 30), mode="bilinear")[0]
    assert errors[2] < 0.5 * (blurred - picture()).abs().mean()


def test_the_fit_is_adam_on_the_mean_error_of_all_pixels():
    """In float64, with a ratio that is not whole, so that cells have different numbers of pixels."""
    fine = picture().double()[:, :13, :16]
    scene = Scene(fine, (2, 3), 2)
    kernels = initial_kernels(scene).requires_grad_()
    optimizer = torch.optim.Adam([kernels])
    for n in range(3):
        optimizer.param_groups[0]["lr"] = 0.1 * 1e-8 ** (n / 5100)
        optimizer.zero_grad()
        (made_of_small(scene, kernels) - fine).abs().mean().backward()
        optimizer.step()
    torch.testing.assert_close(fitted(scene, 3), kernels.detach(), atol=1e-7, rtol=0)
    assert (kernels.detach() - initial_kernels(scene))[:, [0, 1, 3]].abs().min() > 0.01


def test_bands_change_nothing(monkeypatch):
    image, features = torch.randn(1, 3, 20, 26), torch.randn(1, 3, 4, 5)
    peer = peer_from_config({"peer": "upsample_anything", "num_steps": 3, "radius": 2})
    whole = peer(image, features)
    monkeypatch.setattr(upsample_anything, "_AT_ONCE", 500)  # one or two cells
    scene = Scene(torch.rand(3, 20, 26), (4, 5), 2)
    assert len(list(scene.bands())) > 5
    torch.testing.assert_close(peer(image, features), whole, atol=1e-4, rtol=0)


def test_edges_of_the_image_become_edges_of_the_features():
    image = torch.zeros(1, 3, 32, 32)
    image[..., 13:] = 1.5  # within a cell
    features = torch.zeros(1, 1, 4, 4)
    features[..., 1] = 3 / 8  # the share of the bright side in its cell
    features[..., 2:] = 1
    output = peer_from_config("upsample_anything")(image, features)[0, 0]
    assert (output[:, :12] < 0.2).all()
    assert (output[:, 14:] > 0.8).all()


def test_settings_that_it_cannot_have():
    for wrong in ({"num_steps": -1}, {"radius": 0}):
        with pytest.raises(SettingError, match="upsample_anything needs steps from 0 and a radius from 1, got num_st"):
            peer_from_config({"peer": "upsample_anything", **wrong})
