"""A linear head in front of the attention gives what it gives behind it, and is refused where it would not."""

import pytest
import torch
from torch import Tensor, nn

import core
from core import AnyUp, Context, Decoder, points
from core.streams import named_stream
from experiments.measuring.bench import Bench, EncodedImage, Sizes
from experiments.measuring.heads import HEADS, at_positions, enlarged
from experiments.measuring.readout import at_pixels, raw_outputs
from experiments.measuring.upsamplers import Blurred, MeanOf
from experiments.peers import peer_from_config
from experiments.peers.interpolation import Bilinear

SMALL = ["embed_dim=16", "unifier.num_basis=8"]


def inputs(channels: int = 7, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator).to(dtype)  # noqa: E731
    return draw(3, 14, 19), draw(channels, 4, 5)


@pytest.mark.parametrize(
    "overrides", [[], ["attention=global"], ["attention=pyramid_window"], ["unifier.ordering=released"]], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_head_on_the_output(perturbed, overrides, bias):
    model = perturbed(core.build([*SMALL, *overrides])).double().eval()
    image, features = inputs(dtype=torch.float64)
    head = nn.Conv2d(7, 3, 1, bias=bias).double()
    with torch.no_grad():
        expected = head(model(image, features, (11, 9)))
        torch.testing.assert_close(model.readout(image, features, head, (11, 9)), expected, rtol=1e-10, atol=1e-12)
        linear = nn.Linear(7, 3, bias=bias).double()
        linear.weight.copy_(head.weight.flatten(1))
        if bias:
            linear.bias.copy_(head.bias)
        for same in (linear, (head.weight.flatten(1), head.bias)):
            torch.testing.assert_close(model.readout(image, features, same, (11, 9)), expected, rtol=1e-10, atol=1e-12)


def test_gradients_reach_the_head_and_the_model():
    model, (image, features) = core.build(SMALL).double(), inputs(dtype=torch.float64)
    grads = []
    for call in (lambda head: head(model(image, features, (6, 8))),
                 lambda head: model.readout(image, features, head, (6, 8))):  # fmt: skip
        torch.manual_seed(1)
        head = nn.Conv2d(7, 3, 1).double()
        weights = [head.weight, head.bias, model.attention.project_query.weight, model.unifier.encoder[0].basis]
        grads.append(torch.autograd.grad(call(head).square().sum(), weights))
    for there, here in zip(*grads, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-12)


def test_full_features_are_never_made(largest_tensor):
    model, (image, features) = core.build(SMALL).eval(), inputs(channels=512, batch=1)
    with torch.no_grad(), largest_tensor() as largest:
        model.readout(image, features, nn.Linear(512, 2), (40, 50))
    assert largest.values < 40 * 50 * 512 / 3


class Curved(Decoder):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output: Tensor, context: Context) -> Tensor:
        return output.relu()


@pytest.mark.parametrize(
    ("fillers", "head", "error", "message"),
    [
        ({"decoder": Curved}, nn.Linear(7, 2), ValueError, r"decoder=Curved is not linear .* or use decoder=none"),
        ({}, nn.Linear(6, 2), ValueError, r"head has weight \(2, 6\), but features have 7 channels"),
        ({}, nn.Conv2d(7, 2, 3), ValueError, r"head must be linear in each pixel"),
        ({}, nn.Conv2d(7, 2, 1, stride=2), ValueError, r"head must be linear in each pixel"),
        ({}, nn.Conv2d(7, 2, 1, padding=1), ValueError, r"head must be linear in each pixel"),
        ({}, (torch.zeros(2, 7), torch.zeros(3)), ValueError, r"head has bias \(3,\) for 2 outputs"),
        ({}, nn.Sequential(nn.Linear(7, 2)), TypeError, r"head must be nn.Linear, nn.Conv2d of 1x1.*got Sequential"),
    ],
)
def test_what_would_not_be_exact_is_refused(fillers, head, error, message):
    with pytest.raises(error, match=message):
        AnyUp(**fillers, embed_dim=16).readout(*inputs(), head)


def test_only_the_cells_around_points_are_convolved():
    """The same as convolving the whole grid, in the corners too, and with gradients."""
    grid, weight = inputs(5)[1].double(), torch.randn(6, 5, 3, 3, dtype=torch.float64)
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.0], [0.999, 0.2]])
    coords = torch.cat([corners, torch.rand(20, 2)]).double()
    weight.requires_grad_()
    grads = []
    for found in (
        points.sample(nn.functional.conv2d(grid, weight, padding=1), coords),
        points.sample_convolved(grid, weight, coords),
    ):
        grads.append((found.detach(), *torch.autograd.grad(found.square().sum(), weight)))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("overrides", [[], ["attention=global"], ["unifier.ordering=released"]], ids=str)
def test_few_points_are_what_all_points_are(perturbed, monkeypatch, overrides):
    model = perturbed(core.build([*SMALL, *overrides])).double().eval()
    image, features = inputs(dtype=torch.float64)
    with torch.no_grad():
        grid = model(image, features, (12, 16))
        coords = points.pixel_centres((12, 16), features)[[0, 3, 11], [0, 9, 15]].double()
        monkeypatch.setattr(core.attention, "FEW_POINTS", 8)
        few = model.query(image, features, coords, (12, 16))
        monkeypatch.setattr(core.attention, "FEW_POINTS", 10**9)
        all_of_them = model.query(image, features, coords, (12, 16))
    torch.testing.assert_close(few, all_of_them, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(few, grid[:, :, [0, 3, 11], [0, 9, 15]], rtol=1e-5, atol=1e-6)  # coords are float32


@pytest.mark.parametrize("output", [(24, 32), (12, 16)])
def test_probes_need_no_full_features_of_any_arm(output, monkeypatch):
    """Heads and drawn pixels give what they give on upsampled features, of AnyUp, peers and their means."""
    case = EncodedImage("a", torch.rand(1, 3, 24, 32).half(), (torch.randn(1, 9, 3, 4).half(),))
    sizes = Sizes((24, 32), (24, 32), (24, 32), output)
    where = Bench(None, None, None, sizes, None, 2, torch.device("cpu"))
    anyup, bilateral = core.build(SMALL).eval(), peer_from_config("joint_bilateral")
    models = [Bilinear(), anyup, bilateral, MeanOf([anyup, bilateral, Bilinear()]), Blurred(anyup, 0.4)]
    with named_stream(0, "heads"):
        heads = [HEADS["linear"].make([9], outputs, 0) for outputs in (2, 3)]
    positions = torch.tensor([[0, 0], [23, 31], [7, 12], [11, 30]])
    expected = []
    for model in models:
        (features,) = where.upsample(model, [case])
        at = at_positions(features, positions, sizes.image)
        expected.append(([enlarged(head([features]), output) for head in heads], at))
    if output == sizes.image:
        models.pop()
        expected.pop()
        monkeypatch.setattr(core.AnyUp, "forward", None)  # it is not called
    for model, (raw, at) in zip(models, expected, strict=True):
        for found, true in zip(raw_outputs(model, case, heads, where), raw, strict=True):
            torch.testing.assert_close(enlarged(found, output), true, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(at_pixels(model, case, positions, where), at, rtol=1e-4, atol=1e-5)
