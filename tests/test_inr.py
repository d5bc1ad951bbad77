"""The implicit decoder, and queries at arbitrary points, with it and without."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import core
from core import AnyUp, Attention, Context, Refiner, Temporal, build, points
from core.attention import GlobalAttention
from core.fast.windows import window_bounds
from core.points import nearest_cells, pixel_centres, sample, visible_keys
from extensions import inr
from extensions.inr import INRDecoder

WIDTH = 16
SMALL = {"hidden_dim": 8, "num_units": 3, "num_frequencies": 2}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def make(seed: int = 0, **settings) -> INRDecoder:
    """With an open gate and every weight off its initial value, float64."""
    torch.manual_seed(seed)
    decoder = INRDecoder(WIDTH, **(SMALL | settings)).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def given(channels: int = 5, grid=(3, 4), image=(9, 14), size=(7, 6), batch: int = 2) -> dict[str, Tensor]:
    return {
        "output": noise(batch, channels, *size),
        "features": noise(batch, channels, *grid, seed=1),
        "guidance": noise(batch, WIDTH, *image, seed=2),
        "coords": pixel_centres(size, like=torch.empty(0, dtype=torch.float64)),
    }


def decode(decoder: INRDecoder, output: Tensor, features: Tensor, guidance: Tensor, coords: Tensor) -> Tensor:
    return decoder(output, Context(image=guidance[:, :3], features=features, coords=coords, guidance=guidance))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item() / expected.abs().max().clamp(min=1e-3).item()
    assert error <= tolerance, f"off by {error:.1e} of the largest value"
    return True


# --- the definition, point by point and channel by channel -----------------------------------------------------------


def loop_sample(grid: Tensor, row: float, column: float) -> Tensor:
    """(D,h,w) at a point in pixels (centres at whole numbers): bilinear, constant beyond the outermost centres."""
    total = torch.zeros(len(grid), dtype=torch.float64)
    for i in (math.floor(row), math.floor(row) + 1):
        for j in (math.floor(column), math.floor(column) + 1):
            inside = grid[:, min(max(i, 0), grid.shape[1] - 1), min(max(j, 0), grid.shape[2] - 1)]
            total += (1 - abs(row - i)) * (1 - abs(column - j)) * inside
    return total


def loop_unit(x: Tensor) -> Tensor:
    return x / (x.square().mean() + torch.finfo(torch.float64).eps).sqrt()


def loop_channel(features: Tensor) -> tuple[float, float]:
    """Mean and deviation of one channel (h,w)."""
    return features.mean(), (features.var(correction=0) + 1e-8 * features.square().mean()).sqrt()


def loop_decoder(decoder: INRDecoder, output: Tensor, features: Tensor, guidance: Tensor, coords: Tensor) -> Tensor:
    """One image: (C,Qh,Qw), (C,h,w), (D,H,W), (Qh,Qw,2) -> (C,Qh,Qw)."""
    channels, height, width = features.shape
    result = output.clone()
    for at in np.ndindex(*output.shape[1:]):
        y, x = coords[at].tolist()
        own = decoder.project_point(loop_unit(loop_sample(guidance, *in_pixels(y, x, guidance))))
        row, column = y * height - 0.5, x * width - 0.5
        of_channels = [loop_channel(channel) for channel in features]
        seen = torch.stack([(v - mean) / unit for v, (mean, unit) in zip(output[:, *at], of_channels, strict=True)])
        before = torch.zeros(channels, decoder.num_units, dtype=torch.float64)  # of the nonlinearity
        last, blend = torch.zeros(decoder.num_units, dtype=torch.float64), 0.0
        for i in (math.floor(row), math.floor(row) + 1):
            for j in (math.floor(column), math.floor(column) + 1):
                weight = (1 - abs(row - i)) * (1 - abs(column - j))
                cell = min(max(i, 0), height - 1), min(max(j, 0), width - 1)
                context, known = loop_context(decoder, seen, features, guidance, own, (row, column), cell)
                of_cell, of_own, bias, of_last = decoder.head(context).split([2 * len(last)] + 3 * [len(last)])
                for c in range(channels):
                    before[c] += weight * (of_cell.view(-1, 2) @ known[c] + of_own * seen[c] + bias)
                last += weight * of_last
                blend += weight * (context @ decoder.gate).item()
        for c in range(channels):
            result[c, *at] += math.tanh(blend) * of_channels[c][1] * (last @ before[c].clamp(min=0))
    return result


def in_pixels(y: float, x: float, grid: Tensor) -> tuple[float, float]:
    return y * grid.shape[1] - 0.5, x * grid.shape[2] - 0.5


def loop_context(decoder, seen, features, guidance, own, position, cell) -> tuple[Tensor, Tensor]:
    """What is known of one point and one cell: (H,) context, (C,2) normalised value and mean around the cell."""
    _, height, width = features.shape
    known = []
    for channel in features:
        mean, unit = loop_channel(channel)
        around = channel[max(cell[0] - 1, 0) : cell[0] + 2, max(cell[1] - 1, 0) : cell[1] + 2]
        known.append(torch.stack([channel[cell] - mean, around.mean() - mean]) / unit)
    known = torch.stack(known)
    value, smooth = known.unbind(1)
    pairs = (seen, seen), (seen, value), (seen, smooth), (value, value), (value, smooth), (smooth, smooth)
    agree = torch.stack([(a * b).mean() for a, b in pairs])
    averaged = torch.zeros(len(guidance), dtype=torch.float64)
    for a in range(4):
        for b in range(4):
            inner = (cell[0] + (a + 0.5) / 4) / height, (cell[1] + (b + 0.5) / 4) / width
            averaged += loop_sample(guidance, *in_pixels(*inner, guidance)) / 16
    offset = torch.tensor([position[0] - cell[0], position[1] - cell[1]], dtype=torch.float64)
    angle = 2 * math.pi * (offset @ decoder.freqs)
    pixels = torch.tensor(
        [math.log2(guidance.shape[1] / height), math.log2(guidance.shape[2] / width)], dtype=torch.float64
    )
    context = own + decoder.project_cell(loop_unit(averaged))
    context = context + decoder.project_offset(torch.cat([angle.cos(), angle.sin(), pixels]))
    context = context + decoder.project_products(agree / (1 + agree.abs()))
    return decoder.hidden(context), known


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"grid": (2, 2), "image": (5, 4), "size": (2, 9)},
        {"channels": 1, "grid": (5, 3), "image": (3, 11), "size": (3, 2)},
    ],
    ids=str,
)
@torch.no_grad()
def test_decoder_is_its_definition(sizes):
    decoder, arguments = make(), given(**sizes)
    actual = decode(decoder, **arguments)
    for i in range(2):
        alone = {name: tensor if name == "coords" else tensor[i] for name, tensor in arguments.items()}
        assert close(actual[i], loop_decoder(decoder, **alone), 1e-6)  # coordinates are float32
    assert (actual - arguments["output"]).abs().max() > 0.05, "the decoder does nothing here"


# --- neutral at the start --------------------------------------------------------------------------------------------


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return noise(batch, 3, 20, 26).float(), noise(batch, 6, 4, 5).float()


@pytest.mark.parametrize("size", [None, (9, 11)])
def test_closed_it_is_the_baseline_bit_for_bit(size):
    baseline, variant = (build(["embed_dim=16", "unifier.num_basis=8", *more]) for more in ([], ["decoder=inr"]))
    own = {name for name in variant.state_dict() if name.startswith("decoder.")}
    assert own
    for name, tensor in baseline.state_dict().items():
        assert torch.equal(variant.state_dict()[name], tensor), f"decoder=inr changes the initial {name}"
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(variant(*inputs(), size), baseline(*inputs(), size))


def test_a_closed_gate_opens():
    """Its gradient is not zero, and after one step everything else has one too."""
    decoder = INRDecoder(WIDTH).double()
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (decode(decoder, **given()) * noise(2, 5, 7, 6, seed=9)).sum().backward()
        for name, parameter in decoder.named_parameters():
            assert (parameter.grad.abs().max() > 0) == (name == "gate" or step > 0), (name, step)
        optimizer.step()


def test_learns_what_no_weighted_mean_can_give():
    """Twice as far from the channel's mean as the explicit output is: outside the hull of all features."""
    torch.manual_seed(0)
    decoder, arguments = INRDecoder(WIDTH, **SMALL).double(), given(batch=1)
    mean = arguments["features"].mean((2, 3), keepdim=True)
    arguments["output"] = F.interpolate(arguments["features"], (7, 6), mode="bilinear")
    target = mean + 2 * (arguments["output"] - mean)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.03)
    before = (arguments["output"] - target).square().mean()
    for _ in range(150):
        loss = (decode(decoder, **arguments) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * before
    assert decode(decoder, **arguments).max() > 1.05 * arguments["features"].max()


# --- what it follows, and where it is continuous ---------------------------------------------------------------------


@torch.no_grad()
def test_follows_scale_and_shift_of_the_features():
    decoder, arguments = make(), given()
    expected = decode(decoder, **arguments)
    scale = noise(1, 5, 1, 1).exp()
    for factor, shift in ((scale, 0), (1e-3, 0), (1, 3.0), (scale, 5.0)):
        changed = {name: factor * arguments[name] + shift for name in ("output", "features")}
        assert close(decode(decoder, **(arguments | changed)), factor * expected + shift, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_channels_that_are_constant_stay_so(dtype):
    """Dead channels are common in convolutional encoders: nothing is divided by their zero deviation."""
    arguments = {name: tensor.to(dtype) for name, tensor in given(batch=1).items()}
    for name in ("output", "features"):
        arguments[name][:, 0], arguments[name][:, 1] = 0, 2
    result = decode(make().to(dtype), **arguments)
    assert torch.isfinite(result).all()
    assert (result[:, 0] == 0).all()
    assert close(result[:, 1], arguments["output"][:, 1], 1e-2)


@torch.no_grad()
def test_continuous_where_the_nearest_cells_change():
    decoder, arguments = make(), given(batch=1)
    centre, step = 1.5 / 3, 1e-9
    places = torch.tensor([[[centre - step, 0.4], [centre + step, 0.4], [centre + 0.02, 0.4]]], dtype=torch.float64)
    output = arguments["output"][:, :, :1, :1].expand(-1, -1, 1, 3)
    before, after, further = decode(decoder, **(arguments | {"output": output, "coords": places}))[0, :, 0].unbind(1)
    assert close(after, before, 1e-6)
    assert (further - before).abs().max() > 1e-3


@torch.no_grad()
def test_guidance_and_place_matter():
    decoder, arguments = make(), given()
    result = decode(decoder, **arguments)
    for name, other in (("guidance", arguments["guidance"].flip(-1)), ("coords", arguments["coords"] * 0.9)):
        assert (decode(decoder, **(arguments | {name: other})) - result).abs().max() > 1e-3, name


# --- blocks, memory, other modes -------------------------------------------------------------------------------------


def test_blocks_change_nothing(monkeypatch):
    decoder, arguments = make(), given()
    whole, weight = decode(decoder, **arguments), noise(2, 5, 7, 6, seed=9)
    expected = torch.autograd.grad((whole * weight).sum(), list(decoder.parameters()))
    for limit, several in ((1, 1), (2 * 4 * 32, 8)):  # one point, four points at once
        monkeypatch.setattr(inr, "MAX_HIDDEN", {"cpu": limit})
        monkeypatch.setattr(inr, "MAX_POINTS", several)
        result = decode(decoder, **arguments)
        assert close(result, whole)
        for ours, theirs in zip(
            torch.autograd.grad((result * weight).sum(), list(decoder.parameters())), expected, strict=True
        ):
            assert close(ours, theirs, 1e-9)
        with torch.no_grad():
            assert close(decode(decoder, **arguments), whole)


def large(channels: int = 64, side: int = 32) -> dict[str, Tensor]:
    arguments = {name: tensor.float() for name, tensor in given(channels, size=(side, side), batch=1).items()}
    arguments["output"] = arguments["output"].contiguous(memory_format=torch.channels_last)
    return arguments


def test_the_hidden_layer_never_exists_at_once(monkeypatch, largest_tensor):
    """It would be 3 times the output, and what is gathered 8 times; nothing is larger than the output itself."""
    monkeypatch.setattr(inr, "MAX_HIDDEN", {"cpu": 2**14})
    decoder, arguments = make().float(), large()
    with torch.no_grad(), largest_tensor() as largest:
        decode(decoder, **arguments)
    assert largest.values == arguments["output"].numel()
    with torch.no_grad(), largest_tensor() as largest:
        decode(decoder, **large(channels=1))
    assert largest.values <= 2**16, "the context of a block"  # 4 x hidden_dim values a point


def test_with_gradients_blocks_keep_their_inputs_alone(monkeypatch):
    monkeypatch.setattr(inr, "MAX_HIDDEN", {"cpu": 2**14})
    decoder, arguments = make().float(), large()
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decode(decoder, **(arguments | {"output": arguments["output"].requires_grad_()}))
    assert sum(kept.values()) < 2 * arguments["output"].numel()


def test_differentiates_twice():
    decoder, arguments = make(), given()
    (first,) = torch.autograd.grad(decode(decoder, **arguments).square().sum(), decoder.gate, create_graph=True)
    first.square().sum().backward()
    assert decoder.head.weight.grad.abs().max() > 0
    assert torch.isfinite(decoder.head.weight.grad).all()


def test_half_precision_by_autocast():
    decoder, arguments = make().float(), {name: tensor.float() for name, tensor in given().items()}
    expected = decode(decoder, **arguments)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            assert close(decode(decoder, **arguments), expected, 0.05)


def test_coordinates_are_not_rounded_to_half_precision():
    assert pixel_centres((224, 1), like=torch.empty(0, dtype=torch.bfloat16)).dtype == torch.float32
    assert pixel_centres((224, 1), like=torch.empty(0, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("others", [[], ["attention=global"]], ids=str)
def test_exports(perturbed, others):
    model = perturbed(build(["embed_dim=16", "unifier=none", "decoder=inr", "decoder.hidden_dim=8", *others])).eval()
    image, features = inputs()
    with torch.no_grad():
        expected = model(image, features, (9, 11))
        program = torch.export.export(model, (image, features, (9, 11))).module()
        assert close(program(image, features, (9, 11)), expected, 1e-5)


# --- pictures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pictures_show_the_blending_weight():
    decoder, arguments = make(), given()
    assert decoder.pictures() == {}
    moved = decode(decoder, **arguments) - arguments["output"]
    pictures = decoder.pictures()
    plain, relative = pictures.values()
    assert next(iter(pictures)) == "blend"
    assert plain.shape == relative.shape == (3, 7, 6)
    assert 0 < plain.max() < 1
    assert plain.min() >= 0
    assert relative.max() == 1
    decoder.gate.mul_(1e-4)  # small weights: as the gate does, so the correction and the picture
    less = decode(decoder, **arguments) - arguments["output"]
    ratio = less[0].abs().amax(0) / moved[0].abs().amax(0)  # by pixel
    assert close(decoder.pictures()["blend"][0] / plain[0], ratio, 1e-4)


@torch.no_grad()
def test_pictures_of_large_outputs_are_small_and_a_closed_gate_is_black():
    decoder = INRDecoder(WIDTH, **SMALL)
    decode(decoder, **{name: tensor.float() for name, tensor in given(1, size=(300, 270), batch=1).items()})
    pictures = decoder.pictures()
    assert all(picture.shape == (3, 256, 256) and not picture.any() for picture in pictures.values())


# --- points anywhere -------------------------------------------------------------------------------------------------


class PlainAttention(GlobalAttention):
    """An attention that knows nothing of points."""

    at = Attention.at


MODELS = {
    "baseline": {},
    "narrow window": {"attention": partial(core.attention.WindowAttention, window_ratio=0.2, num_heads=2)},
    "global": {"attention": GlobalAttention},
    "no points of its own": {"attention": PlainAttention},
    "inr": {"decoder": partial(INRDecoder, **SMALL)},
}


@pytest.fixture
def model_of(perturbed):
    def make_model(fillers: dict) -> AnyUp:
        return perturbed(AnyUp(**fillers, embed_dim=WIDTH)).eval()

    return make_model


@pytest.mark.parametrize("fillers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", [None, (9, 11), (25, 7)])
@torch.no_grad()
def test_at_pixel_centres_a_query_is_the_forward(model_of, fillers, size):
    model, (image, features) = model_of(fillers), inputs()
    expected = model(image, features, size).flatten(2)  # (B,C,Q)
    centres = pixel_centres(size or (20, 26), like=image).flatten(0, 1)
    assert close(model.query(image, features, centres, size), expected, 1e-5)
    order = torch.randperm(len(centres))[:17]
    assert close(model.query(image, features, centres[order], size), expected[..., order], 1e-5)


@pytest.mark.parametrize("fillers", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_each_image_may_have_its_own_points(model_of, fillers):
    model, (image, features) = model_of(fillers), inputs()
    coords = noise(2, 13, 2).sigmoid().float()
    together = model.query(image, features, coords)
    assert together.shape == (2, 6, 13)
    for i in range(2):
        assert close(together[i], model.query(image, features, coords[i])[i], 1e-5)


def turned(side: int, degrees: float, zoom: float) -> Tensor:
    """(side²,2): a square grid about the image's centre, rotated and scaled."""
    angle = math.radians(degrees)
    rotation = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return 0.5 + zoom * (pixel_centres((side, side), like=rotation).flatten(0, 1) - 0.5) @ rotation


@pytest.mark.parametrize(
    "fillers", [MODELS["baseline"], MODELS["global"], MODELS["inr"]], ids=["window", "global", "inr"]
)
@torch.no_grad()
def test_a_rotated_crop_of_something_smooth_is_the_output_resampled(model_of, fillers):
    """On a fine grid of a smooth image, interpolating the output and looking from the points themselves agree.

    (But for points within a pixel of where their window changes: attention itself is not continuous there.)
    """
    rows, columns = pixel_centres((96, 96), like=torch.empty(0)).unbind(-1)
    image = torch.stack([(3 * rows).sin(), (2 * columns).cos(), rows * columns])[None]
    coarse = F.adaptive_avg_pool2d(torch.cat([image, image.square()], 1), (6, 6))
    model, coords = model_of(fillers), turned(17, 30, 0.55)
    output = model(image, coarse)
    resampled = F.grid_sample(output, 2 * coords.flip(-1)[None, None] - 1, align_corners=False)[:, :, 0]
    asked = model.query(image, coarse, coords)
    assert (asked - resampled).abs().mean() < 0.03 * output.std()
    spread = (asked - asked.mean(-1, keepdim=True)).abs().mean()
    assert spread > 20 * (asked - resampled).abs().mean(), "the crop shows nothing"


@pytest.mark.parametrize("ratio", [0.1, 0.26, 0.5, 0, -1])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 3), (7, 4), (32, 16), (15, 37)])
def test_a_point_sees_what_a_pixel_there_sees(num_queries, num_keys, ratio):
    first, last = window_bounds(num_queries, num_keys, ratio)
    centres = pixel_centres((num_queries, 1), like=torch.empty(0, dtype=torch.float64))[:, 0, 0]
    keys, visible = visible_keys(centres, num_keys, ratio)
    for i in range(num_queries):
        assert keys[i][visible[i]].tolist() == list(range(first[i], last[i]))


@torch.no_grad()
def test_the_window_is_around_the_point_itself(model_of):
    """Just before and just after the edge of a cell comes into reach, between two pixel centres."""
    model, (image, features) = model_of({}), inputs()  # half-width 0.1, 4 cells of 0.25
    far = features.clone()
    far[:, :, 2:] += 100  # seen from 0.4 on
    touched = [
        (model.attention.at(*seen_from(model, image, features, far), torch.tensor([[y, 0.5]]))).max()
        for y in (0.399, 0.401)
    ]
    assert touched[0] < 10 < touched[1] + 10
    assert touched[1] > 1.2 * touched[0]


def seen_from(model, image, features, values):
    _, query, key = model._guide(image, features, (20, 26), core.fast.norm_act_conv.Buffers())
    return query, key, values


@torch.no_grad()
def test_points_in_blocks(model_of, monkeypatch, largest_tensor):
    model, (image, features), coords = model_of({}), inputs(), noise(40, 2).sigmoid().float()
    expected = model.query(image, features, coords)
    monkeypatch.setattr(points, "MAX_GATHERED", {"cpu": 1000})
    assert close(model.query(image, features, coords), expected, 1e-6)
    with largest_tensor() as largest:
        points.attend(noise(1, 400, 8), noise(1, 20, 20, 8), noise(1, 20, 20, 8), noise(400, 2).sigmoid(), 0.1, 2)
    assert largest.values <= max(400 * 25, 400 * 8), "more than indices and the result"


@pytest.mark.parametrize("fillers", MODELS.values(), ids=MODELS)
def test_queries_train_the_model(model_of, fillers, monkeypatch):
    """As the forward at the same pixels does; in blocks, too."""
    model, (image, features) = model_of(fillers), inputs()
    centres, weight = pixel_centres((9, 11), like=image).flatten(0, 1), noise(2, 6, 99).float()
    (model(image, features, (9, 11)).flatten(2) * weight).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for limit in (2**20, 5000):
        monkeypatch.setattr(points, "MAX_GATHERED", {"cpu": limit})
        model.zero_grad()
        (model.query(image, features, centres, (9, 11)) * weight).sum().backward()
        for name, parameter in model.named_parameters():
            assert close(parameter.grad, expected[name], 1e-3), name


def test_nearest_cells_by_hand():
    near, weights, offsets = nearest_cells(torch.tensor([[0.5, 0.3], [0.0, 1.0]]), (2, 5))
    assert near[0].tolist() == [1, 2, 6, 7]
    assert torch.allclose(weights[0], torch.tensor([0.5, 0, 0.5, 0]), atol=1e-6)
    assert torch.allclose(offsets[0, 0], torch.tensor([0.5, 0.0]), atol=1e-6)
    assert near.tolist()[1] == [4, 4, 4, 4]
    assert torch.allclose(weights.sum(1), torch.ones(2))
    assert torch.allclose(
        sample(torch.arange(10.0).view(1, 1, 2, 5), torch.tensor([[0.5, 0.3]])), torch.tensor([[[3.5]]])
    )


# --- refusals --------------------------------------------------------------------------------------------------------

COORDS = torch.rand(7, 2)


@pytest.mark.parametrize(
    ("coords", "error", "message"),
    [
        (torch.tensor([[0.2, 0.3], [0.5, 1.25]]), ValueError, r"coords must lie in the image.*1 of 2 .*\(0.5, 1.25\)"),
        (torch.tensor([[-0.1, 0.3]]), ValueError, r"from 0 to 1 .*\(row, column\) = \(-0.1, 0.3\)"),
        (torch.tensor([[0.1, float("nan")]]), ValueError, "coords must lie in the image"),
        (torch.tensor([[3, 4]]), ValueError, r"floating point in the unit square, got torch.int64.*\(i \+ 0.5\)"),
        (COORDS.T, ValueError, r"\(points, 2\) or \(batch, points, 2\) .*got \(2, 7\)"),
        (COORDS[0], ValueError, r"got \(2,\)"),
        (COORDS[:0], ValueError, r"coords is empty: \(0, 2\)"),
        (
            COORDS.expand(3, -1, -1),
            ValueError,
            r"coords must be the same batch as features, got .* features of 2 images",
        ),
        (COORDS.to("meta"), ValueError, "coords is on meta but features is on cpu"),
        (COORDS.numpy(), TypeError, "coords must be a torch tensor, got ndarray"),
    ],
)
def test_points_that_are_none(coords, error, message):
    with pytest.raises(error, match=message):
        AnyUp(embed_dim=WIDTH).query(*inputs(), coords)


def test_the_border_is_inside():
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    with torch.no_grad():
        assert torch.isfinite(AnyUp(embed_dim=WIDTH).query(*inputs(), corners)).all()


class WholeRefiner(Refiner):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output, context):
        return output


class WholeTemporal(Temporal):
    def __init__(self, embed_dim: int):
        super().__init__()

    def forward(self, output, context, state):
        return output, state


@pytest.mark.parametrize("filler", [WholeRefiner, WholeTemporal])
def test_fillers_that_need_the_whole_output_are_named(filler):
    model = AnyUp(**{filler.hook: filler}, embed_dim=WIDTH)
    with pytest.raises(
        ValueError, match=f"{filler.hook}={filler.__name__} needs .* single points; .* {filler.hook}=none"
    ):
        model.query(*inputs(), COORDS)


def test_an_attention_that_answers_wrongly_is_named():
    class Wrong(GlobalAttention):
        def at(self, query, key, value, coords):
            return value

    with pytest.raises(ValueError, match=r"attention Wrong must return shape \(2, 6, 7\)"):
        AnyUp(attention=Wrong, embed_dim=WIDTH).query(*inputs(), COORDS)


@pytest.mark.parametrize("name", ["hidden_dim", "num_units", "num_frequencies"])
@pytest.mark.parametrize("number", [0, -2])
def test_nothing_to_decode_with(name, number):
    with pytest.raises(ValueError, match=f"decoder=inr: {name} must be at least 1, got {number}; decoder=none"):
        build(["decoder=inr", f"decoder.{name}={number}"])


@pytest.mark.parametrize("ratio", [1e-9])
def test_a_window_that_sees_nothing(ratio):
    with pytest.raises(ValueError, match="window_ratio=1e-09 leaves a point without a key"):
        visible_keys(torch.tensor([0.5]), 16, ratio)


# --- sizes of the idea -----------------------------------------------------------------------------------------------


def test_it_is_light_and_the_same_for_any_number_of_channels():
    added = sum(parameter.numel() for parameter in INRDecoder(128).parameters())
    assert added < 0.05 * sum(parameter.numel() for parameter in AnyUp().parameters())
    decoder = make()
    for channels, larger in pairwise((1, 7, 40)):
        assert decode(decoder, **given(channels)).shape[1] == channels
        assert decode(decoder, **given(larger)).shape[1] == larger
